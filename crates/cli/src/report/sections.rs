//! From rows to sections: the machine, the block, its lengths, the roofline, the steps, the errors.

use crate::bench::record::{Machine, Results, Row};

use super::axis::{Axis, Spread};
use super::charts::{self, Bar, Group, Mark, Series, Spot};
use super::format::{self, or_dash};
use super::kernels;
use super::model::{Along, Config, Sweep, configs, is_peer, ms, name, peers, rank, style, sweeps};
use super::page::{Block, Figure, Section, Table};
use super::summary::Payoff;

/// The run with what every section needs to know about it.
pub struct Run<'a> {
    /// What was measured.
    pub results: &'a Results,
    /// Its peers.
    pub peers: Vec<String>,
}

impl<'a> Run<'a> {
    /// Prepares a run.
    pub fn new(results: &'a Results) -> Self {
        Run { results, peers: peers(&results.results) }
    }

    /// The rows of one study.
    pub fn of(&self, study: &str) -> Vec<&'a Row> {
        self.results.results.iter().filter(|r| r.study == study).collect()
    }
}

/// Bytes as a number for a chart.
#[expect(clippy::cast_precision_loss, reason = "a chart shows three digits")]
pub fn real(v: u64) -> f64 {
    v as f64
}

/// A size as a number for a chart.
pub fn count(v: usize) -> f64 {
    real(v as u64)
}

/// An empty section's remark.
pub fn absent(what: &str, study: &str) -> Vec<Block> {
    vec![Block::Note { text: format!("Not in this run: lawson bench {study} measures {what}.") }]
}

/// The machine and its measured limits.
pub fn machine(m: &Machine) -> Section {
    let mut items: Vec<(String, String)> = Vec::new();
    let mut fact = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|v| !v.is_empty()) {
            items.push((name.to_owned(), value));
        }
    };
    let bytes = |v: Option<u64>| v.map(|v| format::bytes_tick(real(v)));
    fact("Processor", Some(m.name.clone()));
    fact("Instruction set", Some(m.isa.clone()));
    fact("Cores", m.cores.map(|v| v.to_string()));
    fact("Threads used", m.threads.map(|v| v.to_string()));
    let caches: Vec<String> = [bytes(m.l1_bytes), bytes(m.l2_bytes), bytes(m.l3_bytes)].into_iter().flatten().collect();
    fact("Caches", Some(caches.join(" · ")));
    fact("Memory", bytes(m.memory_bytes));
    fact("Measured peak, f32", m.peak_gflops.filter(|v| v.is_finite()).map(format::gflops));
    fact("Measured peak, bf16", m.bf16_peak_gflops.filter(|v| v.is_finite()).map(format::gflops));
    fact("Measured peak, int8", m.int8_peak_gops.filter(|v| v.is_finite()).map(format::gflops));
    let bandwidth = m.bandwidth_gbps.filter(|v| v.is_finite());
    fact("Measured bandwidth", bandwidth.map(|v| format!("{} GB/s", format::sig3(v))));
    fact("System", m.os.clone());
    fact("Commit", m.commit.clone());
    fact("Date", m.date.as_deref().map(format::date));
    fact("Features", Some(m.isa_features.join(", ")));
    let blocks = if items.is_empty() {
        vec![Block::Note { text: "The run does not say which machine it ran on.".to_owned() }]
    } else {
        let varied = varied(m).map(|text| Block::Text { text });
        [Block::Facts { items }].into_iter().chain(varied).collect()
    };
    Section { id: "machine", title: "The machine", sub: false, blocks }
}

/// A line that says so where the limits of a run lie more than a quarter apart.
pub fn varied(m: &Machine) -> Option<String> {
    let bandwidth = |v: f64| format!("{} GB/s", format::sig3(v));
    let limits: [(&str, _, _, &dyn Fn(f64) -> String); 3] = [
        ("f32 peak", m.peak_gflops_least, m.peak_gflops, &format::gflops),
        ("bf16 peak", m.bf16_peak_gflops_least, m.bf16_peak_gflops, &format::gflops),
        ("bandwidth", m.bandwidth_gbps_least, m.bandwidth_gbps, &bandwidth),
    ];
    let apart = limits.into_iter().filter_map(|(name, least, greatest, format)| {
        let (least, greatest) = least.zip(greatest).filter(|(least, greatest)| greatest > &(1.25 * least))?;
        Some(format!("{name} {} to {}", format(least), format(greatest)))
    });
    let apart: Vec<String> = apart.collect();
    let text = || format!("The limits varied within the run, and shares are of the greatest: {}.", apart.join(", "));
    (!apart.is_empty()).then(text)
}

/// The heading of a table's column of rates, and how many GFLOP/s its unit is.
pub fn rate_column(gflops: impl IntoIterator<Item = f64>) -> (&'static str, f64) {
    match format::rate_unit(gflops) {
        (_, 1.0) => ("#GFLOP/s", 1.0),
        (_, unit) => ("#TFLOP/s", unit),
    }
}

/// What to say about a row when it is pointed at.
fn about(row: &Row) -> String {
    let mut parts = vec![or_dash(ms(row), format::time)];
    if let (Some(low), Some(high)) = (row.p10_ms, row.p90_ms) {
        parts.push(format!("p10 to p90 {}", format::times(low, high)));
    }
    parts.extend(row.peak_bytes.map(|b| format!("peak {}", format::bytes(real(b)))));
    parts.extend(row.same_as.as_ref().map(|s| format!("same plan as {s}")));
    parts.extend(row.note.clone());
    parts.join(", ")
}

fn bar(run: &Run<'_>, row: &Row, value: Option<f64>, text: String) -> Bar {
    let text =
        if ms(row).is_none() { row.note.as_deref().map_or("not measured".to_owned(), |n| format::shorten(n, 22)) } else { text };
    Bar { name: name(row), style: style(row, &run.peers), value, text, about: about(row) }
}

/// Two charts: speed-up over unfused and peak memory as a share of it.
pub fn speed_and_memory(run: &Run<'_>, configs: &[Config<'_>], caption: &str) -> Vec<Figure> {
    let against = configs.iter().flat_map(|c| c.baseline()).map(name).next();
    let mut speed = Vec::new();
    let mut memory = Vec::new();
    for config in configs {
        let bars = config.rows.iter().map(|row| {
            let speedup = config.speedup(row).filter(|_| ms(row).is_some());
            let time = or_dash(ms(row), format::time);
            bar(run, row, speedup, speedup.map_or(time.clone(), |s| format!("{} · {time}", format::factor(s))))
        });
        speed.push(Group { name: config.name.clone(), bars: bars.collect() });
        let base = config.baseline().and_then(|r| r.peak_bytes).filter(|b| *b > 0);
        let bars = config.rows.iter().filter(|r| r.peak_bytes.is_some()).map(|row| {
            let peak = real(row.peak_bytes.unwrap_or(0));
            let share = base.map(|b| peak / real(b));
            let change = share.filter(|s| (s - 1.0).abs() >= 0.005).map_or(String::new(), |s| {
                let sign = if s < 1.0 { "−" } else { "+" };
                format!(" · {sign}{}", format::percent((s - 1.0).abs()))
            });
            bar(run, row, share, format!("{}{change}", format::bytes(peak)))
        });
        let bars: Vec<Bar> = bars.collect();
        if !bars.is_empty() {
            memory.push(Group { name: config.name.clone(), bars });
        }
    }
    let mut figures = Vec::new();
    let base = against.unwrap_or_else(|| "unfused".to_owned());
    let mut add = |title: &str, axis_title: String, format: fn(f64) -> String, groups: &[Group]| {
        let axis = Axis { title: &axis_title, spread: Spread::Linear, format, value: format };
        if let Some(svg) = charts::bars(&format!("{title} of each level. {caption}"), axis, groups, Some(1.0)) {
            figures.push(Figure { title: title.to_owned(), caption: caption.to_owned(), svg });
        }
    };
    add("Speed-up", format!("times as fast as {base} (longer is better)"), |v| format!("{}×", format::plain(v)), &speed);
    add("Peak memory", format!("share of {base}'s peak (shorter is better)"), format::percent, &memory);
    figures
}

/// Steps, GEMMs and launches of the row's plan.
fn counts(row: &Row) -> Option<String> {
    let all = [row.steps, row.gemms, row.launches];
    let text = all.map(|v| v.map_or(format::NONE.to_owned(), |v| v.to_string()));
    all.iter().any(Option::is_some).then(|| text.join(" / "))
}

/// What all rows of a configuration remark.
fn shared_note<'a>(config: &Config<'a>) -> Option<&'a str> {
    let (first, rest) = config.rows.split_first()?;
    first.note.as_deref().filter(|note| !rest.is_empty() && rest.iter().all(|r| r.note.as_deref() == Some(note)))
}

/// The rows' remarks, each once, for charts that have no place for them.
pub fn remarks(rows: &[&Row]) -> Option<Block> {
    let mut found: Vec<&str> = Vec::new();
    for note in rows.iter().filter(|r| ms(r).is_some()).filter_map(|r| r.note.as_deref()) {
        if !found.contains(&note) {
            found.push(note);
        }
    }
    (!found.is_empty()).then(|| Block::Text { text: format!("{}.", found.join("; ")) })
}

/// The peak that binds a row, and the dtype it was measured with.
fn peak_of(row: &Row, m: &Machine) -> (&'static str, Option<f64>) {
    if row.weights.as_deref() == Some("int8") && m.int8_peak_gops.is_some() {
        ("int8", m.int8_peak_gops)
    } else if row.dtype == lawson::DType::BF16.name() && m.bf16_peak_gflops.is_some() {
        ("bf16", m.bf16_peak_gflops)
    } else {
        ("f32", m.peak_gflops)
    }
}

/// The share of the limit that binds, or why there is none.
pub fn limit_share(row: &Row, m: &Machine) -> Option<String> {
    let above = |v: Option<f64>, limit: Option<f64>| v.zip(limit).is_some_and(|(v, limit)| v > limit);
    match row.limit_share {
        Some(share) => Some(format::percent(share)),
        None if above(row.gbps, m.bandwidth_gbps) => Some("data was in cache".to_owned()),
        None if above(row.gflops, peak_of(row, m).1) => Some(format!("above the {} peak", peak_of(row, m).0)),
        None => None,
    }
}

/// A table of the rows of each configuration, with the columns that some row fills.
pub fn table(run: &Run<'_>, caption: &str, configs: &[Config<'_>]) -> Table {
    type Column<'a> = (&'static str, &'a dyn Fn(&Row) -> Option<String>);
    let (rate, unit) = rate_column(configs.iter().flat_map(|c| &c.rows).filter_map(|r| r.gflops));
    let columns: [Column<'_>; 10] = [
        ("#median", &|r| ms(r).map(format::time)),
        ("#p10 – p90", &|r| r.p10_ms.zip(r.p90_ms).map(|(a, b)| format::times(a, b))),
        ("#cold cache", &|r| r.cold_ms.map(format::time)),
        ("#peak memory", &|r| r.peak_bytes.map(|b| format::bytes(real(b)))),
        ("#traffic", &|r| r.traffic_bytes.map(|b| format::bytes(real(b)))),
        (rate, &|r| r.gflops.map(|v| format::sig3(v / unit))),
        ("#GB/s", &|r| r.gbps.map(format::sig3)),
        ("#of the limit", &|r| limit_share(r, &run.results.machine)),
        ("#steps / GEMMs / launches", &counts),
        ("#max abs. error", &|r| r.max_abs_err.map(format::error)),
    ];
    let filled: Vec<&Column<'_>> =
        columns.iter().filter(|(_, get)| configs.iter().flat_map(|c| &c.rows).any(|r| get(r).is_some())).collect();
    let speedups = configs.iter().any(|c| c.rows.iter().any(|r| c.speedup(r).is_some()));
    let own = |c: &Config<'_>, r: &Row| r.note.clone().filter(|_| shared_note(c).is_none());
    let notes = configs.iter().any(|c| c.rows.iter().any(|r| own(c, r).is_some() || r.same_as.is_some()));
    let mut head = vec!["level"];
    head.extend(filled.iter().map(|(title, _)| *title).take(1));
    head.extend(speedups.then_some("#speedup"));
    head.extend(filled.iter().map(|(title, _)| *title).skip(1));
    head.extend(notes.then_some("note"));
    let mut table = Table::new(caption, &head);
    for config in configs {
        match shared_note(config) {
            Some(note) => table.group(&format!("{} — {note}", config.name)),
            None => table.group(&config.name),
        }
        for row in &config.rows {
            let cell = |get: &dyn Fn(&Row) -> Option<String>| get(row).unwrap_or_else(|| format::NONE.to_owned());
            let mut cells = vec![name(row)];
            cells.extend(filled.iter().take(1).map(|(_, get)| cell(*get)));
            cells.extend(speedups.then(|| or_dash(config.speedup(row), format::factor)));
            cells.extend(filled.iter().skip(1).map(|(_, get)| cell(*get)));
            let same = row.same_as.as_ref().map(|s| format!("same plan as {s}"));
            let note: Vec<String> = same.into_iter().chain(own(config, row)).collect();
            cells.extend(notes.then(|| note.join("; ")));
            table.row(&style(row, &run.peers).class, cells);
        }
    }
    table
}

/// What `maximal` pays for working in row blocks, where it does.
fn row_blocks(configs: &[Config<'_>]) -> Option<String> {
    let more = |get: fn(&Row) -> Option<u64>| {
        let of = |c: &Config<'_>, level: &str| c.rows.iter().find(|r| r.level == level).and_then(|r| get(r));
        configs.iter().any(|c| of(c, "moderate").zip(of(c, "maximal")).is_some_and(|(moderate, maximal)| maximal > moderate))
    };
    let launches = more(|r| r.launches.map(|n| n as u64));
    let costs = match (launches, launches && more(|r| r.traffic_bytes)) {
        (false, _) => return None,
        (true, false) => "it has more launches than moderate",
        (true, true) => {
            "it has more launches than moderate and, as each block reads all weights again, more traffic in long calls"
        }
    };
    Some(format!("maximal works through the tokens block by block: {costs}, but it needs less memory."))
}

/// The levels of the block side by side.
pub fn block(run: &Run<'_>) -> Section {
    let rows = run.of("block");
    let swept: Vec<Sweep<'_>> = sweeps(&rows, Along::Seq, &run.peers);
    // A sweep has its own chart; of its configurations only the longest stands here too.
    let inside = |row: &Row| {
        swept.iter().any(|s| {
            let members = || s.series.iter().flat_map(|t| &t.rows);
            members().any(|r| std::ptr::eq(*r, row)) && members().filter_map(|r| r.seq).max() != row.seq
        })
    };
    let shown: Vec<&Row> = rows.iter().copied().filter(|r| !inside(r)).collect();
    let configs = configs(&shown);
    let mut blocks = Vec::new();
    let figures = speed_and_memory(run, &configs, "");
    if rows.is_empty() {
        blocks = absent("the block at its four levels", "block");
    } else {
        blocks.push(Block::Text {
            text: "Every level computes the same block; peak memory is that of one call above what was resident before it."
                .to_owned(),
        });
        blocks.extend(row_blocks(&configs).map(|text| Block::Text { text }));
        if !figures.is_empty() {
            blocks.push(Block::Figures { items: figures });
        }
        blocks.push(Block::Table { table: table(run, "", &configs) });
    }
    Section { id: "block", title: "The block at each level", sub: false, blocks }
}

/// What a line chart draws of a row.
pub struct Quantity {
    /// The chart's heading.
    pub title: &'static str,
    /// The axis' title with the unit.
    pub axis: &'static str,
    /// How values spread.
    pub spread: Spread,
    /// A tick as text.
    pub format: fn(f64) -> String,
    /// A value as text.
    pub value: fn(f64) -> String,
    /// The value.
    pub get: fn(&Row) -> Option<f64>,
}

/// Time of a call.
pub const TIME: Quantity = Quantity {
    title: "Time",
    axis: "median time of a call",
    spread: Spread::Log,
    format: format::time_tick,
    value: format::time,
    get: ms,
};
/// Peak memory of a call.
pub const MEMORY: Quantity = Quantity {
    title: "Peak memory",
    axis: "peak memory of a call",
    spread: Spread::Log2,
    format: format::bytes_tick,
    value: format::bytes,
    get: |r| r.peak_bytes.map(real),
};

/// One quantity over a sweep; with `crossovers` the lengths where levels start to pay are marked.
pub fn over(sweep: &Sweep<'_>, quantity: &Quantity, crossovers: bool) -> Option<Figure> {
    let mut series = Vec::new();
    for track in &sweep.series {
        let points = track.rows.iter().filter_map(|r| Some((count(sweep.along.of(r)?), (quantity.get)(r)?)));
        series.push(Series { name: track.name.clone(), style: track.style.clone(), points: points.collect() });
    }
    let marks = if crossovers { marks(sweep, quantity) } else { Vec::new() };
    let label = format!("{} against {}, {}, one line per level", quantity.title, sweep.along.title(), sweep.name);
    let x = Axis { title: sweep.along.title(), spread: Spread::Log2, format: format::plain, value: format::plain };
    let y = Axis { title: quantity.axis, spread: quantity.spread, format: quantity.format, value: quantity.value };
    let svg = charts::lines(&label, x, y, &series, &marks)?;
    Some(Figure { title: format!("{} against {}", quantity.title, sweep.along.letter()), caption: sweep.name.clone(), svg })
}

/// A mark per length at which levels start to pay, shortest first.
fn marks(sweep: &Sweep<'_>, quantity: &Quantity) -> Vec<Mark> {
    let mut starts: Vec<(usize, String, Mark)> = Vec::new();
    for track in sweep.series.iter().filter(|t| t.level != "unfused" && !t.level.starts_with("peer:")) {
        let Payoff::From { length, .. } = sweep.payoff(track) else { continue };
        let Some(row) = track.rows.iter().find(|r| sweep.along.of(r) == Some(length)) else { continue };
        let Some(y) = (quantity.get)(row) else { continue };
        match starts.iter_mut().find(|(l, _, _)| *l == length) {
            Some((_, names, mark)) => {
                *names = format!("{names}, {}", track.name);
                mark.class.clone_from(&track.style.class);
                mark.at.1 = y;
            }
            None => {
                let mark = Mark { text: String::new(), class: track.style.class.clone(), at: (count(length), y) };
                starts.push((length, track.name.clone(), mark));
            }
        }
    }
    starts.sort_by_key(|(length, _, _)| *length);
    let text = |length: usize, names: &str| {
        let verb = if names.contains(", ") { "pay" } else { "pays" };
        format!("{names} {verb} from {} = {length}", sweep.along.letter())
    };
    starts.into_iter().map(|(length, names, mark)| Mark { text: text(length, &names), ..mark }).collect()
}

/// Where each series of a sweep starts to pay, in words.
pub fn payoffs(sweep: &Sweep<'_>) -> Option<Table> {
    sweep.baseline()?;
    let letter = sweep.along.letter();
    let mut table = Table::new("", &["level", "pays", "#at the longest"]);
    for track in sweep.series.iter().filter(|t| t.level != "unfused") {
        let speedups = sweep.speedups(track);
        let Some((longest, speedup, _)) = speedups.last() else { continue };
        let pays = match sweep.payoff(track) {
            Payoff::From { always: true, .. } => "at every length measured".to_owned(),
            Payoff::From { length, .. } => format!("from {letter} = {length}"),
            Payoff::Only(lengths) => {
                let lengths: Vec<String> = lengths.iter().map(usize::to_string).collect();
                format!("at {letter} = {}, not beyond", lengths.join(", "))
            }
            Payoff::Never => "at no length measured".to_owned(),
        };
        table.row(
            &track.style.class,
            vec![track.name.clone(), pays, format!("{} at {letter} = {longest}", format::factor(*speedup))],
        );
    }
    (!table.rows.is_empty()).then_some(table)
}

/// Time and memory of each sweep, with the crossovers.
pub fn sweep_blocks(sweeps: &[Sweep<'_>]) -> Vec<Block> {
    let mut blocks = Vec::new();
    for sweep in sweeps {
        let items: Vec<Figure> = [over(sweep, &TIME, true), over(sweep, &MEMORY, false)].into_iter().flatten().collect();
        if !items.is_empty() {
            blocks.push(Block::Figures { items });
        }
        blocks.extend(payoffs(sweep).map(|table| Block::Table { table }));
    }
    blocks
}

/// The block over sequence lengths.
pub fn length(run: &Run<'_>) -> Section {
    let rows = run.of("block");
    let mut found = sweeps(&rows, Along::Seq, &run.peers);
    found.extend(sweeps(&rows, Along::Past, &run.peers));
    let blocks = if found.is_empty() {
        let text = "Not in this run: it takes one block configuration at three or more lengths.".to_owned();
        vec![Block::Note { text }]
    } else {
        let text = "A level pays from the length on at which it stays at least 1.05× as fast as unfused, by more than noise: its p90 is \
            below unfused's p10, or the medians differ by more than both spreads.";
        let mut blocks = vec![Block::Text { text: text.to_owned() }];
        blocks.extend(sweep_blocks(&found));
        blocks
    };
    Section { id: "length", title: "Against length: where fusing starts to pay", sub: false, blocks }
}

/// Each kernel and row under the machine's limits.
pub fn roofline(run: &Run<'_>) -> Section {
    let m = &run.results.machine;
    let limit = |v: Option<f64>| v.filter(|v| v.is_finite() && *v > 0.0);
    let bandwidth = limit(m.bandwidth_gbps);
    // A roof for each kind of row.
    let mut peaks: Vec<(&str, f64)> = Vec::new();
    for (dtype, peak) in run.results.results.iter().map(|r| peak_of(r, m)) {
        // Peaks that differ by no more than two measurements of one do share a roof.
        if let Some(peak) = limit(peak).filter(|v| peaks.iter().all(|p| p.0 != dtype && (v / p.1 - 1.0).abs() > 0.1)) {
            peaks.push((dtype, peak));
        }
    }
    let mut spots: Vec<Spot> = Vec::new();
    let shown = largest_rows(run);
    let (rate_head, unit) = rate_column(shown.iter().filter_map(|r| r.gflops));
    let mut table = Table::new("", &["#no.", "what", "#FLOP/byte", rate_head, "#share"]);
    let mut add = |what: String, class: &str, flops: f64, bytes: f64, time_ms: f64, row: &Row| {
        let (intensity, rate) = (flops / bytes, flops / time_ms * 1e-6);
        if !(intensity.is_finite() && rate.is_finite() && intensity > 0.0 && rate > 0.0) {
            return;
        }
        let number = spots.len() + 1;
        let (dtype, peak) = peak_of(row, m);
        let roof = [limit(peak), bandwidth.map(|b| b * intensity)].into_iter().flatten().reduce(f64::min);
        let memory_binds = bandwidth.is_some_and(|b| roof == Some(b * intensity));
        let share = match roof.map(|r| rate / r) {
            Some(share) if share > 1.0 && memory_binds => "data was in cache".to_owned(),
            Some(share) if share > 1.0 => format!("above the {dtype} peak"),
            share => or_dash(share, format::percent),
        };
        let of = if share.ends_with('%') { " of the roof" } else { "" };
        let about = format!("{what}: {}, {} FLOP/byte, {share}{of}", format::gflops(rate), format::sig3(intensity));
        table.row(class, vec![number.to_string(), what, format::sig3(intensity), format::sig3(rate / unit), share]);
        spots.push(Spot { number, about, class: class.to_owned(), at: (intensity, rate) });
    };
    for row in shown {
        let (Some(flops), Some(gbps), Some(time)) = (row.flops, row.gbps, ms(row)) else { continue };
        let what = if row.study == "kernels" {
            format!("{}: {}", name(row), kernels::shape(row))
        } else {
            format!("{} {}: {}", row.study, name(row), short_shape(row))
        };
        add(what, &style(row, &run.peers).class, real(flops), gbps * time * 1e6, time, row);
    }
    if let Some(row) = featured(run).last() {
        for step in &row.steps_table {
            let (Some(flops), Some(bytes), Some(time)) = (step.flops, step.bytes, step.median_ms) else { continue };
            add(format!("kernel {} ({})", step.kernel, step.op), "c-kernel", real(flops), real(bytes), time, row);
        }
    }
    let label = "Roofline: operations per second against FLOP per byte of each measurement, under measured peak and bandwidth";
    let blocks = match charts::roofline(label, &peaks, bandwidth, &spots) {
        Some(svg) => {
            let caption =
                "each level's and kernel's largest shape; bytes that must move once (weights, x, y, valid cache); share is of the roof above"
                    .to_owned();
            vec![Block::Beside { figure: Figure { title: "Roofline".to_owned(), caption, svg }, table }]
        }
        None => vec![Block::Note { text: "Not in this run: no row has operations, bytes and time.".to_owned() }],
    };
    Section { id: "roofline", title: "How near the machine's limits", sub: false, blocks }
}

fn short_shape(row: &Row) -> String {
    let batch = row.batch.filter(|b| *b > 1).map(|b| format!("B\u{a0}{b} "));
    let past = row.past.filter(|p| *p > 0).map(|p| format!("L\u{a0}{p} "));
    let seq = row.seq.filter(|s| past.is_none() || *s > 1).map(|s| format!("S\u{a0}{s} "));
    let cache = row.kv_dtype.as_ref().filter(|kv| **kv != row.dtype && row.study != "qkv").map(|kv| format!(", {kv} cache"));
    let lengths: String = [batch, seq, past].into_iter().flatten().collect();
    format!("{lengths}{}{}", row.dtype, cache.unwrap_or_default())
}

/// Of each study, level and type, and of each kernel alone, the row with the most work.
fn largest_rows<'a>(run: &Run<'a>) -> Vec<&'a Row> {
    let studies = ["block", "attention", "qkv", "decode", "kernels"];
    // Kernels that are measured alone differ in their form and their heads, not in their level.
    let form = |r: &'a Row| match r.variant.as_deref() {
        _ if r.study != "kernels" => None,
        Some("gemm") => Some(("gemm", None, None)),
        variant => Some((variant.unwrap_or(""), r.heads.zip(r.kv_heads), r.head_dim)),
    };
    let mut found: Vec<&'a Row> = Vec::new();
    let candidates =
        studies.iter().flat_map(|s| run.of(s)).filter(|r| r.flops.is_some() && r.gbps.is_some() && r.same_as.is_none());
    for row in candidates.filter(|r| r.variant.as_deref() != Some("layer")) {
        let same = |r: &'a Row| {
            (&r.study, &r.level, &r.dtype, &r.kv_dtype, &r.device, form(r))
                == (&row.study, &row.level, &row.dtype, &row.kv_dtype, &row.device, form(row))
        };
        match found.iter_mut().find(|r| same(r)) {
            Some(kept) if kept.flops < row.flops => *kept = row,
            Some(_) => {}
            None => found.push(row),
        }
    }
    found
}

/// The largest block configuration whose plan is there step by step: its rows by level.
fn featured<'a>(run: &Run<'a>) -> Vec<&'a Row> {
    for study in ["block", "attention", "decode", "qkv"] {
        let rows: Vec<&Row> = run.of(study).into_iter().filter(|r| !r.steps_table.is_empty()).collect();
        let found = configs(&rows);
        if let Some(config) = found.into_iter().max_by_key(|c| (c.rows.len(), c.rows.iter().filter_map(|r| r.flops).max())) {
            return config.rows;
        }
    }
    Vec::new()
}

/// The plan of one configuration, step by step.
pub fn steps(run: &Run<'_>) -> Section {
    let rows = featured(run);
    let mut blocks = Vec::new();
    if let Some(first) = rows.first() {
        let shape = configs(&rows[..1])[0].name.clone();
        blocks.push(Block::Text {
            text: format!(
                "The plan of the {} study's largest configuration: {shape}. Steps are timed one by one in calls of their \
            own; shares are of the sum of the steps shown, not of the call's median beside the level.",
                first.study
            ),
        });
        let measured = rows.iter().flat_map(|r| &r.steps_table).any(|s| s.median_ms.is_some());
        let (rate_head, unit) = rate_column(rows.iter().flat_map(|r| &r.steps_table).filter_map(|s| s.gflops));
        let head = [
            "step",
            "kernel",
            if measured { "#time" } else { "#predicted" },
            "#of all steps",
            "#bytes",
            "#GFLOP",
            rate_head,
            "#GB/s",
        ];
        let mut table = Table::new("", &head);
        for row in rows {
            let plural = |v: Option<usize>, one: &str, many: &str| v.map(|v| format!("{v} {}", if v == 1 { one } else { many }));
            let counts = [
                plural(row.steps, "step", "steps"),
                plural(row.gemms, "GEMM", "GEMMs"),
                plural(row.launches, "launch", "launches"),
            ];
            let traffic = row.traffic_bytes.map(|b| format!("{} moved", format::bytes(real(b))));
            let facts: Vec<String> = counts.into_iter().flatten().chain(traffic).chain(ms(row).map(format::time)).collect();
            table.group(&format!("{}: {}", name(row), facts.join(", ")));
            let whole: f64 = row.steps_table.iter().filter_map(|s| s.median_ms.or(s.predicted_ms)).sum();
            for step in &row.steps_table {
                let time = step.median_ms.or(step.predicted_ms).filter(|t| *t > 0.0);
                let rate = step.gflops.or_else(|| Some(real(step.flops?) / time? * 1e-6));
                let flops = step.flops.map(real).filter(|f| *f > 0.0);
                table.row(
                    &style(row, &run.peers).class,
                    vec![
                        step.op.clone(),
                        step.kernel.clone(),
                        or_dash(time, format::time),
                        or_dash(time.map(|t| t / whole), format::percent),
                        or_dash(step.bytes.map(real), format::bytes),
                        or_dash(flops.map(|f| f * 1e-9), format::sig3),
                        or_dash(rate.filter(|_| flops.is_some()).map(|v| v / unit), format::sig3),
                        or_dash(step.bytes.zip(time).map(|(b, t)| real(b) / t * 1e-6), format::sig3),
                    ],
                );
            }
        }
        blocks.push(Block::Table { table });
    } else {
        blocks.push(Block::Note { text: "Not in this run: no row lists the steps of its plan.".to_owned() });
    }
    Section { id: "steps", title: "Step by step", sub: false, blocks }
}

/// The worst error of each study, level and type.
pub fn errors(run: &Run<'_>) -> Section {
    struct Worst<'a> {
        row: &'a Row,
        rows: usize,
        absolute: Option<f64>,
        relative: Option<f64>,
    }
    // A NaN error must come out as the worst, not vanish.
    let worse = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => Some(if a.is_nan() || a > b { a } else { b }),
        (a, b) => a.or(b),
    };
    let mut found: Vec<Worst<'_>> = Vec::new();
    for row in run.results.results.iter().filter(|r| r.max_abs_err.is_some() || r.rel_err.is_some()) {
        let same = |w: &&mut Worst<'_>| w.row.study == row.study && w.row.dtype == row.dtype && name(w.row) == name(row);
        match found.iter_mut().find(same) {
            Some(w) => {
                w.rows += 1;
                w.absolute = worse(row.max_abs_err, w.absolute);
                w.relative = worse(row.rel_err, w.relative);
            }
            None => found.push(Worst { row, rows: 1, absolute: row.max_abs_err, relative: row.rel_err }),
        }
    }
    let studies = ["block", "qkv", "softmax", "rope", "attention", "decode", "throughput", "kernels"];
    let place = |r: &Row| studies.iter().position(|s| *s == r.study).unwrap_or(studies.len());
    found.sort_by_key(|w| (place(w.row), w.row.study.clone(), w.row.dtype.clone(), is_peer(w.row), rank(w.row)));
    let mut table = Table::new("", &["level", "compute type", "#measurements", "#largest absolute", "#largest relative"]);
    let mut study = "";
    for w in &found {
        if w.row.study != study {
            study = &w.row.study;
            table.group(study);
        }
        let cells = vec![
            name(w.row),
            w.row.dtype.clone(),
            w.rows.to_string(),
            or_dash(w.absolute, format::error),
            or_dash(w.relative, format::error),
        ];
        table.row(&style(w.row, &run.peers).class, cells);
    }
    let blocks = if table.rows.is_empty() {
        vec![Block::Note { text: "Not in this run: no row carries an error.".to_owned() }]
    } else {
        let text = "The output of the last timed call against a float64 reference that shares no code with the kernels; \
            relative is in the L2 norm.";
        vec![Block::Text { text: text.to_owned() }, Block::Table { table }]
    };
    Section { id: "errors", title: "Errors against the float64 reference", sub: false, blocks }
}

/// What remarks on sizes refer to.
const ARTICLE: &str = "“The article” in remarks is 计算融合优化：从理论到实践的性能飞跃 (Optimising by computation fusion: a leap in performance from \
    theory to practice), from which Lawson grew; the sizes called small, medium and large, and those that bench --preset article \
    measures, are its.";

/// How the figures came about.
pub fn method(run: &Run<'_>) -> Section {
    let rows = &run.results.results;
    let runs: Vec<usize> = rows.iter().filter_map(|r| r.runs).collect();
    let timed = match (runs.iter().min(), runs.iter().max()) {
        (Some(a), Some(b)) if a == b => format!("the median of {a} timed calls"),
        (Some(a), Some(b)) => format!("the median of {a} to {b} timed calls"),
        _ => "the median of the timed calls".to_owned(),
    };
    let mut texts = vec![
        format!(
            "Each time is {timed} after warm-up; p10 and p90 are the tenth and ninetieth percentile. Levels and \
            peers that are compared ran in the same run, in turns. Inputs are normally distributed, and outputs are \
            filled with NaN before each timed call, so that a kernel that writes nothing cannot pass."
        ),
        "Peak memory is that of one cold call in a process of its own, above what was resident before: kept workspace, \
            tile scratch and stacks count; y, cache and weights do not."
            .to_owned(),
        "FLOP counts the projections and 4·D per visible (query, key, head), the same at every level and for every \
            peer. GB/s counts weights, x, y and the valid cache, each once. Traffic, steps, GEMMs and launches are \
            counted from the plan. The share of the limit is against the peak or bandwidth measured in this run, \
            whichever binds; both were measured at the start and after every study, and the greatest count. Data that \
            stayed in a cache can beat memory's bandwidth; then there is no share."
            .to_owned(),
        "Larger shapes are verified on a seeded sample of k and v and on whole rows of y; smaller ones completely.".to_owned(),
    ];
    if rows.iter().any(|r| r.note.as_deref().is_some_and(|note| note.contains("the article"))) {
        texts.push(ARTICLE.to_owned());
    }
    if rows.iter().any(|r| r.device.starts_with("cuda")) {
        texts.push(
            "On a GPU a call is a CUDA graph, timed by the GPU's own clock: the mean of as many replays in a row as fill 2 ms, which find in the \
                second-level cache what fits there. Cold cache is one replay after that cache was overwritten. Peers are timed alike; their notes say \
                which of them are graphs."
                .to_owned(),
        );
    }
    let absent: Vec<String> = run
        .peers
        .iter()
        .filter(|p| rows.iter().filter(|r| r.level == **p).all(|r| ms(r).is_none()))
        .map(|p| p.trim_start_matches("peer:").to_owned())
        .collect();
    if !absent.is_empty() {
        texts.push(format!("Asked for but not measured: {}.", absent.join(", ")));
    }
    let blocks = texts.into_iter().map(|text| Block::Text { text }).collect();
    Section { id: "method", title: "How it was measured", sub: false, blocks }
}
