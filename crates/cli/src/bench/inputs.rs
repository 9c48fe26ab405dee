//! Seeded inputs, N(0, 1), made on several threads.

use lawson::{BlockData, BlockProblem, DType, Error, Result, Tensor};
use lawson_core::{Storage, StorageMut, data::Mask, problem::MaskShape, round_to};
use lawson_testkit::rng::Rng;

use super::parallel;

/// Elements that one generator makes; a constant, so that numbers do not depend on the threads.
const CHUNK: usize = 1 << 16;

/// `n` normal numbers of deviation `deviation`, rounded to `dtype`.
pub fn normals(n: usize, deviation: f64, dtype: DType, seed: u64, threads: usize) -> Vec<f32> {
    let fill = |chunk: usize| {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9).wrapping_add(chunk as u64));
        let mut out = Vec::with_capacity(CHUNK + 1);
        let count = CHUNK.min(n - chunk * CHUNK);
        while out.len() < count {
            // Both numbers of a pair of the polar method, unlike the test kit's generator, which must be the same everywhere.
            let (a, b) = (2.0 * rng.uniform() - 1.0, 2.0 * rng.uniform() - 1.0);
            let s = a * a + b * b;
            if s > 0.0 && s < 1.0 {
                let factor = deviation * (-2.0 * s.ln() / s).sqrt();
                out.extend([a, b].map(|v| round_to(dtype, (v * factor) as f32)));
            }
        }
        out.truncate(count);
        out
    };
    let parts = parallel::map(n.div_ceil(CHUNK), threads, fill);
    let mut all = Vec::with_capacity(n);
    parts.iter().for_each(|p| all.extend_from_slice(p));
    all
}

/// Weights N(0, 1)/√fan-in, x and the past N(0, 1) of a problem without norms, biases and masks.
pub fn block_data(problem: &BlockProblem, seed: u64, threads: usize) -> BlockData {
    let (a, e) = (&problem.spec.attention, problem.spec.hidden_size);
    let fan = |n: usize| 1.0 / (n as f64).sqrt();
    let of = |part: u64, n: usize, deviation: f64, dtype: DType| normals(n, deviation, dtype, seed * 16 + part, threads);
    let past_rows = problem.batch.past().iter().copied().max().unwrap_or(0);
    let past = problem.batch.sequences() * a.kv_dim() * past_rows;
    BlockData {
        x: of(0, problem.batch.tokens() * e, 1.0, problem.dtype),
        q_weight: of(1, a.q_dim() * e, fan(e), problem.dtype),
        k_weight: of(2, a.kv_dim() * e, fan(e), problem.dtype),
        v_weight: of(3, a.kv_dim() * e, fan(e), problem.dtype),
        o_weight: of(4, e * a.q_dim(), fan(a.q_dim()), problem.dtype),
        past_rows,
        past_k: of(5, past, 1.0, problem.kv_dtype.rounds_to(problem.dtype)),
        past_v: of(6, past, 1.0, problem.kv_dtype.rounds_to(problem.dtype)),
        ..BlockData::default()
    }
}

/// Most elements of one tensor that are drawn for a GPU, which has memory for more than a host draws, checks and writes for peers in good time.
const DRAWN: usize = 1 << 24;

/// How many of `batch` sequences, of `elements` each, are drawn: a divisor of `batch`; the others repeat them at addresses of their own.
pub fn distinct(batch: usize, elements: usize) -> usize {
    (1..=batch).rev().find(|n| batch.is_multiple_of(*n) && n.saturating_mul(elements) <= DRAWN).unwrap_or(1)
}

/// A mask [rows, columns] for all sequences and heads, each element visible with probability 1/2.
pub fn mask(rows: usize, columns: usize, seed: u64, threads: usize) -> Mask {
    let row = |i: usize| {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9).wrapping_add(i as u64));
        (0..columns).map(|_| u8::from(rng.chance(0.5))).collect::<Vec<u8>>()
    };
    let shape = MaskShape { per_sequence: false, per_head: false };
    Mask { shape, rows, columns, data: parallel::map(rows, threads, row).concat() }
}

/// The slopes 2^(−8(h + 1)/H) of ALiBi.
pub fn slopes(heads: usize) -> Vec<f32> {
    (1..=heads).map(|h| (-8.0 * h as f32 / heads as f32).exp2()).collect()
}

/// A tensor of NaN.
pub fn nans(dtype: DType, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_f32(&vec![f32::NAN; shape.iter().product()], dtype, shape)
}

/// Copies `from` over `to`, which has its dtype and shape.
pub fn copy(from: &Tensor, to: &mut Tensor) -> Result<()> {
    match (to.as_mut().storage_mut(), from.as_ref().storage()) {
        (StorageMut::F32(to), Storage::F32(from)) => to.copy_from_slice(from),
        (StorageMut::BF16(to), Storage::BF16(from)) => to.copy_from_slice(from),
        (StorageMut::F16(to), Storage::F16(from)) => to.copy_from_slice(from),
        _ => return Err(Error::invalid("a tensor can only be copied over one of its own dtype")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_normal_and_do_not_depend_on_threads() {
        let n = 3 * CHUNK + 5;
        let one = normals(n, 2.0, DType::F32, 3, 1);
        assert_eq!(one, normals(n, 2.0, DType::F32, 3, 2));
        let moment = |k: i32| one.iter().map(|&v| (f64::from(v) / 2.0).powi(k)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.02 && (moment(4) - 3.0).abs() < 0.1);
        assert_ne!(one[..8], one[CHUNK..CHUNK + 8]);
    }

    #[test]
    fn sequences_that_are_drawn_divide_the_batch() {
        assert_eq!(distinct(32, 1), 32);
        assert_eq!(distinct(32, DRAWN / 5), 4);
        assert_eq!(distinct(7, DRAWN / 5), 1);
        assert_eq!(distinct(8, 2 * DRAWN), 1);
    }

    #[test]
    fn tensors_copy_within_a_dtype_only() {
        let mut to = nans(DType::BF16, &[2, 2]).unwrap();
        let from = Tensor::from_f32(&[1.0, 2.0, 3.0, 4.0], DType::BF16, &[2, 2]).unwrap();
        copy(&from, &mut to).unwrap();
        assert_eq!(to.to_f32(), [1.0, 2.0, 3.0, 4.0]);
        assert!(copy(&nans(DType::F32, &[2, 2]).unwrap(), &mut to).is_err());
    }
}
