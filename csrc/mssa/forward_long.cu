// Tied-attention forward for any n, causal or not.
//
// A block is two warpgroups, each with a row tile of one head. Both tiles stay on chip and are the
// first columns visited; the other row tiles pass through a ring of buffers that the bulk copy
// engine fills ahead, each loaded once as key and value of both.
//
// Blocks in which a row's own score was no reference for its softmax do all their rows again at the
// end (forward_again.cuh). docs/mssa.md
#include "forward_again.cuh"
#include "launchers.h"

namespace crate_kernels {
namespace {

constexpr int kGroups = 2;
constexpr int kThreads = kGroups * 128;

template <typename T, int kHeadDim>
struct LongForward {
    static constexpr int kTileElements = kChunks<kHeadDim> * kTile * kChunkColumns;
    static constexpr int kTileWords = kChunks<kHeadDim> * kTile * kRowStep;
    static constexpr int kSlots = kHeadDim == 80 ? 4 : 8;
    // Loads issued ahead: a slot is free a visit later than its own, and no group waits for the
    // other at once.
    static constexpr int kAhead = kSlots - 3;
    static constexpr int kSharedBytes = (kGroups + kSlots) * kTileElements * sizeof(T) +
                                        (1 + 2 * kSlots) * sizeof(Barrier) + kSwizzleAtomBytes;
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 80 ? 2 : 1)
    attention_forward_long(const __grid_constant__ CUtensorMap w_map,
                           const __grid_constant__ CUtensorMap o_map, float* lse, int n, int heads,
                           float scale, bool causal) {
    using Config = LongForward<T, kHeadDim>;
    constexpr int kSlots = Config::kSlots;

    // shared memory: the block's own tiles, in the end staging, the ring, and barriers
    extern __shared__ char shared[];
    T* own = reinterpret_cast<T*>(swizzle_aligned(shared));
    T* ring = own + kGroups * Config::kTileElements;
    auto own_loaded = reinterpret_cast<Barrier*>(ring + kSlots * Config::kTileElements);
    Barrier *loaded = own_loaded + 1, *released = loaded + kSlots;
    const int warp = uniform(threadIdx.x / 32), group = warp / 4;
    T* w_j = own + group * Config::kTileElements;

    int tiles = ceil_div(n, kTile), blocks = ceil_div(tiles, kGroups);
    int block = blockIdx.x % blocks, index = blockIdx.x / blocks;
    if (causal) {  // the longest of all heads first
        int all = gridDim.x / blocks;
        block = blocks - 1 - blockIdx.x / all, index = blockIdx.x % all;
    }
    int head = index % heads, batch = index / heads;
    lse += (int64_t)index * n;
    int first_tile = block * kGroups, tile_j = first_tile + group;
    int groups = min(kGroups, tiles - first_tile);  // with rows
    int streamed = causal ? first_tile : tiles - groups;

    auto load = [&](T* to, int index, Barrier* barrier) {
        barrier_expect(barrier, Config::kTileElements * sizeof(T));
        load_rows<kHeadDim>(to, kTile, &w_map, barrier, head, index * kTile, batch);
    };
    // The t-th streamed tile: those before the own, then those after.
    auto stream = [&](int t) { return t < first_tile ? t : t + groups; };
    auto load_ahead = [&](int t) {
        if (t >= kSlots) barrier_wait(&released[t % kSlots], (t / kSlots - 1) % 2);
        load(ring + t % kSlots * Config::kTileElements, stream(t), &loaded[t % kSlots]);
    };
    if (threadIdx.x == 0) {
        barrier_init(own_loaded, groups);
        barrier_init_done();
        for (int g = 0; g < groups; ++g) {
            load(own + g * Config::kTileElements, first_tile + g, own_loaded);
        }
        for (int slot = 0; slot < kSlots; ++slot) {
            barrier_init(&loaded[slot], 1);
            barrier_init(&released[slot], groups * 4);
        }
        barrier_init_done();
        for (int t = 0; t < min(Config::kAhead, streamed); ++t) load_ahead(t);
    }
    __syncthreads();
    if (group >= groups) return;
    barrier_wait(own_loaded, 0);

    ForwardTile<T, kHeadDim> tile(w_j, kTile, scale);
    tile.begin(tile_j * kTile, n, causal);
    if (groups == 2 && (!causal || group == 1)) {
        tile.visit(low_word(own + (1 - group) * Config::kTileElements),
                   (first_tile + 1 - group) * kTile, n);
    }
    const uint32_t ring_words = low_word(ring);
    for (int t = 0; t < streamed; ++t) {
        barrier_wait(&loaded[t % kSlots], t / kSlots % 2);
        tile.visit(ring_words + t % kSlots * Config::kTileWords, stream(t) * kTile, n, [&] {
            int next = t + Config::kAhead;
            if (warp == 0 && next < streamed && elect_one()) load_ahead(next);
        });
        // What was visited before has gone into o.
        if (t > 0 && threadIdx.x % 32 == 0) barrier_arrive(&released[(t - 1) % kSlots]);
    }
    tile.finish();
    bool trusted = tile.complete(tile_j * kTile, n);
    // Nobody reads the block's tiles any more.
    if (!any_of_threads(1, groups * 128, !trusted)) {
        tile.store(w_j, &o_map, lse, head, batch, tile_j * kTile, n);
    } else {
        SearchedTile<T, kHeadDim> again(w_j, kTile, scale, tile_j * kTile, n, causal);
        int end = causal ? first_tile + groups : tiles;
        for (int i = 0; i < 2 * end; ++i) {  // all of them twice
            if (threadIdx.x % 128 == 0) {    // what each group arrives with and waits for
                group == 0 ? load(ring, i % end, own_loaded) : barrier_arrive(own_loaded);
            }
            barrier_wait(own_loaded, (i + 1) % 2);
            if (i == end) again.end_search();
            if (!causal || i % end <= tile_j) {
                i < end ? again.search(ring, i * kTile) : again.visit(ring, (i - end) * kTile);
            }
            sync_threads_of(1, groups * 128);  // before the next is loaded
        }
        again.end_visits();
        again.store(w_j, &o_map, lse, head, batch, tile_j * kTile, n);
    }
    if (threadIdx.x % 32 == 0) wait_stores_read<0>();
}

}  // namespace

void attention_forward_long(const AttentionForward& args, cudaStream_t stream) {
    dispatch(args.dtype, args.head_dim, [&](auto type, auto head_dim) {
        using T = decltype(type);
        constexpr int kHeadDim = decltype(head_dim)::value;
        using Config = LongForward<T, kHeadDim>;
        int64_t width = (int64_t)args.heads * args.head_dim;
        CUtensorMap w = head_map(args.w, args.dtype, args.batch, args.n, args.heads, args.head_dim,
                                 args.w_stride_batch, args.w_stride_row, kTile);
        CUtensorMap o = head_map(args.o, args.dtype, args.batch, args.n, args.heads, args.head_dim,
                                 args.n * width, width, 16);
        int tiles = ceil_div(args.n, kTile), heads = args.batch * args.heads;
        auto kernel = attention_forward_long<T, kHeadDim>;
        allow_shared_memory(kernel, Config::kSharedBytes);
        kernel<<<ceil_div(tiles, kGroups) * heads, kThreads, Config::kSharedBytes, stream>>>(
            w, o, args.lse, args.n, args.heads, args.scale, args.causal);
        check(cudaGetLastError(), "attention_forward_long");
    });
}

}  // namespace crate_kernels
