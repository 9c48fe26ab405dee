//! What is measured: the configurations of each study, as data.

mod gpu;
mod kernels;

use clap::ValueEnum;
use lawson::{AttentionSpec, BlockProblem, BlockSpec, CacheDType, DType, Error, Lengths, Result, RopeSpec, WeightKind};

use super::measure::Budget;

pub use kernels::{Feature, Kernel, neighbours};

/// What `lawson bench` can measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Study {
    /// Everything but kernels
    All,
    /// Separate against fused QKV projection, alone and inside a layer
    Qkv,
    /// Three-pass, fused and online softmax
    Softmax,
    /// Two-pass against fused rotary embedding, both layouts
    Rope,
    /// Materialised against tiled attention
    Attention,
    /// Attention of one new token over a cache
    Decode,
    /// The whole block at each level of fusion
    Block,
    /// Decoded tokens per second and sequences that fit, against the batch
    Throughput,
    /// Each hot kernel alone, as a share of what it could reach
    Kernels,
    /// What weights in int8 and quantised caches cost on a trained model: layer errors, and the change in mean loss
    Quality,
}

impl Study {
    /// What `all` measures, in the report's order.
    pub const EACH: [Study; 7] =
        [Study::Block, Study::Qkv, Study::Softmax, Study::Rope, Study::Attention, Study::Decode, Study::Throughput];

    /// The name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Study::All => "all",
            Study::Qkv => "qkv",
            Study::Softmax => "softmax",
            Study::Rope => "rope",
            Study::Attention => "attention",
            Study::Decode => "decode",
            Study::Block => "block",
            Study::Throughput => "throughput",
            Study::Kernels => "kernels",
            Study::Quality => "quality",
        }
    }
}

/// Which sizes are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// One to two minutes on two cores
    Quick,
    /// The article's exact sizes, f32 and bf16; batches scaled down where memory or time demand it
    Article,
}

impl Preset {
    /// Time of a configuration.
    pub fn budget(self, on_gpu: bool) -> Budget {
        match self {
            // A GPU's calls are short, and its article has more configurations.
            _ if on_gpu => Budget { seconds: 0.5, least: 5, most: 30 },
            Preset::Quick => Budget { seconds: 0.7, least: 5, most: 30 },
            Preset::Article => Budget { seconds: 8.0, least: 5, most: 50 },
        }
    }
}

/// More sequences or rows than any machine can hold.
const MOST: usize = 1 << 24;

/// The sizes that [`is_size`] takes, for people.
pub const SIZES: &str = "1 to 2^24";

/// Whether `n` can be a size of a shape.
pub fn is_size(n: usize) -> bool {
    (1..=MOST).contains(&n)
}

/// Checks the size that `flag` gives.
fn check_size(flag: &str, n: usize) -> Result<()> {
    if is_size(n) { Ok(()) } else { Err(Error::invalid(format!("{flag} must be {SIZES}, got {n}"))) }
}

/// One shape. L, the rows that a new token sees, is `past + seq`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Sequences, B.
    pub batch: usize,
    /// New tokens of each, S.
    pub seq: usize,
    /// Rows in the cache before the call.
    pub past: usize,
    /// E.
    pub hidden: usize,
    /// H.
    pub heads: usize,
    /// G.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Compute dtype.
    pub dtype: DType,
    /// How the cache holds its elements.
    pub kv_dtype: CacheDType,
    /// How the weights of projections are held.
    pub weights: WeightKind,
    /// Whether a token sees only what comes before it.
    pub causal: bool,
    /// Whether q and k are turned.
    pub rope: bool,
}

impl Shape {
    /// A causal block with RoPE, one sequence without a past, heads of 128 dimensions.
    const fn block(seq: usize, hidden: usize) -> Self {
        Shape {
            batch: 1,
            seq,
            past: 0,
            hidden,
            heads: hidden / 128,
            kv_heads: hidden / 128,
            head_dim: 128,
            dtype: DType::F32,
            kv_dtype: CacheDType::F32,
            weights: WeightKind::Compute,
            causal: true,
            rope: true,
        }
    }

    const fn batch(self, batch: usize) -> Self {
        Shape { batch, ..self }
    }

    const fn heads(self, heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Shape { heads, kv_heads, head_dim, ..self }
    }

    fn dtype(self, dtype: DType) -> Self {
        Shape { dtype, kv_dtype: dtype.into(), ..self }
    }

    /// One new token that sees what the last token sees.
    const fn last_token(self) -> Self {
        Shape { seq: 1, past: self.past + self.seq - 1, ..self }
    }

    /// Columns of q, k and v.
    pub fn qkv_widths(&self) -> [usize; 3] {
        [self.heads, self.kv_heads, self.kv_heads].map(|n| n * self.head_dim)
    }

    /// Heads and masking.
    pub fn attention(&self) -> AttentionSpec {
        AttentionSpec { causal: self.causal, ..AttentionSpec::new(self.heads, self.kv_heads, self.head_dim) }
    }

    /// The block.
    pub fn problem(&self) -> BlockProblem {
        let spec = BlockSpec { rope: self.rope.then(|| RopeSpec::new(10000.0)), ..BlockSpec::new(self.hidden, self.attention()) };
        let batch = Lengths::uniform(self.batch, self.seq, self.past);
        BlockProblem { kv_dtype: self.kv_dtype, weights: self.weights, ..BlockProblem::new(spec, batch, self.dtype) }
    }

    /// Checks every size that `study` reads. Together they may still be more than memory holds.
    ///
    /// # Errors
    /// `InvalidInput`, naming the flag.
    pub fn validate(&self, study: Study) -> Result<()> {
        let sizes = [("--batch", self.batch), ("--seq", self.seq), ("--heads", self.heads)];
        sizes.iter().try_for_each(|&(flag, n)| check_size(flag, n))?;
        if self.past > MOST {
            return Err(Error::invalid(format!("--past must be at most 2^24, got {}", self.past)));
        }
        if study == Study::Softmax {
            return Ok(());
        }
        let sizes = [("--kv-heads", self.kv_heads), ("--head-dim", self.head_dim)];
        sizes.iter().try_for_each(|&(flag, n)| check_size(flag, n))?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (h, g) = (self.heads, self.kv_heads);
            return Err(Error::invalid(format!("--heads must be a multiple of --kv-heads, got {h} and {g}")));
        }
        if self.rope && !self.head_dim.is_multiple_of(2) {
            return Err(Error::invalid(format!("--head-dim must be even, as RoPE turns pairs; got {}", self.head_dim)));
        }
        if study == Study::Rope {
            return Ok(());
        }
        // A width that is given was checked when it was read.
        check_size("--heads times --head-dim", self.hidden)?;
        self.problem().validate()
    }
}

/// One configuration of a study.
#[derive(Clone, Debug)]
pub struct Case {
    /// The study.
    pub study: Study,
    /// Which form of it, where there are several.
    pub variant: Option<&'static str>,
    /// The kernel that is measured alone, in the study of kernels.
    pub kernel: Option<Kernel>,
    /// Its sizes.
    pub shape: Shape,
    /// Whether the plan's steps are timed one by one.
    pub steps: bool,
    /// Whether a child process confirms the peak memory.
    pub confirm_peak: bool,
    /// Whether peers are measured beside it.
    pub peers: bool,
    /// What the reader must know.
    pub notes: Vec<String>,
}

impl Case {
    fn new(study: Study, shape: Shape) -> Self {
        Case { study, variant: None, kernel: None, shape, steps: false, confirm_peak: false, peers: true, notes: Vec::new() }
    }
    /// The form that is measured.
    pub fn variant(self, variant: &'static str) -> Self {
        Case { variant: Some(variant), ..self }
    }
    fn detailed(self) -> Self {
        Case { steps: true, confirm_peak: true, ..self }
    }
    fn note(mut self, note: &str) -> Self {
        if !note.is_empty() {
            self.notes.push(note.to_owned());
        }
        self
    }
    /// The study that measures the same computation and has peers for it: that of the kernel where one is measured alone.
    pub fn measured_by(&self) -> Study {
        match self.kernel {
            Some(Kernel::Projection) => Study::Qkv,
            Some(Kernel::Attention(_)) => Study::Attention,
            Some(Kernel::Decode) => Study::Decode,
            Some(Kernel::Block) => Study::Block,
            None => self.study,
        }
    }
    /// One line for people.
    pub fn name(&self) -> String {
        let s = &self.shape;
        let past = if s.past > 0 { format!(" past {}", s.past) } else { String::new() };
        let heads = if s.heads == s.kv_heads { s.heads.to_string() } else { format!("{}/{}", s.heads, s.kv_heads) };
        let kernel = self.kernel.map_or(String::new(), |k| format!(" {}", k.name()));
        let study = self.study.name();
        let width = if self.study == Study::Softmax { String::new() } else { format!(" of {}", s.head_dim) };
        let int8 = if s.weights == WeightKind::Int8 { ", int8 weights" } else { "" };
        let word = if s.heads == 1 { "head" } else { "heads" };
        format!("{study}{kernel} B {} S {}{past}, {heads} {word}{width}, {}{int8}", s.batch, s.seq, s.dtype)
    }
}

/// The article's layer: no mask, no RoPE, 32 heads of 64.
const LAYER: Shape = Shape { causal: false, rope: false, ..Shape::block(1024, 2048).heads(32, 32, 64) };

fn qkv(shape: Shape, note: &str) -> Vec<Case> {
    vec![
        Case::new(Study::Qkv, shape).variant("alone").note(note),
        Case { confirm_peak: true, ..Case::new(Study::Qkv, shape).variant("layer").note(note) },
    ]
}

/// Square scores of `batch` heads.
fn softmax(batch: usize, seq: usize, note: &str) -> Case {
    Case::new(Study::Softmax, Shape { causal: false, ..Shape::block(seq, 128).batch(batch) }).note(note)
}

fn rope(batch: usize, note: &str) -> Case {
    Case::new(Study::Rope, Shape::block(2048, 4096).batch(batch)).note(note)
}

fn attention(seq: usize, dtype: DType) -> Case {
    Case::new(Study::Attention, Shape::block(seq, 1024).dtype(dtype))
}

/// One new token over `rows` rows, its own included.
fn decode(rows: usize, kv_heads: usize, kv_dtype: CacheDType) -> Case {
    let shape = Shape { past: rows - 1, kv_dtype, ..Shape::block(1, 4096).heads(32, kv_heads, 128) };
    Case::new(Study::Decode, shape)
}

fn throughput(batch: usize, past: usize, shape: Shape) -> Case {
    Case::new(Study::Throughput, Shape { seq: 1, past, ..shape.batch(batch) })
}

fn quick(study: Study) -> Vec<Case> {
    match study {
        Study::Block => {
            let sweep = [64, 128, 256, 512, 1024, 2048].map(|seq| {
                let case = Case::new(Study::Block, Shape::block(seq, 1024));
                match seq {
                    512 => case.detailed().note("the article's small model at batch 1 instead of 16"),
                    2048 => Case { confirm_peak: true, ..case },
                    _ => case,
                }
            });
            let medium = Case::new(Study::Block, Shape::block(1024, 2048)).detailed();
            [vec![medium.note("the article's medium model at batch 1 instead of 8")], sweep.to_vec()].concat()
        }
        Study::Qkv => qkv(Shape { seq: 512, ..LAYER }, "1 x 512 tokens instead of the article's 16 x 1024"),
        Study::Softmax => vec![softmax(1, 2048, "1 x 2048 x 2048 instead of the article's 32 x 4096 x 4096")],
        Study::Rope => vec![rope(1, "batch 1 instead of the article's 32")],
        Study::Attention => [256, 512, 1024, 2048].map(|seq| attention(seq, DType::F32)).to_vec(),
        Study::Decode => decodes(&[512, 2048, 8192]),
        Study::Throughput => {
            let shape = Shape::block(1, 1024).heads(8, 2, 128);
            [1, 4, 16, 64].map(|batch| throughput(batch, 1024, shape)).to_vec()
        }
        Study::Kernels => kernels::quick(),
        Study::All | Study::Quality => Vec::new(),
    }
}

fn decodes(lengths: &[usize]) -> Vec<Case> {
    let mut cases = Vec::new();
    for kv_heads in [8, 32] {
        for kv_dtype in [CacheDType::F32, CacheDType::BF16] {
            cases.extend(lengths.iter().map(|&rows| decode(rows, kv_heads, kv_dtype)));
        }
    }
    cases
}

fn article(study: Study) -> Vec<Case> {
    let both = [DType::F32, DType::BF16];
    match study {
        Study::Block => {
            let mut cases = Vec::new();
            for dtype in both {
                let sizes = [(16, 512, 1024), (8, 1024, 2048), (4, 2048, 4096)];
                let of = |(batch, seq, hidden)| {
                    Case::new(Study::Block, Shape::block(seq, hidden).batch(batch).dtype(dtype)).detailed()
                };
                cases.extend(sizes.map(of));
                let sweep = [64, 128, 256, 512, 1024, 2048, 4096];
                cases.extend(sweep.map(|seq| Case::new(Study::Block, Shape::block(seq, 1024).dtype(dtype))));
            }
            cases
        }
        Study::Qkv => both.iter().flat_map(|&dtype| qkv(LAYER.batch(16).dtype(dtype), "")).collect(),
        Study::Softmax => [512, 1024, 2048, 4096].map(|seq| softmax(32, seq, "")).to_vec(),
        Study::Rope => vec![rope(32, "")],
        Study::Attention => {
            both.iter().flat_map(|&dtype| [256, 512, 1024, 2048, 4096].map(|seq| attention(seq, dtype))).collect()
        }
        Study::Decode => decodes(&[256, 1024, 4096, 16384, 65536]),
        Study::Throughput => {
            let shape = Shape::block(1, 4096).heads(32, 8, 128);
            [1, 2, 4, 8, 16, 32, 64].map(|batch| throughput(batch, 4096, shape)).to_vec()
        }
        Study::Kernels => kernels::article(),
        Study::All | Study::Quality => Vec::new(),
    }
}

fn each(study: Study) -> Vec<Study> {
    if study == Study::All { Study::EACH.to_vec() } else { vec![study] }
}

/// The configurations of `study` in a preset, for a GPU or the CPU.
pub fn preset(study: Study, preset: Preset, on_gpu: bool) -> Vec<Case> {
    let of = |s: Study| match (on_gpu, preset) {
        (true, Preset::Quick) => gpu::quick(s),
        (true, Preset::Article) => gpu::article(s),
        (false, Preset::Quick) => quick(s),
        (false, Preset::Article) => article(s),
    };
    each(study).into_iter().flat_map(of).collect()
}

/// `study` at one shape.
pub fn explicit(study: Study, shape: Shape) -> Vec<Case> {
    let of = |study: Study| match study {
        Study::Qkv => {
            let shape = Shape { past: 0, ..shape };
            qkv(Shape { causal: false, rope: false, ..shape }, "")
        }
        Study::Block => vec![Case::new(study, shape).detailed()],
        Study::Kernels => kernels::explicit(shape),
        Study::Decode | Study::Throughput => vec![Case::new(study, shape.last_token())],
        _ => vec![Case::new(study, shape)],
    };
    each(study).into_iter().flat_map(of).collect()
}
