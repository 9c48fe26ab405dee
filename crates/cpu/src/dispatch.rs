//! THE dispatch table: every kernel, once for every instruction set.

use std::marker::PhantomData;

use lawson_core::{
    DType,
    kernel::{KernelInfo, KernelOp},
    problem::RopeLayout,
};

use crate::{
    isa::Isa,
    kernels::{
        attention::{self, Attention},
        attention_decode, attention_prefill,
        codes::{self, QuantiseKeys},
        gemm::{self, Gemm, Heads, PackX},
        gemm_int8::{self, QuantiseX},
        norm, rope,
        rows::{self, Place, Rows},
        scores::{self, Strips},
        softmax, tile,
    },
    simd::{Simd, portable::Portable},
};

macro_rules! kernels {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $t:ty),*) $(-> $ret:ty)? = $body:path;)*) => {
        /// Entry points of one instruction set. Each is unsafe to call: its body states what of; and the processor has `isa`, which
        /// [`Kernels::of`] checked.
        #[derive(Clone, Copy)]
        pub struct Kernels {
            /// The instruction set.
            pub isa: Isa,
            /// f32 lanes of a vector.
            pub lanes: usize,
            /// Rows of the register tile.
            pub mr: usize,
            /// Rows of the register tile of tiled attention.
            pub query_rows: usize,
            /// Rows of the tile of bf16 dot products; 0 where there are none.
            pub dot_rows: usize,
            /// Operations of a round of the probe of dot products; 0 where there are none.
            pub dot_probe_flops: usize,
            /// Steps of k whose int8 products are added at once.
            pub int8_steps: usize,
            /// What is added to the codes of weights in memory.
            pub int8_shift: i32,
            /// Operations of a round of the probe of int8 products.
            pub int8_probe_ops: usize,
            $($(#[$doc])* pub $name: unsafe fn($($t),*) $(-> $ret)?,)*
            _private: PhantomData<()>,
        }

        #[allow(unused_unsafe, reason = "some bodies are safe without a token to make")]
        mod portable {
            use super::*;
            $(pub unsafe fn $name($($arg: $t),*) $(-> $ret)? {
                // SAFETY: the caller's.
                unsafe { $body(Portable, $($arg),*) }
            })*
        }

        #[cfg(target_arch = "x86_64")]
        mod avx2 {
            use super::*;
            use crate::simd::avx2::Avx2;
            $(#[target_feature(enable = "avx2,fma,f16c")]
            pub unsafe fn $name($($arg: $t),*) $(-> $ret)? {
                // SAFETY: the caller's; the features enabled here are those the token proves.
                unsafe { $body(<Avx2>::new_unchecked(), $($arg),*) }
            })*
        }

        #[cfg(target_arch = "x86_64")]
        mod avx512 {
            use super::*;
            use crate::simd::{avx512::Avx512, dots::Widened};
            $(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            pub unsafe fn $name($($arg: $t),*) $(-> $ret)? {
                // SAFETY: the caller's; the features enabled here are those the token proves.
                unsafe { $body(Avx512::<Widened>::new_unchecked(), $($arg),*) }
            })*
        }

        #[cfg(target_arch = "aarch64")]
        mod neon {
            use super::*;
            use crate::simd::{dots::Widened, neon::Neon};
            $(#[target_feature(enable = "neon")]
            pub unsafe fn $name($($arg: $t),*) $(-> $ret)? {
                // SAFETY: the caller's; the features enabled here are those the token proves.
                unsafe { $body(Neon::<Widened>::new_unchecked(), $($arg),*) }
            })*
        }

        impl Kernels {
            /// The entry points of `isa`, where this processor has it.
            pub fn of(isa: Isa) -> Option<Kernels> {
                if !isa.is_available() {
                    return None;
                }
                Some(match isa {
                    Isa::Portable => Kernels {
                        isa, lanes: Portable::LANES, mr: Portable::MR, query_rows: Portable::QUERY_ROWS, dot_rows: 0, dot_probe_flops: 0,
                        int8_steps: Portable::INT8_STEPS, int8_shift: Portable::INT8_SHIFT, int8_probe_ops: Portable::INT8_PROBE_OPS,
                        $($name: portable::$name,)* _private: PhantomData,
                    },
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 | Isa::Avx2Vnni => with_vnni(Kernels {
                        isa,
                        lanes: <crate::simd::avx2::Avx2>::LANES,
                        mr: <crate::simd::avx2::Avx2>::MR,
                        query_rows: <crate::simd::avx2::Avx2>::QUERY_ROWS,
                        dot_rows: 0,
                        dot_probe_flops: 0,
                        int8_steps: <crate::simd::avx2::Avx2>::INT8_STEPS,
                        int8_shift: <crate::simd::avx2::Avx2>::INT8_SHIFT,
                        int8_probe_ops: <crate::simd::avx2::Avx2>::INT8_PROBE_OPS,
                        $($name: avx2::$name,)*
                        _private: PhantomData,
                    }),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => with_vnni(with_dots(Kernels {
                        isa,
                        lanes: <crate::simd::avx512::Avx512>::LANES,
                        mr: <crate::simd::avx512::Avx512>::MR,
                        query_rows: <crate::simd::avx512::Avx512>::QUERY_ROWS,
                        dot_rows: 0,
                        dot_probe_flops: 0,
                        int8_steps: <crate::simd::avx512::Avx512>::INT8_STEPS,
                        int8_shift: <crate::simd::avx512::Avx512>::INT8_SHIFT,
                        int8_probe_ops: <crate::simd::avx512::Avx512>::INT8_PROBE_OPS,
                        $($name: avx512::$name,)*
                        _private: PhantomData,
                    })),
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon | Isa::NeonBf16 => with_dots(Kernels {
                        isa,
                        lanes: <crate::simd::neon::Neon>::LANES,
                        mr: <crate::simd::neon::Neon>::MR,
                        query_rows: <crate::simd::neon::Neon>::QUERY_ROWS,
                        dot_rows: 0,
                        dot_probe_flops: 0,
                        int8_steps: <crate::simd::neon::Neon>::INT8_STEPS,
                        int8_shift: <crate::simd::neon::Neon>::INT8_SHIFT,
                        int8_probe_ops: <crate::simd::neon::Neon>::INT8_PROBE_OPS,
                        $($name: neon::$name,)*
                        _private: PhantomData,
                    }),
                    _ => return None,
                })
            }
        }
    };
}

kernels! {
    /// Packs a group of rows of x for a GEMM.
    pack_x(p: &PackX, group: usize) = gemm::pack_x;
    /// One work item of a GEMM.
    gemm(g: &Gemm<'_>, item: usize, scratch: *mut f32) = gemm::gemm;
    /// Quantises a group of rows of x for a GEMM in int8.
    quantise_x(q: &QuantiseX, group: usize, scratch: *mut f32) = gemm_int8::quantise_x;
    /// One work item of a GEMM in int8.
    gemm_int8(g: &Gemm<'_>, item: usize, scratch: *mut f32) = gemm_int8::gemm_int8;
    /// Norms, turns and moves one head of one row.
    move_head(h: &Heads<'_>, from: Rows, row: usize, head: usize, place: Place, scratch: *mut f32) = gemm::move_head;
    /// Moves the new keys of one sequence and head into a quantised cache.
    quantise_keys(q: &QuantiseKeys<'_>, item: usize, scratch: *mut f32) = codes::quantise_keys;
    /// RMSNorm of one row.
    norm_row(from: Rows, to: Rows, row: usize, norm: (*const f32, f64), n: usize, scratch: *mut f32) = norm::norm_row;
    /// to = a + b for one row.
    add_row(a: Rows, b: Rows, to: Rows, row: usize, n: usize) = norm::add_row;
    /// One work item of tiled attention.
    attention_prefill(a: &Attention<'_>, item: usize, scratch: *mut f32) = attention_prefill::attention_prefill;
    /// One work item of decode attention.
    attention_decode(a: &Attention<'_>, item: usize, scratch: *mut f32) = attention_decode::attention_decode;
    /// Merges the parts of one row.
    merge_parts(a: &Attention<'_>, row: usize, sequence: usize, scratch: *mut f32) = attention::merge_parts;
    /// qᵀ of one strip.
    transpose_q(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::transpose_q;
    /// Scores of one strip.
    scores(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::scores;
    /// Scale of one strip.
    scale(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::scale;
    /// Softcap of one strip.
    softcap(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::softcap;
    /// ALiBi bias of one strip.
    alibi(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::alibi;
    /// Mask of one strip.
    mask(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::mask;
    /// Softmax of one strip.
    softmax_strip(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::softmax;
    /// Weighted values of one strip.
    weighted_values(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::weighted_values;
    /// [T, H·D] from one strip.
    transpose_o(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::transpose_o;
    /// Converts a row between dtypes.
    convert_row(from: Rows, to: Rows, n: usize) = rows::convert_row;
    /// Writes each dimension's partner, with the sign that sine takes, of a row of heads.
    rope_partner(layout: RopeLayout, x: *const f32, to: *mut f32, width: usize) = rope::partner;
    /// x · cos + partner · sin of one head.
    rope_combine(layout: RopeLayout, x: *mut f32, partner: *const f32, table: *const f32, width: usize) = rope::combine;
    /// Turns one head.
    rope_rotate(layout: RopeLayout, x: *mut f32, table: *const f32, width: usize) = rope::rotate;
    /// Softmax of one row.
    softmax_row(x: *const f32, n: usize, out: *mut f32) = softmax::softmax_row;
    /// Greatest element of a row.
    row_max(x: *const f32, n: usize) -> f32 = softmax::row_max;
    /// e^(x − m) of a row, and its sum.
    row_exp(x: *const f32, n: usize, m: f32, out: *mut f32) -> f32 = softmax::row_exp;
    /// Sum of a row.
    row_sum(x: *const f32, n: usize) -> f32 = softmax::row_sum;
    /// A row times a factor.
    row_scale(x: *mut f32, n: usize, factor: f32) = softmax::row_scale;
    /// The peak probe.
    fma_probe(rounds: usize) -> f32 = tile::fma_probe;
    /// The peak probe of dot products, where there are any.
    dot_probe(rounds: usize) -> f32 = tile::dot_probe;
    /// The peak probe of int8 products.
    int8_probe(rounds: usize) -> f32 = gemm_int8::int8_probe;
    /// 2^x of a row, in place.
    exp2_row(x: *mut f32, n: usize) = crate::math::exp2_row;
    /// tanh of a row, in place.
    tanh_row(x: *mut f32, n: usize) = crate::math::tanh_row;
}

/// The kernels that multiply bf16 natively, for an instruction set that differs from another in nothing else.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! dot_kernels {
    ($module:ident, $features:literal, $token:ty, $($name:ident($($arg:ident: $t:ty),*) $(-> $ret:ty)? = $body:path;)*) => {
        mod $module {
            use super::*;
            type Token = $token;
            $(#[target_feature(enable = $features)]
            pub unsafe fn $name($($arg: $t),*) $(-> $ret)? {
                // SAFETY: the caller's; the features enabled here are those the token proves.
                unsafe { $body(Token::new_unchecked(), $($arg),*) }
            })*
            /// `kernels` with these in place of the same ones.
            pub fn over(kernels: Kernels) -> Kernels {
                Kernels { dot_rows: Token::DOT_ROWS, dot_probe_flops: Token::DOT_PROBE_FLOPS, $($name,)* ..kernels }
            }
        }
    };
    ($($module:ident: $features:literal, $token:ty;)*) => {
        $(dot_kernels! {
            $module, $features, $token,
            pack_x(p: &PackX, group: usize) = gemm::pack_x;
            gemm(g: &Gemm<'_>, item: usize, scratch: *mut f32) = gemm::gemm;
            attention_prefill(a: &Attention<'_>, item: usize, scratch: *mut f32) = attention_prefill::attention_prefill;
            scores(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::scores;
            weighted_values(t: &Strips<'_>, item: usize, scratch: *mut f32) = scores::weighted_values;
            dot_probe(rounds: usize) -> f32 = tile::dot_probe;
        })*
    };
}

#[cfg(target_arch = "x86_64")]
dot_kernels! {
    pairs: "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c", crate::simd::avx512::Avx512<crate::simd::avx512::Pairs>;
    tiles: "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c", crate::simd::avx512::Avx512<crate::simd::amx::Tiles>;
}

#[cfg(target_arch = "aarch64")]
dot_kernels! {
    matrices: "neon,bf16", crate::simd::neon::Neon<crate::simd::neon::Matrices>;
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn with_dots(kernels: Kernels) -> Kernels {
    match kernels.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => pairs::over(kernels),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => tiles::over(kernels),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonBf16 => matrices::over(kernels),
        _ => kernels,
    }
}

/// The kernels that multiply int8 by VNNI, in place of those of an instruction set that widens it.
#[cfg(target_arch = "x86_64")]
macro_rules! vnni_kernels {
    ($module:ident, $features:literal, $token:ty, $($name:ident($($arg:ident: $t:ty),*) $(-> $ret:ty)? = $body:path;)*) => {
        mod $module {
            use super::*;
            type Token = $token;
            $(#[target_feature(enable = $features)]
            pub unsafe fn $name($($arg: $t),*) $(-> $ret)? {
                // SAFETY: the caller's; the features enabled here are those the token proves.
                unsafe { $body(Token::new_unchecked(), $($arg),*) }
            })*
            /// `kernels` with these in place of the same ones.
            pub fn over(kernels: Kernels) -> Kernels {
                Kernels {
                    int8_steps: Token::INT8_STEPS,
                    int8_shift: Token::INT8_SHIFT,
                    int8_probe_ops: Token::INT8_PROBE_OPS,
                    $($name,)*
                    ..kernels
                }
            }
        }
    };
    ($($module:ident: $features:literal, $token:ty;)*) => {
        $(vnni_kernels! {
            $module, $features, $token,
            quantise_x(q: &QuantiseX, group: usize, scratch: *mut f32) = gemm_int8::quantise_x;
            gemm_int8(g: &Gemm<'_>, item: usize, scratch: *mut f32) = gemm_int8::gemm_int8;
            int8_probe(rounds: usize) -> f32 = gemm_int8::int8_probe;
        })*
    };
}

#[cfg(target_arch = "x86_64")]
vnni_kernels! {
    vnni_256: "avx2,fma,f16c,avxvnni", crate::simd::avx2::Avx2<crate::simd::Vnni>;
    vnni_512: "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c", crate::simd::avx512::Avx512<crate::simd::dots::WidenedVnni>;
}

#[cfg(target_arch = "x86_64")]
fn with_vnni(kernels: Kernels) -> Kernels {
    match kernels.isa {
        Isa::Avx2Vnni => vnni_256::over(kernels),
        Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => vnni_512::over(kernels),
        _ => kernels,
    }
}

impl Kernels {
    /// Whether weights and keys of `dtype` are multiplied in pairs, without widening.
    pub fn multiplies_pairs(&self, dtype: DType) -> bool {
        self.dot_rows > 0 && dtype == DType::BF16
    }

    /// Rows of a group of packed x.
    pub fn group_rows(&self, pairs: bool) -> usize {
        if pairs { self.dot_rows } else { self.mr }
    }

    /// Columns of the register tile, and outputs of a panel of packed weights.
    pub fn panel(&self) -> usize {
        2 * self.lanes
    }

    /// The rows of the table, as plain data.
    pub fn infos(&self) -> Vec<KernelInfo> {
        use KernelOp::{AttentionDecode, AttentionPrefill, Gemm, GemmInt8, Norm, Rope, Softmax};
        let isa = self.isa.name();
        let row = |op, dtypes, tile_rows, tile_columns| KernelInfo { op, isa, dtypes, tile_rows, tile_columns };
        let (lanes, nr) = (self.lanes, self.panel());
        // What has a kernel of its own for bf16.
        let widened: &[DType] = if self.dot_rows > 0 { &[DType::F32, DType::F16] } else { &DType::ALL };
        let mut infos = vec![
            row(Gemm, widened, self.mr, nr),
            row(GemmInt8, &DType::ALL, self.mr, nr),
            row(Norm, &DType::ALL, 1, lanes),
            row(Rope, &DType::ALL, 1, lanes),
            row(Softmax, &DType::ALL, 1, lanes),
            row(AttentionPrefill, widened, self.query_rows, attention_prefill::VECTORS * lanes),
            row(AttentionDecode, &DType::ALL, 4, nr),
        ];
        if self.dot_rows > 0 {
            infos.extend([Gemm, AttentionPrefill].map(|op| row(op, &[DType::BF16], self.dot_rows, nr)));
        }
        infos
    }
}
