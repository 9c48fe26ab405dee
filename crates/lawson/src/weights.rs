//! The weights of one block, borrowed.

use std::ops::Range;

use lawson_core::{Error, Result, Storage, TensorRef, data::BlockData, problem::BlockSpec};

/// The weights of one block in host memory, in whatever dtypes they are stored: E hidden size, H query heads, G key/value heads, D head
/// dimension.
#[derive(Clone, Copy, Debug)]
pub struct BlockWeights<'a> {
    /// `[H·D, E]`.
    pub q_weight: TensorRef<'a>,
    /// `[G·D, E]`.
    pub k_weight: TensorRef<'a>,
    /// `[G·D, E]`.
    pub v_weight: TensorRef<'a>,
    /// `[E, H·D]`.
    pub o_weight: TensorRef<'a>,
    /// `[H·D]`.
    pub q_bias: Option<TensorRef<'a>>,
    /// `[G·D]`.
    pub k_bias: Option<TensorRef<'a>>,
    /// `[G·D]`.
    pub v_bias: Option<TensorRef<'a>>,
    /// `[E]`.
    pub o_bias: Option<TensorRef<'a>>,
    /// Weight of the input norm, `[E]`.
    pub input_norm: Option<TensorRef<'a>>,
    /// Weight of the norm of each head of q, `[D]`.
    pub q_norm: Option<TensorRef<'a>>,
    /// Weight of the norm of each head of k, `[D]`.
    pub k_norm: Option<TensorRef<'a>>,
    /// Extra logit of each head, `[H]`.
    pub sinks: Option<TensorRef<'a>>,
    /// ALiBi slope of each head, `[H]`.
    pub alibi_slopes: Option<TensorRef<'a>>,
}

impl<'a> BlockWeights<'a> {
    /// The four projections alone, without anything optional.
    pub fn new(q: TensorRef<'a>, k: TensorRef<'a>, v: TensorRef<'a>, o: TensorRef<'a>) -> Self {
        BlockWeights {
            q_weight: q,
            k_weight: k,
            v_weight: v,
            o_weight: o,
            q_bias: None,
            k_bias: None,
            v_bias: None,
            o_bias: None,
            input_norm: None,
            q_norm: None,
            k_norm: None,
            sinks: None,
            alibi_slopes: None,
        }
    }

    /// The weights of `data`, all f32.
    ///
    /// # Errors
    /// `InvalidInput`, naming the tensor, when a length does not fit `spec`.
    pub fn from_data(spec: &BlockSpec, data: &'a BlockData) -> Result<Self> {
        let s = Shapes::of(spec);
        let named = |name, values: &'a Vec<f32>, shape: &[usize]| TensorRef::new(values, shape).map_err(|e| e.at(name));
        let option =
            |name, values: &'a Option<Vec<f32>>, shape: &[usize]| values.as_ref().map(|v| named(name, v, shape)).transpose();
        Ok(BlockWeights {
            q_weight: named("q_proj.weight", &data.q_weight, &[s.q, s.e])?,
            k_weight: named("k_proj.weight", &data.k_weight, &[s.kv, s.e])?,
            v_weight: named("v_proj.weight", &data.v_weight, &[s.kv, s.e])?,
            o_weight: named("o_proj.weight", &data.o_weight, &[s.e, s.q])?,
            q_bias: option("q_proj.bias", &data.q_bias, &[s.q])?,
            k_bias: option("k_proj.bias", &data.k_bias, &[s.kv])?,
            v_bias: option("v_proj.bias", &data.v_bias, &[s.kv])?,
            o_bias: option("o_proj.bias", &data.o_bias, &[s.e])?,
            input_norm: option("input_norm.weight", &data.input_norm, &[s.e])?,
            q_norm: option("q_norm.weight", &data.q_norm, &[s.d])?,
            k_norm: option("k_norm.weight", &data.k_norm, &[s.d])?,
            sinks: option("sinks", &data.sinks, &[s.h])?,
            alibi_slopes: option("alibi_slopes", &data.alibi_slopes, &[s.h])?,
        })
    }

    /// The three parts of a packed tensor of (H + 2G)·D rows, `qkv_proj.weight` `[(H+2G)·D, E]` or `qkv_proj.bias` `[(H+2G)·D]`: all
    /// q rows, then all k, then all v.
    ///
    /// # Errors
    /// `InvalidInput` when the first dimension does not fit `spec`.
    pub fn split_qkv(packed: TensorRef<'a>, spec: &BlockSpec) -> Result<[TensorRef<'a>; 3]> {
        let (q, kv, all) = (spec.attention.q_dim(), spec.attention.kv_dim(), spec.attention.qkv_dim());
        if packed.shape().first() != Some(&all) {
            return Err(Error::invalid(format!(
                "a packed QKV tensor needs (H+2G)·D = {all} rows, got the shape {:?}",
                packed.shape()
            )));
        }
        Ok([rows(packed, 0..q)?, rows(packed, q..q + kv)?, rows(packed, q + kv..all)?])
    }

    /// Checks that every tensor lies in host memory and has the shape that `spec` needs, and that the optional ones are there exactly when
    /// `spec` asks.
    ///
    /// # Errors
    /// `InvalidInput`, naming the tensor as block files do, what was found and what is needed.
    pub fn check(&self, spec: &BlockSpec) -> Result<()> {
        let s = Shapes::of(spec);
        check_tensor("q_proj.weight", &self.q_weight, "[H·D, E]", &[s.q, s.e])?;
        check_tensor("k_proj.weight", &self.k_weight, "[G·D, E]", &[s.kv, s.e])?;
        check_tensor("v_proj.weight", &self.v_weight, "[G·D, E]", &[s.kv, s.e])?;
        check_tensor("o_proj.weight", &self.o_weight, "[E, H·D]", &[s.e, s.q])?;
        let (b, qk, a) = (&spec.biases, spec.qk_norm.is_some(), &spec.attention);
        for (name, tensor, asked, letters, n) in [
            ("q_proj.bias", &self.q_bias, b.q, "[H·D]", s.q),
            ("k_proj.bias", &self.k_bias, b.k, "[G·D]", s.kv),
            ("v_proj.bias", &self.v_bias, b.v, "[G·D]", s.kv),
            ("o_proj.bias", &self.o_bias, b.o, "[E]", s.e),
            ("input_norm.weight", &self.input_norm, spec.input_norm.is_some(), "[E]", s.e),
            ("q_norm.weight", &self.q_norm, qk, "[D]", s.d),
            ("k_norm.weight", &self.k_norm, qk, "[D]", s.d),
            ("sinks", &self.sinks, a.sinks, "[H]", s.h),
            ("alibi_slopes", &self.alibi_slopes, a.alibi, "[H]", s.h),
        ] {
            match (tensor, asked) {
                (Some(t), true) => check_tensor(name, t, letters, &[n])?,
                (None, false) => {}
                (None, true) => {
                    return Err(Error::invalid(format!(
                        "the block asks for the tensor '{name}' {letters} = [{n}], which is missing"
                    )));
                }
                (Some(_), false) => {
                    return Err(Error::invalid(format!("the tensor '{name}' is given, but the block does not ask for it")));
                }
            }
        }
        Ok(())
    }
}

/// Sizes of a block's tensors.
struct Shapes {
    e: usize,
    h: usize,
    d: usize,
    q: usize,
    kv: usize,
}

impl Shapes {
    fn of(spec: &BlockSpec) -> Self {
        let a = &spec.attention;
        Shapes { e: spec.hidden_size, h: a.heads, d: a.head_dim, q: a.q_dim(), kv: a.kv_dim() }
    }
}

/// Checks a tensor that is read when a block is built, which is done on the host.
fn check_tensor(name: &str, tensor: &TensorRef<'_>, letters: &str, needed: &[usize]) -> Result<()> {
    if !tensor.storage().is_host() {
        return Err(Error::invalid(format!("the tensor '{name}' lies on a device; weights are packed from host memory")));
    }
    if tensor.shape() == needed {
        return Ok(());
    }
    Err(Error::invalid(format!("the tensor '{name}' has the shape {:?}, but {letters} = {needed:?} is needed", tensor.shape())))
}

/// Some rows of a tensor, along its first dimension.
fn rows(tensor: TensorRef<'_>, range: Range<usize>) -> Result<TensorRef<'_>> {
    let mut shape = tensor.shape().to_vec();
    shape[0] = range.len();
    let start = range.start * tensor.strides()[0];
    match tensor.storage() {
        Storage::F32(s) => TensorRef::strided(&s[start.min(s.len())..], &shape, tensor.strides()),
        Storage::BF16(s) => TensorRef::strided(&s[start.min(s.len())..], &shape, tensor.strides()),
        Storage::F16(s) => TensorRef::strided(&s[start.min(s.len())..], &shape, tensor.strides()),
        _ => Err(Error::invalid("a packed QKV tensor must lie in host memory")),
    }
}
