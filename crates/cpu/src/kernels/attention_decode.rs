//! Attention of one query over a long cache: all query heads of a group share every row of K and V that is read.
//!
//! Bytes 2·D·L·size for each key/value head, each once; operations 4·D·L·H/G. With f32 that is H/G operations a byte: memory
//! binds up to some ten heads a group. Keys stand one after another (dot products along D), values in the lanes.

use lawson_core::problem::AttentionSpec;

use super::{
    attention::{Attention, LOG2_E, finish},
    rows::{CacheRows, load_row, with_elem},
    tile::{Tile, column},
};
use crate::{
    math::{exp2, tanh},
    simd::{Elem, Simd},
};

/// f32 of scratch of a decode item.
pub fn scratch_len(spec: &AttentionSpec, lanes: usize) -> usize {
    let width = spec.head_dim.next_multiple_of(lanes);
    let group = spec.group();
    group * (2 * width + CacheRows::TILE + 2) + CacheRows::TILE * width
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
    let tile = CacheRows::TILE;
    let (q, acc) = (scratch, scratch.wrapping_add(group * width));
    let p = acc.wrapping_add(group * width);
    let m = p.wrapping_add(group * tile);
    let l = m.wrapping_add(group);
    let values = l.wrapping_add(group);
    let (factor, cap) = a.factors();
    let position = a.past[b] + item.queries.start;
    let seen = a.visible(b, item.queries.start, item.part);
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
            m.add(r).write(f32::NEG_INFINITY);
            l.add(r).write(0.0);
        }
        let mut start = seen.start;
        while start < seen.end {
            let end = (start / tile * tile + tile).min(seen.end);
            let n = end - start;
            let k = a.cache.k_row(b, item.kv_head, start);
            let v = a.cache.v_row(b, item.kv_head, start);
            let next = a.cache.k_row(b, item.kv_head, end);
            with_elem!(a.cache.dtype, T => {
                dots::<S, T>(s, q, group, d, k.cast::<T>(), a.cache.row_stride, n, p, [v.cast::<T>(), next.cast::<T>()])
            });
            let mut fresh = false;
            for r in 0..group {
                let (p, head) = (p.add(r * tile), head0 + r);
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
                for j in 0..n {
                    let x = p.add(j);
                    if let Some(slope) = slope {
                        *x += slope * ((start + j) as f32 - position as f32);
                    }
                    if mask.is_some_and(|mask| *mask.add(start + j) == 0) {
                        x.write(f32::NEG_INFINITY);
                    }
                }
                let old = *m.add(r);
                let mut top = s.splat(old);
                for j in (0..n).step_by(S::LANES) {
                    top = s.max(top, s.load(p.add(j)));
                }
                let new = s.max_lane(top).max(old);
                let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
                let alpha = (old - base).exp2();
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
            finish(s, a, head0 + r, item.row, item.part, acc.add(r * width), *m.add(r), *l.add(r));
        }
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
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
    unsafe fn heads<S: Simd, T: Elem, const R: usize>(
        s: S,
        q: *const f32,
        width: usize,
        d: usize,
        k: *const T,
        stride: usize,
        n: usize,
        p: *mut f32,
        ahead: [*const T; 2],
        ahead_bytes: usize,
    ) {
        for j in 0..n {
            for start in ahead {
                let row = start.wrapping_add(j * stride).cast::<u8>();
                for line in (0..ahead_bytes).step_by(64) {
                    s.fetch(row.wrapping_add(line));
                }
            }
            // SAFETY: the caller's; q is padded with zeros to whole vectors, k is read by count at its end.
            unsafe {
                let k = k.add(j * stride);
                let mut acc = [s.splat(0.0); R];
                let mut i = 0;
                while i < d {
                    let x = if i + S::LANES <= d { T::load(s, k.add(i)) } else { T::load_n(s, k.add(i), d - i) };
                    for (r, acc) in acc.iter_mut().enumerate() {
                        *acc = s.fma(s.load(q.add(r * width + i)), x, *acc);
                    }
                    i += S::LANES;
                }
                for (r, acc) in acc.into_iter().enumerate() {
                    p.add(r * CacheRows::TILE + j).write(s.sum(acc));
                }
            }
        }
    }
    let width = d.next_multiple_of(S::LANES);
    let mut r = 0;
    while r < group {
        let (q, p) = (q.wrapping_add(r * width), p.wrapping_add(r * CacheRows::TILE));
        let bytes = if r == 0 { d * size_of::<T>() } else { 0 };
        // SAFETY: the caller's.
        unsafe {
            match group - r {
                1 => heads::<S, T, 1>(s, q, width, d, k, stride, n, p, ahead, bytes),
                2 => heads::<S, T, 2>(s, q, width, d, k, stride, n, p, ahead, bytes),
                3 => heads::<S, T, 3>(s, q, width, d, k, stride, n, p, ahead, bytes),
                _ => heads::<S, T, 4>(s, q, width, d, k, stride, n, p, ahead, bytes),
            }
        }
        r += 4.min(group - r);
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
    let mut column0 = 0;
    while column0 < width {
        let vectors = if column0 + 2 * S::LANES <= width { 2 } else { 1 };
        let t = Tile {
            k: n,
            a: p,
            a_stride: CacheRows::TILE,
            b: v.wrapping_add(column0),
            b_stride: stride,
            c: acc.wrapping_add(column0),
            c_stride: width,
            accumulate: true,
        };
        // SAFETY: the caller's: columns column0 .. lie within rows of v and acc.
        unsafe { column::<S, T, false>(s, group, vectors, t) };
        column0 += vectors * S::LANES;
    }
}
