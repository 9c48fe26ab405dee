//! The rooms under the kernels, on a GPU: `cargo test -p lawson-cuda --test gpu -- --ignored --test-threads=1`.

use std::{fs, path::PathBuf, time::Duration};

use lawson_core::DType;
use lawson_cuda::{Device, DiskCache, Instance, Jit, Kernel, KernelParams, Source};

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    x: u64,
    y: u64,
    n: i32,
    add: f32,
}
// SAFETY: the same fields as `Params` in the sources below.
unsafe impl KernelParams for Params {}

macro_rules! source {
    ($name:literal, $text:expr) => {
        Source {
            name: $name,
            kernels: &[$name],
            text: concat!(
                "#include \"params.cuh\"\nextern \"C\" __global__ void ",
                $name,
                "(const __grid_constant__ Params p) {\n",
                "const int i = blockIdx.x * blockDim.x + threadIdx.x;\n",
                $text,
                "\n}\n"
            ),
            headers: &[("params.cuh", "#pragma once\nstruct Params { const float* x; float* y; int n; float add; };\n")],
        }
    };
}

mod graph;
mod jit;
mod launch;
mod memory;
mod products;

static SCALE: Source = source!("scale", "if (i < p.n) p.y[i] = p.x[i] * FACTOR + p.add;");

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("lawson-gpu-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    folder
}

fn device() -> Device {
    Device::open(0).expect("a GPU")
}

fn jit(device: &Device) -> Jit {
    Jit::new(device, DiskCache::at(&scratch("shared"))).expect("NVRTC")
}

fn kernel(jit: &Jit, source: &'static Source) -> Kernel<Params> {
    jit.load(&[Instance::new(source, &[("FACTOR", 3)])]).expect("compiles")[0].functions()[0].typed().expect("one struct")
}

/// Seeded numbers in −1 … 1.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// ‖got − want‖ / ‖want‖.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let sum = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    sum(&mut got.iter().zip(want).map(|(g, w)| g - w)) / sum(&mut want.iter().copied())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Largest relative L2 distance that rounding the result to its type, and sums in f32, explain.
fn bound(dtype: DType, out: DType) -> f64 {
    match (dtype, out) {
        (_, DType::F32) => 2e-6,
        (DType::BF16, _) => 2.5e-3,
        _ => 3.5e-4,
    }
}
