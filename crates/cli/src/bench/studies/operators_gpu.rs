//! The operators alone on a GPU: each form is a graph, replayed and timed by the device's own clock.

use std::borrow::Cow;

use lawson::{
    AttentionProblem, Batch, DType, DeviceTensor, KvCache, Level, Result, RopeLayout, RopeSpec, Tensor, TensorRef,
    ops::{AttentionArgs, Operation, QkvWeights, Replays, RopeAppendArgs, RopeMethod, SoftmaxMethod, replay_timed},
};
use lawson_core::oracle::{self, AttentionInput};

use super::{SEED, attention::Numbers, block_gpu::CALL_SECONDS};
use crate::bench::{
    inputs,
    measure::{Forms, measure},
    parallel,
    peer_rows::{self, PeerSet, swap_heads},
    record::Row,
    rows::{self, Work},
    session::Session,
    specs::{Case, Shape, Study},
    verify::{self, AttentionReference, Checked},
};

/// Bytes of scores in memory above which attention is measured in tiles alone.
pub const LARGEST_SCORES: f64 = 10e9;

/// Some rows of a result and what they must be.
struct Sample {
    name: &'static str,
    dtype: DType,
    rows: Vec<usize>,
    width: usize,
    want: Vec<f64>,
}

impl Sample {
    /// `rows` of the first of `copies` equal parts of `part` rows, and the same rows of the last part.
    fn new(
        name: &'static str,
        dtype: DType,
        (rows, width, want): (Vec<usize>, usize, Vec<f64>),
        part: usize,
        copies: usize,
    ) -> Self {
        if copies == 1 {
            return Sample { name, dtype, rows, width, want };
        }
        let last = rows.iter().map(|r| r + (copies - 1) * part).collect::<Vec<_>>();
        Sample { name, dtype, rows: [rows, last].concat(), width, want: [&want[..], &want[..]].concat() }
    }

    fn check(&self, got: &[f32], limit: f64) -> Checked {
        match got.len() {
            n if n == self.want.len() => verify::check(self.name, limit, got, &self.want, self.width),
            n => verify::wrong_size(n, self.want.len()),
        }
    }
}

/// Replays of form `i`, which write the tensor: mean seconds.
type Replay<'a> = Box<dyn FnMut(usize, &mut DeviceTensor, Replays) -> Result<f64> + 'a>;

/// Forms of an operator over the same inputs, which write the same tensor.
struct OperatorForms<'a> {
    count: usize,
    out: DeviceTensor,
    sample: Sample,
    replay: Replay<'a>,
}

impl Forms for OperatorForms<'_> {
    fn count(&self) -> usize {
        self.count
    }
    fn poison(&mut self, _: usize, _: bool) -> Result<()> {
        self.out.poison()
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        let once = (self.replay)(i, &mut self.out, Replays::Warm(1))?;
        if once >= CALL_SECONDS {
            return Ok(once);
        }
        self.out.poison()?;
        (self.replay)(i, &mut self.out, Replays::Warm((CALL_SECONDS / once.max(1e-6)).ceil() as usize))
    }
    fn verify(&mut self, _: usize) -> Result<Checked> {
        let got = self.out.rows_to_f32(&self.sample.rows, self.sample.width)?;
        Ok(self.sample.check(&got, verify::limit(&[self.sample.dtype])))
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        self.sample.check(data, verify::peer_limit(self.sample.dtype))
    }
    fn peer_rows(&self) -> Option<&[usize]> {
        Some(&self.sample.rows)
    }
    fn cold(&mut self, i: usize) -> Result<Option<f64>> {
        (self.replay)(i, &mut self.out, Replays::Cold(2)).map(Some)
    }
}

/// `values` of `shape`, the first of `copies` equal parts along the first dimension, on the session's GPU.
fn repeated(session: &Session, values: &[f32], dtype: DType, shape: &[usize], copies: usize) -> Result<DeviceTensor> {
    DeviceTensor::repeat(&session.context, &Tensor::from_f32(values, dtype, shape)?.as_ref(), copies)
}

/// Measures `forms` and gives the rows of those that `levels` name, then the peers'.
fn measured(
    session: &Session,
    case: &Case,
    levels: &[Level],
    mut forms: OperatorForms<'_>,
    mut peers: PeerSet,
    work: Work,
) -> Result<Vec<Row>> {
    let found = measure(session, &mut forms, &mut peers.forms)?;
    let mut rows = Vec::new();
    for (level, m) in levels.iter().zip(&found) {
        let mut row = rows::base(session, case, level.name());
        row.resident_bytes = Some(work.bytes as u64);
        rows::measured(&mut row, m, work);
        rows.push(row);
    }
    rows.extend(peer_rows::rows_of(session, case, &peers, &found[levels.len()..], work));
    Ok(rows)
}

fn note_copies(row: &mut Row, distinct: usize, batch: usize) {
    if distinct < batch {
        rows::remark(
            row,
            &format!("{distinct} of the {batch} sequences have numbers of their own, the others repeat them elsewhere in memory"),
        );
    }
}

/// Attention of new tokens, or of one over a cache.
pub fn attention(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let (s, threads) = (&case.shape, session.threads());
    let decode = case.study == Study::Decode;
    let rows_of = |s: &Shape| s.past + s.seq;
    let n = inputs::distinct(s.batch, rows_of(s) * s.kv_heads.max(1) * s.head_dim);
    let (few, copies) = (Shape { batch: n, ..*s }, s.batch / n);
    let numbers = Numbers::new(&few, threads);
    let problem = |s: &Shape| -> Result<AttentionProblem> {
        let batch = lawson::Lengths::uniform(s.batch, s.seq, s.past);
        Ok(AttentionProblem { kv_dtype: s.kv_dtype, ..AttentionProblem::new(s.attention(), batch, s.dtype) })
    };
    let (whole, part) = (problem(s)?, problem(&few)?);
    let (q, k, v) = numbers.parts();
    let input = AttentionInput { q, k, v, rows: rows_of(s), mask: None, sinks: None, slopes: None };
    let reference = AttentionReference::new(&part, &input, threads)?;
    let sample = Sample::new("out", s.dtype, reference.into_parts(), n * s.seq, copies);
    let (q_shape, kv_shape) = ([n * s.seq, s.heads, s.head_dim], [n, s.kv_heads, rows_of(s), s.head_dim]);
    let device_q = repeated(session, q, s.dtype, &q_shape, copies)?;
    let kv_dtype = s.kv_dtype.rounds_to(s.dtype);
    let (device_k, device_v) =
        (repeated(session, k, kv_dtype, &kv_shape, copies)?, repeated(session, v, kv_dtype, &kv_shape, copies)?);

    let scores = (s.batch * s.seq) as f64 * (s.heads * rows_of(s)) as f64 * 4.0;
    let fits = !decode && scores <= LARGEST_SCORES;
    let ways: &[(Level, ())] = if fits { &[(Level::Unfused, ()), (Level::Maximal, ())] } else { &[(Level::Maximal, ())] };
    let levels: Vec<Level> = session.select(ways).iter().map(|c| c.0).collect();
    let replay = |i: usize, out: &mut DeviceTensor, replays| {
        let args = AttentionArgs {
            spec: &whole.spec,
            lengths: &whole.batch,
            q: device_q.as_ref(),
            k: device_k.as_ref(),
            v: device_v.as_ref(),
            mask: None,
            sinks: None,
            slopes: None,
            out: out.as_mut(),
            lse: None,
        };
        replay_timed(&session.context, Operation::Attention(Box::new(args), levels[i]), replays)
    };
    let out = DeviceTensor::nans(&session.context, s.dtype, &[s.batch * s.seq, s.heads, s.head_dim])?;
    let forms = OperatorForms { count: levels.len(), out, sample, replay: Box::new(replay) };
    let peers = if !decode && s.past > 0 {
        PeerSet::none()
    } else {
        let variants = if decode || fits { &[][..] } else { &["traditional"][..] };
        peer_rows::start_without(session, case, variants, || {
            let q = swap_heads(q, [n, s.seq, s.heads, s.head_dim]);
            vec![
                ("q", vec![n, s.heads, s.seq, s.head_dim], Cow::Owned(q)),
                ("k", kv_shape.to_vec(), Cow::Borrowed(k)),
                ("v", kv_shape.to_vec(), Cow::Borrowed(v)),
            ]
        })?
    };
    let kv_bytes = 2.0 * (s.batch * rows_of(s) * s.kv_heads * s.head_dim * kv_dtype.size()) as f64;
    let bytes = kv_bytes + 2.0 * (s.batch * s.seq * s.heads * s.head_dim * s.dtype.size()) as f64;
    let work = Work { flops: Some(whole.flops()), bytes: if decode { kv_bytes } else { bytes } };
    let mut rows = measured(session, case, &levels, forms, peers, work)?;
    for (row, &level) in rows.iter_mut().zip(&levels) {
        rows::planned(row, &session.context.plan_attention(&whole, level)?);
        row.resident_bytes = Some(bytes as u64);
        note_copies(row, n, s.batch);
        if !fits && !decode {
            rows::remark(row, "in tiles alone, as the scores in memory would take more than 10 GB");
        }
    }
    rows::speedups(&mut rows);
    Ok(rows)
}

const METHODS: [(Level, (&str, SoftmaxMethod)); 3] = [
    (Level::Unfused, ("three-pass", SoftmaxMethod::ThreePass)),
    (Level::Minimal, ("fused", SoftmaxMethod::Fused)),
    (Level::Moderate, ("online", SoftmaxMethod::Online(1024))),
];

/// Every method of softmax.
pub fn softmax(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let s = &case.shape;
    let chosen = session.select(&METHODS);
    let (one, width) = (s.heads * s.seq, s.past + s.seq);
    let n = inputs::distinct(s.batch, one * width);
    let x = inputs::normals(n * one * width, 1.0, DType::F32, SEED * 16 + 10, session.threads());
    let picked = verify::pick(n * one, 64, 0);
    let want = oracle::softmax(&verify::gather(&x, &picked, width), width);
    let sample = Sample::new("softmax", DType::F32, (picked, width, want), n * one, s.batch / n);
    let device_x = repeated(session, &x, DType::F32, &[n * one, width], s.batch / n)?;
    let peers = peer_rows::start(session, case, || vec![("x", vec![n, one, width], Cow::Borrowed(&x[..]))])?;
    let replay = |i: usize, out: &mut DeviceTensor, replays| {
        let operation = Operation::Softmax { x: device_x.as_ref(), out: out.as_mut(), method: chosen[i].1.1 };
        replay_timed(&session.context, operation, replays)
    };
    let out = DeviceTensor::nans(&session.context, DType::F32, &[s.batch * one, width])?;
    let forms = OperatorForms { count: chosen.len(), out, sample, replay: Box::new(replay) };
    let bytes = 8.0 * (s.batch * one * width) as f64;
    let levels: Vec<Level> = chosen.iter().map(|c| c.0).collect();
    let mut rows = measured(session, case, &levels, forms, peers, Work { flops: None, bytes })?;
    for (row, (_, (name, method))) in rows.iter_mut().zip(&chosen) {
        row.variant = Some((*name).to_owned());
        let launches = if *method == SoftmaxMethod::ThreePass { 3 } else { 1 };
        (row.steps, row.gemms, row.launches) = (Some(launches), Some(0), Some(launches));
        row.peak_bytes = Some(if launches == 3 { 8 * (s.batch * one) as u64 } else { 0 });
        note_copies(row, n, s.batch);
    }
    rows.iter_mut().for_each(|row| row.dtype = DType::F32.to_string());
    rows::speedups(&mut rows);
    Ok(rows)
}

/// RoPE of x `[T, H, D]`: what one sequence has, drawn anew for as many as memory of the host allows.
struct Turned {
    /// Sequences with numbers of their own.
    n: usize,
    x: Vec<f32>,
    tokens: Vec<usize>,
}

impl Turned {
    fn new(session: &Session, s: &Shape, columns: usize) -> Self {
        let n = inputs::distinct(s.batch, s.seq * columns);
        let x = inputs::normals(n * s.seq * columns, 1.0, s.dtype, SEED * 16 + 11, session.threads());
        Turned { n, x, tokens: verify::pick(n * s.seq, 64, 0) }
    }

    /// What `heads` heads from `first` on of the sampled tokens must be, in rows of `columns` elements.
    fn want(&self, s: &Shape, spec: &RopeSpec, columns: usize, first: usize, heads: usize) -> Vec<f64> {
        let d = s.head_dim;
        let inverse = spec.frequencies(d, s.past + s.seq).inverse;
        let values: Vec<f32> = self.tokens.iter().flat_map(|t| self.x[t * columns + first * d..][..heads * d].to_vec()).collect();
        let angles = |t: &usize| {
            let position = (s.past + t % s.seq) as f64;
            let one: Vec<f64> = inverse.iter().map(|w| position * w).collect();
            one.repeat(heads)
        };
        oracle::rope(&values, d, d, spec.layout, &self.tokens.iter().flat_map(angles).collect::<Vec<_>>())
    }
}

/// Both methods in both layouts, then the pass that follows the projection: q and k turned, k and v appended to the cache.
pub fn rope(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let mut rows = of_layout(session, case, RopeLayout::Half, "half")?;
    rows.extend(of_layout(session, case, RopeLayout::Interleaved, "interleaved")?);
    rows.extend(rope_append(session, case)?);
    Ok(rows)
}

fn of_layout(session: &Session, case: &Case, layout: RopeLayout, name: &str) -> Result<Vec<Row>> {
    let s = &case.shape;
    let chosen = session.select(&[(Level::Unfused, RopeMethod::TwoPass), (Level::Maximal, RopeMethod::Fused)]);
    let (spec, columns) = (RopeSpec { layout, ..RopeSpec::new(10000.0) }, s.heads * s.head_dim);
    let turned = Turned::new(session, s, columns);
    let (n, copies) = (turned.n, s.batch / turned.n);
    let want = turned.want(s, &spec, columns, 0, s.heads);
    let sample = Sample::new("rope", s.dtype, (turned.tokens.clone(), columns, want), n * s.seq, copies);
    let x = repeated(session, &turned.x, s.dtype, &[n * s.seq, s.heads, s.head_dim], copies)?;
    let positions: Vec<usize> = (0..s.batch * s.seq).map(|t| s.past + t % s.seq).collect();
    // PyTorch's users turn halves.
    let peers = if layout == RopeLayout::Half && s.past == 0 {
        peer_rows::start(session, case, || {
            let x = swap_heads(&turned.x, [n, s.seq, s.heads, s.head_dim]);
            vec![("x", vec![n, s.heads, s.seq, s.head_dim], Cow::Owned(x))]
        })?
    } else {
        PeerSet::none()
    };
    let replay = |i: usize, out: &mut DeviceTensor, replays| {
        let (x, out, method) = (x.as_ref(), out.as_mut(), chosen[i].1);
        replay_timed(&session.context, Operation::Rope { x, out, positions: &positions, spec: &spec, method }, replays)
    };
    let out = DeviceTensor::nans(&session.context, s.dtype, &[s.batch * s.seq, s.heads, s.head_dim])?;
    let forms = OperatorForms { count: chosen.len(), out, sample, replay: Box::new(replay) };
    let elements = (s.batch * s.seq * columns * s.dtype.size()) as f64;
    let levels: Vec<Level> = chosen.iter().map(|c| c.0).collect();
    let mut rows = measured(session, case, &levels, forms, peers, Work { flops: None, bytes: 2.0 * elements })?;
    for (i, row) in rows.iter_mut().enumerate() {
        let Some((_, method)) = chosen.get(i) else {
            row.variant = Some(format!("peer {name}"));
            continue;
        };
        let two = *method == RopeMethod::TwoPass;
        row.variant = Some(format!("{} {name}", if two { "two-pass" } else { "fused" }));
        let launches = if two { 2 } else { 1 };
        (row.steps, row.gemms, row.launches) = (Some(launches), Some(0), Some(launches));
        row.peak_bytes = Some(if two { elements as u64 } else { 0 });
        note_copies(row, n, s.batch);
    }
    rows::speedups(&mut rows);
    Ok(rows)
}

/// The pass over q, k and v that follows the projection, by itself.
fn rope_append(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let s = &case.shape;
    if !session.select(&[(Level::Unfused, ()), (Level::Maximal, ())]).iter().any(|c| c.0 == Level::Maximal) {
        return Ok(Vec::new());
    }
    let (h, g, d) = (s.heads, s.kv_heads, s.head_dim);
    let (columns, spec) = ((h + 2 * g) * d, RopeSpec::new(10000.0));
    let turned = Turned::new(session, s, columns);
    let (n, copies) = (turned.n, s.batch / turned.n);
    let sample =
        Sample::new("q", s.dtype, (turned.tokens.clone(), h * d, turned.want(s, &spec, columns, 0, h)), n * s.seq, copies);
    let qkv = repeated(session, &turned.x, s.dtype, &[n * s.seq, columns], copies)?;
    let batch = Batch::uniform(s.batch, s.seq)?;
    let mut cache = KvCache::new(&session.context, &s.attention(), 1, s.batch, s.past + s.seq, s.kv_dtype)?;
    let nans = vec![f32::NAN; g * (s.past + s.seq) * d];
    // Sequences without a past need nothing imported; those that are checked get NaN.
    for b in (0..s.batch).filter(|b| s.past > 0 || [0, s.batch - 1].contains(b)) {
        cache.import(0, b, s.past + s.seq, &nans, &nans)?;
        cache.truncate(b, s.past)?;
    }
    let case = Case { variant: Some(rows::APPEND), ..case.clone() };
    let replay = |_: usize, out: &mut DeviceTensor, replays| {
        let args = RopeAppendArgs { qkv: qkv.as_ref(), batch: &batch, spec: &spec, q: out.as_mut(), cache: cache.layer(0) };
        replay_timed(&session.context, Operation::RopeAppend(args), replays)
    };
    let out = DeviceTensor::nans(&session.context, s.dtype, &[s.batch * s.seq, h, d])?;
    let forms = OperatorForms { count: 1, out, sample, replay: Box::new(replay) };
    let bytes = 2.0 * (s.batch * s.seq * columns * s.dtype.size()) as f64;
    let work = Work { flops: None, bytes };
    let mut rows = measured(session, &case, &[Level::Maximal], forms, PeerSet::none(), work)?;
    let appended = check_append(&turned, s, &spec, &cache)?;
    for row in &mut rows {
        (row.steps, row.gemms, row.launches, row.peak_bytes) = (Some(1), Some(0), Some(1), Some(0));
        note_copies(row, n, s.batch);
        if !appended.ok {
            row.median_ms = None;
            rows::remark(row, &format!("failed: {}", appended.message));
        }
    }
    Ok(rows)
}

/// Checks what the last call appended to the first and the last sequence.
fn check_append(turned: &Turned, s: &Shape, spec: &RopeSpec, cache: &KvCache) -> Result<Checked> {
    let (h, g, d, rows) = (s.heads, s.kv_heads, s.head_dim, s.past + s.seq);
    let columns = (h + 2 * g) * d;
    let k_want = turned.want(s, spec, columns, h, g);
    let limit = verify::limit(&[s.dtype, s.kv_dtype.rounds_to(s.dtype)]);
    let mut found = verify::nothing();
    for b in [0, s.batch - 1] {
        let (k, v) = cache.export(0, b, rows)?;
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (i, t) in turned.tokens.iter().enumerate().filter(|(_, t)| *t / s.seq == b % turned.n) {
            let row = |cache: &[f32], head: usize| cache[(head * rows + s.past + t % s.seq) * d..][..d].to_vec();
            got.extend((0..g).flat_map(|head| row(&k, head)).chain((0..g).flat_map(|head| row(&v, head))));
            want.extend_from_slice(&k_want[i * g * d..][..g * d]);
            want.extend(turned.x[t * columns + (h + g) * d..][..g * d].iter().map(|&v| f64::from(v)));
        }
        found = found.and(verify::check("the cache", limit, &got, &want, d));
    }
    Ok(found)
}

/// Separate against fused projection.
pub fn qkv(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let s = &case.shape;
    let chosen = session.select(&[(Level::Unfused, false), (Level::Minimal, true)]);
    let (e, widths, threads) = (s.hidden, s.qkv_widths(), session.threads());
    let all: usize = widths.iter().sum();
    let n = inputs::distinct(s.batch, s.seq * e);
    let copies = s.batch / n;
    let data = inputs::block_data(&Shape { batch: n, past: 0, ..*s }.problem(), SEED, threads);
    let raw = [&data.q_weight, &data.k_weight, &data.v_weight];
    let weights = {
        let view = |i: usize| TensorRef::new(raw[i], &[widths[i], e]);
        QkvWeights::pack(&session.context, &view(0)?, &view(1)?, &view(2)?, s.dtype)?
    };
    let picked = verify::pick(n * s.seq, 16, 0);
    let row = |i: usize| {
        let x = &data.x[picked[i / 3] * e..][..e];
        let dot = |w: &[f32]| x.iter().zip(w).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        raw[i % 3].chunks_exact(e).map(dot).collect::<Vec<f64>>()
    };
    let want = parallel::map(3 * picked.len(), threads, row).concat();
    let sample = Sample::new("qkv", s.dtype, (picked, all, want), n * s.seq, copies);
    let x = repeated(session, &data.x, s.dtype, &[n * s.seq, e], copies)?;
    let peers = peer_rows::start(session, case, || {
        let names = ["q_proj.weight", "k_proj.weight", "v_proj.weight"];
        let weights = (0..3).map(|i| (names[i], vec![widths[i], e], Cow::Borrowed(&raw[i][..])));
        [("x", vec![n, s.seq, e], Cow::Borrowed(&data.x[..]))].into_iter().chain(weights).collect()
    })?;
    let replay = |i: usize, out: &mut DeviceTensor, replays| {
        let operation = Operation::QkvProjection { x: x.as_ref(), weights: &weights, out: out.as_mut(), fused: chosen[i].1 };
        replay_timed(&session.context, operation, replays)
    };
    let tokens = s.batch * s.seq;
    let out = DeviceTensor::nans(&session.context, s.dtype, &[tokens, all])?;
    let forms = OperatorForms { count: chosen.len(), out, sample, replay: Box::new(replay) };
    let [x_bytes, w_bytes, out_bytes] = [tokens * e, all * e, tokens * all].map(|n| (n * s.dtype.size()) as f64);
    let work = Work { flops: Some(2.0 * (tokens * all * e) as f64), bytes: x_bytes + w_bytes + out_bytes };
    let levels: Vec<Level> = chosen.iter().map(|c| c.0).collect();
    let mut rows = measured(session, case, &levels, forms, peers, work)?;
    for (row, (_, fused)) in rows.iter_mut().zip(&chosen) {
        let products = if *fused { 1 } else { 3 };
        (row.steps, row.gemms, row.launches) = (Some(products), Some(products), Some(products));
        row.traffic_bytes = Some((products as f64 * x_bytes + w_bytes + out_bytes) as u64);
        row.peak_bytes = Some(0);
        note_copies(row, n, s.batch);
    }
    rows::speedups(&mut rows);
    Ok(rows)
}
