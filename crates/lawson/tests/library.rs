//! The library as a program uses it: caches, calls of every shape, levels, threads, and what is refused.

#[allow(dead_code, reason = "other tests use the rest")]
mod files;

use std::ptr::null_mut;

use files::refused;
use half::bf16;
use lawson::{
    Args, AttentionBlock, Batch, BlockData, BlockProblem, BlockWeights, CacheDType, Context, ContextOptions, DType, Device,
    ErrorKind, KvCache, Level, MaskRef, PagePool, Tensor, TensorMut, TensorRef,
};
use lawson_core::compare::{Policy, compare};
use lawson_testkit::{
    inputs::{Sharpness, data_for},
    rng::Rng,
};

const E: usize = 48;
const BLOCK: &str = "block b=1 s=1 e=48 h=4/2 d=16 causal rope=half bias=qkvo qk_norm=1e-6 residual";

fn context() -> Context {
    Context::new(ContextOptions { threads: Some(2), ..Default::default() }).unwrap()
}

/// The block of a problem line, with weights of a fixed seed.
fn block(context: &Context, line: &str) -> AttentionBlock {
    let problem: BlockProblem = line.parse().unwrap();
    let data = data_for(&problem, 11, Sharpness::Ordinary);
    let weights = BlockWeights::from_data(&problem.spec, &data).unwrap();
    AttentionBlock::builder(problem.spec.clone(), weights).dtype(problem.dtype).build(context).unwrap()
}

fn cache(block: &AttentionBlock, sequences: usize, capacity: usize) -> KvCache {
    KvCache::new(block.context(), &block.spec().attention, 1, sequences, capacity, DType::F32).unwrap()
}

/// x of `tokens` tokens.
fn input(seed: u64, tokens: usize) -> Vec<f32> {
    Rng::new(seed).normals(tokens * E, 1.0)
}

/// One call; the new rows are not committed.
fn forward(block: &AttentionBlock, cache: &mut KvCache, new: &[usize], x: &[f32]) -> Vec<f32> {
    let batch = Batch::ragged(new.to_vec()).unwrap();
    let mut y = vec![f32::NAN; x.len()];
    block
        .forward(Args {
            x: TensorRef::new(x, &[batch.tokens(), E]).unwrap(),
            batch: &batch,
            mask: None,
            cache: cache.layer(0),
            y: TensorMut::new(&mut y, &[batch.tokens(), E]).unwrap(),
        })
        .unwrap();
    y
}

/// One call whose new rows are committed.
fn step(block: &AttentionBlock, cache: &mut KvCache, new: &[usize], x: &[f32]) -> Vec<f32> {
    let y = forward(block, cache, new, x);
    cache.commit(&Batch::ragged(new.to_vec()).unwrap()).unwrap();
    y
}

#[track_caller]
fn near(got: &[f32], want: &[f32], what: &str) {
    let want: Vec<f64> = want.iter().map(|&v| v.into()).collect();
    let found = compare(Policy::Relative(5e-6), got, &want, E);
    assert!(found.ok, "{what}: {found}");
}

// The cache

#[test]
fn rows_become_valid_when_they_are_committed() {
    let context = context();
    let block = block(&context, BLOCK);
    let mut cache = cache(&block, 1, 16);
    let x = input(1, 3);
    let first = forward(&block, &mut cache, &[3], &x);
    assert_eq!(cache.lengths(), [0]);
    assert_eq!(forward(&block, &mut cache, &[3], &x), first, "an uncommitted call leaves the cache as it was");
    let written = cache.export(0, 0, 3).unwrap();
    cache.commit(&Batch::uniform(1, 3).unwrap()).unwrap();
    assert_eq!((cache.lengths(), cache.export(0, 0, 3).unwrap()), (&[3][..], written.clone()));
    let next = forward(&block, &mut cache, &[2], &input(2, 2));
    assert_eq!(cache.lengths(), [3]);
    let (k, _) = cache.export(0, 0, 5).unwrap();
    assert_eq!(k[..3 * 16], written.0[..3 * 16], "new rows stand behind the valid ones");
    cache.commit(&Batch::uniform(1, 2).unwrap()).unwrap();
    assert_eq!(cache.lengths(), [5]);
    assert_ne!(forward(&block, &mut cache, &[2], &input(2, 2)), next, "committed rows are seen");
}

#[test]
fn truncate_and_reset_forget_rows() {
    let context = context();
    let block = block(&context, BLOCK);
    let mut cache = cache(&block, 2, 32);
    let (prompt, more) = (input(1, 10), input(2, 6));
    step(&block, &mut cache, &[4, 6], &prompt);
    let want = step(&block, &mut cache, &[3, 3], &more);
    assert_eq!(cache.lengths(), [7, 9]);
    cache.truncate(0, 4).unwrap();
    cache.truncate(1, 6).unwrap();
    assert_eq!(cache.lengths(), [4, 6]);
    assert!(forward(&block, &mut cache, &[3, 3], &more) == want);
    refused(cache.truncate(0, 5), &["sequence 0", "4 rows", "truncated to 5"]);
    refused(cache.truncate(2, 0), &["sequence 2", "2 sequences"]);
    assert_eq!(cache.lengths(), [4, 6]);
    cache.reset();
    assert_eq!(cache.lengths(), [0, 0]);
    step(&block, &mut cache, &[4, 6], &prompt);
    assert!(forward(&block, &mut cache, &[3, 3], &more) == want);
}

#[test]
fn an_exported_sequence_continues_in_another_cache() {
    let context = context();
    let block = block(&context, BLOCK);
    let (mut from, mut to) = (cache(&block, 2, 20), cache(&block, 1, 70));
    step(&block, &mut from, &[5, 8], &input(1, 13));
    let (k, v) = from.export(0, 1, 8).unwrap();
    assert_eq!((k.len(), v.len()), (2 * 8 * 16, 2 * 8 * 16));
    to.import(0, 0, 8, &k, &v).unwrap();
    assert_eq!((to.lengths(), to.export(0, 0, 8).unwrap()), (&[8][..], (k.clone(), v.clone())));
    let x = input(2, 4);
    let both = forward(&block, &mut from, &[4, 4], &[x.clone(), x.clone()].concat());
    assert!(forward(&block, &mut to, &[4], &x) == both[4 * E..]);

    refused(to.export(1, 0, 1), &["layer 1", "1"]);
    refused(to.export(0, 1, 1), &["sequence 1"]);
    refused(to.export(0, 0, 71), &["71 rows", "70"]);
    refused(to.import(0, 0, 8, &k[1..], &v), &["[G, 8, D]", "256", "255 of k"]);
    refused(to.import(0, 0, 71, &k, &v), &["71 rows", "70"]);
    assert_eq!(to.lengths(), [8]);
}

#[test]
fn imported_rows_are_rounded_to_the_caches_dtype() {
    let context = context();
    let spec = block(&context, BLOCK).spec().attention.clone();
    let values = Rng::new(3).normals(2 * 3 * 16, 1.0);
    let mut cache = KvCache::new(&context, &spec, 2, 1, 3, DType::BF16).unwrap();
    assert_eq!(
        (cache.dtype(), cache.layers(), cache.kv_heads(), cache.head_dim(), cache.capacity()),
        (CacheDType::BF16, 2, 2, 16, 3)
    );
    cache.import(1, 0, 3, &values, &values).unwrap();
    let want: Vec<f32> = values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
    assert_eq!(cache.export(1, 0, 3).unwrap(), (want.clone(), want));
    assert_eq!(cache.export(0, 0, 3).unwrap().0, [0.0; 96], "the other layer is untouched");
    // K and V, whole tiles of 64 rows.
    assert_eq!(cache.bytes(), 2 * 2 * 2 * 64 * 16 * 2);
}

#[test]
fn layers_share_lengths_and_nothing_else() {
    let context = context();
    let block = block(&context, BLOCK);
    let mut both = KvCache::new(&context, &block.spec().attention, 2, 1, 9, DType::F32).unwrap();
    let batch = Batch::uniform(1, 3).unwrap();
    let inputs = [input(1, 3), input(2, 3)];
    for (layer, x) in inputs.iter().enumerate() {
        block.forward_alloc(TensorRef::new(x, &[3, E]).unwrap(), &batch, None, both.layer(layer)).unwrap();
    }
    both.commit(&batch).unwrap();
    for (layer, x) in inputs.iter().enumerate() {
        let mut alone = cache(&block, 1, 9);
        step(&block, &mut alone, &[3], x);
        assert_eq!(both.export(layer, 0, 3).unwrap(), alone.export(0, 0, 3).unwrap());
    }
    assert_eq!(both.lengths(), [3]);
}

#[test]
#[should_panic(expected = "layer 2 of a cache of 2 layers")]
fn a_layer_out_of_range_panics() {
    let context = context();
    let spec = block(&context, BLOCK).spec().attention.clone();
    KvCache::new(&context, &spec, 2, 1, 1, DType::F32).unwrap().layer(2);
}

#[test]
fn impossible_caches_and_batches_are_refused() {
    let context = context();
    let spec = block(&context, BLOCK).spec().attention.clone();
    let make = |layers, sequences, capacity| KvCache::new(&context, &spec, layers, sequences, capacity, DType::F32);
    refused(make(0, 1, 1), &["at least 1 of layers"]);
    refused(make(1, 0, 1), &["at least 1 of sequences"]);
    refused(make(1, 1, 0), &["at least 1 of capacity"]);
    refused(make(1, 1, usize::MAX), &["too large"]);
    refused(make(usize::MAX, 2, 1), &["too large"]);
    refused(make(1, usize::MAX / 2, 1), &["too large"]);
    refused(Batch::uniform(0, 1), &["at least one sequence"]);
    refused(Batch::uniform(2, 0), &["sequence 0", "no new token"]);
    refused(Batch::uniform(usize::MAX, usize::MAX), &["sequences is too large"]);
    refused(Batch::ragged(vec![1, 0]), &["sequence 1", "no new token"]);
    refused(Tensor::zeros(DType::F32, &[usize::MAX, 2]), &["cannot be made"]);
    refused(Tensor::zeros(DType::F32, &[1; 5]), &["cannot be made"]);
    refused(Tensor::from_f32(&[1.0], DType::F32, &[2]), &["[2]", "1 elements"]);
}

// Errors

/// Every error of a call: its parts, and that neither y nor the cache changed.
#[test]
fn a_refused_call_changes_nothing() {
    let context = context();
    let block = block(&context, BLOCK);
    let mut cache = cache(&block, 2, 8);
    step(&block, &mut cache, &[3, 5], &input(1, 8));
    let before = [cache.export(0, 0, 8).unwrap(), cache.export(0, 1, 8).unwrap()];
    let other_spec = lawson::AttentionSpec::new(4, 4, 8);
    let mut other = KvCache::new(&context, &other_spec, 1, 2, 8, DType::F32).unwrap();
    let mut three = KvCache::new(&context, &block.spec().attention, 1, 3, 8, DType::F32).unwrap();

    let (x, wide) = (vec![1.0f32; 4 * E], vec![1.0f32; 4 * (E + 1)]);
    let narrow = vec![bf16::ONE; 4 * E];
    let dense = |rows: usize| TensorRef::new(&x[..rows * E], &[rows, E]).unwrap();
    let bytes = [1u8; 4 * 2 * 8 * 8];
    let mask = |shape: [usize; 4]| Some(MaskRef::new(&bytes[..shape.iter().product()], shape).unwrap());
    let good = || (dense(4), [2, 2], None, &[4, E][..]);
    type Case<'a> = ((TensorRef<'a>, [usize; 2], Option<MaskRef<'a>>, &'a [usize]), &'a [&'a str]);
    let cases: Vec<Case<'_>> = vec![
        ((dense(3), [2, 2], None, &[4, E]), &["x has shape [3, 48]", "[4, 48]"]),
        ((TensorRef::new(&wide, &[4, E + 1]).unwrap(), [2, 2], None, &[4, E]), &["x has shape [4, 49]", "48"]),
        ((TensorRef::new(&x, &[4 * E]).unwrap(), [2, 2], None, &[4, E]), &["x has shape [192]"]),
        ((TensorRef::new(&x, &[2, 2, E]).unwrap(), [1, 3], None, &[4, E]), &["x has shape [2, 2, 48]", "equal lengths"]),
        ((TensorRef::new(&narrow, &[4, E]).unwrap(), [2, 2], None, &[4, E]), &["x is bf16", "computes in f32"]),
        ((TensorRef::strided(&wide, &[4, E], &[E + 1, 1]).unwrap(), [2, 2], None, &[4, E]), &["x must be contiguous", "[49, 1]"]),
        ((dense(4), [2, 2], None, &[2, 2 * E]), &["y has shape [2, 96]"]),
        ((dense(4), [0, 0], None, &[4, E]), &["4 heads of 8", "2 of 16"]),
        ((dense(3), [1, 1], None, &[3, E]), &["a batch of 3 sequences for a cache of 2"]),
        ((dense(4), [1, 3], mask([1, 1, 3, 7]), &[4, E]), &["mask has shape [1, 1, 3, 7]", "[2 or 1, 4 or 1, 3, at least 8]"]),
        ((dense(4), [2, 2], mask([2, 2, 2, 8]), &[4, E]), &["mask has shape [2, 2, 2, 8]"]),
        ((dense(4), [2, 2], mask([3, 1, 2, 8]), &[4, E]), &["mask has shape [3, 1, 2, 8]"]),
        ((dense(4), [2, 2], mask([1, 1, 1, 8]), &[4, E]), &["mask has shape [1, 1, 1, 8]"]),
        ((dense(4), [0, 4], None, &[4, E]), &["sequence 1", "5 rows", "4 more", "room for 8"]),
    ];
    for ((x, new, mask, y_shape), parts) in cases {
        let (batch, layer) = match (new, x.shape()[0]) {
            ([0, 0], _) => (Batch::uniform(2, 2).unwrap(), other.layer(0)),
            ([1, 1], _) => (Batch::uniform(3, 1).unwrap(), cache.layer(0)),
            ([0, 4], _) => (Batch::ragged(vec![4, 4]).unwrap(), cache.layer(0)),
            _ => (Batch::ragged(new.to_vec()).unwrap(), cache.layer(0)),
        };
        let long = vec![1.0f32; 8 * E];
        let (x, y_shape) = if new == [0, 4] { (TensorRef::new(&long, &[8, E]).unwrap(), &[8, E][..]) } else { (x, y_shape) };
        let mut y = vec![7.0f32; y_shape.iter().product()];
        let args = Args { x, batch: &batch, mask, cache: layer, y: TensorMut::new(&mut y, y_shape).unwrap() };
        refused(block.forward(args), parts);
        assert!(y.iter().all(|&v| v == 7.0), "y was written: {parts:?}");
        assert_eq!(cache.lengths(), [3, 5]);
        assert_eq!([cache.export(0, 0, 8).unwrap(), cache.export(0, 1, 8).unwrap()], before, "{parts:?}");
    }
    let mut y = vec![bf16::ZERO; 4 * E];
    let (x, _, mask, shape) = good();
    let batch = Batch::uniform(2, 2).unwrap();
    let args = Args { x, batch: &batch, mask, cache: cache.layer(0), y: TensorMut::new(&mut y, shape).unwrap() };
    refused(block.forward(args), &["y is bf16", "computes in f32"]);
    refused(block.forward_alloc(x, &batch, None, three.layer(0)), &["a batch of 2 sequences for a cache of 3"]);
    refused(cache.commit(&Batch::ragged(vec![1, 4]).unwrap()), &["sequence 1", "room for 8"]);
    refused(cache.commit(&Batch::uniform(3, 1).unwrap()), &["a batch of 3 sequences for a cache of 2"]);
    assert_eq!(cache.lengths(), [3, 5]);
    refused(MaskRef::new(&bytes[..5], [1, 1, 2, 3]), &["[1, 1, 2, 3]", "5 elements"]);
    refused(MaskRef::new(&bytes, [usize::MAX, 2, 2, 2]), &["elements"]);
}

#[test]
fn wrong_weights_are_named() {
    let context = context();
    let problem: BlockProblem = BLOCK.parse().unwrap();
    let data = data_for(&problem, 1, Sharpness::Ordinary);
    let build = |edit: &dyn Fn(&mut BlockProblem, &mut BlockWeights<'_>)| {
        let mut problem = problem.clone();
        let mut weights = BlockWeights::from_data(&problem.spec, &data).unwrap();
        edit(&mut problem, &mut weights);
        AttentionBlock::builder(problem.spec, weights).build(&context)
    };
    build(&|_, _| {}).unwrap();
    refused(build(&|_, w| w.q_bias = None), &["'q_proj.bias'", "[64]", "missing"]);
    refused(build(&|_, w| w.input_norm = w.o_bias), &["'input_norm.weight'", "does not ask"]);
    refused(build(&|_, w| w.k_weight = w.q_weight), &["'k_proj.weight'", "[64, 48]", "[G·D, E] = [32, 48]"]);
    refused(build(&|_, w| w.o_bias = w.q_bias), &["'o_proj.bias'", "[64]", "[E] = [48]"]);
    refused(build(&|p, _| p.spec.attention.heads = 3), &["num_attention_heads (3)", "num_key_value_heads (2)"]);
    refused(build(&|p, _| p.spec.rope.as_mut().unwrap().rotary_dim = Some(5)), &["rope.rotary_dim", "5"]);
    let short = BlockData { q_weight: Vec::new(), ..data.clone() };
    refused(BlockWeights::from_data(&problem.spec, &short), &["q_proj.weight", "[64, 48]"]);
}

#[test]
fn what_a_context_lacks_is_named() {
    let options = ContextOptions { device: Device::Cuda(99), ..Default::default() };
    let error = Context::new(options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("cuda:99"), "{error}");
    refused(Context::new(ContextOptions { threads: Some(0), ..Default::default() }), &["threads", "0"]);
    refused("gpu".parse::<Device>(), &["'gpu'", "cuda:N"]);
    // SAFETY: null is the default stream.
    let on_stream = |device| unsafe { Context::with_cuda_stream(ContextOptions { device, ..Default::default() }, null_mut()) };
    refused(on_stream(Device::Auto), &["cuda:N", "not auto"]);
    assert_eq!(on_stream(Device::Cuda(99)).unwrap_err().kind(), ErrorKind::Unavailable);
    let cpu = Context::cpu().unwrap();
    let paged: BlockProblem = format!("{BLOCK} page=64").parse().unwrap();
    let error = PagePool::new(&cpu, &paged.spec.attention, 1, 8, 64, DType::F32).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_eq!(cpu.plan(&paged, None).unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!("cuda:3".parse::<Device>().unwrap(), Device::Cuda(3));
    for device in [Device::Auto, Device::Cpu, Device::Cuda(1)] {
        assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
    }
}

// Levels and plans

#[test]
fn a_level_overrides_the_planner() {
    let context = context();
    let block = block(&context, BLOCK);
    let problem: BlockProblem = BLOCK.parse().unwrap();
    let data = data_for(&problem, 11, Sharpness::Ordinary);
    let chosen = block.plan(&[20], &[0], None, DType::F32).unwrap().level;
    assert!(Level::ALL.contains(&chosen));
    let mut results = Vec::new();
    for level in Level::ALL {
        assert_eq!(block.at(Some(level)).plan(&[20], &[0], None, DType::F32).unwrap().level, level);
        let weights = BlockWeights::from_data(&problem.spec, &data).unwrap();
        let built = AttentionBlock::builder(problem.spec.clone(), weights).level(level).build(&context).unwrap();
        assert_eq!(built.plan(&[20], &[0], None, DType::F32).unwrap().level, level);
        assert_eq!(built.at(None).plan(&[20], &[0], None, DType::F32).unwrap().level, chosen);
        let (mut a, mut b) = (cache(&block, 1, 20), cache(&block, 1, 20));
        results.push(forward(&block.at(Some(level)), &mut a, &[20], &input(1, 20)));
        assert!(&forward(&built, &mut b, &[20], &input(1, 20)) == results.last().unwrap(), "{level}");
        near(results.last().unwrap(), &results[0], level.name());
    }
}

#[test]
fn timed_steps_are_the_plans() {
    let context = context();
    let block = block(&context, BLOCK);
    for level in Level::ALL {
        let (block, mut cache, mut y) = (block.at(Some(level)), cache(&block, 1, 300), vec![0.0f32; 300 * E]);
        let x = input(1, 300);
        let batch = Batch::uniform(1, 300).unwrap();
        let (x, to) = (TensorRef::new(&x, &[300, E]).unwrap(), TensorMut::new(&mut y, &[300, E]).unwrap());
        let (plan, seconds) = block.forward_timed(Args { x, batch: &batch, mask: None, cache: cache.layer(0), y: to }).unwrap();
        assert_eq!((plan.level, seconds.len()), (level, plan.steps().count()));
        assert!(seconds.iter().all(|s| *s > 0.0), "{seconds:?}");
    }
    assert!(context.workspace_bytes() > 0);
}

// Calls of every shape

#[test]
fn forward_alloc_is_forward() {
    let context = context();
    let block = block(&context, BLOCK);
    let x = input(1, 6);
    let (mut a, mut b) = (cache(&block, 2, 3), cache(&block, 2, 3));
    let want = forward(&block, &mut a, &[3, 3], &x);
    let batch = Batch::uniform(2, 3).unwrap();
    for shape in [&[6, E][..], &[2, 3, E]] {
        let y = block.forward_alloc(TensorRef::new(&x, shape).unwrap(), &batch, None, b.layer(0)).unwrap();
        assert_eq!((y.shape(), y.to_f32()), (shape, want.clone()));
    }
}

/// `tokens` tokens in calls of these sizes give what one call gives.
fn in_pieces(line: &str, sizes: &[usize]) {
    let context = context();
    for level in Level::ALL {
        let block = block(&context, line).at(Some(level));
        let tokens = sizes.iter().sum();
        let x = input(5, tokens);
        let (mut whole, mut pieces) = (cache(&block, 1, tokens), cache(&block, 1, tokens));
        let want = step(&block, &mut whole, &[tokens], &x);
        let (mut got, mut done) = (Vec::new(), 0);
        for &n in sizes {
            got.extend(step(&block, &mut pieces, &[n], &x[done * E..(done + n) * E]));
            done += n;
        }
        near(&got, &want, &format!("{level} {sizes:?}: y"));
        let (one, many) = (whole.export(0, 0, tokens).unwrap(), pieces.export(0, 0, tokens).unwrap());
        assert!(many == one, "{level} {sizes:?}: keys and values");
    }
}

#[test]
fn prefill_then_decode_is_one_prefill() {
    in_pieces(BLOCK, &[[60].as_slice(), &[1; 10]].concat());
    in_pieces("block b=1 s=1 e=48 h=4/1 d=33 causal window=20 softcap=5 input_norm=1e-5", &[[60].as_slice(), &[1; 10]].concat());
}

#[test]
fn chunked_prefill_is_one_prefill() {
    in_pieces(BLOCK, &[64, 64, 64, 8]);
    in_pieces(BLOCK, &[1, 63, 2, 300, 17]);
    in_pieces("block b=1 s=1 e=48 h=3/3 d=16 causal window=70 alibi sinks rope=interleaved", &[5, 129, 66, 100]);
}

#[test]
fn ragged_calls_are_separate_calls() {
    let context = context();
    for level in Level::ALL {
        let block = block(&context, BLOCK).at(Some(level));
        let (past, new) = ([7, 0, 70], [1, 20, 3]);
        let mut together = cache(&block, 3, 80);
        let mut results = Vec::new();
        for (b, (&past, &new)) in past.iter().zip(&new).enumerate() {
            let mut alone = cache(&block, 1, 80);
            if past > 0 {
                step(&block, &mut alone, &[past], &input(b as u64, past));
            }
            let (k, v) = alone.export(0, 0, past).unwrap();
            together.import(0, b, past, &k, &v).unwrap();
            let y = step(&block, &mut alone, &[new], &input(100 + b as u64, new));
            results.push((y, alone.export(0, 0, past + new).unwrap()));
        }
        let x: Vec<f32> = new.iter().enumerate().flat_map(|(b, &n)| input(100 + b as u64, n)).collect();
        let y = step(&block, &mut together, &new, &x);
        let want: Vec<f32> = results.iter().flat_map(|(y, _)| y.clone()).collect();
        near(&y, &want, level.name());
        assert_eq!(together.lengths(), [8, 20, 73]);
        for (b, (_, kv)) in results.into_iter().enumerate() {
            assert!(together.export(0, b, past[b] + new[b]).unwrap() == kv, "{level}: sequence {b}");
        }
    }
}

#[test]
fn broadcast_masks_are_full_masks() {
    let context = context();
    let (b, h, s, past, wide) = (2, 4, 5, 3, 11);
    let full_block = block(&context, "block b=1 s=1 e=48 h=4/2 d=16 full");
    let mut rng = Rng::new(9);
    for level in Level::ALL {
        let block = full_block.at(Some(level));
        let run = |mask: Option<(&[u8], [usize; 4])>| {
            let mut cache = cache(&block, b, 16);
            step(&block, &mut cache, &[past; 2], &input(1, b * past));
            let (x, batch) = (input(2, b * s), Batch::uniform(b, s).unwrap());
            let mask = mask.map(|(data, shape)| MaskRef::new(data, shape).unwrap());
            block.forward_alloc(TensorRef::new(&x, &[b * s, E]).unwrap(), &batch, mask, cache.layer(0)).unwrap().to_f32()
        };
        let unmasked = run(None);
        assert!(run(Some((&[1; 40], [1, 1, s, past + s]))) == unmasked, "a mask of ones");
        for [mb, mh] in [[1, 1], [b, 1], [1, h], [b, h]] {
            let part: Vec<u8> = (0..mb * mh * s * wide).map(|_| u8::from(rng.chance(0.5))).collect();
            let mut all = Vec::new();
            for i in 0..b * h {
                let one = (i / h).min(mb - 1) * mh + (i % h).min(mh - 1);
                all.extend_from_slice(&part[one * s * wide..(one + 1) * s * wide]);
            }
            let got = run(Some((&part, [mb, mh, s, wide])));
            assert!(got == run(Some((&all, [b, h, s, wide]))), "{level} [{mb}, {mh}]");
            assert!(got != unmasked);
        }
    }
}

/// Causal attention and windows see what a mask written out key by key shows.
#[test]
fn causal_and_window_are_explicit_masks() {
    let context = context();
    let full = block(&context, "block b=1 s=1 e=48 h=4/2 d=16 full");
    let causal = block(&context, "block b=1 s=1 e=48 h=4/2 d=16 causal");
    let window = block(&context, "block b=1 s=1 e=48 h=4/2 d=16 causal window=7");
    for (past, new) in [(0, 100), (90, 70), (30, 1), (1000, 1), (1000, 2)] {
        for (narrow, width) in [(&causal, usize::MAX), (&window, 7)] {
            let mut mask = Vec::new();
            for i in past..past + new {
                mask.extend((0..past + new).map(|j| u8::from(j <= i && i - j < width)));
            }
            for level in Level::ALL {
                let run = |block: &AttentionBlock, mask: Option<MaskRef<'_>>| {
                    let mut cache = cache(block, 1, past + new);
                    let mut rng = Rng::new(4);
                    let mut kv = || rng.normals(2 * past * 16, 1.0);
                    cache.import(0, 0, past, &kv(), &kv()).unwrap();
                    let (x, batch) = (input(7, new), Batch::uniform(1, new).unwrap());
                    let x = TensorRef::new(&x, &[new, E]).unwrap();
                    block.at(Some(level)).forward_alloc(x, &batch, mask, cache.layer(0)).unwrap().to_f32()
                };
                let explicit = run(&full, Some(MaskRef::new(&mask, [1, 1, new, past + new]).unwrap()));
                near(&run(narrow, None), &explicit, &format!("{level}: {new} tokens after {past}, {width} keys"));
            }
        }
    }
}

#[test]
fn threads_share_a_block_with_a_cache_each() {
    let context = context();
    let block = block(&context, BLOCK);
    let generate = |seed: u64| {
        let mut cache = cache(&block, 1, 40);
        let mut all = step(&block, &mut cache, &[20], &input(seed, 20));
        (0..20).for_each(|i| all.extend(step(&block, &mut cache, &[1], &input(1000 * seed + i, 1))));
        all
    };
    let want = [generate(1), generate(2), generate(3)];
    let got = std::thread::scope(|scope| [1, 2, 3].map(|seed| scope.spawn(move || generate(seed))).map(|t| t.join().unwrap()));
    assert!(got == want, "a thread disturbs another");
    fn shareable<T: Send + Sync + Clone>(_: &T) {}
    shareable(&block);
    shareable(&context);
}

/// NaN and ∞ in x reach their own row, at every level, and nothing of them is left for the next call.
#[test]
fn values_that_are_not_finite_are_computed() {
    let context = context();
    for level in Level::ALL {
        let block = block(&context, BLOCK).at(Some(level));
        let good = input(1, 300);
        let want = forward(&block, &mut cache(&block, 1, 300), &[300], &good);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = good.clone();
            x[30 * E + 5] = bad;
            let y = forward(&block, &mut cache(&block, 1, 300), &[300], &x);
            assert!(y[30 * E..31 * E].iter().all(|v| v.is_nan()), "{level}: {bad} at token 30");
            let again = forward(&block, &mut cache(&block, 1, 300), &[300], &good);
            assert!(again == want, "{level}: {bad} is left in the workspace");
        }
    }
}
