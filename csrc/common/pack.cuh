// Two float32 as two 2-byte floats in a word, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace crate_kernels {

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (__is_same(T, __half)) {
        __half2 packed = __floats2half2_rn(low, high);
        return reinterpret_cast<uint32_t&>(packed);
    } else {
        __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<uint32_t&>(packed);
    }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
    if constexpr (__is_same(T, __half)) {
        return __half22float2(reinterpret_cast<__half2&>(packed));
    } else {
        return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000)};
    }
}

}  // namespace crate_kernels
