//! The same bits on every run and for every number of threads.

use lawson::{BlockOutput, BlockProblem, Context, ContextOptions, Isa, Level, compute};
use lawson_testkit::inputs::{Sharpness, data_for};

/// Prefill over several row blocks, chunked prefill, ragged lengths, decode, decode with split keys, few queries with split keys.
const LINES: [&str; 7] = [
    "block b=1 s=600 past=0 e=96 h=4/2 d=32 causal rope=half input_norm=1e-6 residual",
    "block b=1 s=300 past=0 e=64 h=2/2 d=40 full rope=interleaved qk_norm=1e-6",
    "block b=2 s=70 past=90 e=64 h=4/1 d=64 causal window=50 bias=qkvo softcap=20",
    "block s=1,40,7 past=300,0,65 e=65 h=6/2 d=33 causal alibi sinks",
    "block b=3 s=1 past=100 e=64 h=4/2 d=64 causal rope=half",
    "block b=1 s=1 past=3000 e=64 h=4/2 d=64 causal rope=half sinks",
    "block b=1 s=3 past=2000 e=64 h=2/1 d=64 causal rope=half mask=h",
];

fn bits(out: &BlockOutput) -> [Vec<u32>; 3] {
    [&out.y, &out.k, &out.v].map(|v| v.iter().map(|x| x.to_bits()).collect())
}

fn check(dtype: &str) {
    for isa in Isa::available() {
        let context =
            |threads| Context::new(ContextOptions { isa: Some(isa), threads: Some(threads), ..Default::default() }).unwrap();
        let contexts = [1, 2, 3, 4].map(context);
        for line in LINES {
            let problem: BlockProblem = format!("{line} {dtype}").parse().unwrap();
            let data = data_for(&problem, 2, Sharpness::Sharp);
            for level in Level::ALL {
                let want = bits(&compute(&contexts[0], &problem, Some(level), &data).unwrap());
                assert!(want[0].iter().any(|&b| b != 0), "{problem} {level}: y is all zero");
                for context in &contexts {
                    for run in 0..2 {
                        let got = bits(&compute(context, &problem, Some(level), &data).unwrap());
                        assert!(got == want, "{isa} {problem} {level}: run {run} on {} threads differs", context.threads());
                    }
                }
            }
        }
    }
}

#[test]
fn f32_is_deterministic() {
    check("f32");
}

#[test]
fn int8_weights_are_deterministic() {
    check("bf16 weights=int8");
}

#[test]
fn bf16_is_deterministic() {
    check("bf16");
}
