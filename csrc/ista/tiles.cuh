// What the roles in gemm.cuh share: the parameters, the tiles' shapes and order, shared memory.
#pragma once

#include "../common/cluster.cuh"
#include "../common/wgmma.cuh"

namespace crate_kernels {

enum class Product {
    kForward,
    kNormedForward,
    kBackward,
    kWeight,
    kPlain,
    kRowSums,
    kNormed,
    kResidual,
    kEncode,
    kRefine,
    kMasked,
    kMaskedSum,
    kScaledSum
};

inline constexpr int kBlockM = 128, kBlockK = 64;

// The mask of a [64, 64] block is a word for each thread of a warpgroup, in the layout of wgmma's
// D: bit 8 (2 h + e) + 7 - j is row 16 warp + group + 8 h, column 8 j + 2 pair + e. Two such blocks
// of words, of 128 rows, make one of kMaskWords; those lie column by column, then row by row.
inline constexpr int kMaskWords = 256;

__device__ constexpr uint32_t mask_bit(int j, int h, int e) {
    return 1u << 8 * (2 * h + e) + 7 - j;
}

struct GemmParams {
    CUtensorMap a, b, c, out, g;
    bool stores_g;  // the backward pass, where it makes g
    uint32_t* mask;
    float* row_sums;               // (n / 64, rows)
    float* sums_of_a;              // of each 64 rows of A, over the rows: (2 m_blocks, k); or null
    float2* moments;               // of the output: (tiles of n, rows), as IstaForward has them
    const float2* row_statistics;  // mean and 1 / standard deviation
    const float *shift, *column_sums, *column_scales;  // (n)
    int rows, n, k;
    int m_blocks, k_blocks, k_blocks_of_part;
    int m_per_cluster, n_per_cluster;  // 2, 1: B is shared. 1, 2: A is. 1, 1: nothing is
    int groups_m, groups_n, units, step;
    float threshold;
    // Of products that scale: the factor, and how many blocks of 64 columns the output's mask has.
    float alpha;
    int n_blocks;
};

template <typename T_, typename Out_, int kBlockN_, Product kProduct_>
struct GemmConfig {
    using T = T_;
    using Out = Out_;
    static constexpr int kBlockN = kBlockN_;
    static constexpr Product kProduct = kProduct_;
    static constexpr Transposed kTransposedA = kProduct == Product::kWeight ? kYes : kNo;
    static constexpr Transposed kTransposedB =
        kProduct == Product::kBackward || kProduct == Product::kPlain ||
                kProduct == Product::kNormed || kProduct == Product::kNormedForward ||
                kProduct == Product::kResidual || kProduct == Product::kScaledSum
            ? kNo
            : kYes;
    static constexpr bool kNorms =
        kProduct == Product::kNormed || kProduct == Product::kNormedForward;
    static constexpr bool kMasksResult =
        kProduct == Product::kMasked || kProduct == Product::kMaskedSum;
    static constexpr bool kScales = kMasksResult || kProduct == Product::kEncode ||
                                    kProduct == Product::kRefine || kProduct == Product::kScaledSum;
    static constexpr bool kHasC = kProduct != Product::kWeight && !kNorms &&
                                  kProduct != Product::kEncode && kProduct != Product::kMasked;
    static constexpr bool kClips = kProduct == Product::kForward ||
                                   kProduct == Product::kNormedForward ||
                                   kProduct == Product::kEncode || kProduct == Product::kRefine;
    // Two warps that the producer leaves idle may sum the rows of A.
    static constexpr int kSummingWarps = kProduct == Product::kRowSums ? 2 : 0;
    static constexpr bool kHasMoments =
        (kClips && !kScales && sizeof(Out) == 2) || kProduct == Product::kResidual;
    // dy in float32 comes with a rounded g made before.
    static constexpr bool kMasksA = kProduct == Product::kBackward && sizeof(Out) == 2;

    static constexpr int kConsumerThreads = 128, kThreads = 3 * kConsumerThreads;
    static constexpr int kSums = kBlockN / 2;  // a thread's, of 64 rows

    // A chunk is 64 columns wide, or as many rows of a transposed operand.
    static constexpr int kBytesA = kBlockM * kBlockK * sizeof(T);
    static constexpr int kBytesB = kBlockN * kBlockK * sizeof(T);
    static constexpr int kStageBytes = kBytesA + kBytesB;
    static constexpr int kChunkBytes = 64 * kBlockK * sizeof(T);
    static constexpr int kStages = kBlockN > 128 ? 4 : 5;

    // The epilogue goes by parts of [64 rows][128 bytes].
    static constexpr int kPartColumns = 128 / sizeof(Out), kPartBytes = 64 * 128;
    static constexpr int kParts = 2 * kBlockN / kPartColumns;
    static constexpr int kPartsOfWord = kBlockK / kPartColumns;  // of the mask: consecutive ones
    __device__ static constexpr int half_of(int part) { return part / (kParts / 2); }
    __device__ static constexpr int column_of(int part) {
        return part % (kParts / 2) * kPartColumns;
    }
    static constexpr int kBuffers = kNorms ? 3 : 4;  // of parts, for each consumer
    static constexpr int kAhead = kBuffers - 1;

    static constexpr int kOffsetB = kStages * kBytesA;
    static constexpr int kOffsetParts = kOffsetB + kStages * kBytesB;
    // Of a tile's columns, for each consumer: their shift, sums and scales.
    static constexpr int kOffsetColumns = kOffsetParts + 2 * kBuffers * kPartBytes;
    static constexpr int kColumnNumbers = kProduct == Product::kResidual        ? 1
                                          : kProduct == Product::kNormed        ? 2
                                          : kProduct == Product::kNormedForward ? 3
                                                                                : 0;
    static constexpr int kColumnsBytes = kColumnNumbers * kBlockN * sizeof(float);
    // Of its rows: mean and rstd.
    static constexpr int kOffsetRows = kOffsetColumns + 2 * kColumnsBytes;
    static constexpr int kRowsBytes = kNorms ? kBlockM * sizeof(float2) : 0;
    static constexpr int kOffsetBarriers = kOffsetRows + 2 * kRowsBytes;
    static constexpr int kBarriers = 2 * kStages + 2 * kBuffers;
    static constexpr int kSharedBytes = kOffsetBarriers + kBarriers * sizeof(Barrier);
    static_assert(kSharedBytes <= 232448, "shared memory of a multiprocessor");
    static_assert(kBlockN % 64 == 0 && kParts >= kBuffers, "whole chunks; a tile fills the ring");
};

// ---- which tile

struct Tile {
    int m_block, n_block, part, k_begin, k_end;
};

// A unit is a tile or, where a cluster shares, one for each of its blocks. Neighbours have rows of
// A in common.
struct Schedule {
    int unit, rank;

    __device__ explicit Schedule(const GemmParams& p)
        : unit(blockIdx.x / (p.m_per_cluster * p.n_per_cluster)), rank(cluster_rank()) {}
    __device__ bool done(const GemmParams& p) const { return unit >= p.units; }
    __device__ bool first(const GemmParams& p) const { return unit < p.step; }
    __device__ bool last(const GemmParams& p) const { return unit + p.step >= p.units; }
    __device__ void advance(const GemmParams& p) { unit += p.step; }
    __device__ Schedule next_but_one(const GemmParams& p) const {
        Schedule next = *this;
        next.unit += 2 * p.step;
        return next;
    }
    __device__ Tile tile(const GemmParams& p) const {
        int n = unit % p.groups_n, m = unit / p.groups_n % p.groups_m;
        int part = unit / p.groups_n / p.groups_m;
        return {.m_block = m * p.m_per_cluster + (p.m_per_cluster == 2 ? rank : 0),
                .n_block = n * p.n_per_cluster + (p.n_per_cluster == 2 ? rank : 0),
                .part = part,
                .k_begin = part * p.k_blocks_of_part,
                .k_end = min((part + 1) * p.k_blocks_of_part, p.k_blocks)};
    }
};

template <int kSlots>
__device__ __forceinline__ void skip(RingPosition& at, int count) {
    at.slot += count;
    at.parity ^= at.slot / kSlots & 1;
    at.slot %= kSlots;
}

// ---- shared memory

template <typename Config>
struct GemmShared {
    char* base;

    __device__ char* a(int stage) const { return base + stage * Config::kBytesA; }
    __device__ char* b(int stage) const {
        return base + Config::kOffsetB + stage * Config::kBytesB;
    }
    __device__ Barrier* barriers() const {
        return reinterpret_cast<Barrier*>(base + Config::kOffsetBarriers);
    }
    __device__ Barrier* loaded(int stage) const { return barriers() + stage; }
    __device__ Barrier* free(int stage) const { return barriers() + Config::kStages + stage; }
    __device__ float* columns(int consumer) const {
        return reinterpret_cast<float*>(base + Config::kOffsetColumns +
                                        consumer * Config::kColumnsBytes);
    }
    __device__ float2* rows(int consumer) const {
        return reinterpret_cast<float2*>(base + Config::kOffsetRows +
                                         consumer * Config::kRowsBytes);
    }
    __device__ int part_offset(int consumer, int slot) const {
        return Config::kOffsetParts + (consumer * Config::kBuffers + slot) * Config::kPartBytes;
    }
    __device__ Barrier* part_loaded(int consumer, int slot) const {
        return barriers() + 2 * Config::kStages + consumer * Config::kBuffers + slot;
    }
};

}  // namespace crate_kernels
