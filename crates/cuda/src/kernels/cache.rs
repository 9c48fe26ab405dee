//! The key/value cache as kernels see it: `cu/cache.cuh`.

/// Rows of D elements, contiguous or in pages. Strides are in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cache {
    /// Address of the keys.
    pub k: u64,
    /// Address of the values.
    pub v: u64,
    /// Physical page of each page of each sequence; 0 where the cache is contiguous.
    pub table: u64,
    /// From a sequence to the next, or from a physical page to the next.
    pub sequence_stride: i64,
    /// From a head to the next.
    pub head_stride: i64,
    /// From a row to the next.
    pub row_stride: i64,
    /// Entries of `table` for each sequence.
    pub table_stride: i32,
    /// Rows of a page; of each head, those in memory, where the cache is contiguous.
    pub page: i32,
}
