//! One attention block with random weights, computed at all four levels of fusion.
//!
//! ```sh
//! cargo run --release -p lawson --example random_block
//! ```

use std::time::Instant;

use lawson::{
    Args, AttentionBlock, AttentionSpec, Batch, BlockSpec, BlockWeights, Context, DType, KvCache, Level, Result, RopeSpec,
    TensorMut, TensorRef,
};

/// `n` numbers between −scale and scale, by a small generator so that the example needs no other crate.
fn random(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    };
    (0..n).map(|_| next()).collect()
}

fn main() -> Result<()> {
    // E = 512, eight query heads over two key/value heads of 64 dimensions, causal (the default), with RoPE.
    let (e, h, g, d) = (512, 8, 2, 64);
    let spec = BlockSpec { rope: Some(RopeSpec::new(10000.0)), ..BlockSpec::new(e, AttentionSpec::new(h, g, d)) };
    let scale = 1.0 / (e as f32).sqrt();
    let (q, k, v, o) =
        (random(1, h * d * e, scale), random(2, g * d * e, scale), random(3, g * d * e, scale), random(4, e * h * d, scale));
    let weights = BlockWeights::new(
        TensorRef::new(&q, &[h * d, e])?,
        TensorRef::new(&k, &[g * d, e])?,
        TensorRef::new(&v, &[g * d, e])?,
        TensorRef::new(&o, &[e, h * d])?,
    );

    // A context is the device; building the block packs the weights for it, once.
    let context = Context::cpu()?;
    let block = AttentionBlock::builder(spec, weights).build(&context)?;
    println!("{context:?}, {} KiB of packed weights", block.weight_bytes() / 1024);

    // One sequence of 1024 new tokens, nothing before them.
    let s = 1024;
    let batch = Batch::uniform(1, s)?;
    let x = random(5, s * e, 1.0);
    let mut first: Option<Vec<f32>> = None;
    for level in Level::ALL {
        let block = block.at(Some(level));
        let plan = block.plan(batch.new_tokens(), &[0], None, DType::F32)?;
        let mut cache = KvCache::new(&context, &block.spec().attention, 1, 1, s, DType::F32)?;
        let mut y = vec![0.0; s * e];
        let mut best = f64::INFINITY;
        // The first call warms the workspace up. Nothing is committed, so that each call writes the same rows of the cache.
        for _ in 0..5 {
            let start = Instant::now();
            block.forward(Args {
                x: TensorRef::new(&x, &[s, e])?,
                batch: &batch,
                mask: None,
                cache: cache.layer(0),
                y: TensorMut::new(&mut y, &[s, e])?,
            })?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        // All levels compute the same function, up to rounding.
        let reference = first.get_or_insert_with(|| y.clone());
        let difference = y.iter().zip(reference.iter()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!(
            "{:<9} {:7.2} ms, {:2} launches, {:6.1} MiB of workspace, differs from unfused by at most {difference:.1e}",
            level.name(),
            best * 1e3,
            plan.launches(),
            plan.workspace_bytes as f64 / (1 << 20) as f64,
        );
    }
    Ok(())
}
