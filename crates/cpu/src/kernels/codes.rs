//! Rows of a quantised cache: where codes, scales and the rows of unfinished groups lie, how they are written and read as f32. What codes
//! mean: [`lawson_core::quantised`].

use std::ops::Range;

use half::f16;
use lawson_core::{
    CacheDType,
    quantised::{Codes, GROUP},
};

use super::rows::{CacheRows, Rows, load_row};
use crate::{
    arena::ALIGN,
    simd::{Load, Simd, portable::Portable},
};

/// Calls `$body` with `$t` as the Rust type of `$codes`.
macro_rules! with_codes {
    ($codes:expr, $t:ident => $body:expr) => {
        match $codes {
            lawson_core::quantised::Codes::Int8 => {
                type $t = i8;
                $body
            }
            lawson_core::quantised::Codes::Int4 => {
                type $t = crate::simd::TwoU4;
                $body
            }
            other => unreachable!("codes {other:?} have no CPU kernel"),
        }
    };
}

pub(super) use with_codes;

/// One layer of a quantised cache, each part contiguous.
#[derive(Clone, Copy, Debug)]
pub struct CodeRows {
    /// What the codes are.
    pub codes: Codes,
    /// G.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Rows of each sequence, whole tiles.
    pub rows: usize,
    /// Codes of the keys, [B, G, rows, row bytes].
    pub k: *mut u8,
    /// Codes of the values, [B, G, rows, row bytes].
    pub v: *mut u8,
    /// Scales and minima of the keys, [B, G, rows / 32, scales of D].
    pub k_scales: *mut f16,
    /// Scales and minima of the values, [B, G, rows, scales of ⌈D / 32⌉].
    pub v_scales: *mut f16,
    /// Rows of keys that are not finite, one bit each, [B, G, rows / 32].
    pub lost: *mut u32,
    /// Keys of groups that are not finished, [B, G, 2, 32, D]: of the group behind the valid rows in one half, of what a call has written
    /// into a later group in the other.
    pub tails: *mut f32,
    /// The half of the group that the next valid row lies in, `[B]`.
    pub halves: *const usize,
    /// Valid rows, `[B]`.
    pub valid: *const usize,
}

// SAFETY: addresses and their layout; every use of an address states why it is valid and disjoint.
unsafe impl Send for CodeRows {}
// SAFETY: as above.
unsafe impl Sync for CodeRows {}

impl CodeRows {
    /// Where the parts of a layer start, in bytes from its first, in the order of the fields, and behind them the bytes of all; `None` where
    /// they are too many.
    pub fn layout(codes: Codes, sequences: usize, kv_heads: usize, head_dim: usize, rows: usize) -> Option<[usize; 7]> {
        let heads = sequences.checked_mul(kv_heads)?;
        let (row, scale) = (codes.row_bytes(head_dim), size_of::<f16>());
        let parts = [
            rows.checked_mul(row)?,
            rows.checked_mul(row)?,
            (rows / GROUP).checked_mul(codes.scales(head_dim) * scale)?,
            rows.checked_mul(codes.value_scales(head_dim) * scale)?,
            rows / GROUP * size_of::<u32>(),
            (2 * GROUP * size_of::<f32>()).checked_mul(head_dim)?,
        ];
        let mut starts = [0usize; 7];
        for (i, part) in parts.into_iter().enumerate() {
            starts[i + 1] = starts[i].checked_add(part.checked_mul(heads)?.checked_next_multiple_of(ALIGN)?)?;
        }
        Some(starts)
    }

    /// A layer whose parts start at `starts` from `memory`; [`CodeRows::layout`] gives them.
    pub fn new(
        codes: Codes,
        [kv_heads, head_dim, rows]: [usize; 3],
        memory: *mut u8,
        starts: &[usize; 7],
        state: [*const usize; 2],
    ) -> CodeRows {
        let at = |part: usize| memory.wrapping_add(starts[part]);
        let (k, v, k_scales, v_scales, lost, tails) = (at(0), at(1), at(2).cast(), at(3).cast(), at(4).cast(), at(5).cast());
        let [halves, valid] = state;
        CodeRows { codes, kv_heads, head_dim, rows, k, v, k_scales, v_scales, lost, tails, halves, valid }
    }

    /// Bytes of the codes of a row.
    #[inline(always)]
    pub fn row_bytes(&self) -> usize {
        self.codes.row_bytes(self.head_dim)
    }
    #[inline(always)]
    fn row(&self, sequence: usize, head: usize, row: usize) -> usize {
        (sequence * self.kv_heads + head) * self.rows + row
    }
    /// Codes of a row of keys; those of the rows behind it follow.
    #[inline(always)]
    pub fn k_row(&self, sequence: usize, head: usize, row: usize) -> *mut u8 {
        self.k.wrapping_add(self.row(sequence, head, row) * self.row_bytes())
    }
    /// Codes of a row of values; those of the rows behind it follow.
    #[inline(always)]
    pub fn v_row(&self, sequence: usize, head: usize, row: usize) -> *mut u8 {
        self.v.wrapping_add(self.row(sequence, head, row) * self.row_bytes())
    }
    /// Scales of the group of keys that a row lies in.
    #[inline(always)]
    pub fn k_scales(&self, sequence: usize, head: usize, row: usize) -> *mut f16 {
        self.k_scales.wrapping_add(self.row(sequence, head, row) / GROUP * self.codes.scales(self.head_dim))
    }
    /// Scales of a row of values; those of the rows behind it follow.
    #[inline(always)]
    pub fn v_scales(&self, sequence: usize, head: usize, row: usize) -> *mut f16 {
        self.v_scales.wrapping_add(self.row(sequence, head, row) * self.codes.value_scales(self.head_dim))
    }
    /// The word of the group of keys that a row lies in.
    #[inline(always)]
    pub fn lost(&self, sequence: usize, head: usize, row: usize) -> *mut u32 {
        self.lost.wrapping_add(self.row(sequence, head, row) / GROUP)
    }
    /// A row of keys whose group is not finished; the rows of its group lie together.
    /// # Safety
    /// `sequence` is one of the cache's.
    #[inline(always)]
    pub unsafe fn tail_row(&self, sequence: usize, head: usize, row: usize) -> *mut f32 {
        // SAFETY: the caller's.
        let (half, valid) = unsafe { (*self.halves.add(sequence), *self.valid.add(sequence)) };
        let half = half ^ usize::from(row / GROUP != valid / GROUP);
        let tail = ((sequence * self.kv_heads + head) * 2 + half) * GROUP + row % GROUP;
        self.tails.wrapping_add(tail * self.head_dim)
    }

    /// Adds the key of a row to its tail; the last row of a group has it quantised.
    /// # Safety
    /// `key` is readable as D f32; the row is one of the cache's, those before it in its group have been added, and nobody else uses the
    /// group meanwhile.
    #[inline(always)]
    pub unsafe fn append_key(&self, sequence: usize, head: usize, row: usize, key: *const f32) {
        let (d, first) = (self.head_dim, row / GROUP * GROUP);
        // SAFETY: the caller's: a group's rows, codes and scales lie together.
        unsafe {
            std::ptr::copy_nonoverlapping(key, self.tail_row(sequence, head, row), d);
            if row % GROUP < GROUP - 1 {
                return;
            }
            let rows = std::slice::from_raw_parts(self.tail_row(sequence, head, first), GROUP * d);
            let codes = std::slice::from_raw_parts_mut(self.k_row(sequence, head, first), GROUP * self.row_bytes());
            let scales = std::slice::from_raw_parts_mut(self.k_scales(sequence, head, first), self.codes.scales(d));
            *self.lost(sequence, head, first) = self.codes.quantise_keys(rows, codes, scales);
        }
    }

    /// Quantises a row of values.
    /// # Safety
    /// `values` is readable as D f32; the row is one of the cache's, and nobody else uses it meanwhile.
    #[inline(always)]
    pub unsafe fn append_values(&self, sequence: usize, head: usize, row: usize, values: *const f32) {
        let d = self.head_dim;
        // SAFETY: the caller's.
        unsafe {
            let codes = std::slice::from_raw_parts_mut(self.v_row(sequence, head, row), self.row_bytes());
            let scales = std::slice::from_raw_parts_mut(self.v_scales(sequence, head, row), self.codes.value_scales(d));
            self.codes.quantise_values(std::slice::from_raw_parts(values, d), codes, scales);
        }
    }

    /// Puts the rows before `len` of its group back into the tail, as their codes give them.
    /// # Safety
    /// As [`CodeRows::append_key`]; the group is finished, and the valid rows of the sequence are `len`.
    pub unsafe fn reopen(&self, sequence: usize, head: usize, len: usize) {
        for row in len / GROUP * GROUP..len {
            // SAFETY: the caller's.
            unsafe { self.load_key(Portable, sequence, head, row, self.tail_row(sequence, head, row)) };
        }
    }

    /// A row of keys whose group is finished, as f32.
    /// # Safety
    /// `to` is writable as D f32; the row is one of the cache's.
    #[inline(always)]
    unsafe fn load_key<S: Simd>(&self, s: S, sequence: usize, head: usize, row: usize, to: *mut f32) {
        let (d, scales) = (self.head_dim, self.k_scales(sequence, head, row));
        // SAFETY: the caller's.
        unsafe {
            if *self.lost(sequence, head, row) >> (row % GROUP) & 1 == 1 {
                std::slice::from_raw_parts_mut(to, d).fill(f32::NAN);
                return;
            }
            let codes = self.k_row(sequence, head, row);
            with_codes!(self.codes, T => expand::<S, T, true>(s, codes.cast(), scales, self.minima(scales, d), d, to));
        }
    }

    /// A row of values as f32.
    /// # Safety
    /// As [`CodeRows::load_key`].
    #[inline(always)]
    unsafe fn load_value<S: Simd>(&self, s: S, sequence: usize, head: usize, row: usize, to: *mut f32) {
        let (d, codes, scales) = (self.head_dim, self.v_row(sequence, head, row), self.v_scales(sequence, head, row));
        // SAFETY: the caller's.
        unsafe {
            let minima = self.minima(scales, d.div_ceil(GROUP));
            with_codes!(self.codes, T => expand::<S, T, false>(s, codes.cast(), scales, minima, d, to));
        }
    }

    /// Minima behind `ranges` scales, where the codes have any.
    #[inline(always)]
    fn minima(&self, scales: *const f16, ranges: usize) -> Option<*const f16> {
        (self.codes.scales(1) > 1).then(|| scales.wrapping_add(ranges))
    }
}

/// Scales or minima of `n` channels from `i` on. A range is a channel of keys, or [`GROUP`] channels of values.
#[inline(always)]
unsafe fn ranges<S: Simd, const KEYS: bool>(s: S, of: *const f16, i: usize, n: usize) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        match KEYS {
            true if n == S::LANES => s.load_f16(of.add(i)),
            true => f16::load_n(s, of.add(i), n),
            false => s.splat((*of.add(i / GROUP)).to_f32()),
        }
    }
}

/// What the codes of a row stand for.
#[inline(always)]
unsafe fn expand<S: Simd, T: Load, const KEYS: bool>(
    s: S,
    codes: *const T,
    scales: *const f16,
    minima: Option<*const f16>,
    d: usize,
    to: *mut f32,
) {
    let mut i = 0;
    macro_rules! store {
        ($x:expr, $n:expr) => {
            let min = match minima {
                Some(minima) => ranges::<S, KEYS>(s, minima, i, $n),
                None => s.splat(0.0),
            };
            s.store_n(to.add(i), s.fma($x, ranges::<S, KEYS>(s, scales, i, $n), min), $n);
            i += $n;
        };
    }
    // SAFETY: the caller's: codes, ranges and `to` have D channels.
    unsafe {
        while i + 2 * S::LANES <= d {
            let two = T::load_two(s, codes.add(i / T::PACKED));
            let [x, y] = if T::EVEN_ODD { s.interleave(two) } else { two };
            store!(x, S::LANES);
            store!(y, S::LANES);
        }
        while i < d {
            let n = S::LANES.min(d - i);
            store!(T::load_n(s, codes.add(i / T::PACKED), n), n);
        }
    }
}

/// The key/value cache of one layer.
#[derive(Clone, Copy, Debug)]
pub enum Cache {
    /// Elements of a dtype.
    Elements(CacheRows),
    /// Codes with scales.
    Codes(CodeRows),
}

impl Cache {
    /// How it holds its elements.
    #[inline(always)]
    pub fn dtype(&self) -> CacheDType {
        match self {
            Cache::Elements(c) => c.dtype.into(),
            Cache::Codes(c) => CacheDType::Codes(c.codes),
        }
    }
    /// First byte of a row of keys: those of the rows behind it in its tile follow at [`Cache::row_bytes`].
    #[inline(always)]
    pub fn k_row(&self, sequence: usize, head: usize, row: usize) -> *const u8 {
        match self {
            Cache::Elements(c) => c.k_row(sequence, head, row),
            Cache::Codes(c) => c.k_row(sequence, head, row),
        }
    }
    /// First byte of a row of values, as [`Cache::k_row`].
    #[inline(always)]
    pub fn v_row(&self, sequence: usize, head: usize, row: usize) -> *const u8 {
        match self {
            Cache::Elements(c) => c.v_row(sequence, head, row),
            Cache::Codes(c) => c.v_row(sequence, head, row),
        }
    }
    /// Bytes from one row to the next, scales apart.
    #[inline(always)]
    pub fn row_bytes(&self) -> usize {
        match self {
            Cache::Elements(c) => c.row_stride * c.dtype.size(),
            Cache::Codes(c) => c.row_bytes(),
        }
    }

    /// Keys `rows` of a sequence that has `len` rows, as f32, `stride` apart.
    /// # Safety
    /// `to` is writable as that many rows of D f32; the rows are among the `len`.
    #[expect(clippy::too_many_arguments, reason = "which rows, and where to")]
    #[inline(always)]
    pub unsafe fn load_keys<S: Simd>(
        &self,
        s: S,
        [sequence, head]: [usize; 2],
        rows: Range<usize>,
        len: usize,
        d: usize,
        to: *mut f32,
        stride: usize,
    ) {
        for (i, row) in rows.enumerate() {
            let to = to.wrapping_add(i * stride);
            // SAFETY: the caller's; rows behind the last finished group are in the tail.
            unsafe {
                match self {
                    Cache::Elements(c) => load_row(s, c.dtype, c.k_row(sequence, head, row), to, d),
                    Cache::Codes(c) if row < len / GROUP * GROUP => c.load_key(s, sequence, head, row, to),
                    Cache::Codes(c) => std::ptr::copy_nonoverlapping(c.tail_row(sequence, head, row), to, d),
                }
            }
        }
    }

    /// A row of values as f32.
    /// # Safety
    /// `to` is writable as D f32; the row is one of the cache's.
    #[inline(always)]
    pub unsafe fn load_value<S: Simd>(&self, s: S, [sequence, head]: [usize; 2], row: usize, d: usize, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Cache::Elements(c) => load_row(s, c.dtype, c.v_row(sequence, head, row), to, d),
                Cache::Codes(c) => c.load_value(s, sequence, head, row, to),
            }
        }
    }
}

/// New keys of a block of rows, on their way to a quantised cache.
#[derive(Clone, Copy)]
pub struct QuantiseKeys<'a> {
    /// The cache.
    pub cache: CodeRows,
    /// [rows of the block, G·D], in the compute dtype.
    pub staged: Rows,
    /// New tokens of each sequence.
    pub new: &'a [usize],
    /// Past rows of each sequence.
    pub past: &'a [usize],
    /// First token of the block.
    pub first: usize,
    /// Tokens of the block.
    pub rows: usize,
}

impl QuantiseKeys<'_> {
    /// Work items: one for each sequence and head.
    pub fn items(&self) -> usize {
        self.new.len() * self.cache.kv_heads
    }
}

/// Adds the new keys of one sequence and head to its tail, and quantises each group that is then whole.
/// # Safety
/// `q` describes valid memory, with room for the new rows; `scratch` is writable as D f32; no other item with this index runs.
#[inline(always)]
pub unsafe fn quantise_keys<S: Simd>(s: S, q: &QuantiseKeys<'_>, item: usize, scratch: *mut f32) {
    let (cache, sequence, head) = (&q.cache, item / q.cache.kv_heads, item % q.cache.kv_heads);
    let begin: usize = q.new[..sequence].iter().sum();
    let tokens = q.first.max(begin)..(q.first + q.rows).min(begin + q.new[sequence]);
    for token in tokens {
        let row = q.past[sequence] + token - begin;
        // SAFETY: the caller's; rows before this one are in the tail already, from this call or from those before it.
        unsafe {
            let from = q.staged.at(token - q.first, head * cache.head_dim);
            load_row(s, q.staged.dtype, from, scratch, cache.head_dim);
            cache.append_key(sequence, head, row, scratch);
        }
    }
}
