//! candle on the CPU as a peer of `lawson bench`: its own attention, RoPE, softmax and matmul. The conversation with the parent is
//! that of `../peer.py`.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    io::{BufRead, Write},
    time::Instant,
};

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{
    attention::{AttnMask, flash_attn},
    ops::softmax_last_dim,
    rotary_emb::rope,
};
use serde_json::{Value, json};

/// Crate version of candle that Cargo.toml asks for; candle exports none.
const CANDLE: &str = "candle 0.11";

struct Problem(Value);

impl Problem {
    fn size(&self, key: &str) -> Result<usize> {
        match self.0[key].as_u64() {
            Some(v) => Ok(v as usize),
            None => bail!("the problem's {key} must be a whole number"),
        }
    }
    fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or("")
    }
    fn is(&self, key: &str) -> bool {
        self.0[key].as_bool().unwrap_or(false)
    }
}

type Call = Box<dyn Fn() -> Result<Tensor>>;

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, mask: AttnMask) -> Result<Tensor> {
    match q.dtype() {
        DType::F32 => flash_attn::<f32>(q, k, v, scale, mask, None, None),
        DType::BF16 => flash_attn::<half::bf16>(q, k, v, scale, mask, None, None),
        DType::F16 => flash_attn::<half::f16>(q, k, v, scale, mask, None, None),
        other => bail!("candle's attention has no dtype {other:?}"),
    }
}

/// Keys and values repeated for each query head of their group, as candle's models do it.
fn repeat_kv(x: &Tensor, times: usize) -> Result<Tensor> {
    if times == 1 {
        return Ok(x.clone());
    }
    let (b, g, l, d) = x.dims4()?;
    Tensor::cat(&vec![x; times], 2)?.reshape((b, g * times, l, d))
}

/// q, k, v [B, H, S, D] with the scores in memory.
fn materialised(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    let times = q.dim(1)? / k.dim(1)?;
    let (k, v) = (repeat_kv(k, times)?, repeat_kv(v, times)?);
    let mut scores = (q.matmul(&k.t()?)? * scale)?;
    if let Some(mask) = mask {
        scores = scores.broadcast_add(mask)?;
    }
    softmax_last_dim(&scores)?.matmul(&v)
}

/// [S, S]: 0 where the query sees the key, −∞ elsewhere.
fn causal_mask(s: usize, dtype: DType) -> Result<Tensor> {
    let mask: Vec<f32> = (0..s * s).map(|i| if i % s > i / s { f32::NEG_INFINITY } else { 0.0 }).collect();
    Tensor::from_vec(mask, (s, s), &Device::Cpu)?.to_dtype(dtype)
}

fn prepare(p: &Problem) -> Result<Call> {
    let dtype = match p.text("dtype") {
        "f32" => DType::F32,
        "bf16" => DType::BF16,
        "f16" => DType::F16,
        other => bail!("candle's peer has no dtype {other:?}; f32, bf16 and f16 are accepted"),
    };
    let mut inputs = HashMap::new();
    for (name, tensor) in candle_core::safetensors::load(p.text("inputs"), &Device::Cpu)? {
        inputs.insert(name, tensor.to_dtype(dtype)?);
    }
    let take = |name: &str| match inputs.get(name) {
        Some(t) => Ok(t.clone()),
        None => bail!("the inputs lack {name}"),
    };
    let (b, s, past) = (p.size("batch")?, p.size("seq")?, p.size("past")?);
    let (h, g, d) = (p.size("heads")?, p.size("kv_heads")?, p.size("head_dim")?);
    let (study, variant, causal) = (p.text("study").to_owned(), p.text("variant").to_owned(), p.is("causal"));
    let scale = 1.0 / (d as f64).sqrt();
    let flash_mask = if causal { AttnMask::causal() } else { AttnMask::None };
    let mask = if causal { Some(causal_mask(s, dtype)?) } else { None };
    match (study.as_str(), variant.as_str()) {
        ("attention", "flash") if past == 0 => {
            let tokens_first = |name| take(name)?.transpose(1, 2)?.contiguous();
            let (q, k, v) = (tokens_first("q")?, tokens_first("k")?, tokens_first("v")?);
            Ok(Box::new(move || attend(&q, &k, &v, scale as f32, flash_mask.clone())))
        }
        ("attention", "traditional") if past == 0 => {
            let (q, k, v) = (take("q")?, take("k")?, take("v")?);
            Ok(Box::new(move || materialised(&q, &k, &v, scale, mask.as_ref())))
        }
        ("decode", "flash") => {
            let tokens_first = |name| take(name)?.transpose(1, 2)?.contiguous();
            let (q, k, v) = (tokens_first("q")?, tokens_first("k")?, tokens_first("v")?);
            // At one sequence candle's decode kernel is its causal one; its batched path wants no mask.
            let mask = if b == 1 { AttnMask::causal_with_offset(k.dim(1)? - 1) } else { AttnMask::None };
            Ok(Box::new(move || attend(&q, &k, &v, scale as f32, mask.clone())))
        }
        ("qkv", "fused") => {
            let (x, w) = (take("x")?, Tensor::cat(&[take("q_proj.weight")?, take("k_proj.weight")?, take("v_proj.weight")?], 0)?);
            let linear = candle_nn::Linear::new(w, None);
            Ok(Box::new(move || candle_nn::Module::forward(&linear, &x)))
        }
        ("block", "flash" | "traditional") if past == 0 => {
            for name in inputs.keys() {
                if !["x", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"].contains(&name.as_str()) {
                    bail!("candle's block peer has no input {name}");
                }
            }
            let x = take("x")?;
            let linear = |name| Ok::<_, candle_core::Error>(candle_nn::Linear::new(take(name)?, None));
            let (wq, wk, wv, wo) =
                (linear("q_proj.weight")?, linear("k_proj.weight")?, linear("v_proj.weight")?, linear("o_proj.weight")?);
            let angles: Vec<f32> = (0..s)
                .flat_map(|i| (0..d / 2).map(move |j| (i as f64 * 10000f64.powf(-2.0 * j as f64 / d as f64)) as f32))
                .collect();
            let angles = Tensor::from_vec(angles, (s, d / 2), &Device::Cpu)?;
            let tables = if p.is("rope") { Some((angles.cos()?.to_dtype(dtype)?, angles.sin()?.to_dtype(dtype)?)) } else { None };
            Ok(Box::new(move || {
                use candle_nn::Module;
                let heads = |y: Tensor, n| y.reshape((b, s, n, d))?.transpose(1, 2)?.contiguous();
                let (mut q, mut k, v) = (heads(wq.forward(&x)?, h)?, heads(wk.forward(&x)?, g)?, heads(wv.forward(&x)?, g)?);
                if let Some((cos, sin)) = &tables {
                    (q, k) = (rope(&q, cos, sin)?, rope(&k, cos, sin)?);
                }
                let o = if variant == "flash" {
                    attend(&q.transpose(1, 2)?, &k.transpose(1, 2)?, &v.transpose(1, 2)?, scale as f32, flash_mask.clone())?
                } else {
                    materialised(&q, &k, &v, scale, mask.as_ref())?
                };
                // candle's attention of half-precision inputs gives f32.
                wo.forward(&o.to_dtype(dtype)?.transpose(1, 2)?.reshape((b, s, h * d))?)
            }))
        }
        _ => bail!("candle's peer has no {variant} for {study} with a past of {past}"),
    }
}

fn start(line: &str) -> Result<(Call, Tensor)> {
    let problem = Problem(serde_json::from_str(line).map_err(candle_core::Error::wrap)?);
    let call = prepare(&problem)?;
    call()?;
    let result = call()?;
    Ok((call, result))
}

fn command(line: &str, call: &Call, result: &mut Option<Tensor>) -> Result<Value> {
    if line == "run" {
        *result = None;
        let start = Instant::now();
        let y = call()?;
        let seconds = start.elapsed().as_secs_f64();
        *result = Some(y);
        return Ok(json!({ "seconds": seconds }));
    }
    let request: Value = serde_json::from_str(line).map_err(candle_core::Error::wrap)?;
    let (Some(path), Some(y)) = (request["output"].as_str(), result.as_ref()) else {
        bail!("expected run, quit or an output path, got {line}");
    };
    let y = y.to_dtype(DType::F32)?.contiguous()?;
    candle_core::safetensors::save(&HashMap::from([("y", y)]), path)?;
    Ok(json!({ "written": path }))
}

fn main() {
    let mut lines = std::io::stdin().lock().lines().map_while(std::io::Result::ok);
    let answer = |value: Value| {
        let mut out = std::io::stdout().lock();
        // A parent that is gone needs no answer.
        let _ = writeln!(out, "{value}").and_then(|()| out.flush());
    };
    let one_line = |e: candle_core::Error| e.to_string().lines().next().unwrap_or("").to_owned();
    let Some(first) = lines.next() else { return };
    let (call, result) = match start(&first) {
        Ok(started) => started,
        Err(e) => return answer(json!({ "error": one_line(e) })),
    };
    answer(json!({ "ready": true, "version": CANDLE }));
    let mut result = Some(result);
    for line in lines.take_while(|l| l.trim() != "quit") {
        answer(command(line.trim(), &call, &mut result).unwrap_or_else(|e| json!({ "error": one_line(e) })));
    }
}
