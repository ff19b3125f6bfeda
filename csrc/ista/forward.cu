// y = relu(x + xc G - threshold), the bits of y > 0, and the moments of its rows.
#include "launch.cuh"
#include "launchers.h"

namespace crate_kernels {

int64_t ista_mask_bytes(int64_t rows, int d) {
    return ceil_div(rows, kBlockM) * ceil_div(d, kBlockK) * kMaskWords * sizeof(uint32_t);
}

namespace {

GemmOperands operands_of(const IstaForward& args) {
    check_ista("ista_forward", args.rows, args.d, args.dtype, args.x_dtype);
    if (args.moments) {
        check_moments("ista_forward", args.d);
        if (args.x_dtype != args.dtype) {
            throw std::invalid_argument("ista_forward: expected moments only for one dtype");
        }
    }
    return {.a = args.xc,
            .b = args.gram,
            .c = args.x,
            .out = args.y,
            .mask = static_cast<uint32_t*>(args.mask),
            .m = args.rows,
            .n = args.d,
            .k = args.d,
            .dtype = args.dtype,
            .out_dtype = args.x_dtype,
            .threshold = args.threshold,
            .moments = args.moments};
}

}  // namespace

void ista_forward(const IstaForward& args, cudaStream_t stream) {
    GemmOperands operands = operands_of(args);
    launch_gemm<Product::kForward>(operands, whole_plan(operands), stream);
}

void ista_forward(const IstaForward& args, const GemmPlan& plan, cudaStream_t stream) {
    launch_gemm<Product::kForward>(operands_of(args), plan, stream);
}

}  // namespace crate_kernels
