//! Every kernel and every level of the block, on every instruction set of this machine, against the oracle.

use lawson::{Context, ContextOptions, Isa, compute};
use lawson_testkit::{cases, conformance};

fn contexts() -> Vec<Context> {
    let missing: Vec<_> = Isa::ALL.into_iter().filter(|i| !i.is_available()).map(Isa::name).collect();
    println!("ran: {:?} | could not run: {missing:?}", Isa::available());
    let context = |isa| Context::new(ContextOptions { isa: Some(isa), threads: Some(2), ..Default::default() });
    Isa::available().into_iter().map(|isa| context(isa).expect("an available instruction set")).collect()
}

#[test]
fn kernels() {
    for context in contexts() {
        for kernel in context.backend().kernels() {
            let report = conformance::check_kernel(context.backend(), &kernel, &mut |_, _| {});
            println!("{kernel}: {report}");
            assert!(report.passed(), "{kernel}: {report}");
        }
    }
}

fn blocks(problems: &[lawson::BlockProblem], seed: u64) {
    for context in contexts() {
        let run = |p: &lawson::BlockProblem, level, data: &lawson::BlockData| compute(&context, p, Some(level), data);
        let report = conformance::check_blocks(&run, problems, seed, &mut |_, _| {});
        println!("{}: {report}", context.isa());
        assert!(report.passed(), "{}: {report}", context.isa());
    }
}

#[test]
fn blocks_at_tile_edges() {
    blocks(&cases::edge_cases(), 1);
}

#[test]
fn blocks_over_quantised_caches() {
    blocks(&cases::quantised_cases(9, 60), 9);
}

#[test]
fn decode_over_quantised_caches() {
    blocks(&cases::quantised_decode_cases(), 10);
}

#[test]
fn blocks_with_int8_weights() {
    blocks(&cases::int8_weight_cases(15, 60), 15);
}

#[test]
fn random_blocks() {
    blocks(&cases::random_cases(7, 60), 7);
}
