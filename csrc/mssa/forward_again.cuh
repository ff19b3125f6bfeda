// Row tiles of o in which a row's own score was no reference for its softmax: done again with the
// row's largest score, which a pass before finds. Rare, and so by products of single warps: wgmma
// here would make the compiler wait after each of the others. docs/mssa.md
#pragma once

#include "forward_step.cuh"

namespace crate_kernels {

template <typename T, int kHeadDim>
struct SearchedTile : ForwardTile<T, kHeadDim> {
    static constexpr int kColumns = 16;  // at a time
    const T* w_j;
    int first_j, n, chunk_bytes;
    bool causal;

    __device__ __forceinline__ SearchedTile(const T* w_j, int rows_of_chunk, float scale,
                                            int first_j, int n, bool causal)
        : ForwardTile<T, kHeadDim>(w_j, rows_of_chunk, scale),
          w_j(w_j),
          first_j(first_j),
          n(n),
          chunk_bytes(rows_of_chunk * kChunkColumns * sizeof(T)),
          causal(causal) {
        this->reference_0 = this->reference_1 = -kInfinity;
        this->clear_output();
    }

    // First all row tiles are searched, or those up to tile j if causal; w_i begins at row first_i.
    __device__ __forceinline__ void search(const T* w_i, int first_i) {
        for (int row = 0; row < kTile && first_i + row < n; row += kColumns) {
            float s[kColumns / 2];
            score(s, w_i, row, first_i);
#pragma unroll
            for (int r = 0; r < kColumns / 2; ++r) {
                float& largest = r % 4 < 2 ? this->reference_0 : this->reference_1;
                largest = fmaxf(largest, s[r]);
            }
        }
    }
    __device__ __forceinline__ void end_search() {
        this->reference_0 = row_max(this->reference_0);
        this->reference_1 = row_max(this->reference_1);
    }

    // Then the same ones are visited.
    __device__ __forceinline__ void visit(const T* w_i, int first_i) {
        for (int row = 0; row < kTile && first_i + row < n; row += kColumns) {
            float s[kColumns / 2];
            score(s, w_i, row, first_i);
            // The difference comes first: it is exact where the scores are so large that their
            // products with the scale are rounded to whole bits.
#pragma unroll
            for (int r = 0; r < kColumns / 2; ++r) {
                s[r] -= r % 4 < 2 ? this->reference_0 : this->reference_1;
            }
            uint32_t p[kColumns / 4];
            this->exponentials(s, p, 0, 0);
            int lane = threadIdx.x % 32;
#pragma unroll
            for (int k = 0; k < kHeadDim / 16; ++k) {
                uint32_t b[4];
                load_matrices_transposed(b, address(w_i, row + lane % 16, 2 * k + lane / 16));
                multiply_by_warp<T>(this->o + 8 * k, p, b[0], b[1]);
                multiply_by_warp<T>(this->o + 8 * k + 4, p, b[2], b[3]);
            }
        }
    }
    __device__ __forceinline__ void end_visits() {
        this->sum_0 = row_sum(this->sum_0);
        this->sum_1 = row_sum(this->sum_1);
        this->reference_0 *= this->scale_log2;
        this->reference_1 *= this->scale_log2;
    }

    // Of 8 columns of a row of a tile.
    __device__ __forceinline__ uint32_t address(const T* tile, int row, int eight) const {
        return shared_address(tile) + eight / 8 * chunk_bytes + row * 128 +
               (eight % 8 ^ row % 8) * 16;
    }
    // With rows `row` .. `row` + 15 of tile i, masked.
    __device__ __forceinline__ void score(float (&s)[kColumns / 2], const T* w_i, int row,
                                          int first_i) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < kColumns / 2; ++r) s[r] = 0;
#pragma unroll 1
        for (int k = 0; k < kHeadDim / 16; ++k) {
            uint32_t a[4], b[4];
            load_matrices(a, address(w_j, this->lane.row / 16 * 16 + lane % 16, 2 * k + lane / 16));
            load_matrices(b, address(w_i, row + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            multiply_by_warp<T>(s, a, b[0], b[1]);
            multiply_by_warp<T>(s + 4, a, b[2], b[3]);
        }
        this->template mask<kColumns>(s, first_i + row, first_j, n, causal);
    }
};

}  // namespace crate_kernels
