//! `lawson run` in every form: what it computes is right, what it refuses it names.

mod program;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use lawson::{
    DType,
    tensor_file::{StoredDType, TensorFile, write_safetensors},
};
use lawson_core::compare::{Policy, compare};
use program::{folder, json, refused, stdout};
use serde_json::{Value, json};

const LEVELS: [&str; 4] = ["unfused", "minimal", "moderate", "maximal"];
/// B 2, S 3, P 4, E 12, H 4, G 2, D 6, with everything that has a tensor of its own.
const PROBLEM: &str =
    "block b=2 s=3 past=4,2 e=12 h=4/2 d=6 causal sinks alibi mask qk_norm=1e-6 input_norm=1e-6 bias=qkvo rope=half f32";

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lawson/tests/data").join(name)
}

/// A command line of words and paths.
macro_rules! line {
    ($($part:expr),* $(,)?) => { [$(OsString::from($part)),*] };
}

fn open(path: impl AsRef<Path>) -> TensorFile {
    TensorFile::open(path).unwrap_or_else(|e| panic!("{e}"))
}

fn floats(file: &TensorFile, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap_or_else(|e| panic!("{e}")).as_ref().to_f32()
}

/// Distance of two tensors relative to the second.
fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut want.iter().map(|&v| f64::from(v)))
}

/// Name, shape and numbers of f32 tensors.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let stored: Vec<_> = tensors.iter().map(|(name, (shape, values))| (name, shape, bytes(values))).collect();
    let entries: Vec<_> = stored.iter().map(|(n, shape, b)| (n.as_str(), StoredDType::F32, &shape[..], &b[..])).collect();
    write_safetensors(path, &entries).unwrap_or_else(|e| panic!("{e}"));
}

fn one_tensor(name: &str, shape: &[usize], values: Vec<f32>) -> Tensors {
    Tensors::from([(name.to_string(), (shape.to_vec(), values))])
}

#[test]
fn block_files_are_right_at_every_level() {
    let dir = folder("blocks");
    let mut seen = 0;
    for case in fs::read_dir(data("blocks")).expect("the cases are there") {
        let case = case.expect("a case").path();
        for level in LEVELS {
            let out = dir.join("out.safetensors");
            let (block, tensors) = (case.join("block.json"), case.join("in.safetensors"));
            stdout(&line!["run", "--block", block, "--tensors", tensors, "--out", &out, "--fusion", level, "--dtype", "f32"]);
            let (got, want) = (open(&out), open(case.join("want.safetensors")));
            for name in ["y", "k", "v"] {
                let shape = want.shape(name).expect("the case has it");
                assert_eq!(got.shape(name).expect("it was written"), shape, "{} {level} {name}", case.display());
                let want = want.doubles(name).expect("the case holds doubles");
                let width = shape.last().copied().unwrap_or(1);
                let found = compare(Policy::Relative(5e-6), &floats(&got, name), &want, width);
                assert!(found.ok, "{} {level} {name}: {found}", case.display());
            }
            seen += 1;
        }
    }
    assert!(seen >= 80, "{seen} runs");
}

#[test]
fn a_layer_of_a_checkpoint_matches_transformers() {
    let dir = folder("checkpoint");
    let (model, golden) = (data("tiny-rust-llama"), open(data("tiny-rust-llama").join("golden.safetensors")));
    let (input, out) = (dir.join("x.safetensors"), dir.join("out.safetensors"));
    write_tensors(&input, &one_tensor("x", &[2, 40, 256], floats(&golden, "layer3.attn_in")));
    for level in LEVELS {
        let args = line!["run", "--checkpoint", &model, "--layer", "3", "--tensors", &input, "--out", &out, "--fusion", level];
        stdout(&args);
        let error = error(&floats(&open(&out), "y"), &floats(&golden, "layer3.attn_out"));
        assert!(error <= 3e-6, "{level}: {error:.2e}");
    }

    // With its norm and residual: y = x + attention(RMSNorm(x)).
    let weights = floats(&open(model.join("model.safetensors")), "model.layers.3.input_layernorm.weight");
    let x: Vec<f32> = (0..3 * 256).map(|i| ((i * i % 1009) as f32 - 500.0) / 100.0).collect();
    let normed = x.chunks(256).flat_map(|row| {
        let mean = row.iter().map(|v| f64::from(v * v)).sum::<f64>() / 256.0;
        row.iter().zip(&weights).map(move |(v, w)| (f64::from(*v) / (mean + 1e-5).sqrt() * f64::from(*w)) as f32)
    });
    let run = |values: Vec<f32>, with_norm: &[&str]| {
        write_tensors(&input, &one_tensor("x", &[1, 3, 256], values));
        let args = line!["run", "--checkpoint", &model, "--layer", "3", "--tensors", &input, "--out", &out];
        stdout(&args.into_iter().chain(with_norm.iter().map(OsString::from)).collect::<Vec<_>>());
        floats(&open(&out), "y")
    };
    let mut want = run(normed.collect(), &[]);
    want.iter_mut().zip(&x).for_each(|(y, x)| *y += x);
    assert!(error(&run(x, &["--with-norm"]), &want) <= 3e-6);
}

#[test]
fn a_checkpoint_takes_past_lengths_and_mask() {
    let dir = folder("checkpoint-past");
    let (model, input, out) = (data("tiny-rust-llama"), dir.join("x.safetensors"), dir.join("out.safetensors"));
    let lengths: Vec<u8> = [2i64, 4].iter().flat_map(|v| v.to_le_bytes()).collect();
    let (x, past) = (bytes(&vec![0.5; 2 * 256]), bytes(&vec![0.25; 2 * 2 * 4 * 64]));
    let entries: [(&str, StoredDType, &[usize], &[u8]); 5] = [
        ("x", StoredDType::F32, &[2, 1, 256], &x),
        ("past_k", StoredDType::F32, &[2, 2, 4, 64], &past),
        ("past_v", StoredDType::F32, &[2, 2, 4, 64], &past),
        ("lengths", StoredDType::I64, &[2], &lengths),
        ("mask", StoredDType::U8, &[1, 1, 1, 5], &[1, 1, 0, 0, 1]),
    ];
    write_safetensors(&input, &entries).unwrap_or_else(|e| panic!("{e}"));
    let said = json(&line!["run", "--checkpoint", &model, "--layer", "0", "--tensors", &input, "--out", &out]);
    assert!(said["problem"].as_str().is_some_and(|p| p.contains("past=2,4") && p.contains("mask")), "{said}");
    assert_eq!(open(&out).shape("k").expect("k was written"), [2, 2, 5, 64]);

    write_tensors(&input, &one_tensor("q_proj.weight", &[1], vec![0.0]));
    refused(&line!["run", "--checkpoint", &model, "--layer", "0", "--tensors", &input, "--out", &out], &["'x'", "missing"]);
}

#[test]
fn a_problem_becomes_a_block_file() {
    let dir = folder("problem");
    let make = |name: &str, seed: &str| {
        let said = stdout(&line!["run", "--problem", PROBLEM, "--seed", seed, "--write", dir.join(name)]);
        assert!(said.contains("block.json"), "{said}");
        fs::read(dir.join(name).join("in.safetensors")).expect("the input was written")
    };
    assert_eq!(make("a", "7"), make("b", "7"));
    assert_ne!(make("a", "7"), make("c", "8"));

    // Run at once, and run from what was written.
    let (direct, read, case) = (dir.join("direct.safetensors"), dir.join("read.safetensors"), dir.join("d"));
    let said =
        json(&line!["run", "--problem", PROBLEM, "--seed", "7", "--write", &case, "--out", &direct, "--fusion", "maximal"]);
    assert_eq!(said["problem"], PROBLEM.replace("1e-6", "0.000001"), "{said}");
    assert_eq!((&said["level"], &said["seed"]), (&json!("maximal"), &json!(7)));
    assert_eq!((&said["written"], &said["out"]), (&json!(case), &json!(direct)));
    let (block, tensors) = (case.join("block.json"), case.join("in.safetensors"));
    stdout(&line!["run", "--block", block, "--tensors", tensors, "--out", &read, "--fusion", "maximal"]);
    assert_eq!(fs::read(&direct).expect("an output"), fs::read(&read).expect("an output"));
    let y = floats(&open(&read), "y");
    assert!(y.iter().all(|v| v.is_finite()) && y.iter().any(|v| v.abs() > 0.1), "{y:?}");
}

#[test]
fn a_problem_runs_without_being_written() {
    let dir = folder("direct");
    for dtype in ["auto", "f32"] {
        let [kept, direct] = ["kept", "direct"].map(|n| dir.join(n));
        let problem = PROBLEM.replace("f32", "bf16");
        let line = line!["run", "--problem", problem, "--seed", "3", "--dtype", dtype, "--out"];
        stdout(&[&line[..], &line![&direct]].concat());
        stdout(&[&line[..], &line![&kept, "--write", dir.join("case")]].concat());
        let (block, tensors) = (dir.join("case/block.json"), dir.join("case/in.safetensors"));
        assert_eq!(fs::read(&direct).expect("an output"), fs::read(&kept).expect("an output"));
        stdout(&line!["run", "--block", block, "--tensors", tensors, "--dtype", dtype, "--out", &kept]);
        assert_eq!(fs::read(&direct).expect("an output"), fs::read(&kept).expect("an output"));
    }
}

#[test]
fn an_output_never_replaces_an_input() {
    let case = Case::new("in-place");
    let read = || ["block.json", "in.safetensors"].map(|n| fs::read(case.dir.join(n)).expect("an input"));
    let before = read();
    let mut outs = vec![
        case.dir.join("block.json"),
        case.dir.join("in.safetensors"),
        case.dir.join("../").join(case.dir.file_name().expect("a name")).join("in.safetensors"),
    ];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(case.dir.join("in.safetensors"), case.dir.join("soft")).expect("a link can be made");
        fs::hard_link(case.dir.join("in.safetensors"), case.dir.join("hard")).expect("a link can be made");
        outs.extend([case.dir.join("soft"), case.dir.join("hard")]);
    }
    for out in outs {
        let mut line = case.line();
        line[6] = out.into();
        refused(&line, &["--out", "overwrite"]);
    }
    let (write, out) = (case.dir.clone(), case.dir.join("in.safetensors"));
    refused(&line!["run", "--problem", PROBLEM, "--write", write, "--out", out], &["--out", "overwrite"]);
    assert_eq!(read(), before);
}

#[test]
fn a_quantised_cache_comes_back_in_f32() {
    let dir = folder("quantised");
    let (case, out) = (dir.join("case"), dir.join("out.safetensors"));
    stdout(&line!["run", "--problem", PROBLEM.replace("f32", "bf16"), "--write", &case]);
    let (block, tensors) = (case.join("block.json"), case.join("in.safetensors"));
    for kind in ["int8", "int4"] {
        let said =
            json(&line!["run", "--block", &block, "--tensors", &tensors, "--out", &out, "--device", "cpu", "--kv-dtype", kind]);
        assert!(said["problem"].as_str().is_some_and(|p| p.ends_with(&format!("bf16 kv={kind}"))), "{said}");
        let stored = |name| open(&out).stored_dtype(name).map(|d| d.to_string());
        assert_eq!(["y", "k", "v"].map(stored), ["BF16", "F32", "F32"].map(|d| Some(d.to_string())));
        assert!(floats(&open(&out), "y").iter().all(|v| v.is_finite()));
    }
}

#[test]
fn weights_in_int8_come_from_a_flag_a_line_or_a_quantised_checkpoint() {
    let dir = folder("int8-weights");
    let (model, quantised) = (data("tiny-rust-llama"), dir.join("int8"));
    let said = json(&line!["quantise", &model, &quantised]);
    assert_eq!((&said["layers"], &said["matrices"]), (&6.into(), &24.into()), "{said}");
    assert!(said["bytes_after"].as_f64() <= said["bytes_before"].as_f64().map(|b| 0.52 * b), "{said}");
    let before = fs::read(quantised.join("model.safetensors")).expect("the model");
    refused(&line!["quantise", &model, &quantised], &["int8", "not empty"]);
    refused(&line!["quantise", &model, dir.join("gpu"), "--device", "cuda"], &["--device cuda:0", "accepted: auto, cpu"]);
    refused(&line!["quantise", &quantised, dir.join("again")], &["int8 already"]);
    refused(&line!["quantise", dir.join("nothing"), dir.join("again")], &["config.json"]);
    assert!(!dir.join("again").exists() && fs::read(quantised.join("model.safetensors")).expect("the model") == before);

    let input = dir.join("x.safetensors");
    write_tensors(
        &input,
        &one_tensor("x", &[1, 9, 256], (0..9 * 256).map(|i| ((i * i % 1009) as f32 - 500.0) / 100.0).collect()),
    );
    let run = |checkpoint: &Path, more: &[&str]| {
        let out = dir.join("out.safetensors");
        let args = line!["run", "--checkpoint", checkpoint, "--layer", "3", "--tensors", &input, "--out", &out, "--with-norm"];
        let said = json(&args.into_iter().chain(more.iter().map(OsString::from)).collect::<Vec<_>>());
        (said["problem"].as_str().expect("a line").to_owned(), fs::read(&out).expect("an output"))
    };
    let cpu = ["--device", "cpu"];
    for dtype in ["f32", "bf16"] {
        let more = |own: &[&'static str]| [&cpu[..], &["--dtype", dtype], own].concat();
        let (problem, want) = run(&model, &more(&["--weights", "int8"]));
        assert!(problem.contains(" weights=int8"), "{problem}");
        assert!(run(&quantised, &more(&[])) == (problem, want.clone()), "{dtype}");
        assert!(run(&model, &more(&[])).1 != want);
    }
    // In the problem's line and as a flag.
    let out = dir.join("y.safetensors");
    let line = |line: &str, more: &[&str]| {
        let args = line!["run", "--problem", line, "--out", &out, "--device", "cpu"];
        let said = json(&args.into_iter().chain(more.iter().map(OsString::from)).collect::<Vec<_>>());
        (said["problem"].clone(), fs::read(&out).expect("an output"))
    };
    let of_line = line(&format!("{PROBLEM} weights=int8"), &[]);
    assert!(line(PROBLEM, &["--weights", "int8"]) == of_line && line(PROBLEM, &[]) != of_line);
    // What was written with random numbers is read back to the same codes.
    let case = dir.join("case");
    stdout(&line!["run", "--problem", PROBLEM, "--weights", "int8", "--write", &case]);
    let (block, tensors) = (case.join("block.json"), case.join("in.safetensors"));
    stdout(&line!["run", "--block", &block, "--tensors", &tensors, "--weights", "int8", "--device", "cpu", "--out", &out]);
    assert!(fs::read(&out).expect("an output") == of_line.1);
}

#[test]
fn dtypes_are_as_asked() {
    let dir = folder("dtypes");
    let (case, out) = (dir.join("case"), dir.join("out.safetensors"));
    stdout(&line!["run", "--problem", PROBLEM.replace("f32", "f16 kv=bf16"), "--write", &case]);
    let (block, tensors) = (case.join("block.json"), case.join("in.safetensors"));
    let run = |more: &[&str]| {
        let args = line!["run", "--block", &block, "--tensors", &tensors, "--out", &out];
        let said = json(&args.into_iter().chain(more.iter().map(OsString::from)).collect::<Vec<_>>());
        (said["problem"].as_str().expect("a line").to_string(), open(&out).stored_dtype("y").map(|d| d.to_string()))
    };
    let (problem, y) = run(&[]);
    assert!(problem.contains(" f16") && !problem.contains("kv="), "{problem}");
    assert_eq!(y.as_deref(), Some("F16"));
    for dtype in DType::ALL {
        let (problem, y) = run(&["--dtype", dtype.name(), "--kv-dtype", "bf16", "--weights", "auto"]);
        assert!(problem.contains(&format!(" {dtype}")), "{problem}");
        assert_eq!(problem.contains("kv=bf16"), dtype != DType::BF16, "{problem}");
        assert_eq!(y, Some(dtype.name().to_uppercase()));
    }
    // Flags and words of the problem say the same.
    for (problem, flags) in [("f16 kv=bf16", &[][..]), ("f32", &["--dtype", "f16", "--kv-dtype", "bf16"])] {
        let line = line!["run", "--problem", PROBLEM.replace("f32", problem), "--write", &case, "--out", &out];
        let said = json(&line.into_iter().chain(flags.iter().map(OsString::from)).collect::<Vec<_>>());
        assert!(said["problem"].as_str().is_some_and(|p| p.ends_with("f16 kv=bf16")), "{said}");
        let [x, y] = [(&tensors, "x"), (&out, "y")].map(|(path, name)| open(path).stored_dtype(name).map(|d| d.to_string()));
        assert_eq!((x.as_deref(), y.as_deref()), (Some("F16"), Some("F16")), "{problem}");
    }
}

#[test]
fn the_summary_says_what_ran() {
    let dir = folder("summary");
    let (case, out) = (dir.join("case"), dir.join("out.safetensors"));
    let said = stdout(&line!["run", "--problem", PROBLEM, "--write", &case, "--out", &out]);
    for part in
        ["block b=2 s=3", "\non ", " level ", "plan ", " steps, ", " GEMMs, ", "for one call", "of memory predicted", "wrote "]
    {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    for level in LEVELS {
        let (block, tensors) = (case.join("block.json"), case.join("in.safetensors"));
        let said = json(&line!["run", "--block", block, "--tensors", tensors, "--out", &out, "--fusion", level]);
        assert_eq!(said["level"], level);
        let on_cpu = said["device"] == "cpu" && said["threads"].as_u64().is_some_and(|n| n > 0);
        assert!((on_cpu || said["device"] == "cuda:0") && said["isa"].as_str().is_some_and(|isa| !isa.is_empty()), "{said}");
        let steps = said["steps"].as_array().expect("a list");
        assert!(
            steps.iter().all(|s| s["ms"].as_f64().is_some_and(|ms| ms >= 0.0) && s["op"].is_string() && s["kernel"].is_string())
        );
        assert!(said["ms"].as_f64().is_some_and(|ms| ms > 0.0) && said["peak_bytes"].as_u64().is_some_and(|n| n > 0), "{said}");
        assert!(said["plan"].as_str().is_some_and(|p| p.starts_with(level)), "{said}");
    }
}

#[test]
fn where_it_ran_and_what_it_replaced_is_said() {
    let dir = folder("replaced");
    let (case, out) = (dir.join("case"), dir.join("out.safetensors"));
    let line = line!["run", "--problem", PROBLEM, "--write", &case, "--out", &out, "--device", "cpu", "--threads", "2"];
    let first = stdout(&line);
    assert!(first.contains("on cpu (") && first.contains(", 2 threads), level "), "{first}");
    assert_eq!((first.matches("\nwrote ").count(), first.matches("\nreplaced ").count()), (2, 0), "{first}");
    let second = stdout(&line);
    assert_eq!((second.matches("\nwrote ").count(), second.matches("\nreplaced ").count()), (0, 2), "{second}");
    let said = json(&line);
    assert_eq!((&said["written_replaced"], &said["out_replaced"]), (&json!(true), &json!(true)), "{said}");
    assert_eq!((&said["device"], &said["threads"], &said["fallback"]), (&json!("cpu"), &json!(2), &Value::Null), "{said}");
}

#[test]
fn outputs_that_are_no_files_are_refused() {
    let dir = folder("no-file");
    let refuse = |flag: &str, path: &Path, parts: &[&str]| {
        refused(&line!["run", "--problem", PROBLEM, flag, path], &[&[flag, &path.to_string_lossy()], parts].concat());
    };
    refuse("--out", &dir, &["it is a folder", "accepted: the name of a file"]);
    refuse("--out", &dir.join("none/out.safetensors"), &["there is no folder", "none"]);
    #[cfg(unix)]
    refuse("--out", Path::new("/dev/null"), &["not a regular file", "accepted: the name of a file"]);
    fs::write(dir.join("file"), "").expect("a file can be written");
    refuse("--write", &dir.join("file"), &["not a folder", "accepted: a folder"]);
    let negative = line!["run", "--problem", PROBLEM, "--write", dir.join("case"), "--seed", "-1"];
    refused(&negative, &["--seed", "'-1'", "0 or greater"]);
}

/// A block file to be spoilt, and what is needed to see that nothing was written.
struct Case {
    dir: PathBuf,
    block: Value,
    tensors: Tensors,
}

impl Case {
    fn new(name: &str) -> Self {
        let dir = folder(name);
        stdout(&line!["run", "--problem", PROBLEM, "--write", &dir]);
        let block = serde_json::from_slice(&fs::read(dir.join("block.json")).expect("it was written")).expect("JSON");
        let file = open(dir.join("in.safetensors"));
        let float = |n: &&str| file.stored_dtype(n) == Some(StoredDType::F32);
        let tensors =
            file.names().filter(float).map(|n| (n.to_string(), (file.shape(n).expect("a shape").to_vec(), floats(&file, n))));
        Case { block, tensors: tensors.collect(), dir }
    }

    fn line(&self) -> [OsString; 7] {
        let [block, tensors, out] = ["block.json", "in.safetensors", "out.safetensors"].map(|n| self.dir.join(n));
        line!["run", "--block", block, "--tensors", tensors, "--out", out]
    }

    fn write(&self, block: &Value, tensors: &Tensors) {
        fs::write(self.dir.join("block.json"), block.to_string()).expect("the block can be written");
        write_tensors(&self.dir.join("in.safetensors"), tensors);
    }

    /// Asserts that the files as they are now are refused and that no file is added.
    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        refused(&self.line(), parts);
        let mut names: Vec<_> = fs::read_dir(&self.dir).expect("a folder").map(|f| f.expect("a file").file_name()).collect();
        names.sort();
        assert_eq!(names, ["block.json", "in.safetensors"], "{parts:?}");
    }
}

#[test]
fn wrong_blocks_and_tensors_are_named() {
    let case = Case::new("wrong");
    case.write(&case.block, &case.tensors);
    let keys: [(&str, Value, &[&str]); 8] = [
        ("hidden_sise", json!(12), &["block.json", "unknown key 'hidden_sise'"]),
        ("hidden_size", Value::Null, &["hidden_size", "missing"]),
        ("hidden_size", json!("12"), &["hidden_size", "integer"]),
        ("num_key_value_heads", json!(3), &["num_attention_heads (4)", "num_key_value_heads (3)"]),
        ("head_dim", json!(1u64 << 60), &["head_dim"]),
        ("rope", json!({"rotary_dim": 3}), &["rotary_dim", "3"]),
        ("rope", json!({"scaling": {"rope_type": "spiral"}}), &["rope_type", "spiral"]),
        ("sinks", json!(false), &["in.safetensors", "'sinks'"]),
    ];
    for (key, value, parts) in keys {
        let mut block = case.block.clone();
        block[key] = value;
        case.write(&block, &case.tensors);
        case.refused(parts);
    }

    let spoilt = |change: &dyn Fn(&mut Tensors), parts: &[&str]| {
        let mut tensors = case.tensors.clone();
        change(&mut tensors);
        case.write(&case.block, &tensors);
        case.refused(parts);
    };
    spoilt(&|t| drop(t.remove("x")), &["in.safetensors", "'x'", "missing"]);
    spoilt(&|t| drop(t.remove("o_proj.weight")), &["'o_proj.weight'", "missing"]);
    spoilt(&|t| drop(t.remove("past_v")), &["'past_v'", "missing"]);
    spoilt(&|t| drop(t.insert("z".into(), (vec![1], vec![0.0]))), &["unknown tensor 'z'"]);
    spoilt(&|t| drop(t.insert("x".into(), (vec![2, 3, 1], vec![0.0; 6]))), &["'x'", "[2, 3, 1]"]);
    spoilt(&|t| drop(t.insert("lengths".into(), (vec![2], vec![0.0; 2]))), &["'lengths'", "I64 or I32", "F32"]);
}

#[test]
fn damaged_files_are_named() {
    let case = Case::new("damaged");
    let (block, tensors) = (case.dir.join("block.json"), case.dir.join("in.safetensors"));
    let whole = fs::read(&tensors).expect("the tensors");
    let header = u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
    let text = |from: &str, to: &str| {
        let head = String::from_utf8(whole[8..8 + header].to_vec()).expect("a JSON header").replacen(from, to, 1);
        [&(head.len() as u64).to_le_bytes(), head.as_bytes(), &whole[8 + header..]].concat()
    };
    let files: [(Vec<u8>, &[&str]); 9] = [
        (Vec::new(), &["not a safetensors file"]),
        (b"PK\x03\x04 is not this format, though it is long enough".to_vec(), &["not a safetensors file"]),
        ([&u64::MAX.to_le_bytes()[..], &whole[8..]].concat(), &["not a safetensors file", "header"]),
        ([&(1u64 << 26).to_le_bytes()[..], &whole[8..]].concat(), &["truncated"]),
        (whole[..whole.len() - 1].to_vec(), &["truncated"]),
        (whole[..5].to_vec(), &["5 bytes"]),
        ([&whole[..], b"more"].concat(), &["4 bytes after the last tensor"]),
        (text("\"F32\"", "\"I32\""), &["must be F32, BF16 or F16, got I32"]),
        (text("[2,3,12]", "[18446744073709551615,3,12]"), &["'x'", "overflows"]),
    ];
    for (file, parts) in files {
        fs::write(&tensors, file).expect("the tensors can be written");
        case.refused(&[&["in.safetensors"], parts].concat());
    }
    fs::write(&tensors, &whole).expect("the tensors can be written");

    for values in [[1000i64, 4], [4, -1]] {
        let lengths: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let kept: Vec<_> = case.tensors.iter().map(|(name, (shape, values))| (name, shape, bytes(values))).collect();
        let mut entries: Vec<_> = kept.iter().map(|(n, shape, b)| (n.as_str(), StoredDType::F32, &shape[..], &b[..])).collect();
        entries.push(("lengths", StoredDType::I64, &[2], &lengths));
        write_safetensors(&tensors, &entries).unwrap_or_else(|e| panic!("{e}"));
        case.refused(&["'lengths'", "between 0 and P ="]);
    }

    fs::write(&block, "{\"hidden_size\": NaN}").expect("the block can be written");
    case.refused(&["block.json"]);
    fs::write(&block, "{").expect("the block can be written");
    case.refused(&["block.json"]);
    fs::remove_file(&block).expect("the block was there");
    refused(&case.line(), &["block.json", "cannot be read"]);
}

#[test]
fn outputs_that_cannot_be_written_are_found_out_first() {
    let case = Case::new("unwritable");
    let with_out = |out: &Path| {
        let mut line = case.line();
        line[6] = out.into();
        line
    };
    // Refused before the input is looked at, which is wrong as well.
    fs::write(case.dir.join("block.json"), "{").expect("the block can be written");
    refused(&with_out(&case.dir.join("no/such/out")), &["--out", "no/such/out", "cannot be written"]);
    refused(&with_out(&case.dir), &["--out", "cannot be written", "it is a folder"]);
    refused(&with_out(&case.dir.join("..")), &["--out", "cannot be written"]);
    refused(&with_out(&case.dir.join("block.json/out")), &["--out", "cannot be written"]);
    let written = case.dir.join("made");
    let out = case.dir.join("no/such/out");
    refused(&line!["run", "--problem", PROBLEM, "--write", &written, "--out", out], &["--out", "cannot be written"]);
    assert!(!written.exists());
    refused(
        &line!["run", "--problem", PROBLEM, "--write", case.dir.join("block.json")],
        &["--write", "block.json", "cannot be made"],
    );
}

#[test]
fn wrong_flags_are_named() {
    let case = Case::new("flags");
    let and = |more: &[&str]| case.line().into_iter().chain(more.iter().map(OsString::from)).collect::<Vec<_>>();
    let flags: [(&[&str], &[&str]); 12] = [
        (&["--fusion", "most"], &["--fusion", "'most'", "auto, unfused, minimal, moderate, maximal"]),
        (&["--dtype", "f64"], &["--dtype", "'f64'", "auto, f32, bf16, f16"]),
        (&["--kv-dtype", "fp8"], &["--kv-dtype", "'fp8'", "not available in this version", "auto, f32, bf16, f16, int8, int4"]),
        (&["--kv-dtype", "f8"], &["'f8'", "accepted: auto, f32, bf16, f16, int8, int4"]),
        (&["--weights", "int4"], &["--weights", "'int4'", "accepted: auto, int8"]),
        (&["--device", "tpu"], &["--device", "'tpu'", "auto, cpu, cuda"]),
        (&["--device", "cuda:99"], &["cuda:99"]),
        (&["--threads", "0"], &["threads", "0"]),
        (&["--layer", "1"], &["--block", "--layer"]),
        (&["--with-norm"], &["--block", "--with-norm"]),
        (&["--seed", "1"], &["--block", "--seed"]),
        (&["--quite"], &["--quite", "--quiet"]),
    ];
    for (more, parts) in flags {
        refused(&and(more), parts);
    }
    let model = data("tiny-rust-llama");
    let tensors = case.dir.join("in.safetensors");
    let out = case.dir.join("out.safetensors");
    refused(&line!["run", "--tensors", &tensors, "--out", &out], &["--block", "--checkpoint", "--problem"]);
    refused(&line!["run", "--block", case.dir.join("block.json"), "--out", &out], &["--tensors"]);
    refused(&line!["run", "--block", case.dir.join("block.json"), "--tensors", &tensors], &["--out"]);
    refused(&line!["run", "--checkpoint", &model, "--tensors", &tensors, "--out", &out], &["--layer"]);
    let layer = |model: &Path, n: &str| line!["run", "--checkpoint", model, "--layer", n, "--tensors", &tensors, "--out", &out];
    refused(&layer(&model, "6"), &["layer 6", "6 layers"]);
    refused(&layer(&case.dir, "0"), &["config.json", "cannot be read"]);
    refused(&layer(&model, "0"), &["in.safetensors"]);
    assert!(!out.exists());
}

#[test]
fn wrong_problems_are_named() {
    let dir = folder("problems").join("case");
    let wrong: [(&str, &[&str]); 8] = [
        ("block b=1 s=4 e=8 h=3/2 d=4 causal f32", &["num_attention_heads (3)"]),
        ("block b=1 s=4 e=8 h=2/2 d=4 causal f64", &["f64"]),
        ("block b=1000000 s=16000000 e=16000000 h=1/1 d=4 causal f32", &["too large"]),
        ("block b=1 s=18446744073709551615 past=18446744073709551615 e=8 h=1/1 d=4 causal f32", &["too long"]),
        ("block b=99999999999999999999999 s=4 e=8 h=1/1 d=4 causal f32", &["b=99999999999999999999999"]),
        ("block b=1 s=4 e=8 h=1/1 d=5 causal rope=half f32", &["head_dim must be even", "5"]),
        ("block b=2 s=4,3 e=8 h=1/1 d=4 causal f32", &["same number of new tokens", "4 and 3"]),
        ("block b=1 s=4 e=8 h=1/1 d=4 causal f32 page=32", &["--write", "page=32"]),
    ];
    for (problem, parts) in wrong {
        refused(&line!["run", "--problem", problem, "--write", &dir], parts);
        assert!(!dir.exists(), "{problem}");
    }
    refused(&line!["run", "--problem", PROBLEM], &["--out", "--write"]);
    let (paged, out) = (format!("{PROBLEM} page=32"), folder("paged").join("out.safetensors"));
    let refusal = ["error: only a GPU keeps a cache in pages; on a CPU it is contiguous\n"];
    refused(&line!["explain", &paged, "--device", "cpu"], &refusal);
    refused(&line!["run", "--problem", &paged, "--out", out, "--device", "cpu"], &refusal);
}

#[test]
fn nan_and_infinity_are_computed_as_they_are() {
    let case = Case::new("nan");
    let mut tensors = case.tensors.clone();
    let (_, x) = tensors.get_mut("x").expect("x");
    (x[0], x[40]) = (f32::NAN, f32::INFINITY);
    case.write(&case.block, &tensors);
    for level in LEVELS {
        stdout(&case.line().into_iter().chain(["--fusion", level].map(OsString::from)).collect::<Vec<_>>());
        let y = floats(&open(case.dir.join("out.safetensors")), "y");
        let said = stdout(&case.line().into_iter().chain(["--fusion", level].map(OsString::from)).collect::<Vec<_>>());
        let bad = y.iter().filter(|v| !v.is_finite()).count();
        assert!(said.contains(&format!("y holds {bad} values that are not finite")), "{said}");
        assert!(json(&case.line())["non_finite"].as_u64().is_some_and(|n| n > 0));
        assert!(y[..12].iter().any(|v| v.is_nan()), "{level}: {y:?}");
    }
}

#[test]
fn a_block_file_says_which_flags_it_needs() {
    let dir = folder("flags").join("case");
    let write = |problem: &str| stdout(&line!["run", "--problem", problem, "--write", &dir, "--device", "cpu"]);
    assert!(write("block b=1 s=2 e=8 h=2 weights=int8 kv=int8").contains("run it with --weights int8 --kv-dtype int8"));
    assert!(!write("block b=1 s=2 e=8 h=2").contains("run it with"));
    // A cache in the compute dtype follows it.
    let said = stdout(&line!["run", "--problem", "block b=1 s=2 e=8 h=2 bf16", "--write", &dir, "--dtype", "f32"]);
    assert!(said.lines().next().is_some_and(|problem| problem.ends_with("causal f32")), "{said}");
}

#[test]
fn a_problem_too_large_for_memory_is_refused() {
    let out = folder("large").join("out");
    for problem in ["block b=1 s=1 e=1000000 h=4", "block b=1048576 s=64 e=4096 h=8"] {
        refused(&line!["run", "--problem", problem, "--out", &out], &["--problem 'block b=", "of memory, this machine has"]);
        assert!(!out.exists());
    }
}

/// Starts the program, sends it `signal` after `milliseconds`, and asserts that it ends soon, as interrupted.
#[cfg(unix)]
fn interrupt(args: &[OsString], signal: &str, milliseconds: u64) {
    use std::{
        process::{Command, Stdio},
        time::{Duration, Instant},
    };
    let child = program::lawson().args(args).arg("--quiet").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.expect("the program starts");
    std::thread::sleep(Duration::from_millis(milliseconds));
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    let start = Instant::now();
    let output = child.wait_with_output().expect("the program ends");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "error: interrupted\n");
    assert!(output.stdout.is_empty());
}

#[cfg(unix)]
#[test]
fn a_signal_ends_a_run_at_once_and_nothing_is_written() {
    let dir = folder("signals");
    let long = "block b=1 s=400000 e=64 h=4";
    // While numbers are drawn, and while they are computed.
    interrupt(&line!["run", "--problem", "block b=1 s=32768 e=4096 h=32", "--write", dir.join("case")], "-INT", 1000);
    interrupt(&line!["run", "--problem", long, "--out", dir.join("out"), "--device", "cpu"], "-TERM", 2500);
    interrupt(
        &line!["run", "--problem", long, "--write", dir.join("case"), "--out", dir.join("out"), "--device", "cpu"],
        "-INT",
        2500,
    );
    assert_eq!(fs::read_dir(&dir).expect("the folder").count(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn a_block_file_that_cannot_be_written_leaves_no_folder() {
    let dir = folder("full").join("case");
    // Files may not grow beyond 1 or 2 KiB, whichever unit the shell has.
    let script = "trap '' XFSZ; ulimit -f 2; exec \"$0\" run --problem 'block b=1 s=64 e=64 h=4' --write \"$1\"";
    let output = std::process::Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_lawson")]).arg(&dir).output();
    let output = output.expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("in.safetensors: cannot be written"), "{said}");
    assert!(!dir.exists());
}
