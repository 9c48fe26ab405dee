//! Matrix products.

use std::time::Instant;

use half::{bf16, f16};
use lawson_core::{DType, ErrorKind};
use lawson_cuda::{
    Device, DeviceBuffer,
    blas::{Batch, Blas, Matmul, Operand, Operands},
};

use super::{bound, device, distance, micros, numbers};

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

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
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
