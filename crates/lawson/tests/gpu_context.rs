//! Contexts of a GPU that threads and streams share. Run by hand where there is one:
//! `cargo test --release -p lawson --test gpu_context -- --ignored --test-threads 1`.

use std::{ffi::c_void, ptr, thread};

use lawson::{
    Args, AttentionBlock, AttentionProblem, Batch, BlockProblem, BlockWeights, Context, ContextOptions, DType, Device,
    DeviceTensor, ErrorKind, KvCache, Level, PagePool, Tensor, TensorRef,
    ops::{self, AttentionArgs},
};
use lawson_testkit::{
    inputs::{Sharpness, data_for},
    rng::Rng,
};

const OPTIONS: ContextOptions = ContextOptions { device: Device::Cuda(0), threads: None, isa: None };
/// Most rows of a sequence.
const CAPACITY: usize = 400;

fn gpu() -> Context {
    Context::new(OPTIONS).expect("a GPU")
}

fn problem(line: &str) -> BlockProblem {
    line.parse().expect("a problem")
}

/// The block of a problem, with weights of a fixed seed.
fn block(context: &Context, problem: &BlockProblem) -> AttentionBlock {
    let data = data_for(problem, 11, Sharpness::Ordinary);
    let weights = BlockWeights::from_data(&problem.spec, &data).expect("weights");
    AttentionBlock::builder(problem.spec.clone(), weights).dtype(problem.dtype).build(context).expect("a block")
}

fn contiguous(block: &AttentionBlock, sequences: usize) -> KvCache {
    KvCache::new(block.context(), &block.spec().attention, 1, sequences, CAPACITY, block.dtype()).expect("a cache")
}

/// x of `tokens` tokens.
fn input(block: &AttentionBlock, seed: u64, tokens: usize) -> Tensor {
    let e = block.spec().hidden_size;
    Tensor::from_f32(&Rng::new(seed).normals(tokens * e, 1.0), block.dtype(), &[tokens, e]).expect("x")
}

fn on_device(block: &AttentionBlock, tensor: &Tensor) -> DeviceTensor {
    DeviceTensor::upload(block.context(), &tensor.as_ref()).expect("on the GPU")
}

/// The results of a prefill and many decode steps of two sequences, on device tensors.
fn generate(block: &AttentionBlock, cache: &mut KvCache, seed: u64) -> Vec<f32> {
    let mut results = Vec::new();
    for t in 0..60 {
        let batch = Batch::ragged(if t == 0 { vec![37, 20] } else { vec![1, 1] }).expect("a batch");
        let x = on_device(block, &input(block, 1000 * seed + t, batch.tokens()));
        let mut y = on_device(block, &input(block, 0, batch.tokens()));
        y.poison().expect("NaN");
        let args = Args { x: x.as_ref(), batch: &batch, mask: None, cache: cache.layer(0), y: y.as_mut() };
        block.forward(args).expect("a call");
        cache.commit(&batch).expect("room");
        results.extend(y.to_f32().expect("y"));
    }
    assert!(results.iter().all(|v| v.is_finite()));
    results
}

#[test]
#[ignore = "needs a GPU"]
fn threads_share_a_context() {
    let context = gpu();
    let block = block(&context, &problem("block b=2 s=1 e=256 h=8/2 d=64 causal rope=half bf16"));
    for level in [Level::Maximal, Level::Unfused] {
        let block = block.at(Some(level));
        let pool =
            PagePool::new(&context, &block.spec().attention, 1, 4 * 2 * CAPACITY.div_ceil(32), 32, DType::BF16).expect("a pool");
        let want: Vec<_> = (0..4).map(|seed| generate(&block, &mut contiguous(&block, 2), seed)).collect();
        thread::scope(|scope| {
            for (seed, want) in (0..).zip(&want) {
                let (block, pool) = (block.clone(), pool.clone());
                scope.spawn(move || {
                    let paged = KvCache::paged(&pool, 2, CAPACITY).expect("a cache");
                    for mut cache in [contiguous(&block, 2), paged] {
                        assert!(generate(&block, &mut cache, seed) == *want, "{level}: what thread {seed} computes");
                    }
                });
            }
            // Captures while the others enqueue.
            for _ in 0..5 {
                let x = input(&block, 77, 2);
                let cache = contiguous(&block, 2);
                let batch = Batch::uniform(2, 1).expect("a batch");
                let mut captured = block.capture(on_device(&block, &x), batch, cache, 0, on_device(&block, &x)).expect("a graph");
                let mut results = Vec::new();
                for _ in 0..10 {
                    captured.poison_y().expect("NaN");
                    captured.replay().expect("a replay");
                    results.push(captured.y().to_f32().expect("y"));
                }
                assert!(results.iter().all(|r| r == &results[0] && r.iter().all(|v| v.is_finite())), "{level}");
            }
        });
        assert_eq!(pool.free_pages(), pool.pages());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn work_goes_through_the_callers_stream() {
    let (owner, p) = (gpu(), problem("block b=2 s=1 e=256 h=8/2 d=64 causal rope=half bf16"));
    let stream = owner.gpu().expect("a GPU").device().stream();
    // SAFETY: `owner` keeps its stream to the end of the test, and enqueues nothing while the other captures.
    let context = unsafe { Context::with_cuda_stream(OPTIONS, stream) }.expect("a context");
    assert_eq!(context.gpu().expect("a GPU").device().stream(), stream);
    let (own, borrowed) = (block(&owner, &p), block(&context, &p));
    let want = generate(&own, &mut contiguous(&own, 2), 1);
    assert!(generate(&borrowed, &mut contiguous(&borrowed, 2), 1) == want);
    // What both enqueue follows one another, so tensors of one serve the other.
    let batch = Batch::uniform(2, 1).expect("a batch");
    let x = on_device(&own, &input(&own, 5, 2));
    let mut y = on_device(&own, &input(&own, 0, 2));
    let (mut here, mut there) = (contiguous(&borrowed, 2), contiguous(&own, 2));
    borrowed
        .forward(Args { x: x.as_ref(), batch: &batch, mask: None, cache: here.layer(0), y: y.as_mut() })
        .expect("a call over the owner's tensors");
    let first = y.to_f32().expect("y");
    own.forward(Args { x: x.as_ref(), batch: &batch, mask: None, cache: there.layer(0), y: y.as_mut() }).expect("a call");
    assert!(y.to_f32().expect("y") == first);
    let graph =
        borrowed.capture(on_device(&borrowed, &input(&own, 5, 2)), batch, here, 0, on_device(&borrowed, &input(&own, 5, 2)));
    let mut graph = graph.expect("a graph in the caller's stream");
    graph.replay().expect("a replay");
    context.synchronize().expect("done");
    // SAFETY: null is the default stream; nothing is captured in it.
    let default = unsafe { Context::with_cuda_stream(OPTIONS, ptr::null_mut()) }.expect("the default stream");
    let in_default = block(&default, &p);
    assert!(generate(&in_default, &mut contiguous(&in_default, 2), 1) == want);
}

/// A tensor of `owner`, in bf16.
fn owned(owner: &Context, values: &[f32], shape: &[usize]) -> DeviceTensor {
    let tensor = Tensor::from_f32(values, DType::BF16, shape).expect("a tensor");
    DeviceTensor::upload(owner, &tensor.as_ref()).expect("on the GPU")
}

/// The memory of `owner` as a tensor of `context` that does not own it.
fn borrowed(context: &Context, owner: &DeviceTensor) -> DeviceTensor {
    let (at, dtype) = (owner.buffer().ptr() as *mut c_void, owner.as_ref().dtype());
    // SAFETY: every owner in these tests outlives what is enqueued, in the one stream that both contexts work in.
    unsafe { DeviceTensor::from_raw_parts(context, at, dtype, owner.shape()) }.expect("a borrowed tensor")
}

#[test]
#[ignore = "needs a GPU"]
fn tensors_that_the_caller_owns_are_used_where_they_lie() {
    let (owner, p) = (gpu(), problem("block b=2 s=70 past=0 e=256 h=8/2 d=64 causal rope=half residual bf16"));
    let device = owner.gpu().expect("a GPU").device();
    // SAFETY: `owner` keeps its stream to the end of the test, and enqueues nothing while the other captures.
    let context = unsafe { Context::with_cuda_stream(OPTIONS, device.stream()) }.expect("a context");
    let (block, batch) = (block(&context, &p), Batch::uniform(2, 70).expect("a batch"));
    let (x, mut y) = (on_device(&block, &input(&block, 5, 140)), on_device(&block, &input(&block, 0, 140)));
    let (their_x, their_y) =
        (owned(&owner, &x.to_f32().expect("x"), &[140, 256]), owned(&owner, &[f32::NAN; 140 * 256], &[140, 256]));
    let before = context.gpu().expect("a GPU").device().usage();
    let (our_x, mut our_y) = (borrowed(&context, &their_x), borrowed(&context, &their_y));
    assert_eq!(context.gpu().expect("a GPU").device().usage(), before, "borrowed memory is not ours");
    for level in Level::ALL {
        let block = block.at(Some(level));
        let (mut here, mut there) = (contiguous(&block, 2), contiguous(&block, 2));
        let args = Args { x: x.as_ref(), batch: &batch, mask: None, cache: here.layer(0), y: y.as_mut() };
        block.forward(args).expect("a call over tensors of the context");
        our_y.poison().expect("NaN");
        let args = Args { x: our_x.as_ref(), batch: &batch, mask: None, cache: there.layer(0), y: our_y.as_mut() };
        block.forward(args).expect("a call over the caller's tensors");
        let (want, got) = (y.to_f32().expect("y"), their_y.to_f32().expect("y"));
        assert!(want == got && want.iter().all(|v| v.is_finite()), "{level}");
    }
    let mut graph = block.capture(our_x, batch, contiguous(&block, 2), 0, our_y).expect("a graph");
    let want = graph.y().to_f32().expect("y");
    graph.poison_y().expect("NaN");
    graph.replay().expect("a replay");
    assert!(their_y.to_f32().expect("y") == want, "a replay writes there too");
    drop(graph);
    let after = DeviceTensor::nans(&context, DType::BF16, &[140, 256]).expect("a tensor");
    assert!([&their_x, &their_y].iter().all(|t| t.buffer().ptr() != after.buffer().ptr()), "borrowed memory joins no pool");
}

#[test]
#[ignore = "needs a GPU"]
fn attention_reads_the_keys_and_values_of_other_libraries() {
    let owner = gpu();
    // SAFETY: `owner` keeps its stream to the end of the test; nothing is captured.
    let context = unsafe { Context::with_cuda_stream(OPTIONS, owner.gpu().expect("a GPU").device().stream()) };
    let context = context.expect("a context");
    // [B, L, G, D] is seen as [B, G, L, D].
    let problem: AttentionProblem = "attention b=2 s=3 past=57 h=8/2 d=64 causal bf16".parse().expect("a problem");
    let (b, g, l, d) = (2, 2, 60, 64);
    let mut rng = Rng::new(4);
    let q = owned(&owner, &rng.normals(2 * 3 * 8 * d, 1.0), &[6, 8, d]);
    let rows: [Vec<f32>; 2] = [0, 1].map(|_| rng.normals(b * g * l * d, 1.0));
    let by_row = |values: &[f32]| {
        let at = |i: usize| (((i / (g * l * d) * g + i / d % g) * l + i / (g * d) % l) * d) + i % d;
        (0..values.len()).map(|i| values[at(i)]).collect::<Vec<f32>>()
    };
    let run = |kv: [TensorRef<'_>; 2]| {
        let out = owned(&owner, &vec![f32::NAN; 2 * 3 * 8 * d], &[6, 8, d]);
        let (q, mut to) = (borrowed(&context, &q), borrowed(&context, &out));
        let [k, v] = kv;
        let (spec, lengths) = (&problem.spec, &problem.batch);
        let (q, to) = (q.as_ref(), to.as_mut());
        let args = AttentionArgs { spec, lengths, q, k, v, mask: None, sinks: None, slopes: None, out: to, lse: None };
        ops::attention(&context, args).expect("a call");
        out.to_f32().expect("the result")
    };
    let heads = [0, 1].map(|i| owned(&owner, &rows[i], &[b, g, l, d]));
    let tokens = [0, 1].map(|i| owned(&owner, &by_row(&rows[i]), &[b, l, g, d]));
    let (heads, tokens) = (heads.each_ref().map(|t| borrowed(&context, t)), tokens.each_ref().map(|t| borrowed(&context, t)));
    let [k, v] = tokens
        .each_ref()
        .map(|t| TensorRef::strided(t.as_ref().storage(), &[b, g, l, d], &[l * g * d, d, g * d, 1]).expect("a view"));
    let (want, got) = (run(heads.each_ref().map(DeviceTensor::as_ref)), run([k, v]));
    assert!(want == got && want.iter().all(|v| v.is_finite()));
}

#[test]
#[ignore = "needs a GPU"]
fn memory_that_is_not_the_gpus_is_refused() {
    let context = gpu();
    let device = context.gpu().expect("a GPU").device();
    let ours = DeviceTensor::nans(&context, DType::F32, &[4, 64]).expect("a tensor");
    let (at, host) = (ours.buffer().ptr() as usize, vec![0u128; 64]);
    // SAFETY: what is accepted is not used.
    let borrow = |at: usize, shape: &[usize]| unsafe {
        DeviceTensor::from_raw_parts(&context, at as *mut c_void, DType::F32, shape).map(drop)
    };
    let refused = |at: usize, shape: &[usize], why: &str| {
        let error = borrow(at, shape).expect_err(why);
        println!("{error}");
        assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains(why), "{error}");
    };
    borrow(at, &[4, 64]).expect("all of it");
    borrow(at + 256, &[3, 64]).expect("some of its rows");
    borrow(0, &[0, 64]).expect("nothing, which has no address");
    refused(0, &[4, 64], "no memory of a GPU at 0x0");
    refused(at + 4, &[1, 64], "not a multiple of 16");
    refused(host.as_ptr() as usize, &[4, 64], &format!("for cuda:{}", device.info().ordinal));
    refused(at, &[1 << 40], "no memory of a GPU at");
    refused(at, &[1, 1, 1, 1, 4], "cannot be made");
    refused(usize::MAX - 15, &[4, 64], "no address space");
    for other in 1..lawson::cuda::devices().expect("GPUs").len() {
        let other = Context::new(ContextOptions { device: Device::Cuda(other), ..OPTIONS }).expect("another GPU");
        let theirs = DeviceTensor::nans(&other, DType::F32, &[4, 64]).expect("a tensor");
        refused(theirs.buffer().ptr() as usize, &[4, 64], "is memory of cuda:");
    }
    let weights = problem("block b=1 s=1 e=64 h=1/1 d=64 causal bf16");
    let square = DeviceTensor::nans(&context, DType::F32, &[64, 64]).expect("a tensor");
    let [q, k, v, o] = [square.as_ref(); 4];
    let error = AttentionBlock::builder(weights.spec, BlockWeights::new(q, k, v, o)).build(&context).err().expect("no weights");
    assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("'q_proj.weight' lies on a device"), "{error}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_graph_follows_frequencies_that_depend_on_the_length() {
    let context = gpu();
    for rope in ["half,dynamic:4:40", "half,dim=16,longrope:1/1/1/1/1/1/1/1:2/3/4/5/6/7/8/9:40:factor=4"] {
        let p = problem(&format!("block b=2 s=1 e=256 h=4/2 d=64 causal rope={rope} f32"));
        let block = block(&context, &p).at(Some(Level::Maximal));
        let batch = Batch::uniform(2, 1).expect("a batch");
        let pool = PagePool::new(&context, &block.spec().attention, 1, 8, 32, DType::F32).expect("a pool");
        let mut plain = contiguous(&block, 2);
        let mut graphs = [contiguous(&block, 2), KvCache::paged(&pool, 2, CAPACITY).expect("a cache")].map(|cache| {
            let x = || on_device(&block, &input(&block, 0, 2));
            block.capture(x(), batch.clone(), cache, 0, x()).expect("a graph")
        });
        for t in 0..80 {
            let x = input(&block, t, 2);
            let want = block.forward_alloc(x.as_ref(), &batch, None, plain.layer(0)).expect("a call").to_f32();
            plain.commit(&batch).expect("room");
            for graph in &mut graphs {
                graph.write_x(&x.as_ref()).expect("x of the same shape");
                graph.poison_y().expect("NaN");
                graph.replay().expect("a replay");
                graph.commit().expect("room");
                let got = graph.y().to_f32().expect("y");
                let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
                let difference = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b));
                let size = norm(&mut want.iter().copied());
                assert!(difference <= 1e-5 * size, "{rope} token {t}: {difference:.2e} of {size:.2e}");
            }
        }
        let rows = |cache: &KvCache| (0..2).map(|b| cache.export(0, b, 80).expect("rows").0).collect::<Vec<_>>();
        let want = rows(&plain);
        for graph in &graphs {
            for (got, want) in rows(graph.cache()).iter().zip(&want) {
                assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-4), "{rope}: keys turn as in a plain call");
            }
        }
    }
}
