// What the two forward kernels share: one row tile j of o, and what a tile i adds to it.
//
// Softmax needs no running maximum here. With one tensor as query and key a token's own score
// s_jj = |w_j|^2 is on the diagonal, p_ji = exp(scale (s_ji - s_jj)), and p_jj = 1 keeps the sum
// off zero. Scores beyond the own one make p grow, in the worst case beyond its dtype: the sum
// shows it, and the tile is done again with the row's largest score, found by a pass before, in
// place of the own. docs/mssa.md
#pragma once

#include "heads.cuh"

namespace crate_kernels {

template <typename T, int kHeadDim>
struct ForwardTile {
    // Up to here no p is too large for T, and no o for float32.
    static constexpr float kSafeSum = std::is_same_v<T, __half> ? 0x1p15f : 0x1p60f;

    float o[kHeadDim / 2];
    float reference_0, reference_1;  // the row's own score times scale log2(e); searched: largest
    float sum_0, sum_1;
    RowsOperand queries;
    Lane lane;
    float scale_log2;
    bool searched = false;

    __device__ __forceinline__ ForwardTile(const T* w_j, int rows_of_chunk, float scale)
        : queries(w_j, rows_of_chunk), scale_log2(scale * kLog2E) {}

    // Scores of the tile's rows with the first kColumns rows of tile i.
    template <int kColumns>
    __device__ __forceinline__ void score(float (&s)[kColumns / 2], const T* w_i,
                                          int rows_of_chunk) {
        wgmma_fence();
        multiply_rows<T, kHeadDim, kColumns>(s, queries, RowsOperand(w_i, rows_of_chunk));
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(s);
    }
    // -inf where there is no row i (tile i begins at first_i), or, `causal` where tile i is tile j,
    // where it comes later.
    template <int kColumns>
    __device__ __forceinline__ void mask(float (&s)[kColumns / 2], int first_i, int n,
                                         bool causal) {
        if (first_i + kColumns > n || causal) {
#pragma unroll
            for (int r = 0; r < kColumns / 2; ++r) {
                int column = r / 4 * 8 + lane.pair * 2 + r % 2;
                int row = lane.row + r / 2 % 2 * 8;
                if (first_i + column >= n || (causal && column > row)) s[r] = -kInfinity;
            }
        }
    }

    // kColumns rows from first_i on. The first tile to visit is the tile itself; kOnly: and there
    // is no other.
    template <bool kFirst, int kColumns = kTile, bool kOnly = false>
    __device__ __forceinline__ void visit(const T* w_i, int rows_of_chunk, int first_i, int n,
                                          bool causal, bool any_row) {
        float s[kColumns / 2];
        uint32_t p[kColumns / 4];
        score<kColumns>(s, w_i, rows_of_chunk);
        if (kFirst && !searched) take_own_scores(s);
        mask<kColumns>(s, first_i, n, kFirst && causal);
        if (kFirst) {
            sum_0 = sum_1 = 0;
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0;
        }
        if (any_row) {
            exponentials<kColumns>(s, p);
            float whole_0 = row_sum(sum_0), whole_1 = row_sum(sum_1);
            if (kOnly && !__all_sync(0xFFFFFFFF, is_safe(whole_0) && is_safe(whole_1))) {
                begin_search();
                take_larger(s);
                end_search();
                sum_0 = sum_1 = 0;
                exponentials<kColumns>(s, p);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kColumns / 4; ++j) p[j] = 0;
        }
        uint32_t values = low_word_transposed(w_i, rows_of_chunk * kChunkColumns * sizeof(T));
        wgmma_fence();
        add_product<T, kHeadDim, kColumns>(o, p, values);
        wgmma_wait<0>();
        pin_registers(o);
        pin_registers(p);  // not to be written while the product reads them
    }

    // p of scores s, rounded, and their sums.
    template <int kColumns>
    __device__ __forceinline__ void exponentials(float (&s)[kColumns / 2],
                                                 uint32_t (&p)[kColumns / 4]) {
        // Of a searched tile the difference comes first: it is exact where the scores are so large
        // that their products with the scale are rounded to whole bits.
        float subtract_0 = searched ? 0 : reference_0, subtract_1 = searched ? 0 : reference_1;
        if (searched) {
#pragma unroll
            for (int r = 0; r < kColumns / 2; ++r) s[r] -= r % 4 < 2 ? reference_0 : reference_1;
        }
        float more_0 = 0, more_1 = 0;  // shorter chains of additions
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
            float p0 = exp2_approx(s[4 * j] * scale_log2 - subtract_0);
            float p1 = exp2_approx(s[4 * j + 1] * scale_log2 - subtract_0);
            float p2 = exp2_approx(s[4 * j + 2] * scale_log2 - subtract_1);
            float p3 = exp2_approx(s[4 * j + 3] * scale_log2 - subtract_1);
            sum_0 += p0;
            more_0 += p1;
            sum_1 += p2;
            more_1 += p3;
            p[2 * j] = pack<T>(p0, p1);
            p[2 * j + 1] = pack<T>(p2, p3);
        }
        sum_0 += more_0;
        sum_1 += more_1;
    }

    // Before the visits of a tile that is done again: every tile is searched for larger scores.
    __device__ __forceinline__ void begin_search() {
        searched = true;
        reference_0 = reference_1 = -kInfinity;
    }
    __device__ __forceinline__ void search(const T* w_i, int rows_of_chunk, int first_i, int n,
                                           bool causal) {
        float s[kTile / 2];
        score<kTile>(s, w_i, rows_of_chunk);
        mask<kTile>(s, first_i, n, causal);
        take_larger(s);
    }
    template <int kRegisters>
    __device__ __forceinline__ void take_larger(const float (&s)[kRegisters]) {
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) {
            float& largest = r % 4 < 2 ? reference_0 : reference_1;
            largest = fmaxf(largest, s[r]);
        }
    }
    __device__ __forceinline__ void end_search() {
        reference_0 = row_max(reference_0);
        reference_1 = row_max(reference_1);
    }

    // After the last visit. Whether the sums of this thread's rows, as far as they exist, can be
    // trusted; those of a searched tile can.
    __device__ __forceinline__ bool complete(int first, int n) {
        sum_0 = row_sum(sum_0);
        sum_1 = row_sum(sum_1);
        if (searched) {
            reference_0 *= scale_log2;
            reference_1 *= scale_log2;
            return true;
        }
        int row = first + lane.row;
        return (row >= n || is_trusted<0>(sum_0)) && (row + 8 >= n || is_trusted<1>(sum_1));
    }
    // p_jj is 1 but for the rounding of the reference: with less in the sum, what is small may have
    // been lost. NaN is not safe.
    static __device__ __forceinline__ bool is_safe(float sum) {
        return sum >= 0.5f && sum <= kSafeSum;
    }
    // Of rows lane.row + 8 kHalf.
    template <int kHalf>
    __device__ __forceinline__ bool is_trusted(float sum) {
        if (is_safe(sum)) return true;
        if (!std::is_same_v<T, __half> || !(sum > kSafeSum && sum < kInfinity)) return false;
        // Many p, or one too large for float16, which makes o infinite.
        float zero = 0;
#pragma unroll
        for (int r = 2 * kHalf; r < kHeadDim / 2; r += 4) zero += 0 * o[r] + 0 * o[r + 1];
        return zero == 0;
    }

    template <int kRegisters>
    __device__ __forceinline__ void take_own_scores(const float (&s)[kRegisters]) {
        // Row and column are the same in register 8 warp (rows 0 to 7 of the warp's 16) or
        // 8 warp + 6 (rows 8 to 15), plus row % 2, of the lane with pair row % 8 / 2.
        float own_0 = 0, own_1 = 0;
        bool odd = lane.row % 2;
#pragma unroll
        for (int warp = 0; warp < kRegisters / 8; ++warp) {
            if (threadIdx.x / 32 % 4 == warp) {
                own_0 = odd ? s[8 * warp + 1] : s[8 * warp];
                own_1 = odd ? s[8 * warp + 7] : s[8 * warp + 6];
            }
        }
        int owner = threadIdx.x % 32 / 4 * 4 + lane.row % 8 / 2;
        reference_0 = __shfl_sync(0xFFFFFFFF, own_0, owner) * scale_log2;
        reference_1 = __shfl_sync(0xFFFFFFFF, own_1, owner) * scale_log2;
    }

    // Rows `first` .. of o and lse to global memory; `staging` is the warpgroup's.
    __device__ __forceinline__ void store(T* staging, const CUtensorMap* o_map, float* lse,
                                          int head, int batch, int first, int n) {
        int warp = threadIdx.x / 32 % 4;
        if (first + warp * 16 >= n) return;
        store_rows<kHeadDim>(o, 1 / sum_0, 1 / sum_1,
                             staging + warp * (kChunks<kHeadDim> * 16 * kChunkColumns), o_map, head,
                             first + warp * 16, batch);
        if (lane.pair == 0) {
            int row = first + lane.row;
            if (row < n) lse[row] = (reference_0 + __log2f(sum_0)) / kLog2E;
            if (row + 8 < n) lse[row + 8] = (reference_1 + __log2f(sum_1)) / kLog2E;
        }
    }
};

}  // namespace crate_kernels
