//! Writes block files and their results.

use std::{io::Write, path::Path};

use lawson_core::{
    DType, Error, Result,
    data::BlockData,
    problem::{BlockProblem, MaskShape},
};

use super::spec;
use crate::{
    BlockWeights,
    tensor_file::{StoredDType, encode, stored_dtype, write_atomically, write_safetensors},
};

/// One tensor ready to be written.
type Tensor = (&'static str, StoredDType, Vec<usize>, Vec<u8>);

/// Writes `problem` and `data` as `dir/block.json` and `dir/in.safetensors`, which read back as the same (a mask that is given for
/// each of one sequence, or each of one head, reads back as one for all; the cache's dtype must be given again). The folder is made when it is missing.
///
/// # Errors
/// `InvalidInput` when the sequences have different numbers of new tokens, when `data` does not fit `problem`, or when a file cannot
/// be written; `Device` when a disk fails. A folder that was made is removed then.
pub fn write_block_file(dir: impl AsRef<Path>, problem: &BlockProblem, data: &BlockData) -> Result<()> {
    problem.validate()?;
    let tensors = input_tensors(problem, data)?;
    let (dir, new) = (dir.as_ref(), !dir.as_ref().exists());
    std::fs::create_dir_all(dir).map_err(|e| Error::invalid(format!("{}: cannot be made: {e}", dir.display())))?;
    let mut json = format!("{:#}", spec::to_json(&problem.spec)).into_bytes();
    json.push(b'\n');
    let written = write_tensors(&dir.join("in.safetensors"), &tensors)
        .and_then(|()| write_atomically(&dir.join("block.json"), |file| file.write_all(&json)));
    if written.is_err() && new {
        // Nothing better can be done when even this fails; the first error is the one to report. A folder that holds more is not empty and stays.
        let _ = std::fs::remove_file(dir.join("in.safetensors"));
        let _ = std::fs::remove_dir(dir);
    }
    written
}

/// Writes `y` [B, S, E] and the caches after the append, `k` and `v` [B, G, kv_rows, D], in the compute dtype; those of a
/// quantised cache in f32.
///
/// # Errors
/// `InvalidInput` when the sequences have different numbers of new tokens, when a length does not fit, or when the file cannot be
/// written; there is no partial file then.
pub fn write_output(
    path: impl AsRef<Path>,
    problem: &BlockProblem,
    y: &[f32],
    k: &[f32],
    v: &[f32],
    kv_rows: usize,
) -> Result<()> {
    let (b, s) = uniform(problem)?;
    let a = &problem.spec.attention;
    let cache = [b, a.kv_heads, kv_rows, a.head_dim];
    let kv_dtype = if problem.kv_dtype.codes().is_some() { DType::F32 } else { problem.dtype };
    let tensors = [
        tensor("y", problem.dtype, &[b, s, problem.spec.hidden_size], y)?,
        tensor("k", kv_dtype, &cache, k)?,
        tensor("v", kv_dtype, &cache, v)?,
    ];
    write_tensors(path.as_ref(), &tensors)
}

/// B and S.
fn uniform(problem: &BlockProblem) -> Result<(usize, usize)> {
    let new = problem.batch.new_tokens();
    match new.iter().find(|&&n| n != new[0]) {
        Some(other) => Err(Error::invalid(format!(
            "a block file needs the same number of new tokens in every sequence, got {} and {other}",
            new[0]
        ))),
        None => Ok((new.len(), new[0])),
    }
}

fn input_tensors(problem: &BlockProblem, data: &BlockData) -> Result<Vec<Tensor>> {
    let (b, s) = uniform(problem)?;
    let (spec, a, dtype) = (&problem.spec, &problem.spec.attention, problem.dtype);
    let (e, p, w) = (spec.hidden_size, data.past_rows, problem.stored_weights());
    BlockWeights::from_data(spec, data)?.check(spec)?;
    let mut out = vec![
        tensor("x", dtype, &[b, s, e], &data.x)?,
        tensor("q_proj.weight", w, &[a.q_dim(), e], &data.q_weight)?,
        tensor("k_proj.weight", w, &[a.kv_dim(), e], &data.k_weight)?,
        tensor("v_proj.weight", w, &[a.kv_dim(), e], &data.v_weight)?,
        tensor("o_proj.weight", w, &[e, a.q_dim()], &data.o_weight)?,
    ];
    for (name, values) in [
        ("q_proj.bias", &data.q_bias),
        ("k_proj.bias", &data.k_bias),
        ("v_proj.bias", &data.v_bias),
        ("o_proj.bias", &data.o_bias),
        ("input_norm.weight", &data.input_norm),
        ("q_norm.weight", &data.q_norm),
        ("k_norm.weight", &data.k_norm),
        ("sinks", &data.sinks),
        ("alibi_slopes", &data.alibi_slopes),
    ] {
        if let Some(values) = values {
            out.push(tensor(name, DType::F32, &[values.len()], values)?);
        }
    }
    let cache = [b, a.kv_heads, p, a.head_dim];
    let kv_dtype = problem.kv_dtype.rounds_to(dtype);
    let past = [tensor("past_k", kv_dtype, &cache, &data.past_k)?, tensor("past_v", kv_dtype, &cache, &data.past_v)?];
    if p > 0 {
        out.extend(past);
    }
    let lengths = problem.batch.past();
    if let Some(long) = lengths.iter().find(|&&n| n > p) {
        return Err(Error::invalid(format!("a sequence has {long} past rows, but past_k and past_v have {p}")));
    }
    if lengths.iter().any(|&n| n != p) {
        let bytes = lengths.iter().flat_map(|&n| (n as i64).to_le_bytes()).collect();
        out.push(("lengths", StoredDType::I64, vec![b], bytes));
    }
    let shape = data.mask.as_ref().map(|m| m.shape);
    if shape != problem.mask {
        return Err(Error::invalid(format!("the mask given is {shape:?}, the problem's is {:?}", problem.mask)));
    }
    if let Some(mask) = &data.mask {
        let MaskShape { per_sequence, per_head } = mask.shape;
        let shape = [if per_sequence { b } else { 1 }, if per_head { a.heads } else { 1 }, s, p + s];
        if (mask.rows, mask.columns) != (s, p + s) || mask.data.len() != shape.iter().product::<usize>() {
            return Err(Error::invalid(format!(
                "the mask has {} rows, {} columns and {} elements, but {shape:?} is needed",
                mask.rows,
                mask.columns,
                mask.data.len()
            )));
        }
        out.push(("mask", StoredDType::U8, shape.to_vec(), mask.data.clone()));
    }
    Ok(out)
}

fn tensor(name: &'static str, dtype: DType, shape: &[usize], values: &[f32]) -> Result<Tensor> {
    let needed = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    if needed != Some(values.len()) {
        return Err(Error::invalid(format!("the tensor '{name}' needs the shape {shape:?}, got {} elements", values.len())));
    }
    Ok((name, stored_dtype(dtype), shape.to_vec(), encode(values, dtype)?))
}

fn write_tensors(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let borrowed: Vec<_> = tensors.iter().map(|(name, dtype, shape, bytes)| (*name, *dtype, &shape[..], &bytes[..])).collect();
    write_safetensors(path, &borrowed)
}
