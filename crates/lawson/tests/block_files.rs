//! Block files and tensor files: what is read back is what was written, and what is wrong is named.

mod files;

use std::{collections::BTreeSet, path::Path};

use files::{Tensors, f32s, folder, pack, refused, with_header};
use lawson::{
    BlockFile, BlockWeights, Form,
    block_file::{write_block_file, write_output},
    tensor_file::{StoredDType, TensorFile, write_safetensors},
};
use lawson_core::{
    CacheDType, DType, Result,
    data::{BlockData, Mask},
    problem::{
        AttentionSpec, Biases, BlockProblem, BlockSpec, Lengths, MaskShape, Real, RopeLayout, RopeScaling, RopeSpec, Yarn,
    },
    round_to,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// B 2, S 3, P 4, E 6, H 4, G 2, D 4.
fn good() -> (Value, Tensors) {
    let json = json!({"hidden_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rope": {}});
    let mut t = Tensors::new();
    f32s(&mut t, "x", &[2, 3, 6]);
    f32s(&mut t, "q_proj.weight", &[16, 6]);
    f32s(&mut t, "k_proj.weight", &[8, 6]);
    f32s(&mut t, "v_proj.weight", &[8, 6]);
    f32s(&mut t, "o_proj.weight", &[6, 16]);
    f32s(&mut t, "past_k", &[2, 2, 4, 4]);
    f32s(&mut t, "past_v", &[2, 2, 4, 4]);
    (json, t)
}

fn read(json: &str, tensors: &Tensors) -> Result<BlockFile> {
    BlockFile::parse(json.as_bytes(), &TensorFile::from_bytes("in.safetensors", pack(tensors, 0))?, Form::default())
}

fn lengths(values: &[i64]) -> (StoredDType, Vec<usize>, Vec<u8>) {
    (StoredDType::I64, vec![values.len()], values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

#[test]
fn the_good_block_is_read() {
    let (json, mut t) = good();
    t.insert("lengths".into(), lengths(&[4, 1]));
    t.insert("mask".into(), (StoredDType::BOOL, vec![1, 4, 3, 7], vec![1; 84]));
    f32s(&mut t, "q_proj.bias", &[16]);
    let block = read(&json.to_string(), &t).unwrap();
    let p = block.problem();
    assert_eq!(p.batch, Lengths::ragged(vec![3, 3], vec![4, 1]).unwrap());
    assert_eq!(p.mask, Some(MaskShape { per_sequence: false, per_head: true }));
    assert_eq!(p.spec.biases, Biases { q: true, ..Biases::default() });
    assert_eq!(p.spec.rope, Some(RopeSpec::new(10000.0)));
    assert_eq!((p.dtype, p.kv_dtype), (DType::F32, CacheDType::F32));
    assert_eq!((block.data().past_rows, block.data().cache_rows(p)), (4, 7));
    assert_eq!(block.data().x[1], -0.75);
    assert_eq!(block.stored_dtype("x"), Some(DType::F32));
    BlockWeights::from_data(&p.spec, block.data()).unwrap().check(&p.spec).unwrap();
}

#[test]
fn null_equals_absent() {
    let (mut json, t) = good();
    let plain = read(&json.to_string(), &t).unwrap();
    for key in ["causal", "sliding_window", "scale", "softcap", "sinks", "alibi", "qk_norm", "input_norm", "residual"] {
        json[key] = Value::Null;
    }
    json["rope"] = json!({"theta": null, "layout": null, "rotary_dim": null, "scaling": null});
    assert_eq!(read(&json.to_string(), &t).unwrap().problem(), plain.problem());
    json["rope"] = json!({"scaling": {"rope_type": "default"}});
    assert_eq!(read(&json.to_string(), &t).unwrap().problem(), plain.problem());
    json["rope"] = Value::Null;
    assert_eq!(read(&json.to_string(), &t).unwrap().problem().spec.rope, None);
    let (mut json, mut t) = good();
    json["num_key_value_heads"] = Value::Null;
    json["head_dim"] = Value::Null;
    refused(read(&json.to_string(), &t), &["head_dim", "hidden_size (6)", "num_attention_heads (4)"]);
    json["hidden_size"] = json!(8);
    t.retain(|name, _| !name.starts_with("past"));
    for (name, shape) in [("x", [2, 3, 8].as_slice()), ("q_proj.weight", &[8, 8]), ("o_proj.weight", &[8, 8])] {
        f32s(&mut t, name, shape);
    }
    f32s(&mut t, "k_proj.weight", &[8, 8]);
    f32s(&mut t, "v_proj.weight", &[8, 8]);
    let a = read(&json.to_string(), &t).unwrap().problem().spec.attention.clone();
    assert_eq!((a.kv_heads, a.head_dim), (4, 2));
}

#[test]
fn wrong_keys_are_named() {
    let rope = |v: Value| ("rope", v);
    let scaling = |v: Value| ("rope", json!({"scaling": v}));
    let cases: Vec<((&str, Value), &[&str])> = vec![
        (("hidden_sise", json!(6)), &["unknown key 'hidden_sise'", "hidden_size"]),
        (("hidden_size", Value::Null), &["hidden_size", "missing"]),
        (("hidden_size", json!(true)), &["hidden_size", "integer", "true"]),
        (("hidden_size", json!("6")), &["hidden_size", "integer", "\"6\""]),
        (("hidden_size", json!(6.0)), &["hidden_size", "integer", "6.0"]),
        (("hidden_size", json!(-6)), &["hidden_size", "-6"]),
        (("hidden_size", json!(0)), &["hidden_size", "0"]),
        (("hidden_size", json!(u64::MAX)), &["hidden_size"]),
        (("num_attention_heads", Value::Null), &["num_attention_heads", "missing"]),
        (("num_attention_heads", json!(0)), &["num_attention_heads", "0"]),
        (("num_key_value_heads", json!(3)), &["num_attention_heads (4)", "num_key_value_heads (3)"]),
        (("num_key_value_heads", json!(0)), &["num_key_value_heads"]),
        (("head_dim", json!(0)), &["head_dim"]),
        (("head_dim", json!(1u64 << 40)), &["head_dim"]),
        (("causal", json!(1)), &["causal", "true or false", "1"]),
        (("sliding_window", json!(0)), &["sliding_window", "0"]),
        (("sliding_window", json!(false)), &["sliding_window", "false"]),
        (("scale", json!(0.0)), &["scale"]),
        (("scale", json!("1")), &["scale", "number"]),
        (("softcap", json!(0)), &["softcap"]),
        (("softcap", json!(-2.0)), &["softcap"]),
        (("sinks", json!("yes")), &["sinks"]),
        (("alibi", json!(0)), &["alibi"]),
        (("residual", json!(2)), &["residual"]),
        (("qk_norm", json!({})), &["qk_norm.eps", "missing"]),
        (("qk_norm", json!(true)), &["qk_norm", "object"]),
        (("qk_norm", json!({"eps": -1.0})), &["qk_norm.eps"]),
        (("input_norm", json!({"eps": 0, "epsilon": 1})), &["input_norm.epsilon", "eps"]),
        (("input_norm", json!({"eps": null})), &["input_norm.eps", "missing"]),
        (rope(json!([])), &["rope", "object"]),
        (rope(json!({"base": 1})), &["rope.base", "theta"]),
        (rope(json!({"theta": 0})), &["rope.theta"]),
        (rope(json!({"layout": "neox"})), &["rope.layout", "neox", "interleaved"]),
        (rope(json!({"rotary_dim": 3})), &["rope.rotary_dim", "3"]),
        (rope(json!({"rotary_dim": 6})), &["rope.rotary_dim", "6"]),
        (rope(json!({"rotary_dim": 0})), &["rope.rotary_dim", "0"]),
        (scaling(json!({})), &["rope.scaling.rope_type", "missing"]),
        (scaling(json!({"rope_type": "ntk"})), &["rope.scaling.rope_type", "ntk", "longrope"]),
        (scaling(json!({"rope_type": "default", "factor": 2})), &["rope.scaling.factor"]),
        (scaling(json!({"rope_type": "linear"})), &["rope.scaling.factor", "missing"]),
        (scaling(json!({"rope_type": "linear", "factor": 0})), &["rope.scaling.factor"]),
        (scaling(json!({"rope_type": "linear", "factor": 2, "beta_fast": 1})), &["rope.scaling.beta_fast"]),
        (scaling(json!({"rope_type": "dynamic", "factor": 2})), &["rope.scaling.original_max_position_embeddings"]),
        (
            scaling(json!({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 2.5})),
            &["rope.scaling.original_max_position_embeddings", "2.5"],
        ),
        (
            scaling(
                json!({"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 9, "low_freq_factor": 4, "high_freq_factor": 4}),
            ),
            &["rope.scaling.low_freq_factor"],
        ),
        (
            scaling(
                json!({"rope_type": "longrope", "factor": 2, "original_max_position_embeddings": 9, "short_factor": [1], "long_factor": [1, 1]}),
            ),
            &["rope.scaling.short_factor", "2"],
        ),
        (
            scaling(
                json!({"rope_type": "longrope", "factor": 2, "original_max_position_embeddings": 9, "short_factor": [1, "1"], "long_factor": [1, 1]}),
            ),
            &["rope.scaling.short_factor[1]"],
        ),
        (
            scaling(
                json!({"rope_type": "longrope", "original_max_position_embeddings": 9, "short_factor": [1, 1], "long_factor": [1, 1]}),
            ),
            &["longrope", "attention_factor"],
        ),
    ];
    for ((key, value), parts) in cases {
        let (mut json, t) = good();
        json[key] = value;
        refused(read(&json.to_string(), &t), &[&["block.json"], parts].concat());
    }
    let (mut json, t) = good();
    (json["causal"], json["sliding_window"]) = (json!(false), json!(3));
    refused(read(&json.to_string(), &t), &["sliding_window", "causal"]);
    (json["sliding_window"], json["rope"]) = (
        Value::Null,
        json!({"theta": 1.0, "scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 9}}),
    );
    refused(read(&json.to_string(), &t), &["rope.theta", "yarn"]);
}

#[test]
fn what_is_not_json_is_refused() {
    let (json, t) = good();
    let body = json.to_string();
    let body = body.strip_suffix('}').unwrap();
    for (text, part) in [
        (String::new(), "not valid JSON"),
        ("[]".into(), "an object is needed"),
        (body.to_owned(), "not valid JSON"),
        (format!("{body}}} x"), "not valid JSON"),
        (format!("{body}, \"scale\": NaN}}"), "not valid JSON"),
        (format!("{body}, \"scale\": Infinity}}"), "not valid JSON"),
        (format!("{body}, \"scale\": 1e999}}"), "not valid JSON"),
        (format!("{body}, \"rope\": {{}}}}"), "'rope' stands twice"),
        (format!("{body}, \"qk_norm\": {{\"eps\": 0, \"eps\": 0}}}}"), "'eps' stands twice"),
        ("[".repeat(100_000), "not valid JSON"),
    ] {
        refused(read(&text, &t), &["block.json", part]);
    }
    refused(
        BlockFile::parse(b"\xff\xfe", &TensorFile::from_bytes("t", pack(&t, 0)).unwrap(), Form::default()),
        &["not valid JSON"],
    );
}

#[test]
fn wrong_tensors_are_named() {
    let remove = |name: &'static str| move |t: &mut Tensors| drop(t.remove(name));
    let shape = |name: &'static str, shape: &'static [usize]| move |t: &mut Tensors| f32s(t, name, shape);
    let put = |name: &'static str, dtype, shape: &'static [usize], bytes: Vec<u8>| {
        move |t: &mut Tensors| drop(t.insert(name.into(), (dtype, shape.to_vec(), bytes.clone())))
    };
    type Edit = Box<dyn Fn(&mut Tensors)>;
    let cases: Vec<(Edit, &[&str])> = vec![
        (Box::new(shape("y", &[1])), &["unknown tensor 'y'", "accepted"]),
        (Box::new(remove("x")), &["'x'", "missing"]),
        (Box::new(shape("x", &[6, 6])), &["'x'", "[6, 6]", "[B, S, E]"]),
        (Box::new(shape("x", &[2, 3, 5])), &["'x'", "[2, 3, 5]", "6"]),
        (Box::new(shape("x", &[0, 3, 6])), &["'x'", "[0, 3, 6]"]),
        (Box::new(shape("x", &[2, 0, 6])), &["'x'", "[2, 0, 6]"]),
        (Box::new(put("x", StoredDType::F64, &[2, 3, 6], vec![0; 288])), &["'x'", "F32", "F64"]),
        (Box::new(put("x", StoredDType::I32, &[2, 3, 6], vec![0; 144])), &["'x'", "I32"]),
        (Box::new(remove("q_proj.weight")), &["'q_proj.weight'", "missing"]),
        (Box::new(shape("q_proj.weight", &[6, 16])), &["'q_proj.weight'", "[6, 16]", "[16, 6]"]),
        (Box::new(put("k_proj.weight", StoredDType::I64, &[8, 6], vec![0; 384])), &["'k_proj.weight'", "I64"]),
        (Box::new(remove("v_proj.weight")), &["'v_proj.weight'", "missing"]),
        (Box::new(shape("o_proj.weight", &[6, 8])), &["'o_proj.weight'", "[6, 8]", "[6, 16]"]),
        (Box::new(shape("q_proj.bias", &[8])), &["'q_proj.bias'", "[8]", "[16]"]),
        (Box::new(shape("o_proj.bias", &[16])), &["'o_proj.bias'", "[6]"]),
        (Box::new(shape("qkv_proj.weight", &[32, 6])), &["'q_proj.weight'", "qkv_proj.weight"]),
        (Box::new(shape("qkv_proj.bias", &[32])), &["'qkv_proj.bias'", "qkv_proj.weight"]),
        (Box::new(remove("past_k")), &["'past_v'", "'past_k' is missing"]),
        (Box::new(remove("past_v")), &["'past_k'", "'past_v' is missing"]),
        (Box::new(shape("past_v", &[2, 2, 5, 4])), &["'past_v'", "[2, 2, 5, 4]"]),
        (Box::new(shape("past_k", &[2, 4, 4, 4])), &["'past_k'", "[2, 4, 4, 4]"]),
        (Box::new(shape("past_k", &[2, 2, 16])), &["'past_k'", "[2, 2, 16]"]),
        (Box::new(shape("lengths", &[2])), &["'lengths'", "I64", "F32"]),
        (Box::new(put("lengths", StoredDType::I32, &[1], vec![0; 4])), &["'lengths'", "[1]", "[2]"]),
        (Box::new(put("lengths", StoredDType::I64, &[2], lengths(&[0, 5]).2)), &["'lengths'", "5", "sequence 1"]),
        (Box::new(put("lengths", StoredDType::I64, &[2], lengths(&[-1, 0]).2)), &["'lengths'", "-1"]),
        (Box::new(put("lengths", StoredDType::I64, &[2], lengths(&[i64::MAX, 0]).2)), &["'lengths'"]),
        (Box::new(put("mask", StoredDType::U8, &[1, 1, 3, 6], vec![1; 18])), &["'mask'", "[1, 1, 3, 6]", "7"]),
        (Box::new(put("mask", StoredDType::U8, &[1, 2, 3, 7], vec![1; 42])), &["'mask'", "[1, 2, 3, 7]"]),
        (Box::new(put("mask", StoredDType::U8, &[1, 1, 3, 7], vec![2; 21])), &["'mask'", "0 and 1", "2"]),
        (Box::new(put("mask", StoredDType::BOOL, &[1, 1, 3, 7], vec![255; 21])), &["'mask'", "255"]),
        (Box::new(put("mask", StoredDType::I8, &[1, 1, 3, 7], vec![1; 21])), &["'mask'", "BOOL", "I8"]),
        (Box::new(shape("sinks", &[4])), &["'sinks'", "does not ask"]),
        (Box::new(shape("alibi_slopes", &[4])), &["'alibi_slopes'", "'alibi'"]),
        (Box::new(shape("k_norm.weight", &[4])), &["'k_norm.weight'", "'qk_norm'"]),
        (Box::new(shape("input_norm.weight", &[6])), &["'input_norm.weight'", "'input_norm'"]),
    ];
    for (edit, parts) in cases {
        let (json, mut t) = good();
        edit(&mut t);
        refused(read(&json.to_string(), &t), &[&["in.safetensors"], parts].concat());
    }
    for (key, value, tensor) in [
        ("sinks", json!(true), "'sinks'"),
        ("alibi", json!(true), "'alibi_slopes'"),
        ("qk_norm", json!({"eps": 0}), "'q_norm.weight'"),
        ("input_norm", json!({"eps": 0}), "'input_norm.weight'"),
    ] {
        let (mut json, t) = good();
        json[key] = value;
        refused(read(&json.to_string(), &t), &[tensor, "missing"]);
    }
}

#[test]
fn packed_projections_split() {
    let (json, mut t) = good();
    let separate = read(&json.to_string(), &t).unwrap();
    let bytes: Vec<u8> = ["q_proj.weight", "k_proj.weight", "v_proj.weight"].iter().flat_map(|n| t[*n].2.clone()).collect();
    t.retain(|name, _| !["q_proj.weight", "k_proj.weight", "v_proj.weight"].contains(&name.as_str()));
    t.insert("qkv_proj.weight".into(), (StoredDType::F32, vec![32, 6], bytes));
    assert_eq!(read(&json.to_string(), &t).unwrap().data(), separate.data());
    f32s(&mut t, "qkv_proj.bias", &[32]);
    let block = read(&json.to_string(), &t).unwrap();
    assert_eq!(block.problem().spec.biases, Biases { q: true, k: true, v: true, o: false });
    assert_eq!(block.data().v_bias.as_ref().unwrap()[0], 24.0 * 0.25 - 1.0);
    let file = TensorFile::from_bytes("t", pack(&t, 0)).unwrap();
    let (weight, bias) = (file.tensor("qkv_proj.weight").unwrap(), file.tensor("qkv_proj.bias").unwrap());
    let [q, k, v] = BlockWeights::split_qkv(weight.as_ref(), &block.problem().spec).unwrap();
    assert_eq!(
        [q.to_f32(), k.to_f32(), v.to_f32()],
        [&separate.data().q_weight, &separate.data().k_weight, &separate.data().v_weight].map(Vec::clone)
    );
    let [_, k, v] = BlockWeights::split_qkv(bias.as_ref(), &block.problem().spec).unwrap();
    assert_eq!((k.shape(), v.to_f32()), (&[8][..], block.data().v_bias.clone().unwrap()));
    refused(BlockWeights::split_qkv(q, &block.problem().spec), &["32", "[16, 6]"]);
    t.remove("qkv_proj.bias");
    f32s(&mut t, "k_proj.bias", &[8]);
    refused(read(&json.to_string(), &t), &["'k_proj.bias'", "qkv_proj.weight"]);
    t.remove("k_proj.bias");
    f32s(&mut t, "qkv_proj.weight", &[24, 6]);
    refused(read(&json.to_string(), &t), &["'qkv_proj.weight'", "[24, 6]", "[32, 6]"]);
}

#[test]
fn weights_are_checked_against_the_spec() {
    let (json, t) = good();
    let block = read(&json.to_string(), &t).unwrap();
    let spec = &block.problem().spec;
    let weights = BlockWeights::from_data(spec, block.data()).unwrap();
    refused(BlockWeights { k_weight: weights.q_weight, ..weights }.check(spec), &["'k_proj.weight'", "[16, 6]", "[8, 6]"]);
    refused(BlockWeights { q_norm: Some(weights.q_weight), ..weights }.check(spec), &["'q_norm.weight'", "does not ask"]);
    let mut asks = spec.clone();
    asks.attention.sinks = true;
    refused(weights.check(&asks), &["'sinks'", "missing"]);
    asks = spec.clone();
    asks.biases.o = true;
    refused(weights.check(&asks), &["'o_proj.bias'", "missing"]);
    refused(BlockWeights { o_bias: Some(weights.o_weight), ..weights }.check(&asks), &["'o_proj.bias'", "[6, 16]", "[6]"]);
}

#[test]
fn floats_are_rounded_to_the_compute_and_cache_dtypes() {
    let (mut json, mut t) = good();
    json["input_norm"] = json!({"eps": 1e-6});
    let odd = 1.0f32 + 3.0 / 1024.0;
    let bytes = |n: usize| odd.to_le_bytes().repeat(n);
    for (name, (_, shape, data)) in &mut t {
        if name != "o_proj.weight" {
            *data = bytes(shape.iter().product());
        }
    }
    t.insert("input_norm.weight".into(), (StoredDType::F32, vec![6], bytes(6)));
    t.insert("q_proj.bias".into(), (StoredDType::F32, vec![16], bytes(16)));
    let file = TensorFile::from_bytes("t", pack(&t, 0)).unwrap();
    let block = BlockFile::parse(
        json.to_string().as_bytes(),
        &file,
        Form { dtype: Some(DType::BF16), kv_dtype: Some(CacheDType::F16), ..Form::default() },
    )
    .unwrap();
    assert_eq!((block.problem().dtype, block.problem().kv_dtype), (DType::BF16, CacheDType::F16));
    let d = block.data();
    assert_eq!(
        [d.x[0], d.k_weight[0], d.past_k[0]],
        [round_to(DType::BF16, odd), round_to(DType::BF16, odd), round_to(DType::F16, odd)]
    );
    assert_eq!([d.input_norm.as_ref().unwrap()[0], d.q_bias.as_ref().unwrap()[0]], [odd, odd]);
    assert_eq!(block.stored_dtype("past_k"), Some(DType::F32));
}

#[test]
fn malformed_tensor_files_are_refused() {
    let (_, t) = good();
    let whole = pack(&t, 0);
    let open = |bytes: &[u8]| TensorFile::from_bytes("some.safetensors", bytes.to_vec());
    for n in 0..whole.len() {
        refused(open(&whole[..n]), &["some.safetensors"]);
    }
    refused(open(&[&whole[..], &[0]].concat()), &["1 bytes after the last tensor"]);
    refused(open(b"PK\x03\x04 this is some zip file"), &["not a safetensors file"]);
    refused(open(&with_header("[]", &[])), &["not a safetensors file"]);
    refused(open(&with_header("{", &[])), &["not valid JSON"]);
    refused(open(&u64::MAX.to_le_bytes()), &["not a safetensors file", "18446744073709551615"]);
    refused(open(&100_000_001u64.to_le_bytes()), &["100000001"]);
    refused(open(&1000u64.to_le_bytes()), &["truncated", "1000"]);
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        with_header(&format!(r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#), &[0; 16])
    };
    open(&entry("F32", "[4]", "[0, 16]")).unwrap();
    for (dtype, shape, offsets, part) in [
        ("F33", "[4]", "[0, 16]", "F33"),
        ("F32", "[5]", "[0, 16]", "[5]"),
        ("F32", "[4]", "[16, 0]", "16 to 0"),
        ("F32", "[4]", "[4, 20]", "gap"),
        ("F32", "[8]", "[0, 32]", "truncated"),
        ("F32", "[4]", "[0]", "two data_offsets"),
        ("F32", "[4]", "[0, 16, 16]", "two data_offsets"),
        ("F32", "[-4]", "[0, 16]", "'a'.shape"),
        ("F32", "[4.0]", "[0, 16]", "'a'.shape"),
        ("F32", "4", "[0, 16]", "'a'.shape"),
        ("F32", "[4]", "[0, 18446744073709551615]", "'a'"),
        ("F32", "[9223372036854775807, 9223372036854775807]", "[0, 16]", "overflows"),
        ("F32", "[4611686018427387904]", "[0, 16]", "overflows"),
        ("F4", "[31]", "[0, 16]", "[31]"),
    ] {
        refused(open(&entry(dtype, shape, offsets)), &["some.safetensors", part]);
    }
    let two = |first: &str, second: &str| {
        let tensor = |n: &str, o: &str| format!(r#""{n}": {{"dtype": "U8", "shape": [8], "data_offsets": {o}}}"#);
        with_header(&format!("{{{}, {}}}", tensor("a", first), tensor("b", second)), &[0; 16])
    };
    open(&two("[8, 16]", "[0, 8]")).unwrap();
    refused(open(&two("[0, 8]", "[4, 12]")), &["'b'", "overlaps"]);
    refused(open(&two("[0, 8]", "[0, 8]")), &["'b'", "overlaps"]);
    let twice = r#"{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}"#;
    refused(open(&with_header(twice, &[])), &["'a' stands twice"]);
    refused(open(&with_header(r#"{"__metadata__": {"format": 1}}"#, &[])), &["__metadata__.format"]);
    open(&with_header(r#"{"__metadata__": {"format": "pt"}}"#, &[])).unwrap();
    refused(open(&with_header(r#"{"a": {"dtype": "U8", "shape": [0]}}"#, &[])), &["'a'.data_offsets", "missing"]);

    let dir = folder("malformed");
    refused(TensorFile::open(dir.join("none.safetensors")), &["none.safetensors", "cannot be read"]);
    refused(TensorFile::open(&dir), &["not a regular file"]);
    std::fs::write(dir.join("empty"), b"").unwrap();
    refused(TensorFile::open(dir.join("empty")), &["empty", "not a safetensors file"]);
    let none = BlockFile::open(dir.join("block.json"), dir.join("empty"), Form::default());
    refused(none, &["block.json", "cannot be read"]);
}

#[test]
fn misaligned_tensors_are_copied() {
    let (json, t) = good();
    let aligned = TensorFile::from_bytes("t", pack(&t, 0)).unwrap();
    let dir = folder("misaligned");
    for pad in 0..8 {
        let path = dir.join(format!("{pad}.safetensors"));
        std::fs::write(&path, pack(&t, pad)).unwrap();
        let file = TensorFile::open(&path).unwrap();
        let tensor = file.tensor("q_proj.weight").unwrap();
        assert_eq!(tensor.is_borrowed(), pad % 4 == 0, "a map starts on a page");
        assert_eq!(tensor.as_ref().to_f32(), aligned.tensor("q_proj.weight").unwrap().as_ref().to_f32());
        let block = BlockFile::parse(json.to_string().as_bytes(), &file, Form::default()).unwrap();
        assert_eq!(block.data().x[1], -0.75);
    }
    let half = |dtype| Tensors::from([("a".into(), (dtype, vec![2], vec![0x80, 0x3f, 0x00, 0x3c]))]);
    for pad in 0..3 {
        let read = |dtype| TensorFile::from_bytes("t", pack(&half(dtype), pad)).unwrap().tensor("a").unwrap().as_ref().to_f32();
        assert_eq!((read(StoredDType::BF16)[0], read(StoredDType::F16)[1]), (1.0, 1.0));
    }
}

#[test]
fn other_dtypes_are_read() {
    let mut t = Tensors::from([
        ("i32".into(), (StoredDType::I32, vec![2], [-1i32, 7].iter().flat_map(|v| v.to_le_bytes()).collect())),
        ("i64".into(), lengths(&[-1, i64::MAX])),
        ("f64".into(), (StoredDType::F64, vec![1], 0.1f64.to_le_bytes().to_vec())),
        ("bool".into(), (StoredDType::BOOL, vec![3], vec![0, 1, 1])),
        ("five".into(), (StoredDType::F32, vec![1, 1, 1, 1, 1], vec![0; 4])),
    ]);
    f32s(&mut t, "none", &[0, 3]);
    let file = TensorFile::from_bytes("t", pack(&t, 1)).unwrap();
    assert_eq!((file.integers("i32").unwrap(), file.integers("i64").unwrap()), (vec![-1, 7], vec![-1, i64::MAX]));
    assert_eq!((file.doubles("f64").unwrap(), file.flags("bool").unwrap()), (vec![0.1], &[0, 1, 1][..]));
    assert_eq!(file.tensor("none").unwrap().shape(), [0, 3]);
    refused(file.tensor("five"), &["'five'", "4 dimensions"]);
    refused(file.tensor("absent"), &["'absent'", "missing"]);
    refused(file.integers("bool"), &["'bool'", "BOOL"]);
}

#[test]
fn outputs_are_whole_or_not_there() {
    let dir = folder("outputs");
    let problem = BlockProblem::new(BlockSpec::new(2, AttentionSpec::new(1, 1, 2)), Lengths::uniform(1, 2, 1), DType::BF16);
    let (y, kv) = ([1.0, 2.0, 3.0, 1.0 + 1.0 / 512.0], [0.5; 6]);
    let path = dir.join("out.safetensors");
    for _ in 0..2 {
        write_output(&path, &problem, &y, &kv, &kv, 3).unwrap();
    }
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["k", "v", "y"]);
    assert_eq!((file.shape("y").unwrap(), file.shape("k").unwrap()), (&[1, 2, 2][..], &[1, 1, 3, 2][..]));
    assert_eq!(file.tensor("y").unwrap().as_ref().to_f32(), [1.0, 2.0, 3.0, 1.0]);
    assert_eq!(file.stored_dtype("v"), Some(StoredDType::BF16));
    assert!(safetensors::SafeTensors::deserialize(&std::fs::read(&path).unwrap()).is_ok());

    refused(write_output(dir.join("no/such/out"), &problem, &y, &kv, &kv, 3), &["no/such/out", "cannot be written"]);
    refused(write_output(&dir, &problem, &y, &kv, &kv, 3), &["cannot be written", "not a regular file"]);
    refused(write_output(dir.join(".."), &problem, &y, &kv, &kv, 3), &["cannot be written"]);
    refused(write_output(dir.join("z"), &problem, &y[1..], &kv, &kv, 3), &["'y'"]);
    let ragged = BlockProblem { batch: Lengths::ragged(vec![1, 2], vec![0, 0]).unwrap(), ..problem.clone() };
    refused(write_output(dir.join("z"), &ragged, &y, &kv, &kv, 3), &["same number of new tokens"]);
    refused(write_safetensors(dir.join("z"), &[("a", StoredDType::F32, &[2], &[0; 4])]), &["'a'"]);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
}

#[test]
fn generated_cases_are_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/blocks");
    let mut seen = BTreeSet::new();
    for case in std::fs::read_dir(root).unwrap() {
        let case = case.unwrap().path();
        let block = BlockFile::open(case.join("block.json"), case.join("in.safetensors"), Form::default());
        let block = block.unwrap_or_else(|e| panic!("{e}"));
        let (p, want) = (block.problem(), TensorFile::open(case.join("want.safetensors")).unwrap());
        let (a, b) = (&p.spec.attention, p.batch.sequences());
        assert_eq!(want.shape("y").unwrap(), [b, p.batch.max_new(), p.spec.hidden_size]);
        assert_eq!(want.shape("k").unwrap(), [b, a.kv_heads, block.data().cache_rows(p), a.head_dim]);
        assert_eq!(want.doubles("y").unwrap().len(), p.batch.tokens() * p.spec.hidden_size);
        let scaling = match p.spec.rope.as_ref().map(|r| &r.scaling) {
            Some(RopeScaling::Linear { .. }) => "linear",
            Some(RopeScaling::Dynamic { .. }) => "dynamic",
            Some(RopeScaling::Yarn(_)) => "yarn",
            Some(RopeScaling::Llama3 { .. }) => "llama3",
            Some(RopeScaling::LongRope { .. }) => "longrope",
            _ => "unscaled",
        };
        seen.extend([scaling, p.dtype.name()]);
    }
    assert_eq!(seen.len(), 9, "{seen:?}");
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn chance(&mut self) -> bool {
        self.below(2) == 0
    }
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64 + 1e-3
    }
    fn real(&mut self) -> Real {
        Real::new(self.unit()).unwrap()
    }
    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.chance().then(|| make(self))
    }
    fn values(&mut self, n: usize, dtype: DType) -> Vec<f32> {
        (0..n).map(|_| round_to(dtype, (self.unit() * 8.0 - 4.0) as f32)).collect()
    }
}

fn random_scaling(r: &mut Random, pairs: usize) -> RopeScaling {
    let original = 2 + r.below(100);
    let factor = r.real();
    match r.below(6) {
        1 => RopeScaling::Linear { factor },
        2 if pairs > 1 => RopeScaling::Dynamic { factor, original },
        3 => RopeScaling::Yarn(Yarn {
            factor,
            original,
            beta_fast: r.maybe(Random::real),
            beta_slow: r.maybe(Random::real),
            truncate: r.chance(),
            attention_factor: r.maybe(Random::real),
            mscale: r.maybe(Random::real),
            mscale_all_dim: r.maybe(Random::real),
        }),
        4 => {
            let low = r.real();
            RopeScaling::Llama3 { factor, low, high: Real::new(low.get() + r.unit()).unwrap(), original }
        }
        5 => RopeScaling::LongRope {
            short: (0..pairs).map(|_| r.real()).collect(),
            long: (0..pairs).map(|_| r.real()).collect(),
            original,
            factor: Some(factor),
            attention_factor: r.maybe(Random::real),
        },
        _ => RopeScaling::Default,
    }
}

fn random_block(seed: u64) -> (BlockProblem, BlockData) {
    let r = &mut Random(seed);
    let (g, d, e) = (1 + r.below(3), 1 + r.below(6), 1 + r.below(9));
    let (h, b, s, p) = (g * (1 + r.below(3)), 1 + r.below(3), 1 + r.below(4), r.below(5));
    let mut spec = BlockSpec::new(e, AttentionSpec::new(h, g, d));
    spec.attention.causal = r.chance();
    spec.attention.window = if spec.attention.causal { r.maybe(|r| 1 + r.below(5)) } else { None };
    spec.attention.scale = r.maybe(Random::real);
    spec.attention.softcap = r.maybe(Random::real);
    (spec.attention.sinks, spec.attention.alibi, spec.residual) = (r.chance(), r.chance(), r.chance());
    (spec.qk_norm, spec.input_norm) = (r.maybe(Random::real), r.maybe(Random::real));
    spec.biases = Biases { q: r.chance(), k: r.chance(), v: r.chance(), o: r.chance() };
    if d > 1 && r.chance() {
        let pairs = 1 + r.below(d / 2);
        spec.rope = Some(RopeSpec {
            theta: Real::new(1.5 + r.unit() * 1e6).unwrap(),
            layout: if r.chance() { RopeLayout::Half } else { RopeLayout::Interleaved },
            rotary_dim: Some(2 * pairs),
            scaling: random_scaling(r, pairs),
        });
    }
    let (dtype, kv_dtype) = (DType::ALL[r.below(3)], CacheDType::ALL[r.below(5)]);
    let past_dtype = kv_dtype.rounds_to(dtype);
    let past = (0..b).map(|_| r.below(p + 1)).collect();
    // Broadcast and full are the same where a dimension is 1, and read back as broadcast.
    let mask = r.maybe(|r| MaskShape { per_sequence: b > 1 && r.chance(), per_head: h > 1 && r.chance() });
    let mask = mask.map(|shape| {
        let n = if shape.per_sequence { b } else { 1 } * if shape.per_head { h } else { 1 } * s * (p + s);
        Mask { shape, rows: s, columns: p + s, data: (0..n).map(|_| r.below(2) as u8).collect() }
    });
    let option = |r: &mut Random, on: bool, n: usize| on.then(|| r.values(n, DType::F32));
    let data = BlockData {
        x: r.values(b * s * e, dtype),
        q_weight: r.values(h * d * e, dtype),
        k_weight: r.values(g * d * e, dtype),
        v_weight: r.values(g * d * e, dtype),
        o_weight: r.values(h * d * e, dtype),
        q_bias: option(r, spec.biases.q, h * d),
        k_bias: option(r, spec.biases.k, g * d),
        v_bias: option(r, spec.biases.v, g * d),
        o_bias: option(r, spec.biases.o, e),
        input_norm: option(r, spec.input_norm.is_some(), e),
        q_norm: option(r, spec.qk_norm.is_some(), d),
        k_norm: option(r, spec.qk_norm.is_some(), d),
        sinks: option(r, spec.attention.sinks, h),
        alibi_slopes: option(r, spec.attention.alibi, h),
        past_rows: p,
        past_k: r.values(b * g * p * d, past_dtype),
        past_v: r.values(b * g * p * d, past_dtype),
        mask,
    };
    let batch = Lengths::ragged(vec![s; b], past).unwrap();
    let mask = data.mask.as_ref().map(|m| m.shape);
    (BlockProblem { mask, kv_dtype, ..BlockProblem::new(spec, batch, dtype) }, data)
}

proptest! {
    #[test]
    fn what_is_written_reads_back(seed in any::<u64>()) {
        let (problem, data) = random_block(seed);
        let dir = folder("round-trip");
        write_block_file(&dir, &problem, &data).unwrap();
        let block = BlockFile::open(dir.join("block.json"), dir.join("in.safetensors"), Form { kv_dtype: Some(problem.kv_dtype), ..Form::default() }).unwrap();
        prop_assert_eq!(block.problem(), &problem);
        prop_assert_eq!(block.data(), &data);
    }

    #[test]
    fn damaged_files_are_refused_or_read(seed in any::<u64>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let (json, t) = good();
        let (mut json, mut bytes) = (json.to_string().into_bytes(), pack(&t, 0));
        if Random(seed).chance() {
            let i = at.index(json.len());
            json[i] = byte;
        } else {
            let i = at.index(bytes.len().min(1200));
            bytes[i] = byte;
        }
        if let Ok(file) = TensorFile::from_bytes("t", bytes) {
            let _ = BlockFile::parse(&json, &file, Form::default());
        }
    }
}

#[test]
fn what_does_not_fit_is_not_written() {
    let dir = folder("not-written");
    let (problem, data) = random_block(1);
    let short = BlockData { x: Vec::new(), ..data.clone() };
    refused(write_block_file(&dir, &problem, &short), &["'x'"]);
    let mut batch = vec![1; problem.batch.sequences() + 1];
    batch[0] = 2;
    let ragged = BlockProblem { batch: Lengths::ragged(batch.clone(), vec![0; batch.len()]).unwrap(), ..problem.clone() };
    refused(write_block_file(&dir, &ragged, &data), &["same number of new tokens"]);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    std::fs::write(dir.join("file"), b"").unwrap();
    refused(write_block_file(dir.join("file"), &problem, &data), &["file", "cannot be made"]);
}
