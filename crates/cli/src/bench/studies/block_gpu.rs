//! The block on a GPU: each level is a graph, replayed and timed by the device's own clock.

use std::sync::Arc;

use lawson::{
    AttentionBlock, Batch, BlockData, BlockPlan, BlockProblem, BlockWeights, CapturedCall, DeviceTensor, KvCache, Level, Result,
    Tensor, TensorRef,
};

use super::block::{LevelForms, poison_cache, xy_bytes};
use crate::bench::{
    inputs,
    measure::Forms,
    session::Session,
    verify::{BlockReference, Checked},
};

/// Seconds of replays in a row that one timed call is the mean of: launching the first then costs nothing.
pub const CALL_SECONDS: f64 = 2e-3;

/// A block at several levels, each with a cache, x and y of its own.
pub struct GraphForms<'a> {
    problem: &'a BlockProblem,
    data: &'a BlockData,
    block: AttentionBlock,
    calls: Vec<CapturedCall>,
    reference: BlockReference<'a>,
}

impl<'a> GraphForms<'a> {
    /// Uploads the weights of `data`, captures every level and computes what it must give.
    pub fn new(session: &Session, problem: &'a BlockProblem, data: &'a BlockData, levels: &[Level]) -> Result<Self> {
        let context = &session.context;
        let weights = BlockWeights::from_data(&problem.spec, data)?;
        let block = AttentionBlock::builder(problem.spec.clone(), weights).dtype(problem.dtype).build(context)?;
        let (batch, shape) =
            (Batch::ragged(problem.batch.new_tokens().to_vec())?, [problem.batch.tokens(), problem.spec.hidden_size]);
        let (a, rows) = (&problem.spec.attention, problem.batch.max_len());
        let x = Tensor::from_f32(&data.x, problem.dtype, &shape)?;
        let nan = inputs::nans(problem.dtype, &shape)?;
        let device = |t: &TensorRef<'_>| DeviceTensor::upload(context, t);
        let mut calls = Vec::new();
        for &level in levels {
            let mut cache = KvCache::new(context, a, 1, problem.batch.sequences(), rows, problem.kv_dtype)?;
            poison_cache(&mut cache, problem, data)?;
            calls.push(block.at(Some(level)).capture(device(&x.as_ref())?, batch.clone(), cache, 0, device(&nan.as_ref())?)?);
        }
        let reference = BlockReference::new(problem, data, session.threads())?;
        Ok(GraphForms { problem, data, block, calls, reference })
    }

    /// Bytes of weights.
    pub fn weight_bytes(&self) -> usize {
        self.block.weight_bytes()
    }
}

impl Forms for GraphForms<'_> {
    fn count(&self) -> usize {
        self.calls.len()
    }
    fn poison(&mut self, i: usize, everything: bool) -> Result<()> {
        self.calls[i].poison_y()?;
        if everything { poison_cache(&mut self.calls[i], self.problem, self.data) } else { Ok(()) }
    }
    fn call(&mut self, i: usize) -> Result<f64> {
        let once = self.calls[i].replay_timed(1)?;
        if once >= CALL_SECONDS {
            return Ok(once);
        }
        self.calls[i].replay_timed((CALL_SECONDS / once.max(1e-6)).ceil() as usize)
    }
    fn cold(&mut self, i: usize) -> Result<Option<f64>> {
        self.calls[i].replay_cold().map(Some)
    }
    fn verify(&mut self, i: usize) -> Result<Checked> {
        let y = self.calls[i].y().to_f32()?;
        self.reference.check(self.calls[i].cache(), &y)
    }
    fn verify_peer(&self, data: &[f32]) -> Checked {
        self.reference.check_peer(data)
    }
}

impl LevelForms for GraphForms<'_> {
    fn problem(&self) -> &BlockProblem {
        self.problem
    }
    fn plan(&self, i: usize) -> Result<Arc<BlockPlan>> {
        Ok(Arc::clone(self.calls[i].plan()))
    }
    fn resident_bytes(&self) -> usize {
        self.block.weight_bytes() + self.calls[0].cache().bytes() + xy_bytes(self.problem)
    }
    fn step_call(&mut self, i: usize) -> Result<Vec<f64>> {
        Ok(self.calls[i].forward_timed()?.1)
    }
}
