//! 256-bit vectors.

use core::arch::{asm, x86_64::*};
use std::marker::PhantomData;

use half::{bf16, f16};

use super::{
    Load, Outlined, QueryTile, ScoreTile, Simd, ValueTile,
    int8_x86::{Int8, Widening, methods},
};

/// Proves that the processor has AVX2, FMA and F16C, and what `I` multiplies int8 with.
#[derive(Clone, Copy, Debug)]
pub struct Avx2<I = Widening>(PhantomData<I>);

impl<I: Int8> Avx2<I> {
    /// The token.
    /// # Safety
    /// The processor has AVX2, FMA and F16C, and AVX-VNNI where `I` asks for VNNI.
    #[inline(always)]
    pub unsafe fn new_unchecked() -> Self {
        Avx2(PhantomData)
    }
}

/// The upper halves of 32 bits.
static ODD: [u32; 8] = [0xffff_0000; 8];
/// The lower halves of bytes, one in 32 bits.
static LOW: [u32; 8] = [0xf; 8];

const MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// All bits set in the first `n ≤ 8` lanes.
#[inline(always)]
fn lane_mask(n: usize) -> __m256i {
    debug_assert!(n <= 8);
    // SAFETY: 8 elements from 8 − n on lie within MASKS; a token exists wherever this is called.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast()) }
}

macro_rules! ops {
    ($($name:ident($($arg:ident),*) => $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: __m256),*) -> __m256 {
            // SAFETY: the token proves AVX2 and FMA.
            unsafe { $body }
        }
    )*};
}

impl<I: Int8> Simd for Avx2<I> {
    const LANES: usize = 8;
    const MR: usize = 6;
    const QUERY_ROWS: usize = 4;
    methods!(I, words_256, words_256_probe, vnni_256, vnni_256_probe, 8);
    type F = __m256;

    #[inline(always)]
    unsafe fn call<B: Outlined>(self, body: B) {
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline(never)]
        unsafe fn apart<I: Int8, B: Outlined>(s: Avx2<I>, body: B) {
            // SAFETY: the caller's.
            unsafe { body.run(s) }
        }
        // SAFETY: the caller's; the token proves the features.
        unsafe { apart(self, body) }
    }

    ops! {
        add(a, b) => _mm256_add_ps(a, b);
        sub(a, b) => _mm256_sub_ps(a, b);
        mul(a, b) => _mm256_mul_ps(a, b);
        div(a, b) => _mm256_div_ps(a, b);
        reciprocal(v) => {
            let r = _mm256_rcp_ps(v);
            _mm256_mul_ps(r, _mm256_fnmadd_ps(v, r, _mm256_set1_ps(2.0)))
        };
        fma(a, b, c) => _mm256_fmadd_ps(a, b, c);
        max(a, b) => _mm256_max_ps(a, b);
        min(a, b) => _mm256_min_ps(a, b);
        round(v) => _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
        scale2(v, n) => {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        };
        select_lt(a, b, yes, no) => _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b));
        copysign(v, sign) => {
            let bit = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(bit, v), _mm256_and_ps(bit, sign))
        };
        swap_pairs(v) => _mm256_permute_ps::<0b10_11_00_01>(v);
    }

    /// In assembly because 12 sums, three vectors and a broadcast take all 16 registers: the compiler, left to itself, keeps some of the
    /// sums in memory.
    #[inline(always)]
    unsafe fn query_tile(self, t: &QueryTile) -> bool {
        macro_rules! row {
            ($a:literal, $x:literal, $y:literal, $z:literal) => {
                concat!(
                    "vbroadcastss ymm15, [",
                    $a,
                    "]\n",
                    "vfmadd231ps ymm",
                    $x,
                    ", ymm12, ymm15\n",
                    "vfmadd231ps ymm",
                    $y,
                    ", ymm13, ymm15\n",
                    "vfmadd231ps ymm",
                    $z,
                    ", ymm14, ymm15"
                )
            };
        }
        macro_rules! column {
            ($op:literal, $at:literal, $w:literal, $x:literal, $y:literal, $z:literal) => {
                concat!(
                    $op,
                    "[{c} + ",
                    $at,
                    "], ymm",
                    $w,
                    "\n",
                    $op,
                    "[{c} + 96 + ",
                    $at,
                    "], ymm",
                    $x,
                    "\n",
                    $op,
                    "[{c} + 192 + ",
                    $at,
                    "], ymm",
                    $y,
                    "\n",
                    $op,
                    "[{c} + 288 + ",
                    $at,
                    "], ymm",
                    $z
                )
            };
        }
        macro_rules! scaled {
            ($at:literal, $w:literal, $x:literal, $y:literal, $z:literal) => {
                concat!(
                    "vmovups ymm12, [{scale} + ",
                    $at,
                    "]\n",
                    "vfmadd231ps ymm",
                    $w,
                    ", ymm12, [{c} + ",
                    $at,
                    "]\n",
                    "vfmadd231ps ymm",
                    $x,
                    ", ymm12, [{c} + 96 + ",
                    $at,
                    "]\n",
                    "vfmadd231ps ymm",
                    $y,
                    ", ymm12, [{c} + 192 + ",
                    $at,
                    "]\n",
                    "vfmadd231ps ymm",
                    $z,
                    ", ymm12, [{c} + 288 + ",
                    $at,
                    "]"
                )
            };
        }
        let (row, step): (usize, usize) = t.row_stride.map_or((4, 16), |stride| (4 * stride, 4));
        // SAFETY: the caller's: four rows of A `row` bytes apart, three vectors of B at each step, four rows of three vectors of C; the
        // token proves AVX2 and FMA. A prefetch of any address is harmless.
        unsafe {
            asm!(
                "vxorps xmm0, xmm0, xmm0", "vxorps xmm1, xmm1, xmm1", "vxorps xmm2, xmm2, xmm2", "vxorps xmm3, xmm3, xmm3",
                "vxorps xmm4, xmm4, xmm4", "vxorps xmm5, xmm5, xmm5", "vxorps xmm6, xmm6, xmm6", "vxorps xmm7, xmm7, xmm7",
                "vxorps xmm8, xmm8, xmm8", "vxorps xmm9, xmm9, xmm9", "vxorps xmm10, xmm10, xmm10", "vxorps xmm11, xmm11, xmm11",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "prefetcht0 [{near}]",
                "vmovups ymm12, [{b}]",
                "vmovups ymm13, [{b} + 32]",
                "vmovups ymm14, [{b} + 64]",
                row!("{a}", 0, 1, 2),
                row!("{a} + {row}", 3, 4, 5),
                row!("{a} + 2*{row}", 6, 7, 8),
                row!("{a} + {row3}", 9, 10, 11),
                "add {a}, {step}",
                "add {b}, 96",
                "add {near}, {near_step}",
                "dec {n}",
                "jnz 2b",
                "3:",
                "test {scale}, {scale}",
                "jz 4f",
                scaled!(0, 0, 3, 6, 9),
                scaled!(32, 1, 4, 7, 10),
                scaled!(64, 2, 5, 8, 11),
                "4:",
                column!("vmovups ", 0, 0, 3, 6, 9),
                column!("vmovups ", 32, 1, 4, 7, 10),
                column!("vmovups ", 64, 2, 5, 8, 11),
                a = inout(reg) t.a => _, b = inout(reg) t.b => _, n = inout(reg) t.k => _, near = inout(reg) t.fetch.0 => _,
                row = in(reg) row, row3 = in(reg) 3 * row, step = in(reg) step, near_step = in(reg) t.fetch.1, c = in(reg) t.c,
                scale = in(reg) t.scale.unwrap_or(core::ptr::null()),
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
                out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
                out("ymm14") _, out("ymm15") _, options(nostack)
            );
        }
        true
    }
    /// In assembly for the same reason: 12 sums, three keys and a query take all registers. Eight sums would fit without, but then each
    /// waits for its last FMA.
    #[inline(always)]
    unsafe fn score_tile<T: Load, const HEADS: usize>(self, t: &ScoreTile<T>) -> bool {
        if !t.d.is_multiple_of(16) {
            return false;
        }
        // Keys that lie together are fetched in the order of their addresses.
        let step = 16 * size_of::<T>() / T::PACKED;
        let (part, next_step) = if t.stride * T::PACKED == t.d { (step, 3 * step) } else { (t.stride * size_of::<T>(), step) };
        /// Eight dimensions of four queries, behind those of three keys in ymm12 to ymm14.
        macro_rules! multiply {
            ($at:literal) => {
                concat!(
                    multiply!("q", $at, 0, 1, 2),
                    multiply!("q} + {q_row", $at, 3, 4, 5),
                    multiply!("q} + 2*{q_row", $at, 6, 7, 8),
                    multiply!("q} + {q_row3", $at, 9, 10, 11),
                )
            };
            ($q:literal, $at:literal, $x:literal, $y:literal, $z:literal) => {
                concat!(
                    "vmovups ymm15, [{",
                    $q,
                    "} + ",
                    $at,
                    "]\n",
                    "vfmadd231ps ymm",
                    $x,
                    ", ymm12, ymm15\n",
                    "vfmadd231ps ymm",
                    $y,
                    ", ymm13, ymm15\n",
                    "vfmadd231ps ymm",
                    $z,
                    ", ymm14, ymm15\n",
                )
            };
        }
        /// The sums of one key with each query across their lanes: twos, then fours within 128 bits, then the halves.
        macro_rules! sum {
            ($a:literal, $b:literal, $c:literal, $d:literal, $at:literal) => {
                concat!(
                    "vunpcklps ymm12, ymm",
                    $a,
                    ", ymm",
                    $b,
                    "\n",
                    "vunpckhps ymm13, ymm",
                    $a,
                    ", ymm",
                    $b,
                    "\n",
                    "vunpcklps ymm14, ymm",
                    $c,
                    ", ymm",
                    $d,
                    "\n",
                    "vunpckhps ymm15, ymm",
                    $c,
                    ", ymm",
                    $d,
                    "\n",
                    "vaddps ymm12, ymm12, ymm13\n",
                    "vaddps ymm14, ymm14, ymm15\n",
                    "vblendps ymm13, ymm12, ymm14, 0xcc\n",
                    "vshufps ymm12, ymm12, ymm14, 0x4e\n",
                    "vaddps ymm12, ymm12, ymm13\n",
                    "vextractf128 xmm13, ymm12, 1\n",
                    "vaddps xmm12, xmm12, xmm13\n",
                    "vmovups [{p} + ",
                    $at,
                    "*{p_row}], xmm12"
                )
            };
        }
        macro_rules! tile {
            ($($step:expr),*; $($mask:tt)*) => {
                asm!(
                    "vxorps xmm0, xmm0, xmm0", "vxorps xmm1, xmm1, xmm1", "vxorps xmm2, xmm2, xmm2", "vxorps xmm3, xmm3, xmm3",
                    "vxorps xmm4, xmm4, xmm4", "vxorps xmm5, xmm5, xmm5", "vxorps xmm6, xmm6, xmm6", "vxorps xmm7, xmm7, xmm7",
                    "vxorps xmm8, xmm8, xmm8", "vxorps xmm9, xmm9, xmm9", "vxorps xmm10, xmm10, xmm10", "vxorps xmm11, xmm11, xmm11",
                    "2:",
                    "prefetcht0 [{next}]",
                    "prefetcht0 [{next} + {part}]",
                    "prefetcht0 [{next} + 2*{part}]",
                    $($step,)*
                    "add {q}, 64",
                    "add {k}, {step}",
                    "add {next}, {next_step}",
                    "dec {n}",
                    "jnz 2b",
                    sum!(0, 3, 6, 9, 0),
                    sum!(1, 4, 7, 10, 1),
                    sum!(2, 5, 8, 11, 2),
                    q = inout(reg) t.q => _, k = inout(reg) t.k => _, next = inout(reg) t.next => _, part = in(reg) part, next_step = in(reg) next_step,
                    n = inout(reg) t.d / 16 => _, row = in(reg) t.stride * size_of::<T>(), q_row = in(reg) 4 * t.d,
                    q_row3 = in(reg) 12 * t.d, p = in(reg) t.p, step = const 16 * size_of::<T>() / T::PACKED, p_row = const 4 * HEADS, $($mask)*
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
                    out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
                    out("ymm14") _, out("ymm15") _, options(nostack)
                )
            };
        }
        // SAFETY: the caller's: four rows of q and three of k, of at least 16 elements and whole steps of 16, and 12 scores; the token
        // proves AVX2 and FMA. A prefetch of any address is harmless.
        unsafe {
            if T::PACKED == 2 {
                tile!(
                    "vpmovzxbd ymm12, [{k}]", "vpmovzxbd ymm13, [{k} + {row}]", "vpmovzxbd ymm14, [{k} + 2*{row}]",
                    "vmovdqu ymm15, [{low}]",
                    "vpand ymm12, ymm12, ymm15", "vpand ymm13, ymm13, ymm15", "vpand ymm14, ymm14, ymm15",
                    "vcvtdq2ps ymm12, ymm12", "vcvtdq2ps ymm13, ymm13", "vcvtdq2ps ymm14, ymm14",
                    multiply!(0),
                    "vpmovzxbd ymm12, [{k}]", "vpmovzxbd ymm13, [{k} + {row}]", "vpmovzxbd ymm14, [{k} + 2*{row}]",
                    "vpsrld ymm12, ymm12, 4", "vpsrld ymm13, ymm13, 4", "vpsrld ymm14, ymm14, 4",
                    "vcvtdq2ps ymm12, ymm12", "vcvtdq2ps ymm13, ymm13", "vcvtdq2ps ymm14, ymm14",
                    multiply!(32);
                    low = in(reg) LOW.as_ptr(),
                );
            } else if size_of::<T>() == 1 {
                tile!(
                    "vpmovsxbd ymm12, [{k}]", "vpmovsxbd ymm13, [{k} + {row}]", "vpmovsxbd ymm14, [{k} + 2*{row}]",
                    "vcvtdq2ps ymm12, ymm12", "vcvtdq2ps ymm13, ymm13", "vcvtdq2ps ymm14, ymm14",
                    multiply!(0),
                    "vpmovsxbd ymm12, [{k} + 8]", "vpmovsxbd ymm13, [{k} + {row} + 8]", "vpmovsxbd ymm14, [{k} + 2*{row} + 8]",
                    "vcvtdq2ps ymm12, ymm12", "vcvtdq2ps ymm13, ymm13", "vcvtdq2ps ymm14, ymm14",
                    multiply!(32);
                );
            } else if T::EVEN_ODD {
                tile!(
                    "vmovdqu ymm12, [{k}]", "vmovdqu ymm13, [{k} + {row}]", "vmovdqu ymm14, [{k} + 2*{row}]",
                    "vpslld ymm12, ymm12, 16", "vpslld ymm13, ymm13, 16", "vpslld ymm14, ymm14, 16",
                    multiply!(0),
                    "vmovdqu ymm15, [{odd}]",
                    "vpand ymm12, ymm15, [{k}]", "vpand ymm13, ymm15, [{k} + {row}]", "vpand ymm14, ymm15, [{k} + 2*{row}]",
                    multiply!(32);
                    odd = in(reg) ODD.as_ptr(),
                );
            } else if size_of::<T>() == 2 {
                tile!(
                    "vcvtph2ps ymm12, [{k}]", "vcvtph2ps ymm13, [{k} + {row}]", "vcvtph2ps ymm14, [{k} + 2*{row}]",
                    multiply!(0),
                    "vcvtph2ps ymm12, [{k} + 16]", "vcvtph2ps ymm13, [{k} + {row} + 16]", "vcvtph2ps ymm14, [{k} + 2*{row} + 16]",
                    multiply!(32);
                );
            } else {
                tile!(
                    "vmovups ymm12, [{k}]", "vmovups ymm13, [{k} + {row}]", "vmovups ymm14, [{k} + 2*{row}]",
                    multiply!(0),
                    "vmovups ymm12, [{k} + 32]", "vmovups ymm13, [{k} + {row} + 32]", "vmovups ymm14, [{k} + 2*{row} + 32]",
                    multiply!(32);
                );
            }
        }
        true
    }
    /// In assembly for the same reason: 12 sums, three vectors of values and a weight.
    #[inline(always)]
    unsafe fn value_tile<T: Load, const HEADS: usize>(self, t: &ValueTile<T>) -> bool {
        /// One head's share of three vectors of values in ymm12 to ymm14.
        macro_rules! weigh {
            ($at:literal, $x:literal, $y:literal, $z:literal) => {
                concat!(
                    "vbroadcastss ymm15, [{p} + ",
                    $at,
                    "]\n",
                    "vfmadd231ps ymm",
                    $x,
                    ", ymm12, ymm15\n",
                    "vfmadd231ps ymm",
                    $y,
                    ", ymm13, ymm15\n",
                    "vfmadd231ps ymm",
                    $z,
                    ", ymm14, ymm15",
                )
            };
        }
        /// Adds one head's sums to what it has.
        macro_rules! add {
            ($row:literal, $alpha:literal, $x:literal, $y:literal, $z:literal) => {
                concat!(
                    "vbroadcastss ymm12, [{alpha} + ",
                    $alpha,
                    "]\n",
                    add!($row, "", $x),
                    add!($row, " + {apart}", $y),
                    add!($row, " + 2*{apart}", $z),
                )
            };
            ($row:literal, $at:literal, $x:literal) => {
                concat!("vfmadd231ps ymm", $x, ", ymm12, [", $row, $at, "]\n", "vmovups [", $row, $at, "], ymm", $x, "\n",)
            };
        }
        // Three vectors of 8 dimensions, and three more. Of bf16 these are the even and the odd ones of the same elements.
        macro_rules! half {
            ($half:literal, $v:literal, $acc:literal, $apart:literal, $($values:literal),*; $($mask:tt)*) => {
                asm!(
                    "vxorps xmm0, xmm0, xmm0", "vxorps xmm1, xmm1, xmm1", "vxorps xmm2, xmm2, xmm2", "vxorps xmm3, xmm3, xmm3",
                    "vxorps xmm4, xmm4, xmm4", "vxorps xmm5, xmm5, xmm5", "vxorps xmm6, xmm6, xmm6", "vxorps xmm7, xmm7, xmm7",
                    "vxorps xmm8, xmm8, xmm8", "vxorps xmm9, xmm9, xmm9", "vxorps xmm10, xmm10, xmm10", "vxorps xmm11, xmm11, xmm11",
                    "2:",
                    "prefetcht0 [{next}]",
                    $($values,)*
                    weigh!(0, 0, 1, 2),
                    weigh!(4, 3, 4, 5),
                    weigh!(8, 6, 7, 8),
                    weigh!(12, 9, 10, 11),
                    "add {p}, {p_row}",
                    "add {v}, {row}",
                    "add {next}, {next_row}",
                    "dec {n}",
                    "jnz 2b",
                    add!("{acc}", 0, 0, 1, 2),
                    add!("{acc} + {acc_row}", 4, 3, 4, 5),
                    add!("{acc} + 2*{acc_row}", 8, 6, 7, 8),
                    add!("{acc} + {acc_row3}", 12, 9, 10, 11),
                    p = inout(reg) t.p => _, v = inout(reg) t.v.add($v) => _, n = inout(reg) t.n => _,
                    next = inout(reg) t.next[$half] => _,
                    row = in(reg) t.stride * size_of::<T>(), next_row = in(reg) t.next_stride * size_of::<T>(),
                    acc = in(reg) t.acc.add($acc), acc_row = in(reg) 4 * t.acc_stride, acc_row3 = in(reg) 12 * t.acc_stride,
                    alpha = in(reg) t.alpha, p_row = const 4 * HEADS, apart = const 4 * $apart, $($mask)*
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
                    out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
                    out("ymm14") _, out("ymm15") _, options(nostack)
                )
            };
        }
        // SAFETY: the caller's: n ≥ 1 rows of p and v, 4 rows of acc; the token proves AVX2, FMA and F16C. A prefetch of any address is
        // harmless.
        unsafe {
            if T::EVEN_ODD {
                half!(
                    0, 0, 0, 16,
                    "vmovdqu ymm12, [{v}]", "vmovdqu ymm13, [{v} + 32]", "vmovdqu ymm14, [{v} + 64]",
                    "vpslld ymm12, ymm12, 16", "vpslld ymm13, ymm13, 16", "vpslld ymm14, ymm14, 16";
                );
                half!(
                    1, 0, 8, 16,
                    "vmovdqu ymm15, [{odd}]",
                    "vpand ymm12, ymm15, [{v}]", "vpand ymm13, ymm15, [{v} + 32]", "vpand ymm14, ymm15, [{v} + 64]";
                    odd = in(reg) ODD.as_ptr(),
                );
            } else if size_of::<T>() == 2 {
                half!(0, 0, 0, 8, "vcvtph2ps ymm12, [{v}]", "vcvtph2ps ymm13, [{v} + 16]", "vcvtph2ps ymm14, [{v} + 32]";);
                half!(1, 24, 24, 8, "vcvtph2ps ymm12, [{v}]", "vcvtph2ps ymm13, [{v} + 16]", "vcvtph2ps ymm14, [{v} + 32]";);
            } else {
                half!(
                    0, 0, 0, 8,
                    "prefetcht0 [{next} + 64]",
                    "vmovups ymm12, [{v}]", "vmovups ymm13, [{v} + 32]", "vmovups ymm14, [{v} + 64]";
                );
                half!(
                    1, 24, 24, 8,
                    "prefetcht0 [{next} + 64]",
                    "vmovups ymm12, [{v}]", "vmovups ymm13, [{v} + 32]", "vmovups ymm14, [{v} + 64]";
                );
            }
        }
        true
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
    fn splat(self, v: f32) -> __m256 {
        // SAFETY: the token proves AVX2.
        unsafe { _mm256_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> __m256 {
        // SAFETY: masked lanes are not read.
        unsafe { _mm256_maskload_ps(p, lane_mask(n)) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, v: __m256, n: usize) {
        // SAFETY: masked lanes are not written.
        unsafe { _mm256_maskstore_ps(p, lane_mask(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        // SAFETY: the caller's; 8 × 2 bytes are read.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_even_odd(self, p: *const bf16) -> [__m256; 2] {
        // SAFETY: the caller's; 16 × 2 bytes are read.
        unsafe {
            let both = _mm256_loadu_si256(p.cast());
            let odd = _mm256_and_si256(both, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)), _mm256_castsi256_ps(odd)]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        // SAFETY: the caller's; 8 bytes are read.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> [__m256; 2] {
        // SAFETY: the caller's; 8 bytes are read.
        unsafe {
            let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let even = _mm256_and_si256(both, _mm256_set1_epi32(15));
            [_mm256_cvtepi32_ps(even), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(both))]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m256 {
        // SAFETY: the caller's; 8 × 2 bytes are read.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: __m256) {
        // SAFETY: the caller's; 8 × 2 bytes are written. NaN keeps its upper half, made quiet.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let words = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed = _mm256_permute4x64_epi64::<0b00_00_10_00>(_mm256_packus_epi32(words, words));
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: __m256) {
        // SAFETY: the caller's; 8 × 2 bytes are written.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    fn interleave(self, [even, odd]: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token proves AVX2. Within 128 bits first, then halves change places.
        unsafe {
            let (low, high) = (_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
            [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
        }
    }
    #[inline(always)]
    fn deinterleave(self, [a, b]: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token proves AVX2. Within 128 bits first, then the middle quarters change places.
        unsafe {
            let (even, odd) = (_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
            let (even, odd) = (_mm256_castps_pd(even), _mm256_castps_pd(odd));
            [_mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(even)), _mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(odd))]
        }
    }
    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's: 8 rows of 8 elements each. Fours of rows are interleaved within 128 bits, then halves change places.
        unsafe {
            // Closures would be compiled without the token's features.
            let mut fours = [[_mm256_setzero_ps(); 4]; 2];
            for (i, four) in fours.iter_mut().enumerate() {
                let src = src.add(4 * i * src_stride);
                let (a, b) = (_mm256_loadu_ps(src), _mm256_loadu_ps(src.add(src_stride)));
                let (c, d) = (_mm256_loadu_ps(src.add(2 * src_stride)), _mm256_loadu_ps(src.add(3 * src_stride)));
                let (ab, cd) = (_mm256_castps_pd(_mm256_unpacklo_ps(a, b)), _mm256_castps_pd(_mm256_unpacklo_ps(c, d)));
                let (ab2, cd2) = (_mm256_castps_pd(_mm256_unpackhi_ps(a, b)), _mm256_castps_pd(_mm256_unpackhi_ps(c, d)));
                *four = [
                    _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                    _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
                    _mm256_castpd_ps(_mm256_unpacklo_pd(ab2, cd2)),
                    _mm256_castpd_ps(_mm256_unpackhi_pd(ab2, cd2)),
                ];
            }
            for (j, (&a, &b)) in fours[0].iter().zip(&fours[1]).enumerate() {
                _mm256_storeu_ps(dst.add(j * dst_stride), _mm256_permute2f128_ps::<0x20>(a, b));
                _mm256_storeu_ps(dst.add((4 + j) * dst_stride), _mm256_permute2f128_ps::<0x31>(a, b));
            }
        }
    }
    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
        }
    }
    #[inline(always)]
    fn sum_each(self, v: &[__m256; 16]) -> __m256 {
        // SAFETY: the token proves AVX2. Sums of twos, then of fours within 128 bits; then those halves are summed. A blend and a
        // shuffle give the two summands where they can, since a blend costs less than a second shuffle.
        unsafe {
            let mut twos = [_mm256_setzero_ps(); 4];
            for (two, v) in twos.iter_mut().zip(v.chunks_exact(2)) {
                *two = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
            }
            let mut fours = [_mm256_setzero_ps(); 2];
            for (four, two) in fours.iter_mut().zip(twos.chunks_exact(2)) {
                let straight = _mm256_blend_ps::<0b1100_1100>(two[0], two[1]);
                *four = _mm256_add_ps(straight, _mm256_shuffle_ps::<0b01_00_11_10>(two[0], two[1]));
            }
            let straight = _mm256_blend_ps::<0b1111_0000>(fours[0], fours[1]);
            _mm256_add_ps(straight, _mm256_permute2f128_ps::<0x21>(fours[0], fours[1]))
        }
    }
    #[inline(always)]
    fn max_lane(self, v: __m256) -> f32 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
        }
    }
}
