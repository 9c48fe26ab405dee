//! Runs plans on a GPU: kernels and products are chosen, compiled and planned once for each plan, then enqueued step by step.

mod addresses;
mod ready;

use std::{
    fmt::Display,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lawson_core::{
    Error, ErrorKind, Result,
    plan::{BlockPlan, Op},
    problem::RopeFrequencies,
};

use crate::{Device, DeviceBuffer, DiskCache, Graph, Jit, Staging, blas::Blas, kernels::cache::Cache, weights::DeviceWeights};
use addresses::Run;
use ready::{Ready, Sizes};

/// Most sequences whose lengths are sent in one piece at first; more grow the piece.
const LENGTHS: usize = 1024;
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
    /// The log-sum-exp of attention in tiles, [T, H] f32; 0 where it is not wanted.
    pub lse: u64,
    /// New tokens of each sequence: the plan's.
    pub new: &'a [usize],
    /// Past rows of each sequence: at most the plan's.
    pub past: &'a [usize],
    /// The cache, in pages where the plan's is: with pages of that size for all rows, the new ones too, in its table on the device.
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
pub(crate) struct State {
    workspace: Option<Arc<DeviceBuffer>>,
    /// Zeros between calls.
    counters: Option<Arc<DeviceBuffer>>,
    lengths: Option<Arc<Lengths>>,
    frequencies: Vec<(Vec<f64>, Arc<DeviceBuffer>)>,
    prepared: Vec<(u64, Cache, bool, Arc<[Ready]>)>,
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

fn missing(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the plan needs {what}, which the call does not have"))
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

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
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
    pub(crate) unsafe fn run_locked(
        &self,
        state: &mut State,
        plan: &BlockPlan,
        operands: &Operands<'_>,
        monitor: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let (id, layout, lse) = (plan.id(), Cache { k: 0, v: 0, table: 0, ..operands.cache }, operands.lse != 0);
        let ready = match state.prepared.iter().find(|p| (p.0, p.1, p.2) == (id, layout, lse)) {
            Some((.., ready)) => Arc::clone(ready),
            None => {
                let ready = self.prepare(plan, &layout, lse)?;
                if state.prepared.len() == KEPT {
                    state.prepared.remove(0);
                }
                state.prepared.push((id, layout, lse, Arc::clone(&ready)));
                ready
            }
        };
        let what = format_args!("{} at level {}", plan.problem, plan.level);
        let workspace = self.workspace(state, plan.workspace_bytes, &what)?;
        let sizes = Sizes::new(plan, &layout, lse, self.device.info().multiprocessors as usize);
        let counters = plan.steps().map(|s| if let Op::Attention(t) = &s.op { sizes.attention(t).counters() } else { 0 });
        let counters = counters.max().unwrap_or(0) * 4;
        if state.counters.as_ref().is_none_or(|c| c.bytes() < counters) {
            let buffer = self.device.alloc(counters)?;
            buffer.fill(0)?;
            state.counters = Some(Arc::new(buffer));
        }
        let (starts, past) = self.lengths(state, operands.new, operands.past)?;
        let frequencies = operands.frequencies.map_or(Ok(0), |f| state.frequencies(&self.device, &f.inverse))?;
        let counters = state.counters.as_ref().map_or(0, |b| b.ptr());
        let run = Run { plan, operands, sizes, workspace, counters, starts, past, frequencies };
        for (i, (step, ready)) in plan.steps().zip(ready.iter()).enumerate() {
            // SAFETY: the caller's; the plan's buffers fit the workspace reserved above.
            unsafe { run.step(&step.op, &step.writes, ready)? };
            monitor(i)?;
        }
        Ok(())
    }

    /// Where the shared workspace lies, once it has `bytes` bytes; `what` needs them.
    pub(crate) fn workspace(&self, state: &mut State, bytes: usize, what: &dyn Display) -> Result<u64> {
        if let Some(workspace) = state.workspace.as_ref().filter(|w| w.bytes() >= bytes) {
            return Ok(workspace.ptr());
        }
        // The old one goes first: both together may not fit.
        state.workspace = None;
        let workspace = Arc::new(self.device.alloc(bytes).map_err(|e| e.at(format!("the workspace of {what}")))?);
        let address = workspace.ptr();
        state.workspace = Some(workspace);
        Ok(address)
    }

    /// Makes the lengths on the device these: addresses of starts [B + 1] and past `[B]`.
    pub(crate) fn lengths(&self, state: &mut State, new: &[usize], past: &[usize]) -> Result<(u64, u64)> {
        let lengths = state.lengths(&self.device, new.len())?;
        lengths.send(new, past)?;
        let starts = lengths.buffer.ptr();
        Ok((starts, starts + 4 * (new.len() as u64 + 1)))
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

    pub(crate) fn frequencies(&mut self, device: &Device, inverse: &[f64]) -> Result<u64> {
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
