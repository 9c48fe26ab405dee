// What every kernel shares: element types, wide loads and stores, base-2 exponential, tanh, reductions in a fixed order.
// No CUDA header is included; NVRTC alone compiles this, sm_80 and later.
//
// bf16 and f16 elements are `unsigned short`; which of the two a value is stands in the dtype template argument `DT`
// (0 f32, 1 bf16, 2 f16: the values of the macros DTYPE and KV_DTYPE). All arithmetic is in f32.
#pragma once

#define F32 0
#define BF16 1
#define F16 2

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define NEG_INF (__int_as_float(0xff800000))
#define FULL_MASK 0xffffffffu

// ---------------------------------------------------------------------------------------------------- element types

template <int DT> struct Element;
template <> struct Element<F32> { typedef float T; };
template <> struct Element<BF16> { typedef unsigned short T; };
template <> struct Element<F16> { typedef unsigned short T; };

// Elements of a 16-byte access.
template <int DT> struct Wide { static constexpr int N = 16 / (int)sizeof(typename Element<DT>::T); };

template <int DT> __device__ __forceinline__ float to_float(typename Element<DT>::T x);
template <> __device__ __forceinline__ float to_float<F32>(float x) { return x; }
template <> __device__ __forceinline__ float to_float<BF16>(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
template <> __device__ __forceinline__ float to_float<F16>(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// To nearest even, NaN stays NaN, f16 overflows to infinity.
template <int DT> __device__ __forceinline__ typename Element<DT>::T from_float(float x);
template <> __device__ __forceinline__ float from_float<F32>(float x) { return x; }
template <> __device__ __forceinline__ unsigned short from_float<BF16>(float x) {
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
template <> __device__ __forceinline__ unsigned short from_float<F16>(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// x as it would be after being stored and read again.
template <int DT> __device__ __forceinline__ float rounded(float x) { return to_float<DT>(from_float<DT>(x)); }

// Two 16-bit elements in one register, `lo` at the lower address. Not for f32.
template <int DT> __device__ __forceinline__ unsigned pack2(float lo, float hi) {
    static_assert(DT == BF16 || DT == F16, "pack2 is for 16-bit types");
    unsigned y;
    if constexpr (DT == BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <int DT> __device__ __forceinline__ void unpack2(unsigned x, float& lo, float& hi) {
    static_assert(DT == BF16 || DT == F16, "unpack2 is for 16-bit types");
    if constexpr (DT == BF16) {
        lo = __uint_as_float(x << 16);
        hi = __uint_as_float(x & 0xffff0000u);
    } else {
        asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(lo), "=f"(hi) : "r"(x));
    }
}

// ------------------------------------------------------------------------------------------------- loads and stores

// 4, 8 or 16 bytes at an address aligned to as much. Plain accesses (not the read-only path), so in-place kernels may use them.
template <int BYTES> struct Bytes;
template <> struct Bytes<2> { typedef unsigned short V; };
template <> struct Bytes<4> { typedef unsigned V; };
template <> struct Bytes<8> { typedef uint2 V; };
template <> struct Bytes<16> { typedef uint4 V; };

__device__ __forceinline__ uint4 load16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }
// Evict-first: for data that nobody reads again soon.
__device__ __forceinline__ uint4 load16_once(const void* p) { return __ldcs(reinterpret_cast<const uint4*>(p)); }
__device__ __forceinline__ void store16_once(void* p, uint4 v) { __stcs(reinterpret_cast<uint4*>(p), v); }

// N consecutive elements as they lie in memory: loads can be issued long before their conversion needs registers.
// In accesses of min(16, N·size) bytes, to which the address is aligned. N is a power of two.
template <int DT, int N> struct Packed {
    typedef typename Element<DT>::T T;
    static constexpr int CHUNK = N * (int)sizeof(T) < 16 ? N * (int)sizeof(T) : 16, PER = CHUNK / (int)sizeof(T), CHUNKS = N / PER;
    static_assert((N & (N - 1)) == 0, "whole accesses");
    union {
        typename Bytes<CHUNK>::V v[CHUNKS];
        unsigned w[(N * sizeof(T) + 3) / 4];
        T e[N];
    };

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < (int)((N * sizeof(T) + 3) / 4); ++i) w[i] = 0;
    }
    __device__ __forceinline__ void read(const T* p) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) v[i] = *reinterpret_cast<const typename Bytes<CHUNK>::V*>(p + i * PER);
    }
    __device__ __forceinline__ void write(T* p) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) *reinterpret_cast<typename Bytes<CHUNK>::V*>(p + i * PER) = v[i];
    }
    // Evict-first, for data that nobody reads again soon.
    __device__ __forceinline__ void read_once(const T* p) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) v[i] = __ldcs(reinterpret_cast<const typename Bytes<CHUNK>::V*>(p + i * PER));
    }
    __device__ __forceinline__ void write_once(T* p) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) __stcs(reinterpret_cast<typename Bytes<CHUNK>::V*>(p + i * PER), v[i]);
    }
    __device__ __forceinline__ void unpack(float (&x)[N]) const {
        if constexpr (DT != F32 && N > 1) {
#pragma unroll
            for (int j = 0; j < N / 2; ++j) unpack2<DT>(w[j], x[2 * j], x[2 * j + 1]);
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) x[j] = to_float<DT>(e[j]);
        }
    }
    __device__ __forceinline__ void pack(const float (&x)[N]) {
        if constexpr (DT != F32 && N > 1) {
#pragma unroll
            for (int j = 0; j < N / 2; ++j) w[j] = pack2<DT>(x[2 * j], x[2 * j + 1]);
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) e[j] = from_float<DT>(x[j]);
        }
    }
};

template <int DT, int N> __device__ __forceinline__ void load(const typename Element<DT>::T* p, float (&out)[N]) {
    Packed<DT, N> x;
    x.read(p);
    x.unpack(out);
}
template <int DT, int N> __device__ __forceinline__ void store(typename Element<DT>::T* p, const float (&in)[N]) {
    Packed<DT, N> x;
    x.pack(in);
    x.write(p);
}

// --------------------------------------------------------------------------------------------------------- functions

// 2^x, relative error 2^-22; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1/x, error 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh(x), relative error below 6e-7 for every finite x; ±1 at ±inf, NaN stays NaN. An odd polynomial below 0.55 (where
// 1 - 2/(e^2x + 1) would cancel; coefficients: minimax fit of the relative error), the exponential above.
__device__ __forceinline__ float tanh_accurate(float x) {
    const float a = fabsf(x), u = x * x;
    float p = -0.0062742396f;
    p = fmaf(p, u, 0.021071678f);
    p = fmaf(p, u, -0.053852309f);
    p = fmaf(p, u, 0.13332586f);
    p = fmaf(p, u, -0.33333316f);
    const float small = fmaf(x * u, p, x);
    const float large = copysignf(fmaf(-2.0f, reciprocal(exp2_approx(a * (2.0f * LOG2E)) + 1.0f), 1.0f), x);
    return a < 0.55f ? small : large;
}

// -------------------------------------------------------------------------------------------------------- reductions

// Butterflies over `WIDTH` neighbouring lanes: every lane of the group gets the same bits, and the order of the sum never changes.
template <int WIDTH = 32> __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = WIDTH / 2; o > 0; o /= 2) x += __shfl_xor_sync(FULL_MASK, x, o);
    return x;
}
template <int WIDTH = 32> __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = WIDTH / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, o));
    return x;
}

// Over the block's threads (a multiple of 32, x dimension alone); every thread gets the result. `scratch` is 32 floats of shared
// memory, free again when the call returns.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warps = blockDim.x / 32;
    x = warp_sum(x);
    if (warps == 1) return x;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float y = scratch[0];
    for (int i = 1; i < warps; ++i) y += scratch[i];
    __syncthreads();
    return y;
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    const int warps = blockDim.x / 32;
    x = warp_max(x);
    if (warps == 1) return x;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float y = scratch[0];
    for (int i = 1; i < warps; ++i) y = fmaxf(y, scratch[i]);
    __syncthreads();
    return y;
}

// ------------------------------------------------------------------------------------- programmatic dependent launch

// Waits until the kernels before this one in the stream have finished and their writes are visible. Nothing when the launch did
// not ask for overlap, and below sm_90. Every block calls it before its first access to memory that an earlier kernel writes or
// reads, also a block with nothing to do: otherwise the kernel after this one could overtake the one before it.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel's blocks start as soon as this one leaves room for them; they still wait as above before they touch data.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
