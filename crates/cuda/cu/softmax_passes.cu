// Softmax of rows in three passes, each through memory, as frameworks without fusion do it: x, y [rows, W] f32.
//
//   softmax_max      m[row] = max x
//   softmax_exp      y = exp(x - m),  sum[row] = sum y
//   softmax_divide   y = y / sum
//
// A row of -inf alone gives 0. Operations: about 5 per element, one of them an exponential. Bytes: x twice, y three times; memory bounds it.
//
// Macros: VEC, which divides W and the strides, with pointers aligned to it.
#include "prelude.cuh"

#ifndef VEC
#define VEC 4
#endif

struct Params {
    const float* x;     // [rows, W]
    float* y;           // [rows, W]
    float* row_max;     // [rows]
    float* row_sum;     // [rows]
    int rows, width;
};

// For every kernel: grid ceil(rows / blockDim.y); block (32, several) or (threads, 1), threads a multiple of 32 up to 1024.
extern "C" __global__ void __launch_bounds__(1024) softmax_max(const __grid_constant__ Params p) {
    __shared__ float scratch[32];
    wait_for_previous_kernel();
    allow_next_kernel();
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;
    const float* x = p.x + (long long)row * p.width;
    float m = NEG_INF;
#pragma unroll 4
    for (int at = threadIdx.x; at < p.width / VEC; at += blockDim.x) {
        float u[VEC];
        load<F32, VEC>(x + at * VEC, u);
#pragma unroll
        for (int j = 0; j < VEC; ++j) m = fmaxf(m, u[j]);
    }
    m = block_max(m, scratch);
    if (threadIdx.x == 0) p.row_max[row] = m;
}

extern "C" __global__ void __launch_bounds__(1024) softmax_exp(const __grid_constant__ Params p) {
    __shared__ float scratch[32];
    wait_for_previous_kernel();
    allow_next_kernel();
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;
    const float* x = p.x + (long long)row * p.width;
    float* y = p.y + (long long)row * p.width;
    // A row of -inf has maximum 0 here, so that differences are -inf and not NaN.
    const float top = p.row_max[row], m = top == NEG_INF ? 0.0f : top;
    float sum = 0.0f;
#pragma unroll 4
    for (int at = threadIdx.x; at < p.width / VEC; at += blockDim.x) {
        float u[VEC];
        load<F32, VEC>(x + at * VEC, u);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            u[j] = exp2_approx((u[j] - m) * LOG2E);
            sum += u[j];
        }
        store<F32, VEC>(y + at * VEC, u);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) p.row_sum[row] = sum;
}

extern "C" __global__ void __launch_bounds__(1024) softmax_divide(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;
    float* y = p.y + (long long)row * p.width;
    const float sum = p.row_sum[row], inverse = sum > 0.0f ? 1.0f / sum : sum;
#pragma unroll 4
    for (int at = threadIdx.x; at < p.width / VEC; at += blockDim.x) {
        float u[VEC];
        load<F32, VEC>(y + at * VEC, u);
#pragma unroll
        for (int j = 0; j < VEC; ++j) u[j] *= inverse;
        store<F32, VEC>(y + at * VEC, u);
    }
}
