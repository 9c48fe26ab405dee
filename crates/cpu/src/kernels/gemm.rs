//! y = x · Wᵀ with packed weights, the input norm in the prologue, and an epilogue that runs on each tile of results while it is
//! in second-level cache.
//!
//! Operations 2·T·N·E. Bytes: weights once for each group of `row_tile` rows, x once for each column tile. A work item computes
//! `row_tile` rows of one column tile (whole heads, for q, k and v) into a scratch tile, steps of [`STEP`] at a time so that a weight
//! panel stays in first-level cache; with 256 rows that is 128 operations a byte of f32 weights, above what memory needs. Dot products of
//! bf16 do 256 a byte: with tiles of 1024 operations a cycle memory binds before they do, so that the next panels are fetched ahead. With
//! few rows weights bind: they are read once, from end to end.

use half::bf16;
use lawson_core::{DType, problem::RopeLayout};

use super::{
    codes::CodeRows,
    norm::{inverse_rms, normalize},
    rope::rotate,
    rows::{CacheRows, Place, Rows, load_row, load_vector, places, round_row, store_row, with_elem},
    tile::{Tile, UNROLL, column_fetching},
};
use crate::simd::{DOT_STEPS, DotState, DotTile, Elem, INT8_BLOCK, Simd};

/// Bytes of x that stay in second-level cache beside the weights that are streamed through it.
const SMALL_X: usize = 512 << 10;

/// Steps of k between visits to the scratch tile.
pub const STEP: usize = 256;

/// Rows of results between the one that is written and the one that is fetched: writes would else wait for one another's cache lines.
const AHEAD: usize = 8;

/// A packed weight matrix [n, k]: column tiles of `tile_columns` outputs; each a row of panels of 2·LANES outputs, padded with
/// zeros to whole panels; a panel holds its outputs of step 0, then of step 1 and so on. For dot products k is padded with zeros to whole
/// blocks and a panel holds the pairs of steps 0 and 1 of its outputs, then of steps 2 and 3 and so on. Codes of int8 are held the same way,
/// as many steps side by side as `Simd::INT8_STEPS` says.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// First element.
    pub start: *const u8,
    /// Type of the elements.
    pub dtype: DType,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Outputs of a column tile, the last one may have fewer.
    pub tile_columns: usize,
    /// Whether it is packed for dot products.
    pub pairs: bool,
    /// Scales of int8 `[n]`; null where the elements are of `dtype`.
    pub scales: *const f32,
}

impl Weights {
    /// Steps, padding included.
    pub fn depth(&self) -> usize {
        match (self.scales.is_null(), self.pairs) {
            (false, _) => self.k.next_multiple_of(INT8_BLOCK),
            (true, true) => self.k.next_multiple_of(DOT_STEPS),
            (true, false) => self.k,
        }
    }
    /// Column tiles.
    pub fn tiles(&self) -> usize {
        self.n.div_ceil(self.tile_columns)
    }
}

/// Prologue: packs x as `[group of MR rows][k][rows of the group]`; for dot products, in bf16, as
/// `[group of DOT_ROWS rows][block of k][rows of the group][DOT_STEPS]`.
#[derive(Clone, Copy)]
pub struct PackX {
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
    /// Whether it is packed for dot products.
    pub pairs: bool,
    /// The packed x.
    pub packed: *mut f32,
}

/// Packs one group of rows.
/// # Safety
/// `p` describes valid memory: x readable, packed writable as [rows, k up to whole blocks]; no other item packs this group.
#[inline(always)]
pub unsafe fn pack_x<S: Simd>(s: S, p: &PackX, group: usize) {
    if p.pairs {
        // SAFETY: the caller's.
        return unsafe { pack_blocks(s, p, group) };
    }
    let first = group * S::MR;
    let rows = S::MR.min(p.rows - first);
    let out = p.packed.wrapping_add(first * p.k);
    let mut scale = [1f32; 16];
    // SAFETY: rows first .. first + rows exist; lanes holds 16 ≥ LANES for each of at most 16 rows.
    unsafe {
        if let Some((_, eps)) = p.norm {
            for (r, scale) in scale.iter_mut().enumerate().take(rows) {
                *scale = inverse_rms(s, p.x.dtype, p.x.at(p.first + first + r, 0), p.k, eps);
            }
        }
        let mut lanes = [[0f32; 16]; 16];
        let mut i = 0;
        while i < p.k {
            let n = S::LANES.min(p.k - i);
            for (r, lanes) in lanes.iter_mut().enumerate().take(rows) {
                let mut v = load_vector(s, p.x.dtype, p.x.at(p.first + first + r, 0), i, p.k);
                if let Some((weight, _)) = p.norm {
                    v = s.mul(s.mul(v, s.splat(scale[r])), s.load_n(weight.add(i), n));
                }
                s.store(lanes.as_mut_ptr(), v);
            }
            let mut columns = [[0f32; 16]; 16];
            for r0 in (0..rows).step_by(S::LANES) {
                s.transpose(lanes.as_ptr().cast::<f32>().add(r0 * 16), 16, columns.as_mut_ptr().cast::<f32>(), 16);
                let count = S::LANES.min(rows - r0);
                for (j, column) in columns.iter().enumerate().take(n) {
                    let (to, column) = (out.add((i + j) * rows + r0), s.load(column.as_ptr()));
                    // What a whole vector writes too much, the next column overwrites.
                    if rows <= S::LANES && (i + j) * rows + S::LANES <= p.k * rows {
                        s.store(to, column);
                    } else {
                        s.store_n(to, column, count);
                    }
                }
            }
            i += S::LANES;
        }
    }
}

/// [`pack_x`] for dot products.
#[inline(always)]
unsafe fn pack_blocks<S: Simd>(s: S, p: &PackX, group: usize) {
    let first = group * S::DOT_ROWS;
    let rows = S::DOT_ROWS.min(p.rows - first);
    let out = p.packed.cast::<bf16>().wrapping_add(first * p.k.next_multiple_of(DOT_STEPS));
    // SAFETY: the caller's: each row takes k up to whole blocks.
    unsafe {
        for r in 0..rows {
            let x = p.x.at(p.first + first + r, 0);
            let scale = match p.norm {
                Some((_, eps)) => s.splat(inverse_rms(s, p.x.dtype, x, p.k, eps)),
                None => s.splat(1.0),
            };
            for i in (0..p.k.next_multiple_of(DOT_STEPS)).step_by(S::LANES) {
                let mut v = s.splat(0.0);
                if i < p.k {
                    v = load_vector(s, p.x.dtype, x, i, p.k);
                    if let Some((weight, _)) = p.norm {
                        v = s.mul(s.mul(v, scale), s.load_n(weight.add(i), S::LANES.min(p.k - i)));
                    }
                }
                s.store_bf16(out.add((i / DOT_STEPS * rows + r) * DOT_STEPS + i % DOT_STEPS), v);
            }
        }
    }
}

/// Where q, k and v of the new tokens go, and what happens on the way.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Where the results go.
    pub to: HeadsTo,
    /// Weight `[D]` and eps of the QK-norm.
    pub norm: Option<(*const f32, f64)>,
    /// Rotary embedding.
    pub rope: Option<RopeRows>,
    /// New tokens of each sequence.
    pub new: &'a [usize],
    /// Past rows of each sequence.
    pub past: &'a [usize],
}

impl Heads<'_> {
    /// Where a head of a row goes, and the type of its elements; nothing where it becomes codes.
    #[inline(always)]
    fn at(&self, head: usize, row: usize, place: Place) -> Option<(*mut u8, DType)> {
        Some(match self.to {
            HeadsTo::Rows(to) => (to.at(row, head * self.head_dim), to.dtype),
            HeadsTo::CacheK(cache) => (cache.k_row(place.sequence, head, place.position), cache.dtype),
            HeadsTo::CacheV(cache) => (cache.v_row(place.sequence, head, place.position), cache.dtype),
            HeadsTo::CodesV(..) => return None,
        })
    }
}

/// Fetches a row of `n` elements that is written soon.
#[inline(always)]
fn fetch_row<S: Simd>(s: S, (to, dtype): (*mut u8, DType), n: usize) {
    for line in (0..n * dtype.size()).step_by(64) {
        s.fetch_near(to.wrapping_add(line));
    }
}

/// Where heads go.
#[derive(Clone, Copy)]
pub enum HeadsTo {
    /// Rows of a buffer [rows of the block, heads · D].
    Rows(Rows),
    /// The keys of the cache.
    CacheK(CacheRows),
    /// The values of the cache.
    CacheV(CacheRows),
    /// The values of a quantised cache, rounded to the dtype first.
    CodesV(CodeRows, DType),
}

/// Rows of the table that `kernels::rope` describes.
#[derive(Clone, Copy)]
pub struct RopeRows {
    /// The table's row of the first token of the row block.
    pub table: *const f32,
    /// f32 of one half of a row.
    pub width: usize,
    /// Which dimensions turn together.
    pub layout: RopeLayout,
}

/// What happens to a finished tile.
#[derive(Clone, Copy)]
pub enum Epilogue<'a> {
    /// Rows of a tensor, plus the residual.
    Store {
        /// [T, n].
        to: Rows,
        /// Added.
        residual: Option<Rows>,
    },
    /// QK-norm, RoPE and append.
    Heads(Heads<'a>),
}

/// One projection of a GEMM step.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Packed weights.
    pub weights: Weights,
    /// `[n]`.
    pub bias: Option<*const f32>,
    /// What happens to a finished tile.
    pub epilogue: Epilogue<'a>,
}

/// A GEMM step over a block of rows.
#[derive(Clone, Copy)]
pub struct Gemm<'a> {
    /// x as [`pack_x`] leaves it, or `quantise_x` for weights in int8.
    pub packed: *const f32,
    /// First token.
    pub first: usize,
    /// Tokens.
    pub rows: usize,
    /// Rows of a work item, a multiple of MR.
    pub row_tile: usize,
    /// Projections that share x.
    pub segments: &'a [Segment<'a>],
}

impl Gemm<'_> {
    /// Work items.
    pub fn items(&self) -> usize {
        self.rows.div_ceil(self.row_tile) * self.segments.iter().map(|s| s.weights.tiles()).sum::<usize>()
    }

    /// The tile of a work item, its columns padded to whole panels.
    #[inline(always)]
    pub(super) fn tile(&self, item: usize, panel: usize) -> ItemTile<'_> {
        let groups = self.rows.div_ceil(self.row_tile);
        let (mut column_tile, group) = (item / groups, item % groups);
        let mut segment = &self.segments[0];
        for candidate in self.segments {
            segment = candidate;
            if column_tile < candidate.weights.tiles() {
                break;
            }
            column_tile -= candidate.weights.tiles();
        }
        let w = segment.weights;
        let (row0, column0) = (group * self.row_tile, column_tile * w.tile_columns);
        let columns = w.tile_columns.min(w.n - column0);
        let rows = self.row_tile.min(self.rows - row0);
        ItemTile { segment, row0, rows, column0, columns, padded: columns.next_multiple_of(panel) }
    }
}

/// The part of a GEMM that one work item computes.
#[derive(Clone, Copy)]
pub(super) struct ItemTile<'a> {
    /// Whose columns they are.
    pub segment: &'a Segment<'a>,
    /// First row of the row block, and rows.
    pub row0: usize,
    pub rows: usize,
    /// First column of the segment, and columns.
    pub column0: usize,
    pub columns: usize,
    /// Elements between rows of the scratch tile.
    pub padded: usize,
}

/// f32 of scratch for a GEMM of these shapes.
pub const fn scratch_len(row_tile: usize, tile_columns: usize, panel: usize) -> usize {
    row_tile * tile_columns.next_multiple_of(panel)
}

/// Computes one work item.
/// # Safety
/// `g` describes valid memory; `scratch` is writable as [`scratch_len`] f32; no other item with this index runs.
#[inline(always)]
pub unsafe fn gemm<S: Simd>(s: S, g: &Gemm<'_>, item: usize, scratch: *mut f32) {
    let t = g.tile(item, 2 * S::LANES);
    let ItemTile { row0, rows, padded, .. } = t;
    let w = t.segment.weights;
    // SAFETY: the caller's; offsets follow the packed layout.
    unsafe {
        let skipped = (t.column0 / w.tile_columns) * w.tile_columns.next_multiple_of(2 * S::LANES) * w.depth();
        if w.pairs {
            let x = g.packed.cast::<bf16>().add(row0 * w.depth());
            dot_product(s, x.cast(), rows, w.depth() / DOT_STEPS, w.start.add(skipped * 2), padded, scratch);
        } else {
            with_elem!(w.dtype, T => {
                product::<S, T>(s, g.packed.add(row0 * w.k), rows, w.k, w.start.cast::<T>().add(skipped), padded, scratch)
            });
        }
        finish_tile(s, g, &t, scratch);
    }
}

/// Bias and epilogue of the products of a work item's tile.
/// # Safety
/// As [`gemm`]; `scratch` holds the products.
#[inline(always)]
pub(super) unsafe fn finish_tile<S: Simd>(s: S, g: &Gemm<'_>, t: &ItemTile<'_>, scratch: *mut f32) {
    let &ItemTile { segment, row0, rows, column0, columns, padded } = t;
    // SAFETY: the caller's.
    unsafe {
        if let Some(bias) = segment.bias {
            for r in 0..rows {
                let c = scratch.add(r * padded);
                let mut i = 0;
                while i < columns {
                    let n = S::LANES.min(columns - i);
                    s.store(c.add(i), s.add(s.load(c.add(i)), s.load_n(bias.add(column0 + i), n)));
                    i += S::LANES;
                }
            }
        }
        match segment.epilogue {
            Epilogue::Store { to, residual } => {
                for r in 0..rows {
                    let (c, t) = (scratch.add(r * padded), g.first + row0 + r);
                    if let Some(x) = residual {
                        let row = x.at(t, column0);
                        let mut i = 0;
                        while i < columns {
                            s.store(c.add(i), s.add(s.load(c.add(i)), load_vector(s, x.dtype, row, i, columns)));
                            i += S::LANES;
                        }
                    }
                    if r + AHEAD < rows {
                        fetch_row(s, (to.at(t + AHEAD, column0), to.dtype), columns);
                    }
                    store_row(s, to.dtype, c, to.at(t, column0), columns);
                }
            }
            Epilogue::Heads(h) => {
                let end = g.first + row0 + rows;
                let mut later = places(h.new, h.past, end.min(g.first + row0 + AHEAD), end);
                for (r, place) in places(h.new, h.past, g.first + row0, end).enumerate() {
                    let later = later.next();
                    for i in 0..columns / h.head_dim {
                        let c = scratch.add(r * padded + i * h.head_dim);
                        let head = column0 / h.head_dim + i;
                        if let Some(row) = later.and_then(|place| h.at(head, row0 + r + AHEAD, place)) {
                            fetch_row(s, row, h.head_dim);
                        }
                        finish_head(s, &h, c, head, row0 + r, place);
                    }
                }
            }
        }
    }
}

/// C[rows, padded] = packed x · one column tile. Each register tile fetches a share of the next weight panel and of its own next
/// steps of x, so that neither is waited for.
#[inline(always)]
unsafe fn product<S: Simd, T: Elem>(s: S, x: *const f32, rows: usize, k: usize, w: *const T, padded: usize, c: *mut f32) {
    let width = 2 * S::LANES;
    let (panels, groups) = (padded / width, rows.div_ceil(S::MR));
    let depths = k.div_ceil(STEP);
    // Where all of x stays in second-level cache each panel is read from end to end, as it lies in memory.
    let streams = rows * k * 4 <= SMALL_X;
    let (outer, inner) = if streams { (panels, depths) } else { (depths, panels) };
    for i in 0..outer {
        for j in 0..inner {
            let (panel, k0) = if streams { (i, j * STEP) } else { (j, i * STEP) };
            let steps = STEP.min(k - k0);
            let column0 = panel * width;
            let b = w.wrapping_add(column0 * k + k0 * width);
            // What follows here, the next panel, the next steps of the first one, or the tile that follows.
            let next = match (streams, panel + 1 < panels, k0 + steps < k) {
                (true, _, _) => b.wrapping_add(steps * width),
                (false, true, _) => b.wrapping_add(k * width),
                (false, false, true) => w.wrapping_add((k0 + steps) * width),
                (false, false, false) => w.wrapping_add(padded * k),
            };
            let b_share = (UNROLL * width * size_of::<T>()).div_ceil(groups);
            for group in 0..groups {
                let r = group * S::MR;
                let n = S::MR.min(rows - r);
                let a = x.wrapping_add(r * k + k0 * n);
                let a_share = (UNROLL * 4 * n).div_ceil(panels);
                let t = Tile {
                    k: steps,
                    a,
                    a_stride: n,
                    b,
                    b_stride: width,
                    c: c.wrapping_add(r * padded + column0),
                    c_stride: padded,
                    accumulate: k0 > 0,
                };
                let x_next = if k0 + steps < k { a.wrapping_add(steps * n) } else { x.wrapping_add(r * k) };
                let fetch = [
                    (next.cast::<u8>().wrapping_add(group * b_share * steps / UNROLL), b_share),
                    (x_next.cast::<u8>().wrapping_add(panel * a_share * steps / UNROLL), a_share),
                ];
                // SAFETY: the packed layouts: n rows of x side by side, the panel's columns side by side.
                unsafe { column_fetching::<S, T>(s, n, t, fetch) };
            }
        }
    }
}

/// [`product`] by dot products over `blocks` of k.
#[inline(always)]
unsafe fn dot_product<S: Simd>(s: S, x: *const u8, rows: usize, blocks: usize, w: *const u8, padded: usize, c: *mut f32) {
    /// Blocks between visits to the scratch tile: two panels of B and a group of A stay in first-level cache.
    const STEP_BLOCKS: usize = 8;
    // Bytes of a block of a panel.
    let panel_block = DOT_STEPS * S::DOT_COLUMNS * 2;
    let (mut state, panels) = (DotState::default(), padded / S::DOT_COLUMNS);
    let (pairs, depths) = (panels.div_ceil(2), blocks.div_ceil(STEP_BLOCKS));
    let streams = rows * blocks * DOT_STEPS * 2 <= SMALL_X;
    let (outer, inner) = if streams { (pairs, depths) } else { (depths, pairs) };
    for i in 0..outer {
        for j in 0..inner {
            let (pair, block0) = if streams { (2 * i, j * STEP_BLOCKS) } else { (2 * j, i * STEP_BLOCKS) };
            let steps = STEP_BLOCKS.min(blocks - block0);
            // Panels that are read from end to end need no help; of the others each group of rows fetches a share of the next.
            let next = if pair + 2 < panels { (pair + 2, block0) } else { (0, block0 + steps) };
            let share = if streams { 0 } else { (steps * panel_block).div_ceil(rows.div_ceil(S::DOT_ROWS)) };
            for r in (0..rows).step_by(S::DOT_ROWS) {
                let n = S::DOT_ROWS.min(rows - r);
                for panel in pair..panels.min(pair + 2) {
                    let start = ((next.0 + panel - pair) * blocks + next.1) * panel_block + r / S::DOT_ROWS * share;
                    for line in (0..share).step_by(64) {
                        s.fetch(w.wrapping_add(start + line));
                    }
                    let t = DotTile {
                        rows: n,
                        blocks: steps,
                        a: x.wrapping_add((r * blocks + block0 * n) * DOT_STEPS * 2),
                        row_stride: DOT_STEPS * 2,
                        block_stride: n * DOT_STEPS * 2,
                        b: w.wrapping_add((panel * blocks + block0) * panel_block),
                        c: c.wrapping_add(r * padded + panel * S::DOT_COLUMNS),
                        c_stride: padded,
                        accumulate: block0 > 0,
                    };
                    // SAFETY: the packed layouts: blocks of n rows of x, blocks of the panel's columns.
                    unsafe { s.dots(&mut state, &t) };
                }
            }
        }
    }
    s.end_dots(state);
}

/// QK-norm, RoPE and the store of one head of one token.
/// # Safety
/// As [`gemm`]; `c` holds the head.
#[inline(always)]
pub unsafe fn finish_head<S: Simd>(s: S, h: &Heads<'_>, c: *mut f32, head: usize, row: usize, place: Place) {
    // SAFETY: the caller's.
    unsafe {
        if let Some((weight, eps)) = h.norm {
            normalize(s, c, weight, h.head_dim, eps);
        }
        if let Some(rope) = h.rope {
            rotate(s, rope.layout, c, rope.table.add(row * 2 * rope.width), rope.width);
        }
        if let HeadsTo::CodesV(cache, dtype) = h.to {
            round_row(s, dtype, c, h.head_dim);
            return cache.append_values(place.sequence, head, place.position, c);
        }
        let Some((to, dtype)) = h.at(head, row, place) else { return };
        store_row(s, dtype, c, to, h.head_dim);
    }
}

/// Norms, turns and moves one head of the rows `from` without a GEMM: the passes of the less fused levels.
/// # Safety
/// As [`gemm`]; `scratch` is writable as D f32. `from` and the destination are the same rows or do not overlap.
#[inline(always)]
pub unsafe fn move_head<S: Simd>(s: S, h: &Heads<'_>, from: Rows, row: usize, head: usize, place: Place, scratch: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        load_row(s, from.dtype, from.at(row, head * h.head_dim), scratch, h.head_dim);
        finish_head(s, h, scratch, head, row, place);
    }
}
