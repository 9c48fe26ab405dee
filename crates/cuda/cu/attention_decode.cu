// Attention for one or a few new tokens of each sequence (decode): the keys are split over blocks, whose partial results are merged.
//
//   q [T, H, D] (rows q_stride apart)   cache K, V [B, G, L, D]   out [T, H, D]   lse [T, H]   parts [T, H, splits, P] f32, states [T, H, splits, 2] f32
//
// Operations: 4·D for each pair of query row and key, 16 rows at a time whether used or not. Bytes: K and V once for each 16 packed query rows. Bound
// by memory: a warp copies its own 16 keys at a time, several steps ahead, and meets no barrier until the end, so that each SM always has tens of
// kilobytes on their way; mma.sync leaves the arithmetic far below the copies even with one row of 16 in use.
//
// The H/G query heads of a key/value head and the sequence's new tokens are packed into rows R = token · group + head in group, 16 for each block.
// The keys that a block's rows see, in steps of 16 from a multiple of 16 on, are divided into runs of max(⌈steps / splits⌉, WARPS) steps, one for each block
// along x; blocks behind the last run have nothing to do. Ranges follow from the lengths in device memory, so one grid serves growing lengths.
// The last block to arrive merges the parts in the order of the splits; the result does not depend on which one that is.
// Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html); online softmax: softmax_state.cuh.
//
// Macros: DTYPE (1 bf16, 2 f16; also the cache's), HEAD_DIM_PADDED (P, a multiple of 16 from 16 to 256, at least D), SCORE_FEATURES (0: softcap, alibi
// and mask below must be 0 or null; 1: each is a run-time switch). May be given: WARPS, and STAGES, at least 2. Pages have 16 rows or more.
//
// Launch:
//   WARPS   P ≤ 128 ? 8 : 4: one block fills an SM with copies on their way, from as few places in memory as possible
//   STAGES  min(8, ⌊220000 / (64·WARPS·(P + 8))⌋); fewer, or 4 warps, where an SM has less than 227 KiB of shared memory
//   block   32·WARPS threads
//   shared  64·WARPS·(P + 8)·STAGES + 128·WARPS + 16 bytes, dynamic
//   grid    x = splits, y = row_tiles · G with row_tiles = ⌈S_max · (H/G) / 16⌉, z = B
//   splits  1 … 256; the fewest that fill the SMs: clamp(⌊SMs / (B · G · row_tiles)⌋, 1, ⌈L / 128⌉); 2 where B · G · row_tiles ≥ 4 · SMs, so that the last
//           blocks end together
//   parts, states, counters are not touched when splits = 1
#include "prelude.cuh"
#include "cache.cuh"
#include "tile.cuh"
#include "mma_sm80.cuh"
#include "softmax_state.cuh"

#ifndef WARPS
#define WARPS (HEAD_DIM_PADDED <= 128 ? 8 : 4)
#endif
constexpr int THREADS = 32 * WARPS, ROWS = 16, STEP = 16;
constexpr int DIM = HEAD_DIM_PADDED, PITCH = tile_pitch(DIM), DIM_TILES = DIM / 8, KEY_TILES = STEP / 8;
constexpr int TILE_BYTES = 2 * PITCH * STEP, STAGE_BYTES = 2 * TILE_BYTES;  // K and V of one step
#ifndef STAGES
constexpr int FITTING = 220000 / (WARPS * STAGE_BYTES);  // one block on an SM of 227 KiB
constexpr int STAGES = FITTING < 8 ? FITTING : 8;
#endif
constexpr int WARP_BYTES = STAGES * STAGE_BYTES;
constexpr int ACC_PITCH = DIM + 8;  // floats; 8 rows of two-float accesses meet no bank conflict
static_assert(DIM % 16 == 0 && DIM <= 256 && STAGES >= 2, "whole fragments, one step ahead");
static_assert(4 * ACC_PITCH * ROWS <= WARP_BYTES, "a warp's sums fit where its keys were");

struct Params {
    const unsigned short* q;    // token t, head h at t·q_stride + h·head_dim
    unsigned short* out;        // the same with out_stride
    float* lse;                 // [T, H], natural logarithm, sinks included; null: not wanted
    float* parts;               // 16-byte aligned
    float2* states;             // m in base 2 and l
    unsigned* counters;         // [B, row_tiles·G], 0 before the first launch and after each
    const int* starts;          // [B + 1], first token of each sequence
    const int* past;            // [B], rows of the cache before the new tokens
    const float* sinks;         // [H] or null
    const float* alibi_slopes;  // [H] or null
    const unsigned char* mask;  // nonzero = visible, at b·mask_sequence_stride + h·mask_head_stride + i·mask_row_stride + j, or null
    long long q_stride, out_stride;  // elements
    long long mask_sequence_stride, mask_head_stride, mask_row_stride;
    Cache cache;
    float scale;    // finite, not 0, may be negative
    float softcap;  // 0: none
    int heads;      // H
    int kv_heads;   // G
    int head_dim;   // D ≤ HEAD_DIM_PADDED
    int causal;     // 0 or 1
    int window;     // 0: none; else a query at position i sees keys from i − window + 1 on
    int reserved;
};

struct KeyRows {
    const unsigned short* base;
    long long stride;
    __device__ __forceinline__ const unsigned short* operator()(int r, bool) const { return base + r * stride; }
};

extern "C" __global__ void __launch_bounds__(THREADS) attention_decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char shared[];
    wait_for_previous_kernel();

    const int split = blockIdx.x, splits = gridDim.x, b = blockIdx.z;
    const int row_tile = blockIdx.y / p.kv_heads, g = blockIdx.y - row_tile * p.kv_heads;
    const int group = p.heads / p.kv_heads;
    const int start = __ldg(p.starts + b), tokens = __ldg(p.starts + b + 1) - start, past = __ldg(p.past + b);
    const int first_row = row_tile * ROWS, rows = min(tokens * group - first_row, ROWS);
    if (rows <= 0) return;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

    // This block's keys: steps [step_begin, step_end) of 16, counted from keys_begin.
    const int position_first = past + first_row / group, position_last = past + (first_row + rows - 1) / group;
    const int total = past + tokens, keys_end = p.causal ? position_last + 1 : total;
    const int keys_begin = (p.window ? max(0, position_first - p.window + 1) : 0) / STEP * STEP;
    const int steps = (keys_end - keys_begin + STEP - 1) / STEP;
    const int run = max((steps + splits - 1) / splits, WARPS), used = (steps + run - 1) / run;
    const int step_begin = split * run, step_end = min(steps, step_begin + run);

    // Token, head and place in the parts of row r of the tile.
    const auto token_of = [&](int r) { return (first_row + r) / group; };
    const auto head_of = [&](int r) { return g * group + (first_row + r) % group; };
    const auto part_of = [&](int r) { return ((long long)(start + token_of(r)) * p.heads + head_of(r)) * splits; };
    if (split >= used) {
        return;
    }

    const unsigned warp_shared = shared_address(shared) + warp * WARP_BYTES;
    const bool paged = p.cache.table;
    const long long head_offset = g * p.cache.head_stride + (paged ? 0 : b * p.cache.sequence_stride);
    const unsigned short* const k_head = (const unsigned short*)p.cache.k + head_offset;
    const unsigned short* const v_head = (const unsigned short*)p.cache.v + head_offset;
    const bool kv_wide = (((unsigned long long)p.cache.k | (unsigned long long)p.cache.v) % 16 == 0) && p.head_dim % 8 == 0 &&
                         (p.cache.sequence_stride | p.cache.head_stride | p.cache.row_stride) % 8 == 0;
    // Where a step's first key lies, from the head's base; a page has whole steps.
    const auto step_offset = [&](int step) -> long long {
        const int j = keys_begin + step * STEP;
        return paged ? cache_row<1>(p.cache, b, 0, j) : j * p.cache.row_stride;
    };
    const auto load_step = [&](int step, long long offset, int stage) {
        const unsigned to = warp_shared + stage * STAGE_BYTES;
        const int valid = total - (keys_begin + step * STEP);
        load_tile<STEP, DIM, 32>(to, valid, p.head_dim, kv_wide, lane, KeyRows{k_head + offset, p.cache.row_stride});
        load_tile<STEP, DIM, 32>(to + TILE_BYTES, valid, p.head_dim, kv_wide, lane, KeyRows{v_head + offset, p.cache.row_stride});
    };

    int ahead = step_begin + warp;  // the next step to load
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (ahead < step_end) load_step(ahead, step_offset(ahead), i);
        copies_commit();
        ahead += WARPS;
    }
    long long ahead_offset = ahead < step_end ? step_offset(ahead) : 0;

    // Rows lane / 4 and 8 further: their queries as A fragments, positions, slopes.
    unsigned q[DIM / 16][4];
    int position[2];
    [[maybe_unused]] float slope[2];
    const bool q_wide = (unsigned long long)p.q % 4 == 0 && (p.q_stride | p.head_dim) % 2 == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = lane / 4 + 8 * half, i = min(token_of(r), tokens - 1), h = head_of(r);
        position[half] = past + i;
#if SCORE_FEATURES
        slope[half] = p.alibi_slopes ? __ldg(p.alibi_slopes + h) * LOG2E : 0.0f;
#endif
        const unsigned short* const row = p.q + (start + i) * p.q_stride + h * p.head_dim;
#pragma unroll
        for (int k = 0; k < DIM / 8; ++k) {
            const int c = k * 8 + 2 * (lane % 4);
            unsigned x = 0;
            if (r < rows) {
                if (q_wide) {
                    if (c < p.head_dim) x = __ldg(reinterpret_cast<const unsigned*>(row + c));
                } else {
                    if (c < p.head_dim) x = __ldg(row + c);
                    if (c + 1 < p.head_dim) x |= (unsigned)__ldg(row + c + 1) << 16;
                }
            }
            q[k / 2][half + 2 * (k % 2)] = x;
        }
    }

    float acc[DIM_TILES][4] = {}, m[2] = {NOTHING_SEEN, NOTHING_SEEN}, l[2] = {0.0f, 0.0f};
    const float factor = SCORE_FEATURES ? 1.0f : fabsf(p.scale) * LOG2E;
    const unsigned k_lane = warp_shared + 2 * lane_offset_b(lane, PITCH), v_lane = warp_shared + TILE_BYTES + 2 * lane_offset_b_transposed(lane, PITCH);
    // Keys before `all_end` and from `all_begin` on are visible to every row.
    const int all_end = p.causal ? position_first + 1 : total, all_begin = p.window ? position_last - p.window + 1 : 0;

    int stage = 0, stage_ahead = STAGES - 1;
#pragma unroll 1
    for (int step = step_begin + warp; step < step_end; step += WARPS) {
        copies_wait<STAGES - 2>();
        __syncwarp();
        // Into the stage that the previous pass read.
        if (ahead < step_end) load_step(ahead, ahead_offset, stage_ahead);
        copies_commit();
        ahead += WARPS;
        if (ahead < step_end) ahead_offset = step_offset(ahead);

        const unsigned stage_offset = stage * STAGE_BYTES;
        float s[KEY_TILES][4] = {};
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k)
#pragma unroll
            for (int n = 0; n < KEY_TILES; n += 2) {
                unsigned f[4];
                ldmatrix4(f, k_lane + stage_offset + 2 * (n * 8 * PITCH + k * 16));
                mma<DTYPE>(s[n], q[k], f[0], f[1]);
                mma<DTYPE>(s[n + 1], q[k], f[2], f[3]);
            }
        const int j0 = keys_begin + step * STEP, column = j0 + 2 * (lane % 4);
#if SCORE_FEATURES
        const float inverse_cap = p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f;
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float x = s[n][e] * p.scale;
                if (p.softcap > 0.0f) x = p.softcap * tanh_accurate(x * inverse_cap);
                s[n][e] = x * LOG2E - slope[e / 2] * (float)(position[e / 2] - (column + n * 8 + e % 2));
            }
#else
        if (p.scale < 0.0f) {
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[n][e] = -s[n][e];
        }
#endif
        const bool masked = SCORE_FEATURES && p.mask;
        if (j0 + STEP > all_end || j0 < all_begin || masked) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row_begin = p.window ? position[half] - p.window + 1 : 0, row_end = p.causal ? position[half] + 1 : total;
                const unsigned from = column - row_begin, wide = row_end - row_begin;
                [[maybe_unused]] const int r = lane / 4 + 8 * half;
#pragma unroll
                for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        bool visible = from + n * 8 + e < wide;
#if SCORE_FEATURES
                        if (visible && masked && r < rows)
                            visible = __ldg(p.mask + b * p.mask_sequence_stride + head_of(r) * p.mask_head_stride + (position[half] - past) * p.mask_row_stride +
                                            column + n * 8 + e) != 0;
#endif
                        if (!visible) s[n][2 * half + e] = NEG_INF;
                    }
            }
        }

        float top[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x = NEG_INF;
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n) x = fmaxf(x, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            top[half] = warp_max<4>(x) * factor;
        }
        if (__any_sync(FULL_MASK, moves_reference(m[0], top[0], 0.0f) || moves_reference(m[1], top[1], 0.0f))) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float next = moves_reference(m[half], top[half], 0.0f) ? top[half] : m[half];
                const float w = exp2_approx(m[half] - next);
                m[half] = next;
                l[half] *= w;
#pragma unroll
                for (int n = 0; n < DIM_TILES; ++n) acc[n][2 * half] *= w, acc[n][2 * half + 1] *= w;
            }
        }
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k) {
            unsigned a[4];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float (&x)[4] = s[2 * k + n];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    x[e] = exp2_approx(fmaf(x[e], factor, -m[e / 2]));
                    l[e / 2] += x[e];
                }
                a[2 * n] = pack2<DTYPE>(x[0], x[1]);
                a[2 * n + 1] = pack2<DTYPE>(x[2], x[3]);
            }
#pragma unroll
            for (int n = 0; n < DIM_TILES; n += 2) {
                unsigned f[4];
                ldmatrix4_transposed(f, v_lane + stage_offset + 2 * (k * 16 * PITCH + n * 8));
                mma<DTYPE>(acc[n], a, f[0], f[1]);
                mma<DTYPE>(acc[n + 1], a, f[2], f[3]);
            }
        }
        stage_ahead = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    allow_next_kernel();

    // The warps' sums, in the order of the warps.
    copies_wait<0>();
    __syncwarp();
    float* const sums = reinterpret_cast<float*>(shared + warp * WARP_BYTES);
    float2* const warp_states = reinterpret_cast<float2*>(shared + WARPS * WARP_BYTES);  // [WARPS, ROWS]
    int* const last = reinterpret_cast<int*>(warp_states + WARPS * ROWS);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = lane / 4 + 8 * half;
        const float row_l = warp_sum<4>(l[half]);
        if (lane % 4 == 0) warp_states[warp * ROWS + r] = make_float2(m[half], row_l);
        if (r < rows) {
#pragma unroll
            for (int n = 0; n < DIM_TILES; ++n)
                *reinterpret_cast<float2*>(sums + r * ACC_PITCH + n * 8 + 2 * (lane % 4)) = make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
        }
    }
    __syncthreads();
    const bool out_wide = (unsigned long long)p.out % 8 == 0 && (p.out_stride | p.head_dim) % 4 == 0;
#pragma unroll 1
    for (int i = thread; i < rows * (DIM / 4); i += THREADS) {
        const int r = i / (DIM / 4), c = i % (DIM / 4) * 4;
        float top = NOTHING_SEEN;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, warp_states[w * ROWS + r].x);
        float sum = 0.0f, x[4] = {};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float2 state = warp_states[w * ROWS + r];
            const float weight = exp2_approx(state.x - top);
            const float4 y = *reinterpret_cast<const float4*>(shared + w * WARP_BYTES + 4 * (r * ACC_PITCH + c));
            sum = fmaf(state.y, weight, sum);
            x[0] = fmaf(y.x, weight, x[0]);
            x[1] = fmaf(y.y, weight, x[1]);
            x[2] = fmaf(y.z, weight, x[2]);
            x[3] = fmaf(y.w, weight, x[3]);
        }
        if (used == 1) {
            const int t = start + token_of(r), h = head_of(r);
            float log_sum_exp;
            const float scale = finish(top, sum, 0.0f, p.sinks ? __ldg(p.sinks + h) * LOG2E : NEG_INF, log_sum_exp);
            if (p.lse && c == 0) p.lse[(long long)t * p.heads + h] = log_sum_exp;
#pragma unroll
            for (int e = 0; e < 4; ++e) x[e] *= scale;
            store_columns<DTYPE>(p.out + t * p.out_stride + h * p.head_dim, c, p.head_dim, out_wide, x);
        } else {
            const long long part = part_of(r) + split;
            __stcg(reinterpret_cast<float4*>(p.parts + part * DIM + c), make_float4(x[0], x[1], x[2], x[3]));
            if (c == 0) __stcg(p.states + part, make_float2(top, sum));
        }
    }
    if (used == 1) return;

    // The last block to arrive merges. The counter wraps to 0, ready for the next launch.
    __threadfence();
    __syncthreads();
    if (thread == 0) *last = atomicInc(p.counters + b * gridDim.y + blockIdx.y, used - 1) == used - 1;
    __syncthreads();
    if (!*last) return;
    __threadfence();
    for (int r = warp; r < rows; r += WARPS) {
        const int t = start + token_of(r), h = head_of(r);
        const long long part = part_of(r);
        merge_parts<DTYPE, DIM>(p.parts + part * DIM, p.states + part, used, p.sinks ? __ldg(p.sinks + h) * LOG2E : NEG_INF,
            p.out + t * p.out_stride + h * p.head_dim, p.head_dim, out_wide, p.lse ? p.lse + (long long)t * p.heads + h : nullptr, lane);
    }
}
