//! What a study prints.

use super::{HEAD_DIM, record::Row};
use crate::{
    output::{self, Grid},
    report,
};

/// One line of the table as text; an empty column is left out.
type Column = (&'static str, fn(&Row) -> Option<String>);

fn shape(row: &Row) -> String {
    let mut parts = Vec::new();
    let lengths = [("B", row.batch), ("S", row.seq), ("L", row.past.filter(|&p| p > 0)), ("E", row.hidden)];
    parts.extend(lengths.iter().filter_map(|(letter, n)| n.map(|n| format!("{letter} {n}"))));
    match (row.heads, row.kv_heads.filter(|g| Some(*g) != row.heads)) {
        (Some(h), Some(g)) => parts.push(format!("H {h}/{g}")),
        (Some(h), None) => parts.push(format!("H {h}")),
        _ => {}
    }
    parts.extend(row.head_dim.filter(|&d| d != HEAD_DIM).map(|d| format!("D {d}")));
    parts.push(row.dtype.clone());
    parts.extend(row.weights.iter().filter(|w| **w != row.dtype).map(|w| format!("{w} weights")));
    parts.extend(row.kv_dtype.iter().filter(|kv| **kv != row.dtype).map(|kv| format!("{kv} cache")));
    parts.join(" ")
}

fn error(e: f64) -> String {
    if e == 0.0 { "0".to_owned() } else { format!("{e:.1e}") }
}

const COLUMNS: [Column; 18] = [
    ("median", |r| r.median_ms.map(|ms| output::seconds(ms / 1e3))),
    ("p10 – p90", |r| r.p10_ms.zip(r.p90_ms).map(|(a, b)| output::seconds_between(a / 1e3, b / 1e3))),
    ("cold cache", |r| r.cold_ms.map(|ms| output::seconds(ms / 1e3))),
    ("speed-up", |r| r.speedup.map(|s| format!("{s:.2}×"))),
    ("peak memory", |r| r.peak_bytes.map(|b| output::bytes(b as usize))),
    ("GFLOP/s", |r| r.gflops.map(|v| format!("{v:.1}"))),
    ("TFLOP/s", |r| r.gflops.map(|v| format!("{:.1}", v * 1e-3))),
    ("GB/s", |r| r.gbps.map(|v| format!("{v:.1}"))),
    ("of the limit", |r| r.limit_share.map(|s| format!("{:.0} %", s * 100.0))),
    ("of plain", |r| r.plain_share.map(|s| format!("{:.0} %", s * 100.0))),
    ("of a read loop", |r| r.read_share.map(|s| format!("{:.0} %", s * 100.0))),
    ("of its bound", |r| r.bound_share.map(|s| format!("{:.0} %", s * 100.0))),
    ("neighbours", |r| {
        let (least, median) = r.neighbours_least.zip(r.neighbours_median)?;
        Some(format!("{}: least {:.0} %, median {:.0} %", r.neighbours.unwrap_or(0), least * 100.0, median * 100.0))
    }),
    ("tokens/s, fit", |r| {
        let fit = r.sequences_fit.map_or(String::new(), |n| format!(", {n}"));
        r.tokens_per_s.map(|t| format!("{t:.0}{fit}"))
    }),
    ("rel. error", |r| r.rel_err.map(error)),
    ("mean loss", |r| r.mean_loss.map(|v| format!("{v:.5}"))),
    ("change", |r| r.loss_change.map(|v| format!("{:+.3} %", v * 100.0))),
    ("worst layer", |r| r.layer_errors.iter().copied().reduce(f64::max).map(error)),
];

/// Columns that go where a table is too wide, in this order: first those that others imply.
const LEAST: [&str; 12] = [
    "GB/s",
    "rel. error",
    "p10 – p90",
    "GFLOP/s",
    "TFLOP/s",
    "peak memory",
    "tokens/s, fit",
    "neighbours",
    "of its bound",
    "of a read loop",
    "of plain",
    "of the limit",
];

/// The rows of one study, readable, with their remarks below. Where the whole table is too wide, shapes are lines above their levels.
pub fn text(study: &str, rows: &[Row]) -> String {
    let (unit, _) = report::rate_unit(rows.iter().filter_map(|r| r.gflops));
    let in_unit = |title: &str| title == unit || !title.ends_with("FLOP/s");
    let filled = |column: &&Column| in_unit(column.0) && rows.iter().any(|r| column.1(r).is_some());
    let columns: Vec<&Column> = COLUMNS.iter().filter(filled).collect();
    let mut notes: Vec<String> = Vec::new();
    let mut lines = Vec::new();
    for row in rows {
        let mut level = row.level.clone();
        level.extend(row.variant.iter().map(|v| format!(" ({v})")));
        let same = row.same_as.as_ref().map(|s| format!("same plan as {s}"));
        for note in same.into_iter().chain(row.note.clone()) {
            let number = notes.iter().position(|n| *n == note).unwrap_or_else(|| {
                notes.push(note);
                notes.len() - 1
            });
            level.push_str(&format!(" [{}]", number + 1));
        }
        let mut cells = vec![level, shape(row)];
        cells.extend(columns.iter().map(|(_, get)| get(row).unwrap_or_else(|| "–".to_owned())));
        lines.push(cells);
    }
    let head: Vec<&str> = [study, "shape"].into_iter().chain(columns.iter().map(|c| c.0)).collect();
    let flat = Grid { head, rows: lines };
    let mut text = if flat.fits() { flat } else { stacked(flat) }.text(&LEAST);
    for (i, note) in notes.iter().enumerate() {
        text.push_str(&format!("\n[{}] {note}", i + 1));
    }
    text.push('\n');
    text
}

/// The table with its second column, the shape, as a line of its own above the rows that share it.
fn stacked(flat: Grid) -> Grid {
    let without = |mut cells: Vec<String>| (cells.remove(1), cells);
    let mut head = flat.head;
    head.remove(1);
    let (mut rows, mut above) = (Vec::new(), None);
    for (shape, mut cells) in flat.rows.into_iter().map(without) {
        if above.as_ref() != Some(&shape) {
            let mut line = vec![String::new(); cells.len()];
            line[0].clone_from(&shape);
            rows.push(line);
            above = Some(shape);
        }
        cells[0].insert_str(0, "  ");
        rows.push(cells);
    }
    Grid { head, rows }
}
