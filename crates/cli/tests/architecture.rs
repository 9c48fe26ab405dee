//! The laws between the crates, as ARCHITECTURE.md states them.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

const FORBID_UNSAFE: [&str; 4] = ["lawson-core", "lawson-compiler", "lawson-cli", "lawson-testkit"];

struct Package {
    name: String,
    /// Normal and build dependencies on packages of this workspace.
    uses: Vec<String>,
    /// Those of its tests and examples too.
    uses_in_tests: Vec<String>,
    /// Root files of its library and binaries.
    roots: Vec<String>,
}

fn packages() -> Vec<Package> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let text = |v: &Value| v.as_str().expect("a string").to_owned();
    let list = |v: &Value| v.as_array().expect("a list").clone();
    let package = |p: &Value| {
        // Only workspace crates come by path.
        let local = list(&p["dependencies"]).into_iter().filter(|d| d["path"].is_string());
        let (tests, normal): (Vec<_>, Vec<_>) = local.partition(|d| d["kind"] == "dev");
        let names = |d: &[Value]| d.iter().map(|d| text(&d["name"])).collect::<Vec<_>>();
        let built = |t: &Value| list(&t["kind"]).iter().any(|k| ["lib", "bin", "cdylib", "rlib"].contains(&text(k).as_str()));
        Package {
            name: text(&p["name"]),
            uses: names(&normal),
            uses_in_tests: [names(&normal), names(&tests)].concat(),
            roots: list(&p["targets"]).iter().filter(|t| built(t)).map(|t| text(&t["src_path"])).collect(),
        }
    };
    list(&metadata["packages"]).iter().map(package).collect()
}

/// `name` is `crate_name`, or a crate split off from it.
fn is(name: &str, crate_name: &str) -> bool {
    name == crate_name || name.strip_prefix(crate_name).is_some_and(|rest| rest.starts_with('-'))
}

#[test]
fn crates_use_each_other_as_the_architecture_allows() {
    let packages = packages();
    assert!(packages.iter().any(|p| p.name == "lawson-core"), "the workspace has lawson-core");
    let mut broken = Vec::new();
    for p in &packages {
        for used in &p.uses_in_tests {
            let forbidden = match p.name.as_str() {
                "lawson-cpu" => is(used, "lawson-cuda"),
                "lawson-cuda" => is(used, "lawson-cpu"),
                "lawson-compiler" => is(used, "lawson-cpu") || is(used, "lawson-cuda"),
                _ => false,
            };
            if forbidden || is(used, "lawson-cli") || is(used, "lawson-py") {
                broken.push(format!("{} uses {used}", p.name));
            }
        }
        // The library and everything under it is used without the test kit; cli runs it for `check`.
        if p.name != "lawson-cli" && p.uses.iter().any(|u| is(u, "lawson-testkit")) {
            broken.push(format!("{} uses lawson-testkit outside its tests", p.name));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("; "));
    let core = packages.iter().find(|p| p.name == "lawson-core").expect("checked above");
    assert!(core.uses.is_empty(), "lawson-core uses {}", core.uses.join(", "));
}

#[test]
fn crates_without_unsafe_code_say_so() {
    let packages = packages();
    for name in FORBID_UNSAFE {
        let package = packages.iter().find(|p| p.name == name).unwrap_or_else(|| panic!("the workspace has {name}"));
        assert!(!package.roots.is_empty(), "{name} has a library or a binary");
        for root in &package.roots {
            let source = fs::read_to_string(root).expect("a crate's root can be read");
            let mut code = source.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("//"));
            assert_eq!(code.next(), Some("#![forbid(unsafe_code)]"), "first line of code in {root}");
        }
    }
}
