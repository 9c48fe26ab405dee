//! Tolerance policies hold where they should and nowhere else.

use lawson_core::{
    DType,
    compare::{Policy, compare},
};

const WANT: [f64; 6] = [1.0, -2.0, 3.0, 0.5, 0.25, -0.125];

fn got() -> Vec<f32> {
    WANT.iter().map(|&v| v as f32).collect()
}

fn holds(policy: Policy<'_>, got: &[f32]) -> bool {
    compare(policy, got, &WANT, 3).ok
}

#[test]
fn an_equal_result_passes_every_policy() {
    let got = got();
    let within = Policy::Within2x { reference: &got, dtype: DType::F32 };
    for policy in [Policy::Exact, Policy::Ulp(0), Policy::Relative(0.0), within] {
        assert!(holds(policy, &got));
    }
}

#[test]
fn each_policy_has_its_limit() {
    let mut near = got();
    near[1] = near[1].next_up().next_up();
    assert!(!holds(Policy::Exact, &near) && !holds(Policy::Ulp(1), &near) && holds(Policy::Ulp(2), &near));
    assert!(holds(Policy::Relative(1e-6), &near) && !holds(Policy::Relative(1e-9), &near));
    let mut row = got();
    row[5] += 1e-3;
    assert!(!holds(Policy::Relative(1e-3 / 20.0), &row), "the worst row counts");
    assert!(holds(Policy::Relative(1e-3), &row));
    let message = compare(Policy::Exact, &row, &WANT, 3).to_string();
    assert!(message.contains("row 1 column 2"), "{message}");
}

#[test]
fn twice_the_reference_is_the_limit() {
    let shifted = |by: f32| got().iter().map(|v| v + by).collect::<Vec<_>>();
    let reference = shifted(0.01);
    let within = Policy::Within2x { reference: &reference, dtype: DType::F32 };
    assert!(holds(within, &shifted(-0.0199)) && !holds(within, &shifted(0.0201)));
    let exact = got();
    let floor = Policy::Within2x { reference: &exact, dtype: DType::BF16 };
    assert!(holds(floor, &shifted(0.002)) && !holds(floor, &shifted(0.01)));
}

#[test]
fn nan_and_lengths_are_hostile() {
    let policies = [Policy::Exact, Policy::Ulp(u32::MAX), Policy::Relative(f64::INFINITY)];
    for bad in [f32::NAN, f32::INFINITY] {
        let mut broken = got();
        broken[4] = bad;
        assert!(!holds(Policy::Relative(1e30), &broken) && !holds(Policy::Exact, &broken));
        let within = Policy::Within2x { reference: &got(), dtype: DType::F32 };
        assert!(!holds(within, &broken));
        let broken_reference = Policy::Within2x { reference: &broken, dtype: DType::F32 };
        assert_eq!(holds(broken_reference, &got()), !bad.is_nan());
    }
    for policy in policies {
        let mut broken = got();
        broken[0] = f32::NAN;
        assert!(!holds(policy, &broken));
        assert!(!compare(policy, &got()[..5], &WANT, 3).ok);
        assert!(!compare(policy, &got(), &WANT, 4).ok);
        assert!(!compare(policy, &got(), &WANT, 0).ok);
        let expected = [f64::NAN, f64::NEG_INFINITY, 2.0];
        assert!(compare(policy, &[f32::NAN, f32::NEG_INFINITY, 2.0], &expected, 3).ok);
        assert!(!compare(policy, &[0.0, f32::NEG_INFINITY, 2.0], &expected, 3).ok);
    }
    assert!(compare(Policy::Exact, &[], &[], 4).ok);
}
