//! How kernels multiply bf16: an instruction set that differs from another in nothing else shares its vectors.

#[cfg(target_arch = "x86_64")]
use super::int8_x86::{Int8, Vnni, Widening};
use super::{DotState, DotTile};

/// How vectors of one width multiply bf16.
pub trait Dots: Copy + Send + Sync + 'static {
    /// How they multiply int8.
    #[cfg(target_arch = "x86_64")]
    type Int8: Int8;
    /// [`super::Simd::DOT_ROWS`].
    const ROWS: usize;
    /// [`super::Simd::dots`].
    /// # Safety
    /// As there; the processor has what `Self` asks for.
    unsafe fn dots(state: &mut DotState, t: &DotTile);
    /// [`super::Simd::end_dots`].
    fn end(state: DotState);
    /// [`super::Simd::DOT_PROBE_FLOPS`].
    const PROBE_FLOPS: usize;
    /// [`super::Simd::dot_probe`].
    /// # Safety
    /// The processor has what `Self` asks for.
    unsafe fn probe(rounds: usize) -> f32;
}

/// As f32.
#[derive(Clone, Copy, Debug)]
pub struct Widened;

impl Dots for Widened {
    #[cfg(target_arch = "x86_64")]
    type Int8 = Widening;
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

/// As f32, and int8 by VNNI. The processor has AVX-512 VNNI.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub struct WidenedVnni;

#[cfg(target_arch = "x86_64")]
impl Dots for WidenedVnni {
    type Int8 = Vnni;
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
