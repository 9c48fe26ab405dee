// Softmax of rows: y = exp(x - max) / (sum of exp(x - max) [+ exp(sink - max)]), x [rows, W] in DTYPE, y [rows, W] in OUT_DTYPE.
// A row of -inf alone gives 0. y may be x, also with another dtype, as long as both rows start at the same address.
//
// Operations: about 5 per element, one of them an exponential. Bytes: one read and one write per element while a row fits the
// registers of its threads (ITEMS · VEC · threads >= W); beyond (ITEMS = 0) maximum and sum are taken online in a first pass and
// the row is read a second time. Memory bounds it. Paper: Milakov and Gimelshein 2018, arXiv 1805.02867.
//
// Macros: DTYPE, OUT_DTYPE (= DTYPE); VEC (VEC·size <= 16, divides W and the strides, pointers aligned to it); ITEMS 0, 1, 2, 4, 8
// with ITEMS · VEC <= 32.
#include "prelude.cuh"

#ifndef DTYPE
#define DTYPE 0
#endif
#ifndef OUT_DTYPE
#define OUT_DTYPE DTYPE
#endif
#ifndef VEC
#define VEC (16 / (DTYPE == 0 ? 4 : 2))
#endif
#ifndef ITEMS
#define ITEMS 4
#endif

struct Params {
    const void* x;       // [rows, W]
    void* y;             // [rows, W]
    const float* sinks;  // [heads] natural-log logits, of row r: sinks[r / plane_rows mod heads]; or null
    long long x_stride, y_stride; // elements between rows
    int rows, width;
    int plane_rows, heads;        // where sinks are given
};

typedef typename Element<DTYPE>::T In;
typedef typename Element<OUT_DTYPE>::T Out;

// A row of -inf has maximum 0 here, so that differences are -inf and not NaN.
__device__ __forceinline__ float finite_max(float m) { return m == NEG_INF ? 0.0f : m; }

__device__ __forceinline__ float inverse_sum(const Params& p, int row, float sum, float m) {
    if (p.sinks && sum > 0.0f) sum += exp2_approx((__ldg(p.sinks + row / p.plane_rows % p.heads) - m) * LOG2E);
    return sum > 0.0f ? 1.0f / sum : sum == 0.0f ? 0.0f : sum;
}

// Grid: ceil(rows / blockDim.y). Block: (32, several) or (threads, 1), threads a multiple of 32 up to 1024.
extern "C" __global__ void __launch_bounds__(1024) softmax(const __grid_constant__ Params p) {
    __shared__ float scratch[32];
    wait_for_previous_kernel();
    allow_next_kernel();
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;
    const In* x = (const In*)p.x + row * p.x_stride;
    Out* y = (Out*)p.y + row * p.y_stride;
    const int vectors = p.width / VEC;
#if ITEMS > 0
    Packed<DTYPE, VEC> packed[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
        if (at < vectors) packed[i].read_once(x + at * VEC);
    }
    float u[ITEMS][VEC], m = NEG_INF;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        packed[i].unpack(u[i]);
        const bool on = threadIdx.x + i * blockDim.x < vectors;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            u[i][j] = on ? u[i][j] : NEG_INF;
            m = fmaxf(m, u[i][j]);
        }
    }
    m = finite_max(block_max(m, scratch));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            u[i][j] = exp2_approx((u[i][j] - m) * LOG2E);
            sum += u[i][j];
        }
    const float inverse = inverse_sum(p, row, block_sum(sum, scratch), m);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
#pragma unroll
        for (int j = 0; j < VEC; ++j) u[i][j] *= inverse;
        if (at < vectors) store<OUT_DTYPE, VEC>(y + at * VEC, u[i]);
    }
#else
    float m = NEG_INF, sum = 0.0f;
    for (int at = threadIdx.x; at < vectors; at += blockDim.x) {
        float u[VEC];
        load<DTYPE, VEC>(x + at * VEC, u);
        float top = m;
#pragma unroll
        for (int j = 0; j < VEC; ++j) top = fmaxf(top, u[j]);
        const float f = finite_max(top);
        sum *= exp2_approx((m - f) * LOG2E);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum += exp2_approx((u[j] - f) * LOG2E);
        m = top;
    }
    const float top = finite_max(block_max(m, scratch));
    const float inverse = inverse_sum(p, row, block_sum(sum * exp2_approx((m - top) * LOG2E), scratch), top);
    // All threads go through the same number of rounds: a barrier stands between the reads and the writes of each, because in place
    // with a narrower OUT_DTYPE a thread overwrites what others read in the same round.
    for (int base = 0; base < vectors; base += blockDim.x) {
        const int at = base + threadIdx.x;
        float u[VEC];
        if (at < vectors) load<DTYPE, VEC>(x + at * VEC, u);
        if (DTYPE != OUT_DTYPE) {
            if (blockDim.x > 32) __syncthreads();
            else __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) u[j] = exp2_approx((u[j] - top) * LOG2E) * inverse;
        if (at < vectors) store<OUT_DTYPE, VEC>(y + at * VEC, u);
    }
#endif
}
