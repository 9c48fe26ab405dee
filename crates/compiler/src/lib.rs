//! Decides how a block is computed, before any data is seen: problem, kernels and machine in, plan out, all plain data.
#![forbid(unsafe_code)]

mod cost;
mod explain;
mod plan;

pub use cost::Cost;
pub use explain::explain;
pub use plan::{Planner, Scratch, attention_tiles, weights_on_gpu};
