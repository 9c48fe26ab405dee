//! The attention block.

use std::{
    any::Any,
    sync::{Arc, Mutex},
    time::Instant,
};

use lawson_compiler::weights_on_gpu;
use lawson_core::{
    CacheDType, DType, Error, ErrorKind, Result, Storage, StorageMut, TensorMut, TensorRef, WeightKind,
    plan::BlockPlan,
    problem::{BlockProblem, BlockSpec, Lengths, Level, MaskShape, RopeFrequencies},
};
use lawson_cpu::{
    executor::{self, Operands, PackedBlock},
    kernels::{attention::MaskRows, rows::Rows},
    machine::Memory,
    pack::{PackedMatrix, tile_columns},
};
use lawson_cuda::{
    DeviceBuffer, Gpu,
    executor::{Captured, MaskAt, Operands as DeviceOperands},
    kernels::cache::Cache,
    weights::{DeviceWeights, Given},
};

use crate::{
    BlockWeights, Checkpoint, Context, PagePool,
    context::{Call, lock},
    kv_cache::{Batch, KvCache, LayerCache},
    tensor::{DeviceTensor, Tensor},
};

/// An arbitrary mask, [B or 1, H or 1, S, at least the longest past + S], row-major; nonzero is visible. Column j is cache row j.
#[derive(Clone, Copy, Debug)]
pub struct MaskRef<'a> {
    data: &'a [u8],
    shape: [usize; 4],
}

impl<'a> MaskRef<'a> {
    /// A mask over `data` of `shape`.
    ///
    /// # Errors
    /// `InvalidInput` when the shape does not have as many elements as `data`.
    pub fn new(data: &'a [u8], shape: [usize; 4]) -> Result<Self> {
        let len = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if len != Some(data.len()) {
            return Err(Error::invalid(format!("a mask of shape {shape:?} does not have {} elements", data.len())));
        }
        Ok(MaskRef { data, shape })
    }

    /// Which dimensions are not broadcast, after checking the mask against B, H, S and the columns needed.
    pub(crate) fn check(&self, sequences: usize, heads: usize, new: usize, columns: usize) -> Result<MaskShape> {
        let [b, h, s, l] = self.shape;
        if !(b == 1 || b == sequences) || !(h == 1 || h == heads) || s != new || l < columns {
            return Err(Error::invalid(format!(
                "mask has shape {:?}, needed [{sequences} or 1, {heads} or 1, {new}, at least {columns}]",
                self.shape
            )));
        }
        Ok(MaskShape { per_sequence: b != 1, per_head: h != 1 })
    }

    /// The bytes.
    pub(crate) fn data(&self) -> &'a [u8] {
        self.data
    }

    pub(crate) fn rows(&self) -> MaskRows {
        let [b, h, s, l] = self.shape;
        MaskRows {
            start: self.data.as_ptr(),
            sequence_stride: if b == 1 { 0 } else { h * s * l },
            head_stride: if h == 1 { 0 } else { s * l },
            row_stride: l,
        }
    }
}

/// What one call of a block takes. T is the number of new tokens of all sequences.
pub struct Args<'a> {
    /// Input, `[T, E]` or, for equal lengths, `[B, S, E]`; in the block's dtype.
    pub x: TensorRef<'a>,
    /// New tokens of each sequence.
    pub batch: &'a Batch,
    /// An arbitrary mask, combined with the block's own masking.
    pub mask: Option<MaskRef<'a>>,
    /// Where keys and values are appended.
    pub cache: LayerCache<'a>,
    /// Output, of x's shape and dtype.
    pub y: TensorMut<'a>,
}

/// Makes an [`AttentionBlock`].
#[derive(Clone, Debug)]
pub struct AttentionBlockBuilder<'a> {
    spec: BlockSpec,
    weights: BlockWeights<'a>,
    dtype: Option<DType>,
    kind: WeightKind,
    level: Option<Level>,
}

impl AttentionBlockBuilder<'_> {
    /// Compute dtype: of packed weights, x, y and the buffers between steps; that of `q_weight` otherwise. Sums are f32 always.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// How the weights of the projections are held: in the compute dtype, or quantised to int8 from what is stored, with activations quantised
    /// token by token (see [`lawson_core::int8`]), on a CPU.
    pub fn weights(mut self, kind: WeightKind) -> Self {
        self.kind = kind;
        self
    }

    /// Level of fusion; the planner's choice otherwise.
    pub fn level(mut self, level: Level) -> Self {
        self.level = Some(level);
        self
    }

    /// Packs the weights for `context`.
    ///
    /// # Errors
    /// `InvalidInput` when the specification is not valid or a tensor does not fit it, naming the tensor; `OutOfMemory`; `Unavailable` for weights
    /// in int8 on a GPU.
    pub fn build(self, context: &Context) -> Result<AttentionBlock> {
        self.spec.validate()?;
        self.weights.check(&self.spec)?;
        let dtype = self.dtype.unwrap_or(self.weights.q_weight.dtype());
        let packed = match context.gpu() {
            Some(gpu) => {
                weights_on_gpu(self.kind)?;
                Packed::Gpu(self.upload(gpu, dtype)?)
            }
            None => Packed::Cpu(self.pack(context, dtype)?),
        };
        let (context, kind) = (context.clone(), self.kind);
        let inner = Inner { context, spec: self.spec, dtype, kind, packed, frequencies: Mutex::new(None) };
        Ok(AttentionBlock { inner: Arc::new(inner), level: self.level })
    }

    fn pack(&self, context: &Context, dtype: DType) -> Result<PackedBlock> {
        let (w, a, kernels) = (&self.weights, &self.spec.attention, &context.0.cpu.kernels);
        let panel = kernels.panel();
        let pack = |name: &str, t: &TensorRef<'_>, columns: usize| {
            let threads = &context.0.cpu.threads;
            let packed = match self.kind {
                WeightKind::Int8 => PackedMatrix::int8(t, columns, kernels, threads),
                _ => PackedMatrix::new(t, dtype, columns, kernels, threads),
            };
            packed.map_err(|e| e.at(name))
        };
        let heads = |n: usize| tile_columns(a.head_dim, n, panel);
        Ok(PackedBlock {
            q: pack("q_proj.weight", &w.q_weight, heads(a.q_dim()))?,
            k: pack("k_proj.weight", &w.k_weight, heads(a.kv_dim()))?,
            v: pack("v_proj.weight", &w.v_weight, heads(a.kv_dim()))?,
            o: pack("o_proj.weight", &w.o_weight, tile_columns(1, self.spec.hidden_size, panel))?,
            q_bias: values(&w.q_bias),
            k_bias: values(&w.k_bias),
            v_bias: values(&w.v_bias),
            o_bias: values(&w.o_bias),
            input_norm: values(&w.input_norm),
            q_norm: values(&w.q_norm),
            k_norm: values(&w.k_norm),
            sinks: values(&w.sinks),
            alibi_slopes: values(&w.alibi_slopes),
        })
    }

    fn upload(&self, gpu: &Gpu, dtype: DType) -> Result<DeviceWeights> {
        let w = &self.weights;
        let given = Given {
            q: w.q_weight,
            k: w.k_weight,
            v: w.v_weight,
            o: w.o_weight,
            q_bias: values(&w.q_bias),
            k_bias: values(&w.k_bias),
            v_bias: values(&w.v_bias),
            o_bias: values(&w.o_bias),
            input_norm: values(&w.input_norm),
            q_norm: values(&w.q_norm),
            k_norm: values(&w.k_norm),
            sinks: values(&w.sinks),
            alibi_slopes: values(&w.alibi_slopes),
        };
        DeviceWeights::new(gpu.device(), &self.spec, &given, dtype)
    }
}

fn values(t: &Option<TensorRef<'_>>) -> Option<Vec<f32>> {
    t.as_ref().map(TensorRef::to_f32)
}

enum Packed {
    Cpu(PackedBlock),
    Gpu(DeviceWeights),
}

struct Inner {
    context: Context,
    spec: BlockSpec,
    dtype: DType,
    kind: WeightKind,
    packed: Packed,
    /// RoPE frequencies and the `length_key` they were computed for.
    frequencies: Mutex<Option<(usize, Arc<RopeFrequencies>)>>,
}

/// An attention block with packed weights: norm, QKV projection, RoPE, cache append, attention, output projection.
///
/// Cheap to clone; `Send` and `Sync`. It owns no workspace: that is its context's.
///
/// ```
/// use lawson::{Args, AttentionBlock, Batch, BlockWeights, Context, KvCache, TensorMut, TensorRef};
/// use lawson::{AttentionSpec, BlockSpec, DType, RopeSpec};
///
/// // E = 64, four query heads over two key/value heads of 16 dimensions, causal, with RoPE.
/// let (e, h, g, d) = (64, 4, 2, 16);
/// let spec = BlockSpec { rope: Some(RopeSpec::new(10000.0)), ..BlockSpec::new(e, AttentionSpec::new(h, g, d)) };
/// let (q, k, v, o) = (vec![0.01; h * d * e], vec![0.02; g * d * e], vec![0.03; g * d * e], vec![0.04; e * h * d]);
/// let weights = BlockWeights::new(
///     TensorRef::new(&q, &[h * d, e])?,
///     TensorRef::new(&k, &[g * d, e])?,
///     TensorRef::new(&v, &[g * d, e])?,
///     TensorRef::new(&o, &[e, h * d])?,
/// );
/// let context = Context::cpu()?;
/// let block = AttentionBlock::builder(spec, weights).build(&context)?;
///
/// // One sequence of five new tokens.
/// let mut cache = KvCache::new(&context, &block.spec().attention, 1, 1, 128, DType::F32)?;
/// let batch = Batch::uniform(1, 5)?;
/// let (x, mut y) = (vec![1.0f32; 5 * e], vec![0.0f32; 5 * e]);
/// block.forward(Args {
///     x: TensorRef::new(&x, &[5, e])?,
///     batch: &batch,
///     mask: None,
///     cache: cache.layer(0),
///     y: TensorMut::new(&mut y, &[5, e])?,
/// })?;
/// cache.commit(&batch)?;
/// assert_eq!(cache.lengths(), [5]);
/// # Ok::<(), lawson::Error>(())
/// ```
#[derive(Clone)]
pub struct AttentionBlock {
    inner: Arc<Inner>,
    level: Option<Level>,
}

impl AttentionBlock {
    /// A block of `spec` with `weights`, to be built.
    pub fn builder(spec: BlockSpec, weights: BlockWeights<'_>) -> AttentionBlockBuilder<'_> {
        AttentionBlockBuilder { spec, weights, dtype: None, kind: WeightKind::Compute, level: None }
    }

    /// The self-attention of a checkpoint's layer, `with_norm` with its input norm and residual, in the dtype it is stored in; where its weights
    /// are in int8, so are the block's, which computes in the dtype that they had before.
    ///
    /// # Errors
    /// `InvalidInput` when the layer does not exist or is not expressible, `OutOfMemory`.
    pub fn from_checkpoint(context: &Context, checkpoint: &Checkpoint, layer: usize, with_norm: bool) -> Result<Self> {
        let weights = checkpoint.weights(layer, with_norm)?;
        let builder = Self::builder(checkpoint.block_spec(layer, with_norm)?, weights.as_ref());
        let builder = AttentionBlockBuilder { dtype: checkpoint.original_dtype(layer), ..builder };
        builder.weights(checkpoint.weight_kind()).build(context)
    }

    /// The same block, sharing its weights, at `level` of fusion; the planner's choice when `None`.
    pub fn at(&self, level: Option<Level>) -> Self {
        AttentionBlock { inner: Arc::clone(&self.inner), level }
    }

    /// Everything about the block but its numbers.
    pub fn spec(&self) -> &BlockSpec {
        &self.inner.spec
    }
    /// Compute dtype.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }
    /// How the weights of its projections are held.
    pub fn weights(&self) -> WeightKind {
        self.inner.kind
    }
    /// The context it was built for.
    pub fn context(&self) -> &Context {
        &self.inner.context
    }
    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        match &self.inner.packed {
            Packed::Cpu(p) => p.bytes(),
            Packed::Gpu(p) => p.bytes(),
        }
    }
    /// Where the packed matrices lie, for [`Context::read_loop`].
    pub fn weight_memory(&self) -> Vec<Memory<'_>> {
        match &self.inner.packed {
            Packed::Cpu(packed) => packed.memory().into(),
            Packed::Gpu(_) => Vec::new(),
        }
    }

    /// The plan of a call with `new[b]` new tokens behind `past[b]` rows of sequence b of a contiguous cache.
    ///
    /// # Errors
    /// `InvalidInput` when the lengths do not fit each other or are too large.
    pub fn plan(
        &self,
        new: &[usize],
        past: &[usize],
        mask: Option<MaskShape>,
        kv_dtype: impl Into<CacheDType>,
    ) -> Result<Arc<BlockPlan>> {
        let kv_dtype = kv_dtype.into();
        let batch = Lengths::ragged(new.to_vec(), past.to_vec())?;
        let (spec, dtype, weights) = (self.inner.spec.clone(), self.inner.dtype, self.inner.kind);
        let problem = BlockProblem { spec, batch, mask, dtype, weights, kv_dtype, page_size: None };
        self.inner.context.plan(&problem, self.level)
    }

    /// Computes y and writes the new rows of k and v behind the cache's valid rows, which [`crate::KvCache::commit`] then makes valid.
    /// Allocates nothing once a call of the same shape has run. Sequences of a paged cache take the pages that the new rows need; a call
    /// that fails takes none.
    ///
    /// # Errors
    /// `InvalidInput` when a shape or dtype does not fit, or the cache has no room: nothing is written then. `OutOfMemory`, also when too
    /// few of the pool's pages are free.
    pub fn forward(&self, args: Args<'_>) -> Result<()> {
        self.run(args, &mut |_, _| {}).map(drop)
    }

    /// As [`AttentionBlock::forward`], with a new tensor for y.
    ///
    /// # Errors
    /// As [`AttentionBlock::forward`].
    pub fn forward_alloc(
        &self,
        x: TensorRef<'_>,
        batch: &Batch,
        mask: Option<MaskRef<'_>>,
        cache: LayerCache<'_>,
    ) -> Result<Tensor> {
        let mut y = Tensor::zeros(self.inner.dtype, x.shape())?;
        self.forward(Args { x, batch, mask, cache, y: y.as_mut() })?;
        Ok(y)
    }

    /// As [`AttentionBlock::forward`]; returns the plan that ran and the seconds of each of its steps, in the plan's order.
    ///
    /// # Errors
    /// As [`AttentionBlock::forward`].
    pub fn forward_timed(&self, args: Args<'_>) -> Result<(Arc<BlockPlan>, Vec<f64>)> {
        if let Some(gpu) = self.inner.context.gpu() {
            let mut events = vec![gpu.device().record()?];
            let mut failed = None;
            let plan = self.run(args, &mut |_, _| match gpu.device().record() {
                Ok(event) => events.push(event),
                Err(e) => failed = Some(e),
            })?;
            gpu.device().synchronize()?;
            if let Some(e) = failed {
                return Err(e);
            }
            let lap = |pair: &[lawson_cuda::Event]| Ok(pair[1].ms_since(&pair[0])? * 1e-3);
            let seconds = events.windows(2).map(lap).collect::<Result<_>>()?;
            return Ok((plan, seconds));
        }
        let mut laps: Vec<(usize, usize, f64)> = Vec::new();
        let mut last = Instant::now();
        let plan = self.run(args, &mut |stage, step| {
            let now = Instant::now();
            laps.push((stage, step, (now - last).as_secs_f64()));
            last = now;
        })?;
        let mut seconds = Vec::new();
        for (i, stage) in plan.stages.iter().enumerate() {
            for j in 0..stage.steps.len() {
                seconds.push(laps.iter().filter(|l| (l.0, l.1) == (i, j)).map(|l| l.2).sum());
            }
        }
        Ok((plan, seconds))
    }

    fn run(&self, mut args: Args<'_>, monitor: &mut dyn FnMut(usize, usize)) -> Result<Arc<BlockPlan>> {
        let (inner, spec) = (&*self.inner, &self.inner.spec);
        let (new, cache) = (args.batch.new_tokens(), args.cache.cache());
        let on_gpu = inner.context.gpu().is_some();
        check_tensor("x", &args.x, args.batch, spec.hidden_size, inner.dtype, on_gpu)?;
        check_tensor("y", &args.y.as_ref(), args.batch, spec.hidden_size, inner.dtype, on_gpu)?;
        let a = &spec.attention;
        if (cache.kv_heads(), cache.head_dim()) != (a.kv_heads, a.head_dim) {
            return Err(Error::invalid(format!(
                "the cache has {} heads of {} dimensions, the block has {} of {}",
                cache.kv_heads(),
                cache.head_dim(),
                a.kv_heads,
                a.head_dim
            )));
        }
        cache.check(args.batch)?;
        let longest = new.iter().zip(cache.lengths()).map(|(n, p)| n + p).max().unwrap_or(0);
        let mask = args.mask.map(|m| m.check(new.len(), a.heads, new.iter().copied().max().unwrap_or(0), longest)).transpose()?;
        let (dtype, kv_dtype, page_size) = (inner.dtype, cache.dtype(), cache.pool().map(PagePool::page_size));
        let call = Call { spec, new, past: cache.lengths(), mask, dtype, weights: inner.kind, kv_dtype, page_size };
        let plan = inner.context.plan_call(&call, self.level)?;
        let frequencies = inner.frequencies(longest);
        let packed = match &inner.packed {
            Packed::Cpu(packed) => packed,
            Packed::Gpu(weights) => {
                let rows = args.cache.device_rows(&inner.context)?;
                args.cache.reserve(args.batch)?;
                let enqueued = inner.run_on_gpu(&plan, weights, &mut args, rows, frequencies.as_deref(), monitor);
                if enqueued.is_err() {
                    args.cache.undo_reserve();
                }
                return enqueued.map(|()| plan);
            }
        };
        let stride = spec.hidden_size;
        let x = Rows { start: args.x.storage().as_ptr().cast_mut(), dtype: inner.dtype, stride };
        let y = Rows { start: args.y.storage_mut().as_mut_ptr(), dtype: inner.dtype, stride };
        let cpu = &inner.context.0.cpu;
        let mut workspace = inner.context.workspace();
        let rows = args.cache.rows()?;
        let operands = Operands {
            weights: packed,
            x,
            y,
            new,
            past: args.cache.cache().lengths(),
            cache: rows,
            mask: args.mask.map(|m| m.rows()),
            frequencies: frequencies.as_deref(),
        };
        // SAFETY: every shape and dtype was checked above; y and the cache are borrowed mutably, the workspace is locked.
        unsafe { executor::run(&cpu.kernels, &cpu.threads, &plan, &operands, &mut workspace, monitor)? };
        args.cache.wrote(args.batch);
        Ok(plan)
    }
}

/// A call of a block on a GPU, kept as a CUDA graph with the memory it works on. One graph serves a growing cache: lengths, and the table of
/// a paged cache, are read from device memory.
pub struct CapturedCall {
    /// Dropped before the memory that it works on.
    captured: Captured,
    block: AttentionBlock,
    batch: Batch,
    cache: KvCache,
    layer: usize,
    x: DeviceTensor,
    y: DeviceTensor,
    plan: Arc<BlockPlan>,
    /// What the RoPE frequencies of the graph depend on.
    length_key: usize,
}

impl AttentionBlock {
    /// Keeps the call of `x` with `batch` behind the rows of `layer` of `cache` as a graph, after running it once.
    ///
    /// # Errors
    /// `Unavailable` when the block is not on a GPU; else as [`AttentionBlock::forward`].
    pub fn capture(
        &self,
        x: DeviceTensor,
        batch: Batch,
        mut cache: KvCache,
        layer: usize,
        mut y: DeviceTensor,
    ) -> Result<CapturedCall> {
        if self.inner.context.gpu().is_none() {
            return Err(Error::new(ErrorKind::Unavailable, "only a block on a GPU can be captured"));
        }
        if layer >= cache.layers() {
            return Err(Error::invalid(format!("layer {layer} of a cache of {} layers", cache.layers())));
        }
        // All checks, and everything that a first call does.
        self.forward(Args { x: x.as_ref(), batch: &batch, mask: None, cache: cache.layer(layer), y: y.as_mut() })?;
        let (plan, captured, length_key) = self.record(&x, &batch, &mut cache, layer, &y)?;
        Ok(CapturedCall { block: self.clone(), batch, cache, layer, x, y, plan, captured, length_key })
    }

    /// The graph of a call that was checked, planned for all rows of the cache.
    fn record(
        &self,
        x: &DeviceTensor,
        batch: &Batch,
        cache: &mut KvCache,
        layer: usize,
        y: &DeviceTensor,
    ) -> Result<(Arc<BlockPlan>, Captured, usize)> {
        let inner = &*self.inner;
        let (Packed::Gpu(weights), Some(gpu)) = (&inner.packed, inner.context.gpu()) else {
            return Err(Error::new(ErrorKind::Unavailable, "only a block on a GPU can be captured"));
        };
        let new = batch.new_tokens();
        let room: Vec<usize> = new.iter().map(|n| cache.capacity() - n).collect();
        let (dtype, kv_dtype, page_size) = (inner.dtype, cache.dtype(), cache.pool().map(PagePool::page_size));
        let call = Call { spec: &inner.spec, new, past: &room, mask: None, dtype, weights: inner.kind, kv_dtype, page_size };
        let plan = inner.context.plan_exactly(&call, self.level)?;
        let longest = new.iter().zip(cache.lengths()).map(|(n, p)| n + p).max().unwrap_or(0);
        let frequencies = inner.frequencies(longest);
        let rows = cache.layer(layer).device_rows(&inner.context)?;
        let operands = DeviceOperands {
            weights,
            x: x.buffer().ptr(),
            y: y.buffer().ptr(),
            lse: 0,
            new,
            past: cache.lengths(),
            cache: rows,
            mask: None,
            frequencies: frequencies.as_deref(),
        };
        // SAFETY: shapes, dtypes and the device were checked by the call before; `CapturedCall` owns x, y and the cache and drops the graph,
        // which waits for its replays, before them.
        let captured = unsafe { gpu.capture(&plan, &operands)? };
        Ok((plan, captured, inner.spec.rope.as_ref().map_or(0, |r| r.length_key(longest))))
    }
}

impl CapturedCall {
    /// Enqueues the call behind the cache's valid rows; [`KvCache::commit`] makes the new ones valid.
    ///
    /// # Errors
    /// `InvalidInput` when the cache has no room, `OutOfMemory` when too few of the pool's pages are free, `Device`.
    pub fn replay(&mut self) -> Result<()> {
        self.cache.reserve(&self.batch)?;
        let enqueued = self.enqueue();
        if enqueued.is_err() {
            self.cache.undo_reserve();
        }
        enqueued
    }

    /// [`CapturedCall::replay`] where the cache has the pages it needs.
    fn enqueue(&mut self) -> Result<()> {
        if let Some(rope) = &self.block.inner.spec.rope {
            let longest = self.batch.new_tokens().iter().zip(self.cache.lengths()).map(|(n, p)| n + p).max().unwrap_or(0);
            if rope.length_key(longest) != self.length_key {
                (self.plan, self.captured, self.length_key) =
                    self.block.record(&self.x, &self.batch, &mut self.cache, self.layer, &self.y)?;
            }
        }
        let Some(gpu) = self.block.inner.context.gpu() else { return Err(Error::invalid("a captured call needs its GPU")) };
        gpu.replay(&mut self.captured, self.batch.new_tokens(), self.cache.lengths())
    }

    /// Seconds of each of `times` replays in a row, by the device's own clock.
    ///
    /// # Errors
    /// As [`CapturedCall::replay`].
    pub fn replay_timed(&mut self, times: usize) -> Result<f64> {
        let context = self.block.inner.context.clone();
        let Some(gpu) = context.gpu() else { return Err(Error::invalid("a captured call needs its GPU")) };
        let start = gpu.device().record()?;
        (0..times).try_for_each(|_| self.replay())?;
        let end = gpu.device().record()?;
        gpu.device().synchronize()?;
        Ok(end.ms_since(&start)? * 1e-3 / times.max(1) as f64)
    }

    /// As [`CapturedCall::replay_timed`], of one replay that finds nothing of what it reads in the second-level cache.
    ///
    /// # Errors
    /// As [`CapturedCall::replay`].
    pub fn replay_cold(&mut self) -> Result<f64> {
        self.block.inner.context.flush_cache()?;
        self.replay_timed(1)
    }

    /// How the call is computed.
    pub fn plan(&self) -> &Arc<BlockPlan> {
        &self.plan
    }
    /// The same call without the graph; returns the seconds of each of its steps.
    ///
    /// # Errors
    /// As [`AttentionBlock::forward_timed`].
    pub fn forward_timed(&mut self) -> Result<(Arc<BlockPlan>, Vec<f64>)> {
        let (x, cache, y) = (self.x.as_ref(), self.cache.layer(self.layer), self.y.as_mut());
        self.block.forward_timed(Args { x, batch: &self.batch, mask: None, cache, y })
    }
    /// Overwrites the input, for the next replay; enqueued behind the last one.
    ///
    /// # Errors
    /// `InvalidInput` when shape or dtype differ or the tensor is not contiguous in host memory.
    pub fn write_x(&mut self, x: &TensorRef<'_>) -> Result<()> {
        self.x.write(x)
    }
    /// Output of the last replay.
    pub fn y(&self) -> &DeviceTensor {
        &self.y
    }
    /// Enqueues making every element of the output NaN.
    ///
    /// # Errors
    /// `Device` with the driver's word.
    pub fn poison_y(&mut self) -> Result<()> {
        self.y.poison()
    }
    /// As [`KvCache::commit`] with the call's batch.
    ///
    /// # Errors
    /// `InvalidInput` when the cache has no room.
    pub fn commit(&mut self) -> Result<()> {
        self.cache.commit(&self.batch)
    }
    /// As [`KvCache::truncate`].
    ///
    /// # Errors
    /// As there.
    pub fn truncate(&mut self, b: usize, len: usize) -> Result<()> {
        self.cache.truncate(b, len)
    }
    /// As [`KvCache::import`], into the call's layer.
    ///
    /// # Errors
    /// As there.
    pub fn import(&mut self, b: usize, rows: usize, k: &[f32], v: &[f32]) -> Result<()> {
        self.cache.import(self.layer, b, rows, k, v)
    }
    /// The cache. It and the tensors stay where the graph finds them.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }
    /// The cache, when the graph is no longer needed.
    pub fn into_cache(self) -> KvCache {
        let CapturedCall { captured, cache, .. } = self;
        // Waits for its replays.
        drop(captured);
        cache
    }
}

impl Inner {
    /// RoPE frequencies of a call whose longest sequence has `longest` rows after the append.
    fn frequencies(&self, longest: usize) -> Option<Arc<RopeFrequencies>> {
        let rope = self.spec.rope.as_ref()?;
        let key = rope.length_key(longest);
        let mut kept = lock(&self.frequencies);
        match &*kept {
            Some((length, f)) if *length == key => Some(Arc::clone(f)),
            _ => {
                let f = Arc::new(rope.frequencies(self.spec.attention.head_dim, longest));
                *kept = Some((key, Arc::clone(&f)));
                Some(f)
            }
        }
    }

    /// Enqueues the call, for whose new rows the cache has room. Host tensors go to the device and back, which waits; tensors on the device stay there.
    fn run_on_gpu(
        &self,
        plan: &BlockPlan,
        weights: &DeviceWeights,
        args: &mut Args<'_>,
        cache: Cache,
        frequencies: Option<&RopeFrequencies>,
        monitor: &mut dyn FnMut(usize, usize),
    ) -> Result<()> {
        let Some(gpu) = self.context.gpu() else { return Err(Error::invalid("a block on a GPU needs a context of it")) };
        let device = gpu.device();
        let bytes = args.batch.tokens() * self.spec.hidden_size * self.dtype.size();
        let (x, _x) = match args.x.storage() {
            Storage::Device(d) => (on_device("x", d.memory(), gpu, bytes)?, None),
            Storage::F32(s) => upload(device.upload(s)?),
            Storage::BF16(s) => upload(device.upload(s)?),
            Storage::F16(s) => upload(device.upload(s)?),
            _ => return Err(Error::invalid("x lies in memory that no GPU reads")),
        };
        let y_view = args.y.as_ref();
        let (y, result) = match y_view.storage() {
            Storage::Device(d) => (on_device("y", d.memory(), gpu, bytes)?, None),
            _ => upload(device.alloc(bytes)?),
        };
        // It goes back to the pool below, whose next user comes behind this call in the stream.
        let mask = args.mask.map(|m| Ok::<_, Error>((device.upload(m.data)?, m.rows()))).transpose()?;
        let operands = DeviceOperands {
            weights,
            x,
            y,
            lse: 0,
            new: args.batch.new_tokens(),
            past: args.cache.cache().lengths(),
            cache,
            mask: mask.as_ref().map(|(buffer, rows)| MaskAt {
                address: buffer.ptr(),
                sequence_stride: rows.sequence_stride as i64,
                head_stride: rows.head_stride as i64,
                row_stride: rows.row_stride as i64,
            }),
            frequencies,
        };
        let mut behind = |step: usize| {
            // A plan for a GPU has one stage.
            monitor(0, step);
            Ok(())
        };
        // SAFETY: every shape and dtype was checked by the caller, and that the memory is this device's and large enough here or by the cache; y and the
        // cache are borrowed mutably, and whoever reads or frees device memory goes through the device's stream.
        unsafe { gpu.run(plan, &operands, &mut behind)? };
        let Some(result) = result else { return Ok(()) };
        match args.y.storage_mut() {
            StorageMut::F32(s) => result.read(s),
            StorageMut::BF16(s) => result.read(s),
            StorageMut::F16(s) => result.read(s),
            _ => Ok(()),
        }
    }
}

fn upload(buffer: DeviceBuffer) -> (u64, Option<DeviceBuffer>) {
    (buffer.ptr(), Some(buffer))
}

/// The address of a tensor that the caller keeps on `gpu`.
pub(crate) fn on_device(name: &str, memory: &(dyn Any + Send + Sync), gpu: &Gpu, bytes: usize) -> Result<u64> {
    let Some(buffer) = memory.downcast_ref::<DeviceBuffer>() else {
        return Err(Error::invalid(format!("{name} lies in memory of another kind of device than the context's")));
    };
    if buffer.device().stream() != gpu.device().stream() || buffer.bytes() < bytes {
        return Err(Error::invalid(format!("{name} lies on another device or context than the call's, or is too short")));
    }
    Ok(buffer.ptr())
}

fn check_tensor(name: &str, t: &TensorRef<'_>, batch: &Batch, width: usize, dtype: DType, on_gpu: bool) -> Result<()> {
    let new = batch.new_tokens();
    let fits = match *t.shape() {
        [rows, e] => rows == batch.tokens() && e == width,
        [b, s, e] => b == new.len() && new.iter().all(|&n| n == s) && e == width,
        _ => false,
    };
    if !fits {
        return Err(Error::invalid(format!(
            "{name} has shape {:?}, needed [{}, {width}] or, for equal lengths, [{}, S, {width}]",
            t.shape(),
            batch.tokens(),
            new.len()
        )));
    }
    if t.dtype() != dtype {
        return Err(Error::invalid(format!("{name} is {}, the block computes in {dtype}", t.dtype())));
    }
    if !on_gpu && !t.storage().is_host() {
        return Err(Error::invalid(format!("{name} lies on a device, but the block is the CPU's")));
    }
    if !t.is_contiguous() {
        return Err(Error::invalid(format!("{name} must be contiguous, got strides {:?}", t.strides())));
    }
    Ok(())
}
