// One head of a (batch, n, heads * head_dim) tensor: how the attention kernels load and store it.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../common/bulk_copy.cuh"
#include "../common/fragments.cuh"
#include "../common/math.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"

namespace crate_kernels {

inline constexpr int kTile = 64;     // rows of a wgmma
inline constexpr int kFewRows = 16;  // of a last tile whose rows are the columns of products

template <int kHeadDim>
inline constexpr int kChunks = (kHeadDim + kChunkColumns - 1) / kChunkColumns;

// ---- host

// Tiles of `rows` rows and 64 columns of a head; columns past head_dim and rows past n are zero.
inline CUtensorMap head_map(const void* data, Dtype dtype, int batch, int n, int heads,
                            int head_dim, int64_t stride_batch, int64_t stride_row, int rows) {
    if (batch == 1) stride_batch = n * stride_row;  // never used, but checked
    return make_tensor_map<4>(data, dtype, {head_dim, heads, n, batch},
                              {head_dim, stride_row, stride_batch}, {kChunkColumns, 1, rows, 1});
}

// Rows of a head of n <= 256 kept on chip: whole tiles, but for a last one of at most 16 rows. The
// last row tile as A of a product may reach past them: rows of no account.
inline int rows_on_chip(int n) {
    int whole = n / kTile * kTile, rest = n - whole;
    return rest == 0 ? whole : rest <= 16 ? whole + 16 : whole + kTile;
}

// Calls run(T(), std::integral_constant<int, head_dim>()).
template <typename Run>
void dispatch(Dtype dtype, int head_dim, Run&& run) {
    auto with_dtype = [&](auto head_dim_constant) {
        if (dtype == Dtype::kBFloat16) {
            run(__nv_bfloat16(), head_dim_constant);
        } else if (dtype == Dtype::kFloat16) {
            run(__half(), head_dim_constant);
        } else {
            throw std::invalid_argument("attention: expected dtype float16 or bfloat16");
        }
    };
    switch (head_dim) {
        case 48:
            return with_dtype(std::integral_constant<int, 48>());
        case 64:
            return with_dtype(std::integral_constant<int, 64>());
        case 80:
            return with_dtype(std::integral_constant<int, 80>());
        case 128:
            return with_dtype(std::integral_constant<int, 128>());
    }
    throw std::invalid_argument("attention: expected head_dim 48, 64, 80 or 128, got " +
                                std::to_string(head_dim));
}

// ---- device

// What to do while products run, where there is nothing to do.
struct Nothing {
    __device__ __forceinline__ void operator()() const {}
};

// Dynamic shared memory from its first multiple of 1024 bytes on.
__device__ __forceinline__ char* swizzle_aligned(char* shared) {
    return shared + (-shared_address(shared) & (kSwizzleAtomBytes - 1));
}

// A thread's place in its warpgroup's accumulators (wgmma.cuh).
struct Lane {
    int row;   // of 64, and row + 8
    int pair;  // columns 8 j + 2 pair, and the next
    __device__ __forceinline__ Lane()
        : row(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4), pair(threadIdx.x % 4) {}
};

// [kChunks][rows][64] from `row` on, `rows` as the map has it; one thread calls it.
template <int kHeadDim, typename T>
__device__ __forceinline__ void load_rows(T* to, int rows, const CUtensorMap* map, Barrier* barrier,
                                          int head, int row, int batch) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
        load_tile(to + chunk * rows * kChunkColumns, map, barrier, chunk * kChunkColumns, head, row,
                  batch);
    }
}

// A whole head into the L2 cache, for the block that will own it; one thread calls it.
template <int kHeadDim>
__device__ __forceinline__ void prefetch_head(const CUtensorMap* map, int index, int heads) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
        prefetch_tile(map, chunk * kChunkColumns, index % heads, 0, index / heads);
    }
}

// Where a thread's rows of four matrices lie in a [16][64] tile that gets a [64][16] one
// transposed: rows are the columns of D, columns 16 warp + 8 h its rows.
__device__ __forceinline__ uint32_t transposed_matrices(const void* tile) {
    int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
    int column = threadIdx.x / 32 % 4 * 2 + lane / 8 % 2;
    return shared_address(tile) + row * 128 + (column ^ row % 8) * 16;
}

// D[64 of head_dim, 16] += A^T B for a chunk of rows, of which `steps` times 16 count; B is
// [16][64], as transposed_matrices has it.
template <typename T>
__device__ __forceinline__ void add_swapped(float (&d)[kFewRows / 2], const T* rows, const T* b,
                                            int steps, bool add) {
    for (int k = 0; k < steps; ++k) {
        wgmma<kFewRows, T>::template from_shared<kYes, kNo>(
            d, descriptor_transposed(rows, kTile * kChunkColumns * sizeof(T)) + 128 * k,
            descriptor(b) + 2 * k, add || k > 0);
    }
}

// A row's place in units of a descriptor.
inline constexpr int kRowStep = kChunkColumns * 2 / 16;

// Rows of a tile in shared memory as an operand whose sum runs along head_dim.
struct RowsOperand {
    uint32_t base;   // the low word of the first descriptor
    int chunk_step;  // between chunks, in units of the descriptor

    __device__ __forceinline__ RowsOperand(uint32_t base, int rows_of_chunk)
        : base(base), chunk_step(rows_of_chunk * kRowStep) {}
    __device__ __forceinline__ RowsOperand(const void* tile, int rows_of_chunk)
        : RowsOperand(low_word(tile), rows_of_chunk) {}
    __device__ __forceinline__ uint64_t step(int k) const {
        return descriptor_of(base + (k / 4) * chunk_step + (k % 4) * 2);
    }
    // The low word of the same rows where the sum runs along them.
    __device__ __forceinline__ uint32_t transposed() const {
        return (base & 0xFFFF) | uint32_t(chunk_step) << 16;
    }
};

// D[64, N] = A B^T, for A of 64 rows and B of N, both head_dim wide.
template <typename T, int kHeadDim, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N / 2], const RowsOperand& a,
                                              const RowsOperand& b) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
        wgmma<N, T>::from_shared(d, a.step(k), b.step(k), k > 0);
    }
}

// D[64, kHeadDim] += A B, for A [64, kColumns] in registers and B as many rows of a tile, of which
// `low_word` is that of descriptor_transposed.
template <typename T, int kHeadDim, int kColumns, int kRegisters>
__device__ __forceinline__ void add_product(float (&d)[kHeadDim / 2],
                                            const uint32_t (&a)[kRegisters], uint32_t low_word) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
        wgmma<kHeadDim, T>::template from_registers<kYes>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2],
                                                          a[4 * k + 3],
                                                          descriptor_of(low_word + 128 * k), true);
    }
    wgmma_commit();
}

// One warp's 16 rows of an accumulator, the first 8 times `scale_0`, the rest times `scale_1`, to
// global memory from `row` on. `staging` is the warp's own, [kChunks][16][64].
template <int kHeadDim, typename T>
__device__ __forceinline__ void store_rows(const float (&d)[kHeadDim / 2], float scale_0,
                                           float scale_1, T* staging, const CUtensorMap* map,
                                           int head, int row, int batch) {
    int lane = threadIdx.x % 32;
    if (lane == 0) wait_stores_read<0>();  // of the tile before
    __syncwarp();
    uint32_t rows = shared_address(staging) + lane % 16 * 128;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
        const float* of = d + 8 * k;
        uint32_t packed[4] = {
            pack<T>(of[0] * scale_0, of[1] * scale_0), pack<T>(of[2] * scale_1, of[3] * scale_1),
            pack<T>(of[4] * scale_0, of[5] * scale_0), pack<T>(of[6] * scale_1, of[7] * scale_1)};
        int column = (k % 4 * 2 + lane / 16) ^ lane % 8;  // in eights
        store_matrices(rows + k / 4 * (16 * 128) + column * 16, packed);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
            store_tile(map, staging + chunk * 16 * kChunkColumns, chunk * kChunkColumns, head, row,
                       batch);
        }
        commit_stores();
    }
}

}  // namespace crate_kernels
