// RoPE alone, for the study: x [B, H, S, D] → y [B, H, S, D], in place where y is x. Position of row s: first + s.
//
// Operations: 3 per element. Bytes: 2 · B·H·S·D elements, each read once and written once; memory bounds it. Paper: rope.cuh.
//
// A group of GROUP lanes holds a row; it takes the rows s of PLANES planes (b, h), which share sines and cosines.
// Macros: DTYPE; VEC, GROUP, ITEMS as in qkv_epilogue.cu; PLANES.
#include "prelude.cuh"
#include "rope.cuh"

#ifndef DTYPE
#define DTYPE 1
#endif
#ifndef VEC
#define VEC (16 / (DTYPE == 0 ? 4 : 2))
#endif
#ifndef GROUP
#define GROUP (64 / VEC)
#endif
#ifndef ITEMS
#define ITEMS 1
#endif
#ifndef PLANES
#define PLANES 2
#endif

struct Params {
    const void* x;             // [B·H, S, D]
    void* y;                   // [B·H, S, D]
    const double* frequencies; // [rotary_dim/2]
    int planes;                // B·H
    int seq;                   // S
    int head_dim;              // D
    int rotary_dim;
    int interleaved;
    int first;                 // position of row 0
    float attention_factor;
};

typedef typename Element<DTYPE>::T T;

// Grid: x: ceil(S / (threads / GROUP)), y: up to ceil(planes / PLANES), rows of blocks beyond it take turns. Block: 256 threads.
extern "C" __global__ void __launch_bounds__(256, 3) rope(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const int lane = threadIdx.x % GROUP, s = blockIdx.x * (blockDim.x / GROUP) + threadIdx.x / GROUP;
    if (s >= p.seq) return;
    const long long plane_stride = (long long)p.seq * p.head_dim, row = (long long)s * p.head_dim;
    const int sets = (p.planes + PLANES - 1) / PLANES;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const Item<VEC> item(lane + i * GROUP, p.head_dim, p.rotary_dim, p.interleaved);
        Angles<VEC> angles;
        bool ready = false;
        for (int set = blockIdx.y; set < sets; set += gridDim.y) {
            Packed<DTYPE, VEC> raw[PLANES][2];
#pragma unroll
            for (int n = 0; n < PLANES; ++n) {
                const int plane = set + n * sets;
                const T* x = (const T*)p.x + plane * plane_stride + row;
                raw[n][0].clear();
                raw[n][1].clear();
                if (plane < p.planes && item.has_a) raw[n][0].read_once(x + item.a);
                if (plane < p.planes && item.has_b) raw[n][1].read_once(x + item.b);
            }
            if (!ready) angles.compute(p.frequencies, lane + i * GROUP, item.pairs, p.first + s, p.attention_factor);
            ready = true;
#pragma unroll
            for (int n = 0; n < PLANES; ++n) {
                const int plane = set + n * sets;
                T* y = (T*)p.y + plane * plane_stride + row;
                float a[VEC], b[VEC];
                raw[n][0].unpack(a);
                raw[n][1].unpack(b);
                angles.rotate(a, b, item.pairs, p.interleaved);
                raw[n][0].pack(a);
                raw[n][1].pack(b);
                if (plane < p.planes && item.has_a) raw[n][0].write_once(y + item.a);
                if (plane < p.planes && item.has_b) raw[n][1].write_once(y + item.b);
            }
        }
    }
}
