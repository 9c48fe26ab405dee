//! Rows of a run-time dtype to and from f32, and where rows lie.

use half::{bf16, f16};
use lawson_core::DType;

use crate::simd::{Elem, Simd};

/// Calls `$body` with `$t` as the Rust type of `$dtype`.
macro_rules! with_elem {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            lawson_core::DType::F32 => {
                type $t = f32;
                $body
            }
            lawson_core::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            lawson_core::DType::F16 => {
                type $t = half::f16;
                $body
            }
            other => unreachable!("dtype {other} has no CPU kernel"),
        }
    };
}
pub(crate) use with_elem;

/// Rows of a tensor or buffer on the host.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// First element.
    pub start: *mut u8,
    /// Type of the elements.
    pub dtype: DType,
    /// Elements between rows.
    pub stride: usize,
}

// SAFETY: an address and its layout; every use of the address states why it is valid and disjoint.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Address of element `column` of row `row`; valid only inside the tensor.
    #[inline(always)]
    pub fn at(&self, row: usize, column: usize) -> *mut u8 {
        self.start.wrapping_add((row * self.stride + column) * self.dtype.size())
    }
}

/// Converts `n` elements to f32.
/// # Safety
/// `src` is readable as `n` elements of `dtype`, `dst` writable as `n` f32.
#[inline(always)]
pub unsafe fn load_row<S: Simd>(s: S, dtype: DType, src: *const u8, dst: *mut f32, n: usize) {
    #[inline(always)]
    unsafe fn typed<S: Simd, T: Elem>(s: S, src: *const T, dst: *mut f32, n: usize) {
        // SAFETY: chunks and the tail stay below n.
        unsafe {
            let mut i = 0;
            while i + S::LANES <= n {
                s.store(dst.add(i), T::load(s, src.add(i)));
                i += S::LANES;
            }
            if i < n {
                s.store_n(dst.add(i), T::load_n(s, src.add(i), n - i), n - i);
            }
        }
    }
    // SAFETY: the caller's.
    with_elem!(dtype, T => unsafe { typed::<S, T>(s, src.cast(), dst, n) })
}

/// Rounds `n` f32 to `dtype`.
/// # Safety
/// `src` is readable as `n` f32, `dst` writable as `n` elements of `dtype`.
#[inline(always)]
pub unsafe fn store_row<S: Simd>(s: S, dtype: DType, src: *const f32, dst: *mut u8, n: usize) {
    #[inline(always)]
    unsafe fn typed<S: Simd, T: Elem>(s: S, src: *const f32, dst: *mut T, n: usize) {
        // SAFETY: chunks and the tail stay below n.
        unsafe {
            let mut i = 0;
            while i + S::LANES <= n {
                T::store(s, dst.add(i), s.load(src.add(i)));
                i += S::LANES;
            }
            if i < n {
                T::store_n(s, dst.add(i), s.load_n(src.add(i), n - i), n - i);
            }
        }
    }
    // SAFETY: the caller's.
    with_elem!(dtype, T => unsafe { typed::<S, T>(s, src, dst.cast(), n) })
}

/// Rounds `n` f32 to `dtype`, in place.
/// # Safety
/// `row` is readable and writable as `n` f32.
#[inline(always)]
pub unsafe fn round_row<S: Simd>(s: S, dtype: DType, row: *mut f32, n: usize) {
    #[inline(always)]
    unsafe fn typed<S: Simd, T: Elem>(s: S, row: *mut f32, n: usize) {
        let mut narrow = [T::from_f32(0.0); 16];
        for i in (0..n).step_by(S::LANES) {
            let count = S::LANES.min(n - i);
            // SAFETY: the caller's; LANES ≤ 16.
            unsafe {
                T::store(s, narrow.as_mut_ptr(), s.load_n(row.add(i), count));
                s.store_n(row.add(i), T::load(s, narrow.as_ptr()), count);
            }
        }
    }
    // SAFETY: the caller's.
    with_elem!(dtype, T => unsafe { typed::<S, T>(s, row, n) })
}

/// Converts the first `n` elements of row 0.
/// # Safety
/// `from` is readable and `to` writable as a row of `n` elements.
#[inline(always)]
pub unsafe fn convert_row<S: Simd>(s: S, from: Rows, to: Rows, n: usize) {
    let mut lanes = [0f32; 16];
    for i in (0..n).step_by(S::LANES) {
        // SAFETY: i < n; 16 ≥ LANES.
        unsafe {
            s.store(lanes.as_mut_ptr(), load_vector(s, from.dtype, from.at(0, 0), i, n));
            store_row(s, to.dtype, lanes.as_ptr(), to.at(0, i), S::LANES.min(n - i));
        }
    }
}

/// One vector of elements `i ..` of a row, as f32; lanes from `n` on are 0.
/// # Safety
/// `src` is readable as `n` elements of `dtype`; i < n.
#[inline(always)]
pub unsafe fn load_vector<S: Simd>(s: S, dtype: DType, src: *const u8, i: usize, n: usize) -> S::F {
    #[inline(always)]
    unsafe fn typed<S: Simd, T: Elem>(s: S, src: *const T, i: usize, n: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { if i + S::LANES <= n { T::load(s, src.add(i)) } else { T::load_n(s, src.add(i), n - i) } }
    }
    // SAFETY: the caller's.
    unsafe {
        match dtype {
            DType::BF16 => typed::<S, bf16>(s, src.cast(), i, n),
            DType::F16 => typed::<S, f16>(s, src.cast(), i, n),
            _ => typed::<S, f32>(s, src.cast(), i, n),
        }
    }
}

/// Where a new token stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its sequence.
    pub sequence: usize,
    /// Its index among the new tokens of the sequence.
    pub index: usize,
    /// Its position: its row in the cache.
    pub position: usize,
}

/// Where tokens `start .. end` stand, in order.
pub fn places<'a>(new: &'a [usize], past: &'a [usize], start: usize, end: usize) -> impl Iterator<Item = Place> + Clone + 'a {
    let (mut sequence, mut index) = (0, start);
    while sequence < new.len() && index >= new[sequence] {
        index -= new[sequence];
        sequence += 1;
    }
    (start..end).map(move |_| {
        let place = Place { sequence, index, position: past[sequence] + index };
        index += 1;
        if index == new[sequence] {
            (sequence, index) = (sequence + 1, 0);
        }
        place
    })
}

/// The key/value cache of one layer: rows in tiles of [`CacheRows::TILE`] that each lie together.
#[derive(Clone, Copy, Debug)]
pub struct CacheRows {
    /// First element of the keys.
    pub k: *mut u8,
    /// First element of the values.
    pub v: *mut u8,
    /// Type of the elements.
    pub dtype: DType,
    /// Elements between sequences.
    pub sequence_stride: usize,
    /// Elements between heads.
    pub head_stride: usize,
    /// Elements between rows.
    pub row_stride: usize,
}

impl CacheRows {
    /// Rows of a tile.
    pub const TILE: usize = 64;

    /// Element offset of `row`.
    #[inline(always)]
    pub fn offset(&self, sequence: usize, head: usize, row: usize) -> usize {
        sequence * self.sequence_stride + head * self.head_stride + row * self.row_stride
    }
    /// Address of a row of keys; the rows of its tile follow at `row_stride`.
    #[inline(always)]
    pub fn k_row(&self, sequence: usize, head: usize, row: usize) -> *mut u8 {
        self.k.wrapping_add(self.offset(sequence, head, row) * self.dtype.size())
    }
    /// Address of a row of values; the rows of its tile follow at `row_stride`.
    #[inline(always)]
    pub fn v_row(&self, sequence: usize, head: usize, row: usize) -> *mut u8 {
        self.v.wrapping_add(self.offset(sequence, head, row) * self.dtype.size())
    }
}
