//! The rows as the report sees them: configurations whose levels compare, and sweeps over one length.

use crate::bench::record::Row;

use super::charts::Style;
use super::svg::Marker;

/// From this speed-up on fusing is said to pay: less would be noise on a shared machine.
pub const PAYS: f64 = 1.05;

/// Whether `row` is faster than `base` by [`PAYS`] and by more than noise: its slow calls beat the quick ones of `base`, or the medians
/// lie further apart than either's calls.
pub fn pays(base: &Row, row: &Row) -> bool {
    let (Some(slow), Some(fast)) = (ms(base), ms(row)) else { return false };
    if slow / fast < PAYS {
        return false;
    }
    let ((Some(a10), Some(a90)), (Some(b10), Some(b90))) = ((base.p10_ms, base.p90_ms), (row.p10_ms, row.p90_ms)) else {
        return true;
    };
    b90 < a10 || slow - fast > (a90 - a10).max(b90 - b10)
}

/// What varies along a sweep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Along {
    /// New tokens per sequence.
    Seq,
    /// Cached tokens.
    Past,
    /// Sequences.
    Batch,
}

impl Along {
    /// The value that varies.
    pub fn of(self, row: &Row) -> Option<usize> {
        match self {
            Along::Seq => row.seq,
            Along::Past => row.past,
            Along::Batch => row.batch,
        }
    }

    /// The letter for it.
    pub fn letter(self) -> &'static str {
        match self {
            Along::Seq => "S",
            Along::Past => "L",
            Along::Batch => "B",
        }
    }

    /// Its axis title.
    pub fn title(self) -> &'static str {
        match self {
            Along::Seq => "sequence length S (tokens)",
            Along::Past => "cache length L (tokens)",
            Along::Batch => "batch B (sequences)",
        }
    }
}

/// One configuration with a row per level (and peer), best known baseline first.
pub struct Config<'a> {
    /// What it is, for people.
    pub name: String,
    /// Its rows by level.
    pub rows: Vec<&'a Row>,
}

impl<'a> Config<'a> {
    /// The unfused row that was timed.
    pub fn baseline(&self) -> Option<&'a Row> {
        self.rows.iter().copied().find(|r| r.level == "unfused" && ms(r).is_some())
    }

    /// How much faster `row` is than the baseline.
    pub fn speedup(&self, row: &Row) -> Option<f64> {
        match (self.baseline().and_then(ms), ms(row)) {
            (Some(base), Some(this)) => Some(base / this),
            _ => row.speedup.filter(|v| v.is_finite()),
        }
    }
}

/// One configuration over a varying length.
pub struct Sweep<'a> {
    /// What stays the same, for people.
    pub name: String,
    /// What varies.
    pub along: Along,
    /// The rows of each series by growing length.
    pub series: Vec<Track<'a>>,
}

/// One series of a sweep.
pub struct Track<'a> {
    /// Its name.
    pub name: String,
    /// Its level.
    pub level: &'a str,
    /// Colour and marker.
    pub style: Style,
    /// Rows by growing length.
    pub rows: Vec<&'a Row>,
}

/// The median, where there is a usable one.
pub fn ms(row: &Row) -> Option<f64> {
    row.median_ms.filter(|v| v.is_finite() && *v > 0.0)
}

/// Whether the row is another library's.
pub fn is_peer(row: &Row) -> bool {
    row.level.starts_with("peer:")
}

/// Order of levels in every chart and table.
pub fn rank(row: &Row) -> usize {
    let levels = ["unfused", "minimal", "moderate", "maximal"];
    let level = levels.iter().position(|l| *l == row.level).unwrap_or(levels.len());
    match (row.study.as_str(), row.variant.as_deref()) {
        ("softmax" | "rope", _) if is_peer(row) => level,
        ("softmax" | "rope", Some(v)) if v.starts_with("fused") => 1,
        ("softmax" | "rope", Some(v)) if v.starts_with("online") => 2,
        ("softmax" | "rope", Some(_)) => 0,
        _ => level,
    }
}

/// What a row is called where its study and configuration are known.
pub fn name(row: &Row) -> String {
    if let Some(peer) = row.level.strip_prefix("peer:") {
        return peer.to_owned();
    }
    let named = match (row.study.as_str(), row.level.as_str()) {
        ("qkv", "unfused") => "separate",
        ("qkv", "minimal") => "fused",
        ("attention", "unfused") => "materialised",
        ("attention", "maximal") => "tiled",
        ("kernels", level) => row.variant.as_deref().unwrap_or(level),
        ("softmax" | "rope", _) => row.variant.as_deref().map_or(row.level.as_str(), |v| v.split(' ').next().unwrap_or(v)),
        (_, level) => level,
    };
    named.to_owned()
}

/// Colour and marker of a row; `peers` lists every peer of the run, so that each keeps its own.
pub fn style(row: &Row, peers: &[String]) -> Style {
    const PEERS: [Marker; 3] = [Marker::Ring, Marker::Box, Marker::Down];
    if let Some(i) = peers.iter().position(|p| *p == row.level) {
        return Style { class: format!("c-peer{}", i % 4), marker: PEERS[i % PEERS.len()] };
    }
    let (class, marker) = match (row.study.as_str(), rank(row)) {
        (_, 0) => ("c-unfused", Marker::Disc),
        ("rope", _) => ("c-maximal", Marker::Diamond),
        (_, 1) => ("c-minimal", Marker::Square),
        (_, 2) => ("c-moderate", Marker::Triangle),
        (_, 3) => ("c-maximal", Marker::Diamond),
        _ => ("c-peer3", Marker::Ring),
    };
    Style { class: class.to_owned(), marker }
}

/// The peers of a run, in the order met.
pub fn peers(rows: &[Row]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for row in rows.iter().filter(|r| is_peer(r)) {
        if !found.contains(&row.level) {
            found.push(row.level.clone());
        }
    }
    found
}

/// What makes rows comparable, with one length left out when a sweep runs along it.
#[derive(PartialEq)]
struct Key<'a> {
    sizes: [Option<usize>; 7],
    /// Of attention alone, where it is a choice of the study's.
    causal: Option<bool>,
    dtype: &'a str,
    device: &'a str,
    form: &'a str,
}

fn key(row: &Row, without: Option<Along>) -> Key<'_> {
    let keep = |along: Along| if without == Some(along) { None } else { along.of(row) };
    // A peer's cache length is null where ours says 0.
    let past = keep(Along::Past).filter(|p| *p > 0);
    // Forms that differ in what is computed; a softmax's variants compare with each other.
    let form = match (row.study.as_str(), row.variant.as_deref()) {
        ("rope", Some(v)) => v.split_once(' ').map_or("", |(_, layout)| layout),
        ("softmax", _) | (_, None) => "",
        (_, Some(v)) => v,
    };
    let attends = row.study == "attention";
    // Attention is compared by length with as many tokens in all, the batch shrinking as sequences grow.
    let batch = if attends && without == Some(Along::Seq) { None } else { keep(Along::Batch) };
    let causal = row.causal.filter(|_| attends);
    let sizes = [batch, keep(Along::Seq), past, row.hidden, row.heads, row.kv_heads, row.head_dim];
    Key { sizes, causal, dtype: &row.dtype, device: &row.device, form }
}

fn describe(row: &Row, without: Option<Along>) -> String {
    let mut parts: Vec<String> = Vec::new();
    for along in [Along::Batch, Along::Seq, Along::Past] {
        if let Some(v) = along.of(row).filter(|v| without != Some(along) && (along != Along::Past || *v > 0)) {
            parts.push(format!("{} {v}", along.letter()));
        }
    }
    parts.extend(row.hidden.map(|e| format!("E {e}")));
    let heads = match (row.heads, row.kv_heads) {
        (Some(h), Some(g)) if g != h => Some(format!("{h}/{g}")),
        (Some(h), _) => Some(h.to_string()),
        _ => None,
    };
    let word = if row.heads == Some(1) { "head" } else { "heads" };
    match (heads, row.head_dim) {
        (Some(h), Some(d)) => parts.push(format!("{h} {word} of {d}")),
        (Some(h), None) => parts.push(format!("{h} {word}")),
        (None, Some(d)) => parts.push(format!("D {d}")),
        (None, None) => {}
    }
    parts.extend(Some(row.dtype.clone()).filter(|d| !d.is_empty()));
    if without.is_none() {
        let cache =
            row.kv_dtype.as_ref().filter(|kv| **kv != row.dtype && !matches!(row.study.as_str(), "qkv" | "softmax" | "rope"));
        parts.extend(cache.map(|kv| format!("{kv} cache")));
        parts.extend(row.weights.as_ref().filter(|w| **w != row.dtype && !w.is_empty()).map(|w| format!("{w} weights")));
    }
    let form = key(row, None).form;
    match (row.study.as_str(), form) {
        (_, "") => {}
        ("qkv", "layer") => parts.push("in the layer".to_owned()),
        (_, form) => parts.push(form.to_owned()),
    }
    if row.study == "attention" && row.causal == Some(false) {
        parts.push("full".to_owned());
    }
    if !row.device.is_empty() && row.device != "cpu" {
        parts.push(row.device.clone());
    }
    if parts.is_empty() { "this shape".to_owned() } else { parts.join(" · ") }
}

/// The rows grouped into configurations, in the order met.
pub fn configs<'a>(rows: &[&'a Row]) -> Vec<Config<'a>> {
    grouped(rows, None).into_iter().map(|rows| Config { name: describe(rows[0], None), rows }).collect()
}

/// Whether cache and weights are stored in the same types, as far as both say.
pub fn stored_alike(a: &Row, b: &Row) -> bool {
    let alike = |a: &Option<String>, b: &Option<String>| a.is_none() || b.is_none() || a == b;
    alike(&a.kv_dtype, &b.kv_dtype) && alike(&a.weights, &b.weights)
}

fn grouped<'a>(rows: &[&'a Row], without: Option<Along>) -> Vec<Vec<&'a Row>> {
    let mut groups: Vec<(Key<'a>, Vec<&'a Row>)> = Vec::new();
    for &row in rows {
        let key = key(row, without);
        match groups.iter_mut().find(|(k, members)| *k == key && (without.is_some() || stored_alike(members[0], row))) {
            Some((_, members)) => members.push(row),
            None => groups.push((key, vec![row])),
        }
    }
    let mut groups: Vec<Vec<&Row>> = groups.into_iter().map(|(_, members)| members).collect();
    for members in &mut groups {
        members.sort_by_key(|r| (is_peer(r), rank(r)));
    }
    groups
}

/// The rows that sweep one length over at least three values, as charts will show them.
pub fn sweeps<'a>(rows: &[&'a Row], along: Along, peers: &[String]) -> Vec<Sweep<'a>> {
    let mut found = Vec::new();
    for members in grouped(rows, Some(along)) {
        let mut lengths: Vec<usize> = members.iter().filter_map(|r| along.of(r)).collect();
        lengths.sort_unstable();
        lengths.dedup();
        if lengths.len() < 3 {
            continue;
        }
        let varied = members.iter().any(|r| r.batch != members[0].batch) && along != Along::Batch;
        let named = Row { batch: members[0].batch.filter(|_| !varied), ..members[0].clone() };
        let name = describe(&named, Some(along));
        found.push(Sweep { name, along, series: tracks(&members, along, peers) });
    }
    found
}

fn tracks<'a>(members: &[&'a Row], along: Along, peers: &[String]) -> Vec<Track<'a>> {
    // Storage types tell series apart only where one level has several.
    let varied = |of: fn(&Row) -> Option<&str>| {
        members.iter().any(|a| members.iter().any(|b| a.level == b.level && of(a).is_some() && of(b).is_some() && of(a) != of(b)))
    };
    let by_cache = varied(|r| r.kv_dtype.as_deref());
    let by_weights = varied(|r| r.weights.as_deref());
    let mut tracks: Vec<Track<'a>> = Vec::new();
    for &row in members.iter().filter(|r| along.of(r).is_some()) {
        let mut label = name(row);
        if let Some(kv) = row.kv_dtype.as_ref().filter(|_| by_cache) {
            label = format!("{label}, {kv} cache");
        }
        if let Some(weights) = row.weights.as_ref().filter(|_| by_weights) {
            label = format!("{label}, {weights} weights");
        }
        match tracks.iter_mut().find(|t| t.name == label) {
            Some(track) => track.rows.push(row),
            None => {
                let mut style = style(row, peers);
                if tracks.iter().any(|t| t.level == row.level) {
                    style.class.push_str(" dashed");
                }
                tracks.push(Track { name: label, level: &row.level, style, rows: vec![row] });
            }
        }
    }
    for track in &mut tracks {
        track.rows.sort_by_key(|r| along.of(r));
    }
    tracks
}
