//! A warm `forward` allocates nothing, on any thread. One test alone, so that no other test's allocations are counted.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use lawson::{Args, AttentionBlock, Batch, BlockProblem, BlockWeights, Context, ContextOptions, KvCache, Level, Tensor};
use lawson_testkit::inputs::{Sharpness, data_for};

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

fn count() {
    if COUNTING.load(Ordering::Relaxed) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.realloc(p, layout, size) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of every thread while `f` runs.
fn allocations(f: impl FnOnce()) -> usize {
    ALLOCATIONS.store(0, Ordering::SeqCst);
    COUNTING.store(true, Ordering::SeqCst);
    f();
    COUNTING.store(false, Ordering::SeqCst);
    ALLOCATIONS.load(Ordering::SeqCst)
}

#[test]
fn a_warm_forward_allocates_nothing() {
    assert!(allocations(|| drop(std::hint::black_box(vec![0u8; 100]))) > 0, "the counter does not count");
    let context = Context::new(ContextOptions { threads: Some(2), ..Default::default() }).unwrap();
    for line in [
        "block b=2 s=1 e=64 h=4/2 d=32 causal rope=half f32",
        "block b=2 s=1 e=64 h=4/2 d=32 causal window=64 rope=interleaved input_norm=1e-6 qk_norm=1e-6 bias=qkvo residual sinks bf16",
        "block b=2 s=1 e=64 h=4/2 d=32 causal rope=half f32 kv=int8",
        "block b=2 s=1 e=64 h=4/2 d=33 full bf16 kv=int4",
    ] {
        let problem: BlockProblem = line.parse().unwrap();
        let data = data_for(&problem, 1, Sharpness::Ordinary);
        let weights = BlockWeights::from_data(&problem.spec, &data).unwrap();
        let built = AttentionBlock::builder(problem.spec.clone(), weights).dtype(problem.dtype).build(&context).unwrap();
        for level in Level::ALL.map(Some).into_iter().chain([None]) {
            let block = built.at(level);
            let mut cache = KvCache::new(&context, &block.spec().attention, 1, 2, 550, problem.kv_dtype).unwrap();
            let call = |cache: &mut KvCache, batch: &Batch, x: &Tensor, y: &mut Tensor| {
                allocations(|| {
                    block.forward(Args { x: x.as_ref(), batch, mask: None, cache: cache.layer(0), y: y.as_mut() }).unwrap();
                    cache.commit(batch).unwrap();
                })
            };
            let tensor = |tokens: usize| Tensor::from_f32(&vec![0.5; tokens * 64], problem.dtype, &[tokens, 64]).unwrap();

            let (batch, x, mut y) = (Batch::uniform(2, 480).unwrap(), tensor(960), tensor(960));
            call(&mut cache, &batch, &x, &mut y);
            cache.reset();
            assert_eq!(call(&mut cache, &batch, &x, &mut y), 0, "{line} {level:?}: prefill");

            // A plan serves past lengths up to a multiple of 256.
            let (batch, x, mut y) = (Batch::ragged(vec![1, 1]).unwrap(), tensor(2), tensor(2));
            while cache.lengths()[0] < 550 {
                let past = cache.lengths()[0];
                let n = call(&mut cache, &batch, &x, &mut y);
                let new_plan = past == 480 || past % 256 == 1;
                assert!(n == 0 || new_plan, "{line} {level:?}: {n} allocations in a decode step after {past} rows");
            }
        }
    }
}
