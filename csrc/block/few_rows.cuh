// A tile [64, 128] of a product of few rows by the blocks of a cluster: bound by latency.
// docs/block.md
//
//     out = act(rstd e (a W^T - mean s) + f (+ c))
//
// The blocks share the sum over k: each has its part of the rows of a and of W on chip at once, and
// makes its part of the sums of each row of a and of its squares, of which mean and rstd come. Then
// each adds up a part of the tile's columns.
#pragma once

#include "../common/cluster.cuh"
#include "../common/fragments.cuh"
#include "../common/math.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"
#include "../crate_kernels.h"

namespace crate_kernels {

struct FewRowsTile {
    static constexpr int kThreads = 128, kRows = 64, kColumns = 128, kDepth = 64;  // of a step
    static constexpr int kBlocks = 4;                                              // of a cluster
    static constexpr int kOwnColumns = kColumns / kBlocks, kOwnGroups = kOwnColumns / 8;
    static constexpr int kBytesA = kRows * kDepth * 2, kBytesB = kColumns * kDepth * 2;
    static constexpr int kBytesParts = kRows * kColumns * int(sizeof(float));

    static __host__ __device__ int steps_of_block(int k) { return ceil_div(k, kBlocks * kDepth); }

    int k, first_step, steps;  // of this block
    int first_row, first_column, rank;
    int row, column;  // the first of this thread in the output

    __device__ __forceinline__ FewRowsTile(int k, int row_tile, int column_tile)
        : k(k), rank(cluster_rank()) {
        int most = steps_of_block(k), lane = threadIdx.x % 32;
        first_step = rank * most;
        steps = max(0, min(most, ceil_div(k, kDepth) - first_step));
        first_column = column_tile * kColumns;
        column = first_column + rank * kOwnColumns + lane % 4 * 2;
        row = threadIdx.x / 32 * 16 + lane / 4;
        first_row = row_tile * kRows;
    }

    // One thread loads.
    __device__ __forceinline__ void load_weight(char* b, const CUtensorMap* map,
                                                Barrier* loaded) const {
        barrier_expect(loaded, steps * kBytesB);
        for (int i = 0; i < steps; ++i) {
            load_tile(b + i * kBytesB, map, loaded, (first_step + i) * kDepth, first_column);
        }
    }
    __device__ __forceinline__ void load_rows(char* a, const CUtensorMap* map,
                                              Barrier* loaded) const {
        for (int i = 0; i < steps; ++i) {
            barrier_expect(loaded + i, kBytesA);
            load_tile(a + i * kBytesA, map, loaded + i, (first_step + i) * kDepth, first_row);
        }
    }
};

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
    float2 scale[FewRowsTile::kOwnGroups], sum[FewRowsTile::kOwnGroups],
        shift[FewRowsTile::kOwnGroups];

    __device__ __forceinline__ FewRowsConstants(const FewRowsTile& tile,
                                                const FewRowsEpilogue& to) {
#pragma unroll
        for (int j = 0; j < FewRowsTile::kOwnGroups; ++j) {
            auto two = [&](const float* from, float otherwise) {
                int at = tile.column + 8 * j;
                return from && at < to.n ? *reinterpret_cast<const float2*>(from + at)
                                         : float2{otherwise, otherwise};
            };
            scale[j] = two(to.scales, 1), sum[j] = two(to.sums, 0), shift[j] = two(to.shift, 0);
        }
    }
};

// The product, of a and b in shared memory once their barriers have those parities, to `to`. parts
// and moments are shared memory too, which the blocks read of each other. All threads of a cluster
// call it, each after an arrive_in_cluster of its own, and it ends with one: before the block ends,
// wait_for_cluster. on_read() is called once nobody of this block reads a or b any more.
template <typename T, typename OnRead>
__device__ __forceinline__ void multiply_few_rows(const FewRowsTile& tile,
                                                  const FewRowsConstants& constants,
                                                  const FewRowsEpilogue& to, const char* a,
                                                  Barrier* a_loaded, int a_parity, const char* b,
                                                  Barrier* b_loaded, int b_parity, float4* parts,
                                                  float2* moments, OnRead&& on_read) {
    using Tile = FewRowsTile;
    const int thread = threadIdx.x;
    const bool norms = to.sums != nullptr;
    uint32_t c[Tile::kOwnGroups][2] = {};
#pragma unroll
    for (int j = 0; j < Tile::kOwnGroups; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int r = tile.first_row + tile.row + 8 * h, at = tile.column + 8 * j;
            if (to.c && r < to.rows && at < to.n) {
                c[j][h] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(to.c) +
                                                             int64_t(r) * to.n + at);
            }
        }
    }

    // products, and what this block has of the moments: half a row a thread
    float sums[Tile::kColumns / 2] = {};
    float2 of_row[4] = {};  // shorter chains of additions
    if (tile.steps > 0) barrier_wait(b_loaded, b_parity);
    for (int step = 0; step < tile.steps; ++step) {
        barrier_wait(a_loaded + step, a_parity);
        wgmma_fence();
        uint64_t rows = descriptor(a + step * Tile::kBytesA);
        uint64_t columns = descriptor(b + step * Tile::kBytesB);
#pragma unroll
        for (int i = 0; i < Tile::kDepth / 16; ++i) {
            wgmma<Tile::kColumns, T>::template from_shared<kNo, kNo>(sums, rows + 2 * i,
                                                                     columns + 2 * i, true);
        }
        wgmma_commit();
        if (norms) {
            int r = thread / 2;
            const uint4* from = reinterpret_cast<const uint4*>(a + step * Tile::kBytesA + r * 128);
            uint4 eight[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) eight[i] = from[(thread % 2 * 4 + i) ^ r % 8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                for (uint32_t word : {eight[i].x, eight[i].y, eight[i].z, eight[i].w}) {
                    float2 x = unpack<T>(word);
                    of_row[i].x += x.x + x.y;
                    of_row[i].y += x.x * x.x + x.y * x.y;
                }
            }
        }
        wgmma_wait<0>();
        pin_registers(sums);
    }
    fence_async_proxy();  // what was read of a may be loaded anew

    // to the blocks of the cluster, once they have read what was there
    wait_for_cluster();
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
        parts[j * Tile::kThreads + thread] = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2],
                                              sums[4 * j + 3]};
    }
    if (norms) {
        float2 all{of_row[0].x + of_row[1].x + (of_row[2].x + of_row[3].x),
                   of_row[0].y + of_row[1].y + (of_row[2].y + of_row[3].y)};
        all.x += __shfl_xor_sync(0xFFFFFFFF, all.x, 1);
        all.y += __shfl_xor_sync(0xFFFFFFFF, all.y, 1);
        if (thread % 2 == 0) moments[thread / 2] = all;
    }
    sync_cluster();
    on_read();
    float4 total[Tile::kOwnGroups] = {};
    float2 statistics[2] = {};
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
#pragma unroll
        for (int j = 0; j < Tile::kOwnGroups; ++j) {
            const float4* from =
                parts + (tile.rank * Tile::kOwnGroups + j) * Tile::kThreads + thread;
            float4 x = read_four_in_block(address_in_block(from, block));
            total[j].x += x.x, total[j].y += x.y, total[j].z += x.z, total[j].w += x.w;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!norms) continue;
            float2 x = read_two_in_block(address_in_block(moments + tile.row + 8 * h, block));
            statistics[h].x += x.x, statistics[h].y += x.y;
        }
    }
    arrive_in_cluster();

    // output
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int r = tile.first_row + tile.row + 8 * h;
        float mean = statistics[h].x / tile.k, rstd = 1;
        if (norms) {
            rstd = rsqrtf(fmaxf(statistics[h].y / tile.k - mean * mean, 0) + to.eps);
        }
#pragma unroll
        for (int j = 0; j < Tile::kOwnGroups; ++j) {
            int at = tile.column + 8 * j;
            float2 added = unpack<T>(c[j][h]), shift = constants.shift[j];
            float2 scale = constants.scale[j], sum = constants.sum[j];
            float2 product = h ? float2{total[j].z, total[j].w} : float2{total[j].x, total[j].y};
            float first = rstd * scale.x * (product.x - mean * sum.x) + shift.x + added.x;
            float second = rstd * scale.y * (product.y - mean * sum.y) + shift.y + added.y;
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
}

}  // namespace crate_kernels
