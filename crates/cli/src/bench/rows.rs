//! From measurements to rows of `results.json`.

use lawson::{BlockPlan, DType, Result, WeightKind};

use super::{
    measure::Measured,
    record::{Machine, Row, StepRow},
    session::Session,
    specs::{Case, Kernel, Study},
};

/// The variant of the RoPE study that turns q and k and appends k and v.
pub const APPEND: &str = "fused append";

/// A row with what `case` says, at `level`.
pub fn base(session: &Session, case: &Case, level: &str) -> Row {
    let s = &case.shape;
    let block = matches!(case.study, Study::Block | Study::Qkv | Study::Throughput)
        || matches!(case.kernel, Some(Kernel::Projection | Kernel::Block));
    let with_cache = case.variant == Some(APPEND);
    let cached = block || with_cache || matches!(case.study, Study::Attention | Study::Decode | Study::Kernels);
    let decode = case.study == Study::Decode || case.kernel == Some(Kernel::Decode);
    Row {
        study: case.study.name().to_owned(),
        level: level.to_owned(),
        device: session.context.device().to_string(),
        dtype: s.dtype.to_string(),
        kv_dtype: cached.then(|| s.kv_dtype.to_string()),
        weights: block.then(|| match s.weights {
            WeightKind::Compute => s.dtype.to_string(),
            other => other.to_string(),
        }),
        batch: Some(s.batch),
        seq: Some(s.seq),
        // The cache of decode attention holds the new token's row already.
        past: Some(if decode { s.past + s.seq } else { s.past }),
        hidden: block.then_some(s.hidden),
        heads: Some(s.heads),
        kv_heads: cached.then_some(s.kv_heads),
        head_dim: (case.study != Study::Softmax).then_some(s.head_dim),
        causal: cached.then_some(s.causal),
        threads: session.context.gpu().is_none().then(|| session.threads()),
        variant: case.variant.map(str::to_owned),
        note: (!case.notes.is_empty()).then(|| case.notes.join("; ")),
        ..Row::default()
    }
}

/// Adds a remark.
pub fn remark(row: &mut Row, text: &str) {
    row.note = Some(match row.note.take() {
        Some(note) => format!("{note}; {text}"),
        None => text.to_owned(),
    });
}

/// What a form computes and must move, the same for every level and peer.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Floating-point operations.
    pub flops: Option<f64>,
    /// Compulsory bytes.
    pub bytes: f64,
}

/// Fills in times, rates and errors.
pub fn measured(row: &mut Row, m: &Measured, work: Work) {
    if let Some(checked) = &m.checked {
        row.max_abs_err = Some(checked.max_abs).filter(|v| v.is_finite());
        row.rel_err = Some(checked.relative).filter(|v| v.is_finite());
    }
    row.flops = work.flops.map(|f| f as u64);
    if let Some(why) = &m.failed {
        remark(row, why);
        return;
    }
    let median = m.times.median();
    let milliseconds = |s: f64| Some(s * 1e3).filter(|v| v.is_finite());
    row.median_ms = milliseconds(median);
    (row.p10_ms, row.p90_ms) = (milliseconds(m.times.percentile(0.1)), milliseconds(m.times.percentile(0.9)));
    row.cold_ms = m.cold.and_then(milliseconds);
    row.runs = Some(m.times.runs());
    row.gflops = work.flops.map(|f| f / median * 1e-9);
    row.gbps = Some(work.bytes / median * 1e-9);
}

/// Limits of the machine, as measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// f32 FMA operations per second.
    pub peak_flops: f64,
    /// Operations per second on bf16.
    pub bf16_peak_flops: f64,
    /// Operations per second on int8, on a CPU.
    pub int8_peak_ops: Option<f64>,
    /// Bytes per second.
    pub bandwidth: f64,
}

impl Limits {
    /// Measures them.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn measure(session: &Session) -> Result<Self> {
        let peak = |dtype| session.context.measure_peak(dtype);
        let bandwidth = session.context.measure_bandwidth()?;
        let int8_peak_ops = session.context.gpu().is_none().then(|| session.context.measure_int8_peak());
        Ok(Limits { peak_flops: peak(DType::F32)?, bf16_peak_flops: peak(DType::BF16)?, int8_peak_ops, bandwidth })
    }

    /// Operations per second on elements that are bf16 or not.
    pub fn peak(self, bf16: bool) -> f64 {
        if bf16 { self.bf16_peak_flops } else { self.peak_flops }
    }

    /// Operations per second that bind `row`: with weights in int8 those of the projections, which the rest of a block does not reach.
    fn peak_of(self, row: &Row) -> f64 {
        let own = self.peak(row.dtype == DType::BF16.name());
        let int8 = row.weights.as_deref() == Some("int8");
        self.int8_peak_ops.filter(|_| int8).map_or(own, |ops| own.max(ops))
    }

    /// The greater of each: what else ran on the machine can only lower a measurement.
    pub fn max(self, other: Self) -> Self {
        Limits {
            peak_flops: self.peak_flops.max(other.peak_flops),
            bf16_peak_flops: self.bf16_peak_flops.max(other.bf16_peak_flops),
            int8_peak_ops: self.int8_peak_ops.zip(other.int8_peak_ops).map(|(a, b)| a.max(b)),
            bandwidth: self.bandwidth.max(other.bandwidth),
        }
    }

    /// The lesser of each.
    pub fn min(self, other: Self) -> Self {
        Limits {
            peak_flops: self.peak_flops.min(other.peak_flops),
            bf16_peak_flops: self.bf16_peak_flops.min(other.bf16_peak_flops),
            int8_peak_ops: self.int8_peak_ops.zip(other.int8_peak_ops).map(|(a, b)| a.min(b)),
            bandwidth: self.bandwidth.min(other.bandwidth),
        }
    }

    /// Fills in what a run found: these, its greatest, and its `lowest`.
    pub fn describe(self, lowest: Self, machine: &mut Machine) {
        let billions = |v: f64| Some(v * 1e-9);
        machine.peak_gflops = billions(self.peak_flops);
        machine.bf16_peak_gflops = billions(self.bf16_peak_flops);
        machine.int8_peak_gops = self.int8_peak_ops.and_then(billions);
        machine.bandwidth_gbps = billions(self.bandwidth);
        machine.peak_gflops_least = billions(lowest.peak_flops);
        machine.bf16_peak_gflops_least = billions(lowest.bf16_peak_flops);
        machine.bandwidth_gbps_least = billions(lowest.bandwidth);
    }

    /// Fills in each row's share of the limit that binds; none where it is exceeded, as by data that stays in a cache.
    pub fn fill_shares(self, rows: &mut [Row]) {
        for row in rows {
            let compute = row.gflops.map_or(0.0, |v| v * 1e9 / self.peak_of(row));
            row.limit_share = row.gbps.map(|v| compute.max(v * 1e9 / self.bandwidth)).filter(|&s| s <= 1.0);
        }
    }
}

/// Fills in what the plan says.
pub fn planned(row: &mut Row, plan: &BlockPlan) {
    row.peak_bytes = Some(plan.peak_bytes() as u64);
    row.traffic_bytes = Some(plan.traffic_bytes() as u64);
    row.steps = Some(plan.steps().count());
    row.gemms = Some(plan.gemms());
    row.launches = Some(plan.launches());
    row.plan = Some(plan.to_string());
}

/// The plan's steps with their measured seconds.
pub fn steps(plan: &BlockPlan, seconds: &[f64]) -> Vec<StepRow> {
    let row = |(step, &s): (&lawson_core::plan::Step, &f64)| StepRow {
        op: step.op.name_in(&plan.problem.spec),
        kernel: step.kernel.clone(),
        median_ms: Some(s * 1e3),
        predicted_ms: Some(step.seconds * 1e3),
        bytes: Some(step.bytes as u64),
        flops: Some(step.flops as u64),
        gflops: (step.flops > 0.0 && s > 0.0).then(|| step.flops / s * 1e-9),
    };
    plan.steps().zip(seconds).map(row).collect()
}

/// Fills in how much faster than unfused each row is.
pub fn speedups(rows: &mut [Row]) {
    let base = rows.iter().find(|r| r.level == "unfused").and_then(|r| r.median_ms);
    for row in rows {
        row.speedup = base.zip(row.median_ms).map(|(base, this)| base / this);
    }
}
