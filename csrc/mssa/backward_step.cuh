// One row tile j of dw: what a tile i adds to it, and what has to be known of the rows for that.
#pragma once

#include "heads.cuh"

namespace crate_kernels {

// What the backward needs to know of 64 rows besides w and dO. Lengths in bits (log2).
struct __align__(128) RowStatistics {
    float lse[kTile];     // of the scaled scores, times log2(e); inf past the last row
    float weight[kTile];  // 2^(lse of row 0 - lse): 0 past the last row
    float delta[kTile];   // scale * rowsum(dO * O)
    // Whether weight is safe to use: P_ij = P_ji weight_i / weight_j loses nothing that counts as
    // long as the quotient stays within 2^64. One word for the tile, padded to 256 bytes.
    uint32_t weights_hold;
    uint32_t padding[kTile - 1];
};
inline constexpr float kWeightBits = 32;

// One of 8 lanes' part of rowsum(dO * O) of a row, 16 bytes each at a time.
template <typename T, int kHeadDim>
__device__ __forceinline__ float row_delta_part(const T* grad_o, const T* o) {
    float sum = 0;
#pragma unroll
    for (int c = threadIdx.x % 8 * 8; c < kHeadDim; c += 64) {
        uint4 a = __ldg(reinterpret_cast<const uint4*>(grad_o + c));
        uint4 b = __ldg(reinterpret_cast<const uint4*>(o + c));
        const T* x = reinterpret_cast<const T*>(&a);
        const T* y = reinterpret_cast<const T*>(&b);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += float(x[e]) * float(y[e]);
    }
    return sum;
}

// Row statistics of a row; lse_0 is the lse (bits) of the head's row 0. Returns whether the weight
// holds.
__device__ __forceinline__ bool write_statistics(RowStatistics* to, int row, bool exists, float lse,
                                                 float lse_0, float delta, float scale) {
    float apart = lse_0 - lse;
    to->lse[row] = exists ? lse : kInfinity;
    to->weight[row] = exists ? exp2_approx(apart) : 0;
    to->delta[row] = exists ? scale * delta : 0;
    return !exists || fabsf(apart) <= kWeightBits;
}

// Which attention there is between tiles j and i: each sees the other; causally, j comes after i
// and sees it, or before i and is seen, or they are one tile.
enum class Part { kBoth, kAfter, kBefore, kDiagonal };

__device__ __forceinline__ float2 two(const float* at) {
    return *reinterpret_cast<const float2*>(at);
}

template <typename T, int kHeadDim>
struct BackwardTile {
    float dw[kHeadDim / 2];
    uint32_t ds[kTile / 4];  // operand of the product that a visit leaves running
    RowsOperand w_j, grad_o_j;
    Lane lane;
    float lse_0, lse_1, inverse_0, inverse_1, delta_0, delta_1;  // of the thread's rows; 1 / weight
    bool weights_hold;
    float scale;

    __device__ __forceinline__ BackwardTile(const T* w_j, const T* grad_o_j,
                                            const RowStatistics& rows, float scale)
        : ds{},
          w_j(w_j, kTile),
          grad_o_j(grad_o_j, kTile),
          lse_0(rows.lse[lane.row]),
          lse_1(rows.lse[lane.row + 8]),
          inverse_0(1 / rows.weight[lane.row]),
          inverse_1(1 / rows.weight[lane.row + 8]),
          delta_0(rows.delta[lane.row]),
          delta_1(rows.delta[lane.row + 8]),
          weights_hold(rows.weights_hold),
          scale(scale) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) dw[i] = 0;
    }

    // Adds to dw_j [64, kHeadDim] what kColumns rows i give it:
    //     P_ij^T dO_i + scale (dS_ji + dS_ij^T) w_i
    // The elements of a tile have row j and column i. The last product is left running: its
    // operands have to stay, ds and w_i, until the next visit or finish. Calls `meanwhile` while
    // the first ones run.
    template <int kColumns, Part kPart, typename Meanwhile>
    __device__ __forceinline__ void visit(const T* w_i, const T* grad_o_i,
                                          const RowStatistics& stats_i, Meanwhile&& meanwhile) {
        constexpr bool kSees = kPart != Part::kBefore;  // P_ji exists
        constexpr bool kSeen = kPart != Part::kAfter;   // P_ij exists
        float s[kColumns / 2], dp_ji[kColumns / 2], dp_ij[kColumns / 2];
        RowsOperand w_rows(w_i, kTile), grad_o_rows(grad_o_i, kTile);
        constexpr int chunk_bytes = kTile * kChunkColumns * sizeof(T);
        uint32_t w_sum = low_word_transposed(w_i, chunk_bytes);
        uint32_t grad_o_sum = low_word_transposed(grad_o_i, chunk_bytes);
        const bool by_weights = weights_hold && stats_i.weights_hold;

        wgmma_fence();
        multiply_rows<T, kHeadDim, kColumns>(s, w_j, w_rows);
        wgmma_commit();
        if constexpr (kSees) multiply_rows<T, kHeadDim, kColumns>(dp_ji, grad_o_j, w_rows);
        wgmma_commit();
        meanwhile();
        wgmma_wait<1>();
        pin_registers(s);
        pin_registers(ds);  // of the visit before: not to be written while its product read them
        pin_registers(dw);

        // P_ji and P_ij, rounded: as operands, and to spare registers
        float scale_log2 = scale * kLog2E;
        uint32_t p_ji[kColumns / 4], p_ij[kColumns / 4];
        auto round_probabilities = [&](auto weights_hold) {
            constexpr bool kByWeight = kSees && kSeen && decltype(weights_hold)::value;
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j) {
                int column = 8 * j + 2 * lane.pair;
                float2 of_i = two((kByWeight ? stats_i.weight : stats_i.lse) + column);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x = s[4 * j + 2 * half] * scale_log2,
                          y = s[4 * j + 2 * half + 1] * scale_log2;
                    [[maybe_unused]] float lse_j = half ? lse_1 : lse_0;
                    [[maybe_unused]] float inverse_j = half ? inverse_1 : inverse_0;
                    float2 ji = {}, ij = {};
                    if constexpr (kSees) ji = {exp2_approx(x - lse_j), exp2_approx(y - lse_j)};
                    if constexpr (kByWeight) {
                        ij = {ji.x * (inverse_j * of_i.x), ji.y * (inverse_j * of_i.y)};
                    } else if constexpr (kSeen) {
                        ij = {exp2_approx(x - of_i.x), exp2_approx(y - of_i.y)};
                    }
                    if constexpr (kPart == Part::kDiagonal) {
                        int row = lane.row + 8 * half;
                        if (column > row) ji.x = 0;
                        if (column + 1 > row) ji.y = 0;
                        if (column < row) ij.x = 0;
                        if (column + 1 < row) ij.y = 0;
                    }
                    if constexpr (kSees) p_ji[2 * j + half] = pack<T>(ji.x, ji.y);
                    if constexpr (kSeen) p_ij[2 * j + half] = pack<T>(ij.x, ij.y);
                }
            }
        };
        if (by_weights) {
            round_probabilities(std::true_type());
        } else {
            round_probabilities(std::false_type());
        }
        if constexpr (kSeen) {
            wgmma_fence();
            multiply_rows<T, kHeadDim, kColumns>(dp_ij, w_j, grad_o_rows);
            wgmma_commit();
            add_product<T, kHeadDim, kColumns>(dw, p_ij, grad_o_sum);
            wgmma_wait<1>();
            pin_registers(dp_ij);
        } else {
            wgmma_wait<0>();
        }
        if constexpr (kSees) {
            pin_registers(dp_ji);
            pin_registers(p_ji);
        }
        pin_registers(p_ij);

        // scale (dS_ji + dS_ij^T)
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
            float2 delta_i = two(stats_i.delta + 8 * j + 2 * lane.pair);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int e = 4 * j + 2 * half;
                float delta_j = half ? delta_1 : delta_0;
                float x = 0, y = 0;
                if constexpr (kSees) {
                    float2 p = unpack<T>(p_ji[2 * j + half]);
                    x = p.x * (dp_ji[e] * scale - delta_j);
                    y = p.y * (dp_ji[e + 1] * scale - delta_j);
                }
                if constexpr (kSeen) {
                    float2 p = unpack<T>(p_ij[2 * j + half]);
                    x += p.x * (dp_ij[e] * scale - delta_i.x);
                    y += p.y * (dp_ij[e + 1] * scale - delta_i.y);
                }
                ds[2 * j + half] = pack<T>(x, y);
            }
        }
        wgmma_fence();
        add_product<T, kHeadDim, kColumns>(dw, ds, w_sum);
        if constexpr (kSeen) {
            wgmma_wait<1>();
            pin_registers(p_ij);
        }
    }

    __device__ __forceinline__ void finish() {
        wgmma_wait<0>();
        pin_registers(dw);
        pin_registers(ds);
    }
};

}  // namespace crate_kernels
