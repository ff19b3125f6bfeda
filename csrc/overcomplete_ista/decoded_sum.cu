// c + alpha z D^T by the GEMM of ISTA: the residual of a code, and the gradient of x.
// docs/overcomplete_ista.md
#include "../ista/launch.cuh"

namespace crate_kernels {

void overcomplete_decoded_sum(const OvercompleteDecodedSum& args, cudaStream_t stream) {
    check_ista("overcomplete_decoded_sum", args.rows, args.d, args.dtype, args.dtype);
    check_ista("overcomplete_decoded_sum", args.rows, args.m, args.dtype, args.dtype);
    GemmOperands operands{.a = args.z,
                          .b = args.dictionary,
                          .c = args.c,
                          .out = args.out,
                          .m = args.rows,
                          .n = args.d,
                          .k = args.m,
                          .dtype = args.dtype,
                          .out_dtype = args.dtype,
                          .alpha = args.alpha};
    launch_gemm<Product::kScaledSum>(operands, whole_plan(operands), stream);
}

}  // namespace crate_kernels
