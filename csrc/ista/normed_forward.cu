// y = relu(u + u G - threshold) of u = LN(z), by a GEMM on z that norms the products instead of the
// rows. docs/block.md
#include "launch.cuh"

namespace crate_kernels {

void ista_normed_forward(const IstaNormedForward& args, cudaStream_t stream) {
    check_ista("ista_normed_forward", args.rows, args.d, args.dtype, args.dtype);
    check_moments("ista_normed_forward", args.d);
    GemmOperands operands{.a = args.z,
                          .b = args.weight,
                          .out = args.y,
                          .mask = static_cast<uint32_t*>(args.mask),
                          .m = args.rows,
                          .n = args.d,
                          .k = args.d,
                          .dtype = args.dtype,
                          .out_dtype = args.dtype,
                          .threshold = args.threshold,
                          .moments = args.moments,
                          .row_statistics = args.stats,
                          .shift = args.shift,
                          .column_sums = args.sums,
                          .column_scales = args.scales};
    launch_gemm<Product::kNormedForward>(operands, whole_plan(operands), stream);
}

}  // namespace crate_kernels
