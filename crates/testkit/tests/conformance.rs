//! The conformance suite passes an honest runner and fails broken ones.

use lawson_core::{
    DType, Error, ErrorKind, Result,
    data::{BlockData, BlockOutput},
    kernel::{Backend, DeviceKind, KernelCase, KernelInfo, KernelOp, MachineProfile},
    oracle::{self, AttentionInput},
    problem::{BlockProblem, Level, RopeLayout},
};
use lawson_testkit::{
    cases::{edge_cases, int8_weight_cases, quantised_cases, random_cases},
    conformance::{Report, check_blocks, check_kernel},
};

fn check(run: impl Fn(&BlockProblem, &BlockData) -> Result<BlockOutput>, cases: &[BlockProblem]) -> Report {
    // One level is computed and the others repeat it, so that the suite's own test costs a quarter.
    let last = std::cell::RefCell::new(None);
    let runner = |p: &BlockProblem, level: Level, d: &BlockData| {
        if level == Level::Unfused {
            *last.borrow_mut() = Some(run(p, d));
        }
        last.borrow().clone().expect("levels come in order, unfused first")
    };
    check_blocks(&runner, cases, 5, &mut |_, _| ())
}

#[test]
fn the_honest_reference_passes() {
    let cases: Vec<_> = random_cases(3, 150)
        .into_iter()
        .chain(edge_cases())
        .chain(quantised_cases(4, 60))
        .chain(int8_weight_cases(6, 30))
        .collect();
    let report = check(oracle::rounded, &cases);
    assert!(report.passed() && report.ran == 4 * cases.len(), "{report}");
}

/// Cases where `breaks` changes the problem.
fn affected(breaks: impl Fn(&mut BlockProblem, &mut BlockData) + Copy, cases: Vec<BlockProblem>) -> Report {
    let run = move |p: &BlockProblem, d: &BlockData| {
        let (mut p, mut d) = (p.clone(), d.clone());
        breaks(&mut p, &mut d);
        oracle::rounded(&p, &d)
    };
    check(run, &cases)
}

fn with(token: &str, count: usize) -> Vec<BlockProblem> {
    let has = |p: &BlockProblem| p.to_string().split(' ').any(|t| t.starts_with(token));
    random_cases(17, 600).into_iter().filter(has).take(count).collect()
}

#[test]
fn broken_runners_fail() {
    let mask = affected(
        |p, d| {
            p.mask = None;
            d.mask = None;
        },
        with("mask", 12),
    );
    let window = affected(|p, _| p.spec.attention.window = None, with("window", 16));
    let causal = affected(|p, _| (p.spec.attention.causal, p.spec.attention.window) = (false, None), with("causal", 12));
    let softcap = affected(|p, _| p.spec.attention.softcap = None, with("softcap", 12));
    let sinks = affected(|_, d| d.sinks.iter_mut().flatten().for_each(|s| *s = -1e30), with("sinks", 12));
    let alibi = affected(|_, d| d.alibi_slopes.iter_mut().flatten().for_each(|s| *s = -*s), with("alibi", 12));
    let layout = affected(
        |p, _| {
            if let Some(rope) = &mut p.spec.rope {
                rope.layout = if rope.layout == RopeLayout::Half { RopeLayout::Interleaved } else { RopeLayout::Half };
            }
        },
        with("rope", 12),
    );
    let residual = affected(|p, _| p.spec.residual = false, with("residual", 12));
    for (name, report) in [
        ("mask", mask),
        ("window", window),
        ("causal", causal),
        ("softcap", softcap),
        ("sinks", sinks),
        ("alibi", alibi),
        ("layout", layout),
        ("residual", residual),
    ] {
        assert!(report.failed.len() * 4 > report.ran, "{name} broken, yet {report}");
        assert!(report.failed[0].contains("level=unfused seed="), "{}", report.failed[0]);
    }
}

#[test]
fn errors_and_nan_are_told_apart_from_what_cannot_run() {
    let cases = random_cases(1, 3);
    let report = check(|_, _| Err(Error::new(ErrorKind::Unavailable, "no such device")), &cases);
    assert!((report.ran, report.failed.len(), report.could_not_run.len()) == (0, 0, 12) && !report.passed());
    assert!(report.to_string().starts_with("ran: 0, failed: 0 | could not run: 12"));
    let report = check(|_, _| Err(Error::invalid("odd")), &cases);
    assert_eq!((report.ran, report.failed.len()), (12, 12));
    let report = check(
        |p, d| {
            let mut out = oracle::rounded(p, d)?;
            out.y[0] = f32::NAN;
            Ok(out)
        },
        &cases,
    );
    assert_eq!(report.failed.len(), 12);
}

/// Runs the oracle as if it were a device, with the results changed by `bend`.
struct Honest {
    bend: fn(&KernelCase, &mut Vec<f32>),
}

impl Backend for Honest {
    fn profile(&self) -> MachineProfile {
        let isa = "portable".to_string();
        MachineProfile {
            kind: DeviceKind::Cpu,
            name: isa.clone(),
            isa,
            threads: 1,
            l1_bytes: 1,
            l2_bytes: 1,
            peak_flops: 1.0,
            bf16_peak_flops: 1.0,
            int8_peak_flops: 1.0,
            bandwidth: 1.0,
            launch_seconds: 0.0,
        }
    }
    fn kernels(&self) -> Vec<KernelInfo> {
        let all = [
            KernelOp::Gemm,
            KernelOp::GemmInt8,
            KernelOp::Norm,
            KernelOp::Rope,
            KernelOp::Softmax,
            KernelOp::AttentionPrefill,
            KernelOp::AttentionDecode,
        ];
        all.into_iter().map(|op| KernelInfo { op, isa: "portable", dtypes: &DType::ALL, tile_rows: 1, tile_columns: 1 }).collect()
    }
    fn run(&self, _: &KernelInfo, case: &KernelCase) -> Result<Vec<f32>> {
        let narrow = |v: Vec<f64>| v.into_iter().map(|v| v as f32).collect::<Vec<_>>();
        let mut out = match case {
            KernelCase::Gemm { k, x, w, bias, .. } => narrow(oracle::gemm(x, w, bias.as_deref(), *k)),
            KernelCase::GemmInt8 { k, x, w, bias, .. } => oracle::gemm_int8(x, w, bias.as_deref(), *k),
            KernelCase::Norm { x, weight, eps, .. } => narrow(oracle::rms_norm(x, weight, *eps)),
            KernelCase::Rope { head_dim, rotary_dim, layout, x, angles } => {
                narrow(oracle::rope(x, *head_dim, *rotary_dim, *layout, angles))
            }
            KernelCase::Softmax { width, x } => narrow(oracle::softmax(x, *width)),
            KernelCase::Attention { problem, q, k, v, rows, mask, sinks, slopes, .. } => {
                let (mask, sinks, slopes) = (mask.as_ref(), sinks.as_deref(), slopes.as_deref());
                let input = AttentionInput { q, k, v, rows: *rows, mask, sinks, slopes };
                let (mut out, lse) = oracle::attention_rounded(problem, &input)?;
                out.extend(lse);
                out
            }
        };
        (self.bend)(case, &mut out);
        Ok(out)
    }
}

#[test]
fn kernels_are_checked() {
    let honest = Honest { bend: |_, _| () };
    let broken = Honest { bend: |_, out| *out.last_mut().unwrap() += 1.0 };
    for kernel in honest.kernels() {
        let mut seen = 0;
        let report = check_kernel(&honest, &kernel, &mut |done, of| seen = of - done);
        assert!(report.passed() && seen == 0 && report.ran > 40, "{kernel}: {report}");
        let report = check_kernel(&broken, &kernel, &mut |_, _| ());
        // One row in some cases sees nothing: −∞ + 1 is still −∞.
        assert!(report.failed.len() * 10 > report.ran * 8, "{kernel}: {} of {}", report.failed.len(), report.ran);
    }
}
