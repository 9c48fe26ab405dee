//! The laws of online softmax.

use lawson_core::softmax_state::SoftmaxState;
use proptest::{collection::vec, prelude::*};

const DIM: usize = 3;

type Tile = Vec<(f32, [f32; DIM])>;

fn tile() -> impl Strategy<Value = Tile> {
    let score = prop_oneof![8 => -40.0f32..40.0, 1 => Just(f32::NEG_INFINITY), 1 => -3e4f32..3e4];
    vec((score, [-2.0f32..2.0, -2.0f32..2.0, -2.0f32..2.0]), 0..9)
}

fn push(state: &mut SoftmaxState, tile: &Tile) {
    let scores: Vec<f32> = tile.iter().map(|t| t.0).collect();
    let values: Vec<f32> = tile.iter().flat_map(|t| t.1).collect();
    state.push(&scores, &values);
}

fn state(tile: &Tile) -> SoftmaxState {
    let mut s = SoftmaxState::empty(DIM);
    push(&mut s, tile);
    s
}

fn merged(a: &SoftmaxState, b: &SoftmaxState) -> SoftmaxState {
    let mut a = a.clone();
    a.merge(b);
    a
}

fn close(a: &SoftmaxState, b: &SoftmaxState) -> Result<(), TestCaseError> {
    for (x, y) in a.finish().into_iter().zip(b.finish()) {
        prop_assert!((x - y).abs() <= 2e-5, "{a:?} {b:?}");
    }
    let (x, y) = (a.log_sum_exp(), b.log_sum_exp());
    prop_assert!(x == y || (x - y).abs() <= 1e-5 * x.abs().max(1.0), "{a:?} {b:?}");
    Ok(())
}

proptest! {
    #[test]
    fn merge_is_commutative(a in tile(), b in tile()) {
        let (a, b) = (state(&a), state(&b));
        close(&merged(&a, &b), &merged(&b, &a))?;
    }

    #[test]
    fn merge_is_associative(a in tile(), b in tile(), c in tile()) {
        let (a, b, c) = (state(&a), state(&b), state(&c));
        close(&merged(&merged(&a, &b), &c), &merged(&a, &merged(&b, &c)))?;
    }

    #[test]
    fn empty_is_neutral(a in tile()) {
        let (a, empty) = (state(&a), SoftmaxState::empty(DIM));
        prop_assert_eq!(&merged(&a, &empty), &a);
        prop_assert_eq!(&merged(&empty, &a), &a);
    }

    #[test]
    fn order_of_tiles_does_not_matter(a in tile(), b in tile(), sink in -30f32..30.0) {
        let mut forward = SoftmaxState::empty(DIM);
        forward.push_sink(sink);
        push(&mut forward, &a);
        push(&mut forward, &b);
        let mut backward = SoftmaxState::empty(DIM);
        push(&mut backward, &b);
        push(&mut backward, &a);
        backward.push_sink(sink);
        close(&forward, &backward)?;
    }

    #[test]
    fn it_is_softmax(tile in tile()) {
        let max = tile.iter().map(|t| f64::from(t.0)).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = tile.iter().map(|t| if t.0 == f32::NEG_INFINITY { 0.0 } else { (f64::from(t.0) - max).exp() }).collect();
        let sum: f64 = weights.iter().sum();
        for (d, got) in state(&tile).finish().into_iter().enumerate() {
            let want = tile.iter().zip(&weights).map(|(t, w)| w * f64::from(t.1[d])).sum::<f64>() / if sum == 0.0 { 1.0 } else { sum };
            prop_assert!((f64::from(got) - want).abs() <= 1e-5);
        }
    }
}

#[test]
fn a_row_that_saw_nothing_gives_zero() {
    let mut s = SoftmaxState::empty(2);
    assert_eq!((s.finish(), s.log_sum_exp()), (vec![0.0; 2], f32::NEG_INFINITY));
    s.push(&[f32::NEG_INFINITY; 2], &[f32::NAN; 4]);
    s.merge(&SoftmaxState::empty(2));
    assert_eq!((s.finish(), s.log_sum_exp()), (vec![0.0; 2], f32::NEG_INFINITY));
    s.push_sink(3.0);
    assert_eq!((s.finish(), s.log_sum_exp()), (vec![0.0; 2], 3.0));
}

#[test]
fn nan_scores_give_nan() {
    for scores in [[f32::NAN, 1.0], [1.0, f32::NAN], [f32::NEG_INFINITY, f32::NAN]] {
        let mut s = SoftmaxState::empty(1);
        s.push(&scores, &[1.0, 2.0]);
        s.push(&[5.0, f32::NEG_INFINITY], &[1.0, 1.0]);
        let mut other = SoftmaxState::empty(1);
        other.merge(&s);
        assert!(other.finish()[0].is_nan() && other.log_sum_exp().is_nan());
    }
}
