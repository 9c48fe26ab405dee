//! The trained model's six attention blocks against what Hugging Face transformers computed (float32, eager attention).

use std::path::Path;

use lawson::{
    Args, AttentionBlock, Batch, BlockWeights, Checkpoint, Context, ContextOptions, DType, Isa, KvCache, Level,
    tensor_file::TensorFile,
};

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny-rust-llama")
}

#[test]
fn blocks_match_transformers() {
    let checkpoint = Checkpoint::open(folder()).expect("the model");
    let golden = TensorFile::open(folder().join("golden.safetensors")).expect("the golden file");
    let read = |name: &str| golden.tensor(name).expect("a golden tensor").as_ref().to_f32();
    for isa in Isa::available() {
        let context = Context::new(ContextOptions { isa: Some(isa), ..Default::default() }).expect("a context");
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
                    x: lawson::TensorRef::new(&x, &[2, 40, 256]).expect("x"),
                    batch: &Batch::uniform(2, 40).expect("a batch"),
                    mask: None,
                    cache: cache.layer(0),
                    y: lawson::TensorMut::new(&mut y, &[2, 40, 256]).expect("y"),
                };
                block.at(Some(level)).forward(args).expect("a call");
                let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
                let error = square(&mut y.iter().zip(&want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
                let error = error / square(&mut want.iter().map(|&v| f64::from(v)));
                assert!(error <= 3e-6, "{isa} layer {layer} {level}: relative error {error:.2e}");
            }
        }
    }
}
