//! The kernels: their sources, and every instance of them that a plan may ask for.
//!
//! A source is a file `cu/NAME.cu` with kernels `extern "C" __global__ void KERNEL(const __grid_constant__ Params p)`. To add one: a line in
//! `sources!`, its instances in [`instances`], and on the host a `#[repr(C)]` copy of its parameters that is
//! [`KernelParams`](crate::KernelParams). Where the macros of a source differ, the source says what they are.

#![allow(missing_docs, reason = "parameter structs mirror those of the sources, which say what each field is")]

pub mod attention;
pub mod cache;
pub mod gemv;
mod geometry;
pub mod heads;
mod instances;
pub mod passes;
pub mod rows;

pub use instances::instances;

use crate::nvrtc::Source;

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

sources! {
    /// RMSNorm of rows.
    NORM = "norm" ["rms_norm"] ["prelude.cuh"];
    /// The product with one row of x.
    GEMV = "gemv" ["gemv"] ["prelude.cuh", "tile.cuh"];
    /// What follows the QKV projection.
    QKV_EPILOGUE = "qkv_epilogue" ["qkv_epilogue"] ["prelude.cuh", "cache.cuh", "rope.cuh"];
    /// Softmax of rows.
    SOFTMAX = "softmax" ["softmax"] ["prelude.cuh"];
    /// Softmax of rows in three passes.
    SOFTMAX_PASSES = "softmax_passes" ["softmax_max", "softmax_exp", "softmax_divide"] ["prelude.cuh"];
    /// RoPE in two passes.
    ROPE_PASSES = "rope_passes" ["rope_partner", "rope_combine"] ["prelude.cuh", "cache.cuh", "rope.cuh"];
    /// Passes over scores.
    SCORES = "scores" ["scores"] ["prelude.cuh", "cache.cuh"];
    /// Copies of rows.
    TRANSPOSE = "transpose" ["transpose_to_heads", "transpose_to_tokens", "gather_cache"] ["prelude.cuh", "cache.cuh"];
    /// Sum with the residual.
    RESIDUAL = "residual" ["residual"] ["prelude.cuh"];
    /// Attention in f32 arithmetic.
    ATTENTION_F32 = "attention_f32" ["attention_f32", "attention_f32_merge"] ["prelude.cuh", "cache.cuh"];
    /// Attention of many queries on tensor cores.
    ATTENTION_PREFILL = "attention_prefill" ["attention_prefill"]
        ["prelude.cuh", "cache.cuh", "prefill_call.cuh", "tile.cuh", "mma_sm80.cuh", "score_rules.cuh", "softmax_state.cuh"];
    /// The same on Hopper.
    ATTENTION_PREFILL_SM90 = "attention_prefill_sm90" ["attention_prefill_sm90"]
        ["prelude.cuh", "cache.cuh", "prefill_call.cuh", "tile.cuh", "copy_engine.cuh", "mma_sm90.cuh", "score_rules.cuh", "softmax_state.cuh"];
    /// Attention of few queries on tensor cores.
    ATTENTION_DECODE = "attention_decode" ["attention_decode"]
        ["prelude.cuh", "cache.cuh", "tile.cuh", "mma_sm80.cuh", "copy_engine.cuh", "decode_steps.cuh", "softmax_state.cuh"];
}
