//! Checkpoint folders: configurations as transformers reads them, one and many files, and what is refused by name.

mod files;

use std::path::{Path, PathBuf};

use files::{Tensors, f32s, folder, pack, refused};
use lawson::{
    BlockFile, BlockWeights, Checkpoint, Form,
    tensor_file::{StoredDType, TensorFile},
};
use lawson_core::{
    DType, Result,
    problem::{Biases, BlockSpec, Real, RopeScaling, RopeSpec, Yarn},
};
use serde_json::{Value, json};

fn real(v: f64) -> Real {
    Real::new(v).unwrap()
}

/// E 8, H 4, G 2, D 4, two layers.
fn config(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 64, "vocab_size": 10,
    })
}

fn tensors(prefix: &str) -> Tensors {
    let mut t = Tensors::new();
    for layer in 0..2 {
        let name = |n: &str| format!("{prefix}layers.{layer}.{n}");
        f32s(&mut t, &name("self_attn.q_proj.weight"), &[16, 8]);
        f32s(&mut t, &name("self_attn.k_proj.weight"), &[8, 8]);
        f32s(&mut t, &name("self_attn.v_proj.weight"), &[8, 8]);
        f32s(&mut t, &name("self_attn.o_proj.weight"), &[8, 16]);
        f32s(&mut t, &name("input_layernorm.weight"), &[8]);
        f32s(&mut t, &name("self_attn.rotary_emb.inv_freq"), &[2]);
    }
    f32s(&mut t, "lm_head.weight", &[10, 8]);
    t
}

fn add(t: &mut Tensors, name: &str, len: usize) {
    (0..2).for_each(|layer| f32s(t, &format!("model.layers.{layer}.self_attn.{name}"), &[len]));
}

/// A folder with this configuration and one file.
fn make(name: &str, config: &Value, tensors: &Tensors) -> PathBuf {
    let dir = folder(name);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("model.safetensors"), pack(tensors, 0)).unwrap();
    dir
}

fn spec(name: &str, config: &Value) -> Result<BlockSpec> {
    Checkpoint::open(make(name, config, &tensors("model.")))?.block_spec(0, false)
}

#[test]
fn the_trained_model_opens() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny-rust-llama");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.layers(), 6);
    let spec = checkpoint.block_spec(5, false).unwrap();
    let a = &spec.attention;
    assert_eq!((spec.hidden_size, a.heads, a.kv_heads, a.head_dim), (256, 4, 2, 64));
    assert_eq!((spec.rope.clone(), spec.input_norm, spec.residual), (Some(RopeSpec::new(10000.0)), None, false));
    for layer in 0..6 {
        for with_norm in [false, true] {
            let (spec, weights) =
                (checkpoint.block_spec(layer, with_norm).unwrap(), checkpoint.weights(layer, with_norm).unwrap());
            weights.as_ref().check(&spec).unwrap();
            assert_eq!(weights.as_ref().q_weight.dtype(), DType::BF16);
            assert_eq!((spec.input_norm.is_some(), spec.residual), (with_norm, with_norm));
        }
    }
    assert_eq!(checkpoint.block_spec(0, true).unwrap().input_norm, Some(real(1e-5)));
    refused(checkpoint.block_spec(6, false), &["layer 6", "6 layers"]);
    refused(checkpoint.weights(usize::MAX, true), &["out of range"]);
    let golden = TensorFile::open(dir.join("golden.safetensors")).unwrap();
    assert_eq!(golden.shape("layer3.attn_in").unwrap(), [2, 40, 256]);
}

#[test]
fn a_layer_takes_its_input_from_a_file() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny-rust-llama");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let (spec, weights) = (checkpoint.block_spec(3, true).unwrap(), checkpoint.weights(3, true).unwrap());
    let mut t = Tensors::new();
    f32s(&mut t, "x", &[1, 2, 256]);
    let read = |t: &Tensors| {
        let file = TensorFile::from_bytes("in.safetensors", pack(t, 0)).unwrap();
        BlockFile::with_weights(spec.clone(), &weights.as_ref(), &file, Form::default())
    };
    let block = read(&t).unwrap();
    assert_eq!((&block.problem().spec, block.problem().dtype), (&spec, DType::F32));
    assert_eq!(block.data().o_weight, weights.as_ref().o_weight.to_f32());
    assert_eq!(block.data().input_norm, Some(weights.as_ref().input_norm.unwrap().to_f32()));
    f32s(&mut t, "o_proj.weight", &[256, 256]);
    refused(read(&t), &["in.safetensors", "'o_proj.weight'", "x, past_k"]);
    let other = BlockSpec { hidden_size: 128, ..spec.clone() };
    let file = TensorFile::from_bytes("in.safetensors", pack(&t, 0)).unwrap();
    refused(BlockFile::with_weights(other, &weights.as_ref(), &file, Form::default()), &["'q_proj.weight'", "[256, 128]"]);
}

#[test]
fn families_differ_as_in_transformers() {
    let open = |name, config: &Value, t: &Tensors| Checkpoint::open(make(name, config, t)).unwrap();
    let layer = |c: &Checkpoint, i| c.block_spec(i, false).unwrap();

    let llama = open("llama", &config("llama"), &tensors("model."));
    assert_eq!((layer(&llama, 1).biases, layer(&llama, 1).attention.window), (Biases::default(), None));
    assert_eq!(layer(&llama, 0).rope, Some(RopeSpec::new(5e5)));

    let mut biased = config("llama");
    biased["attention_bias"] = json!(true);
    let mut t = tensors("model.");
    for (name, n) in [("q_proj.bias", 16), ("k_proj.bias", 8), ("v_proj.bias", 8), ("o_proj.bias", 8)] {
        add(&mut t, name, n);
    }
    let biased = open("llama-bias", &biased, &t);
    biased.weights(0, true).unwrap().as_ref().check(&biased.block_spec(0, true).unwrap()).unwrap();
    assert!(layer(&biased, 0).biases.o);

    let mut c = config("mistral");
    assert_eq!(spec("mistral", &c).unwrap().attention.window, Some(4096));
    c["sliding_window"] = Value::Null;
    assert_eq!(spec("mistral", &c).unwrap().attention.window, None);
    c["sliding_window"] = json!(7);
    assert_eq!(spec("mistral", &c).unwrap().attention.window, Some(7));

    let mut t = tensors("model.");
    for (name, n) in [("q_proj.bias", 16), ("k_proj.bias", 8), ("v_proj.bias", 8)] {
        add(&mut t, name, n);
    }
    let mut c = config("qwen2");
    c["sliding_window"] = json!(9);
    let qwen2 = open("qwen2", &c, &t);
    assert_eq!(layer(&qwen2, 1).biases, Biases { q: true, k: true, v: true, o: false });
    assert_eq!(layer(&qwen2, 1).attention.window, None);
    qwen2.weights(1, false).unwrap().as_ref().check(&layer(&qwen2, 1)).unwrap();
    c["use_sliding_window"] = json!(true);
    assert_eq!(layer(&open("qwen2", &c, &t), 1).attention.window, None, "max_window_layers is 28");
    c["max_window_layers"] = json!(1);
    let qwen2 = open("qwen2", &c, &t);
    assert_eq!((layer(&qwen2, 0).attention.window, layer(&qwen2, 1).attention.window), (None, Some(9)));
    c["layer_types"] = json!(["sliding_attention", "full_attention"]);
    let qwen2 = open("qwen2", &c, &t);
    assert_eq!((layer(&qwen2, 0).attention.window, layer(&qwen2, 1).attention.window), (Some(9), None));

    let mut t = tensors("model.");
    add(&mut t, "q_norm.weight", 4);
    add(&mut t, "k_norm.weight", 4);
    let qwen3 = open("qwen3", &config("qwen3"), &t);
    assert_eq!((layer(&qwen3, 0).qk_norm, layer(&qwen3, 0).biases), (Some(real(1e-5)), Biases::default()));
    qwen3.weights(0, true).unwrap().as_ref().check(&qwen3.block_spec(0, true).unwrap()).unwrap();
    add(&mut t, "q_norm.weight", 16);
    refused(open("qwen3", &config("qwen3"), &t).weights(1, false), &["q_norm.weight", "[16]", "[4]", "over H·D"]);

    let base = open("base", &config("llama"), &tensors(""));
    base.weights(1, true).unwrap();
}

#[test]
fn defaults_follow_the_family() {
    let without = |model_type, keys: &[&str]| {
        let mut c = config(model_type);
        keys.iter().for_each(|k| drop(c.as_object_mut().unwrap().remove(*k)));
        c
    };
    let s = spec("defaults", &without("llama", &["num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps"])).unwrap();
    assert_eq!((s.attention.kv_heads, s.attention.head_dim, s.rope), (4, 2, Some(RopeSpec::new(10000.0))));
    let s = spec("defaults", &without("qwen3", &["head_dim"])).unwrap();
    assert_eq!((s.attention.head_dim, s.qk_norm), (128, Some(real(1e-5))));
    let mut c = config("llama");
    c["is_causal"] = json!(false);
    assert!(!spec("defaults", &c).unwrap().attention.causal);
}

#[test]
fn rope_is_read_in_both_forms() {
    let older = |v: Value| {
        let mut c = config("llama");
        c["rope_scaling"] = v;
        spec("rope-older", &c)
    };
    let newer = |v: Value| {
        let mut c = config("llama");
        c.as_object_mut().unwrap().remove("rope_theta");
        c["rope_parameters"] = v;
        c["rope_parameters"]["rope_theta"] = json!(5e5);
        spec("rope-newer", &c)
    };
    let both = |v: Value, want: RopeScaling| {
        for read in [older(v.clone()), newer(v)] {
            assert_eq!(read.unwrap().rope, Some(RopeSpec { scaling: want.clone(), ..RopeSpec::new(5e5) }));
        }
    };
    both(json!({"rope_type": "default"}), RopeScaling::Default);
    both(json!({"rope_type": "linear", "factor": 2.0}), RopeScaling::Linear { factor: real(2.0) });
    both(json!({"type": "linear", "factor": 2}), RopeScaling::Linear { factor: real(2.0) });
    let dynamic = RopeScaling::Dynamic { factor: real(4.0), original: 64 };
    both(json!({"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}), dynamic);
    let llama3 = RopeScaling::Llama3 { factor: real(8.0), low: real(1.0), high: real(4.0), original: 32 };
    both(
        json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32}),
        llama3,
    );
    let yarn = Yarn {
        factor: real(4.0),
        original: 64,
        beta_fast: None,
        beta_slow: Some(real(2.0)),
        truncate: false,
        attention_factor: None,
        mscale: Some(real(0.7)),
        mscale_all_dim: None,
    };
    both(
        json!({"rope_type": "yarn", "factor": 4, "beta_fast": 0, "beta_slow": 2, "truncate": false, "mscale": 0.7}),
        RopeScaling::Yarn(yarn.clone()),
    );
    both(
        json!({"rope_type": "yarn", "factor": null, "beta_slow": 2, "truncate": false, "mscale": 0.7, "original_max_position_embeddings": 16}),
        RopeScaling::Yarn(Yarn { original: 16, ..yarn }),
    );
    let longrope = |original, factor| RopeScaling::LongRope {
        short: vec![real(1.0), real(1.5)],
        long: vec![real(2.0), real(3.0)],
        original,
        factor: Some(real(factor)),
        attention_factor: None,
    };
    let lists =
        json!({"rope_type": "longrope", "short_factor": [1, 1.5], "long_factor": [2, 3], "original_max_position_embeddings": 16});
    both(lists.clone(), longrope(16, 4.0));
    let mut c = config("llama");
    (c["rope_scaling"], c["original_max_position_embeddings"]) = (lists, json!(32));
    assert_eq!(spec("rope-outer", &c).unwrap().rope.unwrap().scaling, longrope(32, 2.0));

    let mut c = config("llama");
    c["partial_rotary_factor"] = json!(0.5);
    assert_eq!(spec("rope-partial", &c).unwrap().rope.unwrap().rotary_dim, Some(2));
    c["partial_rotary_factor"] = json!(1.0);
    assert_eq!(spec("rope-partial", &c).unwrap().rope.unwrap().rotary_dim, None);
    c["partial_rotary_factor"] = json!(0.75);
    refused(spec("rope-partial", &c), &["partial_rotary_factor", "0.75"]);

    refused(older(json!({"rope_type": "mrope"})), &["mrope", "longrope"]);
    refused(older(json!({"type": "linear"})), &["rope_scaling.factor", "missing"]);
    refused(older(json!({"rope_type": "llama3", "factor": 2, "low_freq_factor": 1})), &["rope_scaling.high_freq_factor"]);
    refused(older(json!(3)), &["rope_scaling", "object"]);
    refused(newer(json!({"full_attention": {"rope_type": "default"}})), &["full_attention"]);
    refused(
        newer(json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 0})),
        &["original_max_position_embeddings"],
    );
}

#[test]
fn what_a_block_cannot_express_is_refused_by_name() {
    let with = |model_type: &str, pairs: &[(&str, Value)]| {
        let mut c = config(model_type);
        pairs.iter().for_each(|(k, v)| c[*k] = v.clone());
        spec("refused", &c)
    };
    let yes = || json!(true);
    refused(with("llama", &[("clip_qkv", json!(8.0))]), &["config.json", "clipped QKV", "clip_qkv"]);
    refused(with("olmo", &[("clip_qkv", Value::Null)]), &["olmo", "clip_qkv"]);
    refused(with("llama", &[("attention_chunk_size", json!(8192))]), &["chunked attention"]);
    refused(with("deepseek_v3", &[("kv_lora_rank", json!(512))]), &["MLA", "kv_lora_rank"]);
    refused(with("llama", &[("quantization_config", json!({"bits": 4}))]), &["quantization_config"]);
    refused(with("llama", &[("use_qk_norm", yes())]), &["use_qk_norm"]);
    refused(with("olmo2", &[]), &["olmo2", "QK-norm over H·D"]);
    refused(with("cohere", &[]), &["LayerNorm"]);
    refused(with("gpt_neox", &[]), &["gpt_neox", "llama, mistral, qwen2, qwen3"]);
    refused(with("mistral", &[("use_bidirectional_attention", yes())]), &["bidirectional"]);
    let types = json!(["full_attention", "chunked_attention"]);
    refused(with("qwen3", &[("layer_types", types)]), &["chunked_attention"]);
    refused(with("qwen3", &[("layer_types", json!(["full_attention"]))]), &["layer_types", "2 layers"]);
    refused(with("mistral", &[("sliding_window", json!(0))]), &["sliding_window"]);
    refused(with("llama", &[("num_attention_heads", json!(0))]), &["num_attention_heads"]);
    refused(with("llama", &[("num_key_value_heads", json!(3))]), &["num_key_value_heads (3)"]);
    refused(with("llama", &[("hidden_size", json!(true))]), &["hidden_size", "true"]);
    refused(with("llama", &[("num_hidden_layers", json!(1u64 << 60))]), &["num_hidden_layers"]);
    for key in ["model_type", "hidden_size", "num_attention_heads", "num_hidden_layers"] {
        refused(with("llama", &[(key, Value::Null)]), &[key, "missing"]);
    }
}

#[test]
fn wrong_tensors_are_named() {
    let weights = |edit: &dyn Fn(&mut Tensors)| {
        let mut t = tensors("model.");
        edit(&mut t);
        Checkpoint::open(make("wrong", &config("llama"), &t)).unwrap().weights(1, true).map(drop)
    };
    let name = |n: &str| format!("model.layers.1.{n}");
    weights(&|_| ()).unwrap();
    refused(
        weights(&|t| drop(t.remove(&name("self_attn.k_proj.weight")))),
        &["'model.layers.1.self_attn.k_proj.weight'", "missing"],
    );
    refused(weights(&|t| drop(t.remove(&name("input_layernorm.weight")))), &["input_layernorm.weight", "missing"]);
    refused(weights(&|t| f32s(t, &name("self_attn.o_proj.weight"), &[16, 8])), &["o_proj.weight", "[16, 8]", "[8, 16]"]);
    refused(weights(&|t| add(t, "q_proj.bias", 16)), &["q_proj.bias", "config.json does not ask"]);
    let int8 = |t: &mut Tensors| drop(t.insert(name("self_attn.q_proj.weight"), (StoredDType::I8, vec![16, 8], vec![0; 128])));
    refused(weights(&int8), &["q_proj.weight", "I8"]);
}

#[test]
fn many_files_are_one_checkpoint() {
    let all = tensors("model.");
    let whole = Checkpoint::open(make("one-file", &config("llama"), &all)).unwrap();
    let dir = folder("many-files");
    std::fs::write(dir.join("config.json"), config("llama").to_string()).unwrap();
    let file = |i: usize| format!("model-0000{i}-of-00003.safetensors");
    let mut map = serde_json::Map::new();
    for i in 0..3 {
        let part: Tensors =
            all.iter().enumerate().filter(|(n, _)| n % 3 == i).map(|(_, (k, v))| (k.clone(), v.clone())).collect();
        map.extend(part.keys().map(|k| (k.clone(), json!(file(i)))));
        // An odd header length leaves every tensor misaligned.
        std::fs::write(dir.join(file(i)), pack(&part, i)).unwrap();
    }
    let write_index = |map: &Value| {
        std::fs::write(
            dir.join("model.safetensors.index.json"),
            json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string(),
        )
        .unwrap();
    };
    let map = Value::Object(map);
    write_index(&map);
    let split = Checkpoint::open(&dir).unwrap();
    let values =
        |w: BlockWeights<'_>| [w.q_weight, w.k_weight, w.v_weight, w.o_weight, w.input_norm.unwrap()].map(|t| t.to_f32());
    for layer in 0..2 {
        let (a, b) = (whole.weights(layer, true).unwrap(), split.weights(layer, true).unwrap());
        assert_eq!(values(a.as_ref()), values(b.as_ref()));
    }
    let mut wrong = map.clone();
    wrong["lm_head.weight"] = json!("../model.safetensors");
    write_index(&wrong);
    refused(Checkpoint::open(&dir), &["index.json", "weight_map.lm_head.weight"]);
    wrong["lm_head.weight"] = json!(7);
    write_index(&wrong);
    refused(Checkpoint::open(&dir), &["weight_map.lm_head.weight"]);
    wrong["lm_head.weight"] = json!("absent.safetensors");
    write_index(&wrong);
    refused(Checkpoint::open(&dir), &["absent.safetensors", "cannot be read"]);
    wrong["lm_head.weight"] = map["lm_head.weight"].clone();
    wrong["extra"] = json!(file(0));
    write_index(&wrong);
    refused(Checkpoint::open(&dir), &["'extra'", "missing"]);
    std::fs::write(dir.join("model.safetensors.index.json"), "{}").unwrap();
    refused(Checkpoint::open(&dir), &["weight_map", "missing"]);
}

#[test]
fn incomplete_folders_are_refused() {
    let dir = folder("incomplete");
    refused(Checkpoint::open(dir.join("none")), &["config.json", "cannot be read"]);
    std::fs::write(dir.join("config.json"), "{").unwrap();
    refused(Checkpoint::open(&dir), &["config.json", "not valid JSON"]);
    std::fs::write(dir.join("config.json"), config("llama").to_string()).unwrap();
    refused(Checkpoint::open(&dir), &["model.safetensors", "cannot be read"]);
    std::fs::write(dir.join("model.safetensors"), "<html>").unwrap();
    refused(Checkpoint::open(&dir), &["model.safetensors", "not a safetensors file"]);
}
