//! The studies: each part of the block alone, separate against fused.

use crate::bench::record::Row;

use super::axis::Spread;
use super::format;
use super::model::{Along, Sweep, configs, sweeps};
use super::page::{Block, Section};
use super::sections::{MEMORY, Quantity, Run, TIME, absent, over, payoffs, real, remarks, speed_and_memory, sweep_blocks, table};

const BANDWIDTH: Quantity = Quantity {
    title: "Cache bandwidth",
    axis: "compulsory GB/s",
    spread: Spread::Linear,
    format: format::plain,
    value: format::sig3,
    get: |r| r.gbps,
};
const RATE: Quantity = Quantity {
    title: "Rate",
    axis: "TFLOP/s",
    spread: Spread::Linear,
    format: format::plain,
    value: format::sig3,
    get: |r| r.gflops.map(|v| v * 1e-3),
};
const TOKENS: Quantity = Quantity {
    title: "Throughput",
    axis: "decoded tokens/s, whole batch",
    spread: Spread::Log,
    format: format::plain,
    value: format::sig3,
    get: |r| r.tokens_per_s,
};
const FIT: Quantity = Quantity {
    title: "Sequences that fit",
    axis: "sequences in the memory given",
    spread: Spread::Linear,
    format: format::plain,
    value: format::plain,
    get: |r| r.sequences_fit.map(real),
};

/// The heading and one section per study.
pub fn studies(run: &Run<'_>) -> Vec<Section> {
    let text = "The block's parts alone, each in its separate and its fused form.".to_owned();
    let top = Section { id: "studies", title: "The studies", sub: false, blocks: vec![Block::Text { text }] };
    vec![top, qkv(run), softmax(run), rope(run), attention(run), decode(run), throughput(run)]
}

fn study(
    run: &Run<'_>,
    study: &'static str,
    (id, title, what): (&'static str, &'static str, &str),
    text: &str,
    draw: impl FnOnce(&[&Row]) -> Vec<Block>,
) -> Section {
    let rows = run.of(study);
    let blocks = if rows.is_empty() {
        absent(what, study)
    } else {
        let mut blocks = vec![Block::Text { text: text.to_owned() }];
        blocks.extend(draw(&rows));
        blocks
    };
    Section { id, title, sub: true, blocks }
}

/// Bars of every configuration, then the table.
fn bars_and_table(run: &Run<'_>, rows: &[&Row]) -> Vec<Block> {
    let configs = configs(rows);
    let items = speed_and_memory(run, &configs, "");
    let figures = (!items.is_empty()).then_some(Block::Figures { items });
    figures.into_iter().chain([Block::Table { table: table(run, "", &configs) }]).collect()
}

fn qkv(run: &Run<'_>) -> Section {
    let head = ("study-qkv", "Projection: separate or fused", "separate against fused projection");
    let text = "Three products that each read x, or one for all three; alone and inside a whole layer.";
    study(run, "qkv", head, text, |rows| bars_and_table(run, rows))
}

fn softmax(run: &Run<'_>) -> Section {
    let head = ("study-softmax", "Softmax: three-pass, fused, online", "the three softmaxes");
    let text = "Maximum, sum and division as three passes; in one kernel; or online, tile by tile, with a running \
        maximum and sum per row. The error column is the absolute difference from the float64 reference.";
    study(run, "softmax", head, text, |rows| bars_and_table(run, rows))
}

fn rope(run: &Run<'_>) -> Section {
    let head = ("study-rope", "Rotary embedding: two-pass or fused", "the rotary embedding");
    let text = "Rotating queries and keys in two passes with a rotated copy, or in one pass, in both layouts. On a GPU also the pass \
        that follows the projection: q and k rotated, k and v appended to the cache.";
    study(run, "rope", head, text, |rows| bars_and_table(run, rows))
}

fn attention(run: &Run<'_>) -> Section {
    let head = ("study-attention", "Attention: materialised or tiled", "materialised against tiled attention");
    let text = "Scores written to memory, or kept in tiles with an online softmax.";
    study(run, "attention", head, text, |rows| {
        let found = sweeps(rows, Along::Seq, &run.peers);
        let swept = |row: &Row| found.iter().flat_map(|s| &s.series).flat_map(|t| &t.rows).any(|r| std::ptr::eq(*r, row));
        let rest: Vec<&Row> = rows.iter().copied().filter(|r| !swept(r)).collect();
        let mut blocks = sweep_blocks(&found);
        // A batch that shrinks as sequences grow leaves the tokens, so that the rate says more than the time.
        let rates: Vec<_> = found.iter().filter(|s| on_gpu(s)).filter_map(|s| over(s, &RATE, false)).collect();
        blocks.extend((!rates.is_empty()).then_some(Block::Figures { items: rates }));
        if !found.is_empty() {
            let unfused: Vec<&Row> = rows.iter().copied().filter(|r| r.level == "unfused").collect();
            blocks.extend(remarks(&unfused));
        }
        if !rest.is_empty() {
            blocks.extend(bars_and_table(run, &rest));
        }
        blocks
    })
}

fn decode(run: &Run<'_>) -> Section {
    let head = ("study-decode", "Decode: one new token over a cache", "attention of one new token over a cache");
    let text = "Decoding reads the whole cache for every token, so memory bandwidth bounds it. Compulsory bytes are those that must \
        move whatever the method: q, the valid rows of the cache and the result, each once.";
    study(run, "decode", head, text, |rows| {
        let found = sweeps(rows, Along::Past, &run.peers);
        let mut blocks = Vec::new();
        for sweep in &found {
            let items = [over(sweep, &TIME, false), over(sweep, &BANDWIDTH, false)].into_iter().flatten().collect();
            blocks.push(Block::Figures { items });
            blocks.extend(payoffs(sweep).map(|table| Block::Table { table }));
        }
        let swept = |row: &Row| found.iter().flat_map(|s| &s.series).flat_map(|t| &t.rows).any(|r| std::ptr::eq(*r, row));
        let rest: Vec<&Row> = rows.iter().copied().filter(|r| !swept(r)).collect();
        if !rest.is_empty() {
            blocks.extend(bars_and_table(run, &rest));
        }
        blocks
    })
}

fn on_gpu(sweep: &Sweep<'_>) -> bool {
    sweep.series.iter().flat_map(|t| &t.rows).any(|r| r.device.starts_with("cuda"))
}

fn throughput(run: &Run<'_>) -> Section {
    let head = ("study-throughput", "Throughput: tokens per second, sequences that fit", "decode throughput");
    let text = "Decoding with a growing batch. Memory that a level does not take for intermediates holds more sequences.";
    study(run, "throughput", head, text, |rows| {
        let found = sweeps(rows, Along::Batch, &run.peers);
        let mut blocks = Vec::new();
        if let Some(limit) = rows.iter().find_map(|r| r.memory_limit_bytes) {
            let text = format!("Sequences that fit are counted for {} of memory.", format::bytes_tick(real(limit)));
            blocks.push(Block::Text { text });
        }
        for sweep in &found {
            let items: Vec<_> = [over(sweep, &TOKENS, false), over(sweep, &FIT, false).or_else(|| over(sweep, &MEMORY, false))]
                .into_iter()
                .flatten()
                .collect();
            if !items.is_empty() {
                blocks.push(Block::Figures { items });
            }
        }
        if found.is_empty() {
            blocks.extend(bars_and_table(run, rows));
        } else {
            blocks.extend(remarks(rows));
        }
        blocks
    })
}
