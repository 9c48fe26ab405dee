//! The machine of a run, as `results.json` states it.

use std::{
    collections::BTreeSet,
    fs,
    time::{SystemTime, UNIX_EPOCH},
};

use lawson::{Context, machine};

use super::record::Machine;

/// The machine, its limits left open.
pub fn describe(context: &Context) -> Machine {
    let cache = |level| machine::cache_bytes(level).map(|n| n as u64);
    let kernel = |what: &str| fs::read_to_string(format!("/proc/sys/kernel/{what}")).ok();
    let system = kernel("ostype").unwrap_or_else(|| std::env::consts::OS.to_owned());
    let system = [system, kernel("osrelease").unwrap_or_default(), std::env::consts::ARCH.to_owned()];
    if let Some(gpu) = context.gpu().map(|gpu| gpu.device().info()) {
        return Machine {
            name: gpu.name.clone(),
            isa: context.machine().isa.clone(),
            cores: Some(gpu.multiprocessors as usize),
            l1_bytes: Some(gpu.shared_memory_per_multiprocessor.into()),
            l2_bytes: Some(gpu.l2_bytes.into()),
            memory_bytes: Some(gpu.memory_bytes),
            os: Some(system.iter().flat_map(|part| part.split_whitespace()).collect::<Vec<_>>().join(" ")),
            commit: Some(env!("LAWSON_COMMIT").to_owned()),
            date: now(),
            ..Machine::default()
        };
    }
    Machine {
        name: context.machine().name.clone(),
        isa: context.machine().isa.clone(),
        isa_features: machine::features().into_iter().map(str::to_owned).collect(),
        cores: cores(),
        threads: Some(context.threads()),
        l1_bytes: cache(1),
        l2_bytes: cache(2),
        l3_bytes: cache(3),
        memory_bytes: machine::memory_bytes().map(|n| n as u64),
        os: Some(system.iter().flat_map(|part| part.split_whitespace()).collect::<Vec<_>>().join(" ")),
        commit: Some(env!("LAWSON_COMMIT").to_owned()),
        date: now(),
        ..Machine::default()
    }
}

/// The date and time of day.
fn now() -> Option<String> {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|d| iso_8601(d.as_secs()))
}

/// Physical cores, where the system tells; else what the process may use.
fn cores() -> Option<usize> {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |part: &str, name: &str| {
        let line = part.lines().find(|l| l.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|l| l.split_once(':')).map(|(_, v)| v.trim().to_owned())
    };
    let found: BTreeSet<_> = info.split("\n\n").filter_map(|p| Some((value(p, "physical id")?, value(p, "core id")?))).collect();
    if found.is_empty() { std::thread::available_parallelism().ok().map(usize::from) } else { Some(found.len()) }
}

/// Seconds since 1970 as a date and time of day in UTC.
fn iso_8601(seconds: u64) -> String {
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let leap = |y: u64| (y.is_multiple_of(4) && !y.is_multiple_of(100)) || y.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}T{:02}:{:02}:{:02}Z", month + 1, days + 1, rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::iso_8601;

    #[test]
    fn dates_are_right() {
        assert_eq!(iso_8601(0), "1970-01-01T00:00:00Z");
        assert_eq!(iso_8601(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(iso_8601(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(iso_8601(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
