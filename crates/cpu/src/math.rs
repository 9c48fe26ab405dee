//! Vector functions with stated error.

use crate::simd::Simd;

/// 2^x: at most 2 ulp from −126 to 127.5; 0 below −126, that or +∞ from 127.5, +∞ from 128 on; NaN for NaN.
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // `min` returns its second operand when one is NaN, which keeps a NaN x.
    power_of_two(s, s.min(s.splat(128.0), x), -126.0, C)
}

/// The polynomial with 2^0 = 1 whose greatest relative error for |x| ≤ ½ is least, 2e-8 with coefficients in f32.
const C: [f32; 7] = [1.0, std::f32::consts::LN_2, 0.240_226_48, 0.055_503_324, 0.009_618_437, 0.001_339_887_5, 0.000_153_533_62];

/// 2^x of x ≤ 128 as a share of a sum that is at least ½: as [`exp2()`], but 0 below −100, so that products with values of usual size
/// are not denormal, which would cost a processor's slow path.
#[inline(always)]
pub fn exp2_share<S: Simd>(s: S, x: S::F) -> S::F {
    power_of_two(s, x, -100.0, C)
}

/// 2^x for x ≤ 128, 0 below `least`: x = n + f with |f| ≤ ½, and 2^f by the polynomial `c`.
#[inline(always)]
fn power_of_two<S: Simd, const N: usize>(s: S, x: S::F, least: f32, c: [f32; N]) -> S::F {
    let least = s.splat(least);
    let clamped = s.max(least, x);
    let n = s.round(clamped);
    let f = s.sub(clamped, n);
    let mut p = s.splat(c[N - 1]);
    for c in c[..N - 1].iter().rev() {
        p = s.fma(p, f, s.splat(*c));
    }
    s.select_lt(x, least, s.splat(0.0), s.scale2(p, n))
}

/// [`exp2_share`] with a relative error below 1.1e-4, for results that are rounded to bf16: the polynomial has degree 3.
#[inline(always)]
pub fn exp2_rough<S: Simd>(s: S, x: S::F) -> S::F {
    power_of_two(s, x, -100.0, [1.0, 0.693_282_9, 0.242_210_97, 0.055_008_933])
}

/// tanh(x): at most 4 ulp; ±1 for large |x|, NaN for NaN.
///
/// Below 0.625 an odd polynomial (Cephes' single-precision coefficients, S. Moshier), else 1 − 2 / (e^2|x| + 1).
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    // From 10 on it is 1; `min` keeps a NaN.
    let a = s.min(s.splat(10.0), s.copysign(x, s.splat(1.0)));
    let e = exp2(s, s.mul(a, s.splat(2.0 * std::f32::consts::LOG2_E)));
    let big = s.fma(s.splat(-2.0), s.reciprocal(s.add(e, s.splat(1.0))), s.splat(1.0));
    const C: [f32; 5] = [-0.333_332_8, 0.133_314_42, -0.053_739_715, 0.020_639_09, -0.005_704_988_7];
    let z = s.mul(a, a);
    let mut p = s.splat(C[4]);
    for c in C[..4].iter().rev() {
        p = s.fma(p, z, s.splat(*c));
    }
    let small = s.fma(s.mul(p, z), a, a);
    s.copysign(s.select_lt(a, s.splat(0.625), small, big), x)
}

/// 2^x of a row, in place.
/// # Safety
/// `x` is writable as `n` f32.
#[inline(always)]
pub unsafe fn exp2_row<S: Simd>(s: S, x: *mut f32, n: usize) {
    for i in (0..n).step_by(S::LANES) {
        let c = S::LANES.min(n - i);
        // SAFETY: i + c ≤ n.
        unsafe { s.store_n(x.add(i), exp2(s, s.load_n(x.add(i), c)), c) };
    }
}

/// tanh of a row, in place.
/// # Safety
/// As [`exp2_row`].
#[inline(always)]
pub unsafe fn tanh_row<S: Simd>(s: S, x: *mut f32, n: usize) {
    for i in (0..n).step_by(S::LANES) {
        let c = S::LANES.min(n - i);
        // SAFETY: i + c ≤ n.
        unsafe { s.store_n(x.add(i), tanh(s, s.load_n(x.add(i), c)), c) };
    }
}
