//! How a block is computed: steps over named buffers with planned offsets in one workspace.
//!
//! A plan holds no pointer and no number of the user's; levels of fusion differ only in this data.

use std::fmt;

use crate::{
    DType,
    problem::{BlockProblem, BlockSpec, Level},
};

/// Which projection a GEMM step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Keys and values.
    Kv,
    /// Queries, keys and values.
    Qkv,
    /// The output.
    O,
}

/// A GEMM step: which weights, what its prologue and epilogue hold. The bias always lives in the epilogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Projection {
    /// Which weights.
    pub part: Part,
    /// The input norm is applied while x is packed.
    pub norm: bool,
    /// The epilogue holds QK-norm and RoPE, where the block has them, and the append: q goes to its buffer, k and v to the cache.
    pub append: bool,
    /// The epilogue adds x.
    pub residual: bool,
    /// Rows that one work item computes, a multiple of the register tile's rows. On a GPU 1 where there is one row, for
    /// which there is a kernel, and 0 where the library computes them.
    pub row_tile: usize,
}

/// A tiled-attention step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TiledAttention {
    /// Queries of one work item; 0 selects the decode kernel (one query, all heads of a group, per work item).
    pub query_tile: usize,
    /// Rows of the cache in each part that is attended by itself; parts are merged in order. A multiple of 64 on
    /// a CPU; a GPU divides the rows that are there among as many parts.
    pub split: Option<usize>,
    /// Blocks of a GPU that take even shares of the keys of all sequences and heads, for each tile of query rows. Where a sequence's keys are
    /// then divided follows from the lengths of all.
    pub shares: Option<usize>,
}

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op {
    /// h = RMSNorm(x).
    InputNorm,
    /// A GEMM.
    Projection(Projection),
    /// RMSNorm over D of q and k, in place.
    QkNorm,
    /// cos and sin of every new position.
    RopeTable,
    /// Turns q and k, in place.
    Rope,
    /// Copies k and v to the cache.
    Append,
    /// Turns q in place and k on its way to the cache; copies v.
    RopeAppend,
    /// Moves new keys into a quantised cache: groups that they finish as codes, the others as they are.
    QuantiseKeys,
    /// One pass over q, k and v: biases, QK-norm and RoPE, q in place, k and v to the cache. Multiplies by the rows' rstd first where the
    /// input norm's weight lies in the projection.
    HeadEpilogue {
        /// Whether it does the latter.
        norm: bool,
    },
    /// Copies the cache's valid rows to [B, G, L, D], zeros behind them.
    Gather,
    /// Transposes q to head-major strips.
    TransposeQ,
    /// scores = q · kᵀ of every head.
    Scores,
    /// Multiplies the scores.
    Scale,
    /// Caps the scores.
    Softcap,
    /// Adds the ALiBi bias to the scores.
    Alibi,
    /// Sets invisible scores to −∞.
    Mask,
    /// Softmax of the scores, in place.
    Softmax,
    /// scores · v of every head.
    WeightedValues,
    /// Transposes the heads' results to [T, H·D].
    TransposeO,
    /// Tiled attention with online softmax.
    Attention(TiledAttention),
    /// Merges the parts of a split attention.
    MergeSplits(TiledAttention),
    /// y = projected + x.
    Residual,
}

impl Op {
    /// The name that tables show, of what the step does in a block of `spec`.
    pub fn name_in(&self, spec: &BlockSpec) -> String {
        let has = |parts: &[(&str, bool)]| parts.iter().filter(|p| p.1).map(|p| p.0).collect::<Vec<_>>().join(", ");
        let rope = spec.rope.is_some();
        match self {
            Op::Projection(p) => {
                has(&[(self.name(), true), ("RoPE", p.append && rope), ("append", p.append && p.part != Part::Q)])
            }
            Op::HeadEpilogue { norm } => has(&[
                ("norm", *norm),
                ("bias", spec.biases.q || spec.biases.k || spec.biases.v),
                ("qk norm", spec.qk_norm.is_some()),
                ("rope", rope),
                ("append", true),
            ]),
            _ => self.name().to_owned(),
        }
    }

    /// The step's name, whatever the block.
    pub fn name(&self) -> &'static str {
        match self {
            Op::InputNorm => "input norm",
            Op::Projection(p) => match p.part {
                Part::Q => "q projection",
                Part::K => "k projection",
                Part::V => "v projection",
                Part::Kv => "kv projection",
                Part::Qkv => "qkv projection",
                Part::O => "output projection",
            },
            Op::HeadEpilogue { .. } => "head epilogue",
            Op::QkNorm => "qk norm",
            Op::RopeTable => "rope table",
            Op::Rope => "rope",
            Op::Append => "append",
            Op::RopeAppend => "rope, append",
            Op::QuantiseKeys => "quantise k",
            Op::Gather => "gather k, v",
            Op::TransposeQ => "transpose q",
            Op::Scores => "scores",
            Op::Scale => "scale",
            Op::Softcap => "softcap",
            Op::Alibi => "alibi",
            Op::Mask => "mask",
            Op::Softmax => "softmax",
            Op::WeightedValues => "weighted values",
            Op::TransposeO => "transpose o",
            Op::Attention(a) if a.query_tile == 0 => "decode attention",
            Op::Attention(_) => "tiled attention",
            Op::MergeSplits(_) => "merge splits",
            Op::Residual => "residual",
        }
    }

    /// How many GEMMs the step is, by itself.
    pub fn gemms(&self) -> usize {
        usize::from(matches!(self, Op::Projection(_) | Op::Scores | Op::WeightedValues))
    }
}

/// What a buffer holds. A plan has at most one buffer of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum BufferName {
    /// Normed x, [T, E].
    H,
    /// x packed for a GEMM.
    Packed,
    /// x in int8 with its scales, packed for a GEMM.
    Codes,
    /// New queries, [T, H·D].
    Q,
    /// New keys, [T, G·D].
    K,
    /// New values, [T, G·D].
    V,
    /// New keys on their way to a quantised cache, [T, G·D].
    StagedK,
    /// New queries, keys and values side by side, [T, (H + 2G)·D].
    Qkv,
    /// Queries by heads, [B, H, S, D].
    QHeads,
    /// Attention results by heads, [B, H, S, D].
    OHeads,
    /// Keys by heads, [B, G, L, D].
    KHeads,
    /// Values by heads, [B, G, L, D].
    VHeads,
    /// cos and sin, [T, 2, rotary_dim/2 or rotary_dim].
    RopeTable,
    /// Queries as strips [B, H, strip, D, lanes].
    QStrips,
    /// Scores as strips [B, H, strip, L, lanes]; on a GPU [B, H, S, L], rows a multiple of 8 apart.
    Scores,
    /// Attention results as strips [B, H, strip, D, lanes].
    OStrips,
    /// Attention results, [T, H·D].
    Attention,
    /// The output projection before the residual, [T, E].
    Projected,
    /// Results, maximum and sum of every part of a split attention, [T, H, parts, D + 2].
    Parts,
}

impl BufferName {
    /// The name that tables show.
    pub fn name(self) -> &'static str {
        match self {
            BufferName::H => "h",
            BufferName::Packed => "packed x",
            BufferName::Codes => "codes of x",
            BufferName::Q => "q",
            BufferName::K => "k",
            BufferName::V => "v",
            BufferName::StagedK => "staged k",
            BufferName::Qkv => "qkv",
            BufferName::QHeads => "q by heads",
            BufferName::OHeads => "o by heads",
            BufferName::KHeads => "k by heads",
            BufferName::VHeads => "v by heads",
            BufferName::RopeTable => "rope table",
            BufferName::QStrips => "q strips",
            BufferName::Scores => "scores",
            BufferName::OStrips => "o strips",
            BufferName::Attention => "attention",
            BufferName::Projected => "projected",
            BufferName::Parts => "parts",
        }
    }
}

/// A buffer of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer {
    /// What it holds.
    pub name: BufferName,
    /// Type of its elements.
    pub dtype: DType,
    /// Its size.
    pub bytes: usize,
    /// Where it starts in the workspace; buffers that never live together may overlap.
    pub offset: usize,
}

impl Buffer {
    /// What its elements are, as tables show it.
    pub fn elements(&self) -> &'static str {
        if self.name == BufferName::Codes { "int8" } else { self.dtype.name() }
    }
}

/// What a step reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operand {
    /// The caller's x.
    X,
    /// The caller's y.
    Y,
    /// The key/value cache.
    Cache,
    /// The caller's mask.
    Mask,
    /// The block's weights.
    Weights,
    /// A buffer of the workspace.
    Buffer(BufferName),
}

impl Operand {
    /// The name that tables show.
    pub fn name(self) -> &'static str {
        match self {
            Operand::X => "x",
            Operand::Y => "y",
            Operand::Cache => "cache",
            Operand::Mask => "mask",
            Operand::Weights => "weights",
            Operand::Buffer(b) => b.name(),
        }
    }
}

/// One step: launched once for each row block of its stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What it does.
    pub op: Op,
    /// The family of kernels that does it.
    pub kernel: String,
    /// What it reads.
    pub reads: Vec<Operand>,
    /// What it writes.
    pub writes: Vec<Operand>,
    /// Floating-point operations of all its launches.
    pub flops: f64,
    /// Bytes it reads and writes in all its launches.
    pub bytes: f64,
    /// Predicted seconds of all its launches.
    pub seconds: f64,
    /// Why it is done this way.
    pub why: String,
}

/// Steps that run one after another over the same rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Tokens of a row block: the steps run over each block in turn. All tokens at once when `None`.
    pub row_block: Option<usize>,
    /// The steps.
    pub steps: Vec<Step>,
}

/// Something the planner considered and did not choose.
#[derive(Clone, Debug, PartialEq)]
pub struct Rejected {
    /// What it was.
    pub what: String,
    /// Why not.
    pub why: String,
}

/// How a block is computed.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockPlan {
    /// What is computed.
    pub problem: BlockProblem,
    /// The level of fusion.
    pub level: Level,
    /// Threads the plan was made for, multiprocessors of a GPU; on a CPU results do not depend on them.
    pub threads: usize,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// The workspace's buffers.
    pub buffers: Vec<Buffer>,
    /// Bytes of all buffers together, overlaps counted once.
    pub workspace_bytes: usize,
    /// Bytes of scratch that each thread has.
    pub scratch_bytes: usize,
    /// What was considered and not chosen.
    pub rejected: Vec<Rejected>,
}

impl BlockPlan {
    /// Every step, in order.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.stages.iter().flat_map(|s| &s.steps)
    }
    /// How many times steps are launched: each step once for each row block.
    pub fn launches(&self) -> usize {
        let tokens = self.problem.batch.tokens();
        self.stages.iter().map(|s| s.steps.len() * s.row_block.map_or(1, |r| tokens.div_ceil(r))).sum()
    }
    /// GEMM steps.
    pub fn gemms(&self) -> usize {
        self.steps().map(|s| s.op.gemms()).sum()
    }
    /// Bytes that a call needs beyond weights, cache, x and y.
    pub fn peak_bytes(&self) -> usize {
        self.workspace_bytes + self.threads * self.scratch_bytes
    }
    /// Bytes that all steps read and write.
    pub fn traffic_bytes(&self) -> f64 {
        self.steps().map(|s| s.bytes).sum()
    }
    /// Predicted seconds of a call.
    pub fn seconds(&self) -> f64 {
        self.steps().map(|s| s.seconds).sum()
    }
    /// The buffer `name`, where the plan has one.
    pub fn buffer(&self, name: BufferName) -> Option<&Buffer> {
        self.buffers.iter().find(|b| b.name == name)
    }
    /// Whether `other` computes the same steps over the same buffers.
    pub fn same_as(&self, other: &BlockPlan) -> bool {
        self.stages == other.stages && self.buffers == other.buffers
    }
    /// A number that is equal for equal plans: of the problem, the steps' operations and the buffers.
    pub fn id(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut h = DefaultHasher::new();
        (&self.problem, self.level, &self.buffers, self.scratch_bytes).hash(&mut h);
        for stage in &self.stages {
            stage.row_block.hash(&mut h);
            stage.steps.iter().for_each(|s| (s.op, &s.kernel).hash(&mut h));
        }
        h.finish()
    }
}

impl fmt::Display for BlockPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:016x}:", self.level, self.threads, self.id())?;
        for (i, stage) in self.stages.iter().enumerate() {
            write!(f, "{}", if i == 0 { " " } else { " | " })?;
            if let Some(r) = stage.row_block {
                write!(f, "each {r} rows: ")?;
            }
            for (j, s) in stage.steps.iter().enumerate() {
                write!(f, "{}{}", if j == 0 { "" } else { " > " }, s.op.name_in(&self.problem.spec))?;
            }
        }
        Ok(())
    }
}
