// Tiled attention with online softmax for many new tokens on Hopper: what attention_prefill.cu computes, by warpgroup products and the copy engine.
//
//   q [T, H, D] (rows q_stride apart)   cache K, V [B, G, L, D]   out [T, H, D] (rows out_stride apart)   lse [T, H]
//
// Operations: 4·D for each visible pair of query row and key. Bytes: q and out once, K and V once for each tile of query rows, of which all
// but the first reading come from L2. Bound by the tensor cores, beside which the exponential (one for each pair) has to hide.
//
// Rows are packed as in attention_prefill.cu: row R of pair (b, g) is token R / group, head g·group + R mod group. A block stays on its multiprocessor
// and takes one tile of ROWS rows after another; in the first warpgroup one thread has K and V copied, KEYS rows at a time, through rings of STAGES
// tiles that run on from one item to the next. Each other warpgroup owns 64 rows: its product with V runs beside that of the next keys, and both beside
// the exponentials of the others.
// FlashAttention-3 (arXiv:2407.08608); online softmax (arXiv:1805.02867); the rarely moving reference: softmax_state.cuh.
//
// Macros: DTYPE (1 bf16, 2 f16; also the cache's), HEAD_DIM_PADDED (64, 128 or 256, at least D), SCORE_FEATURES (as in attention_prefill.cu).
//
// Needs: D a multiple of 8; q, out, k, v and all strides of them multiples of 16 bytes; sm_90a.
// k_map, v_map: boxes of KEYS rows, or a page where that is less.
//
// Launch, for P = HEAD_DIM_PADDED:
//   block   128 · (1 + ROWS / 64) threads
//   ROWS    P = 64 ? 192 : 128
//   KEYS    P = 256, or P = 64 with SCORE_FEATURES: 64; else 128
//   shared  2·P·(ROWS + 4·KEYS) + 64 + 1024 bytes, dynamic
//   grid    x = min(multiprocessors, tiles · B · G) with tiles = ⌈S_max · (H/G) / ROWS⌉; y = z = 1
//   section as in attention_prefill.cu
#include "prelude.cuh"
#include "prefill_call.cuh"
#include "tile.cuh"
#include "mma_sm90.cuh"
#include "score_rules.cuh"
#include "softmax_state.cuh"

constexpr int DIM = HEAD_DIM_PADDED, STAGES = 2;
constexpr int WARPGROUPS = DIM == 64 ? 3 : 2, ROWS = 64 * WARPGROUPS, THREADS = 128 * (1 + WARPGROUPS);
constexpr int KEYS = DIM == 256 || DIM == 64 && SCORE_FEATURES ? 64 : 128;
constexpr int KEY_TILES = KEYS / 8, DIM_TILES = DIM / 8, BANDS = DIM / 64;
constexpr int Q_BYTES = 64 * 2 * DIM, TILE_BYTES = KEYS * 2 * DIM;  // of one warpgroup's rows; of one tile of K or V
constexpr int UNITS = DIM / 8;  // of a row, 16 bytes each
// Registers of the threads that copy and of those that compute; all together what THREADS threads have at the start.
constexpr int FEW = WARPGROUPS == 3 ? 32 : 24, MANY = WARPGROUPS == 3 ? 160 : 240;

struct Params : CacheMaps, PrefillCall {};

// A tile of query rows of one pair of sequence and key/value head.
struct Item {
    int b, g, start, tokens, past, first_row, rows;

    // The item of this number: sections of pairs one after another; within one the last tiles first, which are the longest where the mask is causal.
    // It has no rows where the sequence is shorter than others.
    __device__ __forceinline__ void take(const Params& p, int number) {
        const int pairs = p.batch * p.kv_heads;
        const int section = number / (p.section * p.tiles);
        const int in_section = number - section * p.section * p.tiles;
        const int width = min(p.section, pairs - section * p.section);
        const int pair = section * p.section + in_section % width;
        b = pair / p.kv_heads, g = pair - b * p.kv_heads;
        start = __ldg(p.starts + b), tokens = __ldg(p.starts + b + 1) - start, past = __ldg(p.past + b);
        first_row = (p.tiles - 1 - in_section / width) * ROWS;
        rows = min(tokens * (p.heads / p.kv_heads) - first_row, ROWS);
    }
    // Of row r, also where r is no row of the item.
    __device__ __forceinline__ int position(const Params& p, int r) const {
        return past + min((first_row + r) / (p.heads / p.kv_heads), tokens - 1);
    }
    // First tile of keys that rows from `first` to `last` see, and the one after the last.
    __device__ __forceinline__ int2 key_tiles(const Params& p, int first, int last) const {
        const int begin = p.window ? max(0, position(p, first) - p.window + 1) : 0;
        const int end = p.causal ? position(p, last) + 1 : past + tokens;
        return make_int2(begin / KEYS, (end + KEYS - 1) / KEYS);
    }
};

// The items of one block: every gridDim.x-th, in turn from the front and from the back, so that no block has all the longest.
struct Items {
    int turn = 0;
    // The next one with rows, if there is one.
    __device__ __forceinline__ bool next(const Params& p, Item& item) {
        while (turn * (int)gridDim.x < p.tiles * p.batch * p.kv_heads) {
            const int number = turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
            ++turn;
            if (number >= p.tiles * p.batch * p.kv_heads) continue;
            item.take(p, number);
            if (item.rows > 0) return true;
        }
        return false;
    }
};

// Where unit u (8 columns) of row r of a warpgroup's 64 query rows lies.
__device__ __forceinline__ unsigned query_unit(int r, int u) { return u / 8 * (64 * 128) + r * 128 + ((u ^ r) & 7) * 16; }

// Of the 4 × 4 words x of four lanes column lane mod 4: word i is x[lane mod 4] of lane i.
__device__ __forceinline__ uint4 quad_transpose(const unsigned (&x)[4], int lane) {
    const bool high = lane & 2, odd = lane & 1;
    // Two columns from this lane and from the one two away, then one of them from these and their neighbours.
    const unsigned own0 = high ? x[2] : x[0], own1 = high ? x[3] : x[1];
    const unsigned far0 = __shfl_xor_sync(FULL_MASK, high ? x[0] : x[2], 2), far1 = __shfl_xor_sync(FULL_MASK, high ? x[1] : x[3], 2);
    const unsigned own = odd ? own1 : own0, far = odd ? far1 : far0;
    const unsigned next = __shfl_xor_sync(FULL_MASK, odd ? own0 : own1, 1), far_next = __shfl_xor_sync(FULL_MASK, odd ? far0 : far1, 1);
    const uint2 near_pair = odd ? make_uint2(next, own) : make_uint2(own, next), far_pair = odd ? make_uint2(far_next, far) : make_uint2(far, far_next);
    return high ? make_uint4(far_pair.x, far_pair.y, near_pair.x, near_pair.y) : make_uint4(near_pair.x, near_pair.y, far_pair.x, far_pair.y);
}

// How far a ring of STAGES tiles has come.
struct Ring {
    unsigned count = 0;
    __device__ __forceinline__ unsigned stage() const { return count % STAGES; }
    __device__ __forceinline__ unsigned parity() const { return count / STAGES & 1; }
};

struct Barriers {
    unsigned first;  // 8 bytes each: K full, K empty, V full, V empty, STAGES of each
    __device__ __forceinline__ unsigned full(int which, unsigned stage) const { return first + 8 * (2 * which * STAGES + stage); }
    __device__ __forceinline__ unsigned empty(int which, unsigned stage) const { return full(which, stage) + 8 * STAGES; }
};

__device__ __forceinline__ void copy_keys(const Params& p, unsigned tiles, const Barriers& barriers) {
    const bool paged = p.cache.table != nullptr;
    const int box = paged ? min(p.cache.page, KEYS) : KEYS;
    Ring ring;
    Items items;
    for (Item item; items.next(p, item);) {
        const int total = item.past + item.tokens;
        const int2 range = item.key_tiles(p, 0, item.rows - 1);
        for (int t = range.x; t < range.y; ++t, ++ring.count) {
            const int first = t * KEYS, boxes = (min(KEYS, total - first) + box - 1) / box;
            for (int which = 0; which < 2; ++which) {
                const unsigned full = barriers.full(which, ring.stage());
                barrier_wait(barriers.empty(which, ring.stage()), ring.parity() ^ 1);
                barrier_expect(full, boxes * box * 2 * DIM);
                const unsigned to = tiles + (which * STAGES + ring.stage()) * TILE_BYTES;
                for (int i = 0; i < boxes; ++i) {
                    int row = first + i * box, outer = item.b;
                    if (paged) {
                        outer = __ldg(p.cache.table + (long long)item.b * p.cache.table_stride + row / p.cache.page);
                        row %= p.cache.page;
                    }
#pragma unroll
                    for (int band = 0; band < BANDS; ++band)
                        copy_box(to + band * KEYS * 128 + i * box * 128, which ? p.v_map : p.k_map, band * 64, row, item.g, outer, full);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_sm90(const __grid_constant__ Params p) {
    extern __shared__ unsigned char shared[];
    const unsigned base = (shared_address(shared) + 1023) & ~1023u;
    const unsigned tiles = base + WARPGROUPS * Q_BYTES;
    const Barriers barriers = {tiles + 2 * STAGES * TILE_BYTES};
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
    if (threadIdx.x == 0) {
        for (int which = 0; which < 2; ++which)
            for (int stage = 0; stage < STAGES; ++stage) {
                barrier_init(barriers.full(which, stage), 1);
                barrier_init(barriers.empty(which, stage), 4 * WARPGROUPS);
            }
        barriers_initialised();
    }
    __syncthreads();
    wait_for_previous_kernel();

    if (threadIdx.x < 128) {
        registers_fewer<FEW>();
        if (threadIdx.x == 0) {
            copy_keys(p, tiles, barriers);
            allow_next_kernel();
        }
    } else {
        registers_more<MANY>();
        const int warpgroup = threadIdx.x / 128 - 1, group = p.heads / p.kv_heads;
        const unsigned q_tile = base + warpgroup * Q_BYTES;
        const unsigned long long tile = tile_descriptor(KEYS);
        const float factor = SCORE_FEATURES ? 1.0f : p.scale * LOG2E;
        const int units = p.head_dim / 8;
        // Where row r of the warpgroup's rows lies in q or out.
        const auto row_offset = [&](const Item& x, long long stride, int r) -> long long {
            const int row = x.first_row + 64 * warpgroup + r, token = row / group;
            return (x.start + token) * stride + (x.g * group + row - token * group) * p.head_dim;
        };
        // Has each warp's 16 query rows copied; those behind the item's become 0.
        const auto copy_queries = [&](const Item& x) {
            if (x.rows <= 64 * warpgroup) return;  // the tile is not read
#pragma unroll
            for (int i = 0; i < 16 * UNITS / 32; ++i) {
                const int r = 16 * warp + (i * 32 + lane) / UNITS, u = lane % UNITS;
                const bool inside = r < x.rows - 64 * warpgroup && u < units;
                copy16_async(q_tile + query_unit(r, u), inside ? p.q + row_offset(x, p.q_stride, r) + u * 8 : p.q, inside);
            }
        };
        // Warpgroups issue their products in turn, one tile each, so that one's exponentials run beside another's products.
        const auto wait_turn = [&]() { named_barrier(8 + warpgroup, 256); };
        const auto end_turn = [&]() { named_arrive(8 + (warpgroup + 1) % WARPGROUPS, 256); };
        if (warpgroup == WARPGROUPS - 1) end_turn();
        Ring ring;
        Items items;
        Item item;
        bool more = items.next(p, item);
        if (more) copy_queries(item);
        while (more) {
            // This warpgroup's rows, which are some of its 64, and where the thread's two are.
            const int first_row = item.first_row + 64 * warpgroup, rows = min(item.rows - 64 * warpgroup, 64);
            const int2 all = item.key_tiles(p, 0, item.rows - 1);
            int2 own = make_int2(all.y, all.y);
            if (rows > 0) own = item.key_tiles(p, 64 * warpgroup, 64 * warpgroup + rows - 1);
            // Its tiles and those of the others: all of them take every turn and arrive at every barrier.
            const auto pass = [&](int count) {
                for (; count > 0; --count, ++ring.count) {
                    wait_turn();
                    end_turn();
                    for (int which = 0; which < 2; ++which) {
                        barrier_wait(barriers.full(which, ring.stage()), ring.parity());
                        if (lane == 0) barrier_arrive(barriers.empty(which, ring.stage()));
                    }
                }
            };
            pass(own.x - all.x);
            if (rows <= 0) {
                more = items.next(p, item);
                if (more) copy_queries(item);
                continue;
            }

            const int total = item.past + item.tokens;
            const int position_first = item.position(p, 64 * warpgroup), position_last = item.position(p, 64 * warpgroup + rows - 1);
            int positions[2];
            [[maybe_unused]] float slopes[2] = {};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = 16 * warp + 8 * half + lane / 4;
                positions[half] = item.position(p, 64 * warpgroup + r);
#if SCORE_FEATURES
                if (p.alibi_slopes) slopes[half] = __ldg(p.alibi_slopes + item.g * group + (first_row + r) % group) * LOG2E;
#endif
            }

            copies_commit();
            copies_wait<0>();
            written_for_async_proxy();
            named_barrier(1 + warpgroup, 128);

            float s[KEY_TILES][4], acc[DIM_TILES][4];
            unsigned weights[KEYS / 16][4];
            // References, sums over the thread's own columns and top scores of the thread's two rows.
            float m[2] = {NOTHING_SEEN, NOTHING_SEEN}, sums[2] = {}, greatest[2] = {NOTHING_SEEN, NOTHING_SEEN}, rescale[2];
#pragma unroll
            for (int n = 0; n < DIM_TILES; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;

            // s = Q · Kᵀ of the ring's tile at `stage`, begun.
            const auto begin_scores = [&](unsigned stage) {
                settle(s);
                products_begin();
#pragma unroll
                for (int k = 0; k < DIM / 16; ++k)
                    product_rows(s, descriptor_at(tile, q_tile + k / 4 * (64 * 128) + k % 4 * 32),
                                 descriptor_at(tile, tiles + stage * TILE_BYTES + k / 4 * (KEYS * 128) + k % 4 * 32), k > 0);
                products_commit();
            };
            // acc += weights · V, begun.
            const auto begin_values = [&](unsigned stage) {
                settle(acc);
                settle(weights);
                products_begin();
#pragma unroll
                for (int k = 0; k < KEYS / 16; ++k)
                    product_columns(acc, weights[k], descriptor_at(tile, tiles + (STAGES + stage) * TILE_BYTES + k * 16 * 128));
                products_commit();
            };
            const auto release = [&](int which, unsigned stage) {
                if (lane == 0) barrier_arrive(barriers.empty(which, stage));
            };
            // Rows behind the valid ones hold anything, and 0 · NaN is NaN.
            const auto clear_behind = [&](int t, unsigned stage) {
                const int valid = total - t * KEYS;
                if (valid >= KEYS) return;
                const unsigned to = tiles + (STAGES + stage) * TILE_BYTES;
                for (int i = thread; i < (KEYS - valid) * UNITS; i += 128) {
                    const int r = valid + i / UNITS, u = i % UNITS;
                    store_shared16(to + u / 8 * (KEYS * 128) + r * 128 + u % 8 * 16, make_uint4(0, 0, 0, 0));
                }
                written_for_async_proxy();
                named_barrier(1 + warpgroup, 128);
            };
            // Scores of the keys of tile t become weights; true when what was summed before must be multiplied by `rescale`.
            const auto weigh = [&](int t) -> bool {
                const int j0 = t * KEYS, column = j0 + 2 * (lane % 4);
#if SCORE_FEATURES
                // The logits in base 2, so that what follows scales by 1.
                const float inverse_cap = p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float position = (float)(positions[half] - column);
                    shape_scores(s, half, p.scale, p.softcap, inverse_cap, slopes[half], position);
                }
#endif
                const bool masked = SCORE_FEATURES && p.mask;
                if (j0 + KEYS > (p.causal ? position_first + 1 : total) || (p.window && j0 <= position_last - p.window) || masked) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int position = positions[half];
                        const int row_begin = p.window ? position - p.window + 1 : 0, row_end = p.causal ? position + 1 : total;
                        const unsigned from = column - row_begin, wide = row_end - row_begin;
                        hide_outside(s, half, from, wide);
#if SCORE_FEATURES
                        const int r = 16 * warp + 8 * half + lane / 4;
                        if (masked && r < rows) {
                            const int i = position - item.past, h = item.g * group + first_row + r - i * group;
                            const unsigned char* mask =
                                p.mask + item.b * p.mask_sequence_stride + h * p.mask_head_stride + i * p.mask_row_stride + column;
                            hide_masked(s, half, from, wide, mask);
                        }
#endif
                    }
                }
                bool moved = false;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float x = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
                    for (int n = 1; n < KEY_TILES; ++n) x = fmaxf(x, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
                    const float top = warp_max<4>(x) * factor;
                    greatest[half] = fmaxf(greatest[half], top);
                    const bool moves = moves_reference(m[half], top, SOFTMAX_SLACK);
                    const float next = moves ? top : m[half];
                    rescale[half] = exp2_approx(m[half] - next);
                    m[half] = next;
                    sums[half] *= rescale[half];
                    moved |= moves;
                }
#pragma unroll
                for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        s[n][e] = exp2_approx(fmaf(s[n][e], factor, -m[e / 2]));
                        sums[e / 2] += s[n][e];
                    }
                return __any_sync(FULL_MASK, moved);
            };
            const auto pack_weights = [&]() {
#pragma unroll
                for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        weights[k][2 * n] = pack2<DTYPE>(s[2 * k + n][0], s[2 * k + n][1]);
                        weights[k][2 * n + 1] = pack2<DTYPE>(s[2 * k + n][2], s[2 * k + n][3]);
                    }
            };

            barrier_wait(barriers.full(0, ring.stage()), ring.parity());
            wait_turn();
            begin_scores(ring.stage());
            end_turn();
            products_wait<0>();
            settle(s);
            release(0, ring.stage());
            weigh(own.x);
            pack_weights();
#pragma unroll 1
            for (int t = own.x + 1; t < own.y; ++t) {
                const Ring before = ring;
                ++ring.count;
                barrier_wait(barriers.full(0, ring.stage()), ring.parity());
                wait_turn();
                begin_scores(ring.stage());
                // All keys of a tile before the last are valid.
                barrier_wait(barriers.full(1, before.stage()), before.parity());
                begin_values(before.stage());
                end_turn();
                products_wait<1>();
                settle(s);
                const bool moved = weigh(t);
                // A sum is never negative. The assembler would wait for the product with V before the exponentials, but moves no wait past an access of
                // memory, and this one has to know the sum.
                if (!(sums[0] + sums[1] < 0.0f)) release(0, ring.stage());
                products_wait<0>();
                settle(acc);
                settle(weights);
                release(1, before.stage());
                if (moved) {
#pragma unroll
                    for (int n = 0; n < DIM_TILES; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) acc[n][e] *= rescale[e / 2];
                }
                pack_weights();
            }
            // Nobody reads these queries any more.
            named_barrier(1 + warpgroup, 128);
            const Item done = item;
            more = items.next(p, item);
            if (more) copy_queries(item);
            barrier_wait(barriers.full(1, ring.stage()), ring.parity());
            clear_behind(own.y - 1, ring.stage());
            begin_values(ring.stage());
            products_wait<0>();
            settle(acc);
            release(1, ring.stage());
            ++ring.count;

#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = 16 * warp + 8 * half + lane / 4;
                const int i = positions[half] - done.past, h = done.g * group + first_row + r - i * group;
                const bool valid = r < rows;
                const float sink = valid && p.sinks ? __ldg(p.sinks + h) * LOG2E : NEG_INF;
                float log_sum_exp;
                const float w = finish(m[half], warp_sum<4>(sums[half]), rounding_of_greatest<DTYPE>(m[half], greatest[half]), sink, log_sum_exp);
                if (SCORE_FEATURES && valid && p.lse && lane % 4 == 0) p.lse[(long long)(done.start + i) * p.heads + h] = log_sum_exp;
                unsigned short* const row = p.out + row_offset(done, p.out_stride, r);
#pragma unroll
                for (int n = 0; n < DIM_TILES; n += 4) {
                    unsigned x[4];
#pragma unroll
                    for (int e = 0; e < 4; ++e) x[e] = pack2<DTYPE>(acc[n + e][2 * half] * w, acc[n + e][2 * half + 1] * w);
                    const uint4 unit = quad_transpose(x, lane);
                    if (valid && n + lane % 4 < units) store16(row + (n + lane % 4) * 8, unit);
                }
            }
            pass(all.y - own.y);
        }
    }
}
