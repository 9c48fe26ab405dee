//! Online softmax: a softmax-weighted mean of values whose scores come tile by tile, and two halves that merge.
//!
//! This is what lets attention run without its score matrix (arXiv:1805.02867, arXiv:2205.14135).
//!
//! ```sh
//! cargo run --release -p lawson --example online_softmax
//! ```

use lawson::{
    Context, Result, TensorMut, TensorRef,
    ops::{OnlineSoftmax, SoftmaxMethod, softmax},
};

fn main() -> Result<()> {
    // One query's scores for 1000 keys, and a value of 4 dimensions for each key.
    let (keys, dim, tile) = (1000, 4, 64);
    let scores: Vec<f32> = (0..keys).map(|j| 8.0 * (j as f32 * 0.21).sin()).collect();
    let values: Vec<f32> = (0..keys * dim).map(|i| (i as f32 * 0.013).cos()).collect();

    // Tile by tile: the state holds the greatest score so far, the sum of exponentials and the weighted sum of values. When a tile brings a
    // greater score, all that was summed before is scaled down.
    let mut whole = OnlineSoftmax::empty(dim);
    for (i, (s, v)) in scores.chunks(tile).zip(values.chunks(tile * dim)).enumerate() {
        whole.push(s, v);
        if i < 4 {
            println!("after tile {i}: m = {:.4}, l = {:.4}", whole.m, whole.l);
        }
    }

    // Two halves, as two threads would compute them, merged.
    let half = keys / 2;
    let mut left = OnlineSoftmax::empty(dim);
    left.push(&scores[..half], &values[..half * dim]);
    let mut right = OnlineSoftmax::empty(dim);
    right.push(&scores[half..], &values[half * dim..]);
    left.merge(&right);

    // The ordinary way: all scores at once through softmax, then the weighted mean.
    let context = Context::cpu()?;
    let mut p = vec![0.0; keys];
    softmax(&context, &TensorRef::new(&scores, &[1, keys])?, &mut TensorMut::new(&mut p, &[1, keys])?, SoftmaxMethod::Fused)?;
    let mut want = vec![0.0; dim];
    for (p, v) in p.iter().zip(values.chunks(dim)) {
        want.iter_mut().zip(v).for_each(|(w, v)| *w += p * v);
    }

    println!("tile by tile:   {:.6?}", whole.finish());
    println!("halves merged:  {:.6?}", left.finish());
    println!("all at once:    {want:.6?}");
    println!("log-sum-exp:    {:.6} and {:.6}", whole.log_sum_exp(), left.log_sum_exp());
    Ok(())
}
