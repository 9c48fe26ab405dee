//! A plan as text that people read.

use std::fmt::Write;

use lawson_core::plan::{BlockPlan, Op, Operand};

fn list(operands: &[Operand]) -> String {
    let names: Vec<_> = operands.iter().map(|o| o.name()).collect();
    if names.is_empty() { "-".into() } else { names.join(", ") }
}

/// Bytes with a binary unit.
fn bytes(n: f64) -> String {
    let (mut n, mut unit) = (n, 0);
    while n >= 1024.0 && unit < 3 {
        n /= 1024.0;
        unit += 1;
    }
    format!("{n:.1} {}", ["B", "KiB", "MiB", "GiB"][unit])
}

/// The plan's steps with kernel, tiles, reads, writes, reason, predicted time and bytes, its buffers, and what was rejected.
pub fn explain(plan: &BlockPlan) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let mut line = |s: String| {
        let _ = writeln!(out, "{s}");
    };
    line(format!("{}", plan.problem));
    line(format!("level {}, {} threads, plan {:016x}", plan.level, plan.threads, plan.id()));
    line(format!(
        "{} steps, {} GEMMs, {} launches; predicted {:.3} ms; {} of memory beyond weights, cache, x and y; {} of traffic",
        plan.steps().count(),
        plan.gemms(),
        plan.launches(),
        plan.seconds() * 1e3,
        bytes(plan.peak_bytes() as f64),
        bytes(plan.traffic_bytes())
    ));
    let mut n = 0;
    for stage in &plan.stages {
        match stage.row_block {
            Some(r) => line(format!("\nfor each {r} tokens:")),
            None => line("\nfor all tokens at once:".into()),
        }
        for s in &stage.steps {
            n += 1;
            let params = match s.op {
                Op::Projection(p) => format!(" row tile {}", p.row_tile),
                Op::Attention(t) | Op::MergeSplits(t) => {
                    let split = t.split.map_or_else(|| "no split".to_string(), |s| format!("parts of {s} rows"));
                    if t.query_tile == 0 { format!(" {split}") } else { format!(" {} queries, {split}", t.query_tile) }
                }
                _ => String::new(),
            };
            line(format!("{n:>3}. {:<28} {}{}", s.op.name(), s.kernel, params));
            line(format!("     reads {}; writes {}", list(&s.reads), list(&s.writes)));
            line(format!("     predicted {:.3} ms, {:.3} GFLOP, {}", s.seconds * 1e3, s.flops / 1e9, bytes(s.bytes)));
            line(format!("     {}", s.why));
        }
    }
    line("\nworkspace:".into());
    for b in &plan.buffers {
        line(format!("     {:<12} {:<5} {:>10} at {}", b.name.name(), b.dtype, bytes(b.bytes as f64), b.offset));
    }
    line(format!("     {:<12} {:<5} {:>10} for each thread", "scratch", "", bytes(plan.scratch_bytes as f64)));
    if !plan.rejected.is_empty() {
        line("\nrejected:".into());
    }
    for r in &plan.rejected {
        line(format!("     {}: {}", r.what, r.why));
    }
    out
}
