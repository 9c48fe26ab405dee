//! `bench`: what it prints, writes and refuses.

#[allow(dead_code, reason = "helpers of several test programs")]
mod program;

use std::{fs, path::Path, process::Output};

use program::{folder, is_refusal, lawson, refused};
use serde_json::Value;

const TINY: [&str; 12] = ["--batch", "2", "--seq", "24", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"];

const FIELDS: [&str; 40] = [
    "study",
    "level",
    "same_as",
    "device",
    "dtype",
    "kv_dtype",
    "weights",
    "batch",
    "seq",
    "past",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "causal",
    "threads",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "runs",
    "peak_bytes",
    "resident_bytes",
    "traffic_bytes",
    "flops",
    "gflops",
    "gbps",
    "steps",
    "gemms",
    "launches",
    "max_abs_err",
    "rel_err",
    "speedup",
    "limit_share",
    "plain_share",
    "read_share",
    "bound_share",
    "neighbours",
    "neighbours_least",
    "neighbours_median",
    "plan",
];

fn bench(args: &[&str], out: &Path) -> Output {
    let output =
        lawson().arg("bench").args(args).args(["--threads", "2", "--out"]).arg(out).output().expect("the program starts");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn results(out: &Path) -> Value {
    let text = fs::read_to_string(out.join("results.json")).expect("results.json was written");
    serde_json::from_str(&text).expect("results.json is JSON")
}

fn rows(results: &Value) -> Vec<&Value> {
    results["results"].as_array().expect("results is a list").iter().collect()
}

/// Checks that the numbers of one of our rows hang together.
fn check_row(row: &Value, peak_gflops: f64) {
    let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row} is no number"));
    for field in FIELDS {
        assert!(row.get(field).is_some(), "{field} is missing in {row}");
    }
    let (low, median, high) = (number("p10_ms"), number("median_ms"), number("p90_ms"));
    assert!(0.0 < low && low <= median && median <= high && number("runs") >= 5.0, "{row}");
    assert!(number("rel_err") <= 5e-6 && number("max_abs_err") <= 1e-4, "{row}");
    assert!(number("peak_bytes") >= 0.0 && number("resident_bytes") > 0.0 && number("gbps") > 0.0, "{row}");
    if !row["flops"].is_null() {
        let gflops = number("flops") / median * 1e-6;
        assert!((number("gflops") / gflops - 1.0).abs() < 1e-6 && gflops < 2.0 * peak_gflops, "{row}");
    }
    assert!(row["limit_share"].is_null() || (0.0..=1.0).contains(&number("limit_share")), "{row}");
}

#[test]
fn every_study_is_measured_and_reported() {
    let out = folder("bench-all");
    let output = bench(&[&["all"], &TINY[..]].concat(), &out);
    let said = String::from_utf8_lossy(&output.stdout);
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(progress.contains("measuring block (1 of 7)…") && progress.contains("measuring throughput (7 of 7)…"), "{progress}");
    assert!(said.trim_end().ends_with(&format!("report: {}", out.join("index.html").display())), "{said}");
    let results = results(&out);
    assert_eq!(results["lawson"], env!("CARGO_PKG_VERSION"));
    let peak = results["machine"]["peak_gflops"].as_f64().expect("the peak was measured");
    assert!(peak > 0.0 && results["machine"]["bandwidth_gbps"].as_f64().is_some_and(|b| b > 0.0));
    let rows = rows(&results);
    for row in &rows {
        check_row(row, peak);
        assert!(said.contains(row["study"].as_str().expect("a study has a name")));
    }
    let levels = |study: &str, variant: &str| -> Vec<&str> {
        let of = rows.iter().filter(|r| r["study"] == study && r["variant"].as_str().unwrap_or("").starts_with(variant));
        of.map(|r| r["level"].as_str().expect("a level has a name")).collect()
    };
    let all = ["unfused", "minimal", "moderate", "maximal"];
    assert_eq!(levels("block", ""), all);
    assert_eq!(levels("throughput", ""), all);
    assert_eq!((levels("qkv", "alone"), levels("qkv", "layer")), (all[..2].to_vec(), all[..2].to_vec()));
    assert_eq!(levels("softmax", ""), all[..3]);
    assert_eq!((levels("rope", "two-pass"), levels("rope", "fused")), (vec!["unfused"; 2], vec!["maximal"; 2]));
    assert_eq!((levels("attention", ""), levels("decode", "")), (vec!["unfused", "maximal"], vec!["maximal"]));
    let counts = |level: &str| {
        let row = rows.iter().find(|r| r["study"] == "block" && r["level"] == level).expect("the level was measured");
        assert_eq!(row["steps_table"].as_array().map(Vec::len), row["steps"].as_u64().map(|n| n as usize), "{row}");
        assert!(row["plan"].as_str().is_some_and(|p| p.starts_with(level)), "{row}");
        (row["steps"].as_u64(), row["gemms"].as_u64())
    };
    let (unfused, maximal) = (counts("unfused"), counts("maximal"));
    assert!(unfused.0 > maximal.0 && unfused.1 > maximal.1, "{unfused:?} {maximal:?}");
    let page = fs::read_to_string(out.join("index.html")).expect("the report was written");
    for text in ["<svg", "unfused", "maximal", "three-pass", "B 2 · S 24", "E 64", "4/2 heads of 16"] {
        assert!(page.contains(text), "{text} is not in the report");
    }
    assert_eq!(fs::read_dir(&out).expect("the folder is there").count(), 2, "nothing else was left there");
}

#[test]
fn json_is_the_results_alone() {
    let out = folder("bench-json");
    let args =
        ["block", "--seq", "1", "--past", "300", "--heads", "2", "--head-dim", "16", "--levels", "maximal,unfused", "--json"];
    let output = bench(&args, &out);
    let printed: Value = serde_json::from_slice(&output.stdout).expect("stdout is one JSON document");
    assert_eq!(printed, results(&out));
    let rows = rows(&printed);
    assert_eq!(rows.iter().map(|r| r["level"].as_str().unwrap_or("")).collect::<Vec<_>>(), ["unfused", "maximal"]);
    let median = |i: usize| rows[i]["median_ms"].as_f64().expect("it was timed");
    assert!((rows[1]["speedup"].as_f64().expect("there is a baseline") / (median(0) / median(1)) - 1.0).abs() < 1e-9);
    assert_eq!((&rows[0]["past"], &rows[0]["hidden"], &rows[0]["causal"]), (&300.into(), &32.into(), &true.into()));
}

#[test]
fn narrow_types_and_full_attention_are_measured() {
    for dtype in ["bf16", "f16"] {
        let out = folder(&format!("bench-{dtype}"));
        let shape = ["--seq", "33", "--heads", "2", "--dtype", dtype, "--head-dim", "16", "--causal", "false"];
        for study in ["block", "attention", "qkv"] {
            // The study of the projection is never causal, and takes no word about it.
            let taken = if study == "qkv" { &shape[..8] } else { &shape[..] };
            bench(&[&[study], taken].concat(), &out);
            let results = results(&out);
            for row in rows(&results) {
                assert_eq!((&row["dtype"], &row["causal"]), (&dtype.into(), &false.into()));
                assert!(row["rel_err"].as_f64().is_some_and(|e| e > 0.0 && e < 8e-3) && row["median_ms"].is_number(), "{row}");
            }
        }
    }
}

#[test]
fn each_kernel_is_measured_alone() {
    let out = folder("bench-kernels");
    bench(&[&["kernels"], &TINY[..], &["--neighbours", "3"]].concat(), &out);
    let results = results(&out);
    let rows = rows(&results);
    let peak = results["machine"]["peak_gflops"].as_f64().expect("a peak");
    let variants: Vec<&str> = rows.iter().filter_map(|r| r["variant"].as_str()).collect();
    let attention = ["causal", "softcap", "window 512", "sinks", "ALiBi", "ragged batch", "D 80", "mask"];
    let attention = attention.map(|v| format!("attention {v}"));
    let want =
        ["gemm"].into_iter().chain(attention.iter().map(String::as_str)).chain(["decode warm", "decode cold", "block decode"]);
    assert_eq!(variants, want.collect::<Vec<_>>());
    for row in rows {
        check_row(row, peak);
        let (variant, has) = (row["variant"].as_str().unwrap_or(""), |name: &str| row[name].as_f64().is_some_and(|v| v > 0.0));
        assert_eq!((&row["study"], &row["level"]), (&"kernels".into(), &"maximal".into()));
        assert_eq!(has("plain_share"), variant.starts_with("attention") && variant != "attention causal", "{row}");
        assert_eq!(has("read_share"), variant.contains("decode"), "{row}");
        assert_eq!(has("bound_share"), variant.starts_with("decode"), "{row}");
        let near = ["neighbours", "neighbours_least", "neighbours_median"].map(has);
        assert_eq!(near, [matches!(variant, "gemm" | "attention causal"); 3], "{row}");
    }
    let flops = |variant: &str| {
        let row = results["results"].as_array()?.iter().find(|r| r["variant"] == variant)?;
        row["flops"].as_u64()
    };
    // 24 · 25 / 2 pairs of 4 heads of 16 in each of 2 sequences; a mask leaves about half.
    let plain = flops("attention causal").expect("it was measured");
    assert_eq!(plain, 4 * 16 * 4 * 300 * 2);
    assert!(flops("attention mask").is_some_and(|m| m * 3 > plain && m * 3 < 2 * plain));
}

#[test]
fn a_peer_that_is_not_installed_is_named() {
    let out = folder("bench-peer");
    let mut command = lawson();
    command.args([
        "bench",
        "block",
        "--seq",
        "8",
        "--heads",
        "1",
        "--head-dim",
        "8",
        "--levels",
        "maximal",
        "--peers",
        "torch",
        "--out",
    ]);
    let output = command.arg(&out).env("LAWSON_PYTHON", out.join("no-python")).output().expect("the program starts");
    assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("torch is not installed"));
    let results = results(&out);
    let peer = rows(&results).into_iter().find(|r| r["level"] == "peer:torch").expect("the peer has a row");
    assert!(peer["median_ms"].is_null() && peer["note"].as_str().is_some_and(|n| n.contains("not installed")), "{peer}");
}

#[test]
fn bad_arguments_are_refused_before_anything_is_written() {
    let out = folder("bench-bad").join("report");
    let refuse = |args: &[&str], parts: &[&str]| {
        let output = lawson().arg("bench").args(args).arg("--out").arg(&out).output().expect("the program starts");
        is_refusal(&output, parts);
        assert!(!out.exists(), "{args:?} left a folder");
    };
    refuse(&["flux"], &["flux", "softmax", "throughput"]);
    refuse(&["block", "--heads", "6", "--kv-heads", "4"], &["multiple", "6", "4"]);
    for flag in ["--batch", "--seq", "--hidden", "--heads", "--kv-heads", "--head-dim"] {
        let accepted = if flag == "--batch" { "1 to 2^20" } else { "1 to 2^24" };
        refuse(&["block", flag, "0"], &[flag, "0", accepted]);
        refuse(&["block", flag, "18446744073709551615"], &[flag]);
        refuse(&["block", flag, "-1"], &[flag, "-1", accepted]);
    }
    refuse(&["block", "--heads", "3", "--hidden", "1000"], &["--head-dim is needed"]);
    refuse(&["block", "--hidden", "1000"], &["--head-dim"]);
    refuse(&["block", "--past", "99999999999"], &["--past"]);
    refuse(&["block", "--past", "-1"], &["--past", "'-1'", "0 or greater"]);
    refuse(&["block", "--threads", "-2"], &["--threads", "'-2'", "1 to 1024"]);
    refuse(&["block", "--batch", "1048576", "--seq", "16777216"], &["too large"]);
    for study in ["softmax", "rope"] {
        // Neither has a cache, nor a width of x.
        refuse(&[study, "--batch", "1048576", "--seq", "16777216"], &[study, "available"]);
        refuse(&[study, "--heads", "16777216", "--seq", "16777216"], &[study, "available"]);
    }
    refuse(&["block", "--heads", "16777216"], &["--heads times --head-dim"]);
    for study in ["all", "block", "attention", "softmax", "rope", "qkv", "decode", "throughput", "kernels"] {
        refuse(&[study, "--batch", "4096", "--seq", "65536"], &["available"]);
    }
    refuse(&["block", "--seq", "16777216", "--head-dim", "8", "--heads", "64"], &["available"]);
    // Each sequence takes a tile of rows in the cache.
    refuse(
        &["block", "--batch", "1048576", "--seq", "1", "--hidden", "8192", "--heads", "64"],
        &["block B 1048576", "available"],
    );
    refuse(&["block", "--head-dim", "7", "--heads", "2"], &["--head-dim", "even"]);
    refuse(&["--dtype", "int3"], &["int3", "bf16"]);
    refuse(&["--causal", "maybe"], &["maybe", "true", "false"]);
    refuse(&["--levels", "most"], &["most", "moderate"]);
    refuse(&["--peers", "jax"], &["jax", "torch", "candle"]);
    refuse(&["kernels", "--neighbours", "-1"], &["--neighbours"]);
    refuse(&["kernels", "--neighbours", "1001"], &["1001", "0..=1000"]);
    refuse(&["--memory", "8GB"], &["8GB", "8GiB"]);
    refuse(&["--preset", "article", "--seq", "7"], &["--preset", "--seq"]);
    refuse(&["--preset", "slow"], &["slow", "quick"]);
}

#[test]
fn flags_and_levels_that_mean_nothing_to_a_study_are_refused() {
    let out = folder("bench-flags").join("report");
    let refuse = |args: &[&str], parts: &[&str]| {
        let output = lawson().arg("bench").args(args).arg("--out").arg(&out).output().expect("the program starts");
        is_refusal(&output, parts);
        assert!(!out.exists(), "{args:?} left a folder");
    };
    for (study, unused) in [
        ("softmax", &["--hidden", "--kv-heads", "--head-dim", "--dtype", "--causal", "--memory", "--neighbours"][..]),
        ("rope", &["--kv-heads", "--weights", "--dtype", "--causal", "--memory", "--neighbours"]),
        ("qkv", &["--past", "--causal", "--memory", "--neighbours"]),
        ("attention", &["--memory", "--neighbours", "--weights"]),
        ("decode", &["--memory", "--neighbours", "--weights"]),
        ("block", &["--memory", "--neighbours", "--checkpoint", "--tokens"]),
        ("throughput", &["--neighbours"]),
        ("kernels", &["--memory"]),
        ("all", &["--neighbours"]),
    ] {
        for flag in unused {
            let value = match *flag {
                "--dtype" => "bf16",
                "--causal" => "false",
                "--weights" => "int8",
                _ => "64",
            };
            let study_name = format!("the study {study}");
            let takes = if study == "all" { "--memory" } else { "--batch, --seq" };
            refuse(&[study, flag, value], &[flag, &study_name, "takes", takes]);
        }
    }
    for study in ["rope", "attention", "decode"] {
        refuse(&[study, "--hidden", "64", "--heads", "4", "--head-dim", "16"], &["--hidden", study, "--heads and --head-dim"]);
    }
    for (study, lacks, has) in [
        ("qkv", "moderate", "unfused, minimal"),
        ("softmax", "maximal", "unfused, minimal, moderate"),
        ("rope", "minimal", "unfused, maximal"),
        ("attention", "moderate", "unfused, maximal"),
        ("decode", "unfused", "has maximal"),
        ("kernels", "unfused", "has maximal"),
    ] {
        refuse(&[study, "--levels", lacks], &["--levels", lacks, study, has]);
        refuse(&[study, "--levels", &format!("{lacks},unfused,maximal")], &["--levels", study, has]);
    }
}

#[test]
fn weights_in_int8_are_measured_and_verified() {
    let out = folder("bench-int8");
    for study in ["qkv", "block"] {
        bench(&[&[study, "--weights", "int8", "--dtype", "bf16", "--device", "cpu"], &TINY[..]].concat(), &out);
        let results = results(&out);
        assert!(results["machine"]["int8_peak_gops"].as_f64().is_some_and(|v| v > 0.0), "{results}");
        for row in rows(&results) {
            assert!(row["weights"] == "int8" && row["median_ms"].as_f64().is_some_and(|v| v > 0.0), "{row}");
            // Codes are off by more than bf16 and less than a hundredth or two.
            assert!(row["rel_err"].as_f64().is_some_and(|e| e > 4e-3 && e < 0.04), "{row}");
        }
    }
}

#[test]
fn quality_compares_forms_of_a_trained_model() {
    let out = folder("bench-quality");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lawson/tests/data/tiny-rust-llama");
    let tokens = out.join("tokens.u16");
    let all = fs::read(model.join("valid.u16")).expect("the text");
    fs::write(&tokens, &all[..2 * 513]).expect("a window of it");
    let (model, tokens) = (model.display().to_string(), tokens.display().to_string());
    let output = bench(&["quality", "--checkpoint", &model, "--tokens", &tokens, "--device", "cpu"], &out);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("mean loss") && said.contains("int8 weights, int8 cache") && said.contains("worst layer"), "{said}");
    let results = results(&out);
    let rows = rows(&results);
    assert_eq!(rows.len(), 6);
    for (i, row) in rows.into_iter().enumerate() {
        assert!(row["study"] == "quality" && row["mean_loss"].as_f64().is_some_and(|v| v > 0.5 && v < 4.0), "{row}");
        assert!(row["loss_change"].as_f64().is_some_and(|v| v.abs() < 0.03 && (v == 0.0) == (i == 0)), "{row}");
        assert_eq!(row["layer_errors"].as_array().map(Vec::len), Some(6), "{row}");
    }
    let page = fs::read_to_string(out.join("index.html")).expect("a report");
    assert!(page.contains("Quality: what quantisation costs") && page.contains("Error of each layer"), "the page has no quality");
    let fresh = out.join("report");
    for (args, parts) in [
        (&["quality"][..], &["--checkpoint DIR"][..]),
        (&["quality", "--checkpoint", &model], &["--tokens FILE"]),
        (&["quality", "--checkpoint", "nowhere", "--tokens", &tokens], &["nowhere", "config.json"]),
        (&["quality", "--checkpoint", &model, "--tokens", "nowhere"], &["--tokens nowhere"]),
        (&["quality", "--seq", "8"], &["--seq", "the study quality", "--checkpoint, --tokens"]),
    ] {
        let output = lawson().arg("bench").args(args).args(["--device", "cpu", "--out"]).arg(&fresh).output().expect("it starts");
        is_refusal(&output, parts);
        assert!(!fresh.exists(), "{args:?} left a folder");
    }
}

#[test]
fn a_peer_that_measures_nothing_of_a_study_is_named() {
    let out = folder("bench-peer-none");
    for (study, shape) in [
        ("softmax", &["--seq", "8", "--heads", "1", "--past", "3"][..]),
        ("rope", &["--seq", "8", "--heads", "1", "--head-dim", "8"]),
        ("attention", &["--seq", "8", "--heads", "1", "--head-dim", "8", "--past", "3"]),
        ("throughput", &["--heads", "1", "--head-dim", "8", "--levels", "maximal"]),
    ] {
        let output = bench(&[&[study, "--peers", "torch"], shape].concat(), &out);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("the peer torch measures nothing here") && said.contains(study) && said.contains("qkv"), "{said}");
    }
}

#[test]
fn tables_fit_and_say_what_they_leave_out() {
    let out = folder("bench-width");
    let width = |columns: Option<&str>| {
        let mut command = lawson();
        command
            .arg("bench")
            .arg("block")
            .args(TINY)
            .args(["--threads", "1", "--out"])
            .arg(&out)
            .env_remove("COLUMNS")
            .envs(columns.map(|n| ("COLUMNS", n)));
        let output = command.output().expect("the program starts");
        let said = String::from_utf8(output.stdout).expect("the program prints UTF-8");
        let table: Vec<String> = said.lines().filter(|l| l.starts_with(['┌', '│', '╞', '└'])).map(str::to_owned).collect();
        assert!(table.len() > 6 && table.iter().all(|l| l.chars().count() == table[0].chars().count()), "{said}");
        (table[0].chars().count(), said)
    };
    let (whole, said) = width(Some("200"));
    assert!(whole > 120 && said.contains("GB/s") && said.contains("p10 – p90") && !said.contains("left out"), "{said}");
    for (columns, most) in [(Some("80"), 80), (Some("100"), 100), (None, 120)] {
        let (width, said) = width(columns);
        assert!(width <= most, "{width} of {most}: {said}");
        assert!(
            said.contains("median") && said.contains("speed-up") && said.contains(&format!("to fit {most} columns")),
            "{said}"
        );
        assert!(said.contains("maximal") && said.contains("B 2 S 24 E 64 H 4/2 D 16 f32"), "{said}");
    }
}

#[test]
fn a_report_in_the_place_of_an_earlier_one_is_said_so() {
    let out = folder("bench-again");
    let again = |_| String::from_utf8_lossy(&bench(&["softmax", "--seq", "8", "--heads", "1"], &out).stdout).into_owned();
    let [first, second] = [0, 1].map(again);
    assert!(first.starts_with("on ") && !first.contains("earlier one"), "{first}");
    assert!(second.trim_end().ends_with("index.html (in place of an earlier one)"), "{second}");
}

#[test]
fn a_folder_that_cannot_be_written_is_refused() {
    let dir = folder("bench-out");
    fs::write(dir.join("file"), "x").expect("a file can be written");
    let inside = dir.join("file").join("report");
    refused(&["bench", "block", "--seq", "8", "--out", &inside.to_string_lossy()], &["--out", "file"]);
    refused(&["bench", "block", "--seq", "8", "--out", &dir.join("file").to_string_lossy()], &["--out", "not a folder"]);
    fs::create_dir_all(dir.join("taken/index.html")).expect("a folder can be made");
    refused(&["bench", "block", "--seq", "8", "--out", &dir.join("taken").to_string_lossy()], &["index.html"]);
    for name in ["index.html", "results.json"] {
        let other = dir.join(format!("other-{name}"));
        fs::create_dir(&other).expect("a folder can be made");
        fs::write(other.join(name), "<title>Home</title>").expect("a file can be written");
        refused(&["bench", "softmax", "--seq", "8", "--out", &other.to_string_lossy()], &["--out", name, "did not write"]);
        let kept = fs::read_to_string(other.join(name)).expect("the file is there");
        assert_eq!((kept.as_str(), fs::read_dir(&other).expect("the folder is there").count()), ("<title>Home</title>", 1));
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_without_a_report() {
    use std::process::{Command, Stdio};
    let out = folder("bench-stop");
    let mut command = lawson();
    command.args(["bench", "block", "--seq", "512", "--hidden", "512", "--out"]).arg(&out);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    std::thread::sleep(std::time::Duration::from_millis(700));
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(killed.success());
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read_dir(&out).expect("the folder is there").count(), 0);
}
