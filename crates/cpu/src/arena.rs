//! Aligned memory that grows and is kept.

use std::alloc::{Layout, alloc_zeroed, dealloc};

use lawson_core::{Error, ErrorKind, Result};

/// Every allocation starts at a multiple of this: a cache line, and the widest vector.
pub const ALIGN: usize = 64;

/// Zeroed bytes at a multiple of [`ALIGN`]; pages are only taken from the system when they are touched.
pub struct AlignedBytes {
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory is owned and plain bytes.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; writing needs `&mut` or the holder's own proof of disjointness.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `len` zeroed bytes.
    ///
    /// # Errors
    /// `OutOfMemory`, saying how many bytes could not be had.
    pub fn new(len: usize) -> Result<Self> {
        if len == 0 {
            return Ok(AlignedBytes { start: std::ptr::without_provenance_mut(ALIGN), len });
        }
        let none = || Error::new(ErrorKind::OutOfMemory, format!("{len} bytes of memory could not be allocated"));
        let layout = Layout::from_size_align(len, ALIGN).map_err(|_| none())?;
        // SAFETY: the size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err(none());
        }
        advise_huge_pages(start, len);
        Ok(AlignedBytes { start, len })
    }
    /// Bytes held.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether no byte is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Address of the first byte; writing through it needs proof that nobody else uses the same bytes.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }
    /// Makes room for `len` bytes; what was held is lost when it grows.
    ///
    /// # Errors
    /// `OutOfMemory`; nothing is held then.
    pub fn grow(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            *self = AlignedBytes::new(0)?;
            *self = AlignedBytes::new(len)?;
        }
        Ok(())
    }
}

/// Asks for huge pages wherever a whole one lies inside the allocation, so that streaming through weights and caches misses the TLB less
/// and no memory beyond `len` is touched.
#[cfg(target_os = "linux")]
fn advise_huge_pages(start: *mut u8, len: usize) {
    const HUGE: usize = 2 << 20;
    let skip = start.align_offset(HUGE);
    if len >= 2 * HUGE && skip < len {
        // SAFETY: the range lies within the allocation; the advice changes no content, and a refusal is harmless.
        unsafe { libc::madvise(start.add(skip).cast(), (len - skip) / HUGE * HUGE, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: *mut u8, _: usize) {}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.start, Layout::from_size_align_unchecked(self.len, ALIGN)) };
        }
    }
}
