//! Weights in int8: the same codes at every level and in every compute dtype, memory, limits, and checkpoints that hold them.

#[allow(dead_code, reason = "other tests use the rest")]
mod files;

use std::{
    fs,
    path::{Path, PathBuf},
};

use files::{folder, refused};
use lawson::{
    Args, AttentionBlock, Batch, BlockProblem, BlockWeights, Checkpoint, Context, ContextOptions, DType, Isa, KvCache, Level,
    Tensor, TensorRef, WeightKind, compute,
    tensor_file::{StoredDType, TensorFile, write_safetensors},
};
use lawson_core::{int8, oracle};
use lawson_testkit::{
    inputs::{Sharpness, data_for},
    rng::Rng,
};
use serde_json::{Value, json};

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn levels_and_instruction_sets_have_the_same_codes() {
    // Without RoPE, norms and a cache in another dtype, k and v are products in int8 to the bit.
    let problem: BlockProblem = "block b=2 s=37 past=5 e=96 h=4/2 d=33 causal bias=kv f32 weights=int8".parse().unwrap();
    let data = data_for(&problem, 5, Sharpness::Ordinary);
    let (e, kv) = (96, 66);
    let want_k = oracle::gemm_int8(&data.x, &data.k_weight, data.k_bias.as_deref(), e);
    for isa in Isa::available() {
        let context = Context::new(ContextOptions { isa: Some(isa), threads: Some(2), ..Default::default() }).unwrap();
        for level in Level::ALL {
            let out = compute(&context, &problem, Some(level), &data).unwrap();
            for (t, row) in want_k.chunks_exact(kv).enumerate() {
                for g in 0..2 {
                    let at = ((t / 37 * 2 + g) * 42 + 5 + t % 37) * 33;
                    assert_eq!(bits(&out.k[at..at + 33]), bits(&row[g * 33..(g + 1) * 33]), "{isa} {level} token {t} head {g}");
                }
            }
        }
    }
}

#[test]
fn the_input_norm_is_rounded_before_it_becomes_codes() {
    // So that levels which norm through memory and those which norm while x is quantised agree to the bit.
    for dtype in ["f32", "bf16", "f16"] {
        let line = format!("block b=1 s=70 e=100 h=4/2 d=16 causal input_norm=1e-6 bias=qkvo residual {dtype} weights=int8");
        let problem: BlockProblem = line.parse().unwrap();
        let data = data_for(&problem, 6, Sharpness::Sharp);
        let context = Context::cpu().unwrap();
        let of = |level| compute(&context, &problem, Some(level), &data).unwrap();
        let (unfused, maximal) = (of(Level::Unfused), of(Level::Maximal));
        assert!(bits(&unfused.k) == bits(&maximal.k) && bits(&unfused.v) == bits(&maximal.v), "{dtype}");
    }
}

#[test]
fn few_and_many_rows_share_their_results() {
    // Each row alone, in decode's shape, and all at once.
    let (k, n) = (300, 70);
    let mut rng = Rng::new(12);
    let (x, w) = (rng.normals(40 * k, 1.0), rng.normals(n * k, 1.0));
    let want = oracle::gemm_int8(&x, &w, None, k);
    let context = Context::cpu().unwrap();
    let view = TensorRef::new(&w, &[n, k]).unwrap();
    let weights = lawson::ops::QkvWeights::int8(&context, &view, &view, &view, DType::F32).unwrap();
    for rows in [1, 2, 3, 5, 8, 16, 40] {
        for first in (0..40).step_by(rows) {
            let rows = rows.min(40 - first);
            let x = TensorRef::new(&x[first * k..(first + rows) * k], &[rows, k]).unwrap();
            let mut out = [0, 1, 2].map(|_| Tensor::from_f32(&vec![f32::NAN; rows * n], DType::F32, &[rows, n]).unwrap());
            let [a, b, c] = &mut out;
            let out_refs = [&mut a.as_mut(), &mut b.as_mut(), &mut c.as_mut()];
            lawson::ops::qkv_projection(&context, &x, &weights, out_refs, true).unwrap();
            for out in &out {
                assert_eq!(bits(&out.to_f32()), bits(&want[first * n..(first + rows) * n]), "{rows} rows from {first}");
            }
        }
    }
}

#[test]
fn weights_keep_their_budget_and_the_plan_knows_them() {
    let context = Context::cpu().unwrap();
    let line = "block b=1 s=1 past=64 e=1024 h=8/2 d=128 causal rope=half input_norm=1e-6 bf16";
    let [plain, int8] = ["", " weights=int8"].map(|w| format!("{line}{w}").parse::<BlockProblem>().unwrap());
    let data = data_for(&plain, 1, Sharpness::Ordinary);
    let build = |p: &BlockProblem| {
        let weights = BlockWeights::from_data(&p.spec, &data).unwrap();
        AttentionBlock::builder(p.spec.clone(), weights).dtype(p.dtype).weights(p.weights).build(&context).unwrap()
    };
    let (bf16, codes) = (build(&plain), build(&int8));
    assert_eq!((bf16.weights(), codes.weights()), (WeightKind::Compute, WeightKind::Int8));
    let share = codes.weight_bytes() as f64 / bf16.weight_bytes() as f64;
    assert!(share <= 0.52, "{share}");
    let plan = |p: &BlockProblem, level| context.plan(p, Some(level)).unwrap();
    for level in Level::ALL {
        let (a, b) = (plan(&plain, level), plan(&int8, level));
        let bytes = |plan: &lawson::BlockPlan| -> f64 {
            plan.steps().filter(|s| s.op.name().contains("projection")).map(|s| s.bytes).sum()
        };
        assert!(a.id() != b.id() && bytes(&b) < 0.55 * bytes(&a), "{level}: {} of {}", bytes(&b), bytes(&a));
        let projections: Vec<&str> = b.steps().filter(|s| s.op.name().contains("projection")).map(|s| &s.kernel[..]).collect();
        assert!(!projections.is_empty() && projections.iter().all(|k| k.starts_with("gemm_int8-")), "{projections:?}");
    }
    assert!(int8.compulsory_bytes() < 0.55 * plain.compulsory_bytes());
    // The kernels of one are not those of the other, though all else is the same.
    let y = |p: &BlockProblem| compute(&context, p, None, &data).unwrap().y;
    assert!(y(&plain) != y(&int8));
}

#[test]
fn an_input_that_is_not_finite_reaches_its_own_token_only() {
    let problem: BlockProblem = "block b=3 s=1 e=64 h=2 d=32 causal residual f32 weights=int8".parse().unwrap();
    let mut data = data_for(&problem, 3, Sharpness::Ordinary);
    data.x[64 + 7] = f32::NAN;
    let out = compute(&Context::cpu().unwrap(), &problem, None, &data).unwrap();
    for (t, row) in out.y.chunks_exact(64).enumerate() {
        assert!(row.iter().all(|y| y.is_nan() == (t == 1)), "token {t}: {row:?}");
    }
    // An output whose weights are not finite is lost for all tokens, and no other.
    let mut data = data_for(&problem, 3, Sharpness::Ordinary);
    data.o_weight[9 * 64] = f32::INFINITY;
    let out = compute(&Context::cpu().unwrap(), &problem, None, &data).unwrap();
    assert!(out.y.chunks_exact(64).all(|row| row.iter().enumerate().all(|(i, y)| y.is_nan() == (i == 9))));
}

#[test]
fn too_many_inputs_are_refused() {
    let line = format!("block b=1 s=1 e={} h=1 d=8 f32", int8::MOST_INPUTS + 1);
    assert!(line.parse::<BlockProblem>().is_ok());
    refused(format!("{line} weights=int8").parse::<BlockProblem>(), &["131072", "131073"]);
}

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny-rust-llama")
}

/// Layer 3 of a checkpoint with its norm, over some tokens in a cache of int8.
fn layer_of(context: &Context, checkpoint: &Checkpoint, kind: Option<WeightKind>) -> Vec<u32> {
    let block = match kind {
        None => AttentionBlock::from_checkpoint(context, checkpoint, 3, true).unwrap(),
        Some(kind) => {
            let weights = checkpoint.weights(3, true).unwrap();
            let builder = AttentionBlock::builder(checkpoint.block_spec(3, true).unwrap(), weights.as_ref());
            builder.weights(kind).build(context).unwrap()
        }
    };
    let x = Tensor::from_f32(&Rng::new(2).normals(40 * 256, 1.0), block.dtype(), &[40, 256]).unwrap();
    let mut cache = KvCache::new(context, &block.spec().attention, 1, 1, 40, lawson::CacheDType::INT8).unwrap();
    let (batch, mut y) = (Batch::uniform(1, 40).unwrap(), Tensor::zeros(block.dtype(), &[40, 256]).unwrap());
    block.forward(Args { x: x.as_ref(), batch: &batch, mask: None, cache: cache.layer(0), y: y.as_mut() }).unwrap();
    assert_eq!((block.dtype(), block.weights()), (DType::BF16, WeightKind::Int8));
    bits(&y.to_f32())
}

#[test]
fn a_quantised_checkpoint_computes_the_same_bits() {
    let out = folder("quantised").join("out");
    let checkpoint = Checkpoint::open(model()).unwrap();
    let report = checkpoint.quantise(&out).unwrap();
    assert_eq!((report.matrices, report.bytes_before), (24, 6 * 2 * 256 * 768));
    assert_eq!(report.bytes_after, 6 * (256 * 768 + 4 * (256 + 128 + 128 + 256)));
    let context = Context::cpu().unwrap();
    let read = Checkpoint::open(&out).unwrap();
    assert_eq!((checkpoint.weight_kind(), read.weight_kind()), (WeightKind::Compute, WeightKind::Int8));
    let want = layer_of(&context, &checkpoint, Some(WeightKind::Int8));
    assert!(layer_of(&context, &read, None) == want);
    // The codes are those of the definition, and what is no projection is as it was.
    let (was, is) =
        (TensorFile::open(model().join("model.safetensors")).unwrap(), TensorFile::open(out.join("model.safetensors")).unwrap());
    for name in was.names() {
        if !name.contains("self_attn") {
            assert_eq!(is.raw(name).unwrap(), was.raw(name).unwrap(), "{name}");
            continue;
        }
        let weight = was.tensor(name).unwrap();
        let (&[n, k], values) = (weight.shape(), weight.as_ref().to_f32()) else { panic!("{name}") };
        let (dtype, shape, codes) = is.raw(name).unwrap();
        assert_eq!((dtype, shape), (StoredDType::I8, &[n, k][..]));
        let scales = is.tensor(&format!("{name}_scale")).unwrap().as_ref().to_f32();
        let mut row = vec![0i8; k];
        for i in 0..n {
            assert_eq!(int8::quantise(&values[i * k..(i + 1) * k], &mut row), scales[i], "{name} {i}");
            assert!(row.iter().zip(&codes[i * k..]).all(|(a, b)| *a as u8 == *b), "{name} {i}");
        }
    }
    assert_eq!(fs::read(out.join("config.json")).unwrap(), fs::read(model().join("config.json")).unwrap());
    let said: Value = serde_json::from_slice(&fs::read(out.join("lawson.json")).unwrap()).unwrap();
    assert_eq!(said, json!({"format": "lawson-weights", "version": 1, "weights": "int8", "dtypes": vec!["bf16"; 6]}));
    // Nothing but the folder was left behind.
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1);
    refused(read.quantise(out.with_file_name("again")), &["int8 already"]);
    refused(checkpoint.quantise(&out), &["out", "not empty"]);
    fs::create_dir(out.with_file_name("empty")).unwrap();
    checkpoint.quantise(out.with_file_name("empty")).unwrap();
    refused(checkpoint.quantise(out.with_file_name("none").join("out")), &["cannot be written"]);
}

#[test]
fn a_checkpoint_of_several_files_is_quantised_file_by_file() {
    let dir = folder("sharded");
    let whole = TensorFile::open(model().join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (i, file) in ["a.safetensors", "b.safetensors"].into_iter().enumerate() {
        let names: Vec<&str> = whole.names().enumerate().filter(|(j, _)| j % 2 == i).map(|(_, n)| n).collect();
        let tensors: Vec<_> = names.iter().map(|n| (n, whole.raw(n).unwrap())).map(|(n, (d, s, b))| (*n, d, s, b)).collect();
        write_safetensors(dir.join(file), &tensors).unwrap();
        names.iter().for_each(|n| drop(map.insert((*n).to_owned(), json!(file))));
    }
    fs::write(dir.join("model.safetensors.index.json"), json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    fs::copy(model().join("config.json"), dir.join("config.json")).unwrap();
    let out = folder("sharded-out").join("out");
    Checkpoint::open(&dir).unwrap().quantise(&out).unwrap();
    let context = Context::cpu().unwrap();
    let want = layer_of(&context, &Checkpoint::open(model()).unwrap(), Some(WeightKind::Int8));
    assert!(layer_of(&context, &Checkpoint::open(&out).unwrap(), None) == want);
    assert!(out.join("a.safetensors").exists() && out.join("b.safetensors").exists() && !out.join("model.safetensors").exists());
}

#[test]
fn bad_quantised_checkpoints_are_refused() {
    let out = folder("bad").join("out");
    Checkpoint::open(model()).unwrap().quantise(&out).unwrap();
    let good = fs::read(out.join("lawson.json")).unwrap();
    let said: Value = serde_json::from_slice(&good).unwrap();
    for (key, value, parts) in [
        ("version", json!(2), &["lawson.json", "version 2", "newer", "accepted: 1"][..]),
        ("version", json!(0), &["version must be 1"]),
        ("version", json!("1"), &["version"]),
        ("version", Value::Null, &["version"]),
        ("format", json!("other"), &["\"other\"", "lawson-weights"]),
        ("weights", json!("int3"), &["\"int3\"", "int8"]),
        ("dtypes", json!(["bf16"]), &["all 6 layers", "got 1"]),
        ("dtypes", json!(["int2", "bf16", "bf16", "bf16", "bf16", "bf16"]), &["dtypes", "'int2'"]),
        ("more", json!(1), &["more"]),
    ] {
        let mut bad = said.clone();
        bad[key] = value;
        fs::write(out.join("lawson.json"), bad.to_string()).unwrap();
        refused(Checkpoint::open(&out), parts);
    }
    fs::write(out.join("lawson.json"), "{").unwrap();
    refused(Checkpoint::open(&out), &["lawson.json"]);
    // Without the description its codes are no weights.
    fs::remove_file(out.join("lawson.json")).unwrap();
    refused(Checkpoint::open(&out).unwrap().weights(3, true), &["self_attn.q_proj.weight", "must be F32, BF16 or F16"]);
    fs::write(out.join("lawson.json"), &good).unwrap();

    let file = out.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let name = "model.layers.3.self_attn.k_proj.weight";
    let scales = format!("{name}_scale");
    type Bend<'a> = &'a dyn Fn(&str, StoredDType, &mut Vec<usize>, &mut Vec<u8>) -> Option<StoredDType>;
    let tamper = |bend: Bend<'_>, parts: &[&str]| {
        let all = TensorFile::from_bytes("model.safetensors", bytes.clone()).unwrap();
        let mut kept: Vec<(String, StoredDType, Vec<usize>, Vec<u8>)> = Vec::new();
        for n in all.names() {
            let (dtype, shape, bytes) = all.raw(n).unwrap();
            let (mut shape, mut bytes) = (shape.to_vec(), bytes.to_vec());
            if let Some(dtype) = bend(n, dtype, &mut shape, &mut bytes) {
                kept.push((n.to_owned(), dtype, shape, bytes));
            }
        }
        let tensors: Vec<_> = kept.iter().map(|(n, d, s, b)| (&n[..], *d, &s[..], &b[..])).collect();
        fs::remove_file(&file).unwrap();
        write_safetensors(&file, &tensors).unwrap();
        let open = Checkpoint::open(&out).unwrap();
        refused(open.weights(3, true), parts);
        assert!(open.weights(2, true).is_ok());
    };
    tamper(&|n, d, _, _| (n != scales).then_some(d), &[&scales, "scales", "missing"]);
    tamper(&|n, d, _, _| (n != name).then_some(d), &[name, "missing"]);
    let cut = |n: &str, d: StoredDType, s: &mut Vec<usize>, b: &mut Vec<u8>| {
        if n == scales {
            s[0] = 127;
            b.truncate(4 * 127);
        }
        Some(d)
    };
    tamper(&cut, &[&scales, "[127]", "[128]"]);
    let turned = |n: &str, d: StoredDType, s: &mut Vec<usize>, _: &mut Vec<u8>| {
        if n == name {
            s.reverse();
        }
        Some(d)
    };
    tamper(&turned, &[name, "[256, 128]", "[128, 256]"]);
    let other = |n: &str, d: StoredDType, _: &mut Vec<usize>, _: &mut Vec<u8>| Some(if n == name { StoredDType::U8 } else { d });
    tamper(&other, &[name, "must be I8", "U8"]);
    for scale in [f32::INFINITY, -1.0, 0.1, 0.0] {
        let bad = |n: &str, d: StoredDType, _: &mut Vec<usize>, b: &mut Vec<u8>| {
            if n == scales {
                b[8..12].copy_from_slice(&scale.to_le_bytes());
            }
            Some(d)
        };
        tamper(&bad, &[name, "row 2"]);
    }
    let least = |n: &str, d: StoredDType, _: &mut Vec<usize>, b: &mut Vec<u8>| {
        if n == name {
            b[5 * 256 + 1] = 0x80;
        }
        Some(d)
    };
    tamper(&least, &[name, "row 5", "reach 127"]);
}
