//! The one definition of "this kernel is right" and "this block is right".

use std::fmt;

use lawson_core::{
    DType, ErrorKind, Result, WeightKind,
    compare::{Comparison, Policy, compare},
    data::{BlockData, BlockOutput},
    kernel::{Backend, KernelCase, KernelInfo},
    oracle::{self, AttentionInput, Oracle, OracleOutput},
    problem::{BlockProblem, Level},
    round_to,
};

use crate::inputs::{Sharpness, data_for};
pub use crate::kernel_cases::kernel_cases;

/// Relative error that f32 results may have.
const F32_RELATIVE: f64 = 5e-6;

/// What was run, and how it went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Runs that gave a result or an error.
    pub ran: usize,
    /// One line for each wrong run, with all that is needed to repeat it.
    pub failed: Vec<String>,
    /// One line for each run that this machine or build cannot do.
    pub could_not_run: Vec<String>,
}

impl Report {
    /// Whether something ran and nothing was wrong.
    pub fn passed(&self) -> bool {
        self.ran > 0 && self.failed.is_empty()
    }
    /// Adds what `other` ran.
    pub fn merge(&mut self, other: Report) {
        self.ran += other.ran;
        self.failed.extend(other.failed);
        self.could_not_run.extend(other.could_not_run);
    }
    /// Counts one run named `name`: its result checked by `check`, which gives what is wrong.
    fn record<T>(&mut self, name: impl Fn() -> String, result: Result<T>, check: impl FnOnce(T) -> Vec<String>) {
        match result {
            Err(e) if e.kind() == ErrorKind::Unavailable => return self.could_not_run.push(format!("{}: {e}", name())),
            Err(e) => self.failed.push(format!("{}: {e}", name())),
            Ok(result) => self.failed.extend(check(result).into_iter().map(|wrong| format!("{}: {wrong}", name()))),
        }
        self.ran += 1;
    }
}

/// `ran: 120, failed: 0 | could not run: 3`, then a line for each failure.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ran: {}, failed: {} | could not run: {}", self.ran, self.failed.len(), self.could_not_run.len())?;
        self.failed.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

/// The policy of results in `dtype`, whose honest reference is `reference`.
fn policy(dtype: DType, reference: &[f32]) -> Policy<'_> {
    if dtype == DType::F32 { Policy::Relative(F32_RELATIVE) } else { Policy::Within2x { reference, dtype } }
}

/// The policy of a block's results, which in int8 have the error of codes as their reference has.
fn policy_of<'a>(problem: &BlockProblem, dtype: DType, reference: &'a [f32]) -> Policy<'a> {
    match problem.weights {
        WeightKind::Int8 => Policy::Within2x { reference, dtype },
        _ => policy(dtype, reference),
    }
}

fn wrong(name: &str, comparison: Comparison) -> Option<String> {
    (!comparison.ok).then(|| format!("{name}: {comparison}"))
}

/// Runs every case of the kernel's operation; `progress` gets the cases done and their number.
pub fn check_kernel(backend: &dyn Backend, kernel: &KernelInfo, progress: &mut dyn FnMut(usize, usize)) -> Report {
    let mut report = Report::default();
    let mut cases = kernel_cases(kernel.op);
    cases.retain(|(_, case)| kernel.dtypes.contains(&case.dtype()));
    for (i, (name, case)) in cases.iter().enumerate() {
        let named = || format!("{kernel}: {name}");
        report.record(named, backend.run(kernel, case), |got| {
            check_kernel_result(case, &got).unwrap_or_else(|e| vec![e.to_string()])
        });
        progress(i + 1, cases.len());
    }
    report
}

/// What is wrong with the result of one kernel run; nothing when it is right.
///
/// # Errors
/// `InvalidInput` when the case itself is not valid.
pub fn check_kernel_result(case: &KernelCase, got: &[f32]) -> Result<Vec<String>> {
    let f32_only = |want: Vec<f64>, width: usize| wrong("result", compare(policy(DType::F32, &[]), got, &want, width));
    let one = match case {
        KernelCase::Gemm { n, k, x, w, bias, weight_dtype, .. } => {
            let want = oracle::gemm(x, w, bias.as_deref(), *k);
            let honest: Vec<f32> = want.iter().map(|&v| round_to(*weight_dtype, v as f32)).collect();
            wrong("result", compare(policy(*weight_dtype, &honest), got, &want, *n))
        }
        KernelCase::GemmInt8 { k, x, w, bias, .. } => wrong_int8(x, w, bias.as_deref(), *k, got),
        KernelCase::Norm { width, x, weight, eps } => f32_only(oracle::rms_norm(x, weight, *eps), *width),
        KernelCase::Rope { head_dim, rotary_dim, layout, x, angles } => {
            f32_only(oracle::rope(x, *head_dim, *rotary_dim, *layout, angles), *head_dim)
        }
        KernelCase::Softmax { width, x } => f32_only(oracle::softmax(x, *width), *width),
        KernelCase::Attention { problem, q, k, v, rows, mask, sinks, slopes, .. } => {
            let (mask, sinks, slopes) = (mask.as_ref(), sinks.as_deref(), slopes.as_deref());
            let input = AttentionInput { q, k, v, rows: *rows, mask, sinks, slopes };
            let (want, want_lse) = oracle::attention(problem, &input)?;
            let (honest, honest_lse) = oracle::attention_rounded(problem, &input)?;
            if got.len() != want.len() + want_lse.len() {
                return Ok(vec![format!("{} elements, expected {} + {}", got.len(), want.len(), want_lse.len())]);
            }
            let (out, lse) = got.split_at(want.len());
            let out = compare(policy(problem.dtype, &honest), out, &want, problem.spec.head_dim);
            let lse = compare(policy(problem.dtype, &honest_lse), lse, &want_lse, problem.spec.heads);
            return Ok([wrong("result", out), wrong("log-sum-exp", lse)].into_iter().flatten().collect());
        }
    };
    Ok(one.into_iter().collect())
}

/// What is wrong with the result of a GEMM in int8. It is defined to the bit; that the definition is near the truth is asked of every element too:
/// codes are at most half a scale off, and a scale at most 2⁻¹⁵ more than it needs to be.
fn wrong_int8(x: &[f32], w: &[f32], bias: Option<&[f32]>, k: usize, got: &[f32]) -> Option<String> {
    let want = oracle::gemm_int8(x, w, bias, k);
    let n = w.len() / k;
    if got.len() != want.len() {
        return Some(format!("{} elements, expected {}", got.len(), want.len()));
    }
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    if let Some(i) = got.iter().zip(&want).position(|pair| !same(pair)) {
        return Some(format!("result: {} at [{}, {}], expected {}", got[i], i / n, i % n, want[i]));
    }
    let truth = oracle::gemm(x, w, bias, k);
    let scale = |row: &[f32]| row.iter().fold(0f64, |m, v| m.max(f64::from(v.abs()))) / 127.0 * (1.0 + 1.0 / 32768.0);
    let sum = |row: &[f32]| row.iter().map(|v| f64::from(v.abs())).sum::<f64>();
    // Less than this, a scale is 0.
    let least = 128.0 * f64::from(f32::MIN_POSITIVE);
    for (i, row) in x.chunks_exact(k).enumerate() {
        let (x_scale, x_sum) = (scale(row).max(2.0 * least), sum(row));
        for (j, row) in w.chunks_exact(k).enumerate() {
            let (w_scale, w_sum) = (scale(row).max(2.0 * least), sum(row));
            let (y, t) = (f64::from(got[i * n + j]), truth[i * n + j]);
            let most =
                0.5001 * (x_scale * w_sum + w_scale * x_sum) + 0.2501 * k as f64 * x_scale * w_scale + 3e-7 * t.abs() + 1e-37;
            let near = (y - t).abs() <= most + 3e-7 * bias.map_or(0.0, |b| f64::from(b[j].abs()));
            if t.is_finite() && !near {
                return Some(format!("accuracy: {y} at [{i}, {j}], not within {most:e} of {t}"));
            }
        }
    }
    None
}

/// Whether a result in int8 is as far from the reference, whose codes are the same but for a few, as that is from the truth.
fn astray(name: &str, dtype: DType, got: &[f32], want: &[f64], reference: &[f32], width: usize) -> Option<String> {
    let relative = |got: &[f32], want: &[f64]| compare(Policy::Exact, got, want, width).errors.map_or(f64::NAN, |e| e.relative);
    let wide: Vec<f64> = reference.iter().map(|&v| v.into()).collect();
    let (apart, error) = (relative(got, &wide), relative(reference, want));
    let most = 0.5 * error + 2.0 * dtype.epsilon();
    let near = apart <= most;
    (!near).then(|| format!("{name}: {apart:.2e} from the reference, which is {error:.2e} from the truth"))
}

/// What is wrong with the result of one block; nothing when it is right.
fn check_block(
    problem: &BlockProblem,
    data: &BlockData,
    got: &BlockOutput,
    want: &OracleOutput,
    honest: &BlockOutput,
) -> Result<Vec<String>> {
    let (e, d, dtype) = (problem.spec.hidden_size, problem.spec.attention.head_dim, problem.dtype);
    let int8 = problem.weights == WeightKind::Int8;
    let check = |name: &str, dtype: DType, got: &[f32], want: &[f64], reference: &[f32], width: usize| {
        let far = wrong(name, compare(policy_of(problem, dtype, reference), got, want, width));
        if int8 { far.or_else(|| astray(name, dtype, got, want, reference, width)) } else { far }
    };
    if problem.kv_dtype.codes().is_some() {
        // The error of codes is in every honest result, and a code that is rounded the other way is no error of the attention over it.
        let of_cache = |name: &str, got: &[f32], want: &[f64], reference: &[f32]| {
            // Keys of an unfinished group are as exact as those of any cache.
            let exact = compare(policy_of(problem, dtype, reference), got, want, d);
            wrong(name, if exact.ok { exact } else { compare(Policy::Within2x { reference, dtype }, got, want, d) })
        };
        let y_want = Oracle::new(problem, data)?.y_over_cache(&got.k, &got.v)?;
        let y_honest = oracle::rounded_over_cache(problem, data, &got.k, &got.v)?;
        let y = check("y", dtype, &got.y, &y_want, &y_honest, e);
        let (k, v) = (of_cache("k", &got.k, &want.k, &honest.k), of_cache("v", &got.v, &want.v, &honest.v));
        return Ok([y, k, v].into_iter().flatten().collect());
    }
    let coarser = if dtype == DType::F32 { problem.kv_dtype.rounds_to(dtype) } else { dtype };
    let y = check("y", coarser, &got.y, &want.y, &honest.y, e);
    let k = check("k", coarser, &got.k, &want.k, &honest.k, d);
    let v = check("v", coarser, &got.v, &want.v, &honest.v, d);
    Ok([y, k, v].into_iter().flatten().collect())
}

/// Runs every level of every case with sharp inputs of `seed` + its index; `progress` gets the cases done and their number.
///
/// The runner gives y, k and v as [`BlockOutput`]; an `Unavailable` error counts as a run that could not be done.
pub fn check_blocks(
    run: &dyn Fn(&BlockProblem, Level, &BlockData) -> Result<BlockOutput>,
    cases: &[BlockProblem],
    seed: u64,
    progress: &mut dyn FnMut(usize, usize),
) -> Report {
    let mut report = Report::default();
    for (i, problem) in cases.iter().enumerate() {
        let seed = seed.wrapping_add(i as u64);
        let data = data_for(problem, seed, Sharpness::Sharp);
        let answer = Oracle::new(problem, &data).map(|o| o.run()).and_then(|want| Ok((want, oracle::rounded(problem, &data)?)));
        for level in Level::ALL {
            let named = || format!("{problem} level={level} seed={seed}");
            match &answer {
                Err(e) => report.failed.push(format!("{}: the case is not valid: {e}", named())),
                Ok((want, honest)) => report.record(named, run(problem, level, &data), |got| {
                    check_block(problem, &data, &got, want, honest).unwrap_or_else(|e| vec![e.to_string()])
                }),
            }
        }
        progress(i + 1, cases.len());
    }
    report
}
