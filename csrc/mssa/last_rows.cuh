// The last row tile of a head where it has at most 16 rows, roles swapped: 64 keys are the rows of
// its products and the queries their 16 columns, so that nothing is done for rows that are not
// there.
//
//     S^T = w_i w_j^T        P^T from S^T, through shared memory        o_j^T += w_i^T P_ij^T
//
// All keys' P come before the first of the second products.
#pragma once

#include "forward_step.cuh"

namespace crate_kernels {

// The rows from kWholeTiles tiles on, of o and lse; returns whether they can be trusted. of.staging
// is waited for.
template <typename T, int kHeadDim, int kWholeTiles>
__device__ __forceinline__ bool finish_last_rows(const HeadOnChip<T>& of) {
    constexpr int kTiles = kWholeTiles + 1, whole = kWholeTiles * kTile;
    __shared__ float references[kFewRows], shares[4][kFewRows];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float scale_log2 = of.scale * kLog2E;
    const Lane place;
    const uint32_t matrices = transposed_matrices(of.staging);
    const uint32_t words = uniform(low_word(of.w)), words_of_p = uniform(low_word(of.staging));
    auto tile = [&](int t) {  // the own one first
        return RowsOperand(words + (t == 0 ? kWholeTiles : t - 1) * kTile * kRowStep, of.rows);
    };

    // all scores; the own ones are the references
    float s[kTiles][kFewRows / 2];
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        multiply_rows<T, kHeadDim, kFewRows>(s[t], tile(t), tile(0));
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) pin_registers(s[t]);
    if (warp == 0 && place.pair == place.row / 2) {
        bool odd = place.row % 2;
        references[place.row] = odd ? s[0][1] : s[0][0];
        references[place.row + 8] = odd ? s[0][7] : s[0][6];
    }
    if (lane == 0) wait_stores_read<0>();
    __syncthreads();
    float reference[4], sum[4] = {};  // of columns 8 (i / 2) + 2 pair + i % 2
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        reference[i] = references[i / 2 * 8 + place.pair * 2 + i % 2] * scale_log2;
    }

    // P, tile by tile
    const int own = of.n - whole;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        uint32_t p[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // matrix: columns 8 (m / 2), rows 8 (m % 2)
            float two[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float x = exp2_approx(s[t][4 * (m / 2) + 2 * (m % 2) + e] * scale_log2 -
                                      reference[m / 2 * 2 + e]);
                two[e] = t == 0 && place.row + m % 2 * 8 >= own ? 0 : x;
                sum[m / 2 * 2 + e] += two[e];
            }
            p[m] = pack<T>(two[0], two[1]);
        }
        store_matrices_transposed(matrices + t * kFewRows * kChunkColumns * sizeof(T), p);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
            sum[i] += __shfl_xor_sync(0xFFFFFFFF, sum[i], lanes);
        }
        if (lane < 4) shares[warp][i / 2 * 8 + place.pair * 2 + i % 2] = sum[i];
    }
    fence_async_proxy();
    __syncthreads();

    // o^T
    float o[kChunks<kHeadDim>][kFewRows / 2];
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int k = 0; k < (t == 0 ? 1 : kTile / 16); ++k) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
                wgmma<kFewRows, T>::template from_shared<kYes, kNo>(
                    o[chunk],
                    descriptor_of(tile(t).transposed() + chunk * of.rows * kRowStep + 128 * k),
                    descriptor_of(words_of_p + t * kFewRows * kRowStep + 2 * k), t > 0 || k > 0);
            }
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    bool trusted = true;
    float inverse[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int column = i / 2 * 8 + place.pair * 2 + i % 2;
        float total = 0;
        for (int w = 0; w < 4; ++w) total += shares[w][column];
        inverse[i] = reciprocal_approx(total);
        if (column >= own) continue;
        trusted &= ForwardTile<T, kHeadDim>::is_safe(total);
        if (threadIdx.x < 4) of.lse[whole + column] = kLn2 * (reference[i] + log2_approx(total));
    }
    __syncthreads();  // the products have read P, where the output goes
#pragma unroll
    for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
        pin_registers(o[chunk]);
        uint32_t packed[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const float* two = &o[chunk][4 * (m / 2) + 2 * (m % 2)];
            packed[m] = pack<T>(two[0] * inverse[m / 2 * 2], two[1] * inverse[m / 2 * 2 + 1]);
        }
        store_matrices_transposed(matrices + chunk * kFewRows * kChunkColumns * sizeof(T), packed);
    }
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
            store_tile(of.o_map, of.staging + chunk * kFewRows * kChunkColumns,
                       chunk * kChunkColumns, of.head, whole, of.batch);
        }
        commit_stores();
    }
    return trusted;
}

}  // namespace crate_kernels
