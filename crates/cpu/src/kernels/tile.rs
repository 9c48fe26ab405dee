//! The register tile: C[M, N] (+)= A[M, k] · B[k, N], with scalars of A broadcast and B read along its lanes.
//!
//! Operations 2·M·N·k; bytes read from first-level cache (M + N)·k·4. With M = MR rows and N = 2·LANES columns an AVX-512 step
//! needs 24 FMAs and 14 loads, so that two FMA ports stay busy with two load ports. Every product of the block runs here: the
//! GEMMs (A packed activations, B packed weights), scores (A rows of K, B transposed queries), weighted values (A rows of V, B
//! transposed probabilities) and decode (A probabilities, B rows of V). Each element of C sums over k in order, whatever M and N.

use crate::simd::{Elem, Simd};


/// Operands of one register tile.
#[derive(Clone, Copy)]
pub struct Tile<B> {
    /// Steps.
    pub k: usize,
    /// A.
    pub a: *const f32,
    /// Elements between steps of A, whose rows are adjacent (`ROWS_ADJACENT`); else between rows, whose steps are adjacent.
    pub a_stride: usize,
    /// B.
    pub b: *const B,
    /// Elements between steps of B.
    pub b_stride: usize,
    /// C.
    pub c: *mut f32,
    /// Elements between rows of C.
    pub c_stride: usize,
    /// Whether C is added to.
    pub accumulate: bool,
}

#[inline(always)]
unsafe fn exact<S: Simd, B: Elem, const M: usize, const NV: usize, const ROWS_ADJACENT: bool>(s: S, t: Tile<B>) {
    let mut acc = [[s.splat(0.0); NV]; M];
    // SAFETY: the caller's: every pointer below stays within A [M, k], B [k, NV·LANES] or C [M, NV·LANES].
    unsafe {
        if t.accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                for (j, v) in row.iter_mut().enumerate() {
                    *v = s.load(t.c.add(i * t.c_stride + j * S::LANES));
                }
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.k {
            let mut bv = [s.splat(0.0); NV];
            for (j, v) in bv.iter_mut().enumerate() {
                *v = B::load(s, b.add(j * S::LANES));
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let x = s.splat(*a.add(if ROWS_ADJACENT { i } else { i * t.a_stride }));
                for (v, bv) in row.iter_mut().zip(bv) {
                    *v = s.fma(x, bv, *v);
                }
            }
            a = a.wrapping_add(if ROWS_ADJACENT { t.a_stride } else { 1 });
            b = b.wrapping_add(t.b_stride);
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, v) in row.iter().enumerate() {
                s.store(t.c.add(i * t.c_stride + j * S::LANES), *v);
            }
        }
    }
}

/// Runs a tile of `rows` ≤ MR rows and `vectors` (1 or 2) vectors of columns.
///
/// # Safety
/// A is readable as [rows, k], B as [k, vectors·LANES], C writable (and readable, when accumulating) as [rows, vectors·LANES].
#[inline(always)]
pub unsafe fn tile<S: Simd, B: Elem, const ROWS_ADJACENT: bool>(s: S, rows: usize, vectors: usize, t: Tile<B>) {
    macro_rules! by_rows {
        ($nv:literal: $($m:literal),*) => {
            match rows {
                // SAFETY: the caller's.
                $($m if $m <= S::MR => unsafe { exact::<S, B, $m, $nv, ROWS_ADJACENT>(s, t) },)*
                _ => unreachable!("a register tile of {rows} rows"),
            }
        };
    }
    if vectors == 2 {
        by_rows!(2: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    } else {
        by_rows!(1: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    }
}

/// C[m, vectors·LANES] (+)= A · B for any m, one register tile after another.
///
/// # Safety
/// As [`tile`], for m rows.
#[inline(always)]
pub unsafe fn column<S: Simd, B: Elem, const ROWS_ADJACENT: bool>(s: S, m: usize, vectors: usize, t: Tile<B>) {
    let mut i = 0;
    while i < m {
        let rows = S::MR.min(m - i);
        let a = t.a.wrapping_add(if ROWS_ADJACENT { i } else { i * t.a_stride });
        // SAFETY: rows i .. i + rows of A and C lie within what the caller vouches for.
        unsafe { tile::<S, B, ROWS_ADJACENT>(s, rows, vectors, Tile { a, c: t.c.wrapping_add(i * t.c_stride), ..t }) };
        i += rows;
    }
}

/// `rounds` × 64 × 2 × LANES operations in independent chains: what the FMA ports can do when nothing else is asked of them.
#[inline(always)]
pub fn fma_probe<S: Simd>(s: S, rounds: usize) -> f32 {
    let (x, y) = (s.splat(0.999_999), s.splat(1e-7));
    let mut acc = [s.splat(1.0); 12];
    let rounds = rounds * 64 / 12 + 1;
    for _ in 0..rounds {
        for v in &mut acc {
            *v = s.fma(*v, x, y);
        }
    }
    acc.into_iter().map(|v| s.sum(v)).sum()
}
