//! `block.json` to and from [`BlockSpec`].

use lawson_core::{
    Error, Result,
    problem::{AttentionSpec, BlockSpec, Real, RopeLayout, RopeScaling, RopeSpec, Yarn},
};
use serde_json::{Map, Value, json};

use crate::json::{Fields, Json};

/// The block that `text` describes; biases follow from the tensors and are left out.
pub(super) fn parse(text: &[u8]) -> Result<BlockSpec> {
    let mut f = Fields::new(Json::parse(text)?, "")?;
    let hidden_size = f.int("hidden_size")?;
    let hidden_size = f.required("hidden_size", hidden_size)?;
    let heads = f.int("num_attention_heads")?;
    let heads = f.required("num_attention_heads", heads)?;
    let kv_heads = f.int("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = match f.int("head_dim")? {
        Some(d) => d,
        None if heads == 0 => return Err(Error::invalid("num_attention_heads must be at least 1, got 0")),
        None if !hidden_size.is_multiple_of(heads) => {
            return Err(Error::invalid(format!(
                "head_dim is missing, and hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({heads})"
            )));
        }
        None => hidden_size / heads,
    };
    let mut attention = AttentionSpec::new(heads, kv_heads, head_dim);
    attention.causal = f.boolean("causal")?.unwrap_or(true);
    attention.window = f.int("sliding_window")?;
    attention.scale = f.float("scale")?;
    attention.softcap = f.float("softcap")?;
    attention.sinks = f.boolean("sinks")?.unwrap_or(false);
    attention.alibi = f.boolean("alibi")?.unwrap_or(false);
    let mut spec = BlockSpec::new(hidden_size, attention);
    spec.qk_norm = eps(f.object("qk_norm")?)?;
    spec.input_norm = eps(f.object("input_norm")?)?;
    spec.residual = f.boolean("residual")?.unwrap_or(false);
    spec.rope = f.object("rope")?.map(rope).transpose()?;
    f.finish()?;
    spec.validate()?;
    Ok(spec)
}

fn eps(norm: Option<Fields>) -> Result<Option<Real>> {
    let Some(mut f) = norm else { return Ok(None) };
    let eps = f.float("eps")?;
    let eps = f.required("eps", eps)?;
    f.finish()?;
    Ok(Some(eps))
}

fn rope(mut f: Fields) -> Result<RopeSpec> {
    let mut rope = RopeSpec::new(10000.0);
    if let Some(theta) = f.float("theta")? {
        rope.theta = theta;
    }
    rope.layout = match f.string("layout")?.as_deref() {
        None | Some("half") => RopeLayout::Half,
        Some("interleaved") => RopeLayout::Interleaved,
        Some(other) => return Err(Error::invalid(format!("rope.layout must be \"half\" or \"interleaved\", got {other:?}"))),
    };
    rope.rotary_dim = f.int("rotary_dim")?;
    rope.scaling = f.object("scaling")?.map(scaling).transpose()?.unwrap_or_default();
    f.finish()?;
    Ok(rope)
}

fn scaling(mut f: Fields) -> Result<RopeScaling> {
    let kind = f.string("rope_type")?;
    let kind = f.required("rope_type", kind)?;
    macro_rules! need {
        ($take:ident, $key:literal) => {{
            let value = f.$take($key)?;
            f.required($key, value)?
        }};
    }
    let scaling = match kind.as_str() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: need!(float, "factor") },
        "dynamic" => {
            RopeScaling::Dynamic { factor: need!(float, "factor"), original: need!(int, "original_max_position_embeddings") }
        }
        "yarn" => RopeScaling::Yarn(Yarn {
            factor: need!(float, "factor"),
            original: need!(int, "original_max_position_embeddings"),
            beta_fast: f.float("beta_fast")?,
            beta_slow: f.float("beta_slow")?,
            truncate: f.boolean("truncate")?.unwrap_or(true),
            attention_factor: f.float("attention_factor")?,
            mscale: f.float("mscale")?,
            mscale_all_dim: f.float("mscale_all_dim")?,
        }),
        "llama3" => RopeScaling::Llama3 {
            factor: need!(float, "factor"),
            low: need!(float, "low_freq_factor"),
            high: need!(float, "high_freq_factor"),
            original: need!(int, "original_max_position_embeddings"),
        },
        "longrope" => RopeScaling::LongRope {
            short: need!(floats, "short_factor"),
            long: need!(floats, "long_factor"),
            original: need!(int, "original_max_position_embeddings"),
            factor: f.float("factor")?,
            attention_factor: f.float("attention_factor")?,
        },
        other => {
            return Err(Error::invalid(format!(
                "rope.scaling.rope_type must be default, linear, dynamic, yarn, llama3 or longrope, got {other:?}"
            )));
        }
    };
    f.finish()?;
    Ok(scaling)
}

/// The `block.json` of `spec`.
pub(super) fn to_json(spec: &BlockSpec) -> Value {
    let a = &spec.attention;
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("hidden_size", json!(spec.hidden_size));
    put("num_attention_heads", json!(a.heads));
    put("num_key_value_heads", json!(a.kv_heads));
    put("head_dim", json!(a.head_dim));
    put("causal", json!(a.causal));
    a.window.map(|v| put("sliding_window", json!(v)));
    a.scale.map(|v| put("scale", json!(v.get())));
    a.softcap.map(|v| put("softcap", json!(v.get())));
    put("sinks", json!(a.sinks));
    put("alibi", json!(a.alibi));
    spec.qk_norm.map(|v| put("qk_norm", json!({"eps": v.get()})));
    spec.input_norm.map(|v| put("input_norm", json!({"eps": v.get()})));
    put("residual", json!(spec.residual));
    spec.rope.as_ref().map(|v| put("rope", rope_to_json(v)));
    Value::Object(map)
}

fn rope_to_json(rope: &RopeSpec) -> Value {
    let mut map = Map::new();
    map.insert("theta".into(), json!(rope.theta.get()));
    let layout = match rope.layout {
        RopeLayout::Half => "half",
        RopeLayout::Interleaved => "interleaved",
    };
    map.insert("layout".into(), json!(layout));
    rope.rotary_dim.map(|v| map.insert("rotary_dim".into(), json!(v)));
    scaling_to_json(&rope.scaling).map(|v| map.insert("scaling".into(), v));
    Value::Object(map)
}

fn scaling_to_json(scaling: &RopeScaling) -> Option<Value> {
    let list = |v: &[Real]| v.iter().map(|v| v.get()).collect::<Vec<_>>();
    let real = |v: &Option<Real>| v.map(Real::get);
    Some(match scaling {
        RopeScaling::Default => return None,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor.get()}),
        RopeScaling::Dynamic { factor, original } => {
            json!({"rope_type": "dynamic", "factor": factor.get(), "original_max_position_embeddings": original})
        }
        RopeScaling::Yarn(y) => json!({
            "rope_type": "yarn",
            "factor": y.factor.get(),
            "original_max_position_embeddings": y.original,
            "beta_fast": real(&y.beta_fast),
            "beta_slow": real(&y.beta_slow),
            "truncate": y.truncate,
            "attention_factor": real(&y.attention_factor),
            "mscale": real(&y.mscale),
            "mscale_all_dim": real(&y.mscale_all_dim),
        }),
        RopeScaling::Llama3 { factor, low, high, original } => json!({
            "rope_type": "llama3",
            "factor": factor.get(),
            "low_freq_factor": low.get(),
            "high_freq_factor": high.get(),
            "original_max_position_embeddings": original,
        }),
        RopeScaling::LongRope { short, long, original, factor, attention_factor } => json!({
            "rope_type": "longrope",
            "short_factor": list(short),
            "long_factor": list(long),
            "original_max_position_embeddings": original,
            "factor": real(factor),
            "attention_factor": real(attention_factor),
        }),
    })
}
