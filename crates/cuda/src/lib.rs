//! Lawson's CUDA backend: GPUs, kernels compiled when they are first needed, device memory, matrix products and graphs.
//!
//! Nothing of CUDA is needed to build this crate. The driver, NVRTC and cuBLASLt are loaded when they are first asked for; a machine
//! without one of them gets an [`Error`](lawson_core::Error) of kind [`Unavailable`](lawson_core::ErrorKind::Unavailable) that says what is
//! missing and where it comes from.

mod backend;
pub mod blas;
pub mod buffer;
pub mod cache;
pub mod device;
mod driver;
pub mod executor;
pub mod graph;
pub mod kernels;
pub mod launch;
mod measure;
pub mod nvrtc;
pub mod operators;
pub mod weights;

pub use buffer::{DeviceBuffer, Element, Staging, Usage};
pub use cache::{DiskCache, Jit, Module};
pub use device::{Device, DeviceInfo, Event, devices};
pub use executor::Gpu;
pub use graph::Graph;
pub use launch::{Function, Kernel, KernelParams, Launch};
pub use nvrtc::{Instance, Nvrtc, Source};

/// Whether an NVIDIA driver is installed, whatever GPUs it shows.
pub fn has_driver() -> bool {
    driver::is_installed()
}

/// Every library of NVIDIA's that blocks on a GPU need and this machine lacks, each with where to get it.
pub fn missing_libraries() -> Vec<lawson_core::Error> {
    let loaded = [driver::load(), Nvrtc::load().map(|_| ()), blas::load()];
    loaded.into_iter().filter_map(Result::err).collect()
}
