//! Quantised key/value caches: what codes and scales are, and what they give back. Every backend stores these bits.
//!
//! Rows of the cache are numbered from 0 for each sequence; [`GROUP`] rows from a multiple of it on are a group. Keys share a scale along
//! a group, channel by channel; values share one along [`GROUP`] channels of their row, the last ones of an odd D fewer:
//!
//! | | codes of a row | scales | minima |
//! |---|---|---|---|
//! | keys, int8 | D bytes | D for each group of rows | |
//! | values, int8 | D bytes | ⌈D / 32⌉ for each row | |
//! | keys, int4 | ⌈D / 2⌉ bytes | D for each group of rows | D behind the scales |
//! | values, int4 | ⌈D / 2⌉ bytes | ⌈D / 32⌉ for each row | ⌈D / 32⌉ behind the scales |
//!
//! A group of keys is quantised when its last row is there, from rows rounded to the compute dtype; until then its rows are kept as f32,
//! which holds every compute dtype. So codes do not depend on how tokens were chunked. A row of values is quantised when it is appended.
//!
//! **int8** is symmetric: with a the greatest |x|, scale = f16↑(a / 127), code = x / scale in −127 … 127, and code · scale comes back.
//! **int4** is not: minimum = f16↓(least x), scale = f16↑((greatest x − minimum) / 15), code = (x − minimum) / scale in 0 … 15, and
//! minimum + code · scale comes back. Byte i of a row holds channel 2i in its low half and 2i + 1 in its high half; a last half is 0.
//!
//! All arithmetic is f32, each operation rounded to nearest even: "/ scale" is a product with 1 / scale, and codes are rounded to
//! the nearest integer, ties to even. f16↑ and f16↓ round towards +∞ and −∞, subnormal numbers kept, and saturate at ±65504: no
//! element of a range is beyond its codes, so an error is at most half a scale, up to ±127 · 65504. code · scale is exact in f32, so that fused and
//! separate multiplication and addition give the same. A scale is 0 where the elements are all 0 (int8) or all equal to the minimum
//! (int4); codes are 0 then. A minimum is never −0.
//!
//! **A row that holds NaN or ±∞** comes back as NaN, every element, and changes no other row: it counts for no scale and its codes are
//! 0. Its values have NaN scales and minima (0x7e00). A group of keys has a word of 32 bits, of which bit i stands for such a row i.

use std::{fmt, str::FromStr};

use half::f16;

use crate::{DType, Error, ErrorKind, Result};

/// Rows of keys, and channels of values, that share a scale.
pub const GROUP: usize = 32;

/// Channels whose ranges are found at once.
const LANES: usize = 16;

/// How a quantised cache holds an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Codes {
    /// 8 bits, symmetric.
    Int8,
    /// 4 bits, with a minimum.
    Int4,
}

/// How a cache holds its elements: as a dtype, or as codes with scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CacheDType {
    /// Elements of a dtype.
    Elements(DType),
    /// Codes with scales.
    Codes(Codes),
}

impl CacheDType {
    /// Elements of [`DType::F32`].
    pub const F32: CacheDType = CacheDType::Elements(DType::F32);
    /// Elements of [`DType::BF16`].
    pub const BF16: CacheDType = CacheDType::Elements(DType::BF16);
    /// Elements of [`DType::F16`].
    pub const F16: CacheDType = CacheDType::Elements(DType::F16);
    /// Codes of 8 bits.
    pub const INT8: CacheDType = CacheDType::Codes(Codes::Int8);
    /// Codes of 4 bits.
    pub const INT4: CacheDType = CacheDType::Codes(Codes::Int4);

    /// Everything that a cache can be.
    pub const ALL: [CacheDType; 5] = [CacheDType::F32, CacheDType::BF16, CacheDType::F16, CacheDType::INT8, CacheDType::INT4];

    /// The name users write: `f32`, `bf16`, `f16`, `int8`, `int4`.
    pub const fn name(self) -> &'static str {
        match self {
            CacheDType::Elements(dtype) => dtype.name(),
            CacheDType::Codes(Codes::Int8) => "int8",
            CacheDType::Codes(Codes::Int4) => "int4",
        }
    }

    /// The dtype of its elements, where it is not quantised.
    pub const fn elements(self) -> Option<DType> {
        match self {
            CacheDType::Elements(dtype) => Some(dtype),
            CacheDType::Codes(_) => None,
        }
    }

    /// The dtype of its elements on a GPU.
    ///
    /// # Errors
    /// `Unavailable` where it is quantised, which no kernel of a GPU reads.
    pub fn on_gpu(self) -> Result<DType> {
        let refused = || format!("a cache of {self} is not yet available on a GPU; accepted there: f32, bf16, f16");
        self.elements().ok_or_else(|| Error::new(ErrorKind::Unavailable, refused()))
    }

    /// Its codes, where it is quantised.
    pub const fn codes(self) -> Option<Codes> {
        match self {
            CacheDType::Elements(_) => None,
            CacheDType::Codes(codes) => Some(codes),
        }
    }

    /// The dtype that rows are rounded to on their way to it, in a block that computes in `dtype`.
    pub const fn rounds_to(self, dtype: DType) -> DType {
        match self {
            CacheDType::Elements(own) => own,
            CacheDType::Codes(_) => dtype,
        }
    }

    /// Bytes of a row of keys and one of values of a head with `head_dim` dimensions, with their share of the scales.
    pub fn row_bytes(self, head_dim: usize) -> f64 {
        match self {
            CacheDType::Elements(dtype) => (2 * head_dim * dtype.size()) as f64,
            CacheDType::Codes(codes) => {
                let group = codes.scales(head_dim) * size_of::<f16>() + size_of::<u32>();
                let row = 2 * codes.row_bytes(head_dim) + codes.value_scales(head_dim) * size_of::<f16>();
                row as f64 + group as f64 / GROUP as f64
            }
        }
    }
}

impl From<DType> for CacheDType {
    fn from(dtype: DType) -> Self {
        CacheDType::Elements(dtype)
    }
}

impl PartialEq<DType> for CacheDType {
    fn eq(&self, other: &DType) -> bool {
        self.elements() == Some(*other)
    }
}

impl fmt::Display for CacheDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for CacheDType {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let found = CacheDType::ALL.into_iter().find(|d| d.name() == s);
        found.ok_or_else(|| Error::invalid(format!("unknown cache dtype '{s}'; accepted: f32, bf16, f16, int8, int4")))
    }
}

/// Scale and minimum of some elements, with what codes are computed by.
#[derive(Clone, Copy)]
struct Range {
    scale: f16,
    min: f16,
    /// 1 / scale; 0 where the scale is.
    inverse: f32,
}

/// `v` ≥ 0 in f16, rounded up; −0 becomes 0.
fn f16_up(v: f32) -> f16 {
    let near = f16::from_f32(v + 0.0);
    let up = if near.to_f32() < v { f16::from_bits(near.to_bits() + 1) } else { near };
    if up.is_finite() { up } else { f16::MAX }
}

/// `v` in f16, rounded down; −0 becomes 0.
fn f16_down(v: f32) -> f16 {
    let near = f16::from_f32(v + 0.0);
    let down = match near.to_f32() > v {
        false => near,
        true if near == f16::ZERO => f16::from_bits(0x8001),
        true if near > f16::ZERO => f16::from_bits(near.to_bits() - 1),
        true => f16::from_bits(near.to_bits() + 1),
    };
    if down.is_finite() { down } else { f16::MIN }
}

impl Codes {
    /// Bytes of the codes of a row of `head_dim` channels.
    pub const fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Codes::Int8 => head_dim,
            Codes::Int4 => head_dim.div_ceil(2),
        }
    }

    /// Scales and minima, together, of `ranges` ranges.
    pub const fn scales(self, ranges: usize) -> usize {
        match self {
            Codes::Int8 => ranges,
            Codes::Int4 => 2 * ranges,
        }
    }

    /// Scales and minima of a row of values.
    pub const fn value_scales(self, head_dim: usize) -> usize {
        self.scales(head_dim.div_ceil(GROUP))
    }

    /// The range of elements between `least` and `greatest`.
    fn range(self, least: f32, greatest: f32) -> Range {
        let (scale, min) = match self {
            Codes::Int8 => (f16_up(greatest.abs().max(least.abs()) / 127.0), f16::ZERO),
            Codes::Int4 => {
                let min = f16_down(least);
                // Less than 0 where the minimum saturates.
                (f16_up((greatest - min.to_f32()).max(0.0) / 15.0), min)
            }
        };
        Range { scale, min, inverse: if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() } }
    }

    /// The code of a finite `x`.
    #[inline]
    fn code(self, range: Range, x: f32) -> u8 {
        let (least, greatest) = match self {
            Codes::Int8 => (-127.0, 127.0),
            Codes::Int4 => (0.0, 15.0),
        };
        let code = ((x - range.min.to_f32()) * range.inverse).clamp(least, greatest);
        // A sum with 1.5 · 2²³ has no bits behind the point and is rounded to even; its last byte is the integer in two's complement.
        (code + 12_582_912.0).to_bits() as u8
    }

    /// What a code stands for.
    #[inline]
    fn element(self, scale: f16, min: f16, code: u8) -> f32 {
        match self {
            Codes::Int8 => f32::from(code as i8) * scale.to_f32(),
            Codes::Int4 => min.to_f32() + f32::from(code) * scale.to_f32(),
        }
    }

    #[inline]
    fn put(self, codes: &mut [u8], channel: usize, code: u8) {
        match self {
            Codes::Int8 => codes[channel] = code,
            Codes::Int4 if channel.is_multiple_of(2) => codes[channel / 2] = code,
            Codes::Int4 => codes[channel / 2] |= code << 4,
        }
    }

    #[inline]
    fn get(self, codes: &[u8], channel: usize) -> u8 {
        match self {
            Codes::Int8 => codes[channel],
            Codes::Int4 => codes[channel / 2] >> (channel % 2 * 4) & 15,
        }
    }

    /// Scale and minimum `i` of `scales`.
    fn scale(self, scales: &[f16], i: usize) -> (f16, f16) {
        match self {
            Codes::Int8 => (scales[i], f16::ZERO),
            Codes::Int4 => (scales[i], scales[scales.len() / 2 + i]),
        }
    }

    fn set_scale(self, scales: &mut [f16], i: usize, (scale, min): (f16, f16)) {
        let minima = scales.len() / 2;
        scales[i] = scale;
        if self == Codes::Int4 {
            scales[minima + i] = min;
        }
    }

    /// Quantises a group of keys `rows` [GROUP, D]: writes `codes` [GROUP, row bytes] and `scales`, and returns the word of rows that are
    /// not finite.
    ///
    /// # Panics
    /// When a slice does not have the length that its D asks for.
    pub fn quantise_keys(self, rows: &[f32], codes: &mut [u8], scales: &mut [f16]) -> u32 {
        let (d, row_bytes) = (rows.len() / GROUP, codes.len() / GROUP);
        assert!(row_bytes == self.row_bytes(d) && scales.len() == self.scales(d), "codes and scales of a group of {d} channels");
        let row = |i: usize| &rows[i * d..(i + 1) * d];
        let lost = (0..GROUP).filter(|&i| !row(i).iter().all(|x| x.is_finite())).fold(0u32, |word, i| word | 1 << i);
        let kept = |i: &usize| lost >> i & 1 == 0;
        codes.fill(0);
        for first in (0..d).step_by(LANES) {
            let channels = first..d.min(first + LANES);
            let (mut least, mut greatest) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
            if lost == u32::MAX {
                (least, greatest) = ([0.0; LANES], [0.0; LANES]);
            }
            for i in (0..GROUP).filter(kept) {
                let ends = least.iter_mut().zip(&mut greatest);
                ends.zip(&row(i)[channels.clone()]).for_each(|((least, greatest), &x)| {
                    (*least, *greatest) = (least.min(x), greatest.max(x));
                });
            }
            let ranges: [Range; LANES] = std::array::from_fn(|lane| self.range(least[lane], greatest[lane]));
            for (channel, range) in channels.clone().zip(ranges) {
                self.set_scale(scales, channel, (range.scale, range.min));
            }
            for i in (0..GROUP).filter(kept) {
                for (channel, range) in channels.clone().zip(ranges) {
                    self.put(&mut codes[i * row_bytes..], channel, self.code(range, row(i)[channel]));
                }
            }
        }
        lost
    }

    /// Quantises a row of values: writes its `codes` and `scales`.
    ///
    /// # Panics
    /// When a slice does not have the length that the row's D asks for.
    pub fn quantise_values(self, row: &[f32], codes: &mut [u8], scales: &mut [f16]) {
        let d = row.len();
        assert!(
            codes.len() == self.row_bytes(d) && scales.len() == self.value_scales(d),
            "codes and scales of a row of {d} channels"
        );
        codes.fill(0);
        if !row.iter().all(|x| x.is_finite()) {
            scales.fill(f16::NAN);
            return;
        }
        for (block, x) in row.chunks(GROUP).enumerate() {
            let ends = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(least, greatest), &x| (least.min(x), greatest.max(x)));
            let range = self.range(ends.0, ends.1);
            self.set_scale(scales, block, (range.scale, range.min));
            for (i, &x) in x.iter().enumerate() {
                self.put(codes, block * GROUP + i, self.code(range, x));
            }
        }
    }

    /// What key `i` of a group comes back as; `codes`, `scales` and `lost` are as [`Codes::quantise_keys`] left them.
    pub fn key(self, codes: &[u8], scales: &[f16], lost: u32, i: usize, out: &mut [f32]) {
        let codes = &codes[i * self.row_bytes(out.len())..];
        for (channel, x) in out.iter_mut().enumerate() {
            let (scale, min) = self.scale(scales, channel);
            *x = if lost >> i & 1 == 1 { f32::NAN } else { self.element(scale, min, self.get(codes, channel)) };
        }
    }

    /// What a row of values comes back as; `codes` and `scales` are as [`Codes::quantise_values`] left them.
    pub fn values(self, codes: &[u8], scales: &[f16], out: &mut [f32]) {
        for (channel, x) in out.iter_mut().enumerate() {
            let (scale, min) = self.scale(scales, channel / GROUP);
            *x = self.element(scale, min, self.get(codes, channel));
        }
    }

    /// What a cache gives back of the keys `rows` [L, D] of one sequence and head: whole groups through codes, the rows behind them as they
    /// are.
    pub fn keys_through_codes(self, rows: &mut [f32], head_dim: usize) {
        let mut codes = vec![0; GROUP * self.row_bytes(head_dim)];
        let mut scales = vec![f16::ZERO; self.scales(head_dim)];
        for group in rows.chunks_exact_mut(GROUP * head_dim) {
            let lost = self.quantise_keys(group, &mut codes, &mut scales);
            group.chunks_exact_mut(head_dim).enumerate().for_each(|(i, row)| self.key(&codes, &scales, lost, i, row));
        }
    }

    /// What a cache gives back of the values `rows` [L, D].
    pub fn values_through_codes(self, rows: &mut [f32], head_dim: usize) {
        let (mut codes, mut scales) = (vec![0; self.row_bytes(head_dim)], vec![f16::ZERO; self.value_scales(head_dim)]);
        for row in rows.chunks_exact_mut(head_dim) {
            self.quantise_values(row, &mut codes, &mut scales);
            self.values(&codes, &scales, row);
        }
    }
}
