// Tied-attention forward for n <= 256, not causal.
//
// A block is one warpgroup and owns one head: w_h [n, head_dim] is loaded once, and is query, key
// and value of every row tile; of one of them where heads are few. docs/mssa.md
#include "forward_rows.cuh"
#include "launchers.h"

namespace crate_kernels {
namespace {

constexpr int kThreads = 128;

// kOneTile: n <= 64.
template <typename T, int kHeadDim, bool kOneTile>
__global__ void __launch_bounds__(kThreads, kHeadDim > 80   ? 2
                                            : kHeadDim > 64 ? 3
                                            : kOneTile      ? 6
                                                            : 4)
    attention_forward_short(const __grid_constant__ CUtensorMap w_map,
                            const __grid_constant__ CUtensorMap o_map, float* lse, int n, int rows,
                            int heads, float scale, int rows_of_block, int ahead) {
    // shared memory
    extern __shared__ char shared[];
    __shared__ Barrier w_loaded;
    T* w = reinterpret_cast<T*>(swizzle_aligned(shared));
    T* staging = w + kChunks<kHeadDim> * rows * kChunkColumns;

    int head = blockIdx.x % heads, batch = blockIdx.x / heads;
    int begin = blockIdx.y * rows_of_block, end = min(begin + rows_of_block, n);

    // load
    if (gridDim.y > 1) let_next_kernel_start();  // few heads
    if (threadIdx.x == 0) {
        barrier_init(&w_loaded, 1);
        barrier_init_done();
        barrier_expect(&w_loaded, kChunks<kHeadDim> * rows * kChunkColumns * sizeof(T));
        wait_for_kernel_before();
        load_rows<kHeadDim>(w, rows, &w_map, &w_loaded, head, 0, batch);
        int next = blockIdx.x + ahead;  // about when this block ends
        if (next < gridDim.x) prefetch_head<kHeadDim>(&w_map, next, heads);
    }
    __syncthreads();
    barrier_wait(&w_loaded, 0);

    attend_rows<T, kHeadDim, kOneTile>(HeadOnChip<T>{.w = w,
                                                     .rows = rows,
                                                     .n = n,
                                                     .scale = scale,
                                                     .staging = staging,
                                                     .o_map = &o_map,
                                                     .lse = lse + (int64_t)blockIdx.x * n,
                                                     .head = head,
                                                     .batch = batch},
                                       begin, end);
    if (threadIdx.x % 32 == 0) wait_stores_read<0>();
}

}  // namespace

void attention_forward_short(const AttentionForward& args, cudaStream_t stream) {
    dispatch(args.dtype, args.head_dim, [&](auto type, auto head_dim) {
        using T = decltype(type);
        constexpr int kHeadDim = decltype(head_dim)::value;
        int rows = args.n <= kTile ? kTile : rows_on_chip(args.n);
        int64_t width = (int64_t)args.heads * args.head_dim;
        CUtensorMap w = head_map(args.w, args.dtype, args.batch, args.n, args.heads, args.head_dim,
                                 args.w_stride_batch, args.w_stride_row, rows);
        CUtensorMap o = head_map(args.o, args.dtype, args.batch, args.n, args.heads, args.head_dim,
                                 args.n * width, width, 16);
        auto bytes = [&](int rows) {
            int elements = kChunks<kHeadDim> * rows * kChunkColumns + kStagingElements<kHeadDim>;
            return int(elements * sizeof(T)) + kSwizzleAtomBytes;
        };
        auto kernel = args.n <= kTile ? attention_forward_short<T, kHeadDim, true>
                                      : attention_forward_short<T, kHeadDim, false>;
        allow_shared_memory(kernel, bytes(256));  // the same in every thread of the host
        // Few heads: a block for each row tile, as long as all run at once.
        int blocks = args.batch * args.heads, tiles = ceil_div(args.n, kTile);
        bool few = blocks * tiles <= 2 * multiprocessors();
        dim3 grid(blocks, few ? tiles : 1);
        launch(kernel, few, grid, kThreads, bytes(rows), stream, w, o, args.lse, args.n, rows,
               args.heads, args.scale, few ? kTile : args.n, 4 * multiprocessors());
    });
}

}  // namespace crate_kernels
