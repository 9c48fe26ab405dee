//! The oracle on cases small enough to compute by hand.

use lawson_core::{
    data::{BlockData, Mask},
    oracle::{self, AttentionInput, KvSlices, Oracle},
    problem::{AttentionProblem, BlockProblem, MaskShape, RopeLayout},
};
use lawson_testkit::{
    cases::random_cases,
    inputs::{Sharpness, data_for},
};

const E: f64 = std::f64::consts::E;

fn near(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!(g == w || (g - w).abs() < 1e-7, "{got:?} for {want:?}");
    }
}

/// One head of one dimension, scale 1; keys and values are given, one for each row.
fn attend<'a>(
    extra: &str,
    past: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    bend: impl Fn(&mut AttentionInput<'a>),
) -> (Vec<f64>, Vec<f64>) {
    let line = format!("attention b=1 s={} past={past} h=1 d=1 {extra}", q.len());
    let problem: AttentionProblem = line.parse().unwrap();
    let mut input = AttentionInput { q, k, v, rows: k.len(), mask: None, sinks: None, slopes: None };
    bend(&mut input);
    oracle::attention(&problem, &input).unwrap()
}

#[test]
fn causal_rows_see_their_past() {
    let (out, lse) = attend("causal", 1, &[1.0, 1.0], &[0.0, 1.0, 2.0], &[1.0, 2.0, 3.0], |_| ());
    let sum = 1.0 + E + E * E;
    near(&out, &[(1.0 + 2.0 * E) / (1.0 + E), (1.0 + 2.0 * E + 3.0 * E * E) / sum]);
    near(&lse, &[(1.0 + E).ln(), sum.ln()]);
}

#[test]
fn full_rows_see_all_and_a_window_cuts() {
    let (k, v) = ([0.0, 0.0, 0.0, f32::NAN], [3.0, 6.0, 9.0, f32::NAN]);
    near(&attend("full", 1, &[1.0, 1.0], &k, &v, |_| ()).0, &[6.0, 6.0]);
    near(&attend("causal window=2", 1, &[1.0, 1.0], &k, &v, |_| ()).0, &[4.5, 7.5]);
    near(&attend("causal window=1", 1, &[1.0, 1.0], &k, &v, |_| ()).0, &[6.0, 9.0]);
}

#[test]
fn scale_then_softcap_then_alibi() {
    let (out, lse) =
        attend("full scale=3 softcap=2 alibi", 0, &[1.0, 1.0], &[1.0, -1.0], &[1.0, 0.0], |i| i.slopes = Some(&[0.5]));
    let capped = 2.0 * 1.5f64.tanh();
    let rows = [(capped, -capped + 0.5), (capped - 0.5, -capped)];
    near(&out, &rows.map(|(a, b)| a.exp() / (a.exp() + b.exp())));
    near(&lse, &rows.map(|(a, b)| (a.exp() + b.exp()).ln()));
}

#[test]
fn sinks_take_weight_and_unseen_rows_give_zero() {
    let (out, lse) = attend("causal sinks", 0, &[0.0], &[7.0], &[4.0], |i| i.sinks = Some(&[0.0]));
    near(&out, &[2.0]);
    near(&lse, &[2f64.ln()]);
    let shape = MaskShape { per_sequence: false, per_head: false };
    let mask = Mask { shape, rows: 2, columns: 2, data: vec![0, 1, 1, 0] };
    let (out, lse) = attend("causal mask", 0, &[0.0, 0.0], &[7.0, 7.0], &[4.0, 8.0], |i| i.mask = Some(&mask));
    near(&out, &[0.0, 4.0]);
    near(&lse, &[f64::NEG_INFINITY, 0.0]);
    let (out, lse) = attend("causal mask sinks", 0, &[0.0, 0.0], &[7.0, 7.0], &[4.0, 8.0], |i| {
        i.mask = Some(&mask);
        i.sinks = Some(&[-1.0]);
    });
    near(&out, &[0.0, 4.0 * E / (E + 1.0)]);
    near(&lse, &[-1.0, (1.0 + 1.0 / E).ln()]);
}

#[test]
fn heads_read_their_group_and_ragged_sequences_their_rows() {
    let problem: AttentionProblem = "attention b=2 s=1,2 past=1,0 h=4/2 d=1 causal".parse().unwrap();
    // [B, G, rows, D]: the value of row j of head g of sequence b is 100 b + 10 g + j.
    let v: Vec<f32> = (0..12).map(|i| (100 * (i / 6) + 10 * (i / 3 % 2) + i % 3) as f32).collect();
    let input = AttentionInput { q: &[0.0; 12], k: &[0.0; 12], v: &v, rows: 3, mask: None, sinks: None, slopes: None };
    let (out, _) = oracle::attention(&problem, &input).unwrap();
    near(&out, &[0.5, 0.5, 10.5, 10.5, 100.0, 100.0, 110.0, 110.0, 100.5, 100.5, 110.5, 110.5]);
}

#[test]
fn parts_are_right() {
    near(&oracle::gemm(&[1.0, 2.0], &[1.0, 0.0, 3.0, -1.0], Some(&[0.5, 0.0]), 2), &[1.5, 1.0]);
    near(&oracle::rms_norm(&[3.0, 4.0], &[1.0, 2.0], 12.5), &[0.6, 1.6]);
    let quarter = std::f64::consts::FRAC_PI_2;
    near(&oracle::rope(&[1.0, 2.0, 3.0, 4.0, 5.0], 5, 4, RopeLayout::Half, &[quarter, 0.0]), &[-3.0, 2.0, 1.0, 4.0, 5.0]);
    near(&oracle::rope(&[1.0, 2.0, 3.0, 4.0, 5.0], 5, 4, RopeLayout::Interleaved, &[quarter, 0.0]), &[-2.0, 1.0, 3.0, 4.0, 5.0]);
    near(&oracle::softmax(&[0.0, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY], 2), &[1.0, 0.0, 0.0, 0.0]);
}

/// E = 2, one head of two dimensions: every number can be followed.
#[test]
fn a_block_by_hand() {
    let problem: BlockProblem = "block b=1 s=1 past=1 e=2 h=1 d=2 causal scale=1 residual bias=o rope=half".parse().unwrap();
    let identity = vec![1.0, 0.0, 0.0, 1.0];
    let data = BlockData {
        x: vec![1.0, 0.0],
        q_weight: identity.clone(),
        k_weight: identity.clone(),
        v_weight: vec![2.0, 0.0, 0.0, 2.0],
        o_weight: vec![0.0, 1.0, 1.0, 0.0],
        o_bias: Some(vec![10.0, 20.0]),
        past_rows: 2,
        past_k: vec![0.0, 0.0, f32::NAN, f32::NAN],
        past_v: vec![0.0, 4.0, f32::NAN, f32::NAN],
        ..BlockData::default()
    };
    let out = Oracle::new(&problem, &data).unwrap().run();
    let (cos, sin) = (1f64.cos(), 1f64.sin());
    near(&out.k, &[0.0, 0.0, cos, sin, 0.0, 0.0]);
    near(&out.v, &[0.0, 4.0, 2.0, 0.0, 0.0, 0.0]);
    // The new key answers with q·k = cos² + sin² = 1, the past one with 0.
    let p = E / (1.0 + E);
    near(&out.y, &[4.0 * (1.0 - p) + 10.0 + 1.0, 2.0 * p + 20.0]);
    let honest = oracle::rounded(&problem, &data).unwrap();
    near(
        &honest.y.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(),
        &out.y.iter().map(|&v| f64::from(v as f32)).collect::<Vec<_>>(),
    );
}

#[test]
fn sampled_rows_are_the_rows_of_the_whole() {
    for (i, problem) in random_cases(21, 20).iter().enumerate() {
        let data = data_for(problem, i as u64, Sharpness::Sharp);
        let oracle = Oracle::new(problem, &data).unwrap();
        let want = oracle.run();
        let (rows, a) = (data.cache_rows(problem), &problem.spec.attention);
        let cache = KvSlices { k: &want.k, v: &want.v, rows, kv_heads: a.kv_heads };
        let t = problem.batch.tokens() - 1;
        let y = oracle.output_row(t, &oracle.attend_row(t, &oracle.q_row(t), &cache));
        assert_eq!(y, want.y[t * problem.spec.hidden_size..]);
        assert!([want.y, want.k, want.v].iter().flatten().all(|v| v.is_finite()), "poison reached the result of {problem}");
    }
}

#[test]
fn wrong_data_is_an_error_that_names_the_tensor() {
    let problem: BlockProblem = "block b=1 s=1 past=1 e=4 h=2/1 d=2 sinks mask".parse().unwrap();
    let data = data_for(&problem, 1, Sharpness::Ordinary);
    type Damage = fn(&mut BlockData);
    let damages: [(&str, Damage); 6] = [
        ("x has", |d| d.x.push(0.0)),
        ("o_proj.weight", |d| d.o_weight.clear()),
        ("sinks is missing", |d| d.sinks = None),
        ("q_proj.bias is given", |d| d.q_bias = Some(vec![0.0; 4])),
        ("past_k and past_v have 0 rows", |d| d.past_rows = 0),
        ("the mask", |d| d.mask.as_mut().unwrap().data.clear()),
    ];
    for (says, damage) in damages {
        let mut data = data.clone();
        damage(&mut data);
        let error = Oracle::new(&problem, &data).unwrap_err();
        assert!(error.to_string().contains(says), "'{error}' does not say '{says}'");
    }
}
