//! Scales, ticks and the frame that every chart with two axes stands in.

use super::svg::{Anchor, FONT, Svg, WIDTH, text_width};

/// How values spread along an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spread {
    /// Even steps, from zero.
    Linear,
    /// Powers of ten, with 2 and 5 between them.
    Log,
    /// Powers of two.
    Log2,
}

/// One axis: its title with the unit, its spread, how to print a tick.
#[derive(Clone, Copy)]
pub struct Axis<'a> {
    /// What is measured, and in what unit.
    pub title: &'a str,
    /// How values spread.
    pub spread: Spread,
    /// A tick as text.
    pub format: fn(f64) -> String,
    /// A measured value as text, with the digits that tell it from others.
    pub value: fn(f64) -> String,
}

/// A mapping from values to positions.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    log: bool,
    domain: (f64, f64),
    range: (f64, f64),
}

impl Scale {
    /// Maps `domain` to `range`. A log scale needs a positive domain.
    pub fn new(spread: Spread, domain: (f64, f64), range: (f64, f64)) -> Self {
        let log = spread != Spread::Linear;
        let domain = if log { (domain.0.ln(), domain.1.ln()) } else { domain };
        Scale { log, domain, range }
    }

    /// Where `v` lies.
    pub fn at(&self, v: f64) -> f64 {
        let v = if self.log { v.ln() } else { v };
        let width = self.domain.1 - self.domain.0;
        let t = if width.abs() < 1e-12 { 0.5 } else { (v - self.domain.0) / width };
        self.range.0 + t * (self.range.1 - self.range.0)
    }
}

/// The smallest range about `values` that an axis should show: padded, from zero when linear; `None` without usable values.
pub fn extent(values: impl Iterator<Item = f64>, spread: Spread, pad: f64) -> Option<(f64, f64)> {
    let (mut lo, mut hi) = (f64::INFINITY, f64::NEG_INFINITY);
    for v in values.filter(|v| usable(*v, spread)) {
        lo = lo.min(v);
        hi = hi.max(v);
    }
    if lo > hi {
        return None;
    }
    if spread == Spread::Linear {
        return Some((0.0, if hi > 0.0 { hi * (1.0 + pad) } else { 1.0 }));
    }
    let mut log = (lo.ln(), hi.ln());
    if log.1 - log.0 < 0.7 {
        let middle = (log.0 + log.1) / 2.0;
        log = (middle - 0.35, middle + 0.35);
    }
    let margin = (log.1 - log.0) * pad;
    Some(((log.0 - margin).exp(), (log.1 + margin).exp()))
}

/// Whether an axis can show the value at all.
pub fn usable(v: f64, spread: Spread) -> bool {
    v.is_finite() && if spread == Spread::Linear { v >= 0.0 } else { v > 1e-300 && v < 1e300 }
}

/// Round values inside `domain`, at most about `most`.
pub fn ticks((lo, hi): (f64, f64), spread: Spread, most: usize) -> Vec<f64> {
    match spread {
        Spread::Linear => linear_ticks(lo, hi, most),
        Spread::Log2 => {
            let (first, last) = (lo.log2().ceil() as i32, hi.log2().floor() as i32);
            let step = (1..).find(|step| (last - first) / step < most as i32).unwrap_or(1);
            let found: Vec<f64> = (first..=last).filter(|e| e.rem_euclid(step) == 0).map(|e| 2f64.powi(e)).collect();
            if found.len() < 2 { linear_ticks(lo, hi, most) } else { found }
        }
        Spread::Log => {
            let (first, last) = (lo.log10().floor() as i32, hi.log10().ceil() as i32);
            let within = |mantissas: &[f64], step: i32| -> Vec<f64> {
                (first..=last)
                    .filter(|e| e.rem_euclid(step) == 0)
                    .flat_map(|e| mantissas.iter().map(move |m| m * 10f64.powi(e)))
                    .filter(|v| (lo..=hi).contains(v))
                    .collect()
            };
            let finest =
                [(&[1.0, 2.0, 5.0][..], 1), (&[1.0, 3.0], 1), (&[1.0], 1), (&[1.0], 2), (&[1.0], 3), (&[1.0], 6), (&[1.0], 12)];
            let found = finest.iter().map(|(m, step)| within(m, *step)).find(|t| t.len() <= most).unwrap_or_default();
            if found.len() < 3 && hi / lo < 20.0 { linear_ticks(lo, hi, most) } else { found }
        }
    }
}

fn linear_ticks(lo: f64, hi: f64, most: usize) -> Vec<f64> {
    let raw = (hi - lo) / most.max(1) as f64;
    if !raw.is_finite() || raw <= 0.0 {
        return vec![lo];
    }
    let magnitude = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].iter().map(|m| m * magnitude).find(|s| *s >= raw * 0.999).unwrap_or(magnitude * 10.0);
    let (first, last) = ((lo / step).ceil() as i64, (hi / step + 1e-9).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// Where a chart's data are drawn, with both scales.
pub struct Frame {
    /// Left, top, right and bottom of the plot.
    pub left: f64,
    /// See `left`.
    pub top: f64,
    /// See `left`.
    pub right: f64,
    /// See `left`.
    pub bottom: f64,
    /// Maps values along x.
    pub x: Scale,
    /// Maps values along y.
    pub y: Scale,
}

impl Frame {
    /// Draws gridlines, ticks and axis titles. `x_ticks` are wanted positions, left out where their labels would touch;
    /// the y axis' title stands at the
    /// top, where it reads without turning the head, with `above` left free between it and the plot.
    pub fn draw(
        svg: &mut Svg,
        (x, x_domain, x_ticks): (Axis<'_>, (f64, f64), &[f64]),
        (y, y_domain): (Axis<'_>, (f64, f64)),
        (top, above, bottom): (f64, f64, f64),
        right_margin: f64,
    ) -> Frame {
        let most = (((bottom - top - above) / 34.0) as usize).max(3);
        let y_ticks = ticks(y_domain, y.spread, most);
        let labels: Vec<String> = y_ticks.iter().map(|v| (y.format)(*v)).collect();
        let left = labels.iter().map(|l| text_width(l)).fold(24.0, f64::max) + 8.0;
        let right = WIDTH - right_margin;
        svg.text((2.0, top + FONT - 1.0), Anchor::Start, "axis", y.title);
        let top = top + FONT + 8.0 + above;
        let frame = Frame {
            left,
            top,
            right,
            bottom,
            x: Scale::new(x.spread, x_domain, (left, right)),
            y: Scale::new(y.spread, y_domain, (bottom, top)),
        };
        for (value, label) in y_ticks.iter().zip(&labels) {
            let at = frame.y.at(*value);
            svg.line((left, at), (right, at), "grid");
            svg.text((left - 6.0, at + 4.0), Anchor::End, "tick", label);
        }
        // From the right, so that the largest, which the summary speaks of, always has its label.
        let mut shown: Vec<(f64, String)> = Vec::new();
        let mut free_to = f64::INFINITY;
        for value in x_ticks.iter().rev() {
            let (at, label) = (frame.x.at(*value), (x.format)(*value));
            let half = text_width(&label) / 2.0;
            svg.line((at, bottom), (at, bottom + 4.0), "frame");
            if at + half < free_to && at - half > 0.0 {
                free_to = at - half - 6.0;
                shown.push((at, label));
            }
        }
        for (at, label) in shown {
            svg.text((at, bottom + 16.0), Anchor::Middle, "tick", &label);
        }
        svg.line((left, bottom), (right, bottom), "frame");
        svg.text(((left + right) / 2.0, bottom + 33.0), Anchor::Middle, "axis", x.title);
        frame
    }

    /// How far below the plot's bottom the frame writes.
    pub const BELOW: f64 = 40.0;
}
