//! A plan as text that people read.

use std::fmt::Write;

use lawson_core::plan::{BlockPlan, Op, Operand};

fn list(operands: &[Operand]) -> String {
    let names: Vec<_> = operands.iter().map(|o| o.name()).collect();
    if names.is_empty() { "-".into() } else { names.join(", ") }
}

/// `n` in the largest unit of which it holds one, each `step` of the one before.
fn scaled(n: f64, step: f64, units: &[&str]) -> String {
    let (mut n, mut unit) = (n, 0);
    while n >= step && unit + 1 < units.len() {
        n /= step;
        unit += 1;
    }
    if unit == 0 { format!("{n:.0} {}", units[0]) } else { format!("{n:.1} {}", units[unit]) }
}

/// Bytes with a binary unit.
pub(crate) fn bytes(n: f64) -> String {
    scaled(n, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

/// Floating-point operations with their unit.
fn operations(n: f64) -> String {
    scaled(n, 1000.0, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"])
}

/// A time with its unit.
pub(crate) fn time(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.1} µs", seconds * 1e6) } else { format!("{:.3} ms", seconds * 1e3) }
}

/// `n` of `one`.
pub(crate) fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// The plan's steps with kernel, tiles, reads, writes, reason, predicted time and bytes, its buffers, and what was rejected.
pub fn explain(plan: &BlockPlan) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let mut line = |s: String| {
        let _ = writeln!(out, "{s}");
    };
    line(format!("{}", plan.problem));
    line(format!("level {}, {}, plan {:016x}", plan.level, count(plan.threads, "thread", "threads"), plan.id()));
    line(format!(
        "{} steps, {} GEMMs, {} launches; predicted {}; {} of memory beyond weights, cache, x and y; {} of traffic",
        plan.steps().count(),
        plan.gemms(),
        plan.launches(),
        time(plan.seconds()),
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
                Op::Projection(p) if p.row_tile > 0 => format!(" row tile {}", p.row_tile),
                Op::Attention(t) | Op::MergeSplits(t) => {
                    let split = match (t.split, t.shares) {
                        (Some(s), _) => format!("parts of {s} rows"),
                        (None, Some(n)) => format!("shares for {}", count(n, "block", "blocks")),
                        (None, None) => "no split".to_string(),
                    };
                    if t.query_tile == 0 {
                        format!(" {split}")
                    } else {
                        format!(" {}, {split}", count(t.query_tile, "query", "queries"))
                    }
                }
                _ => String::new(),
            };
            line(format!("{n:>3}. {:<28} {}{}", s.op.name_in(&plan.problem.spec), s.kernel, params));
            line(format!("     reads {}; writes {}", list(&s.reads), list(&s.writes)));
            line(format!("     predicted {}, {}, {}", time(s.seconds), operations(s.flops), bytes(s.bytes)));
            line(format!("     {}", s.why));
        }
    }
    line("\nworkspace:".into());
    for b in &plan.buffers {
        let (size, offset) = (bytes(b.bytes as f64), bytes(b.offset as f64));
        line(format!("     {:<12} {:<5} {size:>10} at {offset}", b.name.name(), b.elements()));
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
