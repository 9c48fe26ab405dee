//! What is computed: specifications and problems as hashable data that print and parse.

mod real;
mod rope;
mod spec;
mod text;

use std::fmt;

pub use real::Real;
pub use rope::{RopeFrequencies, RopeLayout, RopeScaling, RopeSpec, Yarn};
pub use spec::{AttentionSpec, Biases, BlockSpec};

use crate::{CacheDType, DType, Error, ErrorKind, Result, WeightKind, int8::check_inputs};

/// New tokens and valid past rows of every sequence of a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lengths {
    new: Vec<usize>,
    past: Vec<usize>,
}

impl Lengths {
    /// `batch` sequences with `seq` new tokens each, after `past` rows each.
    pub fn uniform(batch: usize, seq: usize, past: usize) -> Self {
        Lengths { new: vec![seq; batch], past: vec![past; batch] }
    }

    /// One sequence for each entry: `new[b]` new tokens after `past[b]` rows.
    ///
    /// # Errors
    /// `InvalidInput` when the lengths differ, are empty, or `new` holds a 0.
    pub fn ragged(new: Vec<usize>, past: Vec<usize>) -> Result<Self> {
        if new.len() != past.len() || new.is_empty() {
            return Err(Error::invalid(format!(
                "a batch needs one past length for each sequence and at least one sequence, got {} new and {} past",
                new.len(),
                past.len()
            )));
        }
        if let Some(b) = new.iter().position(|&n| n == 0) {
            return Err(Error::invalid(format!("sequence {b} of the batch has no new token; each needs at least one")));
        }
        Ok(Lengths { new, past })
    }

    /// Number of sequences, B.
    pub fn sequences(&self) -> usize {
        self.new.len()
    }
    /// New tokens of each sequence.
    pub fn new_tokens(&self) -> &[usize] {
        &self.new
    }
    /// Valid past rows of each sequence.
    pub fn past(&self) -> &[usize] {
        &self.past
    }
    /// New tokens of all sequences, T.
    pub fn tokens(&self) -> usize {
        self.new.iter().sum()
    }
    /// Longest sequence after the append.
    pub fn max_len(&self) -> usize {
        self.new.iter().zip(&self.past).map(|(n, p)| n + p).max().unwrap_or(0)
    }
    /// Most new tokens of a sequence.
    pub fn max_new(&self) -> usize {
        self.new.iter().copied().max().unwrap_or(0)
    }
    /// Sequence and index within it of token `t`.
    ///
    /// # Panics
    /// When `t` is not less than [`Lengths::tokens`].
    pub fn locate(&self, t: usize) -> (usize, usize) {
        let mut rest = t;
        for (b, &n) in self.new.iter().enumerate() {
            if rest < n {
                return (b, rest);
            }
            rest -= n;
        }
        panic!("token {t} of {}", self.tokens());
    }
}

/// Which dimensions of an arbitrary mask are not broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaskShape {
    /// One mask for each sequence (else one for all).
    pub per_sequence: bool,
    /// One mask for each query head (else one for all).
    pub per_head: bool,
}

/// One call of the attention block, regardless of actual numbers.
///
/// Prints as, and parses from, a line such as
/// `block b=2 s=37 past=4096 e=4096 h=32/8 d=128 causal rope=half,llama3:8:1:4:8192 bf16`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockProblem {
    /// The block.
    pub spec: BlockSpec,
    /// New and past rows of each sequence.
    pub batch: Lengths,
    /// An arbitrary mask, if one is given.
    pub mask: Option<MaskShape>,
    /// Compute dtype: of weights, x, y and the buffers between steps.
    pub dtype: DType,
    /// How the projections' weights are held.
    pub weights: WeightKind,
    /// How the cache holds its elements.
    pub kv_dtype: CacheDType,
    /// Rows of a page where the cache lies in pages, one of [`PAGE_SIZES`]; contiguous when `None`.
    pub page_size: Option<usize>,
}

/// One call of attention alone, regardless of actual numbers; prints and parses as
/// `attention b=1 s=2048 past=0 h=8/8 d=128 causal f32`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AttentionProblem {
    /// Heads, masking and score rules.
    pub spec: AttentionSpec,
    /// New and past rows of each sequence.
    pub batch: Lengths,
    /// An arbitrary mask, if one is given.
    pub mask: Option<MaskShape>,
    /// Dtype of q and of the result.
    pub dtype: DType,
    /// How k and v are held.
    pub kv_dtype: CacheDType,
}

/// Rows that a page of a paged cache may have: powers of two, as kernels divide by them.
pub const PAGE_SIZES: [usize; 3] = [32, 64, 128];

/// Checks that a page may have `rows` rows.
///
/// # Errors
/// `InvalidInput` with what is accepted.
pub fn check_page_size(rows: usize) -> Result<()> {
    if PAGE_SIZES.contains(&rows) {
        return Ok(());
    }
    Err(Error::invalid(format!("a page of {rows} rows; accepted: 32, 64, 128")))
}

/// What a CPU answers to a cache in pages.
pub fn pages_need_a_gpu() -> Error {
    let text = "only a GPU keeps a cache in pages; on a CPU it is contiguous";
    Error::new(ErrorKind::Unavailable, text)
}

/// Most bytes of any one tensor of a problem; keeps every product of sizes within `isize`.
const MAX_BYTES: u128 = 1 << 46;

impl BlockProblem {
    /// A problem without an arbitrary mask, its cache contiguous and in the compute dtype.
    pub fn new(spec: BlockSpec, batch: Lengths, dtype: DType) -> Self {
        BlockProblem { spec, batch, mask: None, dtype, weights: WeightKind::Compute, kv_dtype: dtype.into(), page_size: None }
    }

    /// The attention of this block.
    pub fn attention(&self) -> AttentionProblem {
        AttentionProblem {
            spec: self.spec.attention.clone(),
            batch: self.batch.clone(),
            mask: self.mask,
            dtype: self.dtype,
            kv_dtype: self.kv_dtype,
        }
    }

    /// Checks every range and that no size overflows.
    ///
    /// # Errors
    /// `InvalidInput`, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.spec.validate()?;
        self.attention().validate()?;
        self.page_size.map_or(Ok(()), check_page_size)?;
        if self.weights == WeightKind::Int8 {
            [self.spec.hidden_size, self.spec.attention.q_dim()].into_iter().try_for_each(check_inputs)?;
        }
        let (e, tokens) = (self.spec.hidden_size as u128, token_count(&self.batch));
        let widest = e.max(self.spec.attention.qkv_dim() as u128);
        check_size("x, q or y", tokens, widest)?;
        check_size("the QKV weight", e, self.spec.attention.qkv_dim() as u128)
    }

    /// The dtype that the weights of projections are rounded to before anything else: that of their elements; none where they become codes.
    pub fn stored_weights(&self) -> DType {
        match self.weights {
            WeightKind::Compute => self.dtype,
            WeightKind::Int8 => DType::F32,
        }
    }

    /// Floating-point operations: the projections, and 4·D for each visible (query, key, head). The same at every level.
    pub fn flops(&self) -> f64 {
        let a = &self.spec.attention;
        let (t, e) = (self.batch.tokens() as f64, self.spec.hidden_size as f64);
        2.0 * t * e * (a.qkv_dim() + a.q_dim()) as f64 + self.attention().flops()
    }

    /// Bytes that must move whatever the method: weights, x, y and the valid cache, each once.
    pub fn compulsory_bytes(&self) -> f64 {
        let a = &self.spec.attention;
        let (t, e) = (self.batch.tokens(), self.spec.hidden_size);
        let rows: usize = (0..self.batch.sequences()).map(|b| self.batch.past[b] + self.batch.new[b]).sum();
        let size = self.dtype.size();
        self.weights.bytes(a.qkv_dim(), e, size)
            + self.weights.bytes(e, a.q_dim(), size)
            + (2 * t * e * size) as f64
            + (rows * a.kv_heads) as f64 * self.kv_dtype.row_bytes(a.head_dim)
    }
}

impl AttentionProblem {
    /// A problem without an arbitrary mask, k and v in the same dtype as q.
    pub fn new(spec: AttentionSpec, batch: Lengths, dtype: DType) -> Self {
        AttentionProblem { spec, batch, mask: None, dtype, kv_dtype: dtype.into() }
    }

    /// Checks every range and that no size overflows.
    ///
    /// # Errors
    /// `InvalidInput`, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.spec.validate()?;
        if self.batch.sequences() == 0 || self.batch.new.contains(&0) {
            return Err(Error::invalid("a batch needs at least one sequence, and each sequence at least one new token"));
        }
        let longest = self.batch.new.iter().zip(&self.batch.past).map(|(&n, &p)| n as u128 + p as u128).max().unwrap_or(0);
        if longest > 1 << 24 {
            return Err(Error::invalid(format!("a sequence of {longest} rows is too long; at most 2^24")));
        }
        let rows = longest.saturating_mul(self.batch.sequences() as u128);
        check_size("the cache", rows, self.spec.kv_dim() as u128)?;
        check_size("q", token_count(&self.batch), self.spec.q_dim() as u128)?;
        if self.mask.is_some() {
            check_size("the mask", rows, (self.batch.max_new() as u128).saturating_mul(self.spec.heads as u128))?;
        }
        Ok(())
    }

    /// Visible (query, key) pairs of one head, by causal and window alone.
    pub fn visible_pairs(&self) -> f64 {
        let visible = |past: usize, i: usize, new: usize| self.spec.visible_range(past + i, past + new).len() as f64;
        let of = |b: usize| {
            let (new, past) = (self.batch.new[b], self.batch.past[b]);
            match (self.spec.causal, self.spec.window) {
                (false, _) => new as f64 * (past + new) as f64,
                (true, None) => (0.5 * (new as f64 + 1.0) + past as f64) * new as f64,
                (true, Some(_)) => (0..new).map(|i| visible(past, i, new)).sum(),
            }
        };
        (0..self.batch.sequences()).map(of).sum()
    }

    /// Floating-point operations: 4·D for each visible (query, key, head).
    pub fn flops(&self) -> f64 {
        4.0 * self.spec.head_dim as f64 * self.spec.heads as f64 * self.visible_pairs()
    }
}

fn token_count(batch: &Lengths) -> u128 {
    batch.new.iter().map(|&n| n as u128).sum()
}

fn check_size(what: &str, a: u128, b: u128) -> Result<()> {
    match a.checked_mul(b).and_then(|n| n.checked_mul(8)) {
        Some(n) if n <= MAX_BYTES => Ok(()),
        _ => Err(Error::invalid(format!("{what} of {a} x {b} elements is too large to address"))),
    }
}

/// How many of a block's stages are fused; the article's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// Every intermediate goes through memory ("traditional").
    Unfused,
    /// One QKV launch: three packed matrices as its segments, which share packed x; the rest as `Unfused`.
    Minimal,
    /// One QKV GEMM; RoPE and KV append in one pass; tiled attention.
    Moderate,
    /// Norm, bias, QK-norm, RoPE and KV append live in the QKV GEMM; tiled attention; bias and residual in the output GEMM.
    Maximal,
}

impl Level {
    /// Every level, least fused first.
    pub const ALL: [Level; 4] = [Level::Unfused, Level::Minimal, Level::Moderate, Level::Maximal];

    /// The name users write.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Unfused => "unfused",
            Level::Minimal => "minimal",
            Level::Moderate => "moderate",
            Level::Maximal => "maximal",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Level {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let found = Level::ALL.into_iter().find(|l| l.name() == s);
        found.ok_or_else(|| Error::invalid(format!("unknown fusion level '{s}'; accepted: unfused, minimal, moderate, maximal")))
    }
}
