//! Numbers as people read them: three significant digits and a unit that fits.

const TIME_MS: [(f64, &str); 4] = [(1e3, "s"), (1.0, "ms"), (1e-3, "µs"), (1e-6, "ns")];
const KIB: f64 = 1024.0;
const BYTES: [(f64, &str); 5] =
    [(KIB * KIB * KIB * KIB, "TiB"), (KIB * KIB * KIB, "GiB"), (KIB * KIB, "MiB"), (KIB, "KiB"), (1.0, "B")];

/// What stands where there is no number.
pub const NONE: &str = "–";

/// Three significant digits; whole numbers from 1000 up.
pub fn sig3(v: f64) -> String {
    if !v.is_finite() {
        return NONE.to_owned();
    }
    if v == 0.0 {
        return "0".to_owned();
    }
    // The exponent after rounding, so that 9.996 becomes 10.0 and not 10.00.
    let scientific = format!("{v:.2e}");
    let exponent: i32 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    if !(-4..=15).contains(&exponent) {
        return scientific;
    }
    format!("{v:.*}", usize::try_from(2 - exponent).unwrap_or(0))
}

/// Like [`sig3`], without the zeros that a tick label does not need.
pub fn plain(v: f64) -> String {
    let s = sig3(v);
    if s.contains('.') && !s.contains('e') { s.trim_end_matches('0').trim_end_matches('.').to_owned() } else { s }
}

fn in_unit(v: f64, units: &[(f64, &str)], digits: fn(f64) -> String) -> String {
    if !v.is_finite() {
        return NONE.to_owned();
    }
    // 0.9995 of a unit would print as 1000 of the next smaller one.
    let (size, unit) = units.iter().find(|(size, _)| v.abs() >= size * 0.9995).or(units.last()).copied().unwrap_or((1.0, ""));
    format!("{} {unit}", digits(v / size))
}

/// A time given in milliseconds.
pub fn time(ms: f64) -> String {
    in_unit(ms, &TIME_MS, sig3)
}

/// A range of times, the unit once where both share it.
pub fn times(low: f64, high: f64) -> String {
    let (low, high) = (time(low), time(high));
    match (low.split_once(' '), high.split_once(' ')) {
        (Some((number, a)), Some((_, b))) if a == b => format!("{number} – {high}"),
        _ => format!("{low} – {high}"),
    }
}

/// A time for a tick label.
pub fn time_tick(ms: f64) -> String {
    in_unit(ms, &TIME_MS, plain)
}

/// A number of bytes.
pub fn bytes(v: f64) -> String {
    in_unit(v, &BYTES, if v < KIB { plain } else { sig3 })
}

/// A number of bytes for a tick label.
pub fn bytes_tick(v: f64) -> String {
    in_unit(v, &BYTES, plain)
}

/// A rate in GFLOP/s from which on it is given in TFLOP/s.
const TERA: f64 = 9995.0;

/// The unit of a column or axis of rates given in GFLOP/s, and how many GFLOP/s it is: one for all, whatever the greatest asks for.
pub fn rate_unit(gflops: impl IntoIterator<Item = f64>) -> (&'static str, f64) {
    if gflops.into_iter().any(|v| v.is_finite() && v >= TERA) { ("TFLOP/s", 1e3) } else { ("GFLOP/s", 1.0) }
}

/// A rate given in GFLOP/s.
pub fn gflops(v: f64) -> String {
    if v >= TERA { format!("{} TFLOP/s", sig3(v / 1e3)) } else { format!("{} GFLOP/s", sig3(v)) }
}

/// A share, 0 to 1, as a percentage.
pub fn percent(share: f64) -> String {
    let p = share * 100.0;
    if !p.is_finite() {
        NONE.to_owned()
    } else if p.abs() < 0.995 && p != 0.0 {
        format!("{p:.1} %")
    } else if p > 99.5 && p < 100.0 {
        // Nearly everything is not everything.
        format!("{:.1} %", (p * 10.0).floor() / 10.0)
    } else {
        format!("{p:.0} %")
    }
}

/// An error: two digits are all that an error deserves.
pub fn error(v: f64) -> String {
    if v == 0.0 {
        "0".to_owned()
    } else if v.is_finite() {
        format!("{v:.1e}")
    } else {
        "not a number".to_owned()
    }
}

/// A factor such as 2.4×.
pub fn factor(v: f64) -> String {
    if !v.is_finite() {
        NONE.to_owned()
    } else if v >= 99.95 {
        format!("{v:.0}×")
    } else if v >= 9.95 {
        format!("{v:.1}×")
    } else {
        format!("{v:.2}×")
    }
}

/// A change against a baseline in words: "91 % less memory".
pub fn change(share: f64, less: &str, more: &str, noun: &str) -> String {
    let difference = 1.0 - share;
    if difference.abs() < 0.01 {
        format!("the same {noun}")
    } else if difference > 0.0 {
        format!("{} {less} {noun}", percent(difference))
    } else if share > 3.0 {
        format!("{} the {noun}", factor(share))
    } else {
        format!("{} {more} {noun}", percent(-difference))
    }
}

/// An ISO 8601 date and time with a space where it may break.
pub fn date(iso: &str) -> String {
    match iso.split_once('T') {
        Some((day, time)) => match time.strip_suffix('Z') {
            Some(time) => format!("{day} {time} UTC"),
            None => format!("{day} {time}"),
        },
        None => iso.to_owned(),
    }
}

/// Text whose numbers stay with their units at the end of a line.
pub fn unbroken(text: &str) -> String {
    text.replace(" = ", "\u{a0}=\u{a0}").replace(" %", "\u{a0}%")
}

/// The value formatted, or a dash.
pub fn or_dash(v: Option<f64>, f: fn(f64) -> String) -> String {
    v.filter(|v| v.is_finite()).map_or_else(|| NONE.to_owned(), f)
}

/// Text cut to `max` characters, with an ellipsis where something is missing.
pub fn shorten(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    text.chars().take(max.saturating_sub(1)).chain(['…']).collect()
}
