// The epilogue of the ISTA GEMM, by parts of [64 rows][128 bytes]: c comes into shared memory,
// becomes the output there and leaves.
#pragma once

#include "../common/fragments.cuh"
#include "../common/math.cuh"
#include "tiles.cuh"

namespace crate_kernels {

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
    if constexpr (__is_same(T, __half)) {
        return __half22float2(reinterpret_cast<__half2&>(packed));
    } else {
        return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(packed));
    }
}

template <typename Out>
__device__ __forceinline__ float2 read_pair(const char* from) {
    if constexpr (sizeof(Out) == 4) {
        return *reinterpret_cast<const float2*>(from);
    } else {
        return unpack<Out>(*reinterpret_cast<const uint32_t*>(from));
    }
}

template <typename Out>
__device__ __forceinline__ void write_pair(char* to, float2 pair) {
    if constexpr (sizeof(Out) == 4) {
        *reinterpret_cast<float2*>(to) = pair;
    } else {
        *reinterpret_cast<uint32_t*>(to) = pack<Out>(pair.x, pair.y);
    }
}

// Where a thread has columns 8 j + 2 pair and the next of row 16 warp + group + 8 h of a part.
template <typename Config>
struct PartPosition {
    char* shared;
    int offset;

    __device__ PartPosition(char* shared, int part) : shared(shared) {
        int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        int group = row % 8, pair = threadIdx.x % 4;
        offset = part + row * 128 +
                 (sizeof(typename Config::Out) == 2 ? group * 16 + pair * 4
                                                    : (group ^ pair / 2) * 16 + pair % 2 * 8);
    }
    __device__ char* at(int j, int h) const {
        constexpr int kShift = sizeof(typename Config::Out) == 2 ? 4 : 5;
        return shared + (offset ^ j << kShift) + h * 8 * 128;
    }
};

// sums += c, which the backward pass masks.
template <typename Config, int kPart>
__device__ __forceinline__ void add_part(PartPosition<Config> part, float (&sums)[Config::kSums],
                                         uint32_t word) {
    constexpr int kFirst = Config::column_of(kPart) / 8;
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; ++j) {
        int in_word = (kFirst + j) % 8;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float2 c = read_pair<typename Config::Out>(part.at(j, h));
            if constexpr (Config::kProduct == Product::kBackward) {
                if (!(word & mask_bit(in_word, h, 0))) c.x = 0;
                if (!(word & mask_bit(in_word, h, 1))) c.y = 0;
            }
            sums[4 * (kFirst + j) + 2 * h] += c.x;
            sums[4 * (kFirst + j) + 2 * h + 1] += c.y;
        }
    }
}

// The sums of out * c along the rows of a part, which is a head of 64 columns.
template <typename Config, int kPart>
__device__ __forceinline__ void sum_rows(const GemmParams& p, PartPosition<Config> part, int column,
                                         int row, const float (&sums)[Config::kSums]) {
    constexpr int kFirst = Config::column_of(kPart) / 8;
    float along[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float2 c = read_pair<typename Config::Out>(part.at(j, h));
            along[h] += sums[4 * (kFirst + j) + 2 * h] * c.x;
            along[h] += sums[4 * (kFirst + j) + 2 * h + 1] * c.y;
        }
    }
    row += threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float sum = row_sum(along[h]);
        if (threadIdx.x % 4 == 0 && column < p.n && row + 8 * h < p.rows) {
            p.row_sums[int64_t(column / 64) * p.rows + row + 8 * h] = sum;
        }
    }
}

// The numbers of a tile's columns into shared memory.
template <typename Config>
__device__ __forceinline__ void load_columns(const GemmParams& p, float* to, const Tile& tile) {
    for (int i = threadIdx.x % 128; i < Config::kBlockN; i += 128) {
        int column = min(tile.n_block * Config::kBlockN + i, p.n - 1);
        float* numbers = to + i * Config::kColumnNumbers;
        numbers[0] = p.shift ? __ldg(p.shift + column) : 0;
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

// sums += shift
template <typename Config, int kPart>
__device__ __forceinline__ void shift_part(const float* columns, float (&sums)[Config::kSums]) {
    constexpr int kFirst = Config::column_of(kPart) / 8;
    columns += Config::column_of(kPart) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; ++j) {
        float2 shift = read_columns<1>(columns + 8 * j).shift;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            sums[4 * (kFirst + j) + 2 * h] += shift.x;
            sums[4 * (kFirst + j) + 2 * h + 1] += shift.y;
        }
    }
}

// sums = rstd column_scales (sums - mean column_sums) + shift
template <typename Config, int kPart>
__device__ __forceinline__ void norm_part(const GemmParams& p, const float* columns, int row,
                                          float (&sums)[Config::kSums]) {
    constexpr int kFirst = Config::column_of(kPart) / 8, kNumbers = Config::kColumnNumbers;
    columns += (Config::column_of(kPart) + threadIdx.x % 4 * 2) * kNumbers;
    row += threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    float2 stats[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        stats[h] = load_pair_now(p.row_statistics + min(row + 8 * h, p.rows - 1));
    }
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; ++j) {
        auto [shift, sum, scale] = read_columns<kNumbers>(columns + 8 * j * kNumbers);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float& first = sums[4 * (kFirst + j) + 2 * h];
            float& second = sums[4 * (kFirst + j) + 2 * h + 1];
            first = stats[h].y * scale.x * (first - stats[h].x * sum.x) + shift.x;
            second = stats[h].y * scale.y * (second - stats[h].x * sum.y) + shift.y;
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

// The output, which is left in sums as well, and in the forward pass the bits of what is not zero.
template <typename Config, int kPart>
__device__ __forceinline__ void write_part(PartPosition<Config> part, float (&sums)[Config::kSums],
                                           uint32_t& word, float threshold) {
#pragma unroll
    for (int j = 0; j < Config::kPartColumns / 8; ++j) {
        constexpr int kFirst = Config::column_of(kPart) / 8;
        int in_word = (kFirst + j) % 8;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float& first = sums[4 * (kFirst + j) + 2 * h];
            float& second = sums[4 * (kFirst + j) + 2 * h + 1];
            if constexpr (Config::kClips) {
                first -= threshold;
                second -= threshold;
                if (first <= 0) {  // false for NaN, which stays
                    first = 0;
                } else {
                    word |= mask_bit(in_word, h, 0);
                }
                if (second <= 0) {
                    second = 0;
                } else {
                    word |= mask_bit(in_word, h, 1);
                }
            }
            write_pair<typename Config::Out>(part.at(j, h), {first, second});
        }
    }
}

// This thread's words of a tile's mask.
template <typename Config>
struct TileMask {
    uint32_t* first;
    int k_blocks;  // those that there are from here on, 0 without a mask

    __device__ TileMask(const GemmParams& p, const Tile& tile) {
        int k_block = tile.n_block * Config::kBlockN / kBlockK;
        k_blocks = p.mask && tile.m_block < p.m_blocks ? p.k_blocks - k_block : 0;
        first = p.mask + (int64_t(tile.m_block) * p.k_blocks + k_block) * kMaskWords +
                threadIdx.x % 128;
    }
    template <int kPart>
    __device__ __forceinline__ uint32_t* word() const {
        constexpr int kBlock = Config::column_of(kPart) / kBlockK;
        constexpr int kHalf = Config::half_of(kPart);
        return kBlock < k_blocks ? first + kBlock * kMaskWords + kHalf * 128 : nullptr;
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
// (maybe of the next tile) are loaded meanwhile. `word` is of the mask that is being made,
// `moments` of the tile's rows so far.
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

    // c, and what the columns and rows have of their own
    const float* columns = shared.columns(consumer);
    if constexpr (Config::kHasC) {
        uint32_t kept = 0;
        if constexpr (Config::kProduct == Product::kBackward) {
            const uint32_t* from = mask.template word<kPart>();
            if (from) kept = load_word_now(from);
        }
        barrier_wait(shared.part_loaded(consumer, at.slot), at.parity);
        if constexpr (Config::kProduct == Product::kRowSums) {
            sum_rows<Config, kPart>(p, part, column, row, part_sums);
        } else {
            add_part<Config, kPart>(part, part_sums, kept);
        }
        if constexpr (Config::kProduct == Product::kResidual) {
            if constexpr (kPart == 0) sync_threads_of(1 + consumer, Config::kConsumerThreads);
            shift_part<Config, kPart>(columns, part_sums);
        }
    } else {
        if (leader) wait_stores_read<Config::kBuffers - 1>();
        sync_threads_of(1 + consumer, Config::kConsumerThreads);
        if constexpr (Config::kNorms) norm_part<Config, kPart>(p, columns, row, part_sums);
    }

    // output
    constexpr int kInWord = kPart % Config::kPartsOfWord;
    if constexpr (kInWord == 0) word = 0;
    write_part<Config, kPart>(part, part_sums, word, p.threshold);
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
        if (p.moments && kEndsHalf) write_moments(p, moments, tile.n_block, row);
    }
    if constexpr (Config::kClips && kInWord + 1 == Config::kPartsOfWord) {
        uint32_t* to = mask.template word<kPart>();
        if (to) *to = word;
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
