//! Made-up runs that exercise the whole page.

use crate::bench::record::{Machine, Results, Row, StepRow};

const LEVELS: [&str; 4] = ["unfused", "minimal", "moderate", "maximal"];

/// A machine of two threads.
pub fn machine() -> Machine {
    Machine {
        name: "Intel Xeon Platinum 8488C".to_owned(),
        isa: "avx512".to_owned(),
        isa_features: ["avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512bf16", "amx_tile", "amx_bf16"]
            .map(str::to_owned)
            .to_vec(),
        cores: Some(2),
        threads: Some(2),
        l1_bytes: Some(48 << 10),
        l2_bytes: Some(2 << 20),
        l3_bytes: Some(105 << 20),
        memory_bytes: Some(16 << 30),
        peak_gflops: Some(409.0),
        bf16_peak_gflops: Some(880.0),
        int8_peak_gops: Some(1600.0),
        bandwidth_gbps: Some(24.3),
        peak_gflops_least: Some(402.0),
        bf16_peak_gflops_least: Some(871.0),
        bandwidth_gbps_least: Some(21.0),
        os: Some("Linux 6.8 x86_64".to_owned()),
        commit: Some("3f9c1e2".to_owned()),
        date: Some("2025-03-08T14:12:00Z".to_owned()),
    }
}

/// A row of one study with everything measured.
pub fn row(study: &str, level: &str, (batch, seq, past): (usize, usize, usize), hidden: usize, median_ms: f64) -> Row {
    let (heads, head_dim) = (hidden / 64, 64);
    let (b, s, e, l) = (batch as u64, seq as u64, hidden as u64, (seq + past) as u64);
    let projections = if matches!(study, "block" | "throughput") { 8 * b * s * e * e } else { 0 };
    let flops = projections + if study == "qkv" { 6 * b * s * e * e } else { 2 * b * s * e * l };
    let compulsory = match study {
        "block" | "throughput" => 16 * e * e + 8 * b * s * e + 8 * b * past as u64 * e,
        "qkv" => 12 * e * e + 16 * b * s * e,
        _ => 8 * b * s * e + 8 * b * l * e,
    };
    let peak = match level {
        "unfused" => 4 * b * heads as u64 * s * l + 20 * b * s * e,
        "minimal" => 4 * b * heads as u64 * s * l + 24 * b * s * e,
        "moderate" => 20 * b * s * e + (1 << 18),
        _ => 8 * b * s * e + (1 << 18),
    };
    Row {
        study: study.to_owned(),
        level: level.to_owned(),
        device: "cpu".to_owned(),
        dtype: "f32".to_owned(),
        kv_dtype: Some("f32".to_owned()),
        weights: Some("f32".to_owned()),
        batch: Some(batch),
        seq: Some(seq),
        past: Some(past),
        hidden: Some(hidden),
        heads: Some(heads),
        kv_heads: Some(heads),
        head_dim: Some(head_dim),
        causal: Some(true),
        threads: Some(2),
        median_ms: Some(median_ms),
        p10_ms: Some(median_ms * 0.97),
        p90_ms: Some(median_ms * 1.08),
        runs: Some(9),
        peak_bytes: Some(peak),
        resident_bytes: Some(16 * e * e),
        traffic_bytes: Some(compulsory + 2 * peak),
        flops: Some(flops),
        gflops: Some(flops as f64 / median_ms * 1e-6),
        gbps: Some(compulsory as f64 / median_ms * 1e-6),
        steps: Some(match level {
            "unfused" => 11,
            "minimal" => 9,
            "moderate" => 4,
            _ => 3,
        }),
        gemms: Some(match level {
            "unfused" => 6,
            "minimal" => 4,
            _ => 2,
        }),
        launches: Some(if level == "maximal" { 3 } else { 9 }),
        max_abs_err: Some(3.1e-7),
        rel_err: Some(4.6e-7),
        limit_share: Some((flops as f64 / median_ms * 1e-6 / 409.0).max(compulsory as f64 / median_ms * 1e-6 / 24.3).min(1.0)),
        ..Row::default()
    }
}

fn block_ms(level: usize, seq: usize, hidden: usize) -> f64 {
    let (s, e) = (seq as f64, hidden as f64);
    let gemm = 8.0 * s * e * e / 280e6 * [1.0, 0.985, 0.985, 0.97][level];
    let attention = 2.0 * s * s * e / 210e6;
    let scores = e / 64.0 * s * s * 4.0 * 6.0 / 22e6;
    gemm + if level < 2 { 2.0 * attention + scores } else { attention } + [0.02, 0.02, 0.75, 0.45][level]
}

fn steps(level: &str, ms: f64) -> Vec<StepRow> {
    let step = |op: &str, kernel: &str, share: f64, bytes: u64, flops: u64| StepRow {
        op: op.to_owned(),
        kernel: kernel.to_owned(),
        median_ms: Some(ms * share),
        predicted_ms: None,
        bytes: Some(bytes),
        flops: Some(flops),
        gflops: (flops > 0).then(|| flops as f64 / (ms * share) * 1e-6),
    };
    let g = 1u64 << 31;
    match level {
        "unfused" => vec![
            step("q = x·Wq", "gemm_avx512", 0.07, 42 << 20, g),
            step("k = x·Wk", "gemm_avx512", 0.07, 42 << 20, g),
            step("v = x·Wv", "gemm_avx512", 0.07, 42 << 20, g),
            step("RoPE of q and k", "rope_avx512", 0.02, 67 << 20, 1 << 26),
            step("append k and v", "copy", 0.01, 67 << 20, 0),
            step("scores = q·kᵀ", "gemm_batched_avx512", 0.22, 1100 << 20, 4 * g),
            step("scale, mask, softmax", "softmax_avx512", 0.25, 2100 << 20, 1 << 30),
            step("p·v", "gemm_batched_avx512", 0.21, 1100 << 20, 4 * g),
            step("transpose", "copy", 0.01, 33 << 20, 0),
            step("y = a·Wo", "gemm_avx512", 0.07, 42 << 20, g),
        ],
        "maximal" => vec![
            step("norm, QKV, RoPE, append", "gemm_qkv_rope_avx512", 0.40, 80 << 20, 3 * g),
            step("attention", "attention_prefill_avx512", 0.46, 67 << 20, 4 * g),
            step("y = a·Wo + residual", "gemm_avx512", 0.14, 50 << 20, g),
        ],
        _ => vec![step("QKV", "gemm_avx512", 0.4, 80 << 20, 3 * g), step("rest", "several", 0.6, 300 << 20, 5 * g)],
    }
}

/// A run of every study, with peers.
pub fn full() -> Results {
    let mut rows = Vec::new();
    for (batch, seq, hidden, dtype) in
        [(16, 512, 1024, "f32"), (8, 1024, 2048, "f32"), (1, 2048, 4096, "f32"), (1, 2048, 4096, "bf16")]
    {
        for (i, level) in LEVELS.iter().enumerate() {
            let mut r = row("block", level, (batch, seq, 0), hidden, block_ms(i, seq, hidden) * batch as f64);
            r.dtype = dtype.to_owned();
            rows.push(r);
        }
        for (peer, factor) in [("peer:torch-sdpa", 1.25), ("peer:torch-traditional", 2.7)] {
            let mut r = row("block", peer, (batch, seq, 0), hidden, block_ms(2, seq, hidden) * batch as f64 * factor);
            r.dtype = dtype.to_owned();
            rows.push(r);
        }
    }
    for seq in [128, 256, 512, 1024, 2048, 4096] {
        for (i, level) in LEVELS.iter().enumerate() {
            let slow = if i >= 2 && seq < 512 { 1.06 } else { 1.0 };
            let ms = block_ms(i, seq, 512) * slow * if i == 3 && seq == 256 { 0.8 } else { 1.0 };
            let mut r = row("block", level, (1, seq, 0), 512, ms);
            if seq == 4096 {
                r.steps_table = steps(level, ms);
            }
            rows.push(r);
        }
        rows.push(Row {
            kv_heads: Some(8),
            ..row("block", "peer:torch-sdpa", (1, seq, 0), 512, block_ms(2, seq, 512) * 1.3 + 0.2)
        });
    }
    rows.push(Row {
        median_ms: None,
        p10_ms: None,
        p90_ms: None,
        peak_bytes: None,
        traffic_bytes: None,
        gflops: None,
        gbps: None,
        limit_share: None,
        max_abs_err: None,
        rel_err: None,
        steps: None,
        gemms: None,
        launches: None,
        note: Some("not installed".to_owned()),
        ..row("block", "peer:ort", (1, 4096, 0), 512, 1.0)
    });
    for (variant, factor) in [("alone", 1.0), ("layer", 3.2)] {
        for (level, ms) in [("unfused", 101.0), ("minimal", 92.6)] {
            let peak = Some(96 << 20);
            rows.push(Row {
                variant: Some(variant.to_owned()),
                peak_bytes: peak,
                ..row("qkv", level, (1, 1024, 0), 2048, ms * factor)
            });
        }
    }
    for (level, variant, ms, err, peak) in [
        ("unfused", "three-pass", 42.0, 8.2e-9, 64u64 << 20),
        ("minimal", "fused", 17.5, 8.2e-9, 2 << 10),
        ("moderate", "online", 21.0, 9.4e-9, 4 << 10),
    ] {
        rows.push(Row {
            variant: Some(variant.to_owned()),
            peak_bytes: Some(peak),
            max_abs_err: Some(err),
            hidden: None,
            heads: None,
            kv_heads: None,
            head_dim: None,
            flops: None,
            gflops: None,
            ..row("softmax", level, (64, 4096, 0), 1024, ms)
        });
    }
    for (level, variant, ms) in [
        ("unfused", "two-pass half", 9.4),
        ("maximal", "fused half", 3.9),
        ("unfused", "two-pass interleaved", 12.1),
        ("maximal", "fused interleaved", 4.1),
    ] {
        rows.push(Row {
            variant: Some(variant.to_owned()),
            flops: None,
            gflops: None,
            ..row("rope", level, (4, 1024, 0), 1024, ms)
        });
    }
    for seq in [256, 512, 1024, 2048, 4096] {
        let (s, base) = (seq as f64, 2.0 * (seq * seq) as f64 * 1024.0 / 215e6);
        rows.push(row("attention", "unfused", (1, seq, 0), 1024, base * 2.0 + 16.0 * s * s * 4.0 * 6.0 / 22e6));
        rows.push(row("attention", "maximal", (1, seq, 0), 1024, base));
        rows.push(row("attention", "peer:torch-sdpa", (1, seq, 0), 1024, base * 1.7));
    }
    for past in [256, 1024, 4096, 16384, 65536] {
        for (kv, bytes) in [("f32", 8.0), ("bf16", 4.0)] {
            for (level, rate) in [("unfused", 9.0), ("maximal", 22.5)] {
                let ms = past as f64 * 1024.0 * bytes / (rate * 1e6) + 0.004;
                let gbps = Some(past as f64 * 1024.0 * bytes / ms * 1e-6);
                rows.push(Row { kv_dtype: Some(kv.to_owned()), gbps, ..row("decode", level, (1, 1, past), 4096, ms) });
            }
        }
    }
    for batch in [1, 2, 4, 8, 16, 32, 64] {
        for (i, level) in LEVELS.iter().enumerate() {
            let b = batch as f64;
            let ms = 2.8 + b * [0.62, 0.6, 0.33, 0.31][i];
            rows.push(Row {
                tokens_per_s: Some(b / ms * 1e3),
                sequences_fit: Some([118, 116, 127, 128][i] - batch as u64 / 16),
                memory_limit_bytes: Some(4 << 30),
                ..row("throughput", level, (batch, 1, 4096), 1024, ms)
            });
        }
    }
    rows.extend(kernels());
    rows.extend(quality());
    Results { lawson: "0.1.0".to_owned(), machine: machine(), results: rows }
}

/// Rows of `lawson bench quality`.
pub fn quality() -> Vec<Row> {
    let of = |(variant, change, error): (&str, f64, f64)| Row {
        variant: Some(variant.to_owned()),
        mean_loss: Some(1.879 * (1.0 + change)),
        loss_change: Some(change),
        layer_errors: (0..6).map(|i| error * (1.0 + 0.1 * f64::from(i))).collect(),
        batch: Some(32),
        seq: Some(512),
        ..Row { study: "quality".to_owned(), level: "maximal".to_owned(), dtype: "f32".to_owned(), ..Row::default() }
    };
    let forms = [
        ("f32", 0.0, 0.0),
        ("int8 weights", 0.0003, 0.012),
        ("int4 cache", 0.011, 0.08),
        ("int8 weights, int8 cache", 0.0004, 0.014),
    ];
    forms.map(of).to_vec()
}

/// Rows of `lawson bench kernels --neighbours 30`.
pub fn kernels() -> Vec<Row> {
    let of = |variant: &str, dtype: &str, size: (usize, usize, usize), hidden: usize, ms: f64| Row {
        variant: Some(variant.to_owned()),
        dtype: dtype.to_owned(),
        ..row("kernels", "maximal", size, hidden, ms)
    };
    let alone = |row: Row| Row { hidden: None, ..row };
    let mut rows = Vec::new();
    for (dtype, faster) in [("f32", 1.0), ("bf16", 2.1)] {
        for e in [1024, 2048, 4096] {
            let (ms, flops) = (6.0 * (e * e) as f64 * e as f64 / 360e6 / faster, 6 * (e * e * e) as u64);
            rows.push(Row {
                flops: Some(flops),
                gflops: Some(flops as f64 / ms * 1e-6),
                neighbours: Some(30),
                neighbours_least: Some(0.88),
                neighbours_median: Some(0.97),
                ..of("gemm", dtype, (1, e, 0), e, ms)
            });
        }
        rows.push(alone(of("attention full", dtype, (1, 2048, 0), 1024, 26.0 / faster)));
        for (variant, share) in [("attention causal", None), ("attention softcap", Some(0.81)), ("attention mask", Some(0.42))] {
            let ms = 27.5 / faster / share.unwrap_or(1.0);
            rows.push(alone(Row { plain_share: share, ..of(variant, dtype, (1, 2048, 0), 1024, ms) }));
        }
        for (variant, share) in [("decode warm", 0.92), ("decode cold", 0.87)] {
            for past in [1024, 4096, 16384] {
                let ms = past as f64 * 8192.0 / 25e6 / faster;
                let row = of(variant, dtype, (1, 1, past), 4096, ms);
                rows.push(alone(Row { read_share: Some(share - 300.0 / past as f64), kv_heads: Some(8), ..row }));
            }
        }
    }
    rows.push(Row { read_share: Some(0.83), ..of("block decode", "bf16", (1, 1, 4096), 4096, 4.1) });
    rows
}

/// `lawson bench attention`: one study, and fusing that does not pay.
pub fn attention_only() -> Results {
    let mut rows = Vec::new();
    for seq in [64, 128, 256] {
        rows.push(row("attention", "unfused", (1, seq, 0), 512, seq as f64 * 0.01));
        rows.push(row("attention", "maximal", (1, seq, 0), 512, seq as f64 * 0.0103));
    }
    Results { lawson: "0.1.0".to_owned(), machine: machine(), results: rows }
}

/// One row and an unknown machine.
pub fn single() -> Results {
    Results { results: vec![row("block", "maximal", (1, 512, 0), 512, 3.4)], ..Results::default() }
}

/// `lawson bench --device cuda --preset article --peers torch`.
pub fn gpu() -> Results {
    let machine = Machine {
        name: "NVIDIA H200".to_owned(),
        isa: "sm_90a".to_owned(),
        cores: Some(132),
        l1_bytes: Some(228 << 10),
        l2_bytes: Some(50 << 20),
        memory_bytes: Some(140 << 30),
        peak_gflops: Some(51_000.0),
        bf16_peak_gflops: Some(770_000.0),
        bandwidth_gbps: Some(4200.0),
        os: Some("Linux 6.8 x86_64".to_owned()),
        ..Machine::default()
    };
    let on_gpu =
        |study: &str, level: &str, (size, hidden): ((usize, usize, usize), usize), flops: f64, bytes: f64, ms: f64| Row {
            device: "cuda:0".to_owned(),
            dtype: "bf16".to_owned(),
            kv_dtype: Some("bf16".to_owned()),
            weights: (study == "block").then(|| "bf16".to_owned()),
            hidden: matches!(study, "block" | "qkv").then_some(hidden),
            threads: None,
            cold_ms: (!level.starts_with("peer:")).then_some(ms * 1.1),
            flops: (flops > 0.0).then_some(flops as u64),
            gflops: (flops > 0.0).then_some(flops / ms * 1e-6),
            gbps: Some(bytes / ms * 1e-6),
            note: level.starts_with("peer:").then(|| "PyTorch 2.11.0+cu130, CUDA graph".to_owned()),
            ..row(study, level, size, hidden, ms)
        };
    let peer = |i: usize| ["peer:torch-sdpa-cudnn", "peer:torch-sdpa-flash", "peer:torch-compiled", "peer:torch-traditional"][i];
    let mut rows = Vec::new();
    for (b, s, e, best) in [(16, 512, 1024, 0.17), (8, 1024, 2048, 0.5), (4, 2048, 4096, 1.95)] {
        let flops = (8 * b * s * e * e + 2 * b * s * s * e) as f64;
        for (level, factor) in LEVELS.iter().zip([3.4, 3.3, 1.1, 1.0]) {
            rows.push(on_gpu("block", level, ((b, s, 0), e), flops, (8 * e * e) as f64, best * factor));
        }
        for (i, factor) in [1.2, 1.3, 1.05, 4.0].into_iter().enumerate() {
            rows.push(on_gpu("block", peer(i), ((b, s, 0), e), flops, (8 * e * e) as f64, best * factor));
        }
    }
    for (causal, head_dim) in [(false, 64), (false, 128), (true, 64), (true, 128)] {
        for s in [1024, 2048, 4096, 8192, 16_384] {
            let flops = 4.0 * 16_384.0 * s as f64 * 2048.0 * if causal { 0.5 } else { 1.0 };
            let ms = flops / (330.0 + 10.0 * (s as f64).log2()) * 1e-9;
            let mut levels = vec![("maximal", 1.0), (peer(0), 0.7), (peer(1), 1.05)];
            if s <= 4096 {
                levels.extend([("unfused", 14.0), (peer(3), 16.0)]);
            }
            for (level, factor) in levels {
                let row = on_gpu("attention", level, ((16_384 / s, s, 0), 2048), flops, 2e8, ms * factor);
                let heads = Some(2048 / head_dim);
                rows.push(Row { causal: Some(causal), heads, kv_heads: heads, head_dim: Some(head_dim), ..row });
            }
        }
    }
    for kv_heads in [32, 8] {
        for (b, l) in [(1, 4096), (1, 16_384), (1, 65_536), (8, 4096), (32, 4096), (32, 16_384), (128, 4096)] {
            let bytes = (4 * b * kv_heads * l * 128) as f64;
            for (level, factor) in [("maximal", 1.0), (peer(0), 1.04), (peer(1), 1.3)] {
                let row = on_gpu("decode", level, ((b, 1, l), 4096), bytes, bytes, factor * (0.006 + bytes / 4.5e9));
                rows.push(Row { heads: Some(32), kv_heads: Some(kv_heads), head_dim: Some(128), ..row });
            }
        }
    }
    for (level, variant, ms) in [
        ("unfused", "two-pass half", 0.71),
        ("maximal", "fused half", 0.27),
        ("peer:torch-compiled", "peer half", 0.295),
        ("peer:torch-traditional", "peer half", 3.07),
        ("unfused", "two-pass interleaved", 0.72),
        ("maximal", "fused interleaved", 0.27),
        ("maximal", "fused append", 0.82),
    ] {
        let bytes = if variant == "fused append" { 3.2e9 } else { 1.07e9 };
        rows.push(Row { variant: Some(variant.to_owned()), ..on_gpu("rope", level, ((32, 2048, 0), 4096), 0.0, bytes, ms) });
    }
    Results { lawson: "0.1.0".to_owned(), machine, results: rows }
}
