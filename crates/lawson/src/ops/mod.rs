//! The block's operators on borrowed tensors, on the device of the context. On a GPU, tensors on it stay there, and calls return once they are
//! enqueued; tensors on the host are copied there and back, which waits.

mod gpu;

use lawson_compiler::weights_on_gpu;
use lawson_core::{
    DType, Error, Result, TensorMut, TensorRef, WeightKind,
    problem::{AttentionProblem, AttentionSpec, Lengths, Level, RopeSpec},
};
use lawson_cpu::{
    kernels::{
        attention::Attention,
        codes::Cache,
        gemm::{self, Epilogue, Gemm, PackX, Segment},
        gemm_int8::QuantiseX,
        rope,
        rows::{CacheRows, Rows},
    },
    pack::{PackedMatrix, tile_columns},
};

use lawson_cuda::Gpu;

use crate::{Context, MaskRef};

pub use gpu::{Operation, RopeAppendArgs, replay_timed, rope_append};
pub use lawson_core::softmax_state::SoftmaxState as OnlineSoftmax;
pub use lawson_cuda::operators::Replays;

/// What [`attention`] takes.
pub struct AttentionArgs<'a> {
    /// Heads, masking and score rules.
    pub spec: &'a AttentionSpec,
    /// New tokens of each sequence, and the rows before them.
    pub lengths: &'a Lengths,
    /// `[T, H, D]`, already normed and rotated.
    pub q: TensorRef<'a>,
    /// `[B, G, L, D]`: rows 0 … past + new of each sequence are read. Rows of D elements must be contiguous.
    pub k: TensorRef<'a>,
    /// `[B, G, L, D]`, with the strides of k.
    pub v: TensorRef<'a>,
    /// An arbitrary mask.
    pub mask: Option<MaskRef<'a>>,
    /// One logit for each head, `[H]`, where `spec` has sinks.
    pub sinks: Option<&'a [f32]>,
    /// One slope for each head, `[H]`, where `spec` has ALiBi.
    pub slopes: Option<&'a [f32]>,
    /// Result, `[T, H, D]`, in q's dtype.
    pub out: TensorMut<'a>,
    /// Natural log-sum-exp of each row's scores, the sink among them, `[T, H]` in f32; −∞ for a row that sees no key and has no sink.
    pub lse: Option<TensorMut<'a>>,
}

fn shape_error(name: &str, t: &TensorRef<'_>, needed: &str) -> Error {
    Error::invalid(format!("{name} has shape {:?} and strides {:?}, needed {needed}", t.shape(), t.strides()))
}

/// Refuses tensors that the CPU does not reach.
fn on_host(tensors: &[(&str, TensorRef<'_>)]) -> Result<()> {
    match tensors.iter().find(|(_, t)| !t.storage().is_host()) {
        Some((name, _)) => Err(Error::invalid(format!("{name} lies on a device, but the context is the CPU's"))),
        None => Ok(()),
    }
}

/// Where a tensor's rows lie.
fn rows(t: &TensorRef<'_>, stride: usize) -> Rows {
    Rows { start: t.storage().as_ptr().cast_mut(), dtype: t.dtype(), stride }
}

fn rows_mut(t: &mut TensorMut<'_>, stride: usize) -> Rows {
    let dtype = t.dtype();
    Rows { start: t.storage_mut().as_mut_ptr(), dtype, stride }
}

/// The problem of `args` after checking every shape, stride and dtype.
fn check_attention(args: &AttentionArgs<'_>) -> Result<AttentionProblem> {
    let (s, lengths) = (args.spec, args.lengths);
    let problem =
        AttentionProblem { kv_dtype: args.k.dtype().into(), ..AttentionProblem::new(s.clone(), lengths.clone(), args.q.dtype()) };
    problem.validate()?;
    let (tokens, b) = (lengths.tokens(), lengths.sequences());
    let q_shape = [tokens, s.heads, s.head_dim];
    let fits = |t: &TensorRef<'_>| t.shape() == q_shape && t.is_contiguous();
    if !fits(&args.q) {
        return Err(shape_error("q", &args.q, &format!("contiguous {q_shape:?}")));
    }
    if !fits(&args.out.as_ref()) || args.out.dtype() != args.q.dtype() {
        return Err(shape_error("out", &args.out.as_ref(), &format!("contiguous {q_shape:?} in q's dtype {}", args.q.dtype())));
    }
    let longest = lengths.max_len();
    let kv_fits = |t: &TensorRef<'_>| {
        matches!(*t.shape(), [tb, g, l, d] if (tb, g, d) == (b, s.kv_heads, s.head_dim) && l >= longest)
            && (s.head_dim == 1 || t.strides()[3] == 1)
    };
    let needed = format!("[{b}, {}, at least {longest}, {}] with contiguous rows", s.kv_heads, s.head_dim);
    if !kv_fits(&args.k) {
        return Err(shape_error("k", &args.k, &needed));
    }
    if !kv_fits(&args.v) || args.v.dtype() != args.k.dtype() || args.v.strides() != args.k.strides() {
        return Err(shape_error("v", &args.v, &format!("{needed}, in the dtype and with the strides of k")));
    }
    for (name, given, asked) in [("sinks", args.sinks, s.sinks), ("slopes", args.slopes, s.alibi)] {
        match given {
            Some(v) if !asked => return Err(Error::invalid(format!("{name} of {} heads are given, but not asked for", v.len()))),
            Some(v) if v.len() == s.heads => {}
            None if !asked => {}
            other => {
                return Err(Error::invalid(format!("{name} has {} elements, needed {}", other.map_or(0, <[f32]>::len), s.heads)));
            }
        }
    }
    if let Some(lse) = &args.lse
        && (lse.shape() != [tokens, s.heads] || lse.dtype() != DType::F32)
    {
        return Err(shape_error("lse", &lse.as_ref(), &format!("[{tokens}, {}] in f32", s.heads)));
    }
    let mask = args.mask.map(|m| m.check(b, s.heads, lengths.max_new(), longest)).transpose()?;
    Ok(AttentionProblem { mask, ..problem })
}

/// Tiled attention with online softmax (FlashAttention, arXiv:2205.14135): softmax(q·kᵀ·scale …)·v, scores never in memory. A row that sees
/// no key gives 0.
///
/// # Errors
/// `InvalidInput` when a shape or dtype does not fit, `OutOfMemory`.
pub fn attention(context: &Context, mut args: AttentionArgs<'_>) -> Result<()> {
    let problem = check_attention(&args)?;
    if let Some(gpu) = context.gpu() {
        return gpu::attention(context, gpu, args, problem, Level::Maximal, None).map(drop);
    }
    on_host(&[("q", args.q), ("k", args.k), ("v", args.v), ("out", args.out.as_ref())])?;
    args.lse.iter().try_for_each(|lse| on_host(&[("lse", lse.as_ref())]))?;
    let (s, lengths) = (args.spec, args.lengths);
    let (tokens, longest) = (lengths.tokens(), lengths.max_len());
    let strides = args.k.strides();
    let tiles = lawson_compiler::attention_tiles(&problem, context.kernels(), problem.batch.tokens());
    let a = Attention {
        spec: s,
        q: rows(&args.q, s.q_dim()),
        cache: Cache::Elements(CacheRows {
            k: args.k.storage().as_ptr().cast_mut(),
            v: args.v.storage().as_ptr().cast_mut(),
            dtype: args.k.dtype(),
            sequence_stride: strides[0],
            head_stride: strides[1],
            row_stride: strides[2],
        }),
        out: rows_mut(&mut args.out, s.q_dim()),
        lse: args.lse.as_mut().map(|lse| lse.storage_mut().as_mut_ptr().cast()),
        mask: args.mask.map(|m| m.rows()),
        sinks: args.sinks.map(<[f32]>::as_ptr),
        slopes: args.slopes.map(<[f32]>::as_ptr),
        new: lengths.new_tokens(),
        past: lengths.past(),
        first: 0,
        rows: tokens,
        query_tile: tiles.query_tile,
        split: tiles.split,
        parts: std::ptr::null_mut(),
        most_parts: tiles.split.map_or(1, |s| longest.div_ceil(s)),
    };
    // SAFETY: every shape, stride and dtype was checked above; out and lse are borrowed mutably.
    unsafe { context.0.cpu.attention(&a, &mut context.workspace()) }
}

/// How [`rope()`] works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopeMethod {
    /// One pass: each pair is read once and written once.
    #[default]
    Fused,
    /// Two passes, as frameworks do it: partners to a temporary tensor, then x·cos + partner·sin.
    TwoPass,
}

/// T, H, D, and the longest sequence, of a call of [`rope()`], after checking it. `f32_alone`: the CPU's kernels take no other dtype.
fn check_rope(x: &TensorRef<'_>, positions: &[usize], spec: &RopeSpec, f32_alone: bool) -> Result<([usize; 3], usize)> {
    let &[tokens, heads, d] = x.shape() else {
        return Err(Error::invalid(format!("x has shape {:?}, needed [T, H, D]", x.shape())));
    };
    if positions.len() != tokens || (f32_alone && x.dtype() != DType::F32) {
        let needed = if f32_alone { "f32" } else { "as many" };
        return Err(Error::invalid(format!(
            "x is {} of {tokens} tokens, needed {needed} of {} positions",
            x.dtype(),
            positions.len()
        )));
    }
    spec.validate(d)?;
    let longest = positions.iter().max().map_or(0, |p| p.saturating_add(1));
    if longest > 1 << 24 {
        return Err(Error::invalid(format!("position {} is too large; at most 2^24 − 1", longest - 1)));
    }
    Ok(([tokens, heads, d], longest))
}

/// Turns `x` `[T, H, D]` in place by its `positions` `[T]` (RoPE, arXiv:2104.09864); f32, on a GPU also bf16 and f16. Length-dependent scalings
/// take the greatest position + 1 as the longest sequence.
///
/// # Errors
/// `InvalidInput` when a shape does not fit, `OutOfMemory`.
pub fn rope(context: &Context, x: &mut TensorMut<'_>, positions: &[usize], spec: &RopeSpec, method: RopeMethod) -> Result<()> {
    let ([tokens, heads, d], longest) = check_rope(&x.as_ref(), positions, spec, context.gpu().is_none())?;
    if tokens == 0 || heads == 0 {
        return Ok(());
    }
    if let Some(gpu) = context.gpu() {
        return gpu::rope_in_place(gpu, x, positions, spec, method);
    }
    on_host(&[("x", x.as_ref())])?;
    let (frequencies, rotary) = (spec.frequencies(d, longest), spec.rotary_dim(d));
    let width = rope::table_width(spec.layout, rotary);
    let (k, threads) = (&context.0.cpu.kernels, &context.0.cpu.threads);
    let mut workspace = context.workspace();
    let table_bytes = tokens * 2 * width * 4;
    let partner_bytes = if method == RopeMethod::TwoPass { tokens * heads * rotary * 4 } else { 0 };
    workspace.reserve(table_bytes + partner_bytes, 0, 1)?;
    let to = rows_mut(x, heads * d);
    let table = Rows { start: workspace.buffers(), dtype: DType::F32, stride: 2 * width };
    let partner = Rows { start: workspace.buffers().wrapping_add(table_bytes), dtype: DType::F32, stride: heads * rotary };
    threads.run(tokens.div_ceil(rope::CHUNK), &|_, chunk| {
        let range = chunk * rope::CHUNK..tokens.min((chunk + 1) * rope::CHUNK);
        // SAFETY: each item fills its own rows of the table.
        let out = unsafe { std::slice::from_raw_parts_mut(table.at(range.start, 0).cast(), range.len() * 2 * width) };
        rope::fill_rows(spec.layout, &frequencies, positions[range].iter().copied(), width, out);
    });
    // SAFETY: each item touches its own rows of x, partner and table, all of the sizes reserved above.
    unsafe {
        match method {
            RopeMethod::Fused => threads.run(tokens, &|_, t| {
                for h in 0..heads {
                    (k.rope_rotate)(spec.layout, to.at(t, h * d).cast(), table.at(t, 0).cast(), width);
                }
            }),
            RopeMethod::TwoPass => {
                threads.run(tokens, &|_, t| {
                    for h in 0..heads {
                        (k.rope_partner)(spec.layout, to.at(t, h * d).cast(), partner.at(t, h * rotary).cast(), width);
                    }
                });
                threads.run(tokens, &|_, t| {
                    for h in 0..heads {
                        let partner = partner.at(t, h * rotary).cast();
                        (k.rope_combine)(spec.layout, to.at(t, h * d).cast(), partner, table.at(t, 0).cast(), width);
                    }
                });
            }
        }
    }
    Ok(())
}

/// How [`softmax`] works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SoftmaxMethod {
    /// All passes over a row while it is in cache.
    #[default]
    Fused,
    /// Maximum, exponential, sum and division each over the whole tensor, as frameworks without fusion do it.
    ThreePass,
    /// Running maximum and sum over tiles of this many columns (arXiv:1805.02867), then one pass that rescales. On a GPU the tile is a block of
    /// threads, whatever this says.
    Online(usize),
}

/// Checks what [`softmax`] takes.
fn check_softmax(x: &TensorRef<'_>, out: &TensorMut<'_>, method: SoftmaxMethod) -> Result<()> {
    if x.shape().len() != 2 || !x.is_contiguous() || x.dtype() != DType::F32 {
        return Err(shape_error("x", x, "contiguous [rows, width] f32"));
    }
    if out.shape() != x.shape() || out.dtype() != DType::F32 {
        return Err(shape_error("out", &out.as_ref(), &format!("{:?} f32", x.shape())));
    }
    if method == SoftmaxMethod::Online(0) {
        return Err(Error::invalid("a tile of the online softmax needs at least one column"));
    }
    Ok(())
}

/// Softmax of each row of `x` `[rows, width]` f32 into `out`. A row of −∞ alone gives 0.
///
/// # Errors
/// `InvalidInput` when a shape or dtype does not fit or a tile is empty, `OutOfMemory`.
pub fn softmax(context: &Context, x: &TensorRef<'_>, out: &mut TensorMut<'_>, method: SoftmaxMethod) -> Result<()> {
    check_softmax(x, out, method)?;
    let (count, width) = (x.shape()[0], x.shape()[1]);
    if count == 0 || width == 0 {
        return Ok(());
    }
    if let Some(gpu) = context.gpu() {
        return gpu::softmax(gpu, x, out, method, None).map(drop);
    }
    on_host(&[("x", *x), ("out", out.as_ref())])?;
    let (k, threads) = (&context.0.cpu.kernels, &context.0.cpu.threads);
    let (from, to) = (rows(x, width), rows_mut(out, width));
    let factor = |m: f32, sum: f32| if m == f32::NEG_INFINITY && sum == 0.0 { 0.0 } else { 1.0 / sum };
    // SAFETY: each item reads its own row of x and writes its own row of out and of the statistics.
    unsafe {
        match method {
            SoftmaxMethod::Fused => {
                threads.run(count, &|_, r| (k.softmax_row)(from.at(r, 0).cast(), width, to.at(r, 0).cast()));
            }
            SoftmaxMethod::ThreePass => {
                let mut workspace = context.workspace();
                workspace.reserve(8 * count, 0, 1)?;
                let statistics = Rows { start: workspace.buffers(), dtype: DType::F32, stride: 2 };
                let (max, sum) = (|r| statistics.at(r, 0).cast::<f32>(), |r| statistics.at(r, 1).cast::<f32>());
                threads.run(count, &|_, r| max(r).write((k.row_max)(from.at(r, 0).cast(), width)));
                threads.run(count, &|_, r| {
                    (k.row_exp)(from.at(r, 0).cast(), width, *max(r), to.at(r, 0).cast());
                });
                threads.run(count, &|_, r| sum(r).write((k.row_sum)(to.at(r, 0).cast(), width)));
                threads.run(count, &|_, r| (k.row_scale)(to.at(r, 0).cast(), width, factor(*max(r), *sum(r))));
            }
            SoftmaxMethod::Online(tile) => {
                let mut workspace = context.workspace();
                let tiles = width.div_ceil(tile);
                workspace.reserve(4 * count * tiles, 0, 1)?;
                // The running maximum that each tile's exponentials were taken against.
                let against = Rows { start: workspace.buffers(), dtype: DType::F32, stride: tiles };
                threads.run(count, &|_, r| {
                    let (mut m, mut sum) = (f32::NEG_INFINITY, 0f32);
                    for i in 0..tiles {
                        let n = tile.min(width - i * tile);
                        let x = from.at(r, i * tile).cast();
                        let top = (k.row_max)(x, n).max(m);
                        let part = (k.row_exp)(x, n, top, to.at(r, i * tile).cast());
                        sum = if m == f32::NEG_INFINITY { part } else { sum * (m - top).exp() + part };
                        m = top;
                        against.at(r, i).cast::<f32>().write(top);
                    }
                    for i in 0..tiles {
                        let top = *against.at(r, i).cast::<f32>();
                        let share = if top == f32::NEG_INFINITY { 1.0 } else { (top - m).exp() };
                        (k.row_scale)(to.at(r, i * tile).cast(), tile.min(width - i * tile), share * factor(m, sum));
                    }
                });
            }
        }
    }
    Ok(())
}

/// Weights of q, k and v packed for [`qkv_projection`].
pub struct QkvWeights(Packed);

enum Packed {
    Cpu(Box<[PackedMatrix; 3]>, DType, WeightKind),
    Gpu(gpu::DeviceQkv),
}

impl QkvWeights {
    /// Packs `[H·D, E]`, `[G·D, E]` and `[G·D, E]`, rounded to `dtype`.
    ///
    /// # Errors
    /// `InvalidInput` when a weight is not a contiguous matrix or the widths differ, `OutOfMemory`.
    pub fn pack(context: &Context, q: &TensorRef<'_>, k: &TensorRef<'_>, v: &TensorRef<'_>, dtype: DType) -> Result<Self> {
        Self::held(context, [q, k, v], dtype, WeightKind::Compute)
    }

    /// As [`QkvWeights::pack`] in int8 (see [`lawson_core::int8`]), for x in `dtype`, on a CPU.
    ///
    /// # Errors
    /// As there; `Unavailable` on a GPU.
    pub fn int8(context: &Context, q: &TensorRef<'_>, k: &TensorRef<'_>, v: &TensorRef<'_>, dtype: DType) -> Result<Self> {
        Self::held(context, [q, k, v], dtype, WeightKind::Int8)
    }

    fn held(context: &Context, [q, k, v]: [&TensorRef<'_>; 3], dtype: DType, kind: WeightKind) -> Result<Self> {
        if context.gpu().is_some() {
            weights_on_gpu(kind)?;
        }
        if let Some(gpu) = context.gpu() {
            let parts = [("q weight", q), ("k weight", k), ("v weight", v)];
            return gpu::DeviceQkv::new(gpu, parts, dtype).map(|w| QkvWeights(Packed::Gpu(w)));
        }
        on_host(&[("q weight", *q), ("k weight", *k), ("v weight", *v)])?;
        let cpu = &context.0.cpu;
        let pack = |name: &str, w: &TensorRef<'_>| {
            let columns = tile_columns(1, w.shape().first().copied().unwrap_or(1).max(1), cpu.kernels.panel());
            let packed = match kind {
                WeightKind::Int8 => PackedMatrix::int8(w, columns, &cpu.kernels, &cpu.threads),
                _ => PackedMatrix::new(w, dtype, columns, &cpu.kernels, &cpu.threads),
            };
            packed.map_err(|e| e.at(name))
        };
        let parts = [pack("q weight", q)?, pack("k weight", k)?, pack("v weight", v)?];
        let widths = [q, k, v].map(|w| w.shape()[1]);
        if widths != [widths[0]; 3] {
            return Err(Error::invalid(format!("the weights of q, k and v have different widths {widths:?}")));
        }
        Ok(QkvWeights(Packed::Cpu(Box::new(parts), dtype, kind)))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Packed::Cpu(parts, ..) => parts.iter().map(PackedMatrix::bytes).sum(),
            Packed::Gpu(w) => w.bytes(),
        }
    }

    fn on_gpu(&self, gpu: &Gpu) -> Result<&gpu::DeviceQkv> {
        match &self.0 {
            Packed::Gpu(w) if w.here(gpu) => Ok(w),
            _ => Err(Error::invalid("the weights were packed for another device or context")),
        }
    }
}

/// The three projections of x `[T, E]`: q `[T, H·D]`, k and v `[T, G·D]`; as one GEMM when `fused`, else one after another. On a GPU one GEMM
/// writes them side by side, as [`Operation::QkvProjection`] has it: apart they are three.
///
/// # Errors
/// `InvalidInput` when a shape or dtype does not fit or the weights were packed by a context with another instruction set, `OutOfMemory`.
pub fn qkv_projection(
    context: &Context,
    x: &TensorRef<'_>,
    weights: &QkvWeights,
    out: [&mut TensorMut<'_>; 3],
    fused: bool,
) -> Result<()> {
    if let Some(gpu) = context.gpu() {
        return weights.on_gpu(gpu)?.project(gpu, x, out);
    }
    let cpu = &context.0.cpu;
    let (parts, dtype, kind) = match &weights.0 {
        Packed::Cpu(parts, dtype, kind) if parts.iter().all(|p| p.fits(&cpu.kernels)) => (parts, *dtype, *kind),
        _ => {
            let isa = cpu.kernels.isa;
            return Err(Error::invalid(format!("the weights were packed for another device or instruction set than {isa}")));
        }
    };
    let k = parts[0].weights().k;
    let (&[tokens, width], true) = (x.shape(), x.is_contiguous() && x.dtype() == dtype) else {
        return Err(shape_error("x", x, &format!("contiguous [T, {k}] in {dtype}")));
    };
    on_host(&[("x", *x)])?;
    if width != k || tokens == 0 {
        return Err(shape_error("x", x, &format!("[T, {k}] with T at least 1")));
    }
    let mut segments = Vec::with_capacity(3);
    for (name, (out, part)) in ["q", "k", "v"].into_iter().zip(out.into_iter().zip(parts.iter())) {
        let w = part.weights();
        if out.shape() != [tokens, w.n] {
            return Err(shape_error(name, &out.as_ref(), &format!("[{tokens}, {}]", w.n)));
        }
        on_host(&[(name, out.as_ref())])?;
        let to = rows_mut(out, w.n);
        segments.push(Segment { weights: w, bias: None, epilogue: Epilogue::Store { to, residual: None } });
    }
    let (depth, pairs) = (parts[0].weights().depth(), parts[0].weights().pairs);
    let row_tile = tokens.min(256).next_multiple_of(cpu.kernels.group_rows(pairs));
    let widest = segments.iter().map(|s| s.weights.tile_columns).max().unwrap_or(1);
    let scratch_len = gemm::scratch_len(row_tile, widest, cpu.kernels.panel());
    let mut workspace = context.workspace();
    let int8 = kind == WeightKind::Int8;
    let packed_bytes = if int8 { cpu.codes_bytes(tokens, k) } else { tokens * depth * 4 };
    let scratch = workspace.reserve(packed_bytes, scratch_len.max(k) * 4, cpu.threads.count())?;
    let packed = workspace.buffers().cast::<f32>();
    let groups: Vec<&[Segment<'_>]> = if fused { vec![&segments] } else { segments.chunks(1).collect() };
    for group in groups {
        let (x, first, rows, norm) = (rows(x, k), 0, tokens, None);
        let gemm = Gemm { packed, first, rows, row_tile, segments: group };
        // SAFETY: the shapes were checked above, the outputs are borrowed mutably, and items write disjoint parts.
        unsafe {
            if int8 {
                let quantise = QuantiseX { x, first, rows, k, norm, dtype, packed: packed.cast() };
                lawson_cpu::executor::project_int8(&cpu.kernels, &cpu.threads, &quantise, &gemm, scratch);
            } else {
                let pack = PackX { x, first, rows, k, norm, pairs, packed };
                lawson_cpu::executor::project(&cpu.kernels, &cpu.threads, &pack, &gemm, scratch);
            }
        }
    }
    Ok(())
}
