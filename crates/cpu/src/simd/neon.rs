//! 256 bits in two registers of 128: Advanced SIMD has 32 of them, so that the register tiles of 16 wide ones fit.

use core::arch::{aarch64::*, asm};
use std::marker::PhantomData;

use half::{bf16, f16};

use super::{
    DOT_STEPS, DotState, DotTile, Outlined, Simd,
    dots::{Dots, Widened},
};

/// Proves that the processor has Advanced SIMD (NEON), and what `D` multiplies bf16 with.
#[derive(Clone, Copy, Debug)]
pub struct Neon<D = Widened>(PhantomData<D>);

impl<D: Dots> Neon<D> {
    /// The token.
    /// # Safety
    /// The processor has Advanced SIMD and what `D` asks for.
    #[inline(always)]
    pub unsafe fn new_unchecked() -> Self {
        Neon(PhantomData)
    }
}

/// Lanes of a register.
const HALF: usize = 4;

type V = [float32x4_t; 2];

/// By `bfmmla` two rows at a time and `bfdot` what is left, which stable Rust has no intrinsics for. The processor has BF16.
#[derive(Clone, Copy, Debug)]
pub struct Matrices;

/// c[2, 2] += a[2, 4] · b[2, 4]ᵀ.
/// # Safety
/// The processor has BF16.
#[inline(always)]
unsafe fn bfmmla(c: float32x4_t, a: uint16x8_t, b: uint16x8_t) -> float32x4_t {
    let mut c = c;
    // SAFETY: the caller's; registers only.
    unsafe {
        asm!("bfmmla {c:v}.4s, {a:v}.8h, {b:v}.8h", c = inout(vreg) c, a = in(vreg) a, b = in(vreg) b, options(pure, nomem, nostack));
    }
    c
}

impl Dots for Matrices {
    const ROWS: usize = 8;

    #[inline(always)]
    unsafe fn dots(_: &mut DotState, t: &DotTile) {
        let mut i = 0;
        while i < t.rows {
            let a = t.a.wrapping_add(i * t.row_stride);
            let t = DotTile { rows: t.rows - i, a, c: t.c.wrapping_add(i * t.c_stride), ..*t };
            // SAFETY: rows i and on of A and C lie within what the caller vouches for.
            unsafe {
                i += match t.rows {
                    8.. => matrix_tile::<4>(&t),
                    4.. => matrix_tile::<2>(&t),
                    2.. => matrix_tile::<1>(&t),
                    _ => row_tile(&t),
                };
            }
        }
    }
    fn end(_: DotState) {}

    const PROBE_FLOPS: usize = 16 * 2 * 16;
    #[inline(always)]
    unsafe fn probe(rounds: usize) -> f32 {
        // SAFETY: the processor has BF16; ½ in each element.
        unsafe {
            let (x, mut acc) = (vdupq_n_u16(0x3f00), [vdupq_n_f32(0.0); 16]);
            for _ in 0..rounds {
                for v in &mut acc {
                    *v = bfmmla(*v, x, x);
                }
            }
            let mut sum = acc[0];
            for v in &acc[1..] {
                sum = vaddq_f32(sum, *v);
            }
            vaddvq_f32(sum)
        }
    }
}

/// Columns of a tile: two vectors.
const COLUMNS: usize = 4 * HALF;
/// Bytes of a pair of steps of B.
const PAIR: usize = COLUMNS * 4;

/// Rows of 2 · `M` of a tile, eight columns at a time: M · 4 accumulators of 2 × 2; a step multiplies eight steps of k. Returns its rows.
#[inline(always)]
unsafe fn matrix_tile<const M: usize>(t: &DotTile) -> usize {
    for column in (0..COLUMNS).step_by(8) {
        let (mut a, mut b) = (t.a, t.b.wrapping_add(column * 4));
        // SAFETY: the caller's, as [`Simd::dots`]; the processor has BF16.
        unsafe {
            let mut acc = [[vdupq_n_f32(0.0); 4]; M];
            for _ in 0..t.blocks {
                for eight in 0..DOT_STEPS / 8 {
                    // Two rows of four steps, and the four behind them.
                    let mut rows = [[vdupq_n_u16(0); 2]; M];
                    for (i, rows) in rows.iter_mut().enumerate() {
                        let a = a.add(2 * i * t.row_stride + eight * 16);
                        let (x, y) = (vld1q_u64(a.cast()), vld1q_u64(a.add(t.row_stride).cast()));
                        *rows = [vreinterpretq_u16_u64(vzip1q_u64(x, y)), vreinterpretq_u16_u64(vzip2q_u64(x, y))];
                    }
                    for four in 0..2 {
                        // Four steps of columns 0 and 1, 2 and 3, and so on.
                        let b = b.add((eight * 4 + four * 2) * PAIR);
                        let mut columns = [vdupq_n_u16(0); 4];
                        for (j, columns) in columns.chunks_exact_mut(2).enumerate() {
                            let (x, y) = (vld1q_u32(b.add(j * 16).cast()), vld1q_u32(b.add(PAIR + j * 16).cast()));
                            columns[0] = vreinterpretq_u16_u32(vzip1q_u32(x, y));
                            columns[1] = vreinterpretq_u16_u32(vzip2q_u32(x, y));
                        }
                        for (acc, rows) in acc.iter_mut().zip(&rows) {
                            for (acc, &columns) in acc.iter_mut().zip(&columns) {
                                *acc = bfmmla(*acc, rows[four], columns);
                            }
                        }
                    }
                }
                a = a.wrapping_add(t.block_stride);
                b = b.wrapping_add(DOT_STEPS / 2 * PAIR);
            }
            for (i, acc) in acc.iter().enumerate() {
                for (j, acc) in acc.chunks_exact(2).enumerate() {
                    let [x, y] = [vreinterpretq_f64_f32(acc[0]), vreinterpretq_f64_f32(acc[1])];
                    let c = t.c.add(2 * i * t.c_stride + column + j * HALF);
                    put(t, c, vreinterpretq_f32_f64(vzip1q_f64(x, y)));
                    put(t, c.add(t.c_stride), vreinterpretq_f32_f64(vzip2q_f64(x, y)));
                }
            }
        }
    }
    2 * M
}

/// Stores, or adds to, four elements of C.
#[inline(always)]
unsafe fn put(t: &DotTile, c: *mut f32, v: float32x4_t) {
    // SAFETY: the caller's: C is writable there, and readable when accumulating.
    unsafe { vst1q_f32(c, if t.accumulate { vaddq_f32(vld1q_f32(c), v) } else { v }) }
}

/// One row of a tile. Returns 1.
#[inline(always)]
unsafe fn row_tile(t: &DotTile) -> usize {
    let (mut a, mut b) = (t.a, t.b);
    // SAFETY: the caller's, as [`Simd::dots`]; the processor has BF16.
    unsafe {
        let mut acc = [vdupq_n_f32(0.0); COLUMNS / HALF];
        for _ in 0..t.blocks {
            for eight in 0..DOT_STEPS / 8 {
                let a = vld1q_u16(a.add(eight * 16).cast());
                macro_rules! pair {
                    ($pair:literal) => {
                        for (j, acc) in acc.iter_mut().enumerate() {
                            let b = vld1q_u16(b.add((eight * 4 + $pair) * PAIR + j * 16).cast());
                            asm!(
                                concat!("bfdot {c:v}.4s, {b:v}.8h, {a:v}.2h[", $pair, "]"),
                                c = inout(vreg) *acc, a = in(vreg) a, b = in(vreg) b, options(pure, nomem, nostack)
                            );
                        }
                    };
                }
                pair!(0);
                pair!(1);
                pair!(2);
                pair!(3);
            }
            a = a.wrapping_add(t.block_stride);
            b = b.wrapping_add(DOT_STEPS / 2 * PAIR);
        }
        for (j, &acc) in acc.iter().enumerate() {
            put(t, t.c.add(j * HALF), acc);
        }
    }
    1
}

/// Loads `n` ≤ 4 elements, the other lanes 0.
/// # Safety
/// `p` is valid for reading `n` elements, and the processor has Advanced SIMD; so it does wherever a function of this file is called.
#[inline(always)]
unsafe fn load_half(p: *const f32, n: usize) -> float32x4_t {
    debug_assert!(n <= HALF);
    // SAFETY: the caller's: only elements before `n` are read.
    unsafe {
        let zero = vdupq_n_f32(0.0);
        match n {
            0 => zero,
            1 => vld1q_lane_f32::<0>(p, zero),
            2 => vcombine_f32(vld1_f32(p), vget_low_f32(zero)),
            3 => vld1q_lane_f32::<2>(p.add(2), vcombine_f32(vld1_f32(p), vget_low_f32(zero))),
            _ => vld1q_f32(p),
        }
    }
}

/// Stores the first `n` ≤ 4 elements.
/// # Safety
/// `p` is valid for writing `n` elements.
#[inline(always)]
unsafe fn store_half(p: *mut f32, v: float32x4_t, n: usize) {
    debug_assert!(n <= HALF);
    // SAFETY: the caller's: only elements before `n` are written.
    unsafe {
        match n {
            0 => {}
            1 => vst1q_lane_f32::<0>(p, v),
            2 => vst1_f32(p, vget_low_f32(v)),
            3 => {
                vst1_f32(p, vget_low_f32(v));
                vst1q_lane_f32::<2>(p.add(2), v);
            }
            _ => vst1q_f32(p, v),
        }
    }
}

/// Upper halves of f32 rounded to nearest even; NaN keeps its own, made quiet.
#[inline(always)]
unsafe fn bf16_bits(v: float32x4_t) -> uint16x4_t {
    // SAFETY: the processor has Advanced SIMD.
    unsafe {
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), rounded, quiet))
    }
}

/// Codes of 8 bits as f32.
#[inline(always)]
unsafe fn widen_i8(codes: int8x8_t) -> V {
    // SAFETY: the processor has Advanced SIMD.
    unsafe {
        let words = vmovl_s8(codes);
        [vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(words)))]
    }
}

macro_rules! ops {
    ($($name:ident($($arg:ident),*) => $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: V),*) -> V {
            let half = |i: usize| {
                $(let $arg = $arg[i];)*
                // SAFETY: the token proves Advanced SIMD, which this architecture's code has everywhere, closures too.
                unsafe { $body }
            };
            [half(0), half(1)]
        }
    )*};
}

impl<D: Dots> Simd for Neon<D> {
    const LANES: usize = 2 * HALF;
    const MR: usize = 6;
    const QUERY_ROWS: usize = 4;
    const DOT_ROWS: usize = D::ROWS;
    const DOT_PROBE_FLOPS: usize = D::PROBE_FLOPS;
    type F = V;

    #[inline(always)]
    unsafe fn call<B: Outlined>(self, body: B) {
        #[target_feature(enable = "neon")]
        #[inline(never)]
        unsafe fn apart<D: Dots, B: Outlined>(s: Neon<D>, body: B) {
            // SAFETY: the caller's.
            unsafe { body.run(s) }
        }
        // SAFETY: the caller's; the token proves the features.
        unsafe { apart(self, body) }
    }

    ops! {
        add(a, b) => vaddq_f32(a, b);
        sub(a, b) => vsubq_f32(a, b);
        mul(a, b) => vmulq_f32(a, b);
        div(a, b) => vdivq_f32(a, b);
        reciprocal(v) => vdivq_f32(vdupq_n_f32(1.0), v);
        fma(a, b, c) => vfmaq_f32(c, a, b);
        // `vmaxq_f32` would keep a NaN of either.
        max(a, b) => vbslq_f32(vcgtq_f32(a, b), a, b);
        min(a, b) => vbslq_f32(vcltq_f32(a, b), a, b);
        round(v) => vrndnq_f32(v);
        scale2(v, n) => {
            let exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
            vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
        };
        select_lt(a, b, yes, no) => vbslq_f32(vcltq_f32(a, b), yes, no);
        copysign(v, sign) => vbslq_f32(vdupq_n_u32(1 << 31), sign, v);
        swap_pairs(v) => vrev64q_f32(v);
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
    unsafe fn store_pairs(self, p: *mut u8, even: V, odd: V) {
        // SAFETY: the caller's: 32 bytes are written; every token with dot products proves BF16.
        unsafe {
            let [mut evens, mut odds] = [vdupq_n_u16(0); 2];
            for (words, v) in [(&mut evens, even), (&mut odds, odd)] {
                asm!(
                    "bfcvtn {words:v}.4h, {low:v}.4s",
                    "bfcvtn2 {words:v}.8h, {high:v}.4s",
                    words = out(vreg) *words, low = in(vreg) v[0], high = in(vreg) v[1], options(pure, nomem, nostack)
                );
            }
            vst1q_u16(p.cast(), vzip1q_u16(evens, odds));
            vst1q_u16(p.add(16).cast(), vzip2q_u16(evens, odds));
        }
    }
    #[inline(always)]
    unsafe fn pair_rows(self, p: *mut u8, even: *const bf16, odd: *const bf16) {
        // SAFETY: the caller's; 8 × 2 bytes are read from each row and 32 written.
        unsafe {
            let (even, odd) = (vld1q_u16(even.cast()), vld1q_u16(odd.cast()));
            vst1q_u16(p.cast(), vzip1q_u16(even, odd));
            vst1q_u16(p.add(16).cast(), vzip2q_u16(even, odd));
        }
    }
    #[inline(always)]
    fn fetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { asm!("prfm pldl2keep, [{}]", in(reg) p, options(nostack, preserves_flags, readonly)) }
    }
    #[inline(always)]
    fn fetch_near(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, preserves_flags, readonly)) }
    }
    #[inline(always)]
    fn splat(self, v: f32) -> V {
        // SAFETY: the token proves Advanced SIMD.
        [unsafe { vdupq_n_f32(v) }; 2]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller's.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(HALF))] }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> V {
        // SAFETY: the caller's: HALF elements come before the others.
        unsafe {
            match n.checked_sub(HALF) {
                Some(rest) => [vld1q_f32(p), load_half(p.add(HALF), rest)],
                None => [load_half(p, n), vdupq_n_f32(0.0)],
            }
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller's.
        unsafe {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(HALF), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, v: V, n: usize) {
        // SAFETY: the caller's: HALF elements come before the others.
        unsafe {
            match n.checked_sub(HALF) {
                Some(rest) => {
                    vst1q_f32(p, v[0]);
                    store_half(p.add(HALF), v[1], rest);
                }
                None => store_half(p, v[0], n),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> V {
        // SAFETY: the caller's; 8 × 2 bytes are read.
        unsafe {
            let words = vld1q_u16(p.cast());
            let (low, high) = (vshll_n_u16::<16>(vget_low_u16(words)), vshll_n_u16::<16>(vget_high_u16(words)));
            [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
        }
    }
    #[inline(always)]
    unsafe fn load_even_odd(self, p: *const bf16) -> [V; 2] {
        // SAFETY: the caller's; 16 × 2 bytes are read.
        unsafe {
            let both = [vld1q_u32(p.cast()), vld1q_u32(p.add(8).cast())];
            let upper = vdupq_n_u32(0xffff_0000);
            let (even, odd) = (both.map(|x| vshlq_n_u32::<16>(x)), both.map(|x| vandq_u32(x, upper)));
            [even.map(|x| vreinterpretq_f32_u32(x)), odd.map(|x| vreinterpretq_f32_u32(x))]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> V {
        // SAFETY: the caller's; 8 bytes are read.
        unsafe { widen_i8(vld1_s8(p)) }
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> [V; 2] {
        // SAFETY: the caller's; 8 bytes are read. Below 16 a code is the same with a sign.
        unsafe {
            let both = vld1_u8(p);
            let (even, odd) = (vand_u8(both, vdup_n_u8(15)), vshr_n_u8::<4>(both));
            [widen_i8(vreinterpret_s8_u8(even)), widen_i8(vreinterpret_s8_u8(odd))]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> V {
        let [mut low, mut high] = self.splat(0.0);
        // SAFETY: the caller's; 8 × 2 bytes are read. The conversion is part of Advanced SIMD.
        unsafe {
            asm!(
                "fcvtl {low:v}.4s, {words:v}.4h",
                "fcvtl2 {high:v}.4s, {words:v}.8h",
                low = out(vreg) low, high = out(vreg) high, words = in(vreg) vld1q_u16(p.cast()), options(pure, nomem, nostack)
            );
        }
        [low, high]
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: V) {
        // SAFETY: the caller's; 8 × 2 bytes are written.
        unsafe { vst1q_u16(p.cast(), vcombine_u16(bf16_bits(v[0]), bf16_bits(v[1]))) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: V) {
        // SAFETY: the caller's; 8 × 2 bytes are written. The conversion is part of Advanced SIMD.
        unsafe {
            let mut words = vdupq_n_u16(0);
            asm!(
                "fcvtn {words:v}.4h, {low:v}.4s",
                "fcvtn2 {words:v}.8h, {high:v}.4s",
                words = out(vreg) words, low = in(vreg) v[0], high = in(vreg) v[1], options(pure, nomem, nostack)
            );
            vst1q_u16(p.cast(), words);
        }
    }
    #[inline(always)]
    fn interleave(self, [even, odd]: [V; 2]) -> [V; 2] {
        // SAFETY: the token proves Advanced SIMD.
        unsafe {
            [
                [vzip1q_f32(even[0], odd[0]), vzip2q_f32(even[0], odd[0])],
                [vzip1q_f32(even[1], odd[1]), vzip2q_f32(even[1], odd[1])],
            ]
        }
    }
    #[inline(always)]
    fn deinterleave(self, [a, b]: [V; 2]) -> [V; 2] {
        // SAFETY: the token proves Advanced SIMD.
        unsafe { [[vuzp1q_f32(a[0], a[1]), vuzp1q_f32(b[0], b[1])], [vuzp2q_f32(a[0], a[1]), vuzp2q_f32(b[0], b[1])]] }
    }
    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        for i in [0, HALF] {
            for j in [0, HALF] {
                // SAFETY: the caller's: the square of HALF rows from i and HALF columns from j lies within 8 rows of 8 elements. Lanes are
                // exchanged between pairs of rows, then pairs of lanes.
                unsafe {
                    let (src, dst) = (src.add(i * src_stride + j), dst.add(j * dst_stride + i));
                    let (a, b) = (vld1q_f32(src), vld1q_f32(src.add(src_stride)));
                    let (c, d) = (vld1q_f32(src.add(2 * src_stride)), vld1q_f32(src.add(3 * src_stride)));
                    let (ab, ab2) = (vreinterpretq_f64_f32(vtrn1q_f32(a, b)), vreinterpretq_f64_f32(vtrn2q_f32(a, b)));
                    let (cd, cd2) = (vreinterpretq_f64_f32(vtrn1q_f32(c, d)), vreinterpretq_f64_f32(vtrn2q_f32(c, d)));
                    vst1q_f32(dst, vreinterpretq_f32_f64(vtrn1q_f64(ab, cd)));
                    vst1q_f32(dst.add(dst_stride), vreinterpretq_f32_f64(vtrn1q_f64(ab2, cd2)));
                    vst1q_f32(dst.add(2 * dst_stride), vreinterpretq_f32_f64(vtrn2q_f64(ab, cd)));
                    vst1q_f32(dst.add(3 * dst_stride), vreinterpretq_f32_f64(vtrn2q_f64(ab2, cd2)));
                }
            }
        }
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: the token proves Advanced SIMD.
        unsafe { vaddvq_f32(vaddq_f32(v[0], v[1])) }
    }
    #[inline(always)]
    fn sum_each(self, v: &[V; 16]) -> V {
        let mut sums = self.splat(0.0);
        for (sum, v) in sums.iter_mut().zip(v.chunks_exact(HALF)) {
            // SAFETY: the token proves Advanced SIMD. Halves are added, then lanes side by side.
            unsafe {
                let (a, b) = (vaddq_f32(v[0][0], v[0][1]), vaddq_f32(v[1][0], v[1][1]));
                let (c, d) = (vaddq_f32(v[2][0], v[2][1]), vaddq_f32(v[3][0], v[3][1]));
                *sum = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
            }
        }
        sums
    }
    #[inline(always)]
    fn max_lane(self, v: V) -> f32 {
        // SAFETY: the token proves Advanced SIMD.
        unsafe { vmaxvq_f32(vmaxq_f32(v[0], v[1])) }
    }
}
