//! `lawson explain`: how a problem would be computed.

use std::process::ExitCode;

use clap::Args;
use lawson::{BlockPlan, BlockProblem, Level, Result, WeightKind};
use lawson_core::plan::{Buffer, Op, Operand};
use serde_json::{Value, json};

use crate::{
    args::{self, Auto, Global},
    output,
};

const AFTER_HELP: &str = "\
Examples:
  lawson explain 'block b=1 s=2048 e=4096 h=32/8 rope=half bf16'
  lawson explain 'block b=8 s=1 past=4096 e=4096 h=32' --fusion maximal --json
  lawson explain 'block b=1 s=1 past=4096 e=4096 h=32/8 bf16' --weights int8";

/// Show how a problem would be computed, step by step, and why
#[derive(Args, Debug)]
#[command(after_help = format!("{}\n\n{AFTER_HELP}", args::PROBLEM_HELP))]
pub struct ExplainArgs {
    /// The problem as one line, as every command prints it
    #[arg(value_name = "PROBLEM", required = true)]
    problem: Vec<String>,
    /// Level of fusion: auto (the planner's choice, with a table of all levels), unfused, minimal, moderate, maximal
    #[arg(long, value_name = "LEVEL", default_value = "auto", value_parser = args::level)]
    fusion: Auto<Level>,
    /// How the projections' weights are held: auto (as the problem says), int8 (on a CPU)
    #[arg(long, value_name = "KIND", default_value = "auto", value_parser = args::weights)]
    weights: Auto<WeightKind>,
}

/// Runs the command.
///
/// # Errors
/// `InvalidInput` when the problem is not valid.
pub fn execute(args: &ExplainArgs, global: &Global) -> Result<ExitCode> {
    let problem: BlockProblem = args.problem.join(" ").parse()?;
    let problem = BlockProblem { weights: args.weights.0.unwrap_or(problem.weights), ..problem };
    problem.validate()?;
    let context = global.context()?;
    let plan = context.plan(&problem, args.fusion.0)?;
    let compared = match args.fusion.0 {
        // A level that cannot be planned stands among what was rejected.
        None => Level::ALL.into_iter().filter_map(|level| context.plan(&problem, Some(level)).ok()).collect(),
        Some(_) => Vec::new(),
    };
    if global.json {
        let levels: Vec<_> = compared.iter().map(|plan| totals(plan)).collect();
        let mut value = json!({"problem": problem.to_string(), "plan": plan_json(&plan), "weight_bytes": weight_bytes(&problem)});
        if !levels.is_empty() {
            value["levels"] = json!(levels);
        }
        output::print_json(&value)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    if plan.problem != problem {
        text += &format!("{problem}\nplanned with past lengths rounded up, so that one plan serves a growing cache:\n");
    }
    text += &lawson::explain(&plan);
    let overlap = |a: &Buffer, b: &Buffer| a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
    if plan.buffers.iter().enumerate().any(|(i, a)| plan.buffers[i + 1..].iter().any(|b| overlap(a, b))) {
        text += "\nbuffers of the workspace that overlap are not in use at the same time\n";
    }
    text += &format!("\nweights of the projections: {}\n", output::bytes(weight_bytes(&problem) as usize));
    if !compared.is_empty() {
        let head = vec!["level", "predicted time", "memory", "traffic", "steps", "GEMMs", "launches"];
        let rows = compared.iter().map(|p| {
            let name = if p.level == plan.level { format!("{} (chosen)", p.level) } else { p.level.to_string() };
            let (memory, traffic) = (output::bytes(p.peak_bytes()), output::bytes(p.traffic_bytes() as usize));
            let counts = [p.steps().count(), p.gemms(), p.launches()].map(|n| n.to_string());
            [vec![name, output::seconds(p.seconds()), memory, traffic], counts.to_vec()].concat()
        });
        let grid = output::Grid { head, rows: rows.collect() };
        text += &format!("\n{}", grid.text(&["GEMMs", "steps", "launches", "traffic"]));
    }
    output::print(text)?;
    Ok(ExitCode::SUCCESS)
}

/// Bytes of the projections' weights, without what their layout is padded with.
fn weight_bytes(problem: &BlockProblem) -> f64 {
    let (a, e, size) = (&problem.spec.attention, problem.spec.hidden_size, problem.dtype.size());
    problem.weights.bytes(a.qkv_dim(), e, size) + problem.weights.bytes(e, a.q_dim(), size)
}

fn totals(plan: &BlockPlan) -> Value {
    json!({
        "level": plan.level.name(),
        "id": format!("{:016x}", plan.id()),
        "predicted_ms": plan.seconds() * 1e3,
        "peak_bytes": plan.peak_bytes(),
        "traffic_bytes": plan.traffic_bytes(),
        "step_count": plan.steps().count(),
        "gemms": plan.gemms(),
        "launches": plan.launches(),
    })
}

fn plan_json(plan: &BlockPlan) -> Value {
    let names = |operands: &[Operand]| operands.iter().map(|o| o.name()).collect::<Vec<_>>();
    let stages = plan.stages.iter().map(|stage| {
        let steps = stage.steps.iter().map(|s| {
            let (row_tile, query_tile, split) = match s.op {
                Op::Projection(p) => (Some(p.row_tile), None, None),
                Op::Attention(t) | Op::MergeSplits(t) => (None, Some(t.query_tile), t.split),
                _ => (None, None, None),
            };
            json!({
                "op": s.op.name_in(&plan.problem.spec),
                "kernel": s.kernel,
                "row_tile": row_tile,
                "query_tile": query_tile,
                "split": split,
                "reads": names(&s.reads),
                "writes": names(&s.writes),
                "flops": s.flops,
                "bytes": s.bytes,
                "predicted_ms": s.seconds * 1e3,
                "why": s.why,
            })
        });
        let steps: Vec<Value> = steps.collect();
        json!({"row_block": stage.row_block, "steps": steps})
    });
    let stages: Vec<Value> = stages.collect();
    let buffer = |b: &Buffer| json!({"name": b.name.name(), "dtype": b.elements(), "bytes": b.bytes, "offset": b.offset});
    let buffers: Vec<_> = plan.buffers.iter().map(buffer).collect();
    let rejected: Vec<_> = plan.rejected.iter().map(|r| json!({"what": r.what, "why": r.why})).collect();
    let mut value = totals(plan);
    for (key, part) in [
        ("problem", json!(plan.problem.to_string())),
        ("threads", json!(plan.threads)),
        ("stages", json!(stages)),
        ("buffers", json!(buffers)),
        ("workspace_bytes", json!(plan.workspace_bytes)),
        ("scratch_bytes", json!(plan.scratch_bytes)),
        ("rejected", json!(rejected)),
    ] {
        value[key] = part;
    }
    value
}
