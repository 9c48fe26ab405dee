//! Runs the built program.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

/// The program, on the instruction set it chooses by itself.
pub fn lawson() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lawson"));
    command.env_remove("LAWSON_ISA");
    command
}

fn call(args: &[impl AsRef<OsStr>]) -> Output {
    lawson().args(args).output().expect("the program starts")
}

/// What a run that must succeed prints on stdout.
#[track_caller]
pub fn stdout(args: &[impl AsRef<OsStr>]) -> String {
    let output = call(args);
    assert!(output.status.success(), "{:?}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("the program prints UTF-8")
}

/// The document that a run with `--json`, which must succeed, prints.
#[track_caller]
pub fn json(args: &[impl AsRef<OsStr>]) -> Value {
    let args: Vec<_> = args.iter().map(AsRef::as_ref).chain([OsStr::new("--json")]).collect();
    serde_json::from_str(&stdout(&args)).expect("the program prints one JSON document")
}

/// Asserts that `output` is a refusal: exit 2, nothing on stdout, one line on stderr that holds every one of `parts`.
#[track_caller]
pub fn is_refusal(output: &Output, parts: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{parts:?}: {said}");
    assert!(output.stdout.is_empty(), "{parts:?}: {}", String::from_utf8_lossy(&output.stdout));
    assert!(said.starts_with("error: ") && said.ends_with('\n') && said.lines().count() == 1, "{said:?} is not one line");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
}

/// Asserts that the program refuses `args`, naming `parts`.
#[track_caller]
pub fn refused(args: &[impl AsRef<OsStr>], parts: &[&str]) {
    is_refusal(&call(args), parts);
}

/// An empty folder for the test `name`.
#[allow(dead_code, reason = "not every test program writes files")]
pub fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a folder can be made");
    dir
}
