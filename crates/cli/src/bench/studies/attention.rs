//! Attention alone: materialised against tiled, and decode over a cache.

use std::borrow::Cow;

use lawson::{
    AttentionProblem, Context, DType, Level, MaskRef, Result, Tensor,
    machine::Memory,
    ops::{self, AttentionArgs},
};
use lawson_core::{
    data::Mask,
    oracle::AttentionInput,
    plan::{BufferName, Op},
};

use super::{
    SEED,
    block::{BlockForms, LevelForms},
};
use crate::bench::{
    inputs,
    measure::{Forms, Reads, measure, time},
    peer_rows::{self, PeerSet},
    record::Row,
    rows::{self, Work},
    session::Session,
    specs::{Case, Feature, Shape, Study},
    verify::{self, AttentionReference, Checked},
};

/// Width of the block whose attention steps are timed: its projections do not count.
const NARROW: usize = 128;

/// The operator over q, k and v, its output and what it must be.
pub struct Operator<'a> {
    session: &'a Session<'a>,
    problem: AttentionProblem,
    q: Tensor,
    /// Keys and values, in copies that take turns.
    kv: Vec<[Tensor; 2]>,
    turn: usize,
    mask: Option<Mask>,
    sinks: Option<Vec<f32>>,
    slopes: Option<Vec<f32>>,
    out: Tensor,
    nan: Tensor,
    reference: AttentionReference,
}

/// q [T, H, D], k and v [B, G, L, D] as f32.
pub struct Numbers {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Numbers {
    /// Seeded ones, enough for sequences of equal length.
    pub fn new(s: &Shape, threads: usize) -> Self {
        let rows = s.batch * s.kv_heads * (s.past + s.seq) * s.head_dim;
        Numbers {
            q: inputs::normals(s.batch * s.seq * s.heads * s.head_dim, 1.0, s.dtype, SEED * 16 + 7, threads),
            k: inputs::normals(rows, 1.0, s.kv_dtype.rounds_to(s.dtype), SEED * 16 + 8, threads),
            v: inputs::normals(rows, 1.0, s.kv_dtype.rounds_to(s.dtype), SEED * 16 + 9, threads),
        }
    }
}

impl Numbers {
    /// q, k and v.
    pub fn parts(&self) -> (&[f32], &[f32], &[f32]) {
        (&self.q, &self.k, &self.v)
    }
}

impl<'a> Operator<'a> {
    /// Plain attention of the shape `s`.
    pub fn new(session: &'a Session<'a>, s: &Shape, n: &Numbers) -> Result<Self> {
        Self::with(session, s, Feature::Plain, n)
    }

    /// Attention of the plain shape `plain` with `feature`; `n` are numbers of the feature's shape.
    pub fn with(session: &'a Session<'a>, plain: &Shape, feature: Feature, n: &Numbers) -> Result<Self> {
        let (s, batch, spec) = (feature.shape(*plain), feature.lengths(plain)?, feature.spec(&feature.shape(*plain)));
        let (threads, rows, tokens) = (session.threads(), s.past + s.seq, batch.tokens());
        let mask = (feature == Feature::Mask).then(|| inputs::mask(s.seq, rows, SEED * 16 + 12, threads));
        let sinks = spec.sinks.then(|| inputs::normals(s.heads, 1.0, DType::F32, SEED * 16 + 13, threads));
        let slopes = spec.alibi.then(|| inputs::slopes(s.heads));
        let problem = AttentionProblem {
            kv_dtype: s.kv_dtype,
            mask: mask.as_ref().map(|m| m.shape),
            ..AttentionProblem::new(spec, batch, s.dtype)
        };
        let shape = [tokens, s.heads, s.head_dim];
        let kv = [s.batch, s.kv_heads, rows, s.head_dim];
        let q = &n.q[..tokens * problem.spec.q_dim()];
        let (sink_view, slope_view) = (sinks.as_deref(), slopes.as_deref());
        let input = AttentionInput { q, k: &n.k, v: &n.v, rows, mask: mask.as_ref(), sinks: sink_view, slopes: slope_view };
        let (nan, kv_dtype) = (inputs::nans(s.dtype, &shape)?, s.kv_dtype.rounds_to(s.dtype));
        Ok(Operator {
            session,
            reference: AttentionReference::new(&problem, &input, threads)?,
            q: Tensor::from_f32(q, s.dtype, &shape)?,
            kv: vec![[Tensor::from_f32(&n.k, kv_dtype, &kv)?, Tensor::from_f32(&n.v, kv_dtype, &kv)?]],
            turn: 0,
            mask,
            sinks,
            slopes,
            out: nan.clone(),
            nan,
            problem,
        })
    }

    /// Keeps `count` copies of keys and values, which take turns from now on.
    pub fn keep_copies(&mut self, count: usize) {
        self.kv.truncate(count.max(1));
        while self.kv.len() < count {
            self.kv.push(self.kv[0].clone());
        }
    }

    fn call_on(&mut self, context: &Context) -> Result<()> {
        let [k, v] = &self.kv[self.turn % self.kv.len()];
        let mask = self.mask.as_ref().map(|m| MaskRef::new(&m.data, [1, 1, m.rows, m.columns])).transpose()?;
        let args = AttentionArgs {
            spec: &self.problem.spec,
            lengths: &self.problem.batch,
            q: self.q.as_ref(),
            k: k.as_ref(),
            v: v.as_ref(),
            mask,
            sinks: self.sinks.as_deref(),
            slopes: self.slopes.as_deref(),
            out: self.out.as_mut(),
            lse: None,
        };
        ops::attention(context, args)
    }

    /// Memory beyond q, k, v and the result that a cold call takes.
    pub fn peak_bytes(&mut self) -> Result<u64> {
        let cold = self.session.cold()?;
        self.call_on(&cold)?;
        Ok(cold.workspace_bytes() as u64)
    }

    /// Bytes of q, k, v, the mask and the result.
    pub fn resident_bytes(&self) -> u64 {
        let elements = 2 * self.problem.batch.tokens() * self.problem.spec.q_dim() * self.problem.dtype.size();
        (elements + self.cache_bytes() + self.mask.as_ref().map_or(0, |m| m.data.len())) as u64
    }

    /// Bytes of the valid rows of k and v.
    pub fn cache_bytes(&self) -> usize {
        cache_bytes(&self.problem) as usize
    }

    /// Visible (query, key) pairs of one head.
    fn visible_pairs(&self) -> f64 {
        let Some(mask) = &self.mask else { return self.problem.visible_pairs() };
        let (spec, batch) = (&self.problem.spec, &self.problem.batch);
        let seen = |t: usize| {
            let (b, i) = batch.locate(t);
            let past = batch.past()[b];
            let range = spec.visible_range(past + i, past + batch.new_tokens()[b]);
            mask.row(b, 0, i, spec.heads)[range].iter().filter(|&&m| m != 0).count()
        };
        (0..batch.tokens()).map(seen).sum::<usize>() as f64
    }

    /// Operations, and the bytes of everything that is read and written.
    pub fn work(&self) -> Work {
        let flops = 4.0 * self.problem.spec.q_dim() as f64 * self.visible_pairs();
        Work { flops: Some(flops), bytes: self.resident_bytes() as f64 }
    }

    /// As [`Operator::work`], for decoding: it is about the keys and values; q and the result are nothing beside them.
    pub fn decode_work(&self) -> Work {
        Work { bytes: self.cache_bytes() as f64, ..self.work() }
    }
}

impl Forms for Operator<'_> {
    fn count(&self) -> usize {
        1
    }
    fn poison(&mut self, _: usize, _: bool) -> Result<()> {
        inputs::copy(&self.nan, &mut self.out)
    }
    fn call(&mut self, _: usize) -> Result<f64> {
        let context = &self.session.context;
        time(|| self.call_on(context))
    }
    fn verify(&mut self, _: usize) -> Result<Checked> {
        Ok(self.reference.check(&self.out.to_f32(), verify::limit(&[self.problem.dtype])))
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        match (data.len(), self.problem.batch.tokens() * self.problem.spec.q_dim()) {
            (n, want) if n == want => self.reference.check(data, verify::peer_limit(self.problem.dtype)),
            (n, want) => verify::wrong_size(n, want),
        }
    }
}

impl Reads for Operator<'_> {
    fn memory(&self) -> Vec<Memory<'_>> {
        self.kv[self.turn % self.kv.len()].iter().map(|t| Memory::from(t.as_ref().storage())).collect()
    }
    fn advance(&mut self) {
        self.turn += 1;
    }
}

/// The steps of a materialised plan that tiled attention replaces.
fn is_attention(op: &Op) -> bool {
    matches!(
        op,
        Op::TransposeQ
            | Op::Scores
            | Op::Scale
            | Op::Softcap
            | Op::Alibi
            | Op::Mask
            | Op::Softmax
            | Op::WeightedValues
            | Op::TransposeO
    )
}

/// Bytes of the valid rows of k and v.
fn cache_bytes(problem: &AttentionProblem) -> f64 {
    let rows = problem.batch.tokens() + problem.batch.past().iter().sum::<usize>();
    (rows * problem.spec.kv_heads) as f64 * problem.kv_dtype.row_bytes(problem.spec.head_dim)
}

/// The steps of tiled attention.
fn is_tiled(op: &Op) -> bool {
    matches!(op, Op::Attention(_) | Op::MergeSplits(_))
}

/// Which way attention is computed.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Materialised,
    Tiled,
}

/// Tiled attention: the operator, or the steps of a block where keys and values are codes, which no tensor holds.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum Tiled<'a> {
    Operator(Operator<'a>),
    Steps(BlockForms<'a>),
}

impl<'a> Tiled<'a> {
    fn form(&self) -> &(dyn Forms + 'a) {
        match self {
            Tiled::Operator(operator) => operator,
            Tiled::Steps(block) => block,
        }
    }
    fn form_mut(&mut self) -> &mut (dyn Forms + 'a) {
        match self {
            Tiled::Operator(operator) => operator,
            Tiled::Steps(block) => block,
        }
    }
}

struct AttentionForms<'a> {
    ways: Vec<Way>,
    materialised: Option<BlockForms<'a>>,
    tiled: Tiled<'a>,
}

impl<'a> AttentionForms<'a> {
    fn form(&mut self, i: usize) -> &mut (dyn Forms + 'a) {
        match (self.ways[i], &mut self.materialised) {
            (Way::Materialised, Some(block)) => block,
            _ => self.tiled.form_mut(),
        }
    }
}

impl Forms for AttentionForms<'_> {
    fn count(&self) -> usize {
        self.ways.len()
    }
    fn poison(&mut self, i: usize, everything: bool) -> Result<()> {
        self.form(i).poison(0, everything)
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        self.form(i).call(0)
    }
    fn verify(&mut self, i: usize) -> Result<Checked> {
        self.form(i).verify(0)
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        self.tiled.form().verify_peer(data)
    }
}

/// The peers of attention alone, or of decode, over the same numbers.
pub fn start_peers(session: &Session, case: &Case, n: &Numbers) -> Result<PeerSet> {
    let s = &case.shape;
    peer_rows::start(session, case, || {
        let kv = vec![s.batch, s.kv_heads, s.past + s.seq, s.head_dim];
        let q = peer_rows::swap_heads(&n.q, [s.batch, s.seq, s.heads, s.head_dim]);
        vec![
            ("q", vec![s.batch, s.heads, s.seq, s.head_dim], Cow::Owned(q)),
            ("k", kv.clone(), Cow::Borrowed(&n.k[..])),
            ("v", kv, Cow::Borrowed(&n.v[..])),
        ]
    })
}

/// Materialised against tiled attention.
pub fn run(session: &Session, case: &Case) -> Result<Vec<Row>> {
    measure_ways(session, case, &[(Level::Unfused, Way::Materialised), (Level::Maximal, Way::Tiled)])
}

/// Attention of one new token over a cache that holds its row already.
pub fn decode(session: &Session, case: &Case) -> Result<Vec<Row>> {
    measure_ways(session, case, &[(Level::Maximal, Way::Tiled)])
}

fn measure_ways(session: &Session, case: &Case, ways: &[(Level, Way)]) -> Result<Vec<Row>> {
    let chosen = session.select(ways);
    let s = &case.shape;
    let numbers = Numbers::new(s, session.threads());
    let problem = Shape { hidden: NARROW, rope: false, ..*s }.problem();
    let (wanted, quantised) = (chosen.iter().any(|c| c.1 == Way::Materialised), s.kv_dtype.codes().is_some());
    let needs_data = wanted || quantised;
    let data = if needs_data { inputs::block_data(&problem, SEED, session.threads()) } else { lawson::BlockData::default() };
    let block = |level, counted| BlockForms::new(session, &problem, &data, &[level], Some(counted));
    let materialised = if wanted { Some(block(Level::Unfused, is_attention)?) } else { None };
    let tiled = match quantised {
        true => Tiled::Steps(block(Level::Maximal, is_tiled)?),
        false => Tiled::Operator(Operator::new(session, s, &numbers)?),
    };
    let mut forms = AttentionForms { ways: chosen.iter().map(|c| c.1).collect(), materialised, tiled };
    let mut peers = start_peers(session, case, &numbers)?;
    let found = measure(session, &mut forms, &mut peers.forms)?;

    // Decoding is about the keys and values; q and the result are nothing beside them.
    let attention = problem.attention();
    let cache = cache_bytes(&attention);
    let resident = cache + (2 * attention.batch.tokens() * attention.spec.q_dim() * attention.dtype.size()) as f64;
    let work = Work { flops: Some(attention.flops()), bytes: if case.study == Study::Decode { cache } else { resident } };
    let mut rows = Vec::new();
    for (&(level, way), m) in chosen.iter().zip(&found) {
        let mut row = rows::base(session, case, level.name());
        rows::measured(&mut row, m, work);
        row.resident_bytes = Some(resident as u64);
        match (way, &forms.materialised, &mut forms.tiled) {
            (Way::Materialised, Some(block), _) => {
                let plan = block.plan(0)?;
                let steps = || plan.steps().filter(|s| is_attention(&s.op));
                row.steps = Some(steps().count());
                row.launches = row.steps;
                row.gemms = Some(steps().map(|s| s.op.gemms()).sum());
                row.traffic_bytes = Some(steps().map(|s| s.bytes).sum::<f64>() as u64);
                let buffers = [BufferName::QStrips, BufferName::Scores, BufferName::OStrips];
                row.peak_bytes = Some(buffers.iter().filter_map(|&b| plan.buffer(b)).map(|b| b.bytes as u64).sum());
                row.plan = Some(plan.to_string());
                rows::remark(
                    &mut row,
                    "The materialised form is the attention steps of an unfused block: their time, the buffers they use, the errors of its y",
                );
            }
            (_, _, Tiled::Operator(operator)) => {
                row.peak_bytes = Some(operator.peak_bytes()?);
                (row.steps, row.gemms, row.launches) = (Some(1), Some(0), Some(1));
                row.traffic_bytes = row.resident_bytes;
            }
            (_, _, Tiled::Steps(block)) => {
                let plan = block.plan(0)?;
                let steps = || plan.steps().filter(|s| is_tiled(&s.op));
                (row.steps, row.gemms, row.launches) = (Some(steps().count()), Some(0), Some(steps().count()));
                row.traffic_bytes = Some(steps().map(|s| s.bytes).sum::<f64>() as u64);
                let parts = plan.buffer(BufferName::Parts).map_or(0, |b| b.bytes);
                row.peak_bytes = Some((parts + plan.threads * plan.scratch_bytes) as u64);
                row.plan = Some(plan.to_string());
                rows::remark(
                    &mut row,
                    "Tiled attention over a quantised cache is the attention steps of a block: their time, the memory they use, the errors of its y",
                );
            }
        }
        rows.push(row);
    }
    rows.extend(peer_rows::rows_of(session, case, &peers, &found[chosen.len()..], work));
    rows::speedups(&mut rows);
    Ok(rows)
}
