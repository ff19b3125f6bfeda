// The calls of crate_kernels.h with the plan given, for measurements.
#pragma once

#include "../crate_kernels.h"
#include "plan.h"

namespace crate_kernels {

void ista_forward(const IstaForward& args, const GemmPlan& plan, cudaStream_t stream);
void ista_backward(const IstaBackward& args, const GemmPlan& plan, cudaStream_t stream);
void ista_weight(const IstaWeight& args, const GemmPlan& plan, cudaStream_t stream);

}  // namespace crate_kernels
