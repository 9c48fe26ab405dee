//! Blocks on a GPU. Run by hand where there is one: `cargo test --release -p lawson --test gpu -- --ignored --test-threads 1`.

use std::{path::PathBuf, time::Instant};

use lawson::{
    Args, AttentionBlock, AttentionProblem, AttentionSpec, Batch, BlockProblem, BlockSpec, BlockWeights, Checkpoint, Context,
    ContextOptions, DType, Device, DeviceTensor, ErrorKind, KvCache, Level, PreparedCall, RopeSpec, Tensor, TensorMut, TensorRef,
    compute,
    ops::{self, AttentionArgs, Operation, QkvWeights, Replays, RopeAppendArgs, RopeMethod, SoftmaxMethod},
    tensor_file::TensorFile,
};
use lawson_core::{
    compare::{Policy, compare},
    oracle::{self, AttentionInput},
};
use lawson_testkit::{
    cases,
    conformance::check_blocks,
    inputs::{self, Sharpness, data_for},
    rng::Rng,
};

fn gpu() -> Context {
    Context::new(ContextOptions { device: Device::Cuda(0), ..Default::default() }).expect("a GPU")
}

fn problem(line: &str) -> BlockProblem {
    line.parse().expect("a problem")
}

/// Where the crate's test data lies: where it was built, or where it runs.
fn data() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    if built.exists() { built.join("tests/data") } else { PathBuf::from("crates/lawson/tests/data") }
}

/// A spread of prefill, chunked prefill and decode, ragged too, whose plans take every kernel.
const LINES: [&str; 13] = [
    "block b=1 s=1 past=70 e=264 h=4/2 d=64 causal bias=qkvo residual f16",
    "block b=1 s=1 past=300 e=65 h=4/2 d=33 causal rope=half,dim=32 bias=qkvo residual bf16",
    "block b=1 s=1 past=300 e=1000 h=5/5 d=72 causal rope=half input_norm=0.00001 bias=qkvo f32",
    "block b=2 s=300 past=0 e=512 h=8/2 d=64 causal rope=half bf16",
    "block b=1 s=77 past=200 e=512 h=4/4 d=128 causal window=90 qk_norm=0.000001 input_norm=0.00001 residual rope=half bf16",
    "block b=4 s=1 past=3000 e=512 h=8/2 d=64 causal rope=half input_norm=0.00001 residual f16",
    "block b=1 s=1 past=5000 e=512 h=8/8 d=128 causal softcap=20 sinks rope=half bf16",
    "block s=5,90,1 past=100,0,700 e=256 h=4/2 d=80 causal alibi bias=qkvo f16",
    "block b=2 s=130 past=0 e=256 h=4/1 d=64 full rope=interleaved f32",
    "block b=3 s=1 past=900 e=256 h=4/2 d=33 causal rope=half,dim=32 f32",
    "block b=3 s=1 past=700 e=256 h=6/2 d=80 causal rope=half bf16",
    "block b=2 s=2 past=400 e=256 h=4/1 d=192 causal window=300 rope=half f16",
    "block s=5,2 past=3,40 e=64 h=2/1 d=1101 causal qk_norm=0.000001 rope=half,dim=36 bf16",
];

#[test]
#[ignore = "needs a GPU"]
fn blocks_are_right() {
    let context = gpu();
    let run = |p: &BlockProblem, level, data: &lawson::BlockData| compute(&context, p, Some(level), data);
    let problems: Vec<_> = LINES.iter().map(|l| problem(l)).chain(cases::random_cases(2026, 120)).collect();
    let report = check_blocks(&run, &problems, 1, &mut |_, _| {});
    println!("{report}");
    assert!(report.passed() && report.could_not_run.is_empty(), "{report}");
}

#[test]
#[ignore = "needs a GPU"]
fn trained_blocks_match_transformers() {
    let folder = data().join("tiny-rust-llama");
    let (context, checkpoint) = (gpu(), Checkpoint::open(&folder).expect("the model"));
    let golden = TensorFile::open(folder.join("golden.safetensors")).expect("the golden file");
    let read = |name: &str| golden.tensor(name).expect("a golden tensor").as_ref().to_f32();
    let mut worst: f64 = 0.0;
    for layer in 0..checkpoint.layers() {
        let weights = checkpoint.weights(layer, false).expect("a layer's weights");
        let weights: BlockWeights<'_> = weights.as_ref();
        let spec = checkpoint.block_spec(layer, false).expect("a layer's spec");
        let block = AttentionBlock::builder(spec, weights).dtype(DType::F32).build(&context).expect("a block");
        let (x, want) = (read(&format!("layer{layer}.attn_in")), read(&format!("layer{layer}.attn_out")));
        for level in Level::ALL {
            let mut cache = KvCache::new(&context, &block.spec().attention, 1, 2, 40, DType::F32).expect("a cache");
            let mut y = vec![f32::NAN; x.len()];
            let args = Args {
                x: TensorRef::new(&x, &[2, 40, 256]).expect("x"),
                batch: &Batch::uniform(2, 40).expect("a batch"),
                mask: None,
                cache: cache.layer(0),
                y: TensorMut::new(&mut y, &[2, 40, 256]).expect("y"),
            };
            block.at(Some(level)).forward(args).expect("a call");
            let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut y.iter().zip(&want).map(|(a, b)| f64::from(*a) - f64::from(*b)))
                / norm(&mut want.iter().map(|&v| f64::from(v)));
            worst = worst.max(error);
            assert!(error <= 3e-6, "layer {layer} {level}: relative error {error:.2e}");
        }
    }
    println!("worst relative error {worst:.2e}");
}

#[test]
#[ignore = "needs a GPU"]
fn repeated_runs_give_the_same_bits() {
    let context = gpu();
    for line in LINES {
        let problem = problem(line);
        let data = data_for(&problem, 3, Sharpness::Sharp);
        for level in Level::ALL {
            let mut first: Option<Vec<u32>> = None;
            for run in 0..20 {
                let out = compute(&context, &problem, Some(level), &data).expect("a call");
                let bits = out.y.iter().chain(&out.k).chain(&out.v).map(|v| v.to_bits()).collect::<Vec<_>>();
                match &first {
                    None => first = Some(bits),
                    Some(first) => assert!(*first == bits, "run {run} of {line} {level} differs"),
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn device_tensors_and_host_tensors_agree() {
    let context = gpu();
    let problem = problem(LINES[0]);
    let data = data_for(&problem, 5, Sharpness::Sharp);
    let mut call = PreparedCall::new(&context, &problem, &data, Some(Level::Maximal)).expect("a call");
    let mut y = Tensor::zeros(problem.dtype, &[problem.batch.tokens(), problem.spec.hidden_size]).expect("y");
    let block = call.block.clone();
    block.forward(call.args(&mut y).expect("args")).expect("a call from the host");
    let x = DeviceTensor::upload(&context, &call.x.as_ref()).expect("x on the GPU");
    let mut on_device = DeviceTensor::upload(&context, &y.as_ref()).expect("y on the GPU");
    on_device.poison().expect("NaN");
    let args = Args { x: x.as_ref(), batch: &call.batch, mask: None, cache: call.cache.layer(0), y: on_device.as_mut() };
    block.forward(args).expect("a call on the GPU");
    assert_eq!(on_device.to_f32().expect("y"), y.to_f32());

    let other = gpu();
    let foreign = DeviceTensor::upload(&other, &call.x.as_ref()).expect("x of another context");
    let args = Args { x: foreign.as_ref(), batch: &call.batch, mask: None, cache: call.cache.layer(0), y: on_device.as_mut() };
    assert_eq!(block.forward(args).unwrap_err().kind(), ErrorKind::InvalidInput);
    let cpu = Context::cpu().expect("the CPU");
    let mut host_cache = KvCache::new(&cpu, &problem.spec.attention, 1, 2, 300, problem.dtype).expect("a cache");
    let args = Args { x: x.as_ref(), batch: &call.batch, mask: None, cache: host_cache.layer(0), y: on_device.as_mut() };
    assert_eq!(block.forward(args).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
#[ignore = "needs a GPU"]
fn one_graph_serves_a_growing_cache() {
    let context = gpu();
    let (e, h, g, d) = (256, 8, 2, 64);
    let spec = BlockSpec { rope: Some(RopeSpec::new(10000.0)), ..BlockSpec::new(e, AttentionSpec::new(h, g, d)) };
    let weights = |n: usize| (0..n).map(|i| ((i * 7919 % 101) as f32 / 101.0 - 0.5) * 0.2).collect::<Vec<_>>();
    let (q, k, v, o) = (weights(h * d * e), weights(g * d * e), weights(g * d * e), weights(e * h * d));
    let weights = BlockWeights::new(
        TensorRef::new(&q, &[h * d, e]).expect("q"),
        TensorRef::new(&k, &[g * d, e]).expect("k"),
        TensorRef::new(&v, &[g * d, e]).expect("v"),
        TensorRef::new(&o, &[e, h * d]).expect("o"),
    );
    let block = AttentionBlock::builder(spec, weights).dtype(DType::BF16).build(&context).expect("a block");
    let cache = || KvCache::new(&context, &block.spec().attention, 1, 2, 400, DType::BF16).expect("a cache");
    let batch = Batch::uniform(2, 1).expect("a batch");
    let x = |t: usize| {
        let values: Vec<f32> = (0..2 * e).map(|i| ((((i + 31 * t) * 2_654_435_761) >> 7) % 1000) as f32 / 500.0 - 1.0).collect();
        Tensor::from_f32(&values, DType::BF16, &[2, e]).expect("x")
    };
    let device = |t: &Tensor| DeviceTensor::upload(&context, &t.as_ref()).expect("on the GPU");
    let mut plain = cache();
    let mut captured = block.capture(device(&x(0)), batch.clone(), cache(), 0, device(&x(0))).expect("a graph");
    let mut before = Vec::new();
    for t in 0..400 {
        captured.write_x(&x(t).as_ref()).expect("x of the same shape");
        let mut y = Tensor::zeros(DType::BF16, &[2, e]).expect("y");
        let input = x(t);
        let args = Args { x: input.as_ref(), batch: &batch, mask: None, cache: plain.layer(0), y: y.as_mut() };
        block.forward(args).expect("a call");
        plain.commit(&batch).expect("room");
        captured.replay().expect("a replay");
        captured.commit().expect("room");
        let (got, want) = (captured.y().to_f32().expect("y"), y.to_f32());
        let norm = |v: &[f32]| v.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let difference: Vec<f32> = got.iter().zip(&want).map(|(a, b)| a - b).collect();
        assert!(got != before, "token {t}: the input counts");
        before.clone_from(&got);
        assert!(norm(&difference) <= 1e-2 * norm(&want), "token {t}: {} of {}", norm(&difference), norm(&want));
    }
    assert_eq!(captured.replay().unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
#[ignore = "needs a GPU"]
fn what_does_not_fit_is_refused_and_the_rest_goes_on() {
    let context = gpu();
    let spec = AttentionSpec::new(8, 8, 128);
    let error = KvCache::new(&context, &spec, 80, 64, 1 << 20, DType::BF16).err().expect("no GPU holds it");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    println!("{error}");
    let problem = problem(LINES[0]);
    let data = data_for(&problem, 5, Sharpness::Sharp);
    compute(&context, &problem, None, &data).expect("a call after a refusal");
}

#[test]
#[ignore = "needs a GPU"]
fn a_warm_call_allocates_nothing_and_costs_little() {
    let context = gpu();
    let problem = problem("block b=1 s=1 past=4000 e=4096 h=32/8 d=128 causal rope=half input_norm=0.00001 residual bf16");
    let data = data_for(&problem, 5, Sharpness::Sharp);
    let mut call = PreparedCall::new(&context, &problem, &data, Some(Level::Maximal)).expect("a call");
    let block = call.block.clone();
    let x = DeviceTensor::upload(&context, &call.x.as_ref()).expect("x");
    let mut y = DeviceTensor::upload(&context, &call.x.as_ref()).expect("y");
    let mut forward = || {
        block
            .forward(Args { x: x.as_ref(), batch: &call.batch, mask: None, cache: call.cache.layer(0), y: y.as_mut() })
            .expect("a call");
    };
    forward();
    let device = context.gpu().expect("a GPU").device();
    device.synchronize().expect("done");
    device.reset_peak();
    let before = device.usage();
    let mut times: Vec<f64> = (0..200)
        .map(|_| {
            let start = Instant::now();
            forward();
            let seconds = start.elapsed().as_secs_f64();
            device.synchronize().expect("done");
            seconds
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("host cost of a forward call: median {:.1} µs", times[100] * 1e6);
    assert_eq!(before, device.usage(), "a warm call takes no device memory");
}

fn on_device(context: &Context, values: &[f32], dtype: DType, shape: &[usize]) -> DeviceTensor {
    let tensor = Tensor::from_f32(values, dtype, shape).expect("a tensor");
    DeviceTensor::upload(context, &tensor.as_ref()).expect("on the GPU")
}

fn nans(context: &Context, dtype: DType, shape: &[usize]) -> DeviceTensor {
    on_device(context, &vec![f32::NAN; shape.iter().product()], dtype, shape)
}

#[track_caller]
fn check(policy: Policy<'_>, got: &[f32], want: &[f64], width: usize, what: &str) {
    let found = compare(policy, got, want, width);
    assert!(found.ok, "{what}: {found}");
}

fn attention_args<'a>(
    problem: &'a AttentionProblem,
    [q, k, v]: [&'a DeviceTensor; 3],
    out: &'a mut DeviceTensor,
) -> AttentionArgs<'a> {
    AttentionArgs {
        spec: &problem.spec,
        lengths: &problem.batch,
        q: q.as_ref(),
        k: k.as_ref(),
        v: v.as_ref(),
        mask: None,
        sinks: None,
        slopes: None,
        out: out.as_mut(),
        lse: None,
    }
}

#[test]
#[ignore = "needs a GPU"]
fn attention_by_itself_is_right_at_both_levels_and_as_a_graph() {
    let context = gpu();
    for line in [
        "attention b=2 s=300 past=0 h=8/2 d=64 causal bf16",
        "attention b=2 s=130 past=70 h=4/4 d=128 causal bf16",
        "attention b=3 s=1 past=1500 h=8/2 d=128 full f16",
        "attention b=1 s=1 past=5000 h=8/8 d=128 causal bf16",
        "attention b=1 s=200 past=0 h=4/4 d=256 full bf16",
        "attention s=5,90,1 past=100,0,700 h=4/2 d=80 causal f16",
        "attention b=2 s=150 past=0 h=4/2 d=64 causal f32",
        "attention b=2 s=1 past=900 h=4/1 d=64 causal f32",
    ] {
        let problem: AttentionProblem = line.parse().expect("a problem");
        let (spec, batch, mut rng) = (&problem.spec, &problem.batch, Rng::new(22));
        let (rows, dtype) = (batch.max_len(), problem.dtype);
        let mut numbers = |n: usize, deviation: f64| inputs::rounded(dtype, rng.normals(n, deviation));
        let kv_len = batch.sequences() * spec.kv_dim() * rows;
        let (q, k, v) = (numbers(batch.tokens() * spec.q_dim(), 2.0), numbers(kv_len, 2.0), numbers(kv_len, 1.0));
        let input = AttentionInput { q: &q, k: &k, v: &v, rows, mask: None, sinks: None, slopes: None };
        let (want, want_lse) = oracle::attention(&problem, &input).expect("an answer");
        let (honest, honest_lse) = oracle::attention_rounded(&problem, &input).expect("an answer");
        let policy = if dtype == DType::F32 { Policy::Relative(5e-6) } else { Policy::Within2x { reference: &honest, dtype } };
        let (shape, kv_shape) =
            ([batch.tokens(), spec.heads, spec.head_dim], [batch.sequences(), spec.kv_heads, rows, spec.head_dim]);
        let (q, k, v) = (
            on_device(&context, &q, dtype, &shape),
            on_device(&context, &k, dtype, &kv_shape),
            on_device(&context, &v, dtype, &kv_shape),
        );
        let inputs = [&q, &k, &v];
        let mut out = nans(&context, dtype, &shape);
        ops::attention(&context, attention_args(&problem, inputs, &mut out)).expect("a call");
        check(policy, &out.to_f32().expect("out"), &want, spec.head_dim, line);
        let mut lse = nans(&context, DType::F32, &shape[..2]);
        let args = attention_args(&problem, inputs, &mut out);
        ops::attention(&context, AttentionArgs { lse: Some(lse.as_mut()), ..args }).expect("a call");
        let policy_of_lse = if dtype == DType::F32 { policy } else { Policy::Within2x { reference: &honest_lse, dtype } };
        check(policy_of_lse, &lse.to_f32().expect("lse"), &want_lse, spec.heads, &format!("{line}: log-sum-exp"));
        let args = AttentionArgs { lse: Some(lse.as_mut()), ..attention_args(&problem, inputs, &mut out) };
        let operation = Operation::Attention(Box::new(args), Level::Unfused);
        let error = ops::replay_timed(&context, operation, Replays::Warm(1)).expect_err("scores in memory have no such sum");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        for (level, replays) in
            [(Level::Unfused, Replays::Warm(3)), (Level::Maximal, Replays::Warm(3)), (Level::Maximal, Replays::Cold(3))]
        {
            out.poison().expect("NaN");
            let operation = Operation::Attention(Box::new(attention_args(&problem, inputs, &mut out)), level);
            let seconds = ops::replay_timed(&context, operation, replays).expect("replays");
            let what = format!("{line} {level}");
            assert!(seconds > 0.0, "{what}");
            check(policy, &out.to_f32().expect("out"), &want, spec.head_dim, &what);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn rope_with_the_append_writes_q_and_the_cache() {
    let context = gpu();
    for (dtype, h, g, d) in [(DType::BF16, 8, 2, 128), (DType::F32, 3, 3, 34), (DType::F16, 4, 4, 64)] {
        let (b, s, past) = (2, 70, 5);
        let (tokens, width) = (b * s, (h + 2 * g) * d);
        let mut rng = Rng::new(9);
        let qkv = inputs::rounded(dtype, rng.normals(tokens * width, 1.0));
        let spec = RopeSpec::new(10000.0);
        let mut cache = KvCache::new(&context, &AttentionSpec::new(h, g, d), 1, b, s + past, dtype).expect("a cache");
        for sequence in 0..b {
            let rows = vec![f32::NAN; g * (s + past) * d];
            cache.import(0, sequence, s + past, &rows, &rows).expect("room");
            cache.truncate(sequence, past).expect("fewer rows");
        }
        let batch = Batch::uniform(b, s).expect("a batch");
        let (from, mut q) = (on_device(&context, &qkv, dtype, &[tokens, width]), nans(&context, dtype, &[tokens, h, d]));
        let args = RopeAppendArgs { qkv: from.as_ref(), batch: &batch, spec: &spec, q: q.as_mut(), cache: cache.layer(0) };
        ops::rope_append(&context, args).expect("a call");
        let inverse = spec.frequencies(d, s + past).inverse;
        // Heads of all tokens from `first` on, turned or as they are.
        let heads = |first: usize, n: usize, turned: bool| {
            let values: Vec<f32> = (0..tokens).flat_map(|t| qkv[t * width + first * d..][..n * d].to_vec()).collect();
            let factor = if turned { 1.0 } else { 0.0 };
            let angles: Vec<f64> = (0..tokens)
                .flat_map(|t| vec![(past + t % s) as f64 * factor; n])
                .flat_map(|p| inverse.iter().map(move |w| p * w))
                .collect();
            oracle::rope(&values, d, d, spec.layout, &angles)
        };
        let policy = Policy::Relative(if dtype == DType::F32 { 5e-6 } else { dtype.epsilon() });
        check(policy, &q.to_f32().expect("q"), &heads(0, h, true), d, "q");
        let (k, v) = (heads(h, g, true), heads(h + g, g, false));
        for sequence in 0..b {
            let found = cache.export(0, sequence, s + past).expect("the cache");
            for (got, want, name) in [(&found.0, &k, "k"), (&found.1, &v, "v")] {
                for head in 0..g {
                    let got = &got[(head * (s + past) + past) * d..][..s * d];
                    let row = |t: usize| want[((sequence * s + t) * g + head) * d..][..d].to_vec();
                    let want: Vec<f64> = (0..s).flat_map(row).collect();
                    check(policy, got, &want, d, &format!("{name} of sequence {sequence}, head {head}, {dtype}"));
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn replays_of_operators_give_what_calls_do() {
    let context = gpu();
    let mut rng = Rng::new(10);
    let (tokens, h, d) = (90, 4, 64);
    let positions: Vec<usize> = (0..tokens).map(|t| t % 45).collect();
    let spec = RopeSpec::new(10000.0);
    for dtype in DType::ALL {
        let x = on_device(&context, &rng.normals(tokens * h * d, 1.0), dtype, &[tokens, h, d]);
        let before = x.to_f32().expect("x");
        for method in [RopeMethod::Fused, RopeMethod::TwoPass] {
            let mut out = nans(&context, dtype, &[tokens, h, d]);
            let mut in_place = on_device(&context, &before, dtype, &[tokens, h, d]);
            ops::rope(&context, &mut in_place.as_mut(), &positions, &spec, method).expect("a call");
            let (x, out_view) = (x.as_ref(), out.as_mut());
            let operation = Operation::Rope { x, out: out_view, positions: &positions, spec: &spec, method };
            assert!(ops::replay_timed(&context, operation, Replays::Warm(4)).expect("replays") > 0.0);
            assert_eq!(out.to_f32().expect("out"), in_place.to_f32().expect("x"), "{dtype} {method:?}");
        }
        assert_eq!(x.to_f32().expect("x"), before, "{dtype}: the input stays");
    }
    let x = on_device(&context, &rng.normals(64 * 1000, 3.0), DType::F32, &[64, 1000]);
    for method in [SoftmaxMethod::Fused, SoftmaxMethod::ThreePass, SoftmaxMethod::Online(512)] {
        let (mut once, mut out) = (nans(&context, DType::F32, &[64, 1000]), nans(&context, DType::F32, &[64, 1000]));
        ops::softmax(&context, &x.as_ref(), &mut once.as_mut(), method).expect("a call");
        let operation = Operation::Softmax { x: x.as_ref(), out: out.as_mut(), method };
        ops::replay_timed(&context, operation, Replays::Warm(4)).expect("replays");
        assert_eq!(once.to_f32().expect("out"), out.to_f32().expect("out"), "{method:?}");
    }
    let (e, q_dim, kv_dim) = (256, 128, 64);
    let [q, k, v] = [q_dim, kv_dim, kv_dim].map(|n| inputs::rounded(DType::BF16, rng.normals(n * e, 0.1)));
    let matrix = |w: &[f32]| Tensor::from_f32(w, DType::F32, &[w.len() / e, e]).expect("a matrix");
    let (wq, wk, wv) = (matrix(&q), matrix(&k), matrix(&v));
    let weights = QkvWeights::pack(&context, &wq.as_ref(), &wk.as_ref(), &wv.as_ref(), DType::BF16).expect("weights");
    let x = inputs::rounded(DType::BF16, rng.normals(tokens * e, 1.0));
    let all = [&q[..], &k, &v].concat();
    let (want, n) = (oracle::gemm(&x, &all, None, e), q_dim + 2 * kv_dim);
    let x = on_device(&context, &x, DType::BF16, &[tokens, e]);
    for fused in [true, false] {
        let mut out = nans(&context, DType::BF16, &[tokens, n]);
        let operation = Operation::QkvProjection { x: x.as_ref(), weights: &weights, out: out.as_mut(), fused };
        ops::replay_timed(&context, operation, Replays::Warm(4)).expect("replays");
        let what = format!("fused {fused}");
        check(Policy::Relative(DType::BF16.epsilon()), &out.to_f32().expect("out"), &want, n, &what);
    }
    context.flush_cache().expect("an empty cache");
    context.synchronize().expect("done");
}
