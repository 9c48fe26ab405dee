//! When fusing pays: the crossovers, and the one sentence at the top of the page.

use crate::bench::record::{Results, Row};

use super::format;
use super::model::{Along, Config, PAYS, Sweep, Track, configs, is_peer, ms, name, pays, stored_alike, sweeps};

/// Where along a sweep a level is faster than the baseline, as [`pays`] says.
#[derive(Clone, Debug, PartialEq)]
pub enum Payoff {
    /// From this length to the end; `always` when that is the shortest one measured.
    From {
        /// The length.
        length: usize,
        /// Whether it is the shortest measured.
        always: bool,
    },
    /// At these lengths, but not at the longest.
    Only(Vec<usize>),
    /// Nowhere.
    Never,
}

/// A length, the speed-up there, and whether it pays.
pub type Point = (usize, f64, bool);

/// Reads the payoff off points by growing length.
fn payoff(points: &[Point]) -> Payoff {
    let pays: Vec<usize> = points.iter().filter(|p| p.2).map(|p| p.0).collect();
    let tail = points.iter().rev().take_while(|p| p.2).last();
    match tail {
        Some((length, ..)) => Payoff::From { length: *length, always: points.first().is_some_and(|p| p.0 == *length) },
        None if pays.is_empty() => Payoff::Never,
        None => Payoff::Only(pays),
    }
}

impl Sweep<'_> {
    /// The unfused series.
    pub fn baseline(&self) -> Option<&Track<'_>> {
        self.series.iter().find(|t| t.level == "unfused")
    }

    /// The unfused row at a length, stored as `row` is.
    fn base_of(&self, row: &Row) -> Option<&Row> {
        let mut unfused = self.series.iter().filter(|t| t.level == "unfused").flat_map(|t| &t.rows).copied();
        unfused.find(|r| self.along.of(r) == self.along.of(row) && ms(r).is_some() && stored_alike(r, row))
    }

    /// The points of one series over unfused.
    pub fn speedups(&self, track: &Track<'_>) -> Vec<Point> {
        let one = |row: &&Row| {
            let length = self.along.of(row)?;
            let base = self.base_of(row)?;
            Some((length, ms(base)? / ms(row)?, pays(base, row)))
        };
        track.rows.iter().filter_map(one).collect()
    }

    /// Where one series pays.
    pub fn payoff(&self, track: &Track<'_>) -> Payoff {
        payoff(&self.speedups(track))
    }

    /// The fused series that reaches the longest length, the fastest of them there; its row there and the unfused one.
    fn furthest(&self) -> Option<(&Track<'_>, &Row, &Row)> {
        let fused = self.series.iter().filter(|t| t.level != "unfused" && !t.rows.iter().any(|r| is_peer(r)));
        let ends = fused.filter_map(|t| {
            let timed = t.rows.iter().rev().copied().filter(|r| ms(r).is_some());
            timed.filter_map(|row| Some((t, self.base_of(row)?, row))).next()
        });
        ends.max_by(|(_, _, a), (_, _, b)| {
            let faster = ms(b).unwrap_or(f64::MAX).total_cmp(&ms(a).unwrap_or(f64::MAX));
            self.along.of(a).cmp(&self.along.of(b)).then(faster)
        })
    }
}

/// The headline and the line under it.
pub struct Summary {
    /// One sentence.
    pub sentence: String,
    /// What it speaks of.
    pub about: String,
}

/// The page's summary, computed from the rows.
pub fn summary(results: &Results) -> Summary {
    let of = |study: &str| -> Vec<&Row> { results.results.iter().filter(|r| r.study == study).collect() };
    for (study, what) in [("block", "fusing the block"), ("attention", "tiling the attention")] {
        let rows = of(study);
        let mut found = sweeps(&rows, Along::Seq, &[]);
        // The sweep that reaches furthest says most.
        found.sort_by_key(|s| std::cmp::Reverse(s.furthest().and_then(|(_, _, row)| s.along.of(row))));
        if let Some(sentence) = found.first().and_then(|s| of_sweep(s, what)) {
            return Summary { sentence, about: format!("{study}, {}", found[0].name) };
        }
        if let Some(summary) = of_configs(&configs(&rows), what) {
            return summary;
        }
    }
    let mut studies: Vec<&str> = results.results.iter().map(|r| r.study.as_str()).collect();
    studies.dedup();
    let sentence = match results.results.len() {
        0 => "This run has no measurements.".to_owned(),
        _ => "This run did not compare fused with unfused blocks; what it measured stands below.".to_owned(),
    };
    Summary { sentence, about: if studies.is_empty() { String::new() } else { format!("measured: {}", studies.join(", ")) } }
}

/// `what` with the one level that the sentence is about, where there are several.
fn at_level(what: &str, row: &Row) -> String {
    if row.study == "attention" { what.to_owned() } else { format!("{what} ({})", name(row)) }
}

fn of_sweep(sweep: &Sweep<'_>, what: &str) -> Option<String> {
    let (track, base, fused) = sweep.furthest()?;
    let points = sweep.speedups(track);
    let ((first, ..), (longest, speedup, _)) = (points.first()?, points.last()?);
    let what = at_level(what, fused);
    let memory = memory_change(base, fused).map_or(String::new(), |m| format!(", {m}"));
    let with_memory = memory.replacen(", ", ", with ", 1);
    let letter = sweep.along.letter();
    let at = format!("at {letter} = {longest}");
    Some(match payoff(&points) {
        Payoff::From { always: true, .. } => format!(
            "On this machine {what} pays at every length measured ({letter} = {first} to {longest}): {} faster{memory} {at}.",
            format::factor(*speedup)
        ),
        Payoff::From { length, .. } => {
            format!("On this machine {what} pays from {letter} = {length}: {} faster{memory} {at}.", format::factor(*speedup))
        }
        Payoff::Only(lengths) => {
            let lengths: Vec<String> = lengths.iter().map(usize::to_string).collect();
            let (lengths, not, speed) = (lengths.join(", "), saves_not(*speedup), format::factor(*speedup));
            format!(
                "On this machine {what} pays at {letter} = {lengths} but {not} at the longest: {speed} the speed{with_memory} {at}."
            )
        }
        Payoff::Never => {
            let (not, speed) = (saves_not(*speedup), format::factor(*speedup));
            format!("On this machine {what} {not}: it runs at {speed} the speed{with_memory} {at}.")
        }
    })
}

/// How to say that a level does not pay.
fn saves_not(speedup: f64) -> &'static str {
    if speedup < PAYS { "does not save time" } else { "saves no time that stands out from the noise" }
}

fn of_configs(configs: &[Config<'_>], what: &str) -> Option<Summary> {
    let fused = configs.iter().flat_map(|config| {
        let rows = config.rows.iter().copied().filter(|r| !is_peer(r) && r.level != "unfused");
        rows.filter_map(move |row| {
            let base = config.baseline()?;
            Some((ms(base)? / ms(row)?, pays(base, row), base, row, config))
        })
    });
    let fused: Vec<(f64, bool, &Row, &Row, &Config<'_>)> = fused.collect();
    // A gain that stands out from the noise goes before a greater one that does not.
    let &(speedup, _, base, row, config) = fused.iter().max_by(|a, b| a.1.cmp(&b.1).then(a.0.total_cmp(&b.0)))?;
    let what = at_level(what, row);
    let memory = memory_change(base, row).map_or(String::new(), |m| format!(" and takes {m}"));
    let of_level: Vec<bool> = fused.iter().filter(|f| f.3.level == row.level).map(|f| f.1).collect();
    let sentence = match (of_level.iter().filter(|pays| **pays).count(), of_level.len()) {
        (0, 1) => {
            let (not, speed) = (saves_not(speedup), format::factor(speedup));
            format!("On this machine {what} {not} here: it runs at {speed} the speed{memory}.")
        }
        (0, n) => format!(
            "On this machine {what} clearly saves time in none of {n} configurations: at best {} the speed{memory}.",
            format::factor(speedup)
        ),
        (_, 1) => format!("On this machine {what} makes it {} faster{memory}.", format::factor(speedup)),
        (k, n) => {
            let best = format::factor(speedup);
            format!("On this machine {what} pays in {k} of {n} configurations; at best it is {best} faster{memory}.")
        }
    };
    Some(Summary { sentence, about: config.name.clone() })
}

fn memory_change(base: &Row, fused: &Row) -> Option<String> {
    let (base, fused) = (base.peak_bytes? as f64, fused.peak_bytes? as f64);
    (base > 0.0).then(|| format::change(fused / base, "less", "more", "memory"))
}
