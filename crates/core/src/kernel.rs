//! Kernels and machines as plain data, and what a backend offers.

use std::fmt;

use serde::Serialize;

use crate::{
    DType, Result,
    data::Mask,
    problem::{AttentionProblem, RopeLayout},
};

/// What a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum KernelOp {
    /// x · Wᵀ with packed W, prologue and epilogue.
    Gemm,
    /// x · Wᵀ with W in int8, x quantised row by row.
    GemmInt8,
    /// RMSNorm of rows.
    Norm,
    /// Rotary embedding of rows.
    Rope,
    /// Softmax of rows.
    Softmax,
    /// Tiled attention of many queries with online softmax.
    AttentionPrefill,
    /// Attention of few queries over a long cache, keys split and merged.
    AttentionDecode,
}

impl KernelOp {
    /// The stem of the kernel's name and of its files.
    pub const fn name(self) -> &'static str {
        match self {
            KernelOp::Gemm => "gemm",
            KernelOp::GemmInt8 => "gemm_int8",
            KernelOp::Norm => "norm",
            KernelOp::Rope => "rope",
            KernelOp::Softmax => "softmax",
            KernelOp::AttentionPrefill => "attention_prefill",
            KernelOp::AttentionDecode => "attention_decode",
        }
    }
}

/// One row of a backend's dispatch table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelInfo {
    /// What it computes.
    pub op: KernelOp,
    /// Instruction set or architecture, as users write it.
    pub isa: &'static str,
    /// Dtypes of what it reads.
    pub dtypes: &'static [DType],
    /// Rows of the register tile.
    pub tile_rows: usize,
    /// Columns of the register tile (lanes of all its vectors).
    pub tile_columns: usize,
}

impl fmt::Display for KernelInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dtypes {
            [one] => write!(f, "{}-{one}-{}", self.op.name(), self.isa),
            _ => write!(f, "{}-{}", self.op.name(), self.isa),
        }
    }
}

/// What a machine profile describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Cores that share the host's memory.
    Cpu,
    /// An accelerator with memory of its own.
    Gpu,
}

/// What the planner knows of a machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MachineProfile {
    /// Which kind of plan it takes.
    pub kind: DeviceKind,
    /// The processor's own name.
    pub name: String,
    /// Instruction set in use.
    pub isa: String,
    /// Threads in use; multiprocessors of a GPU.
    pub threads: usize,
    /// Bytes of first-level data cache of a core, of shared memory of a multiprocessor.
    pub l1_bytes: usize,
    /// Bytes of second-level cache of a core, of the whole GPU.
    pub l2_bytes: usize,
    /// Floating-point operations per second of all threads, f32 FMA.
    pub peak_flops: f64,
    /// Floating-point operations per second of all threads on bf16.
    pub bf16_peak_flops: f64,
    /// Operations per second of all threads on int8.
    pub int8_peak_flops: f64,
    /// Bytes per second read from memory by all threads.
    pub bandwidth: f64,
    /// Seconds to start and join a parallel step.
    pub launch_seconds: f64,
}

/// One run of a single kernel with its data, for conformance.
#[expect(clippy::large_enum_variant, reason = "cases are few and their data is larger than any variant")]
#[derive(Clone, Debug)]
pub enum KernelCase {
    /// x `[m, k]` · Wᵀ, W `[n, k]`, plus bias `[n]`: gives `[m, n]`.
    Gemm {
        /// Rows of x.
        m: usize,
        /// Rows of W.
        n: usize,
        /// Columns of both.
        k: usize,
        /// [m, k].
        x: Vec<f32>,
        /// [n, k].
        w: Vec<f32>,
        /// `[n]`.
        bias: Option<Vec<f32>>,
        /// Dtype that W is packed in.
        weight_dtype: DType,
    },
    /// x `[m, k]` · Wᵀ in int8, W `[n, k]`, plus bias `[n]`: gives `[m, n]`, the same on every instruction set.
    GemmInt8 {
        /// Rows of x.
        m: usize,
        /// Rows of W.
        n: usize,
        /// Columns of both.
        k: usize,
        /// [m, k].
        x: Vec<f32>,
        /// [n, k].
        w: Vec<f32>,
        /// `[n]`.
        bias: Option<Vec<f32>>,
    },
    /// Rows of `width` divided by their root mean square, times `weight`.
    Norm {
        /// Elements of a row.
        width: usize,
        /// [rows, width].
        x: Vec<f32>,
        /// `[width]`.
        weight: Vec<f32>,
        /// Added to the mean square.
        eps: f64,
    },
    /// Rows [rows, head_dim] turned by `angles`.
    Rope {
        /// Elements of a row.
        head_dim: usize,
        /// Leading elements that turn.
        rotary_dim: usize,
        /// Which elements turn together.
        layout: RopeLayout,
        /// [rows, head_dim].
        x: Vec<f32>,
        /// Radians, [rows, rotary_dim/2].
        angles: Vec<f64>,
    },
    /// Softmax of rows of `width`.
    Softmax {
        /// Elements of a row.
        width: usize,
        /// [rows, width].
        x: Vec<f32>,
    },
    /// Attention by the prefill or the decode kernel.
    Attention {
        /// What is computed.
        problem: AttentionProblem,
        /// [T, H, D].
        q: Vec<f32>,
        /// [B, G, rows, D]; rows beyond a sequence's length may hold anything.
        k: Vec<f32>,
        /// [B, G, rows, D].
        v: Vec<f32>,
        /// Rows of k and v.
        rows: usize,
        /// The arbitrary mask, where the problem has one.
        mask: Option<Mask>,
        /// `[H]`, where the problem has sinks.
        sinks: Option<Vec<f32>>,
        /// `[H]`, where the problem has ALiBi.
        slopes: Option<Vec<f32>>,
        /// Rows of each part of the keys, a multiple of 64, or all in one part.
        split: Option<usize>,
    },
}

impl KernelCase {
    /// Dtype of the weights or the cache, F32 where there is neither.
    pub fn dtype(&self) -> DType {
        match self {
            KernelCase::Gemm { weight_dtype, .. } => *weight_dtype,
            // Where they differ, the wider one decides.
            KernelCase::Attention { problem, .. } if problem.kv_dtype == problem.dtype => problem.dtype,
            _ => DType::F32,
        }
    }
}

/// A device family that runs kernels.
pub trait Backend: Send + Sync {
    /// What is known of the machine without measuring (rates are priors).
    fn profile(&self) -> MachineProfile;
    /// Every kernel that can run here.
    fn kernels(&self) -> Vec<KernelInfo>;
    /// Runs one kernel of [`Backend::kernels`]. Attention gives [T, H, D] followed by the log-sum-exp [T, H].
    ///
    /// # Errors
    /// `InvalidInput` when the case does not fit the kernel.
    fn run(&self, kernel: &KernelInfo, case: &KernelCase) -> Result<Vec<f32>>;
}
