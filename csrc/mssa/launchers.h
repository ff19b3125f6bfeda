// The kernels by the calls they serve; forward.cu and backward.cu choose.
#pragma once

#include "../crate_kernels.h"

namespace crate_kernels {

void attention_forward_short(const AttentionForward& args, cudaStream_t stream);  // n <= 256
void attention_forward_long(const AttentionForward& args, cudaStream_t stream);

void attention_backward_short(const AttentionBackward& args, cudaStream_t stream);  // n <= 64
void attention_backward_long(const AttentionBackward& args, cudaStream_t stream);
int64_t attention_backward_long_scratch(int batch, int n, int heads);  // bytes

}  // namespace crate_kernels
