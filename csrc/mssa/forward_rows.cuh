// Rows of o for a head that is on chip whole: what the kernels for n <= 256 share.
#pragma once

#include "forward_again.cuh"
#include "last_rows.cuh"

namespace crate_kernels {

// Rows `begin` to `end` (whole tiles, but for the last) of o and lse by one warpgroup, with the
// largest scores as references.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend_rows_again(const HeadOnChip<T>& of, int begin, int end) {
    for (int first = begin; first < end; first += kTile) {
        SearchedTile<T, kHeadDim> tile(of.w + first * kChunkColumns, of.rows, of.scale, first, of.n,
                                       false);
        for (int i = 0; i < of.n; i += kTile) tile.search(of.w + i * kChunkColumns, i);
        tile.end_search();
        for (int i = 0; i < of.n; i += kTile) tile.visit(of.w + i * kChunkColumns, i);
        tile.end_visits();
        tile.store(of.staging, of.o_map, of.lse, of.head, of.batch, first, of.n);
    }
}

// The same without a search; where that will not do, again. kOneTile: n <= 64.
template <typename T, int kHeadDim, bool kOneTile>
__device__ __forceinline__ void attend_rows(const HeadOnChip<T>& of, int begin, int end) {
    const int whole = of.rows / kTile * kTile;
    const uint32_t words = uniform(low_word(of.w));
    bool trusted = true;
    for (int first = begin; first < end; first += kTile) {
        if (!kOneTile && first == whole && of.rows - whole == kFewRows) {
            trusted &= whole == kTile       ? finish_last_rows<T, kHeadDim, 1>(of)
                       : whole == 2 * kTile ? finish_last_rows<T, kHeadDim, 2>(of)
                                            : finish_last_rows<T, kHeadDim, 3>(of);
            continue;
        }
        ForwardTile<T, kHeadDim> tile(of.w + first * kChunkColumns, of.rows, of.scale);
        tile.begin(first, of.n, false);
        if (!kOneTile) {
            for (int i = 0; i < whole; i += kTile) {
                if (i != first) tile.visit(uniform(words + i * kRowStep), i, of.n);
            }
        }
        if (!kOneTile && whole < of.rows) {
            tile.template visit<kFewRows>(uniform(words + whole * kRowStep), whole, of.n);
            tile.template finish<kFewRows>();
        } else {
            tile.finish();
        }
        trusted &= tile.complete(first, of.n);
        tile.store(of.staging, of.o_map, of.lse, of.head, of.batch, first, of.n);
    }
    if (__syncthreads_or(!trusted)) {
        if (threadIdx.x % 32 == 0) wait_stores_written();  // they go to the same place
        attend_rows_again<T, kHeadDim>(of, begin, end);
    }
}

// The row tile from `begin` on by a warpgroup that has the multiprocessor to itself: every score is
// on its way before the first is needed, and products are not waited for. A head of kTiles tiles.
template <typename T, int kHeadDim, int kTiles>
__device__ __forceinline__ void attend_tile_at_once(const HeadOnChip<T>& of, int begin) {
    constexpr int kRows = kTiles * kTile;
    auto first_of = [&](int t) { return (begin + t * kTile) % kRows; };  // the own tile is tile 0
    auto rows_of = [&](int t) { return of.w + first_of(t) * kChunkColumns; };
    ForwardTile<T, kHeadDim> tile(rows_of(0), kRows, of.scale);
    float s[kTiles][kTile / 2];
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        multiply_rows<T, kHeadDim, kTile>(s[t], tile.queries, RowsOperand(rows_of(t), kRows));
        wgmma_commit();
    }
    uint32_t p[2][kTile / 4];
    tile.clear_output();
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
        tile.template mask<kTile>(s[t], first_of(t), begin, of.n, false);
        tile.exponentials(s[t], p[t % 2], tile.reference_0, tile.reference_1);
        wgmma_fence();
        add_product<T, kHeadDim, kTile>(tile.o, p[t % 2],
                                        RowsOperand(rows_of(t), kRows).transposed());
    }
    wgmma_wait<0>();
    pin_registers(tile.o);
#pragma unroll
    for (int t = 0; t < 2; ++t) pin_registers(p[t]);
    if (__syncthreads_or(!tile.complete(begin, of.n))) {
        attend_rows_again<T, kHeadDim>(of, begin, begin + 1);
    } else {
        tile.store(of.staging, of.o_map, of.lse, of.head, of.batch, begin, of.n);
    }
}

}  // namespace crate_kernels
