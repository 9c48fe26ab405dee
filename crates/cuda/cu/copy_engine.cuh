// Bulk copies from global to shared memory, which the copy engine of Hopper and later GPUs does by itself, and the barriers in shared memory that they
// arrive on.
//
// Tiles of 16-bit elements lie as the copy engine writes them with its 128-byte swizzle: columns in bands of 64, band after band; in a band, row r
// is 128 bytes, whose 16-byte unit u is at place u XOR (r mod 8). A band starts at a multiple of 1024 bytes.
#pragma once

#include "prelude.cuh"

// Parameter of a kernel; `launch::TensorMap` on the host.
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

// Keys and values as [B or pages, G, rows, D] in boxes of 64 columns by some rows, swizzled by 128 bytes. rows: those that lie in memory, so that what a
// box has behind them becomes 0.
struct CacheMaps {
    TensorMap k_map, v_map;
};

// ---------------------------------------------------------------------------------------------------------- barriers

__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void barriers_initialised() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase end only when `bytes` more have been copied.
__device__ __forceinline__ void barrier_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended; the phase before a barrier's first counts as ended with parity 1.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// ------------------------------------------------------------------------------------------------------------ copies

// The box of a map at (c0, c1, c2, c3), innermost first, to shared memory; what lies outside the tensor becomes 0. Its bytes count for `barrier`.
__device__ __forceinline__ void copy_box(unsigned dst, const TensorMap& map, int c0, int c1, int c2, int c3, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(dst), "l"(&map),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
                 : "memory");
}
// The map will be read soon.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// What this thread wrote to shared memory is ordered before what wgmma reads and the copy engine writes there later.
__device__ __forceinline__ void written_for_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
