//! The block's parts, one row at a time.

use super::number::{Number, dot};
use crate::problem::RopeLayout;

/// x·Wᵀ + bias of one row: `x` `[k]`, `w` [n, k], `bias` `[n]`; gives `[n]`.
pub(super) fn project_row<N: Number>(x: &[N], w: &[f32], bias: Option<&[f32]>) -> Vec<N> {
    let output = |(i, w): (usize, &[f32])| {
        let sum = dot(|j| N::from_f64(w[j].into()), x);
        bias.map_or(sum, |b| sum + N::from_f64(b[i].into()))
    };
    w.chunks_exact(x.len()).enumerate().map(output).collect()
}

/// x / √(mean(x²) + eps) · weight.
pub(super) fn norm_row<N: Number>(x: &[N], weight: &[f32], eps: f64) -> Vec<N> {
    let mean = dot(|i| x[i], x) / N::from_f64(x.len() as f64);
    let root = (mean + N::from_f64(eps)).sqrt();
    // A row of zeros with eps 0 has no direction; 0/0 is the definition's own answer.
    x.iter().zip(weight).map(|(&x, &w)| x / root * N::from_f64(w.into())).collect()
}

/// Turns the leading pairs of `row` by `angles`, in f64 radians, and multiplies them by `factor`.
pub(super) fn rope_row<N: Number>(row: &mut [N], layout: RopeLayout, angles: &[f64], factor: f64) {
    let half = angles.len();
    for (d, angle) in angles.iter().enumerate() {
        let (i, j) = match layout {
            RopeLayout::Half => (d, d + half),
            RopeLayout::Interleaved => (2 * d, 2 * d + 1),
        };
        let (cos, sin) = (N::from_f64(angle.cos() * factor), N::from_f64(angle.sin() * factor));
        (row[i], row[j]) = (row[i] * cos - row[j] * sin, row[j] * cos + row[i] * sin);
    }
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| v.into()).collect()
}

/// x·Wᵀ + bias: `x` [m, k], `w` [n, k], `bias` `[n]`; gives [m, n]. `k` must not be 0.
pub fn gemm(x: &[f32], w: &[f32], bias: Option<&[f32]>, k: usize) -> Vec<f64> {
    x.chunks_exact(k).flat_map(|x| project_row(&widen(x), w, bias)).collect()
}

/// RMSNorm of rows: `x` [rows, width], `weight` `[width]`; gives [rows, width].
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    x.chunks_exact(weight.len()).flat_map(|x| norm_row(&widen(x), weight, eps)).collect()
}

/// Rotary embedding of rows: `x` [rows, head_dim], `angles` [rows, rotary_dim/2] in radians; gives [rows, head_dim].
pub fn rope(x: &[f32], head_dim: usize, rotary_dim: usize, layout: RopeLayout, angles: &[f64]) -> Vec<f64> {
    let mut out = widen(x);
    for (row, angles) in out.chunks_exact_mut(head_dim).zip(angles.chunks_exact(rotary_dim / 2)) {
        rope_row(row, layout, angles, 1.0);
    }
    out
}

/// Softmax of rows: `x` [rows, width]; gives [rows, width]. A row of −∞ alone gives 0.
pub fn softmax(x: &[f32], width: usize) -> Vec<f64> {
    let row = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let p: Vec<f64> =
            x.iter().map(|&s| if s == f32::NEG_INFINITY { 0.0 } else { (f64::from(s) - f64::from(max)).exp() }).collect();
        let sum: f64 = p.iter().sum();
        p.into_iter().map(move |p| if sum == 0.0 { 0.0 } else { p / sum })
    };
    x.chunks_exact(width).flat_map(row).collect()
}
