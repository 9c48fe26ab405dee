//! Runs plans on a GPU: kernels and products are chosen, compiled and planned once for each plan, then enqueued step by step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lawson_core::{
    DType, Error, ErrorKind, Result,
    plan::{BlockPlan, BufferName, Op, Operand as PlanOperand, Part, Projection, TiledAttention},
    problem::{RopeFrequencies, RopeLayout},
};

use crate::{
    Device, DeviceBuffer, DiskCache, Graph, Instance, Jit, Staging,
    blas::{Batch, Blas, Matmul, MatmulPlan, Operand, Operands as Matrices},
    kernels::{
        attention::{self, Attention},
        cache::Cache,
        heads::{self, HeadsPass},
        rows::{Copies, Norm, Residual, ScoreOp, Scores, ScoresParams, Softmax, SoftmaxParams, Transpose, TransposeParams},
    },
    weights::DeviceWeights,
};

/// Most sequences whose lengths are sent in one piece at first; more grow the piece.
const LENGTHS: usize = 1024;
/// Most blocks along the second and third dimension of a grid.
const MOST_BLOCKS: usize = 65_535;
/// Most plans whose kernels are kept at hand.
const KEPT: usize = 64;
/// Most sets of RoPE frequencies that are kept on the device.
const KEPT_FREQUENCIES: usize = 16;

/// An arbitrary mask on the device. Strides are in bytes; 0 where it is broadcast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaskAt {
    /// First byte.
    pub address: u64,
    /// From a sequence to the next.
    pub sequence_stride: i64,
    /// From a head to the next.
    pub head_stride: i64,
    /// From a query to the next.
    pub row_stride: i64,
}

/// The memory of one call; all of it on the device.
pub struct Operands<'a> {
    /// The block's weights.
    pub weights: &'a DeviceWeights,
    /// [T, E].
    pub x: u64,
    /// [T, E].
    pub y: u64,
    /// New tokens of each sequence: the plan's.
    pub new: &'a [usize],
    /// Past rows of each sequence: at most the plan's.
    pub past: &'a [usize],
    /// The cache.
    pub cache: Cache,
    /// The arbitrary mask.
    pub mask: Option<MaskAt>,
    /// Frequencies of this call, where the block has RoPE.
    pub frequencies: Option<&'a RopeFrequencies>,
}

/// A GPU with its kernels, products and workspace.
pub struct Gpu {
    device: Device,
    jit: Jit,
    blas: Blas,
    state: Mutex<State>,
}

/// Memory that calls share, one behind another in the stream. Graphs hold on to what they were captured with.
#[derive(Default)]
struct State {
    workspace: Option<Arc<DeviceBuffer>>,
    /// Zeros between calls.
    counters: Option<Arc<DeviceBuffer>>,
    lengths: Option<Arc<Lengths>>,
    frequencies: Vec<(Vec<f64>, Arc<DeviceBuffer>)>,
    prepared: Vec<(u64, Cache, Arc<[Ready]>)>,
}

/// starts [B + 1] and past `[B]` on the device, and what stands there.
struct Lengths {
    buffer: DeviceBuffer,
    staging: Staging,
    sequences: usize,
    sent: Mutex<Vec<i32>>,
}

/// A call captured as a graph, whose lengths may differ from replay to replay: [`Gpu::replay`].
pub struct Captured {
    graph: Graph,
    lengths: Arc<Lengths>,
    _kept: Vec<Arc<DeviceBuffer>>,
}

/// A step that only lacks addresses.
enum Ready {
    Norm(Norm),
    Product(Arc<MatmulPlan>),
    Heads(Vec<HeadsPass>),
    Copy(Transpose),
    Scores(ScoreOp, Scores),
    Softmax(Softmax),
    Attention(Attention),
    Residual(Residual),
}

fn missing(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the plan needs {what}, which the call does not have"))
}

/// Sizes that several steps need.
struct Sizes<'a> {
    plan: &'a BlockPlan,
    /// T.
    tokens: usize,
    /// Most new tokens of a sequence.
    new: usize,
    /// Most rows of a sequence.
    rows: usize,
    sequences: usize,
    /// Elements from a row of scores to the next.
    scores_stride: usize,
    /// Columns of a row of scores that are masked and weighed.
    columns: usize,
    gathers: bool,
    multiprocessors: usize,
}

impl<'a> Sizes<'a> {
    fn new(plan: &'a BlockPlan, multiprocessors: usize) -> Self {
        let batch = &plan.problem.batch;
        let rows = batch.max_len();
        let scores_stride = rows.next_multiple_of(8);
        // The columns up to whole accesses are masked too where there is a mask.
        let masks = plan.steps().any(|s| s.op == Op::Mask);
        Sizes {
            plan,
            tokens: batch.tokens(),
            new: batch.max_new(),
            rows,
            sequences: batch.sequences(),
            scores_stride,
            columns: if masks { scores_stride } else { rows },
            gathers: plan.steps().any(|s| s.op == Op::Gather),
            multiprocessors,
        }
    }

    fn dtype(&self) -> DType {
        self.plan.problem.dtype
    }

    fn buffer_dtype(&self, name: BufferName) -> DType {
        self.plan.buffer(name).map_or(self.dtype(), |b| b.dtype)
    }

    /// Rows of scores.
    fn score_rows(&self) -> usize {
        self.sequences * self.plan.problem.spec.attention.heads * self.new
    }

    fn heads(&self, from: DType, to: DType, heads: [usize; 3], rope: bool) -> heads::Shape {
        let appends = heads[2] > 0;
        let spec = &self.plan.problem.spec;
        let rope = spec.rope.as_ref().filter(|_| rope);
        let d = spec.attention.head_dim;
        heads::Shape {
            from,
            to,
            kv: if appends { self.plan.problem.kv_dtype } else { to },
            head_dim: d,
            rotary_dim: rope.map_or(0, |r| r.rotary_dim(d)),
            interleaved: rope.is_some_and(|r| r.layout == RopeLayout::Interleaved),
            heads,
            tokens: self.tokens,
            multiprocessors: self.multiprocessors,
        }
    }

    /// The passes of a step over heads.
    fn passes(&self, op: &Op) -> Vec<heads::Shape> {
        let spec = &self.plan.problem.spec;
        let (h, g) = (spec.attention.heads, spec.attention.kv_heads);
        let (qkv, to) = (self.buffer_dtype(BufferName::Qkv), self.dtype());
        match op {
            Op::QkNorm if spec.rope.is_some() => vec![self.heads(qkv, qkv, [h, g, 0], false)],
            Op::QkNorm => vec![self.heads(qkv, to, [h, g, 0], false)],
            Op::Rope => vec![self.heads(qkv, to, [h, g, 0], true)],
            Op::Append if qkv == to && self.plan.buffer(BufferName::K).is_none() => {
                vec![self.heads(to, to, [0, g, g], false)]
            }
            Op::Append => vec![self.heads(to, to, [0, g, 0], false), self.heads(qkv, to, [0, 0, g], false)],
            _ => vec![self.heads(qkv, to, [h, g, g], true)],
        }
    }

    fn attention(&self, t: &TiledAttention) -> attention::Shape {
        let p = &self.plan.problem;
        attention::Shape {
            spec: p.spec.attention.clone(),
            dtype: p.dtype,
            kv_dtype: p.kv_dtype,
            sequences: self.sequences,
            tokens: self.tokens,
            new: self.new,
            rows: self.rows,
            mask: p.mask.is_some(),
            decode: t.query_tile == 0,
            splits: t.split.map_or(1, |s| self.rows.div_ceil(s)),
        }
    }

    /// First column and columns of a projection's result.
    fn columns(&self, part: Part) -> (usize, usize) {
        let a = &self.plan.problem.spec.attention;
        let (q, kv) = (a.q_dim(), a.kv_dim());
        match part {
            Part::Q => (0, q),
            Part::K => (q, kv),
            Part::V => (q + kv, kv),
            Part::Kv => (q, 2 * kv),
            Part::Qkv => (0, a.qkv_dim()),
            Part::O => (0, self.plan.problem.spec.hidden_size),
        }
    }

    fn projection(&self, p: &Projection, writes: &[PlanOperand]) -> Matmul {
        let spec = &self.plan.problem.spec;
        let (a, e) = (&spec.attention, spec.hidden_size);
        let is_o = p.part == Part::O;
        let (first, n) = self.columns(p.part);
        let (k, ldd) = if is_o { (a.q_dim(), e) } else { (e, a.qkv_dim()) };
        let out = match writes {
            [PlanOperand::Buffer(name)] => self.buffer_dtype(*name),
            _ => self.dtype(),
        };
        let b = &spec.biases;
        // Where one pass over heads follows, it adds the biases of q, k and v.
        let in_epilogue = is_o || !self.plan.steps().any(|s| matches!(s.op, Op::HeadEpilogue { .. }));
        let biased = match p.part {
            Part::Q => b.q,
            Part::K => b.k,
            Part::V => b.v,
            Part::Kv => b.k || b.v,
            Part::Qkv => b.q || b.k || b.v,
            Part::O => b.o,
        };
        let size = self.dtype().size();
        let steps = [first * out.size(), ldd * out.size(), k * size, first * e * size];
        let alignment = 1 << steps.iter().fold(4, |bits, s| bits.min(s.trailing_zeros()));
        Matmul {
            out,
            ldc: ldd,
            ldd,
            bias: biased && in_epilogue,
            residual: p.residual,
            alignment,
            ..Matmul::projection(self.tokens, n, k, self.dtype())
        }
    }

    /// Q·Kᵀ of every key/value head with all queries of its group, or P·V.
    fn product(&self, weighted: bool, cache: &Cache) -> Matmul {
        let p = &self.plan.problem;
        let a = &p.spec.attention;
        let (d, size) = (a.head_dim, self.dtype().size());
        let (group_rows, l) = (a.group() * self.new, self.rows);
        let kv_stride = if self.gathers { l * d } else { cache.head_stride as usize };
        let kv_row = if self.gathers { d } else { cache.row_stride as usize };
        let count = self.sequences * a.kv_heads;
        // Probabilities lie where their scores did.
        let p_stride = self.scores_stride * 4 / size;
        let batch =
            |a: usize, b: usize, d: usize| [Batch { count, a: a as i64, b: b as i64, c: d as i64, d: d as i64 }, Batch::ONE];
        let steps = [group_rows * d * size, kv_stride * size, kv_row * size, d * size];
        let alignment = 1 << steps.iter().fold(4, |bits, s| bits.min(s.trailing_zeros()));
        if weighted {
            return Matmul {
                b: Operand::Columns,
                lda: p_stride,
                ldb: kv_row,
                ldc: d,
                ldd: d,
                alignment,
                batch: batch(group_rows * p_stride, kv_stride, group_rows * d),
                ..Matmul::projection(group_rows, d, l, self.dtype())
            };
        }
        Matmul {
            out: DType::F32,
            lda: d,
            ldb: kv_row,
            ldc: self.scores_stride,
            ldd: self.scores_stride,
            alignment,
            batch: batch(group_rows * d, kv_stride, group_rows * self.scores_stride),
            ..Matmul::projection(group_rows, l, d, self.dtype())
        }
    }

    /// What a step needs compiled.
    fn instances(&self, op: &Op, device: &Device) -> Vec<Instance> {
        let p = &self.plan.problem;
        let d = p.spec.attention.head_dim;
        match op {
            Op::InputNorm => vec![Norm::instance(self.dtype(), p.spec.hidden_size)],
            Op::QkNorm | Op::Rope | Op::Append | Op::HeadEpilogue { .. } => {
                self.passes(op).iter().map(heads::Shape::instance).collect()
            }
            Op::TransposeQ | Op::TransposeO => vec![Transpose::instance(self.dtype(), d)],
            Op::Gather => vec![Transpose::instance(p.kv_dtype, d)],
            Op::Scale | Op::Softcap | Op::Alibi | Op::Mask => vec![Scores::instance()],
            Op::Softmax => vec![Softmax::instance(self.dtype(), self.columns, self.scores_stride)],
            Op::Attention(t) => vec![self.attention(t).instance(device.info())],
            Op::Residual => vec![Residual::instance(self.dtype(), p.spec.hidden_size)],
            _ => Vec::new(),
        }
    }
}

impl Gpu {
    /// `device` with NVRTC and cuBLASLt.
    ///
    /// # Errors
    /// `Unavailable` when one of them is missing: which, and where it comes from.
    pub fn new(device: Device) -> Result<Self> {
        let jit = Jit::new(&device, DiskCache::standard())?;
        let blas = Blas::new(&device)?;
        Ok(Gpu { device, jit, blas, state: Mutex::default() })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }
    /// The kernels.
    pub fn jit(&self) -> &Jit {
        &self.jit
    }
    /// The products.
    pub fn blas(&self) -> &Blas {
        &self.blas
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of workspace held.
    pub fn workspace_bytes(&self) -> usize {
        self.state().workspace.as_ref().map_or(0, |w| w.bytes())
    }

    /// Captures `plan` over `operands` as a graph, after running it once.
    ///
    /// # Errors
    /// As [`Gpu::run`].
    ///
    /// # Safety
    /// As [`Gpu::run`], for every replay; the memory of `operands` outlives the graph.
    pub unsafe fn capture(&self, plan: &BlockPlan, operands: &Operands<'_>) -> Result<Captured> {
        // Held throughout: another call's work would be captured with this one's, or change the lengths in between.
        let state = &mut *self.state();
        // SAFETY: the caller's.
        unsafe { self.run_locked(state, plan, operands, &mut |_| Ok(()))? };
        // SAFETY: the caller's; what the graph uses besides is kept below. Nothing is sent now, as the lengths stand there.
        let graph = unsafe { Graph::capture(&self.device, || self.run_locked(state, plan, operands, &mut |_| Ok(())))? };
        let lengths = state.lengths.clone().ok_or_else(|| missing("lengths"))?;
        let shared = [&state.workspace, &state.counters].into_iter().flatten().cloned();
        let kept = shared.chain(state.frequencies.iter().map(|f| Arc::clone(&f.1))).collect();
        Ok(Captured { graph, lengths, _kept: kept })
    }

    /// Enqueues a captured call for these lengths, at most those that its plan was made for.
    ///
    /// # Errors
    /// `Device` with the driver's word.
    pub fn replay(&self, captured: &mut Captured, new: &[usize], past: &[usize]) -> Result<()> {
        // The workspace and the lengths are those of all calls, which follow one another whole.
        let _state = self.state();
        captured.lengths.send(new, past)?;
        captured.graph.replay()
    }

    /// Operations per second of a large product of `dtype`: the best of several.
    ///
    /// # Errors
    /// `OutOfMemory`, `Device`.
    pub fn measure_peak(&self, dtype: DType) -> Result<f64> {
        let n = if dtype == DType::F32 { 4096 } else { 8192 };
        // Numbers, as zeros draw less power and run faster.
        let values: Vec<f32> =
            (0..n * n).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 16) as u16 as f32 / 32_768.0 - 1.0).collect();
        let operand = self.device.upload(&crate::weights::encode(&values, dtype))?;
        let result = self.device.alloc(n * n * dtype.size())?;
        let product = self.blas.plan(&Matmul::projection(n, n, n, dtype))?;
        let run = || {
            let start = self.device.record()?;
            // SAFETY: both operands and the result are [n, n] of `dtype`, and the result is apart.
            unsafe { product.run(&Matrices::new(operand.ptr(), operand.ptr(), result.ptr()))? };
            let end = self.device.record()?;
            self.device.synchronize()?;
            Ok(end.ms_since(&start)? * 1e-3)
        };
        let times = (0..8).map(|_| run()).collect::<Result<Vec<f64>>>()?;
        Ok(product.matmul().flops() / times[2..].iter().copied().fold(f64::INFINITY, f64::min))
    }

    /// Bytes per second of a large copy on the device, those read and those written: the best of several.
    ///
    /// # Errors
    /// `OutOfMemory`, `Device`.
    pub fn measure_bandwidth(&self) -> Result<f64> {
        const BYTES: usize = 1 << 30;
        let (from, to) = (self.device.alloc(BYTES)?, self.device.alloc(BYTES)?);
        from.fill(1)?;
        let run = || {
            let start = self.device.record()?;
            to.copy_from(0, &from, 0, BYTES)?;
            let end = self.device.record()?;
            self.device.synchronize()?;
            Ok(end.ms_since(&start)? * 1e-3)
        };
        let times = (0..8).map(|_| run()).collect::<Result<Vec<f64>>>()?;
        Ok(2.0 * BYTES as f64 / times.iter().copied().fold(f64::INFINITY, f64::min))
    }

    fn prepare(&self, plan: &BlockPlan, cache: &Cache) -> Result<Arc<[Ready]>> {
        let info = self.device.info();
        let (batch, a) = (&plan.problem.batch, &plan.problem.spec.attention);
        // Blocks along the second and third dimension of a grid.
        let limits = [
            ("sequences", batch.sequences() * a.head_dim.div_ceil(256)),
            ("key/value heads times groups of query rows", a.kv_heads * (batch.max_new().min(8) * a.group()).div_ceil(16)),
            ("heads", a.heads + 2 * a.kv_heads),
        ];
        if let Some((what, n)) = limits.into_iter().find(|l| l.1 > MOST_BLOCKS) {
            return Err(Error::invalid(format!("{}: {n} {what} are more than a GPU's {MOST_BLOCKS}", plan.problem)));
        }
        let s = Sizes::new(plan, info.multiprocessors as usize);
        let instances: Vec<Vec<Instance>> = plan.steps().map(|step| s.instances(&step.op, &self.device)).collect();
        let mut modules = self.jit.load(&instances.concat())?.into_iter();
        let p = &plan.problem;
        let (d, e, mp) = (a.head_dim, p.spec.hidden_size, s.multiprocessors);
        let mut ready = Vec::new();
        for (step, instances) in plan.steps().zip(&instances) {
            let modules: Vec<_> = modules.by_ref().take(instances.len()).collect();
            let module = || modules.first().ok_or_else(|| missing("a kernel"));
            ready.push(match &step.op {
                Op::InputNorm => Ready::Norm(Norm::new(module()?, s.dtype(), s.tokens, e)?),
                Op::Projection(p) => Ready::Product(self.blas.plan(&s.projection(p, &step.writes))?),
                Op::QkNorm | Op::Rope | Op::Append | Op::HeadEpilogue { .. } => {
                    let shapes = s.passes(&step.op);
                    Ready::Heads(modules.iter().zip(shapes).map(|(m, shape)| HeadsPass::new(m, shape)).collect::<Result<_>>()?)
                }
                Op::TransposeQ | Op::TransposeO => {
                    let copies = if step.op == Op::TransposeQ { Copies::ToHeads } else { Copies::ToTokens };
                    Ready::Copy(Transpose::new(module()?, copies, s.dtype(), s.score_rows(), d, mp)?)
                }
                Op::Gather => {
                    let rows = s.sequences * a.kv_heads * s.rows;
                    Ready::Copy(Transpose::new(module()?, Copies::GatherCache, p.kv_dtype, rows, d, mp)?)
                }
                Op::Scores => Ready::Product(self.blas.plan(&s.product(false, cache))?),
                Op::WeightedValues => Ready::Product(self.blas.plan(&s.product(true, cache))?),
                Op::Scale => Ready::Scores(ScoreOp::Scale, Scores::new(module()?, s.score_rows(), s.columns)?),
                Op::Softcap => Ready::Scores(ScoreOp::Softcap, Scores::new(module()?, s.score_rows(), s.columns)?),
                Op::Alibi => Ready::Scores(ScoreOp::Alibi, Scores::new(module()?, s.score_rows(), s.columns)?),
                Op::Mask => Ready::Scores(ScoreOp::Mask, Scores::new(module()?, s.score_rows(), s.columns)?),
                Op::Softmax => Ready::Softmax(Softmax::new(module()?, s.score_rows(), s.columns, s.scores_stride)?),
                Op::Attention(t) => Ready::Attention(Attention::new(module()?, s.attention(t), info)?),
                Op::Residual => Ready::Residual(Residual::new(module()?, s.dtype(), s.tokens, e, mp)?),
                other => return Err(missing(other.name())),
            });
        }
        Ok(ready.into())
    }

    /// Enqueues `plan` over `operands`. `monitor` is called behind each step with its number.
    ///
    /// # Errors
    /// `OutOfMemory` and `Unavailable` before anything is enqueued; `Device` with kernel, problem and the driver's word.
    ///
    /// # Safety
    /// `operands` are memory of this device of the plan's shapes and dtypes, with room for the new rows in the cache, alive until the work
    /// enqueued now is done; nothing else uses y and the cache's new rows except through the device's stream.
    pub unsafe fn run(
        &self,
        plan: &BlockPlan,
        operands: &Operands<'_>,
        monitor: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.run_locked(&mut self.state(), plan, operands, monitor) }
    }

    /// [`Gpu::run`] for who holds the state.
    unsafe fn run_locked(
        &self,
        state: &mut State,
        plan: &BlockPlan,
        operands: &Operands<'_>,
        monitor: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let (id, layout) = (plan.id(), Cache { k: 0, v: 0, ..operands.cache });
        let ready = match state.prepared.iter().find(|p| (p.0, p.1) == (id, layout)) {
            Some((_, _, ready)) => Arc::clone(ready),
            None => {
                let ready = self.prepare(plan, &layout)?;
                if state.prepared.len() == KEPT {
                    state.prepared.remove(0);
                }
                state.prepared.push((id, layout, Arc::clone(&ready)));
                ready
            }
        };
        if state.workspace.as_ref().is_none_or(|w| w.bytes() < plan.workspace_bytes) {
            // The old one goes first: both together may not fit.
            state.workspace = None;
            let workspace = self.device.alloc(plan.workspace_bytes);
            let named = |e: Error| e.at(format!("the workspace of {} at level {}", plan.problem, plan.level));
            state.workspace = Some(Arc::new(workspace.map_err(named)?));
        }
        let sizes = Sizes::new(plan, self.device.info().multiprocessors as usize);
        let counters = plan.steps().map(|s| if let Op::Attention(t) = &s.op { sizes.attention(t).counters() } else { 0 });
        let counters = counters.max().unwrap_or(0) * 4;
        if state.counters.as_ref().is_none_or(|c| c.bytes() < counters) {
            let buffer = self.device.alloc(counters)?;
            buffer.fill(0)?;
            state.counters = Some(Arc::new(buffer));
        }
        let lengths = state.lengths(&self.device, operands.new.len())?;
        lengths.send(operands.new, operands.past)?;
        let frequencies = operands.frequencies.map_or(Ok(0), |f| state.frequencies(&self.device, &f.inverse))?;
        let address = |b: &Option<Arc<DeviceBuffer>>| b.as_ref().map_or(0, |b| b.ptr());
        let lengths = lengths.buffer.ptr();
        let run = Run {
            plan,
            operands,
            sizes,
            workspace: address(&state.workspace),
            counters: address(&state.counters),
            starts: lengths,
            past: lengths + 4 * (operands.new.len() as u64 + 1),
            frequencies,
        };
        for (i, (step, ready)) in plan.steps().zip(ready.iter()).enumerate() {
            // SAFETY: the caller's; the plan's buffers fit the workspace reserved above.
            unsafe { run.step(&step.op, &step.writes, ready)? };
            monitor(i)?;
        }
        Ok(())
    }
}

impl State {
    /// Room for the lengths of `sequences` sequences.
    fn lengths(&mut self, device: &Device, sequences: usize) -> Result<Arc<Lengths>> {
        if let Some(lengths) = self.lengths.as_ref().filter(|l| l.sequences >= sequences) {
            return Ok(Arc::clone(lengths));
        }
        let sequences = sequences.max(LENGTHS).next_power_of_two();
        let bytes = 4 * (2 * sequences + 1);
        let (buffer, staging) = (device.alloc(bytes)?, Staging::new(device, bytes, 4)?);
        let lengths = Arc::new(Lengths { buffer, staging, sequences, sent: Mutex::new(Vec::with_capacity(2 * sequences + 1)) });
        self.lengths = Some(Arc::clone(&lengths));
        Ok(lengths)
    }

    fn frequencies(&mut self, device: &Device, inverse: &[f64]) -> Result<u64> {
        if let Some((_, buffer)) = self.frequencies.iter().find(|(kept, _)| kept == inverse) {
            return Ok(buffer.ptr());
        }
        let buffer = Arc::new(device.upload(inverse)?);
        let address = buffer.ptr();
        if self.frequencies.len() == KEPT_FREQUENCIES {
            self.frequencies.remove(0);
        }
        self.frequencies.push((inverse.to_vec(), buffer));
        Ok(address)
    }
}

impl Lengths {
    /// Makes the lengths on the device these; a call that changes nothing neither allocates nor copies.
    fn send(&self, new: &[usize], past: &[usize]) -> Result<()> {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = new.iter().scan(0, |end, n| {
            *end += n;
            Some(*end as i32)
        });
        let wanted = || std::iter::once(0).chain(ends.clone()).chain(past.iter().map(|&p| p as i32));
        if wanted().eq(sent.iter().copied()) {
            return Ok(());
        }
        sent.clear();
        sent.extend(wanted());
        // What did not get there must not be taken for sent.
        self.staging.send(&self.buffer, 0, &sent).inspect_err(|_| sent.clear())
    }
}

/// The addresses of one call.
struct Run<'a> {
    plan: &'a BlockPlan,
    operands: &'a Operands<'a>,
    sizes: Sizes<'a>,
    workspace: u64,
    counters: u64,
    starts: u64,
    past: u64,
    frequencies: u64,
}

impl Run<'_> {
    fn buffer(&self, name: BufferName) -> Result<u64> {
        let buffer = self.plan.buffer(name).ok_or_else(|| missing(name.name()))?;
        Ok(self.workspace + buffer.offset as u64)
    }

    fn optional(&self, b: &Option<DeviceBuffer>) -> u64 {
        b.as_ref().map_or(0, DeviceBuffer::ptr)
    }

    unsafe fn step(&self, op: &Op, writes: &[PlanOperand], ready: &Ready) -> Result<()> {
        let (o, p, s) = (self.operands, &self.plan.problem, &self.sizes);
        let a = &p.spec.attention;
        // SAFETY: for each launch, the caller's: the addresses are of this call's operands and of the plan's buffers, with the planned shapes.
        unsafe {
            match (op, ready) {
                (Op::InputNorm, Ready::Norm(norm)) => {
                    let eps = p.spec.input_norm.map_or(0.0, |e| e.get());
                    norm.run(o.x, self.optional(&o.weights.input_norm), eps, self.buffer(BufferName::H)?, p)
                }
                (Op::Projection(projection), Ready::Product(product)) => {
                    product.run(&self.projection(projection, product.matmul(), writes)?)
                }
                (Op::QkNorm | Op::Rope | Op::Append | Op::HeadEpilogue { .. }, Ready::Heads(passes)) => {
                    passes.iter().enumerate().try_for_each(|(i, pass)| pass.run(self.heads(op, i)?, p))
                }
                (Op::TransposeQ | Op::TransposeO | Op::Gather, Ready::Copy(copy)) => copy.run(&self.copy(op)?, p),
                (Op::Scores, Ready::Product(product)) => {
                    let keys = if s.gathers { self.buffer(BufferName::KHeads)? } else { o.cache.k };
                    product.run(&Matrices::new(self.buffer(BufferName::QHeads)?, keys, self.buffer(BufferName::Scores)?))
                }
                (Op::WeightedValues, Ready::Product(product)) => {
                    let values = if s.gathers { self.buffer(BufferName::VHeads)? } else { o.cache.v };
                    product.run(&Matrices::new(self.buffer(BufferName::Scores)?, values, self.buffer(BufferName::OHeads)?))
                }
                (_, Ready::Scores(op, scores)) => scores.run(&self.scores(*op)?, p),
                (Op::Softmax, Ready::Softmax(softmax)) => {
                    let scores = self.buffer(BufferName::Scores)?;
                    let params = SoftmaxParams {
                        x: scores,
                        y: scores,
                        sinks: self.optional(&o.weights.sinks),
                        x_stride: s.scores_stride as i64,
                        y_stride: (s.scores_stride * 4 / s.dtype().size()) as i64,
                        rows: s.score_rows() as i32,
                        width: s.columns as i32,
                        plane_rows: s.new as i32,
                        heads: a.heads as i32,
                    };
                    softmax.run(&params, p)
                }
                (Op::Attention(_), Ready::Attention(attention)) => attention.run(&self.attention()?, p),
                (Op::Residual, Ready::Residual(residual)) => residual.run(self.buffer(BufferName::Projected)?, o.x, o.y, p),
                (other, _) => Err(missing(other.name())),
            }
        }
    }

    fn projection(&self, p: &Projection, matmul: &Matmul, writes: &[PlanOperand]) -> Result<Matrices> {
        let (o, spec) = (self.operands, &self.plan.problem.spec);
        let w = o.weights;
        let (first, _) = self.sizes.columns(p.part);
        let size = matmul.dtype.size() as u64;
        let (a, b) = if p.part == Part::O {
            (self.buffer(BufferName::Attention)?, w.o.ptr())
        } else {
            let weights = if p.norm { w.folded.as_ref().ok_or_else(|| missing("folded weights"))? } else { &w.qkv };
            let normed = spec.input_norm.is_some() && !p.norm;
            let x = if normed { self.buffer(BufferName::H)? } else { o.x };
            (x, weights.ptr() + (first * spec.hidden_size) as u64 * size)
        };
        let d = match writes {
            [PlanOperand::Buffer(name)] => self.buffer(*name)?,
            _ => o.y,
        } + (first * matmul.out.size()) as u64;
        let bias = if p.part == Part::O { &w.o_bias } else { &w.qkv_bias };
        let bias = bias.as_ref().map_or(0, |b| {
            let b = if matmul.out == DType::F32 { &b.f32 } else { &b.narrow };
            b.ptr() + (first * matmul.out.size()) as u64
        });
        let c = if p.residual { o.x } else { 0 };
        Ok(Matrices { a, b, bias: if matmul.bias { bias } else { 0 }, c, d, scale: 1.0 })
    }

    /// What pass `i` of a step over heads reads and writes.
    fn heads(&self, op: &Op, i: usize) -> Result<heads::Params> {
        let (o, spec, s) = (self.operands, &self.plan.problem.spec, &self.sizes);
        let (a, w) = (&spec.attention, o.weights);
        let (q_dim, kv_dim) = (a.q_dim(), a.kv_dim());
        let qkv = self.buffer(BufferName::Qkv)?;
        let size = s.buffer_dtype(BufferName::Qkv).size() as u64;
        let stride = a.qkv_dim() as i64;
        let (k, v) = (qkv + q_dim as u64 * size, qkv + (q_dim + kv_dim) as u64 * size);
        let turned = self.plan.buffer(BufferName::Q).is_some();
        let (norm, rope, append) = match op {
            Op::QkNorm => (true, false, false),
            Op::Rope => (false, true, false),
            Op::Append => (false, false, true),
            _ => (true, true, true),
        };
        let mut params = heads::Params {
            q: qkv,
            k,
            v,
            q_out: qkv,
            k_out: k,
            starts: self.starts,
            past: self.past,
            q_stride: stride,
            k_stride: stride,
            v_stride: stride,
            q_out_stride: stride,
            k_out_stride: stride,
            sequences: s.sequences as i32,
            uniform: if o.new.iter().all(|&n| n == s.new) { s.new as i32 } else { 0 },
            ..heads::Params::default()
        };
        // The last pass before the append rounds q and k into buffers of their own.
        if turned && (rope || spec.rope.is_none()) && !append {
            params.q_out = self.buffer(BufferName::Q)?;
            params.k_out = self.buffer(BufferName::K)?;
            (params.q_out_stride, params.k_out_stride) = (q_dim as i64, kv_dim as i64);
        }
        if matches!(op, Op::HeadEpilogue { .. }) && turned {
            params.q_out = self.buffer(BufferName::Q)?;
            params.q_out_stride = q_dim as i64;
        }
        if append {
            params.cache = o.cache;
            (params.k_out, params.v_out) = (0, 0);
            if turned && i == 0 && matches!(op, Op::Append) {
                params.k = self.buffer(BufferName::K)?;
                params.k_stride = kv_dim as i64;
            }
        }
        if norm && let Some(eps) = spec.qk_norm {
            (params.q_norm, params.k_norm) = (self.optional(&w.q_norm), self.optional(&w.k_norm));
            params.qk_norm_eps = eps.get() as f32;
        }
        if rope && let Some(f) = o.frequencies {
            params.frequencies = self.frequencies;
            params.attention_factor = f.attention_factor as f32;
        }
        if let Op::HeadEpilogue { norm } = op {
            if let Some(bias) = &w.qkv_bias {
                let at = |first: usize| bias.f32.ptr() + 4 * first as u64;
                (params.q_bias, params.k_bias, params.v_bias) = (at(0), at(q_dim), at(q_dim + kv_dim));
            }
            if *norm {
                params.x = o.x;
                params.hidden = spec.hidden_size as i32;
                params.input_norm_eps = spec.input_norm.map_or(0.0, |e| e.get()) as f32;
            }
        }
        Ok(params)
    }

    fn copy(&self, op: &Op) -> Result<TransposeParams> {
        let (p, s) = (&self.plan.problem, &self.sizes);
        let (a, gathers) = (&p.spec.attention, *op == Op::Gather);
        let dtype = if gathers { p.kv_dtype } else { p.dtype };
        let size = dtype.size();
        let mut params = TransposeParams {
            starts: self.starts,
            past: self.past,
            sequences: s.sequences as i32,
            heads: if gathers { a.kv_heads } else { a.heads } as i32,
            rows: if gathers { s.rows } else { s.new } as i32,
            row_bytes: (a.head_dim * size) as i32,
            element_size: size as i32,
            token_stride: (a.q_dim() * size) as i64,
            ..TransposeParams::default()
        };
        match op {
            Op::Gather => {
                params.cache = self.operands.cache;
                (params.k, params.v) = (self.buffer(BufferName::KHeads)?, self.buffer(BufferName::VHeads)?);
            }
            Op::TransposeQ => {
                if self.plan.buffer(BufferName::Q).is_some() {
                    params.x = self.buffer(BufferName::Q)?;
                } else {
                    params.x = self.buffer(BufferName::Qkv)?;
                    params.token_stride = (a.qkv_dim() * size) as i64;
                }
                params.y = self.buffer(BufferName::QHeads)?;
            }
            _ => (params.x, params.y) = (self.buffer(BufferName::OHeads)?, self.buffer(BufferName::Attention)?),
        }
        Ok(params)
    }

    fn scores(&self, op: ScoreOp) -> Result<ScoresParams> {
        let (o, s) = (self.operands, &self.sizes);
        let a = &self.plan.problem.spec.attention;
        let mask = o.mask.unwrap_or_default();
        Ok(ScoresParams {
            scores: self.buffer(BufferName::Scores)?,
            slopes: self.optional(&o.weights.alibi_slopes),
            mask: mask.address,
            starts: self.starts,
            past: self.past,
            row_stride: s.scores_stride as i64,
            mask_sequence_stride: mask.sequence_stride,
            mask_head_stride: mask.head_stride,
            mask_row_stride: mask.row_stride,
            heads: a.heads as i32,
            seq: s.new as i32,
            columns: s.columns as i32,
            operations: op as i32,
            causal: i32::from(a.causal),
            window: a.window.map_or(0, |w| i32::try_from(w).unwrap_or(i32::MAX / 2)),
            scale: a.scale() as f32,
            softcap: a.softcap.map_or(0.0, |c| c.get() as f32),
        })
    }

    fn attention(&self) -> Result<attention::Call> {
        let (o, a) = (self.operands, &self.plan.problem.spec.attention);
        let mask = o.mask.unwrap_or_default();
        let turned = self.plan.buffer(BufferName::Q).is_some();
        Ok(attention::Call {
            cache: o.cache,
            q: self.buffer(if turned { BufferName::Q } else { BufferName::Qkv })?,
            q_stride: if turned { a.q_dim() } else { a.qkv_dim() } as i64,
            out: self.buffer(BufferName::Attention)?,
            out_stride: a.q_dim() as i64,
            lse: 0,
            starts: self.starts,
            past: self.past,
            sinks: self.optional(&o.weights.sinks),
            slopes: self.optional(&o.weights.alibi_slopes),
            mask: mask.address,
            mask_sequence_stride: mask.sequence_stride,
            mask_head_stride: mask.head_stride,
            mask_row_stride: mask.row_stride,
            parts: if self.plan.buffer(BufferName::Parts).is_some() { self.buffer(BufferName::Parts)? } else { 0 },
            counters: self.counters,
        })
    }
}
