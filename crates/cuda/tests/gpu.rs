//! The rooms under the kernels, on a GPU: `cargo test -p lawson-cuda --test gpu -- --ignored --test-threads=1`.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use half::{bf16, f16};
use lawson_core::{DType, ErrorKind};
use lawson_cuda::{
    Device, DeviceBuffer, DiskCache, Graph, Instance, Jit, Kernel, KernelParams, Launch, Nvrtc, Source, Staging,
    blas::{Batch, Blas, Matmul, Operand, Operands},
    devices,
    kernels::instances,
    launch::{Swizzle, TensorMap},
};

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    x: u64,
    y: u64,
    n: i32,
    add: f32,
}
// SAFETY: the same fields as `Params` in the sources below.
unsafe impl KernelParams for Params {}

macro_rules! source {
    ($name:literal, $text:expr) => {
        Source {
            name: $name,
            kernels: &[$name],
            text: concat!(
                "#include \"params.cuh\"\nextern \"C\" __global__ void ",
                $name,
                "(const __grid_constant__ Params p) {\n",
                "const int i = blockIdx.x * blockDim.x + threadIdx.x;\n",
                $text,
                "\n}\n"
            ),
            headers: &[("params.cuh", "#pragma once\nstruct Params { const float* x; float* y; int n; float add; };\n")],
        }
    };
}

static SCALE: Source = source!("scale", "if (i < p.n) p.y[i] = p.x[i] * FACTOR + p.add;");
static SHARED: Source = source!(
    "shared",
    "extern __shared__ float s[]; s[blockDim.x * 40 + threadIdx.x] = p.x[i]; __syncthreads(); p.y[i] = s[blockDim.x * 40 + threadIdx.x];"
);
static CLUSTER: Source = source!(
    "cluster",
    "unsigned n, r; asm(\"mov.u32 %0, %%cluster_nctaid.x;\" : \"=r\"(n)); asm(\"mov.u32 %0, %%cluster_ctaid.x;\" : \"=r\"(r)); if (i < p.n) p.y[i] = n * 100 + r;"
);
static DEPENDENT: Source = source!(
    "dependent",
    "asm volatile(\"griddepcontrol.launch_dependents;\"); asm volatile(\"griddepcontrol.wait;\" ::: \"memory\"); if (i < p.n) p.y[i] = p.y[i] * 2 + 1;"
);
static FAULT: Source = source!("fault", "*(volatile float*)(p.x + 1000000000000ll) = i;");
static BROKEN: Source = source!("broken", "p.z = nothing;");

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("lawson-gpu-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    folder
}

fn device() -> Device {
    Device::open(0).expect("a GPU")
}

fn jit(device: &Device) -> Jit {
    Jit::new(device, DiskCache::at(&scratch("shared"))).expect("NVRTC")
}

fn kernel(jit: &Jit, source: &'static Source) -> Kernel<Params> {
    jit.load(&[Instance::new(source, &[("FACTOR", 3)])]).expect("compiles")[0].functions()[0].typed().expect("one struct")
}

/// Seeded numbers in −1 … 1.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Values rounded to `dtype`, on the device.
fn upload(device: &Device, values: &[f32], dtype: DType) -> DeviceBuffer {
    match dtype {
        DType::F32 => device.upload(values),
        DType::BF16 => device.upload(&values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>()),
        _ => device.upload(&values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>()),
    }
    .expect("memory")
}

fn rounded(values: &[f32], dtype: DType) -> Vec<f64> {
    let round = |v: f32| match dtype {
        DType::F32 => v,
        DType::BF16 => bf16::from_f32(v).to_f32(),
        _ => f16::from_f32(v).to_f32(),
    };
    values.iter().map(|&v| round(v).into()).collect()
}

fn download(buffer: &DeviceBuffer, dtype: DType, count: usize) -> Vec<f64> {
    match dtype {
        DType::F32 => buffer.to_vec::<f32>(count).expect("read").into_iter().map(f64::from).collect(),
        DType::BF16 => buffer.to_vec::<bf16>(count).expect("read").into_iter().map(f64::from).collect(),
        _ => buffer.to_vec::<f16>(count).expect("read").into_iter().map(f64::from).collect(),
    }
}

/// ‖got − want‖ / ‖want‖.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let sum = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    sum(&mut got.iter().zip(want).map(|(g, w)| g - w)) / sum(&mut want.iter().copied())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

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
    let error = self::jit(&device).load(&[Instance::new(&BROKEN, &[("FACTOR", 3)])]).expect_err("does not compile");
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
                .args(["--ignored", "--exact", "child_that_compiles", "--nocapture"])
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

#[test]
#[ignore = "needs a GPU"]
fn kernels_run_with_their_parameters() {
    let device = device();
    let jit = jit(&device);
    let scale = kernel(&jit, &SCALE);
    let n = 10_007;
    let x = numbers(1, n);
    let (dx, dy) = (device.upload(&x).expect("memory"), device.alloc(n * 4).expect("memory"));
    dy.fill(0xff).expect("filled");
    let params = Params { x: dx.ptr(), y: dy.ptr(), n: n as i32, add: 0.5 };
    let grid = Launch::new([(n as u32).div_ceil(256), 1, 1], 256);
    // SAFETY: both buffers have n floats and live to the end of the test, which reads the results before.
    let run = |k: &Kernel<Params>, launch: Launch| unsafe { k.launch(&launch, &params, &"a test") };
    run(&scale, grid).expect("launched");
    let y = dy.to_vec::<f32>(n).expect("read");
    assert!(y.iter().zip(&x).all(|(y, x)| *y == x.mul_add(3.0, 0.5)));

    assert!(jit.load(&[Instance::new(&SCALE, &[("FACTOR", 3)])]).expect("loaded")[0].kernel::<Small>("scale").is_err());
    run(&scale, Launch::new([0, 1, 1], 256)).expect("nothing to do");
    let error = run(&scale, Launch::new([1, 1, 1], 2048)).expect_err("too many threads");
    println!("{error}");
    assert!(error.to_string().contains("a test") && error.to_string().contains("scale FACTOR=3"), "{error}");
    let error = run(&scale, grid.shared(300_000)).expect_err("too much shared memory");
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);

    let shared = kernel(&jit, &SHARED);
    dy.fill(0xff).expect("filled");
    run(&shared, Launch::new([4, 1, 1], 512).shared(96_000)).expect("launched");
    assert_eq!(dy.to_vec::<f32>(2048).expect("read"), x[..2048]);
    println!("blocks per multiprocessor: {}", scale.function().blocks_per_multiprocessor(256, 0).expect("asked"));
    assert_eq!(shared.function().blocks_per_multiprocessor(512, 96_000).expect("asked"), 2);

    run(&scale, grid.cooperative()).expect("launched together");
    if device.info().compute_capability.0 >= 9 {
        let cluster = kernel(&jit, &CLUSTER);
        for size in [2u32, 4, 8, 16] {
            run(&cluster, Launch::new([16, 1, 1], 64).cluster([size, 1, 1])).expect("launched");
            let y = dy.to_vec::<f32>(1024).expect("read");
            assert!(y.iter().enumerate().all(|(i, &y)| y == (size * 100 + (i as u32 / 64) % size) as f32), "clusters of {size}");
        }
        let dependent = kernel(&jit, &DEPENDENT);
        dy.fill(0).expect("filled");
        for _ in 0..20 {
            run(&dependent, grid.overlapping_previous()).expect("launched");
        }
        let y = dy.to_vec::<f32>(n).expect("read");
        assert!(y.iter().all(|&y| y == ((1u32 << 20) - 1) as f32), "each waited for the one before");
    }

    let calls = 400;
    let started = Instant::now();
    for _ in 0..calls {
        run(&scale, grid).expect("launched");
    }
    let enqueued = started.elapsed();
    device.synchronize().expect("done");
    println!("launch: {:.2} µs of host time", micros(enqueued) / calls as f64);
    if device.info().compute_capability.0 >= 9 {
        let started = Instant::now();
        for _ in 0..calls {
            run(&scale, grid.overlapping_previous()).expect("launched");
        }
        println!("launch overlapping the one before: {:.2} µs of host time", micros(started.elapsed()) / calls as f64);
        device.synchronize().expect("done");
    }

    // The caller's stream, from another thread.
    // SAFETY: `device` outlives the thread, and its stream with it.
    let borrowed = unsafe { Device::with_stream(0, device.stream()) }.expect("the same context");
    std::thread::spawn(move || {
        let buffer = borrowed.upload(&[1.0f32, 2.0]).expect("memory");
        assert_eq!(buffer.to_vec::<f32>(2).expect("read"), [1.0, 2.0]);
    })
    .join()
    .expect("no panic");
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Small(u64);
// SAFETY: never launched; the point is that it does not get that far.
unsafe impl KernelParams for Small {}

#[test]
#[ignore = "needs a GPU"]
fn a_fault_is_reported_with_its_kernel() {
    // A fault ends the process's use of the GPU, so a child has it.
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "child_with_a_fault", "--nocapture"])
        .env("LAWSON_TEST_FAULT", "1")
        .env("LAWSON_CUDA_SYNC", "1")
        .output()
        .expect("runs");
    let output = String::from_utf8_lossy(&child.stdout).into_owned();
    println!("{output}");
    assert!(output.contains("block b=1: fault FACTOR=3"), "{output}{}", String::from_utf8_lossy(&child.stderr));
    assert!(output.contains("ILLEGAL_ADDRESS"), "{output}");
    assert!(child.status.success(), "dropping everything afterwards does not crash");
}

#[test]
#[ignore = "needs a GPU; does nothing by itself"]
fn child_with_a_fault() {
    if std::env::var_os("LAWSON_TEST_FAULT").is_none() {
        return;
    }
    let device = device();
    let fault = kernel(&jit(&device), &FAULT);
    let buffer = device.alloc(4).expect("memory");
    let params = Params { x: buffer.ptr(), y: 0, n: 1, add: 0.0 };
    // SAFETY: none: the write outside of every buffer is what is tested, in a process that ends after it.
    let error = unsafe { fault.launch(&Launch::new([1, 1, 1], 1), &params, &"block b=1") }.expect_err("it faults");
    assert_eq!(error.kind(), ErrorKind::Device);
    println!("{error}");
    println!("afterwards: {}", device.synchronize().expect_err("the context is lost"));
}

#[derive(Clone, Copy)]
#[repr(C)]
struct MapParams {
    map: TensorMap,
    y: u64,
    row: i32,
    column: i32,
}
// SAFETY: the same fields as `MapParams` in the source below.
unsafe impl KernelParams for MapParams {}

static TENSOR_MAP: Source = Source {
    name: "tensor_map",
    kernels: &["tensor_map"],
    text: r#"
struct alignas(64) TensorMap { unsigned long long opaque[16]; };
struct MapParams { TensorMap map; float* y; int row, column; };
extern "C" __global__ void tensor_map(const __grid_constant__ MapParams p) {
    __shared__ alignas(128) float tile[8 * 16];
    __shared__ alignas(8) unsigned long long barrier;
    const unsigned s = (unsigned)__cvta_generic_to_shared(tile), b = (unsigned)__cvta_generic_to_shared(&barrier);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(b));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(8 * 16 * 4) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
            :: "r"(s), "l"(&p.map), "r"(p.column), "r"(p.row), "r"(b) : "memory");
    }
    __syncthreads();
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0; @!done bra again; }" :: "r"(b) : "memory");
    p.y[threadIdx.x] = tile[threadIdx.x];
}
"#,
    headers: &[],
};

#[test]
#[ignore = "needs a GPU"]
fn tensor_maps_describe_memory() {
    let device = device();
    if device.info().compute_capability.0 < 9 {
        return;
    }
    let (rows, columns) = (50, 40);
    let x = numbers(5, rows * columns);
    let dx = device.upload(&x).expect("memory");
    let dy = device.alloc(8 * 16 * 4).expect("memory");
    let make = |strides: &[u64], tile: &[u32]| {
        TensorMap::tiled(&device, DType::F32, dx.ptr(), &[columns as u64, rows as u64], strides, tile, Swizzle::None)
    };
    for (strides, tile) in [(&[164][..], &[16, 8][..]), (&[], &[16, 8]), (&[160], &[16]), (&[160], &[300, 8])] {
        println!("{}", make(strides, tile).expect_err("refused"));
    }
    let kernel: Kernel<MapParams> =
        jit(&device).load(&[Instance::new(&TENSOR_MAP, &[])]).expect("compiles")[0].functions()[0].typed().expect("one struct");
    for (row, column) in [(0, 0), (7, 12), (45, 32)] {
        let params = MapParams { map: make(&[160], &[16, 8]).expect("a map"), y: dy.ptr(), row, column };
        // SAFETY: the map describes `dx`, `dy` has the tile's size, and both live to the end of the test.
        unsafe { kernel.launch(&Launch::new([1, 1, 1], 128), &params, &"a tile") }.expect("launched");
        let y = dy.to_vec::<f32>(128).expect("read");
        for (i, &y) in y.iter().enumerate() {
            let (r, c) = (row as usize + i / 16, column as usize + i % 16);
            let want = if r < rows && c < columns { x[r * columns + c] } else { 0.0 };
            assert_eq!(y, want, "row {r} column {c}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn memory_is_accounted_exactly_and_refused_in_time() {
    let device = device();
    assert_eq!((device.usage().in_use, device.usage().peak), (0, 0));
    let a = device.alloc(1000).expect("memory");
    let b = device.alloc(3 << 20).expect("memory");
    assert_eq!(device.usage().in_use, 1000 + (3 << 20));
    let address = a.ptr();
    drop(a);
    assert_eq!((device.usage().in_use, device.usage().peak), (3 << 20, 1000 + (3 << 20)));
    let reserved = device.usage().reserved;
    let a = device.alloc(1001).expect("memory");
    assert_eq!((a.ptr(), device.usage().reserved), (address, reserved), "a dropped block is used again");
    device.reset_peak();
    assert_eq!(device.usage().peak, 1001 + (3 << 20));

    let free = device.free_bytes().expect("free");
    let error = device.alloc(free as usize + (1 << 30)).expect_err("more than there is");
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert_eq!(device.alloc(usize::MAX).expect_err("more than a number holds").kind(), ErrorKind::OutOfMemory);
    assert_eq!(device.usage().in_use, 1001 + (3 << 20), "a refusal changes nothing");
    b.write(&[7u8; 3 << 20]).expect("still there");
    assert_eq!(b.to_vec::<u8>(3 << 20).expect("still there"), vec![7; 3 << 20]);

    // What is kept for later makes room for what is needed now.
    let large = device.free_bytes().expect("free") as usize / 10 * 6;
    drop(device.alloc(large).expect("memory"));
    let other = device.alloc(large / 8 * 9).expect("the pool gives back what nobody uses");
    drop((a, b, other));
    device.trim().expect("trimmed");
    assert_eq!((device.usage().in_use, device.usage().reserved), (0, 0));
    let empty = device.alloc(0).expect("nothing");
    assert!(empty.ptr() != 0 && empty.write::<f32>(&[]).is_ok() && empty.write(&[1u8]).is_err());

    let to = device.alloc(64).expect("memory");
    let staging = Staging::new(&device, 64, 3).expect("page-locked memory");
    let started = Instant::now();
    for i in 0..100i32 {
        staging.send(&to, 4, &[i, i + 1, i + 2]).expect("sent");
    }
    println!("staged copy: {:.2} µs of host time", micros(started.elapsed()) / 100.0);
    let mut got = [0i32; 3];
    to.read_at(4, &mut got).expect("read");
    assert_eq!(got, [99, 100, 101]);
    for i in 0..10i32 {
        let (a, b) = ([i, i + 1], [i + 2]);
        staging.send_all(&to, [(20, &a[..]), (0, &[]), (32, &b[..])].into_iter()).expect("sent");
    }
    let (mut pair, mut one) = ([0i32; 2], [0i32; 1]);
    to.read_at(20, &mut pair).expect("read");
    to.read_at(32, &mut one).expect("read");
    assert_eq!((pair, one), ([9, 10], [11]));
    assert!(staging.send_all(&to, [(0, &[0i32; 9][..]), (0, &[0i32; 8][..])].into_iter()).is_err(), "more than a piece");
    assert!(staging.send_all(&to, [(0, &[1i32][..]), (64, &[0i32][..])].into_iter()).is_err(), "behind the buffer");
    to.read_at(4, &mut got).expect("read");
    assert_eq!(got, [99, 100, 101], "what is refused sends nothing");
    assert!(staging.send(&to, 0, &[0u8; 65]).is_err() && staging.send(&to, 60, &[0u64]).is_err());
    let copy = device.alloc(12).expect("memory");
    copy.copy_from(0, &to, 4, 12).expect("copied");
    assert_eq!(copy.to_vec::<i32>(3).expect("read"), [99, 100, 101]);
}

/// Largest relative L2 distance that rounding the result to its type, and sums in f32, explain.
fn bound(dtype: DType, out: DType) -> f64 {
    match (dtype, out) {
        (_, DType::F32) => 2e-6,
        (DType::BF16, _) => 2.5e-3,
        _ => 3.5e-4,
    }
}

#[test]
#[ignore = "needs a GPU"]
fn products_agree_with_float64() {
    let device = device();
    let started = Instant::now();
    let blas = Blas::new(&device).expect("cuBLASLt");
    println!("cuBLASLt {} started in {:.1} ms", blas.version(), micros(started.elapsed()) / 1e3);
    let mut worst = 0.0f64;
    for dtype in DType::ALL {
        for out in [dtype, DType::F32] {
            for (m, n, k) in [(1, 1, 1), (1, 4096, 512), (65, 130, 257), (128, 256, 4096), (7, 80, 33), (3, 1025, 2049)] {
                for (bias, residual) in [(false, false), (true, false), (false, true), (true, true)] {
                    let (x, w, bv, c) = (numbers(1, m * k), numbers(2, n * k), numbers(3, n), numbers(4, m * n));
                    let (dx, dw) = (upload(&device, &x, dtype), upload(&device, &w, dtype));
                    let (db, dc) = (upload(&device, &bv, out), upload(&device, &c, out));
                    let dy = device.alloc(m * n * out.size()).expect("memory");
                    dy.fill(0xff).expect("poisoned");
                    // Odd rows are not aligned to more than an element.
                    let matmul = Matmul { out, bias, residual, ..Matmul::projection(m, n, k, dtype) };
                    let plan = match blas.plan(&matmul) {
                        Ok(plan) => plan,
                        Err(error) => {
                            println!("NOT TAKEN: {error}");
                            worst = f64::INFINITY;
                            continue;
                        }
                    };
                    let operands =
                        Operands { bias: db.ptr(), c: dc.ptr(), scale: 0.5, ..Operands::new(dx.ptr(), dw.ptr(), dy.ptr()) };
                    // SAFETY: every buffer has the planned size and lives until the result is read.
                    unsafe { plan.run(&operands) }.expect("enqueued");
                    let got = download(&dy, out, m * n);
                    let (x, w, bv, c) = (rounded(&x, dtype), rounded(&w, dtype), rounded(&bv, out), rounded(&c, out));
                    let want: Vec<f64> = (0..m * n)
                        .map(|at| {
                            let (i, j) = (at / n, at % n);
                            let dot: f64 = x[i * k..][..k].iter().zip(&w[j * k..][..k]).map(|(a, b)| a * b).sum();
                            0.5 * dot + if bias { bv[j] } else { 0.0 } + if residual { c[at] } else { 0.0 }
                        })
                        .collect();
                    let error = distance(&got, &want) / bound(dtype, out);
                    if error.is_nan() || error > 1.0 {
                        println!("{matmul}: {error:.2} of the bound");
                        worst = f64::INFINITY;
                    }
                    worst = worst.max(error);
                    let first = dy.to_vec::<u8>(m * n * out.size()).expect("read");
                    for _ in 0..5 {
                        // SAFETY: as above.
                        unsafe { plan.run(&operands) }.expect("enqueued");
                        assert!(dy.to_vec::<u8>(first.len()).expect("read") == first, "{matmul}: other bits");
                    }
                    if residual {
                        // The same C elsewhere, and in place.
                        let again = device.alloc(first.len()).expect("memory");
                        again.copy_from(0, &dc, 0, first.len()).expect("copied");
                        dy.fill(0xff).expect("poisoned");
                        // SAFETY: as above.
                        unsafe { plan.run(&Operands { c: again.ptr(), ..operands }) }.expect("enqueued");
                        if dy.to_vec::<u8>(first.len()).expect("read") != first {
                            println!("{plan:?}: other bits with C elsewhere");
                            worst = f64::INFINITY;
                        }
                        let in_place = || {
                            dy.copy_from(0, &dc, 0, first.len()).expect("copied");
                            // SAFETY: as above; C is D.
                            unsafe { plan.run(&Operands { c: dy.ptr(), ..operands }) }.expect("enqueued");
                            let error = distance(&download(&dy, out, m * n), &want) / bound(dtype, out);
                            assert!(error <= 1.0, "{matmul} in place: {error:.2} of the bound");
                            dy.to_vec::<u8>(first.len()).expect("read")
                        };
                        assert!(in_place() == in_place(), "{matmul} in place: other bits");
                    }
                }
            }
        }
    }
    println!("largest error: {worst:.3} of its bound; workspace {} bytes, in use {:?}", blas.workspace_bytes(), device.usage());
    assert!(worst <= 1.0);
    let plan = blas.plan(&Matmul::projection(2, 2, 2, DType::F32)).expect("planned");
    // SAFETY: refused before anything is enqueued.
    assert_eq!(unsafe { plan.run(&Operands::new(256, 256, 0)) }.expect_err("no D").kind(), ErrorKind::InvalidInput);
}

#[test]
#[ignore = "needs a GPU"]
fn scores_and_weighted_values_are_batched_products() {
    let device = device();
    let blas = Blas::new(&device).expect("cuBLASLt");
    for dtype in DType::ALL {
        for (s, l, h, g, d) in [(17, 33, 6, 2, 64), (16, 64, 4, 4, 80), (1, 100, 8, 1, 128), (5, 41, 4, 2, 33)] {
            let r = h / g;
            // q [S, H, D], k and v [G, L, D], scores [H, S, L], o [S, H, D].
            let (q, k, v) = (numbers(1, s * h * d), numbers(2, g * l * d), numbers(3, g * l * d));
            let (dq, dk, dv) = (upload(&device, &q, dtype), upload(&device, &k, dtype), upload(&device, &v, dtype));
            let scores = device.alloc(h * s * l * 4).expect("memory");
            scores.fill(0xff).expect("poisoned");
            let step = |a: usize, b: usize, d: usize| Batch { count: 1, a: a as i64, b: b as i64, c: 0, d: d as i64 };
            let alignment =
                if d % 16 == 0 && dtype == DType::F32 { 16 } else { 4 >> u32::from(d % 2 == 1 && dtype != DType::F32) };
            let matmul = Matmul {
                m: s,
                n: l,
                k: d,
                dtype,
                out: DType::F32,
                b: Operand::Rows,
                lda: h * d,
                ldb: d,
                ldc: l,
                ldd: l,
                bias: false,
                residual: false,
                batch: [Batch { count: g, ..step(r * d, l * d, r * s * l) }, Batch { count: r, ..step(d, 0, s * l) }],
                alignment,
            };
            let plan = blas.plan(&matmul).expect("planned");
            // SAFETY: every buffer has the planned size and lives until the result is read.
            unsafe { plan.run(&Operands { scale: 0.25, ..Operands::new(dq.ptr(), dk.ptr(), scores.ptr()) }) }.expect("enqueued");
            let (q, k, v) = (rounded(&q, dtype), rounded(&k, dtype), rounded(&v, dtype));
            let mut want = vec![0.0; h * s * l];
            for (at, want) in want.iter_mut().enumerate() {
                let (head, i, j) = (at / (s * l), at / l % s, at % l);
                *want = 0.25 * (0..d).map(|e| q[(i * h + head) * d + e] * k[(head / r * l + j) * d + e]).sum::<f64>();
            }
            let error = distance(&download(&scores, DType::F32, h * s * l), &want);
            println!("scores {dtype} s={s} l={l} h={h}/{g} d={d}: {} calls, error {error:.1e}", plan.calls());
            assert!(error <= bound(dtype, DType::F32));

            let p = numbers(4, h * s * l);
            let dp = upload(&device, &p, dtype);
            let p = rounded(&p, dtype);
            let o = device.alloc(s * h * d * dtype.size()).expect("memory");
            o.fill(0xff).expect("poisoned");
            let odd = dtype != DType::F32 && (d % 2 == 1 || l % 2 == 1);
            let matmul = Matmul {
                n: d,
                k: l,
                out: dtype,
                b: Operand::Columns,
                lda: l,
                ldb: d,
                ldc: h * d,
                ldd: h * d,
                batch: [Batch { count: g, ..step(r * s * l, l * d, r * d) }, Batch { count: r, ..step(s * l, 0, d) }],
                alignment: if odd { 2 } else { 4 },
                ..matmul
            };
            let plan = blas.plan(&matmul).expect("planned");
            // SAFETY: as above.
            unsafe { plan.run(&Operands::new(dp.ptr(), dv.ptr(), o.ptr())) }.expect("enqueued");
            let mut want = vec![0.0; s * h * d];
            for (at, want) in want.iter_mut().enumerate() {
                let (i, head, e) = (at / (h * d), at / d % h, at % d);
                *want = (0..l).map(|j| p[(head * s + i) * l + j] * v[(head / r * l + j) * d + e]).sum();
            }
            let error = distance(&download(&o, dtype, s * h * d), &want);
            println!("values {dtype}: {} calls, error {error:.1e}", plan.calls());
            assert!(error <= bound(dtype, dtype));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn graphs_replay_what_was_captured() {
    let device = device();
    let (jit, blas) = (jit(&device), Blas::new(&device).expect("cuBLASLt"));
    let scale = kernel(&jit, &SCALE);
    let n = 64;
    let (x, w) = (numbers(1, n * n), numbers(2, n * n));
    let (dx, dw) = (device.upload(&x).expect("memory"), device.upload(&w).expect("memory"));
    let (dy, dz) = (device.alloc(n * n * 4).expect("memory"), device.alloc(n * n * 4).expect("memory"));
    let plan = blas.plan(&Matmul::projection(n, n, n, DType::F32)).expect("planned");
    let params = Params { x: dy.ptr(), y: dz.ptr(), n: (n * n) as i32, add: 1.0 };
    let launch = Launch::new([(n * n) as u32 / 256, 1, 1], 256).overlapping_previous();
    let work = || {
        // SAFETY: every buffer has the planned size and lives to the end of the test, and so do plan and kernel.
        unsafe { plan.run(&Operands::new(dx.ptr(), dw.ptr(), dy.ptr())) }?;
        for _ in 0..3 {
            // SAFETY: as above.
            unsafe { scale.launch(&launch, &params, &"a graph") }?;
        }
        Ok(())
    };
    // SAFETY: as above.
    let mut graph = unsafe { Graph::capture(&device, work) }.expect("captured");
    println!("{} nodes", graph.nodes());
    dz.fill(0xff).expect("poisoned");
    graph.replay().expect("replayed");
    let first = dz.to_vec::<f32>(n * n).expect("read");
    let want: Vec<f64> = (0..n * n)
        .map(|at| (0..n).map(|e| f64::from(x[at / n * n + e]) * f64::from(w[at % n * n + e])).sum::<f64>() * 3.0 + 1.0)
        .collect();
    assert!(distance(&first.iter().map(|&v| v.into()).collect::<Vec<_>>(), &want) <= bound(DType::F32, DType::F32));
    for _ in 0..20 {
        graph.replay().expect("replayed");
    }
    assert_eq!(dz.to_vec::<f32>(n * n).expect("read"), first);
    let started = Instant::now();
    for _ in 0..1000 {
        graph.replay().expect("replayed");
    }
    println!("replay: {:.2} µs of host time", micros(started.elapsed()) / 1000.0);
    device.synchronize().expect("done");
    // Waiting cannot be captured; the device works on.
    // SAFETY: nothing is captured.
    let error = unsafe { Graph::capture(&device, || device.synchronize()) }.err().expect("refused");
    println!("{error}");
    // SAFETY: nothing is captured.
    let refused = unsafe { Graph::capture(&device, || Err(lawson_core::Error::invalid("no"))) };
    assert_eq!(refused.err().expect("passed on").to_string(), "no");
    work().expect("enqueued");
    assert_eq!(dz.to_vec::<f32>(n * n).expect("read"), first);
}

#[test]
#[ignore = "needs a GPU"]
fn products_are_fast() {
    let device = device();
    let blas = Blas::new(&device).expect("cuBLASLt");
    let run = |matmul: &Matmul, repeats: usize| {
        let started = Instant::now();
        let plan = blas.plan(matmul).expect("planned");
        let planned = micros(started.elapsed());
        let Matmul { m, n, k, dtype, .. } = *matmul;
        let (x, w) = (upload(&device, &numbers(1, m * k), dtype), upload(&device, &numbers(2, n * k), dtype));
        let (b, c) = (upload(&device, &numbers(3, n), dtype), upload(&device, &numbers(4, m * n), dtype));
        let y = device.alloc(m * n * matmul.out.size()).expect("memory");
        let operands = Operands { bias: b.ptr(), c: c.ptr(), ..Operands::new(x.ptr(), w.ptr(), y.ptr()) };
        // SAFETY: every buffer has the planned size and lives until the work is waited for.
        let once = || unsafe { plan.run(&operands) }.expect("enqueued");
        (0..3).for_each(|_| once());
        device.synchronize().expect("done");
        let started = Instant::now();
        (0..repeats).for_each(|_| once());
        let host = micros(started.elapsed()) / repeats as f64;
        device.synchronize().expect("done");
        let times = (0..20)
            .map(|_| {
                let start = device.record().expect("event");
                once();
                device.record().expect("event").ms_since(&start).expect("timed")
            })
            .collect();
        let ms = median(times);
        println!(
            "{plan:?}: {ms:.4} ms, {:.0} TFLOP/s; host {host:.2} µs a call; planned in {planned:.0} µs",
            matmul.flops() / ms / 1e9,
        );
    };
    let big = Matmul::projection(8192, 8192, 8192, DType::BF16);
    let block = Matmul::projection(2048, 4096, 4096, DType::BF16);
    run(&big, 3);
    run(&block, 100);
    run(&Matmul { bias: true, ..block }, 100);
    run(&Matmul { residual: true, ..block }, 100);
    run(&Matmul { bias: true, residual: true, ..block }, 100);
    run(&Matmul::projection(2048, 4096, 4096, DType::F16), 100);
    run(&Matmul::projection(2048, 4096, 4096, DType::F32), 20);
    run(&Matmul::projection(2048, 6144, 4096, DType::BF16), 100);
    run(&Matmul::projection(1, 6144, 4096, DType::BF16), 400);
    run(&Matmul::projection(1, 4096, 4096, DType::BF16), 400);
    run(&Matmul { residual: true, ..Matmul::projection(1, 4096, 4096, DType::BF16) }, 400);
    run(&Matmul::projection(1, 64, 64, DType::BF16), 400);
    println!("workspace {}, {:?}", blas.workspace_bytes(), device.usage());
}
