//! The QKV projection alone: three products that each read x, or one that packs x once for all three.

use std::borrow::Cow;

use lawson::{
    BlockData, Context, Level, Result, Tensor, TensorRef, WeightKind,
    ops::{self, QkvWeights},
};

use super::SEED;
use crate::bench::{
    inputs,
    measure::{Forms, Measured, measure, time},
    parallel,
    peer_rows::{self, PeerSet},
    record::Row,
    rows::{self, Work},
    session::Session,
    specs::{Case, Shape},
    verify::{self, Checked},
};

/// Elements of each result that a sample has.
const SAMPLE: usize = 256;

/// Elements of one result and what they must be.
struct Expected {
    width: usize,
    at: Vec<usize>,
    want: Vec<f64>,
}

impl Expected {
    /// Of x·Wᵀ: all elements below the limit of whole checks, else a sample.
    fn new(x: &[f32], w: &[f32], e: usize, part: u64, threads: usize) -> Self {
        let width = w.len() / e;
        let n = x.len() / e * width;
        let whole = 2.0 * (n * e) as f64 <= verify::WHOLE_FLOPS / 3.0;
        let at = if whole { (0..n).collect() } else { verify::pick(n, SAMPLE, part) };
        let dot = |i: usize| {
            let (row, column) = (at[i] / width, at[i] % width);
            let pairs = x[row * e..(row + 1) * e].iter().zip(&w[column * e..(column + 1) * e]);
            pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
        };
        Expected { width, want: parallel::map(at.len(), threads, dot), at }
    }

    fn check(&self, name: &str, got: impl Fn(usize, usize) -> f32, limit: f64) -> Checked {
        let got: Vec<f32> = self.at.iter().map(|&i| got(i / self.width, i % self.width)).collect();
        verify::check(name, limit, &got, &self.want, got.len().max(1))
    }
}

/// The projections of one x, separate or fused.
pub struct QkvForms<'a> {
    session: &'a Session<'a>,
    shape: Shape,
    fused: Vec<bool>,
    x: Tensor,
    weights: QkvWeights,
    out: [Tensor; 3],
    nan: [Tensor; 3],
    expected: [Expected; 3],
}

impl<'a> QkvForms<'a> {
    /// Packs the weights of `data`, which is of the shape `s`, and computes what they must give.
    pub fn new(session: &'a Session<'a>, s: Shape, fused: Vec<bool>, data: &BlockData) -> Result<Self> {
        let (t, e) = (s.batch * s.seq, s.hidden);
        let widths = s.qkv_widths();
        let raw = [&data.q_weight, &data.k_weight, &data.v_weight];
        let view = |i: usize| TensorRef::new(raw[i], &[widths[i], e]);
        let nans = |i: usize| inputs::nans(s.dtype, &[t, widths[i]]);
        let nan = [nans(0)?, nans(1)?, nans(2)?];
        Ok(QkvForms {
            session,
            shape: s,
            fused,
            x: Tensor::from_f32(&data.x, s.dtype, &[t, e])?,
            weights: match s.weights {
                WeightKind::Int8 => QkvWeights::int8(&session.context, &view(0)?, &view(1)?, &view(2)?, s.dtype)?,
                _ => QkvWeights::pack(&session.context, &view(0)?, &view(1)?, &view(2)?, s.dtype)?,
            },
            out: nan.clone(),
            nan,
            expected: [0, 1, 2].map(|i| Expected::new(&data.x, raw[i], e, i as u64, session.threads())),
        })
    }

    /// Elements of x, of the weights and of the results.
    fn elements(&self) -> [usize; 3] {
        let (t, e, all) = (self.shape.batch * self.shape.seq, self.shape.hidden, self.shape.qkv_widths().iter().sum::<usize>());
        [t * e, all * e, t * all]
    }

    /// Bytes of the same.
    fn bytes(&self) -> [usize; 3] {
        let (s, [x, _, out]) = (&self.shape, self.elements());
        let weights = s.weights.bytes(s.qkv_widths().iter().sum(), s.hidden, s.dtype.size()) as usize;
        [x * s.dtype.size(), weights, out * s.dtype.size()]
    }

    /// Operations, and the bytes of x, weights and results, each once.
    pub fn work(&self) -> Work {
        let all = self.shape.qkv_widths().iter().sum::<usize>();
        let [x_bytes, w_bytes, out_bytes] = self.bytes();
        Work { flops: Some(2.0 * (self.elements()[0] * all) as f64), bytes: (x_bytes + w_bytes + out_bytes) as f64 }
    }

    /// What form `i`, as it was measured, says of itself.
    pub fn row(&mut self, case: &Case, level: Level, i: usize, m: &Measured) -> Result<Row> {
        let mut row = rows::base(self.session, case, level.name());
        rows::measured(&mut row, m, self.work());
        let [x_bytes, w_bytes, out_bytes] = self.bytes();
        let products = if self.fused[i] { 1 } else { 3 };
        (row.steps, row.gemms, row.launches) = (Some(products), Some(products), Some(products));
        row.traffic_bytes = Some((products * x_bytes + w_bytes + out_bytes) as u64);
        row.resident_bytes = Some((self.weights.bytes() + x_bytes + out_bytes) as u64);
        let cold = self.session.cold()?;
        self.call_on(i, &cold)?;
        row.peak_bytes = Some(cold.workspace_bytes() as u64);
        Ok(row)
    }

    fn call_on(&mut self, i: usize, context: &Context) -> Result<()> {
        let [q, k, v] = &mut self.out;
        let out = [&mut q.as_mut(), &mut k.as_mut(), &mut v.as_mut()];
        ops::qkv_projection(context, &self.x.as_ref(), &self.weights, out, self.fused[i])
    }

    fn check(&self, limit: f64, got: impl Fn(usize, usize, usize) -> f32) -> Checked {
        let of = |part: usize| self.expected[part].check(["q", "k", "v"][part], |r, c| got(part, r, c), limit);
        of(0).and(of(1)).and(of(2))
    }
}

impl Forms for QkvForms<'_> {
    fn count(&self) -> usize {
        self.fused.len()
    }
    fn poison(&mut self, _: usize, _: bool) -> Result<()> {
        self.nan.iter().zip(&mut self.out).try_for_each(|(nan, out)| inputs::copy(nan, out))
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        time(|| self.call_on(i, &self.session.context))
    }
    fn verify(&mut self, _: usize) -> Result<Checked> {
        let all = self.out.each_ref().map(Tensor::to_f32);
        let widths = self.expected.each_ref().map(|e| e.width);
        // Weights and x are off by half a scale each.
        let limit = if self.shape.weights == WeightKind::Int8 { 0.02 } else { verify::limit(&[self.shape.dtype]) };
        Ok(self.check(limit, |part, row, column| all[part][row * widths[part] + column]))
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        let widths = self.expected.each_ref().map(|e| e.width);
        let (all, rows) = (widths.iter().sum::<usize>(), self.shape.batch * self.shape.seq);
        if data.len() != rows * all {
            return verify::wrong_size(data.len(), rows * all);
        }
        let first = [0, widths[0], widths[0] + widths[1]];
        self.check(verify::peer_limit(self.shape.dtype), |part, row, column| data[row * all + first[part] + column])
    }
}

/// The peers of the projection, over the same numbers.
pub fn start_peers(session: &Session, case: &Case, data: &BlockData) -> Result<PeerSet> {
    let s = &case.shape;
    peer_rows::start(session, case, || {
        let (widths, e) = (s.qkv_widths(), s.hidden);
        let raw = [("q_proj.weight", &data.q_weight), ("k_proj.weight", &data.k_weight), ("v_proj.weight", &data.v_weight)];
        let weights = raw.into_iter().zip(widths).map(|((name, w), n)| (name, vec![n, e], Cow::Borrowed(&w[..])));
        [("x", vec![s.batch, s.seq, e], Cow::Borrowed(&data.x[..]))].into_iter().chain(weights).collect()
    })
}

/// Separate against fused.
pub fn run(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let s = case.shape;
    let chosen = session.select(&[(Level::Unfused, false), (Level::Minimal, true)]);
    let data = inputs::block_data(&s.problem(), SEED, session.threads());
    let mut forms = QkvForms::new(session, s, chosen.iter().map(|c| c.1).collect(), &data)?;
    let mut peers = start_peers(session, case, &data)?;
    let found = measure(session, &mut forms, &mut peers.forms)?;
    let mut rows = Vec::new();
    for (i, (&(level, _), m)) in chosen.iter().zip(&found).enumerate() {
        rows.push(forms.row(case, level, i, m)?);
    }
    rows.extend(peer_rows::rows_of(session, case, &peers, &found[chosen.len()..], forms.work()));
    rows::speedups(&mut rows);
    Ok(rows)
}
