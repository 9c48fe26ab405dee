//! What a step is predicted to take: the greater of its bytes over the bandwidth and its operations over the rate, plus a launch.

use lawson_core::{DType, kernel::MachineProfile};

/// Operations and bytes of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: f64,
    /// Times it is launched.
    pub launches: usize,
}

/// The share of the peak that a product reaches; a prior that measurement replaces.
const PRODUCT_EFFICIENCY: f64 = 0.75;

impl Cost {
    /// Predicted seconds on `machine` with products of `dtype`.
    pub fn seconds(&self, machine: &MachineProfile, dtype: DType) -> f64 {
        self.seconds_at(machine, if dtype == DType::BF16 { machine.bf16_peak_flops } else { machine.peak_flops })
    }

    /// Predicted seconds on `machine` with products at most at `peak` operations a second.
    pub fn seconds_at(&self, machine: &MachineProfile, peak: f64) -> f64 {
        let compute = self.flops / (peak * PRODUCT_EFFICIENCY);
        compute.max(self.bytes / machine.bandwidth) + self.launches as f64 * machine.launch_seconds
    }
}
