// Rotary position embedding: the angles and the pairs (Su et al. 2021, arXiv 2104.09864).
#pragma once
#include "prelude.cuh"

// sin and cos of an angle, 0 <= angle < 2^31, absolute error below 1e-7. The angle stays in f64 until it is reduced to
// [-pi/4, pi/4], so that the error does not grow with the position; the polynomials then need f32 alone. No table: it would grow
// with the longest position, and a handful of f64 operations per pair hide behind the loads of the heads that share them.
__device__ __forceinline__ void sincos_of(double angle, float& sine, float& cosine) {
    const double n = rint(angle * 0.63661977236758134308);
    double reduced = fma(-n, 1.5707963267948965580, angle);
    reduced = fma(-n, 6.1232339957367658860e-17, reduced);
    const unsigned quadrant = (unsigned)(long long)n;
    const float r = (float)reduced, z = r * r;
    float s = fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f);
    s = fmaf(s, z, -1.6666654611e-1f);
    s = fmaf(s * z, r, r);
    float c = fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
    c = fmaf(c, z, 4.166664568298827e-2f);
    c = fmaf(c, z * z, fmaf(-0.5f, z, 1.0f));
    sine = (quadrant & 1) ? c : s;
    cosine = (quadrant & 1) ? s : c;
    if (quadrant & 2) sine = -sine;
    if ((quadrant + 1) & 2) cosine = -cosine;
}

// A head's row is cut into items of two chunks of N elements, such that an item holds N whole pairs: a thread rotates without
// talking to others. Item c holds pairs c·N … c·N + N - 1 in both layouts; items past the rotated ones hold the rest.
// Layout half needs rotary_dim/2 to be a multiple of N; D is one in both.
template <int N> struct Item {
    int a, b;       // first element of each chunk
    int pairs;      // how many of its N pairs turn
    bool has_a, has_b;

    Item() = default;
    __device__ __forceinline__ Item(int c, int head_dim, int rotary_dim, int interleaved) {
        const int half = rotary_dim / 2;
        pairs = min(max(half - c * N, 0), N);
        const bool across = !interleaved && pairs > 0;
        a = across ? c * N : 2 * c * N;
        b = a + (across ? half : N);
        has_a = a < head_dim;
        has_b = b < head_dim;
    }
};

template <int N> struct Angles {
    float sine[N], cosine[N];

    // frequencies f64 [rotary_dim/2]
    __device__ __forceinline__ void compute(const double* frequencies, int c, int pairs, int position, float factor) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            sine[j] = 0.0f;
            cosine[j] = 1.0f;
            if (j < pairs) {
                sincos_of((double)position * __ldg(frequencies + c * N + j), sine[j], cosine[j]);
                sine[j] *= factor;
                cosine[j] *= factor;
            }
        }
    }

    // Pairs that do not turn keep their bits, so that an infinity beside them stays one.
    __device__ __forceinline__ void rotate(float (&a)[N], float (&b)[N], int pairs, int interleaved) const {
        if (N > 1 && interleaved) {
#pragma unroll
            for (int j = 0; j < N / 2; ++j) {
                if (j < pairs) turn(a[2 * j], a[2 * j + 1], j);
                if (N / 2 + j < pairs) turn(b[2 * j], b[2 * j + 1], N / 2 + j);
            }
        } else if (pairs > 0) {
#pragma unroll
            for (int j = 0; j < N; ++j) turn(a[j], b[j], j);
        }
    }

    __device__ __forceinline__ void turn(float& x, float& y, int j) const {
        const float u = x * cosine[j] - y * sine[j];
        y = y * cosine[j] + x * sine[j];
        x = u;
    }
};
