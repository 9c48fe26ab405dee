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

    /// The fastest fused row and the unfused one at each length that has both.
    fn best(&self) -> Vec<(usize, &Row, &Row)> {
        let mut lengths: Vec<usize> =
            self.baseline().map(|t| t.rows.iter().filter_map(|r| self.along.of(r)).collect()).unwrap_or_default();
        lengths.sort_unstable();
        lengths.dedup();
        let one = |length: usize| {
            let fused = self
                .series
                .iter()
                .flat_map(|t| &t.rows)
                .copied()
                .filter(|r| !is_peer(r) && r.level != "unfused" && self.along.of(r) == Some(length) && ms(r).is_some());
            let fused = fused.min_by(|a, b| ms(a).unwrap_or(f64::MAX).total_cmp(&ms(b).unwrap_or(f64::MAX)))?;
            Some((length, self.base_of(fused)?, fused))
        };
        lengths.into_iter().filter_map(one).collect()
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
        found.sort_by_key(|s| std::cmp::Reverse(s.best().last().map_or(0, |b| b.0)));
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

fn of_sweep(sweep: &Sweep<'_>, what: &str) -> Option<String> {
    let best = sweep.best();
    let point = |(l, base, fused): &(usize, &Row, &Row)| Some((*l, ms(base)? / ms(fused)?, pays(base, fused)));
    let points: Vec<Point> = best.iter().filter_map(point).collect();
    let ((first, ..), (longest, speedup, _)) = (points.first()?, points.last()?);
    let (_, base, fused) = best.last()?;
    let memory = memory_change(base, fused).map_or(String::new(), |m| format!(", {m}"));
    let with_memory = memory.replacen(", ", ", with ", 1);
    let letter = sweep.along.letter();
    let at = format!("at {letter} = {longest}");
    Some(match payoff(&points) {
        Payoff::From { always: true, .. } => format!(
            "On this machine {what} pays at every length measured ({letter} = {first} to {longest}): {} faster{memory} {at}.",
            format::factor_short(*speedup)
        ),
        Payoff::From { length, .. } => format!(
            "On this machine {what} pays from {letter} = {length}: {} faster{memory} {at}.",
            format::factor_short(*speedup)
        ),
        Payoff::Only(lengths) => {
            let lengths: Vec<String> = lengths.iter().map(usize::to_string).collect();
            let (lengths, speed) = (lengths.join(", "), format::factor(*speedup));
            format!(
                "On this machine {what} pays at {letter} = {lengths} but not at the longest: {speed} the speed{with_memory} {at}."
            )
        }
        Payoff::Never => {
            let (name, speed) = (name(fused), format::factor(*speedup));
            format!(
                "On this machine {what} {}: the best level ({name}) runs at {speed} the speed{with_memory} {at}.",
                saves_not(*speedup)
            )
        }
    })
}

/// How to say that a level does not pay.
fn saves_not(speedup: f64) -> &'static str {
    if speedup < PAYS { "does not save time" } else { "saves no time that stands out from the noise" }
}

fn of_configs(configs: &[Config<'_>], what: &str) -> Option<Summary> {
    let best = |config: &Config<'_>| -> Option<(f64, bool, String, String)> {
        let base = config.baseline()?;
        let fused = config.rows.iter().copied().filter(|r| !is_peer(r) && r.level != "unfused" && ms(r).is_some());
        let row = fused.min_by(|a, b| ms(a).unwrap_or(f64::MAX).total_cmp(&ms(b).unwrap_or(f64::MAX)))?;
        let memory = memory_change(base, row).map_or(String::new(), |m| format!(" and takes {m}"));
        Some((ms(base)? / ms(row)?, pays(base, row), memory, config.name.clone()))
    };
    let found: Vec<(f64, bool, String, String)> = configs.iter().filter_map(best).collect();
    // A gain that stands out from the noise goes before a greater one that does not.
    let (speedup, _, memory, about) = found.iter().max_by(|a, b| a.1.cmp(&b.1).then(a.0.total_cmp(&b.0)))?.clone();
    let paying = found.iter().filter(|f| f.1).count();
    let sentence = match (paying, found.len()) {
        (0, 1) => {
            let (not, speed) = (saves_not(speedup), format::factor(speedup));
            format!("On this machine {what} {not} here: it runs at {speed} the speed{memory}.")
        }
        (0, n) => format!(
            "On this machine {what} clearly saves time in none of {n} configurations: at best {} the speed{memory}.",
            format::factor(speedup)
        ),
        (_, 1) => format!("On this machine {what} makes it {} faster{memory}.", format::factor_short(speedup)),
        (k, n) => {
            let best = format::factor_short(speedup);
            format!("On this machine {what} pays in {k} of {n} configurations; at best it is {best} faster{memory}.")
        }
    };
    Some(Summary { sentence, about })
}

fn memory_change(base: &Row, fused: &Row) -> Option<String> {
    let (base, fused) = (base.peak_bytes? as f64, fused.peak_bytes? as f64);
    (base > 0.0).then(|| format::change(fused / base, "less", "more", "memory"))
}
