//! `explain`, `devices`, `check` and what all commands share.

mod program;

use program::{is_refusal, json, lawson, refused, stdout};

const PROBLEM: &str = "block b=2 s=37 past=300 e=64 h=4/2 d=16 causal rope=half bf16";

#[test]
fn version_names_commit_and_instruction_set() {
    let said = stdout(&["--version"]);
    assert!(said.starts_with(&format!("lawson {} (commit ", env!("CARGO_PKG_VERSION"))), "{said}");
    assert!(
        ["portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx", "neon", "neon_bf16"]
            .iter()
            .any(|isa| said.trim_end().ends_with(&format!("{isa})"))),
        "{said}"
    );
}

#[test]
fn help_shows_examples() {
    assert!(stdout(&["--help"]).contains("LAWSON_ISA"));
    for command in ["run", "explain", "devices", "quantise", "check"] {
        let said = stdout(&[command, "--help"]);
        assert!(said.contains(&format!("lawson {command} ")) && said.contains("--device") && said.contains("Example"), "{said}");
    }
    let output = lawson().output().expect("the program starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty() && String::from_utf8_lossy(&output.stderr).contains("explain"));
}

#[test]
fn an_unknown_instruction_set_is_refused() {
    for args in [&["explain", PROBLEM][..], &["devices"], &["check", "--quick"], &["bench"]] {
        let output = lawson().args(args).env("LAWSON_ISA", "mmx").output().expect("the program starts");
        let all = "portable, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx, neon, neon_bf16";
        is_refusal(&output, &["LAWSON_ISA", "'mmx'", all]);
    }
    let output = lawson().args(["explain", PROBLEM]).env("LAWSON_ISA", "portable").output().expect("the program starts");
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("-portable"));
}

#[test]
fn explain_compares_the_levels() {
    let said = stdout(&["explain", PROBLEM]);
    for part in
        ["past=300", "planned with past lengths rounded up", "qkv projection", "predicted", "(chosen)", "unfused", "maximal"]
    {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    // Without quotes around the problem.
    let words: Vec<_> = ["explain"].into_iter().chain(PROBLEM.split(' ')).chain(["--fusion", "unfused"]).collect();
    let said = stdout(&words);
    assert!(said.contains("level unfused") && said.contains("softmax") && !said.contains("(chosen)"), "{said}");
}

#[test]
fn explain_gives_the_plan_as_data() {
    let said = json(&["explain", PROBLEM]);
    let levels: Vec<_> =
        said["levels"].as_array().expect("a list").iter().map(|l| l["level"].as_str().expect("a name")).collect();
    assert_eq!(levels, ["unfused", "minimal", "moderate", "maximal"]);
    for level in levels {
        let said = json(&["explain", PROBLEM, "--fusion", level]);
        let plan = &said["plan"];
        assert!(said["levels"].is_null() && said["problem"].as_str().is_some_and(|p| p.contains("past=300")), "{said}");
        assert_eq!(plan["level"], level);
        let stages = plan["stages"].as_array().expect("a list");
        let steps: Vec<_> = stages.iter().flat_map(|s| s["steps"].as_array().expect("a list")).collect();
        assert_eq!(plan["step_count"], steps.len());
        for step in steps {
            for key in ["op", "kernel", "reads", "writes", "flops", "bytes", "predicted_ms", "why"] {
                assert!(!step[key].is_null(), "{level}: {key} is missing in {step}");
            }
        }
        assert!(plan["buffers"].is_array() && plan["rejected"].is_array() && plan["peak_bytes"].is_u64(), "{plan}");
    }
}

#[test]
fn explain_names_only_what_a_block_has() {
    let plain = "block b=1 s=600 e=64 h=4/2 d=16";
    let said = ["unfused", "minimal", "moderate", "maximal"].map(|level| stdout(&["explain", plain, "--fusion", level]));
    for said in &said {
        for absent in ["norm", "RoPE", "rope table", "rope, ", "residual", "split keys"] {
            // A step may say that there is none.
            assert!(!said.replace("no RoPE", "").contains(absent), "{absent}: {said}");
        }
        assert!(!said.contains("bias"), "{said}");
    }
    assert!(said[3].contains("append while the tile is warm") && said[3].contains("nothing is added"), "{}", said[3]);

    let rich = "input_norm=1e-6 residual bias=qo qk_norm=1e-6 rope=half";
    let said = stdout(&["explain", &format!("{plain} {rich}"), "--fusion", "maximal"]);
    for part in
        ["norm, bias, QK-norm, RoPE and append while", "bias and residual in the epilogue", "qkv projection, RoPE, append"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    // All keys and values first, then the queries.
    let said = stdout(&["explain", &format!("{plain} full bias=k rope=half"), "--fusion", "maximal"]);
    for part in
        ["first query; bias, RoPE and append while", "     RoPE while", "kv projection, RoPE, append", "q projection, RoPE "]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn explain_has_units_and_fits() {
    let problem = "block b=1 s=2048 e=1024 h=8 d=128 rope=half";
    let said = stdout(&["explain", problem]);
    let rejected = said.lines().find(|l| l.contains("level unfused: predicted")).expect("it was rejected");
    assert!(rejected.matches("iB").count() == 2 && !rejected.contains("bytes"), "{rejected}");
    let workspace: Vec<&str> = said.lines().skip_while(|l| *l != "workspace:").skip(1).take_while(|l| !l.is_empty()).collect();
    assert!(workspace.len() > 3 && workspace.iter().all(|l| l.ends_with("B") || l.ends_with("for each thread")), "{said}");
    for columns in ["60", "80", "100"] {
        let output = lawson().args(["explain", problem]).env("COLUMNS", columns).output().expect("the program starts");
        let said = String::from_utf8_lossy(&output.stdout);
        let table = said.lines().filter(|l| l.starts_with(['┌', '│']));
        assert!(table.map(|l| l.chars().count()).max().is_some_and(|n| n <= columns.parse().unwrap_or(0)), "{said}");
        assert_eq!(columns == "100", !said.contains("left out to fit"), "{said}");
    }
}

#[test]
fn wrong_problems_are_refused() {
    refused(&["explain"], &["PROBLEM"]);
    refused(&["explain", "nonsense"], &["nonsense"]);
    refused(&["explain", "block b=1 s=4 e=8 h=3/2 d=4 causal f32"], &["num_attention_heads (3)"]);
    refused(&["explain", PROBLEM, "--fusion", "full"], &["--fusion", "'full'", "auto, unfused"]);
    refused(&["explain", "block b=1 s=4 e=18446744073709551615 h=1/1 d=4 causal f32"], &["hidden_size"]);
    refused(&["explode"], &["explode", "bench, run, explain, devices, quantise, check"]);
    let with = |tokens: &str| format!("block b=1 s=4 e=64 h=4 d=16 {tokens}");
    refused(&["explain", "block b=1 s=-4 e=64 h=4"], &["'s=-4'", "whole numbers, 0 or greater"]);
    refused(&["explain", &with("rope=half:theta")], &["'half:theta'", "rope=half,theta=500000"]);
    refused(&["explain", &with("f32 f16")], &["'f16'", "one of f32, bf16, f16"]);
    refused(&["explain", &with("causal full")], &["'full'", "one of causal, full"]);
    refused(&["explain", "attention b=1 s=4 h=4 d=16"], &["block problem starts with the word 'block'", "'attention'"]);
}

#[test]
fn numbers_of_flags_are_refused_with_what_is_accepted() {
    for bad in ["-2", "many", "1.5", ""] {
        refused(&["devices", "--threads", bad], &["--threads", &format!("'{bad}'"), "accepted: 1 to 1024"]);
    }
    refused(&["devices", "--threads", "0"], &["threads", "1 and 1024", "got 0"]);
    refused(&["run"], &["one of these is needed: --block <FILE>, --checkpoint <DIR>, --problem <PROBLEM>; see"]);
    refused(&["run", "--block", "b.json"], &["not provided: --tensors <FILE>, --out <FILE>; see"]);
    refused(&["bench", "--preset", "slow"], &["'slow'", "; accepted: quick, article; see"]);
    refused(&["check", "--jason"], &["--jason", "; a similar argument exists: '--json'"]);
}

#[test]
fn devices_are_described() {
    let said = stdout(&["devices", "--threads", "1"]);
    for part in ["processor", "in use", "caches", "GB/s (measured)"] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    let said = json(&["devices"]);
    let cpu = &said["cpu"];
    for key in ["peak_gflops", "one_thread_peak_gflops", "bandwidth_gbps"] {
        assert!(cpu[key].as_f64().is_some_and(|rate| rate > 0.0), "{key} in {cpu}");
    }
    assert!(cpu["isa_available"].as_array().is_some_and(|a| a.contains(&cpu["isa"])), "{cpu}");
    let cuda = &said["cuda"];
    let word = if cuda["can_run"] == true { "cuda: can run" } else { "cuda: cannot run" };
    assert!(stdout(&["devices", "--threads", "1"]).contains(word), "{word:?}");
    assert!(cuda["can_run"] == true || cuda["why"].as_str().is_some_and(|why| !why.is_empty()), "{cuda}");
    let missing: Vec<&str> = cuda["missing"].as_array().expect("a list").iter().filter_map(|m| m.as_str()).collect();
    assert!(missing.is_empty() || cuda["can_run"] == false, "{cuda}");
    let human = stdout(&["devices", "--threads", "1"]);
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    for text in &missing {
        assert!(words(&human).contains(&words(text)), "{text}: {human}");
    }
    if !missing.is_empty() {
        refused(
            &["explain", "block b=1 s=1 e=64 h=1", "--device", "cuda"],
            &["device cuda:0", "`lawson devices`", "device cpu needs none"],
        );
    }
    let narrow = lawson().args(["devices", "--threads", "1"]).env("COLUMNS", "72").output().expect("the program starts");
    let narrow = String::from_utf8_lossy(&narrow.stdout);
    assert!(narrow.lines().all(|l| l.chars().count() <= 72), "{narrow}");
    let auto = if cuda["can_run"] == true { "cuda:0" } else { "cpu" };
    assert_eq!(said["auto"], auto);
    assert!(human.lines().any(|l| l.starts_with("auto: ") && l.contains(auto)), "{human}");
}

#[test]
fn a_quick_check_passes() {
    let said = json(&["check", "--quick"]);
    assert_eq!((&said["passed"], said["failed"].as_array().map(Vec::len)), (&true.into(), Some(0)), "{said}");
    assert!(said["ran"].as_u64().is_some_and(|n| n > 100), "{said}");
    assert!(said["ran_on"].as_array().is_some_and(|a| a.contains(&"portable".into())), "{said}");
    let names = |key: &str| said[key].as_array().map_or(String::new(), |a| format!("{a:?}"));
    assert!(names("ran_on").contains("cuda:0") || names("could_not_run").contains("cuda:0"), "{said}");
    refused(&["check", "--device", "cuda:99"], &["cuda:99"]);
    let only = json(&["check", "--quick", "--weights", "int8"]);
    assert!(only["passed"] == true && only["ran"].as_u64() < said["ran"].as_u64(), "{only}");
    refused(&["check", "--weights", "int8", "--device", "cuda"], &["weights of int8", "GPU"]);
}

#[test]
fn explain_knows_weights_in_int8() {
    let [plain, int8] = [&[][..], &["--weights", "int8"]]
        .map(|more| json(&[&["explain", PROBLEM, "--device", "cpu", "--fusion", "maximal"], more].concat()));
    assert!(int8["problem"].as_str().is_some_and(|p| p.contains("weights=int8")), "{int8}");
    // Scales take 4 bytes of an output's 64 + 4.
    assert!(int8["weight_bytes"].as_f64() <= plain["weight_bytes"].as_f64().map(|b| 0.54 * b), "{int8}");
    let kernels = int8["plan"]["stages"][0]["steps"].to_string();
    assert!(kernels.contains("gemm_int8-") && !plain["plan"]["stages"].to_string().contains("gemm_int8"), "{kernels}");
    let said = stdout(&["explain", &format!("{PROBLEM} weights=int8"), "--device", "cpu"]);
    assert!(said.contains("codes of x") && said.contains("weights of the projections"), "{said}");
    refused(&["explain", PROBLEM, "--weights", "int4"], &["'int4'", "accepted: auto, int8"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_check() {
    use std::{process::Stdio, thread::sleep, time::Duration};

    let child = lawson().arg("check").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    sleep(Duration::from_millis(500));
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(killed.success());
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "error: interrupted\n");
    assert!(output.stdout.is_empty());
}
