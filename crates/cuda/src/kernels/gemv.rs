//! The product with one row of x: `cu/gemv.cu`.

use std::fmt::Display;

use lawson_core::{DType, Error, Result};

use super::{GEMV, geometry};
use crate::{
    Instance, Kernel, KernelParams, Launch, Module,
    blas::{Batch, Matmul, Operand, Operands},
};

/// Threads of a block.
const THREADS: usize = 256;
/// Rows of W of a thread's step.
const ROWS: usize = 2;
/// Bytes of the ring: four stages of 16 bytes for each row and thread.
const RING: u32 = 4 * (ROWS * THREADS) as u32 * 16;

/// Parameters of `gemv`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct GemvParams {
    pub x: u64,
    pub w: u64,
    pub bias: u64,
    pub c: u64,
    pub y: u64,
    pub w_stride: i64,
    pub outputs: i32,
    pub inputs: i32,
    pub lanes: i32,
    pub wide: i32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order, without padding.
unsafe impl KernelParams for GemvParams {}

/// A projection of one row.
#[derive(Clone, Debug)]
pub struct Gemv {
    kernel: Kernel<GemvParams>,
    launch: Launch,
    lanes: usize,
    matmul: Matmul,
}

impl Gemv {
    /// What is compiled.
    pub fn instance(dtype: DType) -> Instance {
        Instance::new(&GEMV, &[("DTYPE", geometry::code(dtype))])
    }

    /// Whether it is a projection of one row in whole pieces of 16 bytes.
    fn takes(m: &Matmul) -> bool {
        let whole = [m.k, m.ldb].iter().all(|n| (n * m.dtype.size()).is_multiple_of(16));
        m.m == 1 && m.b == Operand::Rows && m.batch == [Batch::ONE; 2] && whole
    }

    /// `matmul`, a projection of one row whose length, and the distance of the rows of W, are multiples of 16 bytes.
    ///
    /// # Errors
    /// `InvalidInput` when it is another product; as [`Module::kernel`].
    pub fn new(module: &Module, matmul: Matmul, multiprocessors: usize) -> Result<Self> {
        if !Self::takes(&matmul) {
            return Err(Error::invalid(format!("{matmul} is not a product of one row in whole pieces of 16 bytes")));
        }
        let kernel: Kernel<GemvParams> = module.kernel("gemv")?;
        let lanes = (matmul.k * matmul.dtype.size() / 16).next_power_of_two().clamp(32, THREADS);
        let units = matmul.n.div_ceil(ROWS * THREADS / lanes);
        let blocks = kernel.function().blocks_per_multiprocessor(THREADS as u32, RING)? as usize * multiprocessors;
        let launch = Launch::new([units.min(blocks) as u32, 1, 1], THREADS as u32).shared(RING).overlapping_previous();
        Ok(Gemv { kernel, launch, lanes, matmul })
    }

    /// What it computes.
    pub fn matmul(&self) -> &Matmul {
        &self.matmul
    }

    /// Enqueues the product, not scaled.
    ///
    /// # Errors
    /// `InvalidInput` when x or W does not lie at a multiple of 16 bytes; as [`Kernel::launch`].
    ///
    /// # Safety
    /// As [`MatmulPlan::run`](crate::blas::MatmulPlan::run).
    pub unsafe fn run(&self, operands: &Operands, problem: &dyn Display) -> Result<()> {
        let (m, o) = (&self.matmul, operands);
        if (o.a | o.b) % 16 != 0 {
            return Err(Error::invalid(format!("{problem}: {m}: {o:x?}: x and weights are not at multiples of 16 bytes")));
        }
        let params = GemvParams {
            x: o.a,
            w: o.b,
            bias: if m.bias { o.bias } else { 0 },
            c: if m.residual { o.c } else { 0 },
            y: o.d,
            w_stride: m.ldb as i64,
            outputs: m.n as i32,
            inputs: m.k as i32,
            lanes: self.lanes as i32,
            wide: i32::from(m.out == DType::F32),
        };
        // SAFETY: the caller's.
        unsafe { self.kernel.launch(&self.launch, &params, problem) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_products_are_not_taken() {
        for (dtype, k) in [(DType::BF16, 4096), (DType::F16, 8), (DType::F32, 1000)] {
            let good = Matmul { out: DType::F32, bias: true, residual: true, ..Matmul::projection(1, 263, k, dtype) };
            assert!(Gemv::takes(&good), "{good}");
            let two = Batch { count: 2, ..Batch::ONE };
            for other in [
                Matmul { m: 2, ..good },
                Matmul { b: Operand::Columns, ..good },
                Matmul { batch: [two, Batch::ONE], ..good },
                Matmul { k: k - 1, ..good },
                Matmul { ldb: k + 1, ..good },
            ] {
                assert!(!Gemv::takes(&other), "{other}");
            }
        }
    }
}
