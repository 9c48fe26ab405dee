// Tiled attention with online softmax for many new tokens (prefill, chunked prefill): out = softmax(mask(bias(cap(scale · Q Kᵀ)))) V, f32 sums.
//
//   q [T, H, D] (rows q_stride apart)   cache K, V [B, G, L, D]   out [T, H, D] (rows out_stride apart)   lse [T, H]
//
// Operations: 4·D for each visible pair of query row and key. Bytes: q and out once, K and V once for each tile of query rows, of which all
// but the first reading come from L2. Bound by the tensor cores, through mma.sync; beside them shared memory (each fragment of K and V serves 32
// query rows of a warp, or its 128 bytes a cycle would bind) and the exponential (one for each pair).
//
// The H/G query heads of a key/value head are packed into the tile's rows: row R of pair (b, g) is token R / group, head g·group + R mod group. A
// block owns ROWS rows and walks the keys that any of them sees, KEYS at a time, ascending. With one stage the next K comes in during softmax and P·V
// and the next V during the next Q·Kᵀ; with two, a whole tile ahead.
// P stays in registers. Masks are applied in tiles where they cut something, and a warp passes over tiles that none of its rows sees.
// FlashAttention-2 (arXiv:2307.08691); online softmax (arXiv:1805.02867); the rarely moving reference: softmax_state.cuh.
//
// Macros: DTYPE (1 bf16, 2 f16; also the cache's), HEAD_DIM_PADDED (a multiple of 16 from 16 to 256, at least D), PAGED (0, 1), SCORE_FEATURES (0: lse,
// softcap, alibi and mask below must be 0 or null and scale positive; 1: each is a run-time switch). May be given: KEYS, STAGES.
//
// Launch, for P = HEAD_DIM_PADDED:
//   block   128 threads
//   ROWS    P ≤ 128 ? 128 : 64
//   KEYS    P ≤ 64 and no SCORE_FEATURES: 128; 96 < P ≤ 128 with SCORE_FEATURES: 32; else 64
//   STAGES  P ≤ 96 ? 2 : 1; 1 also where two blocks would not fit an SM
//   shared  2·(P + 8)·(ROWS + 2·STAGES·KEYS) + 8·ROWS + 64 bytes, dynamic
//   grid    x = tiles · B · G with tiles = ⌈S_max · (H/G) / ROWS⌉, S_max the greatest number of new tokens of a sequence; y = z = 1
//   section how many pairs (b, g) run side by side: clamp(⌊L2 bytes / 2 / (4 · D · rows of the cache)⌋, 1, B·G), so that their K and V stay in L2
#include "prelude.cuh"
#include "prefill_call.cuh"
#include "tile.cuh"
#include "mma_sm80.cuh"
#include "score_rules.cuh"
#include "softmax_state.cuh"

#ifndef KEYS
#define KEYS (HEAD_DIM_PADDED <= 64 && !SCORE_FEATURES ? 128 : HEAD_DIM_PADDED <= 128 && HEAD_DIM_PADDED > 96 && SCORE_FEATURES ? 32 : 64)
#endif
#ifndef STAGES
#define STAGES (HEAD_DIM_PADDED <= 96 ? 2 : 1)
#endif

constexpr int DIM = HEAD_DIM_PADDED, PITCH = tile_pitch(DIM);
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROW_TILES = DIM <= 128 ? 2 : 1;  // of 16 query rows, for each warp; the accumulators take 4·DIM·ROW_TILES / 8 registers
constexpr int WARP_ROWS = 16 * ROW_TILES, ROWS = WARPS * WARP_ROWS;
// The sum of a row's weights as a product with ones, which leaves the exponential's pipe free and adds up the rounded weights; where the sum itself is
// not asked for, and short rows of V make the additions count.
constexpr bool SUM_BY_MMA = DIM <= 64 && !SCORE_FEATURES;
constexpr unsigned ONES = DTYPE == BF16 ? 0x3f803f80u : 0x3c003c00u;
constexpr int KEY_TILES = KEYS / 8, DIM_TILES = DIM / 8;
constexpr int TILE_BYTES = 2 * PITCH * KEYS;
static_assert(DIM % 16 == 0 && DIM <= 256 && KEYS % 16 == 0 && (KEYS & (KEYS - 1)) == 0, "whole fragments");

typedef PrefillCall Params;

// One head of one sequence of the cache. It lies in shared memory, since the main loop has no registers for it.
struct Head {
    const unsigned short *k, *v;
    const int* table;
    long long page_stride;
    int row_stride, page_shift, page_mask;
};

// Its rows from `first` on, of K or of V.
struct HeadRows {
    const Head& head;
    const unsigned short* base;
    int first;
    __device__ __forceinline__ const unsigned short* operator()(int r, [[maybe_unused]] bool inside) const {
        const int row = first + r;
#if PAGED
        return !inside ? base : base + __ldg(head.table + (row >> head.page_shift)) * head.page_stride + (long long)(row & head.page_mask) * head.row_stride;
#else
        return base + (long long)row * head.row_stride;
#endif
    }
};

// Rows of the packed tile: R / group is the token.
struct QueryRows {
    const unsigned short* base;  // token 0 of the sequence, first head of the group
    long long stride;
    int group, first, head_dim;
    __device__ __forceinline__ const unsigned short* operator()(int r, bool) const {
        const int i = group == 1 ? first + r : (first + r) / group;
        return base + i * stride + (first + r - i * group) * head_dim;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_prefill(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char shared[];
    wait_for_previous_kernel();

    // Sections of pairs one after another; within one the last tiles first, which are the longest where the mask is causal.
    const int pairs = p.batch * p.kv_heads, tiles = p.tiles;
    const int section = blockIdx.x / (p.section * tiles);
    const int in_section = blockIdx.x - section * p.section * tiles;
    const int width = min(p.section, pairs - section * p.section);
    const int tile = tiles - 1 - in_section / width;
    const int pair = section * p.section + in_section % width;
    const int b = pair / p.kv_heads, g = pair - b * p.kv_heads;

    const int group = p.heads / p.kv_heads;
    const int start = __ldg(p.starts + b), tokens = __ldg(p.starts + b + 1) - start, past = __ldg(p.past + b);
    const int first_row = tile * ROWS, rows_left = tokens * group - first_row;
    if (rows_left <= 0) return;
    const int rows = min(rows_left, ROWS);

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int total = past + tokens;
    // Position and slope of each row of the tile, for masks, bias and the way out.
    int* const positions = reinterpret_cast<int*>(shared + 2 * PITCH * ROWS + 2 * STAGES * TILE_BYTES);
    [[maybe_unused]] float* const slopes = reinterpret_cast<float*>(positions + ROWS);
    Head& head = *reinterpret_cast<Head*>(slopes + ROWS);
    if (thread == 0) {
        const long long offset = g * p.cache.head_stride + (PAGED ? 0 : b * p.cache.sequence_stride);
        head.k = (const unsigned short*)p.cache.k + offset;
        head.v = (const unsigned short*)p.cache.v + offset;
        head.row_stride = (int)p.cache.row_stride;
#if PAGED
        head.table = p.cache.table + (long long)b * p.cache.table_stride;
        head.page_stride = p.cache.sequence_stride;
        head.page_shift = 31 - __clz(p.cache.page);
        head.page_mask = p.cache.page - 1;
#endif
    }
    for (int r = thread; r < ROWS; r += THREADS) {
        const int token = min((first_row + r) / group, tokens - 1);
        positions[r] = past + token;
#if SCORE_FEATURES
        if (p.alibi_slopes) slopes[r] = __ldg(p.alibi_slopes + g * group + (first_row + r) % group) * LOG2E;
#endif
    }

    // Keys that any row of the block sees, and any row of this warp.
    const int position_first = past + first_row / group, position_last = past + (first_row + rows - 1) / group;
    const int keys_end = p.causal ? position_last + 1 : total;
    const int keys_begin = (p.window ? max(0, position_first - p.window + 1) : 0) / KEYS * KEYS;
    const int warp_row = warp * WARP_ROWS;

    const unsigned q_tile = shared_address(shared), k_tile = q_tile + 2 * PITCH * ROWS, v_tile = k_tile + STAGES * TILE_BYTES;
    const bool kv_wide = (((unsigned long long)p.cache.k | (unsigned long long)p.cache.v) % 16 == 0) && p.head_dim % 8 == 0 &&
                         (p.cache.sequence_stride | p.cache.head_stride | p.cache.row_stride) % 8 == 0;
    {
        QueryRows q_rows = {p.q + start * p.q_stride + (long long)g * group * p.head_dim, p.q_stride, group, first_row, p.head_dim};
        load_tile<ROWS, DIM, THREADS>(q_tile, rows, p.head_dim, (unsigned long long)p.q % 16 == 0 && (p.q_stride | p.head_dim) % 8 == 0, thread, q_rows);
    }
    const auto load_k = [&](int first, unsigned to) {
        load_tile<KEYS, DIM, THREADS>(to, total - first, p.head_dim, kv_wide, thread, HeadRows{head, head.k, first});
    };
    const auto load_v = [&](int first, unsigned to) {
        load_tile<KEYS, DIM, THREADS>(to, total - first, p.head_dim, kv_wide, thread, HeadRows{head, head.v, first});
    };
    __syncthreads();
    load_k(keys_begin, k_tile);
    if (STAGES == 1) copies_commit();
    load_v(keys_begin, v_tile);
    copies_commit();

    float acc[ROW_TILES][DIM_TILES][4] = {};
    // References and sums of the thread's rows. Sums are whole with SUM_BY_MMA (two equal columns of the product), else of the thread's own columns,
    // in the first of two. greatest: top score so far of row lane mod 4 of the four (or two) that the quad shares.
    float m[ROW_TILES][2], sums[ROW_TILES][4] = {}, greatest = NOTHING_SEEN;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) m[t][0] = m[t][1] = NOTHING_SEEN;

    const float factor = SCORE_FEATURES ? 1.0f : p.scale * LOG2E;
    const unsigned q_lane = q_tile + 2 * (warp_row * PITCH + lane_offset_a(lane, PITCH));
    const unsigned k_lane = k_tile + 2 * lane_offset_b(lane, PITCH), v_lane = v_tile + 2 * lane_offset_b_transposed(lane, PITCH);

    unsigned stage = 0;  // offset of the current tile among the stages
#pragma unroll 1
    for (int j0 = keys_begin; j0 < keys_end; j0 += KEYS) {
        const bool more = j0 + KEYS < keys_end;
        copies_wait<STAGES == 1 ? 1 : 0>();
        __syncthreads();
        if (STAGES == 2 && more) load_k(j0 + KEYS, k_tile + (stage ^ TILE_BYTES));
        // What the warp's rows see; positions ascend with the rows. Read again for each tile, since registers are short.
        const int warp_first = positions[warp_row], warp_last = positions[warp_row + WARP_ROWS - 1];
        const bool seen = warp_row < rows && (!p.causal || j0 <= warp_last) && (!p.window || j0 + KEYS > warp_first - p.window + 1);
        float s[ROW_TILES][KEY_TILES][4] = {};
        if (seen) {
#pragma unroll
            for (int k = 0; k < DIM / 16; ++k) {
                unsigned a[ROW_TILES][4];
#pragma unroll
                for (int t = 0; t < ROW_TILES; ++t) ldmatrix4(a[t], q_lane + 2 * (t * 16 * PITCH + k * 16));
#pragma unroll
                for (int n = 0; n < KEY_TILES; n += 2) {
                    unsigned f[4];
                    ldmatrix4(f, k_lane + stage + 2 * (n * 8 * PITCH + k * 16));
#pragma unroll
                    for (int t = 0; t < ROW_TILES; ++t) {
                        mma<DTYPE>(s[t][n], a[t], f[0], f[1]);
                        mma<DTYPE>(s[t][n + 1], a[t], f[2], f[3]);
                    }
                }
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (more) load_k(j0 + KEYS, k_tile);
        } else if (more) {
            load_v(j0 + KEYS, v_tile + (stage ^ TILE_BYTES));
        }
        copies_commit();
        if (seen) {
            const int column = j0 + 2 * (lane % 4);
#if SCORE_FEATURES
            // The logits in base 2, so that what follows scales by 1.
            const float inverse_cap = p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f;
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int r = warp_row + t * 16 + half * 8 + lane / 4;
                    const float position = (float)(positions[r] - column);
                    const float slope = p.alibi_slopes ? slopes[r] : 0.0f;
                    shape_scores(s[t], half, p.scale, p.softcap, inverse_cap, slope, position);
                }
#endif
            const bool masked = SCORE_FEATURES && p.mask;
            if (j0 + KEYS > (p.causal ? warp_first + 1 : total) || (p.window && j0 <= warp_last - p.window) || masked) {
#pragma unroll
                for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int r = warp_row + t * 16 + half * 8 + lane / 4, position = positions[r];
                        const int row_begin = p.window ? position - p.window + 1 : 0, row_end = p.causal ? position + 1 : total;
                        const unsigned from = column - row_begin, wide = row_end - row_begin;
                        hide_outside(s[t], half, from, wide);
#if SCORE_FEATURES
                        if (masked && r < rows) {
                            const int i = position - past, h = g * group + first_row + r - i * group;
                            const unsigned char* mask = p.mask + b * p.mask_sequence_stride + h * p.mask_head_stride + i * p.mask_row_stride + column;
                            hide_masked(s[t], half, from, wide, mask);
                        }
#endif
                    }
            }

            float top[ROW_TILES][2];
            bool moved = false;
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x = fmaxf(s[t][0][2 * half], s[t][0][2 * half + 1]);
#pragma unroll
                    for (int n = 1; n < KEY_TILES; ++n) x = fmaxf(x, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
                    top[t][half] = warp_max<4>(x) * factor;
                    moved |= moves_reference(m[t][half], top[t][half], SOFTMAX_SLACK);
                }
            if (!SUM_BY_MMA) {
                float mine = lane % 2 ? top[0][1] : top[0][0];
                if (ROW_TILES == 2 && lane % 4 >= 2) mine = lane % 2 ? top[ROW_TILES - 1][1] : top[ROW_TILES - 1][0];
                greatest = fmaxf(greatest, mine);
            }
            if (__any_sync(FULL_MASK, moved)) {
#pragma unroll
                for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float next = moves_reference(m[t][half], top[t][half], SOFTMAX_SLACK) ? top[t][half] : m[t][half];
                        const float w = exp2_approx(m[t][half] - next);
                        m[t][half] = next;
                        sums[t][2 * half] *= w, sums[t][2 * half + 1] *= w;
#pragma unroll
                        for (int n = 0; n < DIM_TILES; ++n) acc[t][n][2 * half] *= w, acc[t][n][2 * half + 1] *= w;
                    }
            }
        }
        if (STAGES == 1) {
            copies_wait<1>();
            __syncthreads();
        }
        if (seen) {
            // The weights of 16 keys and their product with V, one after another, so that the exponentials of the next 16 run beside the product.
#pragma unroll
            for (int k = 0; k < KEYS / 16; ++k) {
                unsigned a[ROW_TILES][4];
#pragma unroll
                for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        float (&x)[4] = s[t][2 * k + n];
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            x[e] = exp2_approx(fmaf(x[e], factor, -m[t][e / 2]));
                            if (!SUM_BY_MMA) sums[t][e / 2 * 2] += x[e];
                        }
                        a[t][2 * n] = pack2<DTYPE>(x[0], x[1]);
                        a[t][2 * n + 1] = pack2<DTYPE>(x[2], x[3]);
                    }
                if (SUM_BY_MMA) {
#pragma unroll
                    for (int t = 0; t < ROW_TILES; ++t) mma<DTYPE>(sums[t], a[t], ONES, ONES);
                }
#pragma unroll
                for (int n = 0; n < DIM_TILES; n += 2) {
                    unsigned f[4];
                    ldmatrix4_transposed(f, v_lane + stage + 2 * (k * 16 * PITCH + n * 8));
#pragma unroll
                    for (int t = 0; t < ROW_TILES; ++t) {
                        mma<DTYPE>(acc[t][n], a[t], f[0], f[1]);
                        mma<DTYPE>(acc[t][n + 1], a[t], f[2], f[3]);
                    }
                }
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (more) load_v(j0 + KEYS, v_tile);
            copies_commit();
        } else {
            stage ^= TILE_BYTES;
        }
    }
    allow_next_kernel();

    // Out through the warp's own rows of the query tile, which nobody else reads.
    if (warp_row >= rows) return;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = warp_row + t * 16 + half * 8 + lane / 4;
            const int i = positions[r] - past, h = g * group + first_row + r - i * group;
            const bool valid = r < rows;
            const float sink = valid && p.sinks ? __ldg(p.sinks + h) * LOG2E : NEG_INF;
            float log_sum_exp;
            float sum = sums[t][2 * half], rounding = 0.0f;
            if (!SUM_BY_MMA) {
                sum = warp_sum<4>(sum);
                rounding = rounding_of_greatest<DTYPE>(m[t][half], __shfl_sync(FULL_MASK, greatest, lane / 4 * 4 + 2 * t + half));
            }
            const float w = finish(m[t][half], sum, rounding, sink, log_sum_exp);
            if (SCORE_FEATURES && valid && p.lse && lane % 4 == 0) p.lse[(long long)(start + i) * p.heads + h] = log_sum_exp;
            unsigned* row = reinterpret_cast<unsigned*>(shared) + (r * PITCH + 2 * (lane % 4)) / 2;
#pragma unroll
            for (int n = 0; n < DIM_TILES; ++n) row[n * 4] = pack2<DTYPE>(acc[t][n][2 * half] * w, acc[t][n][2 * half + 1] * w);
        }
    __syncwarp();
    const unsigned short* const tile_rows = reinterpret_cast<const unsigned short*>(shared);
    if ((unsigned long long)p.out % 16 == 0 && (p.out_stride | p.head_dim) % 8 == 0) {
        typedef Lanes<DIM, 32> L;
        const int unit = lane % L::ALONG;
        if (unit * 8 < p.head_dim)
#pragma unroll 4
            for (int r = warp_row + lane / L::ALONG; r < min(rows, warp_row + WARP_ROWS); r += L::ROWS) {
                const int i = positions[r] - past, h = g * group + first_row + r - i * group;
                store16(p.out + (start + i) * p.out_stride + h * p.head_dim + unit * 8, load16(tile_rows + r * PITCH + unit * 8));
            }
    } else {
        for (int r = warp_row; r < min(rows, warp_row + WARP_ROWS); ++r) {
            const int i = positions[r] - past, h = g * group + first_row + r - i * group;
            for (int c = lane; c < p.head_dim; c += 32) p.out[(start + i) * p.out_stride + h * p.head_dim + c] = tile_rows[r * PITCH + c];
        }
    }
}
