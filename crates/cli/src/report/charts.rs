//! The three charts of the report: bars, lines, and numbered points under a roof.

use super::axis::{Axis, Frame, Scale, Spread, extent, ticks, usable};
use super::format;
use super::svg::{Anchor, FONT, Marker, Svg, WIDTH, text_width};

const LEGEND_ROW: f64 = 18.0;

/// How a series looks everywhere: its colour class and its marker.
#[derive(Clone, Debug, PartialEq)]
pub struct Style {
    /// CSS class that carries the colour, with `dashed` where a second series shares it.
    pub class: String,
    /// Marker of its points.
    pub marker: Marker,
}

/// One bar of a group.
pub struct Bar {
    /// Printed left of the bar.
    pub name: String,
    /// Colour.
    pub style: Style,
    /// Length; `None` draws no bar, only the text.
    pub value: Option<f64>,
    /// Printed right of the bar.
    pub text: String,
    /// Shown when pointed at.
    pub about: String,
}

/// Bars that are compared with each other.
pub struct Group {
    /// Printed above the bars.
    pub name: String,
    /// The bars, top to bottom.
    pub bars: Vec<Bar>,
}

/// Horizontal bars in groups on one axis from zero, with a line at `reference`. `None` when no bar has a length.
pub fn bars(label: &str, axis: Axis<'_>, groups: &[Group], reference: Option<f64>) -> Option<String> {
    const PITCH: f64 = 19.0;
    const HEAD: f64 = 24.0;
    const NAME: usize = 18;
    const LINE: f64 = 14.0;
    let all = || groups.iter().flat_map(|g| &g.bars);
    let domain = extent(all().filter_map(|b| b.value).chain(reference), Spread::Linear, 0.0)?;
    all().find(|b| b.value.is_some())?;
    let name_width = all().map(|b| text_width(&format::shorten(&b.name, NAME))).fold(30.0, f64::max);
    let value_width = all().map(|b| text_width(&b.text)).fold(20.0, f64::max).min(150.0);
    let (left, right) = (name_width + 8.0, WIDTH - value_width - 10.0);
    let scale = Scale::new(Spread::Linear, domain, (left, right));
    let rows: usize = groups.iter().map(|g| g.bars.len()).sum();
    let heads: Vec<Vec<String>> = groups.iter().map(|g| wrap(&g.name)).collect();
    let head_lines: usize = heads.iter().map(|h| h.len() - 1).sum();
    let bottom = groups.len() as f64 * (HEAD + 6.0) + head_lines as f64 * LINE + rows as f64 * PITCH;

    let mut svg = Svg::new();
    let tick_values = ticks(domain, Spread::Linear, 4);
    for tick in &tick_values {
        svg.text((scale.at(*tick), bottom + 14.0), Anchor::Middle, "tick", &(axis.format)(*tick));
    }
    let mut y = 0.0;
    for (group, head) in groups.iter().zip(&heads) {
        for line in head {
            svg.text((0.0, y + 16.0), Anchor::Start, "group", line);
            y += LINE;
        }
        y += HEAD - LINE;
        let end = y + group.bars.len() as f64 * PITCH;
        for tick in &tick_values {
            svg.line((scale.at(*tick), y), (scale.at(*tick), end), "grid");
        }
        let ends = group.bars.iter().map(|b| b.value.filter(|v| usable(*v, Spread::Linear)).map_or(left, |v| scale.at(v)));
        let ends: Vec<f64> = ends.collect();
        for ((bar, end), row) in group.bars.iter().zip(&ends).zip(0..).filter(|((_, end), _)| **end > left) {
            let (top, about) = (y + f64::from(row) * PITCH + 3.0, format!("{}: {}", bar.name, bar.about));
            svg.rect((left, top), (end - left, PITCH - 6.0), &format!("fill {}", bar.style.class), &about);
        }
        svg.line((left, y), (left, end), "frame");
        if let Some(at) = reference.map(|v| scale.at(v)) {
            svg.line((at, y), (at, end), "reference");
        }
        for (bar, end) in group.bars.iter().zip(&ends) {
            let baseline = y + PITCH / 2.0 + 4.0;
            svg.text((left - 6.0, baseline), Anchor::End, "name", &format::shorten(&bar.name, NAME));
            let class = if bar.value.is_some() { "value" } else { "tick value" };
            svg.text((end + 5.0, baseline), Anchor::Start, class, &bar.text);
            y += PITCH;
        }
        y += 6.0;
    }
    svg.text(((left + right) / 2.0, bottom + 31.0), Anchor::Middle, "axis", axis.title);
    Some(svg.finish(bottom + 38.0, label))
}

/// A heading in as many lines as it needs, broken between its parts.
fn wrap(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for part in text.split(" · ") {
        let last = lines.len() - 1;
        let longer = if lines[last].is_empty() { part.to_owned() } else { format!("{} · {part}", lines[last]) };
        // Headings are bold, hence wider.
        if lines[last].is_empty() || text_width(&longer) * 1.1 < WIDTH {
            lines[last] = longer;
        } else {
            lines.push(part.to_owned());
        }
    }
    lines
}

/// One line of a chart.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Colour and marker.
    pub style: Style,
    /// Points by growing x.
    pub points: Vec<(f64, f64)>,
}

/// A place on the x axis that is named above the plot and marked on one series.
pub struct Mark {
    /// What it says.
    pub text: String,
    /// Colour class.
    pub class: String,
    /// Where, as a point of the series.
    pub at: (f64, f64),
}

/// Lines through points, with a legend above and each line's last value at its end. `None` without points.
pub fn lines(label: &str, x: Axis<'_>, y: Axis<'_>, series: &[Series], marks: &[Mark]) -> Option<String> {
    const PLOT: f64 = 225.0;
    let points = |s: &Series| -> Vec<(f64, f64)> {
        s.points.iter().copied().filter(|&(a, b)| usable(a, x.spread) && usable(b, y.spread)).collect()
    };
    let drawn: Vec<(&Series, Vec<(f64, f64)>)> = series.iter().map(|s| (s, points(s))).filter(|(_, p)| !p.is_empty()).collect();
    let all = || drawn.iter().flat_map(|(_, p)| p.iter());
    let x_domain = extent(all().map(|p| p.0), x.spread, 0.04)?;
    let y_domain = extent(all().map(|p| p.1), y.spread, 0.06)?;
    let mut x_ticks: Vec<f64> = all().map(|p| p.0).collect();
    x_ticks.sort_by(f64::total_cmp);
    x_ticks.dedup();

    let ends: Vec<String> = drawn.iter().map(|(_, p)| p.last().map_or(String::new(), |p| (y.value)(p.1))).collect();
    let margin = ends.iter().map(|t| text_width(t)).fold(10.0, f64::max) + 12.0;
    let mut svg = Svg::new();
    let top = legend(&mut svg, drawn.iter().map(|(s, _)| (s.name.as_str(), &s.style)));
    let above = marks.len() as f64 * 15.0;
    let mark_rows = top + FONT + 16.0;
    let bottom = top + above + PLOT;
    let frame = Frame::draw(&mut svg, (x, x_domain, &x_ticks), (y, y_domain), (top, above, bottom), margin);

    for (mark, row) in marks.iter().zip(0..) {
        let (at, height) = (frame.x.at(mark.at.0), mark_rows + f64::from(row) * 15.0);
        svg.line((at, height + 3.0), (at, frame.bottom), &format!("mark {}", mark.class));
    }
    for (s, points) in &drawn {
        let places: Vec<(f64, f64)> = points.iter().map(|p| (frame.x.at(p.0), frame.y.at(p.1))).collect();
        svg.polyline(&places, &format!("line {}", s.style.class));
        for (place, p) in places.iter().zip(points) {
            let about = format!("{}: {} at {}", s.name, (y.value)(p.1), (x.format)(p.0));
            svg.marker(s.style.marker, *place, &s.style.class, &about);
        }
    }
    for (mark, row) in marks.iter().zip(0..) {
        let (at, height) = (frame.x.at(mark.at.0), mark_rows + f64::from(row) * 15.0);
        svg.halo((at, frame.y.at(mark.at.1)), &mark.class);
        let fits = at + text_width(&mark.text) < WIDTH;
        let (place, anchor) = if fits { (at, Anchor::Start) } else { (WIDTH, Anchor::End) };
        svg.text((place, height), anchor, &format!("note {}", mark.class), &mark.text);
    }
    let wanted: Vec<f64> = drawn.iter().map(|(_, p)| p.last().map_or(0.0, |p| frame.y.at(p.1))).collect();
    for (((s, points), text), height) in drawn.iter().zip(&ends).zip(spread_out(&wanted, 13.0, (frame.top, frame.bottom))) {
        let at = points.last().map_or(0.0, |p| frame.x.at(p.0));
        svg.text((at + 8.0, height + 4.0), Anchor::Start, &format!("note {}", s.style.class), text);
    }
    Some(svg.finish(bottom + Frame::BELOW, label))
}

/// A numbered point of the roofline.
pub struct Spot {
    /// Its number, explained beside the chart.
    pub number: usize,
    /// Shown when pointed at.
    pub about: String,
    /// Colour class.
    pub class: String,
    /// Floating-point operations per byte, GFLOP/s.
    pub at: (f64, f64),
}

/// Points under a roof of `peak` GFLOP/s and `bandwidth` GB/s. `None` without points.
pub fn roofline(label: &str, peaks: &[(&str, f64)], bandwidth: Option<f64>, spots: &[Spot]) -> Option<String> {
    const BOTTOM: f64 = 300.0;
    const RADIUS: f64 = 7.5;
    let spots: Vec<&Spot> = spots.iter().filter(|s| usable(s.at.0, Spread::Log) && usable(s.at.1, Spread::Log)).collect();
    if spots.is_empty() {
        return None;
    }
    let peak = peaks.iter().map(|p| p.1).reduce(f64::max);
    let ridge_of = |peak: f64| bandwidth.map(|b| peak / b);
    let ridge = peak.and_then(ridge_of);
    let x_domain = extent(
        spots.iter().map(|s| s.at.0).chain(ridge).chain(peaks.iter().filter_map(|p| ridge_of(p.1)).map(|r| r / 8.0)),
        Spread::Log,
        0.08,
    )?;
    let low_roof = bandwidth.map(|b| b * x_domain.0).filter(|v| peak.is_none_or(|p| *v < p));
    let mut y_domain = extent(spots.iter().map(|s| s.at.1).chain(peaks.iter().map(|p| p.1)).chain(low_roof), Spread::Log, 0.06)?;
    y_domain.1 *= 1.3;
    let x = Axis { title: "FLOP per compulsory byte", spread: Spread::Log, format: format::plain, value: format::plain };
    let (title, unit) = format::rate_unit(spots.iter().map(|s| s.at.1).chain(peaks.iter().map(|p| p.1)));
    let format = if unit == 1.0 { format::plain } else { |v| format::plain(v * 1e-3) };
    let y = Axis { title, spread: Spread::Log, format, value: format };
    let mut svg = Svg::new();
    let x_ticks = ticks(x_domain, Spread::Log, 8);
    let frame = Frame::draw(&mut svg, (x, x_domain, &x_ticks), (y, y_domain), (0.0, 0.0, BOTTOM), 8.0);
    let place = |(a, b): (f64, f64)| (frame.x.at(a), frame.y.at(b));
    let mut roof: Vec<(f64, f64)> = Vec::new();

    for &(dtype, peak) in peaks {
        let from = place((ridge_of(peak).unwrap_or(x_domain.0).max(x_domain.0), peak));
        let to = place((x_domain.1, peak));
        svg.line(from, to, "roof");
        roof.extend(along(from, to));
        let text = format!("{dtype} peak {}", format::gflops(peak));
        // Left of the ridge nothing can lie at this height.
        if from.0 - text_width(&text) > frame.left + 8.0 {
            svg.text((from.0 - 6.0, from.1 + 4.0), Anchor::End, "note", &text);
        } else {
            svg.text((frame.right - 2.0, from.1 - 7.0), Anchor::End, "note", &text);
        }
    }
    if let Some(bandwidth) = bandwidth {
        let end = ridge.unwrap_or(x_domain.1).min(x_domain.1);
        let (a, b) = (place((x_domain.0, bandwidth * x_domain.0)), place((end, bandwidth * end)));
        svg.line(a, b, "roof");
        roof.extend(along(a, b));
        let slope = (b.1 - a.1).atan2(b.0 - a.0);
        let text = format!("memory {} GB/s", format::sig3(bandwidth));
        let length = (b.0 - a.0).hypot(b.1 - a.1);
        if length > text_width(&text) + 16.0 {
            let (half, above) = (length / 2.0, 7.0);
            let at = (a.0 + half * slope.cos() + above * slope.sin(), a.1 + half * slope.sin() - above * slope.cos());
            svg.rotated(at, slope.to_degrees(), Anchor::Middle, "note", &text);
        } else {
            svg.text((b.0 + 14.0, frame.bottom - 8.0), Anchor::Start, "note", &text);
        }
    }
    for spot in &spots {
        let at = place(spot.at);
        svg.marker(Marker::Disc, at, &spot.class, &spot.about);
    }
    let dots: Vec<(f64, f64)> = spots.iter().map(|s| place(s.at)).collect();
    let mut badges: Vec<(f64, f64)> = Vec::new();
    for spot in &spots {
        let at = place(spot.at);
        let seat = seat(at, &[(&badges, 2.0 * RADIUS + 1.0), (&dots, RADIUS + 4.5), (&roof, RADIUS + 2.0)], RADIUS, &frame);
        let reach = (seat.0 - at.0).hypot(seat.1 - at.1);
        let t = 1.0 - RADIUS / reach;
        svg.line(at, (at.0 + (seat.0 - at.0) * t, at.1 + (seat.1 - at.1) * t), &format!("leader {}", spot.class));
        svg.badge(seat, &spot.class, &spot.number.to_string(), &spot.about);
        badges.push(seat);
    }
    Some(svg.finish(BOTTOM + Frame::BELOW, label))
}

/// Points along a line, close enough that nothing slips between them.
fn along(a: (f64, f64), b: (f64, f64)) -> impl Iterator<Item = (f64, f64)> {
    (0..=60).map(move |i| {
        let t = f64::from(i) / 60.0;
        (a.0 + (b.0 - a.0) * t, a.1 + (b.1 - a.1) * t)
    })
}

/// The nearest place for a badge about `at` that keeps its distance from everything drawn and stays in the frame.
fn seat(at: (f64, f64), drawn: &[(&Vec<(f64, f64)>, f64)], radius: f64, frame: &Frame) -> (f64, f64) {
    let ring = |step: i32| (0..24).map(move |i| (15.0 + 6.0 * f64::from(step), f64::from(i) * std::f64::consts::TAU / 24.0));
    let inside = |(x, y): (f64, f64)| {
        x > frame.left + radius && x < frame.right - radius && y > frame.top + radius && y < frame.bottom - radius
    };
    (0..30)
        .flat_map(ring)
        .map(|(r, turn)| (at.0 + r * turn.cos(), at.1 - r * turn.sin()))
        .find(|&p| inside(p) && drawn.iter().all(|(points, away)| points.iter().all(|t| (t.0 - p.0).hypot(t.1 - p.1) > *away)))
        .unwrap_or((at.0 + 15.0, at.1))
}

/// Draws names with their markers in rows and returns the height used.
fn legend<'a>(svg: &mut Svg, entries: impl Iterator<Item = (&'a str, &'a Style)>) -> f64 {
    let (mut x, mut y) = (2.0, 0.0);
    for (name, style) in entries {
        let name = format::shorten(name, 30);
        let width = 28.0 + text_width(&name) + 12.0;
        if x + width > WIDTH && x > 2.0 {
            (x, y) = (2.0, y + LEGEND_ROW);
        }
        svg.polyline(&[(x, y + 9.0), (x + 22.0, y + 9.0)], &format!("line {}", style.class));
        svg.marker(style.marker, (x + 11.0, y + 9.0), &style.class, "");
        svg.text((x + 27.0, y + 13.0), Anchor::Start, "name", &name);
        x += width;
    }
    y + LEGEND_ROW + 4.0
}

/// Moves heights apart until neighbours are `gap` away from each other, inside `bounds` where there is room.
fn spread_out(wanted: &[f64], gap: f64, (low, high): (f64, f64)) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
    let mut placed = wanted.to_vec();
    let mut next = low;
    for &i in &order {
        placed[i] = placed[i].max(next);
        next = placed[i] + gap;
    }
    // Pushing down made them drift below where they belong: push back up from the lowest that may go higher.
    let mut limit = high;
    for &i in order.iter().rev() {
        placed[i] = placed[i].min(limit);
        limit = placed[i] - gap;
    }
    placed
}
