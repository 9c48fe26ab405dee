//! exp2 and tanh within their stated bounds, on every instruction set.

use lawson_cpu::{Isa, dispatch::Kernels};

fn each_isa(check: impl Fn(&Kernels)) {
    Isa::available().into_iter().for_each(|isa| check(&Kernels::of(isa).expect("an available instruction set")));
}

fn exp2(kernels: &Kernels, mut x: Vec<f32>) -> Vec<f32> {
    // SAFETY: the pointer and the length are one vector's; the processor has the instruction set.
    unsafe { (kernels.exp2_row)(x.as_mut_ptr(), x.len()) };
    x
}

fn tanh(kernels: &Kernels, mut x: Vec<f32>) -> Vec<f32> {
    // SAFETY: as above.
    unsafe { (kernels.tanh_row)(x.as_mut_ptr(), x.len()) };
    x
}

/// Distance in units of the last place of `want` rounded to f32.
fn ulps(got: f32, want: f64) -> f64 {
    let near = (want.abs() as f32).clamp(f32::MIN_POSITIVE, f32::MAX);
    let unit = f64::from(near) - f64::from(f32::from_bits(near.to_bits() - 1));
    (f64::from(got) - want).abs() / unit
}

fn check_exp2(kernels: &Kernels, xs: Vec<f32>) -> f64 {
    let mut worst = 0f64;
    for (x, got) in xs.iter().zip(exp2(kernels, xs.clone())) {
        let isa = kernels.isa;
        if x.is_nan() {
            assert!(got.is_nan(), "{isa}: 2^NaN = {got}");
        } else if *x >= 128.0 {
            assert_eq!(got, f32::INFINITY, "{isa}: 2^{x}");
        } else if *x < -126.0 {
            assert_eq!(got, 0.0, "{isa}: 2^{x}");
        } else if *x < 127.5 || got.is_finite() {
            let error = ulps(got, f64::from(*x).exp2());
            assert!(error <= 2.0, "{isa}: 2^{x:?} = {got:e}, {error} ulp away");
            worst = worst.max(error);
        }
    }
    worst
}

fn check_tanh(kernels: &Kernels, xs: Vec<f32>) -> f64 {
    let mut worst = 0f64;
    for (x, got) in xs.iter().zip(tanh(kernels, xs.clone())) {
        let isa = kernels.isa;
        if x.is_nan() {
            assert!(got.is_nan(), "{isa}: tanh(NaN) = {got}");
        } else {
            let error = ulps(got, f64::from(*x).tanh());
            assert!(error <= 4.0 && got.abs() <= 1.0, "{isa}: tanh({x:?}) = {got:e}, {error} ulp away");
            assert_eq!(got.is_sign_negative(), x.is_sign_negative(), "{isa}: tanh({x:?}) = {got:e}");
            worst = worst.max(error);
        }
    }
    worst
}

/// Numbers with every exponent and sign, and mantissas spread over their range.
fn samples() -> Vec<f32> {
    (0..1u32 << 20).map(|i| f32::from_bits(i.wrapping_mul(4093) ^ i >> 7)).collect()
}

/// `n` numbers from `low` to `high`, equally far apart.
fn even(low: f32, high: f32, n: usize) -> Vec<f32> {
    (0..=n).map(|i| low + (high - low) * (i as f32 / n as f32)).collect()
}

const SPECIAL: [f32; 23] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    f32::NAN,
    -f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    1e-45,
    -1e-45,
    127.499_99,
    127.5,
    128.0,
    -125.999_99,
    -126.0,
    -126.500_01,
    -127.0,
    -150.0,
    0.625,
];

#[test]
fn exp2_is_within_2_ulp() {
    each_isa(|k| {
        let worst = [samples(), even(-130.0, 130.0, 400_000), even(-1.0, 1.0, 200_000), SPECIAL.to_vec()];
        let worst = worst.map(|xs| check_exp2(k, xs)).into_iter().fold(0.0, f64::max);
        println!("exp2 {}: {worst:.2} ulp", k.isa);
    });
}

#[test]
fn tanh_is_within_4_ulp() {
    each_isa(|k| {
        let worst = [samples(), even(-12.0, 12.0, 400_000), even(-1.0, 1.0, 200_000), SPECIAL.to_vec()];
        let worst = worst.map(|xs| check_tanh(k, xs)).into_iter().fold(0.0, f64::max);
        println!("tanh {}: {worst:.2} ulp", k.isa);
    });
}

#[test]
fn whole_numbers_are_exact() {
    each_isa(|k| {
        let xs: Vec<f32> = (-126..128).map(|n| n as f32).collect();
        let want: Vec<f32> = (-126..128).map(|n| f32::from_bits(((n + 127) as u32) << 23)).collect();
        assert_eq!(exp2(k, xs), want, "{}", k.isa);
    });
}

#[test]
fn limits() {
    each_isa(|k| {
        let e = exp2(k, vec![f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45, -1e-45, -0.0]);
        assert_eq!(e, [f32::INFINITY, 0.0, f32::INFINITY, 0.0, 1.0, 1.0, 1.0], "{}", k.isa);
        let t = tanh(k, vec![f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45, -1e-45, -0.0]);
        let want = [1.0, -1.0, 1.0, -1.0, 1e-45, -1e-45, -0.0f32];
        assert_eq!(t.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), want.map(f32::to_bits), "{}: {t:?}", k.isa);
    });
}

/// A row's tail gives the same bits as a whole vector and nothing behind it is written.
#[test]
fn rows_of_every_length() {
    each_isa(|k| {
        let xs = even(-5.0, 5.0, 69);
        let (whole_e, whole_t) = (exp2(k, xs.clone()), tanh(k, xs.clone()));
        for n in 0..xs.len() {
            for (whole, kernel) in [(&whole_e, k.exp2_row), (&whole_t, k.tanh_row)] {
                let mut row = xs.clone();
                // SAFETY: n is at most the row's length.
                unsafe { kernel(row.as_mut_ptr(), n) };
                assert_eq!((&row[..n], &row[n..]), (&whole[..n], &xs[n..]), "{} of {n} elements", k.isa);
            }
        }
    });
}

#[test]
#[ignore = "all f32 numbers: minutes"]
fn every_number() {
    each_isa(|k| {
        let (mut e, mut t) = (0f64, 0f64);
        for high in 0..1u32 << 12 {
            let xs: Vec<f32> = (0..1u32 << 20).map(|low| f32::from_bits(high << 20 | low)).collect();
            e = e.max(check_exp2(k, xs.clone()));
            t = t.max(check_tanh(k, xs));
        }
        println!("{}: exp2 {e:.3} ulp, tanh {t:.3} ulp", k.isa);
    });
}
