// All layers of an encoder in one kernel, for few rows: bound by latency, not by bytes.
// docs/block.md
//
//     w = LN(x) U^T,  o = attention(w),  z = x + o V^T + b,  x = relu(LN(z) + LN(z) G - threshold)
//
// A cluster of four blocks owns 128 columns of each of the three products (few_rows.cuh), and loads
// their weights for the next layer as soon as it has multiplied by this one's. Row tiles of heads
// are shared among all blocks. Between two steps, blocks count in global memory what they have
// written, and whoever reads it waits for the count. So all blocks have to run at once.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../mssa/forward_rows.cuh"
#include "few_rows.cuh"

namespace crate_kernels {
namespace {

using Tile = FewRowsTile;

enum Product { kQkv, kOut, kGram, kProducts };
constexpr int kSteps = kProducts + 1;  // of a layer, each with a counter
constexpr int kMostRowsOfHead = 256;
constexpr int kMostSteps = ceil_div(kMostFewEncoderColumns, Tile::kBlocks* Tile::kDepth);

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
    uint32_t* counters;  // (depth, kSteps)
    int depth, rows, d, column_tiles, groups, heads, n, tiles_of_head, attention_tasks,
        rows_of_head;
    float scale, eps;
};

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

template <typename T, int kHeadDim>
__global__ void __cluster_dims__(Tile::kBlocks, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    encoder_of_few_kernel(const __grid_constant__ EncoderParams p) {
    // shared memory: weights of the products; what they add up; rows of A, or a head
    extern __shared__ char raw[];
    const int most_steps = Tile::steps_of_block(p.d);
    char* weights = swizzle_aligned(raw);
    auto weight_of = [&](int product) { return weights + product * most_steps * Tile::kBytesB; };
    auto parts = reinterpret_cast<float4*>(weight_of(kProducts));
    char* area = weight_of(kProducts) + Tile::kBytesParts;
    T* head_rows = reinterpret_cast<T*>(area);
    T* staging = head_rows + kChunks<kHeadDim> * p.rows_of_head * kChunkColumns;
    __shared__ Barrier a_loaded[kMostSteps], weight_loaded[kProducts], head_loaded;
    __shared__ float2 moments[Tile::kRows];

    const int thread = threadIdx.x, cluster = blockIdx.x / Tile::kBlocks;
    const int column_tile = cluster % p.column_tiles, group = cluster / p.column_tiles;
    const int row_tiles = ceil_div(p.rows, Tile::kRows);
    const uint32_t blocks_of_product = row_tiles * p.column_tiles * Tile::kBlocks;
    if (thread == 0) {
        for (Barrier& barrier : a_loaded) barrier_init(&barrier, 1);
        for (Barrier& barrier : weight_loaded) barrier_init(&barrier, 1);
        barrier_init(&head_loaded, 1);
        barrier_init_done();
        Tile tile(p.d, group, column_tile);
        for (int product = 0; product < kProducts; ++product) {
            tile.load_weight(weight_of(product), &p.layers[0].weight[product],
                             weight_loaded + product);
        }
    }
    __syncthreads();
    arrive_in_cluster();

    int a_parity = 0, head_parity = 0;
    for (int index = 0; index < kProducts * p.depth; ++index) {
        const int layer = index / kProducts, product = index % kProducts;
        uint32_t* counters = p.counters + layer * kSteps;

        if (product == kOut) {
            for (int task = blockIdx.x; task < p.attention_tasks; task += gridDim.x) {
                int begin = task % p.tiles_of_head * kTile, item = task / p.tiles_of_head;
                int head = item % p.heads, batch = item / p.heads;
                if (thread == 0) {
                    wait_for_count(counters + kQkv, blocks_of_product);
                    int bytes = kChunks<kHeadDim> * p.rows_of_head * kChunkColumns * sizeof(T);
                    barrier_expect(&head_loaded, bytes);
                    load_rows<kHeadDim>(head_rows, p.rows_of_head, &p.w_heads, &head_loaded, head,
                                        0, batch);
                }
                barrier_wait(&head_loaded, head_parity);
                head_parity ^= 1;
                attend_rows<T, kHeadDim, false>(head_rows, p.rows_of_head, staging, &p.o_heads,
                                                p.lse + int64_t(item) * p.n, head, batch, begin,
                                                min(begin + kTile, p.n), p.n, p.scale);
                if (thread % 32 == 0) wait_stores_written();
                fence_async_proxy();  // the area may be loaded anew
                __syncthreads();
                if (thread == 0) count(counters + kProducts);
            }
        }

        const CUtensorMap* a_map = product == kOut    ? &p.o
                                   : product == kGram ? &p.z
                                   : layer == 0       ? &p.x
                                                      : &p.y;
        // of what this product reads
        const uint32_t* before = product == kOut    ? counters + kProducts
                                 : product == kGram ? counters + kOut
                                                    : counters - kSteps + kGram;
        const uint32_t target = product == kOut ? p.attention_tasks : blocks_of_product;
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
        FewRowsConstants constants(Tile(p.d, group, column_tile), to);
        for (int row_tile = group; row_tile < row_tiles; row_tile += p.groups) {
            Tile tile(p.d, row_tile, column_tile);
            if (thread == 0) {
                if (index > 0) wait_for_count(before, target);
                tile.load_rows(area, a_map, a_loaded);
            }
            auto load_next_weight = [&] {
                if (thread == 0 && row_tile + p.groups >= row_tiles && layer + 1 < p.depth) {
                    tile.load_weight(weight_of(product), &p.layers[layer + 1].weight[product],
                                     weight_loaded + product);
                }
            };
            multiply_few_rows<T>(tile, constants, to, area, a_loaded, a_parity, weight_of(product),
                                 weight_loaded + product, layer & 1, parts, moments,
                                 load_next_weight);
            a_parity ^= 1;
            __syncthreads();
            if (thread == 0) count(counters + product);
        }
    }
    wait_for_cluster();  // a neighbour may still read here
}

template <int kHeadDim>
int shared_bytes(int d, int rows_of_head) {
    int steps = Tile::steps_of_block(d);
    int of_head =
        2 * (kChunks<kHeadDim> * rows_of_head * kChunkColumns + kStagingElements<kHeadDim>);
    return kSwizzleAtomBytes + kProducts * steps * Tile::kBytesB + Tile::kBytesParts +
           std::max(steps * Tile::kBytesA, of_head);
}

template <typename T, int kHeadDim>
void launch(const EncoderOfFew& args, cudaStream_t stream) {
    int rows = args.batch * args.n, width = args.d;
    EncoderParams p{};
    auto tiles = [&](const void* data, int of_rows, int box_rows) {
        return make_tensor_map<2>(data, args.dtype, {width, of_rows}, {width},
                                  {Tile::kDepth, box_rows});
    };
    for (int i = 0; i < args.depth; ++i) {
        const EncoderLayer& from = args.layers[i];
        Layer& to = p.layers[i];
        to.weight[kQkv] = tiles(from.w_qkv, width, Tile::kColumns);
        to.weight[kOut] = tiles(from.w_out, width, Tile::kColumns);
        to.weight[kGram] = tiles(from.gram, width, Tile::kColumns);
        to.sums[kQkv] = from.qkv_sums, to.shift[kQkv] = from.qkv_shift;
        to.shift[kOut] = from.bias;
        to.scales[kGram] = from.gram_scales, to.sums[kGram] = from.gram_sums;
        to.shift[kGram] = from.gram_shift;
        to.threshold = from.threshold;
    }
    p.x = tiles(args.x, rows, Tile::kRows), p.y = tiles(args.y, rows, Tile::kRows);
    p.o = tiles(args.o, rows, Tile::kRows), p.z = tiles(args.z, rows, Tile::kRows);
    p.rows_of_head = args.n <= kTile ? kTile : rows_on_chip(args.n);
    auto heads = [&](const void* data, int box_rows) {
        return head_map(data, args.dtype, args.batch, args.n, args.heads, kHeadDim,
                        int64_t(args.n) * width, width, box_rows);
    };
    p.w_heads = heads(args.w, p.rows_of_head), p.o_heads = heads(args.o, 16);
    p.given = args.x;
    p.out[kQkv] = args.w, p.out[kOut] = args.z, p.out[kGram] = args.y;
    p.lse = args.lse, p.counters = args.counters;
    p.depth = args.depth, p.rows = rows, p.d = width, p.heads = args.heads, p.n = args.n;
    p.scale = args.scale, p.eps = args.eps;
    p.tiles_of_head = ceil_div(args.n, kTile);
    p.attention_tasks = args.batch * args.heads * p.tiles_of_head;
    p.column_tiles = ceil_div(width, Tile::kColumns);

    auto kernel = encoder_of_few_kernel<T, kHeadDim>;
    // the same in every thread of the host
    allow_shared_memory(kernel, shared_bytes<kHeadDim>(kMostFewEncoderColumns, kMostRowsOfHead));

    cudaLaunchAttribute all_at_once;
    all_at_once.id = cudaLaunchAttributeCooperative;
    all_at_once.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = Tile::kBlocks;
    config.blockDim = Tile::kThreads;
    config.dynamicSmemBytes = shared_bytes<kHeadDim>(width, p.rows_of_head);
    config.stream = stream;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config),
          "cudaOccupancyMaxActiveClusters");
    p.groups = std::min(clusters / p.column_tiles, ceil_div(rows, Tile::kRows));
    if (p.groups < 1) {
        throw std::runtime_error("encoder_of_few: expected at least " +
                                 std::to_string(p.column_tiles) + " clusters at once, got " +
                                 std::to_string(clusters));
    }
    config.gridDim = p.groups * p.column_tiles * Tile::kBlocks;
    config.attrs = &all_at_once;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, p), "cudaLaunchKernelEx");
}

}  // namespace

void encoder_of_few(const EncoderOfFew& args, cudaStream_t stream) {
    bool fits = args.batch > 0 && args.n > 0 && args.n <= kMostRowsOfHead && args.depth > 0 &&
                args.depth <= kMostFewEncoderLayers && args.d > 0 && args.d % 8 == 0 &&
                args.d <= kMostFewEncoderColumns && args.heads > 0 && args.dtype != Dtype::kFloat32;
    int head_dim = fits && args.d % args.heads == 0 ? args.d / args.heads : 0;
    bool half = args.dtype == Dtype::kFloat16;
    if (head_dim == 64) {
        return half ? launch<__half, 64>(args, stream) : launch<__nv_bfloat16, 64>(args, stream);
    }
    if (head_dim == 48) {
        return half ? launch<__half, 48>(args, stream) : launch<__nv_bfloat16, 48>(args, stream);
    }
    throw std::invalid_argument("encoder_of_few: expected 0 < n <= 256, up to " +
                                std::to_string(kMostFewEncoderLayers) + " layers of up to " +
                                std::to_string(kMostFewEncoderColumns) +
                                " columns, heads of 48 or 64, and float16 or bfloat16");
}

}  // namespace crate_kernels
