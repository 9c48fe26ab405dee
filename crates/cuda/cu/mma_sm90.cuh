// Matrix products of one warpgroup (four warps, the first of a number divisible by 4), wgmma.mma_async.m64nNk16 on 16-bit elements with f32 sums,
// over tiles as copy_engine.cuh lays them.
//
// Sums of lane l of warp w: c[n][0..1] = (16·w + l / 4, 8·n + 2·(l mod 4) ..), c[n][2..3] eight rows below: as with mma.sync.m16n8k16, whose A fragment
// of 16 columns is also what the first operand takes from registers.
#pragma once

#include "copy_engine.cuh"

// ---------------------------------------------------------------------------------------------------------- barriers

// A barrier of `threads` threads, one of those with the numbers 1 to 15.
__device__ __forceinline__ void named_barrier(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

// Counts for a barrier without waiting at it.
__device__ __forceinline__ void named_arrive(int number, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

// ---------------------------------------------------------------------------------------------------------- products

// What the matrix descriptor of a tile with `rows` rows says beside its address: 128-byte swizzle, 1024 bytes from 8 rows to the next 8, and from a band
// to the next, which only an operand that is read along its columns crosses.
__host__ __device__ constexpr unsigned long long tile_descriptor(int rows) {
    return 1ull << 62 | (1024ull >> 4) << 32 | (unsigned long long)(rows * 128 >> 4) << 16;
}
__device__ __forceinline__ unsigned long long descriptor_at(unsigned long long tile, unsigned address) { return tile | (address & 0x3ffff) >> 4; }

// Before the first product on registers that other instructions wrote.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups of products are still on their way.
template <int PENDING> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Keeps the compiler from moving accesses of registers across: after a wait for their products, and before what overwrites them.
template <int N> __device__ __forceinline__ void settle(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}
template <int N> __device__ __forceinline__ void settle(unsigned (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

#if DTYPE == BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif
#define WGMMA_8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define WGMMA_32                                                                                                                  \
    WGMMA_8(0, 1, 2, 3, 4, 5, 6, 7) ", " WGMMA_8(8, 9, 10, 11, 12, 13, 14, 15) ", " WGMMA_8(16, 17, 18, 19, 20, 21, 22, 23) ", " \
    WGMMA_8(24, 25, 26, 27, 28, 29, 30, 31)
#define WGMMA_64                                                                                                                           \
    WGMMA_32 ", " WGMMA_8(32, 33, 34, 35, 36, 37, 38, 39) ", " WGMMA_8(40, 41, 42, 43, 44, 45, 46, 47) ", "                                \
    WGMMA_8(48, 49, 50, 51, 52, 53, 54, 55) ", " WGMMA_8(56, 57, 58, 59, 60, 61, 62, 63)
#define WGMMA_128                                                                                                                          \
    WGMMA_64 ", " WGMMA_8(64, 65, 66, 67, 68, 69, 70, 71) ", " WGMMA_8(72, 73, 74, 75, 76, 77, 78, 79) ", "                                \
    WGMMA_8(80, 81, 82, 83, 84, 85, 86, 87) ", " WGMMA_8(88, 89, 90, 91, 92, 93, 94, 95) ", "                                              \
    WGMMA_8(96, 97, 98, 99, 100, 101, 102, 103) ", " WGMMA_8(104, 105, 106, 107, 108, 109, 110, 111) ", "                                  \
    WGMMA_8(112, 113, 114, 115, 116, 117, 118, 119) ", " WGMMA_8(120, 121, 122, 123, 124, 125, 126, 127)
#define SUMS_4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SUMS_16(c, n) SUMS_4(c, n), SUMS_4(c, n + 1), SUMS_4(c, n + 2), SUMS_4(c, n + 3)
#define SUMS_32(c) SUMS_16(c, 0), SUMS_16(c, 4)
#define SUMS_64(c) SUMS_32(c), SUMS_16(c, 8), SUMS_16(c, 12)
#define SUMS_128(c) SUMS_64(c), SUMS_16(c, 16), SUMS_16(c, 20), SUMS_16(c, 24), SUMS_16(c, 28)

// c += a · bᵀ for 16 columns of a [64, ·] and of b [N, ·], both tiles in shared memory; c is not read when `add` is false.
// c += a · b for a in registers and 16 rows of b [·, N], a tile in shared memory.
#define WGMMA(N, COUNT, D0, D1, D2, D3, D4)                                                                                                \
    __device__ __forceinline__ void product_rows(float (&c)[N / 8][4], unsigned long long a, unsigned long long b, bool add) {             \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #D2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" WGMMA_##COUNT \
                     "}, %" #D0 ", %" #D1 ", p, 1, 1, 0, 0;\n}"                                                                            \
                     : SUMS_##COUNT(c)                                                                                                     \
                     : "l"(a), "l"(b), "r"((int)add));                                                                                     \
    }                                                                                                                                      \
    __device__ __forceinline__ void product_columns(float (&c)[N / 8][4], const unsigned (&a)[4], unsigned long long b) {                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES " {" WGMMA_##COUNT \
                     "}, {%" #D0 ", %" #D1 ", %" #D2 ", %" #D3 "}, %" #D4 ", p, 1, 1, 1;\n}"                                              \
                     : SUMS_##COUNT(c)                                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                \
    }
WGMMA(64, 32, 32, 33, 34, 35, 36)
WGMMA(128, 64, 64, 65, 66, 67, 68)
WGMMA(256, 128, 128, 129, 130, 131, 132)
#undef WGMMA

// How many registers the threads of a warpgroup have from here on.
template <int COUNT> __device__ __forceinline__ void registers_fewer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> __device__ __forceinline__ void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
