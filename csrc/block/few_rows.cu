// A product of few rows with a norm before it: one tile a cluster (few_rows.cuh).
#include <stdexcept>
#include <type_traits>

#include "few_rows.cuh"

namespace crate_kernels {
namespace {

using Tile = FewRowsTile;

struct FewRowsParams {
    CUtensorMap a, weight;
    FewRowsEpilogue to;
    int k;
};

int shared_bytes(int k) {
    return kSwizzleAtomBytes + Tile::bytes_of_rows(k) + Tile::steps_of(k) * Tile::kBytesB;
}

template <typename T, int kStepsOfK>
__global__ void __cluster_dims__(Tile::kBlocks, 1, 1) __launch_bounds__(Tile::kThreads)
    few_rows_kernel(const __grid_constant__ FewRowsParams p) {
    // shared memory
    extern __shared__ char raw[];
    char* a = raw + (-shared_address(raw) & kSwizzleAtomBytes - 1);
    char* b = a + Tile::bytes_of_rows(p.k);
    __shared__ Barrier a_loaded[Tile::kBlocks], b_loaded;
    __shared__ float2 moments[Tile::kBlocks * Tile::kRows];

    Tile tile(p.k, blockIdx.y, blockIdx.x / Tile::kBlocks);
    if (threadIdx.x == 0) {
        prefetch_map(&p.a);
        for (Barrier& barrier : a_loaded) barrier_init(&barrier, 1);
        barrier_init(&b_loaded, 1);
        barrier_init_done();
        tile.load_weight(b, &p.weight, &b_loaded);  // nothing writes it: no need to wait
    }
    sync_cluster();
    tile.expect_rows(a_loaded);
    FewRowsConstants constants(tile, p.to);
    wait_for_kernel_before();
    let_next_kernel_start();  // not earlier: one kernel's weights at a time
    if (threadIdx.x == 0) tile.load_rows(a, &p.a, a_loaded);
    multiply_few_rows<T, kStepsOfK>(tile, constants, p.to, a, a_loaded, 0, b, &b_loaded, 0, moments,
                                    [] {});
    sync_cluster();  // before all have their rows, none may end
}

template <typename T, int kStepsOfK>
void launch(const FewRows& args, cudaStream_t stream) {
    FewRowsParams p{};
    p.a = few_rows_map(args.a, args.dtype, args.rows, args.k);
    p.weight = few_rows_weight_map(args.weight, args.dtype, args.n, args.k);
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
    allow_shared_memory(few_rows_kernel<T, kStepsOfK>, shared_bytes(args.k));
    dim3 grid(ceil_div(args.n, Tile::kColumnsOfCluster) * Tile::kBlocks,
              ceil_div(args.rows, Tile::kRows));
    launch_early(few_rows_kernel<T, kStepsOfK>, grid, Tile::kThreads, shared_bytes(args.k), stream,
                 p);
}

}  // namespace

void few_rows(const FewRows& args, cudaStream_t stream) {
    bool fits = args.rows > 0 && args.n > 0 && args.n % 8 == 0 && args.dtype != Dtype::kFloat32;
    auto run = [&](auto steps) {
        constexpr int kStepsOfK = decltype(steps)::value;
        bool is_it = fits && args.k == kStepsOfK * Tile::kDepth;
        if (is_it && args.dtype == Dtype::kFloat16) {
            launch<__half, kStepsOfK>(args, stream);
        } else if (is_it) {
            launch<__nv_bfloat16, kStepsOfK>(args, stream);
        }
        return is_it;
    };
    using std::integral_constant;
    if (run(integral_constant<int, 3>()) || run(integral_constant<int, 6>()) ||
        run(integral_constant<int, 9>()) || run(integral_constant<int, 12>()) ||
        run(integral_constant<int, 16>())) {
        return;
    }
    throw std::invalid_argument(
        "few_rows: expected rows > 0, n a positive multiple of 8, k = 192, 384, 576, 768 or 1024, "
        "and float16 or bfloat16");
}

}  // namespace crate_kernels
