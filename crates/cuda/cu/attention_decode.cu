// Attention for one or a few new tokens of each sequence (decode): the keys are split over blocks, whose partial results are merged.
//
//   q [T, H, D] (rows q_stride apart)   cache K, V [B, G, L, D]   out [T, H, D]   lse [T, H]
//
// Operations: 4·D for each pair of query row and key, 16 rows at a time whether used or not. Bytes: K and V once for each 16 packed query rows. Bound
// by memory: a warp copies its own 16 keys at a time, several steps ahead, and meets no barrier but where an item ends, so that each SM always has tens of
// kilobytes on their way; mma.sync leaves the arithmetic far below the copies even with one row of 16 in use.
//
// The H/G query heads of a key/value head and the sequence's new tokens are packed into rows R = token · group + head in group, ROWS = 16 for each tile.
// The keys that a tile of a sequence's head sees are an item: steps of 16 from a multiple of 16 on. The items of tile y of all sequences and heads, one
// behind another, are one row of steps, of which the blocks of grid row y take even shares: a block stays and reads on across items, so that memory
// never waits for the end of one, and no multiprocessor has more to read than another. Shares follow from the lengths in device memory, so one grid
// serves growing lengths. An item that several blocks share ends in parts; the last of them to arrive merges these in the order of the keys, so the
// result does not depend on which one that is.
// Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html); even shares: Stream-K (arXiv:2301.03598); online softmax: softmax_state.cuh.
//
// Macros: DTYPE (1 bf16, 2 f16; also the cache's), HEAD_DIM_PADDED (P, a multiple of 16 from 16 to 256, at least D), SCORE_FEATURES (0: softcap, alibi
// and mask below must be 0 or null; 1: each is a run-time switch), WARPS and STAGES, at least 2, COPY_ENGINE (1: one thread of a warp has the copy engine
// fetch whole steps, which memory serves faster than the same bytes asked for row by row; 0: every thread copies 16 bytes at a time).
// Pages have 16 rows or more.
//
// COPY_ENGINE needs: k, v and all their strides multiples of 16 bytes; P a multiple of 64; sm_90 or later. k_map, v_map: boxes of 16 rows.
//
// Launch: one block fills an SM with copies on their way, from as few places in memory as possible.
//   block   32·WARPS threads
//   shared  WARPS·(STAGES·step + 16·(P + 8) + 128) + 128 bytes, dynamic, where P > 128 32·P more
//           step = 64·(P + 8); with COPY_ENGINE 64·P + 16, and 1024 bytes more in all
//   grid    x = blocks that share a row of steps, y = ⌈S_max · (H/G) / 16⌉
//   parts   [2·x·y, part_rows, P] f32 and states [2·x·y, part_rows, 2] f32; not touched, nor are counters, when x = 1
#include "prelude.cuh"
#include "decode_steps.cuh"
#include "softmax_state.cuh"

constexpr int THREADS = 32 * WARPS, ROWS = 16;
constexpr int DIM = HEAD_DIM_PADDED, DIM_TILES = DIM / 8, KEY_TILES = STEP / 8;
constexpr int MERGE_ROWS = 4;       // of the warps' sums, which are merged so many at a time
constexpr int SUM_PITCH = DIM + 8;  // floats
constexpr int SUM_BYTES = 4 * MERGE_ROWS * SUM_PITCH;  // of a warp
// Queries are in shared memory where registers have no room for them beside the sums. Where they have, the next item's are on their way while the sums
// are merged; for architectures from 10.0 on the assembler would spill.
constexpr bool SHARED_QUERIES = DIM > 128, EARLY_QUERIES = DIM < 128 || (DIM == 128 && __CUDA_ARCH__ < 1000);
constexpr int QUERY_BYTES = SHARED_QUERIES ? 2 * ROWS * DIM : 0;
constexpr int MERGED_BYTES = 128;  // of what two items of the block share with others
static_assert(DIM % 16 == 0 && DIM <= 256 && STAGES >= 2, "whole fragments, one step ahead");

struct DecodeCall {
    const unsigned short* q;    // token t, head h at t·q_stride + h·head_dim
    unsigned short* out;        // the same with out_stride
    float* lse;                 // [T, H], natural logarithm, sinks included; null: not wanted
    float* parts;               // of each block: of the item that it goes on with, then of one that it begins and does not end; 16-byte aligned
    float2* states;             // m in base 2 and l
    unsigned* counters;         // [B, y, G], 0 before the first launch and after each
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
    int sequences;  // B
    int causal;     // 0 or 1
    int window;     // 0: none; else a query at position i sees keys from i − window + 1 on
    int part_rows;  // min(S_max · (H/G), 16)
    int reserved;
};
struct Params : StepSource, DecodeCall {};

// What one tile of a sequence's rows sees, the same for each of its heads.
struct Sequence {
    int start, tokens, past;  // first new token, new tokens, rows of the cache before them
    int rows;                 // of queries in the tile; none if 0 or less
    int keys_begin, steps;    // first key, a multiple of STEP; steps of STEP keys
};

// An item: keys of one head of one sequence, at steps [at, at + steps) counted from the first of the block's share.
struct Item {
    int b, g, at;
    Sequence sequence;
};

// An item that blocks share, and which of the row's.
struct SharedItem {
    Item item;
    int first_block, parts;
};
static_assert(2 * (sizeof(SharedItem) + sizeof(int)) <= MERGED_BYTES, "two items and which of them this block merges");

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int group = p.heads / p.kv_heads, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    unsigned char* const tiles = shared + (-shared_address(shared) & (Steps::ALIGNMENT - 1));
    float* const sums = reinterpret_cast<float*>(tiles + WARPS * Steps::BYTES);                         // [WARPS, MERGE_ROWS, SUM_PITCH]
    float2* const warp_states = reinterpret_cast<float2*>(tiles + WARPS * (Steps::BYTES + SUM_BYTES));  // [WARPS, ROWS]
    SharedItem* const shared_items = reinterpret_cast<SharedItem*>(warp_states + WARPS * ROWS);  // at most 2: what the share begins and ends with
    int* const last = reinterpret_cast<int*>(shared_items + 2);                                  // [2], whether this block came last to them
    [[maybe_unused]] uint4* const queries = reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(shared_items) + MERGED_BYTES);  // fragments [P / 16, lane]
    Steps steps(p, p.cache, p.head_dim, shared_address(tiles) + warp * Steps::BYTES,
                shared_address(queries) + QUERY_BYTES + warp * Steps::BARRIER_BYTES, lane);
    wait_for_previous_kernel();
    // Token of row r of the tile, and its head.
    const auto token_of = [&](int r) { return int(blockIdx.y * ROWS + r) / group; };
    const auto head_of = [&](const Item& i, int r) { return i.g * group + int(blockIdx.y * ROWS + r) % group; };
    const int first_token = token_of(0), last_token = token_of(ROWS - 1);

    const auto sequence_at = [&](int b) {
        Sequence s;
        s.start = __ldg(p.starts + b), s.tokens = __ldg(p.starts + b + 1) - s.start, s.past = __ldg(p.past + b);
        s.rows = min(s.tokens * group - int(blockIdx.y) * ROWS, ROWS);
        s.keys_begin = (p.window ? max(0, s.past + first_token - p.window + 1) : 0) / STEP * STEP;
        const int keys_end = s.past + (p.causal ? min(last_token + 1, s.tokens) : s.tokens);
        s.steps = s.rows > 0 ? (keys_end - s.keys_begin + STEP - 1) / STEP : 0;
        return s;
    };
    // The item behind `i`; there must be one.
    const auto next_item = [&](Item& i) {
        i.at += i.sequence.steps;
        if (++i.g < p.kv_heads) return;
        i.g = 0;
        do i.sequence = sequence_at(++i.b);
        while (i.sequence.steps == 0);
    };

    // All steps of this row of blocks, and this block's share: `count` of them from `begin` on. Fewer than a step for each warp would leave warps idle.
    const auto steps_of = [&](int b) -> unsigned { return b < p.sequences ? sequence_at(b).steps * p.kv_heads : 0; };
    unsigned own = 0, total = 0;
    for (int b = lane; b < p.sequences; b += 32) total += own = steps_of(b);
    total = __reduce_add_sync(FULL_MASK, total);
    const unsigned sharing = min(gridDim.x, max(total / WARPS, 1u)), quotient = total / sharing, rest = total % sharing;
    if (blockIdx.x >= sharing || total == 0) return;
    const auto begin_of = [&](unsigned block) { return block * quotient + block * rest / sharing; };
    const auto block_of = [&](unsigned step) {
        unsigned block = min(step / quotient, sharing - 1);
        while (begin_of(block) > step) --block;
        return block;
    };
    const unsigned begin = begin_of(blockIdx.x);
    const int count = begin_of(blockIdx.x + 1) - begin;

    // The item that has step `begin`.
    Item item;
    item.b = 0;
    unsigned before = 0;  // steps of the sequences before item.b
    for (int first = 0; p.sequences > 1; first += 32) {
        if (p.sequences > 32) own = steps_of(first + lane);
        unsigned up_to = own;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const unsigned x = __shfl_up_sync(FULL_MASK, up_to, o);
            if (lane >= o) up_to += x;
        }
        const unsigned reach = __ballot_sync(FULL_MASK, before + up_to > begin);
        if (reach) {
            item.b = first + __ffs(reach) - 1;
            before += __shfl_sync(FULL_MASK, up_to - own, item.b);
            break;
        }
        before += __shfl_sync(FULL_MASK, up_to, 31);
    }
    item.sequence = sequence_at(item.b);
    item.g = (begin - before) / item.sequence.steps;
    item.at = before + item.g * item.sequence.steps - begin;

    // The next step to load, and the item that it belongs to.
    int ahead = warp;
    Item ahead_item = item;
    const auto first_ahead = [&] { return ahead_item.sequence.keys_begin + (ahead - ahead_item.at) * STEP; };
    const auto find_ahead = [&] {
        if (ahead >= count) return;
        while (ahead >= ahead_item.at + ahead_item.sequence.steps) next_item(ahead_item);
        steps.find(ahead_item.b, ahead_item.g, first_ahead());
    };
    const auto load_ahead = [&] {
        steps.load(ahead_item.g, ahead_item.sequence.past + ahead_item.sequence.tokens - first_ahead(), ahead < count);
        ahead += WARPS;
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) {
        find_ahead();
        load_ahead();
    }
    find_ahead();

    int shared_count = 0;
    const bool q_wide = (unsigned long long)p.q % 4 == 0 && (p.q_stride | p.head_dim) % 2 == 0;
    const bool out_wide = (unsigned long long)p.out % 8 == 0 && (p.out_stride | p.head_dim) % 4 == 0;
    const float factor = SCORE_FEATURES ? 1.0f : fabsf(p.scale) * LOG2E;
    // Of the parts, those of items that the blocks go on with come first.
    const int blocks = gridDim.x * gridDim.y, row_of_blocks = blockIdx.y * gridDim.x;
    const auto parts_of = [&](int block, bool begun) { return (row_of_blocks + block + (begun ? blocks : 0)) * p.part_rows; };

    int step = warp;
    float acc[DIM_TILES][4], m[2], l[2] = {};
    Item done = item;  // whose sums are in acc, m and l; none yet
    done.sequence.rows = 0;
#pragma unroll 1
    for (int end = 0;;) {
        // Rows lane / 4 and 8 further: their queries as A fragments, positions, slopes.
        unsigned q[SHARED_QUERIES ? 1 : DIM / 16][4];
        int position[2];
        [[maybe_unused]] float slope[2];
        const auto load_queries = [&] {
            const Sequence& s = item.sequence;
            const unsigned short* row[2];
            int columns[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = lane / 4 + 8 * half, i = min(token_of(r), s.tokens - 1), h = head_of(item, r);
                position[half] = s.past + i;
#if SCORE_FEATURES
                slope[half] = p.alibi_slopes ? __ldg(p.alibi_slopes + h) * LOG2E : 0.0f;
#endif
                row[half] = p.q + (s.start + i) * p.q_stride + h * p.head_dim + 2 * (lane % 4);
                columns[half] = r < s.rows ? p.head_dim - 2 * (lane % 4) : 0;
            }
            const auto fragment = [&](unsigned (&f)[4], int k) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int half = e % 2, c = k * 16 + e / 2 * 8;
                    if (q_wide) {
                        f[e] = c < columns[half] ? __ldg(reinterpret_cast<const unsigned*>(row[half] + c)) : 0;
                    } else {
                        const unsigned low = c < columns[half] ? __ldg(row[half] + c) : 0, high = c + 1 < columns[half] ? __ldg(row[half] + c + 1) : 0;
                        f[e] = low | high << 16;
                    }
                }
            };
            if constexpr (SHARED_QUERIES) {
                for (int k = warp; k < DIM / 16; k += WARPS) {
                    unsigned f[4];
                    fragment(f, k);
                    queries[k * 32 + lane] = make_uint4(f[0], f[1], f[2], f[3]);
                }
                __syncthreads();
            } else {
#pragma unroll
                for (int k = 0; k < DIM / 16; ++k) fragment(q[k], k);
            }
        };
        if (EARLY_QUERIES && end < count) load_queries();

        // The warps' sums, in the order of the warps; the keys behind them are on their way meanwhile.
        const bool whole = done.at >= 0 && done.at + done.sequence.steps <= count;
        const int part = parts_of(blockIdx.x, done.at >= 0);
        l[0] = warp_sum<4>(l[0]), l[1] = warp_sum<4>(l[1]);
#pragma unroll 1
        for (int first = 0; first < done.sequence.rows; first += MERGE_ROWS) {
            __syncthreads();  // what was merged before has been read
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = lane / 4 + 8 * half;
                if (first == 0 && lane % 4 == 0) warp_states[warp * ROWS + r] = make_float2(m[half], l[half]);
                if (r < first || r >= first + MERGE_ROWS) continue;
#pragma unroll
                for (int n = 0; n < DIM_TILES; ++n)
                    *reinterpret_cast<float2*>(sums + (warp * MERGE_ROWS + r - first) * SUM_PITCH + n * 8 + 2 * (lane % 4)) =
                        make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
            }
            __syncthreads();
#pragma unroll 1
            for (int i = thread; i < min(done.sequence.rows - first, MERGE_ROWS) * (DIM / 4); i += THREADS) {
                const int r = first + i / (DIM / 4), c = i % (DIM / 4) * 4;
                float top = NOTHING_SEEN;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) top = fmaxf(top, warp_states[w * ROWS + r].x);
                float sum = 0.0f, x[4] = {};
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    const float2 state = warp_states[w * ROWS + r];
                    const float weight = exp2_approx(state.x - top);
                    const float4 y = *reinterpret_cast<const float4*>(sums + (w * MERGE_ROWS + r - first) * SUM_PITCH + c);
                    sum = fmaf(state.y, weight, sum);
                    x[0] = fmaf(y.x, weight, x[0]);
                    x[1] = fmaf(y.y, weight, x[1]);
                    x[2] = fmaf(y.z, weight, x[2]);
                    x[3] = fmaf(y.w, weight, x[3]);
                }
                if (whole) {
                    const int t = done.sequence.start + token_of(r), h = head_of(done, r);
                    float log_sum_exp;
                    const float scale = finish(top, sum, 0.0f, p.sinks ? __ldg(p.sinks + h) * LOG2E : NEG_INF, log_sum_exp);
                    if (p.lse && c == 0) p.lse[(long long)t * p.heads + h] = log_sum_exp;
#pragma unroll
                    for (int e = 0; e < 4; ++e) x[e] *= scale;
                    store_columns<DTYPE>(p.out + t * p.out_stride + h * p.head_dim, c, p.head_dim, out_wide, x);
                } else {
                    __stcg(reinterpret_cast<float4*>(p.parts + (part + r) * DIM + c), make_float4(x[0], x[1], x[2], x[3]));
                    if (c == 0) __stcg(p.states + part + r, make_float2(top, sum));
                }
            }
        }
        if (end == count) break;
        if (!EARLY_QUERIES) {
            if (done.sequence.rows > 0) next_item(item);
            load_queries();
        }
        const Sequence s = item.sequence;

        end = min(item.at + s.steps, count);
        if (item.at < 0 || item.at + s.steps > count) {
            if (thread == 0) {
                const unsigned first = block_of(begin + item.at);
                shared_items[shared_count] = SharedItem{item, int(first), int(block_of(begin + item.at + s.steps - 1) - first + 1)};
            }
            ++shared_count;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            m[half] = NOTHING_SEEN, l[half] = 0.0f;
#pragma unroll
            for (int n = 0; n < DIM_TILES; ++n) acc[n][2 * half] = acc[n][2 * half + 1] = 0.0f;
        }
        // Keys before `all_end` and from `all_begin` on are visible to every row.
        const int total_keys = s.past + s.tokens;
        const int all_end = p.causal ? s.past + first_token + 1 : total_keys;
        const int all_begin = p.window ? s.past + min(last_token, s.tokens - 1) - p.window + 1 : 0;
#pragma unroll 1
        for (; step < end; step += WARPS) {
            steps.wait_for_keys();
            load_ahead();  // into the stage that the previous pass read
            find_ahead();

            float x[KEY_TILES][4] = {};
#pragma unroll
            for (int k = 0; k < DIM / 16; ++k) {
                unsigned a[4];
                if constexpr (SHARED_QUERIES) {
                    const uint4 f = queries[k * 32 + lane];
                    a[0] = f.x, a[1] = f.y, a[2] = f.z, a[3] = f.w;
                } else {
#pragma unroll
                    for (int e = 0; e < 4; ++e) a[e] = q[k][e];
                }
#pragma unroll
                for (int n = 0; n < KEY_TILES; n += 2) {
                    unsigned f[4];
                    ldmatrix4(f, steps.keys(n, k));
                    mma<DTYPE>(x[n], a, f[0], f[1]);
                    mma<DTYPE>(x[n + 1], a, f[2], f[3]);
                }
            }
            const int j0 = s.keys_begin + (step - item.at) * STEP, column = j0 + 2 * (lane % 4);
#if SCORE_FEATURES
            const float inverse_cap = p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f;
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float y = x[n][e] * p.scale;
                    if (p.softcap > 0.0f) y = p.softcap * tanh_accurate(y * inverse_cap);
                    x[n][e] = y * LOG2E - slope[e / 2] * (float)(position[e / 2] - (column + n * 8 + e % 2));
                }
#else
            if (p.scale < 0.0f) {
#pragma unroll
                for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) x[n][e] = -x[n][e];
            }
#endif
            const bool masked = SCORE_FEATURES && p.mask;
            if (j0 + STEP > all_end || j0 < all_begin || masked) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row_begin = p.window ? position[half] - p.window + 1 : 0, row_end = p.causal ? position[half] + 1 : total_keys;
                    const unsigned from = column - row_begin, wide = row_end - row_begin;
                    [[maybe_unused]] const int r = lane / 4 + 8 * half;
#pragma unroll
                    for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            bool visible = from + n * 8 + e < wide;
#if SCORE_FEATURES
                            if (visible && masked && r < s.rows)
                                visible = __ldg(p.mask + item.b * p.mask_sequence_stride + head_of(item, r) * p.mask_head_stride +
                                                (position[half] - s.past) * p.mask_row_stride + column + n * 8 + e) != 0;
#endif
                            if (!visible) x[n][2 * half + e] = NEG_INF;
                        }
                }
            }

            float top[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float y = NEG_INF;
#pragma unroll
                for (int n = 0; n < KEY_TILES; ++n) y = fmaxf(y, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
                top[half] = warp_max<4>(y) * factor;
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
            steps.wait_for_values(total_keys - j0);
            unsigned weights[4];
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    x[n][e] = exp2_approx(fmaf(x[n][e], factor, -m[e / 2]));
                    l[e / 2] += x[n][e];
                }
                weights[2 * n] = pack2<DTYPE>(x[n][0], x[n][1]);
                weights[2 * n + 1] = pack2<DTYPE>(x[n][2], x[n][3]);
            }
#pragma unroll
            for (int n = 0; n < DIM_TILES; n += 2) {
                unsigned f[4];
                ldmatrix4_transposed(f, steps.values(n));
                mma<DTYPE>(acc[n], weights, f[0], f[1]);
                mma<DTYPE>(acc[n + 1], weights, f[2], f[3]);
            }
            steps.advance();
        }
        done = item;
        if (end == count) allow_next_kernel();
        else if (EARLY_QUERIES) next_item(item);
    }

    // The last block to arrive at a shared item merges its parts. The counter wraps to 0, ready for the next launch.
    if (shared_count == 0) return;
    __syncthreads();
    if (thread < shared_count) {
        const SharedItem& i = shared_items[thread];
        unsigned* const counter = p.counters + ((long long)i.item.b * gridDim.y + blockIdx.y) * p.kv_heads + i.item.g;
        last[thread] = count_arrival(counter, i.parts - 1) == i.parts - 1;
    }
    __syncthreads();
    for (int n = warp; n < shared_count * ROWS; n += WARPS) {
        const int which = n / ROWS, r = n % ROWS;
        const SharedItem& i = shared_items[which];
        if (!last[which] || r >= i.item.sequence.rows) continue;
        const int t = i.item.sequence.start + token_of(r), h = head_of(i.item, r);
        const auto place = [&](int part) { return parts_of(i.first_block + part, part == 0) + r; };
        merge_parts<DTYPE, DIM>(p.parts, p.states, i.parts, place, p.sinks ? __ldg(p.sinks + h) * LOG2E : NEG_INF,
                                p.out + t * p.out_stride + h * p.head_dim, p.head_dim, out_wide,
                                p.lse ? p.lse + (long long)t * p.heads + h : nullptr, lane);
    }
}
