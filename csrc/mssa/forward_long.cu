// Tied-attention forward for any n, causal or not.
//
// A block is two warpgroups, each with a row tile of one head. Both tiles stay on chip and are the
// first columns visited; the other row tiles pass through a ring of buffers that the bulk copy
// engine fills ahead, each loaded once as key and value of both.
//
// A second kernel does those row tiles again in which a row's own score was no reference for its
// softmax (forward_step.cuh); mostly there are none. docs/mssa.md
#include <algorithm>

#include "forward_step.cuh"
#include "launchers.h"

namespace crate_kernels {
namespace {

constexpr int kGroups = 2;
constexpr int kThreads = kGroups * 128;

template <typename T, int kHeadDim>
struct LongForward {
    static constexpr int kTileElements = kChunks<kHeadDim> * kTile * kChunkColumns;
    static constexpr int kSlots = kHeadDim == 80 ? 4 : 8;
    // Loads issued ahead: a slot is free a visit later than its own, and no group waits for the
    // other at once.
    static constexpr int kAhead = kSlots - 3;
    static constexpr int kSharedBytes =
        (kGroups + kSlots) * kTileElements * sizeof(T) + kSwizzleAtomBytes;
};

// Visits that overlap: the product of p with w is left to the next visit, and runs while the
// exponentials of that one are taken.
template <typename T, int kHeadDim>
struct OverlappingTile : ForwardTile<T, kHeadDim> {
    using Base = ForwardTile<T, kHeadDim>;
    uint32_t p[kTile / 4];

    __device__ __forceinline__ OverlappingTile(const T* w_j, float scale)
        : Base(w_j, kTile, scale) {
        this->sum_0 = this->sum_1 = 0;
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) this->o[i] = 0;
        pin_registers(this->o);  // zero before a product starts
    }

    // Rows from first_i on; w_before are those visited before. The first tile to visit is the tile
    // itself.
    template <bool kFirst>
    __device__ __forceinline__ void visit(const T* w_i, const T* w_before, int first_i, int n,
                                          bool causal) {
        float s[kTile / 2];
        wgmma_fence();
        multiply_rows<T, kHeadDim, kTile>(s, this->queries, RowsOperand(w_i, kTile));
        wgmma_commit();
        if constexpr (kFirst) {
            wgmma_wait<0>();
        } else {
            start_product(w_before);
            wgmma_wait<1>();
        }
        pin_registers(s);
        if constexpr (kFirst) this->take_own_scores(s);
        float e[kTile / 2];  // p, not rounded: its registers are still in use
#pragma unroll
        for (int r = 0; r < kTile / 2; ++r) e[r] = s[r];
        this->template mask<kTile>(e, first_i, n, kFirst && causal);
        float more_0 = 0, more_1 = 0;  // shorter chains of additions
#pragma unroll
        for (int r = 0; r < kTile / 2; r += 4) {
            this->sum_0 += e[r] = exponential(e[r], this->reference_0);
            more_0 += e[r + 1] = exponential(e[r + 1], this->reference_0);
            this->sum_1 += e[r + 2] = exponential(e[r + 2], this->reference_1);
            more_1 += e[r + 3] = exponential(e[r + 3], this->reference_1);
        }
        this->sum_0 += more_0;
        this->sum_1 += more_1;
        if constexpr (!kFirst) await_product();
#pragma unroll
        for (int r = 0; r < kTile / 2; r += 2) p[r / 2] = pack<T>(e[r], e[r + 1]);
    }
    __device__ __forceinline__ float exponential(float s, float reference) {
        return exp2_approx(s * this->scale_log2 - reference);
    }
    // After the last visit.
    __device__ __forceinline__ void finish(const T* w_i) {
        wgmma_fence();
        start_product(w_i);
        await_product();
    }

    __device__ __forceinline__ void start_product(const T* w_i) {
        add_product<T, kHeadDim, kTile>(
            this->o, p, low_word_transposed(w_i, kTile * kChunkColumns * sizeof(T)));
    }
    __device__ __forceinline__ void await_product() {
        wgmma_wait<0>();
        pin_registers(this->o);
        pin_registers(p);  // not to be written while the product reads them
    }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 80 ? 2 : 1)
    attention_forward_long(const __grid_constant__ CUtensorMap w_map,
                           const __grid_constant__ CUtensorMap o_map, float* lse, int n, int heads,
                           float scale, bool causal) {
    using Config = LongForward<T, kHeadDim>;
    constexpr int kSlots = Config::kSlots;

    // shared memory: the block's own tiles, in the end staging, and the ring
    extern __shared__ char shared[];
    __shared__ Barrier own_loaded, loaded[kSlots], released[kSlots];
    T* own = reinterpret_cast<T*>(swizzle_aligned(shared));
    T* ring = own + kGroups * Config::kTileElements;
    int group = threadIdx.x / 128;
    T* w_j = own + group * Config::kTileElements;

    int tiles = ceil_div(n, kTile), blocks = ceil_div(tiles, kGroups);
    int block = blockIdx.x % blocks;
    if (causal) block = blocks - 1 - block;  // the longest first
    int head = blockIdx.x / blocks % heads, batch = blockIdx.x / blocks / heads;
    lse += (int64_t)(blockIdx.x / blocks) * n;
    int first_tile = block * kGroups, tile_j = first_tile + group;
    int groups = min(kGroups, tiles - first_tile);  // with rows
    int streamed = causal ? first_tile : tiles - groups;

    if (threadIdx.x == 0) {
        barrier_init(&own_loaded, 1);
        for (int slot = 0; slot < kSlots; ++slot) {
            barrier_init(&loaded[slot], 1);
            barrier_init(&released[slot], groups * 4);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (group >= groups) return;

    // The t-th streamed tile: those before the own, then those after.
    auto stream = [&](int t) { return t < first_tile ? t : t + groups; };
    auto load = [&](int t) {
        int slot = t % kSlots;
        if (t >= kSlots) barrier_wait(&released[slot], (t / kSlots - 1) % 2);
        barrier_expect(&loaded[slot], Config::kTileElements * sizeof(T));
        load_rows<kHeadDim>(ring + slot * Config::kTileElements, kTile, &w_map, &loaded[slot], head,
                            stream(t) * kTile, batch);
    };
    if (threadIdx.x == 0) {
        barrier_expect(&own_loaded, groups * Config::kTileElements * sizeof(T));
        for (int g = 0; g < groups; ++g) {
            load_rows<kHeadDim>(own + g * Config::kTileElements, kTile, &w_map, &own_loaded, head,
                                (first_tile + g) * kTile, batch);
        }
        for (int t = 0; t < min(Config::kAhead, streamed); ++t) load(t);
    }
    barrier_wait(&own_loaded, 0);

    OverlappingTile<T, kHeadDim> tile(w_j, scale);
    tile.template visit<true>(w_j, w_j, tile_j * kTile, n, causal);
    const T* before = w_j;
    if (groups == 2 && (!causal || group == 1)) {
        const T* w_i = own + (1 - group) * Config::kTileElements;
        tile.template visit<false>(w_i, before, (first_tile + 1 - group) * kTile, n, false);
        before = w_i;
    }
    for (int t = 0; t < streamed; ++t) {
        int slot = t % kSlots;
        if (threadIdx.x == 0 && t + Config::kAhead < streamed) load(t + Config::kAhead);
        barrier_wait(&loaded[slot], t / kSlots % 2);
        const T* w_i = ring + slot * Config::kTileElements;
        tile.template visit<false>(w_i, before, stream(t) * kTile, n, false);
        before = w_i;
        if (t == 0) {
            if (groups == 2) arrive_among(1 + (1 - group), kThreads);
        } else if (threadIdx.x % 32 == 0) {
            barrier_arrive(&released[(t - 1) % kSlots]);
        }
    }
    tile.finish(before);
    if (groups == 2 && streamed == 0) arrive_among(1 + (1 - group), kThreads);
    let_next_kernel_start();
    // Where the own scores would not do, attention_forward_again finds a NaN.
    if (!__all_sync(0xFFFFFFFF, tile.complete(tile_j * kTile, n))) {
        tile.sum_0 = tile.sum_1 = kNaN;
    }
    if (groups == 2) sync_threads_of(1 + group, kThreads);  // nobody reads w_j any more
    tile.store(w_j, &o_map, lse, head, batch, tile_j * kTile, n);
    if (threadIdx.x % 32 == 0) wait_stores_read<0>();
}

// Blocks share out the row tiles, and look for NaN in their lse.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(128)
    attention_forward_again(const __grid_constant__ CUtensorMap w_map,
                            const __grid_constant__ CUtensorMap o_map, float* lse_of_heads,
                            int all_tiles, int n, int heads, float scale, bool causal) {
    using Config = LongForward<T, kHeadDim>;
    extern __shared__ char shared[];
    __shared__ Barrier own_loaded, loaded;
    T* w_j = reinterpret_cast<T*>(swizzle_aligned(shared));
    T* w_i = w_j + Config::kTileElements;
    T* staging = w_i + Config::kTileElements;

    if (threadIdx.x == 0) {
        barrier_init(&own_loaded, 1);
        barrier_init(&loaded, 1);
        barrier_init_done();
    }
    __syncthreads();

    // The block's share of the tiles, whose lse lie together.
    int share = ceil_div(all_tiles, int(gridDim.x)), tiles = ceil_div(n, kTile);
    int begin = min(blockIdx.x * share, all_tiles), end = min(begin + share, all_tiles);
    auto first_row = [&](int index) {
        return (int64_t)(index / tiles) * n + index % tiles * kTile;
    };
    bool any = false;
    wait_for_kernel_before();
#pragma unroll 8
    for (int64_t row = first_row(begin) + threadIdx.x; row < first_row(end); row += 128) {
        any |= isnan(lse_of_heads[row]);
    }
    if (!__syncthreads_or(any)) return;

    uint32_t own_parity = 0, parity = 0;
    for (int index = begin; index < end; ++index) {
        int tile_j = index % tiles, head = index / tiles % heads, batch = index / tiles / heads;
        float* lse = lse_of_heads + (int64_t)(index / tiles) * n;
        int row = tile_j * kTile + threadIdx.x % kTile;
        if (!__syncthreads_or(row < n && isnan(lse[row]))) continue;

        auto load = [&](T* to, int tile, Barrier* barrier) {
            if (threadIdx.x > 0) return;
            barrier_expect(barrier, Config::kTileElements * sizeof(T));
            load_rows<kHeadDim>(to, kTile, &w_map, barrier, head, tile * kTile, batch);
        };
        auto load_other = [&](int tile) {
            __syncthreads();  // nobody reads the tile before
            load(w_i, tile, &loaded);
            barrier_wait(&loaded, parity);
            parity ^= 1;
        };
        load(w_j, tile_j, &own_loaded);
        barrier_wait(&own_loaded, own_parity);
        own_parity ^= 1;

        int last = causal ? tile_j + 1 : tiles;
        ForwardTile<T, kHeadDim> tile(w_j, kTile, scale);
        tile.begin_search();
        tile.search(w_j, kTile, tile_j * kTile, n, causal);
        for (int i = 0; i < last; ++i) {
            if (i == tile_j) continue;
            load_other(i);
            tile.search(w_i, kTile, i * kTile, n, false);
        }
        tile.end_search();
        tile.template visit<true>(w_j, kTile, tile_j * kTile, n, causal, true);
        for (int i = 0; i < last; ++i) {
            if (i == tile_j) continue;
            load_other(i);
            tile.template visit<false>(w_i, kTile, i * kTile, n, false, true);
        }
        tile.complete(tile_j * kTile, n);
        tile.store(staging, &o_map, lse, head, batch, tile_j * kTile, n);
        __syncthreads();
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
        auto again = attention_forward_again<T, kHeadDim>;
        int bytes = 3 * Config::kTileElements * sizeof(T) + kSwizzleAtomBytes;
        allow_shared_memory(again, bytes);
        launch_early(again, std::min(tiles * heads, 2 * multiprocessors()), 128, bytes, stream, w,
                     o, args.lse, tiles * heads, args.n, args.heads, args.scale, args.causal);
    });
}

}  // namespace crate_kernels
