// dw of a last row tile of at most 16 rows, roles swapped as in last_rows.cuh: tile i has the rows
// of the products, the tile's own rows j are their 16 columns.
//
//     S = w_i w_j^T      dP_ji = w_i dO_j^T      dP_ij = dO_i w_j^T
//     dw_j^T += dO_i^T P_ij + w_i^T dS,          dS = scale (dS_ji + dS_ij), elements (i, j)
#pragma once

#include "backward_step.cuh"

namespace crate_kernels {

template <typename T, int kHeadDim>
struct LastRowsBackward {
    float dw[kChunks<kHeadDim>][kFewRows / 2];
    float lse[4], delta[4];  // of columns 8 (i / 2) + 2 pair + i % 2
    const T *w_j, *grad_o_j;
    Lane lane;
    float scale;

    // In both tiles the rows from 16 on are zero, and free after the first visit's first products.
    __device__ __forceinline__ LastRowsBackward(T* w_j, T* grad_o_j, const RowStatistics& rows,
                                                float scale)
        : w_j(w_j), grad_o_j(grad_o_j), scale(scale) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int column = i / 2 * 8 + lane.pair * 2 + i % 2;
            lse[i] = rows.lse[column];
            delta[i] = rows.delta[column];
        }
    }
    __device__ __forceinline__ T* operand(int which, int visit) const {
        const T* tile = visit % 2 ? grad_o_j : w_j;
        return const_cast<T*>(tile) + (1 + which) * kFewRows * kChunkColumns;
    }

    // Of tile i, `steps` times 16 rows; the first visit is the own tile's.
    __device__ __forceinline__ void visit(const T* w_i, const T* grad_o_i,
                                          const RowStatistics& stats_i, int steps, int visit) {
        float s[kFewRows / 2], dp_ji[kFewRows / 2], dp_ij[kFewRows / 2];
        RowsOperand w_rows(w_i, kTile), grad_o_rows(grad_o_i, kTile);
        RowsOperand w_columns(w_j, kTile), grad_o_columns(grad_o_j, kTile);
        wgmma_fence();
        multiply_rows<T, kHeadDim, kFewRows>(s, w_rows, w_columns);
        multiply_rows<T, kHeadDim, kFewRows>(dp_ji, w_rows, grad_o_columns);
        multiply_rows<T, kHeadDim, kFewRows>(dp_ij, grad_o_rows, w_columns);
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(s);
        pin_registers(dp_ji);
        pin_registers(dp_ij);
        if (visit == 0) __syncthreads();  // all have read the rows that are not there

        uint32_t p[4], ds[4];
        const float scale_log2 = scale * kLog2E;
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // matrix: columns 8 (m / 2), rows 8 (m % 2)
            int row = lane.row + m % 2 * 8;
            float lse_i = stats_i.lse[row], delta_i = stats_i.delta[row];
            int e = 4 * (m / 2) + 2 * (m % 2), of = m / 2 * 2;
            float x = s[e] * scale_log2, y = s[e + 1] * scale_log2;
            p[m] = pack<T>(exp2_approx(x - lse_i), exp2_approx(y - lse_i));
            float2 ij = unpack<T>(p[m]);
            float2 ji = unpack<T>(pack<T>(exp2_approx(x - lse[of]), exp2_approx(y - lse[of + 1])));
            ds[m] =
                pack<T>(ji.x * (dp_ji[e] * scale - delta[of]) + ij.x * (dp_ij[e] * scale - delta_i),
                        ji.y * (dp_ji[e + 1] * scale - delta[of + 1]) +
                            ij.y * (dp_ij[e + 1] * scale - delta_i));
        }
        store_matrices_transposed(transposed_matrices(operand(0, visit)), p);
        store_matrices_transposed(transposed_matrices(operand(1, visit)), ds);
        fence_async_proxy();
        __syncthreads();
        wgmma_fence();
#pragma unroll
        for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
            int at = chunk * kTile * kChunkColumns;
            add_swapped(dw[chunk], grad_o_i + at, operand(0, visit), steps, visit > 0);
            add_swapped(dw[chunk], w_i + at, operand(1, visit), steps, true);
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (auto& of_chunk : dw) pin_registers(of_chunk);
    }

    __device__ __forceinline__ void store(T* staging, const CUtensorMap* map, int head, int row,
                                          int batch) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
            uint32_t packed[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                int e = 4 * (m / 2) + 2 * (m % 2);
                packed[m] = pack<T>(dw[chunk][e], dw[chunk][e + 1]);
            }
            store_matrices_transposed(
                transposed_matrices(staging + chunk * kFewRows * kChunkColumns), packed);
        }
        fence_async_proxy();
        __syncthreads();
        if (threadIdx.x == 0) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks<kHeadDim>; ++chunk) {
                store_tile(map, staging + chunk * kFewRows * kChunkColumns, chunk * kChunkColumns,
                           head, row, batch);
            }
            commit_stores();
            wait_stores_read<0>();
        }
    }
};

}  // namespace crate_kernels
