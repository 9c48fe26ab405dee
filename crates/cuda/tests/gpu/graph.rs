//! Captures and replays.

use std::time::Instant;

use lawson_core::DType;
use lawson_cuda::{
    Graph, Launch,
    blas::{Blas, Matmul, Operands},
};

use super::{Params, SCALE, bound, device, distance, jit, kernel, micros, numbers};

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
