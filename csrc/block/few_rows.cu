// The GEMMs of a layer where there are few rows: one tile a cluster, bound by latency.
// docs/block.md
//
//     out = act(rstd e (a W^T - mean s) + f (+ c))
//
// The blocks of a cluster share the sum over k: each has its part of the rows of a and of W on chip
// at once, and makes its part of the sums of each row of a and of its squares, of which mean and
// rstd come. Then each adds up a part of the tile's columns. W, which nothing writes, is loaded
// before the kernel ahead ends.
#include <stdexcept>
#include <string>

#include "../common/cluster.cuh"
#include "../common/fragments.cuh"
#include "../common/math.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"
#include "../crate_kernels.h"

namespace crate_kernels {
namespace {

constexpr int kThreads = 128, kRows = 64, kColumns = 128, kDepth = 64;  // of a step
constexpr int kBlocks = 4;                                              // of a cluster
constexpr int kOwnColumns = kColumns / kBlocks, kOwnGroups = kOwnColumns / 8;
constexpr int kBytesA = kRows * kDepth * 2, kBytesB = kColumns * kDepth * 2;
constexpr int kStepDepth = kBlocks * kDepth;  // of a cluster
constexpr int kMostSteps = ceil_div(kMostFewRowsDepth, kStepDepth);

constexpr int shared_bytes(int steps_of_block) {
    return kSwizzleAtomBytes + steps_of_block * (kBytesA + kBytesB) +
           kRows * kColumns * int(sizeof(float));
}

struct FewRowsParams {
    CUtensorMap a, weight;
    const float *scales, *sums, *shift;
    const void* c;
    void* out;
    int rows, n, k, steps_of_block;
    float eps, threshold;
    bool clips;
};

template <typename T>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads)
    few_rows_kernel(const __grid_constant__ FewRowsParams p) {
    // shared memory
    extern __shared__ char raw[];
    char* memory = raw + (-shared_address(raw) & kSwizzleAtomBytes - 1);
    auto a_of = [&](int step) { return memory + step * (kBytesA + kBytesB); };
    auto b_of = [&](int step) { return a_of(step) + kBytesA; };
    auto parts = reinterpret_cast<float4*>(a_of(p.steps_of_block));  // [column / 8][thread]
    __shared__ Barrier a_loaded[kMostSteps], b_loaded;
    __shared__ float2 moments[kRows];

    const int thread = threadIdx.x, lane = thread % 32, rank = cluster_rank();
    const int first_row = blockIdx.y * kRows, first_column = blockIdx.x / kBlocks * kColumns;
    const int first_step = rank * p.steps_of_block;
    const int steps = max(0, min(p.steps_of_block, ceil_div(p.k, kDepth) - first_step));
    const bool norms = p.sums != nullptr;
    if (thread == 0) {
        prefetch_map(&p.a);
        for (int step = 0; step < steps; ++step) barrier_init(a_loaded + step, 1);
        barrier_init(&b_loaded, 1);
        barrier_init_done();
        barrier_expect(&b_loaded, steps * kBytesB);
        for (int step = 0; step < steps; ++step) {
            load_tile(b_of(step), &p.weight, &b_loaded, (first_step + step) * kDepth, first_column);
        }
    }
    __syncthreads();

    // constants of this thread's columns, which nothing writes either
    const int row = thread / 32 * 16 + lane / 4;
    const int column = first_column + rank * kOwnColumns + lane % 4 * 2;
    float2 scale[kOwnGroups], sum[kOwnGroups], shift[kOwnGroups];
#pragma unroll
    for (int j = 0; j < kOwnGroups; ++j) {
        auto two = [&](const float* from, float otherwise) {
            int at = column + 8 * j;
            return from && at < p.n ? *reinterpret_cast<const float2*>(from + at)
                                    : float2{otherwise, otherwise};
        };
        scale[j] = two(p.scales, 1), sum[j] = two(p.sums, 0), shift[j] = two(p.shift, 0);
    }
    wait_for_kernel_before();
    let_next_kernel_start();  // not earlier: one kernel's weights at a time

    // products, and what this block has of the moments: half a row a thread
    if (thread == 0) {
        for (int step = 0; step < steps; ++step) {
            barrier_expect(a_loaded + step, kBytesA);
            load_tile(a_of(step), &p.a, a_loaded + step, (first_step + step) * kDepth, first_row);
        }
    }
    uint32_t c[kOwnGroups][2] = {};
#pragma unroll
    for (int j = 0; j < kOwnGroups; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int r = first_row + row + 8 * h, at = column + 8 * j;
            if (p.c && r < p.rows && at < p.n) {
                c[j][h] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.c) +
                                                             int64_t(r) * p.n + at);
            }
        }
    }
    float sums[kColumns / 2] = {};
    float2 of_row[4] = {};  // shorter chains of additions
    if (steps > 0) barrier_wait(&b_loaded, 0);
    for (int step = 0; step < steps; ++step) {
        barrier_wait(a_loaded + step, 0);
        wgmma_fence();
        uint64_t rows = descriptor(a_of(step)), columns = descriptor(b_of(step));
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i) {
            wgmma<kColumns, T>::template from_shared<kNo, kNo>(sums, rows + 2 * i, columns + 2 * i,
                                                               true);
        }
        wgmma_commit();
        if (norms) {
            int r = thread / 2;
            const uint4* from = reinterpret_cast<const uint4*>(a_of(step) + r * 128);
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

    // to the blocks of the cluster
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
        parts[j * kThreads + thread] = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2],
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
    float4 total[kOwnGroups] = {};
    float2 statistics[2] = {};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int j = 0; j < kOwnGroups; ++j) {
            const float4* from = parts + (rank * kOwnGroups + j) * kThreads + thread;
            float4 x = read_four_in_block(address_in_block(from, block));
            total[j].x += x.x, total[j].y += x.y, total[j].z += x.z, total[j].w += x.w;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (!norms) continue;
            float2 x = read_two_in_block(address_in_block(moments + row + 8 * h, block));
            statistics[h].x += x.x, statistics[h].y += x.y;
        }
    }
    arrive_in_cluster();

    // output
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int r = first_row + row + 8 * h;
        float mean = statistics[h].x / p.k, rstd = 1;
        if (norms) {
            rstd = rsqrtf(fmaxf(statistics[h].y / p.k - mean * mean, 0) + p.eps);
        }
#pragma unroll
        for (int j = 0; j < kOwnGroups; ++j) {
            int at = column + 8 * j;
            float2 added = unpack<T>(c[j][h]);
            float2 product = h ? float2{total[j].z, total[j].w} : float2{total[j].x, total[j].y};
            float first = rstd * scale[j].x * (product.x - mean * sum[j].x) + shift[j].x + added.x;
            float second = rstd * scale[j].y * (product.y - mean * sum[j].y) + shift[j].y + added.y;
            if (p.clips) {
                first = zero_or_more(first - p.threshold);
                second = zero_or_more(second - p.threshold);
            }
            if (r < p.rows && at < p.n) {
                *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + int64_t(r) * p.n + at) =
                    pack<T>(first, second);
            }
        }
    }
    wait_for_cluster();  // a neighbour may still read here
}

template <typename T>
void launch(const FewRows& args, cudaStream_t stream) {
    FewRowsParams p{};
    p.a = make_tensor_map<2>(args.a, args.dtype, {args.k, args.rows}, {args.k}, {kDepth, kRows});
    p.weight =
        make_tensor_map<2>(args.weight, args.dtype, {args.k, args.n}, {args.k}, {kDepth, kColumns});
    p.scales = args.scales, p.sums = args.sums, p.shift = args.shift, p.c = args.c;
    p.out = args.out;
    p.rows = args.rows, p.n = args.n, p.k = args.k;
    p.steps_of_block = ceil_div(args.k, kStepDepth);
    p.eps = args.eps, p.threshold = args.threshold, p.clips = args.clips;
    allow_shared_memory(few_rows_kernel<T>, shared_bytes(kMostSteps));
    dim3 grid(ceil_div(args.n, kColumns) * kBlocks, ceil_div(args.rows, kRows));
    launch_early(few_rows_kernel<T>, grid, kThreads, shared_bytes(p.steps_of_block), stream, p);
}

}  // namespace

void few_rows(const FewRows& args, cudaStream_t stream) {
    if (args.rows < 1 || args.n < 8 || args.n % 8 != 0 || args.k < 8 || args.k % 8 != 0 ||
        args.k > kMostFewRowsDepth || args.dtype == Dtype::kFloat32) {
        throw std::invalid_argument(
            "few_rows: expected rows > 0, n and k positive multiples of 8, k up to " +
            std::to_string(kMostFewRowsDepth) + ", and float16 or bfloat16");
    }
    args.dtype == Dtype::kFloat16 ? launch<__half>(args, stream)
                                  : launch<__nv_bfloat16>(args, stream);
}

}  // namespace crate_kernels
