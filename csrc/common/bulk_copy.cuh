// Tiles between global and shared memory by the bulk tensor copy engine. One thread issues a copy;
// a load completes on a barrier, a store in its thread's own bulk group.
#pragma once

#include <cuda.h>

#include "barrier.cuh"

namespace crate_kernels {

// Whether the calling thread is the one that goes on alone, of its warp, all of which calls. Copies
// behind it are issued once; behind a comparison of threadIdx.x the compiler loops over threads.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xFFFFFFFF;\n"
        "selp.b32 %0, 1, 0, elected;\n"
        "}\n"
        : "=r"(elected));
    return elected;
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_tile(void* to, const CUtensorMap* map, Barrier* barrier,
                                          int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
        : "memory");
}

__device__ __forceinline__ void load_tile(void* to, const CUtensorMap* map, Barrier* barrier,
                                          int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

__device__ __forceinline__ void load_tile(void* to, const CUtensorMap* map, Barrier* barrier,
                                          int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Brings a tile into the L2 cache, for a load that will come.
__device__ __forceinline__ void prefetch_tile(const CUtensorMap* map, int c0, int c1, int c2,
                                              int c3) {
    asm volatile(
        "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map),
        "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

__device__ __forceinline__ void store_tile(const CUtensorMap* map, const void* from, int c0,
                                           int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(shared_address(from)), "r"(c0), "r"(c1)
        : "memory");
}

__device__ __forceinline__ void store_tile(const CUtensorMap* map, const void* from, int c0, int c1,
                                           int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Closes the group of this thread's stores so far.
__device__ __forceinline__ void commit_stores() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most kPending groups of this thread still read shared memory: none may, when it is
// written again and when the block ends.
template <int kPending>
__device__ __forceinline__ void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until all stores of this thread are in global memory: before it stores there once more.
__device__ __forceinline__ void wait_stores_written() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace crate_kernels
