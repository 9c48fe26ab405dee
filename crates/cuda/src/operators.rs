//! Operators alone, with the kernels, products and memory of the executor: enqueued once, or kept as a graph whose replays are timed.

use std::fmt::Display;

use lawson_core::{Result, plan::BlockPlan, problem::RopeFrequencies};

use crate::{
    Gpu, Graph,
    blas::{Matmul, Operands as Matrices},
    executor::{Operands, State},
    kernels::{
        heads::{self, HeadsPass},
        passes::{self, RopePasses, SoftmaxPasses},
        rows::{self, Softmax},
    },
};

/// Positions of tokens: those of sequence b are past\[b\], past\[b\] + 1 …, `new[b]` of them.
#[derive(Clone, Copy, Debug)]
pub struct Positions<'a> {
    /// New tokens of each sequence.
    pub new: &'a [usize],
    /// Past rows of each sequence.
    pub past: &'a [usize],
    /// Of the pairs that turn.
    pub frequencies: &'a RopeFrequencies,
}

impl Positions<'_> {
    /// New tokens of each sequence when all have as many, else 0.
    fn uniform(&self) -> i32 {
        let first = self.new.first().copied().unwrap_or(0);
        if self.new.iter().all(|&n| n == first) { first as i32 } else { 0 }
    }
}

/// Replays of a graph that are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replays {
    /// So many in a row: what the second-level cache holds, they find there.
    Warm(usize),
    /// So many, each behind the emptying of the second-level cache, which is not timed.
    Cold(usize),
}

/// How softmax goes over its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftmaxWay {
    /// A row stays in registers where it fits.
    Fused,
    /// Maximum, exponential with the sum, and division, each through memory.
    ThreePass,
    /// Maximum and sum online, then a second reading.
    Online,
}

/// An operator with its addresses on the device.
pub enum Operator<'a> {
    /// Attention alone, planned by `Planner::attention`.
    Attention(&'a BlockPlan, Operands<'a>),
    /// A pass over heads. Lengths, sequences and frequencies are filled in.
    Heads(heads::Shape, &'a heads::Params, Positions<'a>),
    /// RoPE of the first heads of the shape in two passes, from x to y. The copy between them, lengths, sequences and frequencies are filled in.
    RopeTwoPass(heads::Shape, passes::RopeParams, Positions<'a>),
    /// Softmax of contiguous f32 rows.
    Softmax {
        /// [rows, width].
        x: u64,
        /// [rows, width].
        y: u64,
        /// How many.
        rows: usize,
        /// Their elements.
        width: usize,
        /// In which way.
        way: SoftmaxWay,
    },
    /// Products, one after another.
    Products(&'a [(Matmul, Matrices)]),
}

impl Display for Operator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Operator::Attention(plan, _) => write!(f, "{}", plan.problem.attention()),
            Operator::Heads(s, ..) | Operator::RopeTwoPass(s, ..) => {
                write!(f, "RoPE of {} tokens of {:?} heads of {} {}", s.tokens, s.heads, s.head_dim, s.to)
            }
            Operator::Softmax { rows, width, way, .. } => write!(f, "softmax of {rows} rows of {width}, {way:?}"),
            Operator::Products(all) => all.iter().try_for_each(|(product, _)| write!(f, "{product} ")),
        }
    }
}

impl Gpu {
    /// Enqueues an operator.
    ///
    /// # Errors
    /// `OutOfMemory` and `InvalidInput` before anything is enqueued; `Device` with kernel, problem and the driver's word.
    ///
    /// # Safety
    /// The addresses are of memory of this device of the operator's shapes and dtypes, alive until the work enqueued now is done; nothing else uses
    /// what it writes except through the device's stream.
    pub unsafe fn enqueue(&self, operator: &Operator<'_>) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.enqueue_locked(&mut self.state(), operator) }
    }

    /// Enqueues an operator, keeps it as a graph and gives the mean seconds of its `replays`, by the device's own clock.
    ///
    /// # Errors
    /// As [`Gpu::enqueue`].
    ///
    /// # Safety
    /// As [`Gpu::enqueue`].
    pub unsafe fn replay_timed(&self, operator: &Operator<'_>, replays: Replays) -> Result<f64> {
        let state = &mut *self.state();
        // Compiles, plans, reserves and sends all that the graph then finds there.
        // SAFETY: the caller's.
        unsafe { self.enqueue_locked(state, operator)? };
        // SAFETY: the caller's; the graph goes before anything that it uses, as its drop waits for its last replay and the state stays locked.
        let mut graph = unsafe { Graph::capture(self.device(), || self.enqueue_locked(state, operator))? };
        // A graph's first launch takes longer.
        graph.replay()?;
        let mut timed = |times: usize| {
            let start = self.device().record()?;
            (0..times).try_for_each(|_| graph.replay())?;
            Ok((start, self.device().record()?))
        };
        let (laps, times) = match replays {
            Replays::Warm(times) => (vec![timed(times)?], times),
            Replays::Cold(times) => {
                let lap = |_| {
                    self.flush_cache()?;
                    timed(1)
                };
                ((0..times).map(lap).collect::<Result<Vec<_>>>()?, times)
            }
        };
        self.device().synchronize()?;
        let ms = laps.iter().map(|(start, end)| end.ms_since(start)).sum::<Result<f64>>()?;
        Ok(ms * 1e-3 / times.max(1) as f64)
    }

    /// Enqueues overwriting memory of twice the second-level cache, which then holds nothing that was there.
    ///
    /// # Errors
    /// `OutOfMemory`, `Device`.
    pub fn flush_cache(&self) -> Result<()> {
        self.device().alloc(2 * self.device().info().l2_bytes as usize)?.fill(0)
    }

    unsafe fn enqueue_locked(&self, state: &mut State, operator: &Operator<'_>) -> Result<()> {
        let multiprocessors = self.device().info().multiprocessors as usize;
        match operator {
            Operator::Attention(plan, operands) => {
                // SAFETY: the caller's.
                unsafe { self.run_locked(state, plan, operands, &mut |_| Ok(())) }
            }
            Operator::Heads(shape, params, positions) => {
                let modules = self.jit().load(&[shape.instance()])?;
                let (starts, past, frequencies) = self.send(state, positions)?;
                let params = heads::Params {
                    starts,
                    past,
                    frequencies,
                    sequences: positions.new.len() as i32,
                    uniform: positions.uniform(),
                    attention_factor: positions.frequencies.attention_factor as f32,
                    ..**params
                };
                let pass = HeadsPass::new(&modules[0], heads::Shape { multiprocessors, ..*shape })?;
                // SAFETY: the caller's; the lengths and frequencies were sent above.
                unsafe { pass.run(params, operator) }
            }
            Operator::RopeTwoPass(shape, params, positions) => {
                let modules = self.jit().load(&[RopePasses::instance(shape)])?;
                let (starts, past, frequencies) = self.send(state, positions)?;
                let params = passes::RopeParams {
                    partner: self.workspace(state, RopePasses::partner_bytes(shape), operator)?,
                    starts,
                    past,
                    frequencies,
                    sequences: positions.new.len() as i32,
                    uniform: positions.uniform(),
                    attention_factor: positions.frequencies.attention_factor as f32,
                    ..*params
                };
                // SAFETY: the caller's; the lengths and frequencies were sent above, the workspace has room for the copy.
                unsafe { RopePasses::new(&modules[0], *shape)?.run(params, operator) }
            }
            &Operator::Softmax { x, y, rows, width, way: SoftmaxWay::ThreePass } => {
                let modules = self.jit().load(&[SoftmaxPasses::instance(width)])?;
                let row_max = self.workspace(state, 8 * rows, operator)?;
                let row_sum = row_max + 4 * rows as u64;
                let params = passes::SoftmaxParams { x, y, row_max, row_sum, rows: rows as i32, width: width as i32 };
                // SAFETY: the caller's; the workspace has room for both statistics.
                unsafe { SoftmaxPasses::new(&modules[0], rows, width)?.run(&params, operator) }
            }
            &Operator::Softmax { x, y, rows, width, way } => {
                let fused = way == SoftmaxWay::Fused;
                let instance = if fused {
                    Softmax::instance(lawson_core::DType::F32, width, width)
                } else {
                    Softmax::online_instance(width)
                };
                let modules = self.jit().load(&[instance])?;
                let module = &modules[0];
                let softmax =
                    if fused { Softmax::new(module, rows, width, width)? } else { Softmax::online(module, rows, width)? };
                let stride = width as i64;
                let params = rows::SoftmaxParams {
                    x,
                    y,
                    x_stride: stride,
                    y_stride: stride,
                    rows: rows as i32,
                    width: width as i32,
                    ..Default::default()
                };
                // SAFETY: the caller's.
                unsafe { softmax.run(&params, operator) }
            }
            Operator::Products(all) => {
                for (product, matrices) in *all {
                    // SAFETY: the caller's.
                    unsafe { self.blas().plan(product)?.run(matrices)? };
                }
                Ok(())
            }
        }
    }

    /// Makes lengths and frequencies those of `positions`: addresses of starts, past and frequencies.
    fn send(&self, state: &mut State, positions: &Positions<'_>) -> Result<(u64, u64, u64)> {
        let (starts, past) = self.lengths(state, positions.new, positions.past)?;
        Ok((starts, past, state.frequencies(self.device(), &positions.frequencies.inverse)?))
    }
}
