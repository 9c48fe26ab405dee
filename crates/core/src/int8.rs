//! Projections in int8: what the codes and scales of weights and of activations are, as plain scalar code. Every backend computes these bits.
//!
//! A weight matrix [n, k] has one scale for each output (row); an activation has one for each token, found when it is there. Both are
//! symmetric: with a the greatest |x| of the row, scale = s16(a / 127) and code = x / scale in −127 … 127. One output of one token is
//!
//! ```text
//! y = f32(Σ over k of code(x) · code(w)) · (scale(x) · scale(w))
//! ```
//!
//! whose sum is exact in 32 bits as long as k ≤ [`MOST_INPUTS`]; bias, norms, RoPE and residual follow as for any other weights. The scheme is
//! that of LLM.int8() (arXiv:2208.07339) without its outliers in 16 bits.
//!
//! All arithmetic is f32, each operation rounded to nearest even: "/ scale" is a product with 1 / scale, and codes are rounded to the nearest
//! integer, ties to even. s16 rounds up to 16 significant bits. So code · scale is exact, one code of a row is ±127, and a row that is
//! dequantised and quantised again has the same codes and scale: weights in f32 can stand for their codes. Near the end of f32's range, where
//! 127 · scale would overflow, s16 rounds down instead.
//!
//! A scale that would be less than the least normal f32 is 0, and so are the codes of its row. A row that holds NaN or ±∞ has the scale NaN
//! and codes of 0: everything that is computed with it is NaN, and nothing else is.
//!
//! Activations are rounded to the compute dtype before they are quantised, where the input norm has made them as where they were given. Weights
//! are not rounded before, so that their codes are those of the stored numbers in every compute dtype.

use std::{fmt, str::FromStr};

use crate::{Error, Result};

/// Greatest code; the least is −`CODE_MAX`.
pub const CODE_MAX: f32 = 127.0;

/// Most inputs of a projection: 127² times as many is less than 2³¹.
pub const MOST_INPUTS: usize = 1 << 17;

/// Adding it leaves no bits behind the point, and the integer, rounded to even, in the last bits.
pub const ROUND_MAGIC: f32 = 12_582_912.0;

/// How a block holds the weights of its projections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum WeightKind {
    /// Elements of the compute dtype.
    #[default]
    Compute,
    /// Codes of 8 bits, one scale for each output; activations are quantised token by token.
    Int8,
}

impl WeightKind {
    /// Bytes of a matrix [n, k], in a block that computes in elements of `size` bytes.
    pub fn bytes(self, n: usize, k: usize, size: usize) -> f64 {
        match self {
            WeightKind::Compute => (n as f64) * (k * size) as f64,
            WeightKind::Int8 => (n as f64) * (k + size_of::<f32>()) as f64,
        }
    }
}

/// Prints as users write it: `auto`, `int8`.
impl fmt::Display for WeightKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            WeightKind::Compute => "auto",
            WeightKind::Int8 => "int8",
        })
    }
}

impl FromStr for WeightKind {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(WeightKind::Compute),
            "int8" => Ok(WeightKind::Int8),
            _ => Err(Error::invalid(format!("unknown kind of weights '{s}'; accepted: auto, int8"))),
        }
    }
}

/// The scale of elements whose greatest absolute value is `greatest`; NaN where that is not finite.
#[inline]
pub fn scale(greatest: f32) -> f32 {
    /// Bits of a significand of 24 beyond the first 16.
    const REST: u32 = 0xff;
    if !greatest.is_finite() {
        return f32::NAN;
    }
    let exact = greatest / CODE_MAX;
    if exact < f32::MIN_POSITIVE {
        return 0.0;
    }
    let up = f32::from_bits((exact.to_bits() + REST) & !REST);
    if (CODE_MAX * up).is_finite() { up } else { f32::from_bits(exact.to_bits() & !REST) }
}

/// What elements are multiplied by to become codes, before they are rounded; 0 where there are no codes but 0.
#[inline]
pub fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// The code of a finite `x`.
#[inline]
pub fn code(x: f32, inverse: f32) -> i8 {
    let code = (x * inverse).clamp(-CODE_MAX, CODE_MAX);
    // The last byte of the sum is the integer in two's complement.
    (code + ROUND_MAGIC).to_bits() as i8
}

/// Quantises a row: writes its codes and returns its scale.
///
/// # Panics
/// When the lengths differ.
pub fn quantise(row: &[f32], codes: &mut [i8]) -> f32 {
    assert_eq!(row.len(), codes.len(), "a code for each element");
    let finite = row.iter().all(|x| x.is_finite());
    let greatest = row.iter().fold(0f32, |m, x| m.max(x.abs()));
    let scale = scale(if finite { greatest } else { f32::NAN });
    let inverse = inverse(scale);
    codes.iter_mut().zip(row).for_each(|(c, &x)| *c = if finite { code(x, inverse) } else { 0 });
    scale
}

/// What a code stands for.
#[inline]
pub fn element(code: i8, scale: f32) -> f32 {
    f32::from(code) * scale
}

/// One output before the bias: `sum` is that of the products of codes.
#[inline]
pub fn output(sum: i32, x_scale: f32, w_scale: f32) -> f32 {
    sum as f32 * (x_scale * w_scale)
}

/// Refuses a projection whose sums could leave 32 bits.
///
/// # Errors
/// `InvalidInput` when `k` is more than [`MOST_INPUTS`].
pub fn check_inputs(k: usize) -> Result<()> {
    if k <= MOST_INPUTS {
        return Ok(());
    }
    Err(Error::invalid(format!("weights of int8 take at most {MOST_INPUTS} inputs of a projection, got {k}")))
}
