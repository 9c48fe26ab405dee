//! Listing GPUs, compiling kernels and keeping them.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::Instant,
};

use lawson_core::ErrorKind;
use lawson_cuda::{Device, DiskCache, Instance, Jit, Kernel, Launch, Nvrtc, Source, devices, kernels::instances};

use super::{Params, SCALE, device, micros, numbers, scratch};

static BROKEN: Source = source!("broken", "p.z = nothing;");

#[test]
#[ignore = "needs a GPU"]
fn gpus_are_listed() {
    for info in devices().expect("a GPU") {
        println!("{info}\n{info:#?}");
        assert!(info.multiprocessors > 0 && info.memory_bytes > 0 && info.compute_capability.0 >= 7);
    }
    let device = device();
    let free = device.free_bytes().expect("free memory");
    assert!(free > 0 && free <= device.info().memory_bytes);
    assert_eq!(Device::open(1000).expect_err("not there").kind(), ErrorKind::Unavailable);
}

#[test]
#[ignore = "needs a GPU"]
fn kernels_are_compiled_once_and_found_again() {
    let started = Instant::now();
    let nvrtc = Nvrtc::load().expect("NVRTC");
    println!(
        "NVRTC {:?} knows {:?}; loaded in {:.1} ms",
        nvrtc.version(),
        nvrtc.architectures(),
        micros(started.elapsed()) / 1e3
    );
    let started = Instant::now();
    let device = device();
    println!("device opened in {:.1} ms", micros(started.elapsed()) / 1e3);
    let folder = scratch("jit");
    let instances: Vec<Instance> = (0..8).map(|f| Instance::new(&SCALE, &[("FACTOR", f)])).collect();
    let run = |what: &str| {
        let jit = Jit::new(&device, DiskCache::at(&folder)).expect("NVRTC");
        let started = Instant::now();
        let functions = jit.load(&instances).expect("compiles");
        println!(
            "{what}: 8 instances for {} in {:.2} ms, {} compiled",
            jit.target(),
            micros(started.elapsed()) / 1e3,
            jit.compiled()
        );
        println!("  {:?}", functions[1]);
        let started = Instant::now();
        jit.load(&instances).expect("loaded");
        println!("  again: {:.1} µs", micros(started.elapsed()));
        jit.compiled()
    };
    assert_eq!(run("cold"), 8);
    assert_eq!(run("warm"), 0);
    let entry = fs::read_dir(folder.join("cuda-1")).expect("entries").next().expect("one").expect("readable").path();
    let whole = fs::read(&entry).expect("an entry");
    fs::write(&entry, &whole[..whole.len() - 100]).expect("cut");
    assert_eq!(run("one cut short"), 1);
    assert_eq!(fs::read(&entry).expect("an entry"), whole, "replaced");
    let error = super::jit(&device).load(&[Instance::new(&BROKEN, &[("FACTOR", 3)])]).expect_err("does not compile");
    println!("{error}");
    assert!(error.to_string().contains("broken FACTOR=3") && error.to_string().contains("nothing"), "{error}");
}

#[test]
#[ignore = "needs a GPU"]
fn processes_share_a_folder_of_kernels() {
    let folder = scratch("processes");
    let run = |count: usize| {
        let child = || {
            Command::new(std::env::current_exe().expect("this program"))
                .args(["--ignored", "--exact", "jit::child_that_compiles", "--nocapture"])
                .env("LAWSON_TEST_KERNELS", &folder)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("starts")
        };
        let children: Vec<_> = (0..count).map(|_| child()).collect();
        let outputs = children.into_iter().map(|c| c.wait_with_output().expect("runs"));
        outputs
            .map(|output| {
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
                let compiled = said.split("compiled: ").nth(1).and_then(|rest| rest.split_whitespace().next());
                compiled.and_then(|n| n.parse::<usize>().ok()).expect("a number of kernels")
            })
            .collect::<Vec<_>>()
    };
    let cold = run(4);
    println!("compiled by each of four processes: {cold:?}");
    assert!(cold.iter().sum::<usize>() >= KERNELS as usize);
    let left: Vec<_> = fs::read_dir(folder.join("cuda-1")).expect("entries").map(|e| e.expect("readable").file_name()).collect();
    assert!(left.len() == KERNELS as usize && left.iter().all(|n| n.to_string_lossy().ends_with(".cubin")), "{left:?}");
    assert_eq!(run(2), [0, 0], "what one process has compiled the next finds");
}

/// Kernels that processes compile side by side.
const KERNELS: i64 = 12;

#[test]
#[ignore = "needs a GPU; does nothing by itself"]
fn child_that_compiles() {
    let Some(folder) = std::env::var_os("LAWSON_TEST_KERNELS") else { return };
    let device = device();
    let jit = Jit::new(&device, DiskCache::at(&PathBuf::from(folder))).expect("NVRTC");
    let instances: Vec<Instance> = (0..KERNELS).map(|f| Instance::new(&SCALE, &[("FACTOR", f)])).collect();
    let modules = jit.load(&instances).expect("compiles");
    let n = 1000;
    let x = numbers(3, n);
    let (dx, dy) = (device.upload(&x).expect("memory"), device.alloc(n * 4).expect("memory"));
    for (factor, module) in modules.iter().enumerate() {
        let kernel: Kernel<Params> = module.functions()[0].typed().expect("one struct");
        let params = Params { x: dx.ptr(), y: dy.ptr(), n: n as i32, add: 0.5 };
        // SAFETY: both buffers have n floats and live to the end of the test, which reads the results before.
        unsafe { kernel.launch(&Launch::new([4, 1, 1], 256), &params, &"a test") }.expect("launched");
        let y = dy.to_vec::<f32>(n).expect("read");
        assert!(y.iter().zip(&x).all(|(y, x)| *y == x.mul_add(factor as f32, 0.5)), "factor {factor}");
    }
    println!("compiled: {} ", jit.compiled());
}

#[test]
#[ignore = "needs a GPU"]
fn every_kernel_loads_and_fits() {
    let device = device();
    let folder = scratch("all");
    let all = instances(device.info().compute_capability, device.info().shared_memory_per_block);
    let plan: Vec<Instance> = ["norm", "qkv_epilogue", "attention_prefill", "attention_decode", "residual"]
        .iter()
        .flat_map(|name| all.iter().find(|i| i.source.name == *name).cloned())
        .collect();
    for what in ["cold", "warm"] {
        for instances in [&plan, &all] {
            let jit = Jit::new(&device, DiskCache::at(&folder)).expect("NVRTC");
            let started = Instant::now();
            let modules = jit.load(instances).expect("compiles");
            println!(
                "{what}: {} instances in {:.1} ms, {} compiled",
                instances.len(),
                micros(started.elapsed()) / 1e3,
                jit.compiled()
            );
            assert!(modules.iter().flat_map(|m| m.functions()).all(|f| f.registers() > 0));
        }
    }
}
