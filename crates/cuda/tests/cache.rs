//! The cache of compiled kernels: what a key covers, and entries that are cut short, altered, or written by two at once.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Barrier,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use lawson_core::{Error, ErrorKind};
use lawson_cuda::{DiskCache, Instance, Source, cache::Key};

type Header = (&'static str, &'static str);

fn instance(name: &'static str, text: &'static str, headers: &[Header], macros: &[(&'static str, i64)]) -> Instance {
    let source =
        Box::leak(Box::new(Source { name, kernels: &[], text, headers: Box::leak(headers.to_vec().into_boxed_slice()) }));
    Instance::new(source, macros)
}

fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels").join(test);
    let _ = fs::remove_dir_all(&folder);
    folder
}

fn key(n: i64) -> Key {
    Key::new(&instance("k", "text", &[], &[("N", n)]), "sm_90a", (13, 0))
}

#[test]
fn a_key_covers_all_that_the_code_depends_on() {
    let base = || instance("k", "text", &[("a.cuh", "one"), ("b.cuh", "two")], &[("X", 1), ("Y", 2)]);
    let of = |i: &Instance| Key::new(i, "sm_90a", (13, 0));
    assert_eq!(of(&base()), of(&base()), "equal parts have equal keys");
    let others = [
        of(&base()),
        of(&instance("j", "text", base().source.headers, &base().macros)),
        of(&instance("k", "text ", base().source.headers, &base().macros)),
        of(&instance("k", "text", &[("a.cuh", "one."), ("b.cuh", "two")], &base().macros)),
        of(&instance("k", "text", &[("a.cuh", "one"), ("b.cuh", "two.")], &base().macros)),
        of(&instance("k", "text", &[("c.cuh", "one"), ("b.cuh", "two")], &base().macros)),
        of(&instance("k", "text", &[("a.cuhone", ""), ("b.cuh", "two")], &base().macros)),
        of(&instance("k", "text", &[("a.cuh", "one")], &base().macros)),
        of(&instance("k", "text", base().source.headers, &[("X", 1)])),
        of(&instance("k", "text", base().source.headers, &[("X", 1), ("Y", 3)])),
        of(&instance("k", "text", base().source.headers, &[("X", 1), ("Z", 2)])),
        Key::new(&base(), "sm_80", (13, 0)),
        Key::new(&base(), "sm_90a", (12, 0)),
        Key::new(&base(), "sm_90a", (13, 1)),
    ];
    let distinct: HashSet<Key> = others.into_iter().collect();
    assert_eq!(distinct.len(), others.len());
}

#[test]
fn an_entry_is_compiled_once() {
    let cache = DiskCache::at(&folder("once"));
    let code = vec![7u8; 1000];
    assert_eq!(cache.get(&key(1)), None);
    assert_eq!(cache.get_or_compile(&key(1), || Ok(code.clone())).expect("compiled"), code);
    let again = cache.get_or_compile(&key(1), || panic!("it is there"));
    assert_eq!(again.expect("found"), code);
    assert_eq!(cache.get(&key(2)), None, "another key has no entry");
}

#[test]
fn a_failed_compilation_is_reported_and_not_kept() {
    let cache = DiskCache::at(&folder("failed"));
    let error = cache.get_or_compile(&key(1), || Err(Error::new(ErrorKind::Device, "line 3"))).expect_err("reported");
    assert_eq!(error.to_string(), "line 3");
    assert_eq!(cache.get(&key(1)), None);
}

#[test]
fn a_corrupted_entry_is_compiled_again_and_replaced() {
    let cache = DiskCache::at(&folder("corrupted"));
    let code: Vec<u8> = (0..100).collect();
    assert!(cache.put(&key(1), &code));
    let path = cache.folder().expect("a folder").join(format!("{}.cubin", key(1)));
    let whole = fs::read(&path).expect("an entry");
    let mut bad: Vec<Vec<u8>> = (0..whole.len()).map(|cut| whole[..cut].to_vec()).collect();
    for at in 0..whole.len() {
        let mut altered = whole.clone();
        altered[at] ^= 0x10;
        bad.push(altered);
    }
    bad.push([whole.clone(), vec![0]].concat());
    for entry in bad {
        fs::write(&path, &entry).expect("written");
        assert_eq!(cache.get(&key(1)), None, "{} bytes", entry.len());
    }
    assert_eq!(cache.get_or_compile(&key(1), || Ok(code.clone())).expect("compiled"), code);
    assert_eq!(fs::read(&path).expect("an entry"), whole, "replaced");
    // An entry under another's name.
    fs::copy(&path, cache.folder().expect("a folder").join(format!("{}.cubin", key(2)))).expect("copied");
    assert_eq!(cache.get(&key(2)), None);
}

#[test]
fn writers_of_the_same_entry_do_not_disturb_each_other() {
    let folder = folder("writers");
    let code: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    let (together, compiled) = (Barrier::new(4), AtomicU32::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let cache = DiskCache::at(&folder);
                let made = cache.get_or_compile(&key(1), || {
                    // All of them have found nothing before one of them writes.
                    together.wait();
                    compiled.fetch_add(1, Ordering::Relaxed);
                    Ok(code.clone())
                });
                assert!(made.expect("compiled") == code);
                for _ in 0..50 {
                    assert!(cache.put(&key(1), &code));
                    assert!(cache.get(&key(1)).is_some_and(|found| found == code), "an entry is whole whenever it is read");
                }
            });
        }
    });
    assert_eq!(compiled.into_inner(), 4);
    let files: Vec<_> = fs::read_dir(DiskCache::at(&folder).folder().expect("a folder")).expect("readable").collect();
    assert_eq!(files.len(), 1, "no temporary file is left: {files:?}");
}

#[test]
fn a_folder_that_cannot_be_written_is_no_error() {
    let folder = folder("unwritable");
    fs::create_dir_all(folder.parent().expect("a parent")).expect("made");
    // A file where the folder would be.
    let _ = fs::remove_file(&folder);
    fs::write(&folder, b"").expect("written");
    let cache = DiskCache::at(&folder);
    assert!(!cache.put(&key(1), b"code"));
    assert_eq!(cache.get_or_compile(&key(1), || Ok(b"code".to_vec())).expect("compiled"), b"code");
}
