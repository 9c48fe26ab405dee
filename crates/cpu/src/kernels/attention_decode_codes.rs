//! Decode attention over the codes of a quantised cache.
//!
//! Bytes D for each key and for each value in int8, half in int4, and scales: one part in sixteen or more. A group of keys shares scales along
//! it and a value's dimensions share them in groups, so that scales meet the queries and the weights, once for each group, and codes need only become
//! f32: Σ (q · scale) · code + Σ q · minimum, and Σ (p · scale) · code + Σ p · minimum. That is two operations more for each vector of codes,
//! shared by the heads of a group, so that arithmetic binds sooner than over elements.

use half::f16;
use lawson_core::quantised::GROUP;

use super::attention_decode::{Scores, Weigh, each_head, scores, weigh};
use crate::simd::{Load, Outlined, Simd};

/// [`Scores`] of keys of one finished group of a quantised cache. Scales are folded into the queries, Σ (q · scale) · code + Σ q · minimum, so that
/// codes are multiplied as they are.
pub(super) struct CodeScores<T, const R: usize> {
    pub scores: Scores<T, R>,
    /// `[D]`, and where codes have minima as many of these behind them.
    pub scales: *const f16,
    /// A bit for each key that is not finite.
    pub lost: u32,
    /// Scratch, [R, D].
    pub folded: *mut f32,
}

impl<T: Load, const R: usize> Outlined for CodeScores<T, R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Scores { q, d, n, p, .. } = self.scores;
        // SAFETY: the caller's.
        unsafe {
            macro_rules! two {
                ($of:expr) => {{
                    let two = [s.load_f16($of), s.load_f16($of.add(S::LANES))];
                    if T::EVEN_ODD { s.deinterleave(two) } else { two }
                }};
            }
            let mut offsets = [s.splat(0.0); 16];
            for i in (0..d).step_by(2 * S::LANES) {
                let scales = two!(self.scales.add(i));
                let minima = if T::MINIMA { two!(self.scales.add(d + i)) } else { scales };
                for (r, offset) in offsets.iter_mut().enumerate().take(R) {
                    for (half, (scale, minimum)) in scales.into_iter().zip(minima).enumerate() {
                        let at = r * d + i + half * S::LANES;
                        let q = s.load(q.add(at));
                        s.store(self.folded.add(at), s.mul(q, scale));
                        if T::MINIMA {
                            *offset = s.fma(q, minimum, *offset);
                        }
                    }
                }
            }
            scores(s, Scores { q: self.folded, ..self.scores });
            if T::MINIMA {
                let mut lanes = [0f32; 16];
                s.store(lanes.as_mut_ptr(), s.sum_each(&offsets));
                let offset = each_head::<S, R>(s, lanes.as_ptr());
                for j in (0..n * R).step_by(S::LANES) {
                    s.store(p.add(j), s.add(s.load(p.add(j)), offset));
                }
            }
            let mut lost = self.lost;
            while lost != 0 {
                let j = lost.trailing_zeros() as usize;
                if j < n {
                    std::slice::from_raw_parts_mut(p.add(j * R), R).fill(f32::NAN);
                }
                lost &= lost - 1;
            }
        }
    }
}

/// [`Weigh`] of values of a quantised cache. Scales are folded into the weights, Σ (p · scale) · code + Σ p · minimum.
pub(super) struct CodeWeigh<T, const R: usize> {
    pub weigh: Weigh<T, R>,
    /// [n, D / GROUP], and where codes have minima as many of these behind those of each row.
    pub scales: *const f16,
    /// Scratch: weights [D / GROUP, n, R], scales [n, 2 · D / GROUP], and for the minima [D / GROUP, R].
    pub folded: *mut f32,
}

impl<T: Load, const R: usize> Outlined for CodeWeigh<T, R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Weigh { p, n, acc, width, .. } = self.weigh;
        let (groups, p_step) = (width / GROUP, n * R);
        let ranges = if T::MINIMA { 2 * groups } else { groups };
        let scales = self.folded.wrapping_add(groups * p_step);
        let offsets = scales.wrapping_add(n * ranges).cast::<[f32; R]>();
        // SAFETY: the caller's.
        unsafe {
            let whole = n * ranges / S::LANES * S::LANES;
            for i in (0..whole).step_by(S::LANES) {
                s.store(scales.add(i), s.load_f16(self.scales.add(i)));
            }
            for i in whole..n * ranges {
                scales.add(i).write((*self.scales.add(i)).to_f32());
            }
            for g in 0..groups {
                let folded = self.folded.add(g * p_step);
                let mut offset = [0f32; R];
                for j in 0..n {
                    let range = scales.add(j * ranges + g);
                    // Read whole, so that they need not be read again behind each store.
                    let (p, scale) = (p.add(j * R).cast::<[f32; R]>().read(), *range);
                    folded.add(j * R).cast::<[f32; R]>().write(p.map(|p| p * scale));
                    if T::MINIMA {
                        let minimum = *range.add(groups);
                        offset = std::array::from_fn(|r| offset[r] + p[r] * minimum);
                    }
                }
                offsets.add(g).write(offset);
            }
            weigh(s, Weigh { p: self.folded, p_step, ..self.weigh });
            if T::MINIMA {
                for i in (0..width).step_by(S::LANES) {
                    for (r, &offset) in (*offsets.add(i / GROUP)).iter().enumerate() {
                        let to = acc.add(r * width + i);
                        s.store(to, s.add(s.load(to), s.splat(offset)));
                    }
                }
            }
        }
    }
}
