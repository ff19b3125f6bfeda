// Tied-attention backward for n <= 64, causal or not.
//
// A block is one warpgroup and owns one head, all of whose scores are one tile: P and dS are
// computed once, row by row, and pass through shared memory to be read transposed. No O is needed:
// rowsum(dO * O) = rowsum(P * dP). docs/mssa.md
//
//     S = w w^T    dP = dO w^T    P = exp(scale S - lse)    dS = scale P (dP - rowsum(P dP))
//     dw = dS w + dS^T w + P^T dO
#include "../common/fragments.cuh"
#include "heads.cuh"
#include "launchers.h"

namespace crate_kernels {
namespace {

constexpr int kThreads = 128;

template <typename T, int kHeadDim>
struct ShortBackward {
    static constexpr int kTileElements = kChunks<kHeadDim> * kTile * kChunkColumns;
    static constexpr int kScoreElements = kTile * kTile;
    static constexpr int kSharedBytes =
        2 * (kTileElements + kScoreElements) * sizeof(T) + kSwizzleAtomBytes;
    static constexpr int kBlocks = kHeadDim <= 64 ? 5 : kHeadDim <= 80 ? 4 : 3;
};

// The packed registers of [64, 64] to shared memory, as an operand: rows of 64 with swizzle.
template <typename T>
__device__ __forceinline__ void store_operand(T* tile, const uint32_t (&packed)[kTile / 4]) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < kTile / 8; j += 2) {
        uint32_t four[4] = {packed[2 * j], packed[2 * j + 1], packed[2 * j + 2], packed[2 * j + 3]};
        store_matrices(shared_address(tile + row * kTile + ((j + lane / 16) ^ row % 8) * 8), four);
    }
}

// D[64, kHeadDim] += A^T B, for such an operand A and B of as many rows.
template <typename T, int kHeadDim>
__device__ __forceinline__ void add_transposed(float (&d)[kHeadDim / 2], const T* a, const T* b) {
    constexpr int kChunkBytes = kTile * kChunkColumns * sizeof(T);
    uint32_t rows = low_word_transposed(a, kChunkBytes),
             columns = low_word_transposed(b, kChunkBytes);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
        wgmma<kHeadDim, T>::template from_shared<kYes, kYes>(
            d, descriptor_of(rows + 128 * k), descriptor_of(columns + 128 * k), true);
    }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, ShortBackward<T, kHeadDim>::kBlocks)
    attention_backward_short(const __grid_constant__ CUtensorMap grad_o_map,
                             const __grid_constant__ CUtensorMap w_map,
                             const __grid_constant__ CUtensorMap grad_w_map, const float* lse,
                             int n, int heads, float scale, bool causal) {
    using Config = ShortBackward<T, kHeadDim>;

    // shared memory; that of w and dO is staging in the end
    extern __shared__ char shared[];
    __shared__ Barrier w_loaded, grad_o_loaded;
    T* w = reinterpret_cast<T*>(swizzle_aligned(shared));
    T* grad_o = w + Config::kTileElements;
    T* p_tile = grad_o + Config::kTileElements;
    T* ds_tile = p_tile + Config::kScoreElements;

    // load
    int head = blockIdx.x % heads, batch = blockIdx.x / heads;
    if (threadIdx.x == 0) {
        barrier_init(&w_loaded, 1);
        barrier_init(&grad_o_loaded, 1);
        barrier_init_done();
        barrier_expect(&w_loaded, Config::kTileElements * sizeof(T));
        load_rows<kHeadDim>(w, kTile, &w_map, &w_loaded, head, 0, batch);
        barrier_expect(&grad_o_loaded, Config::kTileElements * sizeof(T));
        load_rows<kHeadDim>(grad_o, kTile, &grad_o_map, &grad_o_loaded, head, 0, batch);
    }
    Lane lane;
    lse += (int64_t)blockIdx.x * n;
    // A row past the last: P is 0 there. A column past it: w and dP are.
    float lse_0 = lane.row < n ? __ldg(lse + lane.row) * kLog2E : kInfinity;
    float lse_1 = lane.row + 8 < n ? __ldg(lse + lane.row + 8) * kLog2E : kInfinity;
    __syncthreads();

    // S and dP
    float s[kTile / 2], dp[kTile / 2];
    RowsOperand w_rows(w, kTile), grad_o_rows(grad_o, kTile);
    barrier_wait(&w_loaded, 0);
    wgmma_fence();
    multiply_rows<T, kHeadDim, kTile>(s, w_rows, w_rows);
    wgmma_commit();
    barrier_wait(&grad_o_loaded, 0);
    wgmma_fence();
    multiply_rows<T, kHeadDim, kTile>(dp, grad_o_rows, w_rows);
    wgmma_commit();
    wgmma_wait<1>();
    pin_registers(s);

    // P, in place of S
    float scale_log2 = scale * kLog2E;
    uint32_t packed[kTile / 4];
#pragma unroll
    for (int r = 0; r < kTile / 2; r += 2) {
        float lse_j = r % 4 < 2 ? lse_0 : lse_1;
        s[r] = exp2_approx(s[r] * scale_log2 - lse_j);
        s[r + 1] = exp2_approx(s[r + 1] * scale_log2 - lse_j);
        if (causal) {
            int row = lane.row + r / 2 % 2 * 8, column = r / 4 * 8 + lane.pair * 2;
            if (column > row) s[r] = 0;
            if (column + 1 > row) s[r + 1] = 0;
        }
        packed[r / 2] = pack<T>(s[r], s[r + 1]);
    }
    store_operand(p_tile, packed);

    // dS
    wgmma_wait<0>();
    pin_registers(dp);
    float delta_0 = 0, delta_1 = 0;
#pragma unroll
    for (int r = 0; r < kTile / 2; ++r) (r % 4 < 2 ? delta_0 : delta_1) += s[r] * dp[r];
    delta_0 = row_sum(delta_0) * scale;
    delta_1 = row_sum(delta_1) * scale;
    uint32_t ds[kTile / 4];
#pragma unroll
    for (int r = 0; r < kTile / 2; r += 2) {
        float delta_j = r % 4 < 2 ? delta_0 : delta_1;
        ds[r / 2] =
            pack<T>(s[r] * (dp[r] * scale - delta_j), s[r + 1] * (dp[r + 1] * scale - delta_j));
    }
    store_operand(ds_tile, ds);
    fence_async_proxy();
    __syncthreads();

    // dw
    float dw[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dw[i] = 0;
    constexpr int kChunkBytes = kTile * kChunkColumns * sizeof(T);
    wgmma_fence();
    add_product<T, kHeadDim, kTile>(dw, ds, low_word_transposed(w, kChunkBytes));
    add_transposed<T, kHeadDim>(dw, ds_tile, w);
    add_transposed<T, kHeadDim>(dw, p_tile, grad_o);
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(dw);
    pin_registers(ds);

    __syncthreads();  // nobody reads w and dO any more
    int first = threadIdx.x / 32 * 16;
    if (first < n) {
        store_rows<kHeadDim>(dw, 1.f, 1.f, w + first * kChunks<kHeadDim> * kChunkColumns,
                             &grad_w_map, head, first, batch);
    }
    if (threadIdx.x % 32 == 0) wait_stores_read<0>();
}

}  // namespace

void attention_backward_short(const AttentionBackward& args, cudaStream_t stream) {
    dispatch(args.dtype, args.head_dim, [&](auto type, auto head_dim) {
        using T = decltype(type);
        constexpr int kHeadDim = decltype(head_dim)::value;
        using Config = ShortBackward<T, kHeadDim>;
        int64_t width = (int64_t)args.heads * args.head_dim;
        auto map = [&](const void* data, int64_t stride_batch, int64_t stride_row, int box_rows) {
            return head_map(data, args.dtype, args.batch, args.n, args.heads, args.head_dim,
                            stride_batch, stride_row, box_rows);
        };
        auto kernel = attention_backward_short<T, kHeadDim>;
        allow_shared_memory(kernel, Config::kSharedBytes);
        kernel<<<args.batch * args.heads, kThreads, Config::kSharedBytes, stream>>>(
            map(args.grad_o, args.grad_o_stride_batch, args.grad_o_stride_row, kTile),
            map(args.w, args.w_stride_batch, args.w_stride_row, kTile),
            map(args.grad_w, args.n * width, width, 16), args.lse, args.n, args.heads, args.scale,
            args.causal);
        check(cudaGetLastError(), "attention_backward_short");
    });
}

}  // namespace crate_kernels
