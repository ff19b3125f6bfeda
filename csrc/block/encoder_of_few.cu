// All layers of an encoder in one kernel, for few rows: bound by latency, not by bytes.
// docs/block.md
//
//     w = LN(x) U^T,  o = attention(w),  z = x + o V^T + b,  x = relu(LN(z) + LN(z) G - threshold)
//
// A block owns 32 columns of each of the three products (few_rows.cuh), and loads the weights of
// the product after the next as soon as it has multiplied by this one's. Row tiles of heads are
// shared among all blocks. Between two steps, blocks count in global memory what they have
// written, and whoever reads it waits for the count. So all blocks have to run at once.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../mssa/forward_rows.cuh"
#include "few_rows.cuh"

namespace crate_kernels {
namespace {

using Tile = FewRowsTile;

enum Product { kQkv, kOut, kGram, kProducts };
constexpr int kCounters = kProducts + 1;  // of a layer: the products' and attention's
constexpr int kTilesOfHead = 4, kRowsOfHead = kTilesOfHead * kTile;  // on chip, zero from n on
constexpr int kSlots = 2;                                            // of weights
constexpr int kLoader = Tile::kThreads - 32;  // of weights: not the thread that counts and waits

struct Layer {
    CUtensorMap weight[kProducts];
    const float *scales[kProducts], *sums[kProducts], *shift[kProducts];
    float threshold;
};

struct EncoderParams {
    Layer layers[kMostFewEncoderLayers];
    CUtensorMap x, y, o, z;        // tiles of rows, as A of a product
    CUtensorMap w_heads, o_heads;  // as attention has them
    const void* given;             // x
    void* out[kProducts];          // w, z, y
    float* lse;
    uint32_t* counters;  // (depth, kCounters, row tiles)
    int depth, rows, d, cluster_columns, groups, heads, n, tiles_of_head, attention_tasks,
        rows_of_head;
    float scale, eps;
};

template <int kHeadDim>
__host__ __device__ constexpr int area_bytes(int d) {
    int of_head =
        2 * (kChunks<kHeadDim> * kRowsOfHead * kChunkColumns + kStagingElements<kHeadDim>);
    int of_rows = Tile::bytes_of_rows(d);
    return of_head > of_rows ? of_head : of_rows;
}

__device__ __forceinline__ void count(uint32_t* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Until `counter` is at `target`: then what was written before its counts may be read, by the copy
// engine too.
__device__ __forceinline__ void wait_for_count(const uint32_t* counter, uint32_t target) {
    uint32_t value;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    } while (value < target);
    asm volatile("fence.proxy.async;" ::: "memory");
}

template <typename T, int kHeadDim, int kStepsOfK>
__global__ void __cluster_dims__(Tile::kBlocks, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    encoder_of_few_kernel(const __grid_constant__ EncoderParams p) {
    // shared memory: rows of A, or a head; weights of this product and the next
    extern __shared__ char raw[];
    char* area = swizzle_aligned(raw);
    T* head_rows = reinterpret_cast<T*>(area);
    T* staging = head_rows + kChunks<kHeadDim> * kRowsOfHead * kChunkColumns;
    const int bytes_of_weight = Tile::steps_of(p.d) * Tile::kBytesB;
    auto weight_of = [&](int slot) {
        return area + area_bytes<kHeadDim>(p.d) + slot * bytes_of_weight;
    };
    __shared__ Barrier a_loaded[Tile::kBlocks], weight_loaded[kSlots], head_loaded;
    __shared__ float2 moments[Tile::kBlocks * Tile::kRows];

    const int thread = threadIdx.x, cluster = blockIdx.x / Tile::kBlocks;
    const int cluster_column = cluster % p.cluster_columns, group = cluster / p.cluster_columns;
    const int row_tiles = ceil_div(p.rows, Tile::kRows);
    const uint32_t blocks_of_row_tile = p.cluster_columns * Tile::kBlocks;
    auto load_weight = [&](int index) {
        if (index >= kProducts * p.depth) return;
        const Layer& of = p.layers[index / kProducts];
        Tile(p.d, group, cluster_column)
            .load_weight(weight_of(index % kSlots), &of.weight[index % kProducts],
                         weight_loaded + index % kSlots);
    };
    if (thread == 0) {
        for (Barrier& barrier : a_loaded) barrier_init(&barrier, 1);
        for (Barrier& barrier : weight_loaded) barrier_init(&barrier, 1);
        barrier_init(&head_loaded, 1);
        barrier_init_done();
        for (int index = 0; index < kSlots; ++index) load_weight(index);
    }
    sync_cluster();

    int a_parity = 0, head_parity = 0;
    for (int index = 0; index < kProducts * p.depth; ++index) {
        const int layer = index / kProducts, product = index % kProducts;
        // of this layer's steps; of z and of x there is one for each row tile
        auto counter = [&](int step, int row_tile = 0) {
            return p.counters + ((layer * kCounters + step) * row_tiles + row_tile);
        };

        if (product == kOut) {
            for (int task = blockIdx.x; task < p.attention_tasks; task += gridDim.x) {
                // the same in every lane, and known to be
                int begin = __shfl_sync(0xFFFFFFFF, task % p.tiles_of_head * kTile, 0),
                    item = task / p.tiles_of_head;
                int head = item % p.heads, batch = item / p.heads;
                if (thread == 0) {
                    wait_for_count(counter(kQkv), row_tiles * blocks_of_row_tile);
                    int bytes = kChunks<kHeadDim> * kRowsOfHead * kChunkColumns * sizeof(T);
                    barrier_expect(&head_loaded, bytes);
                    load_rows<kHeadDim>(head_rows, kRowsOfHead, &p.w_heads, &head_loaded, head, 0,
                                        batch);
                }
                barrier_wait(&head_loaded, head_parity);
                head_parity ^= 1;
                attend_tile_at_once<T, kHeadDim, kTilesOfHead>(
                    HeadOnChip<T>{.w = head_rows,
                                  .rows = kRowsOfHead,
                                  .n = p.n,
                                  .scale = p.scale,
                                  .staging = staging,
                                  .o_map = &p.o_heads,
                                  .lse = p.lse + int64_t(item) * p.n,
                                  .head = head,
                                  .batch = batch},
                    begin);
                if (thread % 32 == 0) wait_stores_written();
                fence_async_proxy();  // the area may be loaded anew
                __syncthreads();
                if (thread == 0) count(counter(kProducts));
            }
        }

        const CUtensorMap* a_map = product == kOut    ? &p.o
                                   : product == kGram ? &p.z
                                   : layer == 0       ? &p.x
                                                      : &p.y;
        const Layer& of = p.layers[layer];
        FewRowsEpilogue to{.scales = of.scales[product],
                           .sums = of.sums[product],
                           .shift = of.shift[product],
                           .c = product != kOut ? nullptr
                                : layer == 0    ? p.given
                                                : p.out[kGram],  // where this thread wrote it
                           .out = p.out[product],
                           .rows = p.rows,
                           .n = p.d,
                           .eps = p.eps,
                           .threshold = of.threshold,
                           .clips = product == kGram};
        for (int row_tile = group; row_tile < row_tiles; row_tile += p.groups) {
            Tile tile(p.d, row_tile, cluster_column);
            if (row_tile > group) sync_cluster();  // all have read the rows before
            tile.expect_rows(a_loaded);
            if (thread == 0) {
                if (product == kOut) {
                    wait_for_count(counter(kProducts), p.attention_tasks);
                } else if (index > 0) {  // z, or x of the layer before
                    wait_for_count(counter(product == kGram ? kOut : kGram - kCounters, row_tile),
                                   blocks_of_row_tile);
                }
                tile.load_rows(area, a_map, a_loaded);
            }
            FewRowsConstants constants(tile, to);
            auto load_next_weight = [&] {
                if (thread == kLoader && index > 0 && row_tile == group) load_weight(index + 1);
            };
            multiply_few_rows<T, kStepsOfK>(
                tile, constants, to, area, a_loaded, a_parity, weight_of(index % kSlots),
                weight_loaded + index % kSlots, index / kSlots % 2, moments, load_next_weight);
            a_parity ^= 1;
            __syncthreads();
            if (thread == 0) count(counter(product, product == kQkv ? 0 : row_tile));
        }
    }
    sync_cluster();  // before all have their rows, none may end
}

template <int kHeadDim>
int shared_bytes(int d) {
    return kSwizzleAtomBytes + area_bytes<kHeadDim>(d) + kSlots * Tile::steps_of(d) * Tile::kBytesB;
}

template <typename T, int kHeadDim, int kStepsOfK>
void launch(const EncoderOfFew& args, cudaStream_t stream) {
    int rows = args.batch * args.n, width = args.d;
    EncoderParams p{};
    auto weight = [&](const void* data) {
        return few_rows_weight_map(data, args.dtype, width, width);
    };
    auto tokens = [&](const void* data) { return few_rows_map(data, args.dtype, rows, width); };
    for (int i = 0; i < args.depth; ++i) {
        const EncoderLayer& from = args.layers[i];
        Layer& to = p.layers[i];
        to.weight[kQkv] = weight(from.w_qkv);
        to.weight[kOut] = weight(from.w_out);
        to.weight[kGram] = weight(from.gram);
        to.sums[kQkv] = from.qkv_sums, to.shift[kQkv] = from.qkv_shift;
        to.shift[kOut] = from.bias;
        to.scales[kGram] = from.gram_scales, to.sums[kGram] = from.gram_sums;
        to.shift[kGram] = from.gram_shift;
        to.threshold = from.threshold;
    }
    p.x = tokens(args.x), p.y = tokens(args.y), p.o = tokens(args.o), p.z = tokens(args.z);
    auto heads = [&](const void* data, int box_rows) {
        return head_map(data, args.dtype, args.batch, args.n, args.heads, kHeadDim,
                        int64_t(args.n) * width, width, box_rows);
    };
    p.w_heads = heads(args.w, kRowsOfHead), p.o_heads = heads(args.o, 16);
    p.given = args.x;
    p.out[kQkv] = args.w, p.out[kOut] = args.z, p.out[kGram] = args.y;
    p.lse = args.lse, p.counters = args.counters;
    p.depth = args.depth, p.rows = rows, p.d = width, p.heads = args.heads, p.n = args.n;
    p.scale = args.scale, p.eps = args.eps;
    p.tiles_of_head = ceil_div(args.n, kTile);
    p.attention_tasks = args.batch * args.heads * p.tiles_of_head;
    p.cluster_columns = ceil_div(width, Tile::kColumnsOfCluster);

    auto kernel = encoder_of_few_kernel<T, kHeadDim, kStepsOfK>;
    // the same in every thread of the host
    allow_shared_memory(kernel, shared_bytes<kHeadDim>(kMostFewEncoderColumns));

    cudaLaunchAttribute all_at_once;
    all_at_once.id = cudaLaunchAttributeCooperative;
    all_at_once.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = Tile::kBlocks;
    config.blockDim = Tile::kThreads;
    config.dynamicSmemBytes = shared_bytes<kHeadDim>(width);
    config.stream = stream;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config),
          "cudaOccupancyMaxActiveClusters");
    p.groups = std::min(clusters / p.cluster_columns, ceil_div(rows, Tile::kRows));
    if (p.groups < 1) {
        throw std::runtime_error("encoder_of_few: expected at least " +
                                 std::to_string(p.cluster_columns) + " clusters at once, got " +
                                 std::to_string(clusters));
    }
    config.gridDim = p.groups * p.cluster_columns * Tile::kBlocks;
    config.attrs = &all_at_once;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, p), "cudaLaunchKernelEx");
}

}  // namespace

void encoder_of_few(const EncoderOfFew& args, cudaStream_t stream) {
    bool fits = args.batch > 0 && args.n > 0 && args.n <= kRowsOfHead && args.depth > 0 &&
                args.depth <= kMostFewEncoderLayers && args.heads > 0 &&
                args.dtype != Dtype::kFloat32;
    auto run = [&](auto of_head, auto steps) {
        constexpr int kHeadDim = decltype(of_head)::value, kStepsOfK = decltype(steps)::value;
        bool is_it = fits && args.d == kStepsOfK * Tile::kDepth && args.d == args.heads * kHeadDim;
        if (is_it && args.dtype == Dtype::kFloat16) {
            launch<__half, kHeadDim, kStepsOfK>(args, stream);
        } else if (is_it) {
            launch<__nv_bfloat16, kHeadDim, kStepsOfK>(args, stream);
        }
        return is_it;
    };
    using std::integral_constant;
    if (run(integral_constant<int, 64>(), integral_constant<int, 6>()) ||
        run(integral_constant<int, 48>(), integral_constant<int, 9>()) ||
        run(integral_constant<int, 64>(), integral_constant<int, 12>())) {
        return;
    }
    throw std::invalid_argument(
        "encoder_of_few: expected 0 < n <= 256, up to " + std::to_string(kMostFewEncoderLayers) +
        " layers, d = 384 or 768 in heads of 64, or 576 in heads of 48, and float16 or bfloat16");
}

}  // namespace crate_kernels
