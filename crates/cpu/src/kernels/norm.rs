//! RMSNorm of a row (arXiv:1910.07467). Three operations an element and two passes over a row that stays in first-level cache.

use lawson_core::DType;

use super::rows::{Rows, load_row, load_vector, store_row};
use crate::simd::Simd;

/// 1/√(mean(x²) + eps) of a row of `n` elements.
/// # Safety
/// `x` is readable as `n` elements of `dtype`.
#[inline(always)]
pub unsafe fn inverse_rms<S: Simd>(s: S, dtype: DType, x: *const u8, n: usize, eps: f64) -> f32 {
    let (mut sum, mut i) = (0f64, 0);
    while i < n {
        // A short run in f32, then f64: rows of any width keep the error of one run.
        let end = n.min(i + 64 * S::LANES);
        let mut acc = s.splat(0.0);
        while i < end {
            // SAFETY: i < n.
            let v = unsafe { load_vector(s, dtype, x, i, n) };
            acc = s.fma(v, v, acc);
            i += S::LANES;
        }
        sum += f64::from(s.sum(acc));
    }
    (1.0 / (sum / n as f64 + eps).sqrt()) as f32
}

/// x · rms⁻¹ · weight, in place.
/// # Safety
/// `x` is writable and `weight` readable as `n` f32.
#[inline(always)]
pub unsafe fn normalize<S: Simd>(s: S, x: *mut f32, weight: *const f32, n: usize, eps: f64) {
    // SAFETY: the caller's; the tail is loaded and stored by count.
    unsafe {
        let r = s.splat(inverse_rms(s, DType::F32, x.cast_const().cast(), n, eps));
        let mut i = 0;
        while i < n {
            let m = S::LANES.min(n - i);
            let v = s.mul(s.mul(s.load_n(x.add(i), m), r), s.load_n(weight.add(i), m));
            s.store_n(x.add(i), v, m);
            i += S::LANES;
        }
    }
}

/// RMSNorm of one row from one tensor to another.
/// # Safety
/// Row `row` of `from` is readable and of `to` writable as `n` elements, `weight` readable and `scratch` writable as `n` f32.
#[inline(always)]
pub unsafe fn norm_row<S: Simd>(
    s: S,
    from: Rows,
    to: Rows,
    row: usize,
    (weight, eps): (*const f32, f64),
    n: usize,
    scratch: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        load_row(s, from.dtype, from.at(row, 0), scratch, n);
        normalize(s, scratch, weight, n, eps);
        store_row(s, to.dtype, scratch, to.at(row, 0), n);
    }
}

/// to = a + b for one row, rounded once.
/// # Safety
/// Row `row` of all three has `n` elements, `to` is writable.
#[inline(always)]
pub unsafe fn add_row<S: Simd>(s: S, a: Rows, b: Rows, to: Rows, row: usize, n: usize) {
    let mut lanes = [0f32; 16];
    for i in (0..n).step_by(S::LANES) {
        // SAFETY: i < n; 16 ≥ LANES.
        unsafe {
            let sum = s.add(load_vector(s, a.dtype, a.at(row, 0), i, n), load_vector(s, b.dtype, b.at(row, 0), i, n));
            s.store(lanes.as_mut_ptr(), sum);
            store_row(s, to.dtype, lanes.as_ptr(), to.at(row, i), S::LANES.min(n - i));
        }
    }
}
