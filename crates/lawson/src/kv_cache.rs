//! Keys and values of every layer of a model, for a fixed set of sequences.

use lawson_core::{DType, Error, Result, problem::AttentionSpec};
use lawson_cpu::{arena::AlignedBytes, kernels::rows::CacheRows, machine};
use lawson_cuda::{DeviceBuffer, kernels::cache::Cache, weights};

use crate::Context;

/// New tokens of each sequence of a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Batch(Vec<usize>);

impl Batch {
    /// `seq` new tokens for each of `sequences` sequences.
    ///
    /// # Errors
    /// `InvalidInput` when either is 0.
    pub fn uniform(sequences: usize, seq: usize) -> Result<Self> {
        Self::ragged(vec![seq; sequences])
    }

    /// `new[b]` new tokens for sequence b.
    ///
    /// # Errors
    /// `InvalidInput` when `new` is empty, holds a 0 or more than 2^24.
    pub fn ragged(new: Vec<usize>) -> Result<Self> {
        match new.iter().position(|&n| n == 0) {
            Some(b) => Err(Error::invalid(format!("sequence {b} of the batch has no new token; each needs at least one"))),
            None if new.is_empty() => Err(Error::invalid("a batch needs at least one sequence")),
            None if new.iter().any(|&n| n > 1 << 24) => Err(Error::invalid("a sequence gets at most 2^24 new tokens")),
            None => Ok(Batch(new)),
        }
    }

    /// New tokens of each sequence.
    pub fn new_tokens(&self) -> &[usize] {
        &self.0
    }

    /// New tokens of all sequences, T.
    pub fn tokens(&self) -> usize {
        self.0.iter().sum()
    }
}

/// Keys and values of every layer of a model, for B sequences of up to a fixed number of rows.
///
/// All layers share the sequences' lengths. A call of a block writes its layer's new rows behind them; [`KvCache::commit`] makes them
/// valid after the last layer, so that a failed call changes nothing.
pub struct KvCache {
    memory: Place,
    dtype: DType,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Rows that each sequence has room for, whole tiles.
    rows: usize,
    capacity: usize,
    lengths: Vec<usize>,
}

enum Place {
    Host(AlignedBytes),
    Device(DeviceBuffer),
}

impl KvCache {
    /// An empty cache of `layers` layers with the key/value heads of `spec`, for `sequences` sequences of up to `capacity` rows. The
    /// context decides where its memory lies.
    ///
    /// # Errors
    /// `InvalidInput` when a number is 0 or `spec` is not valid, `OutOfMemory`.
    pub fn new(
        context: &Context,
        spec: &AttentionSpec,
        layers: usize,
        sequences: usize,
        capacity: usize,
        dtype: DType,
    ) -> Result<Self> {
        spec.validate()?;
        for (what, n) in [("layers", layers), ("sequences", sequences), ("capacity", capacity)] {
            if n == 0 {
                return Err(Error::invalid(format!("a cache needs at least 1 of {what}, got 0")));
            }
        }
        let rows = capacity.checked_next_multiple_of(CacheRows::TILE);
        let product = [layers, 2, sequences, spec.kv_heads, spec.head_dim, dtype.size()];
        let bytes =
            product.iter().try_fold(rows.unwrap_or(usize::MAX), |n, &f| n.checked_mul(f)).filter(|&n| n <= isize::MAX as usize);
        let (Some(rows), Some(bytes)) = (rows, bytes) else {
            return Err(Error::invalid(format!(
                "a cache of {layers} layers, {sequences} sequences and {capacity} rows is too large"
            )));
        };
        let memory = match context.gpu() {
            Some(gpu) => {
                let buffer = gpu.device().alloc(bytes)?;
                buffer.fill(0)?;
                Place::Device(buffer)
            }
            None => Place::Host(AlignedBytes::new(bytes)?),
        };
        let (kv_heads, head_dim) = (spec.kv_heads, spec.head_dim);
        Ok(KvCache { memory, dtype, layers, kv_heads, head_dim, rows, capacity, lengths: vec![0; sequences] })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers
    }
    /// Key/value heads, G.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }
    /// Dimensions of a head, D.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }
    /// Most rows of a sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
    /// Valid rows of each sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.memory {
            Place::Host(m) => m.len(),
            Place::Device(m) => m.bytes(),
        }
    }

    /// Where all of it lies, for [`Context::read_loop`]; nothing where that is a device.
    pub fn memory(&self) -> Option<machine::Memory<'_>> {
        match &self.memory {
            Place::Host(m) => Some(machine::Memory::from(m)),
            Place::Device(_) => None,
        }
    }

    /// The cache of one layer, for one call.
    ///
    /// # Panics
    /// When `layer` is not less than [`KvCache::layers`].
    pub fn layer(&mut self, layer: usize) -> LayerCache<'_> {
        assert!(layer < self.layers, "layer {layer} of a cache of {} layers", self.layers);
        LayerCache { cache: self, layer }
    }

    /// Checks that `batch` has this cache's sequences and that its rows fit behind the valid ones.
    ///
    /// # Errors
    /// `InvalidInput`, naming the sequence.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        let new = batch.new_tokens();
        if new.len() != self.lengths.len() {
            return Err(Error::invalid(format!("a batch of {} sequences for a cache of {}", new.len(), self.lengths.len())));
        }
        for (b, (&n, &len)) in new.iter().zip(&self.lengths).enumerate() {
            if len.checked_add(n).is_none_or(|end| end > self.capacity) {
                return Err(Error::invalid(format!(
                    "sequence {b} has {len} rows and gets {n} more, but the cache has room for {}",
                    self.capacity
                )));
            }
        }
        Ok(())
    }

    /// Makes the rows that calls with `batch` wrote valid, in every layer.
    ///
    /// # Errors
    /// `InvalidInput` as [`KvCache::check`]; nothing changes then.
    pub fn commit(&mut self, batch: &Batch) -> Result<()> {
        self.check(batch)?;
        self.lengths.iter_mut().zip(batch.new_tokens()).for_each(|(len, n)| *len += n);
        Ok(())
    }

    /// Shortens sequence `b` to `len` rows.
    ///
    /// # Errors
    /// `InvalidInput` when there is no such sequence or it is shorter.
    pub fn truncate(&mut self, b: usize, len: usize) -> Result<()> {
        match self.lengths.get_mut(b) {
            Some(l) if len <= *l => *l = len,
            Some(l) => return Err(Error::invalid(format!("sequence {b} has {l} rows and cannot be truncated to {len}"))),
            None => return Err(Error::invalid(format!("sequence {b} of a cache of {} sequences", self.lengths.len()))),
        }
        Ok(())
    }

    /// Empties every sequence.
    pub fn reset(&mut self) {
        self.lengths.fill(0);
    }

    /// Copies of the first `rows` rows of sequence `b` in `layer`, each [G, rows, D] as f32: keys, values. Rows behind the valid ones that
    /// a call has written may be read before they are committed.
    ///
    /// # Errors
    /// `InvalidInput` when layer, sequence or rows are out of range; `Device` when the device failed.
    pub fn export(&self, layer: usize, b: usize, rows: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        self.check_rows(layer, b, rows)?;
        if let Place::Device(memory) = &self.memory {
            let copy = |keys: bool| -> Result<Vec<f32>> {
                let mut out = Vec::with_capacity(self.kv_heads * rows * self.head_dim);
                let mut bytes = vec![0u8; rows * self.head_dim * self.dtype.size()];
                for g in 0..self.kv_heads {
                    memory.read_at(self.offset(layer, keys, b, g) * self.dtype.size(), &mut bytes)?;
                    out.extend(weights::decode(&bytes, self.dtype));
                }
                Ok(out)
            };
            return Ok((copy(true)?, copy(false)?));
        }
        let cache = self.rows(layer)?;
        let copy = |keys: bool| {
            let mut out = Vec::with_capacity(self.kv_heads * rows * self.head_dim);
            for g in 0..self.kv_heads {
                for r in 0..rows {
                    let from = if keys { cache.k_row(b, g, r) } else { cache.v_row(b, g, r) };
                    // SAFETY: a row of the cache holds D elements of its dtype at an aligned address.
                    unsafe {
                        match self.dtype {
                            DType::BF16 => {
                                out.extend(
                                    std::slice::from_raw_parts(from.cast::<half::bf16>(), self.head_dim)
                                        .iter()
                                        .map(|v| v.to_f32()),
                                );
                            }
                            DType::F16 => {
                                out.extend(
                                    std::slice::from_raw_parts(from.cast::<half::f16>(), self.head_dim)
                                        .iter()
                                        .map(|v| v.to_f32()),
                                );
                            }
                            _ => out.extend_from_slice(std::slice::from_raw_parts(from.cast::<f32>(), self.head_dim)),
                        }
                    }
                }
            }
            out
        };
        Ok((copy(true), copy(false)))
    }

    /// Replaces sequence `b` of `layer` by `rows` rows of keys and values, each [G, rows, D] as f32, rounded to nearest even. The
    /// sequence then has `rows` valid rows, in every layer.
    ///
    /// # Errors
    /// `InvalidInput` when layer, sequence, rows or a length is out of range.
    pub fn import(&mut self, layer: usize, b: usize, rows: usize, k: &[f32], v: &[f32]) -> Result<()> {
        self.check_rows(layer, b, rows)?;
        let need = self.kv_heads * rows * self.head_dim;
        if k.len() != need || v.len() != need {
            return Err(Error::invalid(format!(
                "[G, {rows}, D] needs {need} elements, got {} of k and {} of v",
                k.len(),
                v.len()
            )));
        }
        if let Place::Device(memory) = &self.memory {
            let slab = rows * self.head_dim;
            for g in 0..self.kv_heads {
                for (keys, from) in [(true, k), (false, v)] {
                    let bytes = weights::encode(&from[g * slab..(g + 1) * slab], self.dtype);
                    memory.write_at(self.offset(layer, keys, b, g) * self.dtype.size(), &bytes)?;
                }
            }
            self.lengths[b] = rows;
            return Ok(());
        }
        let cache = self.rows(layer)?;
        let d = self.head_dim;
        for (i, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            let (g, r) = (i / rows, i % rows);
            for (from, to) in [(k, cache.k_row(b, g, r)), (v, cache.v_row(b, g, r))] {
                // SAFETY: a row of the cache holds D elements of its dtype at an aligned address, and `self` is borrowed mutably.
                unsafe {
                    match self.dtype {
                        DType::BF16 => {
                            let to = std::slice::from_raw_parts_mut(to.cast::<half::bf16>(), d);
                            to.iter_mut().zip(from).for_each(|(t, &f)| *t = half::bf16::from_f32(f));
                        }
                        DType::F16 => {
                            let to = std::slice::from_raw_parts_mut(to.cast::<half::f16>(), d);
                            to.iter_mut().zip(from).for_each(|(t, &f)| *t = half::f16::from_f32(f));
                        }
                        _ => std::slice::from_raw_parts_mut(to.cast::<f32>(), d).copy_from_slice(from),
                    }
                }
            }
        }
        self.lengths[b] = rows;
        Ok(())
    }

    fn check_rows(&self, layer: usize, b: usize, rows: usize) -> Result<()> {
        for (what, i, end) in [("layer", layer, self.layers), ("sequence", b, self.lengths.len())] {
            if i >= end {
                return Err(Error::invalid(format!("{what} {i} of a cache that has {end}")));
            }
        }
        if rows > self.capacity {
            return Err(Error::invalid(format!("{rows} rows of a cache that has room for {}", self.capacity)));
        }
        Ok(())
    }

    /// Elements from one head to the next, from one sequence to the next, and of all keys or values of a layer: [layer][keys,
    /// values][B][G][rows][D].
    fn strides(&self) -> (usize, usize, usize) {
        let head = self.rows * self.head_dim;
        let sequence = head * self.kv_heads;
        (head, sequence, sequence * self.lengths.len())
    }

    /// Where a head's rows begin, in elements.
    fn offset(&self, layer: usize, keys: bool, b: usize, g: usize) -> usize {
        let (head, sequence, half) = self.strides();
        (2 * layer + usize::from(!keys)) * half + b * sequence + g * head
    }

    /// Where the CPU's kernels find a layer.
    fn rows(&self, layer: usize) -> Result<CacheRows> {
        let Place::Host(memory) = &self.memory else {
            return Err(Error::invalid("the cache lies on a GPU, the block on the CPU; make both with one context"));
        };
        let (head_stride, sequence_stride, half) = self.strides();
        let half = half * self.dtype.size();
        let k = memory.as_ptr().wrapping_add(2 * layer * half);
        let v = k.wrapping_add(half);
        Ok(CacheRows { k, v, dtype: self.dtype, sequence_stride, head_stride, row_stride: self.head_dim })
    }

    /// Where the kernels of the GPU that `context` has find a layer.
    fn device_rows(&self, layer: usize, context: &Context) -> Result<Cache> {
        let here = |m: &DeviceBuffer| context.gpu().is_some_and(|gpu| gpu.device().stream() == m.device().stream());
        let Place::Device(memory) = &self.memory else {
            return Err(Error::invalid("the cache lies in host memory, the block on a GPU; make both with one context"));
        };
        if !here(memory) {
            return Err(Error::invalid("the cache was made with another context than the block"));
        }
        let (head, sequence, half) = self.strides();
        let k = memory.ptr() + (2 * layer * half * self.dtype.size()) as u64;
        Ok(Cache {
            k,
            v: k + (half * self.dtype.size()) as u64,
            sequence_stride: sequence as i64,
            head_stride: head as i64,
            row_stride: self.head_dim as i64,
            ..Cache::default()
        })
    }
}

/// One layer of a [`KvCache`], borrowed for one call.
pub struct LayerCache<'a> {
    cache: &'a mut KvCache,
    layer: usize,
}

impl LayerCache<'_> {
    pub(crate) fn cache(&self) -> &KvCache {
        self.cache
    }
    pub(crate) fn rows(&mut self) -> Result<CacheRows> {
        self.cache.rows(self.layer)
    }
    pub(crate) fn device_rows(&self, context: &Context) -> Result<Cache> {
        self.cache.device_rows(self.layer, context)
    }
}
