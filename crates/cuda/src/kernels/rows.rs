//! Kernels over rows and elements: `cu/norm.cu`, `cu/softmax.cu`, `cu/scores.cu`, `cu/transpose.cu`, `cu/residual.cu`.

use std::fmt::Display;

use lawson_core::{DType, Result};

use super::{NORM, RESIDUAL, SCORES, SOFTMAX, TRANSPOSE, cache::Cache, geometry};
use crate::{Instance, Kernel, KernelParams, Launch, Module};

/// Parameters of `rms_norm`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct NormParams {
    pub x: u64,
    pub y: u64,
    pub weight: u64,
    pub rstd: u64,
    pub x_stride: i64,
    pub y_stride: i64,
    pub rows: i32,
    pub hidden: i32,
    pub eps: f32,
    /// Up to a multiple of 8 bytes.
    pub padding: i32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order; the last is its padding.
unsafe impl KernelParams for NormParams {}

/// RMSNorm of rows of E elements.
#[derive(Clone, Debug)]
pub struct Norm {
    kernel: Kernel<NormParams>,
    launch: Launch,
    rows: usize,
    hidden: usize,
}

impl Norm {
    const ITEMS: usize = 4;

    /// What is compiled.
    pub fn instance(dtype: DType, hidden: usize) -> Instance {
        let vector = geometry::vector(dtype, &[hidden]);
        Instance::new(&NORM, &[("DTYPE", geometry::code(dtype)), ("VEC", vector as i64), ("ITEMS", Self::ITEMS as i64)])
    }

    /// Over `rows` rows.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn new(module: &Module, dtype: DType, rows: usize, hidden: usize) -> Result<Self> {
        let (grid, block) = geometry::rows(rows, hidden / geometry::vector(dtype, &[hidden]), Self::ITEMS);
        let launch = Launch { block, ..Launch::new(grid, 1).overlapping_previous() };
        Ok(Norm { kernel: module.kernel("rms_norm")?, launch, rows, hidden })
    }

    /// y = x / √(mean(x²) + eps) · weight, contiguous.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// x and y are [rows, E] in the planned dtype, weight is `[E]` f32.
    pub unsafe fn run(&self, x: u64, weight: u64, eps: f64, y: u64, problem: &dyn Display) -> Result<()> {
        let stride = self.hidden as i64;
        let params = NormParams {
            x,
            y,
            weight,
            x_stride: stride,
            y_stride: stride,
            rows: self.rows as i32,
            hidden: self.hidden as i32,
            eps: eps as f32,
            ..NormParams::default()
        };
        // SAFETY: the caller's.
        unsafe { self.kernel.launch(&self.launch, &params, problem) }
    }
}

/// Parameters of `softmax`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftmaxParams {
    pub x: u64,
    pub y: u64,
    pub sinks: u64,
    pub x_stride: i64,
    pub y_stride: i64,
    pub rows: i32,
    pub width: i32,
    pub plane_rows: i32,
    pub heads: i32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order, without padding.
unsafe impl KernelParams for SoftmaxParams {}

/// Softmax of f32 rows, written in another dtype at the same place or elsewhere.
#[derive(Clone, Debug)]
pub struct Softmax {
    kernel: Kernel<SoftmaxParams>,
    launch: Launch,
}

impl Softmax {
    /// Elements of an access and accesses of a thread; 0 where a row does not fit a block's registers. `stride` is from row to row.
    fn items(width: usize, stride: usize) -> (usize, usize) {
        let vector = geometry::vector(DType::F32, &[width, stride]);
        let accesses = width.div_ceil(vector);
        let fits = |&items: &usize| items * vector <= 32 && accesses <= items * if items == 2 { 32 } else { 1024 };
        (vector, [2, 4, 8].into_iter().find(fits).unwrap_or(0))
    }

    /// What is compiled.
    pub fn instance(out: DType, width: usize, stride: usize) -> Instance {
        let (vector, items) = Self::items(width, stride);
        Self::with(out, vector, items)
    }

    /// The same where rows are read twice, with the maximum and sum taken online, however narrow they are.
    pub fn online_instance(width: usize) -> Instance {
        Self::with(DType::F32, Self::items(width, width).0, 0)
    }

    fn with(out: DType, vector: usize, items: usize) -> Instance {
        let macros = [("DTYPE", 0), ("OUT_DTYPE", geometry::code(out)), ("VEC", vector as i64), ("ITEMS", items as i64)];
        Instance::new(&SOFTMAX, &macros)
    }

    /// Over `rows` rows of `width` elements.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn new(module: &Module, rows: usize, width: usize, stride: usize) -> Result<Self> {
        let (vector, items) = Self::items(width, stride);
        Self::over(module, rows, width.div_ceil(vector), if items == 0 { 1 } else { items })
    }

    /// Over contiguous rows, of the instance that reads them twice.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn online(module: &Module, rows: usize, width: usize) -> Result<Self> {
        Self::over(module, rows, width.div_ceil(Self::items(width, width).0), 4)
    }

    fn over(module: &Module, rows: usize, vectors: usize, items: usize) -> Result<Self> {
        let (grid, block) = geometry::rows(rows, vectors, items);
        let launch = Launch { block, ..Launch::new(grid, 1).overlapping_previous() };
        Ok(Softmax { kernel: module.kernel("softmax")?, launch })
    }

    /// Enqueues it.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn run(&self, params: &SoftmaxParams, problem: &dyn Display) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.kernel.launch(&self.launch, params, problem) }
    }
}

/// Parameters of `scores`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ScoresParams {
    pub scores: u64,
    pub slopes: u64,
    pub mask: u64,
    pub starts: u64,
    pub past: u64,
    pub row_stride: i64,
    pub mask_sequence_stride: i64,
    pub mask_head_stride: i64,
    pub mask_row_stride: i64,
    pub heads: i32,
    pub seq: i32,
    pub columns: i32,
    pub operations: i32,
    pub causal: i32,
    pub window: i32,
    pub scale: f32,
    pub softcap: f32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order, without padding.
unsafe impl KernelParams for ScoresParams {}

/// What [`Scores`] does to each score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreOp {
    /// Multiplies it.
    Scale = 1,
    /// Caps it.
    Softcap = 2,
    /// Adds the ALiBi bias.
    Alibi = 4,
    /// Sets invisible ones to −∞.
    Mask = 8,
}

/// One pass over f32 scores [B, H, S, stride], in place.
#[derive(Clone, Debug)]
pub struct Scores {
    kernel: Kernel<ScoresParams>,
    launch: Launch,
}

impl Scores {
    /// What is compiled; rows are a multiple of 8 apart.
    pub fn instance() -> Instance {
        Instance::new(&SCORES, &[("DTYPE", 0), ("VEC", 4)])
    }

    /// Over `rows` rows of `columns` columns.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn new(module: &Module, rows: usize, columns: usize) -> Result<Self> {
        let vectors = columns.div_ceil(4);
        let threads = vectors.next_multiple_of(32).min(256);
        let grid = [rows as u32, vectors.div_ceil(threads).min(65_535) as u32, 1];
        Ok(Scores { kernel: module.kernel("scores")?, launch: Launch::new(grid, threads as u32).overlapping_previous() })
    }

    /// Enqueues it.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn run(&self, params: &ScoresParams, problem: &dyn Display) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.kernel.launch(&self.launch, params, problem) }
    }
}

/// Parameters of the kernels of `transpose.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct TransposeParams {
    pub cache: Cache,
    pub x: u64,
    pub y: u64,
    pub k: u64,
    pub v: u64,
    pub starts: u64,
    pub past: u64,
    pub token_stride: i64,
    pub sequences: i32,
    pub heads: i32,
    pub rows: i32,
    pub row_bytes: i32,
    pub element_size: i32,
    /// Up to a multiple of 8 bytes.
    pub padding: i32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order; the last is its padding.
unsafe impl KernelParams for TransposeParams {}

/// Which copy of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// [T, H·D] to [B, H, S, D].
    ToHeads,
    /// [B, H, S, D] to [T, H·D].
    ToTokens,
    /// Rows of the cache to [B, G, L, D].
    GatherCache,
}

/// Copies of rows between layouts.
#[derive(Clone, Debug)]
pub struct Transpose {
    kernel: Kernel<TransposeParams>,
    launch: Launch,
}

impl Transpose {
    fn access(dtype: DType, head_dim: usize) -> usize {
        geometry::vector(dtype, &[head_dim]) * dtype.size()
    }

    /// What is compiled.
    pub fn instance(dtype: DType, head_dim: usize) -> Instance {
        Instance::new(&TRANSPOSE, &[("BYTES_PER_ACCESS", Self::access(dtype, head_dim) as i64)])
    }

    /// Of `rows` rows of D elements.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn new(
        module: &Module,
        copies: Copies,
        dtype: DType,
        rows: usize,
        head_dim: usize,
        multiprocessors: usize,
    ) -> Result<Self> {
        let name = match copies {
            Copies::ToHeads => "transpose_to_heads",
            Copies::ToTokens => "transpose_to_tokens",
            Copies::GatherCache => "gather_cache",
        };
        let accesses = rows * head_dim * dtype.size() / Self::access(dtype, head_dim);
        let launch = Launch::new(geometry::stride_grid(accesses, multiprocessors), 256).overlapping_previous();
        Ok(Transpose { kernel: module.kernel(name)?, launch })
    }

    /// Enqueues it.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn run(&self, params: &TransposeParams, problem: &dyn Display) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.kernel.launch(&self.launch, params, problem) }
    }
}

/// Parameters of `residual`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ResidualParams {
    pub projected: u64,
    pub x: u64,
    pub y: u64,
    pub count: i64,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order, without padding.
unsafe impl KernelParams for ResidualParams {}

/// y = projected + x, `projected` in f32.
#[derive(Clone, Debug)]
pub struct Residual {
    kernel: Kernel<ResidualParams>,
    launch: Launch,
    count: usize,
}

impl Residual {
    /// What is compiled.
    pub fn instance(dtype: DType, hidden: usize) -> Instance {
        let vector = geometry::vector(dtype, &[hidden]);
        Instance::new(&RESIDUAL, &[("DTYPE", geometry::code(dtype)), ("PROJECTED_DTYPE", 0), ("VEC", vector as i64)])
    }

    /// Over [rows, hidden].
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn new(module: &Module, dtype: DType, rows: usize, hidden: usize, multiprocessors: usize) -> Result<Self> {
        let accesses = rows * hidden / geometry::vector(dtype, &[hidden]);
        let launch = Launch::new(geometry::stride_grid(accesses, multiprocessors), 256).overlapping_previous();
        Ok(Residual { kernel: module.kernel("residual")?, launch, count: rows * hidden })
    }

    /// Enqueues it.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// All three are [rows, hidden], `projected` f32, the others in the planned dtype.
    pub unsafe fn run(&self, projected: u64, x: u64, y: u64, problem: &dyn Display) -> Result<()> {
        let params = ResidualParams { projected, x, y, count: self.count as i64 };
        // SAFETY: the caller's.
        unsafe { self.kernel.launch(&self.launch, &params, problem) }
    }
}
