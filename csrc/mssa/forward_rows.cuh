// Rows of o for a head that is on chip whole: what the kernels for n <= 256 share.
#pragma once

#include "last_rows.cuh"

namespace crate_kernels {

template <int kHeadDim>
inline constexpr int kStagingElements = 4 * kChunks<kHeadDim> * 16 * kChunkColumns;

// o and lse of rows `begin` to `end` (whole tiles, but for the last) by one warpgroup. w: the head,
// `rows` rows of a chunk (rows_on_chip); lse: the head's. kOneTile: n <= 64. The stores may still
// read staging when this returns.
template <typename T, int kHeadDim, bool kOneTile>
__device__ __forceinline__ void attend_rows(const T* w, int rows, T* staging,
                                            const CUtensorMap* o_map, float* lse, int head,
                                            int batch, int begin, int end, int n, float scale) {
    int whole = rows / kTile * kTile;
    // A second pass only where the first could not do without the largest scores.
    for (bool searched = false;; searched = true) {
        bool trusted = true;
        for (int first = begin; first < end; first += kTile) {
            if (!kOneTile && !searched && first == whole && rows - whole == kFewRows) {
                trusted &= finish_last_rows<T, kHeadDim>(w, rows, whole, n, scale, staging, o_map,
                                                         lse, head, batch);
                continue;
            }
            const T* w_j = w + first * kChunkColumns;
            ForwardTile<T, kHeadDim> tile(w_j, rows, scale);
            bool any_row = first + threadIdx.x / 32 * 16 < n;  // of this warp
            if (!kOneTile && searched) {
                tile.begin_search();
                for (int i = 0; i < n; i += kTile) {
                    tile.search(w + i * kChunkColumns, rows, i, n, false);
                }
                tile.end_search();
            }
            if (kOneTile) {
                tile.template visit<true, kTile, true>(w_j, rows, first, n, false, any_row);
            } else if (first < whole) {
                tile.template visit<true>(w_j, rows, first, n, false, any_row);
            } else {
                tile.template visit<true, 16>(w_j, rows, first, n, false, any_row);
            }
            if (!kOneTile) {
                for (int i = 0; i < whole; i += kTile) {
                    if (i == first) continue;
                    tile.template visit<false>(w + i * kChunkColumns, rows, i, n, false, any_row);
                }
                if (whole < rows && first < whole) {
                    tile.template visit<false, 16>(w + whole * kChunkColumns, rows, whole, n, false,
                                                   any_row);
                }
            }
            trusted &= tile.complete(first, n);
            tile.store(staging, o_map, lse, head, batch, first, n);
        }
        if (kOneTile || searched || !__syncthreads_or(!trusted)) break;
        if (threadIdx.x % 32 == 0) wait_stores_written();  // they go to the same place
    }
}

// The same of the row tile from `begin` on by a warpgroup that has the multiprocessor to itself:
// every score is on its way before the first is needed, and products are not waited for. w: kTiles
// tiles of rows, zero from row n on. False, and nothing stored, where attend_rows has to do it.
template <typename T, int kHeadDim, int kTiles>
__device__ __forceinline__ bool attend_tile_at_once(const T* w, T* staging,
                                                    const CUtensorMap* o_map, float* lse, int head,
                                                    int batch, int begin, int n, float scale) {
    constexpr int kRows = kTiles * kTile;
    auto first_of = [&](int t) { return (begin + t * kTile) % kRows; };  // the own tile is tile 0
    auto rows_of = [&](int t) { return w + first_of(t) * kChunkColumns; };
    ForwardTile<T, kHeadDim> tile(rows_of(0), kRows, scale);
    float s[kTiles][kTile / 2];
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        multiply_rows<T, kHeadDim, kTile>(s[t], tile.queries, RowsOperand(rows_of(t), kRows));
        wgmma_commit();
    }
    uint32_t p[2][kTile / 4];
    tile.sum_0 = tile.sum_1 = 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) tile.o[i] = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        if (t < 2) {
            wgmma_wait<kTiles - 1>();
        } else {
            wgmma_wait<1>();
            pin_registers(p[t % 2]);  // the product that read them is made
        }
        pin_registers(s[t]);
        if (t == 0) tile.take_own_scores(s[0]);
        tile.template mask<kTile>(s[t], first_of(t), n, false);
        tile.template exponentials<kTile>(s[t], p[t % 2]);
        wgmma_fence();
        add_product<T, kHeadDim, kTile>(
            tile.o, p[t % 2], low_word_transposed(rows_of(t), kRows * kChunkColumns * sizeof(T)));
    }
    wgmma_wait<0>();
    pin_registers(tile.o);
#pragma unroll
    for (int t = 0; t < 2; ++t) pin_registers(p[t]);
    if (__syncthreads_or(!tile.complete(begin, n))) return false;
    tile.store(staging, o_map, lse, head, batch, begin, n);
    return true;
}

}  // namespace crate_kernels
