//! Results against the oracle: whole ones where that is cheap, else a seeded sample.

use std::collections::{BTreeMap, btree_map::Entry};

use lawson::{BlockData, BlockProblem, CacheDType, DType, KvCache, Lengths, Result, WeightKind};
use lawson_core::{
    compare::{Comparison, Policy, compare},
    data::Mask,
    oracle::{self, AttentionInput, CacheRows, Oracle},
    problem::{AttentionProblem, MaskShape},
};
use lawson_testkit::rng::Rng;

use super::parallel;

/// Above this a result is checked by samples.
pub const WHOLE_FLOPS: f64 = 2e9;
/// Rows of y that a sample has.
const ROWS: usize = 16;
/// Elements of k, and of v, that a sample has: this many of each of as many tokens.
const KV_TOKENS: usize = 16;
/// Seed of every sample.
const SEED: u64 = 20_230_927;

/// Errors of one result.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Whether they are small enough.
    pub ok: bool,
    /// Largest absolute error.
    pub max_abs: f64,
    /// Relative error, L2.
    pub relative: f64,
    /// What was found, as a sentence.
    pub message: String,
}

impl Checked {
    fn of(what: &str, c: &Comparison) -> Self {
        let (max_abs, relative) = c.errors.map_or((f64::NAN, f64::NAN), |e| (e.max_abs, e.relative));
        Checked { ok: c.ok, max_abs, relative, message: format!("{what}: {c}") }
    }

    /// The worse of two.
    pub fn and(self, other: Checked) -> Self {
        let message = if self.ok { other.message } else { self.message };
        Checked {
            ok: self.ok && other.ok,
            max_abs: self.max_abs.max(other.max_abs),
            relative: self.relative.max(other.relative),
            message,
        }
    }
}

/// Relative error that results computed and stored in `dtypes` may have: of f32 what the project demands of every kernel, of narrower
/// types one unit, as every intermediate is rounded by up to half of one.
pub fn limit(dtypes: &[DType]) -> f64 {
    dtypes.iter().map(|&d| if d == DType::F32 { 5e-6 } else { d.epsilon() }).fold(0.0, f64::max)
}

/// Compares rows of `width`.
pub fn check(what: &str, limit: f64, got: &[f32], want: &[f64], width: usize) -> Checked {
    Checked::of(what, &compare(Policy::Relative(limit), got, want, width))
}

/// `k` of `n` indices by growing value, or all of them.
pub fn pick(n: usize, k: usize, part: u64) -> Vec<usize> {
    if n <= k {
        return (0..n).collect();
    }
    let mut rng = Rng::new(SEED ^ part);
    let mut found = std::collections::BTreeSet::new();
    // The last token sees most, so that it is always there.
    found.insert(n - 1);
    while found.len() < k {
        found.insert(rng.below(n));
    }
    found.into_iter().collect()
}

/// All of `n` rows when the work is small, else a sample.
pub fn rows(n: usize, flops: f64) -> Vec<usize> {
    if flops <= WHOLE_FLOPS { (0..n).collect() } else { pick(n, ROWS, 0) }
}

/// The rows `rows` of `all`, each `width` long.
pub fn gather(all: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    rows.iter().flat_map(|r| &all[r * width..(r + 1) * width]).copied().collect()
}

/// Key and value of a token, as far as they are checked.
struct KvRow {
    token: usize,
    columns: Vec<usize>,
    k: Vec<f64>,
    v: Vec<f64>,
}

/// What a call of a block must give.
pub struct BlockReference<'a> {
    problem: &'a BlockProblem,
    oracle: Oracle<'a>,
    threads: usize,
    whole: bool,
    kv: Vec<KvRow>,
    tokens: Vec<usize>,
    q: Vec<Vec<f64>>,
    /// Expected rows of y over the cache that was produced last.
    y: Vec<f64>,
}

/// Some sequences of a cache.
struct Exported {
    rows: usize,
    d: usize,
    sequences: BTreeMap<usize, (Vec<f32>, Vec<f32>)>,
}

impl Exported {
    fn row(&self, keys: bool, b: usize, g: usize, j: usize) -> &[f32] {
        let start = (g * self.rows + j) * self.d;
        self.sequences.get(&b).map_or(&[], |(k, v)| &(if keys { k } else { v })[start..start + self.d])
    }
}

impl CacheRows<f64> for Exported {
    fn key(&self, b: usize, g: usize, j: usize, out: &mut [f64]) {
        out.iter_mut().zip(self.row(true, b, g, j)).for_each(|(o, &v)| *o = v.into());
    }
    fn value(&self, b: usize, g: usize, j: usize, out: &mut [f64]) {
        out.iter_mut().zip(self.row(false, b, g, j)).for_each(|(o, &v)| *o = v.into());
    }
}

impl<'a> BlockReference<'a> {
    /// Computes what does not depend on a call's cache.
    pub fn new(problem: &'a BlockProblem, data: &'a BlockData, threads: usize) -> Result<Self> {
        let oracle = Oracle::new(problem, data)?;
        let (t, columns) = (problem.batch.tokens(), problem.spec.attention.kv_dim());
        let whole = problem.flops() <= WHOLE_FLOPS;
        let tokens = rows(t, problem.flops());
        let kv_tokens = if whole { tokens.clone() } else { pick(t, KV_TOKENS, 1) };
        let row = |i: usize| {
            let token = kv_tokens[i];
            let (k, v) = oracle.kv_row(token);
            let each = if whole { columns } else { (KV_TOKENS * KV_TOKENS).div_ceil(kv_tokens.len()) };
            let columns = pick(columns, each, 2 + i as u64);
            let of = |row: &[f64]| columns.iter().map(|&c| row[c]).collect();
            KvRow { token, k: of(&k), v: of(&v), columns }
        };
        let kv = parallel::map(kv_tokens.len(), threads, row);
        let q = parallel::map(tokens.len(), threads, |i| oracle.q_row(tokens[i]));
        Ok(BlockReference { problem, oracle, threads, whole, kv, tokens, q, y: Vec::new() })
    }

    /// What y may be off, and k and v: codes are off by half a scale, of numbers that are N(0, 1).
    fn limits(&self) -> (f64, f64) {
        let (dtype, kv_dtype) = (self.problem.dtype, self.problem.kv_dtype);
        let mut of_y = limit(&[dtype, kv_dtype.rounds_to(dtype)]);
        if self.problem.weights == WeightKind::Int8 {
            // Weights and x are off by half a scale each, twice between x and y.
            of_y = 0.04;
        }
        match kv_dtype {
            CacheDType::INT8 => (of_y, of_y.max(0.01)),
            CacheDType::INT4 => (of_y, 0.15),
            _ => (of_y, of_y),
        }
    }

    /// Checks k and v that a call appended to `cache`, and its `y` [T, E].
    pub fn check(&mut self, cache: &KvCache, y: &[f32]) -> Result<Checked> {
        let (batch, a) = (&self.problem.batch, &self.problem.spec.attention);
        let rows = batch.max_len();
        let mut exported = Exported { rows, d: a.head_dim, sequences: BTreeMap::new() };
        for b in self.tokens.iter().chain(self.kv.iter().map(|r| &r.token)).map(|&t| batch.locate(t).0) {
            if let Entry::Vacant(entry) = exported.sequences.entry(b) {
                entry.insert(cache.export(0, b, rows)?);
            }
        }
        let (of_y, of_kv) = self.limits();
        let mut sides = [(true, "k"), (false, "v")].map(|(keys, name)| {
            let (mut got, mut want) = (Vec::new(), Vec::new());
            for row in &self.kv {
                let (b, i) = batch.locate(row.token);
                let at = |&c: &usize| exported.row(keys, b, c / a.head_dim, batch.past()[b] + i)[c % a.head_dim];
                got.extend(row.columns.iter().map(at));
                want.extend_from_slice(if keys { &row.k } else { &row.v });
            }
            let width = self.kv.first().map_or(1, |r| r.columns.len());
            Some(check(name, of_kv, &got, &want, width))
        });
        // Where all of k and v was found right, every call's y is the same; codes may be off by one.
        let exact = self.whole && of_kv <= of_y && self.problem.weights == WeightKind::Compute;
        if !exact || self.y.is_empty() {
            let y_row = |i: usize| {
                let t = self.tokens[i];
                self.oracle.output_row(t, &self.oracle.attend_row(t, &self.q[i], &exported))
            };
            self.y = parallel::map(self.tokens.len(), self.threads, y_row).concat();
        }
        let of_y = self.check_y(y, of_y);
        Ok(sides.iter_mut().filter_map(Option::take).fold(of_y, Checked::and))
    }

    /// Checks `y` [T, E] over the cache that was checked last.
    pub fn check_y(&self, y: &[f32], limit: f64) -> Checked {
        let e = self.problem.spec.hidden_size;
        check("y", limit, &gather(y, &self.tokens, e), &self.y, e)
    }

    /// The verdict on a peer's y, within [`peer_limit`].
    pub fn check_peer(&self, y: &[f32]) -> Checked {
        let e = self.problem.spec.hidden_size;
        if y.len() != self.problem.batch.tokens() * e {
            return wrong_size(y.len(), self.problem.batch.tokens() * e);
        }
        self.check_y(y, peer_limit(self.problem.dtype))
    }
}

/// What a peer's result may be off: their sums are in other orders, and in narrow types some round more often than we do.
pub fn peer_limit(dtype: DType) -> f64 {
    4.0 * limit(&[dtype])
}

/// The verdict on what has no result.
pub fn nothing() -> Checked {
    Checked { ok: true, max_abs: 0.0, relative: 0.0, message: String::new() }
}

/// The verdict on a result of another size.
pub fn wrong_size(got: usize, want: usize) -> Checked {
    let message = format!("{got} elements instead of {want}");
    Checked { ok: false, max_abs: f64::NAN, relative: f64::NAN, message }
}

/// What attention of q [T, H, D] over k and v [B, G, rows, D] must give.
pub struct AttentionReference {
    tokens: Vec<usize>,
    width: usize,
    want: Vec<f64>,
}

impl AttentionReference {
    /// Computes it, whole or by a sample. A mask is the same for all heads.
    pub fn new(problem: &AttentionProblem, input: &AttentionInput<'_>, threads: usize) -> Result<Self> {
        let (spec, batch) = (&problem.spec, &problem.batch);
        let (width, one) = (spec.q_dim(), spec.kv_dim() * input.rows);
        let tokens = rows(batch.tokens(), problem.flops());
        // A row by itself is a call with one new token behind all the rows that it sees.
        let row = |i: usize| {
            let (b, s) = batch.locate(tokens[i]);
            let past = batch.past()[b] + if spec.causal { s } else { batch.new_tokens()[b] - 1 };
            let mask = input.mask.map(|m| Mask {
                shape: MaskShape { per_sequence: false, per_head: false },
                rows: 1,
                columns: m.columns,
                data: m.row(b, 0, s, spec.heads).to_vec(),
            });
            let of_mask = mask.as_ref().map(|m| m.shape);
            let alone = AttentionProblem { batch: Lengths::uniform(1, 1, past), mask: of_mask, ..problem.clone() };
            let part = AttentionInput {
                q: &input.q[tokens[i] * width..(tokens[i] + 1) * width],
                k: &input.k[b * one..(b + 1) * one],
                v: &input.v[b * one..(b + 1) * one],
                mask: mask.as_ref(),
                ..*input
            };
            oracle::attention(&alone, &part).map(|(o, _)| o)
        };
        let want = parallel::map(tokens.len(), threads, row).into_iter().collect::<Result<Vec<_>>>()?.concat();
        Ok(AttentionReference { tokens, width, want })
    }

    /// Tokens that were computed, elements of each, and what they must be.
    pub fn into_parts(self) -> (Vec<usize>, usize, Vec<f64>) {
        (self.tokens, self.width, self.want)
    }

    /// Checks `out` [T, H·D].
    pub fn check(&self, out: &[f32], limit: f64) -> Checked {
        check("out", limit, &gather(out, &self.tokens, self.width), &self.want, self.width)
    }
}
