//! The numbers of one call of the block on the host, as f32 already rounded to the dtypes they are stored in.

use crate::problem::{BlockProblem, MaskShape};

/// An arbitrary mask, 1 = visible, [B or 1, H or 1, S, P + S]; column j is cache row j. S is the most new tokens of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    /// Which of the first two dimensions are not broadcast.
    pub shape: MaskShape,
    /// Rows of each mask, S.
    pub rows: usize,
    /// Columns of each mask, P + S.
    pub columns: usize,
    /// One byte for each element, 0 or 1, row-major.
    pub data: Vec<u8>,
}

impl Mask {
    /// The row of query `i` of sequence `b`, head `h`; `heads` is H.
    pub fn row(&self, b: usize, h: usize, i: usize, heads: usize) -> &[u8] {
        let b = if self.shape.per_sequence { b } else { 0 };
        let (h, heads) = if self.shape.per_head { (h, heads) } else { (0, 1) };
        let start = ((b * heads + h) * self.rows + i) * self.columns;
        &self.data[start..start + self.columns]
    }
}

/// Weights and inputs of one call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockData {
    /// [T, E].
    pub x: Vec<f32>,
    /// [H·D, E].
    pub q_weight: Vec<f32>,
    /// [G·D, E].
    pub k_weight: Vec<f32>,
    /// [G·D, E].
    pub v_weight: Vec<f32>,
    /// [E, H·D].
    pub o_weight: Vec<f32>,
    /// [H·D].
    pub q_bias: Option<Vec<f32>>,
    /// [G·D].
    pub k_bias: Option<Vec<f32>>,
    /// [G·D].
    pub v_bias: Option<Vec<f32>>,
    /// `[E]`.
    pub o_bias: Option<Vec<f32>>,
    /// `[E]`.
    pub input_norm: Option<Vec<f32>>,
    /// `[D]`.
    pub q_norm: Option<Vec<f32>>,
    /// `[D]`.
    pub k_norm: Option<Vec<f32>>,
    /// `[H]`.
    pub sinks: Option<Vec<f32>>,
    /// `[H]`.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Rows of `past_k` and `past_v`, P; at least the longest valid past.
    pub past_rows: usize,
    /// [B, G, P, D]; rows beyond the valid past may hold anything.
    pub past_k: Vec<f32>,
    /// [B, G, P, D].
    pub past_v: Vec<f32>,
    /// The arbitrary mask, where the problem has one.
    pub mask: Option<Mask>,
}

/// What one call gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockOutput {
    /// [T, E].
    pub y: Vec<f32>,
    /// The keys after the append, [B, G, P + S, D]; rows after the valid ones are zero.
    pub k: Vec<f32>,
    /// The values after the append, [B, G, P + S, D].
    pub v: Vec<f32>,
}

impl BlockData {
    /// Rows of the caches after the append, P + S.
    pub fn cache_rows(&self, problem: &BlockProblem) -> usize {
        self.past_rows + problem.batch.max_new()
    }
}
