//! The kernels: their sources, and every instance of them that a plan may ask for.
//!
//! A source is a file `cu/NAME.cu` with kernels `extern "C" __global__ void KERNEL(const __grid_constant__ Params p)`. To add one: a line in
//! `sources!`, its instances in [`instances`], and on the host a `#[repr(C)]` copy of its parameters that is
//! [`KernelParams`](crate::KernelParams). Where the macros of a source differ, the source says what they are.

use crate::nvrtc::{Instance, Source};

/// NAME = file [kernels] [headers, those that they include too].
macro_rules! sources {
    ($($(#[$doc:meta])* $name:ident = $stem:literal [$($kernel:literal),+] [$($header:literal),*];)*) => {
        $($(#[$doc])* pub static $name: Source = Source {
            name: $stem,
            kernels: &[$($kernel),+],
            text: include_str!(concat!("../../cu/", $stem, ".cu")),
            headers: &[$(($header, include_str!(concat!("../../cu/", $header)))),*],
        };)*
        /// Every source.
        pub static SOURCES: &[&Source] = &[$(&$name),*];
    };
}

sources! {}

/// Every instance that a plan may ask for. `tests/compile_all.rs` compiles them for every GPU it can.
pub fn instances() -> Vec<Instance> {
    Vec::new()
}
