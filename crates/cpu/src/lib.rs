//! Lawson's CPU backend: SIMD kernels, packing, threads, and the executor of plans.
//!
//! Kernels are written once over [`simd::Simd`] and instantiated for every instruction set in [`dispatch`].

pub mod arena;
mod backend;
pub mod dispatch;
pub mod executor;
pub mod isa;
pub mod kernels;
pub mod machine;
pub mod math;
pub mod pack;
pub mod simd;
pub mod threads;

pub use backend::Cpu;
pub use isa::Isa;
