//! Problems print as lines that parse back to the same problem, and no line makes the parser panic.

use lawson_core::{
    CacheDType, DType, ErrorKind, WeightKind,
    problem::{
        AttentionProblem, AttentionSpec, Biases, BlockProblem, BlockSpec, Lengths, MaskShape, PAGE_SIZES, Real, RopeLayout,
        RopeScaling, RopeSpec, Yarn,
    },
};
use proptest::{collection::vec, option, prelude::*, sample::select};

fn number(range: std::ops::Range<f64>) -> impl Strategy<Value = Real> {
    range.prop_map(|v| Real::new(v).unwrap())
}

fn dtype() -> impl Strategy<Value = DType> {
    select(DType::ALL.to_vec())
}

fn scaling(pairs: usize) -> impl Strategy<Value = RopeScaling> {
    let factor = || number(0.1..64.0);
    let maybe = || option::of(number(0.1..64.0));
    let list = move || vec(number(0.5..70.0), pairs);
    prop_oneof![
        Just(RopeScaling::Default),
        factor().prop_map(|factor| RopeScaling::Linear { factor }),
        (factor(), 1usize..9999).prop_map(|(factor, original)| RopeScaling::Dynamic { factor, original }),
        (factor(), number(0.1..2.0), number(2.0..9.0), 1usize..9999)
            .prop_map(|(factor, low, high, original)| RopeScaling::Llama3 { factor, low, high, original }),
        (factor(), 1usize..9999, maybe(), maybe(), any::<bool>(), maybe(), maybe(), option::of(number(-3.0..3.0))).prop_map(
            |(factor, original, beta_fast, beta_slow, truncate, attention_factor, mscale, mscale_all_dim)| {
                let yarn = Yarn { factor, original, beta_fast, beta_slow, truncate, attention_factor, mscale, mscale_all_dim };
                RopeScaling::Yarn(yarn)
            }
        ),
        (list(), list(), 2usize..9999, maybe(), maybe()).prop_map(|(short, long, original, factor, attention_factor)| {
            let factor = if attention_factor.is_none() { factor.or(Real::new(2.0)) } else { factor };
            RopeScaling::LongRope { short, long, original, factor, attention_factor }
        }),
    ]
}

fn rope(head_dim: usize) -> impl Strategy<Value = RopeSpec> {
    let pairs = (4..head_dim + 1).prop_map(|d| d / 2);
    let layout = prop_oneof![Just(RopeLayout::Half), Just(RopeLayout::Interleaved)];
    (pairs, prop_oneof![Just(10000.0), 1.5..1e7], layout, any::<bool>())
        .prop_flat_map(|(pairs, theta, layout, whole)| (Just((pairs, theta, layout, whole)), scaling(pairs)))
        .prop_map(move |((pairs, theta, layout, whole), scaling)| RopeSpec {
            layout,
            rotary_dim: (!whole || pairs * 2 != head_dim).then_some(pairs * 2),
            scaling,
            ..RopeSpec::new(theta)
        })
}

fn batch() -> impl Strategy<Value = Lengths> {
    let lengths =
        |least: usize| prop_oneof![(least..9000).prop_map(|n| [n; 5]), [least..90, least..90, least..90, least..90, least..90]];
    (1usize..6, lengths(1), lengths(0)).prop_map(|(b, new, past)| Lengths::ragged(new[..b].to_vec(), past[..b].to_vec()).unwrap())
}

fn mask() -> impl Strategy<Value = Option<MaskShape>> {
    option::of((any::<bool>(), any::<bool>()).prop_map(|(per_sequence, per_head)| MaskShape { per_sequence, per_head }))
}

fn attention() -> impl Strategy<Value = AttentionSpec> {
    let scores = (option::of(number(-2.0..-0.01)), option::of(number(0.5..90.0)), any::<bool>(), any::<bool>());
    (1usize..5, 1usize..5, 4usize..130, any::<bool>(), option::of(1usize..999), scores).prop_map(
        |(kv_heads, group, head_dim, causal, window, (scale, softcap, sinks, alibi))| AttentionSpec {
            causal,
            window: window.filter(|_| causal),
            scale,
            softcap,
            sinks,
            alibi,
            ..AttentionSpec::new(kv_heads * group, kv_heads, head_dim)
        },
    )
}

fn block() -> impl Strategy<Value = BlockProblem> {
    let biases = any::<[bool; 4]>().prop_map(|[q, k, v, o]| Biases { q, k, v, o });
    let norms = (option::of(number(0.0..1e-3)), option::of(number(0.0..1e-3)));
    let spec = attention().prop_flat_map(|a| (option::of(rope(a.head_dim)), Just(a)));
    let cache = (select(CacheDType::ALL.to_vec()), option::of(select(PAGE_SIZES.to_vec())));
    let held = (dtype(), select(vec![WeightKind::Compute, WeightKind::Int8]), cache);
    (spec, 1usize..999, norms, any::<bool>(), biases, batch(), mask(), held).prop_map(
        |(
            (rope, attention),
            hidden_size,
            (qk_norm, input_norm),
            residual,
            biases,
            batch,
            mask,
            (dtype, weights, (kv_dtype, page_size)),
        )| {
            BlockProblem {
                spec: BlockSpec { hidden_size, attention, qk_norm, input_norm, residual, rope, biases },
                batch,
                mask,
                dtype,
                weights,
                kv_dtype,
                page_size,
            }
        },
    )
}

proptest! {
    #[test]
    fn a_block_line_parses_back(problem in block()) {
        prop_assert!(problem.validate().is_ok(), "{:?}", problem.validate());
        let line = problem.to_string();
        prop_assert_eq!(line.parse::<BlockProblem>().map_err(|e| e.to_string()), Ok(problem), "{}", line);
    }

    #[test]
    fn an_attention_line_parses_back(problem in block()) {
        let problem = problem.attention();
        let line = problem.to_string();
        prop_assert_eq!(line.parse::<AttentionProblem>().map_err(|e| e.to_string()), Ok(problem), "{}", line);
    }

    #[test]
    fn a_rope_token_parses_back(rope in rope(64)) {
        prop_assert_eq!(rope.to_string().parse::<RopeSpec>().unwrap(), rope);
    }

    #[test]
    fn tokens_come_in_any_order(problem in block(), seed in any::<u64>()) {
        let line = problem.to_string();
        let mut tokens: Vec<&str> = line.split(' ').skip(1).collect();
        let n = tokens.len();
        tokens.rotate_left(seed as usize % n);
        tokens.reverse();
        let shuffled = format!("block {}", tokens.join("  "));
        prop_assert_eq!(shuffled.parse::<BlockProblem>().map_err(|e| e.to_string()), Ok(problem));
    }

    #[test]
    fn no_line_panics(line in any::<String>()) {
        let _ = line.parse::<BlockProblem>();
        let _ = line.parse::<AttentionProblem>();
        let _ = line.parse::<RopeSpec>();
        let _ = format!("block {line}").parse::<BlockProblem>();
    }

    #[test]
    fn no_damaged_line_panics(problem in block(), at in any::<prop::sample::Index>(), with in "[ -~]{0,3}") {
        let mut line = problem.to_string();
        let at = at.index(line.len());
        line.replace_range(at..at + 1, &with);
        if let Ok(changed) = line.parse::<BlockProblem>() {
            prop_assert_eq!(changed.to_string().parse::<BlockProblem>().unwrap(), changed);
        }
    }
}

#[test]
fn the_documented_lines_are_canonical() {
    for line in [
        "block b=2 s=37 past=4096 e=4096 h=32/8 d=128 causal rope=half,llama3:8:1:4:8192 bf16",
        "block b=3 s=1,2,3 past=0,5,0 e=64 h=4/2 d=16 full scale=0.2 softcap=20 sinks alibi mask=bh qk_norm=0.000001 input_norm=0.00001 residual bias=qo f32 kv=bf16",
        "block b=1 s=1 past=9 e=64 h=4/4 d=16 causal window=7 mask rope=interleaved,theta=500000,dim=4,longrope:1/1.5:2/4:64:factor=8:attention_factor=1.2 f16",
        "block b=1 s=1 past=9 e=64 h=4/4 d=16 causal rope=half,yarn:4:64:beta_fast=8:beta_slow=2:truncate=false:attention_factor=0.8:mscale=0.7:mscale_all_dim=1.3 f32",
        "block b=8 s=1 past=4096 e=4096 h=32/8 d=128 causal rope=half bf16 kv=f16 page=64",
        "block b=1 s=1 past=33 e=64 h=4/4 d=16 causal f32 kv=int8",
        "block b=1 s=1 past=33 e=64 h=4/4 d=16 causal bf16 kv=int4",
    ] {
        assert_eq!(line.parse::<BlockProblem>().unwrap().to_string(), line);
    }
    let line = "attention b=1 s=2048 past=0 h=8/8 d=128 causal f32";
    assert_eq!(line.parse::<AttentionProblem>().unwrap().to_string(), line);
}

#[test]
fn defaults_are_filled_in() {
    let short = "block s=4 past=1,2 h=4 e=64 rope=half".parse::<BlockProblem>().unwrap();
    assert_eq!(short.to_string(), "block b=2 s=4 past=1,2 e=64 h=4/4 d=16 causal rope=half f32");
}

#[test]
fn errors_name_the_token_and_what_is_accepted() {
    for (line, parts) in [
        ("block b=1 s=4 e=64 h=4 colour=red", &["unknown token 'colour=red'", "softcap="][..]),
        ("block b=1 s=4 e=64 h=4 b=2", &["'b=2'", "repeats"]),
        ("block b=1 s=4 e=64 h=4 causal full", &["'full'", "second choice", "causal, full"]),
        ("block b=1 s=4 e=64 h=4 f32 bf16", &["'bf16'", "second choice", "f32, bf16, f16"]),
        ("block b=1 s=-4 e=64 h=4", &["'s=-4'", "whole numbers", "'-4'"]),
        ("block b=1e12 s=4 e=64 h=4", &["'b=1e12'", "whole numbers"]),
        ("block b=1000000000000 s=4 e=64 h=4", &["b must be between 1 and 1048576"]),
        ("block b=99999999999999999999999 s=4 e=64 h=4", &["b=9999", "too large"]),
        ("block b=0 s=4 e=64 h=4", &["b must be between"]),
        ("block b=3 s=4,4 e=64 h=4", &["s= lists 2 numbers, but b is 3"]),
        ("block b=1 s=4 e=64 h=0", &["h= needs at least 1 query head"]),
        ("block b=1 s=4 e=63 h=4", &["d= is needed", "e (63)", "h (4)"]),
        ("block s=4 e=64 h=4", &["'b='", "missing"]),
        ("block b=1 e=64 h=4", &["'s='", "missing"]),
        ("block b=1 s=4 h=4", &["'e='", "missing"]),
        ("block b=1 s=4 e=64", &["'h='", "missing"]),
        ("block b=1 s=4 e=65 h=4", &["d= is needed"]),
        ("block b=1 s=0 e=64 h=4", &["no new token"]),
        ("block b=1 s=4 e=64 h=4/3", &["multiple"]),
        ("block b=1 s=4 e=64 h=4 scale=nan", &["'scale=nan'", "finite"]),
        ("block b=1 s=4 e=64 h=4 scale=1e999", &["finite"]),
        ("block b=1 s=4 e=64 h=4 bias=", &["'bias='"]),
        ("block b=1 s=4 e=64 h=4 bias=qq", &["'bias=qq'", "each once"]),
        ("block b=1 s=4 e=64 h=4 mask=x", &["'mask=x'", "mask=bh"]),
        ("block b=1 s=4 e=64 h=4 kv=f64", &["'kv=f64'", "bf16", "int8", "int4"]),
        ("block b=1 s=4 e=64 h=4 page=63", &["63 rows", "32, 64, 128"]),
        ("block b=1 s=4 e=64 h=4 page=", &["'page='", "whole numbers"]),
        ("block b=1 s=4 e=64 h=4 full window=3", &["sliding_window"]),
        ("block b=1 s=4 e=64 h=4 rope=round", &["rope", "'round'", "interleaved"]),
        ("block b=1 s=4 e=64 h=4 rope=half:theta=3", &["'half:theta=3'", "rope=half,theta=500000"]),
        ("block b=1 s=4 e=64 h=4 rope=half,llama3:8", &["'llama3:8'", "llama3:FACTOR"]),
        ("block b=1 s=4 e=64 h=4 rope=half,linear:2:x=1", &["'linear:2:x=1'", "no options"]),
        ("block b=1 s=4 e=64 h=4 rope=half,dim=7", &["rotary_dim"]),
        ("attention b=1 s=4 h=4", &["'d='", "missing"]),
        ("attention b=1 s=4 h=4 d=16 residual", &["unknown token 'residual'"]),
        ("gemm b=1", &["block", "starts with", "'gemm'"]),
        ("attention b=1 s=4 h=4 d=16 page=64", &["unknown token 'page=64'"]),
        ("", &["nothing"]),
    ] {
        let error = match line.starts_with("attention") {
            true => line.parse::<AttentionProblem>().unwrap_err(),
            false => line.parse::<BlockProblem>().unwrap_err(),
        };
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{line}");
        for part in parts {
            assert!(error.to_string().contains(part), "{line}: '{error}' does not say '{part}'");
        }
    }
}
