//! Attention of one query over a long cache: all query heads of a group share every row of K and V that is read.
//!
//! Bytes 2·D·L·size for each key/value head, each once; operations 4·D·L·H/G. With f32 that is H/G operations a byte: memory
//! binds up to some ten heads a group. Scores are dot products along D, LANES of them summed across their lanes at once; values stand in
//! the lanes. Elements narrower than f32 are widened, bf16 two vectors at a time.

use lawson_core::problem::AttentionSpec;

use super::{
    attention::{Attention, LOG2_E, finish},
    rows::{CacheRows, load_row, with_elem},
};
use crate::{
    math::{exp2, tanh},
    simd::{Elem, Simd},
};

/// Keys of a tile.
const TILE: usize = CacheRows::TILE;

/// f32 of scratch of a decode item.
pub fn scratch_len(spec: &AttentionSpec, lanes: usize) -> usize {
    let width = spec.head_dim.next_multiple_of(lanes);
    let group = spec.group();
    group * (2 * width + TILE + 2) + TILE * width
}

/// Computes one work item: all heads of a group over one part of the keys.
/// # Safety
/// `a` describes valid memory and each of its sequences has one new token; `scratch` is writable as [`scratch_len`] f32; no other
/// item with this index runs.
#[inline(always)]
pub unsafe fn attention_decode<S: Simd>(s: S, a: &Attention<'_>, item: usize, scratch: *mut f32) {
    let item = a.item(item);
    let (d, group, b) = (a.spec.head_dim, a.spec.group(), item.sequence);
    let width = d.next_multiple_of(S::LANES);
    let head0 = item.kv_head * group;
    let (q, acc) = (scratch, scratch.wrapping_add(group * width));
    let p = acc.wrapping_add(group * width);
    let m = p.wrapping_add(group * TILE);
    let l = m.wrapping_add(group);
    let values = l.wrapping_add(group);
    let (factor, cap) = a.factors();
    let position = a.past[b] + item.queries.start;
    let seen = a.visible(b, item.queries.start, item.part);
    let even_odd = with_elem!(a.cache.dtype, T => T::EVEN_ODD);
    // SAFETY: the caller's; the carving above is what `scratch_len` counts.
    unsafe {
        for r in 0..group {
            let (q, acc) = (q.add(r * width), acc.add(r * width));
            for j in (0..width).step_by(S::LANES) {
                s.store(q.add(j), s.splat(0.0));
                s.store(acc.add(j), s.splat(0.0));
            }
            load_row(s, a.q.dtype, a.q.at(item.row, (head0 + r) * d), q, d);
            for j in (0..width).step_by(S::LANES) {
                s.store(q.add(j), s.mul(s.load(q.add(j)), s.splat(factor)));
            }
            if even_odd {
                reorder::<S>(q, d, false);
            }
            m.add(r).write(f32::NEG_INFINITY);
            l.add(r).write(0.0);
        }
        let mut start = seen.start;
        while start < seen.end {
            let end = (start / TILE * TILE + TILE).min(seen.end);
            let n = end - start;
            let k = a.cache.k_row(b, item.kv_head, start);
            let v = a.cache.v_row(b, item.kv_head, start);
            let next = a.cache.k_row(b, item.kv_head, end);
            with_elem!(a.cache.dtype, T => {
                dots::<S, T>(s, q, group, d, k.cast::<T>(), a.cache.row_stride, n, p, [v.cast::<T>(), next.cast::<T>()])
            });
            let mut fresh = false;
            for r in 0..group {
                let (p, head) = (p.add(r * TILE), head0 + r);
                let mask = a.mask.map(|x| x.row(b, head, item.queries.start));
                let slope = a.slopes.map(|x| *x.add(head) * LOG2_E);
                for j in n..n.next_multiple_of(S::LANES) {
                    p.add(j).write(f32::NEG_INFINITY);
                }
                if let Some(cap) = cap {
                    for j in (0..n).step_by(S::LANES) {
                        let c = S::LANES.min(n - j);
                        s.store_n(p.add(j), s.mul(tanh(s, s.load_n(p.add(j), c)), s.splat(cap)), c);
                    }
                }
                if let Some(slope) = slope {
                    for j in 0..n {
                        *p.add(j) += slope * ((start + j) as f32 - position as f32);
                    }
                }
                if let Some(mask) = mask {
                    for j in 0..n {
                        if *mask.add(start + j) == 0 {
                            p.add(j).write(f32::NEG_INFINITY);
                        }
                    }
                }
                let old = *m.add(r);
                let mut top = s.splat(old);
                for j in (0..n).step_by(S::LANES) {
                    top = s.max(top, s.load(p.add(j)));
                }
                let new = s.max_lane(top).max(old);
                let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
                let alpha = if old == base { 1.0 } else { (old - base).exp2() };
                let mut sum = s.splat(0.0);
                for j in (0..n).step_by(S::LANES) {
                    let x = exp2(s, s.sub(s.load(p.add(j)), s.splat(base)));
                    s.store(p.add(j), x);
                    sum = s.add(sum, x);
                }
                *l.add(r) = *l.add(r) * alpha + s.sum(sum);
                m.add(r).write(new);
                fresh |= new != f32::NEG_INFINITY || *l.add(r) != 0.0;
                if alpha != 1.0 {
                    for j in (0..width).step_by(S::LANES) {
                        let o = acc.add(r * width + j);
                        s.store(o, s.mul(s.load(o), s.splat(alpha)));
                    }
                }
            }
            if fresh {
                if d == width {
                    with_elem!(a.cache.dtype, T => weigh::<S, T>(s, p, group, n, v.cast::<T>(), a.cache.row_stride, acc, width));
                } else {
                    // Whole vectors would reach past the last row, so that odd widths go through padded rows.
                    let bytes = a.cache.row_stride * a.cache.dtype.size();
                    for j in 0..n {
                        s.store(values.add(j * width + width - S::LANES), s.splat(0.0));
                        load_row(s, a.cache.dtype, v.add(j * bytes), values.add(j * width), d);
                    }
                    weigh::<S, f32>(s, p, group, n, values.cast_const(), width, acc, width);
                }
            }
            start = end;
        }
        for r in 0..group {
            if even_odd && d == width {
                reorder::<S>(acc.add(r * width), d, true);
            }
            finish(s, a, head0 + r, item.row, item.part, acc.add(r * width), *m.add(r), *l.add(r));
        }
    }
}

/// Dimensions that lie in the order of [`Elem::load_two`] in q and in the result so far: those of whole pairs of vectors.
const fn paired<S: Simd>(d: usize) -> usize {
    d / (2 * S::LANES) * 2 * S::LANES
}

/// Puts the paired dimensions of a row at even places first and those at odd places second, in blocks of two vectors; or back again.
#[inline(always)]
unsafe fn reorder<S: Simd>(row: *mut f32, d: usize, back: bool) {
    for block in (0..paired::<S>(d)).step_by(2 * S::LANES) {
        let mut was = [0f32; 32];
        for i in 0..S::LANES {
            let (apart, together) = ([i, S::LANES + i], [2 * i, 2 * i + 1]);
            let (from, to) = if back { (apart, together) } else { (together, apart) };
            for (from, to) in from.into_iter().zip(to) {
                // SAFETY: the block lies within the row of D elements.
                was[to] = unsafe { *row.add(block + from) };
            }
        }
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(was.as_ptr(), row.add(block), 2 * S::LANES) };
    }
}

/// p[r, j] = q[r] · k[j] for all heads of the group and `n` keys; rows of `ahead`, read next, are fetched on the way.
#[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
#[inline(always)]
unsafe fn dots<S: Simd, T: Elem>(
    s: S,
    q: *const f32,
    group: usize,
    d: usize,
    k: *const T,
    stride: usize,
    n: usize,
    p: *mut f32,
    ahead: [*const T; 2],
) {
    let width = d.next_multiple_of(S::LANES);
    let mut r = 0;
    while r < group {
        let (q, p) = (q.wrapping_add(r * width), p.wrapping_add(r * TILE));
        // SAFETY: the caller's.
        unsafe {
            macro_rules! heads {
                ($heads:literal) => {{
                    if r == 0 {
                        heads::<S, T, $heads, true>(s, q, d, k, stride, n, p, ahead);
                    } else {
                        heads::<S, T, $heads, false>(s, q, d, k, stride, n, p, ahead);
                    }
                    $heads
                }};
            }
            r += match (group - r, S::LANES) {
                (8.., 16) => heads!(8),
                (4.., _) => heads!(4),
                (2.., _) => heads!(2),
                _ => heads!(1),
            };
        }
    }
}

/// [`dots`] of `R` heads, LANES / R keys at a time, so that LANES accumulators are summed across their lanes together.
#[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
#[inline(always)]
unsafe fn heads<S: Simd, T: Elem, const R: usize, const FETCH: bool>(
    s: S,
    q: *const f32,
    d: usize,
    k: *const T,
    stride: usize,
    n: usize,
    p: *mut f32,
    ahead: [*const T; 2],
) {
    let (width, keys) = (d.next_multiple_of(S::LANES), S::LANES / R);
    for j in (0..n).step_by(keys) {
        // SAFETY: the caller's; q is padded with zeros to whole vectors, k is read by count at its end. A key behind the last one is
        // not read: the last one stands for it, and its score is not used.
        unsafe {
            let mut acc = [s.splat(0.0); 16];
            let last = n - 1 - j;
            let mut i = 0;
            macro_rules! multiply {
                ($key:expr, $at:expr, $x:expr) => {
                    for r in 0..R {
                        acc[r * keys + $key] = s.fma(s.load(q.add(r * width + $at)), $x, acc[r * keys + $key]);
                    }
                };
            }
            while i + 2 * S::LANES <= d {
                for key in 0..keys {
                    if FETCH {
                        // A pair of vectors is one or two cache lines.
                        for rows in ahead {
                            let at = rows.wrapping_add((j + key) * stride + i).cast::<u8>();
                            s.fetch_near(at);
                            if 2 * S::LANES * size_of::<T>() > 64 {
                                s.fetch_near(at.wrapping_add(64));
                            }
                        }
                    }
                    let [x, y] = T::load_two(s, k.add((j + key.min(last)) * stride + i));
                    multiply!(key, i, x);
                    multiply!(key, i + S::LANES, y);
                }
                i += 2 * S::LANES;
            }
            while i < d {
                let count = S::LANES.min(d - i);
                for key in 0..keys {
                    let at = k.add((j + key.min(last)) * stride + i);
                    let x = if count == S::LANES { T::load(s, at) } else { T::load_n(s, at, count) };
                    multiply!(key, i, x);
                }
                i += S::LANES;
            }
            let mut sums = [0f32; 16];
            s.store(sums.as_mut_ptr(), s.sum_each(&acc));
            for r in 0..R {
                // A tile holds a multiple of `keys`; what stands behind the last one is overwritten before it is read.
                for key in 0..keys {
                    p.add(r * TILE + j + key).write(sums[r * keys + key]);
                }
            }
        }
    }
}

/// acc[r] += Σ p[r, j] · v[j] for all heads of the group.
#[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
#[inline(always)]
unsafe fn weigh<S: Simd, T: Elem>(
    s: S,
    p: *const f32,
    group: usize,
    n: usize,
    v: *const T,
    stride: usize,
    acc: *mut f32,
    width: usize,
) {
    let mut r = 0;
    while r < group {
        let (p, acc) = (p.wrapping_add(r * TILE), acc.wrapping_add(r * width));
        // As many accumulators as hide the latency of an FMA, from few heads or many.
        macro_rules! columns {
            ($heads:literal, $pairs:literal) => {{
                let mut i = 0;
                while i + $pairs * 2 * S::LANES <= width {
                    weigh_tile::<S, T, $heads, $pairs, true>(s, p, n, v.wrapping_add(i), stride, acc.wrapping_add(i), width);
                    i += $pairs * 2 * S::LANES;
                }
                while i + 2 * S::LANES <= width {
                    weigh_tile::<S, T, $heads, 1, true>(s, p, n, v.wrapping_add(i), stride, acc.wrapping_add(i), width);
                    i += 2 * S::LANES;
                }
                if i < width {
                    weigh_tile::<S, T, $heads, 1, false>(s, p, n, v.wrapping_add(i), stride, acc.wrapping_add(i), width);
                }
                $heads
            }};
        }
        // SAFETY: the caller's: columns i .. lie within rows of v and acc.
        unsafe {
            r += match (group - r, S::LANES) {
                (8.., 16) => columns!(8, 1),
                (4.., 16) => columns!(4, 2),
                (4.., _) => columns!(4, 1),
                (2.., _) => columns!(2, 2),
                (_, 16) => columns!(1, 4),
                _ => columns!(1, 2),
            };
        }
    }
}

/// [`weigh`] of `R` heads over `PAIRS` pairs of vectors, or over one vector.
#[inline(always)]
unsafe fn weigh_tile<S: Simd, T: Elem, const R: usize, const PAIRS: usize, const TWO: bool>(
    s: S,
    p: *const f32,
    n: usize,
    v: *const T,
    stride: usize,
    acc: *mut f32,
    width: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[[s.splat(0.0); 2]; PAIRS]; R];
        for j in 0..n {
            let v = v.add(j * stride);
            let mut x = [[s.splat(0.0); 2]; PAIRS];
            for (i, x) in x.iter_mut().enumerate() {
                *x = if TWO { T::load_two(s, v.add(i * 2 * S::LANES)) } else { [T::load(s, v), s.splat(0.0)] };
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let p = s.splat(*p.add(r * TILE + j));
                for (sum, x) in sums.iter_mut().zip(x) {
                    sum[0] = s.fma(p, x[0], sum[0]);
                    if TWO {
                        sum[1] = s.fma(p, x[1], sum[1]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (i, &sum) in sums.as_flattened().iter().enumerate().take(if TWO { 2 * PAIRS } else { 1 }) {
                let to = acc.add(r * width + i * S::LANES);
                s.store(to, s.add(s.load(to), sum));
            }
        }
    }
}
