//! What the geometry of several kernels has in common.

use lawson_core::DType;

/// A dtype as kernels' macros name it.
pub(crate) fn code(dtype: DType) -> i64 {
    match dtype {
        DType::BF16 => 1,
        DType::F16 => 2,
        _ => 0,
    }
}

/// Elements of one access: as many as fit 16 bytes, halved until all of `sizes`, in elements, are multiples.
pub(crate) fn vector(dtype: DType, sizes: &[usize]) -> usize {
    let mut n = 16 / dtype.size();
    while n > 1 && sizes.iter().any(|s| !s.is_multiple_of(n)) {
        n /= 2;
    }
    n
}

/// Grid and block of a kernel that gives each row of `vectors` accesses to 32 threads where those hold it in `items` accesses each, eight rows
/// a block, and else a block of its own.
pub(crate) fn rows(rows: usize, vectors: usize, items: usize) -> ([u32; 3], [u32; 3]) {
    if vectors <= 32 * items {
        return ([rows.div_ceil(8) as u32, 1, 1], [32, 8, 1]);
    }
    let threads = vectors.div_ceil(items).next_multiple_of(32).min(1024);
    ([rows as u32, 1, 1], [threads as u32, 1, 1])
}

/// Blocks of 256 threads for `accesses`, as many as keep `multiprocessors` full; the rest is done in turns.
pub(crate) fn stride_grid(accesses: usize, multiprocessors: usize) -> [u32; 3] {
    [accesses.div_ceil(256).clamp(1, 16 * multiprocessors) as u32, 1, 1]
}
