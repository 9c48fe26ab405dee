//! y = x · Wᵀ with weights in int8 (`lawson_core::int8`): x is quantised row by row, sums are i32, and the epilogue of `gemm` runs on each
//! dequantised tile while it is in second-level cache.
//!
//! Operations 2·T·N·E. Bytes: E of weights for each output once for each group of `row_tile` rows, half of bf16's; x once for each column tile,
//! 4 / [`Simd::INT8_STEPS`] bytes an element. An AVX2 step, 2 of k by 6 rows by 16 columns, needs 12 `vpmaddwd`, 12 `vpaddd` and 2
//! `vpmovsxbw`: 192 products in 26 vector operations, where f32 has 96 in 12, so that with four vector ports of which two multiply it can at best do
//! 1.85 times what f32 does. A VNNI step, 4 of k by 12 rows by 32 columns, has 1536 products in 24 `vpdpbusd`, 4 times f32's. With few rows weights bind:
//! they are read once, from end to end.
//!
//! `vpmaddwd` adds two products of codes, at most 2·127², without saturation; `vpmaddubsw`, which does saturate, is not used. `vpdpbusd` takes
//! its first operand without sign, so that weights are stored as code + 128 and Σ code(x) · 128 is subtracted at the end; its sums, as all here,
//! wrap, and what is left is less than 2³¹ for k ≤ `MOST_INPUTS`.

use lawson_core::{
    DType,
    int8::{CODE_MAX, ROUND_MAGIC, inverse, output, scale},
};

use super::{
    gemm::{Gemm, finish_tile},
    norm::normalize,
    rows::{Rows, load_row, round_row},
};
use crate::simd::{INT8_BLOCK, Int8Tile, Simd};

/// Blocks of k between visits to the scratch tile: a weight panel stays in first-level cache.
const STEP_BLOCKS: usize = 8;

/// Bytes of x that stay in second-level cache beside the weights that are streamed through it.
const SMALL_X: usize = 256 << 10;

/// Prologue: x as scales, sums of codes, and codes: `[T]` f32, `[T]` i32, then from a multiple of 64 bytes on
/// `[group of MR rows][block of k][rows of the group][INT8_BLOCK]`.
#[derive(Clone, Copy)]
pub struct QuantiseX {
    /// [T, k].
    pub x: Rows,
    /// First token.
    pub first: usize,
    /// Tokens.
    pub rows: usize,
    /// Columns.
    pub k: usize,
    /// Weight `[k]` and eps of the input norm.
    pub norm: Option<(*const f32, f64)>,
    /// What the normed x is rounded to.
    pub dtype: DType,
    /// The packed x.
    pub packed: *mut u8,
}

/// Bytes of the scales and sums of `rows` tokens.
const fn head_bytes(rows: usize) -> usize {
    (8 * rows).next_multiple_of(64)
}

/// Bytes of the packed x of `rows` tokens of `k` columns, for kernels that sum `steps` products at once.
pub const fn packed_bytes(rows: usize, k: usize, steps: usize) -> usize {
    head_bytes(rows) + rows * k.next_multiple_of(INT8_BLOCK) * (4 / steps)
}

/// Quantises one group of rows.
/// # Safety
/// `q` describes valid memory: x readable, packed writable as [`packed_bytes`]; `scratch` is writable as k f32; no other item packs this group.
#[inline(always)]
pub unsafe fn quantise_x<S: Simd>(s: S, q: &QuantiseX, group: usize, scratch: *mut f32) {
    let first = group * S::MR;
    let rows = S::MR.min(q.rows - first);
    let (blocks, bytes) = (q.k.div_ceil(INT8_BLOCK), 4 / S::INT8_STEPS);
    let codes = q.packed.wrapping_add(head_bytes(q.rows) + first * blocks * INT8_BLOCK * bytes);
    for r in 0..rows {
        // SAFETY: the caller's: row first + r exists; its codes lie in the group's part, r · INT8_BLOCK from each block's start.
        unsafe {
            load_row(s, q.x.dtype, q.x.at(q.first + first + r, 0), scratch, q.k);
            if let Some((weight, eps)) = q.norm {
                normalize(s, scratch, weight, q.k, eps);
                round_row(s, q.dtype, scratch, q.k);
            }
            let scale = row_scale(s, scratch, q.k);
            let (row, stride) = (codes.add(r * INT8_BLOCK * bytes), rows * INT8_BLOCK * bytes);
            let sum = if bytes == 1 {
                write_codes::<S, i8>(s, scratch, q.k, scale, row, stride)
            } else {
                write_codes::<S, i16>(s, scratch, q.k, scale, row, stride)
            };
            q.packed.cast::<f32>().add(first + r).write(scale);
            q.packed.cast::<i32>().add(q.rows + first + r).write(sum);
        }
    }
}

/// The scale of a row.
#[inline(always)]
unsafe fn row_scale<S: Simd>(s: S, x: *const f32, n: usize) -> f32 {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let (mut greatest, mut lost) = (zero, zero);
    for i in (0..n).step_by(S::LANES) {
        // SAFETY: i < n.
        let v = unsafe { s.load_n(x.add(i), S::LANES.min(n - i)) };
        greatest = s.max(s.copysign(v, one), greatest);
        // NaN from what is not finite, else 0.
        lost = s.fma(v, zero, lost);
    }
    scale(if s.sum(lost) == 0.0 { s.max_lane(greatest) } else { f32::NAN })
}

/// An integer that holds a code.
trait Code: Copy {
    /// The integer in the last bits.
    fn of(bits: u32) -> Self;
}
impl Code for i8 {
    #[inline(always)]
    fn of(bits: u32) -> i8 {
        bits as i8
    }
}
impl Code for i16 {
    #[inline(always)]
    fn of(bits: u32) -> i16 {
        bits as i16
    }
}

/// Writes the codes of a row, blocks `stride` bytes apart, zeros behind the last; returns their sum.
#[inline(always)]
unsafe fn write_codes<S: Simd, C: Code>(s: S, x: *const f32, n: usize, scale: f32, row: *mut u8, stride: usize) -> i32 {
    let (least, most, magic) = (s.splat(-CODE_MAX), s.splat(CODE_MAX), s.splat(ROUND_MAGIC));
    let factor = s.splat(inverse(scale));
    let mut sum = 0i32;
    for (block, start) in (0..n).step_by(INT8_BLOCK).enumerate() {
        let mut bits = [ROUND_MAGIC.to_bits(); INT8_BLOCK];
        if !scale.is_nan() {
            for i in (0..INT8_BLOCK.min(n - start)).step_by(S::LANES) {
                // SAFETY: start + i < n; i + LANES ≤ INT8_BLOCK, which LANES divides. Lanes behind n are 0.
                unsafe {
                    let v = s.load_n(x.add(start + i), S::LANES.min(n - start - i));
                    let v = s.max(s.min(s.mul(v, factor), most), least);
                    s.store(bits.as_mut_ptr().add(i).cast(), s.add(v, magic));
                }
            }
        }
        // SAFETY: the row has a place of INT8_BLOCK codes in every block.
        let to = unsafe { &mut *row.add(block * stride).cast::<[C; INT8_BLOCK]>() };
        for (to, bits) in to.iter_mut().zip(bits) {
            *to = C::of(bits);
            sum += i32::from(bits as i8);
        }
    }
    sum
}

/// Computes one work item.
/// # Safety
/// As [`super::gemm::gemm`], whose packed x is what [`quantise_x`] has left for the same rows; the weights are in int8.
#[inline(always)]
pub unsafe fn gemm_int8<S: Simd>(s: S, g: &Gemm<'_>, item: usize, scratch: *mut f32) {
    let t = g.tile(item, 2 * S::LANES);
    let w = t.segment.weights;
    let packed = g.packed.cast::<u8>();
    // SAFETY: the caller's; offsets follow the packed layouts.
    unsafe {
        let skipped = (t.column0 / w.tile_columns) * w.tile_columns.next_multiple_of(2 * S::LANES) * w.depth();
        let x = packed.add(head_bytes(g.rows) + t.row0 * w.depth() * (4 / S::INT8_STEPS));
        product(s, x, t.rows, w.depth() / INT8_BLOCK, w.start.add(skipped), t.padded, scratch.cast());
        let w_scales = std::slice::from_raw_parts(w.scales.add(t.column0), t.columns);
        for r in 0..t.rows {
            let x_scale = packed.cast::<f32>().add(t.row0 + r).read();
            let shift = packed.cast::<i32>().add(g.rows + t.row0 + r).read().wrapping_mul(S::INT8_SHIFT);
            let row = std::slice::from_raw_parts_mut(scratch.add(r * t.padded), t.columns);
            for (y, &w_scale) in row.iter_mut().zip(w_scales) {
                *y = output((y.to_bits() as i32).wrapping_sub(shift), x_scale, w_scale);
            }
        }
        finish_tile(s, g, &t, scratch);
    }
}

/// C[rows, padded] = codes of x · one column tile, over `blocks` of k.
#[inline(always)]
unsafe fn product<S: Simd>(s: S, x: *const u8, rows: usize, blocks: usize, w: *const u8, padded: usize, c: *mut i32) {
    let (width, x_block) = (2 * S::LANES, INT8_BLOCK * (4 / S::INT8_STEPS));
    let panel_block = INT8_BLOCK * width;
    let (panels, groups) = (padded / width, rows.div_ceil(S::MR));
    let depths = blocks.div_ceil(STEP_BLOCKS);
    // Where all of x stays in second-level cache each panel is read from end to end, as it lies in memory.
    let streams = rows * blocks * x_block <= SMALL_X;
    let (outer, inner) = if streams { (panels, depths) } else { (depths, panels) };
    for i in 0..outer {
        for j in 0..inner {
            let (panel, block0) = if streams { (i, j * STEP_BLOCKS) } else { (j, i * STEP_BLOCKS) };
            let steps = STEP_BLOCKS.min(blocks - block0);
            let b = w.wrapping_add((panel * blocks + block0) * panel_block);
            // What follows here, the next panel, or the next blocks of the first one; each group fetches a share of it.
            let next = match (streams, panel + 1 < panels) {
                (true, _) => b.wrapping_add(steps * panel_block),
                (false, true) => b.wrapping_add(blocks * panel_block),
                (false, false) => w.wrapping_add((block0 + steps) * panel_block),
            };
            let share = (panel_block / 16).div_ceil(groups);
            for group in 0..groups {
                let r = group * S::MR;
                let n = S::MR.min(rows - r);
                let t = Int8Tile {
                    blocks: steps,
                    a: x.wrapping_add((r * blocks + block0 * n) * x_block),
                    block_stride: n * x_block,
                    b,
                    c: c.wrapping_add(r * padded + panel * width),
                    c_stride: padded,
                    accumulate: block0 > 0,
                    fetch: (next.wrapping_add(group * share * 16 * steps), share),
                };
                // SAFETY: the packed layouts: blocks of n rows of x, blocks of the panel's columns.
                unsafe { tile_rows(s, n, &t) };
            }
        }
    }
}

/// A tile of any number of rows up to MR: the largest tiles first.
#[inline(always)]
unsafe fn tile_rows<S: Simd>(s: S, m: usize, t: &Int8Tile) {
    let mut i = 0;
    while i < m {
        let a = t.a.wrapping_add(i * INT8_BLOCK * (4 / S::INT8_STEPS));
        let t = Int8Tile { a, c: t.c.wrapping_add(i * t.c_stride), ..*t };
        macro_rules! largest {
            ($($rows:literal),*) => {
                match m - i {
                    // SAFETY: rows i .. i + $rows of A and C lie within what the caller vouches for.
                    $(left if $rows <= S::MR && $rows <= left => unsafe {
                        s.int8_tile::<$rows>(&t);
                        i += $rows;
                    },)*
                    _ => unreachable!("1 row always fits"),
                }
            };
        }
        largest!(12, 6, 4, 2, 1);
    }
}

/// What products of int8 can do when nothing else is asked of them: `rounds` × [`Simd::INT8_PROBE_OPS`] operations.
#[inline(always)]
pub fn int8_probe<S: Simd>(s: S, rounds: usize) -> f32 {
    s.int8_probe(rounds) as f32
}
