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

// w: the head, `rows` rows of a chunk; `whole` of them are keys of other tiles, the next n - whole
// the tile's own. staging: 8 KB that no store reads any more once its threads have waited for
// theirs. Writes o and lse of the rows from `whole` on; returns whether they can be trusted.
template <typename T, int kHeadDim>
__device__ __forceinline__ bool finish_last_rows(const T* w, int rows, int whole, int n,
                                                 float scale, T* staging, const CUtensorMap* o_map,
                                                 float* lse, int head, int batch) {
    __shared__ float references[kFewRows], shares[4][kFewRows];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float scale_log2 = scale * kLog2E;
    const Lane place;
    auto tile_of = [&](int first) { return w + first * kChunkColumns; };
    const uint32_t matrices = transposed_matrices(staging);
    auto p_of = [&](int index) { return staging + index * kFewRows * kChunkColumns; };

    // the own scores, which are the references
    float s[kFewRows / 2];
    auto score = [&](int first) {
        wgmma_fence();
        multiply_rows<T, kHeadDim, kFewRows>(s, RowsOperand(tile_of(first), rows),
                                             RowsOperand(tile_of(whole), rows));
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(s);
    };
    score(whole);
    if (warp == 0 && place.pair == place.row / 2) {
        bool odd = place.row % 2;
        references[place.row] = odd ? s[1] : s[0];
        references[place.row + 8] = odd ? s[7] : s[6];
    }
    if (lane == 0) wait_stores_read<0>();
    __syncthreads();
    float reference[4], sum[4] = {};  // of columns 8 (i / 2) + 2 pair + i % 2
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        reference[i] = references[i / 2 * 8 + place.pair * 2 + i % 2] * scale_log2;
    }

    // P, tile by tile, the own one first
    const int own = n - whole;
    auto exponentials = [&](int index, bool is_own) {
        uint32_t p[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // matrix: columns 8 (m / 2), rows 8 (m % 2)
            float two[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float x = exp2_approx(s[4 * (m / 2) + 2 * (m % 2) + e] * scale_log2 -
                                      reference[m / 2 * 2 + e]);
                two[e] = is_own && place.row + m % 2 * 8 >= own ? 0 : x;
                sum[m / 2 * 2 + e] += two[e];
            }
            p[m] = pack<T>(two[0], two[1]);
        }
        store_matrices_transposed(matrices + index * kFewRows * kChunkColumns * sizeof(T), p);
    };
    exponentials(0, true);
    for (int first = 0; first < whole; first += kTile) {
        score(first);
        exponentials(1 + first / kTile, false);
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
    auto multiply = [&](int first, int index, int k) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
            const T* values = tile_of(first) + chunk * rows * kChunkColumns;
            wgmma<kFewRows, T>::template from_shared<kYes, kNo>(
                o[chunk], descriptor_transposed(values, rows * kChunkColumns * sizeof(T)) + 128 * k,
                descriptor(p_of(index)) + 2 * k, index > 0 || k > 0);
        }
    };
    wgmma_fence();
    multiply(whole, 0, 0);
    for (int first = 0; first < whole; first += kTile) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) multiply(first, 1 + first / kTile, k);
    }
    wgmma_fence();
    wgmma_commit();
    wgmma_wait<0>();
    bool trusted = true;
    float inverse[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int column = i / 2 * 8 + place.pair * 2 + i % 2;
        float total = 0;
        for (int w = 0; w < 4; ++w) total += shares[w][column];
        inverse[i] = 1 / total;
        if (column >= own) continue;
        trusted &= ForwardTile<T, kHeadDim>::is_safe(total);
        if (threadIdx.x < 4) lse[whole + column] = (reference[i] + __log2f(total)) / kLog2E;
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
            store_tile(o_map, staging + chunk * kFewRows * kChunkColumns, chunk * kChunkColumns,
                       head, whole, batch);
        }
        commit_stores();
    }
    return trusted;
}

}  // namespace crate_kernels
