//! Attention of one query row over the rows of a cache, and of all rows.

use std::borrow::Cow;

use super::number::{Number, dot};
use crate::{
    DType, Error, Result,
    data::Mask,
    problem::{AttentionProblem, MaskShape},
    round_to,
};

/// Rows of a key/value cache, wherever they are kept.
pub trait CacheRows<N> {
    /// Writes the key of sequence `b`, key/value head `g`, row `j` to `out` `[D]`.
    fn key(&self, b: usize, g: usize, j: usize, out: &mut [N]);
    /// Writes the value of sequence `b`, key/value head `g`, row `j` to `out` `[D]`.
    fn value(&self, b: usize, g: usize, j: usize, out: &mut [N]);
}

/// A cache in two slices, each [B, G, rows, D].
#[derive(Clone, Copy, Debug)]
pub struct KvSlices<'a, T> {
    /// Keys, already normed and rotated.
    pub k: &'a [T],
    /// Values.
    pub v: &'a [T],
    /// Rows of each sequence.
    pub rows: usize,
    /// Key/value heads, G.
    pub kv_heads: usize,
}

impl<T: Copy + Into<f64>> KvSlices<'_, T> {
    fn copy<N: Number>(&self, from: &[T], b: usize, g: usize, j: usize, out: &mut [N]) {
        let start = ((b * self.kv_heads + g) * self.rows + j) * out.len();
        for (out, &v) in out.iter_mut().zip(&from[start..]) {
            *out = N::from_f64(v.into());
        }
    }
}

impl<T: Copy + Into<f64>, N: Number> CacheRows<N> for KvSlices<'_, T> {
    fn key(&self, b: usize, g: usize, j: usize, out: &mut [N]) {
        self.copy(self.k, b, g, j, out);
    }
    fn value(&self, b: usize, g: usize, j: usize, out: &mut [N]) {
        self.copy(self.v, b, g, j, out);
    }
}

/// What bends the scores of a call besides the problem itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bent<'a> {
    pub mask: Option<&'a Mask>,
    pub sinks: Option<&'a [f32]>,
    pub slopes: Option<&'a [f32]>,
}

/// Attention of token `t`: `q_row` [H·D]; gives [H·D] and the log-sum-exp `[H]`. The weights p are rounded to `p_dtype`.
pub(super) fn attend_row<N: Number>(
    problem: &AttentionProblem,
    bent: Bent<'_>,
    t: usize,
    q_row: &[N],
    cache: &impl CacheRows<N>,
    p_dtype: Option<DType>,
) -> (Vec<N>, Vec<N>) {
    let spec = &problem.spec;
    let (b, i) = problem.batch.locate(t);
    let position = problem.batch.past()[b] + i;
    let visible = spec.visible_range(position, problem.batch.past()[b] + problem.batch.new_tokens()[b]);
    let scale = N::from_f64(spec.scale());
    let (mut out, mut lse) = (vec![N::default(); q_row.len()], Vec::with_capacity(spec.heads));
    let mut row = vec![N::default(); spec.head_dim];
    for (h, (q, out)) in q_row.chunks_exact(spec.head_dim).zip(out.chunks_exact_mut(spec.head_dim)).enumerate() {
        let g = h / spec.group();
        let mask = bent.mask.map(|m| m.row(b, h, i, spec.heads));
        let mut scores = Vec::new();
        for j in visible.clone().filter(|&j| mask.is_none_or(|m| m[j] != 0)) {
            cache.key(b, g, j, &mut row);
            let mut s = dot(|d| q[d], &row) * scale;
            if let Some(c) = spec.softcap {
                let c = N::from_f64(c.get());
                s = c * (s / c).tanh();
            }
            if let Some(slopes) = bent.slopes {
                s = s - N::from_f64(slopes[h].into()) * N::from_f64(position as f64 - j as f64);
            }
            scores.push((j, s));
        }
        let max = scores.iter().map(|&(_, s)| s).fold(N::NEG_INFINITY, |m, s| if s > m { s } else { m });
        let mut sum = N::default();
        for (j, s) in scores {
            let p = (s - max).exp();
            sum += p;
            let p = store(p, p_dtype);
            cache.value(b, g, j, &mut row);
            out.iter_mut().zip(&row).for_each(|(o, &v)| *o += p * v);
        }
        // A sink joins last, so that p of the visible keys is at most 1 and reaches it, however large the sink.
        let sink = bent.sinks.map_or(N::NEG_INFINITY, |s| N::from_f64(s[h].into()));
        let top = if sink > max { sink } else { max };
        let weight = |s: N| if s == N::NEG_INFINITY { N::default() } else { (s - top).exp() };
        let share = weight(max);
        sum = sum * share + weight(sink);
        if sum != N::default() {
            out.iter_mut().for_each(|o| *o = *o * share / sum);
            lse.push(top + sum.ln());
        } else {
            lse.push(N::NEG_INFINITY);
        }
    }
    (out, lse)
}

/// `v` as a buffer of `dtype` gives it back; unchanged when `None`.
pub(super) fn store<N: Number>(v: N, dtype: Option<DType>) -> N {
    dtype.map_or(v, |d| N::from_f64(round_to(d, v.to_f64() as f32).into()))
}

/// The numbers of one call of attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInput<'a> {
    /// [T, H, D].
    pub q: &'a [f32],
    /// [B, G, rows, D]; rows beyond a sequence's length may hold anything.
    pub k: &'a [f32],
    /// [B, G, rows, D].
    pub v: &'a [f32],
    /// Rows of k and v of each sequence.
    pub rows: usize,
    /// The arbitrary mask, where the problem has one.
    pub mask: Option<&'a Mask>,
    /// `[H]`, where the problem has sinks.
    pub sinks: Option<&'a [f32]>,
    /// `[H]`, where the problem has ALiBi.
    pub slopes: Option<&'a [f32]>,
}

/// Attention in f64, over what the problem's cache gives back of k and v where it is quantised: the result [T, H, D] and the log-sum-exp [T, H] (natural, sinks included, −∞ for a row that sees nothing).
///
/// # Errors
/// `InvalidInput` when an input does not have the problem's shape.
pub fn attention(problem: &AttentionProblem, input: &AttentionInput<'_>) -> Result<(Vec<f64>, Vec<f64>)> {
    run(problem, input, None)
}

/// Attention as an honest implementation computes it: f32 accumulation, p and the result rounded to the problem's dtype.
///
/// # Errors
/// As [`attention`].
pub fn attention_rounded(problem: &AttentionProblem, input: &AttentionInput<'_>) -> Result<(Vec<f32>, Vec<f32>)> {
    run(problem, input, Some(problem.dtype))
}

fn run<N: Number>(problem: &AttentionProblem, input: &AttentionInput<'_>, dtype: Option<DType>) -> Result<(Vec<N>, Vec<N>)> {
    problem.validate()?;
    let (spec, batch) = (&problem.spec, &problem.batch);
    let cache_len = (batch.sequences() * spec.kv_dim()).saturating_mul(input.rows);
    check_len("q", input.q, batch.tokens() * spec.q_dim())?;
    check_len("k", input.k, cache_len)?;
    check_len("v", input.v, cache_len)?;
    if input.rows < batch.max_len() {
        return Err(Error::invalid(format!("k and v have {} rows, the longest sequence {}", input.rows, batch.max_len())));
    }
    let bent = Bent { mask: input.mask, sinks: input.sinks, slopes: input.slopes };
    check_bent(problem, bent)?;
    let (k, v) = through_cache(problem, input);
    let cache = KvSlices { k: &k, v: &v, rows: input.rows, kv_heads: spec.kv_heads };
    let (mut out, mut lse) = (Vec::with_capacity(input.q.len()), Vec::with_capacity(batch.tokens() * spec.heads));
    for (t, q) in input.q.chunks_exact(spec.q_dim()).enumerate() {
        let q: Vec<N> = q.iter().map(|&v| N::from_f64(v.into())).collect();
        let (o, l) = attend_row(problem, bent, t, &q, &cache, dtype);
        out.extend(o.into_iter().map(|v| store(v, dtype)));
        lse.extend(l);
    }
    Ok((out, lse))
}

/// k and v as the problem's cache gives them back.
fn through_cache<'a>(problem: &AttentionProblem, input: &AttentionInput<'a>) -> (Cow<'a, [f32]>, Cow<'a, [f32]>) {
    let (mut k, mut v) = (Cow::Borrowed(input.k), Cow::Borrowed(input.v));
    if let Some(codes) = problem.kv_dtype.codes() {
        let (spec, batch, d) = (&problem.spec, &problem.batch, problem.spec.head_dim);
        for (b, g) in (0..batch.sequences()).flat_map(|b| (0..spec.kv_heads).map(move |g| (b, g))) {
            let start = (b * spec.kv_heads + g) * input.rows * d;
            let rows = start..start + (batch.past()[b] + batch.new_tokens()[b]) * d;
            codes.keys_through_codes(&mut k.to_mut()[rows.clone()], d);
            codes.values_through_codes(&mut v.to_mut()[rows], d);
        }
    }
    (k, v)
}

pub(super) fn check_len(name: &str, data: &[f32], len: usize) -> Result<()> {
    if data.len() == len {
        Ok(())
    } else {
        Err(Error::invalid(format!("{name} has {} elements; the problem needs {len}", data.len())))
    }
}

/// Checks an input that the problem either asks for or does not have.
pub(super) fn check_optional(name: &str, data: Option<&[f32]>, len: Option<usize>) -> Result<()> {
    match (data, len) {
        (None, None) => Ok(()),
        (Some(data), Some(len)) => check_len(name, data, len),
        (None, Some(_)) => Err(Error::invalid(format!("{name} is missing; the problem asks for it"))),
        (Some(_), None) => Err(Error::invalid(format!("{name} is given; the problem does not ask for it"))),
    }
}

/// Checks mask, sinks and slopes against the problem.
pub(super) fn check_bent(problem: &AttentionProblem, bent: Bent<'_>) -> Result<()> {
    let (spec, batch) = (&problem.spec, &problem.batch);
    check_optional("sinks", bent.sinks, spec.sinks.then_some(spec.heads))?;
    check_optional("alibi_slopes", bent.slopes, spec.alibi.then_some(spec.heads))?;
    if bent.mask.map(|m| m.shape) != problem.mask {
        return Err(Error::invalid("the mask does not have the dimensions that the problem names"));
    }
    let Some(mask) = bent.mask else { return Ok(()) };
    let MaskShape { per_sequence, per_head } = mask.shape;
    let masks = if per_sequence { batch.sequences() } else { 1 } * if per_head { spec.heads } else { 1 };
    if mask.rows < batch.max_new() || mask.columns < batch.max_len() {
        return Err(Error::invalid(format!(
            "the mask has {} rows of {} columns; the problem needs {} and {}",
            mask.rows,
            mask.columns,
            batch.max_new(),
            batch.max_len()
        )));
    }
    if mask.data.len() != masks.saturating_mul(mask.rows).saturating_mul(mask.columns) {
        return Err(Error::invalid(format!(
            "the mask has {} elements; {masks} masks of {} x {} are needed",
            mask.data.len(),
            mask.rows,
            mask.columns
        )));
    }
    Ok(())
}
