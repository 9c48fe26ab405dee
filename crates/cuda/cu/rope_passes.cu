// RoPE in two passes with a turned copy in memory between them, as frameworks without fusion do it:
//
//   rope_partner   partner = the other element of each pair, the first of a pair's negated:  [T, H, D] → [T, H, D]
//   rope_combine   y = x · cos + partner · sin;  what does not turn is copied
//
// Operations: 3 per element. Bytes: 5 elements moved for each of x where one pass moves 2; memory bounds it. Paper: rope.cuh.
//
// A thread takes a chunk of VEC elements of a head, and the same chunk of the token's heads in turns, which share sines and cosines.
// Macros: DTYPE; VEC, which divides D and rotary_dim, in layout half rotary_dim/2, with pointers aligned to it.
#include "prelude.cuh"
#include "cache.cuh"
#include "rope.cuh"

#ifndef DTYPE
#define DTYPE 1
#endif
#ifndef VEC
#define VEC (16 / (DTYPE == 0 ? 4 : 2))
#endif

struct Params {
    const void* x;             // [T, H, D]
    void* partner;             // [T, H, D]; chunks that do not turn are left alone
    void* y;                   // [T, H, D]; may be x
    const double* frequencies; // [rotary_dim/2]
    const int* starts;         // [B + 1]
    const int* past;           // [B]
    int sequences, tokens, uniform; // as in qkv_epilogue.cu
    int heads, head_dim, rotary_dim, interleaved;
    float attention_factor;
};

typedef typename Element<DTYPE>::T T;

// Grid: T. Block: (chunks of a head or fewer, heads or fewer).
extern "C" __global__ void __launch_bounds__(1024) rope_partner(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const long long token = (long long)blockIdx.x * p.heads * p.head_dim;
    const int half = p.rotary_dim / 2;
    for (int at = threadIdx.x * VEC; at < p.rotary_dim; at += blockDim.x * VEC)
        for (int h = threadIdx.y; h < p.heads; h += blockDim.y) {
            const long long row = token + (long long)h * p.head_dim;
            const T* x = (const T*)p.x + row;
            float u[VEC], y[VEC];
            load<DTYPE, VEC>(x + (p.interleaved ? (VEC == 1 ? at ^ 1 : at) : at < half ? at + half : at - half), u);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                if (p.interleaved) y[j] = (at + j) % 2 ? u[(j ^ 1) % VEC] : -u[(j ^ 1) % VEC];
                else y[j] = at < half ? -u[j] : u[j];
            }
            store<DTYPE, VEC>((T*)p.partner + row + at, y);
        }
}

extern "C" __global__ void __launch_bounds__(1024) rope_combine(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const long long token = (long long)blockIdx.x * p.heads * p.head_dim;
    const int t = blockIdx.x, half = p.rotary_dim / 2;
    const int b = p.uniform ? t / p.uniform : sequence_of(p.starts, p.sequences, t);
    const int position = t - (p.uniform ? b * p.uniform : __ldg(p.starts + b)) + __ldg(p.past + b);
    for (int at = threadIdx.x * VEC; at < p.head_dim; at += blockDim.x * VEC) {
        const bool turns = at < p.rotary_dim;
        float sine[VEC], cosine[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            sine[j] = 0.0f;
            cosine[j] = 1.0f;
            if (turns) {
                const int pair = p.interleaved ? (at + j) / 2 : (at + j) % half;
                sincos_of((double)position * __ldg(p.frequencies + pair), sine[j], cosine[j]);
                sine[j] *= p.attention_factor;
                cosine[j] *= p.attention_factor;
            }
        }
        for (int h = threadIdx.y; h < p.heads; h += blockDim.y) {
            const long long row = token + (long long)h * p.head_dim + at;
            float u[VEC];
            load<DTYPE, VEC>((const T*)p.x + row, u);
            if (turns) {
                float other[VEC];
                load<DTYPE, VEC>((const T*)p.partner + row, other);
#pragma unroll
                for (int j = 0; j < VEC; ++j) u[j] = u[j] * cosine[j] + other[j] * sine[j];
            }
            store<DTYPE, VEC>((T*)p.y + row, u);
        }
    }
}
