//! Keys and values of every layer of a model, for a fixed set of sequences.

mod codes;

use codes::CodeCache;
use lawson_core::{CacheDType, DType, Error, Result, problem::AttentionSpec};
use lawson_cpu::{
    arena::AlignedBytes,
    kernels::{
        codes::Cache as HostRows,
        rows::{CacheRows, store_row},
    },
    machine,
    simd::portable::Portable,
};
use lawson_cuda::{DeviceBuffer, Staging, kernels::cache::Cache, weights};

use crate::{
    Context,
    pages::{BlockTable, PagePool},
};

/// New tokens of each sequence of a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Batch(Vec<usize>);

impl Batch {
    /// `seq` new tokens for each of `sequences` sequences.
    ///
    /// # Errors
    /// `InvalidInput` when either is 0, `seq` is more than 2^24 or `sequences` more than memory can list.
    pub fn uniform(sequences: usize, seq: usize) -> Result<Self> {
        let mut new = Vec::new();
        if new.try_reserve_exact(sequences).is_err() {
            return Err(Error::invalid(format!("a batch of {sequences} sequences is too large")));
        }
        new.resize(sequences, seq);
        Self::ragged(new)
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

/// Block tables that may be on their way to the device at once.
const TABLES_UNDER_WAY: usize = 4;

/// Keys and values of every layer of a model, for B sequences of up to a fixed number of rows: contiguous ([`KvCache::new`]), or in pages
/// of a [`PagePool`] ([`KvCache::paged`]).
///
/// All layers share the sequences' lengths. A call of a block writes its layer's new rows behind them; [`KvCache::commit`] makes them
/// valid after the last layer, so that a failed call changes nothing.
pub struct KvCache {
    memory: Place,
    /// Of its elements; of keys that are not quantised yet where it holds codes.
    elements: DType,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Rows that lie one behind another: of a page, or all that a sequence has room for, whole tiles.
    rows: usize,
    capacity: usize,
    lengths: Vec<usize>,
}

enum Place {
    Host(AlignedBytes),
    Codes(CodeCache),
    Device(DeviceBuffer),
    Pages(Pages),
}

/// Pages of the sequences, with the table that kernels find them by.
struct Pages {
    table: BlockTable,
    pool: PagePool,
    /// The table on the device, [B, columns].
    on_device: DeviceBuffer,
    staging: Staging,
}

impl Pages {
    /// Takes the pages that are missing for sequence b to have `rows[b]` rows, and enqueues sending what is new in the table.
    fn reserve(&mut self, rows: impl Iterator<Item = usize> + Clone) -> Result<()> {
        self.table.reserve(rows)?;
        let unsent = self.table.unsent().map(|(at, entries)| (at * size_of::<i32>(), entries));
        if let Err(e) = self.staging.send_all(&self.on_device, unsent) {
            self.table.undo();
            return Err(e);
        }
        self.table.set_sent();
        Ok(())
    }
}

impl KvCache {
    /// Rows of a sequence's memory in a contiguous cache are a multiple of this.
    pub const ROW_TILE: usize = CacheRows::TILE;

    /// An empty cache of `layers` layers with the key/value heads of `spec`, for `sequences` sequences of up to `capacity` rows. The
    /// context decides where its memory lies. A quantised cache holds codes with scales, and has room for 64 keys of each sequence and
    /// head as f32: [`lawson_core::quantised`] defines it.
    ///
    /// # Errors
    /// `InvalidInput` when a number is 0 or `spec` is not valid, `OutOfMemory`; `Unavailable` for a quantised cache on a GPU.
    pub fn new(
        context: &Context,
        spec: &AttentionSpec,
        layers: usize,
        sequences: usize,
        capacity: usize,
        dtype: impl Into<CacheDType>,
    ) -> Result<Self> {
        let dtype = dtype.into();
        spec.validate()?;
        for (what, n) in [("layers", layers), ("sequences", sequences), ("capacity", capacity)] {
            if n == 0 {
                return Err(Error::invalid(format!("a cache needs at least 1 of {what}, got 0")));
            }
        }
        let (kv_heads, head_dim) = (spec.kv_heads, spec.head_dim);
        let too_large =
            || Error::invalid(format!("a cache of {layers} layers, {sequences} sequences and {capacity} rows is too large"));
        let rows = capacity.checked_next_multiple_of(CacheRows::TILE).ok_or_else(too_large)?;
        let bytes = |size: usize| {
            let product = [layers, 2, sequences, kv_heads, head_dim, size];
            let bytes = product.iter().try_fold(rows, |n, &f| n.checked_mul(f)).filter(|&n| n <= isize::MAX as usize);
            bytes.ok_or_else(too_large)
        };
        let (memory, elements) = match (context.gpu(), dtype) {
            (Some(gpu), _) => {
                let dtype = dtype.on_gpu()?;
                let buffer = gpu.device().alloc(bytes(dtype.size())?)?;
                buffer.fill(0)?;
                (Place::Device(buffer), dtype)
            }
            (None, CacheDType::Elements(dtype)) => (Place::Host(AlignedBytes::new(bytes(dtype.size())?)?), dtype),
            (None, CacheDType::Codes(codes)) => {
                let cache = CodeCache::new(codes, layers, sequences, [kv_heads, head_dim, rows])?;
                (Place::Codes(cache), DType::F32)
            }
        };
        Ok(KvCache { memory, elements, layers, kv_heads, head_dim, rows, capacity, lengths: vec![0; sequences] })
    }

    /// An empty cache for `sequences` sequences of up to `capacity` rows in pages of `pool`, which decides geometry and dtype.
    ///
    /// A sequence takes pages when a call of a block, [`KvCache::commit`] or [`KvCache::import`] needs rows behind its last one. It gives back
    /// those that it no longer needs when it is truncated, and all when the cache is reset or dropped. The capacity reserves nothing but its
    /// entries in the block table. Making and dropping a cache wait for the device; a sequence that ends is truncated to 0 rows instead.
    ///
    /// ```no_run
    /// use lawson::{AttentionSpec, Context, ContextOptions, DType, Device, KvCache, PagePool};
    ///
    /// let context = Context::new(ContextOptions { device: Device::Cuda(0), ..Default::default() })?;
    /// // 4096 pages of 64 rows for a model of 32 layers with 8 key/value heads of 128 dimensions: 32 GiB.
    /// let pool = PagePool::new(&context, &AttentionSpec::new(32, 8, 128), 32, 4096, 64, DType::BF16)?;
    /// // Any sequence of either cache may grow to 131072 rows, as long as there are pages.
    /// let long = KvCache::paged(&pool, 4, 131_072)?;
    /// let short = KvCache::paged(&pool, 64, 131_072)?;
    /// # Ok::<(), lawson::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidInput` when a number is 0 or too large; `OutOfMemory` when the block table does not fit.
    pub fn paged(pool: &PagePool, sequences: usize, capacity: usize) -> Result<Self> {
        if sequences == 0 || capacity == 0 {
            return Err(Error::invalid(format!(
                "a cache needs at least 1 sequence and 1 row, got {sequences} and a capacity of {capacity}"
            )));
        }
        let table = BlockTable::new(pool.free(), sequences, capacity)?;
        let (device, bytes) = (pool.memory().device(), table.len() * size_of::<i32>());
        let (on_device, staging) = (device.alloc(bytes)?, Staging::new(device, bytes, TABLES_UNDER_WAY)?);
        Ok(KvCache {
            elements: pool.dtype(),
            layers: pool.layers(),
            kv_heads: pool.kv_heads(),
            head_dim: pool.head_dim(),
            rows: pool.page_size(),
            capacity,
            lengths: vec![0; sequences],
            memory: Place::Pages(Pages { table, pool: pool.clone(), on_device, staging }),
        })
    }

    /// How it holds its elements.
    pub fn dtype(&self) -> CacheDType {
        match &self.memory {
            Place::Codes(c) => CacheDType::Codes(c.codes()),
            _ => self.elements.into(),
        }
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
    /// The pool that its pages are of, where it is paged.
    pub fn pool(&self) -> Option<&PagePool> {
        match &self.memory {
            Place::Pages(p) => Some(&p.pool),
            _ => None,
        }
    }
    /// Bytes held: of its pages, where it is paged.
    pub fn bytes(&self) -> usize {
        match &self.memory {
            Place::Host(m) => m.len(),
            Place::Codes(c) => c.memory().len(),
            Place::Device(m) => m.bytes(),
            Place::Pages(p) => p.table.pages() * (p.pool.bytes() / p.pool.pages()),
        }
    }

    /// Where all of it lies, for [`Context::read_loop`]; nothing where that is a device.
    pub fn memory(&self) -> Option<machine::Memory<'_>> {
        match &self.memory {
            Place::Host(m) => Some(machine::Memory::from(m)),
            Place::Codes(c) => Some(machine::Memory::from(c.memory())),
            Place::Device(_) | Place::Pages(_) => None,
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
    /// `InvalidInput`, naming the sequence; `OutOfMemory` when too few of the pool's pages are free.
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
        match &self.memory {
            Place::Pages(p) => p.table.check(ends(&self.lengths, batch)),
            _ => Ok(()),
        }
    }

    /// Takes the pages that a call with `batch` writes to, where the cache is paged, and enqueues sending the block table.
    ///
    /// # Errors
    /// As [`KvCache::check`], and `Device`; nothing changes then.
    pub(crate) fn reserve(&mut self, batch: &Batch) -> Result<()> {
        self.check(batch)?;
        match &mut self.memory {
            Place::Pages(p) => p.reserve(ends(&self.lengths, batch)),
            _ => Ok(()),
        }
    }

    /// Gives back the pages that the last [`KvCache::reserve`] took, after a call that failed.
    pub(crate) fn undo_reserve(&mut self) {
        if let Place::Pages(p) = &mut self.memory {
            p.table.undo();
        }
    }

    /// Makes the rows that calls with `batch`, the last ones in each layer, wrote valid.
    ///
    /// # Errors
    /// As [`KvCache::check`]; nothing changes then.
    pub fn commit(&mut self, batch: &Batch) -> Result<()> {
        self.reserve(batch)?;
        for (b, n) in batch.new_tokens().iter().enumerate() {
            self.set_len(b, self.lengths[b] + n);
        }
        Ok(())
    }

    /// Sets the valid rows of sequence `b`.
    fn set_len(&mut self, b: usize, len: usize) {
        match &mut self.memory {
            Place::Codes(c) => c.set_len(b, len, &mut self.lengths),
            _ => self.lengths[b] = len,
        }
    }

    /// Shortens sequence `b` to `len` rows; pages that hold none of them go back to the pool. Of a quantised cache, keys of a finished group
    /// keep what their codes give, and are quantised again with those that follow.
    ///
    /// # Errors
    /// `InvalidInput` when there is no such sequence or it is shorter.
    pub fn truncate(&mut self, b: usize, len: usize) -> Result<()> {
        match self.lengths.get(b) {
            Some(&l) if len <= l => self.set_len(b, len),
            Some(l) => return Err(Error::invalid(format!("sequence {b} has {l} rows and cannot be truncated to {len}"))),
            None => return Err(Error::invalid(format!("sequence {b} of a cache of {} sequences", self.lengths.len()))),
        }
        if let Place::Pages(p) = &mut self.memory {
            p.table.truncate(b, len);
        }
        Ok(())
    }

    /// Empties every sequence; all pages go back to the pool.
    pub fn reset(&mut self) {
        (0..self.lengths.len()).for_each(|b| self.set_len(b, 0));
        if let Place::Pages(p) = &mut self.memory {
            (0..self.lengths.len()).for_each(|b| p.table.truncate(b, 0));
        }
    }

    /// Copies of the first `rows` rows of sequence `b` in `layer`, each [G, rows, D] as f32: keys, values. Rows behind the valid ones that
    /// a call has written may be read before they are committed.
    ///
    /// # Errors
    /// `InvalidInput` when layer, sequence or rows are out of range; `Device` when the device failed.
    pub fn export(&self, layer: usize, b: usize, rows: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        self.check_rows(layer, b, rows)?;
        if let Place::Pages(p) = &self.memory
            && p.table.rows(b) < rows
        {
            return Err(Error::invalid(format!("{rows} rows of sequence {b}, which has pages for {}", p.table.rows(b))));
        }
        if let Some(memory) = self.device_memory() {
            let row_bytes = self.head_dim * self.elements.size();
            let copy = |keys: bool| -> Result<Vec<f32>> {
                let mut out = Vec::with_capacity(self.kv_heads * rows * self.head_dim);
                let mut bytes = vec![0u8; rows.min(self.rows) * row_bytes];
                for g in 0..self.kv_heads {
                    for first in (0..rows).step_by(self.rows) {
                        let run = &mut bytes[..(rows - first).min(self.rows) * row_bytes];
                        memory.read_at(self.offset(layer, keys, b, g, first) * self.elements.size(), run)?;
                        out.extend(weights::decode(run, self.elements));
                    }
                }
                Ok(out)
            };
            return Ok((copy(true)?, copy(false)?));
        }
        let (cache, d) = (self.rows(layer)?, self.head_dim);
        let len = match &self.memory {
            Place::Codes(c) => c.len(layer, b, rows, &self.lengths),
            _ => rows,
        };
        let mut out = [(); 2].map(|()| vec![0.0; self.kv_heads * rows * d]);
        for i in 0..self.kv_heads * rows {
            let ([k, v], head, row) = (out.each_mut().map(|o| o[i * d..][..d].as_mut_ptr()), [b, i / rows], i % rows);
            // SAFETY: the row is one of the cache's, and a row of the result has D elements.
            unsafe {
                cache.load_keys(Portable, head, row..row + 1, len, d, k, d);
                cache.load_value(Portable, head, row, d, v);
            }
        }
        let [k, v] = out;
        Ok((k, v))
    }

    /// Replaces sequence `b` of `layer` by `rows` rows of keys and values, each [G, rows, D] as f32, rounded to nearest even; a
    /// quantised cache takes them as they are. The sequence then has `rows` valid rows, in every layer.
    ///
    /// # Errors
    /// `InvalidInput` when layer, sequence, rows or a length is out of range; `OutOfMemory` when too few of the pool's pages are free;
    /// `Device`.
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
        if let Place::Pages(p) = &mut self.memory {
            p.reserve((0..self.lengths.len()).map(|i| if i == b { rows } else { 0 }))?;
        }
        if let Some(memory) = self.device_memory() {
            if let Err(e) = self.write_rows(memory, layer, b, rows, [k, v]) {
                self.undo_reserve();
                return Err(e);
            }
            self.lengths[b] = rows;
            if let Place::Pages(p) = &mut self.memory {
                p.table.truncate(b, rows);
            }
            return Ok(());
        }
        if let Place::Codes(c) = &mut self.memory {
            c.import(layer, b, rows, [k, v], &mut self.lengths);
            return Ok(());
        }
        let (HostRows::Elements(cache), d) = (self.rows(layer)?, self.head_dim) else { return Ok(()) };
        for (i, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            let (g, r) = (i / rows, i % rows);
            for (from, to) in [(k, cache.k_row(b, g, r)), (v, cache.v_row(b, g, r))] {
                // SAFETY: a row of the cache holds D elements of its dtype at an aligned address, and `self` is borrowed mutably.
                unsafe { store_row(Portable, cache.dtype, from.as_ptr(), to, d) };
            }
        }
        self.lengths[b] = rows;
        Ok(())
    }

    /// Writes [G, rows, D] of keys and of values to rows 0 … rows − 1 of sequence b in device memory, which are there.
    fn write_rows(&self, memory: &DeviceBuffer, layer: usize, b: usize, rows: usize, kv: [&[f32]; 2]) -> Result<()> {
        let d = self.head_dim;
        for g in 0..self.kv_heads {
            for (keys, from) in [true, false].into_iter().zip(kv) {
                for first in (0..rows).step_by(self.rows) {
                    let end = rows.min(first + self.rows);
                    let bytes = weights::encode(&from[(g * rows + first) * d..(g * rows + end) * d], self.elements);
                    memory.write_at(self.offset(layer, keys, b, g, first) * self.elements.size(), &bytes)?;
                }
            }
        }
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

    /// Memory on a GPU.
    fn device_memory(&self) -> Option<&DeviceBuffer> {
        match &self.memory {
            Place::Host(_) | Place::Codes(_) => None,
            Place::Device(memory) => Some(memory),
            Place::Pages(p) => Some(p.pool.memory()),
        }
    }

    /// Elements from one head to the next, from one sequence or page to the next, and of all keys or values of a layer: [layer][keys,
    /// values][B or pages][G][rows][D].
    fn strides(&self) -> (usize, usize, usize) {
        let head = self.rows * self.head_dim;
        let sequence = head * self.kv_heads;
        (head, sequence, sequence * self.pool().map_or(self.lengths.len(), PagePool::pages))
    }

    /// Where a row of a head lies, in elements.
    fn offset(&self, layer: usize, keys: bool, b: usize, g: usize, row: usize) -> usize {
        let (head, sequence, half) = self.strides();
        let (b, row) = match &self.memory {
            Place::Pages(p) => (p.table.page(b, row), row % self.rows),
            _ => (b, row),
        };
        (2 * layer + usize::from(!keys)) * half + b * sequence + g * head + row * self.head_dim
    }

    /// Where the CPU's kernels find a layer.
    fn rows(&self, layer: usize) -> Result<HostRows> {
        let memory = match &self.memory {
            Place::Host(memory) => memory,
            Place::Codes(c) => return Ok(HostRows::Codes(c.rows(layer, &self.lengths))),
            Place::Device(_) | Place::Pages(_) => {
                return Err(Error::invalid("the cache lies on a GPU, the block on the CPU; make both with one context"));
            }
        };
        let (head_stride, sequence_stride, half) = self.strides();
        let half = half * self.elements.size();
        let k = memory.as_ptr().wrapping_add(2 * layer * half);
        let v = k.wrapping_add(half);
        let (dtype, row_stride) = (self.elements, self.head_dim);
        Ok(HostRows::Elements(CacheRows { k, v, dtype, sequence_stride, head_stride, row_stride }))
    }

    /// Where the kernels of the GPU that `context` has find a layer. Those of a paged cache read its table when they run: rows that they reach
    /// have a page from [`KvCache::reserve`].
    fn device_rows(&self, layer: usize, context: &Context) -> Result<Cache> {
        let here = |m: &DeviceBuffer| context.gpu().is_some_and(|gpu| gpu.device().stream() == m.device().stream());
        let Some(memory) = self.device_memory() else {
            return Err(Error::invalid("the cache lies in host memory, the block on a GPU; make both with one context"));
        };
        if !here(memory) {
            return Err(Error::invalid("the cache was made with another context than the block"));
        }
        let (head, sequence, half) = self.strides();
        let k = memory.ptr() + (2 * layer * half * self.elements.size()) as u64;
        let (table, table_stride, page) = match &self.memory {
            Place::Pages(p) => (p.on_device.ptr(), p.table.columns() as i32, self.rows as i32),
            _ => (0, 0, self.rows as i32),
        };
        Ok(Cache {
            k,
            v: k + (half * self.elements.size()) as u64,
            table,
            sequence_stride: sequence as i64,
            head_stride: head as i64,
            row_stride: self.head_dim as i64,
            table_stride,
            page,
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
    pub(crate) fn rows(&mut self) -> Result<HostRows> {
        self.cache.rows(self.layer)
    }
    /// Notes that a call with `batch` has written its rows.
    pub(crate) fn wrote(&mut self, batch: &Batch) {
        if let Place::Codes(c) = &mut self.cache.memory {
            c.wrote(self.layer, ends(&self.cache.lengths, batch));
        }
    }
    pub(crate) fn device_rows(&self, context: &Context) -> Result<Cache> {
        self.cache.device_rows(self.layer, context)
    }
    /// As [`KvCache::reserve`].
    pub(crate) fn reserve(&mut self, batch: &Batch) -> Result<()> {
        self.cache.reserve(batch)
    }
    /// As [`KvCache::undo_reserve`].
    pub(crate) fn undo_reserve(&mut self) {
        self.cache.undo_reserve();
    }
}

/// Rows of each sequence behind a call with `batch`.
fn ends<'a>(lengths: &'a [usize], batch: &'a Batch) -> impl Iterator<Item = usize> + Clone + 'a {
    lengths.iter().zip(batch.new_tokens()).map(|(len, new)| len + new)
}
