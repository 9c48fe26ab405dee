//! Tiled attention with online softmax (arXiv:1805.02867, 2205.14135), many queries.
//!
//! Queries stand in the lanes: a strip of up to 3·LANES queries of one key/value head holds qᵀ [D, lanes]; scores of two tiles of the
//! cache come out as [keys, lanes], so that softmax needs no step across lanes and every query head of a group shares the keys. K is read
//! where it lies, V is packed in panels as tall as the register tile, once for all strips of an item. Operations 4·D for each visible (query, key,
//! head) and some 13 for the exponential; bytes: K and V once for each item, from second-level cache while its strips take turns at
//! them: with 384 queries 192 operations a byte of f32, so that FMA binds and the exponential is one part in twenty. Keys that no
//! lane sees are skipped; only those that some lane sees in part are masked.

use std::ops::Range;

use lawson_core::{CacheDType, DType, problem::AttentionSpec};

use super::{
    attention::{Attention, Item, LOG2_E, finish},
    attention_prefill_bf16,
    codes::Cache,
    rows::{CacheRows, Rows, load_row},
    tile::query_tile,
};
use crate::{
    dispatch::Kernels,
    math::{exp2_share, tanh},
    simd::{QueryTile, Simd},
};

/// Vectors of a strip.
pub const VECTORS: usize = 3;

/// Rows of the cache that a strip attends at once: two tiles.
pub(super) const KEYS: usize = 2 * CacheRows::TILE;

/// Rows of a panel of packed values; not a power of two, so that a row's panels lie in different sets of the cache.
const PANEL: usize = KEYS + 6;

/// f32 that a strip's description takes.
pub(super) const STRIP: usize = size_of::<Strip>().div_ceil(64) * 16;

/// Where the parts of an item's scratch lie, in f32 from its start.
struct Layout {
    /// D up to whole vectors: rows of qᵀ and oᵀ, so that they are transposed in squares.
    depth: usize,
    /// Strips.
    strips: usize,
    /// Of the first strip's qᵀ, oᵀ, m, l, α, position and slope; the others' follow.
    state: usize,
    /// f32 of a strip's.
    state_len: usize,
    /// [KEYS, strip].
    scores: usize,
    /// V in panels of `QUERY_ROWS` dimensions [panel, PANEL, QUERY_ROWS].
    v: usize,
    /// K as f32 [KEYS + QUERY_ROWS, D], where the cache has another dtype; else the last rows of K up to a whole register tile.
    k: usize,
    /// LANES rows [LANES, depth] or two squares of LANES on their way through a transpose.
    rows: usize,
    /// All of it.
    len: usize,
}

impl Layout {
    #[inline(always)]
    fn new(spec: &AttentionSpec, kv_dtype: CacheDType, query_tile: usize, lanes: usize) -> Layout {
        let strip = VECTORS * lanes;
        let strips = (query_tile * spec.group()).div_ceil(strip);
        let depth = spec.head_dim.next_multiple_of(lanes.max(8));
        let state = strips * STRIP;
        let state_len = strip * (2 * depth + Strip::STATE);
        let scores = state + strips * state_len;
        let v = scores + KEYS * strip;
        let k = v + PANEL * depth;
        let rows = k + (8 + if kv_dtype == CacheDType::F32 { 0 } else { KEYS }) * depth;
        Layout { depth, strips, state, state_len, scores, v, k, rows, len: rows + (lanes * depth).max(2 * lanes * lanes) }
    }
}

/// f32 of scratch of a prefill item of `kernels` whose result is `dtype`.
pub fn scratch_len(spec: &AttentionSpec, dtype: DType, kv_dtype: CacheDType, query_tile: usize, kernels: &Kernels) -> usize {
    if attention_prefill_bf16::applies(kernels.dot_rows, dtype, kv_dtype) {
        return attention_prefill_bf16::scratch_len(spec, query_tile, kernels.lanes);
    }
    let lanes = kernels.lanes;
    Layout::new(spec, kv_dtype, query_tile, lanes).len
}

/// One strip of an item: its place in scratch and its lanes.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub q: *mut f32,
    pub o: *mut f32,
    pub m: *mut f32,
    pub l: *mut f32,
    /// What a step multiplies the result so far by.
    pub alpha: *mut f32,
    /// Position of each lane.
    pub position: *mut f32,
    pub slope: *mut f32,
    /// The item's number of the first lane.
    pub first: usize,
    /// Lanes in use.
    pub lanes: usize,
    /// Vectors that hold them.
    pub vectors: usize,
    /// Lowest and highest position of a lane.
    pub low: usize,
    pub high: usize,
    /// Rows that some lane may see.
    pub start: usize,
    pub end: usize,
}

impl Strip {
    /// f32 of a lane's state besides q and o.
    pub const STATE: usize = 5;

    #[inline(always)]
    pub fn new(q: *mut f32, o: *mut f32, state: *mut f32, width: usize, first: usize, lanes: usize, vectors: usize) -> Strip {
        let part = |n: usize| state.wrapping_add(width * n);
        let (m, l, alpha, position, slope) = (part(0), part(1), part(2), part(3), part(4));
        let (low, high, start, end) = (usize::MAX, 0, usize::MAX, 0);
        Strip { q, o, m, l, alpha, position, slope, first, lanes, vectors, low, high, start, end }
    }

    /// Empties the state of `lane` and notes what it may see.
    #[inline(always)]
    pub unsafe fn describe(&mut self, a: &Attention<'_>, lanes: &Lanes, item: &Item, lane: usize) {
        let (mut position, mut slope) = (0, 0.0);
        // SAFETY: the caller's: every lane of `vectors` has a state.
        unsafe {
            if lane < self.lanes {
                let (head, index, _) = lanes.of(self.first + lane);
                position = a.past[item.sequence] + index;
                slope = a.slopes.map_or(0.0, |p| *p.add(head)) * LOG2_E;
                let seen = a.visible(item.sequence, index, item.part);
                (self.low, self.high) = (self.low.min(position), self.high.max(position));
                (self.start, self.end) = (self.start.min(seen.start), self.end.max(seen.end));
            }
            self.m.add(lane).write(f32::NEG_INFINITY);
            self.l.add(lane).write(0.0);
            self.position.add(lane).write(position as f32);
            self.slope.add(lane).write(slope);
        }
    }
}

/// Which query each lane of an item is: heads of the group one after another, each with all queries of the item.
pub(super) struct Lanes {
    pub head0: usize,
    pub queries: usize,
    pub index0: usize,
    pub row0: usize,
}

impl Lanes {
    #[inline(always)]
    pub fn new(a: &Attention<'_>, item: &Item) -> Lanes {
        let group = a.spec.group();
        Lanes { head0: item.kv_head * group, queries: item.queries.len(), index0: item.queries.start, row0: item.row }
    }
    /// Head, index among the sequence's new tokens, row of the block.
    #[inline(always)]
    pub fn of(&self, lane: usize) -> (usize, usize, usize) {
        let (head, query) = (lane / self.queries, lane % self.queries);
        (self.head0 + head, self.index0 + query, self.row0 + query)
    }
}

/// Computes one work item.
/// # Safety
/// `a` describes valid memory; `scratch` is writable as [`scratch_len`] f32 and aligned to 64 bytes; no other item with this index runs.
#[inline(always)]
pub unsafe fn attention_prefill<S: Simd>(s: S, a: &Attention<'_>, item: usize, scratch: *mut f32) {
    let item = a.item(item);
    if attention_prefill_bf16::applies(S::DOT_ROWS, a.out.dtype, a.cache.dtype()) {
        // SAFETY: the caller's.
        return unsafe { attention_prefill_bf16::attend(s, a, &item, scratch) };
    }
    let (d, b) = (a.spec.head_dim, item.sequence);
    let lanes = Lanes::new(a, &item);
    let layout = Layout::new(a.spec, a.cache.dtype(), item.queries.len(), S::LANES);
    let at = |offset: usize| scratch.wrapping_add(offset);
    let strip_at = |i: usize| scratch.wrapping_add(i * STRIP).cast::<Strip>();

    // SAFETY: the caller's; `layout` is what `scratch_len` counts, for at most as many queries.
    unsafe {
        let (mut start, mut end) = (usize::MAX, 0);
        for i in 0..layout.strips {
            let strip = prepare(s, a, &lanes, &item, &layout, i, at(layout.state + i * layout.state_len), at(layout.rows));
            (start, end) = (start.min(strip.start), end.max(strip.end));
            strip_at(i).write(strip);
        }
        let mut t = start / KEYS;
        while t * KEYS < end {
            let rows = (t * KEYS).max(start)..((t + 1) * KEYS).min(end);
            let (head, bytes) = ([b, item.kv_head], a.cache.row_bytes());
            let (k_row, v_row) = (a.cache.k_row(b, item.kv_head, rows.start), a.cache.v_row(b, item.kv_head, rows.start));
            pack_values(s, a, head, &rows, at(layout.v), at(layout.rows));
            let (k, stride) = match &a.cache {
                Cache::Elements(c) if c.dtype == DType::F32 => (k_row.cast::<f32>(), c.row_stride),
                cache => {
                    cache.load_keys(s, head, rows.clone(), a.len(b), d, at(layout.k), layout.depth);
                    (at(layout.k).cast_const(), layout.depth)
                }
            };
            for i in 0..layout.strips {
                let strip = &*strip_at(i);
                let (lo, hi) = (rows.start.max(strip.start), rows.end.min(strip.end));
                if lo < hi {
                    let skip = lo - rows.start;
                    // Half of the strips fetch the next rows of K, half those of V.
                    let half = layout.strips.div_ceil(2);
                    let next = if i < half { k_row } else { v_row }.wrapping_add((KEYS + i % half * KEYS / half) * bytes);
                    let share = KEYS * bytes / half / d;
                    let (k, v) = (k.add(skip * stride), at(layout.v + skip * S::QUERY_ROWS));
                    let keys = Keys { rows: lo..hi, k, stride, v, next, share };
                    let mask = strip_mask(a, &lanes, strip, b, &keys.rows);
                    if matches!(mask, StripMask::Nothing) {
                        continue;
                    }
                    attend_strip(s, a, strip, &keys, at(layout.scores), at(layout.k), at(layout.rows), &mask);
                }
            }
            t += 1;
        }
        for i in 0..layout.strips {
            let strip = &*strip_at(i);
            let width = strip.vectors * S::LANES;
            for j in 0..strip.vectors {
                if a.parts.is_null() {
                    fetch_rows(s, a.out, &lanes, strip.first + j * S::LANES, strip.first + strip.lanes, d);
                }
                for i in (0..d).step_by(S::LANES) {
                    s.transpose(strip.o.add(i * width + j * S::LANES), width, at(layout.rows + i), layout.depth);
                }
                for lane in j * S::LANES..strip.lanes.min((j + 1) * S::LANES) {
                    let (head, _, r) = lanes.of(strip.first + lane);
                    let o = at(layout.rows + (lane - j * S::LANES) * layout.depth);
                    finish(s, a, head, r, item.part, o, *strip.m.add(lane), *strip.l.add(lane));
                }
            }
        }
    }
}

/// Fetches the rows of q or of the result that the lanes from `first` on, one vector of them, read or write.
#[inline(always)]
pub(super) fn fetch_rows<S: Simd>(s: S, rows: Rows, lanes: &Lanes, first: usize, end: usize, d: usize) {
    for lane in first..end.min(first + S::LANES) {
        let (head, _, r) = lanes.of(lane);
        for line in (0..d * rows.dtype.size()).step_by(64) {
            s.fetch_near(rows.at(r, head * d).wrapping_add(line));
        }
    }
}

/// Strip `i` with its queries transposed and its state empty.
#[expect(clippy::too_many_arguments, reason = "an item's state and its scratch")]
#[inline(always)]
unsafe fn prepare<S: Simd>(
    s: S,
    a: &Attention<'_>,
    lanes: &Lanes,
    item: &Item,
    layout: &Layout,
    i: usize,
    state: *mut f32,
    rows: *mut f32,
) -> Strip {
    let (d, full) = (a.spec.head_dim, VECTORS * S::LANES);
    let first = i * full;
    let used = full.min(lanes.queries * a.spec.group() - first);
    let vectors = used.div_ceil(S::LANES);
    let width = vectors * S::LANES;
    let o = state.wrapping_add(full * layout.depth);
    let mut strip = Strip::new(state, o, o.wrapping_add(full * layout.depth), full, first, used, vectors);
    let (q_factor, _) = a.factors();
    // SAFETY: the caller's.
    unsafe {
        let end = lanes.queries * a.spec.group();
        if i == 0 {
            fetch_rows(s, a.q, lanes, 0, end, d);
        }
        for lane in 0..width {
            if lane % S::LANES == 0 {
                fetch_rows(s, a.q, lanes, first + lane + S::LANES, end, d);
            }
            let row = rows.add(lane % S::LANES * layout.depth);
            strip.describe(a, lanes, item, lane);
            if lane < used {
                let (head, _, r) = lanes.of(first + lane);
                load_row(s, a.q.dtype, a.q.at(r, head * d), row, d);
                for j in (0..d).step_by(S::LANES) {
                    s.store(row.add(j), s.mul(s.load(row.add(j)), s.splat(q_factor)));
                }
            } else {
                for j in (0..d).step_by(S::LANES) {
                    s.store(row.add(j), s.splat(0.0));
                }
            }
            if lane % S::LANES == S::LANES - 1 {
                for j in (0..d).step_by(S::LANES) {
                    s.transpose(rows.add(j), layout.depth, strip.q.add(j * width + lane + 1 - S::LANES), width);
                }
            }
        }
        for j in (0..layout.depth * width).step_by(S::LANES) {
            s.store(strip.o.add(j), s.splat(0.0));
        }
    }
    strip
}

/// `rows` of V in panels [panel, PANEL, QUERY_ROWS], the last one padded with zeros.
#[inline(always)]
unsafe fn pack_values<S: Simd>(s: S, a: &Attention<'_>, head: [usize; 2], rows: &Range<usize>, packed: *mut f32, row: *mut f32) {
    let d = a.spec.head_dim;
    let whole = a.cache.dtype() == CacheDType::F32 && d.is_multiple_of(S::QUERY_ROWS);
    // SAFETY: the caller's; `row` holds D up to whole vectors.
    unsafe {
        for j in (0..d.next_multiple_of(S::QUERY_ROWS)).step_by(S::LANES) {
            s.store(row.add(j), s.splat(0.0));
        }
        for i in 0..rows.len() {
            let from = if whole {
                a.cache.v_row(head[0], head[1], rows.start + i).cast::<f32>()
            } else {
                a.cache.load_value(s, head, rows.start + i, d, row);
                row.cast_const()
            };
            for j in (0..d).step_by(S::QUERY_ROWS) {
                let (from, to) = (from.add(j), packed.add(j * PANEL + i * S::QUERY_ROWS));
                if S::QUERY_ROWS == 8 {
                    to.cast::<[f32; 8]>().write_unaligned(from.cast::<[f32; 8]>().read_unaligned());
                } else {
                    to.cast::<[f32; 4]>().write_unaligned(from.cast::<[f32; 4]>().read_unaligned());
                }
            }
        }
    }
}

/// The arbitrary mask of a strip over some rows.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, on the stack")]
pub(super) enum StripMask {
    /// Every lane sees every row.
    All,
    /// No lane sees any.
    Nothing,
    /// The bytes of each lane from the first row on.
    Some([*const u8; MOST_LANES]),
}

/// Lanes of the widest strip.
const MOST_LANES: usize = VECTORS * 16;

/// What the arbitrary mask lets a strip see of `rows`.
#[inline(always)]
pub(super) unsafe fn strip_mask(
    a: &Attention<'_>,
    lanes: &Lanes,
    strip: &Strip,
    sequence: usize,
    rows: &Range<usize>,
) -> StripMask {
    let Some(mask) = a.mask else { return StripMask::All };
    let mut lines = [std::ptr::null(); MOST_LANES];
    let (mut head, mut query) = (strip.first / lanes.queries, strip.first % lanes.queries);
    let (mut any, mut all) = (false, true);
    for line in &mut lines[..strip.lanes] {
        *line = mask.row(sequence, lanes.head0 + head, lanes.index0 + query).wrapping_add(rows.start);
        // SAFETY: each row of the mask has a byte for every row of the longest sequence.
        let bytes = unsafe { std::slice::from_raw_parts(*line, rows.len()) };
        let set = bytes.iter().map(|&b| u32::from(b != 0)).sum::<u32>() as usize;
        any |= set > 0;
        all &= set == rows.len();
        query += 1;
        if query == lanes.queries {
            (head, query) = (head + 1, 0);
        }
    }
    match (any, all) {
        (false, _) => StripMask::Nothing,
        (_, true) => StripMask::All,
        _ => StripMask::Some(lines),
    }
}

/// Applies softcap, ALiBi, causality, window and mask to the scores [rows, width] of a strip, multiplied by `factor` first; `lines` takes 2 · LANES² f32.
#[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
#[inline(always)]
pub(super) unsafe fn shape_scores<S: Simd>(
    s: S,
    a: &Attention<'_>,
    strip: &Strip,
    rows: &Range<usize>,
    scores: *mut f32,
    factor: Option<f32>,
    mask: &StripMask,
    lines: *mut f32,
) {
    let (n, width, (_, cap)) = (rows.len(), strip.vectors * S::LANES, a.factors());
    let causal = a.spec.causal && rows.end > strip.low + 1;
    let window = a.spec.window.filter(|&w| rows.start.saturating_add(w) <= strip.high);
    let minus_inf = s.splat(f32::NEG_INFINITY);
    // SAFETY: the caller's; the mask has a byte for every row of the cache that a query may see.
    unsafe {
        for j in 0..strip.vectors {
            let c = scores.add(j * S::LANES);
            if let Some(factor) = factor {
                for i in 0..n {
                    let p = c.add(i * width);
                    s.store(p, s.mul(s.load(p), s.splat(factor)));
                }
            }
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
            if causal || window.is_some() {
                let position = s.load(strip.position.add(j * S::LANES));
                let oldest = s.sub(position, s.splat(window.map_or(f32::INFINITY, |w| (w - 1) as f32)));
                for i in 0..n {
                    let p = c.add(i * width);
                    let at = s.splat((rows.start + i) as f32);
                    let x = s.select_lt(at, oldest, minus_inf, s.load(p));
                    s.store(p, if a.spec.causal { s.select_lt(position, at, minus_inf, x) } else { x });
                }
            }
            let StripMask::Some(mask) = mask else { continue };
            for i0 in (0..n).step_by(S::LANES) {
                let count = S::LANES.min(n - i0);
                for lane in 0..S::LANES {
                    let line = lines.add(lane * S::LANES);
                    // Lanes without a query may see anything.
                    let mut bytes = [1u8; 16];
                    if j * S::LANES + lane < strip.lanes {
                        let from = mask[j * S::LANES + lane].add(i0);
                        if count == S::LANES {
                            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), S::LANES);
                        } else {
                            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), count);
                        }
                    }
                    for (i, byte) in bytes.into_iter().enumerate().take(S::LANES) {
                        line.add(i).write(f32::from(byte));
                    }
                }
                let seen = lines.add(S::LANES * S::LANES);
                s.transpose(lines, S::LANES, seen, S::LANES);
                for i in 0..count {
                    let p = c.add((i0 + i) * width);
                    s.store(p, s.select_lt(s.load(seen.add(i * S::LANES)), s.splat(0.5), minus_inf, s.load(p)));
                }
            }
        }
    }
}

/// Rows of the cache that a strip attends.
struct Keys {
    rows: Range<usize>,
    /// The first of them.
    k: *const f32,
    stride: usize,
    /// Of the first panel.
    v: *const f32,
    /// This strip's share of the memory that the next rows lie in.
    next: *const u8,
    /// Bytes of it for each dimension.
    share: usize,
}

/// Scores, softmax and weighted values of one strip over some rows; `k_rest` takes the last rows of K where they are not whole register
/// tiles.
#[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
#[inline(always)]
unsafe fn attend_strip<S: Simd>(
    s: S,
    a: &Attention<'_>,
    strip: &Strip,
    keys: &Keys,
    scores: *mut f32,
    k_rest: *mut f32,
    lines: *mut f32,
    mask: &StripMask,
) {
    let (d, rows, n) = (a.spec.head_dim, keys.rows.clone(), keys.rows.len());
    let width = strip.vectors * S::LANES;
    // SAFETY: the caller's.
    unsafe {
        for i in (0..n).step_by(S::QUERY_ROWS) {
            let (mut k, mut stride) = (keys.k.add(i * keys.stride), keys.stride);
            if i + S::QUERY_ROWS > n && a.cache.dtype() == CacheDType::F32 {
                for j in 0..S::QUERY_ROWS {
                    // Rows past the last are not this sequence's: the last one stands for them.
                    std::ptr::copy_nonoverlapping(k.add(j.min(n - 1 - i) * stride), k_rest.add(j * d), d);
                }
                (k, stride) = (k_rest.cast_const(), d);
            }
            let c = scores.add(i * width);
            let fetch = (k.wrapping_add(S::QUERY_ROWS * stride).cast(), 4 * S::QUERY_ROWS);
            query_tile(s, strip.vectors, QueryTile { k: d, a: k, row_stride: Some(stride), b: strip.q, c, scale: None, fetch });
        }
        shape_scores(s, a, strip, &rows, scores, None, mask, lines);
        for j in 0..strip.vectors {
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
            let base = s.select_lt(s.splat(f32::NEG_INFINITY), new, new, s.splat(0.0));
            let alpha = exp2_share(s, s.sub(old, base));
            let mut sum = [s.splat(0.0); 4];
            for i in (0..fours).step_by(4) {
                for (u, sum) in sum.iter_mut().enumerate() {
                    let p = c.add((i + u) * width);
                    let x = exp2_share(s, s.sub(s.load(p), base));
                    s.store(p, x);
                    *sum = s.add(*sum, x);
                }
            }
            for i in fours..n {
                let p = c.add(i * width);
                let x = exp2_share(s, s.sub(s.load(p), base));
                s.store(p, x);
                sum[0] = s.add(sum[0], x);
            }
            let sum = s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]));
            s.store(l, s.fma(s.load(l), alpha, sum));
            s.store(m, new);
            s.store(strip.alpha.add(j * S::LANES), alpha);
        }
        for i in (0..d).step_by(S::QUERY_ROWS) {
            let (a, c) = (keys.v.add(i * PANEL), strip.o.add(i * width));
            let fetch = (keys.next.wrapping_add(i * keys.share), keys.share * S::QUERY_ROWS / n);
            let scale = Some(strip.alpha.cast_const());
            query_tile(s, strip.vectors, QueryTile { k: n, a, row_stride: None, b: scores, c, scale, fetch });
        }
    }
}
