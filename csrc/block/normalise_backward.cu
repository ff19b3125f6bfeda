// The gradient of a LayerNorm, a warp a row: bound by memory, each tensor read once. docs/block.md
//
// Rows come into a ring of shared memory by tensor copies, kStages ahead of the warp that takes
// them, and stay in its registers until they leave. A warp's rows are always the same ones, and its
// shares of the sums over rows are added up in order: results are bitwise repeatable.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/bulk_copy.cuh"
#include "../common/fragments.cuh"
#include "../common/math.cuh"
#include "../common/pack.cuh"
#include "../common/tensor_map.h"
#include "../crate_kernels.h"

namespace crate_kernels {
namespace {

// kVectors of 8 elements a lane: rows of up to 256 kVectors. kThird: a third sum, of the skip or,
// without one, of dz.
template <int kVectors, bool kAdds, bool kThird>
struct RowsConfig {
    static constexpr int kWarps = kVectors > 3 ? 8 : kVectors > 2 ? 12 : 16;  // by their registers
    static constexpr bool kMayBeWhole = kAdds ? !kThird : kVectors > 3;       // likewise
    static constexpr int kStages = 4, kTensors = kAdds ? 3 : 2;
    static constexpr int kMostSums = kThird ? 3 : 2;
    static constexpr int kColumns = 256 * kVectors;
    static constexpr int kSlotBytes = kColumns * 2;  // of one tensor's row

    static constexpr int kRingBytes = kWarps * kStages * kTensors * kSlotBytes;
    static constexpr int kSumsBytes = kWarps * kMostSums * kColumns * sizeof(float);
    static constexpr int kOffsetGamma = std::max(kRingBytes, kSumsBytes);
    static constexpr int kOffsetBeta = kOffsetGamma + kColumns * sizeof(float);
    static constexpr int kOffsetBarriers = kOffsetBeta + kColumns * sizeof(float);
    static constexpr int kSharedBytes = kOffsetBarriers + kWarps * kStages * sizeof(Barrier);
    static_assert(kSharedBytes <= 232448, "shared memory of a multiprocessor");
};

constexpr int kBoxColumns = 256;  // of a copy: the most that one may have

struct RowMaps {
    CUtensorMap dh, z, skip;
};

// Eight numbers of a vector, as two fours that lie apart: neighbouring lanes read neighbouring
// ones.
template <int kVectors>
struct ColumnParameters {
    float4* fours;

    __device__ void load(const float* from, int d) {
        float* to = reinterpret_cast<float*>(fours);
        for (int i = threadIdx.x; i < 256 * kVectors; i += blockDim.x) {
            int vector = i / 8, half = i % 8 / 4;
            to[(half * 32 * kVectors + vector) * 4 + i % 4] = i < d ? from[i] : 0;
        }
    }
    __device__ __forceinline__ void read(float (&to)[8], int vector) const {
        *reinterpret_cast<float4*>(&to[0]) = fours[vector];
        *reinterpret_cast<float4*>(&to[4]) = fours[32 * kVectors + vector];
    }
};

template <typename T>
__device__ __forceinline__ void unpack_eight(float (&to)[8], uint4 from) {
    float2 a = unpack<T>(from.x), b = unpack<T>(from.y), c = unpack<T>(from.z),
           d = unpack<T>(from.w);
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
    to[4] = c.x, to[5] = c.y, to[6] = d.x, to[7] = d.y;
}

template <typename T>
__device__ __forceinline__ uint4 pack_eight(const float (&from)[8]) {
    return {pack<T>(from[0], from[1]), pack<T>(from[2], from[3]), pack<T>(from[4], from[5]),
            pack<T>(from[6], from[7])};
}

// Both over the lanes of a warp.
__device__ __forceinline__ float2 warp_sums(float2 x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x.x += __shfl_xor_sync(0xFFFFFFFF, x.x, lanes);
        x.y += __shfl_xor_sync(0xFFFFFFFF, x.y, lanes);
    }
    return x;
}

// kWhole: a row has all of the 256 kVectors columns.
template <typename T, int kVectors, bool kAdds, bool kThird, bool kWhole>
__global__ void __launch_bounds__(RowsConfig<kVectors, kAdds, kThird>::kWarps * 32, 1)
    normalise_backward_kernel(const __grid_constant__ RowMaps maps, const NormaliseBackward p) {
    using Config = RowsConfig<kVectors, kAdds, kThird>;
    constexpr int kStages = Config::kStages, kTensors = Config::kTensors;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = p.d;

    // shared memory
    extern __shared__ __align__(128) char memory[];
    char* ring = memory + warp * kStages * kTensors * Config::kSlotBytes;
    ColumnParameters<kVectors> gamma{reinterpret_cast<float4*>(memory + Config::kOffsetGamma)};
    ColumnParameters<kVectors> beta{reinterpret_cast<float4*>(memory + Config::kOffsetBeta)};
    Barrier* loaded = reinterpret_cast<Barrier*>(memory + Config::kOffsetBarriers) + warp * kStages;
    if (lane == 0) {
        for (int stage = 0; stage < kStages; ++stage) barrier_init(loaded + stage, 1);
        barrier_init_done();
    }
    __syncwarp();

    // rows, the first of which come while the rest gets ready
    auto slot_of = [&](int stage, int tensor) {
        return ring + (stage * kTensors + tensor) * Config::kSlotBytes;
    };
    auto load = [&](int64_t row, int stage) {
        if (row >= p.rows || lane > 0) return;
        barrier_expect(loaded + stage, kTensors * Config::kSlotBytes);
#pragma unroll
        for (int i = 0; i < kTensors; ++i) {
            const CUtensorMap* map = i == 0 ? &maps.dh : i == 1 ? &maps.z : &maps.skip;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                load_tile(slot_of(stage, i) + v * kBoxColumns * sizeof(T), map, loaded + stage,
                          v * kBoxColumns, row);
            }
        }
    };
    const int64_t first = int64_t(blockIdx.x) * Config::kWarps + warp;
    const int64_t step = int64_t(gridDim.x) * Config::kWarps;
    for (int stage = 0; stage < kStages; ++stage) load(first + stage * step, stage);
    const float2* statistics = reinterpret_cast<const float2*>(p.stats);
    float2 next = load_pair_now(statistics + min(first, p.rows - 1));
    gamma.load(p.gamma, d);
    beta.load(p.beta, d);
    __syncthreads();
    float sums[Config::kMostSums][kVectors][8] = {};  // of dh zhat, dh, skip or dz
    const float share = 1.0f / d;
    RingPosition at;
    for (int64_t row = first; row < p.rows; row += step) {
        const float rstd = next.y, shift = -next.x * rstd;  // zhat = rstd z + shift
        next = load_pair_now(statistics + min(row + step, p.rows - 1));
        barrier_wait(loaded + at.slot, at.parity);
        uint4 tensors[kTensors][kVectors];
        auto is_inside = [&](int v) { return kWhole || (v * 32 + lane) * 8 < d; };
        auto unpack_row = [&](float (&dh)[8], float (&zhat)[8], int v) {
            unpack_eight<T>(dh, tensors[0][v]);
            unpack_eight<T>(zhat, tensors[1][v]);
#pragma unroll
            for (float& z : zhat) z = rstd * z + shift;
        };

        // its sums
        float2 total{0, 0};
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (!is_inside(v)) continue;
#pragma unroll
            for (int i = 0; i < kTensors; ++i) {
                const uint4* slot = reinterpret_cast<const uint4*>(slot_of(at.slot, i));
                tensors[i][v] = slot[v * 32 + lane];
            }
            float dh[8], zhat[8], g[8];
            unpack_row(dh, zhat, v);
            gamma.read(g, v * 32 + lane);
            float2 of_vector{0, 0};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float t = g[i] * dh[i];
                of_vector.x += t;
                of_vector.y += t * zhat[i];
                sums[0][v][i] += dh[i] * zhat[i];
                sums[1][v][i] += dh[i];
            }
            if constexpr (kThird && kAdds) {
                unpack_eight<T>(dh, tensors[2][v]);
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[2][v][i] += dh[i];
            }
            total.x += of_vector.x;
            total.y += of_vector.y;
            asm volatile("" ::: "memory");  // a vector at a time, in few registers
        }
        __syncwarp();  // every lane has read the slot
        total = warp_sums(total);
        load(row + kStages * step, at.slot);
        at.advance<kStages>();

        // what it becomes: dz = rstd t - along - across zhat
        const float along = rstd * share * total.x, across = rstd * share * total.y;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (!is_inside(v)) continue;
            float dz[8], zhat[8], g[8], added[8];
            unpack_row(dz, zhat, v);
            gamma.read(g, v * 32 + lane);
            if constexpr (kAdds) unpack_eight<T>(added, tensors[2][v]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                dz[i] = rstd * g[i] * dz[i] - along - across * zhat[i];
                if constexpr (kAdds) dz[i] += added[i];
            }
            if (p.masks) {
                float z[8];
                unpack_eight<T>(z, tensors[1][v]);
#pragma unroll
                for (int i = 0; i < 8; ++i) dz[i] = z[i] == 0 ? 0 : dz[i];
            }
            if constexpr (kThird && !kAdds) {
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[2][v][i] += dz[i];
            }
            int64_t vector = row * (d / 8) + v * 32 + lane;
            static_cast<uint4*>(p.dz)[vector] = pack_eight<T>(dz);
            if (p.h) {
                float b[8];
                beta.read(b, v * 32 + lane);
#pragma unroll
                for (int i = 0; i < 8; ++i) b[i] += g[i] * zhat[i];
                static_cast<uint4*>(p.h)[vector] = pack_eight<T>(b);
            }
            asm volatile("" ::: "memory");
        }
    }

    // this block's share of the sums, fours of a warp side by side as in ColumnParameters
    __syncthreads();
    constexpr int kFours = Config::kColumns / 4;
    float4* shares = reinterpret_cast<float4*>(memory);  // (kWarps, kMostSums, kFours)
#pragma unroll
    for (int which = 0; which < Config::kMostSums; ++which) {
        float4* to = shares + (warp * Config::kMostSums + which) * kFours;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const float (&of)[8] = sums[which][v];
            to[v * 32 + lane] = {of[0], of[1], of[2], of[3]};
            to[(kVectors + v) * 32 + lane] = {of[4], of[5], of[6], of[7]};
        }
    }
    __syncthreads();
    const int n_sums = p.third_sum ? 3 : 2;
    for (int i = threadIdx.x; i < n_sums * kFours; i += blockDim.x) {
        int which = i / kFours, four = i % kFours, vector = four % (kFours / 2);
        int column = vector * 8 + (four < kFours / 2 ? 0 : 4);
        if (column >= d) continue;
        float4 sum{};
        for (int w = 0; w < Config::kWarps; ++w) {
            float4 share = shares[(w * Config::kMostSums + which) * kFours + four];
            sum.x += share.x, sum.y += share.y, sum.z += share.z, sum.w += share.w;
        }
        float* to = p.partials + (int64_t(blockIdx.x) * n_sums + which) * d + column;
        *reinterpret_cast<float4*>(to) = sum;
    }
}

// Calls run<kVectors> for rows of d elements.
template <typename Run>
auto with_vectors(int d, const Run& run) {
    if (d <= 256) return run.template operator()<1>();
    if (d <= 512) return run.template operator()<2>();
    if (d <= 768) return run.template operator()<3>();
    return run.template operator()<4>();
}

int blocks_of(int64_t rows, int d) {
    int warps =
        with_vectors(d, []<int kVectors>() { return RowsConfig<kVectors, true, true>::kWarps; });
    return std::min<int64_t>(ceil_div(rows, warps), multiprocessors());
}

template <typename T, bool kAdds, bool kThird>
void launch(const NormaliseBackward& args, cudaStream_t stream) {
    with_vectors(args.d, [&]<int kVectors>() {
        using Config = RowsConfig<kVectors, kAdds, kThird>;
        auto kernel = normalise_backward_kernel<T, kVectors, kAdds, kThird, false>;
        if constexpr (Config::kMayBeWhole) {
            if (args.d == Config::kColumns) {
                kernel = normalise_backward_kernel<T, kVectors, kAdds, kThird, true>;
            }
        }
        auto map = [&](const void* rows) {
            return make_tensor_map<2>(rows, args.dtype, {args.d, args.rows}, {args.d},
                                      {kBoxColumns, 1});
        };
        RowMaps maps{map(args.dh), map(args.z), map(kAdds ? args.skip : args.z)};
        allow_shared_memory(kernel, Config::kSharedBytes);
        kernel<<<blocks_of(args.rows, args.d), Config::kWarps * 32, Config::kSharedBytes, stream>>>(
            maps, args);
        check(cudaGetLastError(), "normalise_backward");
    });
}

template <typename T>
void launch_wanted(const NormaliseBackward& args, cudaStream_t stream) {
    if (!args.skip) return launch<T, false, true>(args, stream);
    args.third_sum ? launch<T, true, true>(args, stream) : launch<T, true, false>(args, stream);
}

void check_rows(int64_t rows, int d) {
    if (rows < 1 || d < 8 || d > kMostNormedColumns || d % 8 != 0) {
        throw std::invalid_argument(
            "normalise_backward: expected rows, and d a multiple of 8 up to " +
            std::to_string(kMostNormedColumns) + ", got " + std::to_string(rows) + " rows of " +
            std::to_string(d));
    }
}

}  // namespace

int normalise_backward_parts(int64_t rows, int d) {
    check_rows(rows, d);
    return blocks_of(rows, d);
}

void normalise_backward(const NormaliseBackward& args, cudaStream_t stream) {
    check_rows(args.rows, args.d);
    if (args.dtype == Dtype::kFloat32) {
        throw std::invalid_argument("normalise_backward: expected float16 or bfloat16");
    }
    if (args.dtype == Dtype::kFloat16) {
        launch_wanted<__half>(args, stream);
    } else {
        launch_wanted<__nv_bfloat16>(args, stream);
    }
}

}  // namespace crate_kernels
