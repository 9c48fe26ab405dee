//! Two threads share one block, each with a cache of its own.
//!
//! ```sh
//! cargo run --release -p lawson --example threads
//! ```

use lawson::{
    AttentionBlock, AttentionSpec, Batch, BlockSpec, BlockWeights, Context, DType, KvCache, Result, RopeSpec, Tensor, TensorRef,
};

/// Decodes `steps` tokens that depend on `user`; gives the norm of each y.
fn decode(block: &AttentionBlock, user: usize, steps: usize) -> Result<Vec<f32>> {
    let e = block.spec().hidden_size;
    let mut cache = KvCache::new(block.context(), &block.spec().attention, 1, 1, steps, DType::F32)?;
    let batch = Batch::uniform(1, 1)?;
    let mut norms = Vec::new();
    for token in 0..steps {
        let values: Vec<f32> = (0..e).map(|i| ((i + 7 * token + 100 * user) as f32 * 0.1).sin()).collect();
        let x = Tensor::from_f32(&values, DType::F32, &[1, e])?;
        let y = block.forward_alloc(x.as_ref(), &batch, None, cache.layer(0))?;
        cache.commit(&batch)?;
        norms.push(y.to_f32().iter().map(|v| v * v).sum::<f32>().sqrt());
    }
    Ok(norms)
}

fn main() -> Result<()> {
    let (e, h, g, d) = (256, 4, 2, 64);
    let weight = |n: usize, step: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * step).sin() / 16.0).collect() };
    let (q, k, v, o) = (weight(h * d * e, 0.7), weight(g * d * e, 1.1), weight(g * d * e, 1.3), weight(e * h * d, 1.7));
    let weights = BlockWeights::new(
        TensorRef::new(&q, &[h * d, e])?,
        TensorRef::new(&k, &[g * d, e])?,
        TensorRef::new(&v, &[g * d, e])?,
        TensorRef::new(&o, &[e, h * d])?,
    );
    let spec = BlockSpec { rope: Some(RopeSpec::new(10000.0)), ..BlockSpec::new(e, AttentionSpec::new(h, g, d)) };
    let block = AttentionBlock::builder(spec, weights).build(&Context::cpu()?)?;

    // A block is `Send` and `Sync` and only read. Calls on one context take turns, each with all of its threads; a context for each
    // thread would let them run side by side.
    let together = std::thread::scope(|scope| {
        let block = &block;
        let users = [0, 1].map(|user| scope.spawn(move || decode(block, user, 8)));
        users.map(|user| user.join().expect("decode does not panic"))
    });
    for (user, norms) in together.into_iter().enumerate() {
        let norms = norms?;
        println!("user {user}: |y| = {norms:.3?}");
        // The other thread changed nothing: the same tokens alone give the same bits.
        assert_eq!(norms, decode(&block, user, 8)?);
    }
    println!("both users got what they get alone");
    Ok(())
}
