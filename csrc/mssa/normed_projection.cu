// w = LN(x) U^T by the GEMM of ISTA, which norms the products instead of the rows. docs/block.md
#include "../ista/launch.cuh"

namespace crate_kernels {

void normed_projection(const NormedProjection& args, cudaStream_t stream) {
    check_ista("normed_projection", args.rows, args.d, args.dtype, args.dtype);
    check_ista("normed_projection", args.rows, args.inner, args.dtype, args.dtype);
    GemmOperands operands{.a = args.x,
                          .b = args.weight,
                          .out = args.w,
                          .m = args.rows,
                          .n = args.inner,
                          .k = args.d,
                          .dtype = args.dtype,
                          .out_dtype = args.dtype,
                          .row_statistics = args.stats,
                          .shift = args.shift,
                          .column_sums = args.sums};
    launch_gemm<Product::kNormed>(operands, whole_plan(operands), stream);
}

}  // namespace crate_kernels
