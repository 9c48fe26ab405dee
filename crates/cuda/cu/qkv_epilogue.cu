// What follows the QKV projection, in one pass: row scale of the folded input norm, bias, QK-norm, RoPE, append to the cache.
//
//   u = q · rstd + bias;  u = u / sqrt(mean_D(u²) + eps) · w  (q and k);  rotate (q and k);  q → q_out, k → cache row, v → cache row
//
// q [T, H·D], k and v [T, G·D] in QKV_DTYPE, rows at any stride, so the three may be columns of one qkv [T, (H+2G)·D]; q_out
// [T, H·D] in DTYPE, cache rows in KV_DTYPE. Every stage is optional, and k_out or v_out replace the cache: the kernel is also RoPE in
// place, QK-norm alone or append alone (set the heads of what is not wanted to 0).
//
// Operations: about 10 per element. Bytes: each element read once and written once, 2·T·(H+2G)·D elements; memory bounds it.
// Papers: RMSNorm (Zhang and Sennrich 2019), RoPE (Su et al. 2021), QK-norm (Henry et al. 2020).
//
// The row's rstd is computed here from x, or comes from a buffer that norm.cu wrote. x has to be read once in any case, and here that
// costs no launch of its own. When a token's heads are spread over several blocks, each reads the row, from L2 after the first.
//
// A group of GROUP lanes holds a head's row, each lane ITEMS items of two chunks of VEC elements (rope.cuh); a group takes HEADS heads of
// one token, which share sines and cosines. Macros: DTYPE, QKV_DTYPE (= DTYPE), KV_DTYPE (= DTYPE); VEC: the largest power of two, VEC·size(DTYPE) <= 16, that
// divides D, in layout half rotary_dim/2, and all strides, with pointers aligned to it; GROUP · ITEMS >= ceil(D / (2·VEC)), GROUP a
// power of two <= 32; HEADS.
#include "prelude.cuh"
#include "cache.cuh"
#include "rope.cuh"

#ifndef DTYPE
#define DTYPE 1
#endif
#ifndef QKV_DTYPE
#define QKV_DTYPE DTYPE
#endif
#ifndef KV_DTYPE
#define KV_DTYPE DTYPE
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
#ifndef HEADS
#define HEADS 4
#endif

// Strides are in elements between tokens; heads of a token are contiguous.
struct Params {
    Cache cache;               // rows of KV_DTYPE; used where k_out or v_out is null
    const void* q;             // [T, q_heads·D] QKV_DTYPE
    const void* k;             // [T, k_heads·D]
    const void* v;             // [T, v_heads·D]
    void* q_out;               // [T, q_heads·D] DTYPE; may be q
    void* k_out;               // [T, k_heads·D] DTYPE, may be k; null: the cache
    void* v_out;               // [T, v_heads·D] DTYPE, may be v; null: the cache
    const void* x;             // [T, E] DTYPE: multiply rows by 1/sqrt(mean(x²) + input_norm_eps); null: do not
    const float* rstd;         // [T]: multiply rows by it (x is null then); null: do not
    const float* q_bias;       // [q_heads·D] or null
    const float* k_bias;       // [k_heads·D] or null
    const float* v_bias;       // [v_heads·D] or null
    const float* q_norm;       // [D] or null
    const float* k_norm;       // [D] or null
    const double* frequencies; // [rotary_dim/2]: angle = position · frequency
    const int* starts;         // [B + 1]; may be null when uniform > 0
    const int* past;           // [B]; null: all 0
    long long q_stride, k_stride, v_stride, q_out_stride, k_out_stride, v_out_stride;
    int sequences;             // B
    int tokens;                // upper bound of T
    int uniform;               // new tokens of each sequence when all have as many, else 0
    int q_heads, k_heads, v_heads;
    int head_dim;              // D
    int rotary_dim;            // 0: no RoPE
    int interleaved;
    int hidden;                // E, where x is given
    int tokens_per_block, slots_per_block; // tokens_per_block · slots_per_block · GROUP <= threads; tokens_per_block <= 64
    float input_norm_eps, qk_norm_eps;
    float attention_factor;    // multiplies sine and cosine
};

typedef typename Element<DTYPE>::T T;
typedef typename Element<QKV_DTYPE>::T In;
typedef typename Element<KV_DTYPE>::T KV;

// A lane's items stay in registers up to here; those of wider heads lie in its local memory.
constexpr int UNROLLED = ITEMS > 16 ? 1 : ITEMS;

template <int V> struct Constant {
    static constexpr int VALUE = V;
};

// Sum of squares of x [E] over `threads` threads, this one being number `lane`: this thread's part. Four loads are in flight at once,
// since nothing else of the block can go on without the sum.
__device__ __forceinline__ float squares(const T* x, int hidden, int lane, int threads) {
    constexpr int N = Wide<DTYPE>::N, AHEAD = 4;
    float sum = 0.0f;
    int done = 0;
    if (((unsigned long long)x & 15) == 0) {
        done = hidden / N * N;
#pragma unroll 1
        for (int first = lane * N; first < done; first += AHEAD * threads * N) {
            Packed<DTYPE, N> packed[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                packed[i].clear();
                if (first + i * threads * N < done) packed[i].read(x + first + i * threads * N);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                float u[N];
                packed[i].unpack(u);
#pragma unroll
                for (int j = 0; j < N; ++j) sum = fmaf(u[j], u[j], sum);
            }
        }
    }
    for (int i = done + lane; i < hidden; i += threads) {
        const float u = to_float<DTYPE>(x[i]);
        sum = fmaf(u, u, sum);
    }
    return sum;
}

// Grid: x: ceil(T / tokens_per_block), y: ceil(slots / slots_per_block), slots = ceil((q_heads + k_heads + v_heads) / HEADS).
// Block: 32 … 256 threads, a multiple of 32.
extern "C" __global__ void __launch_bounds__(256, ITEMS > 2 ? 1 : 2) qkv_epilogue(const __grid_constant__ Params p) {
    __shared__ float scratch[32];
    __shared__ float row_scale[64];
    wait_for_previous_kernel();
    allow_next_kernel();

    const int heads = p.q_heads + p.k_heads + p.v_heads, slots = (heads + HEADS - 1) / HEADS;
    const int group = threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
    const int local = group / p.slots_per_block, slot = blockIdx.y * p.slots_per_block + group % p.slots_per_block;
    const int first = blockIdx.x * p.tokens_per_block, t = first + local;
    const int tokens = p.starts && !p.uniform ? min(p.tokens, __ldg(p.starts + p.sequences)) : p.tokens;
    // Inactive lanes stay for the shuffles and barriers.
    const bool active = local < p.tokens_per_block && slot < slots && t < tokens;

    Item<VEC> item[ITEMS];
#pragma unroll UNROLLED
    for (int i = 0; i < ITEMS; ++i) item[i] = Item<VEC>(lane + i * GROUP, p.head_dim, p.rotary_dim, p.interleaved);

    Packed<QKV_DTYPE, VEC> raw[HEADS][ITEMS][2];
#pragma unroll
    for (int n = 0; n < HEADS; ++n) {
        const int head = slot + n * slots;
        const bool on = active && head < heads;
        const In* row;
        if (head < p.q_heads) row = (const In*)p.q + t * p.q_stride + (long long)head * p.head_dim;
        else if (head < p.q_heads + p.k_heads) row = (const In*)p.k + t * p.k_stride + (long long)(head - p.q_heads) * p.head_dim;
        else row = (const In*)p.v + t * p.v_stride + (long long)(head - p.q_heads - p.k_heads) * p.head_dim;
#pragma unroll UNROLLED
        for (int i = 0; i < ITEMS; ++i) {
            raw[n][i][0].clear();
            raw[n][i][1].clear();
            if (on && item[i].has_a) raw[n][i][0].read(row + item[i].a);
            if (on && item[i].has_b) raw[n][i][1].read(row + item[i].b);
        }
    }

    float scale = 1.0f;
    if (p.x) {
        const T* x = (const T*)p.x;
        if (p.tokens_per_block == 1) {
            const float sum = block_sum(first < tokens ? squares(x + (long long)first * p.hidden, p.hidden, threadIdx.x, blockDim.x) : 0.0f, scratch);
            scale = 1.0f / sqrtf(sum / p.hidden + p.input_norm_eps);
        } else {
            for (int i = threadIdx.x / 32; i < p.tokens_per_block; i += blockDim.x / 32) {
                const float sum =
                    warp_sum(first + i < tokens ? squares(x + (long long)(first + i) * p.hidden, p.hidden, threadIdx.x % 32, 32) : 0.0f);
                if (threadIdx.x % 32 == 0) row_scale[i] = 1.0f / sqrtf(sum / p.hidden + p.input_norm_eps);
            }
            __syncthreads();
            if (active) scale = row_scale[local];
        }
    } else if (p.rstd && active) {
        scale = __ldg(p.rstd + t);
    }

    int b = 0, position = 0;
    if (active && (p.rotary_dim || !p.k_out || !p.v_out)) {
        b = p.uniform ? t / p.uniform : sequence_of(p.starts, p.sequences, t);
        position = t - (p.uniform ? b * p.uniform : __ldg(p.starts + b)) + (p.past ? __ldg(p.past + b) : 0);
    }
    Angles<VEC> angles[ITEMS];
#pragma unroll UNROLLED
    for (int i = 0; i < ITEMS; ++i) angles[i].compute(p.frequencies, lane + i * GROUP, item[i].pairs, position, p.attention_factor);

#pragma unroll
    for (int n = 0; n < HEADS; ++n) {
        const int head = slot + n * slots;
        const bool on = active && head < heads;
        const bool is_q = head < p.q_heads, is_v = head >= p.q_heads + p.k_heads;
        const int own = is_q ? head : is_v ? head - p.q_heads - p.k_heads : head - p.q_heads;
        const float* bias = is_q ? p.q_bias : is_v ? p.v_bias : p.k_bias;
        const float* weight = is_q ? p.q_norm : is_v ? nullptr : p.k_norm;
        float u[ITEMS][2][VEC];
#pragma unroll UNROLLED
        for (int i = 0; i < ITEMS; ++i)
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                raw[n][i][s].unpack(u[i][s]);
#pragma unroll
                for (int j = 0; j < VEC; ++j) u[i][s][j] *= scale;
                if (bias && on && (s ? item[i].has_b : item[i].has_a)) {
                    float w[VEC];
                    load<F32, VEC>(bias + (long long)own * p.head_dim + (s ? item[i].b : item[i].a), w);
#pragma unroll
                    for (int j = 0; j < VEC; ++j) u[i][s][j] += w[j];
                }
            }
        // Whether there is QK-norm is the same for all lanes, so the shuffles are met by all.
        if (p.q_norm || p.k_norm) {
            float sum = 0.0f;
#pragma unroll UNROLLED
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int s = 0; s < 2; ++s)
#pragma unroll
                    for (int j = 0; j < VEC; ++j) sum = fmaf(u[i][s][j], u[i][s][j], sum);
            sum = warp_sum<GROUP>(sum);
            if (weight) {
                const float r = 1.0f / sqrtf(sum / p.head_dim + p.qk_norm_eps);
#pragma unroll UNROLLED
                for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                    for (int s = 0; s < 2; ++s)
                        if (s ? item[i].has_b : item[i].has_a) {
                            float w[VEC];
                            load<F32, VEC>(weight + (s ? item[i].b : item[i].a), w);
#pragma unroll
                            for (int j = 0; j < VEC; ++j) u[i][s][j] *= r * w[j];
                        }
            }
        }
        if (!on) continue;
#pragma unroll UNROLLED
        for (int i = 0; i < ITEMS; ++i)
            if (!is_v) angles[i].rotate(u[i][0], u[i][1], item[i].pairs, p.interleaved);
        auto write = [&](auto* out, auto dtype) {
#pragma unroll UNROLLED
            for (int i = 0; i < ITEMS; ++i) {
                if (item[i].has_a) store<decltype(dtype)::VALUE, VEC>(out + item[i].a, u[i][0]);
                if (item[i].has_b) store<decltype(dtype)::VALUE, VEC>(out + item[i].b, u[i][1]);
            }
        };
        T* direct = (T*)(is_q ? p.q_out : is_v ? p.v_out : p.k_out);
        if (direct) {
            const long long stride = is_q ? p.q_out_stride : is_v ? p.v_out_stride : p.k_out_stride;
            write(direct + t * stride + (long long)own * p.head_dim, Constant<DTYPE>());
        } else {
            const long long row = p.cache.table ? cache_row<1>(p.cache, b, own, position) : cache_row<0>(p.cache, b, own, position);
            write((KV*)(is_v ? p.cache.v : p.cache.k) + row, Constant<KV_DTYPE>());
        }
    }
}
