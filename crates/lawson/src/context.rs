//! One device with its threads, workspace and plans.

use std::{
    ffi::c_void,
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lawson_compiler::{Planner, Scratch};
use lawson_core::{
    CacheDType, DType, Error, ErrorKind, Result, WeightKind,
    kernel::{Backend, KernelInfo, MachineProfile},
    plan::BlockPlan,
    problem::{AttentionProblem, BlockProblem, BlockSpec, Lengths, Level, MaskShape},
};
use lawson_cpu::{Cpu, Isa, executor::Workspace, machine::Memory};
use lawson_cuda::Gpu;

/// Where blocks are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The best device of this machine.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU by its index.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let index = |n: &str| n.parse().ok().map(Device::Cuda);
        let found = match s {
            "auto" => Some(Device::Auto),
            "cpu" => Some(Device::Cpu),
            "cuda" => Some(Device::Cuda(0)),
            _ => s.strip_prefix("cuda:").and_then(index),
        };
        found.ok_or_else(|| Error::invalid(format!("unknown device '{s}'; accepted: auto, cpu, cuda, cuda:N")))
    }
}

/// How a [`Context`] is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct ContextOptions {
    /// Where blocks are computed.
    pub device: Device,
    /// CPU threads; as many as the process may use when `None`.
    pub threads: Option<usize>,
    /// Instruction set; the fastest of this processor, or what `LAWSON_ISA` names, when `None`.
    pub isa: Option<Isa>,
}

/// Most plans that a context keeps.
const KEPT_PLANS: usize = 64;
/// Past lengths are planned for in steps of this many rows, so that a growing cache keeps its plan.
const PAST_STEP: usize = 256;

struct Kept {
    level: Option<Level>,
    plan: Arc<BlockPlan>,
}

pub(crate) struct Inner {
    /// Computes where there is no GPU; prepares what goes to one.
    pub cpu: Cpu,
    pub gpu: Option<Gpu>,
    fallback: Option<String>,
    kernels: Vec<KernelInfo>,
    machine: MachineProfile,
    workspace: Mutex<Workspace>,
    plans: Mutex<Vec<Kept>>,
}

/// One device with its threads, workspace and plans; cheap to clone, usable from any thread. Calls on one context run one after
/// another.
#[derive(Clone)]
pub struct Context(pub(crate) Arc<Inner>);

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.gpu {
            Some(gpu) => write!(f, "Context({})", gpu.device().info()),
            None => write!(f, "Context({}, {} threads)", self.isa(), self.threads()),
        }
    }
}

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The past length that a call with `past` rows is planned for.
fn planned_past(past: usize, new: usize) -> usize {
    /// Most rows of a sequence that a problem may have.
    const MOST: usize = 1 << 24;
    past.checked_next_multiple_of(PAST_STEP).unwrap_or(past).min(MOST.saturating_sub(new)).max(past)
}

impl Context {
    /// The CPU with all threads of this process and its fastest instruction set.
    ///
    /// # Errors
    /// `InvalidInput` or `Unavailable` when `LAWSON_ISA` names what is unknown or missing; `Device` when no thread can be started.
    pub fn cpu() -> Result<Self> {
        Self::new(ContextOptions { device: Device::Cpu, ..ContextOptions::default() })
    }

    /// A context as `options` say.
    ///
    /// # Errors
    /// As [`Context::cpu`]; `Unavailable` for a device that is missing; `InvalidInput` for a number of threads out of range.
    pub fn new(options: ContextOptions) -> Result<Self> {
        Self::with(options, || match options.device {
            Device::Cpu => Ok((None, None)),
            Device::Cuda(n) => Ok((Some(open(n).map_err(|e| unavailable(e, options.device))?), None)),
            // An instruction set that is asked for is one of the CPU's.
            Device::Auto if options.isa.is_some() || std::env::var_os("LAWSON_ISA").is_some() => Ok((None, None)),
            Device::Auto => match open(0) {
                Ok(gpu) => Ok((Some(gpu), None)),
                Err(e) => Ok((None, Some(all_missing(e).to_string()))),
            },
        })
    }

    /// As [`Context::new`] on a GPU, whose work then goes through the caller's `stream`, a `CUstream` or `cudaStream_t` of its primary
    /// context: what the caller enqueues there before or behind a call is done before or behind it. The default stream (null) cannot be
    /// captured, so [`AttentionBlock::capture`](crate::AttentionBlock::capture) fails in it.
    ///
    /// # Errors
    /// As [`Context::new`]; `InvalidInput` when `options` do not name a GPU by its number, or the stream is not of that GPU's primary context.
    ///
    /// # Safety
    /// `stream` is null or a live stream, and stays so until the last clone of the context and everything made from it are gone. While
    /// [`AttentionBlock::capture`](crate::AttentionBlock::capture) runs nobody else enqueues work in it.
    pub unsafe fn with_cuda_stream(options: ContextOptions, stream: *mut c_void) -> Result<Self> {
        let Device::Cuda(n) = options.device else {
            return Err(Error::invalid(format!("a stream belongs to a GPU: device cuda:N, not {}", options.device)));
        };
        Self::with(options, || {
            // SAFETY: the caller's.
            let device = unsafe { lawson_cuda::Device::with_stream(n, stream) };
            Ok((Some(device.and_then(Gpu::new).map_err(|e| unavailable(e, options.device))?), None))
        })
    }

    /// A context with the GPU that `gpu` opens, or the reason why there is none.
    fn with(options: ContextOptions, gpu: impl FnOnce() -> Result<(Option<Gpu>, Option<String>)>) -> Result<Self> {
        let threads = options.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let cpu = Cpu::new(options.isa.map_or_else(Isa::choose, Ok)?, threads)?;
        let (gpu, fallback) = gpu()?;
        let (kernels, machine) = match &gpu {
            Some(gpu) => (gpu.kernels(), gpu.profile()),
            None => (cpu.kernels(), cpu.profile()),
        };
        let workspace = Mutex::new(Workspace::new()?);
        let plans = Mutex::new(Vec::new());
        Ok(Context(Arc::new(Inner { cpu, gpu, fallback, kernels, machine, workspace, plans })))
    }

    /// Where blocks are computed: `Cpu` or `Cuda`.
    pub fn device(&self) -> Device {
        self.0.gpu.as_ref().map_or(Device::Cpu, |gpu| Device::Cuda(gpu.device().info().ordinal))
    }
    /// Why [`Device::Auto`] took the CPU.
    pub fn fallback(&self) -> Option<&str> {
        self.0.fallback.as_deref()
    }
    /// The GPU of a context that has one.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.0.gpu.as_ref()
    }
    /// The CPU's instruction set in use.
    pub fn isa(&self) -> Isa {
        self.0.cpu.kernels.isa
    }
    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.0.cpu.threads.count()
    }
    /// What the planner knows of the machine.
    pub fn machine(&self) -> &MachineProfile {
        &self.0.machine
    }
    /// The CPU's kernels one by one, for conformance; a GPU's run inside blocks.
    pub fn backend(&self) -> &dyn Backend {
        &self.0.cpu
    }
    /// Bytes of workspace held.
    pub fn workspace_bytes(&self) -> usize {
        self.0.gpu.as_ref().map_or_else(|| lock(&self.0.workspace).bytes(), Gpu::workspace_bytes)
    }
    /// Waits until everything enqueued is done, and reports its failure. On a CPU calls return when they are done.
    ///
    /// # Errors
    /// `Device` when the device failed.
    pub fn synchronize(&self) -> Result<()> {
        self.0.gpu.as_ref().map_or(Ok(()), |gpu| gpu.device().synchronize())
    }

    /// Enqueues emptying a GPU's second-level cache of what calls before left there. On a CPU it does nothing.
    ///
    /// # Errors
    /// `OutOfMemory` or `Device` on a GPU.
    pub fn flush_cache(&self) -> Result<()> {
        self.0.gpu.as_ref().map_or(Ok(()), Gpu::flush_cache)
    }

    /// Operations per second on elements of `dtype`, measured: f32 FMA of all threads, or dot products where the instruction set has them for
    /// `dtype`; a large matrix product on a GPU.
    ///
    /// # Errors
    /// `OutOfMemory` or `Device` on a GPU.
    pub fn measure_peak(&self, dtype: DType) -> Result<f64> {
        match &self.0.gpu {
            Some(gpu) => gpu.measure_peak(dtype),
            None => Ok(lawson_cpu::machine::measure_peak(&self.0.cpu.kernels, &self.0.cpu.threads, dtype)),
        }
    }
    /// Operations per second on int8, measured on the CPU's vectors.
    pub fn measure_int8_peak(&self) -> f64 {
        lawson_cpu::machine::measure_int8_peak(&self.0.cpu.kernels, &self.0.cpu.threads)
    }
    /// Bytes per second from memory, measured: read by all threads; read and written by a large copy on a GPU.
    ///
    /// # Errors
    /// `OutOfMemory`, `Device`.
    pub fn measure_bandwidth(&self) -> Result<f64> {
        match &self.0.gpu {
            Some(gpu) => gpu.measure_bandwidth(),
            None => lawson_cpu::machine::measure_bandwidth(&self.0.cpu.kernels, &self.0.cpu.threads),
        }
    }

    /// Seconds that all threads take to read `memory` once and do nothing else with it.
    pub fn read_loop(&self, memory: &[Memory<'_>]) -> f64 {
        lawson_cpu::machine::read_loop(&self.0.cpu.kernels, &self.0.cpu.threads, memory)
    }

    /// The plan of `problem` at `level`, or the planner's choice when `None`. Past lengths are rounded up in steps of 256 rows, so that
    /// a plan serves a growing cache.
    ///
    /// # Errors
    /// `InvalidInput` when the problem is not valid; `Unavailable` for a paged cache on a CPU.
    pub fn plan(&self, problem: &BlockProblem, level: Option<Level>) -> Result<Arc<BlockPlan>> {
        let &BlockProblem { ref spec, ref batch, mask, dtype, weights, kv_dtype, page_size } = problem;
        let (new, past) = (batch.new_tokens(), batch.past());
        self.plan_call(&Call { spec, new, past, mask, dtype, weights, kv_dtype, page_size }, level)
    }

    /// As [`Context::plan`], without a problem of its own: allocates nothing when the plan is kept.
    pub(crate) fn plan_call(&self, call: &Call<'_>, level: Option<Level>) -> Result<Arc<BlockPlan>> {
        let kept = |k: &&Kept| k.level == level && call.fits(&k.plan.problem);
        if let Some(kept) = lock(&self.0.plans).iter().find(kept) {
            return Ok(Arc::clone(&kept.plan));
        }
        let past = call.past.iter().zip(call.new).map(|(&p, &n)| planned_past(p, n)).collect();
        let plan = self.make_plan(call, past, level)?;
        let mut plans = lock(&self.0.plans);
        if plans.len() == KEPT_PLANS {
            plans.remove(0);
        }
        plans.push(Kept { level, plan: Arc::clone(&plan) });
        Ok(plan)
    }

    /// A plan for exactly these lengths, which is not kept.
    pub(crate) fn plan_exactly(&self, call: &Call<'_>, level: Option<Level>) -> Result<Arc<BlockPlan>> {
        self.make_plan(call, call.past.to_vec(), level)
    }

    fn make_plan(&self, call: &Call<'_>, past: Vec<usize>, level: Option<Level>) -> Result<Arc<BlockPlan>> {
        let problem = BlockProblem {
            spec: call.spec.clone(),
            batch: Lengths::ragged(call.new.to_vec(), past)?,
            mask: call.mask,
            dtype: call.dtype,
            weights: call.weights,
            kv_dtype: call.kv_dtype,
            page_size: call.page_size,
        };
        let scratch: &dyn Scratch = if self.0.gpu.is_some() { &NoScratch } else { &CpuScratch(&self.0.cpu) };
        let planner = Planner { machine: &self.0.machine, kernels: &self.0.kernels, scratch };
        Ok(Arc::new(match level {
            Some(level) => planner.plan(&problem, level)?,
            None => planner.auto(&problem)?,
        }))
    }

    /// The plan of attention alone on a GPU, with q for x and the result for y; scores lie in memory at `Unfused` and `Minimal`. It is not kept.
    ///
    /// # Errors
    /// `Unavailable` on a CPU, `InvalidInput` when the problem is not valid.
    pub fn plan_attention(&self, problem: &AttentionProblem, level: Level) -> Result<BlockPlan> {
        if self.0.gpu.is_none() {
            return Err(Error::new(ErrorKind::Unavailable, "plans of attention alone are a GPU's"));
        }
        let AttentionProblem { spec, batch, mask, dtype, kv_dtype } = problem.clone();
        let block = BlockProblem { mask, kv_dtype, ..BlockProblem::new(BlockSpec::new(spec.q_dim(), spec), batch, dtype) };
        Planner { machine: &self.0.machine, kernels: &self.0.kernels, scratch: &NoScratch }.attention(&block, level)
    }

    pub(crate) fn kernels(&self) -> &[KernelInfo] {
        &self.0.kernels
    }

    pub(crate) fn workspace(&self) -> MutexGuard<'_, Workspace> {
        lock(&self.0.workspace)
    }
}

/// What a plan is looked up by.
pub(crate) struct Call<'a> {
    pub spec: &'a BlockSpec,
    pub new: &'a [usize],
    pub past: &'a [usize],
    pub mask: Option<MaskShape>,
    pub dtype: DType,
    pub weights: WeightKind,
    pub kv_dtype: CacheDType,
    pub page_size: Option<usize>,
}

impl Call<'_> {
    fn fits(&self, p: &BlockProblem) -> bool {
        self.new == p.batch.new_tokens()
            && self.past.iter().zip(self.new).map(|(&p, &n)| planned_past(p, n)).eq(p.batch.past().iter().copied())
            && (self.mask, self.dtype, self.weights) == (p.mask, p.dtype, p.weights)
            && (self.kv_dtype, self.page_size) == (p.kv_dtype, p.page_size)
            && *self.spec == p.spec
    }
}

/// What says that a library is missing, for each that is.
fn missing() -> Vec<String> {
    lawson_cuda::missing_libraries().iter().map(ToString::to_string).collect()
}

/// Names the device that cannot be had, and the way around it.
fn unavailable(e: Error, device: Device) -> Error {
    if e.kind() != ErrorKind::Unavailable {
        return e.at(format!("device {device}"));
    }
    let missing = missing();
    let why = if !lawson_cuda::has_driver() {
        "no GPU was found, as there is no NVIDIA driver (libcuda.so.1); `lawson devices` lists what a GPU needs".to_owned()
    } else if missing.contains(&e.to_string()) {
        // What follows the colon is where to get it.
        let what: Vec<&str> = missing.iter().filter_map(|text| text.split(':').next()).collect();
        format!("{}; `lawson devices` says where to get what is missing", what.join(" and "))
    } else {
        e.to_string()
    };
    Error::new(e.kind(), format!("device {device}: {why}; device cpu needs none of it"))
}

/// `e`, or every library that is missing where one of them is why.
fn all_missing(e: Error) -> Error {
    let missing = missing();
    if missing.contains(&e.to_string()) { Error::new(e.kind(), missing.join("; ")) } else { e }
}

/// Opens a GPU with all that kernels and products need.
fn open(ordinal: usize) -> Result<Gpu> {
    Gpu::new(lawson_cuda::Device::open(ordinal)?)
}

/// A GPU's kernels keep what they need in registers and shared memory.
struct NoScratch;

impl Scratch for NoScratch {
    fn gemm(&self, _: &BlockProblem, _: usize) -> usize {
        0
    }
    fn attention(&self, _: &BlockProblem, _: usize) -> usize {
        0
    }
    fn other(&self, _: &BlockProblem) -> usize {
        0
    }
    fn codes(&self, _: usize, _: usize) -> usize {
        0
    }
}

struct CpuScratch<'a>(&'a Cpu);

impl Scratch for CpuScratch<'_> {
    fn gemm(&self, problem: &BlockProblem, row_tile: usize) -> usize {
        self.0.gemm_scratch(problem, row_tile)
    }
    fn attention(&self, problem: &BlockProblem, query_tile: usize) -> usize {
        self.0.attention_scratch(&problem.spec.attention, problem.dtype, problem.kv_dtype, query_tile)
    }
    fn other(&self, problem: &BlockProblem) -> usize {
        self.0.other_scratch(problem)
    }
    fn codes(&self, rows: usize, width: usize) -> usize {
        self.0.codes_bytes(rows, width)
    }
}
