// Warpgroup matrix products: D[64, N] (+)= A[64, 16] B[16, N], float32 sums in registers.
//
// D lies in a warpgroup as kRegisters = N / 2 floats a thread. With warp = thread / 32 % 4,
// group = lane / 4 and pair = lane % 4, register 4 j + i holds
//     row 16 warp + group + 8 (i / 2), column 8 j + 2 pair + i % 2.
// A from registers is that layout packed in twos: columns 16 k .. 16 k + 15 of a D are the A of the
// k-th step. Operands in shared memory lie in chunks of 64 columns, [rows][64] each, with 128-byte
// swizzle, as the copy engine writes them; a chunk starts at a multiple of 1024 bytes.
#pragma once

#include "barrier.cuh"
#include "pack.cuh"

namespace crate_kernels {

// ---- descriptors of operands in shared memory

inline constexpr int kChunkColumns = 64;  // of 2 bytes: the span of the swizzle
inline constexpr int kSwizzleAtomBytes = 1024;

enum Transposed : int { kNo = 0, kYes = 1 };

// Only the low word of a descriptor varies: the address and, for transposed operands, the distance
// between chunks. The high word says 128-byte swizzle, atoms of 8 rows back to back.
__device__ __forceinline__ uint64_t descriptor_of(uint32_t low_word) {
    constexpr uint32_t kHighWord = kSwizzleAtomBytes >> 4 | 1u << 30;
    return uint64_t{kHighWord} << 32 | low_word;
}

// Rows of the tile are rows of A (columns of B): the sum runs along the 64 contiguous columns.
// Step k of 16 columns within a chunk adds 2 k to the low word, 8 rows add 64.
__device__ __forceinline__ uint32_t low_word(const void* tile) {
    return (shared_address(tile) & 0x3FFFF) >> 4 | 1u << 16;
}
__device__ __forceinline__ uint64_t descriptor(const void* tile) {
    return descriptor_of(low_word(tile));
}

// Rows of the tile are what the sum runs along (A or B transposed); chunks of 64 columns of A^T or
// B lie chunk_bytes apart. Step k of 16 rows adds 128 k to the low word.
__device__ __forceinline__ uint32_t low_word_transposed(const void* tile, int chunk_bytes) {
    return (shared_address(tile) & 0x3FFFF) >> 4 | uint32_t(chunk_bytes >> 4) << 16;
}
__device__ __forceinline__ uint64_t descriptor_transposed(const void* tile, int chunk_bytes) {
    return descriptor_of(low_word_transposed(tile, chunk_bytes));
}

// Says to the compiler that x is the same in all threads of a warp, as it is. Descriptors made of
// it stay in uniform registers, and products follow one another at once.
template <typename Integer>
__device__ __forceinline__ Integer uniform(Integer x) {
    return __shfl_sync(0xFFFFFFFF, x, 0);
}

// ---- order

// Before the first product, and after registers of A or D were written otherwise.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of products issued so far.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending groups run.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers across this point.
template <typename Register, int kCount>
__device__ __forceinline__ void pin_registers(Register (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if constexpr (sizeof(Register) == 4 && !__is_same(Register, float)) {
            asm volatile("" : "+r"(registers[i])::"memory");
        } else {
            asm volatile("" : "+f"(registers[i])::"memory");
        }
    }
}

// ---- products

// wgmma<N, T>::from_shared(d, a, b, add): D = A B, plus D where add; A and B by descriptor.
// wgmma<N, T>::from_registers(d, a, b, add): A by its four registers.
template <int N, typename T>
struct wgmma;

// The names and the operands of the first 8, 16, ... registers of D.
#define CRATE_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define CRATE_NAMES_16 CRATE_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define CRATE_NAMES_24 CRATE_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define CRATE_NAMES_32 CRATE_NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define CRATE_NAMES_40 CRATE_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define CRATE_NAMES_48 CRATE_NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define CRATE_NAMES_56 CRATE_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define CRATE_NAMES_64 CRATE_NAMES_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define CRATE_NAMES_72 CRATE_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define CRATE_NAMES_80 CRATE_NAMES_72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define CRATE_NAMES_88 CRATE_NAMES_80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define CRATE_NAMES_96 CRATE_NAMES_88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define CRATE_NAMES_104 CRATE_NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define CRATE_NAMES_112 CRATE_NAMES_104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define CRATE_NAMES_120 CRATE_NAMES_112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define CRATE_NAMES_128 CRATE_NAMES_120 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define CRATE_EIGHT(i)                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define CRATE_SUMS_8 CRATE_EIGHT(0)
#define CRATE_SUMS_16 CRATE_SUMS_8, CRATE_EIGHT(8)
#define CRATE_SUMS_24 CRATE_SUMS_16, CRATE_EIGHT(16)
#define CRATE_SUMS_32 CRATE_SUMS_24, CRATE_EIGHT(24)
#define CRATE_SUMS_40 CRATE_SUMS_32, CRATE_EIGHT(32)
#define CRATE_SUMS_48 CRATE_SUMS_40, CRATE_EIGHT(40)
#define CRATE_SUMS_56 CRATE_SUMS_48, CRATE_EIGHT(48)
#define CRATE_SUMS_64 CRATE_SUMS_56, CRATE_EIGHT(56)
#define CRATE_SUMS_72 CRATE_SUMS_64, CRATE_EIGHT(64)
#define CRATE_SUMS_80 CRATE_SUMS_72, CRATE_EIGHT(72)
#define CRATE_SUMS_88 CRATE_SUMS_80, CRATE_EIGHT(80)
#define CRATE_SUMS_96 CRATE_SUMS_88, CRATE_EIGHT(88)
#define CRATE_SUMS_104 CRATE_SUMS_96, CRATE_EIGHT(96)
#define CRATE_SUMS_112 CRATE_SUMS_104, CRATE_EIGHT(104)
#define CRATE_SUMS_120 CRATE_SUMS_112, CRATE_EIGHT(112)
#define CRATE_SUMS_128 CRATE_SUMS_120, CRATE_EIGHT(120)

// R is N / 2; R1 .. R6 are the numbers after it, which name the operands after D.
#define CRATE_WGMMA(N, R, R1, R2, R3, R4, R5, R6, T, TYPE)                                         \
    template <>                                                                                    \
    struct wgmma<N, T> {                                                                           \
        template <Transposed kA = kNo, Transposed kB = kNo>                                        \
        static __device__ __forceinline__ void from_shared(float (&d)[R], uint64_t a, uint64_t b,  \
                                                           bool add) {                             \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #R2                              \
                         ", 0;\n"                                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE           \
                         " "                                                                       \
                         "{" CRATE_NAMES_##R "}, %" #R ", %" #R1 ", add, 1, 1, %" #R3 ", %" #R4    \
                                             ";\n}\n"                                              \
                         : CRATE_SUMS_##R                                                          \
                         : "l"(a), "l"(b), "r"(int(add)), "n"(int(kA)), "n"(int(kB)));             \
        }                                                                                          \
        template <Transposed kB = kNo>                                                             \
        static __device__ __forceinline__ void from_registers(float (&d)[R], uint32_t a0,          \
                                                              uint32_t a1, uint32_t a2,            \
                                                              uint32_t a3, uint64_t b, bool add) { \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #R5                              \
                         ", 0;\n"                                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE           \
                         " "                                                                       \
                         "{" CRATE_NAMES_##R "}, {%" #R ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4      \
                                             ", add, 1, 1, %" #R6 ";\n}\n"                         \
                         : CRATE_SUMS_##R                                                          \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(add)),              \
                           "n"(int(kB)));                                                          \
        }                                                                                          \
    };
#define CRATE_WGMMA_OF(N, R, R1, R2, R3, R4, R5, R6)                 \
    CRATE_WGMMA(N, R, R1, R2, R3, R4, R5, R6, __nv_bfloat16, "bf16") \
    CRATE_WGMMA(N, R, R1, R2, R3, R4, R5, R6, __half, "f16")

CRATE_WGMMA_OF(16, 8, 9, 10, 11, 12, 13, 14)
CRATE_WGMMA_OF(32, 16, 17, 18, 19, 20, 21, 22)
CRATE_WGMMA_OF(48, 24, 25, 26, 27, 28, 29, 30)
CRATE_WGMMA_OF(64, 32, 33, 34, 35, 36, 37, 38)
CRATE_WGMMA_OF(80, 40, 41, 42, 43, 44, 45, 46)
CRATE_WGMMA_OF(128, 64, 65, 66, 67, 68, 69, 70)
CRATE_WGMMA_OF(192, 96, 97, 98, 99, 100, 101, 102)

#undef CRATE_WGMMA_OF
#undef CRATE_WGMMA

}  // namespace crate_kernels
