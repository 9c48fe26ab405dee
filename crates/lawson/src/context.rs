//! One device with its threads, workspace and plans.

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lawson_compiler::{Planner, Scratch};
use lawson_core::{
    DType, Error, ErrorKind, Result,
    kernel::{Backend, KernelInfo, MachineProfile},
    plan::BlockPlan,
    problem::{BlockProblem, BlockSpec, Lengths, Level, MaskShape},
};
use lawson_cpu::{Cpu, Isa, executor::Workspace, machine::Memory};

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
    pub cpu: Cpu,
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
        write!(f, "Context({}, {} threads)", self.isa(), self.threads())
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
        Self::new(ContextOptions::default())
    }

    /// A context as `options` say.
    ///
    /// # Errors
    /// As [`Context::cpu`]; `Unavailable` for a device that is missing; `InvalidInput` for a number of threads out of range.
    pub fn new(options: ContextOptions) -> Result<Self> {
        if let Device::Cuda(_) = options.device {
            let what = "this build has no CUDA backend; use --device cpu or auto";
            return Err(Error::new(ErrorKind::Unavailable, format!("device {}: {what}", options.device)));
        }
        let threads = options.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let cpu = Cpu::new(options.isa.map_or_else(Isa::choose, Ok)?, threads)?;
        let (kernels, machine) = (cpu.kernels(), cpu.profile());
        let workspace = Mutex::new(Workspace::new()?);
        Ok(Context(Arc::new(Inner { cpu, kernels, machine, workspace, plans: Mutex::new(Vec::new()) })))
    }

    /// The instruction set in use.
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
    /// The backend, for conformance.
    pub fn backend(&self) -> &dyn Backend {
        &self.0.cpu
    }
    /// Bytes of workspace held.
    pub fn workspace_bytes(&self) -> usize {
        lock(&self.0.workspace).bytes()
    }
    /// Waits until everything enqueued is done, and reports its failure. On a CPU calls return when they are done.
    ///
    /// # Errors
    /// `Device` when the device failed.
    pub fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// Operations per second of all threads on elements of `dtype`, measured: f32 FMA, or dot products where the instruction set has them for
    /// `dtype`.
    pub fn measure_peak(&self, dtype: DType) -> f64 {
        lawson_cpu::machine::measure_peak(&self.0.cpu.kernels, &self.0.cpu.threads, dtype)
    }
    /// Bytes per second that all threads read from memory, measured.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn measure_bandwidth(&self) -> Result<f64> {
        lawson_cpu::machine::measure_bandwidth(&self.0.cpu.kernels, &self.0.cpu.threads)
    }

    /// Seconds that all threads take to read `memory` once and do nothing else with it.
    pub fn read_loop(&self, memory: &[Memory<'_>]) -> f64 {
        lawson_cpu::machine::read_loop(&self.0.cpu.kernels, &self.0.cpu.threads, memory)
    }

    /// The plan of `problem` at `level`, or the planner's choice when `None`. Past lengths are rounded up in steps of 256 rows, so that
    /// a plan serves a growing cache.
    ///
    /// # Errors
    /// `InvalidInput` when the problem is not valid.
    pub fn plan(&self, problem: &BlockProblem, level: Option<Level>) -> Result<Arc<BlockPlan>> {
        let BlockProblem { spec, batch, mask, dtype, kv_dtype } = problem;
        let (new, past) = (batch.new_tokens(), batch.past());
        self.plan_call(&Call { spec, new, past, mask: *mask, dtype: *dtype, kv_dtype: *kv_dtype }, level)
    }

    /// As [`Context::plan`], without a problem of its own: allocates nothing when the plan is kept.
    pub(crate) fn plan_call(&self, call: &Call<'_>, level: Option<Level>) -> Result<Arc<BlockPlan>> {
        let kept = |k: &&Kept| k.level == level && call.fits(&k.plan.problem);
        if let Some(kept) = lock(&self.0.plans).iter().find(kept) {
            return Ok(Arc::clone(&kept.plan));
        }
        let past = call.past.iter().zip(call.new).map(|(&p, &n)| planned_past(p, n)).collect();
        let problem = BlockProblem {
            spec: call.spec.clone(),
            batch: Lengths::ragged(call.new.to_vec(), past)?,
            mask: call.mask,
            dtype: call.dtype,
            kv_dtype: call.kv_dtype,
        };
        let scratch = CpuScratch(&self.0.cpu);
        let planner = Planner { machine: &self.0.machine, kernels: &self.0.kernels, scratch: &scratch };
        let plan = Arc::new(match level {
            Some(level) => planner.plan(&problem, level)?,
            None => planner.auto(&problem)?,
        });
        let mut plans = lock(&self.0.plans);
        if plans.len() == KEPT_PLANS {
            plans.remove(0);
        }
        plans.push(Kept { level, plan: Arc::clone(&plan) });
        Ok(plan)
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
    pub kv_dtype: DType,
}

impl Call<'_> {
    fn fits(&self, p: &BlockProblem) -> bool {
        self.new == p.batch.new_tokens()
            && self.past.iter().zip(self.new).map(|(&p, &n)| planned_past(p, n)).eq(p.batch.past().iter().copied())
            && (self.mask, self.dtype, self.kv_dtype) == (p.mask, p.dtype, p.kv_dtype)
            && *self.spec == p.spec
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
}
