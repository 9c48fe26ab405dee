// RMSNorm of rows: y = x / sqrt(mean(x²) + eps) · w, x and y [T, E] in DTYPE; or only the factor, rstd [T] f32, where y is null.
//
// Operations: 4 per element. Bytes: 2·T·E elements (T·E for the factor alone), each read once and written once while a row fits the
// registers of its threads (ITEMS · VEC · threads elements); the rest of a longer row is read again. Memory bounds it.
// Paper: Zhang and Sennrich 2019, arXiv 1910.07467.
//
// Macros: DTYPE; VEC (VEC·size <= 16, divides E and the strides, pointers aligned to it); ITEMS.
#include "prelude.cuh"

#ifndef DTYPE
#define DTYPE 1
#endif
#ifndef VEC
#define VEC (16 / (DTYPE == 0 ? 4 : 2))
#endif
#ifndef ITEMS
#define ITEMS 4
#endif

struct Params {
    const void* x;        // [T, E]
    void* y;              // [T, E], may be x; or null
    const float* weight;  // [E]; null: 1
    float* rstd;          // [T]; or null
    long long x_stride, y_stride; // elements between rows
    int rows;             // T
    int hidden;           // E
    float eps;
};

typedef typename Element<DTYPE>::T T;

// Not named after the file: `norm` is a function of the compiler's own.
// Grid: ceil(T / blockDim.y). Block: (32, rows) or (threads, 1), threads a multiple of 32 up to 1024.
extern "C" __global__ void __launch_bounds__(1024, 1) rms_norm(const __grid_constant__ Params p) {
    __shared__ float scratch[32];
    wait_for_previous_kernel();
    allow_next_kernel();
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;
    const T* x = (const T*)p.x + row * p.x_stride;
    const int vectors = p.hidden / VEC;

    Packed<DTYPE, VEC> kept[ITEMS];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
        kept[i].clear();
        if (at < vectors) kept[i].read(x + at * VEC);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        float u[VEC];
        kept[i].unpack(u);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum = fmaf(u[j], u[j], sum);
    }
    for (int at = threadIdx.x + ITEMS * blockDim.x; at < vectors; at += blockDim.x) {
        float u[VEC];
        load<DTYPE, VEC>(x + at * VEC, u);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum = fmaf(u[j], u[j], sum);
    }
    const float r = 1.0f / sqrtf(block_sum(sum, scratch) / p.hidden + p.eps);
    if (p.rstd && threadIdx.x == 0) p.rstd[row] = r;
    if (!p.y) return;

    T* y = (T*)p.y + row * p.y_stride;
    auto write = [&](const Packed<DTYPE, VEC>& packed, int at) {
        float u[VEC], w[VEC];
        packed.unpack(u);
#pragma unroll
        for (int j = 0; j < VEC; ++j) w[j] = 1.0f;
        if (p.weight) load<F32, VEC>(p.weight + at * VEC, w);
#pragma unroll
        for (int j = 0; j < VEC; ++j) u[j] *= r * w[j];
        store<DTYPE, VEC>(y + at * VEC, u);
    };
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
        if (at < vectors) write(kept[i], at);
    }
    for (int at = threadIdx.x + ITEMS * blockDim.x; at < vectors; at += blockDim.x) {
        Packed<DTYPE, VEC> packed;
        packed.read(x + at * VEC);
        write(packed, at);
    }
}
