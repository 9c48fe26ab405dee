//! Runs plans: one loop over stages, row blocks and steps; levels of fusion differ only in the plan.

use lawson_core::{
    Error, ErrorKind, Result, WeightKind,
    plan::{BlockPlan, BufferName, Op, Part, Projection, Step, TiledAttention},
    problem::{BlockSpec, RopeFrequencies},
};

use crate::{
    arena::{ALIGN, AlignedBytes},
    dispatch::Kernels,
    kernels::{
        attention::{Attention, MaskRows},
        codes::{Cache, QuantiseKeys},
        gemm::{Epilogue, Gemm, Heads, HeadsTo, PackX, RopeRows, Segment},
        gemm_int8::QuantiseX,
        rope,
        rows::{Rows, places},
        scores::Strips,
    },
    machine::Memory,
    pack::{PackedMatrix, SendPtr},
    threads::Threads,
};

/// A block's weights as kernels read them.
pub struct PackedBlock {
    /// [H·D, E].
    pub q: PackedMatrix,
    /// [G·D, E].
    pub k: PackedMatrix,
    /// [G·D, E].
    pub v: PackedMatrix,
    /// [E, H·D].
    pub o: PackedMatrix,
    /// [H·D].
    pub q_bias: Option<Vec<f32>>,
    /// [G·D].
    pub k_bias: Option<Vec<f32>>,
    /// [G·D].
    pub v_bias: Option<Vec<f32>>,
    /// `[E]`.
    pub o_bias: Option<Vec<f32>>,
    /// `[E]`.
    pub input_norm: Option<Vec<f32>>,
    /// `[D]`.
    pub q_norm: Option<Vec<f32>>,
    /// `[D]`.
    pub k_norm: Option<Vec<f32>>,
    /// `[H]`.
    pub sinks: Option<Vec<f32>>,
    /// `[H]`.
    pub alibi_slopes: Option<Vec<f32>>,
}

impl PackedBlock {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let vectors = [&self.q_bias, &self.k_bias, &self.v_bias, &self.o_bias, &self.input_norm, &self.q_norm, &self.k_norm];
        let small: usize = vectors.into_iter().chain([&self.sinks, &self.alibi_slopes]).flatten().map(|v| v.len() * 4).sum();
        self.q.bytes() + self.k.bytes() + self.v.bytes() + self.o.bytes() + small
    }

    /// Where the matrices lie.
    pub fn memory(&self) -> [Memory<'_>; 4] {
        [&self.q, &self.k, &self.v, &self.o].map(PackedMatrix::memory)
    }
}

/// The caller's memory for one call.
pub struct Operands<'a> {
    /// The block's weights.
    pub weights: &'a PackedBlock,
    /// [T, E], readable.
    pub x: Rows,
    /// [T, E], writable.
    pub y: Rows,
    /// New tokens of each sequence: the plan's.
    pub new: &'a [usize],
    /// Past rows of each sequence: at most the plan's.
    pub past: &'a [usize],
    /// The cache, writable behind the past rows.
    pub cache: Cache,
    /// The arbitrary mask.
    pub mask: Option<MaskRows>,
    /// Frequencies of this call, where the block has RoPE.
    pub frequencies: Option<&'a RopeFrequencies>,
}

/// Memory of one context, kept between calls.
pub struct Workspace {
    buffers: AlignedBytes,
    scratch: AlignedBytes,
}

impl Workspace {
    /// An empty workspace.
    pub fn new() -> Result<Self> {
        Ok(Workspace { buffers: AlignedBytes::new(0)?, scratch: AlignedBytes::new(0)? })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.buffers.len() + self.scratch.len()
    }

    /// Makes room for `buffers` bytes and `scratch` bytes for each of `threads`.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn reserve(&mut self, buffers: usize, scratch: usize, threads: usize) -> Result<Scratch> {
        let stride = scratch.next_multiple_of(ALIGN);
        self.buffers.grow(buffers)?;
        self.scratch.grow(stride * threads)?;
        Ok(Scratch { start: SendPtr(self.scratch.as_ptr()), stride })
    }

    /// Address of the buffers.
    pub fn buffers(&self) -> *mut u8 {
        self.buffers.as_ptr()
    }
}

/// Scratch of every thread.
#[derive(Clone, Copy)]
pub struct Scratch {
    start: SendPtr<u8>,
    stride: usize,
}

impl Scratch {
    /// The scratch of `thread`, which alone uses it.
    pub fn of(&self, thread: usize) -> *mut f32 {
        self.start.get().wrapping_add(thread * self.stride).cast()
    }
}

/// Everything a step needs.
struct Run<'a> {
    kernels: &'a Kernels,
    threads: &'a Threads,
    plan: &'a BlockPlan,
    spec: &'a BlockSpec,
    operands: &'a Operands<'a>,
    buffers: *mut u8,
    scratch: Scratch,
    /// First token and tokens of the row block.
    first: usize,
    rows: usize,
    /// Whether buffers hold this row block alone, so that their first row is `first`.
    blocked: bool,
}

// SAFETY: shared with work items, which write disjoint parts; each use states which.
unsafe impl Sync for Run<'_> {}

/// Runs `plan` over `operands`. `monitor` is called after each launch with its stage and step.
///
/// # Safety
/// `operands` describe valid memory of the plan's shapes and dtypes, with room for the new rows in the cache; nobody else uses y,
/// the cache's new rows or `workspace` meanwhile.
///
/// # Errors
/// `OutOfMemory`; nothing was computed then.
pub unsafe fn run(
    kernels: &Kernels,
    threads: &Threads,
    plan: &BlockPlan,
    operands: &Operands<'_>,
    workspace: &mut Workspace,
    monitor: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    let scratch = workspace.reserve(plan.workspace_bytes, plan.scratch_bytes, threads.count())?;
    let tokens: usize = operands.new.iter().sum();
    for (i, stage) in plan.stages.iter().enumerate() {
        let block = stage.row_block.unwrap_or(tokens);
        for first in (0..tokens).step_by(block) {
            let run = Run {
                kernels,
                threads,
                plan,
                spec: &plan.problem.spec,
                operands,
                buffers: workspace.buffers(),
                scratch,
                first,
                rows: block.min(tokens - first),
                blocked: stage.row_block.is_some(),
            };
            for (j, step) in stage.steps.iter().enumerate() {
                // SAFETY: the caller's; the plan's buffers fit the reserved workspace.
                unsafe { run.step(step)? };
                monitor(i, j);
            }
        }
    }
    Ok(())
}

fn missing(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the plan needs {what}, which the call does not have"))
}

impl Run<'_> {
    /// A buffer's rows; row 0 is the first token of the buffer.
    fn buffer(&self, name: BufferName, stride: usize) -> Result<Rows> {
        let buffer = self.plan.buffer(name).ok_or_else(|| missing(name.name()))?;
        Ok(Rows { start: self.buffers.wrapping_add(buffer.offset), dtype: buffer.dtype, stride })
    }

    /// The row of a buffer that token `first` of this row block has.
    fn base(&self) -> usize {
        if self.blocked { 0 } else { self.first }
    }

    fn f32s(&self, name: BufferName) -> Result<*mut f32> {
        Ok(self.buffer(name, 0)?.start.cast())
    }

    unsafe fn step(&self, step: &Step) -> Result<()> {
        // SAFETY: the caller's, for each.
        unsafe {
            match &step.op {
                Op::InputNorm => self.input_norm(),
                Op::Projection(p) => self.projection(p),
                Op::QkNorm => self.heads(true, false, [Some(BufferName::Q), Some(BufferName::K), None]),
                Op::Rope => self.heads(false, true, [Some(BufferName::Q), Some(BufferName::K), None]),
                Op::Append => self.append(false),
                Op::RopeAppend => {
                    self.heads(false, true, [Some(BufferName::Q), None, None])?;
                    self.append(true)
                }
                Op::QuantiseKeys => self.quantise_keys(),
                Op::RopeTable => self.rope_table(),
                Op::TransposeQ => self.strips(self.kernels.transpose_q),
                Op::Scores => self.strips(self.kernels.scores),
                Op::Scale => self.strips(self.kernels.scale),
                Op::Softcap => self.strips(self.kernels.softcap),
                Op::Alibi => self.strips(self.kernels.alibi),
                Op::Mask => self.strips(self.kernels.mask),
                Op::Softmax => self.strips(self.kernels.softmax_strip),
                Op::WeightedValues => self.strips(self.kernels.weighted_values),
                Op::TransposeO => self.strips(self.kernels.transpose_o),
                Op::Attention(t) => self.attention(t),
                Op::MergeSplits(t) => self.merge(t),
                Op::Residual => self.residual(),
                other => Err(missing(other.name())),
            }
        }
    }

    unsafe fn input_norm(&self) -> Result<()> {
        let h = self.buffer(BufferName::H, self.spec.hidden_size)?;
        let weight = self.operands.weights.input_norm.as_ref().ok_or_else(|| missing("input_norm.weight"))?;
        let norm = (weight.as_ptr(), self.spec.input_norm.map_or(0.0, |e| e.get()));
        let norm = SharedRef(&norm);
        self.threads.run(self.rows, &|thread, row| {
            // SAFETY: the caller's; each item writes its own row of h and its thread's scratch.
            unsafe {
                (self.kernels.norm_row)(
                    self.operands.x,
                    h,
                    self.first + row,
                    *norm.get(),
                    self.spec.hidden_size,
                    self.scratch.of(thread),
                )
            }
        });
        Ok(())
    }

    /// What happens to heads on their way: norm, rope, destination. `kind` is 0 for q, 1 for k, 2 for v.
    fn head_epilogue(&self, kind: usize, norm: bool, rope: bool, to: HeadsTo) -> Result<Heads<'_>> {
        let w = self.operands.weights;
        let norm = match (self.spec.qk_norm, [&w.q_norm, &w.k_norm].get(kind)) {
            (Some(eps), Some(weight)) if norm => {
                Some((weight.as_ref().ok_or_else(|| missing("the QK-norm's weight"))?.as_ptr(), eps.get()))
            }
            _ => None,
        };
        let rope = match &self.spec.rope {
            Some(r) if rope && kind < 2 => {
                let width = rope::table_width(r.layout, r.rotary_dim(self.spec.attention.head_dim));
                // Blocked or not, the epilogue indexes the table by the row of the block.
                let table = self.f32s(BufferName::RopeTable)?.wrapping_add(self.base() * 2 * width);
                Some(RopeRows { table, width, layout: r.layout })
            }
            _ => None,
        };
        Ok(Heads { head_dim: self.spec.attention.head_dim, to, norm, rope, new: self.operands.new, past: self.operands.past })
    }

    unsafe fn projection(&self, p: &Projection) -> Result<()> {
        let (w, a) = (self.operands.weights, &self.spec.attention);
        let int8 = self.plan.problem.weights == WeightKind::Int8;
        let packed = self.f32s(if int8 { BufferName::Codes } else { BufferName::Packed })?;
        let k = if p.part == Part::O { a.q_dim() } else { self.spec.hidden_size };
        let (x, first) = if p.part == Part::O {
            (self.buffer(BufferName::Attention, k)?, self.base())
        } else if self.spec.input_norm.is_some() && !p.norm {
            (self.buffer(BufferName::H, k)?, self.base())
        } else {
            (self.operands.x, self.first)
        };
        let norm = match (&w.input_norm, self.spec.input_norm) {
            (Some(weight), Some(eps)) if p.norm => Some((weight.as_ptr(), eps.get())),
            _ => None,
        };
        let (pairs, columns) = (w.q.weights().pairs, k);
        let q = (&w.q, &w.q_bias, BufferName::Q);
        let k = (&w.k, &w.k_bias, BufferName::K);
        let v = (&w.v, &w.v_bias, BufferName::V);
        let mut segments = [None; 3];
        let parts: &[(usize, _)] = match p.part {
            Part::Q => &[(0, q)],
            Part::K => &[(1, k)],
            Part::V => &[(2, v)],
            Part::Kv => &[(1, k), (2, v)],
            Part::Qkv => &[(0, q), (1, k), (2, v)],
            Part::O => &[],
        };
        for (slot, &(kind, (weights, bias, buffer))) in segments.iter_mut().zip(parts) {
            let epilogue = if p.append {
                let to = match kind {
                    0 => HeadsTo::Rows(self.block_rows(BufferName::Q, a.q_dim())?),
                    1 => self.keys_to()?,
                    _ => self.values_to(),
                };
                Epilogue::Heads(self.head_epilogue(kind, true, true, to)?)
            } else {
                Epilogue::Store { to: self.buffer(buffer, weights.weights().n)?, residual: None }
            };
            *slot = Some(Segment { weights: weights.weights(), bias: bias.as_ref().map(|b| b.as_ptr()), epilogue });
        }
        if p.part == Part::O {
            let separate = self.spec.residual && !p.residual;
            let to = if separate { self.buffer(BufferName::Projected, self.spec.hidden_size)? } else { self.operands.y };
            let residual = p.residual.then_some(self.operands.x);
            segments[0] = Some(Segment {
                weights: w.o.weights(),
                bias: w.o_bias.as_ref().map(|b| b.as_ptr()),
                epilogue: Epilogue::Store { to, residual },
            });
        }
        let count = segments.iter().flatten().count();
        let Some(fill) = segments[0] else { return Err(missing("weights")) };
        let segments = segments.map(|s| s.unwrap_or(fill));
        let gemm = Gemm { packed, first: self.first, rows: self.rows, row_tile: p.row_tile, segments: &segments[..count] };
        let (rows, k) = (self.rows, columns);
        if int8 {
            let dtype = self.plan.problem.dtype;
            let quantise = QuantiseX { x, first, rows, k, norm, dtype, packed: packed.cast() };
            // SAFETY: the caller's.
            unsafe { project_int8(self.kernels, self.threads, &quantise, &gemm, self.scratch) };
        } else {
            let pack = PackX { x, first, rows, k, norm, pairs, packed };
            // SAFETY: the caller's.
            unsafe { project(self.kernels, self.threads, &pack, &gemm, self.scratch) };
        }
        Ok(())
    }

    /// A buffer's rows; row 0 is the first token of this row block.
    fn block_rows(&self, name: BufferName, stride: usize) -> Result<Rows> {
        let rows = self.buffer(name, stride)?;
        Ok(Rows { start: rows.at(self.base(), 0), ..rows })
    }

    /// Where new keys go: those of a quantised cache wait for the others of their group.
    fn keys_to(&self) -> Result<HeadsTo> {
        Ok(match self.operands.cache {
            Cache::Elements(cache) => HeadsTo::CacheK(cache),
            Cache::Codes(_) => HeadsTo::Rows(self.block_rows(BufferName::StagedK, self.spec.attention.kv_dim())?),
        })
    }

    /// Where new values go.
    fn values_to(&self) -> HeadsTo {
        match self.operands.cache {
            Cache::Elements(cache) => HeadsTo::CacheV(cache),
            Cache::Codes(cache) => HeadsTo::CodesV(cache, self.plan.problem.dtype),
        }
    }

    unsafe fn quantise_keys(&self) -> Result<()> {
        let Cache::Codes(cache) = self.operands.cache else { return Err(missing("a quantised cache")) };
        let (new, past) = (self.operands.new, self.operands.past);
        let staged = self.block_rows(BufferName::StagedK, self.spec.attention.kv_dim())?;
        let keys = QuantiseKeys { cache, staged, new, past, first: self.first, rows: self.rows };
        let keys = SharedRef(&keys);
        self.threads.run(keys.get().items(), &|thread, item| {
            // SAFETY: the caller's; each item writes the groups of its own sequence and head.
            unsafe { (self.kernels.quantise_keys)(keys.get(), item, self.scratch.of(thread)) }
        });
        Ok(())
    }

    /// Passes over the heads of q, k and v in their buffers, in place.
    unsafe fn heads(&self, norm: bool, rope: bool, buffers: [Option<BufferName>; 3]) -> Result<()> {
        let a = &self.spec.attention;
        for (kind, name) in buffers.into_iter().enumerate() {
            let Some(name) = name else { continue };
            let count = if kind == 0 { a.heads } else { a.kv_heads };
            let rows = self.buffer(name, count * a.head_dim)?;
            let heads = self.head_epilogue(kind, norm, rope, HeadsTo::Rows(rows))?;
            // SAFETY: the caller's.
            unsafe { self.move_heads(&heads, rows, count) };
        }
        Ok(())
    }

    /// Moves k and v to the cache, turning k on the way when `rope`.
    unsafe fn append(&self, rope: bool) -> Result<()> {
        let a = &self.spec.attention;
        for (kind, name, to) in [(1, BufferName::K, self.keys_to()?), (2, BufferName::V, self.values_to())] {
            let heads = self.head_epilogue(kind, false, rope, to)?;
            // SAFETY: the caller's.
            unsafe { self.move_heads(&heads, self.buffer(name, a.kv_dim())?, a.kv_heads) };
        }
        Ok(())
    }

    unsafe fn move_heads(&self, heads: &Heads<'_>, from: Rows, count: usize) {
        let heads = SharedRef(heads);
        let from = SharedRef(&from);
        self.threads.run(self.rows, &|thread, row| {
            for place in places(self.operands.new, self.operands.past, self.first + row, self.first + row + 1) {
                for head in 0..count {
                    // SAFETY: the caller's; each item moves its own row.
                    unsafe { (self.kernels.move_head)(heads.get(), *from.get(), row, head, place, self.scratch.of(thread)) };
                }
            }
        });
    }

    unsafe fn rope_table(&self) -> Result<()> {
        let rope = self.spec.rope.as_ref().ok_or_else(|| missing("rope"))?;
        let frequencies = self.operands.frequencies.ok_or_else(|| missing("rope frequencies"))?;
        let width = rope::table_width(rope.layout, rope.rotary_dim(self.spec.attention.head_dim));
        let table = SendPtr(self.f32s(BufferName::RopeTable)?.wrapping_add(self.base() * 2 * width));
        let chunks = self.rows.div_ceil(rope::CHUNK);
        self.threads.run(chunks, &|_, chunk| {
            let rows = chunk * rope::CHUNK..self.rows.min((chunk + 1) * rope::CHUNK);
            // SAFETY: the table has 2 · width f32 for every row of the block, and this item alone writes these rows.
            let out = unsafe { std::slice::from_raw_parts_mut(table.get().add(rows.start * 2 * width), rows.len() * 2 * width) };
            let positions =
                places(self.operands.new, self.operands.past, self.first + rows.start, self.first + rows.end).map(|p| p.position);
            rope::fill_rows(rope.layout, frequencies, positions, width, out);
        });
        Ok(())
    }

    fn attention_args<'a>(&'a self, t: &TiledAttention) -> Result<Attention<'a>> {
        let a = &self.spec.attention;
        let w = self.operands.weights;
        let parts = match t.split {
            Some(_) => self.f32s(BufferName::Parts)?,
            None => std::ptr::null_mut(),
        };
        Ok(Attention {
            spec: a,
            q: self.block_rows(BufferName::Q, a.q_dim())?,
            cache: self.operands.cache,
            out: self.block_rows(BufferName::Attention, a.q_dim())?,
            lse: None,
            mask: self.operands.mask,
            sinks: w.sinks.as_ref().map(|v| v.as_ptr()),
            slopes: w.alibi_slopes.as_ref().map(|v| v.as_ptr()),
            new: self.operands.new,
            past: self.operands.past,
            first: self.first,
            rows: self.rows,
            query_tile: t.query_tile,
            split: t.split,
            parts,
            most_parts: t.split.map_or(1, |s| self.plan.problem.batch.max_len().div_ceil(s)),
        })
    }

    unsafe fn attention(&self, t: &TiledAttention) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { attend(self.kernels, self.threads, &self.attention_args(t)?, self.scratch) };
        Ok(())
    }

    unsafe fn merge(&self, t: &TiledAttention) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { merge(self.kernels, self.threads, &self.attention_args(t)?, self.scratch) };
        Ok(())
    }

    unsafe fn strips(&self, kernel: unsafe fn(&Strips<'_>, usize, *mut f32)) -> Result<()> {
        let f32s = |name| self.f32s(name).unwrap_or(std::ptr::null_mut());
        let attention = self.attention_args(&TiledAttention { query_tile: 1, split: None, shares: None })?;
        let strips =
            Strips { attention, q: f32s(BufferName::QStrips), scores: f32s(BufferName::Scores), o: f32s(BufferName::OStrips) };
        let strips = SharedRef(&strips);
        self.threads.run(strips.get().items(2 * self.kernels.lanes), &|thread, item| {
            // SAFETY: the caller's; items work on disjoint strips.
            unsafe { kernel(strips.get(), item, self.scratch.of(thread)) }
        });
        Ok(())
    }

    unsafe fn residual(&self) -> Result<()> {
        let projected = self.buffer(BufferName::Projected, self.spec.hidden_size)?;
        self.threads.run(self.rows, &|_, row| {
            // SAFETY: the caller's; each item writes its own row.
            unsafe {
                (self.kernels.add_row)(projected, self.operands.x, self.operands.y, self.first + row, self.spec.hidden_size)
            }
        });
        Ok(())
    }
}

/// Packs x, then runs the items of a GEMM.
/// # Safety
/// `pack` and `gemm` describe valid memory of the same rows; `scratch` fits the items.
pub unsafe fn project(kernels: &Kernels, threads: &Threads, pack: &PackX, gemm: &Gemm<'_>, scratch: Scratch) {
    let (pack, gemm) = (SharedRef(pack), SharedRef(gemm));
    threads.run(pack.get().rows.div_ceil(kernels.group_rows(pack.get().pairs)), &|_, group| {
        // SAFETY: the caller's; each item packs its own group.
        unsafe { (kernels.pack_x)(pack.get(), group) }
    });
    threads.run(gemm.get().items(), &|thread, item| {
        // SAFETY: the caller's; items compute disjoint tiles and use their thread's scratch.
        unsafe { (kernels.gemm)(gemm.get(), item, scratch.of(thread)) }
    });
}

/// Quantises x, then runs the items of a GEMM in int8.
/// # Safety
/// As [`project`]; the weights are in int8.
pub unsafe fn project_int8(kernels: &Kernels, threads: &Threads, quantise: &QuantiseX, gemm: &Gemm<'_>, scratch: Scratch) {
    let (quantise, gemm) = (SharedRef(quantise), SharedRef(gemm));
    threads.run(quantise.get().rows.div_ceil(kernels.mr), &|thread, group| {
        // SAFETY: the caller's; each item packs its own group and uses its thread's scratch.
        unsafe { (kernels.quantise_x)(quantise.get(), group, scratch.of(thread)) }
    });
    threads.run(gemm.get().items(), &|thread, item| {
        // SAFETY: the caller's; items compute disjoint tiles and use their thread's scratch.
        unsafe { (kernels.gemm_int8)(gemm.get(), item, scratch.of(thread)) }
    });
}

/// Runs the items of an attention step.
/// # Safety
/// `a` describes valid memory, with room for its parts; `scratch` fits its items.
pub unsafe fn attend(kernels: &Kernels, threads: &Threads, a: &Attention<'_>, scratch: Scratch) {
    let kernel = if a.query_tile > 0 { kernels.attention_prefill } else { kernels.attention_decode };
    let a = SharedRef(a);
    threads.run(a.get().items(), &|thread, item| {
        // SAFETY: the caller's; items write disjoint queries, heads and parts.
        unsafe { kernel(a.get(), item, scratch.of(thread)) }
    });
}

/// Merges the parts of a split attention.
/// # Safety
/// As [`attend`], which has run.
pub unsafe fn merge(kernels: &Kernels, threads: &Threads, a: &Attention<'_>, scratch: Scratch) {
    let a = SharedRef(a);
    threads.run(a.get().rows, &|thread, row| {
        let a = a.get();
        for place in places(a.new, a.past, a.first + row, a.first + row + 1) {
            // SAFETY: the caller's; each item merges its own row.
            unsafe { (kernels.merge_parts)(a, row, place.sequence, scratch.of(thread)) };
        }
    });
}

/// A reference to kernel arguments, whose pointers work items share.
struct SharedRef<'a, T>(&'a T);

impl<'a, T> Clone for SharedRef<'a, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SharedRef<'_, T> {}

impl<'a, T> SharedRef<'a, T> {
    fn get(&self) -> &'a T {
        self.0
    }
}

// SAFETY: the arguments are only read; the memory their pointers name is written in disjoint parts, as each use states.
unsafe impl<T> Send for SharedRef<'_, T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SharedRef<'_, T> {}
