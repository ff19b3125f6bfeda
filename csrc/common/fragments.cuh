// Operands of a product on their way through registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace crate_kernels {

// A word of shared memory. Those asked for one after another are on their way together.
__device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}

// Four 8 x 8 matrices of 2-byte elements: lane 8 i + r has the shared-memory address of row r of
// the i-th, and receives elements 2 (lane % 4) and the next of row lane / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// Of each matrix as if it had been stored transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// The reverse: back to where load_matrices took them from.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&from)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}

// Stores four matrices of load_matrices' layout transposed.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address,
                                                          const uint32_t (&from)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
        "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
        : "memory");
}

// D[16, 8] += A[16, 16] B[16, 8] by one warp, float32 sums. A: matrices (rows 0-7, columns 0-7),
// (rows 8-15, columns 0-7), and the same of columns 8-15. b0, b1: rows 0-7 and 8-15 of B,
// transposed. D: row lane / 4 in d[0], d[1], row lane / 4 + 8 in d[2], d[3].
template <typename T>
__device__ __forceinline__ void multiply_by_warp(float* d, const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// From global memory that nothing writes meanwhile; starts here, not where the word is needed.
__device__ __forceinline__ uint32_t load_word_now(const uint32_t* from) {
    uint32_t word;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}

__device__ __forceinline__ float load_float_now(const float* from) {
    return __uint_as_float(load_word_now(reinterpret_cast<const uint32_t*>(from)));
}

__device__ __forceinline__ float2 load_pair_now(const float2* from) {
    float2 pair;
    asm volatile("ld.global.nc.v2.f32 {%0,%1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "l"(from));
    return pair;
}

// A mask of two 2-byte elements from the top bits of bytes 0 and 1, of bytes 2 and 3.
__device__ __forceinline__ uint32_t mask_from_low_bytes(uint32_t bits) {
    uint32_t mask;  // a selector with 8 added repeats the top bit of its byte
    asm("prmt.b32 %0, %1, 0, 0x9988;" : "=r"(mask) : "r"(bits));
    return mask;
}

__device__ __forceinline__ uint32_t mask_from_high_bytes(uint32_t bits) {
    uint32_t mask;
    asm("prmt.b32 %0, %1, 0, 0xBBAA;" : "=r"(mask) : "r"(bits));
    return mask;
}

// Where a word of a mask (csrc/ista/tiles.cuh) has ones, of the columns 16 step .. 16 step + 15.
__device__ __forceinline__ void mask_fragment(uint32_t (&a)[4], uint32_t word, int step) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        uint32_t bits = word << 2 * step + j;
        a[2 * j] &= mask_from_low_bytes(bits);
        a[2 * j + 1] &= mask_from_high_bytes(bits);
    }
}

}  // namespace crate_kernels
