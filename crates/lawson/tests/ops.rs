//! The operators alone, against the oracle, on every instruction set. On a GPU by hand: `cargo test --release -p lawson --test ops -- --ignored
//! --test-threads 1`.

#[allow(dead_code, reason = "other tests use the rest")]
mod files;

use files::refused;
use half::{bf16, f16};
use lawson::{
    AttentionProblem, Batch, Context, ContextOptions, DType, Device, DeviceTensor, Error, ErrorKind, Isa, KvCache, MaskRef,
    RopeLayout, RopeSpec, Tensor, TensorMut, TensorRef,
    ops::{
        AttentionArgs, Operation, QkvWeights, Replays, RopeAppendArgs, RopeMethod, SoftmaxMethod, attention, qkv_projection,
        replay_timed, rope, rope_append, softmax,
    },
};
use lawson_core::{
    compare::{Policy, compare},
    data::Mask,
    oracle::{self, AttentionInput},
};
use lawson_testkit::{inputs, poison::Poisoned, rng::Rng};

fn each_isa(check: impl Fn(&Context)) {
    for isa in Isa::available() {
        check(&Context::new(ContextOptions { isa: Some(isa), threads: Some(2), ..Default::default() }).unwrap());
    }
}

fn on_gpu(check: impl Fn(&Context)) {
    check(&Context::new(ContextOptions { device: Device::Cuda(0), ..Default::default() }).expect("a GPU"));
}

const F32: Policy<'static> = Policy::Relative(5e-6);

#[track_caller]
fn check(policy: Policy<'_>, got: &[f32], want: &[f64], width: usize, what: &str) {
    let found = compare(policy, got, want, width);
    assert!(found.ok, "{what}: {found}");
}

// Attention

/// q, k, v and all that bends the scores of one call; k and v are [B, G, rows, D].
struct Input {
    problem: AttentionProblem,
    rows: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mask: Option<Mask>,
    sinks: Option<Vec<f32>>,
    slopes: Option<Vec<f32>>,
}

impl Input {
    fn new(line: &str) -> Self {
        let problem: AttentionProblem = line.parse().unwrap();
        let (spec, batch, mut rng) = (&problem.spec, &problem.batch, Rng::new(21));
        // Rows that no sequence has are poison.
        let rows = batch.max_len() + 3;
        let mut kv = |deviation: f64| {
            let mut values = inputs::rounded(
                problem.kv_dtype.rounds_to(problem.dtype),
                rng.normals(batch.sequences() * spec.kv_dim() * rows, deviation),
            );
            for (i, head) in values.chunks_mut(rows * spec.head_dim).enumerate() {
                let b = i / spec.kv_heads;
                head[(batch.past()[b] + batch.new_tokens()[b]) * spec.head_dim..].fill(f32::NAN);
            }
            values
        };
        let (k, v) = (kv(2.0), kv(1.0));
        let q = inputs::rounded(problem.dtype, rng.normals(batch.tokens() * spec.q_dim(), 2.0));
        let sinks = spec.sinks.then(|| rng.normals(spec.heads, 2.0));
        let slopes = spec.alibi.then(|| inputs::slopes(spec.heads, &mut rng));
        let mask = problem.mask.map(|shape| inputs::mask(shape, batch, spec.heads, rows, &mut rng));
        Input { rows, q, k, v, mask, sinks, slopes, problem }
    }

    fn oracle(&self) -> AttentionInput<'_> {
        let (mask, sinks, slopes) = (self.mask.as_ref(), self.sinks.as_deref(), self.slopes.as_deref());
        AttentionInput { q: &self.q, k: &self.k, v: &self.v, rows: self.rows, mask, sinks, slopes }
    }

    /// The result and, where it is wanted, its log-sum-exp, with k and v as they are viewed.
    fn run(&self, context: &Context, k: TensorRef<'_>, v: TensorRef<'_>, wants_lse: bool) -> (Vec<f32>, Vec<f32>) {
        let (spec, batch) = (&self.problem.spec, &self.problem.batch);
        let shape = [batch.tokens(), spec.heads, spec.head_dim];
        let q = Tensor::from_f32(&self.q, self.problem.dtype, &shape).unwrap();
        let mut out = Tensor::from_f32(&vec![f32::NAN; self.q.len()], self.problem.dtype, &shape).unwrap();
        let mut lse = Poisoned::<f32>::new(shape[0] * shape[1]);
        let mask = self.mask.as_ref().map(|m| {
            let b = if m.shape.per_sequence { batch.sequences() } else { 1 };
            let h = if m.shape.per_head { spec.heads } else { 1 };
            MaskRef::new(&m.data, [b, h, m.rows, m.columns]).unwrap()
        });
        attention(
            context,
            AttentionArgs {
                spec,
                lengths: batch,
                q: q.as_ref(),
                k,
                v,
                mask,
                sinks: self.sinks.as_deref(),
                slopes: self.slopes.as_deref(),
                out: out.as_mut(),
                lse: wants_lse.then(|| TensorMut::new(lse.as_mut_slice(), &shape[..2]).unwrap()),
            },
        )
        .unwrap_or_else(|e| panic!("{}: {e}", self.problem));
        if !wants_lse {
            return (out.to_f32(), Vec::new());
        }
        lse.check().unwrap_or_else(|e| panic!("{}: log-sum-exp: {e}", self.problem));
        (out.to_f32(), lse.as_slice().to_vec())
    }

    fn kv_shape(&self) -> [usize; 4] {
        [self.problem.batch.sequences(), self.problem.spec.kv_heads, self.rows, self.problem.spec.head_dim]
    }

    fn dense(&self, context: &Context, wants_lse: bool) -> (Vec<f32>, Vec<f32>) {
        let tensor = |values: &[f32]| {
            Tensor::from_f32(values, self.problem.kv_dtype.rounds_to(self.problem.dtype), &self.kv_shape()).unwrap()
        };
        let (k, v) = (tensor(&self.k), tensor(&self.v));
        self.run(context, k.as_ref(), v.as_ref(), wants_lse)
    }
}

fn check_attention(context: &Context) {
    let lines = [
        "attention b=2 s=37 past=0 h=4/2 d=64 causal",
        "attention b=1 s=70 past=65 h=6/1 d=33 causal window=40",
        "attention b=1 s=1 past=0 h=1/1 d=1 causal",
        "attention s=1,5,64,130 past=64,0,3,70 h=8/2 d=16 full softcap=5",
        "attention b=3 s=20 past=9 h=4/4 d=80 causal alibi sinks",
        "attention b=2 s=33 past=31 h=4/2 d=24 full mask=bh",
        "attention b=2 s=33 past=31 h=4/2 d=24 causal mask=b scale=-0.3",
        // Few queries over many keys: the keys are split and merged.
        "attention b=1 s=1 past=2999 h=4/2 d=64 causal sinks",
        "attention s=2,1 past=1500,3 h=2/1 d=40 causal window=700 softcap=20",
        "attention b=2 s=1 past=1200 h=5/1 d=33 causal alibi mask=h",
    ];
    for dtypes in ["f32", "f32 kv=f16", "bf16", "f16"] {
        for line in lines {
            let input = Input::new(&format!("{line} {dtypes}"));
            let what = format!("{} {}", context.isa(), input.problem);
            let (want, want_lse) = oracle::attention(&input.problem, &input.oracle()).unwrap();
            let (honest, honest_lse) = oracle::attention_rounded(&input.problem, &input.oracle()).unwrap();
            let dtype = input.problem.dtype;
            let policy = |reference| if dtype == DType::F32 { F32 } else { Policy::Within2x { reference, dtype } };
            // A GPU has kernels of its own for each.
            for wants_lse in [false, true] {
                let (out, lse) = input.dense(context, wants_lse);
                check(policy(&honest), &out, &want, input.problem.spec.head_dim, &what);
                if wants_lse {
                    check(policy(&honest_lse), &lse, &want_lse, input.problem.spec.heads, &format!("{what}: log-sum-exp"));
                }
            }
        }
    }
}

#[test]
fn attention_is_right() {
    each_isa(check_attention);
}

#[test]
#[ignore = "needs a GPU"]
fn attention_is_right_on_a_gpu() {
    on_gpu(check_attention);
}

fn check_rows_that_see_nothing(context: &Context) {
    for line in [
        "attention b=1 s=3 past=70 h=2/1 d=16 causal mask",
        "attention b=1 s=1 past=2000 h=2/1 d=16 causal mask",
        "attention b=1 s=3 past=70 h=2/1 d=64 causal mask",
        "attention b=1 s=90 past=0 h=2/1 d=64 causal mask",
    ] {
        for more in ["", " sinks", " bf16", " sinks bf16"] {
            let line = format!("{line}{more}");
            let mut input = Input::new(&line);
            let lse_of_none = if input.sinks.is_some() { 0.5 } else { f32::NEG_INFINITY };
            input.sinks = input.sinks.map(|s| vec![0.5; s.len()]);
            let mask = input.mask.as_mut().unwrap();
            mask.data.fill(1);
            mask.data[..mask.columns].fill(0);
            let (out, lse) = input.dense(context, true);
            let (first, others) = out.split_at(2 * input.problem.spec.head_dim);
            assert!(first.iter().all(|&v| v == 0.0), "{} {line}: {first:?}", context.isa());
            // A GPU takes the sink to base 2 and back.
            let is_none = |&v: &f32| v == lse_of_none || (v - lse_of_none).abs() <= 1e-6;
            assert!(lse[..2].iter().all(is_none), "{} {line}: {:?}", context.isa(), &lse[..2]);
            assert!(others.iter().all(|v| v.is_finite() && *v != 0.0) && lse[2..].iter().all(|v| v.is_finite()));
        }
    }
}

#[test]
fn a_row_that_sees_no_key_is_0() {
    each_isa(check_rows_that_see_nothing);
}

#[test]
#[ignore = "needs a GPU"]
fn a_row_that_sees_no_key_is_0_on_a_gpu() {
    on_gpu(check_rows_that_see_nothing);
}

fn check_strides(context: &Context) {
    for (line, more) in [
        ("attention b=2 s=40 past=30 h=4/2 d=20 causal", 5),
        ("attention b=2 s=1 past=100 h=4/2 d=20 causal bf16", 5),
        ("attention b=2 s=1 past=100 h=4/2 d=20 causal bf16", 4),
        ("attention b=2 s=1 past=100 h=4/2 d=64 causal bf16", 8),
        ("attention b=2 s=40 past=30 h=4/2 d=64 causal bf16", 0),
        ("attention b=2 s=40 past=30 h=4/2 d=64 causal bf16", 8),
        ("attention b=2 s=40 past=30 h=4/2 d=64 causal bf16", 5),
    ] {
        let input = Input::new(line);
        let [b, g, rows, d] = input.kv_shape();
        // [B, rows, G, D + more] in memory, as a framework keeps it before its transpose.
        let wide = d + more;
        let spread = |values: &[f32]| {
            let mut out = vec![f32::NAN; b * rows * g * wide];
            for (i, row) in values.chunks_exact(d).enumerate() {
                let (head, r) = (i / rows, i % rows);
                out[((head / g * rows + r) * g + head % g) * wide..][..d].copy_from_slice(row);
            }
            out
        };
        let (k, v) = (spread(&input.k), spread(&input.v));
        let strides = [rows * g * wide, wide, g * wide, 1];
        let narrow = |values: &[f32]| values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
        let (k16, v16) = (narrow(&k), narrow(&v));
        let shape = input.kv_shape();
        let (k, v) = if input.problem.kv_dtype == DType::F32 {
            (TensorRef::strided(&k, &shape, &strides).unwrap(), TensorRef::strided(&v, &shape, &strides).unwrap())
        } else {
            (TensorRef::strided(&k16, &shape, &strides).unwrap(), TensorRef::strided(&v16, &shape, &strides).unwrap())
        };
        for wants_lse in [false, true] {
            let ((got, lse), (want, dense_lse)) = (input.run(context, k, v, wants_lse), input.dense(context, wants_lse));
            let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Rows that are not multiples of 16 bytes apart take another kernel on Hopper.
            let bound: f32 = if d == 64 && more == 5 { 0.02 } else { 0.0 };
            assert!(lse == dense_lse || bound > 0.0, "{} {line} + {more}", context.isa());
            assert!(worst <= bound && got.iter().all(|x| x.is_finite()), "{} {line} + {more}: {worst}", context.isa());
        }
    }
}

#[test]
fn keys_and_values_may_have_strides() {
    each_isa(check_strides);
}

#[test]
#[ignore = "needs a GPU"]
fn keys_and_values_may_have_strides_on_a_gpu() {
    on_gpu(check_strides);
}

#[test]
fn wrong_attention_arguments_are_named() {
    let context = Context::cpu().unwrap();
    let input = Input::new("attention b=2 s=3 past=4 h=4/2 d=8 causal");
    let (spec, lengths) = (&input.problem.spec, &input.problem.batch);
    let (f32s, f16s) = (vec![0f32; 10_000], vec![f16::ZERO; 10_000]);
    let view = |shape: &[usize]| TensorRef::new(&f32s[..shape.iter().product()], shape).unwrap();
    let (mut out, mut lse) = (vec![0f32; 6 * 4 * 8], vec![0f32; 23]);
    let q_shape = [6, 4, 8];
    let bytes = [1u8; 21];
    macro_rules! refuse {
        ($parts:expr, $($field:ident: $value:expr),*) => {{
            #[allow(unused_mut, reason = "not every case changes a field")]
            let mut args = AttentionArgs {
                spec,
                lengths,
                q: view(&q_shape),
                k: view(&[2, 2, 7, 8]),
                v: view(&[2, 2, 7, 8]),
                mask: None,
                sinks: None,
                slopes: None,
                out: TensorMut::new(&mut out, &q_shape).unwrap(),
                lse: None,
            };
            $(args.$field = $value;)*
            refused(attention(&context, args), $parts);
        }};
    }
    refuse!(&["q has shape [6, 8, 4]", "[6, 4, 8]"], q: view(&[6, 8, 4]));
    refuse!(&["q", "strides"], q: TensorRef::strided(&f32s, &q_shape, &[40, 8, 1]).unwrap());
    refuse!(&["k has shape [2, 2, 6, 8]", "at least 7"], k: view(&[2, 2, 6, 8]));
    refuse!(&["k has shape [2, 4, 7, 8]"], k: view(&[2, 4, 7, 8]));
    refuse!(&["k", "contiguous rows"], k: TensorRef::strided(&f32s, &[2, 2, 7, 8], &[224, 112, 16, 2]).unwrap());
    refuse!(&["v has shape", "strides of k"], v: view(&[2, 2, 8, 8]));
    refuse!(&["v has shape", "dtype"], v: TensorRef::new(&f16s[..224], &[2, 2, 7, 8]).unwrap());
    refuse!(&["out has shape", "q's dtype f16"], q: TensorRef::new(&f16s[..192], &q_shape).unwrap());
    refuse!(&["sinks of 4 heads", "not asked for"], sinks: Some(&f32s[..4]));
    refuse!(&["lse has shape [23]", "[6, 4] in f32"], lse: Some(TensorMut::new(&mut lse, &[23]).unwrap()));
    refuse!(&["mask has shape [1, 1, 3, 6]", "at least 7"], mask: Some(MaskRef::new(&bytes[..18], [1, 1, 3, 6]).unwrap()));
    let asked = lawson::AttentionSpec { alibi: true, ..spec.clone() };
    refuse!(&["slopes has 0 elements, needed 4"], spec: &asked);
    refuse!(&["slopes has 3 elements, needed 4"], spec: &asked, slopes: Some(&f32s[..3]));
    let odd = lawson::AttentionSpec { kv_heads: 3, ..spec.clone() };
    refuse!(&["num_attention_heads (4)", "num_key_value_heads (3)"], spec: &odd);
}

// RoPE

fn check_rope(context: &Context) {
    let specs: Vec<RopeSpec> = [
        "half",
        "interleaved",
        "half,dim=6",
        "interleaved,dim=10,theta=500000",
        "half,dim=32,linear:4",
        "interleaved,llama3:8:1:4:64",
    ]
    .iter()
    .map(|s| s.parse().unwrap())
    .collect();
    for spec in &specs {
        // Positions in order, repeated and out of order, past the rows that share one sine.
        for positions in [(0..130).collect::<Vec<_>>(), vec![5, 5, 4, 100_000, 0], vec![7]] {
            let (heads, d) = (3, 34);
            let x = Rng::new(5).normals(positions.len() * heads * d, 1.0);
            let longest = positions.iter().max().unwrap() + 1;
            let f = spec.frequencies(d, longest);
            let rotary = spec.rotary_dim(d);
            let angles: Vec<f64> = positions
                .iter()
                .flat_map(|&p| (0..heads).flat_map(move |_| vec![p; 1]))
                .flat_map(|p| f.inverse.iter().map(move |w| p as f64 * w))
                .collect();
            let want = oracle::rope(&x, d, rotary, spec.layout, &angles);
            for method in [RopeMethod::Fused, RopeMethod::TwoPass] {
                let mut got = x.clone();
                let mut view = TensorMut::new(&mut got, &[positions.len(), heads, d]).unwrap();
                rope(context, &mut view, &positions, spec, method).unwrap();
                check(F32, &got, &want, d, &format!("{} {spec} {method:?}", context.isa()));
                for (got, x) in got.chunks(d).zip(x.chunks(d)) {
                    assert_eq!(got[rotary..], x[rotary..], "{spec} {method:?}: dimensions that do not turn");
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn both_rope_methods_are_right_on_a_gpu() {
    on_gpu(check_rope);
}

#[test]
fn both_rope_methods_are_right() {
    each_isa(check_rope);
    let mut rng = Rng::new(4);
    let (context, mut x) = (Context::cpu().unwrap(), rng.normals(24, 1.0));
    let spec = RopeSpec { layout: RopeLayout::Half, ..RopeSpec::new(10000.0) };
    let before = x.clone();
    refused(
        rope(&context, &mut TensorMut::new(&mut x, &[2, 12]).unwrap(), &[0, 1], &spec, RopeMethod::Fused),
        &["[2, 12]", "[T, H, D]"],
    );
    refused(
        rope(&context, &mut TensorMut::new(&mut x, &[2, 3, 4]).unwrap(), &[0], &spec, RopeMethod::Fused),
        &["2 tokens", "1 positions"],
    );
    refused(
        rope(&context, &mut TensorMut::new(&mut x, &[2, 4, 3]).unwrap(), &[0, 1], &spec, RopeMethod::Fused),
        &["head_dim must be even", "got 3"],
    );
    assert_eq!(x, before);
}

// Softmax

fn check_softmax(context: &Context) {
    let mut rng = Rng::new(6);
    for width in [1, 2, 15, 16, 17, 33, 63, 64, 65, 512, 1000] {
        let mut x = rng.normals(9 * width, 10.0);
        // Rows of −∞, with −∞ at either end, of one dominant element, far from 0.
        x[..width].fill(f32::NEG_INFINITY);
        x[width..width + width / 2].fill(f32::NEG_INFINITY);
        x[2 * width + width / 2 + 1..3 * width].fill(f32::NEG_INFINITY);
        x[3 * width + width / 3] = 300.0;
        x[4 * width..5 * width].iter_mut().for_each(|v| *v += 1e4);
        x[5 * width..6 * width].fill(-3e38);
        let want = oracle::softmax(&x, width);
        let methods = [
            SoftmaxMethod::Fused,
            SoftmaxMethod::ThreePass,
            SoftmaxMethod::Online(1),
            SoftmaxMethod::Online(7),
            SoftmaxMethod::Online(512),
        ];
        for method in methods {
            let mut out = Poisoned::<f32>::new(x.len());
            let view = TensorRef::new(&x, &[9, width]).unwrap();
            softmax(context, &view, &mut TensorMut::new(out.as_mut_slice(), &[9, width]).unwrap(), method).unwrap();
            let what = format!("{} {method:?} width {width}", context.isa());
            out.check().unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(out.as_slice()[..width].iter().all(|&v| v == 0.0), "{what}: a row of −∞ must be 0");
            check(F32, out.as_slice(), &want, width, &what);
        }
    }
}

#[test]
fn all_softmax_methods_are_right() {
    each_isa(check_softmax);
}

#[test]
#[ignore = "needs a GPU"]
fn all_softmax_methods_are_right_on_a_gpu() {
    on_gpu(check_softmax);
}

fn check_softmax_of_nan(context: &Context) {
    let mut x = vec![1.0f32; 3 * 40];
    x[40 + 17] = f32::NAN;
    for method in [SoftmaxMethod::Fused, SoftmaxMethod::ThreePass, SoftmaxMethod::Online(16)] {
        let mut out = vec![0f32; x.len()];
        let view = TensorRef::new(&x, &[3, 40]).unwrap();
        softmax(context, &view, &mut TensorMut::new(&mut out, &[3, 40]).unwrap(), method).unwrap();
        assert!(out[40..80].iter().all(|v| v.is_nan()), "{} {method:?}", context.isa());
        assert!(out[..40].iter().chain(&out[80..]).all(|v| (v - 0.025).abs() < 1e-8), "{} {method:?}", context.isa());
    }
}

#[test]
fn softmax_keeps_nan_in_its_row() {
    each_isa(check_softmax_of_nan);
}

#[test]
#[ignore = "needs a GPU"]
fn softmax_keeps_nan_in_its_row_on_a_gpu() {
    on_gpu(check_softmax_of_nan);
}

#[test]
fn wrong_softmax_arguments_are_named() {
    let context = Context::cpu().unwrap();
    let (x, narrow, mut out) = (vec![0f32; 24], vec![bf16::ZERO; 24], vec![0f32; 24]);
    let mut run =
        |x: TensorRef<'_>, shape: &[usize], method| softmax(&context, &x, &mut TensorMut::new(&mut out, shape).unwrap(), method);
    let good = TensorRef::new(&x, &[4, 6]).unwrap();
    run(good, &[4, 6], SoftmaxMethod::Online(6)).unwrap();
    refused(run(good, &[4, 6], SoftmaxMethod::Online(0)), &["tile", "at least one column"]);
    refused(run(good, &[6, 4], SoftmaxMethod::Fused), &["out has shape [6, 4]", "[4, 6]"]);
    refused(run(TensorRef::new(&x, &[24]).unwrap(), &[24], SoftmaxMethod::Fused), &["x has shape [24]", "[rows, width]"]);
    refused(run(TensorRef::new(&narrow, &[4, 6]).unwrap(), &[4, 6], SoftmaxMethod::Fused), &["x has shape", "f32"]);
    refused(run(TensorRef::strided(&x, &[4, 5], &[6, 1]).unwrap(), &[4, 6], SoftmaxMethod::Fused), &["strides [6, 1]"]);
}

// QKV projection

fn check_projection(context: &Context) {
    for (tokens, e, q_dim, kv_dim) in [(1, 64, 64, 32), (37, 48, 99, 33), (129, 257, 128, 128), (300, 33, 16, 1)] {
        let mut rng = Rng::new(8);
        let [q, k, v] = [q_dim, kv_dim, kv_dim].map(|n| rng.normals(n * e, 0.2));
        let x = rng.normals(tokens * e, 1.0);
        for dtype in DType::ALL {
            let tensor = |values: &[f32], rows: usize| Tensor::from_f32(values, DType::F32, &[rows, e]).unwrap();
            let (wq, wk, wv) = (tensor(&q, q_dim), tensor(&k, kv_dim), tensor(&v, kv_dim));
            let weights = QkvWeights::pack(context, &wq.as_ref(), &wk.as_ref(), &wv.as_ref(), dtype).unwrap();
            assert!(weights.bytes() >= (q_dim + 2 * kv_dim) * e * dtype.size());
            let x = Tensor::from_f32(&x, dtype, &[tokens, e]).unwrap();
            let [fused, separate] = [true, false].map(|fused| {
                let mut out = [q_dim, kv_dim, kv_dim].map(|n| Poisoned::<f32>::new(tokens * n));
                let [a, b, c] = &mut out;
                let mut a = TensorMut::new(a.as_mut_slice(), &[tokens, q_dim]).unwrap();
                let mut b = TensorMut::new(b.as_mut_slice(), &[tokens, kv_dim]).unwrap();
                let mut c = TensorMut::new(c.as_mut_slice(), &[tokens, kv_dim]).unwrap();
                qkv_projection(context, &x.as_ref(), &weights, [&mut a, &mut b, &mut c], fused).unwrap();
                out.iter().for_each(|o| o.check().unwrap());
                out.map(|o| o.as_slice().to_vec())
            });
            let what = format!("{} [{tokens}, {e}] {dtype}", context.isa());
            assert!(fused == separate, "{what}: fused and separate differ");
            for (got, w, n) in [(&fused[0], &q, q_dim), (&fused[1], &k, kv_dim), (&fused[2], &v, kv_dim)] {
                let want = oracle::gemm(&x.to_f32(), &inputs::rounded(dtype, w.clone()), None, e);
                check(F32, got, &want, n, &what);
            }
        }
    }
}

#[test]
fn the_fused_projection_is_the_separate_one() {
    each_isa(check_projection);
}

#[test]
#[ignore = "needs a GPU"]
fn the_fused_projection_is_the_separate_one_on_a_gpu() {
    on_gpu(check_projection);
}

#[test]
fn wrong_projection_arguments_are_named() {
    let context = Context::cpu().unwrap();
    let data = vec![0f32; 1000];
    let view = |shape: &[usize]| TensorRef::new(&data[..shape.iter().product()], shape).unwrap();
    let pack = |q: &[usize], k: &[usize], v: &[usize]| QkvWeights::pack(&context, &view(q), &view(k), &view(v), DType::F32);
    refused(pack(&[8, 6], &[4, 6], &[4, 5]), &["different widths [6, 6, 5]"]);
    refused(pack(&[48], &[4, 6], &[4, 6]), &["q weight", "[48]"]);
    let weights = pack(&[8, 6], &[4, 6], &[4, 6]).unwrap();
    let run = |x: TensorRef<'_>, q: &[usize]| {
        let (mut a, mut b, mut c) = (vec![0f32; q.iter().product()], vec![0f32; 12], vec![0f32; 12]);
        let mut a = TensorMut::new(&mut a, q).unwrap();
        let (mut b, mut c) = (TensorMut::new(&mut b, &[3, 4]).unwrap(), TensorMut::new(&mut c, &[3, 4]).unwrap());
        qkv_projection(&context, &x, &weights, [&mut a, &mut b, &mut c], true)
    };
    run(view(&[3, 6]), &[3, 8]).unwrap();
    refused(run(view(&[3, 7]), &[3, 8]), &["x has shape [3, 7]", "[T, 6]"]);
    refused(run(view(&[0, 6]), &[3, 8]), &["T at least 1"]);
    refused(run(view(&[3, 6]), &[8, 3]), &["q has shape [8, 3]", "[3, 8]"]);
    let narrow = vec![bf16::ZERO; 18];
    refused(run(TensorRef::new(&narrow, &[3, 6]).unwrap(), &[3, 8]), &["x has shape", "f32"]);
}

#[test]
fn what_only_a_gpu_does_is_refused_elsewhere() {
    let context = Context::cpu().unwrap();
    let unavailable = |error: Option<Error>| {
        let error = error.expect("a CPU has no such thing");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains("needs a context of a GPU"), "{error}");
    };
    let (x, mut out) = (vec![0f32; 24], vec![0f32; 24]);
    let operation = Operation::Softmax {
        x: TensorRef::new(&x, &[4, 6]).unwrap(),
        out: TensorMut::new(&mut out, &[4, 6]).unwrap(),
        method: SoftmaxMethod::Fused,
    };
    unavailable(replay_timed(&context, operation, Replays::Warm(1)).err());
    let (batch, spec) = (Batch::uniform(1, 2).unwrap(), RopeSpec::new(10000.0));
    let mut cache = KvCache::new(&context, &lawson::AttentionSpec::new(1, 1, 4), 1, 1, 2, DType::F32).unwrap();
    let args = RopeAppendArgs {
        qkv: TensorRef::new(&x, &[2, 12]).unwrap(),
        batch: &batch,
        spec: &spec,
        q: TensorMut::new(&mut out[..8], &[2, 1, 4]).unwrap(),
        cache: cache.layer(0),
    };
    unavailable(rope_append(&context, args).err());
    unavailable(DeviceTensor::nans(&context, DType::F32, &[2]).err());
    // SAFETY: nothing is at null, and nothing is made of it.
    unavailable(unsafe { DeviceTensor::from_raw_parts(&context, std::ptr::null_mut(), DType::F32, &[2]) }.err());
    assert!(context.flush_cache().is_ok());
}
