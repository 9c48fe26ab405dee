//! Packed weights give back what was packed.

use lawson_core::{
    DType, TensorRef,
    kernel::{Backend, KernelCase, KernelOp},
    round_to,
};
use lawson_cpu::{
    Cpu, Isa,
    dispatch::Kernels,
    pack::{PackedMatrix, tile_columns},
    threads::Threads,
};
use lawson_testkit::rng::Rng;

/// The product with the identity holds each weight alone, so that it must come back exactly.
#[test]
fn the_product_with_the_identity_is_the_weight() {
    let mut rng = Rng::new(3);
    for isa in Isa::available() {
        let cpu = Cpu::new(isa, 2).unwrap();
        let kernel = cpu.kernels().into_iter().find(|k| k.op == KernelOp::Gemm).unwrap();
        for n in [1, 7, 15, 16, 17, 31, 33, 64, 127, 128, 129, 300] {
            for k in [1, 2, 31, 33, 255, 257] {
                for weight_dtype in DType::ALL {
                    let w = rng.normals(n * k, 1.0);
                    let mut x = vec![0.0; k * k];
                    x.iter_mut().step_by(k + 1).for_each(|v| *v = 1.0);
                    let case = KernelCase::Gemm { m: k, n, k, x, w: w.clone(), bias: None, weight_dtype };
                    let got = cpu.run(&kernel, &case).unwrap();
                    for (i, got) in got.iter().enumerate() {
                        let want = round_to(weight_dtype, w[i % n * k + i / n]);
                        assert_eq!(*got, want, "{isa} {n} x {k} {weight_dtype}: weight [{}, {}]", i % n, i / n);
                    }
                }
            }
        }
    }
}

#[test]
fn tiles_hold_whole_units() {
    for lanes in [8, 16] {
        for unit in [1, 2, 16, 32, 33, 64, 80, 96, 112, 128, 256, 512] {
            for count in [1, 2, 3, 8, 40] {
                let columns = tile_columns(unit, unit * count, lanes);
                assert!(columns.is_multiple_of(unit) && (unit..=unit * count).contains(&columns), "{unit} x {count}: {columns}");
            }
        }
    }
}

#[test]
fn what_is_not_a_matrix_is_refused() {
    let (kernels, threads) = (Kernels::of(Isa::Portable).unwrap(), Threads::new(1).unwrap());
    let data = vec![0f32; 24];
    let views = [TensorRef::new(&data, &[2, 3, 4]).unwrap(), TensorRef::strided(&data, &[2, 6], &[12, 1]).unwrap()];
    for view in views {
        let error = PackedMatrix::new(&view, DType::F32, 2, &kernels, &threads).err().expect("accepted").to_string();
        assert!(error.contains("contiguous matrix"), "{error}");
    }
}
