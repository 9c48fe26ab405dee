//! Rows change their dtype exactly as the `half` crate rounds, on every instruction set.

use half::{bf16, f16};
use lawson_core::DType;
use lawson_cpu::{Isa, dispatch::Kernels, kernels::rows::Rows};
use lawson_testkit::poison::Poisoned;

/// Every exponent and sign with spread mantissas; ties, their neighbours, limits, numbers denormal in f16 and in bf16, NaN.
fn samples() -> Vec<f32> {
    let mut x: Vec<f32> = (0..1u32 << 16).map(|i| f32::from_bits(i.wrapping_mul(65_521) ^ i << 7)).collect();
    for high in (0..1u32 << 16).step_by(37) {
        x.extend([0x7fff, 0x8000, 0x8001, 0, 0x1000, 0x0fff, 0x1001, 0x3000].map(|low| f32::from_bits(high << 16 | low)));
    }
    x.extend([
        0.0,
        -0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN,
        65504.0,
        65519.9,
        65520.0,
        6e-8,
        2.9e-8,
        1e-45,
    ]);
    x
}

fn rows<T>(x: &mut [T], dtype: DType) -> Rows {
    Rows { start: x.as_mut_ptr().cast(), dtype, stride: x.len() }
}

#[test]
fn f32_to_half_precision_and_back() {
    for isa in Isa::available() {
        let kernels = Kernels::of(isa).unwrap();
        let mut x = samples();
        let n = x.len();
        let (mut b, mut h) = (Poisoned::<bf16>::new(n), Poisoned::<f16>::new(n));
        let from = rows(&mut x, DType::F32);
        // SAFETY: every row has n elements of its dtype.
        unsafe {
            (kernels.convert_row)(from, rows(b.as_mut_slice(), DType::BF16), n);
            (kernels.convert_row)(from, rows(h.as_mut_slice(), DType::F16), n);
        }
        for (i, &v) in x.iter().enumerate() {
            let (got_b, got_h) = (b.as_slice()[i], h.as_slice()[i]);
            if v.is_nan() {
                assert!(got_b.is_nan() && got_h.is_nan(), "{isa}: NaN became {got_b} and {got_h}");
            } else {
                assert_eq!(got_b.to_bits(), bf16::from_f32(v).to_bits(), "{isa}: {v:e} as bf16");
                assert_eq!(got_h.to_bits(), f16::from_f32(v).to_bits(), "{isa}: {v:e} as f16");
            }
        }
        let (mut back_b, mut back_h) = (vec![0f32; n], vec![0f32; n]);
        // SAFETY: as above.
        unsafe {
            (kernels.convert_row)(rows(b.as_mut_slice(), DType::BF16), rows(&mut back_b, DType::F32), n);
            (kernels.convert_row)(rows(h.as_mut_slice(), DType::F16), rows(&mut back_h, DType::F32), n);
        }
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        for i in 0..n {
            assert!(same(back_b[i], b.as_slice()[i].to_f32()), "{isa}: bf16 {:?} became {}", b.as_slice()[i], back_b[i]);
            assert!(same(back_h[i], h.as_slice()[i].to_f32()), "{isa}: f16 {:?} became {}", h.as_slice()[i], back_h[i]);
        }
    }
}

#[test]
fn rows_of_every_length_are_written_whole_and_no_further() {
    for isa in Isa::available() {
        let kernels = Kernels::of(isa).unwrap();
        for n in 0..70 {
            let mut x: Vec<f32> = (0..n).map(|i| i as f32 - 3.5).collect();
            let mut out = Poisoned::<bf16>::new(n);
            // SAFETY: both rows have n elements.
            unsafe { (kernels.convert_row)(rows(&mut x, DType::F32), rows(out.as_mut_slice(), DType::BF16), n) };
            out.check().unwrap_or_else(|e| panic!("{isa}: {e}"));
            assert!(out.as_slice().iter().zip(&x).all(|(o, x)| o.to_f32() == *x), "{isa}: {n} elements");
        }
    }
}
