//! The right answer, computed naively: row by row, every score of a row at once, nothing shared with any kernel.
//!
//! [`Oracle`] works in f64 without any rounding. [`rounded`] is the same function as an honest implementation at the problem's
//! dtypes computes it: f32 accumulation, and each intermediate rounded once where it is stored. The rows are independent, so that
//! a few rows of a large problem can be checked without computing the others.

mod attention;
mod block;
mod int8;
mod number;
mod ops;

pub use attention::{AttentionInput, CacheRows, KvSlices, attention, attention_rounded};
pub use block::{BlockRows, Oracle, OracleOutput, rounded, rounded_over_cache};
pub use int8::gemm_int8;
pub use number::Number;
pub use ops::{gemm, rms_norm, rope, softmax};
