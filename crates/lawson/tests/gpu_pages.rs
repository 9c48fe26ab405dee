//! Paged caches on a GPU. Run by hand where there is one: `cargo test --release -p lawson --test gpu_pages -- --ignored --test-threads 1`.

use std::time::Instant;

use lawson::{
    Args, AttentionBlock, Batch, BlockProblem, BlockWeights, Context, ContextOptions, DType, Device, DeviceTensor, ErrorKind,
    KvCache, Level, PagePool, RopeSpec, Tensor, compute,
    ops::{self, RopeAppendArgs},
};
use lawson_testkit::{
    cases,
    conformance::check_blocks,
    inputs::{Sharpness, data_for},
    rng::Rng,
};

/// Layers of the caches; calls work on the last.
const LAYERS: usize = 2;

fn gpu() -> Context {
    Context::new(ContextOptions { device: Device::Cuda(0), ..Default::default() }).expect("a GPU")
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

/// A pool full of NaN, whose pages come in a random order.
fn shuffled(context: &Context, problem: &BlockProblem, pages: usize, page_size: usize, seed: u64) -> PagePool {
    let a = &problem.spec.attention;
    let pool = PagePool::new(context, a, LAYERS, pages, page_size, problem.kv_dtype).expect("a pool");
    let mut each = KvCache::paged(&pool, pages, page_size).expect("a sequence for each page");
    let nan = vec![f32::NAN; a.kv_dim() * page_size];
    for b in 0..pages {
        (0..LAYERS).for_each(|layer| each.import(layer, b, page_size, &nan, &nan).expect("a page"));
    }
    assert_eq!(pool.free_pages(), 0);
    let (mut left, mut rng): (Vec<usize>, _) = ((0..pages).collect(), Rng::new(seed));
    while !left.is_empty() {
        let b = left.swap_remove(rng.below(left.len()));
        each.truncate(b, 0).expect("shorter");
    }
    assert_eq!(pool.free_pages(), pages);
    pool
}

/// x of a call.
fn input(problem: &BlockProblem, seed: u64, tokens: usize) -> Tensor {
    let e = problem.spec.hidden_size;
    Tensor::from_f32(&Rng::new(seed).normals(tokens * e, 1.0), problem.dtype, &[tokens, e]).expect("x")
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// y and every valid row after a call over `cache`, as bits.
fn step(block: &AttentionBlock, problem: &BlockProblem, cache: &mut KvCache, new: &[usize], seed: u64) -> Vec<u32> {
    let batch = Batch::ragged(new.to_vec()).expect("a batch");
    let x = input(problem, seed, batch.tokens());
    let y = block.forward_alloc(x.as_ref(), &batch, None, cache.layer(LAYERS - 1)).expect("a call");
    cache.commit(&batch).expect("room");
    let mut all = bits(&y.to_f32());
    for (b, &rows) in cache.lengths().to_vec().iter().enumerate() {
        let (k, v) = cache.export(LAYERS - 1, b, rows).expect("rows");
        assert!(k.iter().chain(&v).all(|v| v.is_finite()), "sequence {b} of {problem}");
        all.extend(bits(&k).into_iter().chain(bits(&v)));
    }
    all
}

#[test]
#[ignore = "needs a GPU"]
fn blocks_over_pages_are_right() {
    let context = gpu();
    let run = |p: &BlockProblem, level, data: &lawson::BlockData| compute(&context, p, Some(level), data);
    let lines = [
        "block b=2 s=300 past=0 e=512 h=8/2 d=64 causal rope=half bf16 page=64",
        "block b=1 s=77 past=200 e=512 h=4/4 d=128 causal window=90 qk_norm=0.000001 input_norm=0.00001 residual rope=half bf16 page=32",
        "block b=4 s=1 past=3000 e=512 h=8/2 d=64 causal rope=half input_norm=0.00001 residual f16 page=128",
        "block b=1 s=1 past=5000 e=512 h=8/8 d=128 causal softcap=20 sinks rope=half bf16 page=32",
        "block s=5,90,1 past=100,0,700 e=256 h=4/2 d=80 causal alibi bias=qkvo f16 page=64",
        "block b=2 s=130 past=0 e=256 h=4/1 d=64 full rope=interleaved f32 page=128",
        "block b=3 s=1 past=900 e=256 h=4/2 d=33 causal rope=half,dim=32 f32 page=32",
        "block b=2 s=40 past=70 e=256 h=2/2 d=320 causal rope=half bf16 page=32",
    ];
    let problems: Vec<_> = lines.iter().map(|l| problem(l)).chain(cases::paged_cases(2027, 90)).collect();
    let report = check_blocks(&run, &problems, 1, &mut |_, _| {});
    println!("{report}");
    assert!(report.passed() && report.could_not_run.is_empty(), "{report}");
}

#[test]
#[ignore = "needs a GPU"]
fn pages_change_no_bit() {
    let context = gpu();
    // Prefill, chunks and decode of three sequences, that cross pages at different times; the first call is uneven, so that a contiguous
    // cache is gathered too where products read it.
    let calls: [&[usize]; 9] =
        [&[70, 33, 5], &[40, 1, 130], &[1, 1, 1], &[1, 1, 1], &[1, 1, 1], &[3, 2, 4], &[8, 1, 2], &[17, 90, 64], &[1, 1, 1]];
    let most = 32 + (0..3).map(|b| calls.iter().map(|new| new[b]).sum::<usize>()).max().expect("three sequences");
    for line in [
        "block b=3 s=1 e=256 h=4/2 d=64 causal rope=half bf16",
        "block b=3 s=1 e=256 h=8/2 d=128 causal window=50 qk_norm=1e-6 input_norm=1e-5 residual rope=half bf16",
        "block b=3 s=1 e=256 h=4/4 d=80 causal softcap=20 sinks rope=interleaved f16",
        "block b=3 s=1 e=256 h=4/1 d=64 full alibi bias=qkvo f16",
        "block b=3 s=1 e=256 h=4/2 d=64 causal rope=half f32",
        "block b=3 s=1 e=256 h=4/2 d=33 causal rope=half,dim=32 f32",
        "block b=3 s=1 e=256 h=4/2 d=64 causal rope=half bf16 kv=f32",
    ] {
        let problem = problem(line);
        let built = block(&context, &problem);
        for level in Level::ALL {
            let block = built.at(Some(level));
            let a = &problem.spec.attention;
            let mut contiguous = KvCache::new(&context, a, LAYERS, 3, most, problem.kv_dtype).expect("a cache");
            let want: Vec<_> = (0..).zip(calls).map(|(i, new)| step(&block, &problem, &mut contiguous, new, 100 + i)).collect();
            for page_size in [32, 64, 128] {
                let pool = shuffled(&context, &problem, 3 * most.div_ceil(page_size) + 5, page_size, 5);
                let mut paged = KvCache::paged(&pool, 3, most).expect("a cache");
                for ((i, new), want) in (0..).zip(calls).zip(&want) {
                    let got = step(&block, &problem, &mut paged, new, 100 + i);
                    assert!(got == *want, "{line} page={page_size} {level}: call {i}, {new:?} new tokens");
                    let pages: usize = paged.lengths().iter().map(|len| len.div_ceil(page_size)).sum();
                    assert_eq!(pool.pages() - pool.free_pages(), pages, "no page more than the rows need");
                    assert_eq!(paged.bytes() / (pool.bytes() / pool.pages()), pages);
                }
                drop(paged);
                assert_eq!(pool.free_pages(), pool.pages());
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn one_graph_serves_sequences_that_cross_pages() {
    let context = gpu();
    for (line, page_size) in [
        ("block b=2 s=1 e=256 h=8/2 d=64 causal rope=half bf16", 32),
        ("block b=2 s=3 e=256 h=8/2 d=64 causal rope=half input_norm=1e-5 residual f16", 64),
        ("block b=2 s=1 e=256 h=4/2 d=64 causal rope=half f32", 32),
    ] {
        let problem = problem(line);
        let (new, e, capacity) = (problem.batch.max_new(), problem.spec.hidden_size, 400);
        let batch = Batch::uniform(2, new).expect("a batch");
        for level in [Level::Maximal, Level::Moderate, Level::Unfused] {
            let block = block(&context, &problem).at(Some(level));
            let x = |t: usize| input(&problem, 1000 + t as u64, 2 * new);
            let device = |t: &Tensor| DeviceTensor::upload(&context, &t.as_ref()).expect("on the GPU");
            let capture =
                |cache: KvCache| block.capture(device(&x(0)), batch.clone(), cache, LAYERS - 1, device(&x(0))).expect("a graph");
            let a = &problem.spec.attention;
            let mut contiguous = capture(KvCache::new(&context, a, LAYERS, 2, capacity, problem.kv_dtype).expect("a cache"));
            let pool = shuffled(&context, &problem, 2 * capacity.div_ceil(page_size) + 4, page_size, 9);
            let mut paged = capture(KvCache::paged(&pool, 2, capacity).expect("a cache"));
            // Takes the pages that the sequences give back, so that they grow into others.
            let mut other = KvCache::paged(&pool, 1, 10_000).expect("a cache");
            let mut before = Vec::new();
            for t in 0..capacity / new {
                if t == 120 / new {
                    for captured in [&mut contiguous, &mut paged] {
                        captured.truncate(0, 10).expect("shorter");
                    }
                    let rows = (pool.free_pages() * page_size).min(4 * page_size);
                    let zeros = vec![0.0; a.kv_dim() * rows];
                    other.import(0, 0, rows, &zeros, &zeros).expect("free pages");
                }
                for captured in [&mut contiguous, &mut paged] {
                    captured.write_x(&x(t).as_ref()).expect("x of the same shape");
                    captured.poison_y().expect("NaN");
                    captured.replay().expect("a replay");
                    captured.commit().expect("room");
                }
                let (want, got) = (contiguous.y().to_f32().expect("y"), paged.y().to_f32().expect("y"));
                assert_eq!(got.len(), 2 * new * e);
                assert!(got.iter().all(|v| v.is_finite()) && got != before, "{line} {level} step {t}: the input counts");
                assert!(bits(&got) == bits(&want), "{line} page={page_size} {level} step {t}");
                before = got;
            }
            assert_eq!(paged.replay().unwrap_err().kind(), ErrorKind::InvalidInput, "the second sequence is full");
            let cache = paged.into_cache();
            for b in 0..2 {
                let rows = cache.lengths()[b];
                let (want, got) = (contiguous.cache().export(LAYERS - 1, b, rows), cache.export(LAYERS - 1, b, rows));
                assert!(want.expect("rows") == got.expect("rows"), "{line} {level}: the cache of sequence {b}");
            }
            drop((cache, other));
            assert_eq!(pool.free_pages(), pool.pages());
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn caches_share_a_pool_and_a_call_that_fails_changes_nothing() {
    let context = gpu();
    let problem = problem("block b=1 s=1 e=256 h=4/2 d=64 causal rope=half bf16");
    let (a, e) = (&problem.spec.attention, problem.spec.hidden_size);
    let block = block(&context, &problem);
    let pool = PagePool::new(&context, a, LAYERS, 6, 32, DType::BF16).expect("a pool");
    assert_eq!((pool.pages(), pool.free_pages(), pool.page_size(), pool.layers()), (6, 6, 32, LAYERS));
    let mut first = KvCache::paged(&pool, 1, 1000).expect("a cache");
    let mut second = KvCache::paged(&pool, 2, 1000).expect("a cache");
    step(&block, &problem, &mut first, &[60], 1);
    step(&block, &problem, &mut second, &[32, 33], 2);
    assert_eq!(pool.free_pages(), 1);

    // Both of the second cache's sequences need a page.
    let batch = Batch::ragged(vec![1, 32]).expect("a batch");
    let x = input(&problem, 3, 33);
    let mut y = Tensor::from_f32(&vec![7.0; 33 * e], DType::BF16, &[33, e]).expect("y");
    let args = Args { x: x.as_ref(), batch: &batch, mask: None, cache: second.layer(0), y: y.as_mut() };
    let error = block.forward(args).unwrap_err();
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(error.to_string().contains("2 more pages of 32 rows, and 1 of the pool's 6"), "{error}");
    assert!(second.check(&batch).is_err() && second.commit(&batch).is_err());
    assert_eq!((pool.free_pages(), second.lengths()), (1, &[32, 33][..]));
    assert!(y.to_f32().iter().all(|&v| v == 7.0));

    // A call that is refused behind the reservation gives its pages back.
    let elsewhere = gpu();
    let mut foreign = DeviceTensor::upload(&elsewhere, &y.as_ref()).expect("y of another context");
    let wide = Batch::ragged(vec![33]).expect("a batch");
    let args = Args { x: x.as_ref(), batch: &wide, mask: None, cache: first.layer(0), y: foreign.as_mut() };
    assert_eq!(block.forward(args).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!((pool.free_pages(), first.lengths()), (1, &[60][..]));
    // As does one of another context's block.
    let other = self::block(&elsewhere, &problem);
    assert_eq!(other.forward_alloc(x.as_ref(), &wide, None, first.layer(0)).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(pool.free_pages(), 1);

    // Pages that one cache gives back serve the other.
    let kept = first.export(LAYERS - 1, 0, 32).expect("rows");
    first.truncate(0, 32).expect("shorter");
    assert_eq!(pool.free_pages(), 2);
    step(&block, &problem, &mut second, &[1, 32], 3);
    assert_eq!((pool.free_pages(), second.lengths()), (0, &[33, 65][..]));
    assert!(first.export(LAYERS - 1, 0, 32).expect("rows") == kept, "what is left of the first is untouched");
    assert_eq!(first.export(LAYERS - 1, 0, 33).unwrap_err().kind(), ErrorKind::InvalidInput);
    second.reset();
    assert_eq!((pool.free_pages(), second.lengths()), (5, &[0, 0][..]));

    // What was exported continues elsewhere.
    let mut copy = KvCache::paged(&pool, 1, 1000).expect("a cache");
    copy.import(LAYERS - 1, 0, 32, &kept.0, &kept.1).expect("a page");
    assert!(step(&block, &problem, &mut first, &[40], 4) == step(&block, &problem, &mut copy, &[40], 4));
    drop((first, second, copy));
    assert_eq!(pool.free_pages(), 6);
}

#[test]
#[ignore = "needs a GPU"]
fn rope_with_the_append_writes_pages_as_it_does_contiguous_rows() {
    let context = gpu();
    for (dtype, page_size) in [(DType::BF16, 32), (DType::F16, 64), (DType::F32, 128)] {
        let problem = problem(&format!("block b=3 s=1 e=256 h=8/2 d=64 causal {dtype}"));
        let a = &problem.spec.attention;
        let pool = shuffled(&context, &problem, 3 * 300usize.div_ceil(page_size), page_size, 6);
        let mut pages = KvCache::paged(&pool, 3, 300).expect("a cache");
        let mut rows = KvCache::new(&context, a, LAYERS, 3, 300, dtype).expect("a cache");
        let spec = RopeSpec::new(10000.0);
        // Rows within a page, over several and over the end of one.
        for (t, new) in (0..).zip([vec![5, 130, 33], vec![1, 1, 1], vec![90, 31, 64], vec![1, 1, 1]]) {
            let batch = Batch::ragged(new).expect("a batch");
            let width = a.qkv_dim();
            let values = Rng::new(30 + t).normals(batch.tokens() * width, 1.0);
            let qkv = Tensor::from_f32(&values, dtype, &[batch.tokens(), width]).expect("qkv");
            let qkv = DeviceTensor::upload(&context, &qkv.as_ref()).expect("on the GPU");
            let qs = [&mut rows, &mut pages].map(|cache| {
                let mut q = DeviceTensor::nans(&context, dtype, &[batch.tokens(), a.heads, a.head_dim]).expect("q");
                let cache_rows = cache.layer(LAYERS - 1);
                let (qkv, to) = (qkv.as_ref(), q.as_mut());
                let args = RopeAppendArgs { qkv, batch: &batch, spec: &spec, q: to, cache: cache_rows };
                ops::rope_append(&context, args).expect("a call");
                cache.commit(&batch).expect("room");
                q.to_f32().expect("q")
            });
            assert!(qs[0].iter().all(|v| v.is_finite()) && bits(&qs[0]) == bits(&qs[1]), "{dtype}, call {t}: q");
            assert_eq!(pages.lengths(), rows.lengths());
            let taken: usize = pages.lengths().iter().map(|len| len.div_ceil(page_size)).sum();
            assert_eq!(pool.free_pages(), pool.pages() - taken, "{dtype}, call {t}");
            for (b, &len) in rows.lengths().iter().enumerate() {
                let [want, got] = [&rows, &pages].map(|cache| cache.export(LAYERS - 1, b, len).expect("rows"));
                assert!(want.0.iter().chain(&want.1).all(|v| v.is_finite()), "{dtype}, call {t}: every row is written");
                assert!(bits(&want.0) == bits(&got.0) && bits(&want.1) == bits(&got.1), "{dtype}, call {t}, sequence {b}");
            }
        }
    }
    // Where the pool has too few pages nothing is taken.
    let problem = problem("block b=1 s=1 e=256 h=8/2 d=64 causal bf16");
    let a = &problem.spec.attention;
    let pool = PagePool::new(&context, a, 1, 1, 32, DType::BF16).expect("a pool");
    let mut cache = KvCache::paged(&pool, 1, 64).expect("a cache");
    let batch = Batch::uniform(1, 33).expect("a batch");
    let qkv = DeviceTensor::nans(&context, DType::BF16, &[33, a.qkv_dim()]).expect("qkv");
    let mut q = DeviceTensor::nans(&context, DType::BF16, &[33, a.heads, a.head_dim]).expect("q");
    let spec = RopeSpec::new(10000.0);
    let args = RopeAppendArgs { qkv: qkv.as_ref(), batch: &batch, spec: &spec, q: q.as_mut(), cache: cache.layer(0) };
    assert_eq!(ops::rope_append(&context, args).unwrap_err().kind(), ErrorKind::OutOfMemory);
    assert_eq!(pool.free_pages(), 1);
}

#[test]
#[ignore = "needs a GPU"]
fn impossible_pools_and_caches_are_refused() {
    let context = gpu();
    let spec = problem("block b=1 s=1 e=256 h=4/2 d=64 f32").spec.attention;
    let make = |layers, pages, page_size| PagePool::new(&context, &spec, layers, pages, page_size, DType::F32);
    for (pool, part) in [
        (make(0, 1, 32), "at least 1 of layers"),
        (make(1, 0, 32), "at least 1 of pages"),
        (make(1, 1, 48), "32, 64, 128"),
        (make(1, usize::MAX, 32), "too large"),
        (make(usize::MAX, 2, 32), "too large"),
    ] {
        let error = pool.err().expect("refused");
        assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains(part), "{error}");
    }
    assert_eq!(make(1000, 1 << 30, 128).err().expect("no GPU holds it").kind(), ErrorKind::OutOfMemory);
    let pool = make(1, 4, 32).expect("a pool");
    for (sequences, capacity) in [(0, 1), (1, 0), (usize::MAX, 64), (2, usize::MAX)] {
        assert_eq!(KvCache::paged(&pool, sequences, capacity).err().expect("refused").kind(), ErrorKind::InvalidInput);
    }
    let mut cache = KvCache::paged(&pool, 1, 40).expect("a cache");
    let batch = Batch::uniform(1, 41).expect("a batch");
    assert_eq!(cache.commit(&batch).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
#[ignore = "needs a GPU"]
fn a_warm_call_over_pages_allocates_nothing_and_costs_little() {
    let context = gpu();
    let problem = problem("block b=8 s=1 e=4096 h=32/8 d=128 causal rope=half input_norm=1e-5 residual bf16");
    let block = block(&context, &problem).at(Some(Level::Maximal));
    let pool = shuffled(&context, &problem, 8 * 20, 32, 3);
    let mut cache = KvCache::paged(&pool, 8, 100_000).expect("a cache");
    let batch = Batch::uniform(8, 1).expect("a batch");
    let x = DeviceTensor::upload(&context, &input(&problem, 1, 8).as_ref()).expect("x");
    let mut y = DeviceTensor::upload(&context, &input(&problem, 1, 8).as_ref()).expect("y");
    let mut forward = |cache: &mut KvCache| {
        let args = Args { x: x.as_ref(), batch: &batch, mask: None, cache: cache.layer(0), y: y.as_mut() };
        block.forward(args).expect("a call");
        cache.commit(&batch).expect("room");
    };
    // The first call behind no rows has a plan of its own.
    (0..2).for_each(|_| forward(&mut cache));
    let device = context.gpu().expect("a GPU").device();
    device.synchronize().expect("done");
    device.reset_peak();
    let before = device.usage();
    let (mut same, mut new) = (Vec::new(), Vec::new());
    // One plan serves up to 256 rows.
    while cache.lengths()[0] < 256 {
        let free = pool.free_pages();
        let start = Instant::now();
        forward(&mut cache);
        let seconds = start.elapsed().as_secs_f64();
        device.synchronize().expect("done");
        if pool.free_pages() == free { &mut same } else { &mut new }.push(seconds);
    }
    assert_eq!(before, device.usage(), "a warm call takes no device memory");
    for (what, mut times) in [("within a page", same), ("with a new page for each sequence", new)] {
        times.sort_by(f64::total_cmp);
        println!("host cost of a call {what}: median {:.1} µs of {}", times[times.len() / 2] * 1e6, times.len());
    }
}
