//! One layer of a checkpoint folder: a prefill, then ten decode steps.
//!
//! ```sh
//! cargo run --release -p lawson --example checkpoint                     # the small model that the tests use
//! cargo run --release -p lawson --example checkpoint -- path/to/model    # any Llama, Mistral, Qwen2 or Qwen3 checkpoint
//! ```

use std::{path::PathBuf, time::Instant};

use lawson::{AttentionBlock, Batch, Checkpoint, Context, KvCache, Result, Tensor};

fn main() -> Result<()> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-rust-llama");
    let path = std::env::args().nth(1).map_or_else(|| PathBuf::from(default), PathBuf::from);

    // Weights are mapped, not read; building the block packs one layer's. `true` takes the input norm and the residual along.
    let context = Context::cpu()?;
    let checkpoint = Checkpoint::open(&path)?;
    let layer = checkpoint.layers() / 2;
    let block = AttentionBlock::from_checkpoint(&context, &checkpoint, layer, true)?;
    let (spec, dtype) = (block.spec(), block.dtype());
    let (e, a) = (spec.hidden_size, &spec.attention);
    println!("layer {layer} of {}: E {e}, {} heads over {} of {}, {dtype}", checkpoint.layers(), a.heads, a.kv_heads, a.head_dim);

    // A cache for this one layer and one sequence of up to 64 rows; a whole model would have one cache with all its layers.
    let mut cache = KvCache::new(&context, a, 1, 1, 64, dtype)?;

    // The prefill: 40 tokens at once. In a model, x is the output of the layer before; here it is a smooth made-up signal.
    let signal = |token: usize| (0..e).map(move |i| ((token * e + i) as f32 * 0.37).sin());
    let prompt: Vec<f32> = (0..40).flat_map(signal).collect();
    let x = Tensor::from_f32(&prompt, dtype, &[40, e])?;
    let batch = Batch::uniform(1, 40)?;
    let start = Instant::now();
    let y = block.forward_alloc(x.as_ref(), &batch, None, cache.layer(0))?;
    // A call writes its keys and values behind the valid rows; the commit makes them valid.
    cache.commit(&batch)?;
    println!("prefill of 40 tokens: {:.2} ms", start.elapsed().as_secs_f64() * 1e3);

    // Decode: one token at a time, each the last one's output.
    let mut last = y.to_f32()[39 * e..].to_vec();
    let batch = Batch::uniform(1, 1)?;
    for _ in 0..10 {
        let x = Tensor::from_f32(&last, dtype, &[1, e])?;
        let start = Instant::now();
        let y = block.forward_alloc(x.as_ref(), &batch, None, cache.layer(0))?;
        let seconds = start.elapsed().as_secs_f64();
        cache.commit(&batch)?;
        last = y.to_f32();
        let norm = last.iter().map(|v| v * v).sum::<f32>().sqrt();
        println!("decode: {} rows in the cache, |y| = {norm:.3}, {:.3} ms", cache.lengths()[0], seconds * 1e3);
    }
    Ok(())
}
