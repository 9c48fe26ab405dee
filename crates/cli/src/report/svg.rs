//! The few SVG elements that the charts are made of, written as text. Colours come from the page's CSS variables, so a chart
//! follows the theme: an element of class `c-NAME` draws in that series' colour.

use std::fmt::Write;

/// Width of every chart in its own units; the page scales it.
pub const WIDTH: f64 = 400.0;
/// Font size of every text, in the same units.
pub const FONT: f64 = 11.5;

/// Where a text is anchored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Anchor {
    /// Text begins at x.
    Start,
    /// Text is centred on x.
    Middle,
    /// Text ends at x.
    End,
}

/// How a series' points look, so that colour is never the only difference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Marker {
    /// A filled disc.
    Disc,
    /// A filled square.
    Square,
    /// A triangle pointing up.
    Triangle,
    /// A square on its corner.
    Diamond,
    /// An outlined circle.
    Ring,
    /// An outlined square.
    Box,
    /// A triangle pointing down.
    Down,
}

/// The text with everything escaped that XML would take for markup.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // XML has no way to write the other control characters.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// About how wide a text comes out; a little generous, since the reader's font is unknown.
pub fn text_width(text: &str) -> f64 {
    let em: f64 = text
        .chars()
        .map(|c| match c {
            'i' | 'j' | 'l' | 't' | 'f' | 'r' | '.' | ',' | ' ' | ':' | '·' | '(' | ')' | '/' | '-' => 0.38,
            'm' | 'w' | 'M' | 'W' | '%' => 0.88,
            c if c.is_uppercase() => 0.7,
            _ => 0.63,
        })
        .sum();
    em * FONT
}

/// A drawing under construction.
pub struct Svg {
    body: String,
}

/// A coordinate with one decimal.
fn n(v: f64) -> f64 {
    debug_assert!(v.is_finite(), "a coordinate must be finite");
    let rounded = if v.is_finite() { (v * 10.0).round() / 10.0 } else { 0.0 };
    rounded + 0.0
}

fn title(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("<title>{}</title>", escape(text)) }
}

impl Svg {
    /// An empty drawing.
    pub fn new() -> Self {
        Svg { body: String::new() }
    }

    /// A straight line.
    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), class: &str) {
        let _ = writeln!(self.body, r#"<line x1="{}" y1="{}" x2="{}" y2="{}" class="{class}"/>"#, n(x1), n(y1), n(x2), n(y2));
    }

    /// A line through points.
    pub fn polyline(&mut self, points: &[(f64, f64)], class: &str) {
        let points: Vec<String> = points.iter().map(|&(x, y)| format!("{},{}", n(x), n(y))).collect();
        let _ = writeln!(self.body, r#"<polyline points="{}" class="{class}"/>"#, points.join(" "));
    }

    /// A filled rectangle with what to say about it when pointed at.
    pub fn rect(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), class: &str, about: &str) {
        let (w, h) = (n(w.max(0.0)), n(h.max(0.0)));
        let _ = writeln!(
            self.body,
            r#"<rect x="{}" y="{}" width="{w}" height="{h}" rx="1.5" class="{class}">{}</rect>"#,
            n(x),
            n(y),
            title(about)
        );
    }

    /// A text.
    pub fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, class: &str, text: &str) {
        self.rotated((x, y), 0.0, anchor, class, text);
    }

    /// A text turned by `degrees` about its anchor.
    pub fn rotated(&mut self, (x, y): (f64, f64), degrees: f64, anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let turn =
            if degrees == 0.0 { String::new() } else { format!(r#" transform="rotate({} {} {})""#, n(degrees), n(x), n(y)) };
        let _ = writeln!(
            self.body,
            r#"<text x="{}" y="{}" text-anchor="{anchor}" class="{class}"{turn}>{}</text>"#,
            n(x),
            n(y),
            escape(text)
        );
    }

    /// A series' point.
    pub fn marker(&mut self, shape: Marker, (x, y): (f64, f64), class: &str, about: &str) {
        let (x, y) = (n(x), n(y));
        let about = title(about);
        let path = |d: String, kind: &str| format!(r#"<path d="{d}" class="{kind} {class}">{about}</path>"#);
        let element = match shape {
            Marker::Disc => format!(r#"<circle cx="{x}" cy="{y}" r="3.4" class="fill {class}">{about}</circle>"#),
            Marker::Ring => format!(r#"<circle cx="{x}" cy="{y}" r="3.2" class="hollow {class}">{about}</circle>"#),
            Marker::Square => path(format!("M{x} {y}m-3.2-3.2h6.4v6.4h-6.4z"), "fill"),
            Marker::Box => path(format!("M{x} {y}m-3-3h6v6h-6z"), "hollow"),
            Marker::Triangle => path(format!("M{x} {y}m0-4.4l4.2 7.4h-8.4z"), "fill"),
            Marker::Down => path(format!("M{x} {y}m0 4.2l4-7h-8z"), "hollow"),
            Marker::Diamond => path(format!("M{x} {y}m0-4.6l4.6 4.6l-4.6 4.6l-4.6-4.6z"), "fill"),
        };
        self.body.push_str(&element);
        self.body.push('\n');
    }

    /// A circle about a point that deserves notice.
    pub fn halo(&mut self, (x, y): (f64, f64), class: &str) {
        let _ = writeln!(self.body, r#"<circle cx="{}" cy="{}" r="7" class="halo {class}"/>"#, n(x), n(y));
    }

    /// A number in a disc.
    pub fn badge(&mut self, (x, y): (f64, f64), class: &str, text: &str, about: &str) {
        let _ = writeln!(
            self.body,
            r#"<g class="badge {class}">{}<circle cx="{x}" cy="{y}" r="7.5"/><text x="{x}" y="{}" text-anchor="middle">{}</text></g>"#,
            title(about),
            n(y + 3.6),
            escape(text),
            x = n(x),
            y = n(y),
        );
    }

    /// The finished element; `label` tells a screen reader what the chart shows.
    pub fn finish(self, height: f64, label: &str) -> String {
        format!(
            "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{label}\">\n<desc>{label}</desc>\n{}</svg>",
            n(height),
            self.body,
            label = escape(label)
        )
    }
}
