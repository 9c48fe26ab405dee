//! Vectors of f32, loads of narrower elements, dot products of bf16 and products of int8; the only place that names `core::arch`.
//!
//! Kernels are generic over [`Simd`] and marked `#[inline(always)]`; `dispatch` instantiates each once for every instruction set
//! inside a function with the matching `#[target_feature]`.

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub mod dots;
#[cfg(target_arch = "x86_64")]
mod int8_x86;
#[cfg(target_arch = "aarch64")]
pub mod neon;
#[cfg(target_arch = "x86_64")]
pub use int8_x86::Vnni;
pub mod portable;

use half::{bf16, f16};

/// Steps of k of a block of bf16 dot products.
pub const DOT_STEPS: usize = 32;

/// Operands of a tile of bf16 dot products: C[rows, COLUMNS] (+)= A[rows, k] · B[k, COLUMNS] with two vectors of COLUMNS, k in blocks of
/// [`DOT_STEPS`].
///
/// A's rows hold the steps of a block side by side. B holds pairs of steps: for each pair, the two elements of every column side by
/// side, so that a block is [16 pairs, COLUMNS, 2].
#[derive(Clone, Copy)]
pub struct DotTile {
    /// Rows, 1 to the instruction set's `DOT_ROWS`.
    pub rows: usize,
    /// Blocks of k, at least 1.
    pub blocks: usize,
    /// A.
    pub a: *const u8,
    /// Bytes between rows of A.
    pub row_stride: usize,
    /// Bytes between blocks of A.
    pub block_stride: usize,
    /// B.
    pub b: *const u8,
    /// C.
    pub c: *mut f32,
    /// Elements between rows of C.
    pub c_stride: usize,
    /// Whether C is added to.
    pub accumulate: bool,
}

/// Steps of k of a block of int8 products.
pub const INT8_BLOCK: usize = 64;

/// Operands of a register tile of int8 products: C[M, 2·LANES] (+)= A[M, k] · B[k, 2·LANES] in i32, k in blocks of [`INT8_BLOCK`].
///
/// A's rows hold the codes of a block side by side, [`INT8_BLOCK`] apart, 4 / [`Simd::INT8_STEPS`] bytes each. B holds groups of `INT8_STEPS` steps: for
/// each group the bytes of every column side by side, code + [`Simd::INT8_SHIFT`] each.
#[derive(Clone, Copy)]
pub struct Int8Tile {
    /// Blocks of k, at least 1.
    pub blocks: usize,
    /// A.
    pub a: *const u8,
    /// Bytes between blocks of A.
    pub block_stride: usize,
    /// B.
    pub b: *const u8,
    /// C.
    pub c: *mut i32,
    /// Elements between rows of C.
    pub c_stride: usize,
    /// Whether C is added to.
    pub accumulate: bool,
    /// Memory that is read next, and the bytes of it that each sixteenth of a block fetches.
    pub fetch: (*const u8, usize),
}

/// Operands of a register tile of tiled attention: C[QUERY_ROWS, vectors·LANES] = C · scale + A · B.
#[derive(Clone, Copy)]
pub struct QueryTile {
    /// Steps.
    pub k: usize,
    /// A.
    pub a: *const f32,
    /// Elements between rows of A, whose steps are adjacent; `None` where its rows are adjacent and `QUERY_ROWS` lie between steps.
    pub row_stride: Option<usize>,
    /// B, whose steps are `vectors`·LANES apart.
    pub b: *const f32,
    /// C, whose rows are `vectors`·LANES apart.
    pub c: *mut f32,
    /// `vectors`·LANES factors that each row of C is multiplied by before A · B is added to it; C is overwritten when `None`.
    pub scale: Option<*const f32>,
    /// Memory that is read next, and the bytes between what is fetched of it at each step.
    pub fetch: (*const u8, usize),
}

/// Operands of the scores of 4 heads with 3 keys: p[3, 4] = k[3, D] · q[4, D]ᵀ.
#[derive(Clone, Copy)]
pub struct ScoreTile<T> {
    /// Dimensions of a head.
    pub d: usize,
    /// The heads' queries, D f32 apart; in the order of [`Load::load_two`].
    pub q: *const f32,
    /// The keys.
    pub k: *const T,
    /// Elements between keys.
    pub stride: usize,
    /// The scores.
    pub p: *mut f32,
    /// Keys that are read later and fetched on the way, as far apart.
    pub next: *const T,
}

/// Operands of the weighted values of 4 heads over [`VALUE_COLUMNS`] dimensions: acc[4, columns] = acc · alpha + pᵀ[4, n] · v[n, columns].
#[derive(Clone, Copy)]
pub struct ValueTile<T> {
    /// Keys.
    pub n: usize,
    /// The heads' weights.
    pub p: *const f32,
    /// The values.
    pub v: *const T,
    /// Elements between values.
    pub stride: usize,
    /// The results so far, in the order of [`Load::load_two`].
    pub acc: *mut f32,
    /// Elements between results.
    pub acc_stride: usize,
    /// Each head's factor.
    pub alpha: *const f32,
    /// Values that are read later and fetched on the way: the first half of the dimensions, then the second.
    pub next: [*const T; 2],
    /// Elements between what is fetched with each key.
    pub next_stride: usize,
}

/// Dimensions of a [`ValueTile`].
pub const VALUE_COLUMNS: usize = 48;

/// What a thread keeps between tiles of dot products of one work item.
#[derive(Default)]
pub struct DotState {
    /// Rows that tile registers are configured for.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only AMX has tile registers"))]
    rows: usize,
}

/// What of a kernel is a function of its own: what has many variants, so that each is compiled apart and in parallel.
pub trait Outlined {
    /// Runs it. Marked `#[inline(always)]`.
    /// # Safety
    /// The fields point to what they say, readable, and writable where they are `*mut`.
    unsafe fn run<S: Simd>(self, s: S);
}

/// A token of an instruction set; holding one proves that the processor has it.
pub trait Simd: Copy + Send + Sync + 'static {
    /// f32 elements of a vector.
    const LANES: usize;
    /// Rows of the register tile: `MR` × 2 accumulators, two vectors and a broadcast fit the register file.
    const MR: usize;
    /// Rows of the register tile of tiled attention: `QUERY_ROWS` × 3 accumulators, three vectors and a broadcast fit the register file.
    const QUERY_ROWS: usize;
    /// Most rows of a tile of bf16 dot products; 0 where there are none and kernels widen bf16 to f32.
    const DOT_ROWS: usize = 0;
    /// Columns of a tile of bf16 dot products, and of a panel of B.
    const DOT_COLUMNS: usize = 2 * Self::LANES;
    /// Operations of a round of [`Simd::dot_probe`].
    const DOT_PROBE_FLOPS: usize = 0;
    /// Steps of k whose products an int8 tile adds at once: 2 where codes of x are widened to 16 bits, 4 where bytes are multiplied.
    const INT8_STEPS: usize = 2;
    /// What is added to the codes of weights in memory: 128 where bytes without sign are multiplied.
    const INT8_SHIFT: i32 = 0;
    /// Operations of a round of [`Simd::int8_probe`].
    const INT8_PROBE_OPS: usize = 2 * 2 * 8;
    /// `LANES` f32.
    type F: Copy;

    /// Runs `body` as a function of its own, with the features of this instruction set's vectors alone: not those of its dot products and
    /// int8 products.
    /// # Safety
    /// As [`Outlined::run`].
    unsafe fn call<B: Outlined>(self, body: B);

    /// All lanes `v`.
    fn splat(self, v: f32) -> Self::F;
    /// Loads `LANES` elements.
    /// # Safety
    /// `p` is valid for reading `LANES` elements; alignment is not needed.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// Loads `n ≤ LANES` elements, the other lanes 0.
    /// # Safety
    /// `p` is valid for reading `n` elements.
    unsafe fn load_n(self, p: *const f32, n: usize) -> Self::F;
    /// Stores `LANES` elements.
    /// # Safety
    /// `p` is valid for writing `LANES` elements.
    unsafe fn store(self, p: *mut f32, v: Self::F);
    /// Stores the first `n ≤ LANES` elements.
    /// # Safety
    /// `p` is valid for writing `n` elements.
    unsafe fn store_n(self, p: *mut f32, v: Self::F, n: usize);
    /// Loads `LANES` bf16.
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_bf16(self, p: *const bf16) -> Self::F;
    /// Loads 2 · `LANES` bf16: those at even places, and those at odd ones.
    /// # Safety
    /// `p` is valid for reading 2 · `LANES` elements.
    unsafe fn load_even_odd(self, p: *const bf16) -> [Self::F; 2];
    /// Loads `LANES` codes of 8 bits.
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_i8(self, p: *const i8) -> Self::F;
    /// Loads 2 · `LANES` codes of 4 bits: those at even places, in the low halves of `LANES` bytes, and those at odd ones.
    /// # Safety
    /// `p` is valid for reading `LANES` bytes.
    unsafe fn load_u4(self, p: *const u8) -> [Self::F; 2];
    /// Loads `LANES` f16.
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_f16(self, p: *const f16) -> Self::F;
    /// Stores `LANES` elements rounded to nearest even.
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::F);
    /// Stores `LANES` elements rounded to nearest even.
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store_f16(self, p: *mut f16, v: Self::F);

    /// A tile of dot products, accumulated in f32. Call [`Simd::end_dots`] after the last of an item.
    /// # Safety
    /// A is readable as [rows, blocks · DOT_STEPS] bf16, B as [blocks · DOT_STEPS, DOT_COLUMNS] bf16, C writable (and readable, when
    /// accumulating) as [rows, DOT_COLUMNS]. `DOT_ROWS` is not 0.
    unsafe fn dots(self, _state: &mut DotState, _t: &DotTile) {
        unreachable!("no dot products on this instruction set")
    }
    /// `rounds` × [`Simd::DOT_PROBE_FLOPS`] operations of dot products whose operands stay in registers.
    fn dot_probe(self, _rounds: usize) -> f32 {
        unreachable!("no dot products on this instruction set")
    }
    /// Gives tile registers back.
    fn end_dots(self, _state: DotState) {}
    /// Stores `LANES` pairs (even, odd) of bf16, rounded to nearest even.
    /// # Safety
    /// `p` is valid for writing 4 · `LANES` bytes. `DOT_ROWS` is not 0.
    unsafe fn store_pairs(self, _p: *mut u8, _even: Self::F, _odd: Self::F) {
        unreachable!("no dot products on this instruction set")
    }
    /// Stores `LANES` pairs of one element from each of two rows of bf16.
    /// # Safety
    /// `even` and `odd` are valid for reading `LANES` elements, `p` for writing 4 · `LANES` bytes. `DOT_ROWS` is not 0.
    unsafe fn pair_rows(self, _p: *mut u8, _even: *const bf16, _odd: *const bf16) {
        unreachable!("no dot products on this instruction set")
    }

    /// A register tile of int8 products.
    /// # Safety
    /// A is readable as [M, blocks · INT8_BLOCK] codes, B as [blocks · INT8_BLOCK, 2·LANES] bytes, C writable (and readable, when accumulating) as
    /// [M, 2·LANES].
    #[inline(always)]
    unsafe fn int8_tile<const M: usize>(self, t: &Int8Tile) {
        /// Columns at once.
        const N: usize = 8;
        let width = 2 * Self::LANES;
        for first in (0..width).step_by(N) {
            let mut acc = [[0i32; N]; M];
            for block in 0..t.blocks {
                for pair in 0..INT8_BLOCK / 2 {
                    // SAFETY: the caller's: a pair of codes of each row, a pair of bytes of each column.
                    unsafe {
                        let b =
                            t.b.add((block * INT8_BLOCK + 2 * pair) * width + 2 * first).cast::<[[i8; 2]; N]>().read_unaligned();
                        for (i, acc) in acc.iter_mut().enumerate() {
                            let a = t.a.add(block * t.block_stride + (i * INT8_BLOCK + 2 * pair) * 2);
                            let a = a.cast::<[i16; 2]>().read_unaligned().map(i32::from);
                            for (acc, b) in acc.iter_mut().zip(b) {
                                *acc += a[0] * i32::from(b[0]) + a[1] * i32::from(b[1]);
                            }
                        }
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                for (j, acc) in acc.iter().enumerate() {
                    // SAFETY: the caller's.
                    unsafe {
                        let c = t.c.add(i * t.c_stride + first + j);
                        c.write(if t.accumulate { c.read() + acc } else { *acc });
                    }
                }
            }
        }
    }
    /// `rounds` × [`Simd::INT8_PROBE_OPS`] operations of int8 products whose operands stay in registers.
    #[inline(always)]
    fn int8_probe(self, rounds: usize) -> i32 {
        let mut acc = [0i32; 8];
        let x = core::hint::black_box([1i16, 2]).map(i32::from);
        for _ in 0..rounds {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = acc.wrapping_add(x[0] * (*acc & 3) + x[1] * i as i32);
            }
        }
        acc.into_iter().fold(0, i32::wrapping_add)
    }

    /// Computes a tile of 3 vectors and returns true where this instruction set has it in assembly; else does nothing.
    /// # Safety
    /// A is readable as [QUERY_ROWS, k], B as [k, 3·LANES], C writable (and readable, when scaled) as [QUERY_ROWS, 3·LANES].
    #[inline(always)]
    unsafe fn query_tile(self, _t: &QueryTile) -> bool {
        false
    }

    /// Computes a tile of scores, `HEADS` apart from key to key, and returns true where this instruction set has it in assembly, for this D;
    /// else does nothing.
    /// # Safety
    /// q is readable as [4, D], k as [3, D], p writable as [3, 4].
    #[inline(always)]
    unsafe fn score_tile<T: Load, const HEADS: usize>(self, _t: &ScoreTile<T>) -> bool {
        false
    }
    /// Computes a tile of weighted values, whose weights are `HEADS` apart from key to key, and returns true where this instruction set has it in
    /// assembly, for elements of more than a byte; else does nothing.
    /// # Safety
    /// There is a key; p is readable as [n, 4], v as [n, VALUE_COLUMNS], alpha as 4 f32, acc readable and writable as [4, VALUE_COLUMNS].
    #[inline(always)]
    unsafe fn value_tile<T: Load, const HEADS: usize>(self, _t: &ValueTile<T>) -> bool {
        false
    }

    /// Asks for the cache line at `p`, which may be any address, in second-level cache.
    fn fetch(self, p: *const u8);
    /// Asks for the cache line at `p`, which may be any address, in first-level cache.
    fn fetch_near(self, p: *const u8);
    /// a + b.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a − b.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// 1 / v, at most 2 ulp, for finite v of at least 1.
    fn reciprocal(self, v: Self::F) -> Self::F;
    /// a · b + c, fused where the processor does so.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The greater; `b` when either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The lesser; `b` when either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Rounded to the nearest integer, ties to even; |v| < 2²².
    fn round(self, v: Self::F) -> Self::F;
    /// v · 2ⁿ for v in ½ ..= 2 and integers n in −126 ..= 128; n = 128 may give ∞ where v < 1 too. NaN gives NaN.
    fn scale2(self, v: Self::F, n: Self::F) -> Self::F;
    /// `yes` where a < b, else `no`.
    fn select_lt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// |v| with the sign of `sign`.
    fn copysign(self, v: Self::F, sign: Self::F) -> Self::F;
    /// Lanes 2i and 2i + 1 exchanged.
    fn swap_pairs(self, v: Self::F) -> Self::F;
    /// Two vectors that lie side by side, from their elements at even places and those at odd ones.
    fn interleave(self, v: [Self::F; 2]) -> [Self::F; 2];
    /// The elements at even places of two vectors that lie side by side, and those at odd ones.
    fn deinterleave(self, v: [Self::F; 2]) -> [Self::F; 2];
    /// Transposes a square of `LANES` × `LANES` elements of 32 bits.
    /// # Safety
    /// `src` is readable and `dst` writable as `LANES` rows of `LANES` elements, `src_stride` and `dst_stride` apart; they do not overlap.
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize);
    /// Sum of all lanes, in a fixed order.
    fn sum(self, v: Self::F) -> f32;
    /// Lane i holds the sum of all lanes of `v[i]`, in a fixed order; what is behind the first `LANES` of `v` is not read.
    fn sum_each(self, v: &[Self::F; 16]) -> Self::F;
    /// Greatest lane; NaN is not reliably kept.
    fn max_lane(self, v: Self::F) -> f32;
}

/// What vectors load from.
pub trait Load: Copy + Send + Sync + 'static {
    /// Elements of one of these.
    const PACKED: usize = 1;
    /// Whether these are codes to which a minimum is added.
    const MINIMA: bool = false;
    /// Whether [`Load::load_two`] gives elements at even places and at odd ones, not halves.
    const EVEN_ODD: bool = false;
    /// Element `i`, as f32.
    /// # Safety
    /// `p` is valid for reading element `i`.
    unsafe fn get(p: *const Self, i: usize) -> f32;
    /// Loads `LANES` elements as f32.
    /// # Safety
    /// As [`Simd::load`].
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { Self::load_n(s, p, S::LANES) }
    }
    /// Loads 2 · `LANES` elements, in the order that costs least.
    /// # Safety
    /// `p` is valid for reading 2 · `LANES` elements.
    #[inline(always)]
    unsafe fn load_two<S: Simd>(s: S, p: *const Self) -> [S::F; 2] {
        // SAFETY: the caller's.
        unsafe { [Self::load(s, p), Self::load(s, p.add(S::LANES))] }
    }
    /// Loads `n ≤ LANES` elements, the other lanes 0.
    /// # Safety
    /// `p` is valid for reading `n` elements.
    #[inline(always)]
    unsafe fn load_n<S: Simd>(s: S, p: *const Self, n: usize) -> S::F {
        let mut lanes = [0f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: i < n.
            *lane = unsafe { Self::get(p, i) };
        }
        // SAFETY: LANES ≤ 16.
        unsafe { s.load(lanes.as_ptr()) }
    }
}

/// An element type that vectors load from and store to.
pub trait Elem: Load {
    /// Stores `LANES` elements.
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store<S: Simd>(s: S, p: *mut Self, v: S::F);
    /// Rounded to nearest even.
    fn from_f32(v: f32) -> Self;

    /// Stores the first `n ≤ LANES` elements.
    /// # Safety
    /// `p` is valid for writing `n` elements.
    #[inline(always)]
    unsafe fn store_n<S: Simd>(s: S, p: *mut Self, v: S::F, n: usize) {
        let mut lanes = [0f32; 16];
        // SAFETY: LANES ≤ 16.
        unsafe { s.store(lanes.as_mut_ptr(), v) };
        for (i, &lane) in lanes.iter().enumerate().take(n) {
            // SAFETY: i < n.
            unsafe { p.add(i).write(Self::from_f32(lane)) };
        }
    }
}

impl Load for i8 {
    #[inline(always)]
    unsafe fn get(p: *const i8, i: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe { f32::from(*p.add(i)) }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const i8) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_i8(p) }
    }
}

/// Two codes of 4 bits: the first in the low half.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct TwoU4(u8);

impl Load for TwoU4 {
    const PACKED: usize = 2;
    const MINIMA: bool = true;
    const EVEN_ODD: bool = true;
    #[inline(always)]
    unsafe fn get(p: *const TwoU4, i: usize) -> f32 {
        // SAFETY: the caller's.
        f32::from(unsafe { (*p.add(i / 2)).0 } >> (i % 2 * 4) & 15)
    }
    #[inline(always)]
    unsafe fn load_two<S: Simd>(s: S, p: *const TwoU4) -> [S::F; 2] {
        // SAFETY: the caller's.
        unsafe { s.load_u4(p.cast()) }
    }
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn get(p: *const f32, i: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe { *p.add(i) }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    unsafe fn load_n<S: Simd>(s: S, p: *const f32, n: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_n(p, n) }
    }
}

impl Elem for f32 {
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, p: *mut f32, v: S::F) {
        // SAFETY: the caller's.
        unsafe { s.store(p, v) }
    }
    #[inline(always)]
    unsafe fn store_n<S: Simd>(s: S, p: *mut f32, v: S::F, n: usize) {
        // SAFETY: the caller's.
        unsafe { s.store_n(p, v, n) }
    }
    #[inline(always)]
    fn from_f32(v: f32) -> f32 {
        v
    }
}

macro_rules! half_elem {
    ($t:ty, $load:ident, $store:ident $(, $two:item, $even_odd:item)?) => {
        impl Load for $t {
            $($two $even_odd)?
            #[inline(always)]
            unsafe fn get(p: *const $t, i: usize) -> f32 {
                // SAFETY: the caller's.
                unsafe { *p.add(i) }.to_f32()
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const $t) -> S::F {
                // SAFETY: the caller's.
                unsafe { s.$load(p) }
            }
        }
        impl Elem for $t {
            #[inline(always)]
            unsafe fn store<S: Simd>(s: S, p: *mut $t, v: S::F) {
                // SAFETY: the caller's.
                unsafe { s.$store(p, v) }
            }
            #[inline(always)]
            fn from_f32(v: f32) -> $t {
                <$t>::from_f32(v)
            }
        }
    };
}
half_elem!(
    bf16,
    load_bf16,
    store_bf16,
    #[inline(always)]
    unsafe fn load_two<S: Simd>(s: S, p: *const bf16) -> [S::F; 2] {
        // SAFETY: the caller's.
        unsafe { s.load_even_odd(p) }
    },
    const EVEN_ODD: bool = true;
);
half_elem!(f16, load_f16, store_f16);
