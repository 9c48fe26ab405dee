//! [`super::attention_prefill`] in bf16 by dot products: K is read where it lies (padded where D is not whole blocks), V goes through a transpose, probabilities are rounded.
//!
//! A strip is one panel of B: qᵀ in pairs of dimensions, then probabilities in pairs of keys. Operations 4·D for each visible (query,
//! key, head), some 10 for the exponential; bytes: K and V once for each item, whose strips share the transposed V. With tiles of
//! 1024 operations a cycle and D = 128 the exponential takes longer than both products.

use half::bf16;
use lawson_core::{CacheDType, DType, problem::AttentionSpec};

use super::{
    attention::{Attention, Item, finish},
    attention_prefill::{KEYS, Lanes, STRIP, Strip, StripMask, fetch_rows, shape_scores, strip_mask},
    rows::{load_row, store_row},
};
use crate::{
    math::{exp2_rough, exp2_share},
    simd::{DOT_STEPS, DotState, DotTile, Simd},
};

/// Whether this kernel computes an item, on an instruction set with tiles of `dot_rows`.
pub const fn applies(dot_rows: usize, dtype: DType, kv_dtype: CacheDType) -> bool {
    dot_rows > 0 && matches!((dtype, kv_dtype), (DType::BF16, CacheDType::BF16))
}

/// Bytes between rows of the transposed V; not a power of two, so that rows lie in different sets of the cache.
pub(super) const V_STRIDE: usize = KEYS * 2 + 64;
/// Growth of a maximum, in powers of two, from which on results so far are rescaled; below, probabilities exceed 1.
const SLACK: f32 = 8.0;

/// Where the parts of an item's scratch lie, in f32 from its start.
struct Layout {
    /// D up to whole blocks.
    depth: usize,
    /// Strips.
    strips: usize,
    /// Of the first strip's qᵀ in pairs, oᵀ and state; the others' follow.
    state: usize,
    /// f32 of a strip's.
    state_len: usize,
    /// [KEYS, strip].
    scores: usize,
    /// Probabilities in pairs of keys [KEYS / 2, strip, 2], bf16.
    p: usize,
    /// Vᵀ [depth, KEYS], bf16, rows V_STRIDE bytes apart.
    v: usize,
    /// K [KEYS, depth], bf16, where D is not whole blocks.
    k: usize,
    /// Rows on their way through a transpose: LANES of q or o, a square of pairs of V, two squares of a mask.
    rows: usize,
    /// All of it.
    len: usize,
}

impl Layout {
    #[inline(always)]
    fn new(spec: &AttentionSpec, query_tile: usize, lanes: usize) -> Layout {
        let strip = 2 * lanes;
        let strips = (query_tile * spec.group()).div_ceil(strip);
        let depth = spec.head_dim.next_multiple_of(DOT_STEPS);
        let state = strips * STRIP;
        let state_len = strip * (depth / 2 + depth + Strip::STATE);
        let scores = state + strips * state_len;
        let p = scores + KEYS * strip;
        let v = p + KEYS / 2 * strip;
        let k = v + depth * V_STRIDE / 4;
        let rows = k + if depth == spec.head_dim { 0 } else { KEYS * depth / 2 };
        Layout { depth, strips, state, state_len, scores, p, v, k, rows, len: rows + lanes * depth }
    }
}

/// f32 of scratch of an item.
pub fn scratch_len(spec: &AttentionSpec, query_tile: usize, lanes: usize) -> usize {
    Layout::new(spec, query_tile, lanes).len
}

/// Computes one work item.
/// # Safety
/// As [`super::attention_prefill::attention_prefill`].
#[inline(always)]
pub unsafe fn attend<S: Simd>(s: S, a: &Attention<'_>, item: &Item, scratch: *mut f32) {
    let (d, b) = (a.spec.head_dim, item.sequence);
    let lanes = Lanes::new(a, item);
    let layout = Layout::new(a.spec, item.queries.len(), S::LANES);
    let at = |offset: usize| scratch.wrapping_add(offset);
    let strip_at = |i: usize| scratch.wrapping_add(i * STRIP).cast::<Strip>();
    let mut state = DotState::default();
    // SAFETY: the caller's; `layout` is what `scratch_len` counts, for at most as many queries.
    unsafe {
        let (mut start, mut end) = (usize::MAX, 0);
        for i in 0..layout.strips {
            let strip = prepare(s, a, &lanes, item, &layout, i, at(layout.state + i * layout.state_len), at(layout.rows).cast());
            (start, end) = (start.min(strip.start), end.max(strip.end));
            strip_at(i).write(strip);
        }
        let row_bytes = a.cache.row_bytes();
        let mut t = start / KEYS;
        while t * KEYS < end {
            let rows = (t * KEYS).max(start)..((t + 1) * KEYS).min(end);
            let v_row = a.cache.v_row(b, item.kv_head, rows.start);
            transpose_values(s, d, rows.len(), v_row.cast(), row_bytes / 2, at(layout.v), at(layout.rows));
            let (mut k, mut k_stride) = (a.cache.k_row(b, item.kv_head, rows.start), row_bytes);
            if layout.depth != d {
                (k, k_stride) = pad_rows(k, k_stride, rows.len(), d, at(layout.k).cast());
            }
            for i in 0..layout.strips {
                let strip = &*strip_at(i);
                // Whole blocks of Vᵀ: the rows before `strip.start` are masked by the window that it comes from.
                let skip = strip.start.saturating_sub(rows.start) / DOT_STEPS * DOT_STEPS;
                let (lo, hi) = (rows.start + skip, rows.end.min(strip.end));
                if lo >= hi {
                    continue;
                }
                let keys = Keys { rows: lo..hi, k: k.add(skip * k_stride), k_stride, v: at(layout.v).cast::<u8>().add(skip * 2) };
                let mask = strip_mask(a, &lanes, strip, b, &keys.rows);
                if matches!(mask, StripMask::Nothing) {
                    continue;
                }
                attend_strip(s, &mut state, a, strip, &keys, &layout, scratch, &mask);
            }
            t += 1;
        }
        s.end_dots(state);
        for i in 0..layout.strips {
            let strip = &*strip_at(i);
            for j in 0..strip.vectors {
                if a.parts.is_null() {
                    fetch_rows(s, a.out, &lanes, strip.first + j * S::LANES, strip.first + strip.lanes, d);
                }
                for i in (0..layout.depth).step_by(S::LANES) {
                    s.transpose(
                        strip.o.add(i * S::DOT_COLUMNS + j * S::LANES),
                        S::DOT_COLUMNS,
                        at(layout.rows + i),
                        layout.depth,
                    );
                }
                for lane in j * S::LANES..strip.lanes.min((j + 1) * S::LANES) {
                    let (head, _, r) = lanes.of(strip.first + lane);
                    let o = at(layout.rows + lane % S::LANES * layout.depth);
                    finish(s, a, head, r, item.part, o, *strip.m.add(lane), *strip.l.add(lane));
                }
            }
        }
    }
}

/// Strip `i` with its queries in pairs and its state empty.
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
    rows: *mut bf16,
) -> Strip {
    let (d, first, end) = (a.spec.head_dim, i * S::DOT_COLUMNS, lanes.queries * a.spec.group());
    let q = state;
    let o = q.wrapping_add(S::DOT_COLUMNS * layout.depth / 2);
    let state = o.wrapping_add(S::DOT_COLUMNS * layout.depth);
    let mut strip = Strip::new(q, o, state, S::DOT_COLUMNS, first, S::DOT_COLUMNS.min(end - first), 2);
    // SAFETY: the caller's.
    unsafe {
        if i == 0 {
            fetch_rows(s, a.q, lanes, 0, end, d);
        }
        for lane in 0..S::DOT_COLUMNS {
            if lane % S::LANES == 0 {
                fetch_rows(s, a.q, lanes, first + lane + S::LANES, end, d);
            }
            strip.describe(a, lanes, item, lane);
            let row = rows.add(lane % S::LANES * layout.depth);
            row.write_bytes(0, layout.depth);
            if lane < strip.lanes {
                let (head, _, r) = lanes.of(first + lane);
                let from = a.q.at(r, head * d);
                if a.q.dtype == DType::BF16 {
                    std::ptr::copy_nonoverlapping(from.cast(), row, d);
                } else {
                    // o is not in use yet.
                    load_row(s, a.q.dtype, from, strip.o, d);
                    store_row(s, DType::BF16, strip.o, row.cast(), d);
                }
            }
            if lane % S::LANES == S::LANES - 1 {
                let pairs = layout.depth / 2;
                for j in (0..pairs).step_by(S::LANES) {
                    let to = strip.q.add(j * S::DOT_COLUMNS + lane + 1 - S::LANES);
                    s.transpose(rows.cast::<f32>().add(j), pairs, to, S::DOT_COLUMNS);
                }
            }
        }
        for j in (0..layout.depth * S::DOT_COLUMNS).step_by(S::LANES) {
            s.store(strip.o.add(j), s.splat(0.0));
        }
    }
    strip
}

/// Vᵀ of `n` ≤ KEYS rows of `d` elements `stride` apart, its own rows V_STRIDE bytes apart; keys and dimensions up to whole blocks are
/// zero.
/// # Safety
/// `v` is readable as [n, d], `to` writable as [d up to whole blocks, V_STRIDE] bytes, `square` as LANES² f32.
#[inline(always)]
pub(super) unsafe fn transpose_values<S: Simd>(
    s: S,
    d: usize,
    n: usize,
    v: *const bf16,
    stride: usize,
    to: *mut f32,
    square: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut line = [bf16::ZERO; 32];
        for key in (0..n.next_multiple_of(DOT_STEPS)).step_by(2 * S::LANES) {
            for i in (0..d.next_multiple_of(DOT_STEPS)).step_by(S::LANES) {
                for pair in 0..S::LANES {
                    let (even, odd) = (key + 2 * pair, key + 2 * pair + 1);
                    let to = square.add(pair * S::LANES).cast();
                    if odd < n && i + S::LANES <= d {
                        s.pair_rows(to, v.add(even * stride + i), v.add(odd * stride + i));
                    } else {
                        for (half, row) in [even, odd].into_iter().enumerate() {
                            for j in 0..S::LANES {
                                let inside = row < n && i + j < d;
                                line[half * S::LANES + j] = if inside { *v.add(row * stride + i + j) } else { bf16::ZERO };
                            }
                        }
                        s.pair_rows(to, line.as_ptr(), line.as_ptr().add(S::LANES));
                    }
                }
                s.transpose(square, S::LANES, to.add(i * V_STRIDE / 4 + key / 2), V_STRIDE / 4);
            }
        }
    }
}

/// `n` rows of `d` bf16 with zeros up to whole blocks, and the bytes between them.
/// # Safety
/// `k` is readable as `n` rows `stride` bytes apart, `to` writable as [n, d up to whole blocks].
#[inline(always)]
pub(super) unsafe fn pad_rows(k: *const u8, stride: usize, n: usize, d: usize, to: *mut u8) -> (*const u8, usize) {
    let bytes = d.next_multiple_of(DOT_STEPS) * 2;
    for j in 0..n {
        // SAFETY: the caller's.
        unsafe {
            let row = to.add(j * bytes);
            row.write_bytes(0, bytes);
            std::ptr::copy_nonoverlapping(k.add(j * stride), row, d * 2);
        }
    }
    (to, bytes)
}

/// Rows of the cache that a strip attends.
struct Keys {
    rows: std::ops::Range<usize>,
    /// The first of them.
    k: *const u8,
    /// Bytes between them.
    k_stride: usize,
    /// Vᵀ from the first of them on.
    v: *const u8,
}

/// Scores, softmax and weighted values of one strip over some rows.
#[expect(clippy::too_many_arguments, reason = "the registers of one inner loop")]
#[inline(always)]
unsafe fn attend_strip<S: Simd>(
    s: S,
    state: &mut DotState,
    a: &Attention<'_>,
    strip: &Strip,
    keys: &Keys,
    layout: &Layout,
    scratch: *mut f32,
    mask: &StripMask,
) {
    let width = S::DOT_COLUMNS;
    let (scores, p) = (scratch.wrapping_add(layout.scores), scratch.wrapping_add(layout.p).cast::<u8>());
    let (n, blocks) = (keys.rows.len(), keys.rows.len().div_ceil(DOT_STEPS));
    let (q_factor, cap) = a.factors();
    // SAFETY: the caller's.
    unsafe {
        for i in (0..n).step_by(S::DOT_ROWS) {
            let tile = DotTile {
                rows: S::DOT_ROWS.min(n - i),
                blocks: layout.depth / DOT_STEPS,
                a: keys.k.add(i * keys.k_stride),
                row_stride: keys.k_stride,
                block_stride: DOT_STEPS * 2,
                b: strip.q.cast_const().cast(),
                c: scores.add(i * width),
                c_stride: width,
                accumulate: false,
            };
            s.dots(state, &tile);
        }
        // The factor waits for the exponential where nothing comes between; it must not turn the order around.
        let early = (cap.is_some() || a.slopes.is_some() || q_factor <= 0.0).then_some(q_factor);
        let factor = s.splat(if early.is_some() { 1.0 } else { q_factor });
        let lines = scratch.add(layout.rows);
        shape_scores(s, a, strip, &keys.rows, scores, early, mask, lines);
        let minus_inf = s.splat(f32::NEG_INFINITY);
        for j in 0..strip.vectors {
            let c = scores.add(j * S::LANES);
            let (m, l) = (strip.m.add(j * S::LANES), strip.l.add(j * S::LANES));
            let old = s.load(m);
            let mut top = [minus_inf; 4];
            let fours = n / 4 * 4;
            for i in (0..fours).step_by(4) {
                for (u, top) in top.iter_mut().enumerate() {
                    *top = s.max(*top, s.load(c.add((i + u) * width)));
                }
            }
            for i in fours..n {
                top[0] = s.max(top[0], s.load(c.add(i * width)));
            }
            let top = s.mul(s.max(s.max(top[0], top[1]), s.max(top[2], top[3])), factor);
            let grown = s.select_lt(s.add(old, s.splat(SLACK)), top, s.splat(1.0), s.splat(0.0));
            let mut new = old;
            if s.max_lane(grown) > 0.0 {
                new = s.max(old, top);
                let base = s.select_lt(minus_inf, new, new, s.splat(0.0));
                let alpha = exp2_share(s, s.sub(old, base));
                s.store(m, new);
                s.store(l, s.mul(s.load(l), alpha));
                for i in 0..layout.depth {
                    let o = strip.o.add(i * width + j * S::LANES);
                    s.store(o, s.mul(s.load(o), alpha));
                }
            }
            // A lane that has seen nothing yet subtracts 0, so that its scores of −∞ give 0 and not NaN.
            let minus_base = s.sub(s.splat(0.0), s.select_lt(minus_inf, new, new, s.splat(0.0)));
            let mut sum = [s.splat(0.0); 4];
            let p = p.add(j * S::LANES * 4);
            for i in (0..fours).step_by(4) {
                let mut x = [s.splat(0.0); 4];
                for (u, (x, sum)) in x.iter_mut().zip(&mut sum).enumerate() {
                    *x = exp2_rough(s, s.fma(s.load(c.add((i + u) * width)), factor, minus_base));
                    *sum = s.add(*sum, *x);
                }
                s.store_pairs(p.add(i / 2 * width * 4), x[0], x[1]);
                s.store_pairs(p.add((i / 2 + 1) * width * 4), x[2], x[3]);
            }
            for i in (fours..blocks * DOT_STEPS).step_by(2) {
                let mut x = [s.splat(0.0); 2];
                for (u, x) in x.iter_mut().enumerate() {
                    if i + u < n {
                        *x = exp2_rough(s, s.fma(s.load(c.add((i + u) * width)), factor, minus_base));
                        sum[u] = s.add(sum[u], *x);
                    }
                }
                s.store_pairs(p.add(i / 2 * width * 4), x[0], x[1]);
            }
            s.store(l, s.add(s.load(l), s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]))));
        }
        for i in (0..layout.depth).step_by(S::DOT_ROWS) {
            let tile = DotTile {
                rows: S::DOT_ROWS.min(layout.depth - i),
                blocks,
                a: keys.v.add(i * V_STRIDE),
                row_stride: V_STRIDE,
                block_stride: DOT_STEPS * 2,
                b: p,
                c: strip.o.add(i * width),
                c_stride: width,
                accumulate: true,
            };
            s.dots(state, &tile);
        }
    }
}
