//! What the steps of a plan need before they can run: kernels with their geometry, and planned products.

use std::sync::Arc;

use lawson_core::{
    DType, Error, Result,
    plan::{BlockPlan, BufferName, Op, Operand as PlanOperand, Part, Projection, TiledAttention},
    problem::RopeLayout,
};

use super::{Gpu, missing};
use crate::{
    Device, Instance,
    blas::{Batch, Matmul, MatmulPlan, Operand},
    kernels::{
        attention::{self, Attention},
        cache::Cache,
        gemv::Gemv,
        heads::{self, HeadsPass},
        rows::{Copies, Norm, Residual, ScoreOp, Scores, Softmax, Transpose},
    },
};

/// Most blocks along the second and third dimension of a grid.
const MOST_BLOCKS: usize = 65_535;

/// A step that only lacks addresses.
pub(super) enum Ready {
    Norm(Norm),
    Product(Arc<MatmulPlan>),
    OneRow(Gemv),
    Heads(Vec<HeadsPass>),
    Copy(Transpose),
    Scores(ScoreOp, Scores),
    Softmax(Softmax),
    Attention(Box<Attention>),
    Residual(Residual),
}

/// Sizes that several steps need.
pub(super) struct Sizes<'a> {
    pub plan: &'a BlockPlan,
    /// T.
    pub tokens: usize,
    /// Most new tokens of a sequence.
    pub new: usize,
    /// Most rows of a sequence.
    pub rows: usize,
    pub sequences: usize,
    /// Elements from a row of scores to the next.
    pub scores_stride: usize,
    /// Columns of a row of scores that are masked and weighed.
    pub columns: usize,
    pub gathers: bool,
    /// Whether the copy engine can read the cache.
    copied: bool,
    /// Whether attention gives the log-sum-exp too.
    lse: bool,
    multiprocessors: usize,
}

impl<'a> Sizes<'a> {
    pub fn new(plan: &'a BlockPlan, cache: &Cache, lse: bool, multiprocessors: usize) -> Self {
        let batch = &plan.problem.batch;
        let rows = batch.max_len();
        let scores_stride = rows.next_multiple_of(8);
        let strides = [cache.sequence_stride, cache.head_stride, cache.row_stride];
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
            copied: strides.iter().all(|&s| s > 0 && s % 8 == 0),
            lse,
            multiprocessors,
        }
    }

    pub fn dtype(&self) -> DType {
        self.plan.problem.dtype
    }

    pub fn buffer_dtype(&self, name: BufferName) -> DType {
        self.plan.buffer(name).map_or(self.dtype(), |b| b.dtype)
    }

    /// Rows of scores.
    pub fn score_rows(&self) -> usize {
        self.sequences * self.plan.problem.spec.attention.heads * self.new
    }

    /// The dtype of the cache's elements: no plan for a GPU has a quantised one.
    pub fn kv_dtype(&self) -> DType {
        self.plan.problem.kv_dtype.rounds_to(self.dtype())
    }

    fn heads(&self, from: DType, to: DType, heads: [usize; 3], rope: bool) -> heads::Shape {
        let appends = heads[2] > 0;
        let spec = &self.plan.problem.spec;
        let rope = spec.rope.as_ref().filter(|_| rope);
        let d = spec.attention.head_dim;
        heads::Shape {
            from,
            to,
            kv: if appends { self.kv_dtype() } else { to },
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

    pub fn attention(&self, t: &TiledAttention) -> attention::Shape {
        let p = &self.plan.problem;
        attention::Shape {
            spec: p.spec.attention.clone(),
            dtype: p.dtype,
            kv_dtype: self.kv_dtype(),
            paged: p.page_size.is_some(),
            copied: self.copied,
            sequences: self.sequences,
            tokens: self.tokens,
            new: self.new,
            rows: self.rows,
            mask: p.mask.is_some(),
            lse: self.lse,
            decode: t.query_tile == 0,
            splits: t.split.map_or(1, |s| self.rows.div_ceil(s)),
            shares: t.shares.unwrap_or(1),
        }
    }

    /// First column and columns of a projection's result.
    pub fn columns(&self, part: Part) -> (usize, usize) {
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
            Op::Projection(p) if p.row_tile > 0 => vec![Gemv::instance(self.dtype())],
            Op::InputNorm => vec![Norm::instance(self.dtype(), p.spec.hidden_size)],
            Op::QkNorm | Op::Rope | Op::Append | Op::HeadEpilogue { .. } => {
                self.passes(op).iter().map(heads::Shape::instance).collect()
            }
            Op::TransposeQ | Op::TransposeO => vec![Transpose::instance(self.dtype(), d)],
            Op::Gather => vec![Transpose::instance(self.kv_dtype(), d)],
            Op::Scale | Op::Softcap | Op::Alibi | Op::Mask => vec![Scores::instance()],
            Op::Softmax => vec![Softmax::instance(self.dtype(), self.columns, self.scores_stride)],
            Op::Attention(t) => vec![self.attention(t).instance(device.info())],
            Op::Residual => vec![Residual::instance(self.dtype(), p.spec.hidden_size)],
            _ => Vec::new(),
        }
    }
}

impl Gpu {
    /// Compiles the kernels of a plan and plans its products.
    pub(super) fn prepare(&self, plan: &BlockPlan, cache: &Cache, lse: bool) -> Result<Arc<[Ready]>> {
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
        let s = Sizes::new(plan, cache, lse, info.multiprocessors as usize);
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
                Op::Projection(p) if p.row_tile > 0 => Ready::OneRow(Gemv::new(module()?, s.projection(p, &step.writes), mp)?),
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
                    Ready::Copy(Transpose::new(module()?, Copies::GatherCache, s.kv_dtype(), rows, d, mp)?)
                }
                Op::Scores => Ready::Product(self.blas.plan(&s.product(false, cache))?),
                Op::WeightedValues => Ready::Product(self.blas.plan(&s.product(true, cache))?),
                Op::Scale => Ready::Scores(ScoreOp::Scale, Scores::new(module()?, s.score_rows(), s.columns)?),
                Op::Softcap => Ready::Scores(ScoreOp::Softcap, Scores::new(module()?, s.score_rows(), s.columns)?),
                Op::Alibi => Ready::Scores(ScoreOp::Alibi, Scores::new(module()?, s.score_rows(), s.columns)?),
                Op::Mask => Ready::Scores(ScoreOp::Mask, Scores::new(module()?, s.score_rows(), s.columns)?),
                Op::Softmax => Ready::Softmax(Softmax::new(module()?, s.score_rows(), s.columns, s.scores_stride)?),
                Op::Attention(t) => Ready::Attention(Box::new(Attention::new(module()?, s.attention(t), info)?)),
                Op::Residual => Ready::Residual(Residual::new(module()?, s.dtype(), s.tokens, e, mp)?),
                other => return Err(missing(other.name())),
            });
        }
        Ok(ready.into())
    }
}
