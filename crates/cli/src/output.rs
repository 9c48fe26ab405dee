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

/// Columns of text where stdout is no terminal and nothing says how many there are.
const WIDTH: usize = 120;

/// Columns of text that there are: what the variable COLUMNS says, else the terminal's, else [`WIDTH`].
fn width() -> usize {
    let said = std::env::var("COLUMNS").ok().and_then(|n| n.parse().ok()).filter(|&n| n > 0);
    said.or_else(|| Table::new().width().map(usize::from)).unwrap_or(WIDTH)
}

/// Whether `text`, whose lines are of one length, fits beside nothing else.
fn fits(text: &str) -> bool {
    text.lines().next().is_none_or(|line| line.chars().count() <= width())
}

/// Rows under a head; the first column stands left, the others stand right.
pub struct Grid<'a> {
    /// A title for each column.
    pub head: Vec<&'a str>,
    /// As many cells each.
    pub rows: Vec<Vec<String>>,
}

impl Grid<'_> {
    fn draw(&self, shown: &[usize]) -> String {
        let mut table = Table::new();
        let cells = |row: &Vec<String>| shown.iter().map(|&i| row[i].clone()).collect::<Vec<_>>();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(shown.iter().map(|&i| self.head[i]));
        table.add_rows(self.rows.iter().map(cells));
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }

    /// Whether the whole table fits.
    pub fn fits(&self) -> bool {
        fits(&self.draw(&(0..self.head.len()).collect::<Vec<_>>()))
    }

    /// The table, without as many of the columns `least`, in that order, as it takes to fit; a line below names those.
    pub fn text(&self, least: &[&str]) -> String {
        let mut shown: Vec<usize> = (0..self.head.len()).collect();
        let mut out: Vec<&str> = Vec::new();
        let mut text = self.draw(&shown);
        for title in least.iter().filter(|title| self.head.contains(title)) {
            if fits(&text) {
                break;
            }
            shown.retain(|&i| self.head[i] != *title);
            out.push(title);
            text = self.draw(&shown);
        }
        if !out.is_empty() {
            text += &format!("\nleft out to fit {} columns: {}; COLUMNS=200 shows all", width(), out.join(", "));
        }
        text
    }
}

/// A name and what is said of it, in as many lines as it takes.
pub fn fact(name: &str, value: &str) -> String {
    const INDENT: usize = 20;
    let (mut text, mut column) = (format!("  {name:<18}"), INDENT);
    for (i, word) in value.split(' ').enumerate() {
        let len = word.chars().count();
        if i > 0 && column + 1 + len > width() {
            text += &format!("\n{:INDENT$}", "");
            column = INDENT;
        } else if i > 0 {
            text.push(' ');
            column += 1;
        }
        text += word;
        column += len;
    }
    text
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

/// Two times in the unit of the second.
pub fn seconds_between(low: f64, high: f64) -> String {
    match high {
        h if h < 1e-3 => format!("{:.1} – {:.1} µs", low * 1e6, h * 1e6),
        h if h < 1.0 => format!("{:.3} – {:.3} ms", low * 1e3, h * 1e3),
        h => format!("{low:.2} – {h:.2} s"),
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
