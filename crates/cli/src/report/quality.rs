//! The study of quality: what weights in int8 and quantised caches cost on a trained model.

use crate::bench::record::Row;

use super::axis::{Axis, Spread};
use super::charts::{self, Series, Style};
use super::format::{self, or_dash};
use super::model::name;
use super::page::{Block, Figure, Section, Table};
use super::sections::{Run, absent, count};
use super::svg::Marker;

/// Looks of the forms, in their order; the first, f32, has no error to draw.
const STYLES: [(&str, Marker); 5] = [
    ("c-minimal", Marker::Square),
    ("c-moderate", Marker::Triangle),
    ("c-maximal", Marker::Square),
    ("c-peer0 dashed", Marker::Triangle),
    ("c-peer1 dashed", Marker::Square),
];

fn change(row: &Row) -> String {
    row.loss_change.filter(|v| v.is_finite()).map_or(format::NONE.to_owned(), |v| {
        let sign = if v < 0.0 { "−" } else { "+" };
        format!("{sign}{:.2} %", v.abs() * 100.0)
    })
}

/// Each layer's error, a line for each form.
fn layers(rows: &[&Row]) -> Option<Figure> {
    let forms = rows.iter().filter(|r| r.layer_errors.iter().any(|e| *e > 0.0));
    let series = forms.zip(STYLES).map(|(row, (class, marker))| Series {
        name: row.variant.clone().unwrap_or_else(|| name(row)),
        style: Style { class: class.to_owned(), marker },
        points: row
            .layer_errors
            .iter()
            .enumerate()
            .map(|(layer, &e)| (count(layer), e))
            .filter(|p| p.1.is_finite() && p.1 > 0.0)
            .collect(),
    });
    let series: Vec<Series> = series.collect();
    let x = Axis { title: "layer", spread: Spread::Linear, format: format::plain, value: format::plain };
    let y = Axis {
        title: "relative error of its attention",
        spread: Spread::Log,
        format: format::percent,
        value: |v| format!("{:.2} %", v * 100.0),
    };
    let svg = charts::lines("Relative error of each layer's attention", x, y, &series, &[])?;
    Some(Figure { title: "Error of each layer".to_owned(), caption: "on the same input as in f32".to_owned(), svg })
}

/// What quantisation costs.
pub fn quality(run: &Run<'_>) -> Section {
    let rows = run.of("quality");
    let blocks = if rows.is_empty() {
        absent("what weights in int8 and quantised caches cost on a trained model", "quality")
    } else {
        let text = "A trained language model whose attention blocks run with their projections in int8, over quantised caches, or both; everything else \
            is computed in f32. Mean loss is in nats for each predicted token of the text; its change is against the same model all in f32. The error of a \
            layer is that of what its attention adds, in the L2 norm.";
        let mut table =
            Table::new("", &["form", "#windows of tokens", "#mean loss", "#change", "#least layer error", "#greatest"]);
        for row in &rows {
            let windows = row.batch.zip(row.seq).map(|(n, s)| format!("{n} × {s}"));
            let errors = || row.layer_errors.iter().copied().filter(|e| e.is_finite());
            table.row(
                "",
                vec![
                    row.variant.clone().unwrap_or_else(|| name(row)),
                    windows.unwrap_or_default(),
                    row.mean_loss.filter(|v| v.is_finite()).map_or(format::NONE.to_owned(), |v| format!("{v:.5}")),
                    change(row),
                    or_dash(errors().reduce(f64::min), format::error),
                    or_dash(errors().reduce(f64::max), format::error),
                ],
            );
        }
        let text = Block::Text { text: text.to_owned() };
        match layers(&rows) {
            Some(figure) => vec![text, Block::Beside { figure, table }],
            None => vec![text, Block::Table { table }],
        }
    };
    Section { id: "study-quality", title: "Quality: what quantisation costs", sub: true, blocks }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_have_colours_of_their_own() {
        let mut colours: Vec<&str> = STYLES.iter().filter_map(|(class, _)| class.split(' ').next()).collect();
        colours.sort_unstable();
        colours.dedup();
        assert_eq!(colours.len(), STYLES.len());
    }
}
