//! Block files with the answers of an independent float64 implementation (numpy), at every level on every instruction set.

use std::path::{Path, PathBuf};

use lawson::{BlockFile, Context, ContextOptions, DType, Form, Isa, Level, compute, tensor_file::TensorFile};
use lawson_core::{
    compare::{Policy, compare},
    oracle::{self, Oracle},
};

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/blocks");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() > 20, "only {} block files", cases.len());
    cases
}

fn open(case: &Path, dtype: DType) -> BlockFile {
    BlockFile::open(
        case.join("block.json"),
        case.join("in.safetensors"),
        Form { dtype: Some(dtype), kv_dtype: Some(dtype.into()), ..Form::default() },
    )
    .unwrap()
}

/// Runs `block` at every level on every instruction set; y, k and v must be near `want` as `policy` says for each.
fn check(case: &Path, block: &BlockFile, want: [&[f64]; 3], policy: [Policy<'_>; 3]) {
    let (problem, data) = (block.problem(), block.data());
    let widths = [problem.spec.hidden_size, problem.spec.attention.head_dim, problem.spec.attention.head_dim];
    for isa in Isa::available() {
        let context = Context::new(ContextOptions { isa: Some(isa), threads: Some(2), ..Default::default() }).unwrap();
        for level in Level::ALL {
            let got = compute(&context, problem, Some(level), data).unwrap();
            for (i, got) in [&got.y, &got.k, &got.v].into_iter().enumerate() {
                let found = compare(policy[i], got, want[i], widths[i]);
                assert!(found.ok, "{} {isa} {level} {}: {found} ({problem})", case.display(), ["y", "k", "v"][i]);
            }
        }
    }
}

#[test]
fn f32_is_near_the_float64_answer() {
    for case in cases() {
        let want = TensorFile::open(case.join("want.safetensors")).unwrap();
        let [y, k, v] = ["y", "k", "v"].map(|name| want.doubles(name).unwrap());
        check(&case, &open(&case, DType::F32), [&y, &k, &v], [Policy::Relative(5e-6); 3]);
    }
}

#[test]
fn half_precision_is_as_good_as_an_honest_implementation() {
    for case in cases() {
        for dtype in [DType::BF16, DType::F16] {
            let block = open(&case, dtype);
            let want = Oracle::new(block.problem(), block.data()).unwrap().run();
            let honest = oracle::rounded(block.problem(), block.data()).unwrap();
            let policy = [&honest.y, &honest.k, &honest.v].map(|reference| Policy::Within2x { reference, dtype });
            check(&case, &block, [&want.y, &want.k, &want.v], policy);
        }
    }
}
