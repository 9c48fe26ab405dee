// Online softmax (arXiv:1805.02867) in base 2: (m, l, acc) over the keys seen so far, with weights 2^(x − m), x = score · log2 e.
//
// m is a reference, not always the maximum: it may follow the maximum only when that has risen by more than SLACK, since any reference that keeps the
// weights finite gives the same quotient acc / l. Weights then stay at or below 2^SLACK, which f16 holds, and accumulators are rarely rescaled. But the
// greatest weight is then no longer 1, so rounding it to 16 bits for the product with V would cost what a sharp row cannot spare:
// `rounding_of_greatest` gives the difference, by which l follows. (Where l is summed from the rounded weights it follows by itself.)
// m = NOTHING_SEEN, a number below every score, stands for −∞ before the first visible key, so that (−∞) − (−∞) never appears: a score of −∞
// weighs 2^(−∞ + 3e38) = 0, and the first key rescales by 2^(−3e38 − m) = 0 what is 0 already.
#pragma once

#include "prelude.cuh"

#define SOFTMAX_SLACK 8.0f
#define NOTHING_SEEN (-3.0e38f)

// Whether a tile's greatest score moves the reference, which then becomes that score. A row decides by itself, so its bits don't depend on its
// neighbours.
__device__ __forceinline__ bool moves_reference(float m, float top, float slack) { return top > m + slack; }

// What rounding to 16 bits adds to the weight of the greatest score, `top` ≥ m.
template <int DT> __device__ __forceinline__ float rounding_of_greatest(float m, float top) {
    const float weight = exp2_approx(top - m);
    return top < m ? 0.0f : rounded<DT>(weight) - weight;
}

// The end of a row: what acc is multiplied by, and the log-sum-exp (natural logarithm). `sink` is the extra logit in base 2, −∞ without one; it
// joins the denominator here, once. A row that saw no key gives 0, with a sink too; its log-sum-exp is then the sink's. `rounding` is added to l for
// the quotient alone.
__device__ __forceinline__ float finish(float m, float l, float rounding, float sink, float& log_sum_exp) {
    const float top = fmaxf(m, sink);
    const float share = exp2_approx(m - top), total = l * share + exp2_approx(sink - top);
    log_sum_exp = total == 0.0f ? NEG_INF : (top + log2_approx(total)) * LN2;
    return l == 0.0f ? 0.0f : share * reciprocal(fmaf(rounding, share, total));
}

// Four consecutive columns of a row of 16-bit elements, from column c on; those from `columns` on are left out. `wide`: rows are 8-byte aligned and
// `columns` is a multiple of 4.
template <int DT> __device__ __forceinline__ void store_columns(unsigned short* row, int c, int columns, bool wide, const float (&x)[4]) {
    if (wide) {
        if (c < columns) *reinterpret_cast<uint2*>(row + c) = make_uint2(pack2<DT>(x[0], x[1]), pack2<DT>(x[2], x[3]));
    } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (c + e < columns) row[c + e] = from_float<DT>(x[e]);
    }
}

// Counts a block at `counter`, which goes from `last` to 0, and returns how many came before. What blocks wrote before they were counted is visible to
// this block from now on; barriers of the block carry that to and from its other threads.
__device__ __forceinline__ unsigned count_arrival(unsigned* counter, unsigned last) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
    return before;
}

// Merges `count` parts of one row in their order and stores the result: a warp's work. Part i lies at place(i): parts [place, DIM] is its acc, states
// [place, 2] its m and l; a part with l = 0 does not count, whatever its acc holds. Written by other blocks, so both are read past L1.
template <int DT, int DIM, class Place>
__device__ __forceinline__ void merge_parts(const float* parts, const float2* states, int count, const Place& place, float sink, unsigned short* out,
                                            int columns, bool wide, float* log_sum_exp, int lane) {
    constexpr int PASSES = (DIM + 127) / 128, CHUNK = DIM <= 128 ? 16 : 8;
    float m = NOTHING_SEEN, l = 0.0f, weight = 0.0f, acc[PASSES][4] = {};
    float2 state = make_float2(NOTHING_SEEN, 0.0f);
    for (int s = lane; s < count; s += 32) {
        state = __ldcg(states + place(s));
        if (state.y != 0.0f) m = fmaxf(m, state.x);
    }
    // Each chunk's parts are on their way before its weights are needed. A lane's weights are summed in a fixed order.
    for (int first = 0; first < count; first += CHUNK) {
        float4 x[CHUNK][PASSES];
#pragma unroll
        for (int s = 0; s < CHUNK; ++s)
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                const int c = pass * 128 + lane * 4;
                x[s][pass] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (first + s < count && c < DIM) x[s][pass] = __ldcg(reinterpret_cast<const float4*>(parts + (long long)place(first + s) * DIM + c));
            }
        if (first == 0) m = warp_max(m);
        if (first % 32 == 0) {
            const bool inside = first + lane < count;
            if (count > 32 && inside) state = __ldcg(states + place(first + lane));
            weight = inside && state.y != 0.0f ? exp2_approx(state.x - m) : 0.0f;
            if (weight != 0.0f) l = fmaf(state.y, weight, l);
        }
#pragma unroll
        for (int s = 0; s < CHUNK; ++s) {
            const float w = __shfl_sync(FULL_MASK, weight, first % 32 + s);
            if (w != 0.0f) {
#pragma unroll
                for (int pass = 0; pass < PASSES; ++pass) {
                    acc[pass][0] = fmaf(w, x[s][pass].x, acc[pass][0]);
                    acc[pass][1] = fmaf(w, x[s][pass].y, acc[pass][1]);
                    acc[pass][2] = fmaf(w, x[s][pass].z, acc[pass][2]);
                    acc[pass][3] = fmaf(w, x[s][pass].w, acc[pass][3]);
                }
            }
        }
    }
    float whole;
    const float scale = finish(m, warp_sum(l), 0.0f, sink, whole);
    if (log_sum_exp && lane == 0) *log_sum_exp = whole;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const float x[4] = {acc[pass][0] * scale, acc[pass][1] * scale, acc[pass][2] * scale, acc[pass][3] * scale};
        store_columns<DT>(out, pass * 128 + lane * 4, columns, wide, x);
    }
}
