//! A block's weights on the device.

use half::{bf16, f16};
use lawson_core::{DType, Result, TensorRef, problem::BlockSpec};

use crate::{Device, DeviceBuffer};

/// A block's weights as they are given: projections as tensors, the rest as f32.
pub struct Given<'a> {
    /// [H·D, E].
    pub q: TensorRef<'a>,
    /// [G·D, E].
    pub k: TensorRef<'a>,
    /// [G·D, E].
    pub v: TensorRef<'a>,
    /// [E, H·D].
    pub o: TensorRef<'a>,
    /// [H·D].
    pub q_bias: Option<Vec<f32>>,
    /// [G·D].
    pub k_bias: Option<Vec<f32>>,
    /// [G·D].
    pub v_bias: Option<Vec<f32>>,
    /// `[E]`.
    pub o_bias: Option<Vec<f32>>,
    /// `[E]`.
    pub input_norm: Option<Vec<f32>>,
    /// `[D]`.
    pub q_norm: Option<Vec<f32>>,
    /// `[D]`.
    pub k_norm: Option<Vec<f32>>,
    /// `[H]`.
    pub sinks: Option<Vec<f32>>,
    /// `[H]`.
    pub alibi_slopes: Option<Vec<f32>>,
}

/// A bias as kernels add it, f32, and as the library's epilogue does, in the dtype of its result.
pub(crate) struct Bias {
    pub f32: DeviceBuffer,
    pub narrow: DeviceBuffer,
}

/// A block's weights in its compute dtype, uploaded once.
pub struct DeviceWeights {
    /// [(H + 2G)·D, E]: all of q, then k, then v.
    pub(crate) qkv: DeviceBuffer,
    /// The same with each column multiplied by the input norm's weight.
    pub(crate) folded: Option<DeviceBuffer>,
    /// [E, H·D].
    pub(crate) o: DeviceBuffer,
    /// [(H + 2G)·D], zeros where a part has no bias.
    pub(crate) qkv_bias: Option<Bias>,
    pub(crate) o_bias: Option<Bias>,
    pub(crate) input_norm: Option<DeviceBuffer>,
    pub(crate) q_norm: Option<DeviceBuffer>,
    pub(crate) k_norm: Option<DeviceBuffer>,
    pub(crate) sinks: Option<DeviceBuffer>,
    pub(crate) alibi_slopes: Option<DeviceBuffer>,
}

/// Bytes of `values` rounded to nearest even in `dtype`.
pub fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_ne_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_ne_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
    }
}

/// The values of `bytes` in `dtype`.
pub fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_ne_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_ne_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

impl DeviceWeights {
    /// Uploads the weights of a block of `spec`, rounded to `dtype`.
    ///
    /// # Errors
    /// `OutOfMemory` with the sizes, `Device`.
    pub fn new(device: &Device, spec: &BlockSpec, given: &Given<'_>, dtype: DType) -> Result<Self> {
        let (a, e) = (&spec.attention, spec.hidden_size);
        let parts = [&given.q, &given.k, &given.v];
        // Part by part, so that the f32 copies of q, k and v do not exist at once.
        let concatenated = |scale: Option<&[f32]>| -> Result<DeviceBuffer> {
            let buffer = device.alloc(a.qkv_dim() * e * dtype.size())?;
            let mut offset = 0;
            for part in parts {
                let mut values = part.to_f32();
                if let Some(scale) = scale {
                    values.chunks_exact_mut(e).for_each(|row| row.iter_mut().zip(scale).for_each(|(v, s)| *v *= s));
                }
                let bytes = encode(&values, dtype);
                buffer.write_at(offset, &bytes)?;
                offset += bytes.len();
            }
            Ok(buffer)
        };
        let f32s = |v: &Option<Vec<f32>>| v.as_ref().map(|v| device.upload(v)).transpose();
        let bias =
            |v: Vec<f32>| -> Result<Bias> { Ok(Bias { narrow: device.upload(&encode(&v, dtype))?, f32: device.upload(&v)? }) };
        let lengths = [a.q_dim(), a.kv_dim(), a.kv_dim()];
        let biases = [&given.q_bias, &given.k_bias, &given.v_bias];
        let qkv_bias = biases.iter().any(|b| b.is_some()).then(|| {
            let part = |(b, n): (&&Option<Vec<f32>>, usize)| (*b).clone().unwrap_or_else(|| vec![0.0; n]);
            biases.iter().zip(lengths).flat_map(part).collect::<Vec<f32>>()
        });
        Ok(DeviceWeights {
            qkv: concatenated(None)?,
            folded: given.input_norm.as_deref().map(|w| concatenated(Some(w))).transpose()?,
            o: device.upload(&encode(&given.o.to_f32(), dtype))?,
            qkv_bias: qkv_bias.map(bias).transpose()?,
            o_bias: given.o_bias.clone().map(bias).transpose()?,
            input_norm: f32s(&given.input_norm)?,
            q_norm: f32s(&given.q_norm)?,
            k_norm: f32s(&given.k_norm)?,
            sinks: f32s(&given.sinks)?,
            alibi_slopes: f32s(&given.alibi_slopes)?,
        })
    }

    /// Of attention alone, `[H]` each.
    ///
    /// # Errors
    /// As [`DeviceWeights::new`].
    pub fn of_attention(device: &Device, sinks: Option<&[f32]>, slopes: Option<&[f32]>) -> Result<Self> {
        let f32s = |v: Option<&[f32]>| v.map(|v| device.upload(v)).transpose();
        Ok(DeviceWeights {
            qkv: device.alloc(0)?,
            folded: None,
            o: device.alloc(0)?,
            qkv_bias: None,
            o_bias: None,
            input_norm: None,
            q_norm: None,
            k_norm: None,
            sinks: f32s(sinks)?,
            alibi_slopes: f32s(slopes)?,
        })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let biases = [&self.qkv_bias, &self.o_bias].into_iter().flatten().flat_map(|b| [&b.f32, &b.narrow]);
        let small = [&self.input_norm, &self.q_norm, &self.k_norm, &self.sinks, &self.alibi_slopes, &self.folded];
        [&self.qkv, &self.o].into_iter().chain(biases).chain(small.into_iter().flatten()).map(DeviceBuffer::bytes).sum()
    }
}
