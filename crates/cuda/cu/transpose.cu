// Copies of rows between the layouts of tokens, heads and cache, for the levels that multiply with strided-batched GEMMs.
//
//   transpose_to_heads:   x [T, H·D] → y [B, H, S, D], zero in rows behind a sequence's tokens
//   transpose_to_tokens:  x [B, H, S, D] → y [T, H·D]
//   gather_cache:         cache rows → k, v [B, G, L, D], zero behind a sequence's rows: what the cache holds there, NaN included, must
//                         not meet a weight 0 in P·V
//
// No operations. Bytes: each element read once and written once; memory bounds it. Elements are only moved, so the kernels know
// bytes alone. Macro: BYTES_PER_ACCESS 16, 8, 4 or 2: divides the bytes of a row and of all strides, pointers aligned to it.
#include "prelude.cuh"
#include "cache.cuh"

#ifndef BYTES_PER_ACCESS
#define BYTES_PER_ACCESS 16
#endif

struct Params {
    Cache cache;           // gather_cache
    const void* x;         // the transposes' input
    void* y;               // the transposes' output
    void* k;               // gather_cache: [B, G, L, D] or null
    void* v;               // gather_cache: [B, G, L, D] or null
    const int* starts;     // [B + 1]
    const int* past;       // [B]; null: all 0. gather_cache takes past[b] + new tokens rows
    long long token_stride; // bytes between tokens of the [T, H·D] side
    int sequences;         // B
    int heads;             // H, or G for the cache
    int rows;              // S, or L for the cache
    int row_bytes;         // D · element size
    int element_size;
};

typedef typename Bytes<BYTES_PER_ACCESS>::V V;

__device__ __forceinline__ V zero() {
    V v;
    memset(&v, 0, sizeof v);
    return v;
}

// Access number `at` of [B, heads, rows, row_bytes] split into sequence, head, row and byte within the row.
struct Place {
    int b, h, r, byte;
    __device__ __forceinline__ Place(const Params& p, long long at, int per_row) {
        const long long row = at / per_row, plane = row / p.rows;
        byte = (int)(at - row * per_row) * BYTES_PER_ACCESS;
        r = (int)(row - plane * p.rows);
        b = (int)plane / p.heads;
        h = (int)plane - b * p.heads;
    }
};

// For all: grid-stride over B·heads·rows·row_bytes / BYTES_PER_ACCESS accesses. Block: 256 threads.
#define FOR_EACH_ACCESS                                                                                              \
    wait_for_previous_kernel();                                                                                      \
    allow_next_kernel();                                                                                             \
    const int per_row = p.row_bytes / BYTES_PER_ACCESS;                                                              \
    const long long total = (long long)p.sequences * p.heads * p.rows * per_row;                                     \
    _Pragma("unroll 4") for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < total;            \
                             at += (long long)gridDim.x * blockDim.x)

extern "C" __global__ void __launch_bounds__(256) transpose_to_heads(const __grid_constant__ Params p) {
    FOR_EACH_ACCESS {
        const Place e(p, at, per_row);
        const int first = __ldg(p.starts + e.b), added = __ldg(p.starts + e.b + 1) - first;
        const char* x = (const char*)p.x + (first + e.r) * p.token_stride + (long long)e.h * p.row_bytes + e.byte;
        ((V*)p.y)[at] = e.r < added ? __ldg((const V*)x) : zero();
    }
}

extern "C" __global__ void __launch_bounds__(256) transpose_to_tokens(const __grid_constant__ Params p) {
    FOR_EACH_ACCESS {
        const Place e(p, at, per_row);
        const int first = __ldg(p.starts + e.b), added = __ldg(p.starts + e.b + 1) - first;
        char* y = (char*)p.y + (first + e.r) * p.token_stride + (long long)e.h * p.row_bytes + e.byte;
        if (e.r < added) *(V*)y = __ldg((const V*)p.x + at);
    }
}

extern "C" __global__ void __launch_bounds__(256) gather_cache(const __grid_constant__ Params p) {
    FOR_EACH_ACCESS {
        const Place e(p, at, per_row);
        const int valid = (p.past ? __ldg(p.past + e.b) : 0) + __ldg(p.starts + e.b + 1) - __ldg(p.starts + e.b);
        V k = zero(), v = zero();
        if (e.r < valid) {
            const long long row = p.cache.table ? cache_row<1>(p.cache, e.b, e.h, e.r) : cache_row<0>(p.cache, e.b, e.h, e.r);
            const long long byte = row * p.element_size + e.byte;
            if (p.k) k = __ldg((const V*)((const char*)p.cache.k + byte));
            if (p.v) v = __ldg((const V*)((const char*)p.cache.v + byte));
        }
        if (p.k) ((V*)p.k)[at] = k;
        if (p.v) ((V*)p.v)[at] = v;
    }
}
