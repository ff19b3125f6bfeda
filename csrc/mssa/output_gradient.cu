// dO = dy V and delta = rowsum(dO * O) of each head of 64, by the GEMM of ISTA: O comes into its
// epilogue, so that no pass over dO and O is left. Idle warps sum the rows of dy as they come by.
// docs/mssa.md
#include "../ista/launch.cuh"

namespace crate_kernels {

void output_gradient(const OutputGradient& args, cudaStream_t stream) {
    check_ista("output_gradient", args.rows, args.d, args.dtype, args.dtype);
    int64_t inner = int64_t{args.heads} * 64;
    GemmOperands operands{.a = args.dy,
                          .b = args.w_out,
                          .c = args.o,
                          .out = args.grad_o,
                          .m = args.rows,
                          .n = inner,
                          .k = args.d,
                          .dtype = args.dtype,
                          .out_dtype = args.dtype,
                          .row_sums = args.delta,
                          .sums_of_a = args.sums};
    launch_gemm<Product::kRowSums>(operands, whole_plan(operands), stream);
}

int64_t output_gradient_sums(int64_t rows) { return 2 * ceil_div(rows, kBlockM); }

}  // namespace crate_kernels
