//! Rotary embedding of a row, and the table it reads.
//!
//! The table holds for each token `2 · width` f32: half layout cos then sin of each pair (width = rotary_dim/2); interleaved
//! layout cos of each dimension, then sin with the sign of its partner (width = rotary_dim), so that both layouts are
//! two products and a sum a vector.

use lawson_core::problem::{RopeFrequencies, RopeLayout};

use crate::simd::Simd;

/// f32 of one half of a table row.
pub const fn table_width(layout: RopeLayout, rotary_dim: usize) -> usize {
    match layout {
        RopeLayout::Half => rotary_dim / 2,
        RopeLayout::Interleaved => rotary_dim,
    }
}

/// Rows that share one sine and cosine of each frequency.
pub const CHUNK: usize = 64;

/// Fills the table rows of at most [`CHUNK`] tokens.
///
/// Angles are f64. Sine and cosine are computed for the first position; while positions count up by one, the next row follows by the
/// angle sum, whose error after [`CHUNK`] steps is some 1e-14.
pub fn fill_rows(
    layout: RopeLayout,
    frequencies: &RopeFrequencies,
    positions: impl Iterator<Item = usize> + Clone,
    width: usize,
    table: &mut [f32],
) {
    let factor = frequencies.attention_factor;
    for (i, &w) in frequencies.inverse.iter().enumerate() {
        let (step_sin, step_cos) = w.sin_cos();
        let (mut sin, mut cos, mut next) = (0.0, 0.0, usize::MAX);
        for (row, position) in table.chunks_exact_mut(2 * width).zip(positions.clone()) {
            (sin, cos) = if position == next {
                (sin * step_cos + cos * step_sin, cos * step_cos - sin * step_sin)
            } else {
                (position as f64 * w).sin_cos()
            };
            next = position + 1;
            let (c, s) = ((cos * factor) as f32, (sin * factor) as f32);
            let (cosines, sines) = row.split_at_mut(width);
            match layout {
                RopeLayout::Half => (cosines[i], sines[i]) = (c, s),
                RopeLayout::Interleaved => {
                    (cosines[2 * i], cosines[2 * i + 1]) = (c, c);
                    (sines[2 * i], sines[2 * i + 1]) = (-s, s);
                }
            }
        }
    }
}

/// Turns the first dimensions of a head in place.
/// # Safety
/// `x` is writable as rotary_dim f32, `table` readable as 2 · `width` f32.
#[inline(always)]
pub unsafe fn rotate<S: Simd>(s: S, layout: RopeLayout, x: *mut f32, table: *const f32, width: usize) {
    // SAFETY: i + m ≤ width throughout; the half layout reaches x[2 · width − 1], the interleaved one x[width − 1].
    unsafe {
        let (cos, sin) = (table, table.add(width));
        let mut i = 0;
        while i < width {
            let m = S::LANES.min(width - i);
            let (c, n) = (s.load_n(cos.add(i), m), s.load_n(sin.add(i), m));
            let a = s.load_n(x.add(i), m);
            match layout {
                RopeLayout::Half => {
                    let b = s.load_n(x.add(width + i), m);
                    let turned_b = s.fma(b, c, s.mul(a, n));
                    let minus_b = s.sub(s.splat(0.0), b);
                    s.store_n(x.add(i), s.fma(a, c, s.mul(minus_b, n)), m);
                    s.store_n(x.add(width + i), turned_b, m);
                }
                RopeLayout::Interleaved => s.store_n(x.add(i), s.fma(a, c, s.mul(s.swap_pairs(a), n)), m),
            }
            i += S::LANES;
        }
    }
}

/// The first of two separate passes: each turning dimension's partner, with the sign that sine takes.
/// # Safety
/// `x` is readable and `to` writable as rotary_dim f32.
#[inline(always)]
pub unsafe fn partner<S: Simd>(s: S, layout: RopeLayout, x: *const f32, to: *mut f32, width: usize) {
    for i in (0..width).step_by(S::LANES) {
        let m = S::LANES.min(width - i);
        // SAFETY: i + m ≤ width; the half layout reaches 2 · width.
        unsafe {
            match layout {
                RopeLayout::Half => {
                    s.store_n(to.add(i), s.sub(s.splat(0.0), s.load_n(x.add(width + i), m)), m);
                    s.store_n(to.add(width + i), s.load_n(x.add(i), m), m);
                }
                RopeLayout::Interleaved => s.store_n(to.add(i), s.swap_pairs(s.load_n(x.add(i), m)), m),
            }
        }
    }
}

/// The second of two separate passes: x · cos + partner · sin.
/// # Safety
/// As [`rotate`]; `partner` is readable as rotary_dim f32.
#[inline(always)]
pub unsafe fn combine<S: Simd>(s: S, layout: RopeLayout, x: *mut f32, partner: *const f32, table: *const f32, width: usize) {
    let halves = if layout == RopeLayout::Half { 2 } else { 1 };
    for half in 0..halves {
        for i in (0..width).step_by(S::LANES) {
            let (m, at) = (S::LANES.min(width - i), half * width + i);
            // SAFETY: at + m ≤ rotary_dim, i + m ≤ width.
            unsafe {
                let (c, n) = (s.load_n(table.add(i), m), s.load_n(table.add(width + i), m));
                let turned = s.fma(s.load_n(x.add(at), m), c, s.mul(s.load_n(partner.add(at), m), n));
                s.store_n(x.add(at), turned, m);
            }
        }
    }
}
