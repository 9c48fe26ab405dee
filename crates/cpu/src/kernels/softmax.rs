//! Softmax of rows in memory. Four operations and an exponential an element; fused, a row is read from memory once and written once
//! (8 bytes an element), in separate passes three times and twice.

use super::attention::LOG2_E;
use crate::{math::exp2, simd::Simd};

/// Greatest element; −∞ for none.
/// # Safety
/// `x` is readable as `n` f32.
#[inline(always)]
pub unsafe fn row_max<S: Simd>(s: S, x: *const f32, n: usize) -> f32 {
    let mut top = [s.splat(f32::NEG_INFINITY); 4];
    let mut i = 0;
    // SAFETY: i stays below n.
    unsafe {
        while i + 4 * S::LANES <= n {
            for (j, t) in top.iter_mut().enumerate() {
                *t = s.max(*t, s.load(x.add(i + j * S::LANES)));
            }
            i += 4 * S::LANES;
        }
        let mut best = s.max_lane(s.max(s.max(top[0], top[1]), s.max(top[2], top[3])));
        while i < n {
            best = best.max(*x.add(i));
            i += 1;
        }
        best
    }
}

/// out = e^(x − m); returns the sum.
/// # Safety
/// `x` is readable and `out` writable as `n` f32; they are the same or do not overlap.
#[inline(always)]
pub unsafe fn row_exp<S: Simd>(s: S, x: *const f32, n: usize, m: f32, out: *mut f32) -> f32 {
    let (log2e, base) = (s.splat(LOG2_E), s.splat(if m == f32::NEG_INFINITY { 0.0 } else { m }));
    let (mut sum, mut i) = ([s.splat(0.0); 2], 0);
    // SAFETY: i stays below n; the tail is loaded and stored by count.
    unsafe {
        while i + 2 * S::LANES <= n {
            for (j, sum) in sum.iter_mut().enumerate() {
                let p = exp2(s, s.mul(s.sub(s.load(x.add(i + j * S::LANES)), base), log2e));
                s.store(out.add(i + j * S::LANES), p);
                *sum = s.add(*sum, p);
            }
            i += 2 * S::LANES;
        }
        let mut total = s.sum(s.add(sum[0], sum[1]));
        while i < n {
            let c = S::LANES.min(n - i);
            s.store_n(out.add(i), exp2(s, s.mul(s.sub(s.load_n(x.add(i), c), base), log2e)), c);
            total += (i..i + c).map(|j| *out.add(j)).sum::<f32>();
            i += c;
        }
        total
    }
}

/// Sum of a row.
/// # Safety
/// `x` is readable as `n` f32.
#[inline(always)]
pub unsafe fn row_sum<S: Simd>(s: S, x: *const f32, n: usize) -> f32 {
    let (mut sum, mut i) = ([s.splat(0.0); 4], 0);
    // SAFETY: i stays below n.
    unsafe {
        while i + 4 * S::LANES <= n {
            for (j, sum) in sum.iter_mut().enumerate() {
                *sum = s.add(*sum, s.load(x.add(i + j * S::LANES)));
            }
            i += 4 * S::LANES;
        }
        let mut total = s.sum(s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3])));
        while i < n {
            total += *x.add(i);
            i += 1;
        }
        total
    }
}

/// x ·= factor.
/// # Safety
/// `x` is writable as `n` f32.
#[inline(always)]
pub unsafe fn row_scale<S: Simd>(s: S, x: *mut f32, n: usize, factor: f32) {
    let f = s.splat(factor);
    for i in (0..n).step_by(S::LANES) {
        let c = S::LANES.min(n - i);
        // SAFETY: i + c ≤ n.
        unsafe { s.store_n(x.add(i), s.mul(s.load_n(x.add(i), c), f), c) };
    }
}

/// Softmax of a row; a row of −∞ alone gives 0.
/// # Safety
/// As [`row_exp`].
#[inline(always)]
pub unsafe fn softmax_row<S: Simd>(s: S, x: *const f32, n: usize, out: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        let m = row_max(s, x, n);
        let sum = row_exp(s, x, n, m, out);
        row_scale(s, out, n, if m == f32::NEG_INFINITY && sum == 0.0 { 0.0 } else { 1.0 / sum });
    }
}
