//! Block files: one attention block, its weights and its input as `block.json` and a safetensors file.

mod spec;
mod write;

use std::{collections::BTreeSet, path::Path};

use lawson_core::{
    CacheDType, DType, Error, Result, TensorRef, WeightKind,
    data::{BlockData, Mask},
    problem::{Biases, BlockProblem, BlockSpec, Lengths, MaskShape},
    round_to,
};
pub use write::{write_block_file, write_output};

use crate::{
    BlockWeights,
    tensor_file::{TensorFile, reserve},
};

/// In what form numbers that were read are computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Form {
    /// The compute dtype; that of `x` when `None`.
    pub dtype: Option<DType>,
    /// How the cache is held; in the compute dtype when `None`.
    pub kv_dtype: Option<CacheDType>,
    /// How the weights of projections are held.
    pub weights: WeightKind,
}

/// A block file that has been read and checked whole.
#[derive(Clone, Debug)]
pub struct BlockFile {
    problem: BlockProblem,
    data: BlockData,
    stored: Vec<(String, DType)>,
}

impl BlockFile {
    /// Reads `block_json` and `tensors`, as `form` says: x, weights and past are rounded to nearest even to their dtypes, the past of a quantised
    /// cache to the compute dtype, weights of projections in int8 to none.
    ///
    /// # Errors
    /// `InvalidInput`, naming the file and the key or tensor, for anything the format does not allow.
    pub fn open(block_json: impl AsRef<Path>, tensors: impl AsRef<Path>, form: Form) -> Result<Self> {
        let path = block_json.as_ref();
        let json = std::fs::read(path).map_err(|e| Error::invalid(format!("cannot be read: {e}")));
        let spec = json.and_then(|json| spec::parse(&json)).map_err(|e| e.at(path.display()))?;
        Self::read(spec, &TensorFile::open(tensors)?, form)
    }

    /// As [`BlockFile::open`], from a `block.json` in memory and an open tensor file.
    ///
    /// # Errors
    /// As [`BlockFile::open`].
    pub fn parse(json: &[u8], tensors: &TensorFile, form: Form) -> Result<Self> {
        Self::read(spec::parse(json).map_err(|e| e.at("block.json"))?, tensors, form)
    }

    fn read(spec: BlockSpec, file: &TensorFile, form: Form) -> Result<Self> {
        Reader::new(file).block(spec, None, form).map_err(|e| e.at(file.name()))
    }

    /// The block `spec` with `weights`, from a checkpoint say, on the input in `tensors`: `x`, and `past_k` with `past_v`, `lengths` and
    /// `mask` where given, as a block file has them; no weights may stand there.
    ///
    /// # Errors
    /// `InvalidInput`, naming the tensor, as [`BlockFile::open`], or when `weights` do not fit `spec`.
    pub fn with_weights(spec: BlockSpec, weights: &BlockWeights<'_>, tensors: &TensorFile, form: Form) -> Result<Self> {
        weights.check(&spec)?;
        Reader::new(tensors).block(spec, Some(weights), form).map_err(|e| e.at(tensors.name()))
    }

    /// What is computed: the spec, the batch (one entry of `lengths` for each sequence), the mask's shape and the dtypes.
    pub fn problem(&self) -> &BlockProblem {
        &self.problem
    }
    /// Weights and input; `past_rows` is P.
    pub fn data(&self) -> &BlockData {
        &self.data
    }
    /// Problem and data.
    pub fn into_parts(self) -> (BlockProblem, BlockData) {
        (self.problem, self.data)
    }
    /// Dtype in which the file holds the floating-point tensor `name`.
    pub fn stored_dtype(&self, name: &str) -> Option<DType> {
        self.stored.iter().find(|(n, _)| n == name).map(|&(_, dtype)| dtype)
    }
}

/// Takes tensors out of a file and remembers which were asked for.
struct Reader<'a> {
    file: &'a TensorFile,
    asked: BTreeSet<&'static str>,
    stored: Vec<(String, DType)>,
}

impl<'a> Reader<'a> {
    fn new(file: &'a TensorFile) -> Self {
        Reader { file, asked: BTreeSet::new(), stored: Vec::new() }
    }

    /// Reads everything; the weights too unless they are given.
    fn block(mut self, mut spec: BlockSpec, weights: Option<&BlockWeights<'_>>, form: Form) -> Result<BlockFile> {
        let (e, a) = (spec.hidden_size, spec.attention.clone());
        let x_shape = self.shape("x", "[B, S, E]")?.to_vec();
        let &[b, s, width] = x_shape.as_slice() else { return Err(wrong_shape("x", &x_shape, "[B, S, E]")) };
        if b == 0 || s == 0 || width != e {
            return Err(wrong_shape("x", &x_shape, &format!("[B, S, E] with B ≥ 1, S ≥ 1 and E = {e}")));
        }
        let dtype = match form.dtype {
            Some(dtype) => dtype,
            None => self.file.tensor("x")?.dtype(),
        };
        let past_rows = self.past_rows(b, a.kv_heads, a.head_dim)?;
        let rows = past_rows.checked_add(s).ok_or_else(|| Error::invalid(format!("P + S = {past_rows} + {s} overflows")))?;
        let past = self.lengths(b, past_rows)?;
        let mask = self.mask(b, a.heads, s, rows)?;
        if weights.is_none() {
            spec.biases = self.biases()?;
        }
        let problem = BlockProblem {
            batch: Lengths::ragged(vec![s; b], past)?,
            mask: mask.as_ref().map(|m| m.shape),
            dtype,
            weights: form.weights,
            kv_dtype: form.kv_dtype.unwrap_or(dtype.into()),
            page_size: None,
            spec,
        };
        problem.validate()?;

        let mut data = match weights {
            Some(weights) => given_weights(weights, problem.stored_weights())?,
            None => self.weights(&problem.spec, problem.stored_weights())?,
        };
        (data.past_rows, data.mask) = (past_rows, mask);
        data.x = self.floats("x", "[B, S, E]", &[b, s, e], dtype)?;
        if self.file.contains("past_k") {
            let cache = [b, a.kv_heads, past_rows, a.head_dim];
            let dtype = problem.kv_dtype.rounds_to(dtype);
            data.past_k = self.floats("past_k", "[B, G, P, D]", &cache, dtype)?;
            data.past_v = self.floats("past_v", "[B, G, P, D]", &cache, dtype)?;
        }
        self.finish(weights.is_some())?;
        Ok(BlockFile { problem, data, stored: self.stored })
    }

    /// Which projections have a bias, from the tensors there are.
    fn biases(&self) -> Result<Biases> {
        let packed = self.packed()? && self.file.contains("qkv_proj.bias");
        Ok(Biases {
            q: packed || self.file.contains("q_proj.bias"),
            k: packed || self.file.contains("k_proj.bias"),
            v: packed || self.file.contains("v_proj.bias"),
            o: self.file.contains("o_proj.bias"),
        })
    }

    /// The weights that `spec` asks for.
    fn weights(&mut self, spec: &BlockSpec, dtype: DType) -> Result<BlockData> {
        let (e, a, biases) = (spec.hidden_size, &spec.attention, &spec.biases);
        let (h, d, q_dim, kv_dim) = (a.heads, a.head_dim, a.q_dim(), a.kv_dim());
        let mut data = BlockData::default();
        if self.packed()? {
            let qkv = self.floats("qkv_proj.weight", "[(H+2G)·D, E]", &[a.qkv_dim(), e], dtype)?;
            [data.q_weight, data.k_weight, data.v_weight] = split(qkv, q_dim * e, kv_dim * e)?;
            if biases.q {
                let qkv = self.floats("qkv_proj.bias", "[(H+2G)·D]", &[a.qkv_dim()], DType::F32)?;
                let [q, k, v] = split(qkv, q_dim, kv_dim)?;
                (data.q_bias, data.k_bias, data.v_bias) = (Some(q), Some(k), Some(v));
            }
        } else {
            data.q_weight = self.floats("q_proj.weight", "[H·D, E]", &[q_dim, e], dtype)?;
            data.k_weight = self.floats("k_proj.weight", "[G·D, E]", &[kv_dim, e], dtype)?;
            data.v_weight = self.floats("v_proj.weight", "[G·D, E]", &[kv_dim, e], dtype)?;
            data.q_bias = self.vector("q_proj.bias", "[H·D]", q_dim, biases.q)?;
            data.k_bias = self.vector("k_proj.bias", "[G·D]", kv_dim, biases.k)?;
            data.v_bias = self.vector("v_proj.bias", "[G·D]", kv_dim, biases.v)?;
        }
        data.o_weight = self.floats("o_proj.weight", "[E, H·D]", &[e, q_dim], dtype)?;
        data.o_bias = self.vector("o_proj.bias", "[E]", e, biases.o)?;
        data.input_norm = self.vector("input_norm.weight", "[E]", e, spec.input_norm.is_some())?;
        data.q_norm = self.vector("q_norm.weight", "[D]", d, spec.qk_norm.is_some())?;
        data.k_norm = self.vector("k_norm.weight", "[D]", d, spec.qk_norm.is_some())?;
        data.sinks = self.vector("sinks", "[H]", h, a.sinks)?;
        data.alibi_slopes = self.vector("alibi_slopes", "[H]", h, a.alibi)?;
        Ok(data)
    }

    /// The shape of a required tensor.
    fn shape(&mut self, name: &'static str, letters: &str) -> Result<&[usize]> {
        self.asked.insert(name);
        if !self.file.contains(name) {
            return Err(Error::invalid(format!("the tensor '{name}' {letters} is missing")));
        }
        self.file.shape(name)
    }

    /// P, from the shape of `past_k`.
    fn past_rows(&mut self, b: usize, g: usize, d: usize) -> Result<usize> {
        match (self.file.contains("past_k"), self.file.contains("past_v")) {
            (false, false) => return Ok(0),
            (true, true) => {}
            (k, _) => {
                let (given, missing) = if k { ("past_k", "past_v") } else { ("past_v", "past_k") };
                return Err(Error::invalid(format!("the tensor '{given}' is given, but '{missing}' is missing")));
            }
        }
        match *self.shape("past_k", "[B, G, P, D]")? {
            [b1, g1, p, d1] if (b1, g1, d1) == (b, g, d) => Ok(p),
            ref other => Err(wrong_shape("past_k", other, &format!("[B, G, P, D] = [{b}, {g}, P, {d}]"))),
        }
    }

    fn lengths(&mut self, b: usize, past_rows: usize) -> Result<Vec<usize>> {
        if !self.file.contains("lengths") {
            let mut lengths = reserve(b)?;
            lengths.resize(b, past_rows);
            return Ok(lengths);
        }
        check_shape("lengths", self.shape("lengths", "[B]")?, "[B]", &[b])?;
        let lengths = self.file.integers("lengths")?;
        let one = |(i, v): (usize, i64)| {
            usize::try_from(v).ok().filter(|&v| v <= past_rows).ok_or_else(|| {
                Error::invalid(format!("the tensor 'lengths' must lie between 0 and P = {past_rows}, got {v} for sequence {i}"))
            })
        };
        lengths.into_iter().enumerate().map(one).collect()
    }

    fn mask(&mut self, b: usize, h: usize, s: usize, columns: usize) -> Result<Option<Mask>> {
        if !self.file.contains("mask") {
            return Ok(None);
        }
        let shape = self.shape("mask", "[B or 1, H or 1, S, P+S]")?;
        let fits = |n: usize, full: usize| n == full || n == 1;
        let shape = match *shape {
            [mb, mh, rows, c] if fits(mb, b) && fits(mh, h) && (rows, c) == (s, columns) => {
                MaskShape { per_sequence: mb != 1, per_head: mh != 1 }
            }
            ref other => {
                let needed = format!("[B or 1, H or 1, S, P+S] = [{b} or 1, {h} or 1, {s}, {columns}]");
                return Err(wrong_shape("mask", other, &needed));
            }
        };
        let flags = self.file.flags("mask")?;
        let mut data = reserve(flags.len())?;
        data.extend_from_slice(flags);
        Ok(Some(Mask { shape, rows: s, columns, data }))
    }

    /// Whether the projections are packed; also that exactly one of the two forms is there.
    fn packed(&self) -> Result<bool> {
        let packed = self.file.contains("qkv_proj.weight");
        let separate = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias"];
        match separate.into_iter().find(|name| self.file.contains(name)) {
            Some(name) if packed => Err(Error::invalid(format!(
                "the tensor '{name}' may not stand beside the packed 'qkv_proj.weight'; give one form"
            ))),
            _ if !packed && self.file.contains("qkv_proj.bias") => {
                Err(Error::invalid("the tensor 'qkv_proj.bias' needs the packed 'qkv_proj.weight', which is missing"))
            }
            _ => Ok(packed),
        }
    }

    /// A required tensor of exactly this shape, each element rounded to `dtype`.
    fn floats(&mut self, name: &'static str, letters: &str, shape: &[usize], dtype: DType) -> Result<Vec<f32>> {
        check_shape(name, self.shape(name, letters)?, letters, shape)?;
        let tensor = self.file.tensor(name)?;
        self.stored.push((name.to_owned(), tensor.dtype()));
        rounded(&tensor.as_ref(), dtype)
    }

    /// A tensor of one dimension, kept in f32, that the block asks for or not.
    fn vector(&mut self, name: &'static str, letters: &str, len: usize, asked: bool) -> Result<Option<Vec<f32>>> {
        if asked { self.floats(name, letters, &[len], DType::F32).map(Some) } else { Ok(None) }
    }

    /// Complains about a tensor that nobody asked for.
    fn finish(&self, weights_given: bool) -> Result<()> {
        const BY_KEY: [(&str, &str); 5] = [
            ("sinks", "sinks"),
            ("alibi_slopes", "alibi"),
            ("q_norm.weight", "qk_norm"),
            ("k_norm.weight", "qk_norm"),
            ("input_norm.weight", "input_norm"),
        ];
        let Some(name) = self.file.names().find(|&n| !self.asked.contains(n)) else { return Ok(()) };
        if weights_given {
            return Err(Error::invalid(format!(
                "unknown tensor '{name}'; accepted beside the weights of a checkpoint: x, past_k, past_v, lengths, mask"
            )));
        }
        Err(Error::invalid(match BY_KEY.iter().find(|(n, _)| *n == name) {
            Some((_, key)) => format!("the tensor '{name}' is given, but the block does not ask for it with the key '{key}'"),
            None => format!(
                "unknown tensor '{name}'; accepted: x, q_proj, k_proj, v_proj or qkv_proj and o_proj (.weight, .bias), past_k, past_v, \
                 lengths, mask, and sinks, alibi_slopes, q_norm.weight, k_norm.weight, input_norm.weight where the block asks for them"
            ),
        }))
    }
}

/// Weights that come from elsewhere; checked before.
fn given_weights(w: &BlockWeights<'_>, dtype: DType) -> Result<BlockData> {
    let vector = |t: &Option<TensorRef<'_>>| t.as_ref().map(|t| rounded(t, DType::F32)).transpose();
    Ok(BlockData {
        q_weight: rounded(&w.q_weight, dtype)?,
        k_weight: rounded(&w.k_weight, dtype)?,
        v_weight: rounded(&w.v_weight, dtype)?,
        o_weight: rounded(&w.o_weight, dtype)?,
        q_bias: vector(&w.q_bias)?,
        k_bias: vector(&w.k_bias)?,
        v_bias: vector(&w.v_bias)?,
        o_bias: vector(&w.o_bias)?,
        input_norm: vector(&w.input_norm)?,
        q_norm: vector(&w.q_norm)?,
        k_norm: vector(&w.k_norm)?,
        sinks: vector(&w.sinks)?,
        alibi_slopes: vector(&w.alibi_slopes)?,
        ..BlockData::default()
    })
}

/// The elements of `tensor`, row-major, each rounded to `dtype`.
fn rounded(tensor: &TensorRef<'_>, dtype: DType) -> Result<Vec<f32>> {
    if !tensor.is_contiguous() {
        return Ok(tensor.to_f32().into_iter().map(|v| round_to(dtype, v)).collect());
    }
    let storage = tensor.storage();
    let len = tensor.shape().iter().product();
    let mut values = reserve(len)?;
    values.extend((0..len).map(|i| round_to(dtype, storage.get(i))));
    Ok(values)
}

/// Splits a packed tensor into q, k and v.
fn split(mut qkv: Vec<f32>, q: usize, kv: usize) -> Result<[Vec<f32>; 3]> {
    let part = |range: &[f32]| {
        let mut v = reserve(range.len())?;
        v.extend_from_slice(range);
        Ok::<_, Error>(v)
    };
    let (k, v) = (part(&qkv[q..q + kv])?, part(&qkv[q + kv..])?);
    qkv.truncate(q);
    Ok([qkv, k, v])
}

fn check_shape(name: &str, found: &[usize], letters: &str, needed: &[usize]) -> Result<()> {
    if found == needed { Ok(()) } else { Err(wrong_shape(name, found, &format!("{letters} = {needed:?}"))) }
}

fn wrong_shape(name: &str, found: &[usize], needed: &str) -> Error {
    Error::invalid(format!("the tensor '{name}' has the shape {found:?}, but {needed} is needed"))
}
