// g = dy where the mask says so, dx = g + g G^T.
#include "launch.cuh"
#include "launchers.h"

namespace crate_kernels {
namespace {

// [128, 64] of g for a block, eight elements at a time.
template <typename In, typename T>
__global__ void mask_kernel(const In* dy, const uint32_t* mask, T* g, int64_t rows, int d) {
    const uint32_t* words = mask + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * kMaskWords;
    for (int i = threadIdx.x; i < kBlockM * 8; i += blockDim.x) {
        int r = i / 8, j = i % 8;
        int64_t row = int64_t(blockIdx.x) * kBlockM + r;
        int column = blockIdx.y * kBlockK + j * 8;
        if (row >= rows || column >= d) continue;
        const In* from = dy + row * d + column;
        uint4 eight;
        if constexpr (sizeof(In) == 4) {
            float4 a = reinterpret_cast<const float4*>(from)[0];
            float4 b = reinterpret_cast<const float4*>(from)[1];
            eight = {pack<T>(a.x, a.y), pack<T>(a.z, a.w), pack<T>(b.x, b.y), pack<T>(b.z, b.w)};
        } else {
            eight = *reinterpret_cast<const uint4*>(from);
        }
        int thread = r % 64 / 16 * 32 + r % 8 * 4;  // the first of four that share the row
        uint4 four = *reinterpret_cast<const uint4*>(words + r / 64 * 128 + thread);
        auto masked = [&](uint32_t two, uint32_t word) {
            return two &
                   (r / 8 % 2 ? mask_from_high_bytes(word << j) : mask_from_low_bytes(word << j));
        };
        *reinterpret_cast<uint4*>(g + row * d + column) = {
            masked(eight.x, four.x), masked(eight.y, four.y), masked(eight.z, four.z),
            masked(eight.w, four.w)};
    }
}

template <typename T>
void launch_mask(const IstaBackward& args, cudaStream_t stream) {
    dim3 grid(ceil_div(args.rows, kBlockM), ceil_div(args.d, kBlockK));
    T* g = static_cast<T*>(args.g);
    const uint32_t* mask = static_cast<const uint32_t*>(args.mask);
    if (args.x_dtype == Dtype::kFloat32) {
        mask_kernel<<<grid, 256, 0, stream>>>(static_cast<const float*>(args.dy), mask, g,
                                              args.rows, args.d);
    } else {
        mask_kernel<<<grid, 256, 0, stream>>>(static_cast<const T*>(args.dy), mask, g, args.rows,
                                              args.d);
    }
    check(cudaGetLastError(), "mask_kernel");
}

}  // namespace

void ista_backward(const IstaBackward& args, cudaStream_t stream) {
    check_ista("ista_backward", args.rows, args.d, args.dtype, args.x_dtype);
    if (!args.mask && (args.g || !args.dx || args.x_dtype != args.dtype)) {
        throw std::invalid_argument("ista_backward: expected a mask, or dx alone and one dtype");
    }
    // Masking on the way takes the longer, the fewer columns there are to multiply by.
    int step_cost = args.mask && args.x_dtype == args.dtype ? 170 : 12;
    ista_backward(args, choose_plan(args.rows, args.d, args.d, 1, step_cost, multiprocessors()),
                  stream);
}

void ista_backward(const IstaBackward& args, const GemmPlan& plan, cudaStream_t stream) {
    // The products take g in dtype: made on the way from dy of the same, before from another.
    bool separate = args.x_dtype != args.dtype || args.dx == nullptr;
    if (separate) {
        if (args.dtype == Dtype::kFloat16) {
            launch_mask<__half>(args, stream);
        } else {
            launch_mask<__nv_bfloat16>(args, stream);
        }
    }
    if (args.dx == nullptr) return;
    GemmOperands operands{.a = separate ? args.g : args.dy,
                          .b = args.gram,
                          .c = args.dy,
                          .out = args.dx,
                          .g = args.g,
                          .mask = static_cast<uint32_t*>(const_cast<void*>(args.mask)),
                          .m = args.rows,
                          .n = args.d,
                          .k = args.d,
                          .dtype = args.dtype,
                          .out_dtype = args.x_dtype};
    if (args.mask) {
        launch_gemm<Product::kBackward>(operands, plan, stream);
    } else {
        launch_gemm<Product::kPlain>(operands, plan, stream);
    }
}

}  // namespace crate_kernels
