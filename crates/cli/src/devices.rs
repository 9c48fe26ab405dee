//! `lawson devices`: what this machine has and what can run on it.

use std::process::ExitCode;

use clap::Args;
use lawson::{Context, ContextOptions, DType, Device, Isa, Result, cuda, machine};
use serde::Serialize;

use crate::{args::Global, output, signals};

const AFTER_HELP: &str = "Example:\n  lawson devices --threads 4 --json";

/// Show what this machine has, measured, and what can run on it
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct DevicesArgs {}

#[derive(Serialize)]
struct Devices {
    cpu: Processor,
    cuda: Gpus,
    /// What `--device auto` takes.
    auto: String,
}

/// The GPUs, or why none can run.
#[derive(Serialize)]
struct Gpus {
    can_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    /// Each library that is missing, with where to get it.
    missing: Vec<String>,
    devices: Vec<GpuFacts>,
}

#[derive(Serialize)]
struct GpuFacts {
    device: String,
    name: String,
    compute_capability: String,
    memory_bytes: u64,
    multiprocessors: u32,
    l2_bytes: u32,
    driver: String,
}

#[derive(Serialize)]
struct Processor {
    name: String,
    can_run: bool,
    isa: &'static str,
    isa_available: Vec<&'static str>,
    isa_missing: Vec<&'static str>,
    features: Vec<&'static str>,
    cores: usize,
    threads: usize,
    l1_bytes: Option<usize>,
    l2_bytes: Option<usize>,
    l3_bytes: Option<usize>,
    memory_bytes: Option<usize>,
    peak_gflops: f64,
    bf16_peak_gflops: f64,
    one_thread_peak_gflops: f64,
    bandwidth_gbps: f64,
}

/// Runs the command.
///
/// # Errors
/// `OutOfMemory` when there is no room to measure bandwidth, `Cancelled`.
pub fn execute(_: &DevicesArgs, global: &Global) -> Result<ExitCode> {
    if let Device::Cuda(_) = global.device {
        // A GPU that is asked for by name has to be there.
        global.context()?;
    }
    let on_cpu = Global { device: Device::Cpu, ..*global };
    let (cpu, cuda) = (processor(&on_cpu.context()?, &on_cpu)?, gpus());
    let auto = Context::new(ContextOptions { device: Device::Auto, threads: Some(1), isa: None })?.device().to_string();
    let devices = Devices { cpu, cuda, auto };
    if global.json {
        output::print_json(&devices)?
    } else {
        output::print(devices.text())?
    }
    Ok(ExitCode::SUCCESS)
}

/// What the driver shows, and whether blocks can run on it.
fn gpus() -> Gpus {
    let missing = cuda::missing_libraries().iter().map(ToString::to_string).collect();
    let found = match cuda::devices() {
        Ok(found) => found,
        Err(e) => return Gpus { can_run: false, why: Some(e.to_string()), missing, devices: Vec::new() },
    };
    let opened = Context::new(ContextOptions { device: Device::Cuda(0), threads: Some(1), isa: None });
    let facts = |d: &cuda::DeviceInfo| GpuFacts {
        device: format!("cuda:{}", d.ordinal),
        name: d.name.clone(),
        compute_capability: format!("{}.{}", d.compute_capability.0, d.compute_capability.1),
        memory_bytes: d.memory_bytes,
        multiprocessors: d.multiprocessors,
        l2_bytes: d.l2_bytes,
        driver: format!("CUDA {}.{}", d.driver_version.0, d.driver_version.1),
    };
    let why = opened.as_ref().err().map(ToString::to_string);
    Gpus { can_run: opened.is_ok(), why, missing, devices: found.iter().map(facts).collect() }
}

fn processor(context: &Context, global: &Global) -> Result<Processor> {
    let bar = output::progress(4, "measuring", global);
    let measured = |what: &'static str, measure: &dyn Fn() -> Result<f64>| {
        bar.set_message(what);
        let rate = measure().map(|rate| rate / 1e9);
        bar.inc(1);
        signals::check().and(rate)
    };
    let peak_gflops = measured("f32 peak of all threads", &|| context.measure_peak(DType::F32))?;
    let bf16_peak_gflops = measured("bf16 peak of all threads", &|| context.measure_peak(DType::BF16))?;
    let one_thread_peak_gflops = measured("peak of one thread", &|| {
        let options = ContextOptions { device: global.device, threads: Some(1), isa: Some(context.isa()) };
        Context::new(options)?.measure_peak(DType::F32)
    })?;
    let bandwidth_gbps = measured("bandwidth", &|| context.measure_bandwidth())?;
    bar.finish_and_clear();
    let (available, missing) = Isa::ALL.into_iter().partition::<Vec<_>, _>(|isa| isa.is_available());
    Ok(Processor {
        name: machine::processor_name(),
        can_run: true,
        isa: context.isa().name(),
        isa_available: available.into_iter().map(Isa::name).collect(),
        isa_missing: missing.into_iter().map(Isa::name).collect(),
        features: machine::features(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        threads: context.threads(),
        l1_bytes: machine::cache_bytes(1),
        l2_bytes: machine::cache_bytes(2),
        l3_bytes: machine::cache_bytes(3),
        memory_bytes: machine::memory_bytes(),
        peak_gflops,
        bf16_peak_gflops,
        one_thread_peak_gflops,
        bandwidth_gbps,
    })
}

impl Devices {
    fn text(&self) -> String {
        let (cpu, cuda) = (&self.cpu, &self.cuda);
        let list = |names: &[&str]| if names.is_empty() { "none".to_string() } else { names.join(", ") };
        let size = |n: Option<usize>| n.map_or_else(|| "unknown".to_string(), output::bytes);
        let (l1, l2, l3) = (size(cpu.l1_bytes), size(cpu.l2_bytes), size(cpu.l3_bytes));
        let rows = [
            ("instruction set", format!("{} in use; available: {}", cpu.isa, list(&cpu.isa_available))),
            ("lacks", list(&cpu.isa_missing)),
            ("features", list(&cpu.features)),
            ("cores", format!("{}, {} threads in use", cpu.cores, cpu.threads)),
            ("caches", format!("L1 {l1}, L2 {l2} of a core, L3 {l3}")),
            ("memory", size(cpu.memory_bytes)),
            ("f32 peak", format!("{:.0} GFLOP/s, {:.0} of one thread (measured)", cpu.peak_gflops, cpu.one_thread_peak_gflops)),
            ("bf16 peak", format!("{:.0} GFLOP/s (measured)", cpu.bf16_peak_gflops)),
            ("bandwidth", format!("{:.1} GB/s (measured)", cpu.bandwidth_gbps)),
        ];
        let mut lines = vec!["cpu: can run".to_string(), output::fact("processor", &cpu.name)];
        lines.extend(rows.iter().map(|(name, value)| output::fact(name, value)));
        lines.push(if cuda.can_run { "cuda: can run" } else { "cuda: cannot run" }.into());
        lines.extend(cuda.missing.iter().map(|library| output::fact("missing", library)));
        lines.extend(cuda.why.iter().filter(|_| cuda.missing.is_empty()).map(|why| output::fact("why", why)));
        lines.extend(cuda.devices.iter().map(|gpu| {
            let memory = output::bytes(gpu.memory_bytes as usize);
            let (name, capability, driver) = (&gpu.name, &gpu.compute_capability, &gpu.driver);
            let multiprocessors = gpu.multiprocessors;
            let facts = format!(
                "{name}, compute capability {capability}, {memory}, {multiprocessors} multiprocessors, driver of {driver}"
            );
            output::fact(&gpu.device, &facts)
        }));
        lines.push(format!("auto: computes on {}", self.auto));
        lines.join("\n")
    }
}
