//! 512-bit vectors.

use core::arch::x86_64::*;
use std::marker::PhantomData;

use half::{bf16, f16};

use super::{
    DOT_STEPS, DotState, DotTile, Outlined, Simd,
    dots::{Dots, Widened},
    int8_x86::{Int8, Vnni, methods},
};

/// Proves that the processor has AVX-512 F, BW, DQ and VL, all that [`super::avx2::Avx2`] proves, and what `D` multiplies bf16 and int8
/// with.
#[derive(Clone, Copy, Debug)]
pub struct Avx512<D = Widened>(PhantomData<D>);

impl<D: Dots> Avx512<D> {
    /// The token.
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C, and what `D` asks for.
    #[inline(always)]
    pub unsafe fn new_unchecked() -> Self {
        Avx512(PhantomData)
    }
}

/// In pairs, by `vdpbf16ps`. The processor has AVX-512 BF16 and VNNI.
#[derive(Clone, Copy, Debug)]
pub struct Pairs;

impl Dots for Pairs {
    type Int8 = Vnni;
    const ROWS: usize = 12;

    #[inline(always)]
    unsafe fn dots(_: &mut DotState, t: &DotTile) {
        let mut i = 0;
        while i < t.rows {
            let a = t.a.wrapping_add(i * t.row_stride);
            let t = DotTile { rows: t.rows - i, a, c: t.c.wrapping_add(i * t.c_stride), ..*t };
            macro_rules! largest {
                ($($rows:literal),*) => {
                    match t.rows {
                        // SAFETY: rows i .. i + $rows of A and C lie within what the caller vouches for.
                        $(left if $rows <= left => unsafe {
                            pair_tile::<$rows>(&t);
                            i += $rows;
                        },)*
                        _ => unreachable!("1 row always fits"),
                    }
                };
            }
            largest!(12, 8, 4, 2, 1);
        }
    }
    fn end(_: DotState) {}

    const PROBE_FLOPS: usize = 16 * 16 * 2 * 2;
    #[inline(always)]
    unsafe fn probe(rounds: usize) -> f32 {
        // SAFETY: the processor has AVX-512 BF16; ½ in each element.
        unsafe {
            let x: __m512bh = core::mem::transmute(_mm512_set1_epi32(0x3f00_3f00));
            let mut acc = [_mm512_setzero_ps(); 16];
            for _ in 0..rounds {
                for v in &mut acc {
                    *v = _mm512_dpbf16_ps(*v, x, x);
                }
            }
            let mut sum = acc[0];
            for v in &acc[1..] {
                sum = _mm512_add_ps(sum, *v);
            }
            _mm512_reduce_add_ps(sum)
        }
    }
}

/// Whether `vdpbf16ps` multiplies more than an f32 FMA: twice as much on AMD's processors, half as much on Intel's.
pub fn pairs_are_fast() -> bool {
    #[allow(unused_unsafe, reason = "safe since Rust 1.92")]
    // SAFETY: every x86-64 processor has CPUID.
    let id = unsafe { __cpuid(0) };
    // "GenuineIntel"
    [id.ebx, id.edx, id.ecx] != [0x756e_6547, 0x4965_6e69, 0x6c65_746e]
}

/// `M` rows of a tile: M · 2 accumulators; a step multiplies two steps of k.
#[inline(always)]
unsafe fn pair_tile<const M: usize>(t: &DotTile) {
    // SAFETY: the caller's, as [`Simd::dots`]; the processor has AVX-512 BF16.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.blocks {
            for pair in 0..DOT_STEPS / 2 {
                let b0: __m512bh = core::mem::transmute(_mm512_loadu_si512(b.add(pair * 128).cast()));
                let b1: __m512bh = core::mem::transmute(_mm512_loadu_si512(b.add(pair * 128 + 64).cast()));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let a = a.add(i * t.row_stride + pair * 4).cast::<i32>().read_unaligned();
                    let a: __m512bh = core::mem::transmute(_mm512_set1_epi32(a));
                    *acc = [_mm512_dpbf16_ps(acc[0], a, b0), _mm512_dpbf16_ps(acc[1], a, b1)];
                }
            }
            a = a.wrapping_add(t.block_stride);
            b = b.wrapping_add(DOT_STEPS / 2 * 128);
        }
        for (i, acc) in acc.iter().enumerate() {
            for (j, &v) in acc.iter().enumerate() {
                let c = t.c.add(i * t.c_stride + 16 * j);
                _mm512_storeu_ps(c, if t.accumulate { _mm512_add_ps(_mm512_loadu_ps(c), v) } else { v });
            }
        }
    }
}

/// Bits of the first `n ≤ 16` lanes.
#[inline(always)]
fn lane_mask(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

macro_rules! ops {
    ($($name:ident($($arg:ident),*) => $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: __m512),*) -> __m512 {
            // SAFETY: the token proves AVX-512 F, DQ.
            unsafe { $body }
        }
    )*};
}

impl<D: Dots> Simd for Avx512<D> {
    const LANES: usize = 16;
    const MR: usize = 12;
    const QUERY_ROWS: usize = 8;
    const DOT_ROWS: usize = D::ROWS;
    methods!(D::Int8, words_512, words_512_probe, vnni_512, vnni_512_probe, 16);
    const DOT_PROBE_FLOPS: usize = D::PROBE_FLOPS;
    type F = __m512;

    #[inline(always)]
    unsafe fn call<B: Outlined>(self, body: B) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        #[inline(never)]
        unsafe fn apart<D: Dots, B: Outlined>(s: Avx512<D>, body: B) {
            // SAFETY: the caller's.
            unsafe { body.run(s) }
        }
        // SAFETY: the caller's; the token proves the features.
        unsafe { apart(self, body) }
    }

    ops! {
        add(a, b) => _mm512_add_ps(a, b);
        sub(a, b) => _mm512_sub_ps(a, b);
        mul(a, b) => _mm512_mul_ps(a, b);
        div(a, b) => _mm512_div_ps(a, b);
        reciprocal(v) => {
            let r = _mm512_rcp14_ps(v);
            _mm512_mul_ps(r, _mm512_fnmadd_ps(v, r, _mm512_set1_ps(2.0)))
        };
        fma(a, b, c) => _mm512_fmadd_ps(a, b, c);
        max(a, b) => _mm512_max_ps(a, b);
        min(a, b) => _mm512_min_ps(a, b);
        round(v) => _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
        scale2(v, n) => _mm512_scalef_ps(v, n);
        select_lt(a, b, yes, no) => _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes);
        copysign(v, sign) => {
            let bit = _mm512_set1_ps(-0.0);
            _mm512_or_ps(_mm512_andnot_ps(bit, v), _mm512_and_ps(bit, sign))
        };
        swap_pairs(v) => _mm512_permute_ps::<0b10_11_00_01>(v);
    }

    #[inline(always)]
    unsafe fn dots(self, state: &mut DotState, t: &DotTile) {
        // SAFETY: the caller's; the token proves what D asks for.
        unsafe { D::dots(state, t) }
    }
    #[inline(always)]
    fn dot_probe(self, rounds: usize) -> f32 {
        // SAFETY: the token proves what D asks for.
        unsafe { D::probe(rounds) }
    }
    #[inline(always)]
    fn end_dots(self, state: DotState) {
        D::end(state);
    }
    #[inline(always)]
    unsafe fn store_pairs(self, p: *mut u8, even: __m512, odd: __m512) {
        // SAFETY: the caller's; every token with dot products proves AVX-512 BF16. Word 2i is element i, word 2i + 1 element 16 + i.
        unsafe {
            let both: __m512i = core::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
            let order = _mm512_add_epi32(
                _mm512_set1_epi32(0x0010_0000),
                _mm512_mullo_epi32(
                    _mm512_set1_epi32(0x0001_0001),
                    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                ),
            );
            _mm512_storeu_si512(p.cast(), _mm512_permutexvar_epi16(order, both));
        }
    }
    #[inline(always)]
    unsafe fn pair_rows(self, p: *mut u8, even: *const bf16, odd: *const bf16) {
        // SAFETY: the caller's; 16 × 2 bytes are read from each row.
        unsafe {
            let even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even.cast()));
            let odd = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd.cast())));
            _mm512_storeu_si512(p.cast(), _mm512_or_si512(even, odd));
        }
    }
    #[inline(always)]
    fn fetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn fetch_near(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn splat(self, v: f32) -> __m512 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> __m512 {
        // SAFETY: masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(lane_mask(n), p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, v: __m512, n: usize) {
        // SAFETY: masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(p, lane_mask(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        // SAFETY: the caller's; 16 × 2 bytes are read.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_even_odd(self, p: *const bf16) -> [__m512; 2] {
        // SAFETY: the caller's; 32 × 2 bytes are read.
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(odd)]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        // SAFETY: the caller's; 16 bytes are read.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> [__m512; 2] {
        // SAFETY: the caller's; 16 bytes are read.
        unsafe {
            let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let even = _mm512_and_si512(both, _mm512_set1_epi32(15));
            [_mm512_cvtepi32_ps(even), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(both))]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        // SAFETY: the caller's; 16 × 2 bytes are read.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: __m512) {
        // SAFETY: the caller's; 16 × 2 bytes are written. NaN keeps its upper half, made quiet.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let bits = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits)));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: __m512) {
        // SAFETY: the caller's; 16 × 2 bytes are written.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    fn interleave(self, [even, odd]: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: the token proves AVX-512 F.
        unsafe {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            [_mm512_permutex2var_ps(even, low, odd), _mm512_permutex2var_ps(even, high, odd)]
        }
    }
    #[inline(always)]
    fn deinterleave(self, [a, b]: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: the token proves AVX-512 F.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            [_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)]
        }
    }
    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's: 16 rows of 16 elements each. Pairs, then fours of rows are interleaved within 128 bits, then those
        // quarters change places.
        unsafe {
            // Closures would be compiled without the token's features.
            let mut fours = [[_mm512_setzero_ps(); 4]; 4];
            for (i, four) in fours.iter_mut().enumerate() {
                let src = src.add(4 * i * src_stride);
                let (a, b) = (_mm512_loadu_ps(src), _mm512_loadu_ps(src.add(src_stride)));
                let (c, d) = (_mm512_loadu_ps(src.add(2 * src_stride)), _mm512_loadu_ps(src.add(3 * src_stride)));
                let (ab, cd) = (_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d)));
                let (ab2, cd2) = (_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d)));
                *four = [
                    _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
                    _mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)),
                ];
            }
            let [a, b, c, d] = fours;
            for (j, (((a, b), c), d)) in a.into_iter().zip(b).zip(c).zip(d).enumerate() {
                let (ab, cd) = (_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d));
                let (ab2, cd2) = (_mm512_shuffle_f32x4::<0b11_01_11_01>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d));
                let dst = dst.add(j * dst_stride);
                _mm512_storeu_ps(dst, _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd));
                _mm512_storeu_ps(dst.add(4 * dst_stride), _mm512_shuffle_f32x4::<0b10_00_10_00>(ab2, cd2));
                _mm512_storeu_ps(dst.add(8 * dst_stride), _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
                _mm512_storeu_ps(dst.add(12 * dst_stride), _mm512_shuffle_f32x4::<0b11_01_11_01>(ab2, cd2));
            }
        }
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    fn sum_each(self, v: &[__m512; 16]) -> __m512 {
        // SAFETY: the token proves AVX-512 F. Sums of twos, then of fours within 128 bits; then those quarters are summed.
        unsafe {
            let mut fours = [_mm512_setzero_ps(); 4];
            for (four, v) in fours.iter_mut().zip(v.chunks_exact(4)) {
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
                *four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
            }
            let [a, b, c, d] = fours;
            let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd))
        }
    }
    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_reduce_max_ps(v) }
    }
}
