//! Runs of single kernels around the edges of their tiles.

use lawson_core::{
    DType,
    kernel::{KernelCase, KernelOp},
    problem::{AttentionProblem, Lengths, RopeLayout, RopeSpec},
};

use crate::{
    cases::{EDGES, HEAD_DIMS, edge_cases, quantised_cases, random_cases},
    inputs::{mask, rounded, sinks, slopes},
    rng::Rng,
};

/// Elements of a case's cache and of its q; keeps all cases of a kernel together in memory.
const MOST_ELEMENTS: usize = 100_000;

/// Every case of `op`, named.
pub fn kernel_cases(op: KernelOp) -> Vec<(String, KernelCase)> {
    let mut rng = Rng::new(op as u64 + 1);
    match op {
        KernelOp::Gemm => gemm(&mut rng),
        KernelOp::GemmInt8 => gemm_int8(&mut rng),
        KernelOp::Norm => norm(&mut rng),
        KernelOp::Rope => rope(&mut rng),
        KernelOp::Softmax => softmax(&mut rng),
        KernelOp::AttentionPrefill => attention(false, &mut rng),
        KernelOp::AttentionDecode => attention(true, &mut rng),
        _ => Vec::new(),
    }
}

fn edges() -> impl Iterator<Item = usize> {
    EDGES.into_iter().filter(|&n| n > 0)
}

fn gemm(rng: &mut Rng) -> Vec<(String, KernelCase)> {
    const DEPTHS: [usize; 12] = [1, 2, 7, 16, 31, 32, 65, 96, 130, 257, 513, 1030];
    let mut cases = Vec::new();
    let sizes: Vec<usize> = edges().chain([2, 3, 5, 6, 7, 8, 12, 13, 24, 25, 48, 97]).collect();
    for &m in &sizes {
        for &n in &sizes {
            let (k, weight_dtype) = (rng.pick(&DEPTHS), DType::ALL[cases.len() % 3]);
            let bias = rng.chance(0.5).then(|| rng.normals(n, 1.0));
            let name = format!("gemm m={m} n={n} k={k} {weight_dtype}{}", if bias.is_some() { " bias" } else { "" });
            let x = rounded(weight_dtype, rng.normals(m * k, 1.0));
            let w = rounded(weight_dtype, rng.normals(n * k, 1.0 / (k as f64).sqrt()));
            cases.push((name, KernelCase::Gemm { m, n, k, x, w, bias, weight_dtype }));
        }
    }
    cases
}

/// Rows around the register tile's, columns around the panel's, depths around a block's; rows of x and of W that are all zero, of very different
/// greatness, with ties of rounding, or not finite.
fn gemm_int8(rng: &mut Rng) -> Vec<(String, KernelCase)> {
    const DEPTHS: [usize; 14] = [1, 2, 3, 4, 5, 31, 63, 64, 65, 128, 130, 255, 257, 1030];
    let mut cases = Vec::new();
    for m in [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 24, 25, 49] {
        for n in [1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 130, 300] {
            let (k, kind) = (rng.pick(&DEPTHS), rng.pick(&["plain", "plain", "spread", "ties", "lost"]));
            let bias = rng.chance(0.5).then(|| rng.normals(n, 1.0));
            let (mut x, mut w) = (rng.normals(m * k, 1.0), rng.normals(n * k, 1.0 / (k as f64).sqrt()));
            match kind {
                "spread" => {
                    for row in x.chunks_exact_mut(k).chain(w.chunks_exact_mut(k)) {
                        let factor = rng.pick(&[0.0, 1e-42, 1e-30, 1e-3, 1.0, 1e4, 1e15]);
                        row.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
                    }
                }
                // Halves of the scale 1.
                "ties" => {
                    for row in x.chunks_exact_mut(k).chain(w.chunks_exact_mut(k)) {
                        row.iter_mut().for_each(|v| *v = (*v * 40.0).round().clamp(-253.0, 253.0) * 0.5);
                        row[0] = 127.0;
                    }
                }
                "lost" => {
                    x[rng.below(m * k)] = rng.pick(&[f32::NAN, f32::INFINITY]);
                    w[rng.below(n * k)] = rng.pick(&[f32::NAN, f32::NEG_INFINITY]);
                }
                _ => {}
            }
            let name = format!("gemm_int8 m={m} n={n} k={k} {kind}{}", if bias.is_some() { " bias" } else { "" });
            cases.push((name, KernelCase::GemmInt8 { m, n, k, x, w, bias }));
        }
    }
    cases
}

fn norm(rng: &mut Rng) -> Vec<(String, KernelCase)> {
    let mut cases = Vec::new();
    for width in edges().chain([2, 3, 80, 96, 112, 128, 256, 1000, 4096]) {
        for (rows, deviation) in [(1, 1.0), (5, 1e-3), (17, 30.0)] {
            let eps = rng.pick(&[1e-6, 1e-5]);
            let (x, weight) = (rng.normals(rows * width, deviation), rng.normals(width, 1.0));
            let name = format!("norm rows={rows} width={width} deviation={deviation} eps={eps}");
            cases.push((name, KernelCase::Norm { width, x, weight, eps }));
        }
    }
    cases
}

fn rope(rng: &mut Rng) -> Vec<(String, KernelCase)> {
    let mut cases = Vec::new();
    for head_dim in HEAD_DIMS.into_iter().chain([2, 4, 6, 10, 18, 34]) {
        for rotary_dim in [2, head_dim / 4 * 2, head_dim / 2 * 2] {
            for (name, layout) in [("half", RopeLayout::Half), ("interleaved", RopeLayout::Interleaved)] {
                if rotary_dim < 2 {
                    continue;
                }
                let rows = rng.pick(&[1, 2, 5, 17, 33]);
                let frequencies =
                    RopeSpec { rotary_dim: Some(rotary_dim), ..RopeSpec::new(1e4) }.frequencies(head_dim, 1).inverse;
                let positions: Vec<f64> = (0..rows).map(|_| rng.below(100_000) as f64).collect();
                let angles = positions.iter().flat_map(|p| frequencies.iter().map(move |f| p * f)).collect();
                let x = rng.normals(rows * head_dim, 1.0);
                let name = format!("rope rows={rows} d={head_dim} dim={rotary_dim} {name}");
                cases.push((name, KernelCase::Rope { head_dim, rotary_dim, layout, x, angles }));
            }
        }
    }
    cases
}

fn softmax(rng: &mut Rng) -> Vec<(String, KernelCase)> {
    let mut cases = Vec::new();
    for width in edges().chain([2, 3, 7, 100, 1000, 4097]) {
        for kind in ["plain", "sharp", "shifted", "masked", "equal"] {
            let rows = rng.pick(&[1, 3, 17]);
            let mut x = rng.normals(rows * width, if kind == "plain" { 1.0 } else { 10.0 });
            match kind {
                "shifted" => x.iter_mut().for_each(|v| *v += 3e4),
                "equal" => x.fill(-7.5),
                "masked" => {
                    x.iter_mut().filter(|_| rng.chance(0.5)).for_each(|v| *v = f32::NEG_INFINITY);
                    let row = rng.below(rows);
                    x[row * width..(row + 1) * width].fill(f32::NEG_INFINITY);
                }
                _ => {}
            }
            cases.push((format!("softmax rows={rows} width={width} {kind}"), KernelCase::Softmax { width, x }));
        }
    }
    cases
}

fn attention(decode: bool, rng: &mut Rng) -> Vec<(String, KernelCase)> {
    let mut problems: Vec<AttentionProblem> = edge_cases()
        .iter()
        .step_by(2)
        .chain(&random_cases(11, 90))
        .chain(&quantised_cases(13, 90))
        .map(|p| p.attention())
        .collect();
    if decode {
        for problem in &mut problems {
            let sequences = problem.batch.sequences();
            let past =
                problem.batch.past().iter().map(|&p| if rng.chance(0.3) { p + rng.pick(&[256, 500, 700]) } else { p }).collect();
            problem.batch = Lengths::ragged(vec![1; sequences], past).expect("every sequence has a new token");
        }
    }
    problems.retain(|p| {
        let (rows, queries) = (p.batch.sequences() * (p.batch.max_len() + 64), p.batch.tokens());
        rows * p.spec.kv_dim() <= MOST_ELEMENTS && queries * p.spec.q_dim() <= MOST_ELEMENTS
    });
    let mut cases = Vec::new();
    for problem in problems {
        let case = attention_case(problem, rng);
        for part in [None, Some(64), Some(128)] {
            let mut case = case.clone();
            let KernelCase::Attention { problem, rows, split, .. } = &mut case else { continue };
            *split = part;
            let part = part.map_or("none".into(), |p| p.to_string());
            cases.push((format!("{problem} rows={rows} split={part}"), case));
        }
    }
    cases
}

/// Sharp numbers for `problem`: logits to ±30, keys that answer one query, poison beyond each sequence.
fn attention_case(problem: AttentionProblem, rng: &mut Rng) -> KernelCase {
    let (a, batch) = (&problem.spec, &problem.batch);
    let (d, spread) = (a.head_dim, rng.pick(&[0.5, 2.0, 4.0, 8.0]));
    let g = (spread / (a.scale().abs() * (d as f64).sqrt())).sqrt();
    let rows = batch.max_len() + rng.pick(&[0, 0, 1, 64]);
    let len = batch.sequences() * a.kv_dim() * rows;
    let q = rounded(problem.dtype, rng.normals(batch.tokens() * a.q_dim(), g));
    let (mut k, mut v) = (rng.normals(len, g), rng.normals(len, 1.0));
    for _ in 0..4 {
        let t = rng.below(batch.tokens());
        let (b, h) = (batch.locate(t).0, rng.below(a.heads));
        let q = &q[(t * a.heads + h) * d..][..d];
        let square: f64 = q.iter().map(|&v| f64::from(v).powi(2)).sum();
        let factor = rng.pick(&[30.0, -30.0, 100.0]) / (a.scale() * square);
        let row = (b * a.kv_heads + h / a.group()) * rows + rng.below(batch.past()[b] + batch.new_tokens()[b]);
        if square > 1e-3 && q.iter().all(|&v| (f64::from(v) * factor).abs() < 1e3) {
            k[row * d..][..d].iter_mut().zip(q).for_each(|(k, &q)| *k = (f64::from(q) * factor) as f32);
        }
    }
    let (mut k, poison) = (rounded(problem.kv_dtype.rounds_to(problem.dtype), k), rng.pick(&[f32::NAN, f32::NAN, 3e4, -3e4]));
    v = rounded(problem.kv_dtype.rounds_to(problem.dtype), v);
    for b in 0..batch.sequences() {
        let valid = batch.past()[b] + batch.new_tokens()[b];
        for g in 0..a.kv_heads {
            let start = (b * a.kv_heads + g) * rows;
            k[(start + valid) * d..(start + rows) * d].fill(poison);
            v[(start + valid) * d..(start + rows) * d].fill(poison);
        }
    }
    let mask = problem.mask.map(|shape| mask(shape, batch, a.heads, rows, rng));
    let sinks = a.sinks.then(|| sinks(a.heads, spread, problem.dtype, rng));
    let slopes = a.alibi.then(|| slopes(a.heads, rng));
    KernelCase::Attention { q, k, v, rows, mask, sinks, slopes, split: None, problem }
}
