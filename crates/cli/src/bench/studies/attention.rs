//! Attention alone: materialised against tiled, and decode over a cache.

use std::borrow::Cow;

use lawson::{
    AttentionProblem, Context, Lengths, Level, Result, Tensor,
    ops::{self, AttentionArgs},
};
use lawson_core::{
    oracle::AttentionInput,
    plan::{BufferName, Op},
};

use super::{SEED, block::BlockForms};
use crate::bench::{
    inputs,
    measure::{Forms, measure, time},
    peer_rows::{self, PeerSet},
    record::Row,
    rows::{self, Work},
    session::Session,
    specs::{Case, Shape, Study},
    verify::{self, AttentionReference, Checked},
};

/// Width of the block whose attention steps are timed: its projections do not count.
const NARROW: usize = 128;

/// q, k and v, the operator's output and what it must be.
struct Operator {
    problem: AttentionProblem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    nan: Tensor,
    reference: AttentionReference,
}

/// q [T, H, D], k and v [B, G, L, D] as f32.
struct Numbers {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Numbers {
    fn new(s: &Shape, threads: usize) -> Self {
        let rows = s.batch * s.kv_heads * (s.past + s.seq) * s.head_dim;
        Numbers {
            q: inputs::normals(s.batch * s.seq * s.heads * s.head_dim, 1.0, s.dtype, SEED * 16 + 7, threads),
            k: inputs::normals(rows, 1.0, s.kv_dtype, SEED * 16 + 8, threads),
            v: inputs::normals(rows, 1.0, s.kv_dtype, SEED * 16 + 9, threads),
        }
    }
}

impl Operator {
    fn new(session: &Session, s: &Shape, n: &Numbers) -> Result<Self> {
        let batch = Lengths::uniform(s.batch, s.seq, s.past);
        let problem = AttentionProblem { kv_dtype: s.kv_dtype, ..AttentionProblem::new(s.attention(), batch, s.dtype) };
        let (rows, shape) = (s.past + s.seq, [s.batch * s.seq, s.heads, s.head_dim]);
        let kv = [s.batch, s.kv_heads, rows, s.head_dim];
        let input = AttentionInput { q: &n.q, k: &n.k, v: &n.v, rows, mask: None, sinks: None, slopes: None };
        let nan = inputs::nans(s.dtype, &shape)?;
        Ok(Operator {
            reference: AttentionReference::new(&problem, &input, session.threads())?,
            q: Tensor::from_f32(&n.q, s.dtype, &shape)?,
            k: Tensor::from_f32(&n.k, s.kv_dtype, &kv)?,
            v: Tensor::from_f32(&n.v, s.kv_dtype, &kv)?,
            out: nan.clone(),
            nan,
            problem,
        })
    }

    fn call_on(&mut self, context: &Context) -> Result<()> {
        let args = AttentionArgs {
            spec: &self.problem.spec,
            lengths: &self.problem.batch,
            q: self.q.as_ref(),
            k: self.k.as_ref(),
            v: self.v.as_ref(),
            mask: None,
            sinks: None,
            slopes: None,
            out: self.out.as_mut(),
            lse: None,
        };
        ops::attention(context, args)
    }

    /// Memory beyond q, k, v and the result that a cold call takes.
    fn peak_bytes(&mut self, session: &Session) -> Result<u64> {
        let cold = session.cold()?;
        self.call_on(&cold)?;
        Ok(cold.workspace_bytes() as u64)
    }

    fn check(&self) -> Checked {
        self.reference.check(&self.out.to_f32(), verify::limit(&[self.problem.dtype]))
    }

    fn resident_bytes(&self) -> u64 {
        let elements = 2 * self.problem.batch.tokens() * self.problem.spec.q_dim() * self.problem.dtype.size();
        (elements + self.cache_bytes()) as u64
    }

    fn cache_bytes(&self) -> usize {
        let rows: usize = self.k.shape().iter().product();
        2 * rows * self.problem.kv_dtype.size()
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

/// Which way attention is computed.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Materialised,
    Tiled,
}

struct AttentionForms<'a> {
    session: &'a Session<'a>,
    ways: Vec<Way>,
    materialised: Option<BlockForms<'a>>,
    tiled: Operator,
}

impl Forms for AttentionForms<'_> {
    fn count(&self) -> usize {
        self.ways.len()
    }
    fn poison(&mut self, i: usize, everything: bool) -> Result<()> {
        match (self.ways[i], &mut self.materialised) {
            (Way::Materialised, Some(block)) => block.poison(0, everything),
            _ => inputs::copy(&self.tiled.nan, &mut self.tiled.out),
        }
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        match (self.ways[i], &mut self.materialised) {
            (Way::Materialised, Some(block)) => block.call(0),
            _ => time(|| self.tiled.call_on(&self.session.context)),
        }
    }
    fn verify(&mut self, i: usize) -> Result<Checked> {
        match (self.ways[i], &mut self.materialised) {
            (Way::Materialised, Some(block)) => block.verify(0),
            _ => Ok(self.tiled.check()),
        }
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        let want = self.tiled.problem.batch.tokens() * self.tiled.problem.spec.q_dim();
        match data.len() {
            n if n == want => self.tiled.reference.check(data, verify::peer_limit(self.tiled.problem.dtype)),
            n => verify::wrong_size(n, want),
        }
    }
}

fn start_peers(session: &Session, case: &Case, n: &Numbers) -> Result<PeerSet> {
    let s = &case.shape;
    // No peer takes new tokens behind a past in this study.
    if case.study == Study::Attention && s.past > 0 {
        return Ok(PeerSet::none());
    }
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
    let tiled = Operator::new(session, s, &numbers)?;
    let problem = Shape { hidden: NARROW, rope: false, ..*s }.problem();
    let wanted = chosen.iter().any(|c| c.1 == Way::Materialised);
    let data = if wanted { inputs::block_data(&problem, SEED, session.threads()) } else { lawson::BlockData::default() };
    let block = || BlockForms::new(session, &problem, &data, &[Level::Unfused], Some(is_attention));
    let materialised = if wanted { Some(block()?) } else { None };
    let mut forms = AttentionForms { session, ways: chosen.iter().map(|c| c.1).collect(), materialised, tiled };
    let mut peers = start_peers(session, case, &numbers)?;
    let found = measure(session, &mut forms, &mut peers.forms)?;

    let bytes = forms.tiled.resident_bytes() as f64;
    let flops = forms.tiled.problem.flops();
    // Decode is about the keys and values; q and the result are nothing beside them.
    let bytes = if case.study == Study::Decode { forms.tiled.cache_bytes() as f64 } else { bytes };
    let work = Work { flops: Some(flops), bytes };
    let mut rows = Vec::new();
    for (&(level, way), m) in chosen.iter().zip(&found) {
        let mut row = rows::base(session, case, level.name());
        rows::measured(&mut row, m, work);
        row.resident_bytes = Some(forms.tiled.resident_bytes());
        match (way, &forms.materialised) {
            (Way::Materialised, Some(block)) => {
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
            _ => {
                row.peak_bytes = Some(forms.tiled.peak_bytes(session)?);
                (row.steps, row.gemms, row.launches) = (Some(1), Some(0), Some(1));
                row.traffic_bytes = Some(forms.tiled.resident_bytes());
            }
        }
        rows.push(row);
    }
    rows.extend(peer_rows::rows_of(session, case, &peers, &found[chosen.len()..], work));
    rows::speedups(&mut rows);
    Ok(rows)
}
