//! What people read: progress, tables, numbers with units.

use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lawson::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::args::Global;

/// A bar of `len` steps on stderr; hidden when quiet or when stderr is no terminal.
pub fn progress(len: usize, what: &str, global: &Global) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len as u64), ProgressDrawTarget::hidden());
    if !global.quiet {
        // indicatif draws nothing when stderr is no terminal.
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(what.to_string());
    bar
}

/// A table whose first column stands left and whose others stand right.
pub fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(head.iter().copied()).add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Bytes with a binary unit.
pub fn bytes(n: usize) -> String {
    let (mut n, mut unit) = (n as f64, 0);
    while n >= 1024.0 && unit < 4 {
        n /= 1024.0;
        unit += 1;
    }
    let name = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
    if unit == 0 { format!("{n:.0} {name}") } else { format!("{n:.1} {name}") }
}

/// A time with its unit.
pub fn seconds(s: f64) -> String {
    match s {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.3} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// Prints `text` on stdout with a line end behind it.
///
/// # Errors
/// `Device` when stdout does not take it; a reader that has gone away is none.
pub fn print(text: impl AsRef<str>) -> Result<()> {
    match writeln!(std::io::stdout().lock(), "{}", text.as_ref().trim_end()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(ErrorKind::Device, format!("stdout cannot be written: {e}")))
        }
        _ => Ok(()),
    }
}

/// Prints `value` as one JSON document.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value);
    print(text.map_err(|e| Error::new(ErrorKind::Corrupt, format!("the result cannot be written as JSON: {e}")))?)
}
