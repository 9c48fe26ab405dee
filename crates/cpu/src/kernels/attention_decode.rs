//! Attention of one query over a long cache: all query heads of a group share every row of K and V that is read.
//!
//! Bytes 2·D·L·size for each key/value head, each once; operations 4·D·L·H/G. That is 2/size · H/G operations a byte: memory binds while that is
//! less than the processor's operations for each byte that a read loop gets. Some keys at a time, so that they and their values
//! stay in first-level cache while the heads take turns at them; each phase fetches the next rows of what it reads. Scores are
//! dot products along D, LANES of them summed across their lanes at once, and stand as [keys, heads], so that the heads' softmax is one;
//! values stand in the lanes. Elements narrower than f32 are widened, bf16 two vectors at a time. Codes of a quantised cache are
//! multiplied as they are (`attention_decode_codes`); those of a group that is not finished, and of odd widths, become f32 once for all heads, a
//! tile at a time.

use lawson_core::{CacheDType, DType, problem::AttentionSpec, quantised::GROUP};

use super::{
    attention::{Attention, LOG2_E, finish},
    attention_decode_codes::{CodeScores, CodeWeigh},
    codes::{Cache, with_codes},
    rows::{CacheRows, load_row, with_elem},
};
use crate::{
    math::{exp2, tanh},
    simd::{Load, Outlined, ScoreTile, Simd, VALUE_COLUMNS, ValueTile},
};

/// Bytes of a tile's keys: they, the tile's values, and the keys and values behind them that are fetched on the way are a first-level cache.
const TILE_BYTES: usize = 8 << 10;

/// Most keys of a tile.
const TILE: usize = CacheRows::TILE;

/// Keys of a tile.
fn tile_keys(row_bytes: usize) -> usize {
    (TILE_BYTES / row_bytes).clamp(16, TILE)
}

/// Keys that scores are computed for behind the last one at most: LANES / R of them are summed up at once.
const SPARE: usize = 16;

/// f32 of scratch of a decode item over a cache of `kv_dtype`.
pub fn scratch_len(spec: &AttentionSpec, kv_dtype: CacheDType, lanes: usize) -> usize {
    let width = spec.head_dim.next_multiple_of(lanes);
    let group = spec.group();
    let keys = kv_dtype.codes().map_or(0, |_| TILE * width);
    group * (2 * width + 3) + (TILE + SPARE) * group + TILE * width + keys
}

/// Calls `$body` with `$r` as the constant that `$heads` is.
macro_rules! with_heads {
    ($heads:expr, $r:ident => $body:expr) => {
        match $heads {
            8 if S::LANES >= 8 => {
                const $r: usize = 8;
                $body
            }
            4 => {
                const $r: usize = 4;
                $body
            }
            2 => {
                const $r: usize = 2;
                $body
            }
            1 => {
                const $r: usize = 1;
                $body
            }
            other => unreachable!("{other} heads at once"),
        }
    };
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
    let values = p.wrapping_add(group * (TILE + SPARE));
    let m = values.wrapping_add(TILE * width);
    let l = m.wrapping_add(group);
    let alpha = l.wrapping_add(group);
    let keys = alpha.wrapping_add(group);
    // What the tiles are of: rows of the cache, or of `keys` and `values`, which codes are expanded into.
    let (dtype, stride, quantised) = match &a.cache {
        Cache::Elements(c) => (c.dtype, c.row_stride, false),
        Cache::Codes(_) => (DType::F32, width, true),
    };
    let (factor, cap) = a.factors();
    let position = a.past[b] + item.queries.start;
    let seen = a.visible(b, item.queries.start, item.part);
    // Codes of a finished group of keys are multiplied as they are.
    let codes = match &a.cache {
        Cache::Codes(c) if d.is_multiple_of(GROUP) => Some(c),
        _ => None,
    };
    let finished = a.len(b) / GROUP * GROUP;
    let even_odd = match codes {
        Some(c) => with_codes!(c.codes, T => T::EVEN_ODD),
        None => with_elem!(dtype, T => T::EVEN_ODD),
    };
    let tile = if quantised { GROUP } else { tile_keys(d * dtype.size()) };
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
                reorder(s, q, d, false);
            }
            m.add(r).write(f32::NEG_INFINITY);
            l.add(r).write(0.0);
        }
        let mut start = seen.start;
        while start < seen.end {
            let end = (start / tile * tile + tile).min(seen.end);
            let n = end - start;
            let codes = codes.filter(|_| end <= finished);
            let expanded = quantised && codes.is_none();
            let mut k = a.cache.k_row(b, item.kv_head, start);
            let v = a.cache.v_row(b, item.kv_head, start);
            // The last tile has none behind it, so that it fetches what it has.
            let ahead = if end < seen.end && !expanded { n * a.cache.row_bytes() } else { 0 };
            if expanded {
                a.cache.load_keys(s, [b, item.kv_head], start..end, a.len(b), d, keys, width);
                k = keys.cast();
            }
            let (next_k, next_v) = (k.wrapping_add(ahead), v.wrapping_add(ahead));
            if d != width || expanded {
                // Whole vectors would reach past the last row, so that odd widths go through padded rows.
                for j in 0..n {
                    s.store(values.add(j * width + width - S::LANES), s.splat(0.0));
                    a.cache.load_value(s, [b, item.kv_head], start + j, d, values.add(j * width));
                    if expanded && even_odd {
                        reorder(s, keys.add(j * width), d, false);
                        reorder(s, values.add(j * width), d, false);
                    }
                }
            }
            let mut r = 0;
            while r < group {
                let heads = match (group - r, S::LANES) {
                    (8.., 8 | 16) => 8,
                    (4.., _) => 4,
                    (2.., _) => 2,
                    _ => 1,
                };
                let (q, acc, m, l) = (q.add(r * width), acc.add(r * width), m.add(r), l.add(r));
                // The first heads fetch what follows for all; the others have what they read.
                let (next_k, next_v) = if r == 0 { (next_k, next_v) } else { (k, v) };
                match codes {
                    Some(c) => with_codes!(c.codes, T => {
                        let (k, next, stride) = (k.cast::<T>(), next_k.cast::<T>(), d / T::PACKED);
                        let scales = c.k_scales(b, item.kv_head, start).cast_const();
                        let lost = *c.lost(b, item.kv_head, start) >> (start % GROUP);
                        with_heads!(heads, R => {
                            let scores = Scores::<T, R> { q, d, k, stride, n, p, next };
                            s.call(CodeScores { scores, scales, lost, folded: keys });
                        });
                    }),
                    None => with_elem!(dtype, T => {
                        let (k, next) = (k.cast::<T>(), next_k.cast::<T>());
                        with_heads!(heads, R => s.call(Scores::<T, R> { q, d, k, stride, n, p, next }));
                    }),
                }
                // Scores behind the last key are anything; they become −∞ below.
                let len = n.next_multiple_of(S::LANES / heads) * heads;
                if let Some(cap) = cap {
                    for j in (0..len).step_by(S::LANES) {
                        s.store(p.add(j), s.mul(tanh(s, s.load(p.add(j))), s.splat(cap)));
                    }
                }
                for i in 0..heads {
                    let (p, head) = (p.add(i), head0 + r + i);
                    if let Some(slope) = a.slopes.map(|x| *x.add(head) * LOG2_E) {
                        for j in 0..n {
                            *p.add(j * heads) += slope * ((start + j) as f32 - position as f32);
                        }
                    }
                    if let Some(mask) = a.mask.map(|x| x.row(b, head, item.queries.start)) {
                        for j in 0..n {
                            if *mask.add(start + j) == 0 {
                                p.add(j * heads).write(f32::NEG_INFINITY);
                            }
                        }
                    }
                }
                for i in n * heads..len {
                    p.add(i).write(f32::NEG_INFINITY);
                }
                if with_heads!(heads, R => softmax::<S, R>(s, p, len, m, l, alpha)) {
                    if let Some(c) = codes {
                        with_codes!(c.codes, T => {
                            let (v, next, stride) = (v.cast::<T>(), next_v.cast::<T>(), d / T::PACKED);
                            let scales = c.v_scales(b, item.kv_head, start).cast_const();
                            with_heads!(heads, R => {
                                let weigh = Weigh::<T, R> { p, p_step: 0, n, v, stride, acc, alpha, width, next };
                                s.call(CodeWeigh { weigh, scales, folded: values });
                            });
                        });
                    } else if d == width && !expanded {
                        with_elem!(dtype, T => {
                            let (v, next) = (v.cast::<T>(), next_v.cast::<T>());
                            with_heads!(heads, R => s.call(Weigh::<T, R> { p, p_step: 0, n, v, stride, acc, alpha, width, next }));
                        });
                    } else {
                        let (v, stride) = (values.cast_const(), width);
                        with_heads!(heads, R => s.call(Weigh::<f32, R> { p, p_step: 0, n, v, stride, acc, alpha, width, next: v }));
                    }
                }
                r += heads;
            }
            start = end;
        }
        for r in 0..group {
            if even_odd && d == width {
                reorder(s, acc.add(r * width), d, true);
            }
            finish(s, a, head0 + r, item.row, item.part, acc.add(r * width), *m.add(r), *l.add(r));
        }
    }
}

/// Dimensions that lie in the order of [`Load::load_two`] in q and in the result so far: those of whole pairs of vectors.
const fn paired<S: Simd>(d: usize) -> usize {
    d / (2 * S::LANES) * 2 * S::LANES
}

/// Puts the paired dimensions of a row at even places first and those at odd places second, in blocks of two vectors; or back again.
#[inline(always)]
unsafe fn reorder<S: Simd>(s: S, row: *mut f32, d: usize, back: bool) {
    for block in (0..paired::<S>(d)).step_by(2 * S::LANES) {
        let at = row.wrapping_add(block);
        // SAFETY: the block lies within the row of D elements.
        unsafe {
            let was = [s.load(at), s.load(at.add(S::LANES))];
            let [x, y] = if back { s.interleave(was) } else { s.deinterleave(was) };
            s.store(at, x);
            s.store(at.add(S::LANES), y);
        }
    }
}

/// p[j, r] = q[r] · k[j] for `R` heads and `n` keys. LANES sums are added up across their lanes at once. The rows from `next` on, as many,
/// are fetched on the way.
#[derive(Clone, Copy)]
pub(super) struct Scores<T, const R: usize> {
    /// [R, D up to whole vectors], in the order of [`Load::load_two`].
    pub q: *const f32,
    pub d: usize,
    /// [n, D], rows `stride` apart.
    pub k: *const T,
    pub stride: usize,
    pub n: usize,
    /// [n up to LANES / R keys more, R].
    pub p: *mut f32,
    /// Any address.
    pub next: *const T,
}

impl<T: Load, const R: usize> Outlined for Scores<T, R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe { scores(s, self) }
    }
}

#[inline(always)]
pub(super) unsafe fn scores<S: Simd, T: Load, const R: usize>(s: S, Scores { q, d, k, stride, n, p, next }: Scores<T, R>) {
    let (width, keys) = (d.next_multiple_of(S::LANES), S::LANES / R);
    let mut j = 0;
    'tiles: while R.is_multiple_of(4) && j + 3 <= n {
        for r in (0..R).step_by(4) {
            let next = if r == 0 { next } else { k };
            let at = |k: *const T| k.wrapping_add(j * stride);
            let t = ScoreTile { d, q: q.wrapping_add(r * d), k: at(k), stride, p: p.wrapping_add(j * R + r), next: at(next) };
            // SAFETY: the caller's; keys j .. j + 3 are among the n.
            if !unsafe { s.score_tile::<T, R>(&t) } {
                break 'tiles;
            }
        }
        j += 3;
    }
    while j < n {
        // SAFETY: the caller's; q is padded with zeros to whole vectors, k is read by count at its end. A key behind the last one is
        // not read: the last one stands for it, and its score is not used.
        unsafe {
            let mut acc = [s.splat(0.0); 16];
            let last = n - 1 - j;
            let mut i = 0;
            macro_rules! multiply {
                ($key:expr, $at:expr, $x:expr) => {
                    for r in 0..R {
                        acc[$key * R + r] = s.fma(s.load(q.add(r * width + $at)), $x, acc[$key * R + r]);
                    }
                };
            }
            while i + 2 * S::LANES <= d {
                for key in 0..keys {
                    let at = k.add((j + key.min(last)) * stride + i / T::PACKED);
                    let near = if stride * T::PACKED == d { i * keys + key * 2 * S::LANES } else { key * stride * T::PACKED + i };
                    fetch::<S, T>(s, next.wrapping_add(j * stride + near / T::PACKED));
                    let [x, y] = T::load_two(s, at);
                    multiply!(key, i, x);
                    multiply!(key, i + S::LANES, y);
                }
                i += 2 * S::LANES;
            }
            while i < d {
                let count = S::LANES.min(d - i);
                for key in 0..keys {
                    let at = k.add((j + key.min(last)) * stride + i / T::PACKED);
                    let x = if count == S::LANES { T::load(s, at) } else { T::load_n(s, at, count) };
                    multiply!(key, i, x);
                }
                i += S::LANES;
            }
            s.store(p.add(j * R), s.sum_each(&acc));
        }
        j += keys;
    }
}

/// Asks for two vectors: one or two cache lines. Rows that lie together are asked for in the order of their addresses, not in that of their use,
/// since processors then run ahead of it.
#[inline(always)]
fn fetch<S: Simd, T>(s: S, at: *const T) {
    s.fetch_near(at.cast());
    if 2 * S::LANES * size_of::<T>() > 64 {
        s.fetch_near(at.cast::<u8>().wrapping_add(64));
    }
}

/// Lane i becomes `pick` of all lanes that are of its head, i mod `HEADS`.
#[inline(always)]
fn of_head<S: Simd, const HEADS: usize>(s: S, v: S::F, pick: impl Fn(f32, f32) -> f32) -> S::F {
    if HEADS == S::LANES {
        return v;
    }
    let mut lanes = [0f32; 16];
    // SAFETY: LANES ≤ 16.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    let (heads, others) = lanes[..S::LANES].split_at_mut(HEADS);
    for other in others.chunks_exact_mut(HEADS) {
        heads.iter_mut().zip(other).for_each(|(head, other)| *head = pick(*head, *other));
    }
    // SAFETY: the first HEADS of 16 lanes are those of each head.
    unsafe { each_head::<S, HEADS>(s, lanes.as_ptr()) }
}

/// Lane i is that of head i mod `HEADS`.
/// # Safety
/// `heads` is readable as `HEADS` f32.
#[inline(always)]
pub(super) unsafe fn each_head<S: Simd, const HEADS: usize>(s: S, heads: *const f32) -> S::F {
    let mut lanes = [0f32; 16];
    // SAFETY: the caller's; LANES ≤ 16.
    unsafe {
        for lanes in lanes[..S::LANES].chunks_exact_mut(HEADS) {
            std::ptr::copy_nonoverlapping(heads, lanes.as_mut_ptr(), HEADS);
        }
        s.load(lanes.as_ptr())
    }
}

/// Makes weights of the scores p[j, heads] of whole vectors, −∞ where a key is not seen: p = 2^(p − m) with the heads' new maxima m, their
/// sums l, and `alpha`, what the results so far are multiplied by. Returns whether there is a weight other than 0.
#[inline(always)]
unsafe fn softmax<S: Simd, const HEADS: usize>(s: S, p: *mut f32, len: usize, m: *mut f32, l: *mut f32, alpha: *mut f32) -> bool {
    // SAFETY: the caller's.
    unsafe {
        let old = each_head::<S, HEADS>(s, m);
        let mut top = old;
        for i in (0..len).step_by(S::LANES) {
            top = s.max(top, s.load(p.add(i)));
        }
        let new = of_head::<S, HEADS>(s, top, f32::max);
        // A head that has seen nothing yet subtracts 0, so that its scores of −∞ give 0 and not NaN.
        let base = s.select_lt(s.splat(f32::NEG_INFINITY), new, new, s.splat(0.0));
        let factor = exp2(s, s.sub(old, base));
        let mut sum = s.splat(0.0);
        for i in (0..len).step_by(S::LANES) {
            let x = exp2(s, s.sub(s.load(p.add(i)), base));
            s.store(p.add(i), x);
            sum = s.add(sum, x);
        }
        let sum = of_head::<S, HEADS>(s, sum, |a, b| a + b);
        let total = s.fma(each_head::<S, HEADS>(s, l), factor, sum);
        for (to, v) in [(m, new), (l, total), (alpha, factor)] {
            // Not `store_n`: a store under a mask is slow.
            let mut lanes = [0f32; 16];
            s.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, HEADS);
        }
        s.sum(sum) != 0.0
    }
}

/// acc[r] = acc[r] · alpha[r] + Σ p[j, r] · v[j] for `R` heads. The rows from `next` on, as many, are fetched on the way.
#[derive(Clone, Copy)]
pub(super) struct Weigh<T, const R: usize> {
    /// [n, R].
    pub p: *const f32,
    /// From the weights for [`GROUP`] dimensions to those for the next; 0 where they are the same.
    pub p_step: usize,
    pub n: usize,
    /// [n, width], rows `stride` apart.
    pub v: *const T,
    pub stride: usize,
    /// [R, width], in the order of [`Load::load_two`].
    pub acc: *mut f32,
    /// `[R]`.
    pub alpha: *const f32,
    pub width: usize,
    /// Any address.
    pub next: *const T,
}

impl<T: Load, const R: usize> Outlined for Weigh<T, R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe { weigh(s, self) }
    }
}

#[inline(always)]
pub(super) unsafe fn weigh<S: Simd, T: Load, const R: usize>(
    s: S,
    Weigh { p, p_step, n, v, stride, acc, alpha, width, next }: Weigh<T, R>,
) {
    // As many accumulators as hide the latency of an FMA, from few heads or many.
    macro_rules! columns {
        ($heads:literal, $pairs:literal) => {
            for r in (0..R).step_by($heads) {
                let (p, acc, alpha) = (p.add(r), acc.add(r * width), alpha.add(r));
                let next = if r == 0 { next } else { v };
                let contiguous = stride * T::PACKED == width;
                let at = |i: usize| next.wrapping_add(if contiguous { i * n } else { i } / T::PACKED);
                let mut i = 0;
                while $heads == 4 && p_step == 0 && i + VALUE_COLUMNS <= width {
                    let half = VALUE_COLUMNS / 2;
                    let next_stride = if stride == width { half } else { stride };
                    let (v, acc, next) = (v.add(i), acc.add(i), [at(i), at(i + half)]);
                    if !s.value_tile::<T, R>(&ValueTile { n, p, v, stride, acc, acc_stride: width, alpha, next, next_stride }) {
                        break;
                    }
                    i += VALUE_COLUMNS;
                }
                macro_rules! tile {
                    ($count:literal, $two:literal) => {{
                        let (p, v) = (p.add(i / GROUP * p_step), v.add(i / T::PACKED));
                        weigh_tile::<S, T, R, $heads, $count, $two>(s, p, n, v, stride, acc.add(i), alpha, width, at(i))
                    }};
                }
                // Weights are the same within GROUP dimensions.
                while (p_step == 0 || $pairs * 2 * S::LANES <= GROUP) && i + $pairs * 2 * S::LANES <= width {
                    tile!($pairs, true);
                    i += $pairs * 2 * S::LANES;
                }
                while i + 2 * S::LANES <= width {
                    tile!(1, true);
                    i += 2 * S::LANES;
                }
                if i < width {
                    tile!(1, false);
                }
            }
        };
    }
    // SAFETY: the caller's: columns i .. lie within rows of v and acc.
    unsafe {
        match (R, S::LANES) {
            (8, 16) => columns!(8, 1),
            (4, 16) => columns!(4, 2),
            (4 | 8, _) => columns!(4, 1),
            (2, _) => columns!(2, 2),
            (_, 16) => columns!(1, 4),
            _ => columns!(1, 2),
        }
    }
}

/// [`weigh`] of `R` of `HEADS` heads over `PAIRS` pairs of vectors, or over one vector.
#[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
#[inline(always)]
unsafe fn weigh_tile<S: Simd, T: Load, const HEADS: usize, const R: usize, const PAIRS: usize, const TWO: bool>(
    s: S,
    p: *const f32,
    n: usize,
    v: *const T,
    stride: usize,
    acc: *mut f32,
    alpha: *const f32,
    width: usize,
    next: *const T,
) {
    let keys = S::LANES / R;
    let step = if stride * T::PACKED == width { PAIRS * 2 * S::LANES / T::PACKED } else { stride };
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[[s.splat(0.0); 2]; PAIRS]; R];
        macro_rules! step {
            ($j:expr) => {
                let (p, v, next) = (p.add($j * HEADS), v.add($j * stride), next.wrapping_add($j * step));
                let mut x = [[s.splat(0.0); 2]; PAIRS];
                for (i, x) in x.iter_mut().enumerate() {
                    let at = i * 2 * S::LANES / T::PACKED;
                    let (v, next) = (v.add(at), next.wrapping_add(at));
                    if TWO {
                        fetch::<S, T>(s, next);
                    }
                    *x = if TWO { T::load_two(s, v) } else { [T::load(s, v), s.splat(0.0)] };
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let p = s.splat(*p.add(r));
                    for (sum, x) in sums.iter_mut().zip(x) {
                        sum[0] = s.fma(p, x[0], sum[0]);
                        if TWO {
                            sum[1] = s.fma(p, x[1], sum[1]);
                        }
                    }
                }
            };
        }
        for i in 0..n / keys {
            for key in 0..keys {
                step!(i * keys + key);
            }
        }
        for j in n / keys * keys..n {
            step!(j);
        }
        for (r, sums) in sums.iter().enumerate() {
            let alpha = s.splat(*alpha.add(r));
            for (i, &sum) in sums.as_flattened().iter().enumerate().take(if TWO { 2 * PAIRS } else { 1 }) {
                let to = acc.add(r * width + i * S::LANES);
                s.store(to, s.fma(s.load(to), alpha, sum));
            }
        }
    }
}
