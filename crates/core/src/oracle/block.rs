//! The block, row by row.

use super::{
    attention::{Bent, CacheRows, KvSlices, attend_row, check_bent, check_len, check_optional, store},
    int8::Int8Matrix,
    number::Number,
    ops::{norm_row, project_row, rope_row},
};
use crate::{
    CacheDType, DType, Error, Result, WeightKind,
    data::{BlockData, BlockOutput},
    problem::{AttentionProblem, BlockProblem, RopeFrequencies},
};

/// The block's rows computed in `N`; [`Oracle`] is the one in f64.
#[derive(Clone, Debug)]
pub struct BlockRows<'a, N> {
    problem: &'a BlockProblem,
    attention: AttentionProblem,
    data: &'a BlockData,
    rope: Option<RopeFrequencies>,
    /// What intermediates are rounded to, and the cache after that; nothing is rounded when `None`.
    compute: Option<DType>,
    cache: Option<CacheDType>,
    /// Weights of q, k, v and o in int8, where intermediates are rounded and the problem says so.
    int8: Option<[Int8Matrix; 4]>,
    number: std::marker::PhantomData<N>,
}

/// The right answer, in f64 without rounding.
pub type Oracle<'a> = BlockRows<'a, f64>;

/// What the oracle gives; shapes as [`BlockOutput`].
#[derive(Clone, Debug, PartialEq)]
pub struct OracleOutput {
    /// [T, E].
    pub y: Vec<f64>,
    /// The keys after the append, [B, G, P + S, D]; rows after the valid ones are zero.
    pub k: Vec<f64>,
    /// The values after the append, [B, G, P + S, D].
    pub v: Vec<f64>,
}

/// The block as an honest implementation at the problem's dtypes computes it: f32 accumulation; h, q, k, v, p, o and y each rounded
/// once to the compute dtype, k and v then to the cache's, quantised where that is; projections in int8 where the problem says so.
///
/// # Errors
/// As [`Oracle::new`].
pub fn rounded(problem: &BlockProblem, data: &BlockData) -> Result<BlockOutput> {
    let (y, k, v) = BlockRows::<f32>::make(problem, data, Some(problem.dtype), Some(problem.kv_dtype))?.all_rows();
    Ok(BlockOutput { y, k, v })
}

/// y as [`rounded`] computes it, over the caches `k` and `v` [B, G, P + S, D] that a call has left.
///
/// # Errors
/// As [`Oracle::y_over_cache`].
pub fn rounded_over_cache(problem: &BlockProblem, data: &BlockData, k: &[f32], v: &[f32]) -> Result<Vec<f32>> {
    BlockRows::<f32>::make(problem, data, Some(problem.dtype), Some(problem.kv_dtype))?.y_over(k, v)
}

impl<'a> Oracle<'a> {
    /// The oracle of one call.
    ///
    /// # Errors
    /// `InvalidInput` when the problem is not valid or the data does not have its shapes.
    pub fn new(problem: &'a BlockProblem, data: &'a BlockData) -> Result<Self> {
        Self::make(problem, data, None, None)
    }

    /// Every row of the answer.
    pub fn run(&self) -> OracleOutput {
        let (y, k, v) = self.all_rows();
        OracleOutput { y, k, v }
    }

    /// y [T, E] over the caches `k` and `v` [B, G, P + S, D] that a call has left: what a quantised cache makes of keys and values is no
    /// error of the attention over it.
    ///
    /// # Errors
    /// `InvalidInput` when k or v do not have that shape.
    pub fn y_over_cache(&self, k: &[f32], v: &[f32]) -> Result<Vec<f64>> {
        self.y_over(k, v)
    }
}

impl<'a, N: Number + Into<f64>> BlockRows<'a, N> {
    fn make(problem: &'a BlockProblem, data: &'a BlockData, compute: Option<DType>, cache: Option<CacheDType>) -> Result<Self> {
        problem.validate()?;
        check_data(problem, data)?;
        let head_dim = problem.spec.attention.head_dim;
        let rope = problem.spec.rope.as_ref().map(|r| r.frequencies(head_dim, problem.batch.max_len()));
        let attention = problem.attention();
        let int8 = (compute.is_some() && problem.weights == WeightKind::Int8).then(|| {
            let (e, q_dim) = (problem.spec.hidden_size, problem.spec.attention.q_dim());
            let weights = [(&data.q_weight, e), (&data.k_weight, e), (&data.v_weight, e), (&data.o_weight, q_dim)];
            weights.map(|(w, k)| Int8Matrix::new(w, k))
        });
        Ok(BlockRows { problem, attention, data, rope, compute, cache, int8, number: std::marker::PhantomData })
    }

    /// x of token `t` as the projections see it, `[E]`.
    fn h_row(&self, t: usize) -> Vec<N> {
        let e = self.problem.spec.hidden_size;
        let x: Vec<N> = self.data.x[t * e..(t + 1) * e].iter().map(|&v| N::from_f64(v.into())).collect();
        match (&self.data.input_norm, self.problem.spec.input_norm) {
            (Some(w), Some(eps)) => norm_row(&x, w, eps.get()).into_iter().map(|v| store(v, self.compute)).collect(),
            _ => x,
        }
    }

    /// x·Wᵀ + bias of one row, of the projection of q, k, v or o by its number.
    fn project(&self, which: usize, x: &[N], w: &[f32], bias: Option<&[f32]>) -> Vec<N> {
        match &self.int8 {
            Some(matrices) => matrices[which].project_row(x, bias),
            None => project_row(x, w, bias),
        }
    }

    /// QK-norm and rotation of all heads of a projected row.
    fn norm_and_turn(&self, t: usize, row: &mut [N], norm: Option<&Vec<f32>>) {
        let spec = &self.problem.spec;
        let (b, i) = self.problem.batch.locate(t);
        let position = (self.problem.batch.past()[b] + i) as f64;
        for head in row.chunks_exact_mut(spec.attention.head_dim) {
            if let (Some(w), Some(eps)) = (norm, spec.qk_norm) {
                head.copy_from_slice(&norm_row(head, w, eps.get()));
            }
            if let (Some(rope), Some(f)) = (&spec.rope, &self.rope) {
                let angles: Vec<f64> = f.inverse.iter().map(|w| position * w).collect();
                rope_row(head, rope.layout, &angles, f.attention_factor);
            }
        }
    }

    /// The query of token `t`, normed and rotated, [H·D].
    pub fn q_row(&self, t: usize) -> Vec<N> {
        let mut q = self.project(0, &self.h_row(t), &self.data.q_weight, self.data.q_bias.as_deref());
        self.norm_and_turn(t, &mut q, self.data.q_norm.as_ref());
        q.into_iter().map(|v| store(v, self.compute)).collect()
    }

    /// The key, normed and rotated, and the value of token `t`, each [G·D]; not quantised.
    pub fn kv_row(&self, t: usize) -> (Vec<N>, Vec<N>) {
        let h = self.h_row(t);
        let mut k = self.project(1, &h, &self.data.k_weight, self.data.k_bias.as_deref());
        self.norm_and_turn(t, &mut k, self.data.k_norm.as_ref());
        let v = self.project(2, &h, &self.data.v_weight, self.data.v_bias.as_deref());
        let elements = self.cache.and_then(CacheDType::elements);
        let append = |row: Vec<N>| row.into_iter().map(|v| store(store(v, self.compute), elements)).collect();
        (append(k), append(v))
    }

    /// Attention of token `t` whose query is `q_row` [H·D] over `cache`; gives [H·D].
    pub fn attend_row(&self, t: usize, q_row: &[N], cache: &impl CacheRows<N>) -> Vec<N> {
        let bent = bent(self.data);
        let (o, _) = attend_row(&self.attention, bent, t, q_row, cache, self.compute);
        o.into_iter().map(|v| store(v, self.compute)).collect()
    }

    /// y of token `t` from its attention `attention_row` [H·D]; gives `[E]`.
    pub fn output_row(&self, t: usize, attention_row: &[N]) -> Vec<N> {
        let e = self.problem.spec.hidden_size;
        let mut y = self.project(3, attention_row, &self.data.o_weight, self.data.o_bias.as_deref());
        if self.problem.spec.residual {
            y.iter_mut().zip(&self.data.x[t * e..]).for_each(|(y, &x)| *y += N::from_f64(x.into()));
        }
        y.into_iter().map(|v| store(v, self.compute)).collect()
    }

    /// y, k and v of every row.
    fn all_rows(&self) -> (Vec<N>, Vec<N>, Vec<N>) {
        let (batch, a) = (&self.problem.batch, &self.problem.spec.attention);
        let rows = self.data.cache_rows(self.problem);
        let mut k = vec![N::default(); batch.sequences() * a.kv_dim() * rows];
        let mut v = k.clone();
        let d = a.head_dim;
        let at = |b: usize, g: usize, j: usize| ((b * a.kv_heads + g) * rows + j) * d;
        for (b, &past) in batch.past().iter().enumerate() {
            for g in 0..a.kv_heads {
                let from = (b * a.kv_heads + g) * self.data.past_rows * d;
                for (to, from) in [(&mut k, &self.data.past_k[from..]), (&mut v, &self.data.past_v[from..])] {
                    let valid = to[at(b, g, 0)..].iter_mut().zip(&from[..past * d]);
                    valid.for_each(|(to, &x)| *to = N::from_f64(x.into()));
                }
            }
        }
        for t in 0..batch.tokens() {
            let (b, i) = batch.locate(t);
            let (new_k, new_v) = self.kv_row(t);
            for g in 0..a.kv_heads {
                let to = at(b, g, batch.past()[b] + i);
                k[to..to + d].copy_from_slice(&new_k[g * d..(g + 1) * d]);
                v[to..to + d].copy_from_slice(&new_v[g * d..(g + 1) * d]);
            }
        }
        if let Some(codes) = self.cache.and_then(CacheDType::codes) {
            for (b, g) in (0..batch.sequences()).flat_map(|b| (0..a.kv_heads).map(move |g| (b, g))) {
                let rows = at(b, g, 0)..at(b, g, batch.past()[b] + batch.new_tokens()[b]);
                through(&mut k[rows.clone()], |rows| codes.keys_through_codes(rows, d));
                through(&mut v[rows], |rows| codes.values_through_codes(rows, d));
            }
        }
        (self.y_rows(&KvSlices { k: &k, v: &v, rows, kv_heads: a.kv_heads }), k, v)
    }

    /// y of every row, over `cache`.
    fn y_rows(&self, cache: &impl CacheRows<N>) -> Vec<N> {
        let tokens = 0..self.problem.batch.tokens();
        tokens.flat_map(|t| self.output_row(t, &self.attend_row(t, &self.q_row(t), cache))).collect()
    }

    /// y of every row over the caches `k` and `v` [B, G, P + S, D].
    fn y_over(&self, k: &[f32], v: &[f32]) -> Result<Vec<N>> {
        let a = &self.problem.spec.attention;
        let rows = self.data.cache_rows(self.problem);
        let len = self.problem.batch.sequences() * a.kv_dim() * rows;
        check_len("k", k, len)?;
        check_len("v", v, len)?;
        Ok(self.y_rows(&KvSlices { k, v, rows, kv_heads: a.kv_heads }))
    }
}

/// Replaces numbers by what `f` makes of them in f32.
fn through<N: Number>(numbers: &mut [N], f: impl FnOnce(&mut [f32])) {
    let mut narrow: Vec<f32> = numbers.iter().map(|x| x.to_f64() as f32).collect();
    f(&mut narrow);
    numbers.iter_mut().zip(narrow).for_each(|(x, narrow)| *x = N::from_f64(narrow.into()));
}

fn bent(data: &BlockData) -> Bent<'_> {
    Bent { mask: data.mask.as_ref(), sinks: data.sinks.as_deref(), slopes: data.alibi_slopes.as_deref() }
}

fn check_data(problem: &BlockProblem, data: &BlockData) -> Result<()> {
    let (spec, batch) = (&problem.spec, &problem.batch);
    let (a, e) = (&spec.attention, spec.hidden_size);
    let longest = batch.past().iter().copied().max().unwrap_or(0);
    if data.past_rows < longest {
        return Err(Error::invalid(format!("past_k and past_v have {} rows; the longest past is {longest}", data.past_rows)));
    }
    let past_len = (batch.sequences() * a.kv_dim()).checked_mul(data.past_rows);
    let past_len = past_len.ok_or_else(|| Error::invalid(format!("{} past rows are too many", data.past_rows)))?;
    for (name, tensor, len) in [
        ("x", &data.x, batch.tokens() * e),
        ("q_proj.weight", &data.q_weight, a.q_dim() * e),
        ("k_proj.weight", &data.k_weight, a.kv_dim() * e),
        ("v_proj.weight", &data.v_weight, a.kv_dim() * e),
        ("o_proj.weight", &data.o_weight, e * a.q_dim()),
        ("past_k", &data.past_k, past_len),
        ("past_v", &data.past_v, past_len),
    ] {
        check_len(name, tensor, len)?;
    }
    let qk = spec.qk_norm.map(|_| a.head_dim);
    for (name, tensor, len) in [
        ("q_proj.bias", &data.q_bias, spec.biases.q.then(|| a.q_dim())),
        ("k_proj.bias", &data.k_bias, spec.biases.k.then(|| a.kv_dim())),
        ("v_proj.bias", &data.v_bias, spec.biases.v.then(|| a.kv_dim())),
        ("o_proj.bias", &data.o_bias, spec.biases.o.then_some(e)),
        ("input_norm.weight", &data.input_norm, spec.input_norm.map(|_| e)),
        ("q_norm.weight", &data.q_norm, qk),
        ("k_norm.weight", &data.k_norm, qk),
    ] {
        check_optional(name, tensor.as_deref(), len)?;
    }
    check_bent(&problem.attention(), bent(data))
}
