//! One call of a block whose numbers are all given: what `lawson run`, conformance and benchmarks do.

use lawson_core::{
    Result,
    data::{BlockData, BlockOutput},
    problem::{BlockProblem, Level},
};

use crate::{Args, AttentionBlock, Batch, BlockWeights, Context, KvCache, MaskRef, PagePool, tensor::Tensor};

/// A block, its cache with the past rows, and its input.
pub struct PreparedCall {
    /// The block.
    pub block: AttentionBlock,
    /// The cache; sequence b has its valid past rows.
    pub cache: KvCache,
    /// New tokens of each sequence.
    pub batch: Batch,
    /// `[T, E]`.
    pub x: Tensor,
    mask: Option<(Vec<u8>, [usize; 4])>,
    past_rows: usize,
}

impl PreparedCall {
    /// Packs the weights of `data` and fills a cache with its past.
    ///
    /// # Errors
    /// `InvalidInput` when `data` does not fit `problem`, `OutOfMemory`; `Unavailable` for a paged cache on a CPU and for weights in int8 on a GPU.
    pub fn new(context: &Context, problem: &BlockProblem, data: &BlockData, level: Option<Level>) -> Result<Self> {
        problem.validate()?;
        let weights = BlockWeights::from_data(&problem.spec, data)?;
        let block = AttentionBlock::builder(problem.spec.clone(), weights).dtype(problem.dtype).weights(problem.weights);
        let block = block.build(context)?.at(level);
        let (batch, a) = (Batch::ragged(problem.batch.new_tokens().to_vec())?, &problem.spec.attention);
        let sequences = problem.batch.sequences();
        let rows = data.cache_rows(problem);
        let mut cache = match problem.page_size {
            None => KvCache::new(context, a, 1, sequences, rows, problem.kv_dtype)?,
            Some(page_size) => {
                let pages = sequences * rows.div_ceil(page_size);
                let pool = PagePool::new(context, a, 1, pages, page_size, problem.kv_dtype)?;
                KvCache::paged(&pool, sequences, rows)?
            }
        };
        let one = a.kv_heads * data.past_rows * a.head_dim;
        for (b, &past) in problem.batch.past().iter().enumerate() {
            // Rows behind the valid ones stay where kernels could find them, but share no scales with others.
            let rows = if problem.kv_dtype.codes().is_some() { past } else { data.past_rows };
            let part = |v: &'_ [f32]| {
                let heads = v.get(b * one..(b + 1) * one).unwrap_or_default().chunks_exact(data.past_rows.max(1) * a.head_dim);
                heads.flat_map(|head| &head[..rows * a.head_dim]).copied().collect::<Vec<_>>()
            };
            cache.import(0, b, rows, &part(&data.past_k), &part(&data.past_v))?;
            cache.truncate(b, past)?;
        }
        let x = Tensor::from_f32(&data.x, problem.dtype, &[problem.batch.tokens(), problem.spec.hidden_size])?;
        let mask = data.mask.as_ref().map(|m| {
            let count = |per: bool, n: usize| if per { n } else { 1 };
            let shape = [count(m.shape.per_sequence, sequences), count(m.shape.per_head, a.heads), m.rows, m.columns];
            (m.data.clone(), shape)
        });
        Ok(PreparedCall { block, cache, batch, x, mask, past_rows: data.past_rows })
    }

    /// What one call takes, with `y` to write to.
    ///
    /// # Errors
    /// `InvalidInput` when the mask's shape does not fit its bytes.
    pub fn args<'a>(&'a mut self, y: &'a mut Tensor) -> Result<Args<'a>> {
        let mask = self.mask.as_ref().map(|(data, shape)| MaskRef::new(data, *shape)).transpose()?;
        Ok(Args { x: self.x.as_ref(), batch: &self.batch, mask, cache: self.cache.layer(0), y: y.as_mut() })
    }

    /// y and the caches after a call that wrote `y`.
    ///
    /// # Errors
    /// `InvalidInput` when the cache is not this call's.
    pub fn output(&self, y: &Tensor) -> Result<BlockOutput> {
        let new = self.batch.new_tokens();
        let rows = self.past_rows + new.iter().copied().max().unwrap_or(0);
        let (g, d) = (self.cache.kv_heads(), self.cache.head_dim());
        let mut out =
            BlockOutput { y: y.to_f32(), k: vec![0.0; new.len() * g * rows * d], v: vec![0.0; new.len() * g * rows * d] };
        for (b, (&n, &past)) in new.iter().zip(self.cache.lengths()).enumerate() {
            let valid = past + n;
            let (k, v) = self.cache.export(0, b, valid)?;
            for (from, to) in [(k, &mut out.k), (v, &mut out.v)] {
                for (head, from) in from.chunks_exact(valid * d).enumerate() {
                    to[(b * g + head) * rows * d..][..valid * d].copy_from_slice(from);
                }
            }
        }
        Ok(out)
    }
}

/// Computes `data` with a block made for it, at `level` or the planner's choice.
///
/// # Errors
/// As [`PreparedCall::new`] and [`AttentionBlock::forward`].
pub fn compute(context: &Context, problem: &BlockProblem, level: Option<Level>, data: &BlockData) -> Result<BlockOutput> {
    let mut call = PreparedCall::new(context, problem, data, level)?;
    // NaN, so that an element that no step writes cannot pass for a result.
    let shape = [problem.batch.tokens(), problem.spec.hidden_size];
    let mut y = Tensor::from_f32(&vec![f32::NAN; shape[0] * shape[1]], problem.dtype, &shape)?;
    let block = call.block.clone();
    block.forward(call.args(&mut y)?)?;
    call.output(&y)
}
