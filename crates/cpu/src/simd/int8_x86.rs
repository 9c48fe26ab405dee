//! Register tiles of int8 products on x86-64: `vpmaddwd` on codes widened to 16 bits, or VNNI's `vpdpbusd` on bytes.

use core::arch::x86_64::*;

use super::{INT8_BLOCK, Int8Tile};

/// How an instruction set multiplies int8.
pub trait Int8: Copy + Send + Sync + 'static {
    /// Whether by VNNI, which the processor has then.
    const VNNI: bool;
}

/// Widened to 16 bits.
#[derive(Clone, Copy, Debug)]
pub struct Widening;

impl Int8 for Widening {
    const VNNI: bool = false;
}

/// By VNNI.
#[derive(Clone, Copy, Debug)]
pub struct Vnni;

impl Int8 for Vnni {
    const VNNI: bool = true;
}

/// A tile of `M` rows and two vectors: for each group of steps, B's two vectors by `$load`, 4 bytes of each row of A in all lanes, and `$multiply`.
macro_rules! tile {
    (
        $(#[$doc:meta])*
        $name:ident, steps $steps:literal, lanes $lanes:literal, $zero:ident, $splat:ident, $add:ident, $loadu:ident, $storeu:ident,
        |$p:ident| $load:expr, |$acc:ident, $a:ident, $b:ident| $multiply:expr
    ) => {
        $(#[$doc])*
        #[inline(always)]
        pub unsafe fn $name<const M: usize>(t: &Int8Tile) {
            /// Bytes of the codes of a row of A in a block, and of B's groups.
            const ROW: usize = INT8_BLOCK * (4 / $steps);
            const GROUP: usize = 2 * $lanes * $steps;
            /// Groups between fetches.
            const RUN: usize = INT8_BLOCK / $steps / 16;
            // SAFETY: the caller's: every pointer read or written lies within A [M, blocks], B [blocks, 2 vectors] or C [M, 2 vectors]. A prefetch of
            // any address is harmless.
            unsafe {
                let mut acc = [[$zero(); 2]; M];
                let (mut a, mut b, (mut next, share)) = (t.a, t.b, t.fetch);
                for _ in 0..t.blocks {
                    for _ in 0..16 {
                        _mm_prefetch::<_MM_HINT_T1>(next.cast());
                        if GROUP * RUN > 64 {
                            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64).cast());
                        }
                        next = next.wrapping_add(share);
                        for group in 0..RUN {
                            let $p = b.add(group * GROUP);
                            let b0 = $load;
                            let $p = b.add(group * GROUP + GROUP / 2);
                            let b1 = $load;
                            for (i, acc) in acc.iter_mut().enumerate() {
                                let $a = $splat(a.add(i * ROW + 4 * group).cast::<i32>().read_unaligned());
                                let ($acc, $b) = (acc[0], b0);
                                acc[0] = $multiply;
                                let ($acc, $b) = (acc[1], b1);
                                acc[1] = $multiply;
                            }
                        }
                        a = a.add(4 * RUN);
                        b = b.add(GROUP * RUN);
                    }
                    a = a.wrapping_add(t.block_stride).wrapping_sub(ROW);
                }
                for (i, acc) in acc.iter().enumerate() {
                    for (j, &v) in acc.iter().enumerate() {
                        let c = t.c.add(i * t.c_stride + j * $lanes);
                        $storeu(c.cast(), if t.accumulate { $add($loadu(c.cast()), v) } else { v });
                    }
                }
            }
        }
    };
}

/// `rounds` of 12 multiplications with their additions, of which each sum depends on the one before it alone.
macro_rules! probe {
    ($name:ident, lanes $lanes:literal, $splat:ident, $storeu:ident, |$acc:ident, $a:ident, $b:ident| $multiply:expr) => {
        /// # Safety
        /// The processor has the instructions.
        #[inline(always)]
        pub unsafe fn $name(rounds: usize) -> i32 {
            // SAFETY: the caller's; each vector is stored in an array of its lanes.
            unsafe {
                let mut sums = [$splat(core::hint::black_box(0x0001_0001)); 12];
                let $b = $splat(core::hint::black_box(0x0002_0001));
                for _ in 0..rounds {
                    for i in 0..12 {
                        // Products of what does not change would be taken out of the loop.
                        let ($acc, $a) = (sums[i], sums[(i + 1) % 12]);
                        sums[i] = $multiply;
                    }
                }
                let (mut lanes, mut all) = ([0i32; $lanes], 0i32);
                for v in sums {
                    $storeu(lanes.as_mut_ptr().cast(), v);
                    all = lanes.iter().fold(all, |all, lane| all.wrapping_add(*lane));
                }
                all
            }
        }
    };
}

tile! {
    /// # Safety
    /// As [`super::Simd::int8_tile`]; the processor has AVX2.
    words_256, steps 2, lanes 8, _mm256_setzero_si256, _mm256_set1_epi32, _mm256_add_epi32, _mm256_loadu_si256, _mm256_storeu_si256,
    |p| _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())), |acc, a, b| _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
}
tile! {
    /// # Safety
    /// As [`super::Simd::int8_tile`]; the processor has AVX2 and AVX-VNNI.
    vnni_256, steps 4, lanes 8, _mm256_setzero_si256, _mm256_set1_epi32, _mm256_add_epi32, _mm256_loadu_si256, _mm256_storeu_si256,
    |p| _mm256_loadu_si256(p.cast()), |acc, a, b| _mm256_dpbusd_avx_epi32(acc, b, a)
}
tile! {
    /// # Safety
    /// As [`super::Simd::int8_tile`]; the processor has AVX-512 F and BW.
    words_512, steps 2, lanes 16, _mm512_setzero_si512, _mm512_set1_epi32, _mm512_add_epi32, _mm512_loadu_si512, _mm512_storeu_si512,
    |p| _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())), |acc, a, b| _mm512_add_epi32(acc, _mm512_madd_epi16(a, b))
}
tile! {
    /// # Safety
    /// As [`super::Simd::int8_tile`]; the processor has AVX-512 F and VNNI.
    vnni_512, steps 4, lanes 16, _mm512_setzero_si512, _mm512_set1_epi32, _mm512_add_epi32, _mm512_loadu_si512, _mm512_storeu_si512,
    |p| _mm512_loadu_si512(p.cast()), |acc, a, b| _mm512_dpbusd_epi32(acc, b, a)
}

probe!(words_256_probe, lanes 8, _mm256_set1_epi32, _mm256_storeu_si256, |acc, a, b| _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)));
probe!(vnni_256_probe, lanes 8, _mm256_set1_epi32, _mm256_storeu_si256, |acc, a, b| _mm256_dpbusd_avx_epi32(acc, b, a));
probe!(words_512_probe, lanes 16, _mm512_set1_epi32, _mm512_storeu_si512, |acc, a, b| _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)));
probe!(vnni_512_probe, lanes 16, _mm512_set1_epi32, _mm512_storeu_si512, |acc, a, b| _mm512_dpbusd_epi32(acc, b, a));

/// The tile and the probe of one width, by VNNI or not, as methods of `Simd`.
macro_rules! methods {
    ($int8:ty, $words:ident, $words_probe:ident, $vnni:ident, $vnni_probe:ident, $lanes:literal) => {
        const INT8_STEPS: usize = if <$int8>::VNNI { 4 } else { 2 };
        const INT8_SHIFT: i32 = if <$int8>::VNNI { 128 } else { 0 };
        const INT8_PROBE_OPS: usize = 12 * $lanes * Self::INT8_STEPS * 2;
        #[inline(always)]
        unsafe fn int8_tile<const M: usize>(self, t: &crate::simd::Int8Tile) {
            // SAFETY: the caller's; the token proves the features.
            unsafe { if <$int8>::VNNI { crate::simd::int8_x86::$vnni::<M>(t) } else { crate::simd::int8_x86::$words::<M>(t) } }
        }
        #[inline(always)]
        fn int8_probe(self, rounds: usize) -> i32 {
            // SAFETY: the token proves the features.
            unsafe {
                if <$int8>::VNNI {
                    crate::simd::int8_x86::$vnni_probe(rounds)
                } else {
                    crate::simd::int8_x86::$words_probe(rounds)
                }
            }
        }
    };
}
pub(super) use methods;
