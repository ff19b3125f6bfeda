#include "heads.cuh"
#include "launchers.h"

namespace crate_kernels {

void attention_backward(const AttentionBackward& args, cudaStream_t stream) {
    if (args.n <= kTile) {
        attention_backward_short(args, stream);
    } else {
        attention_backward_long(args, stream);
    }
}

int64_t attention_backward_scratch(int batch, int n, int heads) {
    return n <= kTile ? 0 : attention_backward_long_scratch(batch, n, heads);
}

}  // namespace crate_kernels
