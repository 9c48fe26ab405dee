//! Owned tensors, and tensors in device memory that the caller owns.

use std::ffi::c_void;

use half::{bf16, f16};
use lawson_core::{DType, DeviceElements, DeviceElementsMut, Error, ErrorKind, Result, Storage, TensorMut, TensorRef};
use lawson_cuda::{DeviceBuffer, Gpu};

use crate::Context;

#[derive(Clone, Debug)]
enum Data {
    F32(Vec<f32>),
    BF16(Vec<bf16>),
    F16(Vec<f16>),
}

/// A contiguous tensor on the host.
#[derive(Clone, Debug)]
pub struct Tensor {
    data: Data,
    shape: Vec<usize>,
}

impl Tensor {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// `InvalidInput` when the shape has more than four dimensions or overflows.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Self> {
        let len = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= isize::MAX as usize / 4);
        let Some(len) = len.filter(|_| shape.len() <= 4) else {
            return Err(Error::invalid(format!("a tensor of shape {shape:?} cannot be made")));
        };
        let data = match dtype {
            DType::BF16 => Data::BF16(vec![bf16::ZERO; len]),
            DType::F16 => Data::F16(vec![f16::ZERO; len]),
            _ => Data::F32(vec![0.0; len]),
        };
        Ok(Tensor { data, shape: shape.to_vec() })
    }

    /// `values`, row-major, rounded to nearest even in `dtype`.
    ///
    /// # Errors
    /// As [`Tensor::zeros`], and when the shape does not have as many elements as `values`.
    pub fn from_f32(values: &[f32], dtype: DType, shape: &[usize]) -> Result<Self> {
        let mut t = Self::zeros(dtype, shape)?;
        if values.len() != t.as_ref().storage().len() {
            return Err(Error::invalid(format!("shape {shape:?} does not have {} elements", values.len())));
        }
        match &mut t.data {
            Data::F32(d) => d.copy_from_slice(values),
            Data::BF16(d) => d.iter_mut().zip(values).for_each(|(d, &v)| *d = bf16::from_f32(v)),
            Data::F16(d) => d.iter_mut().zip(values).for_each(|(d, &v)| *d = f16::from_f32(v)),
        }
        Ok(t)
    }

    /// Length of every dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Borrowed for reading.
    pub fn as_ref(&self) -> TensorRef<'_> {
        let view = match &self.data {
            Data::F32(d) => TensorRef::new(d, &self.shape),
            Data::BF16(d) => TensorRef::new(d, &self.shape),
            Data::F16(d) => TensorRef::new(d, &self.shape),
        };
        view.expect("the data has the shape it was made with")
    }

    /// Borrowed for writing.
    pub fn as_mut(&mut self) -> TensorMut<'_> {
        let view = match &mut self.data {
            Data::F32(d) => TensorMut::new(d, &self.shape),
            Data::BF16(d) => TensorMut::new(d, &self.shape),
            Data::F16(d) => TensorMut::new(d, &self.shape),
        };
        view.expect("the data has the shape it was made with")
    }

    /// All elements as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        self.as_ref().to_f32()
    }
}

fn gpu_of(context: &Context) -> Result<&Gpu> {
    context.gpu().ok_or_else(|| Error::new(ErrorKind::Unavailable, "a tensor on a device needs a context of a GPU"))
}

/// Bytes of a tensor.
fn bytes_of(dtype: DType, shape: &[usize]) -> Result<usize> {
    let bytes = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d)).filter(|_| shape.len() <= 4);
    bytes.ok_or_else(|| Error::invalid(format!("a tensor of shape {shape:?} cannot be made")))
}

/// A contiguous tensor in a GPU's memory, its own or the caller's.
#[derive(Debug)]
pub struct DeviceTensor {
    buffer: DeviceBuffer,
    dtype: DType,
    shape: Vec<usize>,
}

impl DeviceTensor {
    /// A copy of `tensor` on the GPU of `context`.
    ///
    /// # Errors
    /// `Unavailable` when the context has none; `InvalidInput` when the tensor is not contiguous in host memory; `OutOfMemory` with the sizes.
    pub fn upload(context: &Context, tensor: &TensorRef<'_>) -> Result<Self> {
        let gpu = gpu_of(context)?;
        let buffer = match tensor.storage() {
            _ if !tensor.is_contiguous() => None,
            Storage::F32(s) => Some(gpu.device().upload(s)?),
            Storage::BF16(s) => Some(gpu.device().upload(s)?),
            Storage::F16(s) => Some(gpu.device().upload(s)?),
            _ => None,
        };
        let buffer = buffer.ok_or_else(|| Error::invalid("only contiguous tensors in host memory go to a device"))?;
        Ok(DeviceTensor { buffer, dtype: tensor.dtype(), shape: tensor.shape().to_vec() })
    }

    /// A tensor of NaN on the GPU of `context`.
    ///
    /// # Errors
    /// `Unavailable` when the context has none; `InvalidInput` when the shape has more than four dimensions or overflows; `OutOfMemory` with the
    /// sizes.
    pub fn nans(context: &Context, dtype: DType, shape: &[usize]) -> Result<Self> {
        let buffer = gpu_of(context)?.device().alloc(bytes_of(dtype, shape)?)?;
        let mut tensor = DeviceTensor { buffer, dtype, shape: shape.to_vec() };
        tensor.poison()?;
        Ok(tensor)
    }

    /// The tensor of `shape` that the caller, or another library, keeps at `pointer` in the memory of the context's GPU, contiguous and
    /// row-major. It is used where it lies and never freed; without elements the pointer may be null.
    ///
    /// ```no_run
    /// use std::ffi::c_void;
    ///
    /// use lawson::{Args, AttentionBlock, BlockSpec, BlockWeights, Context, ContextOptions, DType, Device, DeviceTensor};
    /// use lawson::{AttentionSpec, Batch, KvCache};
    ///
    /// /// y = block(x) of one sequence of `rows` tokens that another library keeps in bf16 on cuda:0 and works on in `stream`.
    /// ///
    /// /// # Safety
    /// /// x and y are its tensors `[rows, E]`, and all of them live until `stream` has done what is enqueued here.
    /// unsafe fn attend(
    ///     spec: BlockSpec,
    ///     weights: BlockWeights<'_>,
    ///     rows: usize,
    ///     [x, y, stream]: [*mut c_void; 3],
    /// ) -> lawson::Result<()> {
    ///     let options = ContextOptions { device: Device::Cuda(0), ..Default::default() };
    ///     // Its work and Lawson's then follow one another, and nobody waits.
    ///     // SAFETY: the caller's.
    ///     let context = unsafe { Context::with_cuda_stream(options, stream) }?;
    ///     let e = spec.hidden_size;
    ///     // SAFETY: the caller's.
    ///     let tensor = |at| unsafe { DeviceTensor::from_raw_parts(&context, at, DType::BF16, &[rows, e]) };
    ///     let (x, mut y) = (tensor(x)?, tensor(y)?);
    ///     let block = AttentionBlock::builder(spec, weights).dtype(DType::BF16).build(&context)?;
    ///     let mut cache = KvCache::new(&context, &block.spec().attention, 1, 1, rows, DType::BF16)?;
    ///     let batch = Batch::uniform(1, rows)?;
    ///     block.forward(Args { x: x.as_ref(), batch: &batch, mask: None, cache: cache.layer(0), y: y.as_mut() })
    /// }
    /// ```
    ///
    /// # Errors
    /// `Unavailable` when the context has no GPU; `InvalidInput` when the shape has more than four dimensions or overflows, or the elements are
    /// not all memory of that GPU or do not begin at a multiple of 16 bytes.
    ///
    /// # Safety
    /// The elements are the GPU's to use, in its primary context, until the tensor is dropped and all work enqueued with it is done. Whoever
    /// else writes what that work reads, or uses what it writes, comes before or behind it: in the context's stream
    /// ([`Context::with_cuda_stream`] takes the caller's), or after waiting for it ([`Context::synchronize`]). No other tensor of a call
    /// overlaps one that it writes.
    pub unsafe fn from_raw_parts(context: &Context, pointer: *mut c_void, dtype: DType, shape: &[usize]) -> Result<Self> {
        let (device, bytes) = (gpu_of(context)?.device(), bytes_of(dtype, shape)?);
        // SAFETY: the caller's.
        let buffer = unsafe { DeviceBuffer::from_raw_parts(device, pointer.addr() as u64, bytes) }?;
        Ok(DeviceTensor { buffer, dtype, shape: shape.to_vec() })
    }

    /// As [`DeviceTensor::upload`], `times` times behind one another along the first dimension.
    ///
    /// # Errors
    /// As there, and `InvalidInput` when the result has no first dimension or would overflow.
    pub fn repeat(context: &Context, tensor: &TensorRef<'_>, times: usize) -> Result<Self> {
        let one = Self::upload(context, tensor)?;
        let mut shape = one.shape.clone();
        let bytes = one.len() * one.dtype.size();
        let (Some(first), Some(all)) = (shape.first_mut(), bytes.checked_mul(times)) else {
            return Err(Error::invalid(format!("a tensor of shape {:?} cannot be repeated {times} times", one.shape)));
        };
        *first *= times;
        let buffer = one.buffer.device().alloc(all)?;
        (0..times).try_for_each(|i| buffer.copy_from(i * bytes, &one.buffer, 0, bytes))?;
        Ok(DeviceTensor { buffer, dtype: one.dtype, shape })
    }

    /// Overwrites it with `tensor`, of the same shape and dtype.
    ///
    /// # Errors
    /// `InvalidInput` when they differ or `tensor` is not contiguous in host memory.
    pub fn write(&mut self, tensor: &TensorRef<'_>) -> Result<()> {
        if tensor.shape() != self.shape || tensor.dtype() != self.dtype || !tensor.is_contiguous() {
            let (dtype, shape) = (tensor.dtype(), tensor.shape());
            return Err(Error::invalid(format!("{dtype} of {shape:?} over {} of {:?}", self.dtype, self.shape)));
        }
        match tensor.storage() {
            Storage::F32(s) => self.buffer.write(s),
            Storage::BF16(s) => self.buffer.write(s),
            Storage::F16(s) => self.buffer.write(s),
            _ => Err(Error::invalid("only tensors in host memory are written to a device")),
        }
    }

    /// Length of every dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// The memory.
    pub fn buffer(&self) -> &DeviceBuffer {
        &self.buffer
    }
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
    /// Borrowed for reading.
    pub fn as_ref(&self) -> TensorRef<'_> {
        let elements = DeviceElements::new(&self.buffer, self.dtype, self.len());
        TensorRef::new(elements, &self.shape).expect("the memory has the shape it was made with")
    }
    /// Borrowed for writing.
    pub fn as_mut(&mut self) -> TensorMut<'_> {
        let len = self.len();
        let elements = DeviceElementsMut::new(&mut self.buffer, self.dtype, len);
        TensorMut::new(elements, &self.shape).expect("the memory has the shape it was made with")
    }
    /// Enqueues making every element NaN, so that one that no step writes cannot pass for a result.
    ///
    /// # Errors
    /// `Device` with the driver's word.
    pub fn poison(&mut self) -> Result<()> {
        // All bits set are NaN in every dtype.
        self.buffer.fill(0xff)
    }
    /// The given rows of `width` elements as f32, one behind another; waits for the device.
    ///
    /// # Errors
    /// `InvalidInput` when the tensor does not have them; `Device` when the device failed.
    pub fn rows_to_f32(&self, rows: &[usize], width: usize) -> Result<Vec<f32>> {
        let bytes = width * self.dtype.size();
        let mut all = vec![0u8; rows.len() * bytes];
        for (row, to) in rows.iter().zip(all.chunks_exact_mut(bytes.max(1))) {
            self.buffer.read_at(row * bytes, to)?;
        }
        Ok(lawson_cuda::weights::decode(&all, self.dtype))
    }

    /// All elements as f32, row-major; waits for the device.
    ///
    /// # Errors
    /// `Device` when the device failed.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let bytes = self.buffer.to_vec::<u8>(self.len() * self.dtype.size())?;
        Ok(lawson_cuda::weights::decode(&bytes, self.dtype))
    }
}
