// A tile [64, 32] of a product of few rows: bound by latency. docs/block.md
//
//     out = act(rstd e (a W^T - mean s) + f (+ c))
//
// All of the rows of a and of W that it takes are on chip at once. The four blocks of a cluster
// have the same rows, of which each loads a part for all, and makes that part of their moments.
#pragma once

#include "../common/cluster.cuh"
#include "../common/fragments.cuh"
#include "../common/math.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"
#include "../crate_kernels.h"

namespace crate_kernels {

struct FewRowsTile {
    static constexpr int kThreads = 128, kRows = 64, kColumns = 32, kDepth = 64;  // of a step
    static constexpr int kBlocks = 4;                                             // of a cluster
    static constexpr int kGroups = kColumns / 8, kColumnsOfCluster = kBlocks * kColumns;
    static constexpr int kBytesA = kRows * kDepth * 2, kBytesB = kColumns * kDepth * 2;

    static constexpr __host__ __device__ int steps_of(int k) { return k / kDepth; }
    // Of a block's part of the rows of a; that of the last may reach past k, where it is zero.
    static constexpr __host__ __device__ int steps_of_part(int k) {
        return ceil_div(steps_of(k), kBlocks);
    }
    static constexpr __host__ __device__ int bytes_of_rows(int k) {
        return kBlocks * steps_of_part(k) * kBytesA;
    }

    int k, steps, steps_of_a_part, rank;
    int first_row, first_column;
    int row, column;  // the first of this thread in the output

    __device__ __forceinline__ FewRowsTile(int k, int row_tile, int cluster_column)
        : k(k), steps(steps_of(k)), steps_of_a_part(steps_of_part(k)), rank(cluster_rank()) {
        int lane = threadIdx.x % 32;
        first_row = row_tile * kRows;
        first_column = cluster_column * kColumnsOfCluster + rank * kColumns;
        row = first_row + threadIdx.x / 32 * 16 + lane / 4;
        column = first_column + lane % 4 * 2;
    }

    // The barriers of parts of a are told what to expect, by kBlocks threads, once nobody waits for
    // their phase before.
    __device__ __forceinline__ void expect_rows(Barrier* loaded) const {
        if (threadIdx.x < kBlocks) barrier_expect(loaded + threadIdx.x, steps_of_a_part * kBytesA);
    }
    // One thread loads. Rows go to all blocks of the cluster: none may still read those before.
    __device__ __forceinline__ void load_rows(char* a, const CUtensorMap* map,
                                              Barrier* loaded) const {
        int first = rank * steps_of_a_part;
        load_tile_for_all<kBlocks>(a + first * kBytesA, map, loaded + rank, 0, first_row, first);
    }
    __device__ __forceinline__ void load_weight(char* b, const CUtensorMap* map,
                                                Barrier* loaded) const {
        barrier_expect(loaded, steps * kBytesB);
        load_tile(b, map, loaded, 0, first_column, 0);
    }
};

// Host: rows of k, a multiple of kDepth, as steps of kDepth columns.
inline CUtensorMap steps_map(const void* data, Dtype dtype, int rows, int k, int box_rows,
                             int box_steps) {
    int steps = FewRowsTile::steps_of(k), depth = FewRowsTile::kDepth;
    return make_tensor_map<3>(data, dtype, {depth, rows, steps}, {k, depth},
                              {depth, box_rows, box_steps});
}
inline CUtensorMap few_rows_map(const void* data, Dtype dtype, int rows, int k) {
    return steps_map(data, dtype, rows, k, FewRowsTile::kRows, FewRowsTile::steps_of_part(k));
}
inline CUtensorMap few_rows_weight_map(const void* data, Dtype dtype, int n, int k) {
    return steps_map(data, dtype, n, k, FewRowsTile::kColumns, FewRowsTile::steps_of(k));
}

// Of a product, with n columns. Without sums there is no norm; scales, sums, shift and c may be
// null.
struct FewRowsEpilogue {
    const float *scales, *sums, *shift;
    const void* c;
    void* out;
    int rows, n;
    float eps, threshold;
    bool clips;
};

// Constants of a thread's columns, which nothing writes.
struct FewRowsConstants {
    float2 scale[FewRowsTile::kGroups], sum[FewRowsTile::kGroups], shift[FewRowsTile::kGroups];

    __device__ __forceinline__ FewRowsConstants(const FewRowsTile& tile,
                                                const FewRowsEpilogue& to) {
#pragma unroll
        for (int j = 0; j < FewRowsTile::kGroups; ++j) {
            auto two = [&](const float* from, float otherwise) {
                int at = tile.column + 8 * j;
                return from && at < to.n ? *reinterpret_cast<const float2*>(from + at)
                                         : float2{otherwise, otherwise};
            };
            scale[j] = two(to.scales, 1), sum[j] = two(to.sums, 0), shift[j] = two(to.shift, 0);
        }
    }
};

// The product, of a and b in shared memory once their barriers have those parities, to `to`.
// `moments` is shared memory for the sums of each block's part of a row and of its squares.
// on_rows() is called when the rows are there. All threads of a cluster call it.
//
// Every wait comes before the products: descriptors stay in uniform registers as long as nothing
// may diverge, and products whose descriptors have to be brought there take 100 cycles, not 30.
template <typename T, int kStepsOfK, typename OnRows>
__device__ __forceinline__ void multiply_few_rows(const FewRowsTile& tile,
                                                  const FewRowsConstants& constants,
                                                  const FewRowsEpilogue& to, const char* a,
                                                  Barrier* a_loaded, int a_parity, const char* b,
                                                  Barrier* b_loaded, int b_parity, float2* moments,
                                                  OnRows&& on_rows) {
    using Tile = FewRowsTile;
    const bool norms = to.sums != nullptr;
    uint32_t c[Tile::kGroups][2] = {};
#pragma unroll
    for (int j = 0; j < Tile::kGroups; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int r = tile.row + 8 * h, at = tile.column + 8 * j;
            if (to.c && r < to.rows && at < to.n) {
                c[j][h] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(to.c) +
                                                             int64_t(r) * to.n + at);
            }
        }
    }

    // products, in sums that do not wait for each other
    constexpr int kSums = Tile::kDepth / 16;
    float product[kSums][Tile::kColumns / 2];
    barrier_wait(b_loaded, b_parity);
    for (int part = 0; part < Tile::kBlocks; ++part) barrier_wait(a_loaded + part, a_parity);
    on_rows();
    const uint32_t rows = low_word(a), columns = low_word(b);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kStepsOfK; ++step) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            wgmma<Tile::kColumns, T>::template from_shared<kNo, kNo>(
                product[i], descriptor_of(rows + step * (Tile::kBytesA / 16) + 2 * i),
                descriptor_of(columns + step * (Tile::kBytesB / 16) + 2 * i), step > 0);
        }
    }
    wgmma_commit();

    // moments of this block's part of the rows, half a row a thread, for all blocks
    if (norms) {
        float2 of_row[4] = {};  // shorter chains of additions
        int r = threadIdx.x / 2, first = tile.rank * tile.steps_of_a_part;
        for (int step = first; step < first + tile.steps_of_a_part; ++step) {  // zero past the last
            const uint4* from = reinterpret_cast<const uint4*>(a + step * Tile::kBytesA + r * 128);
            uint4 eight[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) eight[i] = from[(threadIdx.x % 2 * 4 + i) ^ r % 8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                for (uint32_t word : {eight[i].x, eight[i].y, eight[i].z, eight[i].w}) {
                    float2 x = unpack<T>(word);
                    of_row[i].x += x.x + x.y;
                    of_row[i].y += x.x * x.x + x.y * x.y;
                }
            }
        }
        float2 sums{of_row[0].x + of_row[1].x + (of_row[2].x + of_row[3].x),
                    of_row[0].y + of_row[1].y + (of_row[2].y + of_row[3].y)};
        sums.x += __shfl_xor_sync(0xFFFFFFFF, sums.x, 1);
        sums.y += __shfl_xor_sync(0xFFFFFFFF, sums.y, 1);
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; block += 2) {  // half of the blocks a thread
            write_in_block(
                address_in_block(&moments[tile.rank * Tile::kRows + r], block + threadIdx.x % 2),
                sums);
        }
        sync_cluster();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) pin_registers(product[i]);

    // output
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int r = tile.row + 8 * h;
        float2 of{};
#pragma unroll
        for (int block = 0; block < Tile::kBlocks && norms; ++block) {
            float2 part = moments[block * Tile::kRows + r - tile.first_row];
            of.x += part.x, of.y += part.y;
        }
        float mean = of.x / tile.k, rstd = 1;
        if (norms) rstd = rsqrtf(fmaxf(of.y / tile.k - mean * mean, 0) + to.eps);
#pragma unroll
        for (int j = 0; j < Tile::kGroups; ++j) {
            int at = tile.column + 8 * j;
            float2 added = unpack<T>(c[j][h]), shift = constants.shift[j];
            float2 scale = constants.scale[j], sum = constants.sum[j];
            float first = 0, second = 0;
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                first += product[i][4 * j + 2 * h];
                second += product[i][4 * j + 2 * h + 1];
            }
            first = rstd * scale.x * (first - mean * sum.x) + shift.x + added.x;
            second = rstd * scale.y * (second - mean * sum.y) + shift.y + added.y;
            if (to.clips) {
                first = zero_or_more(first - to.threshold);
                second = zero_or_more(second - to.threshold);
            }
            if (r < to.rows && at < to.n) {
                *reinterpret_cast<uint32_t*>(static_cast<T*>(to.out) + int64_t(r) * to.n + at) =
                    pack<T>(first, second);
            }
        }
    }
    fence_async_proxy();  // what was read of a may be loaded anew
}

}  // namespace crate_kernels
