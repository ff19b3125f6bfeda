// z = x + o V^T + b, and the moments of its rows, by the GEMM of ISTA: what is left to the norm
// that comes next is two numbers a row. docs/block.md
#include "../ista/launch.cuh"

namespace crate_kernels {

void residual_projection(const ResidualProjection& args, cudaStream_t stream) {
    check_ista("residual_projection", args.rows, args.d, args.dtype, args.dtype);
    check_ista("residual_projection", args.rows, args.inner, args.dtype, args.dtype);
    check_moments("residual_projection", args.d);
    GemmOperands operands{.a = args.o,
                          .b = args.w_out,
                          .c = args.x,
                          .out = args.z,
                          .m = args.rows,
                          .n = args.d,
                          .k = args.inner,
                          .dtype = args.dtype,
                          .out_dtype = args.dtype,
                          .moments = args.moments,
                          .shift = args.bias};
    launch_gemm<Product::kResidual>(operands, whole_plan(operands), stream);
}

}  // namespace crate_kernels
