// Tied-attention backward for n > 64, causal or not.
//
// A block is one warpgroup with a row tile j of one head, its w_j and dO_j on chip. The other row
// tiles pass through a ring of buffers, filled ahead by the bulk copy engine. What a tile needs to
// know of its rows is made by a kernel before. docs/mssa.md
#include "last_rows_backward.cuh"
#include "launchers.h"

namespace crate_kernels {
namespace {

// ---- row statistics: a block for each row tile of a head, 8 threads for each row

constexpr int kStatisticsThreads = 256;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kStatisticsThreads)
    attention_row_statistics(RowStatistics* stats, const T* grad_o, int64_t grad_o_stride_batch,
                             int64_t grad_o_stride_row, const T* o, const float* lse, int n,
                             int heads, float scale) {
    constexpr int kAtOnce = kStatisticsThreads / 8, kRows = kTile / kAtOnce;  // of 8 threads
    let_next_kernel_start();
    int tiles = ceil_div(n, kTile), tile = blockIdx.x % tiles;
    int head = blockIdx.x / tiles % heads, batch = blockIdx.x / tiles / heads;
    lse += (int64_t)(blockIdx.x / tiles) * n;
    float lse_0 = load_float_now(lse), lse_of[kRows], delta[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        int row = min(tile * kTile + i * kAtOnce + int(threadIdx.x / 8), n - 1);
        lse_of[i] = load_float_now(lse + row);
        delta[i] = row_delta_part<T, kHeadDim>(
            grad_o + batch * grad_o_stride_batch + row * grad_o_stride_row + head * kHeadDim,
            o + (((int64_t)batch * n + row) * heads + head) * kHeadDim);
    }
    bool hold = true;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) {
            delta[i] += __shfl_xor_sync(0xFFFFFFFF, delta[i], lanes);
        }
        int row = i * kAtOnce + threadIdx.x / 8;
        if (threadIdx.x % 8 == 0) {
            hold &= write_statistics(&stats[blockIdx.x], row, tile * kTile + row < n,
                                     lse_of[i] * kLog2E, lse_0 * kLog2E, delta[i], scale);
        }
    }
    hold = __syncthreads_and(hold);
    if (threadIdx.x == 0) stats[blockIdx.x].weights_hold = hold;
}

// The same where delta (heads, batch, n) is there: a warp for each row tile of a head.
constexpr int kTilesOfBlock = 8;

__global__ void __launch_bounds__(32 * kTilesOfBlock)
    attention_row_statistics_of(RowStatistics* stats, const float* delta, const float* lse, int n,
                                int heads, int64_t rows, int blocks, float scale) {
    let_next_kernel_start();
    int block = blockIdx.x * kTilesOfBlock + threadIdx.x / 32;  // of the kernel after
    if (block >= blocks) return;
    int tiles = ceil_div(n, kTile), tile = block % tiles;
    int head = block / tiles % heads, batch = block / tiles / heads;
    lse += (int64_t)(block / tiles) * n;
    delta += head * rows + (int64_t)batch * n;
    bool hold = true;
#pragma unroll
    for (int i = threadIdx.x % 32; i < kTile; i += 32) {
        int row = tile * kTile + i;
        bool exists = row < n;
        int r = exists ? row : 0;
        hold &= write_statistics(&stats[block], i, exists, lse[r] * kLog2E, lse[0] * kLog2E,
                                 delta[r], scale);
    }
    hold = __all_sync(0xFFFFFFFF, hold);
    if (threadIdx.x % 32 == 0) stats[block].weights_hold = hold;
}

// ---- dw

constexpr int kThreads = 128;

template <typename T, int kHeadDim>
struct Backward {
    static constexpr int kTileElements = kChunks<kHeadDim> * kTile * kChunkColumns;
    static constexpr int kSlots = kHeadDim <= 64 ? 3 : 2;
    // Whether the last product of a visit runs into the next: then a slot is free one visit later.
    static constexpr bool kOverlap = kSlots > 2;
    static constexpr int kAhead = kSlots - (kOverlap ? 2 : 1);  // loads issued ahead
    static constexpr int kLoadBytes = 2 * kTileElements * sizeof(T) + sizeof(RowStatistics);
    static constexpr int kSharedBytes =
        (1 + kSlots) * (kLoadBytes + 2 * sizeof(Barrier)) + kSwizzleAtomBytes;
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 64 ? 3 : 2)
    attention_backward_long(const __grid_constant__ CUtensorMap grad_o_map,
                            const __grid_constant__ CUtensorMap w_map,
                            const __grid_constant__ CUtensorMap grad_w_map,
                            const __grid_constant__ CUtensorMap stats_map, int n, int heads,
                            float scale, bool causal) {
    using Config = Backward<T, kHeadDim>;
    constexpr int kSlots = Config::kSlots;

    // shared memory: slot 0 is the block's own tile, for good, and in the end its staging
    extern __shared__ char shared[];
    T* tiles_w = reinterpret_cast<T*>(swizzle_aligned(shared));
    T* tiles_grad_o = tiles_w + (1 + kSlots) * Config::kTileElements;
    auto tile_stats =
        reinterpret_cast<RowStatistics*>(tiles_grad_o + (1 + kSlots) * Config::kTileElements);
    auto loaded = reinterpret_cast<Barrier*>(tile_stats + 1 + kSlots);
    Barrier* released = loaded + 1 + kSlots;

    int tiles = ceil_div(n, kTile), tile_j = blockIdx.x % tiles;
    int head = blockIdx.x / tiles % heads, batch = blockIdx.x / tiles / heads;
    int first_stats = blockIdx.x / tiles * tiles;
    int warp = threadIdx.x / 32;

    if (threadIdx.x == 0) {
        for (int slot = 0; slot <= kSlots; ++slot) {
            barrier_init(&loaded[slot], 1);
            barrier_init(&released[slot], kThreads / 32);
        }
        barrier_init_done();
    }
    __syncthreads();

    auto load = [&](int slot, int tile) {
        barrier_expect(&loaded[slot], Config::kLoadBytes);
        load_rows<kHeadDim>(tiles_w + slot * Config::kTileElements, kTile, &w_map, &loaded[slot],
                            head, tile * kTile, batch);
        load_rows<kHeadDim>(tiles_grad_o + slot * Config::kTileElements, kTile, &grad_o_map,
                            &loaded[slot], head, tile * kTile, batch);
        wait_for_kernel_before();  // for the statistics alone
        // By a tensor map: racecheck takes a plain bulk copy for this thread's own write.
        load_tile(&tile_stats[slot], &stats_map, &loaded[slot], 0, first_stats + tile);
    };
    // The t-th streamed tile: those before the own, then those after.
    auto stream = [&](int t) { return t < tile_j ? t : t + 1; };
    if (threadIdx.x == 0) {
        load(0, tile_j);
        for (int t = 0; t < min(Config::kAhead, tiles - 1); ++t) load(1 + t, stream(t));
    }
    barrier_wait(&loaded[0], 0);

    // The slot of the t-th streamed tile, once it is there.
    auto await_streamed = [&](int t) {
        int slot = 1 + t % kSlots;
        barrier_wait(&loaded[slot], t / kSlots % 2);
        return slot;
    };
    // In its visit, a later one sets out.
    auto load_ahead = [&](int t) {
        int next = t + Config::kAhead;
        if (threadIdx.x == 0 && next < tiles - 1) {
            int slot = 1 + next % kSlots;
            if (next >= kSlots) barrier_wait(&released[slot], (next / kSlots - 1) % 2);
            load(slot, stream(next));
        }
    };
    int own_rows = n - tile_j * kTile;
    if (!causal && own_rows <= kFewRows) {
        LastRowsBackward<T, kHeadDim> tile(tiles_w, tiles_grad_o, tile_stats[0], scale);
        tile.visit(tiles_w, tiles_grad_o, tile_stats[0], 1, 0);
        for (int t = 0; t < tiles - 1; ++t) {
            load_ahead(t);
            int slot = await_streamed(t);
            tile.visit(tiles_w + slot * Config::kTileElements,
                       tiles_grad_o + slot * Config::kTileElements, tile_stats[slot], kTile / 16,
                       1 + t);
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(&released[slot]);
        }
        __syncthreads();  // nobody reads an operand any more
        tile.store(tiles_w, &grad_w_map, head, tile_j * kTile, batch);
        return;
    }
    BackwardTile<T, kHeadDim> tile(tiles_w, tiles_grad_o, tile_stats[0], scale);
    auto visit_slot = [&](auto part, auto columns, int slot, auto meanwhile) {
        tile.template visit<decltype(columns)::value, decltype(part)::value>(
            tiles_w + slot * Config::kTileElements, tiles_grad_o + slot * Config::kTileElements,
            tile_stats[slot], meanwhile);
    };
    constexpr std::integral_constant<int, kTile> kWhole;
    auto stream_one = [&](int t, auto visit_it) {
        visit_it(await_streamed(t));
        if (!Config::kOverlap) tile.finish();
        int done = t - Config::kOverlap;
        __syncwarp();  // every lane has read the statistics
        if (threadIdx.x % 32 == 0 && done >= 0) barrier_arrive(&released[1 + done % kSlots]);
    };
    auto visit_streamed = [&](auto part, int from, int to) {
        for (int t = from; t < to; ++t) {
            stream_one(t,
                       [&](int slot) { visit_slot(part, kWhole, slot, [&] { load_ahead(t); }); });
        }
    };
    if (causal) {
        visit_slot(std::integral_constant<Part, Part::kDiagonal>(), kWhole, 0, Nothing());
        visit_streamed(std::integral_constant<Part, Part::kAfter>(), 0, tile_j);
        visit_streamed(std::integral_constant<Part, Part::kBefore>(), tile_j, tiles - 1);
    } else {
        // Of a last tile with few rows no more is visited than there is.
        constexpr std::integral_constant<Part, Part::kBoth> kBoth;
        int rest = n % kTile, last = tiles - 2;
        bool few = rest > 0 && rest <= 32 && tile_j < tiles - 1;
        visit_slot(kBoth, kWhole, 0, Nothing());
        visit_streamed(kBoth, 0, few ? last : last + 1);
        tile.finish();
        if (few && rest <= 16) {
            stream_one(last, [&](int slot) {
                visit_slot(kBoth, std::integral_constant<int, 16>(), slot, Nothing());
                tile.finish();
            });
        } else if (few) {
            stream_one(last, [&](int slot) {
                visit_slot(kBoth, std::integral_constant<int, 32>(), slot, Nothing());
                tile.finish();
            });
        }
    }
    tile.finish();

    __syncthreads();  // nobody reads w_j any more
    if (tile_j * kTile + warp * 16 < n) {
        store_rows<kHeadDim>(tile.dw, 1.f, 1.f,
                             tiles_w + warp * (kChunks<kHeadDim> * 16 * kChunkColumns), &grad_w_map,
                             head, tile_j * kTile + warp * 16, batch);
    }
    if (threadIdx.x % 32 == 0) wait_stores_read<0>();
}

}  // namespace

int64_t attention_backward_long_scratch(int batch, int n, int heads) {
    return int64_t{batch} * heads * ceil_div(n, kTile) * sizeof(RowStatistics);
}

void attention_backward_long(const AttentionBackward& args, cudaStream_t stream) {
    dispatch(args.dtype, args.head_dim, [&](auto type, auto head_dim) {
        using T = decltype(type);
        constexpr int kHeadDim = decltype(head_dim)::value;
        using Config = Backward<T, kHeadDim>;
        int64_t width = (int64_t)args.heads * args.head_dim;
        int blocks = ceil_div(args.n, kTile) * args.batch * args.heads;
        auto stats = reinterpret_cast<RowStatistics*>(args.scratch);
        // Not launched early: the kernel after them reads w and dO before it waits for them.
        if (args.delta) {
            attention_row_statistics_of<<<ceil_div(blocks, kTilesOfBlock), 32 * kTilesOfBlock, 0,
                                          stream>>>(stats, args.delta, args.lse, args.n, args.heads,
                                                    int64_t{args.batch} * args.n, blocks,
                                                    args.scale);
        } else {
            attention_row_statistics<T, kHeadDim><<<blocks, kStatisticsThreads, 0, stream>>>(
                stats, static_cast<const T*>(args.grad_o), args.grad_o_stride_batch,
                args.grad_o_stride_row, static_cast<const T*>(args.o), args.lse, args.n, args.heads,
                args.scale);
        }
        check(cudaGetLastError(), "attention_row_statistics");
        auto map = [&](const void* data, int64_t stride_batch, int64_t stride_row, int box_rows) {
            return head_map(data, args.dtype, args.batch, args.n, args.heads, args.head_dim,
                            stride_batch, stride_row, box_rows);
        };
        constexpr int kWords = sizeof(RowStatistics) / sizeof(float);
        auto kernel = attention_backward_long<T, kHeadDim>;
        allow_shared_memory(kernel, Config::kSharedBytes);
        launch_early(
            kernel, blocks, kThreads, Config::kSharedBytes, stream,
            map(args.grad_o, args.grad_o_stride_batch, args.grad_o_stride_row, kTile),
            map(args.w, args.w_stride_batch, args.w_stride_row, kTile),
            map(args.grad_w, args.n * width, width, 16),
            make_tensor_map<2>(stats, Dtype::kFloat32, {kWords, blocks}, {kWords}, {kWords, 1}),
            args.n, args.heads, args.scale, args.causal);
    });
}

}  // namespace crate_kernels
