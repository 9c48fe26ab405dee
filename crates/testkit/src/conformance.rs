//! The one definition of "this kernel is right" and "this block is right".

use std::fmt;

use lawson_core::{
    DType, ErrorKind, Result,
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

/// What is wrong with the result of one block; nothing when it is right.
fn check_block(
    problem: &BlockProblem,
    data: &BlockData,
    got: &BlockOutput,
    want: &OracleOutput,
    honest: &BlockOutput,
) -> Result<Vec<String>> {
    let (e, d, dtype) = (problem.spec.hidden_size, problem.spec.attention.head_dim, problem.dtype);
    let check = |name: &str, policy: Policy<'_>, got: &[f32], want: &[f64], width| wrong(name, compare(policy, got, want, width));
    if problem.kv_dtype.codes().is_some() {
        // The error of codes is in every honest result, and a code that is rounded the other way is no error of the attention over it.
        let of_cache = |name: &str, got: &[f32], want: &[f64], reference: &[f32]| {
            // Keys of an unfinished group are as exact as those of any cache.
            let exact = compare(policy(dtype, reference), got, want, d);
            wrong(name, if exact.ok { exact } else { compare(Policy::Within2x { reference, dtype }, got, want, d) })
        };
        let y_want = Oracle::new(problem, data)?.y_over_cache(&got.k, &got.v)?;
        let y_honest = oracle::rounded_over_cache(problem, data, &got.k, &got.v)?;
        let y = check("y", policy(dtype, &y_honest), &got.y, &y_want, e);
        let (k, v) = (of_cache("k", &got.k, &want.k, &honest.k), of_cache("v", &got.v, &want.v, &honest.v));
        return Ok([y, k, v].into_iter().flatten().collect());
    }
    let coarser = if dtype == DType::F32 { problem.kv_dtype.rounds_to(dtype) } else { dtype };
    let y = check("y", policy(coarser, &honest.y), &got.y, &want.y, e);
    let k = check("k", policy(coarser, &honest.k), &got.k, &want.k, d);
    let v = check("v", policy(coarser, &honest.v), &got.v, &want.v, d);
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
