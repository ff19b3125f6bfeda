// A product of few rows with a norm before it: one tile a cluster (few_rows.cuh).
#include <stdexcept>
#include <string>

#include "few_rows.cuh"

namespace crate_kernels {
namespace {

using Tile = FewRowsTile;

struct FewRowsParams {
    CUtensorMap a, weight;
    FewRowsEpilogue to;
    int k;
};

constexpr int kMostSteps = ceil_div(kMostFewRowsDepth, Tile::kBlocks* Tile::kDepth);

int shared_bytes(int k) {
    return kSwizzleAtomBytes + Tile::steps_of_block(k) * (Tile::kBytesA + Tile::kBytesB) +
           Tile::kBytesParts;
}

template <typename T>
__global__ void __cluster_dims__(Tile::kBlocks, 1, 1) __launch_bounds__(Tile::kThreads)
    few_rows_kernel(const __grid_constant__ FewRowsParams p) {
    // shared memory
    extern __shared__ char raw[];
    char* a = raw + (-shared_address(raw) & kSwizzleAtomBytes - 1);
    char* b = a + Tile::steps_of_block(p.k) * Tile::kBytesA;
    auto parts = reinterpret_cast<float4*>(b + Tile::steps_of_block(p.k) * Tile::kBytesB);
    __shared__ Barrier a_loaded[kMostSteps], b_loaded;
    __shared__ float2 moments[Tile::kRows];

    Tile tile(p.k, blockIdx.y, blockIdx.x / Tile::kBlocks);
    if (threadIdx.x == 0) {
        prefetch_map(&p.a);
        for (int step = 0; step < tile.steps; ++step) barrier_init(a_loaded + step, 1);
        barrier_init(&b_loaded, 1);
        barrier_init_done();
        tile.load_weight(b, &p.weight, &b_loaded);  // nothing writes it: no need to wait
    }
    __syncthreads();
    arrive_in_cluster();
    FewRowsConstants constants(tile, p.to);
    wait_for_kernel_before();
    let_next_kernel_start();  // not earlier: one kernel's weights at a time
    if (threadIdx.x == 0) tile.load_rows(a, &p.a, a_loaded);
    multiply_few_rows<T>(tile, constants, p.to, a, a_loaded, 0, b, &b_loaded, 0, parts, moments,
                         [] {});
    wait_for_cluster();  // a neighbour may still read here
}

template <typename T>
void launch(const FewRows& args, cudaStream_t stream) {
    FewRowsParams p{};
    p.a = make_tensor_map<2>(args.a, args.dtype, {args.k, args.rows}, {args.k},
                             {Tile::kDepth, Tile::kRows});
    p.weight = make_tensor_map<2>(args.weight, args.dtype, {args.k, args.n}, {args.k},
                                  {Tile::kDepth, Tile::kColumns});
    p.to = {.scales = args.scales,
            .sums = args.sums,
            .shift = args.shift,
            .c = args.c,
            .out = args.out,
            .rows = int(args.rows),
            .n = args.n,
            .eps = args.eps,
            .threshold = args.threshold,
            .clips = args.clips};
    p.k = args.k;
    allow_shared_memory(few_rows_kernel<T>, shared_bytes(kMostFewRowsDepth));
    dim3 grid(ceil_div(args.n, Tile::kColumns) * Tile::kBlocks, ceil_div(args.rows, Tile::kRows));
    launch_early(few_rows_kernel<T>, grid, Tile::kThreads, shared_bytes(args.k), stream, p);
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
