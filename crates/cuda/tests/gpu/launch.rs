//! Launches: parameters, geometry, faults and tensor maps.

use std::{process::Command, time::Instant};

use lawson_core::{DType, ErrorKind};
use lawson_cuda::{
    Device, Instance, Kernel, KernelParams, Launch, Source,
    launch::{Swizzle, TensorMap},
};

use super::{Params, SCALE, device, jit, kernel, micros, numbers};

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
        .args(["--ignored", "--exact", "launch::child_with_a_fault", "--nocapture"])
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
