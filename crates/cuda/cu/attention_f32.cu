// Attention in true f32 (no TF32, no tensor cores): softmax(mask(alibi(softcap(scale · Q·Kᵀ)))) · V, tiled, with online softmax. Every
// feature and every D; with bf16 or f16 elements it is the same in f32 arithmetic, for shapes that the tensor-core kernels do not
// take (D > 256, different dtypes of q and cache).
//
// q, out [T, H·D] in DTYPE; cache rows of D in KV_DTYPE; lse [T, H] f32 (natural log, the sink included).
// Operations: 4·S·L·D per head and sequence, half of it where causal. Bytes: q, k, v read once per row tile, out written once.
// Prefill is bound by FFMA, decode by memory. Papers: FlashAttention-2 (Dao 2023), Flash-Decoding (Dao et al. 2023).
//
// A block computes TILE_M rows, the queries of all H/G heads that share a key/value head packed: row r is token r / (H/G), head
// r mod (H/G) of the group. 16 x 16 threads; a thread has TILE_M/16 rows, keys tx + 16·j and HEAD_DIM_PADDED/16 output columns. All tiles
// are row-major in shared memory with rows 4 floats longer than their content where lanes walk down rows. Each chunk of K or V is
// loaded into registers while the one before is used, and has two buffers, so that one barrier a chunk is enough.
//
// Macros: DTYPE, KV_DTYPE; HEAD_DIM_PADDED 32, 64, 128, 192 or 256; TILE_M 16, 32, 64, 128; CHUNKED 1 for D > 256: the block then
// computes 256 columns of the output and reads Q again with each tile of K.
#include "prelude.cuh"
#include "cache.cuh"

#ifndef DTYPE
#define DTYPE 0
#endif
#ifndef KV_DTYPE
#define KV_DTYPE DTYPE
#endif
#ifndef HEAD_DIM_PADDED
#define HEAD_DIM_PADDED 128
#endif
#ifndef TILE_M
#define TILE_M 64
#endif
#ifndef CHUNKED
#define CHUNKED 0
#endif

struct Params {
    Cache cache;
    const void* q;             // [T, H·D]
    void* out;                 // [T, H·D]
    float* lse;                // [T, H] or null
    const float* sinks;        // [H] or null
    const float* slopes;       // [H] or null: no ALiBi
    const unsigned char* mask; // byte at b·mask_sequence_stride + h·mask_head_stride + i·mask_row_stride + j, nonzero: visible; or null
    const int* starts;         // [B + 1]
    const int* past;           // [B]; null: all 0
    float* partial;            // splits > 1: [splits, tokens, H, D], then [splits, tokens, H, 2] (maximum in base 2, sum)
    long long q_stride, out_stride; // elements between tokens
    long long mask_sequence_stride, mask_head_stride, mask_row_stride;
    int sequences;             // B
    int tokens;                // T, upper bound
    int heads, kv_heads;       // H, G
    int head_dim;              // D
    int splits;                // parts of the keys, each with its own blocks; 1: no partial results
    int causal;
    int window;                // 0: none
    int aligned;               // rows of q and cache start at multiples of 16 bytes, and 8 divides D
    float scale;
    float softcap;             // 0: none
};

typedef typename Element<DTYPE>::T T;
typedef typename Element<KV_DTYPE>::T KV;

constexpr int THREADS = 256, M = TILE_M, N = 64, ROWS = M / 16, KEYS = N / 16;
constexpr int COLUMNS = HEAD_DIM_PADDED;
constexpr int DEPTH = 32;                      // of a chunk of K (and of Q, where chunked)
constexpr int V_KEYS = 16;                     // of a chunk of V
constexpr int PER_THREAD = COLUMNS / 16;       // output columns
constexpr int RUN = PER_THREAD < 4 ? PER_THREAD : 4;     // … of which so many are neighbours
constexpr int V_RUN = PER_THREAD < 8 ? PER_THREAD : (PER_THREAD % 8 ? 4 : 8); // neighbours in a load of V
constexpr int Q_BUFFERS = CHUNKED ? 2 : 1;
constexpr int Q_LD = (CHUNKED ? DEPTH : COLUMNS) + 4, K_LD = DEPTH + 4, P_LD = N + 4;

// COUNT elements of a row of `head_dim` from column d on; 0 outside the row and for a null row.
template <int DT, int COUNT>
__device__ __forceinline__ void load_row(const typename Element<DT>::T* row, int d, int head_dim, int aligned, float (&x)[COUNT]) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) x[j] = 0.0f;
    if (!row) return;
    if (aligned && d + COUNT <= head_dim) {
        load<DT, COUNT>(row + d, x);
    } else {
#pragma unroll
        for (int j = 0; j < COUNT; ++j)
            if (d + j < head_dim) x[j] = to_float<DT>(row[d + j]);
    }
}

// What a row's state (maximum in base 2, sum) becomes at its end: the factor of the weighted values and the log-sum-exp. The sink enters
// the sum here; a query that sees no key gives 0, and the sink's logit for its log-sum-exp; NaN stays NaN.
struct Finish {
    float factor, lse;
    __device__ __forceinline__ Finish(float top, float sum, const float* sink) {
        if (sum == 0.0f) {
            factor = 0.0f;
            lse = sink ? __ldg(sink) : NEG_INF;
            return;
        }
        const float logit = sink ? __ldg(sink) * LOG2E : NEG_INF, both = fmaxf(top, logit), shrink = exp2_approx(top - both);
        const float denominator = sum * shrink + exp2_approx(logit - both);
        factor = shrink / denominator;
        lse = (both + log2f(denominator)) * LN2;
    }
};

template <int COUNT> __device__ __forceinline__ void put(float* p, const float (&x)[COUNT]) { store<F32, COUNT>(p, x); }

// Grid: x: ceil(max S·(H/G) / TILE_M) · splits, y: G, z: B · ceil(D / 256) where chunked, else B. Block: 256 threads.
// Dynamic shared memory: 4 · (Q_BUFFERS·M·Q_LD + 2·N·K_LD + 2·V_KEYS·COLUMNS + M·P_LD) bytes.
extern "C" __global__ void __launch_bounds__(THREADS, COLUMNS <= 128 && M <= 64 ? 2 : 1) attention_f32(const __grid_constant__ Params p) {
    extern __shared__ float4 shared[];
    float* Q = reinterpret_cast<float*>(shared);
    float* K = Q + Q_BUFFERS * M * Q_LD;
    float* V = K + 2 * N * K_LD;
    float* P = V + 2 * V_KEYS * COLUMNS;
    wait_for_previous_kernel();
    allow_next_kernel();

    const int column_blocks = CHUNKED ? (p.head_dim + COLUMNS - 1) / COLUMNS : 1;
    const int b = blockIdx.z / column_blocks, column0 = (blockIdx.z % column_blocks) * COLUMNS, g = blockIdx.y;
    const int group = p.heads / p.kv_heads;
    const int first = __ldg(p.starts + b), added = __ldg(p.starts + b + 1) - first;
    const int past = p.past ? __ldg(p.past + b) : 0, length = past + added, rows = added * group;
    // The last tile first: where causal it sees the most keys.
    const int split = blockIdx.x % p.splits, tile = gridDim.x / p.splits - 1 - blockIdx.x / p.splits, row0 = tile * M;
    if (row0 >= rows) return;
    const int tid = threadIdx.x, tx = tid % 16, ty = tid / 16;

    int end = p.causal ? past + min(row0 + M - 1, rows - 1) / group + 1 : length;
    int begin = p.window ? max(0, past + row0 / group - p.window + 1) / N * N : 0;
    {
        const int tiles = (end - begin + N - 1) / N, share = (tiles + p.splits - 1) / p.splits;
        end = min(end, begin + (split + 1) * share * N);
        begin = begin + split * share * N;
    }

    int position[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) position[r] = past + (row0 + ty * ROWS + r) / group;
    auto head_of = [&](int r) { return g * group + (row0 + ty * ROWS + r) % group; };

    auto q_row = [&](int row) -> const T* {
        if (row0 + row >= rows) return nullptr;
        return (const T*)p.q + (first + (row0 + row) / group) * p.q_stride + (long long)(g * group + (row0 + row) % group) * p.head_dim;
    };
    auto kv_row = [&](const void* base, int key) -> const KV* {
        if (key >= length) return nullptr;
        return (const KV*)base + (p.cache.table ? cache_row<1>(p.cache, b, g, key) : cache_row<0>(p.cache, b, g, key));
    };
    // M rows of Q, `depth` columns from d0 on.
    auto load_q = [&](float* to, int d0, int depth) {
#pragma unroll 1
        for (int e = tid * 8; e < M * depth; e += THREADS * 8) {
            const int row = e / depth, d = e % depth;
            float x[8];
            load_row<DTYPE, 8>(q_row(row), d0 + d, p.head_dim, p.aligned, x);
            put<8>(to + row * Q_LD + d, x);
        }
    };
    if (!CHUNKED) load_q(Q, 0, COLUMNS);

    float acc[ROWS][PER_THREAD], top[ROWS], sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        top[r] = NEG_INF;
        sum[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < PER_THREAD; ++c) acc[r][c] = 0.0f;
    }

    const int chunks = (p.head_dim + DEPTH - 1) / DEPTH;
    float next_k[8], next_v[PER_THREAD / V_RUN][V_RUN];
    const int k_key = tid / 4, k_column = tid % 4 * 8;
    auto fetch_v = [&](int key) {
        const KV* row = kv_row(p.cache.v, key + tid / 16);
#pragma unroll
        for (int c = 0; c < PER_THREAD / V_RUN; ++c)
            load_row<KV_DTYPE, V_RUN>(row, column0 + (c * 16 + tid % 16) * V_RUN, p.head_dim, p.aligned, next_v[c]);
    };
    const KV* k_row = begin < end ? kv_row(p.cache.k, begin + k_key) : nullptr;
    load_row<KV_DTYPE, 8>(k_row, k_column, p.head_dim, p.aligned, next_k);

    for (int key0 = begin; key0 < end; key0 += N) {
        float s[ROWS][KEYS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int j = 0; j < KEYS; ++j) s[r][j] = 0.0f;

        for (int chunk = 0; chunk < chunks; ++chunk) {
            // The barrier of the chunk before has passed, so nobody reads this buffer any more.
            float* k_buffer = K + chunk % 2 * N * K_LD;
            float* q_buffer = CHUNKED ? Q + chunk % 2 * M * Q_LD : Q + chunk * DEPTH;
            put<8>(k_buffer + k_key * K_LD + k_column, next_k);
            if (CHUNKED) load_q(q_buffer, chunk * DEPTH, DEPTH);
            __syncthreads();
            if (chunk + 1 < chunks) load_row<KV_DTYPE, 8>(k_row, (chunk + 1) * DEPTH + k_column, p.head_dim, p.aligned, next_k);
            else fetch_v(key0);
            const float* q = q_buffer + ty * ROWS * Q_LD;
            const float* k = k_buffer + tx * K_LD;
#pragma unroll
            for (int d = 0; d < DEPTH; d += 4) {
                float4 qs[ROWS], ks[KEYS];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) qs[r] = *reinterpret_cast<const float4*>(q + r * Q_LD + d);
#pragma unroll
                for (int j = 0; j < KEYS; ++j) ks[j] = *reinterpret_cast<const float4*>(k + j * 16 * K_LD + d);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
#pragma unroll
                    for (int j = 0; j < KEYS; ++j) {
                        s[r][j] = fmaf(qs[r].x, ks[j].x, s[r][j]);
                        s[r][j] = fmaf(qs[r].y, ks[j].y, s[r][j]);
                        s[r][j] = fmaf(qs[r].z, ks[j].z, s[r][j]);
                        s[r][j] = fmaf(qs[r].w, ks[j].w, s[r][j]);
                    }
            }
        }

#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float slope = p.slopes ? __ldg(p.slopes + head_of(r)) : 0.0f;
            const unsigned char* mask = nullptr;
            if (p.mask)
                mask = p.mask + b * p.mask_sequence_stride + head_of(r) * p.mask_head_stride + (position[r] - past) * p.mask_row_stride;
            // Rows behind the sequence's last see nothing.
            const int row_begin = p.window ? position[r] - p.window + 1 : 0;
            const int row_end = position[r] >= length ? 0 : p.causal ? position[r] + 1 : length;
            float m = top[r];
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                const int key = key0 + tx + 16 * j;
                float u = s[r][j] * p.scale;
                if (p.softcap != 0.0f) u = p.softcap * tanh_accurate(u / p.softcap);
                if (p.slopes) u -= slope * (float)(position[r] - key);
                bool visible = key >= row_begin && key < row_end;
                if (mask && visible) visible = mask[key] != 0;
                s[r][j] = visible ? u * LOG2E : NEG_INF;
                m = fmaxf(m, s[r][j]);
            }
            m = warp_max<16>(m);
            // Nothing seen yet: 0 in place of -inf, so that no difference of infinities arises.
            const float finite = m == NEG_INF ? 0.0f : m;
            const float shrink = exp2_approx(top[r] - finite);
            top[r] = m;
            sum[r] *= shrink;
#pragma unroll
            for (int c = 0; c < PER_THREAD; ++c) acc[r][c] *= shrink;
#pragma unroll
            for (int j = 0; j < KEYS; ++j) {
                const float e = exp2_approx(s[r][j] - finite);
                sum[r] += e;
                P[(ty * ROWS + r) * P_LD + tx + 16 * j] = e;
            }
        }

#pragma unroll 1
        for (int part = 0; part < N / V_KEYS; ++part) {
            float* v_buffer = V + part % 2 * V_KEYS * COLUMNS;
#pragma unroll
            for (int c = 0; c < PER_THREAD / V_RUN; ++c) put<V_RUN>(v_buffer + (tid / 16) * COLUMNS + (c * 16 + tid % 16) * V_RUN, next_v[c]);
            __syncthreads();
            if (part + 1 < N / V_KEYS) {
                fetch_v(key0 + (part + 1) * V_KEYS);
            } else if (key0 + N < end) {
                k_row = kv_row(p.cache.k, key0 + N + k_key);
                load_row<KV_DTYPE, 8>(k_row, k_column, p.head_dim, p.aligned, next_k);
            }
#pragma unroll
            for (int k = 0; k < V_KEYS; k += 4) {
                float w[ROWS][4];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) load<F32, 4>(P + (ty * ROWS + r) * P_LD + part * V_KEYS + k, w[r]);
#pragma unroll
                for (int kk = 0; kk < 4; ++kk)
#pragma unroll
                    for (int c = 0; c < PER_THREAD / RUN; ++c) {
                        float x[RUN];
                        load<F32, RUN>(v_buffer + (k + kk) * COLUMNS + (c * 16 + tx) * RUN, x);
#pragma unroll
                        for (int r = 0; r < ROWS; ++r)
#pragma unroll
                            for (int e = 0; e < RUN; ++e) acc[r][c * RUN + e] = fmaf(w[r][kk], x[e], acc[r][c * RUN + e]);
                    }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int row = row0 + ty * ROWS + r;
        const float total = warp_sum<16>(sum[r]);
        if (row >= rows) continue;
        const int t = first + row / group, head = head_of(r);
        if (p.splits > 1) {
            const long long at = ((long long)split * p.tokens + t) * p.heads + head;
            float* part = p.partial + at * p.head_dim;
#pragma unroll
            for (int c = 0; c < PER_THREAD; ++c) {
                const int d = column0 + (c / RUN * 16 + tx) * RUN + c % RUN;
                if (d < p.head_dim) part[d] = acc[r][c];
            }
            if (tx == 0 && column0 == 0) {
                float* state = p.partial + (long long)p.splits * p.tokens * p.heads * p.head_dim + at * 2;
                state[0] = top[r];
                state[1] = total;
            }
            continue;
        }
        const Finish finish(top[r], total, p.sinks ? p.sinks + head : nullptr);
        T* out = (T*)p.out + t * p.out_stride + (long long)head * p.head_dim;
#pragma unroll
        for (int c = 0; c < PER_THREAD / RUN; ++c) {
            const int d = column0 + (c * 16 + tx) * RUN;
            float x[RUN];
#pragma unroll
            for (int e = 0; e < RUN; ++e) x[e] = acc[r][c * RUN + e] * finish.factor;
            if (p.aligned && p.out_stride % 8 == 0 && d + RUN <= p.head_dim) {
                store<DTYPE, RUN>(out + d, x);
            } else {
#pragma unroll
                for (int e = 0; e < RUN; ++e)
                    if (d + e < p.head_dim) out[d + e] = from_float<DTYPE>(x[e]);
            }
        }
        if (p.lse && tx == 0 && column0 == 0)
            p.lse[(long long)t * p.heads + head] = finish.lse;
    }
}

// Merges the parts in their order. Grid: T · H. Block: any multiple of 32.
extern "C" __global__ void attention_f32_merge(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const int t = blockIdx.x / p.heads, h = blockIdx.x % p.heads;
    if (t >= __ldg(p.starts + p.sequences)) return;
    const long long stride = (long long)p.tokens * p.heads, at = (long long)t * p.heads + h;
    const float* state = p.partial + p.splits * stride * p.head_dim;
    float top = NEG_INF, total = 0.0f;
    for (int i = 0; i < p.splits; ++i) top = fmaxf(top, state[(i * stride + at) * 2]);
    const float finite = top == NEG_INF ? 0.0f : top;
    for (int i = 0; i < p.splits; ++i) total += state[(i * stride + at) * 2 + 1] * exp2_approx(state[(i * stride + at) * 2] - finite);
    const Finish finish(top, total, p.sinks ? p.sinks + h : nullptr);
    for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
        float x = 0.0f;
        for (int i = 0; i < p.splits; ++i)
            x = fmaf(p.partial[(i * stride + at) * p.head_dim + d], exp2_approx(state[(i * stride + at) * 2] - finite), x);
        ((T*)p.out)[t * p.out_stride + (long long)h * p.head_dim + d] = from_float<DTYPE>(x * finish.factor);
    }
    if (p.lse && threadIdx.x == 0) p.lse[at] = finish.lse;
}
