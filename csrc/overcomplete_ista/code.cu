// z = relu(c + step_size a D - threshold), and the bits of z > 0, by the GEMM of ISTA: the two
// steps of the forward pass, the first without c. docs/overcomplete_ista.md
#include "../ista/launch.cuh"

namespace crate_kernels {

void overcomplete_code(const OvercompleteCode& args, cudaStream_t stream) {
    check_ista("overcomplete_code", args.rows, args.d, args.dtype, args.dtype);
    check_ista("overcomplete_code", args.rows, args.m, args.dtype, args.dtype);
    GemmOperands operands{.a = args.a,
                          .b = args.dictionary,
                          .c = args.c,
                          .out = args.z,
                          .mask = static_cast<uint32_t*>(args.mask),
                          .m = args.rows,
                          .n = args.m,
                          .k = args.d,
                          .dtype = args.dtype,
                          .out_dtype = args.dtype,
                          .threshold = args.threshold,
                          .alpha = args.step_size};
    if (args.c) {
        launch_gemm<Product::kRefine>(operands, whole_plan(operands), stream);
    } else {
        launch_gemm<Product::kEncode>(operands, whole_plan(operands), stream);
    }
}

}  // namespace crate_kernels
