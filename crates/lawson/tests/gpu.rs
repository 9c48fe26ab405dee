//! Blocks on a GPU. Run by hand where there is one: `cargo test --release -p lawson --test gpu -- --ignored --test-threads 1`.

use std::{path::PathBuf, time::Instant};

use lawson::{
    Args, AttentionBlock, AttentionSpec, Batch, BlockProblem, BlockSpec, BlockWeights, Checkpoint, Context, ContextOptions,
    DType, Device, DeviceTensor, ErrorKind, KvCache, Level, PreparedCall, RopeSpec, Tensor, TensorMut, TensorRef, compute,
    tensor_file::TensorFile,
};
use lawson_testkit::{
    cases,
    conformance::check_blocks,
    inputs::{Sharpness, data_for},
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
const LINES: [&str; 7] = [
    "block b=2 s=300 past=0 e=512 h=8/2 d=64 causal rope=half bf16",
    "block b=1 s=77 past=200 e=512 h=4/4 d=128 causal window=90 qk_norm=0.000001 input_norm=0.00001 residual rope=half bf16",
    "block b=4 s=1 past=3000 e=512 h=8/2 d=64 causal rope=half input_norm=0.00001 residual f16",
    "block b=1 s=1 past=5000 e=512 h=8/8 d=128 causal softcap=20 sinks rope=half bf16",
    "block s=5,90,1 past=100,0,700 e=256 h=4/2 d=80 causal alibi bias=qkvo f16",
    "block b=2 s=130 past=0 e=256 h=4/1 d=64 full rope=interleaved f32",
    "block b=3 s=1 past=900 e=256 h=4/2 d=33 causal rope=half,dim=32 f32",
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
