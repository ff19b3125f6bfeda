// Barriers in shared memory (mbarrier): arrivals and bytes counted, waited for by phase parity.
#pragma once

#include <cstdint>

namespace crate_kernels {

using Barrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals));
}

// Makes initialised barriers known to the bulk copy engine; a __syncthreads has to follow.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival that also announces bytes which copies will deliver in this phase.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Blocks until the phase of that parity (0 the first time, then alternating) is complete.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// A barrier among some of a block's threads; id 0 is __syncthreads'.
__device__ __forceinline__ void sync_threads_of(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; whether any of the threads says so.
__device__ __forceinline__ bool any_of_threads(int id, int threads, bool here) {
    int any;
    asm volatile(
        "{\n"
        ".reg .pred here, any;\n"
        "setp.ne.b32 here, %3, 0;\n"
        "bar.red.or.pred any, %1, %2, here;\n"
        "selp.b32 %0, 1, 0, any;\n"
        "}\n"
        : "=r"(any)
        : "r"(id), "r"(threads), "r"(int(here))
        : "memory");
    return any;
}

// Counts among those that the barrier's waiting threads wait for, and goes on.
__device__ __forceinline__ void arrive_among(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Shared memory written by ordinary stores becomes visible to wgmma and the copy engine. Each
// writing thread calls it, before the barrier that the readers wait at.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The kernel before in the stream has ended and what it wrote is here; see launch (tensor_map.h).
__device__ __forceinline__ void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// A ring of buffers: which one is next, and the parity to wait for.
struct RingPosition {
    int slot = 0;
    uint32_t parity = 0;

    template <int kSlots>
    __device__ __forceinline__ void advance() {
        if (++slot == kSlots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

}  // namespace crate_kernels
