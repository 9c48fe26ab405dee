//! Every instance that plans ask for, made by the same rules as theirs.

use std::collections::HashSet;

use lawson_core::{
    DType,
    problem::{AttentionSpec, Real},
};

use super::{
    attention,
    gemv::Gemv,
    heads,
    passes::{RopePasses, SoftmaxPasses},
    rows::{Norm, Residual, Scores, Softmax, Transpose},
};
use crate::Instance;

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
const NARROW: [DType; 2] = [DType::BF16, DType::F16];
/// Widths that are multiples of 8, 4, 2 and 1.
const WIDTHS: [usize; 4] = [64, 4, 2, 1];
/// Dimensions of heads, one for each way in which kernels divide them.
const HEAD_DIMS: [usize; 22] =
    [1101, 4, 33, 65, 66, 68, 100, 129, 130, 132, 258, 260, 301, 32, 64, 80, 96, 128, 192, 256, 320, 512];
/// Widths of rows of scores, one for each number of accesses of a thread.
const SCORES: [usize; 6] = [32, 4000, 6000, 10_000, 20_000, 400_000];

/// Every instance that a plan for heads of up to 512 dimensions, and some wider, over a cache of its own dtype may ask for; others are compiled when they are
/// needed all the same.
/// `shared` is the most bytes of shared memory of a block of a GPU of this compute capability. `tests/compile_all.rs` compiles them for every GPU it can.
pub fn instances(compute_capability: (u32, u32), shared: u32) -> Vec<Instance> {
    let mut all = Vec::new();
    for dtype in DTYPES {
        all.push(Gemv::instance(dtype));
        all.extend(WIDTHS.map(|width| Norm::instance(dtype, width)));
        all.extend(WIDTHS.map(|width| Residual::instance(dtype, width)));
        for width in SCORES {
            // Where a row is not masked its width may be odd.
            all.extend([width, width + 2, width + 1].map(|w| Softmax::instance(dtype, w, w.next_multiple_of(8))));
        }
        all.extend([32, 4, 2].map(|head_dim| RopePasses::instance(&heads(dtype, dtype, head_dim, 1))));
    }
    all.extend([4, 2, 1].map(SoftmaxPasses::instance));
    all.extend([4, 2, 1].map(Softmax::online_instance));
    for (from, to) in [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2)].map(|(a, b)| (DTYPES[a], DTYPES[b])) {
        for tokens in [1, 1024] {
            all.extend(HEAD_DIMS.map(|head_dim| heads(from, to, head_dim, tokens).instance()));
        }
    }
    all.extend([1, 2, 4, 8].map(|head_dim| Transpose::instance(DType::BF16, head_dim)));
    all.push(Scores::instance());
    attention(&mut all, compute_capability, shared);
    let mut seen = HashSet::new();
    all.retain(|i| seen.insert(i.clone()));
    all
}

fn heads(from: DType, to: DType, head_dim: usize, tokens: usize) -> heads::Shape {
    let (rotary_dim, interleaved) = (0, true);
    heads::Shape { from, to, kv: to, head_dim, rotary_dim, interleaved, heads: [1, 1, 1], tokens, multiprocessors: 1 }
}

fn attention(all: &mut Vec<Instance>, capability: (u32, u32), shared: u32) {
    let shape = |head_dim: usize, dtype: DType, new: usize| attention::Shape {
        spec: AttentionSpec::new(1, 1, head_dim),
        dtype,
        kv_dtype: dtype,
        paged: false,
        copied: head_dim.is_multiple_of(8),
        sequences: 1,
        tokens: new,
        new,
        rows: new,
        mask: false,
        lse: false,
        decode: false,
        splits: 1,
        shares: 1,
    };
    // Of the dimensions that kernels are compiled for, and next to them some that the copy engine cannot take.
    for head_dim in [32, 64, 80, 96, 128, 192, 256, 60, 124, 188, 252] {
        for dtype in NARROW {
            for decode in [false, true] {
                let plain = attention::Shape { decode, ..shape(head_dim, dtype, 1) };
                let mut capped = plain.clone();
                capped.spec.softcap = Real::new(1.0);
                for shape in [plain, capped] {
                    let paged = attention::Shape { paged: true, ..shape.clone() };
                    all.extend([shape, paged].map(|s| s.instance_for(capability, shared)));
                }
            }
        }
        for new in [1, 32, 64] {
            all.push(shape(head_dim, DType::F32, new).instance_for(capability, shared));
        }
    }
    for dtype in DTYPES {
        all.extend([1, 32].map(|new| shape(257, dtype, new).instance_for(capability, shared)));
    }
}
