//! `lawson check`: every kernel and every level of the block against the oracle.

use std::process::ExitCode;

use clap::Args;
use lawson::{BlockData, BlockProblem, Context, Device, ErrorKind, Isa, Result, WeightKind, compute, weights_on_gpu};
use lawson_core::kernel::KernelOp;
use lawson_testkit::{
    cases,
    conformance::{self, Report},
};
use serde_json::json;

use crate::{
    EXIT_FAILED,
    args::{self, Auto, Global},
    output, signals,
};

const AFTER_HELP: &str = "\
Every instruction set of this machine is checked, whatever LAWSON_ISA says, and its first GPU,
which also reads caches in pages; --device cpu or --device cuda checks one of the two.

Examples:
  lawson check --quick
  lawson check --json";

/// Check every kernel and level of the block on this machine against a float64 reference
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct CheckArgs {
    /// Check every kernel, but only a sample of the blocks
    #[arg(long)]
    quick: bool,
    /// Check only what holds weights so: auto (everything), int8 (on a CPU)
    #[arg(long, value_name = "KIND", default_value = "auto", value_parser = args::weights)]
    weights: Auto<WeightKind>,
}

/// Seed of the random cases and of every case's numbers.
const SEED: u64 = 7;
/// Random blocks.
const RANDOM: usize = 60;
/// Random blocks over a quantised cache, on a CPU.
const QUANTISED: usize = 36;
/// Random blocks with weights in int8, on a CPU.
const INT8_WEIGHTS: usize = 36;
/// Random blocks over a paged cache, on a GPU.
const PAGED: usize = 48;
/// One in so many blocks is checked when it must be quick.
const QUICK_STEP: usize = 12;

/// Runs the command.
///
/// # Errors
/// `Unavailable` for a device that is missing, `Cancelled`.
pub fn execute(args: &CheckArgs, global: &Global) -> Result<ExitCode> {
    let step = if args.quick { QUICK_STEP } else { 1 };
    let only = args.weights.0;
    let int8 = cases::int8_weight_cases(SEED + 3, INT8_WEIGHTS / step);
    let problems: Vec<_> = cases::edge_cases().into_iter().chain(cases::random_cases(SEED, RANDOM)).step_by(step).collect();
    let quantised = cases::quantised_cases(SEED + 2, QUANTISED / step);
    let paged = cases::paged_cases(SEED + 1, PAGED / step);
    let blocks = |c: &Context| {
        let own = if c.gpu().is_some() { [&paged[..], &[]] } else { [&quantised[..], &int8[..]] };
        let all = problems.iter().chain(own.into_iter().flatten());
        all.filter(move |p| only.is_none_or(|kind| p.weights == kind))
    };
    let mut contexts = Vec::new();
    if !matches!(global.device, Device::Cuda(_)) {
        for isa in Isa::available() {
            contexts.push(Global { device: Device::Cpu, ..*global }.context_on(Some(isa))?);
        }
    }
    let mut report = Report::default();
    match global.device {
        Device::Cuda(_) => {
            weights_on_gpu(only.unwrap_or_default())?;
            contexts.push(global.context()?);
        }
        Device::Auto if only.is_some() => {}
        Device::Auto => match (Global { device: Device::Cuda(0), ..*global }).context() {
            Ok(context) => contexts.push(context),
            Err(e) if e.kind() == ErrorKind::Unavailable => report.could_not_run.push(e.to_string()),
            Err(e) => return Err(e),
        },
        _ => {}
    }
    // A GPU's kernels run inside blocks.
    let kernels = |c: &Context| {
        let mut kernels = if c.gpu().is_some() { Vec::new() } else { c.backend().kernels() };
        kernels.retain(|k| only.is_none() || k.op == KernelOp::GemmInt8);
        kernels
    };
    let count: usize = contexts.iter().map(|c| kernels(c).len() + blocks(c).count()).sum();
    let bar = output::progress(count, "checking", global);

    for context in &contexts {
        for kernel in kernels(context) {
            signals::check()?;
            bar.set_message(kernel.to_string());
            report.merge(conformance::check_kernel(context.backend(), &kernel, &mut |_, _| {}));
            bar.inc(1);
        }
        bar.set_message(format!("blocks on {}", name(context)));
        for (i, problem) in blocks(context).enumerate() {
            signals::check()?;
            report.merge(check_block(context, problem, SEED + i as u64));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let missing: Vec<_> = Isa::ALL.into_iter().filter(|isa| !isa.is_available()).map(Isa::name).collect();
    if !missing.is_empty() {
        report.could_not_run.push(format!("{}: this processor lacks them", missing.join(", ")));
    }
    let ran_on: Vec<_> = contexts.iter().map(name).collect();
    if global.json {
        output::print_json(&json!({
            "passed": report.passed(),
            "ran": report.ran,
            "ran_on": ran_on,
            "failed": report.failed,
            "could_not_run": report.could_not_run,
        }))?;
    } else {
        output::print(text(&report, &ran_on))?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILED) })
}

/// One block at every level.
fn check_block(context: &Context, problem: &BlockProblem, seed: u64) -> Report {
    let run = |p: &BlockProblem, level, data: &BlockData| compute(context, p, Some(level), data);
    let mut report = conformance::check_blocks(&run, std::slice::from_ref(problem), seed, &mut |_, _| {});
    report.failed.iter_mut().for_each(|line| *line = format!("{}: {line}", name(context)));
    report
}

/// What a context computes on, as users name it.
fn name(context: &Context) -> String {
    if context.gpu().is_some() { context.device().to_string() } else { context.isa().to_string() }
}

fn text(report: &Report, ran_on: &[String]) -> String {
    let (ran, failed) = (report.ran, report.failed.len());
    let mut lines = vec![match (ran, failed) {
        (0, _) => "nothing ran".to_owned(),
        (_, 0) => format!("{ran} passed"),
        _ => format!("{failed} of {ran} failed"),
    }];
    lines.extend(report.failed.iter().map(|line| format!("  {line}")));
    lines.push(format!("ran on: {}", ran_on.join(", ")));
    if !report.could_not_run.is_empty() {
        lines.push("could not run:".to_owned());
        lines.extend(report.could_not_run.iter().map(|line| format!("  {line}")));
    }
    lines.join("\n")
}
