// The forward kernels by the calls they serve; forward.cu chooses.
#pragma once

#include "../crate_kernels.h"

namespace crate_kernels {

void attention_forward_short(const AttentionForward& args, cudaStream_t stream);  // n <= 256
void attention_forward_long(const AttentionForward& args, cudaStream_t stream);

}  // namespace crate_kernels
