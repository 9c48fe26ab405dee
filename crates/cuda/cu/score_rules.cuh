// What happens to a tile of scores before the softmax, in the accumulators of warp products: rows 0 or 8 ("half") of each fragment of 8 columns.
#pragma once

#include "prelude.cuh"

// Scale, cap and ALiBi of one row: logits in base 2. `position`: the row's less that of the thread's first column. softcap 0: none.
template <int N>
__device__ __forceinline__ void shape_scores(float (&s)[N][4], int half, float scale, float softcap, float inverse_cap, float slope, float position) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float x = s[n][2 * half + e] * scale;
            if (softcap > 0.0f) x = softcap * tanh_accurate(x * inverse_cap);
            s[n][2 * half + e] = x * LOG2E - slope * (position - (float)(n * 8 + e));
        }
}

// Hides the keys outside [begin, begin + wide), `from` being the thread's first column less begin: both bounds in one unsigned comparison.
template <int N> __device__ __forceinline__ void hide_outside(float (&s)[N][4], int half, unsigned from, unsigned wide) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (from + n * 8 + e >= wide) s[n][2 * half + e] = NEG_INF;
}

// Hides the keys inside those bounds that the mask hides, `mask` being its element of the thread's first column.
template <int N>
__device__ __forceinline__ void hide_masked(float (&s)[N][4], int half, unsigned from, unsigned wide, const unsigned char* mask) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (from + n * 8 + e < wide && __ldg(mask + n * 8 + e) == 0) s[n][2 * half + e] = NEG_INF;
}
