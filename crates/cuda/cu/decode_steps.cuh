// How one warp of attention_decode.cu gets its keys and values: steps of STEP rows, in a ring of STAGES steps in shared memory that is the warp's own.
//
// With COPY_ENGINE one lane has the copy engine fetch each tile, as copy_engine.cuh lays them: memory serves whole steps faster than the same bytes
// asked for by their rows. Otherwise each lane copies 16 bytes at a time, or elements where rows are not aligned, as tile.cuh lays them.
//
// Macros: HEAD_DIM_PADDED, STAGES, COPY_ENGINE.
#pragma once

#include "cache.cuh"
#include "mma_sm80.cuh"
#include "tile.cuh"
#if COPY_ENGINE
#include "copy_engine.cuh"
#endif

constexpr int STEP = 16;  // `DECODE_STEP` on the host

// `Steps` of both ways: find(b, g, j) names the next step to copy, load(g, valid, inside) begins to copy it, of which `valid` rows are valid, or nothing;
// wait_for_keys() and wait_for_values(valid) wait for the step to read, keys(n, k) and values(n) are where ldmatrix reads it, advance() goes on to the next.

#if COPY_ENGINE

struct StepSource : CacheMaps {};

struct Steps {
    static_assert(HEAD_DIM_PADDED % 64 == 0, "whole bands");
    static constexpr int BAND_BYTES = 128 * STEP, BANDS = HEAD_DIM_PADDED / 64, TILE_BYTES = BANDS * BAND_BYTES, STAGE_BYTES = 2 * TILE_BYTES;
    static constexpr int BYTES = STAGES * STAGE_BYTES, BARRIER_BYTES = 16 * STAGES, ALIGNMENT = 1024;  // of a warp
    const StepSource& maps;
    const Cache& cache;
    unsigned first, barriers;
    int lane;
    int stage = 0, ahead = 0;  // to read, and to copy to
    unsigned parity = 0;       // of the barriers of `stage`
    int row, outer;            // of the next step to copy

    // `first`: BYTES of shared memory, at a multiple of ALIGNMENT; `barriers`: BARRIER_BYTES.
    __device__ __forceinline__ Steps(const StepSource& maps, const Cache& cache, int, unsigned first, unsigned barriers, int lane)
        : maps(maps), cache(cache), first(first), barriers(barriers), lane(lane) {
        if (lane == 0) {
            prefetch_map(maps.k_map), prefetch_map(maps.v_map);
            for (int i = 0; i < 2 * STAGES; ++i) barrier_init(barriers + 8 * i, 1);
            barriers_initialised();
        }
        __syncwarp();
    }
    __device__ __forceinline__ unsigned tile(int stage, int which) const { return first + stage * STAGE_BYTES + which * TILE_BYTES; }
    __device__ __forceinline__ unsigned barrier(int stage, int which) const { return barriers + 8 * (2 * stage + which); }

    // The next step to copy begins with row j, a multiple of STEP, of head g of sequence b.
    __device__ __forceinline__ void find(int b, int g, int j) {
        row = j, outer = b;
        if (cache.table) {
            const int shift = 31 - __clz(cache.page);
            outer = __ldg(cache.table + (long long)b * cache.table_stride + (j >> shift));
            row = j & (cache.page - 1);
        }
    }
    // Copies it; nothing if `inside` is false.
    __device__ __forceinline__ void load(int g, int, bool inside) {
        __syncwarp();  // every lane has read the stage
        if (inside && lane == 0) {
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                barrier_expect(barrier(ahead, which), TILE_BYTES);
#pragma unroll
                for (int band = 0; band < BANDS; ++band)
                    copy_box(tile(ahead, which) + band * BAND_BYTES, which ? maps.v_map : maps.k_map, band * 64, row, g, outer, barrier(ahead, which));
            }
        }
        ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
    }
    __device__ __forceinline__ void wait_for_keys() const { barrier_wait(barrier(stage, 0), parity); }
    // Of which `valid` are valid: what lies behind is cleared, since it holds anything, and 0 · NaN is NaN.
    __device__ __forceinline__ void wait_for_values(int valid) const {
        barrier_wait(barrier(stage, 1), parity);
        if (valid >= STEP) return;
        for (int i = valid * 8 + lane; i < STEP * 8; i += 32)
            for (int band = 0; band < BANDS; ++band) store_shared16(tile(stage, 1) + band * BAND_BYTES + i * 16, make_uint4(0, 0, 0, 0));
        written_for_async_proxy();  // the engine fills this stage again
        __syncwarp();
    }
    // Where the lane reads for ldmatrix4: of keys 8·n … 8·n + 15 the columns 16·k … 16·k + 15, as lane_offset_b; n is even.
    __device__ __forceinline__ unsigned keys(int n, int k) const {
        const unsigned at = tile(stage, 0) + (lane % 8 + lane / 16 * 8) * 128 + (lane / 8 % 2 ^ lane % 8) * 16;
        return (at ^ k % 4 * 32) + k / 4 * BAND_BYTES + n * 8 * 128;
    }
    // For ldmatrix4_transposed: of the values the columns 8·n … 8·n + 15, as lane_offset_b_transposed; n is even.
    __device__ __forceinline__ unsigned values(int n) const {
        const unsigned at = tile(stage, 1) + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
        return (at ^ n % 8 * 16) + n / 8 * BAND_BYTES;
    }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

#else

struct StepSource {};

struct Steps {
    static constexpr int PITCH = tile_pitch(HEAD_DIM_PADDED), TILE_BYTES = 2 * PITCH * STEP, STAGE_BYTES = 2 * TILE_BYTES;
    static constexpr int BYTES = STAGES * STAGE_BYTES, BARRIER_BYTES = 0, ALIGNMENT = 16;
    struct Rows {
        const unsigned short* base;
        long long stride;
        __device__ __forceinline__ const unsigned short* operator()(int r, bool) const { return base + r * stride; }
    };
    const Cache& cache;
    unsigned first, k_lane, v_lane;
    int head_dim, lane;
    bool wide;
    int stage = 0, ahead = 0;
    long long offset;

    __device__ __forceinline__ Steps(const StepSource&, const Cache& cache, int head_dim, unsigned first, unsigned, int lane)
        : cache(cache), first(first), head_dim(head_dim), lane(lane) {
        k_lane = first + 2 * lane_offset_b(lane, PITCH), v_lane = first + TILE_BYTES + 2 * lane_offset_b_transposed(lane, PITCH);
        wide = (((unsigned long long)cache.k | (unsigned long long)cache.v) % 16 == 0) && head_dim % 8 == 0 &&
               (cache.sequence_stride | cache.head_stride | cache.row_stride) % 8 == 0;
    }
    __device__ __forceinline__ void find(int b, int g, int j) {
        offset = cache.table ? cache_row<1>(cache, b, g, j) : cache_row<0>(cache, b, g, j);  // a page has whole steps
    }
    __device__ __forceinline__ void load(int, int valid, bool inside) {
        const unsigned to = first + ahead * STAGE_BYTES;
        if (inside) {
            load_tile<STEP, HEAD_DIM_PADDED, 32>(to, valid, head_dim, wide, lane, Rows{(const unsigned short*)cache.k + offset, cache.row_stride});
            copies_commit();
            load_tile<STEP, HEAD_DIM_PADDED, 32>(to + TILE_BYTES, valid, head_dim, wide, lane,
                                                 Rows{(const unsigned short*)cache.v + offset, cache.row_stride});
        } else {
            copies_commit();
        }
        copies_commit();
        ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
    }
    // The steps behind are on their way, of this one the values too.
    __device__ __forceinline__ void wait_for_keys() const { copies_wait<2 * STAGES - 3>(), __syncwarp(); }
    __device__ __forceinline__ void wait_for_values(int) const { copies_wait<2 * STAGES - 2>(), __syncwarp(); }
    __device__ __forceinline__ unsigned keys(int n, int k) const { return k_lane + stage * STAGE_BYTES + 2 * (n * 8 * PITCH + k * 16); }
    __device__ __forceinline__ unsigned values(int n) const { return v_lane + stage * STAGE_BYTES + 2 * n * 8; }
    __device__ __forceinline__ void advance() { stage = stage + 1 == STAGES ? 0 : stage + 1; }
};

#endif
