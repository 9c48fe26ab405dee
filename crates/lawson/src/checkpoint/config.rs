//! `config.json` of a Hugging Face checkpoint, read as transformers reads it.

use lawson_core::{
    Error, Result,
    problem::{AttentionSpec, Biases, BlockSpec, Real, RopeScaling, RopeSpec, Yarn},
};

use crate::json::{Fields, Json};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    const ALL: [(&'static str, Family); 4] =
        [("llama", Family::Llama), ("mistral", Family::Mistral), ("qwen2", Family::Qwen2), ("qwen3", Family::Qwen3)];

    fn parse(model_type: &str) -> Result<Self> {
        if let Some((_, family)) = Family::ALL.into_iter().find(|(name, _)| *name == model_type) {
            return Ok(family);
        }
        let why = match model_type {
            "olmo2" | "olmo3" | "olmoe" | "flex_olmo" => " has QK-norm over H·D, which is not supported",
            "cohere" | "cohere2" | "stablelm" | "persimmon" | "phi" | "chameleon" => {
                " normalises by LayerNorm, which is not supported (QK-norm must be RMSNorm over D)"
            }
            "olmo" | "dbrx" | "mpt" => " has clipped QKV (clip_qkv), which is not supported",
            "llama4" | "llama4_text" => " has chunked attention, which is not supported",
            "deepseek_v2" | "deepseek_v3" | "deepseek_v32" | "kimi_k2" | "minicpm3" | "longcat_flash" => {
                " has multi-head latent attention (MLA), which is not supported"
            }
            "bert" | "modernbert" | "gemma3_text" | "t5gemma" => " may have bidirectional windows, which are not supported",
            _ => " is not supported",
        };
        Err(Error::invalid(format!("model_type {model_type:?}{why}; accepted: llama, mistral, qwen2, qwen3")))
    }
}

/// What a checkpoint's layers compute.
#[derive(Clone, Debug)]
pub(super) struct Config {
    /// Number of layers.
    pub(super) layers: usize,
    /// The self-attention of a layer without its window.
    attention: BlockSpec,
    /// The window of each layer.
    windows: Vec<Option<usize>>,
    norm_eps: Real,
}

impl Config {
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let mut f = Fields::new(Json::parse(text)?, "")?;
        refuse_unsupported(&mut f)?;
        let model_type = f.string("model_type")?;
        let family = Family::parse(&f.required("model_type", model_type)?)?;
        let layers = f.int("num_hidden_layers")?;
        let layers = f.required("num_hidden_layers", layers)?;
        if layers > 1 << 16 {
            return Err(Error::invalid(format!("num_hidden_layers must be at most 65536, got {layers}")));
        }
        let hidden_size = f.int("hidden_size")?;
        let hidden_size = f.required("hidden_size", hidden_size)?;
        let heads = f.int("num_attention_heads")?;
        let heads = f.required("num_attention_heads", heads)?;
        if heads == 0 {
            return Err(Error::invalid("num_attention_heads must be at least 1, got 0"));
        }
        let kv_heads = match f.contains("num_key_value_heads") {
            true => f.int("num_key_value_heads")?.unwrap_or(heads),
            false => match family {
                Family::Llama => heads,
                Family::Mistral => 8,
                Family::Qwen2 | Family::Qwen3 => 32,
            },
        };
        let head_dim = f.int("head_dim")?.unwrap_or(if family == Family::Qwen3 { 128 } else { hidden_size / heads });
        let norm_eps = f.float("rms_norm_eps")?.unwrap_or_else(|| real(1e-6));
        let biased = f.boolean("attention_bias")?.unwrap_or(false);
        let causal = f.boolean("is_causal")?.unwrap_or(true) && !f.boolean("use_bidirectional_attention")?.unwrap_or(false);

        let windows = windows(&mut f, family, layers)?;
        if !causal && windows.iter().any(Option::is_some) {
            return Err(Error::invalid(
                "a sliding window that is bidirectional (sliding_window with is_causal false or use_bidirectional_attention) is not supported",
            ));
        }
        let mut attention =
            BlockSpec::new(hidden_size, AttentionSpec { causal, ..AttentionSpec::new(heads, kv_heads, head_dim) });
        attention.qk_norm = (family == Family::Qwen3).then_some(norm_eps);
        attention.biases = match family {
            Family::Llama | Family::Qwen3 => Biases { q: biased, k: biased, v: biased, o: biased },
            Family::Qwen2 => Biases { q: true, k: true, v: true, o: false },
            Family::Mistral => Biases::default(),
        };
        let max_positions = f.int("max_position_embeddings")?.unwrap_or(match family {
            Family::Llama => 2048,
            Family::Mistral => 131_072,
            Family::Qwen2 | Family::Qwen3 => 32_768,
        });
        attention.rope = Some(rope(&mut f, head_dim, max_positions)?);
        let config = Config { layers, attention, windows, norm_eps };
        config.block_spec(0, true)?;
        Ok(config)
    }

    /// The block of `layer`, which exists; with its input norm and residual, or the self-attention alone.
    pub(super) fn block_spec(&self, layer: usize, with_norm: bool) -> Result<BlockSpec> {
        let mut spec = self.attention.clone();
        spec.attention.window = self.windows.get(layer).copied().flatten();
        if with_norm {
            spec.input_norm = Some(self.norm_eps);
            spec.residual = true;
        }
        spec.validate()?;
        Ok(spec)
    }
}

/// Refuses by name what a block cannot express.
fn refuse_unsupported(f: &mut Fields) -> Result<()> {
    for (key, what) in [
        ("clip_qkv", "clipped QKV"),
        ("attention_chunk_size", "chunked attention"),
        ("kv_lora_rank", "multi-head latent attention (MLA)"),
        ("quantization_config", "a quantised checkpoint"),
        ("compression_config", "a compressed checkpoint"),
    ] {
        if f.take(key).is_some() {
            return Err(Error::invalid(format!("{what} ({key}) is not supported")));
        }
    }
    for key in ["use_qk_norm", "qk_layernorm", "qk_norm"] {
        if f.take(key).is_some_and(|v| v != Json::Bool(false)) {
            return Err(Error::invalid(format!("{key} is not supported: QK-norm must be RMSNorm over D, as in qwen3")));
        }
    }
    Ok(())
}

fn windows(f: &mut Fields, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
    let default = |f: &Fields| (!f.contains("sliding_window")).then_some(4096);
    let windows = match family {
        Family::Llama => vec![None; layers],
        Family::Mistral => {
            let default = default(f);
            vec![f.int("sliding_window")?.or(default); layers]
        }
        Family::Qwen2 | Family::Qwen3 => {
            let default = default(f);
            let window = f.int("sliding_window")?.or(default);
            let window = if f.boolean("use_sliding_window")?.unwrap_or(false) { window } else { None };
            let first = f.int("max_window_layers")?.unwrap_or(28);
            match f.strings("layer_types")? {
                None => (0..layers).map(|i| if i >= first { window } else { None }).collect(),
                Some(types) if types.len() != layers => {
                    return Err(Error::invalid(format!("layer_types must name all {layers} layers, got {}", types.len())));
                }
                Some(types) => types
                    .iter()
                    .map(|kind| match kind.as_str() {
                        "full_attention" | "attention" => Ok(None),
                        "sliding_attention" => Ok(window),
                        other => Err(Error::invalid(format!(
                            "layer_types holds {other:?}, which is not supported; accepted: full_attention, sliding_attention"
                        ))),
                    })
                    .collect::<Result<_>>()?,
            }
        }
    };
    match windows.contains(&Some(0)) {
        true => Err(Error::invalid("sliding_window must be at least 1, got 0")),
        false => Ok(windows),
    }
}

/// `rope_theta` with `rope_scaling`, or the newer `rope_parameters`; where both stand, transformers lets a non-empty `rope_scaling` win.
fn rope(f: &mut Fields, head_dim: usize, max_positions: usize) -> Result<RopeSpec> {
    let theta = f.float("rope_theta")?;
    let fraction = f.float("partial_rotary_factor")?;
    let outer_original = f.int("original_max_position_embeddings")?;
    let (older, newer) = (f.object("rope_scaling")?, f.object("rope_parameters")?);
    let mut p = match (older, newer) {
        (Some(older), newer) if !older.is_empty() || newer.is_none() => older,
        (_, Some(newer)) => newer,
        (..) => Fields::new(Json::Object(Vec::new()), "rope_parameters")?,
    };
    for layer_type in ["full_attention", "sliding_attention"] {
        if p.contains(layer_type) {
            let what =
                format!("rope_parameters for each layer type ({layer_type}) are not supported; one set for all layers is needed");
            return Err(Error::invalid(what));
        }
    }
    let mut rope = RopeSpec::new(10000.0);
    if let Some(theta) = p.float("rope_theta")?.or(theta) {
        rope.theta = theta;
    }
    if let Some(fraction) = p.float("partial_rotary_factor")?.or(fraction) {
        let fraction = fraction.get();
        // Truncated, as transformers does.
        let rotary_dim = (head_dim as f64 * fraction) as usize;
        if !(fraction > 0.0 && fraction <= 1.0) || rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
            return Err(Error::invalid(format!(
                "partial_rotary_factor must turn an even number of dimensions, 2 to head_dim ({head_dim}), got {fraction}"
            )));
        }
        rope.rotary_dim = (rotary_dim < head_dim).then_some(rotary_dim);
    }
    let older_kind = p.string("type")?;
    let kind = p.string("rope_type")?.or(older_kind);
    let kind = kind.as_deref().unwrap_or("default");
    let inner_original = p.int("original_max_position_embeddings")?;
    let original = outer_original.or(inner_original).unwrap_or(max_positions);
    let factor = p.float("factor")?;
    let ratio = || real_ratio(max_positions, original);
    rope.scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: p.required("factor", factor)? },
        "dynamic" => RopeScaling::Dynamic { factor: p.required("factor", factor)?, original: max_positions },
        "yarn" => RopeScaling::Yarn(Yarn {
            factor: factor.map_or_else(ratio, Ok)?,
            original,
            beta_fast: nonzero(p.float("beta_fast")?),
            beta_slow: nonzero(p.float("beta_slow")?),
            truncate: p.boolean("truncate")?.unwrap_or(true),
            attention_factor: p.float("attention_factor")?,
            mscale: p.float("mscale")?,
            mscale_all_dim: p.float("mscale_all_dim")?,
        }),
        "llama3" => {
            let (low, high) = (p.float("low_freq_factor")?, p.float("high_freq_factor")?);
            RopeScaling::Llama3 {
                factor: p.required("factor", factor)?,
                low: p.required("low_freq_factor", low)?,
                high: p.required("high_freq_factor", high)?,
                original,
            }
        }
        "longrope" => {
            let (short, long) = (p.floats("short_factor")?, p.floats("long_factor")?);
            let attention_factor = p.float("attention_factor")?;
            RopeScaling::LongRope {
                short: p.required("short_factor", short)?,
                long: p.required("long_factor", long)?,
                original,
                factor: Some(factor.map_or_else(ratio, Ok)?),
                attention_factor,
            }
        }
        other => {
            return Err(Error::invalid(format!(
                "rope_type {other:?} is not supported; accepted: default, linear, dynamic, yarn, llama3, longrope"
            )));
        }
    };
    Ok(rope)
}

fn real(v: f64) -> Real {
    Real::new(v).expect("a finite literal")
}

fn real_ratio(a: usize, b: usize) -> Result<Real> {
    Real::new(a as f64 / b as f64)
        .ok_or_else(|| Error::invalid(format!("original_max_position_embeddings must be at least 1, got {b}")))
}

/// transformers takes a 0 there for an absent number.
fn nonzero(v: Option<Real>) -> Option<Real> {
    v.filter(|v| v.get() != 0.0)
}
