use crate::bench::record::{Results, Row};

use super::{MARK, format, render, sample, varied};

const SECTIONS: [&str; 17] = [
    "summary",
    "machine",
    "block",
    "length",
    "studies",
    "study-qkv",
    "study-softmax",
    "study-rope",
    "study-attention",
    "study-decode",
    "study-throughput",
    "study-kernels",
    "study-quality",
    "roofline",
    "steps",
    "errors",
    "method",
];

/// Checks what every page must fulfil and hands it back.
fn checked(results: &Results) -> String {
    let page = render(results);
    balanced(&page);
    for id in SECTIONS {
        assert_eq!(page.matches(&format!(r#"id="{id}""#)).count(), 1, "section {id}");
    }
    for forbidden in ["http://", "https://", "<script", "<link", "@import", "url(", " src=", "NaN\"", "inf\"", "{{", "{%"] {
        assert!(!page.contains(forbidden), "the page contains {forbidden}");
    }
    for svg in page.split("<svg ").skip(1).map(|rest| rest.split("</svg>").next().unwrap_or("")) {
        assert!(svg.contains("aria-label=") && svg.contains("viewBox="));
        for attribute in [" x=", " y=", " x1=", " y1=", " x2=", " y2=", " cx=", " cy=", " width=", " height=", " points=", " d="]
        {
            for value in svg.split(&format!("{attribute}\"")).skip(1).map(|rest| rest.split('"').next().unwrap_or("")) {
                assert!(!value.contains("NaN") && !value.contains("inf"), "{attribute}{value}");
            }
        }
    }
    page
}

/// Every tag that opens closes, in order.
fn balanced(page: &str) {
    const VOID: [&str; 2] = ["meta", "br"];
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("a page starts with its type");
    while let Some((_, tag)) = rest.split_once('<') {
        let (tag, after) = tag.split_once('>').expect("a tag ends");
        assert!(!tag.contains('<'), "stray < before {tag}");
        let name = tag.split([' ', '\n', '/']).find(|s| !s.is_empty()).unwrap_or("");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "closing tag");
        } else if !tag.ends_with('/') && !VOID.contains(&name) {
            open.push(name);
        }
        rest = after;
    }
    assert_eq!(open, Vec::<&str>::new(), "left open");
}

/// The headline as a reader sees it.
fn headline(page: &str) -> String {
    let text = page.split("<h1>").nth(1).and_then(|rest| rest.split("</h1>").next()).unwrap_or("");
    text.replace('\u{a0}', " ")
}

fn sweep(lengths: &[(usize, f64, f64)]) -> Results {
    let of = |level: &str, s: usize, ms: f64| sample::row("block", level, (1, s, 0), 512, ms);
    let rows = lengths.iter().flat_map(|&(s, a, b)| [of("unfused", s, a), of("maximal", s, b)]).collect();
    Results { results: rows, ..Results::default() }
}

#[test]
fn the_full_page_has_every_section_filled() {
    let page = checked(&sample::full());
    assert!(!page.contains("Not in this run"));
    for text in [
        "torch-sdpa",
        "not installed",
        "maximal pays from S = 256",
        "moderate pays from S = 512",
        "f32 peak 409 GFLOP/s",
        "bf16 peak 880 GFLOP/s",
        "8488C",
        "int8 weights, int8 cache",
        "+0.04 %",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert!(
        headline(&page).starts_with("On this machine fusing the block (maximal) pays from S = 256: 3.04× faster"),
        "{}",
        headline(&page)
    );
}

#[test]
fn a_run_on_a_gpu_fills_the_same_sections() {
    let page = checked(&sample::gpu());
    if let Some(folder) = std::env::var_os("LAWSON_PAGES") {
        std::fs::write(std::path::Path::new(&folder).join("gpu.html"), &page).unwrap();
    }
    for text in [
        "NVIDIA H200",
        "torch-sdpa-cudnn",
        "Rate",
        "cold cache",
        "32 heads of 64 · bf16 · full",
        "B 128 · S 1 · L 4096",
        "append",
        "CUDA graph",
    ] {
        assert!(page.contains(&text.replace(' ', "\u{a0}")) || page.contains(text), "{text}");
    }
}

#[test]
fn one_study_alone_gives_a_page_that_says_what_is_missing() {
    let page = checked(&sample::attention_only());
    assert_eq!(page.matches("Not in this run").count(), 10);
    assert!(page.contains("lawson bench decode"));
    assert!(headline(&page).contains("tiling the attention does not save time"), "{}", headline(&page));
}

#[test]
fn a_single_row_an_empty_run_and_empty_rows_give_pages() {
    checked(&sample::single());
    assert_eq!(headline(&checked(&Results::default())), "This run has no measurements.");
    let studies = ["block", "qkv", "softmax", "rope", "attention", "decode", "throughput", "kernels", "quality", "unheard-of"];
    let bare = |study: &&str| Row { study: (*study).to_owned(), ..Row::default() };
    checked(&Results { results: studies.iter().map(bare).collect(), ..Results::default() });
}

#[test]
fn useless_numbers_draw_nothing_and_break_nothing() {
    let mut results = sample::full();
    let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1.0, 1e308, 5e-324];
    for (i, row) in results.results.iter_mut().enumerate() {
        let v = Some(bad[i % bad.len()]);
        (row.mean_loss, row.loss_change) = (v, v);
        row.layer_errors.extend(v);
        (row.median_ms, row.p10_ms, row.gflops, row.gbps, row.tokens_per_s, row.speedup, row.max_abs_err) = (v, v, v, v, v, v, v);
        (row.plain_share, row.read_share, row.bound_share, row.limit_share) = (v, v, v, v);
        (row.neighbours_least, row.neighbours_median) = (v, v);
        (row.peak_bytes, row.flops) = (Some([0, u64::MAX, 1][i % 3]), Some([u64::MAX, 0, 1][i % 3]));
    }
    results.machine.peak_gflops = Some(f64::NAN);
    results.machine.bandwidth_gbps = Some(0.0);
    checked(&results);
}

#[test]
fn text_is_escaped_wherever_it_comes_from() {
    let evil = "<b>\"x\"&'</svg>\u{1}";
    let mut results = sample::full();
    let m = &mut results.machine;
    (m.name, m.isa, m.isa_features) = (evil.to_owned(), evil.to_owned(), vec![evil.to_owned()]);
    for row in &mut results.results {
        (row.note, row.same_as) = (Some(evil.to_owned()), Some(evil.to_owned()));
        row.dtype = evil.to_owned();
        if row.level.starts_with("peer:") {
            row.level = format!("peer:{evil}");
        }
        for step in &mut row.steps_table {
            (step.op, step.kernel) = (evil.to_owned(), evil.to_owned());
        }
    }
    let page = checked(&results);
    assert!(!page.contains("<b>") && page.contains("&lt;b&gt;"));
}

#[test]
fn the_headline_is_honest() {
    let of = |lengths: &[(usize, f64, f64)]| headline(&checked(&sweep(lengths)));
    let from = of(&[(128, 1.0, 1.2), (256, 2.0, 1.6), (512, 6.0, 2.5)]);
    assert!(from.starts_with("On this machine fusing the block (maximal) pays from S = 256: 2.40× faster, "), "{from}");
    let always = of(&[(128, 2.0, 1.0), (256, 4.0, 2.0), (512, 8.0, 2.0)]);
    assert!(always.contains("at every length measured (S = 128 to 512): 4.00× faster"), "{always}");
    let never = of(&[(128, 1.0, 1.2), (256, 2.0, 2.2), (512, 4.0, 4.1)]);
    assert!(never.contains("(maximal) does not save time: it runs at 0.98× the speed"), "{never}");
    let only = of(&[(128, 2.0, 1.0), (256, 4.0, 2.0), (512, 8.0, 8.0)]);
    assert!(only.contains("pays at S = 128, 256 but does not save time at the longest: 1.00× the speed"), "{only}");
    let hole = of(&[(128, 2.0, 1.0), (256, 2.0, 2.0), (512, 8.0, 4.0)]);
    assert!(hole.contains("pays from S = 512"), "{hole}");
    let two = of(&[(128, 2.0, 1.0), (256, 2.0, 2.0)]);
    assert!(two.contains("pays in 1 of 2 configurations; at best it is 2.00× faster"), "{two}");
}

#[test]
fn the_headline_is_of_one_level() {
    // At first only moderate is faster; at the longest maximal is the fastest.
    let mut results = sweep(&[(128, 2.0, 2.2), (256, 4.0, 4.4), (512, 8.0, 2.0)]);
    let moderate = |(s, ms)| Row { peak_bytes: Some(1), ..sample::row("block", "moderate", (1, s, 0), 512, ms) };
    results.results.extend([(128, 1.0), (256, 2.0), (512, 4.0)].map(moderate));
    let found = headline(&checked(&results));
    assert!(found.contains("(maximal) pays from S = 512: 4.00× faster"), "{found}");
    // Two configurations are no sweep.
    results.results.retain(|r| r.seq != Some(128));
    let found = headline(&checked(&results));
    assert!(found.contains("(maximal) pays in 1 of 2 configurations; at best it is 4.00× faster"), "{found}");
}

#[test]
fn a_gain_within_the_noise_is_called_so() {
    let mut results = sweep(&[(128, 2.0, 1.0), (256, 4.0, 2.0), (512, 8.0, 6.0)]);
    for row in results.results.iter_mut().filter(|r| r.seq == Some(512)) {
        (row.p10_ms, row.p90_ms) = (row.median_ms.map(|v| v - 3.0), row.median_ms.map(|v| v + 3.0));
    }
    let found = headline(&checked(&results));
    let text = "pays at S = 128, 256 but saves no time that stands out from the noise at the longest: 1.33× the speed";
    assert!(found.contains(text), "{found}");
}

#[test]
fn limits_far_apart_are_said() {
    let mut results = sample::full();
    let machine = &mut results.machine;
    (machine.peak_gflops_least, machine.bf16_peak_gflops_least) = (Some(400.0), Some(500.0));
    assert_eq!(
        varied(&results.machine).as_deref(),
        Some("The limits varied within the run, and shares are of the greatest: bf16 peak 500 GFLOP/s to 880 GFLOP/s.")
    );
    assert!(checked(&results).contains("limits varied within the run"));
    assert_eq!(varied(&sample::full().machine), None);
}

#[test]
fn large_rates_are_in_tflops() {
    let page = checked(&sample::gpu());
    assert!(page.contains(">TFLOP/s<") && !page.contains(">GFLOP/s<"), "in headings and on axes");
    assert!(!checked(&sample::full()).contains("TFLOP/s"));
    assert_eq!(format::rate_unit([3.0, f64::INFINITY]), ("GFLOP/s", 1.0));
    assert_eq!(format::rate_unit([3.0, 10_000.0]), ("TFLOP/s", 1e3));
}

#[test]
fn a_report_is_known_by_its_start() {
    assert!(checked(&Results::default()).find(MARK).is_some_and(|at| at < 500));
}

#[test]
fn a_cache_type_compares_with_its_own_baseline() {
    let row = |level: &str, kv: &str, past: usize, ms: f64| Row {
        kv_dtype: Some(kv.to_owned()),
        ..sample::row("decode", level, (1, 1, past), 512, ms)
    };
    let rows = [1024, 2048, 4096]
        .iter()
        .flat_map(|&l| {
            [
                row("unfused", "f32", l, 8.0),
                row("unfused", "bf16", l, 4.0),
                row("maximal", "f32", l, 4.0),
                row("maximal", "bf16", l, 2.0),
            ]
        })
        .collect();
    let page = checked(&Results { results: rows, ..Results::default() });
    assert_eq!(page.matches("2.00× at L = 4096").count(), 2);
}

#[test]
fn each_kernel_alone_has_its_shares_and_its_point() {
    let page = checked(&Results { results: sample::kernels(), machine: sample::machine(), ..Results::default() });
    let section = |id: &str| {
        let rest = page.split(&format!(r#"id="{id}""#)).nth(1).expect("the section is there");
        rest.split("<section").next().unwrap_or("").to_owned()
    };
    let kernels = section("study-kernels");
    for text in ["of plain", "81 %", "of a read loop", "83 %", "30: 97 %", "88 %", "32", "decode cold, 64/8 heads of 64"] {
        assert!(kernels.contains(text), "{text}");
    }
    assert_eq!(kernels.matches("<svg").count(), 4, "limits of two types, decode warm and cold");
    let roofline = section("roofline");
    for text in [
        "gemm: S\u{a0}4096 E\u{a0}4096 bf16",
        "attention mask: S\u{a0}2048",
        "decode warm: L\u{a0}16384",
        "block decode: L\u{a0}4096",
    ] {
        assert!(roofline.contains(text), "{text}");
    }
}

#[test]
fn results_come_back_as_they_were_written() {
    // Values that a short decimal gives exactly.
    let row =
        Row { gflops: Some(1.5), gbps: None, limit_share: Some(0.25), ..sample::row("block", "maximal", (1, 512, 0), 512, 4.0) };
    let row = Row {
        p10_ms: Some(3.5),
        p90_ms: Some(4.5),
        max_abs_err: Some(0.0),
        rel_err: None,
        variant: Some("alone".to_owned()),
        ..row
    };
    let results = Results { results: vec![row], ..sample::single() };
    let text = serde_json::to_string(&results).expect("it serialises");
    assert!(text.contains(r#""gbps":null"#));
    assert_eq!(serde_json::from_str::<Results>(&text).expect("it parses"), results);
    let sparse = r#"{"lawson":"0.1.0","machine":{"name":"x"},
        "results":[{"study":"block","level":"maximal","median_ms":null,"new_field":1}]}"#;
    checked(&serde_json::from_str(sparse).expect("missing and unknown fields are no error"));
}

#[test]
fn numbers_read_well() {
    assert_eq!([0.0, 9.996, 123.4, 4096.0, 0.0615, 1.5e-7].map(format::sig3), ["0", "10.0", "123", "4096", "0.0615", "1.50e-7"]);
    assert_eq!([1234.0, 1.0, 0.0123, 0.99999, 4e-6].map(format::time), ["1.23 s", "1.00 ms", "12.3 µs", "1.00 ms", "4.00 ns"]);
    assert_eq!([512.0, 2048.0, 1.5 * 1048576.0].map(format::bytes), ["512 B", "2.00 KiB", "1.50 MiB"]);
    assert_eq!([0.914, 0.999_97, 1.0, 0.004].map(format::percent), ["91 %", "99.9 %", "100 %", "0.4 %"]);
    assert_eq!([409.0, 12_300.0].map(format::gflops), ["409 GFLOP/s", "12.3 TFLOP/s"]);
    assert_eq!(format::change(0.09, "less", "more", "memory"), "91 % less memory");
    assert_eq!(format::change(1.08, "less", "more", "memory"), "8 % more memory");
    assert_eq!(format::times(389.0, 433.0), "389 – 433 ms");
}

#[test]
fn what_row_blocks_cost_is_said_where_they_do() {
    let mut results = sample::full();
    assert!(!checked(&results).contains("block by block"));
    let maximal = |results: &mut Results, change: fn(&mut Row)| {
        results.results.iter_mut().filter(|r| r.level == "maximal").for_each(change);
    };
    maximal(&mut results, |r| r.launches = Some(12));
    assert!(checked(&results).contains("block by block: it has more launches than moderate, but it needs less memory"));
    maximal(&mut results, |r| r.traffic_bytes = r.traffic_bytes.map(|n| 8 * n));
    assert!(checked(&results).contains("as each block reads all weights again, more traffic in long calls"));
}

#[test]
fn the_article_is_named_where_remarks_refer_to_it() {
    let mut results = sample::full();
    assert!(!checked(&results).contains("计算融合优化"));
    results.results[0].note = Some("the article's small model at batch 1 instead of 16".to_owned());
    assert!(checked(&results).contains("计算融合优化：从理论到实践的性能飞跃 (Optimising by computation fusion"));
}
