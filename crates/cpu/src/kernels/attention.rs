//! One attention step: what it reads and writes, its work items, and how an item's results are finished.
//!
//! An item is some queries of one key/value head, all heads of the group together, over one part of the keys.

use std::ops::Range;

use lawson_core::problem::AttentionSpec;

use super::{
    codes::Cache,
    rows::{Rows, store_row},
};
use crate::simd::Simd;

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
    pub cache: Cache,
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
        self.split.map_or(1, |s| self.len(sequence).div_ceil(s))
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

    /// Rows of a sequence, the new ones included.
    #[inline(always)]
    pub fn len(&self, sequence: usize) -> usize {
        self.past[sequence] + self.new[sequence]
    }

    /// Rows of the cache that the query at `index` of `sequence` may see in `part`.
    pub fn visible(&self, sequence: usize, index: usize, part: usize) -> Range<usize> {
        let seen = self.spec.visible_range(self.past[sequence] + index, self.len(sequence));
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
        let (factor, top, z) = normalizer(m, l, a.sinks.map(|p| *p.add(head)));
        let f = s.splat(factor);
        for j in (0..d).step_by(S::LANES) {
            let n = S::LANES.min(d - j);
            // A row that saw nothing is 0 even where its accumulator holds NaN or ∞ from a poisoned value.
            let x = if factor == 0.0 { s.splat(0.0) } else { s.mul(s.load_n(acc.add(j), n), f) };
            s.store_n(acc.add(j), x, n);
        }
        store_row(s, a.out.dtype, acc, a.out.at(r, head * d), d);
        if let Some(to) = a.lse {
            to.add(r * a.spec.heads + head).write((top + z.log2()) / LOG2_E);
        }
    }
}

/// What multiplies the accumulator of a query with maximum `m` (base 2) and sum `l`, then the two parts of its log-sum-exp: maximum
/// (base 2) and sum, the sink included.
#[inline(always)]
fn normalizer(m: f32, l: f32, sink: Option<f32>) -> (f32, f32, f32) {
    if m == f32::NEG_INFINITY && l == 0.0 {
        return (0.0, sink.map_or(m, |x| x * LOG2_E), 1.0);
    }
    let Some(sink) = sink.map(|x| x * LOG2_E) else { return (1.0 / l, m, l) };
    let top = m.max(sink);
    let share = (m - top).exp2();
    let z = l * share + (sink - top).exp2();
    (share / z, top, z)
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
