//! From a problem and a level of fusion to steps, buffers and offsets.

mod gpu;

use lawson_core::{
    DType, Error, ErrorKind, Result, WeightKind,
    kernel::{DeviceKind, KernelInfo, KernelOp, MachineProfile},
    plan::{BlockPlan, Buffer, BufferName, Op, Operand, Part, Projection, Rejected, Stage, Step, TiledAttention},
    problem::{AttentionProblem, BlockProblem, Level, RopeLayout, pages_need_a_gpu},
};

use crate::{
    Cost,
    explain::{bytes, count, time},
};

/// Bytes of scratch that a backend's kernels need for one work item; the planner takes the largest that a plan uses.
pub trait Scratch {
    /// Of a GEMM item with these rows.
    fn gemm(&self, problem: &BlockProblem, row_tile: usize) -> usize;
    /// Of an attention item with these queries (0: decode).
    fn attention(&self, problem: &BlockProblem, query_tile: usize) -> usize;
    /// Of every other step.
    fn other(&self, problem: &BlockProblem) -> usize;
    /// Bytes of the buffer that holds `rows` tokens of `width` columns in int8.
    fn codes(&self, rows: usize, width: usize) -> usize;
}

/// Tokens of a row block at `maximal`: enough rows to pay for streaming the weights, few enough that q and the attention's result stay
/// in cache. Narrower elements multiply faster and take less room.
const fn row_block(dtype: DType) -> usize {
    1024 / dtype.size()
}
/// Rows and columns that a GEMM's work item has at most, some padding aside.
const GEMM_TILE: usize = 256;
/// Queries of an attention's work item, the heads of a group together: they share the packing of K and V.
const QUERY_LANES: usize = 384;
/// Rows of the smallest part that a split attention is worth.
const LEAST_SPLIT: usize = 256;
/// Work items that keep any sensible number of threads busy; a constant, so that results do not depend on the threads.
const ENOUGH_ITEMS: usize = 64;
/// Most elements of a buffer; keeps sums of their bytes within `isize`.
const MOST_ELEMENTS: usize = 1 << 44;
/// Buffers start at multiples of this.
const ALIGN: usize = 64;

/// Plans blocks for one machine.
pub struct Planner<'a> {
    /// The machine.
    pub machine: &'a MachineProfile,
    /// What can run on it.
    pub kernels: &'a [KernelInfo],
    /// What its kernels need.
    pub scratch: &'a dyn Scratch,
}

/// A buffer with the steps between which it lives.
struct Live {
    name: BufferName,
    dtype: DType,
    elements: usize,
    first: usize,
    last: usize,
}

/// Steps under construction.
struct Draft<'a> {
    planner: &'a Planner<'a>,
    problem: &'a BlockProblem,
    level: Level,
    stages: Vec<Stage>,
    row_block: Option<usize>,
    rejected: Vec<Rejected>,
    live: Vec<Live>,
    steps: usize,
    scratch: usize,
}

impl Planner<'_> {
    /// The plan of `problem` at `level`.
    ///
    /// # Errors
    /// `InvalidInput` when the problem is not valid or a buffer is too large to address; `Unavailable` for a paged cache on a CPU and for a
    /// quantised one on a GPU.
    pub fn plan(&self, problem: &BlockProblem, level: Level) -> Result<BlockPlan> {
        self.draft(problem, level, |d| match (self.machine.kind, level) {
            (DeviceKind::Gpu, _) => d.gpu(level),
            (_, Level::Unfused | Level::Minimal) => d.materialised(level),
            (_, Level::Moderate) => d.moderate(),
            (_, Level::Maximal) => d.maximal(),
        })
    }

    /// The plan of attention alone on a GPU: x is q [T, H·D], as wide as the problem's hidden size, the cache has all keys and values, y is the
    /// result. Scores lie in memory at `unfused` and `minimal`.
    ///
    /// # Errors
    /// As [`Planner::plan`].
    pub fn attention(&self, problem: &BlockProblem, level: Level) -> Result<BlockPlan> {
        self.draft(problem, level, |d| d.gpu_attention(level))
    }

    fn draft<'a>(&'a self, problem: &'a BlockProblem, level: Level, steps: impl FnOnce(&mut Draft<'a>)) -> Result<BlockPlan> {
        problem.validate()?;
        if self.machine.kind == DeviceKind::Cpu && problem.page_size.is_some() {
            return Err(pages_need_a_gpu());
        }
        if self.machine.kind == DeviceKind::Gpu {
            problem.kv_dtype.on_gpu()?;
            weights_on_gpu(problem.weights)?;
        }
        let mut d = Draft {
            planner: self,
            problem,
            level,
            stages: Vec::new(),
            row_block: None,
            rejected: Vec::new(),
            live: Vec::new(),
            steps: 0,
            scratch: self.scratch.other(problem),
        };
        steps(&mut d);
        if let Some(l) = d.live.iter().find(|l| l.elements > MOST_ELEMENTS) {
            return Err(Error::invalid(format!("the buffer '{}' of level {level} is too large to address", l.name.name())));
        }
        let (buffers, workspace_bytes) = place(&d.live);
        Ok(BlockPlan {
            problem: problem.clone(),
            level,
            threads: self.machine.threads,
            stages: d.stages,
            buffers,
            workspace_bytes,
            scratch_bytes: d.scratch.next_multiple_of(ALIGN),
            rejected: d.rejected,
        })
    }

    /// The plan that is predicted to be the fastest; what was passed over stands in `rejected`.
    ///
    /// # Errors
    /// As [`Planner::plan`].
    pub fn auto(&self, problem: &BlockProblem) -> Result<BlockPlan> {
        let mut best = self.plan(problem, Level::Maximal)?;
        let mut rejected = Vec::new();
        for level in [Level::Moderate, Level::Minimal, Level::Unfused] {
            let other = match self.plan(problem, level) {
                Ok(other) => other,
                Err(e) => {
                    rejected.push(Rejected { what: format!("level {level}"), why: e.to_string() });
                    continue;
                }
            };
            let (winner, loser) = if other.seconds() < best.seconds() { (other, best) } else { (best, other) };
            rejected.push(Rejected {
                what: format!("level {}", loser.level),
                why: format!(
                    "predicted {} with {} of memory, against {} with {} at {}",
                    time(loser.seconds()),
                    bytes(loser.peak_bytes() as f64),
                    time(winner.seconds()),
                    bytes(winner.peak_bytes() as f64),
                    winner.level
                ),
            });
            best = winner;
        }
        best.rejected.extend(rejected);
        Ok(best)
    }
}

/// Those of `parts` that the block has, as words.
fn listed(parts: &[(&str, bool)]) -> String {
    let has: Vec<&str> = parts.iter().filter(|p| p.1).map(|p| p.0).collect();
    match has.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => has.concat(),
    }
}

/// Offsets by lifetime: each buffer goes to the lowest place that is free while it lives, the largest first.
fn place(live: &[Live]) -> (Vec<Buffer>, usize) {
    let size = |l: &Live| (l.elements * l.dtype.size()).next_multiple_of(ALIGN);
    let mut order: Vec<usize> = (0..live.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(size(&live[i])));
    let mut offsets: Vec<Option<usize>> = vec![None; live.len()];
    for &i in &order {
        let mut taken: Vec<(usize, usize)> = (0..live.len())
            .filter(|&j| live[j].first <= live[i].last && live[i].first <= live[j].last)
            .filter_map(|j| offsets[j].map(|o| (o, o + size(&live[j]))))
            .collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (start, end) in taken {
            if offset + size(&live[i]) <= start {
                break;
            }
            offset = offset.max(end);
        }
        offsets[i] = Some(offset);
    }
    let buffers: Vec<Buffer> = live
        .iter()
        .zip(&offsets)
        .map(|(l, o)| Buffer { name: l.name, dtype: l.dtype, bytes: size(l), offset: o.unwrap_or(0) })
        .collect();
    let total = buffers.iter().map(|b| b.offset + b.bytes).max().unwrap_or(0);
    (buffers, total)
}

impl Draft<'_> {
    fn tokens(&self) -> usize {
        self.problem.batch.tokens()
    }

    /// Tokens whose rows a buffer holds.
    fn rows(&self) -> usize {
        self.row_block.map_or(self.tokens(), |r| r.min(self.tokens()))
    }

    fn int8(&self) -> bool {
        self.problem.weights == WeightKind::Int8
    }

    /// The kernel of projections on a CPU.
    fn projection_kernel(&self) -> KernelOp {
        if self.int8() { KernelOp::GemmInt8 } else { KernelOp::Gemm }
    }

    fn on_gpu(&self) -> bool {
        self.planner.machine.kind == DeviceKind::Gpu
    }

    fn begin(&mut self, row_block: Option<usize>) {
        self.row_block = row_block;
        self.stages.push(Stage { row_block, steps: Vec::new() });
    }

    fn kernel(&self, op: KernelOp, dtype: DType) -> String {
        find(self.planner.kernels, op, dtype).map_or_else(|| op.name().to_string(), ToString::to_string)
    }

    /// The kernel of `op`'s register tile, rows by columns.
    fn tile(&self, op: KernelOp) -> (usize, usize) {
        find(self.planner.kernels, op, self.problem.dtype).map_or((1, 1), |k| (k.tile_rows, k.tile_columns))
    }

    fn elements(&self, name: BufferName) -> (usize, DType) {
        if self.on_gpu() {
            return self.gpu_elements(name);
        }
        let (a, p) = (&self.problem.spec.attention, self.problem);
        let strip = self.tile(KernelOp::Gemm).1;
        // Saturating: `plan` refuses what does not fit.
        let lanes = |n: usize| (n.div_ceil(strip) * strip).saturating_mul(a.heads);
        let (new, past) = (p.batch.new_tokens(), p.batch.past());
        let strips = new.iter().fold(0usize, |sum, &n| sum.saturating_add(lanes(n)));
        let rows = self.rows();
        match name {
            BufferName::H => (rows * p.spec.hidden_size, p.dtype),
            BufferName::Packed => {
                let width = p.spec.hidden_size.max(a.q_dim());
                match find(self.planner.kernels, KernelOp::Gemm, p.dtype) {
                    // Dot products take x as it is, in whole blocks of 32 columns.
                    Some(k) if k.dtypes == [p.dtype] => (rows * width.next_multiple_of(32), p.dtype),
                    _ => (rows * width, DType::F32),
                }
            }
            BufferName::Codes => {
                let width = p.spec.hidden_size.max(a.q_dim());
                (self.planner.scratch.codes(rows, width).div_ceil(DType::F32.size()), DType::F32)
            }
            BufferName::Q => (rows * a.q_dim(), self.unturned()),
            BufferName::K => (rows * a.kv_dim(), self.unturned()),
            BufferName::V | BufferName::StagedK => (rows * a.kv_dim(), p.dtype),
            BufferName::Attention => (rows * a.q_dim(), p.dtype),
            BufferName::RopeTable => {
                let width = p.spec.rope.as_ref().map_or(0, |r| match (r.layout, r.rotary_dim(a.head_dim)) {
                    (RopeLayout::Half, d) => d,
                    (RopeLayout::Interleaved, d) => 2 * d,
                });
                (rows * width, DType::F32)
            }
            BufferName::QStrips | BufferName::OStrips => (strips.saturating_mul(a.head_dim), DType::F32),
            BufferName::Scores => {
                let rows = |(&n, &p): (&usize, &usize)| lanes(n).saturating_mul(n + p);
                (new.iter().zip(past).map(rows).fold(0, usize::saturating_add), DType::F32)
            }
            BufferName::Projected => (rows * p.spec.hidden_size, DType::F32),
            BufferName::Parts => {
                let parts = self.tiles().split.map_or(0, |s| p.batch.max_len().div_ceil(s));
                (rows * a.heads * parts * (a.head_dim + 2), DType::F32)
            }
            _ => (0, DType::F32),
        }
    }

    /// The dtype of the buffers of q and k: f32 where separate passes norm or turn them. k is then rounded once, on its way to the
    /// cache; q stays f32.
    fn unturned(&self) -> DType {
        let spec = &self.problem.spec;
        let passes = self.level != Level::Maximal && (spec.rope.is_some() || spec.qk_norm.is_some());
        if passes { DType::F32 } else { self.problem.dtype }
    }

    fn touch(&mut self, operand: Operand) {
        let Operand::Buffer(name) = operand else { return };
        let at = self.steps;
        if let Some(l) = self.live.iter_mut().find(|l| l.name == name) {
            l.last = at;
            return;
        }
        let (elements, dtype) = self.elements(name);
        self.live.push(Live { name, dtype, elements, first: at, last: at });
    }

    fn step(&mut self, op: Op, kernel: KernelOp, reads: &[Operand], writes: &[Operand], why: impl Into<String>) {
        reads.iter().chain(writes).for_each(|&o| self.touch(o));
        if let Op::Projection(p) = op
            && !self.on_gpu()
        {
            self.touch(Operand::Buffer(if self.int8() { BufferName::Codes } else { BufferName::Packed }));
            self.scratch = self.scratch.max(self.planner.scratch.gemm(self.problem, p.row_tile));
        }
        if let Op::Attention(t) = op {
            self.scratch = self.scratch.max(self.planner.scratch.attention(self.problem, t.query_tile));
        }
        let attends = matches!(
            op,
            Op::Attention(_) | Op::MergeSplits(_) | Op::Scores | Op::WeightedValues | Op::TransposeQ | Op::TransposeO
        );
        let dtype = if attends { attention_dtype(&self.problem.attention()) } else { self.problem.dtype };
        let mut cost = self.cost(&op, reads, writes);
        cost.launches = self.row_block.map_or(1, |r| self.tokens().div_ceil(r));
        let step = Step {
            op,
            kernel: self.kernel(kernel, dtype),
            reads: reads.to_vec(),
            writes: writes.to_vec(),
            flops: cost.flops,
            bytes: cost.bytes,
            seconds: match kernel {
                KernelOp::GemmInt8 => cost.seconds_at(self.planner.machine, self.planner.machine.int8_peak_flops),
                _ => cost.seconds(self.planner.machine, dtype),
            },
            why: why.into(),
        };
        if let Some(stage) = self.stages.last_mut() {
            stage.steps.push(step);
        }
        self.steps += 1;
    }

    /// Operations and bytes of all launches of a step.
    fn cost(&self, op: &Op, reads: &[Operand], writes: &[Operand]) -> Cost {
        let (a, p) = (&self.problem.spec.attention, self.problem);
        let (t, e) = (self.tokens() as f64, p.spec.hidden_size as f64);
        let (d, h) = (a.head_dim as f64, a.heads as f64);
        let pairs: f64 = p.batch.new_tokens().iter().zip(p.batch.past()).map(|(&n, &p)| (n * (n + p)) as f64).sum();
        let scores = pairs * h;
        let columns = |part: Part| match part {
            Part::Q => a.q_dim(),
            Part::K | Part::V => a.kv_dim(),
            Part::Kv => 2 * a.kv_dim(),
            Part::Qkv => a.qkv_dim(),
            Part::O => a.q_dim(),
        } as f64;
        let visible = p.attention().visible_pairs() * h;
        let flops = match op {
            Op::InputNorm => 4.0 * t * e,
            Op::Projection(x) => 2.0 * t * e * columns(x.part),
            Op::QkNorm => 4.0 * t * (a.q_dim() + a.kv_dim()) as f64,
            Op::HeadEpilogue { .. } => 10.0 * t * a.qkv_dim() as f64,
            Op::Rope | Op::RopeAppend => 6.0 * t * (a.q_dim() + a.kv_dim()) as f64,
            Op::Scores | Op::WeightedValues => 2.0 * d * scores,
            Op::Scale | Op::Alibi | Op::Mask => scores,
            Op::Softcap => 20.0 * scores,
            Op::Softmax => 15.0 * scores,
            Op::Attention(_) => 4.0 * d * visible,
            Op::Residual => t * e,
            _ => 0.0,
        };
        let cache = |new_only: bool| {
            let rows: usize =
                p.batch.new_tokens().iter().zip(p.batch.past()).map(|(n, past)| if new_only { *n } else { n + past }).sum();
            (rows * a.kv_heads) as f64 * p.kv_dtype.row_bytes(a.head_dim)
        };
        let of = |o: &Operand, write: bool| match o {
            Operand::X | Operand::Y => t * e * p.dtype.size() as f64,
            Operand::Weights => match op {
                Op::Projection(x) => {
                    let blocks = self.row_block.map_or(1, |r| self.tokens().div_ceil(r));
                    // o has as many elements with n and k exchanged; its scales are those of E outputs.
                    let (n, k) = if x.part == Part::O { (e, a.q_dim()) } else { (columns(x.part), p.spec.hidden_size) };
                    p.weights.bytes(n as usize, k, p.dtype.size()) * blocks as f64
                }
                _ => 0.0,
            },
            Operand::Mask => p.mask.map_or(0.0, |m| {
                let share =
                    if m.per_head { h } else { 1.0 } * if m.per_sequence { 1.0 } else { 1.0 / p.batch.sequences() as f64 };
                pairs * share
            }),
            Operand::Cache => {
                // Keys or values alone; new keys reach a quantised cache in a step of their own.
                let one = match op {
                    Op::Scores | Op::WeightedValues | Op::QuantiseKeys => true,
                    Op::Projection(_) | Op::Append | Op::RopeAppend => p.kv_dtype.codes().is_some(),
                    _ => false,
                };
                cache(write) * if one { 0.5 } else { 1.0 }
            }
            Operand::Buffer(name) => {
                let (elements, dtype) = self.elements(*name);
                let blocks = self.row_block.map_or(1, |r| self.tokens().div_ceil(r));
                (elements * dtype.size() * blocks) as f64
            }
            _ => 0.0,
        };
        let bytes = reads.iter().map(|o| of(o, false)).sum::<f64>() + writes.iter().map(|o| of(o, true)).sum::<f64>();
        Cost { flops, bytes, launches: 1 }
    }

    /// Rows of a GEMM's work item: as many as keep its result tile in second-level cache, evenly, fewer when there would be too few items.
    fn row_tile(&self, columns: usize) -> usize {
        let mr = self.tile(self.projection_kernel()).0;
        let column_tiles = columns.div_ceil(GEMM_TILE);
        // Each element sums over k in the same order whatever the tile, so that this may depend on the threads.
        let enough = (4 * self.planner.machine.threads).div_ceil(column_tiles);
        let groups = enough.max(self.rows().div_ceil(GEMM_TILE));
        self.rows().div_ceil(groups).next_multiple_of(mr)
    }

    fn projection(&mut self, part: Part, fused: bool, reads: Operand, writes: &[Operand], why: &str) {
        let a = &self.problem.spec.attention;
        let columns = match part {
            Part::Q => a.q_dim(),
            Part::K | Part::V => a.kv_dim(),
            Part::Kv => 2 * a.kv_dim(),
            Part::Qkv => a.qkv_dim(),
            Part::O => self.problem.spec.hidden_size,
        };
        let spec = &self.problem.spec;
        let is_o = part == Part::O;
        let p = Projection {
            part,
            norm: fused && !is_o && spec.input_norm.is_some(),
            append: fused && !is_o,
            residual: fused && is_o && spec.residual,
            row_tile: self.row_tile(columns),
        };
        let mut writes = writes.to_vec();
        if self.staged(p.append && part != Part::Q) {
            writes.push(Operand::Buffer(BufferName::StagedK));
        }
        let mut reads = vec![reads, Operand::Weights];
        if p.append && spec.rope.is_some() {
            reads.push(Operand::Buffer(BufferName::RopeTable));
        }
        if p.residual {
            reads.push(Operand::X);
        }
        self.step(Op::Projection(p), self.projection_kernel(), &reads, &writes, why);
    }

    /// Whether a step that appends keys puts them aside, since the cache takes whole groups.
    fn staged(&self, appends: bool) -> bool {
        appends && self.problem.kv_dtype.codes().is_some()
    }

    /// A pass that appends k and v.
    fn append(&mut self, op: Op, reads: &[Operand], writes: &[Operand], why: &str) {
        let mut writes = [writes, &[Operand::Cache]].concat();
        if self.staged(true) {
            writes.push(Operand::Buffer(BufferName::StagedK));
        }
        self.step(op, KernelOp::Rope, reads, &writes, why);
        self.quantise_keys();
    }

    /// The step behind one that has put keys aside.
    fn quantise_keys(&mut self) {
        if self.staged(true) {
            let why = "32 rows share the scales of keys; the rows of the last group wait for the others in f32";
            self.step(Op::QuantiseKeys, KernelOp::Rope, &[Operand::Buffer(BufferName::StagedK)], &[Operand::Cache], why);
        }
    }

    /// What the epilogue of the output projection holds.
    fn output_epilogue(&self, residual: bool) -> String {
        let spec = &self.problem.spec;
        match listed(&[("bias", spec.biases.o), ("residual", residual && spec.residual)]) {
            none if none.is_empty() => "nothing is added to the product".into(),
            parts => format!("{parts} in the epilogue"),
        }
    }

    /// What the projection `part` of a whole block holds beside the product.
    fn projection_epilogue(&self, part: Part) -> String {
        let spec = &self.problem.spec;
        let (q, kv) = (part != Part::Kv, part != Part::Q);
        let biases = q && spec.biases.q || kv && (spec.biases.k || spec.biases.v);
        let parts = [
            ("norm", spec.input_norm.is_some()),
            ("bias", biases),
            ("QK-norm", spec.qk_norm.is_some()),
            ("RoPE", spec.rope.is_some()),
            ("append", kv),
        ];
        match listed(&parts) {
            none if none.is_empty() => "nothing joins the product".into(),
            parts => format!("{parts} while the tile is warm"),
        }
    }

    /// What the projections read: x, or the normed x that this adds a step for.
    fn normed_x(&mut self) -> Operand {
        if self.problem.spec.input_norm.is_none() {
            return Operand::X;
        }
        let h = Operand::Buffer(BufferName::H);
        self.step(Op::InputNorm, KernelOp::Norm, &[Operand::X], &[h], "x is normed through memory at this level");
        h
    }

    fn rope_table(&mut self) {
        if self.problem.spec.rope.is_some() {
            let table = Operand::Buffer(BufferName::RopeTable);
            self.step(Op::RopeTable, KernelOp::Rope, &[], &[table], "cos and sin once for all heads, from f64 angles");
        }
    }

    fn qk_norm(&mut self) {
        let qk = [BufferName::Q, BufferName::K].map(Operand::Buffer);
        if self.problem.spec.qk_norm.is_some() {
            self.step(Op::QkNorm, KernelOp::Norm, &qk, &qk, "a pass of its own at this level");
        }
    }

    fn qkv(&mut self, level: Level, x: Operand) {
        let [q, k, v] = [BufferName::Q, BufferName::K, BufferName::V].map(Operand::Buffer);
        if level == Level::Unfused {
            self.projection(Part::Q, false, x, &[q], "three projections, each packs x again");
            self.projection(Part::K, false, x, &[k], "as q");
            self.projection(Part::V, false, x, &[v], "as q");
        } else {
            self.projection(Part::Qkv, false, x, &[q, k, v], "x is packed once for q, k and v");
        }
    }

    fn output(&mut self) {
        let attention = Operand::Buffer(BufferName::Attention);
        let why = self.output_epilogue(false);
        if self.problem.spec.residual {
            let projected = Operand::Buffer(BufferName::Projected);
            self.projection(Part::O, false, attention, &[projected], &why);
            self.step(Op::Residual, KernelOp::Norm, &[projected, Operand::X], &[Operand::Y], "a pass of its own at this level");
        } else {
            self.projection(Part::O, false, attention, &[Operand::Y], &why);
        }
    }

    fn materialised(&mut self, level: Level) {
        let spec = &self.problem.spec;
        let a = &spec.attention;
        self.begin(None);
        let x = self.normed_x();
        self.qkv(level, x);
        self.qk_norm();
        let [q, k, v, table] = [BufferName::Q, BufferName::K, BufferName::V, BufferName::RopeTable].map(Operand::Buffer);
        if spec.rope.is_some() {
            self.rope_table();
            self.step(Op::Rope, KernelOp::Rope, &[q, k, table], &[q, k], "a pass of its own at this level");
        }
        self.append(Op::Append, &[k, v], &[], "a copy of its own at this level");
        let [qs, s, os, o] =
            [BufferName::QStrips, BufferName::Scores, BufferName::OStrips, BufferName::Attention].map(Operand::Buffer);
        let prefill = KernelOp::AttentionPrefill;
        self.step(Op::TransposeQ, prefill, &[q], &[qs], "heads side by side in the lanes");
        self.step(Op::Scores, KernelOp::Gemm, &[qs, Operand::Cache], &[s], "scores of every row, visible or not, through memory");
        self.step(Op::Scale, KernelOp::Softmax, &[s], &[s], "element-wise, in place");
        if a.softcap.is_some() {
            self.step(Op::Softcap, KernelOp::Softmax, &[s], &[s], "element-wise, in place");
        }
        if a.alibi {
            self.step(Op::Alibi, KernelOp::Softmax, &[s], &[s], "element-wise, in place");
        }
        if a.causal || self.problem.mask.is_some() {
            let reads: &[Operand] = if self.problem.mask.is_some() { &[s, Operand::Mask] } else { &[s] };
            self.step(Op::Mask, KernelOp::Softmax, reads, &[s], "element-wise, in place");
        }
        self.step(Op::Softmax, KernelOp::Softmax, &[s], &[s], "in place, in the one score buffer");
        self.step(Op::WeightedValues, KernelOp::Gemm, &[s, Operand::Cache], &[os], "probabilities of every row");
        self.step(Op::TransposeO, prefill, &[os], &[o], "back to tokens");
        self.output();
        self.rejected.push(Rejected { what: "tiled attention".into(), why: format!("level {level} keeps the scores in memory") });
    }

    fn tiles(&self) -> TiledAttention {
        attention_tiles(&self.problem.attention(), self.planner.kernels, self.rows())
    }

    fn attention(&mut self) {
        let tiled = self.tiles();
        let (q, o) = (Operand::Buffer(BufferName::Q), Operand::Buffer(BufferName::Attention));
        let parts = Operand::Buffer(BufferName::Parts);
        let kernel = if tiled.query_tile == 0 { KernelOp::AttentionDecode } else { KernelOp::AttentionPrefill };
        let mut reads = vec![q, Operand::Cache];
        if self.problem.mask.is_some() {
            reads.push(Operand::Mask);
        }
        let shared = if self.problem.spec.attention.group() > 1 { "; the heads of a group share each key" } else { "" };
        let why = match (tiled.query_tile, tiled.split) {
            (0, None) => format!("one query a sequence{shared}"),
            (0, Some(s)) => {
                format!("one query a sequence{shared}; its keys are split into parts of {s} rows, so that all threads have work")
            }
            (n, None) => format!("each tile of keys serves {}; scores stay in cache", count(n, "query", "queries")),
            (n, Some(s)) => {
                format!(
                    "each tile of keys serves {}; as these are few, the keys are split into parts of {s} rows",
                    count(n, "query", "queries")
                )
            }
        };
        if tiled.split.is_some() {
            self.step(Op::Attention(tiled), kernel, &reads, &[parts], why);
            self.step(Op::MergeSplits(tiled), kernel, &[parts], &[o], "parts are merged in order by (m, l, acc)");
        } else {
            self.step(Op::Attention(tiled), kernel, &reads, &[o], why);
            let why = match self.problem.batch.max_len() / LEAST_SPLIT {
                0 | 1 => format!("no sequence has the {} rows that two parts would need", 2 * LEAST_SPLIT),
                _ => "queries and heads are work enough for all threads".into(),
            };
            self.rejected.push(Rejected { what: "splitting the keys".into(), why });
        }
    }

    fn moderate(&mut self) {
        self.begin(None);
        let x = self.normed_x();
        self.qkv(Level::Moderate, x);
        self.qk_norm();
        let [q, k, v, table] = [BufferName::Q, BufferName::K, BufferName::V, BufferName::RopeTable].map(Operand::Buffer);
        if self.problem.spec.rope.is_some() {
            self.rope_table();
            self.append(Op::RopeAppend, &[q, k, v, table], &[q], "k turns on its way to the cache");
        } else {
            self.append(Op::Append, &[k, v], &[], "no RoPE: a copy");
        }
        self.attention();
        self.output();
        self.rejected.push(Rejected { what: "scores in memory".into(), why: "tiled attention moves fewer bytes".into() });
    }

    fn maximal(&mut self) {
        let [q, o] = [BufferName::Q, BufferName::Attention].map(Operand::Buffer);
        let most = row_block(self.problem.dtype);
        let block = (self.tokens() > most).then_some(most);
        // A query may see rows that a later row block appends when attention is not causal, and groups of keys that it finishes when
        // they are quantised.
        let (causal, quantised) = (self.problem.spec.attention.causal, self.problem.kv_dtype.codes().is_some());
        let ahead = block.is_some() && (!causal || quantised);
        self.begin(block);
        self.rope_table();
        if ahead {
            let first = if causal { "groups of keys are quantised" } else { "not causal: all keys come" };
            let why = format!("{first} before the first query; {}", self.projection_epilogue(Part::Kv));
            self.projection(Part::Kv, true, Operand::X, &[Operand::Cache], &why);
            self.quantise_keys();
            self.begin(block);
            self.rope_table();
            self.projection(Part::Q, true, Operand::X, &[q], &self.projection_epilogue(Part::Q));
        } else {
            let why = self.projection_epilogue(Part::Qkv);
            self.projection(Part::Qkv, true, Operand::X, &[q, Operand::Cache], &why);
            self.quantise_keys();
        }
        self.attention();
        self.projection(Part::O, true, o, &[Operand::Y], &self.output_epilogue(true));
        if block.is_none() {
            self.rejected.push(Rejected {
                what: format!("row blocks of {most}"),
                why: "the call has no more tokens than one block".into(),
            });
        }
    }
}

/// Whether a GPU has kernels for weights that are held so.
///
/// # Errors
/// `Unavailable` for int8.
pub fn weights_on_gpu(weights: WeightKind) -> Result<()> {
    match weights {
        WeightKind::Compute => Ok(()),
        other => {
            let text = format!("weights of {other} are not yet available on a GPU; accepted there: auto");
            Err(Error::new(ErrorKind::Unavailable, text))
        }
    }
}

/// The kernel of `op` that reads `dtype`.
fn find(kernels: &[KernelInfo], op: KernelOp, dtype: DType) -> Option<&KernelInfo> {
    kernels.iter().find(|k| k.op == op && k.dtypes.contains(&dtype))
}

/// The dtype whose kernel attends: where q and the cache differ, the one that widens both.
fn attention_dtype(problem: &AttentionProblem) -> DType {
    if problem.kv_dtype == problem.dtype { problem.dtype } else { DType::F32 }
}

/// Queries of an attention work item, and the parts that keys are split into when there are too few items otherwise. A function of the
/// problem, the `rows` of a launch and the kernels alone, never of the threads, so that results do not depend on them.
pub fn attention_tiles(problem: &AttentionProblem, kernels: &[KernelInfo], rows: usize) -> TiledAttention {
    let (a, batch) = (&problem.spec, &problem.batch);
    let strip = find(kernels, KernelOp::AttentionPrefill, attention_dtype(problem)).map_or(1, |k| k.tile_columns);
    // Some strips take turns at each tile of K and V; heads of a group share them. Fewer where a launch would have too few items.
    let launched = rows.min(batch.tokens());
    let mut lanes = QUERY_LANES.next_multiple_of(strip);
    while lanes > strip && launched.div_ceil((lanes / a.group()).max(1)) * a.kv_heads < ENOUGH_ITEMS / 4 {
        lanes = (lanes / 2).next_multiple_of(strip);
    }
    // Tiles of equal size, in whole strips: a small one among large ones would leave threads waiting.
    let most = rows.min(batch.max_new()) * a.group();
    lanes = most.div_ceil(most.div_ceil(lanes)).next_multiple_of(strip);
    let query_tile = if batch.max_new() == 1 { 0 } else { (lanes / a.group()).clamp(1, batch.max_new()) };
    let items: usize = batch.new_tokens().iter().map(|n| n.div_ceil(query_tile.max(1)) * a.kv_heads).sum();
    let longest = batch.max_len();
    // Parts cost memory and a merge; many queries give work enough sooner than one does.
    let enough = if query_tile == 0 { ENOUGH_ITEMS } else { ENOUGH_ITEMS / 4 };
    let parts = (enough / items.max(1)).clamp(1, (longest / LEAST_SPLIT).max(1));
    let split = (parts > 1).then(|| longest.div_ceil(parts).next_multiple_of(64));
    TiledAttention { query_tile, split, shares: None }
}
