//! Each hot kernel alone at `maximal`: against the machine's limits, against its plain form, beside a loop that only reads the same memory, and
//! beside neighbours of its shape.

use lawson::{BlockData, DType, Level, Result, WeightKind};

use super::{
    SEED,
    attention::{self, Numbers, Operator},
    block::{self, BlockForms},
    qkv::{self, QkvForms},
};
use crate::bench::{
    fit, inputs,
    measure::{Budget, Forms, Measured, Reads, measure, measure_within},
    peer_rows::{self, PeerSet},
    record::Row,
    rows::{self, Work},
    session::Session,
    specs::{Case, Feature, Kernel, Shape, neighbours},
    statistics::percentile,
    verify::{self, Checked},
};

/// Time of a neighbour and of the shape beside it.
const NEIGHBOUR: Budget = Budget { seconds: 0.4, least: 3, most: 9 };

/// Measures the kernel of `case`.
pub fn run(session: &Session, case: &Case) -> Result<Vec<Row>> {
    match case.kernel {
        Some(Kernel::Projection) => projection(session, case),
        Some(Kernel::Attention(features)) => tiled_attention(session, case, features),
        Some(Kernel::Decode) => decode(session, case),
        Some(Kernel::Block) => decode_block(session, case),
        None => Ok(Vec::new()),
    }
}

/// A computation of one form that knows its work.
trait Single: Forms {
    fn work(&self) -> Work;
}

impl Single for Operator<'_> {
    fn work(&self) -> Work {
        Operator::work(self)
    }
}

impl Single for QkvForms<'_> {
    fn work(&self) -> Work {
        QkvForms::work(self)
    }
}

/// Computations that are timed in turn.
struct InTurn<F>(Vec<F>);

impl<F: Single> Forms for InTurn<F> {
    fn count(&self) -> usize {
        self.0.len()
    }
    fn poison(&mut self, i: usize, everything: bool) -> Result<()> {
        self.0[i].poison(0, everything)
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        self.0[i].call(0)
    }
    fn verify(&mut self, i: usize) -> Result<Checked> {
        self.0[i].verify(0)
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        verify::wrong_size(data.len(), 0)
    }
}

/// A kernel of one form, and a loop of the same threads that only reads the kernel's memory.
struct BesideReading<'a, F> {
    session: &'a Session<'a>,
    kernel: F,
}

impl<F: Reads> Forms for BesideReading<'_, F> {
    fn count(&self) -> usize {
        2
    }
    fn poison(&mut self, i: usize, everything: bool) -> Result<()> {
        self.kernel.advance();
        if i == 0 { self.kernel.poison(0, everything) } else { Ok(()) }
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        if i == 0 { self.kernel.call(0) } else { Ok(self.session.context.read_loop(&self.kernel.memory())) }
    }
    fn verify(&mut self, i: usize) -> Result<Checked> {
        if i == 0 { self.kernel.verify(0) } else { Ok(verify::nothing()) }
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        verify::wrong_size(data.len(), 0)
    }
}

/// The read loop's time, or `least` seconds where that is less, as a share of the kernel's.
fn read_share(found: &[Measured], least: f64) -> Option<f64> {
    let [kernel, read, ..] = found else { return None };
    kernel.failed.is_none().then(|| read.times.median().max(least) / kernel.times.median()).filter(|s| s.is_finite())
}

/// What a kernel must compute, without the kernel.
struct Wanted<'a>(&'a dyn Forms);

impl Forms for Wanted<'_> {
    fn count(&self) -> usize {
        0
    }
    fn poison(&mut self, _: usize, _: bool) -> Result<()> {
        Ok(())
    }
    fn call(&mut self, _: usize) -> Result<f64> {
        Ok(f64::NAN)
    }
    fn verify(&mut self, _: usize) -> Result<Checked> {
        Ok(verify::nothing())
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        self.0.verify_peer(data)
    }
    fn peer_rows(&self) -> Option<&[usize]> {
        self.0.peer_rows()
    }
}

/// Measures peers after the `kernel`, in turn with one another only: between calls of the kernel their threads and memory would cost it the share
/// of its limit that is asked about.
fn peers_of(session: &Session, case: &Case, kernel: &dyn Forms, mut peers: PeerSet, work: Work) -> Result<Vec<Row>> {
    let found = measure(session, &mut Wanted(kernel), &mut peers.forms)?;
    Ok(peer_rows::rows_of(session, case, &peers, &found, work))
}

fn projection(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let data_of = |s: &Shape| inputs::block_data(&s.problem(), SEED, session.threads());
    let make = |s: &Shape, data: &BlockData| QkvForms::new(session, *s, vec![true], data);
    let case = &case.clone().variant(Kernel::Projection.name());
    let data = data_of(&case.shape);
    let mut cases = vec![case.clone()];
    if case.shape.dtype == DType::BF16 && case.shape.weights == WeightKind::Compute {
        cases.push(Case { shape: Shape { weights: WeightKind::Int8, ..case.shape }, ..case.clone() });
    }
    let mut forms = InTurn(cases.iter().map(|c| make(&c.shape, &data)).collect::<Result<Vec<_>>>()?);
    let found = measure(session, &mut forms, &mut [])?;
    let mut all: Vec<Row> = Vec::new();
    for (i, (case, found)) in cases.iter().zip(&found).enumerate() {
        let mut row = forms.0[i].row(case, Level::Maximal, 0, found)?;
        row.plain_share = all.first().and_then(|plain| Some(row.gflops? / plain.gflops?));
        all.push(row);
    }
    forms.0.truncate(1);
    let beside = peers_of(session, case, &forms.0[0], qkv::start_peers(session, case, &data)?, forms.0[0].work())?;
    drop(data);
    let wrong = beside_neighbours(session, case, &mut all[0], forms, |s| make(s, &data_of(s)))?;
    Ok([all, beside, wrong].concat())
}

/// The row of tiled attention as it was measured.
fn attention_row(session: &Session, case: &Case, operator: &mut Operator<'_>, m: &Measured, work: Work) -> Result<Row> {
    let mut row = rows::base(session, case, Level::Maximal.name());
    rows::measured(&mut row, m, work);
    row.resident_bytes = Some(operator.resident_bytes());
    row.traffic_bytes = row.resident_bytes;
    row.peak_bytes = Some(operator.peak_bytes()?);
    (row.steps, row.gemms, row.launches) = (Some(1), Some(0), Some(1));
    Ok(row)
}

fn tiled_attention(session: &Session, case: &Case, features: &[Feature]) -> Result<Vec<Row>> {
    let numbers_of = |s: &Shape, feature: Feature| Numbers::new(&feature.shape(*s), session.threads());
    let make = |s: &Shape, feature: Feature| Operator::with(session, s, feature, &numbers_of(s, feature));
    let operators = features.iter().map(|&f| make(&case.shape, f)).collect::<Result<Vec<_>>>()?;
    let mut forms = InTurn(operators);
    let found = measure(session, &mut forms, &mut [])?;
    // Peers compute the plain form, which comes first.
    let plain = &case.clone().variant(Feature::Plain.variant(case.shape.causal));
    let peers = attention::start_peers(session, plain, &numbers_of(&case.shape, Feature::Plain))?;
    let beside = peers_of(session, plain, &forms.0[0], peers, forms.0[0].work())?;
    let mut all: Vec<Row> = Vec::new();
    for ((&feature, operator), m) in features.iter().zip(&mut forms.0).zip(&found) {
        let shape = feature.shape(case.shape);
        let work = operator.work();
        let case = Case { shape, ..case.clone() }.variant(feature.variant(shape.causal));
        let mut row = attention_row(session, &case, operator, m, work)?;
        if feature == Feature::Ragged {
            let lengths = feature.lengths(&case.shape)?;
            let lengths: Vec<String> = lengths.new_tokens().iter().map(usize::to_string).collect();
            rows::remark(&mut row, &format!("the ragged batch has sequences of {} tokens", lengths.join(", ")));
        }
        row.plain_share = all.first().and_then(|plain| Some(row.gflops? / plain.gflops?));
        all.push(row);
    }
    forms.0.truncate(1);
    let wrong = match all.first_mut() {
        Some(row) => beside_neighbours(session, case, row, forms, |s| make(s, Feature::Plain))?,
        None => Vec::new(),
    };
    Ok([all, beside, wrong].concat())
}

/// Measures neighbours of the shape of `case`, each in turn with the only form of `forms`, and fills in `row`. Gives a row for each neighbour
/// that was wrong.
fn beside_neighbours<F: Single>(
    session: &Session,
    case: &Case,
    row: &mut Row,
    mut forms: InTurn<F>,
    make: impl Fn(&Shape) -> Result<F>,
) -> Result<Vec<Row>> {
    let (Some(kernel), true) = (case.kernel, row.median_ms.is_some()) else { return Ok(Vec::new()) };
    let shapes = neighbours(kernel, case.shape, session.neighbours);
    let (mut shares, mut wrong) = (Vec::new(), Vec::new());
    for (i, shape) in shapes.iter().enumerate() {
        session.check()?;
        session.bar.set_message(format!("{}: neighbour {} of {}", case.name(), i + 1, shapes.len()));
        forms.0.push(make(shape)?);
        let found = measure_within(session, NEIGHBOUR, &mut forms, &mut [])?;
        let rate = |i: usize| forms.0[i].work().flops.map(|f| f / found[i].times.median());
        if found[1].failed.is_some() {
            let mut of = rows::base(session, &Case { shape: *shape, ..case.clone() }, Level::Maximal.name());
            of.variant = row.variant.as_ref().map(|v| format!("{v}, neighbour"));
            rows::measured(&mut of, &found[1], forms.0[1].work());
            wrong.push(of);
        } else {
            shares.extend(rate(1).zip(rate(0)).map(|(near, own)| near / own).filter(|s| s.is_finite()));
        }
        forms.0.truncate(1);
    }
    shares.sort_by(f64::total_cmp);
    if let Some(&least) = shares.first() {
        row.neighbours = Some(shares.len());
        (row.neighbours_least, row.neighbours_median) = (Some(least), Some(percentile(&shares, 0.5)));
    }
    Ok(wrong)
}

/// Warm over one cache, then cold over copies of it that together do not stay in the last-level cache; then the peers, which are warm.
fn decode(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let numbers = Numbers::new(&case.shape, session.threads());
    let kernel = Operator::new(session, &case.shape, &numbers)?;
    let (bytes, work) = (kernel.cache_bytes(), kernel.decode_work());
    let mut forms = BesideReading { session, kernel };
    let warm = case.clone().variant("decode warm");
    let mut all = Vec::new();
    for (case, copies) in [(&warm, 1), (&case.clone().variant("decode cold"), fit::copies(bytes))] {
        session.check()?;
        forms.kernel.keep_copies(copies);
        let found = measure(session, &mut forms, &mut [])?;
        let mut row = attention_row(session, case, &mut forms.kernel, &found[0], work)?;
        row.read_share = read_share(&found, 0.0);
        // Decode widens what it reads, whatever its type.
        let arithmetic = work.flops.unwrap_or(0.0) / session.limits.peak_flops;
        row.bound_share = read_share(&found, arithmetic);
        all.push(row);
    }
    forms.kernel.keep_copies(1);
    all.extend(peers_of(session, &warm, &forms.kernel, attention::start_peers(session, &warm, &numbers)?, work)?);
    Ok(all)
}

fn decode_block(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let problem = case.shape.problem();
    let case = &case.clone().variant(Kernel::Block.name());
    let data = inputs::block_data(&problem, SEED, session.threads());
    let kernel = BlockForms::new(session, &problem, &data, &[Level::Maximal], None)?;
    let mut forms = BesideReading { session, kernel };
    let found = measure(session, &mut forms, &mut [])?;
    let work = Work { flops: Some(problem.flops()), bytes: problem.compulsory_bytes() };
    let mut all = block::level_rows(session, case, &[Level::Maximal], &mut forms.kernel, &found[..1], work)?;
    for row in &mut all {
        row.read_share = read_share(&found, 0.0);
    }
    all.extend(peers_of(session, case, &forms.kernel, block::start_peers(session, case, &data)?, work)?);
    Ok(all)
}
