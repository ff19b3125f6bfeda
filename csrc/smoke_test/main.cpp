// Every kernel against host loops in double precision, without torch or Python:
//   ctest --test-dir build/cpython-312, or under compute-sanitizer (make gpu-sanitize).
//
// The criterion is that of the Python tests: the host also computes with every tensor rounded as
// plain PyTorch rounds it, and our largest error may be at most twice that one's (gradients: three
// times), or one unit in the last place. Each launch runs twice and has to repeat every bit; fresh
// memory is NaN.
#include "host.h"

using namespace crate_kernels;

constexpr int kNoDevice = 77;  // what ctest takes for "skipped", see CMakeLists.txt

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::puts("skipped: no CUDA device");
        return kNoDevice;
    }
    try {
        // One test per op.
        bool passed = test_attention_everywhere();
        passed &= test_normed_projection_everywhere();
        passed &= test_residual_projection_everywhere();
        passed &= test_output_gradient_everywhere();
        passed &= test_encoder_of_few_everywhere();
        passed &= test_normalise_backward_everywhere();
        passed &= test_ista_everywhere();
        passed &= test_normed_ista_everywhere();
        passed &= test_overcomplete_ista_everywhere();
        return passed ? 0 : 1;
    } catch (const std::exception& error) {
        std::printf("FAILED: %s\n", error.what());
        return 1;
    }
}
