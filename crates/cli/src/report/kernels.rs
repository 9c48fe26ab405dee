//! The study of kernels: each hot kernel alone, as a share of what it could reach.

use crate::bench::record::Row;

use super::axis::{Axis, Spread};
use super::charts::{self, Bar, Group, Series, Style};
use super::format;
use super::model::{is_peer, ms, name, style};
use super::page::{Block, Figure, Section, Table};
use super::sections::{Run, absent, count, limit_share, rate_column, remarks};
use super::svg::Marker;

/// The kernels by the first word of their cases, and their headings.
const KINDS: [(&str, &str); 4] = [
    ("gemm", "GEMM: the fused QKV projection, M x E to 3·E"),
    ("attention", "Tiled attention"),
    ("decode", "Decode attention: one new token of each sequence over a cache"),
    ("block", "The block at one new token of each sequence"),
];

/// What a row of this study computes, short.
pub fn shape(row: &Row) -> String {
    let mut parts: Vec<String> = Vec::new();
    let past = row.past.filter(|p| *p > 0);
    let seq = row.seq.filter(|s| past.is_none() || *s > 1);
    let lengths = [("B", row.batch.filter(|b| *b > 1)), ("S", seq), ("L", past), ("E", row.hidden)];
    parts.extend(lengths.iter().filter_map(|(letter, n)| n.map(|n| format!("{letter}\u{a0}{n}"))));
    if row.hidden.is_none() || past.is_some() {
        parts.extend(heads(row).map(|h| format!("H\u{a0}{h}")));
        parts.extend(row.head_dim.map(|d| format!("D\u{a0}{d}")));
    }
    parts.push(row.dtype.clone());
    parts.extend(row.weights.iter().filter(|w| **w != row.dtype).map(|w| format!("{w} weights")));
    parts.join(" ")
}

fn heads(row: &Row) -> Option<String> {
    let h = row.heads?;
    Some(row.kv_heads.filter(|g| *g != h).map_or(h.to_string(), |g| format!("{h}/{g}")))
}

fn is_of(row: &Row, kind: &str) -> bool {
    row.variant.as_deref().and_then(|v| v.split(' ').next()) == Some(kind)
}

/// Bars of one type: each kernel that computes, as a share of the limit.
fn limit_bars(run: &Run<'_>, rows: &[&Row], dtype: &str) -> Option<Figure> {
    let mut groups: Vec<Group> = Vec::new();
    for (kind, title) in &KINDS[..2] {
        let of = rows.iter().filter(|r| r.dtype == dtype && is_of(r, kind));
        let bars = of.map(|row| {
            let text = limit_share(row, &run.results.machine).unwrap_or_default();
            let name = name(row);
            let label = match *kind {
                _ if is_peer(row) => name,
                "gemm" => {
                    let int8 = if row.weights.as_deref() == Some("int8") { ", int8" } else { "" };
                    row.hidden.map_or(name, |e| format!("E {e}{int8}"))
                }
                _ => match name.trim_start_matches("attention ") {
                    short @ ("full" | "causal") => {
                        let (seq, dim) = (row.seq.unwrap_or(0), row.head_dim.unwrap_or(0));
                        format!("{short} {seq}, D {dim}")
                    }
                    short => short.to_owned(),
                },
            };
            let about = format!("{}, {}", shape(row), format::or_dash(row.gflops, format::gflops));
            Bar { name: label, style: style(row, &run.peers), value: row.limit_share, text, about }
        });
        let bars: Vec<Bar> = bars.collect();
        if !bars.is_empty() {
            let title = title.split(':').next().unwrap_or(title);
            groups.push(Group { name: title.to_owned(), bars });
        }
    }
    let axis =
        Axis { title: "share of the measured limit", spread: Spread::Linear, format: format::percent, value: format::percent };
    let svg = charts::bars(&format!("Share of the measured limit of each kernel in {dtype}"), axis, &groups, Some(1.0))?;
    Some(Figure { title: format!("Of the measured limit, {dtype}"), caption: String::new(), svg })
}

/// The read loop's time as a share of decode attention's over the cache's length, a chart for each form and each number of heads.
fn decode_lines(rows: &[&Row]) -> Vec<Figure> {
    let mut charts: Vec<(String, Vec<Series>)> = Vec::new();
    for row in rows.iter().filter(|r| is_of(r, "decode")) {
        let (Some(past), Some(share), Some(heads)) = (row.past, row.read_share, heads(row)) else { continue };
        let caption = format!("{}, {heads} heads of {}", name(row), row.head_dim.unwrap_or(0));
        let at = charts.iter().position(|c| c.0 == caption).unwrap_or_else(|| {
            charts.push((caption, Vec::new()));
            charts.len() - 1
        });
        let batch = row.batch.unwrap_or(1);
        let line = format!("{}, batch {batch}", row.dtype);
        let series = &mut charts[at].1;
        let at = series.iter().position(|s| s.name == line).unwrap_or_else(|| {
            let (class, marker) =
                if row.dtype == "f32" { ("c-minimal", Marker::Square) } else { ("c-moderate", Marker::Triangle) };
            let class = if batch > 1 { format!("{class} dashed") } else { class.to_owned() };
            series.push(Series { name: line, style: Style { class, marker }, points: Vec::new() });
            series.len() - 1
        });
        series[at].points.push((count(past), share));
    }
    let draw = |(caption, mut series): (String, Vec<Series>)| {
        series.iter_mut().for_each(|s| s.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
        series.iter().any(|s| s.points.len() > 1).then_some(())?;
        let x = Axis { title: "cache length L (tokens)", spread: Spread::Log2, format: format::plain, value: format::plain };
        let y = Axis {
            title: "time of the read loop over the kernel's",
            spread: Spread::Linear,
            format: format::percent,
            value: format::percent,
        };
        let svg = charts::lines(&format!("Share of a read loop against cache length, {caption}"), x, y, &series, &[])?;
        Some(Figure { title: "Of a loop that only reads the cache".to_owned(), caption, svg })
    };
    charts.into_iter().filter_map(draw).collect()
}

/// The rows of one kernel, with the columns that some row fills.
fn table(run: &Run<'_>, title: &str, rows: &[&Row]) -> Table {
    type Column<'a> = (&'static str, &'a dyn Fn(&Row) -> Option<String>);
    let share = |v: Option<f64>| v.map(format::percent);
    let (rate, unit) = rate_column(rows.iter().filter_map(|r| r.gflops));
    let columns: [Column<'_>; 10] = [
        ("#median", &|r| ms(r).map(format::time)),
        (rate, &|r| r.gflops.map(|v| format::sig3(v / unit))),
        ("#GB/s", &|r| r.gbps.map(format::sig3).filter(|_| r.read_share.is_some())),
        ("#of the limit", &|r| limit_share(r, &run.results.machine)),
        ("#of plain", &|r| share(r.plain_share)),
        ("#of a read loop", &|r| share(r.read_share)),
        ("#of its bound", &|r| share(r.bound_share)),
        ("#neighbours: least", &|r| share(r.neighbours_least)),
        ("#median of", &|r| r.neighbours.zip(share(r.neighbours_median)).map(|(n, s)| format!("{n}: {s}"))),
        ("#rel. error", &|r| r.rel_err.map(format::error)),
    ];
    let filled: Vec<&Column<'_>> = columns.iter().filter(|(_, get)| rows.iter().any(|r| get(r).is_some())).collect();
    // Why a row has no time stands beside it; other remarks stand below the tables.
    let failed = |r: &Row| r.note.clone().filter(|_| ms(r).is_none());
    let notes = rows.iter().any(|r| failed(r).is_some());
    let mut head = vec!["case", "shape"];
    head.extend(filled.iter().map(|c| c.0));
    head.extend(notes.then_some("note"));
    let mut table = Table::new("", &head);
    table.group(title);
    for row in rows {
        let mut cells = vec![name(row), shape(row)];
        cells.extend(filled.iter().map(|(_, get)| get(row).unwrap_or_else(|| format::NONE.to_owned())));
        cells.extend(notes.then(|| failed(row).unwrap_or_default()));
        table.row(&style(row, &run.peers).class, cells);
    }
    table
}

/// Each hot kernel alone.
pub fn kernels(run: &Run<'_>) -> Section {
    let rows = run.of("kernels");
    let mut blocks = Vec::new();
    if rows.is_empty() {
        blocks = absent("each hot kernel alone", "kernels");
    } else {
        let text = "Each kernel at maximal as a share of the limit that binds it. Of plain: its GFLOP/s beside those of plain causal \
            attention in turn with it (only visible pairs count as work), or of a GEMM with int8 weights beside that in bf16. Of a read loop: the time in which the same threads \
            only read the same cache, or weights and cache, over the kernel's. Of its bound: the greater of that time and of the time that the \
            operations take at the f32 peak, since many heads that share a cache leave arithmetic to bind; cold goes through copies of the cache that \
            together exceed four times the last-level cache. Peers stand below the plain form that they compute. Neighbours are seeded shapes near a kernel's own: GFLOP/s as a share of its.";
        blocks.push(Block::Text { text: text.to_owned() });
        let mut dtypes: Vec<&str> = Vec::new();
        rows.iter().for_each(|r| {
            if !dtypes.contains(&r.dtype.as_str()) {
                dtypes.push(&r.dtype)
            }
        });
        let bars: Vec<Figure> = dtypes.iter().filter_map(|d| limit_bars(run, &rows, d)).collect();
        for items in [bars, decode_lines(&rows)].into_iter().filter(|f| !f.is_empty()) {
            blocks.push(Block::Figures { items });
        }
        for (kind, title) in KINDS {
            let of: Vec<&Row> = rows.iter().copied().filter(|r| is_of(r, kind)).collect();
            if !of.is_empty() {
                blocks.push(Block::Table { table: table(run, title, &of) });
            }
        }
        blocks.extend(remarks(&rows));
    }
    Section { id: "study-kernels", title: "Kernels: how much of what each could reach", sub: true, blocks }
}
