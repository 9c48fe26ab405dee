//! Decoded tokens per second, and the sequences that a given memory holds.

use lawson::{Level, Result};

use super::block;
use crate::bench::{
    record::Row,
    rows,
    session::Session,
    specs::{Case, Shape},
};

/// What `sequences_fit` counts.
const FIT: &str = "The sequences that fit are those whose caches have room beside one layer's weights and the prefill of the batch's prompts together";

/// Bytes of one sequence's cache.
fn cache_bytes(session: &Session, s: &Shape) -> Result<usize> {
    let rows = s.past + s.seq;
    Ok(lawson::KvCache::new(&session.context, &s.attention(), 1, 1, rows, s.kv_dtype)?.bytes())
}

/// Every level at the batch of `case`.
pub fn run(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let measured = block::of_levels(session, case, &session.levels)?;
    let s = &case.shape;
    let one = cache_bytes(session, s)?;
    let mut rows = measured.rows;
    for (row, &level) in rows.iter_mut().zip(&session.levels) {
        row.tokens_per_s = row.median_ms.map(|ms| s.batch as f64 / ms * 1e3);
        let taken = measured.weight_bytes + call_bytes(session, s, level)?;
        row.memory_limit_bytes = Some(session.memory_limit);
        row.sequences_fit = Some((session.memory_limit.saturating_sub(taken as u64)) / one as u64);
        rows::remark(row, FIT);
    }
    Ok(rows)
}

/// Memory that the largest call takes beside weights and caches: the prefill of as many prompts as are decoded together. What a level
/// keeps in memory during that call, it cannot give to sequences.
fn call_bytes(session: &Session, s: &Shape, level: Level) -> Result<usize> {
    let mut most = 0;
    for shape in [Shape { seq: s.past.max(1), past: 0, ..*s }, *s] {
        let plan = session.context.plan(&shape.problem(), Some(level))?;
        most = most.max(plan.peak_bytes() + 2 * shape.batch * shape.seq * shape.hidden * shape.dtype.size());
    }
    Ok(most)
}
