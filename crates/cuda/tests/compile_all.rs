//! Compiles every instance of every kernel, with no GPU: all of them for sm_90a, and for each other target that NVRTC knows a set in which every
//! value of every macro occurs. `LAWSON_KERNEL=NAME` narrows it to one source.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use lawson_cuda::{
    Instance, Nvrtc,
    kernels::{SOURCES, instances},
};

/// Compute capability, and bytes of shared memory of a block.
type Gpu = ((u32, u32), u32);
const EVERYTHING: Gpu = ((9, 0), 227 << 10);
const COVERED: [Gpu; 5] =
    [((8, 0), 163 << 10), ((8, 6), 99 << 10), ((8, 9), 99 << 10), ((10, 0), 227 << 10), ((12, 0), 99 << 10)];

/// Bytes that a thread of these kernels may spill: registers that live across the main loop, stored before it and loaded behind it, cost
/// less than a block fewer on a multiprocessor. Of every other kernel none.
const SPILLS: [(&str, u32); 3] = [("attention_f32", 192), ("attention_prefill", 64), ("attention_prefill_sm90", 384)];

fn allowed(kernel: &str) -> u32 {
    SPILLS.iter().find(|(name, _)| *name == kernel).map_or(0, |(_, bytes)| *bytes)
}

/// Instances in which each macro of each source takes each of its values.
fn covering(all: &[Instance]) -> Vec<Instance> {
    let mut seen = HashSet::new();
    let mut chosen = Vec::new();
    for instance in all {
        let name = instance.source.name;
        let mut fresh = seen.insert((name, "", 0));
        for &(macro_name, value) in &instance.macros {
            fresh |= seen.insert((name, macro_name, value));
        }
        if fresh {
            chosen.push(instance.clone());
        }
    }
    chosen
}

#[test]
fn the_table_is_small_and_names_every_source() {
    let all = instances(EVERYTHING.0, EVERYTHING.1);
    assert!(all.len() <= 300, "{} instances", all.len());
    let distinct: HashSet<&Instance> = all.iter().collect();
    assert_eq!(distinct.len(), all.len(), "an instance stands twice");
    for source in SOURCES {
        assert!(all.iter().any(|i| i.source.name == source.name), "{} has no instance", source.name);
    }
}

#[test]
fn every_instance_compiles_without_spilling() {
    let nvrtc = match Nvrtc::load() {
        Ok(nvrtc) => nvrtc,
        Err(error) => {
            assert!(std::env::var_os("LAWSON_REQUIRE_NVRTC").is_none(), "{error}");
            println!("skipped: {error}");
            return;
        }
    };
    let only = std::env::var("LAWSON_KERNEL").ok();
    let mut work: Vec<(Instance, String)> = Vec::new();
    for gpu in [EVERYTHING].into_iter().chain(COVERED) {
        let (capability, shared) = gpu;
        if !nvrtc.architectures().contains(&(capability.0 * 10 + capability.1)) {
            println!("NVRTC {:?} does not know compute capability {}.{}", nvrtc.version(), capability.0, capability.1);
            continue;
        }
        let target = nvrtc.target(capability).expect("it knows this one");
        let all: Vec<Instance> =
            instances(capability, shared).into_iter().filter(|i| only.as_ref().is_none_or(|o| o == i.source.name)).collect();
        let chosen = if gpu == EVERYTHING { all } else { covering(&all) };
        work.extend(chosen.into_iter().map(|i| (i, target.clone())));
    }

    #[derive(Default)]
    struct Line {
        instances: usize,
        registers: u32,
        seconds: f64,
    }
    let lines: Mutex<BTreeMap<(&str, &str), Line>> = Mutex::default();
    let faults: Mutex<Vec<String>> = Mutex::default();
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((instance, target)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let fault =
                        |what: String| faults.lock().expect("no panic under it").push(format!("{instance} for {target}: {what}"));
                    let started = Instant::now();
                    let cubin = match nvrtc.compile(instance, target) {
                        Ok(cubin) => cubin,
                        Err(error) => {
                            fault(error.to_string());
                            continue;
                        }
                    };
                    let seconds = started.elapsed().as_secs_f64();
                    let kernels = cubin.resources();
                    let mut named: Vec<&str> = kernels.iter().map(|k| k.name.as_str()).collect();
                    let mut expected = instance.source.kernels.to_vec();
                    named.sort_unstable();
                    expected.sort_unstable();
                    if named != expected {
                        fault(format!("it has the kernels {named:?}, not {expected:?}"));
                    }
                    for kernel in
                        kernels.iter().filter(|k| k.registers == 0 || k.registers > 255 || k.spill_bytes > allowed(&k.name))
                    {
                        fault(format!(
                            "{} takes {} registers and spills {} bytes",
                            kernel.name, kernel.registers, kernel.spill_bytes
                        ));
                    }
                    let registers = kernels.iter().map(|k| k.registers).max().unwrap_or(0);
                    let mut lines = lines.lock().expect("no panic under it");
                    let line = lines.entry((instance.source.name, target)).or_default();
                    line.instances += 1;
                    line.registers = line.registers.max(registers);
                    line.seconds += seconds;
                }
            });
        }
    });
    println!("{:<24} {:<8} {:>9} {:>9} {:>8}", "kernel", "target", "instances", "registers", "seconds");
    for ((name, target), line) in lines.into_inner().expect("no panic under it") {
        println!("{name:<24} {target:<8} {:>9} {:>9} {:>8.1}", line.instances, line.registers, line.seconds);
    }
    println!("{} compilations in {:.0} s with NVRTC {:?}", work.len(), started.elapsed().as_secs_f64(), nvrtc.version());
    let faults = faults.into_inner().expect("no panic under it");
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}
