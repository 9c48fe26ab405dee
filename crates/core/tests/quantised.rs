//! Codes, scales and what comes back, worked out by hand from the format's definition.

use half::f16;
use lawson_core::quantised::{CacheDType, Codes, GROUP};

/// A quantised group of keys.
struct Keys {
    codes: Vec<u8>,
    scales: Vec<f16>,
    lost: u32,
    /// What comes back, [GROUP, D].
    back: Vec<f32>,
}

fn keys(kind: Codes, rows: &[f32]) -> Keys {
    let d = rows.len() / GROUP;
    // Poisoned, so that what is not written shows.
    let (mut codes, mut scales) = (vec![0xa5; GROUP * kind.row_bytes(d)], vec![f16::NAN; kind.scales(d)]);
    let lost = kind.quantise_keys(rows, &mut codes, &mut scales);
    let mut back = vec![-1.0; rows.len()];
    back.chunks_exact_mut(d).enumerate().for_each(|(i, row)| kind.key(&codes, &scales, lost, i, row));
    Keys { codes, scales, lost, back }
}

/// Codes and scales of a row of values, and what comes back.
fn values(kind: Codes, row: &[f32]) -> (Vec<u8>, Vec<f16>, Vec<f32>) {
    let (mut codes, mut scales) = (vec![0xa5; kind.row_bytes(row.len())], vec![f16::NAN; kind.value_scales(row.len())]);
    kind.quantise_values(row, &mut codes, &mut scales);
    let mut back = vec![-1.0; row.len()];
    kind.values(&codes, &scales, &mut back);
    (codes, scales, back)
}

/// 32 rows of one channel: `first`, then zeros.
fn column(first: &[f32]) -> Vec<f32> {
    (0..GROUP).map(|i| first.get(i).copied().unwrap_or(0.0)).collect()
}

fn f16s(bits: &[u16]) -> Vec<f16> {
    bits.iter().map(|&b| f16::from_bits(b)).collect()
}

#[test]
fn int8_keys_by_hand() {
    // Greatest 254, so that the scale is 2 = 0x4000: 5 / 2 and 3 / 2 are ties, which go to even, and −254 is −127 = 0x81.
    let k = keys(Codes::Int8, &column(&[254.0, -254.0, 5.0, 3.0, -5.0, -3.0, 1.0, 0.0, -0.0, 7.5]));
    assert_eq!(k.codes[..10], [127, 0x81, 2, 2, 0xfe, 0xfe, 0, 0, 0, 4]);
    assert_eq!(k.codes[10..], [0; 22]);
    assert_eq!((k.scales, k.lost), (f16s(&[0x4000]), 0));
    assert_eq!(k.back[..10], [254.0, -254.0, 4.0, 4.0, -4.0, -4.0, 0.0, 0.0, 0.0, 8.0]);
}

#[test]
fn int8_keys_have_a_scale_for_each_channel_over_the_rows() {
    // Channel 0 reaches 127 in row 0 (scale 1 = 0x3c00), channel 1 63.5 in row 31 (½ = 0x3800), channel 2 is all zeros.
    let mut rows = vec![0.0; GROUP * 3];
    (rows[0], rows[1], rows[31 * 3], rows[31 * 3 + 1]) = (127.0, 1.0, -2.0, -63.5);
    let k = keys(Codes::Int8, &rows);
    assert_eq!(k.scales, f16s(&[0x3c00, 0x3800, 0]));
    assert_eq!((&k.codes[..3], &k.codes[31 * 3..]), (&[127, 2, 0][..], &[0xfe, 0x81, 0][..]));
    assert_eq!(k.back, rows);
}

#[test]
fn int8_values_have_a_scale_for_each_32_channels_of_a_row() {
    // 35 channels: a block of 32 with greatest 127 (scale 1) and one of 3 with greatest 508 (scale 4 = 0x4400).
    let mut row = vec![0.0; 35];
    (row[0], row[31], row[32], row[34]) = (127.0, -1.4, -508.0, 10.0);
    let (codes, scales, back) = values(Codes::Int8, &row);
    assert_eq!(scales, f16s(&[0x3c00, 0x4400]));
    // 10 / 4 is a tie.
    assert_eq!((codes[0], codes[31], codes[32], codes[33], codes[34]), (127, 0xff, 0x81, 0, 2));
    assert_eq!((back[0], back[31], back[32], back[34]), (127.0, -1.0, -508.0, 8.0));
}

#[test]
fn int4_keys_by_hand() {
    // Two channels. 0: from −3 to 27, minimum −3 = 0xc200, scale 2 = 0x4000; 1: from 1 to 8.5, minimum 1, scale ½ = 0x3800.
    let mut rows: Vec<f32> = (0..GROUP).flat_map(|_| [-3.0, 1.0]).collect();
    rows[..8].copy_from_slice(&[27.0, 8.5, -3.0, 1.0, 0.0, 2.25, 2.0, 2.75]);
    let k = keys(Codes::Int4, &rows);
    assert_eq!(k.scales, f16s(&[0x4000, 0x3800, 0xc200, 0x3c00]));
    // Channel 0 in the low half. (0 + 3) / 2 = 1.5 → 2, (2 + 3) / 2 = 2.5 → 2; (2.25 − 1) · 2 = 2.5 → 2, (2.75 − 1) · 2 = 3.5 → 4.
    assert_eq!(k.codes[..5], [0xff, 0x00, 0x22, 0x42, 0x00]);
    assert_eq!(k.back[..8], [27.0, 8.5, -3.0, 1.0, 1.0, 2.0, 1.0, 3.0]);
}

#[test]
fn int4_values_of_an_odd_head() {
    // 33 channels: 0 … 15 twice (minimum 0, scale 1), then −1 alone: minimum −1 = 0xbc00, scale 0, its byte's high half 0.
    let row: Vec<f32> = (0..32).map(|i| (i % 16) as f32).chain([-1.0]).collect();
    let (codes, scales, back) = values(Codes::Int4, &row);
    assert_eq!(scales, f16s(&[0x3c00, 0, 0, 0xbc00]));
    assert_eq!((codes.len(), &codes[..3], codes[15], codes[16]), (17, &[0x10, 0x32, 0x54][..], 0xfe, 0));
    assert_eq!(back, row);
}

#[test]
fn zeros_come_back_as_zeros() {
    for kind in [Codes::Int8, Codes::Int4] {
        let k = keys(kind, &[0.0, -0.0].repeat(GROUP));
        assert!(k.scales.iter().all(|s| s.to_bits() == 0) && k.codes.iter().all(|&c| c == 0), "{kind:?}");
        assert!(k.back.iter().all(|x| x.to_bits() == 0), "{kind:?}");
        let (codes, scales, back) = values(kind, &[-0.0; 40]);
        assert!(scales.iter().all(|s| s.to_bits() == 0) && codes.iter().all(|&c| c == 0), "{kind:?}");
        assert!(back.iter().all(|x| x.to_bits() == 0), "{kind:?}");
    }
}

#[test]
fn rows_that_are_not_finite_come_back_as_nan_and_harm_no_other() {
    for kind in [Codes::Int8, Codes::Int4] {
        let clean: Vec<f32> = (0..GROUP * 2).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let mut rows = clean.clone();
        (rows[3 * 2], rows[7 * 2 + 1], rows[31 * 2]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let k = keys(kind, &rows);
        assert_eq!(k.lost, 1 << 3 | 1 << 7 | 1 << 31, "{kind:?}");
        // The others are as if those rows were not there: as if each repeated another row.
        let mut without = clean.clone();
        for i in [3, 7, 31] {
            without.copy_within(0..2, i * 2);
        }
        let want = keys(kind, &without);
        assert_eq!(k.scales, want.scales, "{kind:?}");
        for i in 0..GROUP {
            let (got, want) = (&k.back[i * 2..i * 2 + 2], &want.back[i * 2..i * 2 + 2]);
            if [3, 7, 31].contains(&i) {
                assert!(got.iter().all(|x| x.is_nan()), "{kind:?} row {i}: {got:?}");
                assert!(k.codes[i * kind.row_bytes(2)..][..kind.row_bytes(2)].iter().all(|&c| c == 0));
            } else {
                assert_eq!(got, want, "{kind:?} row {i}");
            }
        }
        // All rows lost.
        let k = keys(kind, &[f32::NAN; GROUP]);
        assert_eq!((k.lost, k.scales[0].to_bits()), (u32::MAX, 0));
        assert!(k.back.iter().all(|x| x.is_nan()));
        // A row of values is lost whole, in every block.
        let mut row = vec![1.0; 70];
        row[69] = f32::NEG_INFINITY;
        let (codes, scales, back) = values(kind, &row);
        assert!(codes.iter().all(|&c| c == 0) && scales.iter().all(|s| s.to_bits() == 0x7e00), "{kind:?}");
        assert!(back.iter().all(|x| x.is_nan()));
    }
}

#[test]
fn scales_are_rounded_up_so_that_no_code_is_cut_off() {
    // 1 / 127 = 0x2008.1… in f16: rounded up 0x2009 although 0x2008 is nearer. 1 / 0x2009 = 126.98 → 127.
    let k = keys(Codes::Int8, &column(&[1.0, -1.0]));
    let exact = 1.0f32 / 127.0;
    let up = k.scales[0];
    assert!(up.to_f32() >= exact && f16::from_bits(up.to_bits() - 1).to_f32() < exact, "{up:?}");
    assert_eq!(k.codes[..2], [127, 0x81]);
    // The smallest subnormal scale, 2⁻²⁴: half of it is below one half of a code and rounds to 0, three halves to 2.
    let tiny = 2f32.powi(-24);
    let k = keys(Codes::Int8, &column(&[1.5 * tiny, 0.5 * tiny, -tiny]));
    assert_eq!((k.scales[0].to_bits(), &k.codes[..3]), (1, &[2, 0, 0xff][..]));
    assert_eq!(k.back[..3], [2.0 * tiny, 0.0, -tiny]);
    // A minimum is rounded down: −2⁻³⁰ to −2⁻²⁴ = 0x8001, 1 + 2⁻¹² to 1, −1 − 2⁻¹² to 0xbc01.
    for (least, bits) in [(-2f32.powi(-30), 0x8001), (1.0 + 2f32.powi(-12), 0x3c00), (-1.0 - 2f32.powi(-12), 0xbc01)] {
        assert_eq!(keys(Codes::Int4, &[least; GROUP]).scales[1].to_bits(), bits, "{least}");
    }
}

#[test]
fn scales_and_minima_saturate() {
    // 127 · 65504 = 8 319 008 is the most that int8 holds.
    let k = keys(Codes::Int8, &column(&[1e30, -f32::MAX, 65504.0 * 3.0]));
    assert_eq!((k.scales[0], &k.codes[..3]), (f16::MAX, &[127, 0x81, 3][..]));
    assert_eq!(k.back[..2], [8_319_008.0, -8_319_008.0]);
    // −65504 and 15 · 65504 more is what int4 holds.
    let k = keys(Codes::Int4, &column(&[f32::MAX, -f32::MAX]));
    assert_eq!((k.scales.clone(), &k.codes[..2]), (vec![f16::MAX, f16::MIN], &[15, 0][..]));
    assert_eq!(k.back[..3], [14.0 * 65504.0, -65504.0, 0.0]);
    for x in [f32::MAX, -f32::MAX] {
        let k = keys(Codes::Int4, &[x; GROUP]);
        assert!(k.back.iter().all(|b| b.is_finite() && b.abs() >= 65504.0 && b.signum() == x.signum()), "{x}: {:?}", k.back);
    }
}

#[test]
fn an_error_is_at_most_half_a_scale() {
    for kind in [Codes::Int8, Codes::Int4] {
        for size in [1e-7f32, 1e-4, 1.0, 777.0, 5e4] {
            let row: Vec<f32> = (0..96).map(|i| ((i * i) as f32 * 0.37).sin() * size + size * 0.2).collect();
            let (_, scales, back) = values(kind, &row);
            for (i, (x, b)) in row.iter().zip(&back).enumerate() {
                let half = scales[i / GROUP].to_f32() * 0.5;
                assert!((x - b).abs() <= half * 1.0001 + x.abs() * 1e-6, "{kind:?} {size} {i}: {x} {b} {half}");
            }
        }
    }
}

#[test]
fn rows_through_codes_leave_the_last_group_as_it_is() {
    let rows: Vec<f32> = (0..70 * 3).map(|i| (i as f32).cos()).collect();
    for kind in [Codes::Int8, Codes::Int4] {
        let (mut k, mut v) = (rows.clone(), rows.clone());
        kind.keys_through_codes(&mut k, 3);
        kind.values_through_codes(&mut v, 3);
        assert_eq!(k[..GROUP * 3], keys(kind, &rows[..GROUP * 3]).back);
        assert_eq!(k[GROUP * 3..GROUP * 6], keys(kind, &rows[GROUP * 3..GROUP * 6]).back);
        assert_eq!(k[GROUP * 6..], rows[GROUP * 6..]);
        assert_eq!(v[69 * 3..], values(kind, &rows[69 * 3..]).2);
    }
}

#[test]
fn bytes_keep_their_budget_and_names_are_read_back() {
    for d in [64, 128] {
        let share = |kind: CacheDType| kind.row_bytes(d) / CacheDType::BF16.row_bytes(d);
        assert!(share(CacheDType::INT8) <= 0.54 && share(CacheDType::INT4) <= 0.32, "{d}");
    }
    for kind in CacheDType::ALL {
        assert_eq!(kind.to_string().parse::<CacheDType>().unwrap(), kind);
    }
    let said = "int3".parse::<CacheDType>().unwrap_err().to_string();
    assert!(["'int3'", "bf16", "int8", "int4"].iter().all(|part| said.contains(part)), "{said}");
}
