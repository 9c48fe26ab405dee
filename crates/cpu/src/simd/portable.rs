//! Vectors as arrays, for any processor.

use half::{bf16, f16};

use super::{Outlined, Simd};

/// The portable token.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

const N: usize = 4;
type V = [f32; N];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    const LANES: usize = N;
    const MR: usize = 6;
    const QUERY_ROWS: usize = 4;
    type F = V;

    #[inline(never)]
    unsafe fn call<B: Outlined>(self, body: B) {
        // SAFETY: the caller's.
        unsafe { body.run(self) }
    }
    #[inline(always)]
    fn fetch(self, _: *const u8) {}
    #[inline(always)]
    fn fetch_near(self, _: *const u8) {}
    #[inline(always)]
    fn splat(self, v: f32) -> V {
        [v; N]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller's; arrays of f32 have no padding and the read is unaligned.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> V {
        // SAFETY: only i < n is read.
        std::array::from_fn(|i| if i < n { unsafe { p.add(i).read() } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller's.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, v: V, n: usize) {
        for (i, x) in v.into_iter().enumerate().take(n) {
            // SAFETY: i < n.
            unsafe { p.add(i).write(x) };
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> V {
        // SAFETY: the caller's.
        std::array::from_fn(|i| unsafe { p.add(i).read() }.to_f32())
    }
    #[inline(always)]
    unsafe fn load_even_odd(self, p: *const bf16) -> [V; 2] {
        // SAFETY: the caller's; 2i + odd stays below 2 · N.
        [0, 1].map(|odd| std::array::from_fn(|i| unsafe { p.add(2 * i + odd).read() }.to_f32()))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> V {
        // SAFETY: the caller's.
        std::array::from_fn(|i| f32::from(unsafe { p.add(i).read() }))
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> [V; 2] {
        // SAFETY: the caller's.
        [0, 4].map(|shift| std::array::from_fn(|i| f32::from(unsafe { p.add(i).read() } >> shift & 15)))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> V {
        // SAFETY: the caller's.
        std::array::from_fn(|i| unsafe { p.add(i).read() }.to_f32())
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: V) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { p.add(i).write(bf16::from_f32(x)) };
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: V) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { p.add(i).write(f16::from_f32(x)) };
        }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn reciprocal(self, v: V) -> V {
        v.map(|x| 1.0 / x)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self, v: V) -> V {
        // Adding 1.5·2²³ leaves no fraction bits, so the sum is rounded to an integer.
        const MAGIC: f32 = 12_582_912.0;
        v.map(|x| (x + MAGIC) - MAGIC)
    }
    #[inline(always)]
    fn scale2(self, v: V, n: V) -> V {
        zip(v, n, |v, n| v * f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, yes: V, no: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn copysign(self, v: V, sign: V) -> V {
        zip(v, sign, f32::copysign)
    }
    #[inline(always)]
    fn swap_pairs(self, v: V) -> V {
        [v[1], v[0], v[3], v[2]]
    }
    #[inline(always)]
    fn interleave(self, [a, b]: [V; 2]) -> [V; 2] {
        [[a[0], b[0], a[1], b[1]], [a[2], b[2], a[3], b[3]]]
    }
    #[inline(always)]
    fn deinterleave(self, [a, b]: [V; 2]) -> [V; 2] {
        [[a[0], a[2], b[0], b[2]], [a[1], a[3], b[1], b[3]]]
    }
    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        for i in 0..N {
            for j in 0..N {
                // SAFETY: the caller's: i and j stay below N.
                unsafe { dst.add(j * dst_stride + i).write(src.add(i * src_stride + j).read()) };
            }
        }
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    fn sum_each(self, v: &[V; 16]) -> V {
        std::array::from_fn(|i| self.sum(v[i]))
    }
    #[inline(always)]
    fn max_lane(self, v: V) -> f32 {
        v[0].max(v[1]).max(v[2].max(v[3]))
    }
}
