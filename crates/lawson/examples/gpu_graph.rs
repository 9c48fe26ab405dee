//! Decode steps on a GPU: a prefill with host tensors, then one captured call that is replayed for each new token.
//!
//! ```sh
//! cargo run --release -p lawson --example gpu_graph
//! ```
//!
//! Without a GPU that can be used it says why and ends.

use lawson::{
    AttentionBlock, AttentionSpec, Batch, BlockSpec, BlockWeights, Context, ContextOptions, DType, Device, DeviceTensor,
    ErrorKind, KvCache, Result, RopeSpec, Tensor, TensorRef,
};

/// `n` numbers between −scale and scale.
fn wave(n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.37).sin() * scale).collect()
}

fn main() -> Result<()> {
    let context = match Context::new(ContextOptions { device: Device::Cuda(0), ..Default::default() }) {
        Ok(context) => context,
        Err(e) if e.kind() == ErrorKind::Unavailable => {
            println!("this example needs a GPU: {e}");
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    println!("{context:?}");

    // E = 1024, sixteen query heads over four key/value heads of 64 dimensions, causal, with RoPE, in bf16.
    let (e, h, g, d) = (1024, 16, 4, 64);
    let spec = BlockSpec { rope: Some(RopeSpec::new(10000.0)), ..BlockSpec::new(e, AttentionSpec::new(h, g, d)) };
    let scale = 1.0 / (e as f32).sqrt();
    let (q, k, v, o) = (wave(h * d * e, scale), wave(g * d * e, scale), wave(g * d * e, scale), wave(e * h * d, scale));
    let weights = BlockWeights::new(
        TensorRef::new(&q, &[h * d, e])?,
        TensorRef::new(&k, &[g * d, e])?,
        TensorRef::new(&v, &[g * d, e])?,
        TensorRef::new(&o, &[e, h * d])?,
    );
    let block = AttentionBlock::builder(spec, weights).dtype(DType::BF16).build(&context)?;

    // The prompt: host tensors are copied to the device and back, which waits.
    let (prompt, capacity) = (100, 256);
    let mut cache = KvCache::new(&context, &block.spec().attention, 1, 1, capacity, DType::BF16)?;
    let batch = Batch::uniform(1, prompt)?;
    let x = Tensor::from_f32(&wave(prompt * e, 1.0), DType::BF16, &[prompt, e])?;
    let y = block.forward_alloc(x.as_ref(), &batch, None, cache.layer(0))?;
    cache.commit(&batch)?;

    // One new token, captured once. The graph serves every length up to the cache's capacity.
    let mut token = Tensor::from_f32(&y.to_f32()[(prompt - 1) * e..], DType::BF16, &[1, e])?;
    let x = DeviceTensor::upload(&context, &token.as_ref())?;
    let y = DeviceTensor::nans(&context, DType::BF16, &[1, e])?;
    let mut call = block.capture(x, Batch::uniform(1, 1)?, cache, 0, y)?;
    for _ in 0..10 {
        call.write_x(&token.as_ref())?;
        call.replay()?;
        call.commit()?;
        // Reading y waits for the device. A model would feed it to the next layer there instead.
        let y = call.y().to_f32()?;
        let norm = y.iter().map(|v| v * v).sum::<f32>().sqrt();
        println!("{} rows in the cache, |y| = {norm:.4}", call.cache().lengths()[0]);
        token = Tensor::from_f32(&y, DType::BF16, &[1, e])?;
    }
    println!("a replay takes {:.1} µs", call.replay_timed(100)? * 1e6);
    Ok(())
}
