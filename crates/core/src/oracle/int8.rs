//! Projections in int8, from their definition alone.

use super::number::Number;
use crate::int8::{output, quantise};

/// Codes and scales of a weight matrix [n, k].
#[derive(Clone, Debug)]
pub(super) struct Int8Matrix {
    k: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
}

impl Int8Matrix {
    /// Of `w` [n, k].
    pub(super) fn new(w: &[f32], k: usize) -> Self {
        let mut codes = vec![0; w.len()];
        let scales = w.chunks_exact(k).zip(codes.chunks_exact_mut(k)).map(|(row, codes)| quantise(row, codes)).collect();
        Int8Matrix { k, codes, scales }
    }

    /// x·Wᵀ + bias of one row: `x` `[k]`, `bias` `[n]`; gives `[n]`.
    pub(super) fn project_row<N: Number>(&self, x: &[N], bias: Option<&[f32]>) -> Vec<N> {
        let x: Vec<f32> = x.iter().map(|v| v.to_f64() as f32).collect();
        let mut codes = vec![0; self.k];
        let scale = quantise(&x, &mut codes);
        let one = |(i, (w, &w_scale)): (usize, (&[i8], &f32))| {
            let sum = w.iter().zip(&codes).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
            let y = output(sum, scale, w_scale);
            N::from_f64(bias.map_or(y, |b| y + b[i]).into())
        };
        self.codes.chunks_exact(self.k).zip(&self.scales).enumerate().map(one).collect()
    }
}

/// x·Wᵀ + bias in int8: `x` [m, k], `w` [n, k], `bias` `[n]`; gives [m, n], to the bit. `k` must not be 0.
pub fn gemm_int8(x: &[f32], w: &[f32], bias: Option<&[f32]>, k: usize) -> Vec<f32> {
    let matrix = Int8Matrix::new(w, k);
    x.chunks_exact(k).flat_map(|x| matrix.project_row(x, bias)).collect()
}
