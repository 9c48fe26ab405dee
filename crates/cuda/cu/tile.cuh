// Tiles of 16-bit rows in shared memory: layout, asynchronous copies from global memory, copies back.
//
// A tile of R rows by C columns (C a multiple of 16) lies in rows of C + 8 elements. C / 8 is even, so consecutive rows are an odd number of
// 16-byte units apart and eight rows start in eight different bank groups: `ldmatrix` and 16-byte copies meet no bank conflict, as with an
// XOR swizzle, but every fragment's address is one register plus a constant.
#pragma once

#include "prelude.cuh"

__host__ __device__ constexpr int tile_pitch(int columns) { return columns + 8; }

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, not through L1; the bytes are zero when `inside` is false, and `src` is then not read.
__device__ __forceinline__ void copy16_async(unsigned dst, const void* src, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups of copies are still on their way.
template <int PENDING> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ void store_shared16(unsigned dst, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_shared2(unsigned dst, unsigned short x) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(dst), "h"(x) : "memory"); }

__host__ __device__ constexpr int next_power_of_two(int n) {
    int p = 1;
    while (p < n) p *= 2;
    return p;
}

// How THREADS threads share the 16-byte units of a row: a power of two of them lies along a row, so that a thread's column never changes.
template <int COLUMNS, int THREADS> struct Lanes {
    static constexpr int UNITS = COLUMNS / 8;
    static constexpr int ALONG = next_power_of_two(UNITS);
    static constexpr int ROWS = THREADS / ALONG;  // rows of one pass
    static_assert(THREADS % ALONG == 0, "a row fits one pass");
};

// Fills a tile of ROWS rows by COLUMNS columns at `dst`. `row(r, inside)` gives the address of row r, any address when it is not `inside`, for which
// it must read no table; rows from `rows_end` on, and columns from `columns_end` on, become zero: nothing behind the valid rows is touched.
// wide: rows are 16-byte aligned and columns_end is a multiple of 8; then the copies are asynchronous and the caller commits and waits.
// Otherwise elements go one by one. All threads 0 … THREADS − 1 take part; a barrier makes the tile visible.
template <int ROWS, int COLUMNS, int THREADS, class RowAddress>
__device__ __forceinline__ void load_tile(unsigned dst, int rows_end, int columns_end, bool wide, int thread, const RowAddress& row) {
    typedef Lanes<COLUMNS, THREADS> L;
    constexpr int PITCH = tile_pitch(COLUMNS);
    if (wide) {
        const int unit = thread % L::ALONG, first = thread / L::ALONG;
        if (L::UNITS == L::ALONG || unit < L::UNITS) {
            const bool column_inside = unit * 8 < columns_end;
            const unsigned to = dst + 2 * (first * PITCH + unit * 8);
#pragma unroll
            for (int i = 0; i < (ROWS + L::ROWS - 1) / L::ROWS; ++i) {
                const int r = first + i * L::ROWS;
                if (ROWS % L::ROWS != 0 && r >= ROWS) break;
                copy16_async(to + 2 * i * L::ROWS * PITCH, row(r, r < rows_end) + unit * 8, column_inside && r < rows_end);
            }
        }
    } else {
#pragma unroll 1
        for (int i = thread; i < ROWS * COLUMNS; i += THREADS) {
            const int r = i / COLUMNS, c = i % COLUMNS;
            unsigned short x = 0;
            if (r < rows_end && c < columns_end) x = __ldg(row(r, true) + c);
            store_shared2(dst + 2 * (r * PITCH + c), x);
        }
    }
}
