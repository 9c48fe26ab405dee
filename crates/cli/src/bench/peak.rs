//! Peak memory of one cold call, as the system sees it: in a child process, so that nothing was allocated before.

use std::{
    fs,
    process::{Command, ExitCode, Stdio},
};

use lawson::{BlockData, BlockPlan, BlockProblem, Error, ErrorKind, Lengths, Level, PreparedCall, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::session::Session;
use crate::{args::Global, output};

/// Name of the hidden subcommand.
pub const COMMAND: &str = "measure-peak";
/// The system counts pages in batches of each thread; less than this it cannot tell.
const SLACK: f64 = 512.0 * 1024.0;

/// Tokens of the call that comes before.
const SMALL: usize = 16;

/// Arguments of the hidden subcommand.
#[derive(clap::Args, Clone, Debug)]
pub struct MeasureArgs {
    /// The problem
    problem: String,
    /// Level of fusion
    #[arg(long)]
    level: Level,
}

/// What the child found.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    /// Growth of the resident set's high-water mark; `None` where the system does not tell.
    growth: Option<u64>,
}

/// High-water mark of this process' resident set, bytes, after setting it to what is resident now when `reset`.
fn high_water_mark(reset: bool) -> Option<u64> {
    if reset {
        fs::write("/proc/self/clear_refs", "5").ok()?;
    }
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|k| k * 1024)
}

/// The child: one call whose block, cache, x and y were all touched before.
///
/// # Errors
/// As the call's.
pub fn execute(args: &MeasureArgs, global: &Global) -> Result<ExitCode> {
    let problem: BlockProblem = args.problem.parse()?;
    // Pages of the program itself count as soon as they are used: a small call on a context of its own uses them before. Nothing is
    // freed until the end, as the call could else live in freed pages unseen.
    let small = BlockProblem { batch: Lengths::uniform(1, problem.batch.max_new().min(SMALL), 0), ..problem.clone() };
    let _small = prepare(&small, args.level, global)?.run()?;
    let mut prepared = prepare(&problem, args.level, global)?;
    let before = high_water_mark(true);
    prepared = prepared.run()?;
    let growth = high_water_mark(false).zip(before).map(|(after, before)| after.saturating_sub(before));
    drop(prepared);
    output::print_json(&Found { growth })?;
    Ok(ExitCode::SUCCESS)
}

/// A call with everything that it reads and writes resident.
struct Prepared {
    call: PreparedCall,
    y: Tensor,
    _data: BlockData,
}

impl Prepared {
    fn run(mut self) -> Result<Self> {
        let block = self.call.block.clone();
        block.forward(self.call.args(&mut self.y)?)?;
        Ok(self)
    }
}

fn prepare(problem: &BlockProblem, level: Level, global: &Global) -> Result<Prepared> {
    let context = global.context()?;
    // Cheap numbers: only their pages matter.
    let a = &problem.spec.attention;
    let fill = |n: usize| (0..n).map(|i| 0.01 + (i % 7) as f32 * 0.001).collect::<Vec<f32>>();
    let e = problem.spec.hidden_size;
    let past_rows = problem.batch.past().iter().copied().max().unwrap_or(0);
    let past = problem.batch.sequences() * a.kv_dim() * past_rows;
    let data = BlockData {
        x: fill(problem.batch.tokens() * e),
        q_weight: fill(a.q_dim() * e),
        k_weight: fill(a.kv_dim() * e),
        v_weight: fill(a.kv_dim() * e),
        o_weight: fill(e * a.q_dim()),
        past_rows,
        past_k: fill(past),
        past_v: fill(past),
        ..BlockData::default()
    };
    let mut call = PreparedCall::new(&context, problem, &data, Some(level))?;
    let rows = problem.batch.max_len();
    let filled = fill(a.kv_dim() * rows);
    for (b, &past) in problem.batch.past().iter().enumerate() {
        call.cache.import(0, b, rows, &filled, &filled)?;
        call.cache.truncate(b, past)?;
    }
    let y = Tensor::from_f32(&data.x, problem.dtype, &[problem.batch.tokens(), e])?;
    Ok(Prepared { call, y, _data: data })
}

/// Growth of a child's resident set over one call; `None` where the system does not tell.
fn measure(session: &Session, problem: &BlockProblem, level: Level) -> Result<Option<u64>> {
    let failed = |what: String| Error::new(ErrorKind::Device, format!("the child process that measures peak memory {what}"));
    let program = std::env::current_exe().map_err(|e| failed(format!("cannot be started: {e}")))?;
    let mut command = Command::new(program);
    command.arg(COMMAND).arg(problem.to_string()).args(["--level", level.name()]);
    command.args(["--threads", &session.threads().to_string()]).env("LAWSON_ISA", session.context.isa().name());
    let out = command.stdin(Stdio::null()).output().map_err(|e| failed(format!("cannot be started: {e}")))?;
    if !out.status.success() {
        session.check()?;
        return Err(failed(format!("failed: {}", String::from_utf8_lossy(&out.stderr).trim())));
    }
    let found: Found = serde_json::from_slice(&out.stdout).map_err(|e| failed(format!("answered nonsense: {e}")))?;
    Ok(found.growth)
}

/// What to say about the plan's account of peak memory after the system gave its own; nothing when they agree.
///
/// # Errors
/// `Device` when the child process fails.
pub fn confirm(session: &Session, plan: &BlockPlan, problem: &BlockProblem) -> Result<Option<String>> {
    Ok(match measure(session, problem, plan.level)? {
        None => Some("this system does not tell a call's peak memory; the plan's own account stands".to_owned()),
        Some(growth) => {
            let (planned, found) = (plan.peak_bytes() as f64, growth as f64);
            let agree = (planned - found).abs() <= (0.1 * planned).max(SLACK);
            let (planned, found) = (output::bytes(plan.peak_bytes()), output::bytes(growth as usize));
            (!agree).then(|| format!("the plan's peak is {planned}, but the system saw {found}"))
        }
    })
}
