// y = projected + x, the sum rounded once. projected in PROJECTED_DTYPE, x and y in DTYPE, all [count]; y may be x or projected.
//
// Operations: 1 per element. Bytes: two reads and one write per element; memory bounds it.
// Macros: DTYPE, PROJECTED_DTYPE (= DTYPE); VEC (VEC·size(DTYPE) <= 16, divides count, pointers aligned to it).
#include "prelude.cuh"

#ifndef DTYPE
#define DTYPE 1
#endif
#ifndef PROJECTED_DTYPE
#define PROJECTED_DTYPE DTYPE
#endif
#ifndef VEC
#define VEC (16 / (DTYPE == 0 ? 4 : 2))
#endif

struct Params {
    const void* projected;
    const void* x;
    void* y;
    long long count;
};

// Grid-stride over count / VEC accesses. Block: 256 threads.
extern "C" __global__ void __launch_bounds__(256) residual(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    allow_next_kernel();
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < p.count / VEC; i += (long long)gridDim.x * blockDim.x) {
        float a[VEC], b[VEC];
        load<PROJECTED_DTYPE, VEC>((const typename Element<PROJECTED_DTYPE>::T*)p.projected + i * VEC, a);
        load<DTYPE, VEC>((const typename Element<DTYPE>::T*)p.x + i * VEC, b);
#pragma unroll
        for (int j = 0; j < VEC; ++j) a[j] += b[j];
        store<DTYPE, VEC>((typename Element<DTYPE>::T*)p.y + i * VEC, a);
    }
}
