//! The algebra of online softmax (arXiv:1805.02867): partial results over disjoint sets of keys that merge to the whole.
//!
//! Up to rounding, [`SoftmaxState::merge`] is associative and commutative, and [`SoftmaxState::empty`] is neutral.

/// Σ exp(s − m)·v and Σ exp(s − m) over the keys seen so far, with m their greatest score; f32, natural exponent.
#[derive(Clone, Debug, PartialEq)]
pub struct SoftmaxState {
    /// Greatest score, −∞ before any key; NaN once a score was NaN.
    pub m: f32,
    /// Σ exp(s − m).
    pub l: f32,
    /// Σ exp(s − m)·v, one element for each dimension of a value.
    pub acc: Vec<f32>,
}

/// exp(s − m), with 0 for s = −∞ whatever m is, so that (−∞) − (−∞) never appears.
fn weight(s: f32, m: f32) -> f32 {
    if s == f32::NEG_INFINITY && !m.is_nan() { 0.0 } else { (s - m).exp() }
}

/// The greater of two, NaN when either is.
fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

impl SoftmaxState {
    /// No key seen; values have `dim` elements.
    pub fn empty(dim: usize) -> Self {
        SoftmaxState { m: f32::NEG_INFINITY, l: 0.0, acc: vec![0.0; dim] }
    }

    /// Moves the reference maximum to `m`.
    fn rescale(&mut self, m: f32) {
        let w = weight(self.m, m);
        self.m = m;
        self.l *= w;
        self.acc.iter_mut().for_each(|a| *a *= w);
    }

    /// Sees a tile of keys: `scores[i]` with row i of `values` [scores, dim]. A score of −∞ is an invisible key, whose value is not
    /// read, so it may be NaN.
    ///
    /// # Panics
    /// When `values` does not have `dim` elements for each score.
    pub fn push(&mut self, scores: &[f32], values: &[f32]) {
        let dim = self.acc.len();
        assert_eq!(values.len(), scores.len() * dim, "one value row of {dim} for each score");
        self.rescale(scores.iter().fold(self.m, |m, &s| max(m, s)));
        for (i, &s) in scores.iter().enumerate().filter(|(_, s)| **s != f32::NEG_INFINITY) {
            let w = weight(s, self.m);
            self.l += w;
            for (a, v) in self.acc.iter_mut().zip(&values[i * dim..(i + 1) * dim]) {
                *a += w * v;
            }
        }
    }

    /// Sees a logit that has no value; a row that saw nothing else still gives 0.
    pub fn push_sink(&mut self, logit: f32) {
        self.rescale(max(self.m, logit));
        self.l += weight(logit, self.m);
    }

    /// Sees all that `other` saw.
    ///
    /// # Panics
    /// When the values differ in dimension.
    pub fn merge(&mut self, other: &SoftmaxState) {
        assert_eq!(self.acc.len(), other.acc.len(), "both states have values of the same dimension");
        self.rescale(max(self.m, other.m));
        let w = weight(other.m, self.m);
        self.l += w * other.l;
        for (a, b) in self.acc.iter_mut().zip(&other.acc) {
            *a += w * b;
        }
    }

    /// Softmax-weighted mean of the values: acc / l; 0 when nothing was seen.
    pub fn finish(&self) -> Vec<f32> {
        if self.l == 0.0 { vec![0.0; self.acc.len()] } else { self.acc.iter().map(|a| a / self.l).collect() }
    }

    /// ln Σ exp(s), sinks included; −∞ when nothing was seen.
    pub fn log_sum_exp(&self) -> f32 {
        if self.l == 0.0 { f32::NEG_INFINITY } else { self.m + self.l.ln() }
    }
}
