// The epilogue of the ISTA GEMM, by parts of [64 rows][128 bytes]: c comes into shared memory,
// becomes the output there and leaves.
#pragma once

#include "../common/fragments.cuh"
#include "../common/math.cuh"
#include "tiles.cuh"

namespace crate_kernels {

// What a thread has of 16 columns of a part, by pairs: columns 8 e + 2 pair and the next of row
// 16 warp + group + 8 h.
using Pairs = float2[2][2];  // [e][h]

template <typename Config>
struct PartPosition {
    using Out = typename Config::Out;
    char* shared;
    int offset;

    __device__ PartPosition(char* shared, int part) : shared(shared) {
        int lane = threadIdx.x % 32, rows = threadIdx.x % 128 / 32 * 16;
        if constexpr (sizeof(Out) == 2) {  // of the matrices' rows, not of the thread's elements
            int row = rows + lane % 16;
            offset = part + row * 128 + (lane / 16 ^ row % 8) * 16;
        } else {
            int row = rows + lane / 4, pair = lane % 4;
            offset = part + row * 128 + (row % 8 ^ pair / 2) * 16 + pair % 2 * 8;
        }
    }
    __device__ uint32_t matrices(int block) const {
        return shared_address(shared) + (offset ^ block << 5);
    }
    __device__ float2* pair(int block, int e, int h) const {
        return reinterpret_cast<float2*>(shared + (offset ^ (2 * block + e) << 5) + h * 8 * 128);
    }
    __device__ void read(int block, Pairs& pairs) const {
        uint32_t packed[4];
        if constexpr (sizeof(Out) == 2) load_matrices(packed, matrices(block));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(Out) == 2) {
                pairs[i / 2][i % 2] = unpack<Out>(packed[i]);
            } else {
                pairs[i / 2][i % 2] = *pair(block, i / 2, i % 2);
            }
        }
    }
    // Masked by the word, where kMasks.
    template <bool kMasks>
    __device__ void write(int block, const Pairs& pairs, uint32_t word) const {
        static_assert(!kMasks || sizeof(Out) == 2, "pairs of 2-byte elements");
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 two = pairs[i / 2][i % 2];
            if constexpr (sizeof(Out) == 2) {
                packed[i] = pack<Out>(two.x, two.y);
            } else {
                *pair(block, i / 2, i % 2) = two;
            }
        }
        if constexpr (kMasks) mask_fragment(packed, word, block);
        if constexpr (sizeof(Out) == 2) store_matrices(matrices(block), packed);
    }
};

// sums = c + sums, or c + alpha sums; the backward pass masks c.
template <typename Config, int kPart>
__device__ __forceinline__ void add_part(PartPosition<Config> part, float alpha,
                                         float (&sums)[Config::kSums], uint32_t word) {
    constexpr int kFirst = Config::column_of(kPart) / 8;
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; j += 2) {
        Pairs pairs;
        part.read(j / 2, pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int e = i / 2, h = i % 2, in_word = (kFirst + j + e) % 8;
            float2 c = pairs[e][h];
            if constexpr (Config::kProduct == Product::kBackward) {
                if (!(word & mask_bit(in_word, h, 0))) c.x = 0;
                if (!(word & mask_bit(in_word, h, 1))) c.y = 0;
            }
            float& first = sums[4 * (kFirst + j + e) + 2 * h];
            float& second = sums[4 * (kFirst + j + e) + 2 * h + 1];
            if constexpr (Config::kScales) first *= alpha, second *= alpha;
            first += c.x;
            second += c.y;
        }
    }
}

// The sums of out * c along the rows of a part, which is a head of 64 columns.
template <typename Config, int kPart>
__device__ __forceinline__ void sum_rows(const GemmParams& p, PartPosition<Config> part, int column,
                                         int row, const float (&sums)[Config::kSums]) {
    constexpr int kFirst = Config::column_of(kPart) / 8;
    float2 along[2] = {};
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; j += 2) {
        Pairs pairs;
        part.read(j / 2, pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int e = i / 2, h = i % 2;
            along[h].x += sums[4 * (kFirst + j + e) + 2 * h] * pairs[e][h].x;
            along[h].y += sums[4 * (kFirst + j + e) + 2 * h + 1] * pairs[e][h].y;
        }
    }
    row += threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float sum = row_sum(along[h].x + along[h].y);
        if (threadIdx.x % 4 == 0 && column < p.n && row + 8 * h < p.rows) {
            p.row_sums[int64_t(column / 64) * p.rows + row + 8 * h] = sum;
        }
    }
}

// The numbers of a tile's columns and rows into shared memory.
template <typename Config>
__device__ __forceinline__ void load_numbers(const GemmParams& p, float* to, float2* rows,
                                             const Tile& tile) {
    static_assert(Config::kConsumerThreads == kBlockM, "a row each");
    if constexpr (Config::kNorms) {
        int row = min(tile.m_block * kBlockM + int(threadIdx.x % kBlockM), p.rows - 1);
        rows[threadIdx.x % kBlockM] = load_pair_now(p.row_statistics + row);
    }
    for (int i = threadIdx.x % 128; i < Config::kBlockN; i += 128) {
        int column = min(tile.n_block * Config::kBlockN + i, p.n - 1);
        float* numbers = to + i * Config::kColumnNumbers;
        numbers[0] = (p.shift ? __ldg(p.shift + column) : 0) - p.threshold;
        if constexpr (Config::kColumnNumbers > 1) numbers[1] = __ldg(p.column_sums + column);
        if constexpr (Config::kColumnNumbers > 2) numbers[2] = __ldg(p.column_scales + column);
    }
}

struct ColumnPair {
    float2 shift, sum, scale;
};

// Those of two neighbours.
template <int kNumbers>
__device__ __forceinline__ ColumnPair read_columns(const float* from) {
    const float2* two = reinterpret_cast<const float2*>(from);
    if constexpr (kNumbers == 1) {
        return {.shift = two[0]};
    } else if constexpr (kNumbers == 2) {
        float4 all = *reinterpret_cast<const float4*>(from);
        return {.shift = {all.x, all.z}, .sum = {all.y, all.w}, .scale = {1, 1}};
    } else {
        float2 a = two[0], b = two[1], c = two[2];
        return {.shift = {a.x, b.y}, .sum = {a.y, c.x}, .scale = {b.x, c.y}};
    }
}

// What the columns j and, where the product is normed, the rows have of their own: sums = rstd
// scale (sums - mean sum) + shift, or sums + shift.
template <typename Config, int kPart>
__device__ __forceinline__ void norm_columns(int j, const float* columns,
                                             const float2 (&statistics)[2],
                                             float (&sums)[Config::kSums]) {
    constexpr int kFirst = Config::column_of(kPart) / 8, kNumbers = Config::kColumnNumbers;
    int column = Config::column_of(kPart) + 8 * j + threadIdx.x % 4 * 2;
    auto [shift, sum, scale] = read_columns<kNumbers>(columns + column * kNumbers);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float& first = sums[4 * (kFirst + j) + 2 * h];
        float& second = sums[4 * (kFirst + j) + 2 * h + 1];
        if constexpr (Config::kNorms) {
            auto [mean, rstd] = statistics[h];
            first = rstd * scale.x * (first - mean * sum.x) + shift.x;
            second = rstd * scale.y * (second - mean * sum.y) + shift.y;
        } else {
            first += shift.x;
            second += shift.y;
        }
    }
}

// Of the two rows of a half that a thread has elements of: sums of the output and of its squares
// along the tile.
using RowMoments = float2[2];

template <typename Config, int kPart>
__device__ __forceinline__ void add_moments(RowMoments& moments,
                                            const float (&sums)[Config::kSums]) {
    constexpr int kFirst = Config::column_of(kPart) / 8;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float2 sum{0, 0}, square{0, 0};
#pragma unroll
        for (int j = 0; j < Config::kPartColumns / 8; ++j) {
            float first = sums[4 * (kFirst + j) + 2 * h];
            float second = sums[4 * (kFirst + j) + 2 * h + 1];
            sum.x += first, sum.y += second;
            square.x += first * first, square.y += second * second;
        }
        moments[h].x += sum.x + sum.y;
        moments[h].y += square.x + square.y;
    }
}

// Adds up what four threads have of a row.
__device__ __forceinline__ void write_moments(const GemmParams& p, const RowMoments& moments,
                                              int n_block, int row) {
    row += threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float2 all{row_sum(moments[h].x), row_sum(moments[h].y)};
        if (threadIdx.x % 4 == 0 && row + 8 * h < p.rows) {
            p.moments[int64_t(n_block) * p.rows + row + 8 * h] = all;
        }
    }
}

// The output, which is left in sums as well, but for what the word masks of it.
template <typename Config, int kPart>
__device__ __forceinline__ void write_part(const GemmParams& p, PartPosition<Config> part,
                                           const float* columns, const float2* rows, uint32_t word,
                                           float (&sums)[Config::kSums]) {
    constexpr int kFirst = Config::column_of(kPart) / 8;
    rows += Config::half_of(kPart) * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    float2 statistics[2] = {};
    if constexpr (Config::kNorms) statistics[0] = rows[0], statistics[1] = rows[8];
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; j += 2) {
        if constexpr (Config::kColumnNumbers > 0) {
            norm_columns<Config, kPart>(j, columns, statistics, sums);
            norm_columns<Config, kPart>(j + 1, columns, statistics, sums);
        }
        Pairs pairs;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& first = sums[4 * (kFirst + j) + 4 * (i / 2) + 2 * (i % 2)];
            float& second = sums[4 * (kFirst + j) + 4 * (i / 2) + 2 * (i % 2) + 1];
            if constexpr (Config::kScales && !Config::kHasC) first *= p.alpha, second *= p.alpha;
            if constexpr (Config::kClips) {
                if constexpr (!Config::kNorms) first -= p.threshold, second -= p.threshold;
                first = zero_or_more(first);
                second = zero_or_more(second);
            }
            pairs[i / 2][i % 2] = {first, second};
        }
        part.template write<Config::kMasksResult>(j / 2, pairs, word);
    }
}

// The largest number that becomes zero when it is rounded.
template <typename T>
inline constexpr float kRoundedToZero = __is_same(T, __half)          ? 0x1p-25f
                                        : __is_same(T, __nv_bfloat16) ? 0x1p-134f
                                                                      : 0;

// The bits of what is not zero in a part of the output.
template <typename Config, int kPart>
__device__ __forceinline__ uint32_t bits_of_part(const float (&sums)[Config::kSums]) {
    constexpr int kFirst = Config::column_of(kPart) / 8;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                bool is_zero =
                    sums[4 * (kFirst + j) + 2 * h + e] <= kRoundedToZero<typename Config::Out>;
                if (!is_zero) word |= mask_bit((kFirst + j) % 8, h, e);
            }
        }
    }
    return word;
}

// This thread's words of a tile's mask.
template <typename Config>
struct TileMask {
    uint32_t* first;
    int blocks;  // those that there are from here on, 0 without a mask

    __device__ TileMask(const GemmParams& p, const Tile& tile) {
        int block = tile.n_block * Config::kBlockN / kBlockK;
        const int& in_row = Config::kScales ? p.n_blocks : p.k_blocks;  // ISTA's n is k
        blocks = p.mask && tile.m_block < p.m_blocks ? in_row - block : 0;
        first = p.mask + (int64_t(tile.m_block) * in_row + block) * kMaskWords + threadIdx.x % 128;
    }
    template <int kPart>
    __device__ __forceinline__ uint32_t* word() const {
        constexpr int kBlock = Config::column_of(kPart) / kBlockK;
        constexpr int kHalf = Config::half_of(kPart);
        return kBlock < blocks ? first + kBlock * kMaskWords + kHalf * 128 : nullptr;
    }
};

template <typename Config>
__device__ __forceinline__ void load_part(const GemmParams& p, GemmShared<Config> shared,
                                          int consumer, const Tile& tile, int part, int slot) {
    Barrier* barrier = shared.part_loaded(consumer, slot);
    barrier_expect(barrier, Config::kPartBytes);
    load_tile(shared.base + shared.part_offset(consumer, slot), &p.c, barrier,
              tile.n_block * Config::kBlockN + Config::column_of(part),
              tile.m_block * kBlockM + Config::half_of(part) * 64);
}

// Parts kPart, kPart + 1, ... of the tile that the schedule is at; kAhead parts later ones of c
// (maybe of the next tile) are loaded meanwhile. `word` is of the mask that is being made, or this
// part's of the one that masks the output; `moments` are of the tile's rows so far.
template <typename Config, int kPart>
__device__ __forceinline__ void finish_tile(const GemmParams& p, GemmShared<Config> shared,
                                            int consumer, const Schedule& schedule,
                                            const Tile& tile, RingPosition& at,
                                            float (&sums)[2][Config::kSums], uint32_t& word,
                                            RowMoments& moments) {
    bool leader = threadIdx.x % Config::kConsumerThreads == 0;
    int column = tile.n_block * Config::kBlockN + Config::column_of(kPart);
    int row = tile.m_block * kBlockM + Config::half_of(kPart) * 64;
    TileMask<Config> mask(p, tile);
    PartPosition<Config> part(shared.base, shared.part_offset(consumer, at.slot));
    auto& part_sums = sums[Config::half_of(kPart)];

    // the mask
    uint32_t kept = 0;
    if constexpr (Config::kProduct == Product::kBackward) {
        const uint32_t* from = mask.template word<kPart>();
        if (from) kept = load_word_now(from);
    } else if constexpr (Config::kMasksResult) {  // the part's was loaded before
        kept = word;
        if constexpr (kPart + 1 < Config::kParts) {
            const uint32_t* from = mask.template word<kPart + 1>();
            if (from) word = load_word_now(from);
        }
    }

    // c
    if constexpr (Config::kHasC) {
        barrier_wait(shared.part_loaded(consumer, at.slot), at.parity);
        if constexpr (Config::kProduct == Product::kRowSums) {
            sum_rows<Config, kPart>(p, part, column, row, part_sums);
        } else {
            add_part<Config, kPart>(part, p.alpha, part_sums, kept);
        }
        if constexpr (Config::kColumnNumbers > 0 && kPart == 0) {
            sync_threads_of(1 + consumer, Config::kConsumerThreads);  // load_numbers is done
        }
    } else {
        if (leader) wait_stores_read<Config::kBuffers - 1>();
        sync_threads_of(1 + consumer, Config::kConsumerThreads);
    }

    // output
    write_part<Config, kPart>(p, part, shared.columns(consumer), shared.rows(consumer), kept,
                              part_sums);
    fence_async_proxy();
    sync_threads_of(1 + consumer, Config::kConsumerThreads);
    if (leader) {
        const char* from = shared.base + shared.part_offset(consumer, at.slot);
        if constexpr (!Config::kHasC) {
            store_tile(&p.out, from, column, row, tile.part, 0);
        } else {
            store_tile(&p.out, from, column, row);
        }
        commit_stores();
    }
    if constexpr (Config::kHasMoments) {
        if constexpr (Config::column_of(kPart) == 0) moments[0] = moments[1] = {};
        if (p.moments && column < p.n) add_moments<Config, kPart>(moments, part_sums);
        constexpr bool kEndsHalf =
            Config::column_of(kPart) + Config::kPartColumns == Config::kBlockN;
        if constexpr (kEndsHalf) {
            bool exists = tile.n_block * Config::kBlockN < p.n;  // of a pair maybe half a pair
            if (p.moments && exists) write_moments(p, moments, tile.n_block, row);
        }
    }
    if constexpr (Config::kClips) {
        constexpr int kInWord = kPart % Config::kPartsOfWord;
        uint32_t* to = mask.template word<kPart>();
        if (to) {
            word = bits_of_part<Config, kPart>(part_sums) | (kInWord > 0 ? word : 0);
            if constexpr (kInWord + 1 == Config::kPartsOfWord) *to = word;
        }
    }

    // a later part of c, where the output before this one was
    if constexpr (Config::kHasC) {
        if (leader) {
            wait_stores_read<1>();
            constexpr int kComing = kPart + Config::kAhead;
            int slot = (at.slot + Config::kAhead) % Config::kBuffers;
            if constexpr (kComing < Config::kParts) {
                load_part(p, shared, consumer, tile, kComing, slot);
            } else {
                Schedule next = schedule.next_but_one(p);
                if (!next.done(p)) {
                    load_part(p, shared, consumer, next.tile(p), kComing - Config::kParts, slot);
                }
            }
        }
    }
    at.template advance<Config::kBuffers>();
    if constexpr (kPart + 1 < Config::kParts) {
        finish_tile<Config, kPart + 1>(p, shared, consumer, schedule, tile, at, sums, word,
                                       moments);
    }
}

}  // namespace crate_kernels
