#!/usr/bin/env python3
"""Breaks a copy of the tree on purpose and fails when the tests do not notice.

    tools/mutate.py             every mutation of tools/mutations.toml
    tools/mutate.py mask rope   only those whose name contains one of the words
    tools/mutate.py --check     only that every old text still occurs exactly once

A mutation with `needs` is only noticed on a processor with that feature of /proc/cpuinfo, and is passed over elsewhere.

Needs Python 3.11 and cargo. The copy keeps its build between mutations in LAWSON_MUTATE_TARGET, or in the temporary folder.
"""
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "mutations.toml"
KEYS = {"name", "file", "old", "new", "test"}
CPUINFO = pathlib.Path("/proc/cpuinfo")
FEATURES = set(CPUINFO.read_text().split()) if CPUINFO.is_file() else set()
LIMIT = 1800  # seconds for one test run: a mutation may hang it, which counts as noticed


def load():
    mutations = tomllib.loads(LIST.read_text())["mutation"]
    wrong = []
    for i, m in enumerate(mutations, 1):
        if m.keys() - {"needs"} != KEYS:
            wrong.append(f"mutation {i} has the keys {', '.join(sorted(m))}; it needs {', '.join(sorted(KEYS))}, and may have needs")
            continue
        path = ROOT / m["file"]
        found = path.read_text().count(m["old"]) if path.is_file() else -1
        if found < 0:
            wrong.append(f"{m['name']}: there is no {m['file']}")
        elif found != 1:
            wrong.append(f"{m['name']}: its old text occurs {found} times in {m['file']}, it must occur once")
        elif m["old"] == m["new"]:
            wrong.append(f"{m['name']}: old and new are the same")
    names = [m.get("name") for m in mutations]
    wrong += [f"two mutations are named {n}" for n in sorted({n for n in names if names.count(n) > 1})]
    if wrong:
        sys.exit("\n".join(wrong))
    return mutations


def cargo_test(tree, target, arguments, *more):
    command = ["cargo", "test", "--quiet", *shlex.split(arguments), *more]
    # Every mutation compiles the kernels again, which takes longer than the tests.
    env = dict(os.environ, CARGO_TARGET_DIR=str(target), CARGO_PROFILE_TEST_OPT_LEVEL="1", CARGO_PROFILE_TEST_DEBUG="0")
    try:
        return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return None


def tail(run):
    return "\n".join((run.stdout + run.stderr).splitlines()[-20:]) if run else f"it did not end within {LIMIT} s"


def copy_tree(to):
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def main(words):
    mutations = load()
    if words == ["--check"]:
        print(f"{len(mutations)} mutations, each old text occurs once")
        return 0
    chosen = [m for m in mutations if not words or any(w in m["name"] for w in words)]
    if not chosen:
        sys.exit(f"no mutation's name contains {' or '.join(words)}")
    for m in chosen:
        if m.get("needs", "") not in FEATURES | {""}:
            print(f"cannot be tried here, needs {m['needs']}: {m['name']}")
    chosen = [m for m in chosen if m.get("needs", "") in FEATURES | {""}]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="lawson-mutate-") as folder:
        tree = pathlib.Path(folder) / "tree"
        target = pathlib.Path(os.environ.get("LAWSON_MUTATE_TARGET") or pathlib.Path(folder) / "target")
        copy_tree(tree)
        # A test that fails anyway proves nothing.
        for test in sorted({m["test"] for m in chosen}):
            run = cargo_test(tree, target, test)
            if run is None or run.returncode != 0:
                sys.exit(f"cargo test {test} fails without any mutation:\n{tail(run)}")
        for m in chosen:
            path = tree / m["file"]
            text = path.read_text()
            path.write_text(text.replace(m["old"], m["new"]))
            # A mutation that does not compile would be "noticed" by the compiler, not by a test.
            built = cargo_test(tree, target, m["test"], "--no-run")
            if built is None or built.returncode != 0:
                sys.exit(f"{m['name']}: the mutated tree does not build:\n{tail(built)}")
            run = cargo_test(tree, target, m["test"])
            path.write_text(text)
            killed = run is None or run.returncode != 0
            print(f"{'noticed ' if killed else 'SURVIVED'} {m['name']}", flush=True)
            if not killed:
                survivors.append(m["name"])
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
