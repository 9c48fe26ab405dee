//! How kernels multiply bf16: an instruction set that differs from another in nothing else shares its vectors.

use super::{DotState, DotTile};

/// How vectors of one width multiply bf16.
pub trait Dots: Copy + Send + Sync + 'static {
    /// [`Simd::DOT_ROWS`].
    const ROWS: usize;
    /// [`Simd::dots`].
    /// # Safety
    /// As there; the processor has what `Self` asks for.
    unsafe fn dots(state: &mut DotState, t: &DotTile);
    /// [`Simd::end_dots`].
    fn end(state: DotState);
    /// [`Simd::DOT_PROBE_FLOPS`].
    const PROBE_FLOPS: usize;
    /// [`Simd::dot_probe`].
    /// # Safety
    /// The processor has what `Self` asks for.
    unsafe fn probe(rounds: usize) -> f32;
}

/// As f32.
#[derive(Clone, Copy, Debug)]
pub struct Widened;

impl Dots for Widened {
    const ROWS: usize = 0;
    unsafe fn dots(_: &mut DotState, _: &DotTile) {
        unreachable!("no dot products on this instruction set")
    }
    fn end(_: DotState) {}
    const PROBE_FLOPS: usize = 0;
    unsafe fn probe(_: usize) -> f32 {
        unreachable!("no dot products on this instruction set")
    }
}
