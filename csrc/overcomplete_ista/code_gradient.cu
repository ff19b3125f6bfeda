// e = c + alpha a D where the bits of a code say so, else 0, by the GEMM of ISTA: what comes back
// through the thresholds. docs/overcomplete_ista.md
#include "../ista/launch.cuh"

namespace crate_kernels {

void overcomplete_code_gradient(const OvercompleteCodeGradient& args, cudaStream_t stream) {
    check_ista("overcomplete_code_gradient", args.rows, args.d, args.dtype, args.dtype);
    check_ista("overcomplete_code_gradient", args.rows, args.m, args.dtype, args.dtype);
    if (!args.mask) {
        throw std::invalid_argument("overcomplete_code_gradient: expected a mask, got none");
    }
    GemmOperands operands{.a = args.a,
                          .b = args.dictionary,
                          .c = args.c,
                          .out = args.e,
                          .mask = static_cast<uint32_t*>(const_cast<void*>(args.mask)),
                          .m = args.rows,
                          .n = args.m,
                          .k = args.d,
                          .dtype = args.dtype,
                          .out_dtype = args.dtype,
                          .alpha = args.alpha};
    if (args.c) {
        launch_gemm<Product::kMaskedSum>(operands, whole_plan(operands), stream);
    } else {
        launch_gemm<Product::kMasked>(operands, whole_plan(operands), stream);
    }
}

}  // namespace crate_kernels
