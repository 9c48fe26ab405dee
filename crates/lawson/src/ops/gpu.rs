//! The operators on a GPU: what they are checked for, then the addresses that the backend's operators take.

use lawson_core::{
    DType, Error, ErrorKind, Result, Storage, StorageMut, TensorMut, TensorRef,
    problem::{AttentionProblem, Level, RopeLayout, RopeSpec},
};
use lawson_cuda::{
    DeviceBuffer, Gpu,
    blas::{Matmul, Operands as Matrices},
    executor::{MaskAt, Operands},
    kernels::{cache::Cache, heads, passes},
    operators::{Operator, Positions, Replays, SoftmaxWay},
    weights::DeviceWeights,
};

use super::{AttentionArgs, QkvWeights, RopeMethod, SoftmaxMethod, check_attention, check_rope, check_softmax, shape_error};
use crate::{Batch, Context, LayerCache, block::on_device};

/// What [`rope_append`] takes.
pub struct RopeAppendArgs<'a> {
    /// Queries, keys and values side by side, `[T, (H + 2G)·D]`.
    pub qkv: TensorRef<'a>,
    /// New tokens of each sequence.
    pub batch: &'a Batch,
    /// How q and k turn.
    pub spec: &'a RopeSpec,
    /// The turned queries, `[T, H, D]`, in the dtype of `qkv`.
    pub q: TensorMut<'a>,
    /// Where turned keys and values are appended; `commit` of the cache makes them valid.
    pub cache: LayerCache<'a>,
}

/// A call of an operator, for [`replay_timed`].
pub enum Operation<'a> {
    /// [`attention()`](super::attention()) at a level: scores in memory at `Unfused` and `Minimal`, in tiles at the others.
    Attention(Box<AttentionArgs<'a>>, Level),
    /// [`rope()`](super::rope()), from `x` to `out`, of the same shape and dtype.
    Rope {
        /// `[T, H, D]`.
        x: TensorRef<'a>,
        /// `[T, H, D]`.
        out: TensorMut<'a>,
        /// `[T]`.
        positions: &'a [usize],
        /// How it turns.
        spec: &'a RopeSpec,
        /// In which way.
        method: RopeMethod,
    },
    /// [`rope_append`].
    RopeAppend(RopeAppendArgs<'a>),
    /// [`softmax()`](super::softmax()).
    Softmax {
        /// `[rows, width]` f32.
        x: TensorRef<'a>,
        /// `[rows, width]` f32.
        out: TensorMut<'a>,
        /// In which way.
        method: SoftmaxMethod,
    },
    /// [`qkv_projection()`](super::qkv_projection()) with q, k and v side by side.
    QkvProjection {
        /// `[T, E]`.
        x: TensorRef<'a>,
        /// The weights.
        weights: &'a QkvWeights,
        /// `[T, (H + 2G)·D]`.
        out: TensorMut<'a>,
        /// Whether it is one product.
        fused: bool,
    },
}

/// Seconds of a replay of the call as a CUDA graph, by the device's own clock: the mean of several.
///
/// # Errors
/// `Unavailable` on a CPU; else as the operator.
pub fn replay_timed(context: &Context, operation: Operation<'_>, replays: Replays) -> Result<f64> {
    let gpu = gpu_of(context, "a graph")?;
    let replays = Some(replays);
    match operation {
        Operation::Attention(args, level) => {
            let problem = check_attention(&args)?;
            attention(context, gpu, *args, problem, level, replays)
        }
        Operation::Rope { x, mut out, positions, spec, method } => {
            if out.shape() != x.shape() || out.dtype() != x.dtype() || !x.is_contiguous() {
                return Err(shape_error(
                    "out",
                    &out.as_ref(),
                    &format!("that of x, contiguous {:?} in {}", x.shape(), x.dtype()),
                ));
            }
            rope(gpu, &x, &mut out, positions, (spec, method), replays)
        }
        Operation::RopeAppend(args) => append(context, gpu, args, replays),
        Operation::Softmax { x, mut out, method } => {
            check_softmax(&x, &out, method)?;
            softmax(gpu, &x, &mut out, method, replays)
        }
        Operation::QkvProjection { x, weights, mut out, fused } => {
            let w = weights.on_gpu(gpu)?;
            let tokens = w.check_x(&x)?;
            let n: usize = w.widths.iter().sum();
            if out.shape() != [tokens, n] || out.dtype() != w.dtype {
                return Err(shape_error("out", &out.as_ref(), &format!("[{tokens}, {n}] in {}", w.dtype)));
            }
            let (x, to) = (Input::new(gpu, "x", &x)?, Output::new(gpu, "out", &mut out)?);
            let products: Vec<_> = if fused {
                let whole = Matmul::projection(tokens, n, w.k, w.dtype);
                let alignment = whole.alignment.min(1 << (x.address | to.address).trailing_zeros());
                vec![(Matmul { alignment, ..whole }, Matrices::new(x.address, w.buffer.ptr(), to.address))]
            } else {
                (0..3)
                    .map(|part| w.product(part, tokens, n, x.address, to.address + w.first(part) * w.dtype.size() as u64))
                    .collect()
            };
            // SAFETY: x, the weights and the result have the shapes and dtypes that were checked above.
            let seconds = unsafe { run(gpu, &Operator::Products(&products), replays)? };
            to.finish(&mut out)?;
            Ok(seconds)
        }
    }
}

/// RoPE of q and k, and the append of k and v to the cache, in one pass over what the QKV projection wrote.
///
/// # Errors
/// `Unavailable` on a CPU, where it is part of a block alone; `InvalidInput` when a shape or dtype does not fit or the cache has no room;
/// `OutOfMemory` when its pool has too few free pages.
pub fn rope_append(context: &Context, args: RopeAppendArgs<'_>) -> Result<()> {
    append(context, gpu_of(context, "RoPE with the append by itself")?, args, None).map(drop)
}

fn gpu_of<'a>(context: &'a Context, what: &str) -> Result<&'a Gpu> {
    context.gpu().ok_or_else(|| Error::new(ErrorKind::Unavailable, format!("{what} needs a context of a GPU")))
}

/// Enqueues `operator`, or times its replays.
///
/// # Safety
/// As [`Gpu::enqueue`].
unsafe fn run(gpu: &Gpu, operator: &Operator<'_>, replays: Option<Replays>) -> Result<f64> {
    // SAFETY: the caller's.
    unsafe {
        match replays {
            Some(replays) => gpu.replay_timed(operator, replays),
            None => gpu.enqueue(operator).map(|()| 0.0),
        }
    }
}

/// A tensor that an operator reads, on the device.
struct Input {
    address: u64,
    /// Goes back to the pool, whose next user comes behind the operator in the stream.
    _copy: Option<DeviceBuffer>,
}

impl Input {
    fn new(gpu: &Gpu, name: &str, t: &TensorRef<'_>) -> Result<Self> {
        let copy = match t.storage() {
            Storage::Device(d) => {
                let address = on_device(name, d.memory(), gpu, t.storage().len() * t.dtype().size())?;
                return Ok(Input { address, _copy: None });
            }
            Storage::F32(s) => gpu.device().upload(s)?,
            Storage::BF16(s) => gpu.device().upload(s)?,
            Storage::F16(s) => gpu.device().upload(s)?,
            _ => return Err(Error::invalid(format!("{name} lies in memory that no GPU reads"))),
        };
        Ok(Input { address: copy.ptr(), _copy: Some(copy) })
    }
}

/// A tensor that an operator writes.
struct Output {
    address: u64,
    /// Where the tensor itself lies on the host.
    result: Option<DeviceBuffer>,
}

impl Output {
    fn new(gpu: &Gpu, name: &str, t: &mut TensorMut<'_>) -> Result<Self> {
        let view = t.as_ref();
        let bytes = view.storage().len() * view.dtype().size();
        match view.storage() {
            Storage::Device(d) => Ok(Output { address: on_device(name, d.memory(), gpu, bytes)?, result: None }),
            _ => {
                let buffer = gpu.device().alloc(bytes)?;
                Ok(Output { address: buffer.ptr(), result: Some(buffer) })
            }
        }
    }

    fn finish(self, t: &mut TensorMut<'_>) -> Result<()> {
        let Some(result) = self.result else { return Ok(()) };
        match t.storage_mut() {
            StorageMut::F32(s) => result.read(s),
            StorageMut::BF16(s) => result.read(s),
            StorageMut::F16(s) => result.read(s),
            _ => Ok(()),
        }
    }
}

/// Most blocks along the second dimension of a grid, and the least that anything here has along it is a head.
const MOST_HEADS: usize = 65_535;

/// Attention of checked arguments; seconds of each replay where `replays` asks for them.
pub(super) fn attention(
    context: &Context,
    gpu: &Gpu,
    mut args: AttentionArgs<'_>,
    problem: AttentionProblem,
    level: Level,
    replays: Option<Replays>,
) -> Result<f64> {
    if args.lse.is_some() && level <= Level::Minimal {
        return Err(Error::invalid(format!("the log-sum-exp comes from attention in tiles, not at level {level}")));
    }
    let (a, strides) = (&problem.spec, args.k.strides());
    if level <= Level::Minimal && strides[0] != a.kv_heads * strides[1] && args.lengths.sequences() > 1 {
        return Err(shape_error(
            "k",
            &args.k,
            "heads of all sequences at equal distances, as scores in memory are a batch of products",
        ));
    }
    if args.lengths.tokens() == 0 {
        return Ok(0.0);
    }
    let plan = context.plan_attention(&problem, level)?;
    let device = gpu.device();
    let weights = DeviceWeights::of_attention(device, args.sinks, args.slopes)?;
    let mask = args.mask.map(|m| Ok::<_, Error>((device.upload(m.data())?, m.rows()))).transpose()?;
    let (q, k, v) = (Input::new(gpu, "q", &args.q)?, Input::new(gpu, "k", &args.k)?, Input::new(gpu, "v", &args.v)?);
    let out = Output::new(gpu, "out", &mut args.out)?;
    let lse = args.lse.as_mut().map(|t| Output::new(gpu, "lse", t)).transpose()?;
    let operands = Operands {
        weights: &weights,
        x: q.address,
        y: out.address,
        lse: lse.as_ref().map_or(0, |lse| lse.address),
        new: args.lengths.new_tokens(),
        past: args.lengths.past(),
        cache: Cache {
            k: k.address,
            v: v.address,
            sequence_stride: strides[0] as i64,
            head_stride: strides[1] as i64,
            row_stride: strides[2] as i64,
            page: args.k.shape()[2] as i32,
            ..Cache::default()
        },
        mask: mask.as_ref().map(|(buffer, rows)| MaskAt {
            address: buffer.ptr(),
            sequence_stride: rows.sequence_stride as i64,
            head_stride: rows.head_stride as i64,
            row_stride: rows.row_stride as i64,
        }),
        frequencies: None,
    };
    // SAFETY: `check_attention` checked every shape, stride and dtype, and that the memory is this device's and large enough was checked above; what was
    // uploaded goes back to the pool, whose next user comes behind this call in the stream.
    let seconds = unsafe { run(gpu, &Operator::Attention(&plan, operands), replays)? };
    out.finish(&mut args.out)?;
    if let (Some(lse), Some(to)) = (lse, &mut args.lse) {
        lse.finish(to)?;
    }
    Ok(seconds)
}

/// The new tokens and past rows of sequences whose tokens have these positions: each run of positions that grow by one is a sequence.
fn sequences(positions: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let (mut new, mut past): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    for (i, &p) in positions.iter().enumerate() {
        match new.last_mut() {
            Some(n) if positions[i - 1] + 1 == p => *n += 1,
            _ => {
                new.push(1);
                past.push(p);
            }
        }
    }
    (new, past)
}

fn heads_shape(dtype: DType, kv: DType, spec: &RopeSpec, d: usize, heads: [usize; 3], tokens: usize) -> Result<heads::Shape> {
    if heads.iter().sum::<usize>() > MOST_HEADS || tokens > i32::MAX as usize {
        return Err(Error::invalid(format!("{tokens} tokens of {heads:?} heads are more than a GPU's grid has")));
    }
    let (rotary_dim, interleaved) = (spec.rotary_dim(d), spec.layout == RopeLayout::Interleaved);
    Ok(heads::Shape { from: dtype, to: dtype, kv, head_dim: d, rotary_dim, interleaved, heads, tokens, multiprocessors: 1 })
}

/// RoPE of x `[T, H, D]` at one address into another, which may be the same.
struct Turn<'a> {
    from: u64,
    to: u64,
    x: TensorRef<'a>,
    positions: &'a [usize],
    spec: &'a RopeSpec,
    method: RopeMethod,
}

impl Turn<'_> {
    fn run(&self, gpu: &Gpu, replays: Option<Replays>) -> Result<f64> {
        let dtype = self.x.dtype();
        let ([tokens, h, d], longest) = check_rope(&self.x, self.positions, self.spec, false)?;
        if tokens == 0 || h == 0 || d == 0 {
            return Ok(0.0);
        }
        let (new, past) = sequences(self.positions);
        let frequencies = self.spec.frequencies(d, longest);
        let positions = Positions { new: &new, past: &past, frequencies: &frequencies };
        let shape = heads_shape(dtype, dtype, self.spec, d, [h, 0, 0], tokens)?;
        let stride = (h * d) as i64;
        // The kernel takes a head to be of k or v, and looks for the cache, only where there are such heads.
        let heads = heads::Params {
            q: self.from,
            q_out: self.to,
            k_out: self.to,
            v_out: self.to,
            q_stride: stride,
            q_out_stride: stride,
            ..heads::Params::default()
        };
        let operator = match self.method {
            RopeMethod::Fused => Operator::Heads(shape, &heads, positions),
            RopeMethod::TwoPass => {
                let params = passes::RopeParams { x: self.from, y: self.to, ..passes::RopeParams::default() };
                Operator::RopeTwoPass(shape, params, positions)
            }
        };
        // SAFETY: both addresses are of [T, H, D] elements of `dtype` on this device, contiguous, as the caller of this private type checked.
        unsafe { run(gpu, &operator, replays) }
    }
}

/// [`rope`] over x itself.
pub(super) fn rope_in_place(
    gpu: &Gpu,
    x: &mut TensorMut<'_>,
    positions: &[usize],
    spec: &RopeSpec,
    method: RopeMethod,
) -> Result<()> {
    let from = Input::new(gpu, "x", &x.as_ref())?;
    let to = Output::new(gpu, "x", x)?;
    Turn { from: from.address, to: to.address, x: x.as_ref(), positions, spec, method }.run(gpu, None)?;
    to.finish(x)
}

fn rope(
    gpu: &Gpu,
    x: &TensorRef<'_>,
    out: &mut TensorMut<'_>,
    positions: &[usize],
    (spec, method): (&RopeSpec, RopeMethod),
    replays: Option<Replays>,
) -> Result<f64> {
    let (from, to) = (Input::new(gpu, "x", x)?, Output::new(gpu, "out", out)?);
    let seconds = Turn { from: from.address, to: to.address, x: *x, positions, spec, method }.run(gpu, replays)?;
    to.finish(out)?;
    Ok(seconds)
}

fn append(context: &Context, gpu: &Gpu, mut args: RopeAppendArgs<'_>, replays: Option<Replays>) -> Result<f64> {
    let (cache, tokens, dtype) = (args.cache.cache(), args.batch.tokens(), args.qkv.dtype());
    let (g, d, kv_dtype) = (cache.kv_heads(), cache.head_dim(), cache.dtype().on_gpu()?);
    let &[t, h, qd] = args.q.shape() else { return Err(shape_error("q", &args.q.as_ref(), "[T, H, D]")) };
    if (t, qd) != (tokens, d) || args.q.dtype() != dtype {
        return Err(shape_error("q", &args.q.as_ref(), &format!("[{tokens}, H, {d}] in {dtype}")));
    }
    let width = (h + 2 * g) * d;
    if args.qkv.shape() != [tokens, width] || !args.qkv.is_contiguous() {
        return Err(shape_error("qkv", &args.qkv, &format!("contiguous [{tokens}, {width}]")));
    }
    args.spec.validate(d)?;
    cache.check(args.batch)?;
    if tokens == 0 {
        return Ok(0.0);
    }
    let (new, past) = (args.batch.new_tokens(), cache.lengths().to_vec());
    let longest = new.iter().zip(&past).map(|(n, p)| n + p).max().unwrap_or(0);
    let frequencies = args.spec.frequencies(d, longest);
    let shape = heads_shape(dtype, kv_dtype, args.spec, d, [h, g, g], tokens)?;
    let (qkv, q) = (Input::new(gpu, "qkv", &args.qkv)?, Output::new(gpu, "q", &mut args.q)?);
    let at = |heads: usize| qkv.address + (heads * d * dtype.size()) as u64;
    let stride = width as i64;
    let params = heads::Params {
        cache: args.cache.device_rows(context)?,
        q: at(0),
        k: at(h),
        v: at(h + g),
        q_out: q.address,
        q_stride: stride,
        k_stride: stride,
        v_stride: stride,
        q_out_stride: (h * d) as i64,
        ..heads::Params::default()
    };
    let positions = Positions { new, past: &past, frequencies: &frequencies };
    args.cache.reserve(args.batch)?;
    // SAFETY: shapes and dtypes were checked above, and the cache has room, and pages, for all rows; `args` borrows q and the cache mutably.
    let ran = unsafe { run(gpu, &Operator::Heads(shape, &params, positions), replays) };
    if ran.is_err() {
        args.cache.undo_reserve();
    }
    let seconds = ran?;
    q.finish(&mut args.q)?;
    Ok(seconds)
}

/// Softmax of checked arguments.
pub(super) fn softmax(
    gpu: &Gpu,
    x: &TensorRef<'_>,
    out: &mut TensorMut<'_>,
    method: SoftmaxMethod,
    replays: Option<Replays>,
) -> Result<f64> {
    let (rows, width) = (x.shape()[0], x.shape()[1]);
    if rows > i32::MAX as usize || width > i32::MAX as usize {
        return Err(Error::invalid(format!("{rows} rows of {width} elements are more than a GPU's grid has")));
    }
    if rows == 0 || width == 0 {
        return Ok(0.0);
    }
    let (from, to) = (Input::new(gpu, "x", x)?, Output::new(gpu, "out", out)?);
    let way = match method {
        SoftmaxMethod::Fused => SoftmaxWay::Fused,
        SoftmaxMethod::ThreePass => SoftmaxWay::ThreePass,
        SoftmaxMethod::Online(_) => SoftmaxWay::Online,
    };
    // SAFETY: both are contiguous [rows, width] f32 on this device.
    let seconds = unsafe { run(gpu, &Operator::Softmax { x: from.address, y: to.address, rows, width, way }, replays)? };
    to.finish(out)?;
    Ok(seconds)
}

/// Weights of q, k and v, one below the other.
pub(super) struct DeviceQkv {
    buffer: DeviceBuffer,
    dtype: DType,
    /// Outputs of q, k and v.
    widths: [usize; 3],
    /// Inputs.
    k: usize,
}

impl DeviceQkv {
    /// Uploads contiguous matrices of equal width, rounded to `dtype`.
    pub(super) fn new(gpu: &Gpu, parts: [(&str, &TensorRef<'_>); 3], dtype: DType) -> Result<Self> {
        for (name, w) in parts {
            if w.shape().len() != 2 || w.shape().contains(&0) || !w.is_contiguous() || !w.storage().is_host() {
                return Err(shape_error(name, w, "a contiguous matrix in host memory"));
            }
        }
        let (widths, inputs) = (parts.map(|(_, w)| w.shape()[0]), parts.map(|(_, w)| w.shape()[1]));
        if inputs != [inputs[0]; 3] {
            return Err(Error::invalid(format!("the weights of q, k and v have different widths {inputs:?}")));
        }
        let buffer = gpu.device().alloc(widths.iter().sum::<usize>() * inputs[0] * dtype.size())?;
        let mut offset = 0;
        for (_, w) in parts {
            let bytes = lawson_cuda::weights::encode(&w.to_f32(), dtype);
            buffer.write_at(offset, &bytes)?;
            offset += bytes.len();
        }
        Ok(DeviceQkv { buffer, dtype, widths, k: inputs[0] })
    }

    pub(super) fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    pub(super) fn here(&self, gpu: &Gpu) -> bool {
        self.buffer.device().stream() == gpu.device().stream()
    }

    /// T of x `[T, E]`.
    fn check_x(&self, x: &TensorRef<'_>) -> Result<usize> {
        match *x.shape() {
            [tokens, k] if tokens > 0 && k == self.k && x.is_contiguous() && x.dtype() == self.dtype => Ok(tokens),
            _ => Err(shape_error("x", x, &format!("contiguous [T, {}] in {} with T at least 1", self.k, self.dtype))),
        }
    }

    /// First row of a part.
    fn first(&self, part: usize) -> u64 {
        self.widths[..part].iter().sum::<usize>() as u64
    }

    /// x · W of a part, written to `d` in rows of `ldd` elements.
    fn product(&self, part: usize, tokens: usize, ldd: usize, x: u64, d: u64) -> (Matmul, Matrices) {
        let size = self.dtype.size();
        let w = self.buffer.ptr() + self.first(part) * (self.k * size) as u64;
        let steps = [w as usize, d as usize, x as usize, self.k * size, ldd * size];
        let alignment = 1 << steps.iter().fold(4, |bits, s| bits.min(s.trailing_zeros()));
        (
            Matmul { ldd, ldc: ldd, alignment, ..Matmul::projection(tokens, self.widths[part], self.k, self.dtype) },
            Matrices::new(x, w, d),
        )
    }

    /// The three projections into tensors of their own.
    pub(super) fn project(&self, gpu: &Gpu, x: &TensorRef<'_>, mut out: [&mut TensorMut<'_>; 3]) -> Result<()> {
        let tokens = self.check_x(x)?;
        for ((name, to), &n) in ["q", "k", "v"].into_iter().zip(&out).zip(&self.widths) {
            if to.shape() != [tokens, n] || ![self.dtype, DType::F32].contains(&to.dtype()) {
                return Err(shape_error(name, &to.as_ref(), &format!("[{tokens}, {n}] in {} or f32", self.dtype)));
            }
        }
        let x = Input::new(gpu, "x", x)?;
        let [q, k, v] = &mut out;
        let to = [Output::new(gpu, "q", q)?, Output::new(gpu, "k", k)?, Output::new(gpu, "v", v)?];
        let products = [0, 1, 2].map(|part| {
            let (product, matrices) = self.product(part, tokens, self.widths[part], x.address, to[part].address);
            (Matmul { out: out[part].dtype(), ..product }, matrices)
        });
        // SAFETY: x, the weights and the results have the shapes and dtypes that were checked above.
        unsafe { gpu.enqueue(&Operator::Products(&products))? };
        to.into_iter().zip(out).try_for_each(|(to, out)| to.finish(out))
    }
}

#[cfg(test)]
mod tests {
    use super::sequences;

    #[test]
    fn positions_that_grow_by_one_are_a_sequence() {
        assert_eq!(sequences(&[0, 1, 2, 0, 1, 9, 8]), (vec![3, 2, 1, 1], vec![0, 0, 9, 8]));
        assert_eq!(sequences(&[]), (vec![], vec![]));
    }
}
