//! The CPU as a [`Backend`]: its table, and single kernels for conformance.

use lawson_core::{
    CacheDType, DType, Error, Result,
    data::Mask,
    kernel::{Backend, KernelCase, KernelInfo, KernelOp, MachineProfile},
    problem::{AttentionProblem, AttentionSpec, BlockProblem, RopeFrequencies},
};

use crate::{
    Isa,
    arena::AlignedBytes,
    dispatch::Kernels,
    executor::{Workspace, attend, merge},
    kernels::{
        attention::{Attention, MaskRows},
        attention_decode, attention_prefill,
        codes::{Cache, CodeRows},
        gemm::{self, Epilogue, Gemm, Heads, HeadsTo, PackX, RopeRows, Segment},
        gemm_int8::{self, QuantiseX},
        rope,
        rows::{CacheRows, Place, Rows},
        scores,
    },
    machine,
    pack::{PackedMatrix, tile_columns},
    threads::Threads,
};

/// The CPU with one instruction set and some threads.
pub struct Cpu {
    /// Entry points.
    pub kernels: Kernels,
    /// Threads.
    pub threads: Threads,
}

impl Cpu {
    /// The CPU with `isa` and `threads` threads.
    ///
    /// # Errors
    /// `Unavailable` when the processor lacks `isa`; as [`Threads::new`].
    pub fn new(isa: Isa, threads: usize) -> Result<Self> {
        let kernels = Kernels::of(isa).ok_or_else(|| {
            Error::new(lawson_core::ErrorKind::Unavailable, format!("this processor lacks the instruction set {isa}"))
        })?;
        Ok(Cpu { kernels, threads: Threads::new(threads)? })
    }

    /// Bytes of scratch of a GEMM item.
    pub fn gemm_scratch(&self, problem: &BlockProblem, row_tile: usize) -> usize {
        let a = &problem.spec.attention;
        let heads = tile_columns(a.head_dim, a.q_dim(), self.kernels.panel());
        let output = tile_columns(1, problem.spec.hidden_size, self.kernels.panel());
        4 * gemm::scratch_len(row_tile, heads.max(output), self.kernels.panel())
    }

    /// Bytes of scratch of an attention item; `query_tile` 0 is the decode kernel.
    pub fn attention_scratch(&self, spec: &AttentionSpec, dtype: DType, kv_dtype: CacheDType, query_tile: usize) -> usize {
        4 * if query_tile == 0 {
            attention_decode::scratch_len(spec, kv_dtype, self.kernels.lanes)
        } else {
            attention_prefill::scratch_len(spec, dtype, kv_dtype, query_tile, &self.kernels)
        }
    }

    /// Bytes of scratch of every other step.
    pub fn other_scratch(&self, problem: &BlockProblem) -> usize {
        let d = problem.spec.attention.head_dim;
        let width = problem.spec.hidden_size.max(problem.spec.attention.q_dim());
        4 * scores::scratch_len(d, self.kernels.lanes).max(width)
    }

    /// Bytes of `rows` tokens of `width` columns in int8, packed for a GEMM.
    pub fn codes_bytes(&self, rows: usize, width: usize) -> usize {
        gemm_int8::packed_bytes(rows, width, self.kernels.int8_steps)
    }

    /// Attention of user tensors, whole in one call: tiles, parts and merge.
    ///
    /// # Safety
    /// `a` describes valid memory; its `parts` is null (this provides them).
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub unsafe fn attention(&self, a: &Attention<'_>, workspace: &mut Workspace) -> Result<()> {
        let spec = a.spec;
        let parts = a.split.map_or(0, |_| a.rows * spec.heads * a.most_parts * (spec.head_dim + 2) * 4);
        let scratch = self.attention_scratch(spec, a.out.dtype, a.cache.dtype(), a.query_tile);
        let scratch = workspace.reserve(parts, scratch, self.threads.count())?;
        let parts = if a.split.is_some() { workspace.buffers().cast() } else { std::ptr::null_mut() };
        let a = Attention { parts, ..*a };
        // SAFETY: the caller's; parts and scratch were just reserved.
        unsafe {
            attend(&self.kernels, &self.threads, &a, scratch);
            if a.split.is_some() {
                merge(&self.kernels, &self.threads, &a, scratch);
            }
        }
        Ok(())
    }
}

/// A mask as kernels read it.
fn mask_rows(m: &Mask, heads: usize) -> MaskRows {
    let one = m.rows * m.columns;
    let per_sequence = if m.shape.per_head { heads * one } else { one };
    MaskRows {
        start: m.data.as_ptr(),
        sequence_stride: if m.shape.per_sequence { per_sequence } else { 0 },
        head_stride: if m.shape.per_head { one } else { 0 },
        row_stride: m.columns,
    }
}

impl Backend for Cpu {
    fn profile(&self) -> MachineProfile {
        machine::profile(&self.kernels, self.threads.count())
    }

    fn kernels(&self) -> Vec<KernelInfo> {
        self.kernels.infos()
    }

    fn run(&self, kernel: &KernelInfo, case: &KernelCase) -> Result<Vec<f32>> {
        if kernel.isa != self.kernels.isa.name() {
            return Err(Error::invalid(format!("kernel {kernel} is not one of {}", self.kernels.isa)));
        }
        match case {
            KernelCase::Gemm { m, n, k, x, w, bias, weight_dtype } => {
                self.run_gemm(*m, *n, *k, x, w, bias.as_deref(), *weight_dtype)
            }
            KernelCase::GemmInt8 { m, n, k, x, w, bias } => self.run_gemm_int8([*m, *n, *k], x, w, bias.as_deref()),
            KernelCase::Norm { width, x, weight, eps } => {
                if *width == 0 || weight.len() != *width || !x.len().is_multiple_of(*width) {
                    return Err(Error::invalid("a norm case whose lengths do not fit its width"));
                }
                let (mut out, mut scratch) = (vec![f32::NAN; x.len()], vec![0f32; *width]);
                let to = rows_mut(&mut out, *width);
                for row in 0..x.len() / width {
                    // SAFETY: rows of x and out have `width` elements.
                    unsafe {
                        (self.kernels.norm_row)(rows(x, *width), to, row, (weight.as_ptr(), *eps), *width, scratch.as_mut_ptr());
                    }
                }
                Ok(out)
            }
            KernelCase::Rope { head_dim, rotary_dim, layout, x, angles } => {
                let count = x.len().checked_div(*head_dim).unwrap_or(0);
                if x.len() != count * head_dim || angles.len() != count * rotary_dim / 2 || rotary_dim > head_dim {
                    return Err(Error::invalid("a rope case whose lengths do not fit its dimensions"));
                }
                let width = rope::table_width(*layout, *rotary_dim);
                let (mut out, mut scratch) = (x.clone(), vec![0f32; *head_dim]);
                let all = rows_mut(&mut out, *head_dim);
                for row in 0..count {
                    let mut table = vec![0f32; 2 * width];
                    let inverse = angles[row * rotary_dim / 2..][..rotary_dim / 2].to_vec();
                    let frequencies = RopeFrequencies { inverse, attention_factor: 1.0 };
                    rope::fill_rows(*layout, &frequencies, std::iter::once(1), width, &mut table);
                    let heads = Heads {
                        head_dim: *head_dim,
                        to: HeadsTo::Rows(Rows { start: all.at(row, 0), ..all }),
                        norm: None,
                        rope: Some(RopeRows { table: table.as_ptr(), width, layout: *layout }),
                        new: &[1],
                        past: &[0],
                    };
                    let from = Rows { start: all.at(row, 0), ..all };
                    let place = Place { sequence: 0, index: 0, position: 0 };
                    // SAFETY: source and destination are row `row` of out; the table has one row.
                    unsafe { (self.kernels.move_head)(&heads, from, 0, 0, place, scratch.as_mut_ptr()) };
                }
                Ok(out)
            }
            KernelCase::Softmax { width, x } => {
                if *width == 0 || !x.len().is_multiple_of(*width) {
                    return Err(Error::invalid("a softmax case whose length does not fit its width"));
                }
                let mut out = vec![f32::NAN; x.len()];
                for (from, to) in x.chunks_exact(*width).zip(out.chunks_exact_mut(*width)) {
                    // SAFETY: both rows have `width` elements.
                    unsafe { (self.kernels.softmax_row)(from.as_ptr(), *width, to.as_mut_ptr()) };
                }
                Ok(out)
            }
            KernelCase::Attention { problem, q, k, v, rows, mask, sinks, slopes, split } => {
                let data = AttentionData {
                    q,
                    k,
                    v,
                    rows: *rows,
                    mask: mask.as_ref(),
                    sinks: sinks.as_deref(),
                    slopes: slopes.as_deref(),
                };
                self.run_attention(kernel, problem, &data, *split)
            }
        }
    }
}

struct AttentionData<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    rows: usize,
    mask: Option<&'a Mask>,
    sinks: Option<&'a [f32]>,
    slopes: Option<&'a [f32]>,
}

/// Rows of a slice; writing through them needs a slice that was borrowed mutably.
fn rows(x: &[f32], stride: usize) -> Rows {
    Rows { start: x.as_ptr().cast_mut().cast(), dtype: DType::F32, stride }
}

fn rows_mut(x: &mut [f32], stride: usize) -> Rows {
    Rows { start: x.as_mut_ptr().cast(), dtype: DType::F32, stride }
}

/// A cache with the memory that it lies in.
struct Kept {
    cache: Cache,
    _memory: Vec<AlignedBytes>,
    _state: [Vec<usize>; 2],
}

impl Cpu {
    /// k and v as the problem's cache holds them.
    fn keep(&self, p: &AttentionProblem, data: &AttentionData<'_>) -> Result<Kept> {
        let (s, lengths) = (&p.spec, &p.batch);
        let codes = match p.kv_dtype {
            CacheDType::Elements(dtype) => {
                let (k, v) = (self.encode(dtype, data.k)?, self.encode(dtype, data.v)?);
                let cache = Cache::Elements(CacheRows {
                    k: k.as_ptr(),
                    v: v.as_ptr(),
                    dtype,
                    sequence_stride: s.kv_dim() * data.rows,
                    head_stride: data.rows * s.head_dim,
                    row_stride: s.head_dim,
                });
                return Ok(Kept { cache, _memory: vec![k, v], _state: [Vec::new(), Vec::new()] });
            }
            CacheDType::Codes(codes) => codes,
        };
        let (d, rows) = (s.head_dim, data.rows.next_multiple_of(CacheRows::TILE));
        let starts = CodeRows::layout(codes, lengths.sequences(), s.kv_heads, d, rows)
            .ok_or_else(|| Error::invalid(format!("a cache of {rows} rows is too large")))?;
        let memory = AlignedBytes::new(starts[6])?;
        let valid: Vec<usize> = lengths.new_tokens().iter().zip(lengths.past()).map(|(n, p)| n + p).collect();
        let halves = vec![0; valid.len()];
        let state = [halves.as_ptr(), valid.as_ptr()];
        let cache = CodeRows::new(codes, [s.kv_heads, d, rows], memory.as_ptr(), &starts, state);
        // SAFETY: the memory has the layout's bytes, and nobody else uses it. All ones are NaN in scales and tails: what is not written shows.
        unsafe {
            memory.as_ptr().write_bytes(0xff, memory.len());
            for (b, &len) in valid.iter().enumerate() {
                for (head, row) in (0..s.kv_heads).flat_map(|head| (0..len).map(move |row| (head, row))) {
                    let at = ((b * s.kv_heads + head) * data.rows + row) * d;
                    cache.append_values(b, head, row, data.v[at..][..d].as_ptr());
                    cache.append_key(b, head, row, data.k[at..][..d].as_ptr());
                }
            }
        }
        Ok(Kept { cache: Cache::Codes(cache), _memory: vec![memory], _state: [halves, valid] })
    }

    /// `x` rounded to `dtype`.
    fn encode(&self, dtype: DType, x: &[f32]) -> Result<AlignedBytes> {
        let out = AlignedBytes::new(x.len() * dtype.size())?;
        let to = Rows { start: out.as_ptr(), dtype, stride: x.len() };
        // SAFETY: both are one row of x.len() elements.
        unsafe { (self.kernels.convert_row)(rows(x, x.len()), to, x.len()) };
        Ok(out)
    }
}

impl Cpu {
    #[expect(clippy::too_many_arguments, reason = "the fields of one case")]
    fn run_gemm(
        &self,
        m: usize,
        n: usize,
        k: usize,
        x: &[f32],
        w: &[f32],
        bias: Option<&[f32]>,
        dtype: DType,
    ) -> Result<Vec<f32>> {
        if m.checked_mul(k) != Some(x.len()) || x.is_empty() || bias.is_some_and(|b| b.len() != n) {
            return Err(Error::invalid("a GEMM case whose lengths do not fit its shape"));
        }
        let tensor = lawson_core::TensorRef::new(w, &[n, k])?;
        let columns = tile_columns(1, n, self.kernels.panel());
        let packed_w = PackedMatrix::new(&tensor, dtype, columns, &self.kernels, &self.threads)?;
        let (depth, pairs) = (packed_w.weights().depth(), packed_w.weights().pairs);
        let (mut packed, mut out) = (vec![0f32; m * depth], vec![f32::NAN; m * n]);
        let row_tile = 2 * self.kernels.group_rows(pairs);
        let mut scratch = vec![0f32; gemm::scratch_len(row_tile, columns, self.kernels.panel())];
        let pack = PackX { x: rows(x, k), first: 0, rows: m, k, norm: None, pairs, packed: packed.as_mut_ptr() };
        let to = Rows { start: out.as_mut_ptr().cast(), dtype: DType::F32, stride: n };
        let epilogue = Epilogue::Store { to, residual: None };
        let segments = [Segment { weights: packed_w.weights(), bias: bias.map(<[f32]>::as_ptr), epilogue }];
        let gemm = Gemm { packed: packed.as_ptr(), first: 0, rows: m, row_tile, segments: &segments };
        // SAFETY: x, the packed x, the weights and out have the shapes given; items run one after another.
        unsafe {
            (0..m.div_ceil(self.kernels.group_rows(pairs))).for_each(|g| (self.kernels.pack_x)(&pack, g));
            (0..gemm.items()).for_each(|i| (self.kernels.gemm)(&gemm, i, scratch.as_mut_ptr()));
        }
        Ok(out)
    }

    fn run_gemm_int8(&self, [m, n, k]: [usize; 3], x: &[f32], w: &[f32], bias: Option<&[f32]>) -> Result<Vec<f32>> {
        if m.checked_mul(k) != Some(x.len()) || x.is_empty() || bias.is_some_and(|b| b.len() != n) {
            return Err(Error::invalid("a GEMM case whose lengths do not fit its shape"));
        }
        let tensor = lawson_core::TensorRef::new(w, &[n, k])?;
        let columns = tile_columns(1, n, self.kernels.panel());
        let packed_w = PackedMatrix::int8(&tensor, columns, &self.kernels, &self.threads)?;
        let (packed, mut out) = (AlignedBytes::new(self.codes_bytes(m, k))?, vec![f32::NAN; m * n]);
        let row_tile = 2 * self.kernels.mr;
        let mut scratch = vec![0f32; gemm::scratch_len(row_tile, columns, self.kernels.panel()).max(k)];
        let x = rows(x, k);
        let quantise = QuantiseX { x, first: 0, rows: m, k, norm: None, dtype: DType::F32, packed: packed.as_ptr() };
        let to = Rows { start: out.as_mut_ptr().cast(), dtype: DType::F32, stride: n };
        let epilogue = Epilogue::Store { to, residual: None };
        let segments = [Segment { weights: packed_w.weights(), bias: bias.map(<[f32]>::as_ptr), epilogue }];
        let gemm = Gemm { packed: packed.as_ptr().cast(), first: 0, rows: m, row_tile, segments: &segments };
        // SAFETY: x, the packed x, the weights and out have the shapes given; items run one after another. All ones are NaN as scales: what is not
        // written shows.
        unsafe {
            packed.as_ptr().write_bytes(0xff, packed.len());
            (0..m.div_ceil(self.kernels.mr)).for_each(|g| (self.kernels.quantise_x)(&quantise, g, scratch.as_mut_ptr()));
            (0..gemm.items()).for_each(|i| (self.kernels.gemm_int8)(&gemm, i, scratch.as_mut_ptr()));
        }
        Ok(out)
    }

    fn run_attention(
        &self,
        kernel: &KernelInfo,
        p: &AttentionProblem,
        data: &AttentionData<'_>,
        split: Option<usize>,
    ) -> Result<Vec<f32>> {
        p.validate()?;
        let (s, tokens) = (&p.spec, p.batch.tokens());
        let decode = kernel.op == KernelOp::AttentionDecode;
        if decode && p.batch.max_new() != 1 {
            return Err(Error::invalid("the decode kernel takes one new token a sequence"));
        }
        let elements = (p.batch.sequences() * s.kv_dim()).checked_mul(data.rows);
        let per_head = |values: Option<&[f32]>, asked: bool| values.map(<[f32]>::len) == asked.then_some(s.heads);
        if data.q.len() != tokens * s.q_dim()
            || elements != Some(data.k.len())
            || data.v.len() != data.k.len()
            || data.rows < p.batch.max_len()
            || !per_head(data.sinks, s.sinks)
            || !per_head(data.slopes, s.alibi)
            || split == Some(0)
        {
            return Err(Error::invalid("an attention case whose lengths do not fit its problem"));
        }
        if let Some(m) = data.mask {
            let masks = if m.shape.per_sequence { p.batch.sequences() } else { 1 } * if m.shape.per_head { s.heads } else { 1 };
            if m.columns < p.batch.max_len() || m.rows < p.batch.max_new() || m.data.len() != masks * m.rows * m.columns {
                return Err(Error::invalid("an attention case whose mask does not fit its problem"));
            }
        }
        let (q, kept) = (self.encode(p.dtype, data.q)?, self.keep(p, data)?);
        let (out, mut lse) = (self.encode(p.dtype, &vec![f32::NAN; data.q.len()])?, vec![f32::NAN; tokens * s.heads]);
        let a = Attention {
            spec: s,
            q: Rows { start: q.as_ptr(), dtype: p.dtype, stride: s.q_dim() },
            cache: kept.cache,
            out: Rows { start: out.as_ptr(), dtype: p.dtype, stride: s.q_dim() },
            lse: Some(lse.as_mut_ptr()),
            mask: data.mask.map(|m| mask_rows(m, s.heads)),
            sinks: data.sinks.map(<[f32]>::as_ptr),
            slopes: data.slopes.map(<[f32]>::as_ptr),
            new: p.batch.new_tokens(),
            past: p.batch.past(),
            first: 0,
            rows: tokens,
            query_tile: if decode { 0 } else { 3 * self.kernels.lanes },
            split,
            parts: std::ptr::null_mut(),
            most_parts: split.map_or(1, |s| p.batch.max_len().div_ceil(s)),
        };
        // SAFETY: every length was checked above.
        unsafe { self.attention(&a, &mut Workspace::new()?)? };
        let mut result = vec![f32::NAN; tokens * s.q_dim()];
        let from = Rows { start: out.as_ptr(), dtype: p.dtype, stride: result.len() };
        let to = rows_mut(&mut result, 0);
        // SAFETY: both are one row of as many elements.
        unsafe { (self.kernels.convert_row)(from, to, tokens * s.q_dim()) };
        result.extend(lse);
        Ok(result)
    }
}
