//! The register tile: C[M, N] (+)= A[M, k] · B[k, N], with scalars of A broadcast and B read along its lanes.
//!
//! Operations 2·M·N·k; bytes read from first-level cache (M + N)·k·4. With M = MR rows and N = 2·LANES columns an AVX-512 step
//! needs 24 FMAs and 14 loads, so that two FMA ports stay busy with two load ports. The GEMMs run here (A packed activations, B
//! packed weights) and the unfused levels' scores (A rows of K, B transposed queries) and weighted values (A rows of V, B transposed
//! probabilities). Each element of C sums over k in order and is then added to C, whatever M and N. Tiled attention has
//! [`query_tile`], with fewer rows and a third vector: 24 FMAs and 11 loads.

use crate::simd::{Elem, QueryTile, Simd};

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

/// f32 of a cache line.
const LINE: usize = 16;

/// Steps of the unrolled loop.
pub const UNROLL: usize = 2;

/// Memory that later tiles read, fetched into second-level cache: start, and bytes that [`UNROLL`] steps fetch.
pub type Fetch = [(*const u8, usize); 2];

#[inline(always)]
unsafe fn exact<S: Simd, B: Elem, const M: usize, const NV: usize, const ROWS_ADJACENT: bool, const FETCH: bool>(
    s: S,
    t: Tile<B>,
    [mut weights, mut x]: Fetch,
) {
    let mut acc = [[s.splat(0.0); NV]; M];
    // SAFETY: the caller's: every pointer below stays within A [M, k], B [k, NV·LANES] or C [M, NV·LANES].
    unsafe {
        let (mut a, mut b) = (t.a, t.b);
        macro_rules! step {
            () => {
                let mut bv = [s.splat(0.0); NV];
                for (j, v) in bv.iter_mut().enumerate() {
                    *v = B::load(s, b.add(j * S::LANES));
                }
                for (i, row) in acc.iter_mut().enumerate() {
                    let a = s.splat(*a.add(if ROWS_ADJACENT { i } else { i * t.a_stride }));
                    for (v, bv) in row.iter_mut().zip(bv) {
                        *v = s.fma(a, bv, *v);
                    }
                }
                a = a.wrapping_add(if ROWS_ADJACENT { t.a_stride } else { 1 });
                b = b.wrapping_add(t.b_stride);
            };
        }
        // Only the full tile of a GEMM is unrolled: the others run once for each edge, and code is dear.
        let unrolled = if FETCH && M == S::MR { t.k / UNROLL } else { 0 };
        for _ in 0..unrolled {
            if FETCH {
                s.fetch(weights.0);
                s.fetch(x.0);
                weights.0 = weights.0.wrapping_add(weights.1);
                x.0 = x.0.wrapping_add(x.1);
            }
            step!();
            step!();
        }
        let mut near = if ROWS_ADJACENT { a.wrapping_add(2 * M - 1) } else { a.wrapping_add(M * t.a_stride) };
        for _ in 0..t.k - unrolled * UNROLL {
            if FETCH {
                s.fetch(weights.0);
                if NV * S::LANES * size_of::<B>() > 64 {
                    s.fetch(weights.0.wrapping_add(64));
                }
                weights.0 = weights.0.wrapping_add(weights.1.div_ceil(UNROLL));
            } else if M == S::MR {
                // The rows of A that the next tile reads.
                s.fetch_near(near.cast());
                near = near.wrapping_add(if ROWS_ADJACENT { t.a_stride } else { LINE });
            }
            step!();
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, v) in row.iter().enumerate() {
                let c = t.c.add(i * t.c_stride + j * S::LANES);
                // A sum of partial sums loses less than one long sum.
                s.store(c, if t.accumulate { s.add(s.load(c), *v) } else { *v });
            }
        }
    }
}

/// C[m, 2·LANES] (+)= A · B for any m: full register tiles, then ever smaller ones.
///
/// # Safety
/// A is readable as [m, k], B as [k, 2·LANES], C writable (and readable, when accumulating) as [m, 2·LANES].
#[inline(always)]
pub unsafe fn column<S: Simd, const ROWS_ADJACENT: bool>(s: S, m: usize, t: Tile<f32>) {
    // SAFETY: the caller's.
    unsafe { rows::<S, f32, 2, ROWS_ADJACENT, false>(s, m, t, [(std::ptr::null(), 0); 2]) }
}

/// C[m, 2·LANES] (+)= A · B with adjacent rows of A, asking for what `fetch` names on the way.
///
/// # Safety
/// As [`column()`].
#[inline(always)]
pub unsafe fn column_fetching<S: Simd, B: Elem>(s: S, m: usize, t: Tile<B>, fetch: Fetch) {
    // SAFETY: the caller's.
    unsafe { rows::<S, B, 2, true, true>(s, m, t, fetch) }
}

#[inline(always)]
unsafe fn rows<S: Simd, B: Elem, const NV: usize, const ROWS_ADJACENT: bool, const FETCH: bool>(
    s: S,
    m: usize,
    t: Tile<B>,
    fetch: Fetch,
) {
    let mut i = 0;
    while i < m {
        let a = t.a.wrapping_add(if ROWS_ADJACENT { i } else { i * t.a_stride });
        let t = Tile { a, c: t.c.wrapping_add(i * t.c_stride), ..t };
        macro_rules! largest {
            ($($rows:literal),*) => {
                match m - i {
                    // SAFETY: rows i .. i + $rows of A and C lie within what the caller vouches for.
                    $(left if $rows <= S::MR && $rows <= left => unsafe {
                        exact::<S, B, $rows, NV, ROWS_ADJACENT, FETCH>(s, t, fetch);
                        i += $rows;
                    },)*
                    _ => unreachable!("1 row always fits"),
                }
            };
        }
        largest!(12, 8, 6, 4, 2, 1);
    }
}

/// C[QUERY_ROWS, vectors·LANES] = C · scale + A · B, with 1 to 3 vectors.
///
/// # Safety
/// A is readable as [QUERY_ROWS, k], B as [k, vectors·LANES], C writable (and readable, when scaled) as [QUERY_ROWS, vectors·LANES].
#[inline(always)]
pub unsafe fn query_tile<S: Simd>(s: S, vectors: usize, t: QueryTile) {
    macro_rules! by_vectors {
        ($rows:literal) => {
            match (vectors, t.row_stride) {
                (3, None) => query_rows::<S, $rows, 3, true>(s, t),
                (3, Some(_)) => query_rows::<S, $rows, 3, false>(s, t),
                (2, None) => query_rows::<S, $rows, 2, true>(s, t),
                (2, Some(_)) => query_rows::<S, $rows, 2, false>(s, t),
                (_, None) => query_rows::<S, $rows, 1, true>(s, t),
                (_, Some(_)) => query_rows::<S, $rows, 1, false>(s, t),
            }
        };
    }
    // SAFETY: the caller's.
    unsafe {
        if vectors == 3 && s.query_tile(&t) {
            return;
        }
        match S::QUERY_ROWS {
            8 => by_vectors!(8),
            4 => by_vectors!(4),
            _ => unreachable!("an instruction set has 4 or 8 rows"),
        }
    }
}

#[inline(always)]
unsafe fn query_rows<S: Simd, const M: usize, const NV: usize, const ROWS_ADJACENT: bool>(s: S, t: QueryTile) {
    let stride = t.row_stride.unwrap_or(M);
    let mut acc = [[s.splat(0.0); NV]; M];
    let (mut a, mut b, (mut near, near_step)) = (t.a, t.b, t.fetch);
    // SAFETY: the caller's: every pointer read or written stays within A [M, k], B [k, NV·LANES] or C [M, NV·LANES].
    unsafe {
        macro_rules! step {
            ($u:literal) => {
                let mut bv = [s.splat(0.0); NV];
                for (j, v) in bv.iter_mut().enumerate() {
                    *v = s.load(b.add(($u * NV + j) * S::LANES));
                }
                for (i, row) in acc.iter_mut().enumerate() {
                    let a = s.splat(*a.add(if ROWS_ADJACENT { $u * M + i } else { i * stride + $u }));
                    for (v, bv) in row.iter_mut().zip(bv) {
                        *v = s.fma(a, bv, *v);
                    }
                }
            };
        }
        for _ in 0..t.k / 2 {
            if ROWS_ADJACENT {
                s.fetch(near)
            } else {
                s.fetch_near(near)
            }
            near = near.wrapping_add(2 * near_step);
            step!(0);
            step!(1);
            a = a.wrapping_add(if ROWS_ADJACENT { 2 * M } else { 2 });
            b = b.wrapping_add(2 * NV * S::LANES);
        }
        if t.k % 2 == 1 {
            step!(0);
        }
        if let Some(scale) = t.scale {
            for j in 0..NV {
                let scale = s.load(scale.add(j * S::LANES));
                for (i, row) in acc.iter().enumerate() {
                    let c = t.c.add((i * NV + j) * S::LANES);
                    s.store(c, s.fma(s.load(c), scale, row[j]));
                }
            }
        } else {
            for (i, row) in acc.iter().enumerate() {
                for (j, v) in row.iter().enumerate() {
                    s.store(t.c.add((i * NV + j) * S::LANES), *v);
                }
            }
        }
    }
}

/// What dot products can do when nothing else is asked of them: `rounds` × [`Simd::DOT_PROBE_FLOPS`] operations.
#[inline(always)]
pub fn dot_probe<S: Simd>(s: S, rounds: usize) -> f32 {
    s.dot_probe(rounds)
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
