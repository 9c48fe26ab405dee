//! Whether a configuration fits in memory and time, and how far its batch is scaled down where it does not.

use std::fs;

use lawson::{DType, Error, KvCache, Level, Result, machine};

use super::{
    session::Session,
    specs::{Case, Kernel, Shape, Study},
    studies::operators_gpu,
};
use crate::output;

/// Seconds that one call of a preset's configuration may take at the measured limits.
const LONGEST_CALL: f64 = 2.0;
/// Share of the available memory that a preset's configuration may take.
const SHARE: f64 = 0.6;

/// The same of a GPU's, whose configurations are counted closely.
const GPU_SHARE: f64 = 0.9;

/// Bytes that no machine has.
const TOO_LARGE: f64 = (1u64 << 46) as f64;

/// Bytes that can be had now, where the system tells.
fn available() -> Option<f64> {
    let info = fs::read_to_string("/proc/meminfo").ok();
    let line = info.as_deref().and_then(|i| i.lines().find_map(|l| l.strip_prefix("MemAvailable:")));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<usize>().ok());
    kib.map(|k| k * 1024).or_else(machine::memory_bytes).map(|n| n as f64)
}

/// Free bytes of the session's GPU, its own pool's included.
fn available_on_gpu(session: &Session) -> Result<Option<f64>> {
    let Some(gpu) = session.context.gpu() else { return Ok(None) };
    let (free, usage) = (gpu.device().free_bytes()?, gpu.device().usage());
    Ok(Some((free + usage.reserved.saturating_sub(usage.in_use)) as f64))
}

/// Bytes of the GPU's memory that measuring takes at most, about: inputs, results and the largest workspace, and as much again for a peer.
fn gpu_bytes(session: &Session, case: &Case) -> Result<f64> {
    let s = &case.shape;
    let (q, kv) = ((s.heads * s.head_dim) as f64, (s.kv_heads * s.head_dim) as f64);
    let t = (s.batch * s.seq) as f64;
    let (size, kv_size) = (s.dtype.size() as f64, s.kv_dtype.row_bytes(s.head_dim) / (2 * s.head_dim) as f64);
    let (weights, cache) = (s.hidden as f64 * (2.0 * q + 2.0 * kv) * size, 2.0 * tiled_rows(s) * kv * kv_size);
    let one = match case.study {
        Study::Softmax => t * s.heads as f64 * (s.past + s.seq) as f64 * 8.0,
        Study::Rope => t * (q + 2.0 * kv) * size * 2.0,
        Study::Decode => cache + t * q * size * 2.0,
        Study::Attention => {
            let scores = t * s.heads as f64 * (s.past + s.seq) as f64 * 4.0;
            cache + t * q * size * 4.0 + if scores <= operators_gpu::LARGEST_SCORES { scores } else { 0.0 }
        }
        Study::Qkv if case.variant == Some("alone") => weights + t * (s.hidden as f64 + q + 2.0 * kv) * size,
        _ => {
            let levels = levels(session, case);
            let scores = t * s.heads as f64 * (s.past + s.seq) as f64 * 4.0;
            if scores > TOO_LARGE && levels.iter().any(|&l| l <= Level::Minimal) {
                return Ok(scores);
            }
            let mut peak = 0;
            for &level in &levels {
                peak = session.context.plan(&s.problem(), Some(level))?.peak_bytes().max(peak);
            }
            weights + levels.len() as f64 * (cache + t * s.hidden as f64 * size * 2.0) + peak as f64
        }
    };
    Ok(if session.peers.is_empty() || !case.peers { one } else { 2.0 * one })
}

/// Copies of `one` bytes that together exceed four times the last-level cache, or as many as memory has room for.
pub fn copies(one: usize) -> usize {
    /// Where the system does not tell.
    const CACHE: usize = 64 << 20;
    let cache = (2..=4).rev().find_map(machine::cache_bytes).unwrap_or(CACHE);
    let room = available().map_or(usize::MAX, |n| (n * SHARE) as usize);
    (4 * cache / one.max(1) + 1).min(room / one.max(1)).max(1)
}

/// Levels whose plans a configuration runs.
fn levels(session: &Session, case: &Case) -> Vec<Level> {
    match case.study {
        Study::Attention => vec![Level::Unfused],
        Study::Kernels => vec![Level::Maximal],
        _ => session.levels.clone(),
    }
}

/// Bytes that measuring takes at most, about: our copies of the inputs, the packed block, the cache, the largest workspace.
fn bytes(session: &Session, case: &Case) -> Result<f64> {
    let s = &case.shape;
    let (q, kv) = ((s.heads * s.head_dim) as f64, (s.kv_heads * s.head_dim) as f64);
    let (t, rows) = ((s.batch * s.seq) as f64, (s.batch * (s.past + s.seq)) as f64);
    let (size, kv_size) = (s.dtype.size() as f64, s.kv_dtype.row_bytes(s.head_dim) / (2 * s.head_dim) as f64);
    let weights = s.hidden as f64 * (2.0 * q + 2.0 * kv) * (4.0 + size);
    let cache = 2.0 * kv * (rows * 8.0 + tiled_rows(s) * kv_size);
    let projection = weights + t * (s.hidden as f64 + q + 2.0 * kv) * 12.0;
    match case.kernel {
        Some(Kernel::Projection) => return Ok(projection),
        Some(Kernel::Attention(features)) => {
            let mask = t * (s.past + s.seq) as f64;
            return Ok((cache + t * q * 20.0) * features.len() as f64 + mask);
        }
        Some(Kernel::Decode) => return Ok(cache + t * q * 20.0),
        Some(Kernel::Block) | None => {}
    }
    Ok(match case.study {
        Study::Softmax => t * s.heads as f64 * (s.past + s.seq) as f64 * 12.0,
        Study::Rope => t * q * 20.0,
        Study::Decode => cache + t * q * 20.0,
        Study::Qkv if case.variant == Some("alone") => projection,
        _ => {
            // Sizes that no plan could count come out here.
            let scores = t * s.heads as f64 * (s.past + s.seq) as f64 * 4.0;
            if scores > TOO_LARGE && levels(session, case).iter().any(|&l| l <= Level::Minimal) {
                return Ok(scores);
            }
            let resident = weights + cache + t * (s.hidden as f64 + q) * 16.0;
            if available().is_some_and(|have| resident > have) {
                // A plan of very many sequences takes long.
                return Ok(resident);
            }
            let mut peak = 0;
            for level in levels(session, case) {
                peak = session.context.plan(&s.problem(), Some(level))?.peak_bytes().max(peak);
            }
            resident + peak as f64
        }
    })
}

/// Rows of the sequences in a contiguous cache.
fn tiled_rows(s: &Shape) -> f64 {
    s.batch as f64 * (s.past + s.seq).next_multiple_of(KvCache::ROW_TILE) as f64
}

/// Seconds of a call at the machine's limits, about.
fn seconds(session: &Session, case: &Case) -> f64 {
    let s = &case.shape;
    let of_bytes = |n: f64| n / session.limits.bandwidth;
    match case.study {
        Study::Softmax => of_bytes((s.batch * s.heads * s.seq * (s.past + s.seq)) as f64 * 8.0),
        Study::Rope => of_bytes((s.batch * s.seq * s.heads * s.head_dim) as f64 * 8.0),
        _ => {
            let problem = s.problem();
            (problem.flops() / session.limits.peak(s.dtype == DType::BF16)).max(of_bytes(problem.compulsory_bytes()))
        }
    }
}

/// A preset's configuration, its batch halved until it fits; the note says so.
pub fn scaled(session: &Session, mut case: Case) -> Result<Case> {
    let (whole, memory) = (case.shape.batch, available().map_or(f64::INFINITY, |n| n * SHARE));
    let on_gpu = available_on_gpu(session)?;
    let mut why = "";
    loop {
        let large = match on_gpu {
            Some(memory) => gpu_bytes(session, &case)? > memory * GPU_SHARE,
            None => bytes(session, &case)? > memory,
        };
        let long = seconds(session, &case) > LONGEST_CALL;
        if !(long || large) || case.shape.batch == 1 {
            break;
        }
        why = if large { "memory" } else { "time" };
        case.shape = Shape { batch: case.shape.batch / 2, ..case.shape };
    }
    if case.shape.batch != whole {
        case.notes.push(format!("batch {whole} scaled down to {} for {why}", case.shape.batch));
    }
    Ok(case)
}

/// Checks that a shape that was asked for fits in memory.
///
/// # Errors
/// `InvalidInput`, with what it takes and what there is.
pub fn check(session: &Session, case: &Case) -> Result<()> {
    let refuse = |need: f64, have: f64, whose: &str| {
        let (need, have) = (output::bytes(need as usize), output::bytes(have as usize));
        Err(Error::invalid(format!("{}: measuring takes about {need} of {whose}memory, {have} are available", case.name())))
    };
    if let Some(have) = available_on_gpu(session)? {
        let need = gpu_bytes(session, case)?;
        if need > have {
            return refuse(need, have, "the GPU's ");
        }
    }
    // On a GPU the host draws the numbers of blocks alone whole.
    if session.context.gpu().is_some() && !matches!(case.study, Study::Block | Study::Throughput | Study::Qkv) {
        return Ok(());
    }
    let (need, have) = (bytes(session, case)?, available().unwrap_or(f64::INFINITY));
    if need > have { refuse(need, have, "") } else { Ok(()) }
}
