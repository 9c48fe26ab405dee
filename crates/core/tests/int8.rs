//! Codes and scales of int8 projections, worked out by hand from their definition.

use lawson_core::int8::{self, CODE_MAX, MOST_INPUTS, WeightKind, check_inputs, element, output, quantise, scale};

fn codes(row: &[f32]) -> (Vec<i8>, f32) {
    let mut codes = vec![77; row.len()];
    let scale = quantise(row, &mut codes);
    (codes, scale)
}

#[test]
fn a_row_by_hand() {
    // Greatest 254, so that the scale is 2: 5 / 2 and 3 / 2 are ties, which go to even.
    let (c, s) = codes(&[254.0, -254.0, 5.0, 3.0, -5.0, -3.0, 1.0, 0.0, -0.0, 7.4]);
    assert_eq!((c, s), (vec![127, -127, 2, 2, -2, -2, 0, 0, 0, 4], 2.0));
}

#[test]
fn a_projection_by_hand() {
    // x = [127, -254] / 2 and w = [[3, 0], [-1, 127], [0, 0]]: scales ½·2 and 3/127, 1, 0.
    let (x, xs) = codes(&[63.5, -127.0]);
    assert_eq!((&x[..], xs), (&[64, -127][..], 1.0));
    let sums = [[3.0, 0.0], [-1.0, 127.0], [0.0, 0.0]].map(|w| {
        let (w, ws) = codes(&w);
        let sum = x.iter().zip(&w).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>();
        (w, sum, output(sum, xs, ws))
    });
    assert_eq!((&sums[0].0[..], sums[0].1), (&[127, 0][..], 64 * 127));
    assert_eq!((&sums[1].0[..], sums[1].1, sums[1].2), (&[-1, 127][..], -64 - 127 * 127, -16193.0));
    assert_eq!((&sums[2].0[..], sums[2].1, sums[2].2), (&[0, 0][..], 0, 0.0));
    // 3/127 rounded up to 16 bits is off by less than 2⁻¹⁵ of itself.
    assert!((sums[0].2 - 192.0).abs() <= 192.0 / 32768.0, "{}", sums[0].2);
}

#[test]
fn scales_have_sixteen_bits_and_never_less_than_is_needed() {
    let mut greatest = 1e-35f32; // a scale below the normal numbers is 0
    while greatest < 1e38 {
        let s = scale(greatest);
        assert_eq!(s.to_bits() & 0xff, 0, "{greatest}");
        let exact = f64::from(greatest) / 127.0;
        assert!(f64::from(s) >= exact * (1.0 - 1e-7) && f64::from(s) <= exact * (1.0 + 1.0 / 32768.0), "{greatest}: {s}");
        greatest *= 1.37;
    }
}

#[test]
fn what_comes_back_is_quantised_to_the_same() {
    let mut state = 9u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1 << 24) - 0.5
    };
    for exponent in [-110, -40, -3, 0, 5, 60, 127] {
        for _ in 0..200 {
            let row: Vec<f32> = (0..33).map(|_| (next() * 2.0 * 2f64.powi(exponent)) as f32).collect();
            let (c, s) = codes(&row);
            let back: Vec<f32> = c.iter().map(|&c| element(c, s)).collect();
            assert_eq!(codes(&back), (c.clone(), s), "2^{exponent}");
            let most = row.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(most <= 0.5001 * s && (s == 0.0 || c.iter().any(|c| c.abs() == 127)), "2^{exponent}: {most} of {s}");
        }
    }
    // The end of the range: up would overflow.
    let (c, s) = codes(&[f32::MAX, -1e38]);
    assert!(c[0] == 127 && (CODE_MAX * s).is_finite());
    assert_eq!(codes(&[element(c[0], s), element(c[1], s)]), (c, s));
}

#[test]
fn rows_that_are_not_finite_or_too_small() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (c, s) = codes(&[1.0, bad, -3.0]);
        assert!(s.is_nan() && c == [0, 0, 0]);
        assert!(output(0, 1.0, s).is_nan() && output(0, s, 0.0).is_nan());
    }
    assert_eq!(codes(&[0.0, -0.0]), (vec![0, 0], 0.0));
    // 1e-40 / 127 is no normal number; nothing may become ∞ or NaN on the way.
    assert_eq!(codes(&[1e-40, -1e-44]), (vec![0, 0], 0.0));
    assert_eq!(int8::inverse(0.0), 0.0);
}

#[test]
fn sums_stay_within_32_bits() {
    check_inputs(MOST_INPUTS).unwrap();
    assert!(MOST_INPUTS as u64 * 127 * 127 <= i32::MAX as u64);
    let refused = check_inputs(MOST_INPUTS + 1).unwrap_err().to_string();
    assert!(refused.contains("131072") && refused.contains("131073"), "{refused}");
}

#[test]
fn kinds_print_and_parse() {
    for kind in [WeightKind::Compute, WeightKind::Int8] {
        assert_eq!(kind.to_string().parse::<WeightKind>().unwrap(), kind);
    }
    let refused = "int4".parse::<WeightKind>().unwrap_err().to_string();
    assert!(refused.contains("int4") && refused.contains("accepted: auto, int8"), "{refused}");
    assert_eq!((WeightKind::Compute.bytes(3, 8, 2), WeightKind::Int8.bytes(3, 8, 2)), (48.0, 36.0));
}
