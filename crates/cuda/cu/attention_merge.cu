// Merges partial attention over disjoint sets of keys: out = Σ_s 2^(m_s − m)·acc_s / (Σ_s 2^(m_s − m)·l_s + sink), m the greatest m_s, s ascending.
//
//   parts [T, H, splits, HEAD_DIM_PADDED] f32, not divided by l   states [T, H, splits, 2] f32: m in base 2, l   →   out [T, H, D], lse [T, H]
//
// Bytes: parts once, out once; operations do not count. Bound by memory, or by latency when parts are few. Used after attention_decode when that
// was given no counters to merge by itself, and for parts that come from several devices. Online softmax merge: arXiv:1805.02867.
//
// Macros: DTYPE (1 bf16, 2 f16), HEAD_DIM_PADDED as attention_decode's. Launch: block 128 threads, a warp for each row; grid x = ⌈T·H / 4⌉ with T
// the plan's upper bound; no dynamic shared memory.
#include "prelude.cuh"
#include "softmax_state.cuh"

struct Params {
    const float* parts;
    const float2* states;  // l = 0: the part saw no key and its acc is not read
    unsigned short* out;   // token t, head h at t·out_stride + h·head_dim
    float* lse;            // [T, H] or null
    const int* starts;     // [B + 1]; T = starts[B]
    const float* sinks;    // [H] or null
    long long out_stride;  // elements
    int batch, heads, head_dim, splits;
};

extern "C" __global__ void __launch_bounds__(128) attention_merge(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    const int row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= __ldg(p.starts + p.batch) * p.heads) return;
    const int t = row / p.heads, h = row - t * p.heads;
    const bool wide = (unsigned long long)p.out % 8 == 0 && (p.out_stride | p.head_dim) % 4 == 0;
    merge_parts<DTYPE, HEAD_DIM_PADDED>(p.parts + (long long)row * p.splits * HEAD_DIM_PADDED, p.states + (long long)row * p.splits, p.splits,
        p.sinks ? __ldg(p.sinks + h) * LOG2E : NEG_INF, p.out + t * p.out_stride + h * p.head_dim, p.head_dim, wide, p.lse ? p.lse + row : nullptr,
        threadIdx.x % 32);
}
