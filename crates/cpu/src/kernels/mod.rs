//! Bodies of the kernels, written once over [`crate::simd::Simd`]; `dispatch` instantiates them.
//!
//! Each computes one work item, so that the parallel loop around it needs no target features.

pub mod attention;
pub mod attention_decode;
mod attention_decode_codes;
pub mod attention_prefill;
pub mod attention_prefill_bf16;
pub mod codes;
pub mod gemm;
pub mod gemm_int8;
pub mod norm;
pub mod rope;
pub mod rows;
pub mod scores;
pub mod softmax;
pub mod tile;
