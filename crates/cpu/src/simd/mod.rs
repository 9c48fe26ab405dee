//! Vectors of f32 and loads of narrower elements; the only place that names `core::arch`.
//!
//! Kernels are generic over [`Simd`] and marked `#[inline(always)]`; `dispatch` instantiates each once for every instruction set
//! inside a function with the matching `#[target_feature]`.

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
pub mod portable;

use half::{bf16, f16};

/// A token of an instruction set; holding one proves that the processor has it.
pub trait Simd: Copy + Send + Sync + 'static {
    /// f32 elements of a vector.
    const LANES: usize;
    /// Rows of the register tile: `MR` × 2 accumulators, two vectors and a broadcast fit the register file.
    const MR: usize;
    /// `LANES` f32.
    type F: Copy;

    /// All lanes `v`.
    fn splat(self, v: f32) -> Self::F;
    /// Loads `LANES` elements.
    /// # Safety
    /// `p` is valid for reading `LANES` elements; alignment is not needed.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// Loads `n ≤ LANES` elements, the other lanes 0.
    /// # Safety
    /// `p` is valid for reading `n` elements.
    unsafe fn load_n(self, p: *const f32, n: usize) -> Self::F;
    /// Stores `LANES` elements.
    /// # Safety
    /// `p` is valid for writing `LANES` elements.
    unsafe fn store(self, p: *mut f32, v: Self::F);
    /// Stores the first `n ≤ LANES` elements.
    /// # Safety
    /// `p` is valid for writing `n` elements.
    unsafe fn store_n(self, p: *mut f32, v: Self::F, n: usize);
    /// Loads `LANES` bf16.
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_bf16(self, p: *const bf16) -> Self::F;
    /// Loads `LANES` f16.
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_f16(self, p: *const f16) -> Self::F;
    /// Stores `LANES` elements rounded to nearest even.
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::F);
    /// Stores `LANES` elements rounded to nearest even.
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store_f16(self, p: *mut f16, v: Self::F);

    /// Asks for the cache line at `p`, which may be any address, in second-level cache.
    fn fetch(self, p: *const u8);
    /// Asks for the cache line at `p`, which may be any address, in first-level cache.
    fn fetch_near(self, p: *const u8);
    /// a + b.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a − b.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, fused where the processor does so.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The greater; `b` when either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The lesser; `b` when either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Rounded to the nearest integer, ties to even; |v| < 2²².
    fn round(self, v: Self::F) -> Self::F;
    /// 2ⁿ for integers n in −127 ..= 128; −127 gives 0 and 128 gives ∞. NaN gives anything.
    fn pow2(self, n: Self::F) -> Self::F;
    /// `yes` where a < b, else `no`.
    fn select_lt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// |v| with the sign of `sign`.
    fn copysign(self, v: Self::F, sign: Self::F) -> Self::F;
    /// Lanes 2i and 2i + 1 exchanged.
    fn swap_pairs(self, v: Self::F) -> Self::F;
    /// Sum of all lanes, in a fixed order.
    fn sum(self, v: Self::F) -> f32;
    /// Greatest lane; NaN is not reliably kept.
    fn max_lane(self, v: Self::F) -> f32;
}

/// An element type that vectors load from and store to.
pub trait Elem: Copy + Send + Sync + 'static {
    /// Loads `LANES` elements as f32.
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F;
    /// Stores `LANES` elements.
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store<S: Simd>(s: S, p: *mut Self, v: S::F);
    /// As f32.
    fn to_f32(self) -> f32;
    /// Rounded to nearest even.
    fn from_f32(v: f32) -> Self;

    /// Loads `n ≤ LANES` elements, the other lanes 0.
    /// # Safety
    /// `p` is valid for reading `n` elements.
    #[inline(always)]
    unsafe fn load_n<S: Simd>(s: S, p: *const Self, n: usize) -> S::F {
        let mut lanes = [0f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: i < n.
            *lane = unsafe { p.add(i).read() }.to_f32();
        }
        // SAFETY: LANES ≤ 16.
        unsafe { s.load(lanes.as_ptr()) }
    }

    /// Stores the first `n ≤ LANES` elements.
    /// # Safety
    /// `p` is valid for writing `n` elements.
    #[inline(always)]
    unsafe fn store_n<S: Simd>(s: S, p: *mut Self, v: S::F, n: usize) {
        let mut lanes = [0f32; 16];
        // SAFETY: LANES ≤ 16.
        unsafe { s.store(lanes.as_mut_ptr(), v) };
        for (i, &lane) in lanes.iter().enumerate().take(n) {
            // SAFETY: i < n.
            unsafe { p.add(i).write(Self::from_f32(lane)) };
        }
    }
}

impl Elem for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, p: *mut f32, v: S::F) {
        // SAFETY: the caller's.
        unsafe { s.store(p, v) }
    }
    #[inline(always)]
    unsafe fn load_n<S: Simd>(s: S, p: *const f32, n: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_n(p, n) }
    }
    #[inline(always)]
    unsafe fn store_n<S: Simd>(s: S, p: *mut f32, v: S::F, n: usize) {
        // SAFETY: the caller's.
        unsafe { s.store_n(p, v, n) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(v: f32) -> f32 {
        v
    }
}

macro_rules! half_elem {
    ($t:ty, $load:ident, $store:ident) => {
        impl Elem for $t {
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const $t) -> S::F {
                // SAFETY: the caller's.
                unsafe { s.$load(p) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(s: S, p: *mut $t, v: S::F) {
                // SAFETY: the caller's.
                unsafe { s.$store(p, v) }
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn from_f32(v: f32) -> $t {
                <$t>::from_f32(v)
            }
        }
    };
}
half_elem!(bf16, load_bf16, store_bf16);
half_elem!(f16, load_f16, store_f16);
