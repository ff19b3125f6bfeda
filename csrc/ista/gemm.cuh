// The GEMM of ISTA, in its own uses (docs/ista.md), and in those of a layer (docs/block.md):
//
//     forward   y  = relu(c + a b - t),  a = x, b = G        and the bits of y > 0, or moments
//     normed    y  = relu(rstd e (a b - mean s) + f - t)     the same of x = LN(z), a = z,
//       forward      b = diag(gamma) (I + G) / e, s its column sums, f = beta (I + G)
//     backward  dx = c + g b,            b = G^T, c = g      g = dy where the bits say so
//     plain     dx = c + a b,            a = c = g, b = G^T  the same where dy comes as g
//     weight    M  = sum of a^T b,       a = x, b = g        one sum for each part of the tokens
//     row sums  dO = a b,                a = dy, b = V       rowsum(dO * c) of each head, c = O;
//                                                            sums of the rows of a
//     normed    w  = rstd (a b - mean s) + f, a = x, b = (U diag(gamma))^T, s its column sums
//     residual  z  = c + a b + f, a = o, b = V^T, c = x      and moments
//
// and in those of CRATE-alpha's dictionaries (docs/overcomplete_ista.md), b = D or D^T:
//     encode    z  = relu(alpha a b - t),      a = x         and the bits of z > 0
//     refine    z  = relu(c + alpha a b - t),  a = r, c = z  the same
//     masked    e  = alpha a b,                a = dout      where the bits say so, else 0
//     masked sum     c + alpha a b,            a = dr, c = e the same
//     scaled sum     c + alpha a b,            a = z or e
//
// Blocks are persistent and come in clusters of two, which may share their rows of A or columns of
// B. One warp loads [128, 64] of A and [64, kBlockN] of B per stage; two warpgroups take tiles of
// the output in turn, so that one's epilogue hides behind the other's products. In the backward
// pass they mask dy on its way to the products, in registers, and put it back as g; the epilogue
// masks dy again.
#pragma once

#include "epilogue.cuh"

namespace crate_kernels {

// ---- producer: one thread

template <typename Config>
__device__ __forceinline__ void load_a(const GemmParams& p, char* to, Barrier* barrier,
                                       const Tile& tile, int k, int rank) {
    int row = tile.m_block * kBlockM, column = k * kBlockK;
    int half = rank * 64;
    if (p.n_per_cluster == 2) {
        to += rank * Config::kChunkBytes;
        if constexpr (Config::kTransposedA) {
            load_tile_for_both(to, &p.a, barrier, row + half, column);
        } else {
            load_tile_for_both(to, &p.a, barrier, column, row + half);
        }
    } else if constexpr (Config::kTransposedA) {
        load_tile(to, &p.a, barrier, row, column);
        load_tile(to + Config::kChunkBytes, &p.a, barrier, row + 64, column);
    } else {
        load_tile(to, &p.a, barrier, column, row);
    }
}

template <typename Config>
__device__ __forceinline__ void load_b(const GemmParams& p, char* to, Barrier* barrier,
                                       const Tile& tile, int k, int rank) {
    int row = k * kBlockK, column = tile.n_block * Config::kBlockN;
    bool shared = p.m_per_cluster == 2;
    if constexpr (Config::kTransposedB) {
#pragma unroll
        for (int chunk = 0; chunk < Config::kBlockN / 64; ++chunk) {
            char* start = to + chunk * Config::kChunkBytes;
            if (shared) {
                load_tile_for_both(start + rank * Config::kChunkBytes / 2, &p.b, barrier,
                                   column + 64 * chunk, row + rank * kBlockK / 2);
            } else {
                load_tile(start, &p.b, barrier, column + 64 * chunk, row);
            }
        }
    } else if (shared) {
        load_tile_for_both(to + rank * Config::kBytesB / 2, &p.b, barrier, row,
                           column + rank * Config::kBlockN / 2);
    } else {
        load_tile(to, &p.b, barrier, row, column);
    }
}

template <typename Config>
__device__ __forceinline__ void produce(const GemmParams& p, GemmShared<Config> shared) {
    RingPosition at;
    for (Schedule schedule(p); !schedule.done(p); schedule.advance(p)) {
        Tile tile = schedule.tile(p);
#pragma unroll 1  // in few registers
        for (int k = tile.k_begin; k < tile.k_end; ++k) {
            Barrier* loaded = shared.loaded(at.slot);
            barrier_wait(shared.free(at.slot), at.parity ^ 1);
            barrier_expect(loaded, Config::kStageBytes);
            load_a<Config>(p, shared.a(at.slot), loaded, tile, k, schedule.rank);
            load_b<Config>(p, shared.b(at.slot), loaded, tile, k, schedule.rank);
            at.advance<Config::kStages>();
        }
    }
}

// ---- consumers: products

template <typename Config>
__device__ __forceinline__ void multiply_stage(float (&sums)[2][Config::kSums], const char* a,
                                               const char* b, bool add) {
    uint64_t rows =
        Config::kTransposedA ? descriptor_transposed(a, Config::kChunkBytes) : descriptor(a);
    uint64_t columns =
        Config::kTransposedB ? descriptor_transposed(b, Config::kChunkBytes) : descriptor(b);
    constexpr int kStepA = Config::kTransposedA ? 128 : 2, kStepB = Config::kTransposedB ? 128 : 2;
#pragma unroll
    for (int step = 0; step < kBlockK / 16; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            wgmma<Config::kBlockN, typename Config::T>::template from_shared<Config::kTransposedA,
                                                                             Config::kTransposedB>(
                sums[half], rows + half * (Config::kChunkBytes >> 4) + step * kStepA,
                columns + step * kStepB, add || step > 0);
        }
    }
}

// What a consumer tells the producers of its cluster, a lane for each block.
struct StageRelease {
    uint32_t first_free;
    bool arrives;

    template <typename Config>
    __device__ StageRelease(const GemmParams& p, GemmShared<Config> shared, int rank) {
        bool shares = p.m_per_cluster * p.n_per_cluster == 2;
        int lane = threadIdx.x % 32;
        first_free = address_in_block(shared.free(0), shares ? lane & 1 : rank);
        arrives = lane < (shares ? 2 : 1);
    }
    __device__ __forceinline__ void operator()(int stage) const {
        if (arrives) barrier_arrive_at(first_free + stage * sizeof(Barrier));
    }
};

// The consumers' products go in turn. A barrier's parity tells only two phases apart, so a tile has
// to wait until the last stage of the one before is there; that one's products may still run.
struct Turn {
    bool first, last;  // of the block's tiles
    int consumer;

    __device__ __forceinline__ void await() const {
        if (!first) sync_threads_of(3 + consumer, 2 * 128);
    }
    __device__ __forceinline__ void pass() const {
        if (!last) arrive_among(3 + (consumer ^ 1), 2 * 128);
    }
};

// The sums over 64 rows of A, by one warp. Each tile of the output that has these rows sums its
// share of the k.
template <typename Config>
__device__ __forceinline__ void sum_rows_of_a(const GemmParams& p, GemmShared<Config> shared,
                                              int half) {
    Schedule schedule(p);
    StageRelease release(p, shared, schedule.rank);
    RingPosition at;
    int lane = threadIdx.x % 32, shares = ceil_div(p.n, Config::kBlockN);
    uint32_t position = shared_address(shared.a(0)) + half * Config::kChunkBytes + lane * 4;
    for (; !schedule.done(p); schedule.advance(p)) {
        Tile tile = schedule.tile(p);
        bool exists = tile.m_block < p.m_blocks && tile.n_block < shares;
        int next = exists ? tile.n_block : p.k_blocks;
#pragma unroll 1
        for (int k = 0; k < p.k_blocks; ++k) {
            barrier_wait(shared.loaded(at.slot), at.parity);
            if (k == next) {
                next += shares;
                float2 sum = {};
                uint32_t rows = position + at.slot * Config::kBytesA;
#pragma unroll 1
                for (int row = 0; row < 64; row += 8, rows += 8 * 128) {
                    uint32_t x[8];
#pragma unroll
                    for (int i = 0; i < 8; ++i) x[i] = load_shared_word((rows ^ i * 16) + i * 128);
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        float2 of_row = unpack<typename Config::T>(x[i]);
                        sum.x += of_row.x;
                        sum.y += of_row.y;
                    }
                }
                int column = k * kBlockK + 2 * lane;
                float* to = p.sums_of_a + int64_t(2 * tile.m_block + half) * p.k + column;
                if (column < p.k) *reinterpret_cast<float2*>(to) = sum;
            }
            __syncwarp();
            release(at.slot);
            at.advance<Config::kStages>();
        }
    }
}

// A tile's products, A from shared memory.
template <typename Config>
__device__ __forceinline__ void multiply(const GemmParams& p, GemmShared<Config> shared,
                                         const Tile& tile, RingPosition& at, StageRelease release,
                                         Turn turn, float (&sums)[2][Config::kSums]) {
    turn.await();
    int previous = 0;
    for (int k = tile.k_begin; k < tile.k_end; ++k) {
        barrier_wait(shared.loaded(at.slot), at.parity);
        if (k + 1 == tile.k_end) turn.pass();
        wgmma_fence();
        multiply_stage<Config>(sums, shared.a(at.slot), shared.b(at.slot), k > tile.k_begin);
        wgmma_commit();
        wgmma_wait<1>();
        if (k > tile.k_begin) release(previous);
        previous = at.slot;
        at.advance<Config::kStages>();
    }
    wgmma_wait<0>();
    release(previous);
}

// The same with dy for A, masked in registers. A stage is eight products of [64, 16] of A: while up
// to kRunning run, the next one's A is masked and that of the one kAhead later is loaded, as far as
// registers allow. Masked stages of the tile's own columns are also put back and leave as g.
template <typename Config>
__device__ __forceinline__ void multiply_masked(const GemmParams& p, GemmShared<Config> shared,
                                                const Tile& tile, RingPosition& at,
                                                StageRelease release, Turn turn,
                                                float (&sums)[2][Config::kSums]) {
    constexpr int kProducts = 2 * kBlockK / 16;
    constexpr int kRunning = Config::kBlockN > 128 ? 3 : 5, kAhead = Config::kBlockN > 128 ? 2 : 3;
    static_assert(kRunning + kAhead <= kProducts, "loaded over what has been multiplied");
    int m_block = min(tile.m_block, p.m_blocks - 1);  // a pair may be half a pair
    // Of the upper and the lower 64 rows: for this stage, and for the next.
    const uint32_t* mask = p.mask + int64_t(m_block) * p.k_blocks * kMaskWords;
    auto word = [&](int k, int half) {
        return load_word_now(mask + (min(k, p.k_blocks - 1) * kMaskWords + half * 128) +
                             threadIdx.x % 128);
    };
    uint32_t words[2] = {word(0, 0), word(0, 1)}, coming[2] = {word(1, 0), word(1, 1)};
    int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    uint32_t position = shared_address(shared.a(0)) + row * 128 + (lane / 16 ^ row % 8) * 16;
    auto address = [&](int product, int stage) {
        return (position + stage * Config::kBytesA ^ product / 2 << 5) +
               product % 2 * Config::kChunkBytes;
    };
    uint32_t a[kProducts][4] = {};
    auto load = [&](int product, int stage) { load_matrices(a[product], address(product, stage)); };
    int own = p.stores_g ? tile.n_block * (Config::kBlockN / kBlockK) : p.k_blocks;
    auto is_own = [&](int k) { return own <= k && k < own + Config::kBlockN / kBlockK; };
    bool leader = threadIdx.x % Config::kConsumerThreads == 0;

    turn.await();
    barrier_wait(shared.loaded(at.slot), at.parity);
    for (int i = 0; i < kAhead; ++i) load(i, at.slot);
    mask_fragment(a[0], words[0], 0);
    int stage = at.slot;
    for (int k = 0; k < p.k_blocks; ++k) {
        bool more = k + 1 < p.k_blocks, keeps = is_own(k), kept = is_own(k - 1);
        if (!more) turn.pass();
        int previous = stage;
        stage = at.slot;
        at.advance<Config::kStages>();
        uint32_t after[2] = {word(k + 2, 0), word(k + 2, 1)};
        uint64_t columns = descriptor(shared.b(stage));
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
            auto& now = a[i];
            wgmma_fence();
            wgmma<Config::kBlockN, typename Config::T>::template from_registers<kNo>(
                sums[i % 2], now[0], now[1], now[2], now[3], columns + i / 2 * 2, k > 0 || i > 1);
            wgmma_commit();
            if (keeps) store_matrices(address(i, stage), now);
            wgmma_wait<kRunning>();  // product i - kRunning is done
            if (k > 0 && i == kRunning - 1 && !kept) release(previous);
            if (k > 0 && i == kProducts - 1 && kept) {  // by now g has left it
                if (leader) wait_stores_read<0>();
                __syncwarp();
                release(previous);
            }
            int later = (i + kAhead) % kProducts;
            pin_registers(a[later]);
            if (later == 0 && more) barrier_wait(shared.loaded(at.slot), at.parity);
            load(later, i + kAhead < kProducts || !more ? stage : at.slot);
            if (i + 1 < kProducts) {
                mask_fragment(a[i + 1], words[(i + 1) % 2], (i + 1) / 2);
            } else {
                words[0] = coming[0];
                words[1] = coming[1];
                mask_fragment(a[0], words[0], 0);
            }
        }
        if (keeps) {
            fence_async_proxy();
            sync_threads_of(1 + turn.consumer, Config::kConsumerThreads);
            if (leader) {
                store_tile(&p.g, shared.a(stage), k * kBlockK, tile.m_block * kBlockM);
                commit_stores();
            }
        }
        coming[0] = after[0];
        coming[1] = after[1];
    }
    wgmma_wait<0>();
#pragma unroll
    for (auto& fragment : a) pin_registers(fragment);
    if (leader) wait_stores_read<0>();
    __syncwarp();
    release(stage);
}

template <typename Config>
__device__ __forceinline__ void consume(const GemmParams& p, GemmShared<Config> shared,
                                        int consumer) {
    Schedule schedule(p);
    RingPosition at, part_at;
    auto pass_over_tile = [&] {  // the other warpgroup's
        if (schedule.done(p)) return;
        Tile tile = schedule.tile(p);
        skip<Config::kStages>(at, tile.k_end - tile.k_begin);
        schedule.advance(p);
    };
    if (consumer == 1) pass_over_tile();
    if (Config::kHasC && threadIdx.x % Config::kConsumerThreads == 0 && !schedule.done(p)) {
        for (int part = 0; part < Config::kAhead; ++part) {
            load_part(p, shared, consumer, schedule.tile(p), part, part);
        }
    }
    StageRelease release(p, shared, schedule.rank);
    float sums[2][Config::kSums];
    while (!schedule.done(p)) {
        Tile tile = schedule.tile(p);
        if constexpr (Config::kColumnNumbers > 0) {
            load_numbers<Config>(p, shared.columns(consumer), shared.rows(consumer), tile);
        }
        uint32_t word;
        if constexpr (Config::kMasksResult) {
            const uint32_t* from = TileMask<Config>(p, tile).template word<0>();
            word = from ? load_word_now(from) : 0;
        }
        Turn turn{schedule.first(p), schedule.last(p), consumer};
        if constexpr (Config::kMasksA) {
            multiply_masked(p, shared, tile, at, release, turn, sums);
        } else {
            multiply(p, shared, tile, at, release, turn, sums);
        }
        pin_registers(sums[0]);
        pin_registers(sums[1]);
        RowMoments moments;
        finish_tile<Config, 0>(p, shared, consumer, schedule, tile, part_at, sums, word, moments);
        schedule.advance(p);
        pass_over_tile();
    }
    wait_stores_read<0>();  // before the memory goes
}

template <typename Config>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(Config::kThreads, 1)
    gemm_kernel(const __grid_constant__ GemmParams p) {
    // shared memory
    extern __shared__ __align__(kSwizzleAtomBytes) char memory[];
    GemmShared<Config> shared{memory};

    // barriers
    if (threadIdx.x == 0) {
        prefetch_map(&p.a);
        prefetch_map(&p.b);
        int blocks = p.m_per_cluster * p.n_per_cluster;
        int readers = 4 + (p.sums_of_a ? Config::kSummingWarps : 0);  // the consumer's warps first
        for (int stage = 0; stage < Config::kStages; ++stage) {
            barrier_init(shared.loaded(stage), 1);
            barrier_init(shared.free(stage), readers * blocks);
        }
        for (int slot = 0; slot < 2 * Config::kBuffers; ++slot) {
            barrier_init(shared.part_loaded(0, slot), 1);
        }
        barrier_init_done();
    }
    sync_cluster();
    let_next_kernel_start();
    wait_for_kernel_before();

    int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    if (warpgroup == 2) {
        give_up_registers<24>();
        if (threadIdx.x == 2 * 128) produce<Config>(p, shared);
        if constexpr (Config::kSummingWarps > 0) {
            int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) - 9;
            if (p.sums_of_a && warp >= 0 && warp < Config::kSummingWarps) {
                sum_rows_of_a<Config>(p, shared, warp);
            }
        }
    } else {
        take_registers<240>();
        consume<Config>(p, shared, warpgroup);
    }
    __syncwarp();
    sync_cluster();  // a neighbour may still write here
}

}  // namespace crate_kernels
