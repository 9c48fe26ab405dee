//! Operators in several passes through memory, which fused kernels replace: `cu/rope_passes.cu`, `cu/softmax_passes.cu`.

use std::fmt::Display;

use lawson_core::{DType, Result};

use super::{ROPE_PASSES, SOFTMAX_PASSES, geometry, heads};
use crate::{Instance, Kernel, KernelParams, Launch, Module};

/// Parameters of `rope_partner` and `rope_combine`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RopeParams {
    pub x: u64,
    pub partner: u64,
    pub y: u64,
    pub frequencies: u64,
    pub starts: u64,
    pub past: u64,
    pub sequences: i32,
    pub tokens: i32,
    pub uniform: i32,
    pub heads: i32,
    pub head_dim: i32,
    pub rotary_dim: i32,
    pub interleaved: i32,
    pub attention_factor: f32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order, without padding.
unsafe impl KernelParams for RopeParams {}

/// RoPE by way of a copy in which each element has changed places with its pair's other.
#[derive(Clone, Debug)]
pub struct RopePasses {
    partner: Kernel<RopeParams>,
    combine: Kernel<RopeParams>,
    launch: Launch,
    shape: heads::Shape,
}

impl RopePasses {
    fn vector(shape: &heads::Shape) -> usize {
        let half = if shape.interleaved { shape.rotary_dim } else { shape.rotary_dim / 2 };
        geometry::vector(shape.to, &[shape.head_dim, half])
    }

    /// What is compiled.
    pub fn instance(shape: &heads::Shape) -> Instance {
        Instance::new(&ROPE_PASSES, &[("DTYPE", geometry::code(shape.to)), ("VEC", Self::vector(shape) as i64)])
    }

    /// Of the first heads of `shape`.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn new(module: &Module, shape: heads::Shape) -> Result<Self> {
        let chunks = (shape.head_dim / Self::vector(&shape)).clamp(1, 256);
        let block = [chunks as u32, (256 / chunks).clamp(1, shape.heads[0].max(1)) as u32, 1];
        let launch = Launch { block, ..Launch::new([shape.tokens as u32, 1, 1], 1).overlapping_previous() };
        Ok(RopePasses { partner: module.kernel("rope_partner")?, combine: module.kernel("rope_combine")?, launch, shape })
    }

    /// Bytes of the copy.
    pub fn partner_bytes(shape: &heads::Shape) -> usize {
        shape.tokens * shape.heads[0] * shape.head_dim * shape.to.size()
    }

    /// Enqueues both passes; what the shape says is filled in.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn run(&self, params: RopeParams, problem: &dyn Display) -> Result<()> {
        let s = &self.shape;
        let params = RopeParams {
            tokens: s.tokens as i32,
            heads: s.heads[0] as i32,
            head_dim: s.head_dim as i32,
            rotary_dim: s.rotary_dim as i32,
            interleaved: i32::from(s.interleaved),
            ..params
        };
        // SAFETY: the caller's.
        unsafe {
            self.partner.launch(&self.launch, &params, problem)?;
            self.combine.launch(&self.launch, &params, problem)
        }
    }
}

/// Parameters of `softmax_max`, `softmax_exp` and `softmax_divide`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftmaxParams {
    pub x: u64,
    pub y: u64,
    pub row_max: u64,
    pub row_sum: u64,
    pub rows: i32,
    pub width: i32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order, without padding.
unsafe impl KernelParams for SoftmaxParams {}

/// Softmax of contiguous f32 rows in three passes.
#[derive(Clone, Debug)]
pub struct SoftmaxPasses {
    passes: [Kernel<SoftmaxParams>; 3],
    launch: Launch,
}

impl SoftmaxPasses {
    /// What is compiled.
    pub fn instance(width: usize) -> Instance {
        Instance::new(&SOFTMAX_PASSES, &[("VEC", geometry::vector(DType::F32, &[width]) as i64)])
    }

    /// Over `rows` rows of `width` elements.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn new(module: &Module, rows: usize, width: usize) -> Result<Self> {
        let vectors = width / geometry::vector(DType::F32, &[width]);
        let (grid, block) = geometry::rows(rows, vectors, 4);
        let launch = Launch { block, ..Launch::new(grid, 1).overlapping_previous() };
        let passes = [module.kernel("softmax_max")?, module.kernel("softmax_exp")?, module.kernel("softmax_divide")?];
        Ok(SoftmaxPasses { passes, launch })
    }

    /// Enqueues the three.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn run(&self, params: &SoftmaxParams, problem: &dyn Display) -> Result<()> {
        // SAFETY: the caller's.
        self.passes.iter().try_for_each(|kernel| unsafe { kernel.launch(&self.launch, params, problem) })
    }
}
