//! The configurations of the study of kernels: each hot kernel alone, at the sizes that its share of the machine's limits is asked for.

use lawson::{AttentionSpec, DType, Lengths, Real, Result, WeightKind};
use lawson_testkit::rng::Rng;

use super::{Case, Shape, Study};

/// A kernel that is measured alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kernel {
    /// The fused QKV projection, x [M, E]; in bf16 also with weights in int8, in turn.
    Projection,
    /// Tiled attention, plain and with these features, in turn.
    Attention(&'static [Feature]),
    /// Attention of one new token over a cache, warm and cold, beside a loop that reads it.
    Decode,
    /// The block at one new token of each sequence, beside a loop that reads weights and cache.
    Block,
}

impl Kernel {
    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Projection => "gemm",
            Kernel::Attention(_) => "attention",
            Kernel::Decode => "decode",
            Kernel::Block => "block decode",
        }
    }
}

/// What bends the scores of plain attention, or its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Nothing.
    Plain,
    /// c·tanh(s/c).
    Softcap,
    /// A sliding window of [`WINDOW`] rows.
    Window,
    /// A logit of each head without a value.
    Sinks,
    /// Linear biases.
    Alibi,
    /// Three sequences of different lengths, about as much visible work.
    Ragged,
    /// Heads of [`ODD_DIM`] dimensions.
    HeadDim,
    /// A random mask of each query, half of it visible.
    Mask,
}

/// Gemma 2's cap.
const SOFTCAP: f64 = 50.0;
/// Rows of the sliding window.
const WINDOW: usize = 512;
/// A width that is no power of two.
const ODD_DIM: usize = 80;
/// Lengths of a ragged batch as shares of one sequence's: their squares sum up to 1, about.
const RAGGED: [f64; 3] = [0.75, 0.55, 0.37];

impl Feature {
    /// Every feature that causal attention can have, the plain form first.
    const CAUSAL: [Feature; 8] = [
        Feature::Plain,
        Feature::Softcap,
        Feature::Window,
        Feature::Sinks,
        Feature::Alibi,
        Feature::Ragged,
        Feature::HeadDim,
        Feature::Mask,
    ];

    /// The name of the case in results.
    pub fn variant(self, causal: bool) -> &'static str {
        match self {
            Feature::Plain if causal => "attention causal",
            Feature::Plain => "attention full",
            Feature::Softcap => "attention softcap",
            Feature::Window => "attention window 512",
            Feature::Sinks => "attention sinks",
            Feature::Alibi => "attention ALiBi",
            Feature::Ragged => "attention ragged batch",
            Feature::HeadDim => "attention D 80",
            Feature::Mask => "attention mask",
        }
    }

    /// The shape with this feature; a ragged batch has the longest sequence's length.
    pub fn shape(self, s: Shape) -> Shape {
        match self {
            Feature::Ragged => Shape { batch: RAGGED.len(), seq: ragged(s.seq)[0], ..s },
            Feature::HeadDim => Shape { head_dim: ODD_DIM, ..s },
            _ => s,
        }
    }

    /// Heads, masking and score rules.
    pub fn spec(self, s: &Shape) -> AttentionSpec {
        let plain = s.attention();
        match self {
            Feature::Softcap => AttentionSpec { softcap: Real::new(SOFTCAP), ..plain },
            Feature::Window => AttentionSpec { window: Some(WINDOW), ..plain },
            Feature::Sinks => AttentionSpec { sinks: true, ..plain },
            Feature::Alibi => AttentionSpec { alibi: true, ..plain },
            _ => plain,
        }
    }

    /// New and past rows of each sequence of the plain shape `s`.
    ///
    /// # Errors
    /// As [`Lengths::ragged`].
    pub fn lengths(self, s: &Shape) -> Result<Lengths> {
        match self {
            Feature::Ragged => Lengths::ragged(ragged(s.seq).to_vec(), vec![s.past; RAGGED.len()]),
            _ => Ok(Lengths::uniform(s.batch, s.seq, s.past)),
        }
    }
}

/// Lengths of a ragged batch, longest first.
fn ragged(seq: usize) -> [usize; 3] {
    RAGGED.map(|share| ((seq as f64 * share) as usize).max(1))
}

fn case(kernel: Kernel, shape: Shape) -> Case {
    Case { kernel: Some(kernel), ..Case::new(Study::Kernels, shape) }
}

/// M = E.
fn projection(hidden: usize, dtype: DType) -> Case {
    case(Kernel::Projection, Shape { causal: false, rope: false, ..Shape::block(hidden, hidden).dtype(dtype) })
}

/// `case` with weights in int8.
fn int8(case: Case) -> Case {
    Case { shape: Shape { weights: WeightKind::Int8, ..case.shape }, ..case }
}

/// Heads of `head_dim` that are 1024 wide together.
fn attention(seq: usize, head_dim: usize, causal: bool, features: &'static [Feature], dtype: DType) -> Case {
    let heads = 1024 / head_dim;
    let shape = Shape { causal, ..Shape::block(seq, 1024).heads(heads, heads, head_dim).dtype(dtype) };
    case(Kernel::Attention(features), shape)
}

/// One new token of each sequence, which sees `rows` rows.
fn decode(heads: usize, kv_heads: usize, rows: usize, batch: usize, dtype: DType) -> Case {
    let shape = Shape::block(rows, 128 * heads).heads(heads, kv_heads, 128).batch(batch).dtype(dtype);
    case(Kernel::Decode, shape.last_token())
}

fn block(batch: usize) -> Case {
    let shape = Shape::block(4096, 4096).heads(32, 8, 128).batch(batch).dtype(DType::BF16);
    case(Kernel::Block, shape.last_token())
}

const BOTH: [DType; 2] = [DType::F32, DType::BF16];
const PLAIN: &[Feature] = &[Feature::Plain];

/// A shortened table.
pub fn quick() -> Vec<Case> {
    let mut cases = BOTH.map(|dtype| projection(1024, dtype)).to_vec();
    for dtype in BOTH {
        cases.push(attention(2048, 128, false, PLAIN, dtype));
        cases.push(attention(2048, 64, false, PLAIN, dtype));
        cases.push(attention(2048, 128, true, &Feature::CAUSAL, dtype));
    }
    for (heads, kv_heads) in [(32, 8), (8, 1)] {
        for dtype in BOTH {
            cases.extend([1024, 4096, 16384].map(|rows| decode(heads, kv_heads, rows, 1, dtype)));
        }
    }
    cases.extend([block(1), int8(block(1))]);
    cases
}

/// The whole table.
pub fn article() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in BOTH {
        cases.extend([1024, 2048, 4096].map(|hidden| projection(hidden, dtype)));
    }
    for dtype in BOTH {
        cases.push(attention(2048, 128, false, PLAIN, dtype));
        cases.push(attention(2048, 64, false, PLAIN, dtype));
        cases.push(attention(2048, 128, true, &Feature::CAUSAL, dtype));
        cases.push(attention(8192, 128, true, PLAIN, dtype));
    }
    for (heads, kv_heads) in [(32, 8), (8, 1)] {
        for dtype in BOTH {
            for batch in [1, 8] {
                cases.extend([1024, 4096, 16384, 65536].map(|rows| decode(heads, kv_heads, rows, batch, dtype)));
            }
        }
    }
    cases.extend([1, 8].map(block));
    cases.extend([1, 8].map(|batch| int8(block(batch))));
    cases
}

/// Every kernel at one shape; decode is of its last token, and one new token is decoded only.
pub fn explicit(shape: Shape) -> Vec<Case> {
    let features = if shape.causal { &Feature::CAUSAL } else { PLAIN };
    let mut cases = vec![case(Kernel::Projection, Shape { past: 0, causal: false, rope: false, ..shape })];
    if shape.seq > 1 {
        cases.push(case(Kernel::Attention(features), shape));
    }
    cases.extend([Kernel::Decode, Kernel::Block].map(|kernel| case(kernel, shape.last_token())));
    cases
}

/// `n` seeded shapes near `shape`: a token more or less, fewer key/value heads, heads of 80 or 112 dimensions and, where `kernel` reads x,
/// a width that is 1, 3 or 5 off.
pub fn neighbours(kernel: Kernel, shape: Shape, n: usize) -> Vec<Shape> {
    const SEED: u64 = 6;
    let mut rng = Rng::new(SEED);
    let near = |n: usize, by: usize, up: bool| if up { n + by } else { n.saturating_sub(by).max(1) };
    let one = |_| {
        let mut s = shape;
        while s == shape {
            if rng.chance(0.5) {
                s.seq = near(shape.seq, 1, rng.chance(0.5));
            }
            if kernel == Kernel::Projection && rng.chance(0.5) {
                s.hidden = near(shape.hidden, rng.pick(&[1, 3, 5]), rng.chance(0.5));
            }
            if rng.chance(0.5) {
                s.head_dim = rng.pick(&[80, 112]);
            }
            let group = if rng.chance(0.5) { rng.pick(&[2, 4, 8]) } else { 1 };
            s.heads = (shape.heads * shape.head_dim / s.head_dim / group).max(1) * group;
            s.kv_heads = s.heads / group;
        }
        s
    };
    (0..n).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_near_and_others_than_the_shape() {
        for case in article() {
            let (Some(kernel @ (Kernel::Projection | Kernel::Attention(_))), s) = (case.kernel, case.shape) else { continue };
            let near = neighbours(kernel, s, 30);
            assert_eq!((near.len(), &near), (30, &neighbours(kernel, s, 30)));
            for n in near {
                assert!(n != s && n.seq.abs_diff(s.seq) <= 1 && n.hidden.abs_diff(s.hidden) <= 5, "{n:?}");
                assert!(n.heads.is_multiple_of(n.kv_heads) && n.heads * n.head_dim <= 2 * s.heads * s.head_dim, "{n:?}");
                assert!(n.problem().validate().is_ok(), "{n:?}");
            }
        }
    }

    #[test]
    fn a_ragged_batch_has_about_the_work_of_one_sequence() {
        let s = Shape::block(2048, 1024);
        let work: usize = Feature::Ragged.lengths(&s).unwrap().new_tokens().iter().map(|n| n * n).sum();
        assert!((work as f64 / (s.seq * s.seq) as f64 - 1.0).abs() < 0.01);
        assert_eq!(Feature::Ragged.shape(s).seq, 1536);
    }

    #[test]
    fn every_kernel_has_valid_shapes() {
        for case in [quick(), article(), explicit(Shape::block(24, 64).heads(4, 2, 16))].concat() {
            assert!(case.shape.validate(case.study).is_ok() && case.study == Study::Kernels, "{}", case.name());
        }
    }
}
