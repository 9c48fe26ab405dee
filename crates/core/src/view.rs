//! Typed borrowed tensors: shapes and strides are checked once, when a view is made.

use std::{any::Any, fmt};

use half::{bf16, f16};

use crate::{DType, Error, Result};

/// Elements in a device's memory, borrowed. Which memory that is, only its backend knows.
#[derive(Clone, Copy)]
pub struct DeviceElements<'a> {
    memory: &'a (dyn Any + Send + Sync),
    dtype: DType,
    len: usize,
}

impl<'a> DeviceElements<'a> {
    /// The first `len` elements of `memory`.
    pub fn new(memory: &'a (dyn Any + Send + Sync), dtype: DType, len: usize) -> Self {
        DeviceElements { memory, dtype, len }
    }
    /// The memory.
    pub fn memory(&self) -> &'a (dyn Any + Send + Sync) {
        self.memory
    }
}

impl fmt::Debug for DeviceElements<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} elements of {} on a device", self.len, self.dtype)
    }
}

/// Elements in a device's memory, borrowed for writing.
pub struct DeviceElementsMut<'a> {
    memory: &'a mut (dyn Any + Send + Sync),
    dtype: DType,
    len: usize,
}

impl<'a> DeviceElementsMut<'a> {
    /// The first `len` elements of `memory`.
    pub fn new(memory: &'a mut (dyn Any + Send + Sync), dtype: DType, len: usize) -> Self {
        DeviceElementsMut { memory, dtype, len }
    }
    /// The same elements, borrowed for reading.
    pub fn as_ref(&self) -> DeviceElements<'_> {
        DeviceElements { memory: &*self.memory, dtype: self.dtype, len: self.len }
    }
}

impl fmt::Debug for DeviceElementsMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_ref().fmt(f)
    }
}

/// Borrowed elements of a [`TensorRef`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Storage<'a> {
    /// Host memory, f32.
    F32(&'a [f32]),
    /// Host memory, bf16.
    BF16(&'a [bf16]),
    /// Host memory, f16.
    F16(&'a [f16]),
    /// A device's memory.
    Device(DeviceElements<'a>),
}

/// Borrowed elements of a [`TensorMut`].
#[derive(Debug)]
#[non_exhaustive]
pub enum StorageMut<'a> {
    /// Host memory, f32.
    F32(&'a mut [f32]),
    /// Host memory, bf16.
    BF16(&'a mut [bf16]),
    /// Host memory, f16.
    F16(&'a mut [f16]),
    /// A device's memory.
    Device(DeviceElementsMut<'a>),
}

macro_rules! storage_from {
    ($($t:ty => $v:ident),*) => {$(
        impl<'a> From<&'a [$t]> for Storage<'a> {
            fn from(s: &'a [$t]) -> Self { Storage::$v(s) }
        }
        impl<'a> From<&'a Vec<$t>> for Storage<'a> {
            fn from(s: &'a Vec<$t>) -> Self { Storage::$v(s) }
        }
        impl<'a> From<&'a mut [$t]> for StorageMut<'a> {
            fn from(s: &'a mut [$t]) -> Self { StorageMut::$v(s) }
        }
        impl<'a> From<&'a mut Vec<$t>> for StorageMut<'a> {
            fn from(s: &'a mut Vec<$t>) -> Self { StorageMut::$v(s) }
        }
    )*};
}
storage_from!(f32 => F32, bf16 => BF16, f16 => F16);

impl<'a> From<DeviceElements<'a>> for Storage<'a> {
    fn from(d: DeviceElements<'a>) -> Self {
        Storage::Device(d)
    }
}
impl<'a> From<DeviceElementsMut<'a>> for StorageMut<'a> {
    fn from(d: DeviceElementsMut<'a>) -> Self {
        StorageMut::Device(d)
    }
}

impl Storage<'_> {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Storage::F32(_) => DType::F32,
            Storage::BF16(_) => DType::BF16,
            Storage::F16(_) => DType::F16,
            Storage::Device(d) => d.dtype,
        }
    }
    /// Whether the elements lie in host memory.
    pub fn is_host(&self) -> bool {
        !matches!(self, Storage::Device(_))
    }
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Storage::F32(s) => s.len(),
            Storage::BF16(s) => s.len(),
            Storage::F16(s) => s.len(),
            Storage::Device(d) => d.len,
        }
    }
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Address of the first element; null where it is not in host memory.
    pub fn as_ptr(&self) -> *const u8 {
        match self {
            Storage::F32(s) => s.as_ptr().cast(),
            Storage::BF16(s) => s.as_ptr().cast(),
            Storage::F16(s) => s.as_ptr().cast(),
            Storage::Device(_) => std::ptr::null(),
        }
    }
    /// Element `i` as f32.
    ///
    /// # Panics
    /// When `i` is out of bounds or the elements do not lie in host memory.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Storage::F32(s) => s[i],
            Storage::BF16(s) => s[i].to_f32(),
            Storage::F16(s) => s[i].to_f32(),
            Storage::Device(d) => panic!("{d:?} cannot be read one by one"),
        }
    }
}

impl StorageMut<'_> {
    /// The same elements, borrowed for reading.
    pub fn as_ref(&self) -> Storage<'_> {
        match self {
            StorageMut::F32(s) => Storage::F32(s),
            StorageMut::BF16(s) => Storage::BF16(s),
            StorageMut::F16(s) => Storage::F16(s),
            StorageMut::Device(d) => Storage::Device(d.as_ref()),
        }
    }
    /// Address of the first element; null where it is not in host memory.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        match self {
            StorageMut::F32(s) => s.as_mut_ptr().cast(),
            StorageMut::BF16(s) => s.as_mut_ptr().cast(),
            StorageMut::F16(s) => s.as_mut_ptr().cast(),
            StorageMut::Device(_) => std::ptr::null_mut(),
        }
    }
}

/// Most dimensions a view can have.
const MAX_RANK: usize = 4;

/// Shape and strides, in elements; dimensions past `rank` are 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [usize; MAX_RANK],
}

impl Layout {
    fn contiguous(shape: &[usize]) -> Result<(Self, usize)> {
        let mut layout = Layout { rank: shape.len(), shape: [1; MAX_RANK], strides: [0; MAX_RANK] };
        if shape.len() > MAX_RANK {
            return Err(Error::invalid(format!("a tensor has at most {MAX_RANK} dimensions, got {shape:?}")));
        }
        let mut len = 1usize;
        for (i, &n) in shape.iter().enumerate().rev() {
            layout.shape[i] = n;
            layout.strides[i] = len;
            len = len.checked_mul(n).ok_or_else(|| Error::invalid(format!("shape {shape:?} overflows")))?;
        }
        Ok((layout, len))
    }

    fn strided(shape: &[usize], strides: &[usize], len: usize) -> Result<Self> {
        let (mut layout, count) = Layout::contiguous(shape)?;
        if strides.len() != shape.len() {
            return Err(Error::invalid(format!("{} strides for the {} dimensions of {shape:?}", strides.len(), shape.len())));
        }
        let mut last = 0usize;
        for (i, (&n, &s)) in shape.iter().zip(strides).enumerate() {
            layout.strides[i] = s;
            last = (n.max(1) - 1)
                .checked_mul(s)
                .and_then(|x| x.checked_add(last))
                .ok_or_else(|| Error::invalid(format!("strides {strides:?} overflow")))?;
        }
        if count > 0 && last >= len {
            return Err(Error::invalid(format!("shape {shape:?} with strides {strides:?} reaches element {last} of {len}")));
        }
        Ok(layout)
    }
}

/// A borrowed, read-only tensor of run-time [`DType`]; strides count elements and may be 0 (broadcast).
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    data: Storage<'a>,
    layout: Layout,
}

/// A borrowed, writable tensor of run-time [`DType`]; always contiguous.
#[derive(Debug)]
pub struct TensorMut<'a> {
    data: StorageMut<'a>,
    layout: Layout,
}

impl<'a> TensorRef<'a> {
    /// A contiguous view of `data` (row-major).
    ///
    /// # Errors
    /// `InvalidInput` when the shape does not have as many elements as `data`.
    pub fn new(data: impl Into<Storage<'a>>, shape: &[usize]) -> Result<Self> {
        let data = data.into();
        let (layout, len) = Layout::contiguous(shape)?;
        if len != data.len() {
            return Err(Error::invalid(format!("shape {shape:?} needs {len} elements, got {}", data.len())));
        }
        Ok(TensorRef { data, layout })
    }

    /// A view with explicit `strides`, in elements.
    ///
    /// # Errors
    /// `InvalidInput` when an element lies outside `data`.
    pub fn strided(data: impl Into<Storage<'a>>, shape: &[usize], strides: &[usize]) -> Result<Self> {
        let data = data.into();
        let layout = Layout::strided(shape, strides, data.len())?;
        Ok(TensorRef { data, layout })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }
    /// Length of every dimension.
    pub fn shape(&self) -> &[usize] {
        &self.layout.shape[..self.layout.rank]
    }
    /// Elements between neighbours along every dimension.
    pub fn strides(&self) -> &[usize] {
        &self.layout.strides[..self.layout.rank]
    }
    /// The elements, in storage order.
    pub fn storage(&self) -> Storage<'a> {
        self.data
    }
    /// Whether the elements lie row-major without gaps.
    pub fn is_contiguous(&self) -> bool {
        let dense = Layout::contiguous(self.shape()).expect("the shape was checked when the view was made").0;
        (0..self.layout.rank).all(|i| self.layout.shape[i] <= 1 || self.layout.strides[i] == dense.strides[i])
    }
    /// All elements as f32, row-major.
    ///
    /// # Panics
    /// When they do not lie in host memory.
    pub fn to_f32(&self) -> Vec<f32> {
        let [a, b, c, d] = self.layout.shape;
        let s = self.layout.strides;
        let mut out = Vec::with_capacity(a * b * c * d);
        for i in 0..a {
            for j in 0..b {
                for k in 0..c {
                    out.extend((0..d).map(|l| self.data.get(i * s[0] + j * s[1] + k * s[2] + l * s[3])));
                }
            }
        }
        out
    }
}

impl<'a> TensorMut<'a> {
    /// A contiguous view of `data` (row-major).
    ///
    /// # Errors
    /// `InvalidInput` when the shape does not have as many elements as `data`.
    pub fn new(data: impl Into<StorageMut<'a>>, shape: &[usize]) -> Result<Self> {
        let data = data.into();
        let (layout, len) = Layout::contiguous(shape)?;
        if len != data.as_ref().len() {
            return Err(Error::invalid(format!("shape {shape:?} needs {len} elements, got {}", data.as_ref().len())));
        }
        Ok(TensorMut { data, layout })
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.data.as_ref().dtype()
    }
    /// Length of every dimension.
    pub fn shape(&self) -> &[usize] {
        &self.layout.shape[..self.layout.rank]
    }
    /// The same elements, borrowed for reading.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { data: self.data.as_ref(), layout: self.layout }
    }
    /// The elements, in storage order.
    pub fn storage_mut(&mut self) -> &mut StorageMut<'a> {
        &mut self.data
    }
}
