// Tensor maps: what the copy engine knows of a tensor in global memory. Host code.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <stdexcept>
#include <string>

#include "../crate_kernels.h"

namespace crate_kernels {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // said here, not once more by the next launch
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

inline int multiprocessors() {
    int device, count;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    return count;
}

// A kernel that takes more than 48 KB of shared memory has to be told so before its launch.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "cudaFuncSetAttribute");
}

// Launches a kernel which, where `early`, may start before the one ahead of it in the stream ends:
// it calls wait_for_kernel_before before it touches what that one writes.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), bool early, dim3 blocks, int threads, int shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute starts_early;
    starts_early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    starts_early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &starts_early;
    config.numAttrs = early ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "cudaLaunchKernelEx");
}

template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                  cudaStream_t stream, const Arguments&... arguments) {
    launch(kernel, true, blocks, threads, shared_bytes, stream, arguments...);
}

// Tiles of `box` elements of a tensor with `sizes` and, from the second dimension on, `strides`
// (elements; the first dimension is contiguous). What lies outside reads as zero and is not
// written. With 128-byte swizzle if box[0] spans 128 bytes.
template <size_t kRank>
CUtensorMap make_tensor_map(const void* data, Dtype dtype, std::array<int64_t, kRank> sizes,
                            std::array<int64_t, kRank - 1> strides, std::array<int, kRank> box) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {  // from the driver in use: nothing to link with
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                               cudaEnableDefault, &found),
              "cuTensorMapEncodeTiled");
        if (found != cudaDriverEntryPointSuccess) {
            throw std::runtime_error(
                "cuTensorMapEncodeTiled: the driver has none; it has to be of "
                "CUDA 12.0 or newer");
        }
        return reinterpret_cast<Encode>(function);
    }();

    int element = dtype == Dtype::kFloat32 ? 4 : 2;
    cuuint64_t global_sizes[kRank], global_strides[kRank];
    cuuint32_t box_sizes[kRank], element_strides[kRank];
    for (size_t i = 0; i < kRank; ++i) {
        global_sizes[i] = sizes[i];
        box_sizes[i] = box[i];
        element_strides[i] = 1;
        if (i + 1 < kRank) global_strides[i] = strides[i] * element;
    }
    CUtensorMapDataType type = dtype == Dtype::kFloat32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                               : dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMap map;
    CUresult result =
        encode(&map, type, kRank, const_cast<void*>(data), global_sizes, global_strides, box_sizes,
               element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
               box[0] * element == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result) +
                                 " (data and strides have to be multiples of 16 bytes)");
    }
    return map;
}

}  // namespace crate_kernels
