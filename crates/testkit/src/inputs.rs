//! Inputs that make bugs visible: sharp logits, needles, poison in rows that nobody may read, masks of every kind.

use lawson_core::{
    DType,
    data::{BlockData, Mask},
    oracle::Oracle,
    problem::{BlockProblem, Lengths, MaskShape},
    round_to,
};

use crate::rng::Rng;

/// How far apart the logits lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharpness {
    /// Weights N(0, 1)/√fan-in, all else N(0, 1), caches without poison or needles.
    Ordinary,
    /// Logits to about ±30, needles, twins of tokens, poison, tiny rows under the norms.
    Sharp,
}

/// `values` rounded to `dtype`.
pub fn rounded(dtype: DType, mut values: Vec<f32>) -> Vec<f32> {
    values.iter_mut().for_each(|v| *v = round_to(dtype, *v));
    values
}

/// Weights and inputs of `problem`, rounded to the dtypes they are stored in.
///
/// # Panics
/// When the problem is not valid.
pub fn data_for(problem: &BlockProblem, seed: u64, sharpness: Sharpness) -> BlockData {
    let mut rng = Rng::new(seed);
    let (spec, batch, sharp) = (&problem.spec, &problem.batch, sharpness == Sharpness::Sharp);
    let (a, e) = (&spec.attention, spec.hidden_size);
    let (d, tokens) = (a.head_dim, batch.tokens());
    // A tied key answers its own query with about 30.
    let tied = sharp && rng.chance(0.2);
    let spread = if tied { 30.0 / (d as f64).sqrt() } else { rng.pick(&[0.5, 2.0, 4.0, 8.0]) };
    // Elements of q and k with this deviation give logits of deviation `spread`.
    let g = if sharp { (spread / (a.scale().abs() * (d as f64).sqrt())).sqrt() } else { 1.0 };
    let fan = |n: usize| 1.0 / (n as f64).sqrt();

    let mut x = rng.normals(tokens * e, 1.0);
    if sharp && (spec.input_norm.is_some() || spec.qk_norm.is_some()) {
        x.chunks_mut(e).filter(|_| rng.chance(0.3)).for_each(|row| row.iter_mut().for_each(|v| *v *= 1e-3));
    }
    if sharp {
        for _ in 0..tokens / 4 {
            let (from, to) = (rng.below(tokens), rng.below(tokens));
            x.copy_within(from * e..(from + 1) * e, to * e);
        }
    }
    let mut data = BlockData {
        x: rounded(problem.dtype, x),
        q_weight: rounded(problem.dtype, rng.normals(a.q_dim() * e, g * fan(e))),
        k_weight: rounded(problem.dtype, rng.normals(a.kv_dim() * e, g * fan(e))),
        v_weight: rounded(problem.dtype, rng.normals(a.kv_dim() * e, fan(e))),
        o_weight: rounded(problem.dtype, rng.normals(e * a.q_dim(), fan(a.q_dim()))),
        q_bias: spec.biases.q.then(|| rng.normals(a.q_dim(), 0.5 * g)),
        k_bias: spec.biases.k.then(|| rng.normals(a.kv_dim(), 0.5 * g)),
        v_bias: spec.biases.v.then(|| rng.normals(a.kv_dim(), 0.5)),
        o_bias: spec.biases.o.then(|| rng.normals(e, 1.0)),
        ..BlockData::default()
    };
    if tied {
        for (head, k) in data.k_weight.chunks_mut(d * e).enumerate() {
            let q = head * a.group() * d * e;
            k.copy_from_slice(&data.q_weight[q..q + d * e]);
        }
    }
    let mut gains = |n: usize, g: f64| rng.normals(n, 0.3).into_iter().map(|v| ((1.0 + f64::from(v)) * g) as f32).collect();
    data.input_norm = spec.input_norm.map(|_| gains(e, 1.0));
    data.q_norm = spec.qk_norm.map(|_| gains(d, g));
    data.k_norm = spec.qk_norm.map(|_| gains(d, g));
    data.sinks = a.sinks.then(|| sinks(a.heads, spread.min(a.softcap.map_or(30.0, |c| c.get())), problem.dtype, &mut rng));
    data.alibi_slopes = a.alibi.then(|| slopes(a.heads, &mut rng));

    let longest = batch.past().iter().copied().max().unwrap_or(0);
    data.past_rows = longest + if rng.chance(0.3) { rng.pick(&[1, 7, 64]) } else { 0 };
    let past_len = batch.sequences() * a.kv_dim() * data.past_rows;
    data.past_k = rng.normals(past_len, g);
    data.past_v = rng.normals(past_len, 1.0);
    data.mask = problem.mask.map(|shape| mask(shape, batch, a.heads, data.past_rows + batch.max_new(), &mut rng));
    if sharp {
        plant_needles(problem, &mut data, &mut rng);
    }
    data.past_k = rounded(problem.kv_dtype.rounds_to(problem.dtype), std::mem::take(&mut data.past_k));
    data.past_v = rounded(problem.kv_dtype.rounds_to(problem.dtype), std::mem::take(&mut data.past_v));
    if sharp {
        let poison = rng.pick(&[(f32::NAN, f32::NAN), (f32::NAN, f32::NAN), (3e4, 3e4), (-3e4, 3e4), (0.0, -3e4)]);
        poison_past(batch, a.kv_dim() / d, d, data.past_rows, &mut data.past_k, &mut data.past_v, poison);
    }
    data
}

/// One logit for each head: near the others, far above or far below them; in f16 not so far above that results underflow.
pub fn sinks(heads: usize, spread: f64, dtype: DType, rng: &mut Rng) -> Vec<f32> {
    let above = if dtype == DType::F16 { [1.0, spread] } else { [2.0 * spread, 20.0] };
    let middle = rng.pick(&[0.0, above[0], above[1], -20.0]);
    (0..heads).map(|_| (2.0 * rng.normal() + middle) as f32).collect()
}

/// ALiBi's own slopes, sometimes eight times steeper.
pub fn slopes(heads: usize, rng: &mut Rng) -> Vec<f32> {
    let steep = rng.pick(&[1.0, 1.0, 8.0]);
    (1..=heads).map(|h| (steep * (-8.0 * h as f64 / heads as f64).exp2()) as f32).collect()
}

/// Fills the rows of `k` and `v` [B, G, rows, D] beyond each sequence's past.
fn poison_past(batch: &Lengths, kv_heads: usize, d: usize, rows: usize, k: &mut [f32], v: &mut [f32], (in_k, in_v): (f32, f32)) {
    for (b, &past) in batch.past().iter().enumerate() {
        for g in 0..kv_heads {
            let start = (b * kv_heads + g) * rows;
            k[(start + past) * d..(start + rows) * d].fill(in_k);
            v[(start + past) * d..(start + rows) * d].fill(in_v);
        }
    }
}

/// Makes a few past keys answer a query with a logit of ±30 or 100: at random rows, at the ends and on both sides of the window's edge.
fn plant_needles(problem: &BlockProblem, data: &mut BlockData, rng: &mut Rng) {
    const LARGEST: f64 = 1e3;
    let (batch, a) = (&problem.batch, &problem.spec.attention);
    if batch.past().iter().all(|&p| p == 0) {
        return;
    }
    let mut needles = Vec::new();
    let oracle = Oracle::new(problem, data).expect("the data has the problem's shapes");
    for _ in 0..8 {
        let t = rng.below(batch.tokens());
        let (b, i) = batch.locate(t);
        let past = batch.past()[b];
        if past == 0 {
            continue;
        }
        let edge = a.window.map(|w| (past + i + 1).saturating_sub(w));
        let anywhere = rng.below(past);
        let at = match edge {
            Some(first) => rng.pick(&[first, first.saturating_sub(1), anywhere]),
            None => rng.pick(&[0, past - 1, anywhere]),
        };
        let h = rng.below(a.heads);
        let q = &oracle.q_row(t)[h * a.head_dim..(h + 1) * a.head_dim];
        let square: f64 = q.iter().map(|v| v * v).sum();
        let factor = rng.pick(&[30.0, 30.0, -30.0, 100.0]) / (a.scale() * square);
        if at < past && square > 1e-3 && q.iter().all(|v| (v * factor).abs() < LARGEST) {
            let row = (b * a.kv_heads + h / a.group()) * data.past_rows + at;
            needles.push((row, q.iter().map(|v| (v * factor) as f32).collect::<Vec<_>>()));
        }
    }
    for (row, key) in needles {
        data.past_k[row * a.head_dim..(row + 1) * a.head_dim].copy_from_slice(&key);
    }
}

/// A mask for `batch` over `columns` cache rows: random, sparse, whole tiles or whole rows masked, the first tile masked, or recent
/// columns masked.
pub fn mask(shape: MaskShape, batch: &Lengths, heads: usize, columns: usize, rng: &mut Rng) -> Mask {
    let rows = batch.max_new();
    let masks = if shape.per_sequence { batch.sequences() } else { 1 } * if shape.per_head { heads } else { 1 };
    let (kind, tile, recent) = (rng.below(6), rng.pick(&[16, 64, 128]), rng.pick(&[1, 65]));
    let mut data = Vec::with_capacity(masks * rows * columns);
    for _ in 0..masks {
        let tiles: Vec<bool> = (0..=columns / tile).map(|_| rng.chance(0.5)).collect();
        for i in 0..rows {
            let row = rng.chance(0.6);
            data.extend((0..columns).map(|j| {
                u8::from(match kind {
                    0 => rng.chance(0.8),
                    1 => rng.chance(0.05),
                    2 => tiles[j / tile],
                    3 => row && rng.chance(0.8),
                    4 => j >= tile,
                    _ => j + rows + recent <= i + columns,
                })
            }));
        }
    }
    Mask { shape, rows, columns, data }
}
