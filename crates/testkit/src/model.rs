//! A whole language model of the Llama family, plainly in f32, but for its attention, which the caller computes: so that what a change in
//! attention costs can be measured as loss.

use lawson_core::{Error, Result};

/// The feed-forward part of a layer, and the norm before it.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[E]`.
    pub norm: Vec<f32>,
    /// [F, E].
    pub gate: Vec<f32>,
    /// [F, E].
    pub up: Vec<f32>,
    /// [E, F].
    pub down: Vec<f32>,
}

/// Embedding, feed-forward layers, last norm and output.
#[derive(Clone, Debug)]
pub struct Model {
    /// Hidden size, E.
    pub hidden_size: usize,
    /// Added to the mean square of every norm.
    pub eps: f64,
    /// [V, E].
    pub embedding: Vec<f32>,
    /// Of each layer.
    pub mlps: Vec<Mlp>,
    /// Weight of the last norm, `[E]`.
    pub norm: Vec<f32>,
    /// [V, E]; the embedding where `None`.
    pub output: Option<Vec<f32>>,
}

/// Gets a layer and its x [T, E], and gives x + the layer's attention of its norm, [T, E].
pub type Attend<'a> = dyn FnMut(usize, &[f32]) -> Result<Vec<f32>> + 'a;

impl Model {
    /// −log of the probability of each token but the first, in nats.
    ///
    /// # Errors
    /// `InvalidInput` for a token that the model does not have; what `attend` reports.
    pub fn losses(&self, tokens: &[u16], attend: &mut Attend<'_>) -> Result<Vec<f64>> {
        let e = self.hidden_size;
        // Nothing follows the last token.
        let given = &tokens[..tokens.len().saturating_sub(1)];
        let mut x = Vec::with_capacity(given.len() * e);
        for &t in given {
            let row = self.embedding.chunks_exact(e).nth(t.into());
            x.extend_from_slice(row.ok_or_else(|| Error::invalid(format!("the model has no token {t}")))?);
        }
        for (layer, mlp) in self.mlps.iter().enumerate() {
            x = attend(layer, &x)?;
            let h = norm_rows(&x, &mlp.norm, self.eps);
            let (gate, up) = (product(&h, &mlp.gate, e), product(&h, &mlp.up, e));
            let inner: Vec<f32> = gate.iter().zip(&up).map(|(&g, &u)| g / (1.0 + (-g).exp()) * u).collect();
            x.iter_mut().zip(product(&inner, &mlp.down, mlp.down.len() / e)).for_each(|(x, y)| *x += y);
        }
        let h = norm_rows(&x, &self.norm, self.eps);
        let logits = product(&h, self.output.as_ref().unwrap_or(&self.embedding), e);
        let vocabulary = self.embedding.len() / e;
        let next = tokens.iter().skip(1);
        Ok(logits.chunks_exact(vocabulary).zip(next).map(|(logits, &t)| loss(logits, t.into())).collect())
    }
}

/// −log softmax(logits)[token].
fn loss(logits: &[f32], token: usize) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&v| f64::from(v - most).exp()).sum();
    sum.ln() - f64::from(logits[token] - most)
}

/// RMSNorm of rows [T, E].
fn norm_rows(x: &[f32], weight: &[f32], eps: f64) -> Vec<f32> {
    let row = |x: &[f32]| {
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        let factor = (1.0 / (mean + eps).sqrt()) as f32;
        x.iter().zip(weight).map(|(&x, &w)| x * factor * w).collect::<Vec<_>>()
    };
    x.chunks_exact(weight.len()).flat_map(row).collect()
}

/// x · Wᵀ: `x` [T, k], `w` [n, k]; gives [T, n].
fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    /// Rows of x, and of W, whose products share what is loaded.
    const ROWS: usize = 2;
    const LANES: usize = 8;
    let (t, n) = (x.len() / k, w.len() / k);
    let mut out = vec![0f32; t * n];
    let whole = k / LANES * LANES;
    for j in (0..n).step_by(ROWS) {
        for i in (0..t).step_by(ROWS) {
            // At an edge the last row is computed again.
            let xs: [&[f32]; ROWS] = std::array::from_fn(|r| &x[(i + r).min(t - 1) * k..][..k]);
            let ws: [&[f32]; ROWS] = std::array::from_fn(|r| &w[(j + r).min(n - 1) * k..][..k]);
            let mut sums = [[[0f32; LANES]; ROWS]; ROWS];
            for start in (0..whole).step_by(LANES) {
                let xv = xs.map(|x| -> [f32; LANES] { std::array::from_fn(|l| x[start + l]) });
                let wv = ws.map(|w| -> [f32; LANES] { std::array::from_fn(|l| w[start + l]) });
                for (sums, x) in sums.iter_mut().zip(&xv) {
                    for (sum, w) in sums.iter_mut().zip(&wv) {
                        for (l, s) in sum.iter_mut().enumerate() {
                            *s += x[l] * w[l];
                        }
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate().take(t - i) {
                for (c, sum) in sums.iter().enumerate().take(n - j) {
                    let rest: f32 = (whole..k).map(|l| xs[r][l] * ws[c][l]).sum();
                    out[(i + r) * n + j + c] = sum.iter().sum::<f32>() + rest;
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn products_of_odd_sizes() {
        let mut rng = Rng::new(4);
        for (t, n, k) in [(1, 1, 1), (2, 3, 8), (3, 5, 19), (5, 4, 33)] {
            let (x, w) = (rng.normals(t * k, 1.0), rng.normals(n * k, 1.0));
            let want = lawson_core::oracle::gemm(&x, &w, None, k);
            let got = product(&x, &w, k);
            assert!(got.len() == want.len() && got.iter().zip(&want).all(|(g, w)| (f64::from(*g) - w).abs() < 1e-4));
        }
    }

    #[test]
    fn a_model_without_layers_by_hand() {
        // Two tokens with one number each: x = [1, -1], normed to ±1, so that logits are [2, -2] or [-2, 2].
        let model =
            Model { hidden_size: 1, eps: 0.0, embedding: vec![1.0, -1.0], mlps: Vec::new(), norm: vec![2.0], output: None };
        let losses = model.losses(&[0, 0, 1, 0], &mut |_, _| Err(Error::invalid("no layer"))).unwrap();
        let (likely, unlikely) = ((1.0 + (-4f64).exp()).ln(), (1.0 + 4f64.exp()).ln());
        for (got, want) in losses.iter().zip([likely, unlikely, unlikely]) {
            assert!((got - want).abs() < 1e-6, "{losses:?}");
        }
        assert!(losses.len() == 3 && model.losses(&[2, 0], &mut |_, x| Ok(x.to_vec())).is_err());
    }
}
