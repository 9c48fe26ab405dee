//! Pages of key/value caches: a pool of them on a GPU, which of them are free, and where the rows of a sequence lie.

use std::sync::{Arc, Mutex};

use lawson_core::{
    CacheDType, DType, Error, ErrorKind, Result,
    problem::{AttentionSpec, check_page_size, pages_need_a_gpu},
};
use lawson_cuda::DeviceBuffer;

use crate::{Context, context::lock};

/// A pool of pages on a GPU, shared by the caches of one geometry (PagedAttention, arXiv:2309.06180).
///
/// A page holds a fixed number of rows of keys and values of one sequence, in every layer. The caches made with
/// [`KvCache::paged`](crate::KvCache::paged) take pages as their sequences grow and give them back when these are truncated or the cache is
/// dropped, so that sequences of different lengths share the memory without reserving their capacity. Pages are not cleared: rows hold
/// anything until a call writes them. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct PagePool(Arc<Pool>);

struct Pool {
    /// [layers][keys, values][pages][G][rows of a page][D].
    memory: DeviceBuffer,
    free: Arc<FreePages>,
    dtype: DType,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl PagePool {
    /// A pool of `pages` pages of `page_size` rows (32, 64 or 128) each, for caches of `layers` layers with the key/value heads of `spec`.
    ///
    /// # Errors
    /// `Unavailable` when the context has no GPU; `InvalidInput` when a number is out of range or `spec` is not valid; `OutOfMemory`.
    pub fn new(
        context: &Context,
        spec: &AttentionSpec,
        layers: usize,
        pages: usize,
        page_size: usize,
        dtype: impl Into<CacheDType>,
    ) -> Result<Self> {
        let dtype = dtype.into().on_gpu()?;
        let gpu = context.gpu().ok_or_else(pages_need_a_gpu)?;
        spec.validate()?;
        check_page_size(page_size)?;
        for (what, n) in [("layers", layers), ("pages", pages)] {
            if n == 0 {
                return Err(Error::invalid(format!("a pool of pages needs at least 1 of {what}, got 0")));
            }
        }
        let (kv_heads, head_dim) = (spec.kv_heads, spec.head_dim);
        let product = [2, pages, kv_heads, page_size, head_dim, dtype.size()];
        let bytes = product.iter().try_fold(layers, |n, &f| n.checked_mul(f)).filter(|&n| n <= isize::MAX as usize);
        let Some(bytes) = bytes.filter(|_| i32::try_from(pages).is_ok()) else {
            return Err(Error::invalid(format!("a pool of {pages} pages of {page_size} rows for {layers} layers is too large")));
        };
        let (memory, free) = (gpu.device().alloc(bytes)?, Arc::new(FreePages::new(pages, page_size)));
        Ok(PagePool(Arc::new(Pool { memory, free, dtype, layers, kv_heads, head_dim })))
    }

    /// Rows of a page.
    pub fn page_size(&self) -> usize {
        self.0.free.page_size
    }
    /// Pages, free or not.
    pub fn pages(&self) -> usize {
        self.0.free.pages
    }
    /// Pages that no sequence has.
    pub fn free_pages(&self) -> usize {
        lock(&self.0.free.free).len()
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }
    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.0.layers
    }
    /// Key/value heads, G.
    pub fn kv_heads(&self) -> usize {
        self.0.kv_heads
    }
    /// Dimensions of a head, D.
    pub fn head_dim(&self) -> usize {
        self.0.head_dim
    }
    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        self.0.memory.bytes()
    }

    pub(crate) fn memory(&self) -> &DeviceBuffer {
        &self.0.memory
    }
    pub(crate) fn free(&self) -> &Arc<FreePages> {
        &self.0.free
    }
}

/// The pages of a pool that no sequence has.
pub(crate) struct FreePages {
    page_size: usize,
    pages: usize,
    /// The last given back is the next taken.
    free: Mutex<Vec<i32>>,
}

impl FreePages {
    fn new(pages: usize, page_size: usize) -> Self {
        FreePages { page_size, pages, free: Mutex::new((0..pages as i32).collect()) }
    }

    fn exhausted(&self, needed: usize, free: usize) -> Error {
        let (rows, pages) = (self.page_size, self.pages);
        Error::new(
            ErrorKind::OutOfMemory,
            format!("the sequences need {needed} more pages of {rows} rows, and {free} of the pool's {pages} are free"),
        )
    }
}

/// Which pages hold the rows of each sequence of a cache.
pub(crate) struct BlockTable {
    free: Arc<FreePages>,
    /// Most pages of a sequence.
    columns: usize,
    /// [B, columns]; of each sequence the first `held` are pages, in the order of its rows.
    entries: Vec<i32>,
    held: Vec<usize>,
    /// Pages of each sequence that the last reservation took.
    taken: Vec<usize>,
    /// Leading entries of each sequence that stand in the table on the device.
    sent: Vec<usize>,
}

impl BlockTable {
    /// A table for `sequences` sequences of up to `capacity` rows, without pages.
    pub fn new(free: &Arc<FreePages>, sequences: usize, capacity: usize) -> Result<Self> {
        let columns = capacity.div_ceil(free.page_size);
        let mut entries = Vec::new();
        let fits = |n: &usize| *n <= i32::MAX as usize && entries.try_reserve_exact(*n).is_ok();
        let Some(len) = sequences.checked_mul(columns).filter(fits) else {
            return Err(Error::invalid(format!("a cache of {sequences} sequences and {capacity} rows is too large")));
        };
        entries.resize(len, 0);
        let counts = || vec![0; sequences];
        Ok(BlockTable { free: Arc::clone(free), columns, entries, held: counts(), taken: counts(), sent: counts() })
    }

    /// Most pages of a sequence.
    pub fn columns(&self) -> usize {
        self.columns
    }
    /// Entries, used or not.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    /// Pages of all sequences.
    pub fn pages(&self) -> usize {
        self.held.iter().sum()
    }
    /// Rows of sequence `b` that have a page.
    pub fn rows(&self, b: usize) -> usize {
        self.held[b] * self.free.page_size
    }
    /// The page of `row` of sequence `b`, which has one.
    pub fn page(&self, b: usize, row: usize) -> usize {
        self.entries[b * self.columns + row / self.free.page_size] as usize
    }

    /// Pages that are missing for sequence b to have `rows[b]` rows.
    fn missing(&self, rows: impl Iterator<Item = usize>) -> usize {
        rows.zip(&self.held).map(|(rows, &held)| rows.div_ceil(self.free.page_size).saturating_sub(held)).sum()
    }

    /// Whether sequence b can have `rows[b]` rows, at most the capacity.
    ///
    /// # Errors
    /// `OutOfMemory` when the pool has too few pages.
    pub fn check(&self, rows: impl Iterator<Item = usize>) -> Result<()> {
        let (needed, free) = (self.missing(rows), lock(&self.free.free).len());
        if needed > free { Err(self.free.exhausted(needed, free)) } else { Ok(()) }
    }

    /// Takes the pages that are missing for sequence b to have `rows[b]` rows, at most the capacity: all of them, or none.
    ///
    /// # Errors
    /// `OutOfMemory` when the pool has too few.
    pub fn reserve(&mut self, rows: impl Iterator<Item = usize> + Clone) -> Result<()> {
        self.taken.fill(0);
        let needed = self.missing(rows.clone());
        if needed == 0 {
            return Ok(());
        }
        let mut free = lock(&self.free.free);
        if needed > free.len() {
            return Err(self.free.exhausted(needed, free.len()));
        }
        for (b, rows) in rows.enumerate() {
            let missing = rows.div_ceil(self.free.page_size).saturating_sub(self.held[b]);
            let (at, rest) = (b * self.columns + self.held[b], free.len() - missing);
            self.entries[at..at + missing].iter_mut().zip(free.drain(rest..).rev()).for_each(|(entry, page)| *entry = page);
            self.held[b] += missing;
            self.taken[b] = missing;
        }
        Ok(())
    }

    /// Gives back what the last [`BlockTable::reserve`] took.
    pub fn undo(&mut self) {
        for b in 0..self.held.len() {
            let taken = std::mem::take(&mut self.taken[b]);
            self.keep(b, self.held[b] - taken);
        }
    }

    /// Gives back the pages of sequence `b` behind its first `rows` rows.
    pub fn truncate(&mut self, b: usize, rows: usize) {
        self.taken[b] = 0;
        self.keep(b, rows.div_ceil(self.free.page_size));
    }

    fn keep(&mut self, b: usize, pages: usize) {
        if pages < self.held[b] {
            let at = b * self.columns;
            lock(&self.free.free).extend(self.entries[at + pages..at + self.held[b]].iter().rev());
            self.held[b] = pages;
            self.sent[b] = self.sent[b].min(pages);
        }
    }

    /// Runs of entries that the table on the device lacks, each with the index of its first.
    pub fn unsent(&self) -> impl Iterator<Item = (usize, &[i32])> + Clone {
        let run = |b: usize| (b * self.columns + self.sent[b], &self.entries[b * self.columns..][self.sent[b]..self.held[b]]);
        (0..self.held.len()).map(run).filter(|(_, run)| !run.is_empty())
    }

    /// All entries stand in the table on the device now.
    pub fn set_sent(&mut self) {
        self.sent.copy_from_slice(&self.held);
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        (0..self.held.len()).for_each(|b| self.keep(b, 0));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use lawson_testkit::rng::Rng;

    use super::*;

    fn pool(pages: usize) -> Arc<FreePages> {
        Arc::new(FreePages::new(pages, 32))
    }

    fn table(pool: &Arc<FreePages>, sequences: usize, capacity: usize) -> BlockTable {
        BlockTable::new(pool, sequences, capacity).expect("a small table")
    }

    fn reserve(table: &mut BlockTable, rows: &[usize]) -> Result<()> {
        table.reserve(rows.iter().copied())
    }

    fn free(pool: &FreePages) -> usize {
        lock(&pool.free).len()
    }

    /// The pages of sequence `b`.
    fn pages(table: &BlockTable, b: usize) -> Vec<usize> {
        (0..table.rows(b)).step_by(32).map(|row| table.page(b, row)).collect()
    }

    /// Sends the entries that `device` lacks.
    fn send(table: &mut BlockTable, device: &mut [i32]) {
        table.unsent().for_each(|(at, run)| device[at..at + run.len()].copy_from_slice(run));
        table.set_sent();
        assert_eq!(table.unsent().count(), 0);
    }

    #[test]
    fn sequences_take_pages_as_they_grow() {
        let pool = pool(8);
        let mut table = table(&pool, 2, 100);
        assert_eq!((table.columns(), table.len(), table.pages(), free(&pool)), (4, 8, 0, 8));
        reserve(&mut table, &[1, 33]).expect("three pages");
        assert_eq!((table.rows(0), table.rows(1), free(&pool)), (32, 64, 5));
        reserve(&mut table, &[32, 64]).expect("nothing more");
        assert_eq!((table.pages(), free(&pool)), (3, 5));
        let before = pages(&table, 1);
        reserve(&mut table, &[33, 65]).expect("two pages");
        assert_eq!(pages(&table, 1)[..2], before, "rows stay where they are");
        assert_eq!((table.rows(0), table.rows(1), free(&pool)), (64, 96, 3));
        drop(table);
        assert_eq!(free(&pool), 8);
    }

    #[test]
    fn an_exhausted_pool_is_refused_with_numbers_and_changes_nothing() {
        let pool = pool(4);
        let mut table = table(&pool, 2, 1000);
        reserve(&mut table, &[64, 32]).expect("three pages");
        let before = (pages(&table, 0), pages(&table, 1), free(&pool));
        for refused in [table.check([65, 33].into_iter()).unwrap_err(), reserve(&mut table, &[65, 33]).unwrap_err()] {
            assert_eq!(refused.kind(), ErrorKind::OutOfMemory);
            assert_eq!(refused.to_string(), "the sequences need 2 more pages of 32 rows, and 1 of the pool's 4 are free");
        }
        assert_eq!((pages(&table, 0), pages(&table, 1), free(&pool)), before);
        reserve(&mut table, &[65, 32]).expect("the last page");
        assert_eq!(free(&pool), 0);
    }

    #[test]
    fn a_failed_call_gives_back_what_it_took_and_no_more() {
        let pool = pool(8);
        let mut table = table(&pool, 2, 1000);
        reserve(&mut table, &[10, 40]).expect("three pages");
        let before = (pages(&table, 0), pages(&table, 1));
        reserve(&mut table, &[40, 100]).expect("three pages");
        table.undo();
        assert_eq!((pages(&table, 0), pages(&table, 1), free(&pool)), (before.0.clone(), before.1.clone(), 5));
        table.undo();
        reserve(&mut table, &[10, 40]).expect("nothing");
        table.undo();
        assert_eq!((pages(&table, 0), pages(&table, 1), free(&pool)), (before.0.clone(), before.1, 5));
        reserve(&mut table, &[40, 100]).expect("three pages");
        table.truncate(1, 0);
        table.undo();
        assert_eq!((pages(&table, 0), pages(&table, 1), free(&pool)), (before.0, vec![], 7));
    }

    #[test]
    fn truncating_gives_back_whole_pages() {
        let pool = pool(8);
        let mut table = table(&pool, 1, 1000);
        reserve(&mut table, &[200]).expect("seven pages");
        for (rows, left) in [(200, 7), (193, 7), (192, 6), (33, 2), (32, 1), (1, 1), (0, 0)] {
            table.truncate(0, rows);
            assert_eq!((table.pages(), free(&pool)), (left, 8 - left), "{rows} rows");
        }
    }

    #[test]
    fn the_device_gets_what_it_lacks() {
        let pool = pool(16);
        let mut table = table(&pool, 3, 128);
        let mut device = vec![-1; table.len()];
        reserve(&mut table, &[70, 0, 32]).expect("four pages");
        send(&mut table, &mut device);
        reserve(&mut table, &[70, 1, 33]).expect("two pages");
        assert_eq!(table.unsent().map(|(at, run)| (at, run.len())).collect::<Vec<_>>(), [(4, 1), (9, 1)]);
        send(&mut table, &mut device);
        // Another sequence takes the pages that the first gives back; what that takes next differs from what the device has.
        table.truncate(0, 32);
        reserve(&mut table, &[32, 64, 33]).expect("a page");
        reserve(&mut table, &[96, 64, 33]).expect("two pages");
        send(&mut table, &mut device);
        for b in 0..3 {
            let sent = &device[b * table.columns()..][..pages(&table, b).len()];
            assert_eq!(sent.iter().map(|&p| p as usize).collect::<Vec<_>>(), pages(&table, b));
        }
    }

    #[test]
    fn no_page_is_held_twice_or_lost() {
        let (pool, rng) = (pool(40), &mut Rng::new(11));
        let mut tables: Vec<_> = (0..3).map(|i| table(&pool, 1 + i, 400)).collect();
        let mut lengths = [vec![0; 1], vec![0; 2], vec![0; 3]];
        let mut devices: Vec<_> = tables.iter().map(|t| vec![-1; t.len()]).collect();
        let mut refused = 0;
        for _ in 0..4000 {
            let i = rng.below(3);
            let (table, rows) = (&mut tables[i], &mut lengths[i]);
            let b = rng.below(rows.len());
            match rng.below(4) {
                0 => {
                    rows[b] = rng.below(rows[b] + 1);
                    table.truncate(b, rows[b]);
                }
                kind => {
                    let grown: Vec<_> = rows.iter().map(|&r| (r + rng.below(60)).min(400)).collect();
                    match reserve(table, &grown) {
                        Ok(()) if kind == 1 => table.undo(),
                        Ok(()) => {
                            *rows = grown;
                            send(table, &mut devices[i]);
                        }
                        Err(_) => refused += 1,
                    }
                }
            }
            let mut seen: HashSet<usize> = lock(&pool.free).iter().map(|&p| p as usize).collect();
            let mut count = free(&pool);
            for (table, rows) in tables.iter().zip(&lengths) {
                for (b, &rows) in rows.iter().enumerate() {
                    assert!((rows..rows + 32).contains(&table.rows(b)), "{rows} rows have pages for {}", table.rows(b));
                    seen.extend(pages(table, b));
                    count += pages(table, b).len();
                }
            }
            assert_eq!((seen.len(), count), (40, 40));
        }
        assert!(refused > 100, "the pool is often too small");
        for (table, device) in tables.iter_mut().zip(&mut devices) {
            send(table, device);
            for (b, &held) in table.held.iter().enumerate() {
                assert_eq!(device[b * table.columns..][..held], table.entries[b * table.columns..][..held]);
            }
        }
        drop(tables);
        assert_eq!(free(&pool), 40);
    }
}
