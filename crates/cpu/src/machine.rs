//! What this machine is and what it can do: identity from the system, rates by measurement.

use std::{fs, hint::black_box, time::Instant};

use lawson_core::{
    DType, Result, Storage,
    kernel::{DeviceKind, MachineProfile},
};

use crate::{Isa, arena::AlignedBytes, dispatch::Kernels, pack::SendPtr, threads::Threads};

/// The processor's own name, or its architecture.
pub fn processor_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, n)| n.trim().to_string())
}

/// Instruction-set features that bear on kernels here and to come, as the system names them.
pub fn features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! detect {
            ($($name:tt),*) => { $(if is_x86_feature_detected!($name) { found.push($name); })* };
        }
        detect!(
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512bw",
            "avx512dq",
            "avx512vl",
            "avx512bf16",
            "avx512vnni",
            "avxvnni",
            "avx512fp16"
        );
        if crate::simd::amx::is_available() {
            found.push("amx-bf16");
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! detect {
            ($($name:tt),*) => { $(if std::arch::is_aarch64_feature_detected!($name) { found.push($name); })* };
        }
        detect!("neon", "fp16", "dotprod", "bf16", "i8mm");
    }
    found.shrink_to_fit();
    found
}

/// Bytes of the data or unified cache of `level` that a core uses, where the system tells.
pub fn cache_bytes(level: usize) -> Option<usize> {
    (0..8).find_map(|i| {
        let read = |what: &str| fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/{what}")).ok();
        let (kind, at) = (read("type")?, read("level")?);
        if kind.trim() == "Instruction" || at.trim() != level.to_string() {
            return None;
        }
        let size = read("size")?;
        let digits = size.trim().trim_end_matches(['K', 'M']);
        let unit = if size.trim().ends_with('M') { 1 << 20 } else { 1 << 10 };
        digits.parse::<usize>().ok().map(|n| n * unit)
    })
}

/// Bytes of main memory, where the system tells.
pub fn memory_bytes() -> Option<usize> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().ok().map(|k| k * 1024)
}

/// What is known without measuring; the rates are priors.
pub fn profile(kernels: &Kernels, threads: usize) -> MachineProfile {
    /// Two FMA ports at 2.5 GHz.
    const FLOPS_PER_LANE: f64 = 2.0 * 2.0 * 2.5e9;
    let peak_flops = FLOPS_PER_LANE * kernels.lanes as f64 * threads as f64;
    // Tiles have been seen to do some 14 times what FMA does, pairs 2 times where they are chosen. A `bfmmla` does 4 times what an FMA of as
    // many bits does.
    let bf16_factor = match kernels.isa {
        Isa::Amx => 14.0,
        Isa::Avx512Bf16 => 2.0,
        Isa::NeonBf16 => 4.0,
        _ => 1.0,
    };
    let int8_factor = match (kernels.int8_steps, kernels.isa) {
        (_, Isa::Portable) => 1.0,
        (4, _) => 4.0,
        _ => 1.8,
    };
    MachineProfile {
        kind: DeviceKind::Cpu,
        name: processor_name(),
        isa: kernels.isa.name().into(),
        threads,
        l1_bytes: cache_bytes(1).unwrap_or(32 << 10),
        l2_bytes: cache_bytes(2).unwrap_or(1 << 20),
        peak_flops,
        bf16_peak_flops: peak_flops * bf16_factor,
        int8_peak_flops: peak_flops * int8_factor,
        bandwidth: 12e9 * threads as f64,
        launch_seconds: 5e-6,
    }
}

/// Operations per second of all threads on elements of `dtype`, by f32 FMA or by dot products: the best of several runs of some 20 ms.
pub fn measure_peak(kernels: &Kernels, threads: &Threads, dtype: DType) -> f64 {
    if kernels.multiplies_pairs(dtype) {
        return probe_peak(threads, kernels.dot_probe, &|rounds| rounds * kernels.dot_probe_flops);
    }
    probe_peak(threads, kernels.fma_probe, &|rounds| (rounds * 64 / 12 + 1) * 12 * 2 * kernels.lanes)
}

/// Operations per second of all threads on int8: the best of several runs of some 20 ms.
pub fn measure_int8_peak(kernels: &Kernels, threads: &Threads) -> f64 {
    probe_peak(threads, kernels.int8_probe, &|rounds| rounds * kernels.int8_probe_ops)
}

/// Operations per second of a probe that touches no memory and does `operations` of its rounds.
fn probe_peak(threads: &Threads, probe: unsafe fn(usize) -> f32, operations: &dyn Fn(usize) -> usize) -> f64 {
    let items = threads.count() * 8;
    let once = |rounds: usize| {
        let start = Instant::now();
        threads.run(items, &|_, _| {
            // SAFETY: the probe touches no memory.
            black_box(unsafe { probe(rounds) });
        });
        start.elapsed().as_secs_f64()
    };
    let mut rounds = 1000;
    while once(rounds) < 0.01 {
        rounds *= 2;
    }
    let all = (items * operations(rounds)) as f64;
    (0..9).map(|_| all / once(rounds)).fold(0.0, f64::max)
}

/// Memory that [`read_loop`] reads: borrowed numbers, whatever they mean, as f32.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a>(&'a [f32]);

impl Memory<'_> {
    /// The whole f32 within `len` bytes from `start`: all but at most 3 bytes at each end.
    ///
    /// # Safety
    /// The bytes are initialised, readable and not written for as long as the result lives.
    unsafe fn new(start: *const u8, len: usize) -> Self {
        let skip = start.align_offset(align_of::<f32>()).min(len);
        // SAFETY: the range lies within the bytes, starts aligned, and every bit pattern is an f32.
        Memory(unsafe { std::slice::from_raw_parts(start.add(skip).cast(), (len - skip) / size_of::<f32>()) })
    }

    /// Bytes that are read.
    pub fn bytes(&self) -> usize {
        size_of_val(self.0)
    }
}

impl<'a> From<Storage<'a>> for Memory<'a> {
    fn from(s: Storage<'a>) -> Self {
        // SAFETY: elements on the host are initialised and borrowed for 'a.
        unsafe { Memory::new(s.as_ptr(), s.len() * s.dtype().size()) }
    }
}

impl<'a> From<&'a AlignedBytes> for Memory<'a> {
    fn from(bytes: &'a AlignedBytes) -> Self {
        // SAFETY: the bytes were zeroed when they were allocated and are borrowed for 'a; who writes through their address has to
        // prove that nobody else uses them.
        unsafe { Memory::new(bytes.as_ptr(), bytes.len()) }
    }
}

/// Seconds that all threads take to read `memory` once and do nothing else with it: what a kernel that is bound by the same bytes can at best
/// reach. Bytes are summed as f32.
pub fn read_loop(kernels: &Kernels, threads: &Threads, memory: &[Memory<'_>]) -> f64 {
    /// Enough pieces that threads end together.
    const PIECES: usize = 4;
    const LEAST: usize = 1 << 10;
    const MOST: usize = 1 << 18;
    let all: usize = memory.iter().map(|m| m.0.len()).sum();
    let chunk = all.div_ceil(PIECES * threads.count()).clamp(LEAST, MOST).next_multiple_of(LEAST);
    let items = memory.iter().map(|m| m.0.len().div_ceil(chunk)).sum();
    let begin = Instant::now();
    threads.run(items, &|_, item| {
        let mut i = item;
        for m in memory {
            let chunks = m.0.len().div_ceil(chunk);
            if i < chunks {
                let part = &m.0[i * chunk..m.0.len().min((i + 1) * chunk)];
                // SAFETY: the part is a slice of as many f32.
                black_box(unsafe { (kernels.row_sum)(part.as_ptr(), part.len()) });
                return;
            }
            i -= chunks;
        }
    });
    begin.elapsed().as_secs_f64()
}

/// Bytes per second read by all threads from memory, four times the last-level cache or 1 GiB at most: the best of several runs.
///
/// # Errors
/// `OutOfMemory`.
pub fn measure_bandwidth(kernels: &Kernels, threads: &Threads) -> Result<f64> {
    const CHUNK: usize = 1 << 18;
    let bytes = (4 * cache_bytes(3).unwrap_or(64 << 20)).clamp(128 << 20, 1 << 30);
    let memory = AlignedBytes::new(bytes)?;
    let start = SendPtr(memory.as_ptr().cast::<f32>());
    threads.run(bytes / 4 / CHUNK, &|_, i| {
        // SAFETY: each item writes its own chunk.
        unsafe { std::slice::from_raw_parts_mut(start.get().add(i * CHUNK), CHUNK) }.fill(1.0);
    });
    let memory = [Memory::from(&memory)];
    Ok((0..5).map(|_| memory[0].bytes() as f64 / read_loop(kernels, threads, &memory)).fold(0.0, f64::max))
}
