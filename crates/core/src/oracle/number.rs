//! Arithmetic in f64 for the right answer and in f32 for the honest reference.

use std::{
    fmt::Debug,
    iter::Sum,
    ops::{Add, AddAssign, Div, Mul, Sub},
};

/// What the oracle computes in.
pub trait Number:
    Copy
    + Debug
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + Sum
{
    /// Less than every finite number.
    const NEG_INFINITY: Self;
    /// The nearest number to `v`.
    fn from_f64(v: f64) -> Self;
    /// `v` in double precision.
    fn to_f64(self) -> f64;
    /// e to this power.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
}

macro_rules! number {
    ($($t:ident),*) => {$(
        impl Number for $t {
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            fn from_f64(v: f64) -> Self {
                v as $t
            }
            fn to_f64(self) -> f64 {
                self.into()
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn ln(self) -> Self {
                self.ln()
            }
            fn tanh(self) -> Self {
                self.tanh()
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
        }
    )*};
}
number!(f32, f64);

/// Σ a(i)·b[i], in eight interleaved partial sums.
pub(super) fn dot<N: Number>(a: impl Fn(usize) -> N, b: &[N]) -> N {
    const LANES: usize = 8;
    let mut sums = [N::default(); LANES];
    let whole = b.len() / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += a(start + lane) * b[start + lane];
        }
    }
    sums.into_iter().sum::<N>() + (whole..b.len()).map(|i| a(i) * b[i]).sum()
}
