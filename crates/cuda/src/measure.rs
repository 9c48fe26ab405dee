//! What a GPU can do, measured: a large product, a large copy.

use lawson_core::{DType, Result};

use crate::{
    Gpu,
    blas::{Matmul, Operands as Matrices},
    weights,
};

impl Gpu {
    /// Operations per second of a large product of `dtype`: the best of several.
    ///
    /// # Errors
    /// `OutOfMemory`, `Device`.
    pub fn measure_peak(&self, dtype: DType) -> Result<f64> {
        let n = if dtype == DType::F32 { 4096 } else { 8192 };
        // Numbers, as zeros draw less power and run faster.
        let values: Vec<f32> =
            (0..n * n).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 16) as u16 as f32 / 32_768.0 - 1.0).collect();
        let operand = self.device().upload(&weights::encode(&values, dtype))?;
        let result = self.device().alloc(n * n * dtype.size())?;
        let product = self.blas().plan(&Matmul::projection(n, n, n, dtype))?;
        let run = || {
            let start = self.device().record()?;
            // SAFETY: both operands and the result are [n, n] of `dtype`, and the result is apart.
            unsafe { product.run(&Matrices::new(operand.ptr(), operand.ptr(), result.ptr()))? };
            let end = self.device().record()?;
            self.device().synchronize()?;
            Ok(end.ms_since(&start)? * 1e-3)
        };
        let times = (0..8).map(|_| run()).collect::<Result<Vec<f64>>>()?;
        Ok(product.matmul().flops() / times[2..].iter().copied().fold(f64::INFINITY, f64::min))
    }

    /// Bytes per second of a large copy on the device, those read and those written: the best of several.
    ///
    /// # Errors
    /// `OutOfMemory`, `Device`.
    pub fn measure_bandwidth(&self) -> Result<f64> {
        const BYTES: usize = 1 << 30;
        let (from, to) = (self.device().alloc(BYTES)?, self.device().alloc(BYTES)?);
        from.fill(1)?;
        let run = || {
            let start = self.device().record()?;
            to.copy_from(0, &from, 0, BYTES)?;
            let end = self.device().record()?;
            self.device().synchronize()?;
            Ok(end.ms_since(&start)? * 1e-3)
        };
        let times = (0..8).map(|_| run()).collect::<Result<Vec<f64>>>()?;
        Ok(2.0 * BYTES as f64 / times.iter().copied().fold(f64::INFINITY, f64::min))
    }
}
