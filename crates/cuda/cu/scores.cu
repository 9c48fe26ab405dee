// One pass over attention scores in memory, for the levels that keep them there: scale, softcap, ALiBi and mask, in this order, each
// where its bit of `operations` is set. scores [B, H, S, columns], rows `row_stride` apart, in DTYPE, in place.
//
//   s ← s·scale;  s ← c·tanh(s/c);  s ← s - slope·(i - j);  s ← -inf where the query at position i does not see row j
//
// Operations: 1 to 20 per element. Bytes: each element read once and written once (a pass that only masks does not read what it
// overwrites); memory bounds it. Softmax follows in softmax.cu.
//
// Macros: DTYPE; VEC (VEC·size <= 16, divides columns and row_stride, pointer aligned to it).
#include "prelude.cuh"
#include "cache.cuh"

#ifndef DTYPE
#define DTYPE 0
#endif
#ifndef VEC
#define VEC (16 / (DTYPE == 0 ? 4 : 2))
#endif

#define SCALE 1
#define SOFTCAP 2
#define ALIBI 4
#define MASK 8

struct Params {
    void* scores;              // [B, H, S, row_stride]
    const float* slopes;       // [H], with ALIBI
    const unsigned char* mask; // nonzero: visible; byte at b·mask_sequence_stride + h·mask_head_stride + i·mask_row_stride + j, or null
    const int* starts;         // [B + 1]
    const int* past;           // [B]; null: all 0
    long long row_stride;
    long long mask_sequence_stride, mask_head_stride, mask_row_stride;
    int heads;                 // H
    int seq;                   // S: rows of a plane (b, h); those from the sequence's own length on are left as they are
    int columns;               // columns from the sequence's length on are not visible
    int operations;            // SCALE | SOFTCAP | ALIBI | MASK
    int causal;
    int window;                // 0: none
    float scale, softcap;
};

typedef typename Element<DTYPE>::T T;

// Grid: x: B·H·S, y: any number of column blocks, e.g. ceil(columns / (VEC · threads)). Block: up to 256 threads.
extern "C" __global__ void __launch_bounds__(256) scores(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const int plane = blockIdx.x / p.seq, i = blockIdx.x % p.seq, b = plane / p.heads, h = plane % p.heads;
    const int first = __ldg(p.starts + b), added = __ldg(p.starts + b + 1) - first;
    if (i >= added) return;
    const int past = p.past ? __ldg(p.past + b) : 0, position = past + i;
    const int end = p.causal ? position + 1 : past + added;
    const int begin = p.window ? position - p.window + 1 : 0;
    const float slope = p.operations & ALIBI ? __ldg(p.slopes + h) : 0.0f;
    const float inverse_cap = p.operations & SOFTCAP ? 1.0f / p.softcap : 0.0f;
    const unsigned char* mask = p.mask ? p.mask + b * p.mask_sequence_stride + h * p.mask_head_stride + i * p.mask_row_stride : nullptr;
    T* row = (T*)p.scores + blockIdx.x * p.row_stride;
    const int step = gridDim.y * blockDim.x * VEC;
    for (int j0 = (blockIdx.y * blockDim.x + threadIdx.x) * VEC; j0 < p.columns; j0 += step) {
        const bool outside = (p.operations & MASK) && (j0 >= end || j0 + VEC <= begin);
        const bool untouched = p.operations == MASK && !mask && j0 >= begin && j0 + VEC <= end;
        if (untouched) continue;
        float s[VEC];
        if (!outside) load<DTYPE, VEC>(row + j0, s);
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            const int j = j0 + k;
            if (p.operations & SCALE) s[k] *= p.scale;
            if (p.operations & SOFTCAP) s[k] = p.softcap * tanh_accurate(s[k] * inverse_cap);
            if (p.operations & ALIBI) s[k] -= slope * (float)(position - j);
            if (p.operations & MASK) {
                const bool inside = j >= begin && j < end;
                if (!inside || (mask && !mask[j])) s[k] = NEG_INF;
            }
        }
        store<DTYPE, VEC>(row + j0, s);
    }
}
