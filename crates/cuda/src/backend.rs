//! What the planner and the conformance suite know of a GPU.

use lawson_core::{
    DType,
    kernel::{DeviceKind, KernelInfo, KernelOp, MachineProfile},
};

use crate::{DeviceInfo, Gpu};

const NARROW: &[DType] = &[DType::BF16, DType::F16];
const ALL: &[DType] = &[DType::F32, DType::BF16, DType::F16];
const WIDE: &[DType] = &[DType::F32];

/// FP32 lanes of a multiprocessor.
fn f32_lanes(compute_capability: (u32, u32)) -> f64 {
    if compute_capability == (8, 0) { 64.0 } else { 128.0 }
}

/// Operations a cycle of a multiprocessor's tensor cores on 16-bit elements.
fn tensor_flops((major, minor): (u32, u32)) -> f64 {
    match (major, minor) {
        (8, 0) => 2048.0,
        (9.., _) => 4096.0,
        _ => 1024.0,
    }
}

/// What is known of a GPU without measuring; the rates are priors.
pub fn profile(info: &DeviceInfo, target: &str) -> MachineProfile {
    let multiprocessors = f64::from(info.multiprocessors);
    let clock = if info.clock_khz > 0 { f64::from(info.clock_khz) * 1e3 } else { 1.5e9 };
    MachineProfile {
        kind: DeviceKind::Gpu,
        name: info.name.clone(),
        isa: target.to_owned(),
        threads: info.multiprocessors as usize,
        l1_bytes: info.shared_memory_per_multiprocessor as usize,
        l2_bytes: info.l2_bytes as usize,
        peak_flops: 2.0 * f32_lanes(info.compute_capability) * multiprocessors * clock,
        bf16_peak_flops: tensor_flops(info.compute_capability) * multiprocessors * clock,
        int8_peak_flops: 2.0 * tensor_flops(info.compute_capability) * multiprocessors * clock,
        // Data-centre GPUs read some 25 GB/s with each multiprocessor.
        bandwidth: 25e9 * multiprocessors,
        launch_seconds: 2e-6,
    }
}

impl Gpu {
    /// What is known of it without measuring.
    pub fn profile(&self) -> MachineProfile {
        profile(self.device().info(), self.jit().target())
    }

    /// Every family of kernels that runs on it.
    pub fn kernels(&self) -> Vec<KernelInfo> {
        kernels(self.jit().target())
    }
}

/// Every family of kernels on `target`, such as `sm_90a`.
fn kernels(target: &str) -> Vec<KernelInfo> {
    // Targets are few and known by name for as long as the program runs.
    let isa: &'static str = match target {
        "sm_80" => "sm_80",
        "sm_86" => "sm_86",
        "sm_89" => "sm_89",
        "sm_90a" => "sm_90a",
        "sm_100" | "sm_100a" => "sm_100",
        "sm_120" | "sm_120a" => "sm_120",
        _ => "cuda",
    };
    let info = |op, dtypes, tile_rows, tile_columns| KernelInfo { op, isa, dtypes, tile_rows, tile_columns };
    vec![
        info(KernelOp::Gemm, ALL, 1, 1),
        info(KernelOp::Norm, ALL, 1, 1),
        info(KernelOp::Rope, ALL, 1, 1),
        info(KernelOp::Softmax, ALL, 1, 1),
        info(KernelOp::AttentionPrefill, NARROW, 128, 64),
        info(KernelOp::AttentionPrefill, WIDE, 64, 64),
        info(KernelOp::AttentionDecode, NARROW, 16, 16),
        info(KernelOp::AttentionDecode, WIDE, 16, 64),
    ]
}
