//! Tiled attention with online softmax (arXiv:1805.02867, 2205.14135), many queries.
//!
//! Queries stand in the lanes: a strip of up to 2·LANES queries of one key/value head holds qᵀ [D, lanes]; scores of a tile of 64
//! keys come out as [keys, lanes], so that K and V are read where they lie, softmax needs no step across lanes, and every query
//! head of a group shares the tile. Operations 4·D for each visible (query, key, head) and some 12 for the exponential; bytes: K and V
//! once for each query tile, from second-level cache while the strips of an item take turns at them. Tiles that no lane sees
//! are skipped; only tiles that some lane sees in part are masked.

use std::ops::Range;

use lawson_core::{DType, problem::AttentionSpec};

use super::{
    rows::{CacheRows, Rows, load_row, store_row},
    tile::{Tile, column},
};
use crate::{
    math::{exp2, tanh},
    simd::Simd,
};

/// log₂ e: scores are kept in base 2.
pub const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// An arbitrary mask; nonzero is visible.
#[derive(Clone, Copy, Debug)]
pub struct MaskRows {
    /// First byte.
    pub start: *const u8,
    /// Bytes between sequences, 0 when one mask serves all.
    pub sequence_stride: usize,
    /// Bytes between heads, 0 when one mask serves all.
    pub head_stride: usize,
    /// Bytes between queries.
    pub row_stride: usize,
}

impl MaskRows {
    /// Address of the mask of cache row 0.
    #[inline(always)]
    pub fn row(&self, sequence: usize, head: usize, index: usize) -> *const u8 {
        self.start.wrapping_add(sequence * self.sequence_stride + head * self.head_stride + index * self.row_stride)
    }
}

/// An attention step over a block of rows.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Heads, masking and score rules.
    pub spec: &'a AttentionSpec,
    /// [rows of the block, H·D].
    pub q: Rows,
    /// The cache, new rows included.
    pub cache: CacheRows,
    /// [rows of the block, H·D].
    pub out: Rows,
    /// Natural log-sum-exp, [rows of the block, H].
    pub lse: Option<*mut f32>,
    /// The arbitrary mask.
    pub mask: Option<MaskRows>,
    /// `[H]`.
    pub sinks: Option<*const f32>,
    /// `[H]`.
    pub slopes: Option<*const f32>,
    /// New tokens of each sequence.
    pub new: &'a [usize],
    /// Past rows of each sequence.
    pub past: &'a [usize],
    /// First token of the block.
    pub first: usize,
    /// Tokens of the block.
    pub rows: usize,
    /// Queries of a work item; 0 for the decode kernel.
    pub query_tile: usize,
    /// Rows of each part of the cache; one part when `None`.
    pub split: Option<usize>,
    /// Where parts go: [rows of the block, H, parts, D + 2], each acc, m (base 2) and l. Null when one part is all there is.
    pub parts: *mut f32,
    /// Parts of the longest sequence.
    pub most_parts: usize,
}

/// What one work item computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The sequence.
    pub sequence: usize,
    /// The key/value head.
    pub kv_head: usize,
    /// Its queries, as indices among the new tokens of the sequence.
    pub queries: Range<usize>,
    /// The row of the block that its first query has.
    pub row: usize,
    /// Which part of the cache.
    pub part: usize,
}

impl Attention<'_> {
    /// The tokens of each sequence that lie in this row block: (sequence, indices among its new tokens, row of the first).
    fn sequences(&self) -> impl Iterator<Item = (usize, Range<usize>, usize)> + '_ {
        let (first, end) = (self.first, self.first + self.rows);
        let mut start = 0;
        self.new.iter().enumerate().filter_map(move |(b, &n)| {
            let begin = start;
            start += n;
            let (lo, hi) = (first.max(begin), end.min(begin + n));
            (lo < hi).then(|| (b, lo - begin..hi - begin, lo - first))
        })
    }

    fn tiles(&self, queries: &Range<usize>) -> usize {
        queries.len().div_ceil(self.query_tile.max(1))
    }

    /// Parts of a sequence.
    pub fn parts_of(&self, sequence: usize) -> usize {
        self.split.map_or(1, |s| (self.past[sequence] + self.new[sequence]).div_ceil(s))
    }

    /// Work items.
    pub fn items(&self) -> usize {
        self.sequences().map(|(b, q, _)| self.tiles(&q) * self.parts_of(b) * self.spec.kv_heads).sum()
    }

    /// Work item `item`; the last queries of a sequence, which see most, come first.
    pub fn item(&self, mut item: usize) -> Item {
        for (sequence, queries, row) in self.sequences() {
            let (tiles, parts) = (self.tiles(&queries), self.parts_of(sequence));
            let count = tiles * parts * self.spec.kv_heads;
            if item >= count {
                item -= count;
                continue;
            }
            let (tile, rest) = (tiles - 1 - item / (parts * self.spec.kv_heads), item % (parts * self.spec.kv_heads));
            let width = self.query_tile.max(1);
            let start = queries.start + tile * width;
            return Item {
                sequence,
                kv_head: rest % self.spec.kv_heads,
                queries: start..queries.end.min(start + width),
                row: row + tile * width,
                part: rest / self.spec.kv_heads,
            };
        }
        unreachable!("attention item past the last")
    }

    /// Rows of the cache that the query at `index` of `sequence` may see in `part`.
    pub fn visible(&self, sequence: usize, index: usize, part: usize) -> Range<usize> {
        let seen = self.spec.visible_range(self.past[sequence] + index, self.past[sequence] + self.new[sequence]);
        let (lo, hi) = self.split.map_or((0, usize::MAX), |s| (part * s, (part + 1) * s));
        let end = seen.end.min(hi).max(lo);
        seen.start.clamp(lo, end)..end
    }

    /// What multiplies q, and what multiplies the scores after a softcap's tanh.
    pub fn factors(&self) -> (f32, Option<f32>) {
        let scale = self.spec.scale();
        match self.spec.softcap {
            Some(c) => ((scale / c.get()) as f32, Some((c.get() * f64::from(LOG2_E)) as f32)),
            None => ((scale * std::f64::consts::LOG2_E) as f32, None),
        }
    }
}

/// f32 of scratch of a prefill item.
pub fn scratch_len(spec: &AttentionSpec, kv_dtype: DType, query_tile: usize, lanes: usize) -> usize {
    let strip = 2 * lanes;
    let strips = (query_tile * spec.group()).div_ceil(strip);
    let converted = if kv_dtype == DType::F32 { 0 } else { 2 * CacheRows::TILE * spec.head_dim };
    strips * strip * (2 * spec.head_dim + 4) + CacheRows::TILE * strip + converted + spec.head_dim.next_multiple_of(lanes)
}

/// One strip of an item: its place in scratch and its lanes.
struct Strip {
    q: *mut f32,
    o: *mut f32,
    m: *mut f32,
    l: *mut f32,
    /// Position of each lane.
    position: *mut f32,
    slope: *mut f32,
    /// Lanes in use.
    lanes: usize,
    /// LANES or 2·LANES.
    width: usize,
    /// Lowest and highest position of a lane.
    low: usize,
    high: usize,
    /// Rows that some lane may see.
    visible: Range<usize>,
    started: bool,
}

/// Computes one work item.
/// # Safety
/// `a` describes valid memory; `scratch` is writable as [`scratch_len`] f32; no other item with this index runs.
#[inline(always)]
pub unsafe fn attention_prefill<S: Simd>(s: S, a: &Attention<'_>, item: usize, scratch: *mut f32) {
    let item = a.item(item);
    let (d, group) = (a.spec.head_dim, a.spec.group());
    let (b, queries) = (item.sequence, item.queries.len());
    let lanes = queries * group;
    let full = 2 * S::LANES;
    let strips = lanes.div_ceil(full);
    let of_lane =
        |lane: usize| (item.kv_head * group + lane / queries, item.queries.start + lane % queries, item.row + lane % queries);

    let strip_len = full * (2 * d + 4);
    let scores = scratch.wrapping_add(strips * strip_len);
    let k_tile = scores.wrapping_add(CacheRows::TILE * full);
    let converted = if a.cache.dtype == DType::F32 { 0 } else { CacheRows::TILE * d };
    let v_tile = k_tile.wrapping_add(converted);
    let row = v_tile.wrapping_add(converted);
    let strip_at = |i: usize| {
        let at = |n: usize| scratch.wrapping_add(i * strip_len + n);
        let used = full.min(lanes - i * full);
        let (mut low, mut high) = (usize::MAX, 0);
        let (mut start, mut end) = (usize::MAX, 0);
        for lane in i * full..i * full + used {
            let (_, index, _) = of_lane(lane);
            let position = a.past[b] + index;
            (low, high) = (low.min(position), high.max(position));
            let seen = a.visible(b, index, item.part);
            (start, end) = (start.min(seen.start), end.max(seen.end));
        }
        Strip {
            q: at(0),
            o: at(full * d),
            m: at(2 * full * d),
            l: at(2 * full * d + full),
            position: at(2 * full * d + 2 * full),
            slope: at(2 * full * d + 3 * full),
            lanes: used,
            width: if used <= S::LANES { S::LANES } else { full },
            low,
            high,
            visible: start..end,
            started: false,
        }
    };
    let (q_factor, cap) = a.factors();

    // SAFETY: the caller's; the carving above is what `scratch_len` counts.
    unsafe {
        let (mut start, mut end) = (usize::MAX, 0);
        for i in 0..strips {
            let strip = strip_at(i);
            (start, end) = (start.min(strip.visible.start), end.max(strip.visible.end));
            for lane in 0..strip.width {
                strip.m.add(lane).write(f32::NEG_INFINITY);
                strip.l.add(lane).write(0.0);
                if lane >= strip.lanes {
                    strip.position.add(lane).write(0.0);
                    strip.slope.add(lane).write(0.0);
                    for j in 0..d {
                        strip.q.add(j * strip.width + lane).write(0.0);
                    }
                    continue;
                }
                let (head, index, r) = of_lane(i * full + lane);
                strip.position.add(lane).write((a.past[b] + index) as f32);
                strip.slope.add(lane).write(a.slopes.map_or(0.0, |p| *p.add(head)) * LOG2_E);
                load_row(s, a.q.dtype, a.q.at(r, head * d), row, d);
                for j in 0..d {
                    strip.q.add(j * strip.width + lane).write(*row.add(j) * q_factor);
                }
            }
            for j in (0..d * strip.width).step_by(S::LANES) {
                s.store(strip.o.add(j), s.splat(0.0));
            }
        }
        let tile = CacheRows::TILE;
        let mut t = start / tile;
        while t * tile < end {
            let rows = (t * tile).max(start)..((t + 1) * tile).min(end);
            let (mut k, mut v, mut stride) =
                (a.cache.k_row(b, item.kv_head, rows.start), a.cache.v_row(b, item.kv_head, rows.start), a.cache.row_stride);
            if converted > 0 {
                let bytes = a.cache.row_stride * a.cache.dtype.size();
                for j in 0..rows.len() {
                    load_row(s, a.cache.dtype, k.add(j * bytes), k_tile.add(j * d), d);
                    load_row(s, a.cache.dtype, v.add(j * bytes), v_tile.add(j * d), d);
                }
                (k, v, stride) = (k_tile.cast(), v_tile.cast(), d);
            }
            for i in 0..strips {
                let mut strip = strip_at(i);
                strip.started = t > strip.visible.start / tile;
                let (lo, hi) = (rows.start.max(strip.visible.start), rows.end.min(strip.visible.end));
                if lo >= hi {
                    continue;
                }
                let (skip_k, skip_v) =
                    (k.cast::<f32>().add((lo - rows.start) * stride), v.cast::<f32>().add((lo - rows.start) * stride));
                let masks = |lane: usize| {
                    let (head, index, _) = of_lane(i * full + lane);
                    a.mask.map(|m| m.row(b, head, index))
                };
                attend_tile(s, a, &strip, lo..hi, skip_k, skip_v, stride, scores, cap, &masks);
            }
            t += 1;
        }
        for i in 0..strips {
            let strip = strip_at(i);
            for lane in 0..strip.lanes {
                let (head, _, r) = of_lane(i * full + lane);
                for j in 0..d {
                    row.add(j).write(*strip.o.add(j * strip.width + lane));
                }
                finish(s, a, head, r, item.part, row, *strip.m.add(lane), *strip.l.add(lane));
            }
        }
    }
}

/// Whether none, all or some of a strip's mask bytes are set.
unsafe fn mask_census(lanes: usize, rows: &Range<usize>, row: &impl Fn(usize) -> Option<*const u8>) -> (bool, bool) {
    let (mut any, mut all) = (false, true);
    for lane in 0..lanes {
        if let Some(p) = row(lane) {
            // SAFETY: the mask has a byte for every row of the cache that a query may see.
            let bytes = unsafe { std::slice::from_raw_parts(p.add(rows.start), rows.len()) };
            let set = bytes.iter().map(|&b| u32::from(b != 0)).sum::<u32>() as usize;
            any |= set > 0;
            all &= set == rows.len();
        }
    }
    (any, all)
}

/// Scores, softmax and weighted values of one strip and one tile.
#[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
#[inline(always)]
unsafe fn attend_tile<S: Simd>(
    s: S,
    a: &Attention<'_>,
    strip: &Strip,
    rows: Range<usize>,
    k: *const f32,
    v: *const f32,
    stride: usize,
    scores: *mut f32,
    cap: Option<f32>,
    masks: &impl Fn(usize) -> Option<*const u8>,
) {
    let (d, n, width) = (a.spec.head_dim, rows.len(), strip.width);
    let vectors = width / S::LANES;
    // SAFETY: the caller's.
    unsafe {
        let mut masked = false;
        if a.mask.is_some() {
            let (any, all) = mask_census(strip.lanes, &rows, masks);
            if !any {
                return;
            }
            masked = !all;
        }
        let product = Tile {
            k: d,
            a: k,
            a_stride: stride,
            b: strip.q.cast_const(),
            b_stride: width,
            c: scores,
            c_stride: width,
            accumulate: false,
        };
        column::<S, f32, false>(s, n, vectors, product);
        let low = if a.spec.causal && rows.end > strip.low + 1 { Some(()) } else { None };
        let window = a.spec.window.filter(|&w| rows.start.saturating_add(w) <= strip.high);
        let minus_inf = s.splat(f32::NEG_INFINITY);
        for j in 0..vectors {
            let c = scores.add(j * S::LANES);
            if let Some(cap) = cap {
                for i in 0..n {
                    let p = c.add(i * width);
                    s.store(p, s.mul(tanh(s, s.load(p)), s.splat(cap)));
                }
            }
            if a.slopes.is_some() {
                let (position, slope) = (s.load(strip.position.add(j * S::LANES)), s.load(strip.slope.add(j * S::LANES)));
                for i in 0..n {
                    let p = c.add(i * width);
                    let distance = s.sub(s.splat((rows.start + i) as f32), position);
                    s.store(p, s.fma(slope, distance, s.load(p)));
                }
            }
            if low.is_some() || window.is_some() {
                let position = s.load(strip.position.add(j * S::LANES));
                let oldest = s.sub(position, s.splat(window.map_or(f32::INFINITY, |w| (w - 1) as f32)));
                for i in 0..n {
                    let p = c.add(i * width);
                    let at = s.splat((rows.start + i) as f32);
                    let x = s.select_lt(at, oldest, minus_inf, s.load(p));
                    s.store(p, if a.spec.causal { s.select_lt(position, at, minus_inf, x) } else { x });
                }
            }
        }
        if masked {
            for lane in 0..strip.lanes {
                if let Some(p) = masks(lane) {
                    for i in 0..n {
                        if *p.add(rows.start + i) == 0 {
                            scores.add(i * width + lane).write(f32::NEG_INFINITY);
                        }
                    }
                }
            }
        }
        for j in 0..vectors {
            let c = scores.add(j * S::LANES);
            let (m, l) = (strip.m.add(j * S::LANES), strip.l.add(j * S::LANES));
            let old = s.load(m);
            let mut top = [old; 4];
            let fours = n / 4 * 4;
            for i in (0..fours).step_by(4) {
                for (u, top) in top.iter_mut().enumerate() {
                    *top = s.max(*top, s.load(c.add((i + u) * width)));
                }
            }
            for i in fours..n {
                top[0] = s.max(top[0], s.load(c.add(i * width)));
            }
            let new = s.max(s.max(top[0], top[1]), s.max(top[2], top[3]));
            // A lane that has seen nothing yet subtracts 0, so that its scores of −∞ give 0 and not NaN.
            let base = s.select_lt(minus_inf, new, new, s.splat(0.0));
            let alpha = exp2(s, s.sub(old, base));
            let mut sum = [s.splat(0.0); 4];
            for i in (0..fours).step_by(4) {
                for (u, sum) in sum.iter_mut().enumerate() {
                    let p = c.add((i + u) * width);
                    let x = exp2(s, s.sub(s.load(p), base));
                    s.store(p, x);
                    *sum = s.add(*sum, x);
                }
            }
            for i in fours..n {
                let p = c.add(i * width);
                let x = exp2(s, s.sub(s.load(p), base));
                s.store(p, x);
                sum[0] = s.add(sum[0], x);
            }
            let sum = s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]));
            s.store(l, s.fma(s.load(l), alpha, sum));
            s.store(m, new);
            let unchanged = s.max_lane(s.select_lt(alpha, s.splat(1.0), s.splat(1.0), s.splat(0.0))) == 0.0;
            if strip.started && !unchanged {
                for i in 0..d {
                    let o = strip.o.add(i * width + j * S::LANES);
                    s.store(o, s.mul(s.load(o), alpha));
                }
            }
        }
        let product = Tile {
            k: n,
            a: v,
            a_stride: stride,
            b: scores.cast_const(),
            b_stride: width,
            c: strip.o,
            c_stride: width,
            accumulate: true,
        };
        column::<S, f32, true>(s, d, vectors, product);
    }
}

/// Normalises one query's result and writes it, or writes the part.
/// # Safety
/// `acc` holds D f32 and is writable; `r` and `head` lie within the block; nobody else writes this row and head.
#[expect(clippy::too_many_arguments, reason = "the state of one query")]
#[inline(always)]
pub unsafe fn finish<S: Simd>(s: S, a: &Attention<'_>, head: usize, r: usize, part: usize, acc: *mut f32, m: f32, l: f32) {
    let d = a.spec.head_dim;
    // SAFETY: the caller's.
    unsafe {
        if !a.parts.is_null() {
            let to = a.parts.add(((r * a.spec.heads + head) * a.most_parts + part) * (d + 2));
            std::ptr::copy_nonoverlapping(acc, to, d);
            to.add(d).write(m);
            to.add(d + 1).write(l);
            return;
        }
        let (factor, lse) = normalizer(m, l, a.sinks.map(|p| *p.add(head)));
        let f = s.splat(factor);
        for j in (0..d).step_by(S::LANES) {
            let n = S::LANES.min(d - j);
            // A row that saw nothing is 0 even where its accumulator holds NaN or ∞ from a poisoned value.
            let x = if factor == 0.0 { s.splat(0.0) } else { s.mul(s.load_n(acc.add(j), n), f) };
            s.store_n(acc.add(j), x, n);
        }
        store_row(s, a.out.dtype, acc, a.out.at(r, head * d), d);
        if let Some(to) = a.lse {
            to.add(r * a.spec.heads + head).write(lse);
        }
    }
}

/// What multiplies the accumulator of a query with maximum `m` (base 2) and sum `l`, and its natural log-sum-exp.
#[inline(always)]
fn normalizer(m: f32, l: f32, sink: Option<f32>) -> (f32, f32) {
    if m == f32::NEG_INFINITY && l == 0.0 {
        return (0.0, sink.unwrap_or(f32::NEG_INFINITY));
    }
    let sink = sink.map_or(f32::NEG_INFINITY, |x| x * LOG2_E);
    let top = m.max(sink);
    let share = (m - top).exp2();
    let z = l * share + (sink - top).exp2();
    (share / z, (top + z.log2()) / LOG2_E)
}

/// Merges the parts of every head of one row, in order.
/// # Safety
/// `a` describes valid memory with parts written by attention items; no other item merges this row; `scratch` holds D f32.
#[inline(always)]
pub unsafe fn merge_parts<S: Simd>(s: S, a: &Attention<'_>, row: usize, sequence: usize, scratch: *mut f32) {
    let d = a.spec.head_dim;
    // SAFETY: the caller's.
    unsafe {
        for head in 0..a.spec.heads {
            let part = |p: usize| a.parts.add(((row * a.spec.heads + head) * a.most_parts + p) * (d + 2));
            let count = a.parts_of(sequence);
            let (mut m, mut l) = (f32::NEG_INFINITY, 0f32);
            for p in 0..count {
                m = m.max(*part(p).add(d));
            }
            for j in (0..d).step_by(S::LANES) {
                s.store_n(scratch.add(j), s.splat(0.0), S::LANES.min(d - j));
            }
            for p in 0..count {
                let from = part(p);
                let (pm, pl) = (*from.add(d), *from.add(d + 1));
                if pm == f32::NEG_INFINITY && pl == 0.0 {
                    continue;
                }
                let share = (pm - m).exp2();
                l += pl * share;
                for j in (0..d).step_by(S::LANES) {
                    let n = S::LANES.min(d - j);
                    s.store_n(scratch.add(j), s.fma(s.load_n(from.add(j), n), s.splat(share), s.load_n(scratch.add(j), n)), n);
                }
            }
            finish(s, &Attention { parts: std::ptr::null_mut(), ..*a }, head, row, 0, scratch, m, l);
        }
    }
}
