// M = x^T g: partial sums over parts of the tokens, then those summed in order.
#include "launch.cuh"
#include "launchers.h"

namespace crate_kernels {
namespace {

constexpr int kTile = 32;
constexpr int kAtOnce = 8;  // partial sums loaded before the first of them is added

// Starts here, not where the numbers are needed.
__device__ __forceinline__ float4 load_four_now(const float* from) {
    float4 v;
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ void add_four(float4& sum, float4 v) {
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
}

__device__ __forceinline__ void store_four(float* to, float4 v) {
    *reinterpret_cast<float4*>(to) = v;
}

__device__ __forceinline__ void store_four(__nv_bfloat16* to, float4 v) {
    *reinterpret_cast<uint2*>(to) = {pack<__nv_bfloat16>(v.x, v.y), pack<__nv_bfloat16>(v.z, v.w)};
}

// A block sums tile (i, j) and its mirror image (j, i), i <= j: m, and both = m + m^T.
template <typename Both>
__global__ void __launch_bounds__(256)
    sum_partials_kernel(const float* partials, int parts, float* m, Both* both, int d) {
    let_next_kernel_start();
    wait_for_kernel_before();
    int tiles = ceil_div(d, kTile), tile_i = blockIdx.x / tiles, tile_j = blockIdx.x % tiles;
    if (tile_j < tile_i) return;
    __shared__ float sums[2][kTile][kTile + 1];
    int row = threadIdx.x / 8, column = threadIdx.x % 8 * 4;
    int64_t at[2];
    bool inside[2];
    float4 sum[2] = {};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        int i = (side ? tile_j : tile_i) * kTile + row;
        int j = (side ? tile_i : tile_j) * kTile + column;
        inside[side] = i < d && j < d;
        at[side] = inside[side] ? int64_t(i) * d + j : 0;
    }
    for (int first = 0; first < parts; first += kAtOnce) {
        float4 terms[kAtOnce][2];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            if (first + k < parts) {
                const float* partial = partials + int64_t(first + k) * d * d;
                terms[k][0] = load_four_now(partial + at[0]);
                terms[k][1] = load_four_now(partial + at[1]);
            }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            if (first + k < parts) {
                add_four(sum[0], terms[k][0]);
                add_four(sum[1], terms[k][1]);
            }
        }
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        float* to = &sums[side][row][column];
        to[0] = sum[side].x;
        to[1] = sum[side].y;
        to[2] = sum[side].z;
        to[3] = sum[side].w;
    }
    __syncthreads();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        if (!inside[side]) continue;
        auto mirrored = [&](int i) { return sums[side ^ 1][column + i][row]; };
        store_four(m + at[side], sum[side]);
        store_four(both + at[side], {sum[side].x + mirrored(0), sum[side].y + mirrored(1),
                                     sum[side].z + mirrored(2), sum[side].w + mirrored(3)});
    }
}

template <typename Both>
void launch_sum(const IstaWeight& args, int parts, cudaStream_t stream) {
    int tiles = ceil_div(args.d, kTile);
    launch_early(sum_partials_kernel<Both>, tiles * tiles, 256, 0, stream, args.partials, parts,
                 args.m, static_cast<Both*>(args.both), args.d);
}

GemmPlan plan_of(int64_t rows, int d) { return choose_plan(d, d, rows, 32, 12, multiprocessors()); }

}  // namespace

int ista_weight_parts(int64_t rows, int d) { return plan_of(rows, d).parts; }

void ista_weight(const IstaWeight& args, cudaStream_t stream) {
    check_ista("ista_weight", args.rows, args.d, args.dtype, args.dtype);
    ista_weight(args, plan_of(args.rows, args.d), stream);
}

void ista_weight(const IstaWeight& args, const GemmPlan& plan, cudaStream_t stream) {
    GemmOperands operands{.a = args.x,
                          .b = args.g,
                          .out = args.partials,
                          .m = args.d,
                          .n = args.d,
                          .k = args.rows,
                          .dtype = args.dtype,
                          .out_dtype = Dtype::kFloat32};
    launch_gemm<Product::kWeight>(operands, plan, stream);
    if (args.dtype == Dtype::kFloat16) {
        launch_sum<float>(args, plan.parts, stream);
    } else {
        launch_sum<__nv_bfloat16>(args, plan.parts, stream);
    }
}

}  // namespace crate_kernels
