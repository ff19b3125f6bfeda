// What the two forward kernels share: one row tile j of o, and what a tile i adds to it.
//
// Softmax needs no running maximum here. With one tensor as query and key a token's own score
// s_jj = |w_j|^2 is on the diagonal, p_ji = exp(scale (s_ji - s_jj)), and p_jj = 1 keeps the sum
// off zero. Scores beyond the own one make p grow, in the worst case beyond its dtype: the sum
// shows it, and the tile is done again (forward_again.cuh). docs/mssa.md
#pragma once

#include "heads.cuh"

namespace crate_kernels {

template <typename T, int kHeadDim>
struct ForwardTile {
    // Up to here no p is too large for T, and no o for float32.
    static constexpr float kSafeSum = std::is_same_v<T, __half> ? 0x1p15f : 0x1p60f;

    float o[kHeadDim / 2];
    float reference_0, reference_1;  // of the row's softmax: its own score times scale log2(e)
    float sum_0, sum_1;
    RowsOperand queries;
    Lane lane;
    float scale_log2;
    // The product of the last visit's p with its rows is left to the next visit, which starts it
    // together with its scores.
    uint32_t p[kTile / 4];
    uint32_t values;

    __device__ __forceinline__ ForwardTile(const T* w_j, int rows_of_chunk, float scale)
        : sum_0(0),
          sum_1(0),
          queries(uniform(low_word(w_j)), rows_of_chunk),
          scale_log2(scale * kLog2E) {}

    // ---- visits

    // The tile itself, which is the first to visit; it begins at first_j.
    __device__ __forceinline__ void begin(int first_j, int n, bool causal) {
        float s[kTile / 2];
        wgmma_fence();
        multiply_rows<T, kHeadDim, kTile>(s, queries, queries);
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(s);
        take_own_scores(s);
        mask<kTile>(s, first_j, first_j, n, causal);
        exponentials(s, p, reference_0, reference_1);
        values = queries.transposed();
        clear_output();
    }
    // kColumns rows from first_i on, of tile i that has this low word; calls `meanwhile` while the
    // products run.
    template <int kColumns = kTile, typename Meanwhile = Nothing>
    __device__ __forceinline__ void visit(uint32_t word_i, int first_i, int n,
                                          Meanwhile&& meanwhile = {}) {
        float s[kColumns / 2];
        RowsOperand keys = queries;
        keys.base = word_i;
        wgmma_fence();
        multiply_rows<T, kHeadDim, kColumns>(s, queries, keys);
        wgmma_commit();
        add_product<T, kHeadDim, kTile>(o, p, values);
        meanwhile();
        wgmma_wait<1>();
        pin_registers(s);
        mask<kColumns>(s, first_i, 0, n, false);
        await_product();
        exponentials(s, p, reference_0, reference_1);
        values = keys.transposed();
    }
    // After the last visit, of kColumns rows.
    template <int kColumns = kTile>
    __device__ __forceinline__ void finish() {
        wgmma_fence();
        add_product<T, kHeadDim, kColumns>(o, p, values);
        await_product();
    }

    // ---- their parts

    __device__ __forceinline__ void clear_output() {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0;
        pin_registers(o);  // zero before a product starts
    }
    __device__ __forceinline__ void await_product() {
        wgmma_wait<0>();
        pin_registers(o);
        pin_registers(p);  // not to be written while the product reads them
    }

    // -inf where there is no row i (the kColumns begin at first_i), or, `causal`, where it comes
    // later than row j (the tile begins at first_j).
    template <int kColumns>
    __device__ __forceinline__ void mask(float (&s)[kColumns / 2], int first_i, int first_j, int n,
                                         bool causal) {
        if (first_i + kColumns > n || causal) {
            // Of each row, columns 8 (r / 4) + r % 2 from `limit` on.
            int first = first_i + 2 * lane.pair, j = first_j + lane.row;
            int limit_0 = (causal ? min(n, j + 1) : n) - first;
            int limit_1 = (causal ? min(n, j + 9) : n) - first;
#pragma unroll
            for (int r = 0; r < kColumns / 2; ++r) {
                if (r / 4 * 8 + r % 2 >= (r % 4 < 2 ? limit_0 : limit_1)) s[r] = -kInfinity;
            }
        }
    }

    // p of scores s, rounded, and their sums.
    template <int kScores, int kPacked>
    __device__ __forceinline__ void exponentials(const float (&s)[kScores], uint32_t (&p)[kPacked],
                                                 float subtract_0, float subtract_1) {
        float more_0 = 0, more_1 = 0;  // shorter chains of additions
#pragma unroll
        for (int j = 0; j < kScores / 4; ++j) {
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

    __device__ __forceinline__ void take_own_scores(const float (&s)[kTile / 2]) {
        // Row and column are the same in register 8 warp (rows 0 to 7 of the warp's 16) or
        // 8 warp + 6 (rows 8 to 15), plus row % 2, of the lane with pair row % 8 / 2.
        float own_0 = 0, own_1 = 0;
        bool odd = lane.row % 2;
#pragma unroll
        for (int warp = 0; warp < 4; ++warp) {
            if (threadIdx.x / 32 % 4 == warp) {
                own_0 = odd ? s[8 * warp + 1] : s[8 * warp];
                own_1 = odd ? s[8 * warp + 7] : s[8 * warp + 6];
            }
        }
        int owner = threadIdx.x % 32 / 4 * 4 + lane.row % 8 / 2;
        reference_0 = __shfl_sync(0xFFFFFFFF, own_0, owner) * scale_log2;
        reference_1 = __shfl_sync(0xFFFFFFFF, own_1, owner) * scale_log2;
    }

    // ---- the end

    // After `finish`. Whether the sums of this thread's rows, as far as they exist, can be trusted.
    __device__ __forceinline__ bool complete(int first_j, int n) {
        sum_0 = row_sum(sum_0);
        sum_1 = row_sum(sum_1);
        int row = first_j + lane.row;
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

    // Rows from first_j on of o and lse to global memory; `staging` is the warpgroup's.
    __device__ __forceinline__ void store(T* staging, const CUtensorMap* o_map, float* lse,
                                          int head, int batch, int first_j, int n) {
        int warp = threadIdx.x / 32 % 4;
        if (first_j + warp * 16 >= n) return;
        store_rows<kHeadDim>(o, reciprocal_approx(sum_0), reciprocal_approx(sum_1),
                             staging + warp * (kChunks<kHeadDim> * 16 * kChunkColumns), o_map, head,
                             first_j + warp * 16, batch);
        if (lane.pair == 0) {
            int row = first_j + lane.row;
            if (row < n) lse[row] = kLn2 * (reference_0 + log2_approx(sum_0));
            if (row + 8 < n) lse[row + 8] = kLn2 * (reference_1 + log2_approx(sum_1));
        }
    }
};

template <int kHeadDim>
inline constexpr int kStagingElements = 4 * kChunks<kHeadDim> * 16 * kChunkColumns;

// A head of n <= 256 in shared memory, and where rows of its o go.
template <typename T>
struct HeadOnChip {
    const T* w;  // [chunks][rows][64]
    int rows;    // rows_on_chip(n), or more, zero from row n on
    int n;
    float scale;
    T* staging;  // kStagingElements; stores may still read it when a function returns
    const CUtensorMap* o_map;
    float* lse;  // the head's
    int head, batch;
};

}  // namespace crate_kernels
