//! The separate steps of unfused attention: each reads and writes its tensor in memory.
//!
//! Queries stand in the lanes as in `attention_prefill`, and the products run on the same register tiles: strips of 2·LANES queries
//! of one head, qᵀ [D, lanes], scores [L, lanes], oᵀ [D, lanes]. A work item is one strip.

use lawson_core::DType;

use super::{
    attention::{Attention, LOG2_E},
    attention_prefill_bf16::{self, V_STRIDE, pad_rows, transpose_values},
    codes::Cache,
    rows::{CacheRows, load_row, store_row},
    tile::{Tile, column},
};
use crate::{
    math::{exp2, tanh},
    simd::{DOT_STEPS, DotState, DotTile, Simd},
};

/// Dimensions that are summed before they are added to a score: large scores keep more of their last bits that way.
const PART: usize = 32;

/// The strips of a call.
#[derive(Clone, Copy)]
pub struct Strips<'a> {
    /// The attention; `out` and `q` are [T, H·D], all rows are one block.
    pub attention: Attention<'a>,
    /// Queries as strips.
    pub q: *mut f32,
    /// Scores as strips.
    pub scores: *mut f32,
    /// Results as strips.
    pub o: *mut f32,
}

/// One strip.
struct Strip {
    sequence: usize,
    head: usize,
    /// First query, as index among the new tokens of the sequence, and its token.
    query: usize,
    token: usize,
    /// Queries.
    lanes: usize,
    /// Rows of the cache.
    rows: usize,
    q: *mut f32,
    scores: *mut f32,
    o: *mut f32,
}

impl Strips<'_> {
    /// Work items of strips of `width` lanes.
    pub fn items(&self, width: usize) -> usize {
        self.attention.new.iter().map(|n| n.div_ceil(width) * self.attention.spec.heads).sum()
    }

    fn strip(&self, width: usize, mut item: usize) -> Strip {
        let a = &self.attention;
        let (mut token, mut q, mut scores) = (0, 0, 0);
        for (sequence, (&new, &past)) in a.new.iter().zip(a.past).enumerate() {
            let (strips, rows) = (new.div_ceil(width), new + past);
            let count = strips * a.spec.heads;
            if item < count {
                let query = item % strips * width;
                let q = q + item * width * a.spec.head_dim;
                return Strip {
                    sequence,
                    head: item / strips,
                    query,
                    token: token + query,
                    lanes: width.min(new - query),
                    rows,
                    q: self.q.wrapping_add(q),
                    scores: self.scores.wrapping_add(scores + item * width * rows),
                    o: self.o.wrapping_add(q),
                };
            }
            item -= count;
            token += new;
            q += count * width * a.spec.head_dim;
            scores += count * width * rows;
        }
        unreachable!("strip past the last")
    }
}

/// f32 of scratch of every step here.
pub fn scratch_len(head_dim: usize, lanes: usize) -> usize {
    (head_dim.next_multiple_of(lanes) + CacheRows::TILE * head_dim).max(Dots::scratch_len(head_dim, lanes))
}

/// Scratch of the products in bf16.
struct Dots {
    /// B in pairs: [D, strip] or [TILE, strip] bf16.
    b: *mut u8,
    /// K padded [TILE, D], or Vᵀ [D, V_STRIDE bytes].
    a: *mut f32,
    square: *mut f32,
}

impl Dots {
    const SQUARE: usize = 256;

    /// f32 of B.
    #[inline(always)]
    fn pairs_len(depth: usize, lanes: usize) -> usize {
        lanes * depth.max(CacheRows::TILE)
    }

    fn scratch_len(d: usize, lanes: usize) -> usize {
        let depth = d.next_multiple_of(DOT_STEPS);
        Dots::pairs_len(depth, lanes) + depth * V_STRIDE / 4 + Dots::SQUARE
    }

    #[inline(always)]
    fn new<S: Simd>(scratch: *mut f32, d: usize) -> Dots {
        let depth = d.next_multiple_of(DOT_STEPS);
        let a = scratch.wrapping_add(Dots::pairs_len(depth, S::LANES));
        Dots { b: scratch.cast(), a, square: a.wrapping_add(depth * V_STRIDE / 4) }
    }

    /// Rounds `n` rows of a strip to pairs, zeros up to whole blocks behind them.
    /// # Safety
    /// `from` is readable as [n, strip]; `n` is at most D or TILE.
    #[inline(always)]
    unsafe fn set_pairs<S: Simd>(&self, s: S, from: *const f32, n: usize) {
        for i in (0..n.next_multiple_of(DOT_STEPS)).step_by(2) {
            for j in (0..S::DOT_COLUMNS).step_by(S::LANES) {
                let mut x = [s.splat(0.0); 2];
                for (u, x) in x.iter_mut().enumerate() {
                    if i + u < n {
                        // SAFETY: the caller's.
                        *x = unsafe { s.load(from.add((i + u) * S::DOT_COLUMNS + j)) };
                    }
                }
                // SAFETY: b holds n up to whole blocks.
                unsafe { s.store_pairs(self.b.add((i / 2 * S::DOT_COLUMNS + j) * 4), x[0], x[1]) };
            }
        }
    }
}

/// qᵀ of one strip.
/// # Safety
/// `t` describes valid memory; `scratch` is writable as [`scratch_len`] f32; no other item with this index runs.
#[inline(always)]
pub unsafe fn transpose_q<S: Simd>(s: S, t: &Strips<'_>, item: usize, scratch: *mut f32) {
    let (width, d) = (2 * S::LANES, t.attention.spec.head_dim);
    let strip = t.strip(width, item);
    // SAFETY: the caller's.
    unsafe {
        for lane in 0..width {
            if lane < strip.lanes {
                load_row(s, t.attention.q.dtype, t.attention.q.at(strip.token + lane, strip.head * d), scratch, d);
            }
            for j in 0..d {
                strip.q.add(j * width + lane).write(if lane < strip.lanes { *scratch.add(j) } else { 0.0 });
            }
        }
    }
}

/// [T, H·D] from one strip of oᵀ.
/// # Safety
/// As [`transpose_q`].
#[inline(always)]
pub unsafe fn transpose_o<S: Simd>(s: S, t: &Strips<'_>, item: usize, scratch: *mut f32) {
    let (width, d) = (2 * S::LANES, t.attention.spec.head_dim);
    let strip = t.strip(width, item);
    // SAFETY: the caller's.
    unsafe {
        for lane in 0..strip.lanes {
            for j in 0..d {
                scratch.add(j).write(*strip.o.add(j * width + lane));
            }
            let to = t.attention.out;
            store_row(s, to.dtype, scratch, to.at(strip.token + lane, strip.head * d), d);
        }
    }
}

/// scores = k · qᵀ of one strip, every row of the cache.
/// # Safety
/// As [`transpose_q`].
#[inline(always)]
pub unsafe fn scores<S: Simd>(s: S, t: &Strips<'_>, item: usize, scratch: *mut f32) {
    let (width, d, group) = (2 * S::LANES, t.attention.spec.head_dim, t.attention.spec.group());
    let (strip, cache) = (t.strip(width, item), &t.attention.cache);
    let head = [strip.sequence, strip.head / group];
    if attention_prefill_bf16::applies(S::DOT_ROWS, t.attention.out.dtype, cache.dtype()) {
        // SAFETY: the caller's.
        return unsafe { dot_scores(s, t, &strip, &Dots::new::<S>(scratch, d)) };
    }
    for start in (0..strip.rows).step_by(CacheRows::TILE) {
        let n = CacheRows::TILE.min(strip.rows - start);
        // SAFETY: the caller's.
        unsafe {
            let (k, stride) = match cache {
                Cache::Elements(c) if c.dtype == DType::F32 => {
                    (c.k_row(head[0], head[1], start).cast::<f32>().cast_const(), c.row_stride)
                }
                cache => {
                    cache.load_keys(s, head, start..start + n, strip.rows, d, scratch, d);
                    (scratch.cast_const(), d)
                }
            };
            let c = strip.scores.add(start * width);
            for part in (0..d).step_by(PART) {
                let (k, b) = (k.add(part), strip.q.add(part * width).cast_const());
                let (steps, accumulate) = (PART.min(d - part), part > 0);
                let product = Tile { k: steps, a: k, a_stride: stride, b, b_stride: width, c, c_stride: width, accumulate };
                column::<S, false>(s, n, product);
            }
        }
    }
}

/// [`scores`] by dot products.
#[inline(always)]
unsafe fn dot_scores<S: Simd>(s: S, t: &Strips<'_>, strip: &Strip, dots: &Dots) {
    let (d, group, cache) = (t.attention.spec.head_dim, t.attention.spec.group(), &t.attention.cache);
    let mut state = DotState::default();
    // SAFETY: the caller's.
    unsafe {
        dots.set_pairs(s, strip.q, d);
        for start in (0..strip.rows).step_by(CacheRows::TILE) {
            let n = CacheRows::TILE.min(strip.rows - start);
            let (mut k, mut stride) = (cache.k_row(strip.sequence, strip.head / group, start), cache.row_bytes());
            if !d.is_multiple_of(DOT_STEPS) {
                (k, stride) = pad_rows(k, stride, n, d, dots.a.cast());
            }
            for i in (0..n).step_by(S::DOT_ROWS) {
                let tile = DotTile {
                    rows: S::DOT_ROWS.min(n - i),
                    blocks: d.div_ceil(DOT_STEPS),
                    a: k.add(i * stride),
                    row_stride: stride,
                    block_stride: DOT_STEPS * 2,
                    b: dots.b,
                    c: strip.scores.add((start + i) * S::DOT_COLUMNS),
                    c_stride: S::DOT_COLUMNS,
                    accumulate: false,
                };
                s.dots(&mut state, &tile);
            }
        }
    }
    s.end_dots(state);
}

/// [`weighted_values`] by dot products.
#[inline(always)]
unsafe fn dot_values<S: Simd>(s: S, t: &Strips<'_>, strip: &Strip, dots: &Dots) {
    let (d, group, cache) = (t.attention.spec.head_dim, t.attention.spec.group(), &t.attention.cache);
    let mut state = DotState::default();
    // SAFETY: the caller's.
    unsafe {
        for start in (0..strip.rows).step_by(CacheRows::TILE) {
            let n = CacheRows::TILE.min(strip.rows - start);
            dots.set_pairs(s, strip.scores.add(start * S::DOT_COLUMNS), n);
            let v = cache.v_row(strip.sequence, strip.head / group, start);
            transpose_values(s, d, n, v.cast(), cache.row_bytes() / 2, dots.a, dots.square);
            for i in (0..d).step_by(S::DOT_ROWS) {
                let tile = DotTile {
                    rows: S::DOT_ROWS.min(d - i),
                    blocks: n.div_ceil(DOT_STEPS),
                    a: dots.a.cast::<u8>().add(i * V_STRIDE),
                    row_stride: V_STRIDE,
                    block_stride: DOT_STEPS * 2,
                    b: dots.b,
                    c: strip.o.add(i * S::DOT_COLUMNS),
                    c_stride: S::DOT_COLUMNS,
                    accumulate: start > 0,
                };
                s.dots(&mut state, &tile);
            }
        }
    }
    s.end_dots(state);
}

/// oᵀ = vᵀ · scores of one strip.
/// # Safety
/// As [`transpose_q`].
#[inline(always)]
pub unsafe fn weighted_values<S: Simd>(s: S, t: &Strips<'_>, item: usize, scratch: *mut f32) {
    let (width, d, group) = (2 * S::LANES, t.attention.spec.head_dim, t.attention.spec.group());
    let (strip, cache) = (t.strip(width, item), &t.attention.cache);
    let head = [strip.sequence, strip.head / group];
    if attention_prefill_bf16::applies(S::DOT_ROWS, t.attention.out.dtype, cache.dtype()) {
        // SAFETY: the caller's.
        return unsafe { dot_values(s, t, &strip, &Dots::new::<S>(scratch, d)) };
    }
    for start in (0..strip.rows).step_by(CacheRows::TILE) {
        let n = CacheRows::TILE.min(strip.rows - start);
        // SAFETY: the caller's.
        unsafe {
            let (v, stride) = match cache {
                Cache::Elements(c) if c.dtype == DType::F32 => {
                    (c.v_row(head[0], head[1], start).cast::<f32>().cast_const(), c.row_stride)
                }
                cache => {
                    (0..n).for_each(|i| cache.load_value(s, head, start + i, d, scratch.add(i * d)));
                    (scratch.cast_const(), d)
                }
            };
            let b = strip.scores.add(start * width).cast_const();
            let product =
                Tile { k: n, a: v, a_stride: stride, b, b_stride: width, c: strip.o, c_stride: width, accumulate: start > 0 };
            column::<S, true>(s, d, product);
        }
    }
}

/// Applies `f(row, lane vector, score)` to one strip.
#[inline(always)]
unsafe fn each<S: Simd>(s: S, strip: &Strip, f: impl Fn(usize, usize, S::F) -> S::F) {
    let width = 2 * S::LANES;
    for row in 0..strip.rows {
        for j in (0..width).step_by(S::LANES) {
            // SAFETY: the caller's: the strip holds rows × width scores.
            unsafe {
                let p = strip.scores.add(row * width + j);
                s.store(p, f(row, j, s.load(p)));
            }
        }
    }
}

/// Multiplies one strip by the scale.
/// # Safety
/// As [`transpose_q`].
#[inline(always)]
pub unsafe fn scale<S: Simd>(s: S, t: &Strips<'_>, item: usize, _: *mut f32) {
    let factor = s.splat(t.attention.spec.scale() as f32);
    // SAFETY: the caller's.
    unsafe { each(s, &t.strip(2 * S::LANES, item), |_, _, x| s.mul(x, factor)) }
}

/// c · tanh(s / c) on one strip.
/// # Safety
/// As [`transpose_q`].
#[inline(always)]
pub unsafe fn softcap<S: Simd>(s: S, t: &Strips<'_>, item: usize, _: *mut f32) {
    let cap = t.attention.spec.softcap.map_or(1.0, |c| c.get());
    let (cap, inverse) = (s.splat(cap as f32), s.splat((1.0 / cap) as f32));
    // SAFETY: the caller's.
    unsafe { each(s, &t.strip(2 * S::LANES, item), |_, _, x| s.mul(cap, tanh(s, s.mul(x, inverse)))) }
}

/// −slope · (i − j) on one strip.
/// # Safety
/// As [`transpose_q`].
#[inline(always)]
pub unsafe fn alibi<S: Simd>(s: S, t: &Strips<'_>, item: usize, _: *mut f32) {
    let strip = t.strip(2 * S::LANES, item);
    // SAFETY: the caller's.
    unsafe {
        let slope = s.splat(t.attention.slopes.map_or(0.0, |p| *p.add(strip.head)));
        let position = positions(s, &t.attention, &strip);
        each(s, &strip, |row, j, x| s.fma(slope, s.sub(s.splat(row as f32), position[j / S::LANES]), x));
    }
}

#[inline(always)]
fn positions<S: Simd>(s: S, a: &Attention<'_>, strip: &Strip) -> [S::F; 2] {
    let lanes: [f32; 32] = std::array::from_fn(|i| (a.past[strip.sequence] + strip.query + i) as f32);
    // SAFETY: 32 ≥ 2·LANES elements.
    unsafe { [s.load(lanes.as_ptr()), s.load(lanes.as_ptr().add(S::LANES))] }
}

/// −∞ where a query of one strip sees nothing.
/// # Safety
/// As [`transpose_q`].
#[inline(always)]
pub unsafe fn mask<S: Simd>(s: S, t: &Strips<'_>, item: usize, _: *mut f32) {
    let (width, a) = (2 * S::LANES, &t.attention);
    let strip = t.strip(width, item);
    // SAFETY: the caller's.
    unsafe {
        if a.spec.causal {
            let position = positions(s, a, &strip);
            let back = s.splat(a.spec.window.map_or(f32::INFINITY, |w| (w - 1) as f32));
            let minus_inf = s.splat(f32::NEG_INFINITY);
            each(s, &strip, |row, j, x| {
                let (at, position) = (s.splat(row as f32), position[j / S::LANES]);
                s.select_lt(position, at, minus_inf, s.select_lt(at, s.sub(position, back), minus_inf, x))
            });
        }
        if let Some(m) = a.mask {
            for lane in 0..strip.lanes {
                let bytes = m.row(strip.sequence, strip.head, strip.query + lane);
                for row in 0..strip.rows {
                    if *bytes.add(row) == 0 {
                        strip.scores.add(row * width + lane).write(f32::NEG_INFINITY);
                    }
                }
            }
        }
    }
}

/// Softmax over the rows of one strip, in place.
/// # Safety
/// As [`transpose_q`].
#[inline(always)]
pub unsafe fn softmax<S: Simd>(s: S, t: &Strips<'_>, item: usize, _: *mut f32) {
    let width = 2 * S::LANES;
    let strip = t.strip(width, item);
    let (minus_inf, zero, log2e) = (s.splat(f32::NEG_INFINITY), s.splat(0.0), s.splat(LOG2_E));
    for j in (0..width).step_by(S::LANES) {
        // SAFETY: the caller's.
        unsafe {
            let at = |row: usize| strip.scores.add(row * width + j);
            let sink = t.attention.sinks.map(|p| s.mul(s.splat(*p.add(strip.head)), log2e));
            let mut top = [minus_inf; 4];
            for row in 0..strip.rows {
                top[row % 4] = s.max(top[row % 4], s.load(at(row)));
            }
            let seen = s.mul(s.max(s.max(top[0], top[1]), s.max(top[2], top[3])), log2e);
            let top = sink.map_or(seen, |x| s.max(seen, x));
            let base = s.select_lt(minus_inf, top, top, zero);
            let mut sum = [sink.map_or(zero, |x| exp2(s, s.sub(x, base))), zero, zero, zero];
            for row in 0..strip.rows {
                let p = exp2(s, s.sub(s.mul(s.load(at(row)), log2e), base));
                s.store(at(row), p);
                sum[row % 4] = s.add(sum[row % 4], p);
            }
            let sum = s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]));
            // A query that sees nothing has p = 0 and, without a sink, a sum of 0.
            let factor = s.div(s.splat(1.0), s.select_lt(minus_inf, top, sum, s.splat(1.0)));
            for row in 0..strip.rows {
                s.store(at(row), s.mul(s.load(at(row)), factor));
            }
        }
    }
}
