// Clusters: blocks that run side by side and reach each other's shared memory.
#pragma once

#include "bulk_copy.cuh"

namespace crate_kernels {

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier among all threads of a cluster that still run, in halves and whole.
__device__ __forceinline__ void arrive_in_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void sync_cluster() {
    arrive_in_cluster();
    wait_for_cluster();
}

// Where the block of that rank keeps what this one keeps at `pointer`.
__device__ __forceinline__ uint32_t address_in_block(const void* pointer, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(shared_address(pointer)), "r"(rank));
    return address;
}

__device__ __forceinline__ void write_in_block(uint32_t address, float2 x) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x.x), "f"(x.y)
                 : "memory");
}

// For reads that are done, by wgmma or the copy engine: orders the block's own memory accesses only
// (among the whole cluster's, an arrival would cost a fence of the whole GPU).
__device__ __forceinline__ void barrier_arrive_at(uint32_t address) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

// To the same place in both blocks of a cluster of two; each one's barrier counts the bytes.
__device__ __forceinline__ void load_tile_for_both(void* to, const CUtensorMap* map,
                                                   Barrier* barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(uint16_t{3})
        : "memory");
}

// The same for all blocks of a larger one.
template <int kBlocks>
__device__ __forceinline__ void load_tile_for_all(void* to, const CUtensorMap* map,
                                                  Barrier* barrier, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2),
        "h"(uint16_t((1 << kBlocks) - 1))
        : "memory");
}

// ---- registers of a warpgroup, shifted from those that need few to those that need many

template <int kCount>
__device__ __forceinline__ void give_up_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace crate_kernels
