//! Vector functions with stated error.

use crate::simd::Simd;

/// 2^x: at most 2 ulp from −126 to 127.5; 0 below −126.5, +∞ from 127.5 on, NaN for NaN.
///
/// x = n + f with |f| ≤ ½; 2^f by its Taylor polynomial of degree 7, whose remainder on that range is below 6e-9.
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // `max` and `min` return their second operand when one is NaN, which keeps a NaN x.
    let x = s.min(s.splat(128.0), s.max(s.splat(-127.0), x));
    let n = s.round(x);
    let f = s.sub(x, n);
    // ln(2)ⁱ / i!
    const C: [f32; 8] = [
        1.0,
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_11,
        0.009_618_129,
        0.001_333_355_8,
        0.000_154_035_3,
        0.000_015_252_734,
    ];
    let mut p = s.splat(C[7]);
    for c in C[..7].iter().rev() {
        p = s.fma(p, f, s.splat(*c));
    }
    s.mul(p, s.pow2(n))
}

/// tanh(x): at most 4 ulp; ±1 for large |x|, NaN for NaN.
///
/// Below 0.625 an odd polynomial (Cephes' single-precision coefficients, S. Moshier), else 1 − 2 / (e^2|x| + 1).
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let a = s.copysign(x, s.splat(1.0));
    let e = exp2(s, s.mul(a, s.splat(2.0 * std::f32::consts::LOG2_E)));
    let big = s.sub(s.splat(1.0), s.div(s.splat(2.0), s.add(e, s.splat(1.0))));
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
