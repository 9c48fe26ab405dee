//! The whole block at each level of fusion.

use std::{borrow::Cow, sync::Arc};

use lawson::{
    AttentionBlock, BlockData, BlockPlan, BlockProblem, CapturedCall, KvCache, Level, PreparedCall, Result, Tensor,
    machine::Memory,
};
use lawson_core::plan::Op;

use super::{SEED, block_gpu::GraphForms};
use crate::bench::{
    inputs,
    measure::{Forms, Measured, Reads, measure, time},
    peak,
    peer_rows::{self, PeerSet},
    record::Row,
    rows::{self, Work},
    session::Session,
    specs::{Case, Study},
    statistics::Times,
    verify::{BlockReference, Checked},
};

/// Timed calls step by step.
const STEP_RUNS: usize = 5;

/// A block at several levels, over the same cache, x and y.
pub struct BlockForms<'a> {
    problem: &'a BlockProblem,
    data: &'a BlockData,
    blocks: Vec<AttentionBlock>,
    call: PreparedCall,
    y: Tensor,
    nan: Tensor,
    reference: BlockReference<'a>,
    /// Steps whose time counts; the whole call's when `None`.
    counted: Option<fn(&Op) -> bool>,
}

impl<'a> BlockForms<'a> {
    /// Packs the weights of `data` and computes what it must give.
    pub fn new(
        session: &Session,
        problem: &'a BlockProblem,
        data: &'a BlockData,
        levels: &[Level],
        counted: Option<fn(&Op) -> bool>,
    ) -> Result<Self> {
        let call = PreparedCall::new(&session.context, problem, data, None)?;
        let blocks = levels.iter().map(|&l| call.block.at(Some(l))).collect();
        let nan = inputs::nans(problem.dtype, &[problem.batch.tokens(), problem.spec.hidden_size])?;
        let reference = BlockReference::new(problem, data, session.threads())?;
        Ok(BlockForms { problem, data, blocks, call, y: nan.clone(), nan, reference, counted })
    }
}

/// Levels of one block as forms, with what their rows say besides times.
pub trait LevelForms: Forms {
    /// What is computed.
    fn problem(&self) -> &BlockProblem;
    /// The plan of form `i`.
    fn plan(&self, i: usize) -> Result<Arc<BlockPlan>>;
    /// Bytes of packed weights, cache, x and y.
    fn resident_bytes(&self) -> usize;
    /// Seconds of each step of form `i`, in a call of its own.
    fn step_call(&mut self, i: usize) -> Result<Vec<f64>>;
}

/// Bytes of x and y.
pub fn xy_bytes(problem: &BlockProblem) -> usize {
    2 * problem.batch.tokens() * problem.spec.hidden_size * problem.dtype.size()
}

/// Median seconds of each step of form `i`.
fn step_seconds(forms: &mut dyn LevelForms, i: usize) -> Result<Vec<f64>> {
    let mut runs = Vec::new();
    for _ in 0..STEP_RUNS {
        forms.poison(i, false)?;
        runs.push(forms.step_call(i)?);
    }
    let steps = runs.first().map_or(0, Vec::len);
    Ok((0..steps).map(|s| Times::new(runs.iter().map(|r| r[s]).collect()).median()).collect())
}

impl LevelForms for BlockForms<'_> {
    fn problem(&self) -> &BlockProblem {
        self.problem
    }
    fn plan(&self, i: usize) -> Result<Arc<BlockPlan>> {
        let batch = &self.problem.batch;
        self.blocks[i].plan(batch.new_tokens(), batch.past(), None, self.problem.kv_dtype)
    }
    fn resident_bytes(&self) -> usize {
        self.call.block.weight_bytes() + self.call.cache.bytes() + xy_bytes(self.problem)
    }
    fn step_call(&mut self, i: usize) -> Result<Vec<f64>> {
        Ok(self.blocks[i].forward_timed(self.call.args(&mut self.y)?)?.1)
    }
}

impl Forms for BlockForms<'_> {
    fn count(&self) -> usize {
        self.blocks.len()
    }

    fn poison(&mut self, _: usize, everything: bool) -> Result<()> {
        inputs::copy(&self.nan, &mut self.y)?;
        if !everything {
            return Ok(());
        }
        poison_cache(&mut self.call.cache, self.problem, self.data)
    }

    fn call(&mut self, i: usize) -> Result<f64> {
        let (block, args) = (&self.blocks[i], self.call.args(&mut self.y)?);
        let Some(counted) = self.counted else { return time(|| block.forward(args)) };
        let (plan, seconds) = block.forward_timed(args)?;
        Ok(plan.steps().zip(seconds).filter(|(step, _)| counted(&step.op)).map(|(_, s)| s).sum())
    }

    fn verify(&mut self, _: usize) -> Result<Checked> {
        self.reference.check(&self.call.cache, &self.y.to_f32())
    }

    fn verify_peer(&self, data: &[f32]) -> Checked {
        self.reference.check_peer(data)
    }
}

/// A cache of one layer, alone or in a captured call.
pub trait Fill {
    /// Replaces sequence `b`.
    fn fill(&mut self, b: usize, rows: usize, k: &[f32], v: &[f32]) -> Result<()>;
    /// Shortens sequence `b`.
    fn shorten(&mut self, b: usize, len: usize) -> Result<()>;
}

impl Fill for KvCache {
    fn fill(&mut self, b: usize, rows: usize, k: &[f32], v: &[f32]) -> Result<()> {
        self.import(0, b, rows, k, v)
    }
    fn shorten(&mut self, b: usize, len: usize) -> Result<()> {
        self.truncate(b, len)
    }
}

impl Fill for CapturedCall {
    fn fill(&mut self, b: usize, rows: usize, k: &[f32], v: &[f32]) -> Result<()> {
        self.import(b, rows, k, v)
    }
    fn shorten(&mut self, b: usize, len: usize) -> Result<()> {
        self.truncate(b, len)
    }
}

/// Makes a cache that of `data`'s past, with NaN behind it where it is not quantised, by `import` and `truncate`: it
/// takes whole sequences only.
pub fn poison_cache(cache: &mut dyn Fill, problem: &BlockProblem, data: &BlockData) -> Result<()> {
    let (batch, a) = (&problem.batch, &problem.spec.attention);
    let past_row = data.past_rows * a.head_dim;
    // Rows behind the past would share its scales.
    let poisons = problem.kv_dtype.codes().is_none();
    for (b, (&new, &past)) in batch.new_tokens().iter().zip(batch.past()).enumerate() {
        let new = if poisons { new } else { 0 };
        let fill = |from: &[f32]| {
            let mut rows = Vec::with_capacity(a.kv_dim() * (past + new));
            for g in b * a.kv_heads..(b + 1) * a.kv_heads {
                rows.extend_from_slice(&from[g * past_row..][..past * a.head_dim]);
                rows.resize(rows.len() + new * a.head_dim, f32::NAN);
            }
            rows
        };
        cache.fill(b, past + new, &fill(&data.past_k), &fill(&data.past_v))?;
        cache.shorten(b, past)?;
    }
    Ok(())
}

impl Reads for BlockForms<'_> {
    fn memory(&self) -> Vec<Memory<'_>> {
        self.call.block.weight_memory().into_iter().chain(self.call.cache.memory()).collect()
    }
}

/// A block's levels as they were measured.
pub struct BlockRows {
    /// One row per level, then the peers'.
    pub rows: Vec<Row>,
    /// Bytes of packed weights.
    pub weight_bytes: usize,
}

/// Measures every level of `case`.
pub fn run(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let levels = match case.study {
        // The two levels differ in the projection alone.
        Study::Qkv => session.select(&[(Level::Unfused, ()), (Level::Minimal, ())]).into_iter().map(|f| f.0).collect(),
        _ => session.levels.clone(),
    };
    Ok(of_levels(session, case, &levels)?.rows)
}

/// Measures `levels` of the block of `case`.
pub fn of_levels(session: &Session, case: &Case, levels: &[Level]) -> Result<BlockRows> {
    let problem = case.shape.problem();
    let data = inputs::block_data(&problem, SEED, session.threads());
    let mut peers = start_peers(session, case, &data)?;
    let work = Work { flops: Some(problem.flops()), bytes: problem.compulsory_bytes() };
    if session.context.gpu().is_some() {
        let mut forms = GraphForms::new(session, &problem, &data, levels)?;
        let found = measure(session, &mut forms, &mut peers.forms)?;
        let mut rows = level_rows(session, case, levels, &mut forms, &found, work)?;
        rows.extend(peer_rows::rows_of(session, case, &peers, &found[levels.len()..], work));
        rows::speedups(&mut rows);
        return Ok(BlockRows { rows, weight_bytes: forms.weight_bytes() });
    }
    let mut forms = BlockForms::new(session, &problem, &data, levels, None)?;
    let found = measure(session, &mut forms, &mut peers.forms)?;
    let mut rows = level_rows(session, case, levels, &mut forms, &found, work)?;
    rows.extend(peer_rows::rows_of(session, case, &peers, &found[levels.len()..], work));
    rows::speedups(&mut rows);
    Ok(BlockRows { rows, weight_bytes: forms.call.block.weight_bytes() })
}

/// The rows of our own forms, without speed-ups.
pub fn level_rows(
    session: &Session,
    case: &Case,
    levels: &[Level],
    forms: &mut dyn LevelForms,
    found: &[Measured],
    work: Work,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut plans: Vec<Arc<BlockPlan>> = Vec::new();
    for (i, (&level, m)) in levels.iter().zip(found).enumerate() {
        session.check()?;
        let plan = forms.plan(i)?;
        let mut row = rows::base(session, case, level.name());
        rows::measured(&mut row, m, work);
        rows::planned(&mut row, &plan);
        row.resident_bytes = Some(forms.resident_bytes() as u64);
        row.same_as = plans.iter().find(|p| p.same_as(&plan)).map(|p| p.level.name().to_owned());
        if case.confirm_peak && row.same_as.is_none() && session.context.gpu().is_none() {
            session.bar.set_message(format!("{}: peak memory of {level}", case.name()));
            peak::confirm(session, &plan, forms.problem())?.iter().for_each(|text| rows::remark(&mut row, text));
        }
        if case.steps && m.failed.is_none() {
            row.steps_table = rows::steps(&plan, &step_seconds(forms, i)?);
        }
        plans.push(plan);
        rows.push(row);
    }
    Ok(rows)
}

/// The peers of the block, over the same numbers.
pub fn start_peers(session: &Session, case: &Case, data: &BlockData) -> Result<PeerSet> {
    // Throughput is a question to our own plans; the layer of the projection study stands in the block study.
    if case.measured_by() != Study::Block {
        return Ok(PeerSet::none());
    }
    let s = &case.shape;
    // PyTorch's traditional form takes no cache.
    let without: &[&str] = if session.context.gpu().is_some() && s.past > 0 { &["traditional"] } else { &[] };
    peer_rows::start_without(session, case, without, || {
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let mut tensors = vec![
            ("x", vec![s.batch, s.seq, s.hidden], Cow::Borrowed(&data.x[..])),
            ("q_proj.weight", vec![q, s.hidden], Cow::Borrowed(&data.q_weight[..])),
            ("k_proj.weight", vec![kv, s.hidden], Cow::Borrowed(&data.k_weight[..])),
            ("v_proj.weight", vec![kv, s.hidden], Cow::Borrowed(&data.v_weight[..])),
            ("o_proj.weight", vec![s.hidden, q], Cow::Borrowed(&data.o_weight[..])),
        ];
        if s.past > 0 {
            let shape = vec![s.batch, s.kv_heads, s.past, s.head_dim];
            tensors.push(("past_k", shape.clone(), Cow::Borrowed(&data.past_k[..])));
            tensors.push(("past_v", shape, Cow::Borrowed(&data.past_v[..])));
        }
        tensors
    })
}
