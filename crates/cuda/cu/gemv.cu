// y = W · x (+ bias) (+ c) for one row x [K]: W [N, K] and x in DTYPE; bias, c and y [N] in DTYPE or in f32.
//
// Operations: 2·N·K. Bytes: N·K elements of W, each read once; memory bounds it.
//
// A block stays and takes an even share of the rows of W. Each thread copies pieces of 16 bytes of them into a ring of its own in shared
// memory, STAGES − 1 steps ahead of what it multiplies, from one row on into the next. W depends on no kernel before this one, so that the ring
// fills while that one still runs. p.lanes threads share a row; sums over k are f32 in an order that never changes.
//
// Macros: DTYPE.
#include "prelude.cuh"
#include "tile.cuh"

#ifndef DTYPE
#define DTYPE 1
#endif

struct Params {
    const void* x;      // [K]
    const void* w;      // [N, K]
    const void* bias;   // [N] or null
    const void* c;      // [N] or null; may be y
    void* y;            // [N]
    long long w_stride; // elements between rows of w; it, K and the addresses of x and w are multiples of 16 bytes
    int outputs;        // N
    int inputs;         // K
    int lanes;          // threads of a row: a power of two, 32 … THREADS
    int wide;           // whether bias, c and y are f32
};

typedef typename Element<DTYPE>::T T;
constexpr int VEC = Wide<DTYPE>::N;
constexpr int THREADS = 256, WARPS = THREADS / 32;
// Rows of W that a thread multiplies in a step, and how many steps the ring holds.
constexpr int ROWS = 2, STAGES = 4;
// Steps over rows whose sums are kept before they are added up across warps.
constexpr int KEPT = 16;

template <int OUT> __device__ __forceinline__ void finish(const Params& p, int n, float v) {
    typedef typename Element<OUT>::T Out;
    if (p.bias) v += to_float<OUT>(((const Out*)p.bias)[n]);
    if (p.c) v += to_float<OUT>(((const Out*)p.c)[n]);
    ((Out*)p.y)[n] = from_float<OUT>(v);
}

// Grid: at most the blocks that run at once. Block: THREADS threads, the ring in dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 2) gemv(const __grid_constant__ Params p) {
    extern __shared__ uint4 ring[]; // [STAGES, ROWS, THREADS]
    __shared__ float sums[KEPT][WARPS][ROWS];
    const int lane = threadIdx.x % p.lanes, group = threadIdx.x / p.lanes, groups = THREADS / p.lanes;
    const int pieces = p.inputs / VEC, turns = (pieces + p.lanes - 1) / p.lanes;
    // A unit is the rows of a step of all groups.
    const int unit_rows = groups * ROWS, units = (p.outputs + unit_rows - 1) / unit_rows;
    const int begin = (long long)units * blockIdx.x / gridDim.x, end = (long long)units * (blockIdx.x + 1) / gridDim.x;

    int next_unit = begin, next_turn = 0;
    auto copy = [&](int stage) {
        if (next_unit < end) {
            const int piece = next_turn * p.lanes + lane;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                // Rows behind the last are the last one again; pieces behind the last are 0.
                const int row = min((next_unit * groups + group) * ROWS + r, p.outputs - 1);
                const unsigned to = shared_address(ring + (stage * ROWS + r) * THREADS + threadIdx.x);
                copy16_async(to, (const T*)p.w + row * p.w_stride + piece * VEC, piece < pieces);
            }
            if (++next_turn == turns) next_turn = 0, ++next_unit;
        }
        copies_commit();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) copy(stage);
    wait_for_previous_kernel();
    allow_next_kernel();

    float sum[ROWS] = {};
    int turn = 0, unit = begin, stage = 0;
    while (unit < end) {
        copies_wait<STAGES - 2>();
        // Into what was multiplied in the step before.
        copy(stage ? stage - 1 : STAGES - 1);
        const int piece = turn * p.lanes + lane;
        Packed<DTYPE, VEC> packed;
        packed.clear();
        if (piece < pieces) packed.read((const T*)p.x + piece * VEC);
        float u[VEC], v[VEC];
        packed.unpack(u);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            packed.v[0] = ring[(stage * ROWS + r) * THREADS + threadIdx.x];
            packed.unpack(v);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum[r] = fmaf(v[j], u[j], sum[r]);
        }
        stage = stage == STAGES - 1 ? 0 : stage + 1;
        if (++turn < turns) continue;
        turn = 0;
        const int kept = (unit - begin) % KEPT;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float all = warp_sum(sum[r]);
            if (threadIdx.x % 32 == 0) sums[kept][threadIdx.x / 32][r] = all;
            sum[r] = 0.0f;
        }
        ++unit;
        if (kept < KEPT - 1 && unit < end) continue;
        __syncthreads();
        const int rows = (kept + 1) * unit_rows, first = (unit - kept - 1) * unit_rows, warps = p.lanes / 32;
        for (int i = threadIdx.x; i < rows && first + i < p.outputs; i += THREADS) {
            const int own = i % unit_rows;
            float all = 0.0f;
            for (int w = 0; w < warps; ++w) all += sums[i / unit_rows][own / ROWS * warps + w][own % ROWS];
            if (p.wide) finish<F32>(p, first + i, all);
            else finish<DTYPE>(p, first + i, all);
        }
        __syncthreads();
    }
}
