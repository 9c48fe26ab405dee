//! What weights in int8 and quantised caches cost on a trained model: each layer's error, and the change in mean loss over real text.

use std::path::Path;

use lawson::{
    Args, AttentionBlock, Batch, CacheDType, Checkpoint, Context, DType, Error, KvCache, Level, Result, TensorMut, TensorRef,
    WeightKind,
};
use lawson_testkit::model::{Mlp, Model};

use crate::bench::{parallel, record::Row, specs::Preset};

/// Tokens of a window: each predicts the one that follows, the last the first of the next window.
pub const WINDOW: usize = 512;

/// What is compared: everything in f32 first.
pub const FORMS: [(&str, WeightKind, CacheDType); 6] = [
    ("f32", WeightKind::Compute, CacheDType::F32),
    ("int8 weights", WeightKind::Int8, CacheDType::F32),
    ("int8 cache", WeightKind::Compute, CacheDType::INT8),
    ("int4 cache", WeightKind::Compute, CacheDType::INT4),
    ("int8 weights, int8 cache", WeightKind::Int8, CacheDType::INT8),
    ("int8 weights, int4 cache", WeightKind::Int8, CacheDType::INT4),
];

/// Windows that a preset measures.
pub fn windows(preset: Preset) -> usize {
    match preset {
        Preset::Quick => 8,
        Preset::Article => 32,
    }
}

/// The model of a checkpoint, as the test kit computes it.
fn model(checkpoint: &Checkpoint) -> Result<Model> {
    let values = |name: &str, len: Option<usize>| {
        let tensor = checkpoint.tensor(name)?.ok_or_else(|| Error::invalid(format!("the tensor '{name}' is missing")))?;
        let values = tensor.as_ref().to_f32();
        match len {
            Some(len) if values.len() != len => Err(Error::invalid(format!(
                "the tensor '{name}' has the shape {:?}, but {len} elements are needed",
                tensor.shape()
            ))),
            _ => Ok(values),
        }
    };
    let spec = checkpoint.block_spec(0, true)?;
    let (e, eps) = (spec.hidden_size, spec.input_norm.map_or(0.0, |eps| eps.get()));
    let mlp = |layer: usize| {
        let name = |part: &str| format!("layers.{layer}.{part}.weight");
        let gate = values(&name("mlp.gate_proj"), None)?;
        let (up, down) = (values(&name("mlp.up_proj"), Some(gate.len()))?, values(&name("mlp.down_proj"), Some(gate.len()))?);
        Ok(Mlp { norm: values(&name("post_attention_layernorm"), Some(e))?, gate, up, down })
    };
    let embedding = values("embed_tokens.weight", None)?;
    let output = match checkpoint.tensor("lm_head.weight")? {
        Some(_) => Some(values("lm_head.weight", Some(embedding.len()))?),
        None => None,
    };
    let mlps = (0..checkpoint.layers()).map(mlp).collect::<Result<Vec<_>>>()?;
    Ok(Model { hidden_size: e, eps, embedding, mlps, norm: values("norm.weight", Some(e))?, output })
}

/// The first `count` windows of a file of token ids, 16 bits each, little-endian.
fn read_tokens(path: &Path, count: usize) -> Result<Vec<Vec<u16>>> {
    let at = |text: String| Error::invalid(format!("--tokens {}: {text}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| at(format!("cannot be read: {e}")))?;
    let ids: Vec<u16> = bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    if !bytes.len().is_multiple_of(2) || ids.len() <= WINDOW {
        return Err(at(format!("{} bytes; more than {WINDOW} token ids of 2 bytes each are needed", bytes.len())));
    }
    Ok(ids.windows(WINDOW + 1).step_by(WINDOW).take(count).map(<[u16]>::to_vec).collect())
}

/// Checks that the model has every token.
fn check_tokens(texts: &[Vec<u16>], model: &Model) -> Result<()> {
    let vocabulary = model.embedding.len() / model.hidden_size.max(1);
    let at = |window: usize, i: usize| window * WINDOW + i;
    let all = texts.iter().enumerate().flat_map(|(w, text)| text.iter().enumerate().map(move |(i, &id)| (at(w, i), id)));
    match { all }.find(|&(_, id)| usize::from(id) >= vocabulary) {
        None => Ok(()),
        Some((place, id)) => {
            let text = format!("token {id} at place {place}; the model has the tokens 0 to {}", vocabulary.saturating_sub(1));
            Err(Error::invalid(text))
        }
    }
}

/// The blocks of all layers of one form, with input norm and residual, in f32.
struct Blocks {
    layers: Vec<AttentionBlock>,
    cache: CacheDType,
}

impl Blocks {
    fn new(context: &Context, checkpoint: &Checkpoint, kind: WeightKind, cache: CacheDType) -> Result<Self> {
        let layer = |i| {
            let weights = checkpoint.weights(i, true)?;
            let builder = AttentionBlock::builder(checkpoint.block_spec(i, true)?, weights.as_ref());
            builder.dtype(DType::F32).weights(kind).level(Level::Maximal).build(context)
        };
        Ok(Blocks { layers: (0..checkpoint.layers()).map(layer).collect::<Result<_>>()?, cache })
    }

    /// x + attention of a layer, for a sequence without a past.
    fn attend(&self, layer: usize, x: &[f32]) -> Result<Vec<f32>> {
        let block = &self.layers[layer];
        let tokens = x.len() / block.spec().hidden_size;
        let shape = [tokens, block.spec().hidden_size];
        let mut cache = KvCache::new(block.context(), &block.spec().attention, 1, 1, tokens, self.cache)?;
        let (batch, mut y) = (Batch::uniform(1, tokens)?, vec![f32::NAN; x.len()]);
        let (x, out) = (TensorRef::new(x, &shape)?, TensorMut::new(&mut y, &shape)?);
        block.forward(Args { x, batch: &batch, mask: None, cache: cache.layer(0), y: out })?;
        Ok(y)
    }
}

/// ‖a − b‖ / ‖b − x‖: the relative error of what a layer adds to x.
fn relative(a: &[f32], b: &[f32], x: &[f32]) -> f64 {
    let square = |p: &[f32], q: &[f32]| p.iter().zip(q).map(|(p, q)| f64::from(p - q).powi(2)).sum::<f64>();
    (square(a, b) / square(b, x)).sqrt()
}

/// −log of the probability of each predicted token, in nats, on average.
fn mean_loss(model: &Model, blocks: &Blocks, texts: &[Vec<u16>], threads: usize) -> Result<f64> {
    let window = |i: usize| model.losses(&texts[i], &mut |layer, x| blocks.attend(layer, x));
    let losses = parallel::map(texts.len(), threads, window).into_iter().collect::<Result<Vec<_>>>()?.concat();
    Ok(losses.iter().sum::<f64>() / losses.len() as f64)
}

/// Measures every form over `windows` windows of `tokens`.
///
/// # Errors
/// `InvalidInput`, naming file or tensor; `Unavailable` on a GPU.
pub fn run(context: &Context, checkpoint: &Path, tokens: &Path, windows: usize, step: &dyn Fn(&str)) -> Result<Vec<Row>> {
    let opened = Checkpoint::open(checkpoint)?;
    if opened.weight_kind() != WeightKind::Compute {
        let text = format!("--checkpoint {}: its weights are in int8 already; the original is needed", checkpoint.display());
        return Err(Error::invalid(text));
    }
    let texts = read_tokens(tokens, windows)?;
    let model = model(&opened).map_err(|e| e.at(format!("--checkpoint {}", checkpoint.display())))?;
    check_tokens(&texts, &model).map_err(|e| e.at(format!("--tokens {}", tokens.display())))?;
    let all = FORMS.map(|(_, kind, cache)| Blocks::new(context, &opened, kind, cache));
    let all = all.into_iter().collect::<Result<Vec<_>>>()?;

    // Every form on what each layer gets in f32, in the first window.
    let mut errors = vec![Vec::new(); all.len()];
    model.losses(&texts[0], &mut |layer, x| {
        let exact = all[0].attend(layer, x)?;
        for (errors, blocks) in errors.iter_mut().zip(&all) {
            errors.push(relative(&blocks.attend(layer, x)?, &exact, x));
        }
        Ok(exact)
    })?;

    let spec = opened.block_spec(0, true)?;
    let mut rows: Vec<Row> = Vec::new();
    for ((&(name, kind, cache), blocks), layer_errors) in FORMS.iter().zip(&all).zip(errors) {
        step(name);
        let mean = mean_loss(&model, blocks, &texts, context.threads())?;
        let base = rows.first().and_then(|r| r.mean_loss).unwrap_or(mean);
        rows.push(Row {
            study: "quality".to_owned(),
            level: Level::Maximal.name().to_owned(),
            device: context.device().to_string(),
            dtype: DType::F32.to_string(),
            kv_dtype: Some(cache.to_string()),
            weights: Some(if kind == WeightKind::Int8 { kind.to_string() } else { DType::F32.to_string() }),
            batch: Some(texts.len()),
            seq: Some(WINDOW),
            past: Some(0),
            hidden: Some(spec.hidden_size),
            heads: Some(spec.attention.heads),
            kv_heads: Some(spec.attention.kv_heads),
            head_dim: Some(spec.attention.head_dim),
            causal: Some(spec.attention.causal),
            threads: Some(context.threads()),
            variant: Some(name.to_owned()),
            mean_loss: Some(mean),
            loss_change: Some(mean / base - 1.0),
            layer_errors,
            ..Row::default()
        });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../lawson/tests/data/tiny-rust-llama").join(name)
    }

    /// The mean that Hugging Face transformers gives for the first 32 windows, in float32 from the bf16 weights.
    const TRUE_LOSS: f64 = 1.879_338_824_190_199_4;

    #[test]
    fn the_model_in_f32_is_that_of_transformers() {
        let (context, checkpoint) = (Context::cpu().unwrap(), Checkpoint::open(data("")).unwrap());
        let blocks = Blocks::new(&context, &checkpoint, WeightKind::Compute, CacheDType::F32).unwrap();
        let (model, texts) = (model(&checkpoint).unwrap(), read_tokens(&data("valid.u16"), 32).unwrap());
        let loss = mean_loss(&model, &blocks, &texts, context.threads()).unwrap();
        assert!((loss - TRUE_LOSS).abs() < 1e-5, "{loss}");
    }

    #[test]
    fn the_trained_model_loses_as_little_as_is_asked() {
        let context = Context::cpu().unwrap();
        let rows = run(&context, &data(""), &data("valid.u16"), 2, &|_| ()).unwrap();
        let loss = |name: &str| {
            let row = rows.iter().find(|r| r.variant.as_deref() == Some(name)).expect("a form");
            println!("{name}: {:?} {:?} {:?}", row.mean_loss, row.loss_change, row.layer_errors);
            (row.mean_loss.unwrap(), row.loss_change.unwrap(), row.layer_errors.clone())
        };
        let (_, change, errors) = loss("f32");
        assert!(change == 0.0 && errors.iter().all(|&e| e == 0.0), "{errors:?}");
        for (name, most) in [
            ("int8 weights", 0.005),
            ("int8 cache", 0.005),
            ("int4 cache", 0.03),
            ("int8 weights, int8 cache", 0.005),
            ("int8 weights, int4 cache", 0.03),
        ] {
            let (mean, change, errors) = loss(name);
            assert!(mean.is_finite() && change <= most && change > -most, "{name}: {change}");
            assert!(errors.len() == 6 && errors.iter().all(|e| *e > 1e-4 && *e < 0.3), "{name}: {errors:?}");
        }
    }

    #[test]
    fn bad_files_are_refused() {
        let context = Context::cpu().unwrap();
        let refused = |checkpoint: &Path, tokens: &Path| run(&context, checkpoint, tokens, 1, &|_| ()).unwrap_err().to_string();
        let odd = std::env::temp_dir().join(format!("lawson-odd-{}.u16", std::process::id()));
        std::fs::write(&odd, vec![0u8; 2 * WINDOW + 1]).unwrap();
        assert!(refused(&data(""), &odd).contains("1025 bytes"));
        std::fs::write(&odd, vec![0xffu8; 2 * WINDOW + 2]).unwrap();
        assert!(refused(&data(""), &odd).contains("token 65535 at place 0;"));
        std::fs::remove_file(&odd).unwrap();
        assert!(refused(&data(""), &odd).contains("cannot be read"));
        assert!(refused(&odd, &data("valid.u16")).contains("config.json"));
    }
}
