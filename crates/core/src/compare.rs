//! How close a result must be to the right one: tolerance as a policy.

use std::fmt;

use crate::DType;

/// A row may be this many times worse than the whole under [`Policy::Relative`].
const ROW_SLACK: f64 = 20.0;

/// When a result counts as right. Elements are equal where both are NaN, or both the same infinity; any other NaN fails.
#[derive(Clone, Copy, Debug)]
pub enum Policy<'a> {
    /// Every element equal.
    Exact,
    /// Every element at most this many f32 numbers from the right one rounded to f32.
    Ulp(u32),
    /// ‖got − want‖ ≤ x·‖want‖ over the whole, and 20·x for the worst row (rows much smaller than the others are measured
    /// against a hundredth of the root mean square of all rows' norms).
    Relative(f64),
    /// Largest error and relative L2 error at most twice the reference's, plus half a unit of `dtype` at the largest element.
    Within2x {
        /// The same result as an honest implementation in the same dtype gives it.
        reference: &'a [f32],
        /// Dtype of the results, the coarser one where two are involved.
        dtype: DType,
    },
}

/// Errors of a result against the right one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Errors {
    /// Greatest |got − want|.
    pub max_abs: f64,
    /// Where it is.
    pub worst: usize,
    /// ‖got − want‖ / ‖want‖.
    pub relative: f64,
    /// The greatest of all rows' relative errors.
    pub worst_row: f64,
    /// Greatest distance in f32 numbers.
    pub ulps: u64,
    /// Elements that are NaN on one side only.
    pub nans: usize,
    /// Greatest |want|.
    pub scale: f64,
}

/// Outcome of [`compare`]; prints as one line that names the worst element.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Whether the policy holds.
    pub ok: bool,
    /// The result's errors; `None` when the lengths differ.
    pub errors: Option<Errors>,
    message: String,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Compares `got` with `want`, both [rows, width].
pub fn compare(policy: Policy<'_>, got: &[f32], want: &[f64], width: usize) -> Comparison {
    let reject = |message: String| Comparison { ok: false, errors: None, message };
    if got.len() != want.len() {
        return reject(format!("{} elements, expected {}", got.len(), want.len()));
    }
    if width == 0 || !want.len().is_multiple_of(width) {
        return reject(format!("{} elements are not rows of {width}", want.len()));
    }
    let e = Errors::measure(got, want, width);
    let (held, limit) = match policy {
        Policy::Exact => (e.max_abs == 0.0, "exact".to_string()),
        Policy::Ulp(n) => (e.ulps <= u64::from(n), format!("{n} ulp")),
        Policy::Relative(x) => {
            (e.relative <= x && e.worst_row <= ROW_SLACK * x, format!("relative {x:.1e}, worst row {:.1e}", ROW_SLACK * x))
        }
        Policy::Within2x { reference, dtype } => {
            if reference.len() != want.len() {
                return reject(format!("{} elements of the reference, expected {}", reference.len(), want.len()));
            }
            let r = Errors::measure(reference, want, width);
            let floor = dtype.epsilon() / 2.0;
            let (relative, max_abs) = (2.0 * r.relative + floor, 2.0 * r.max_abs + floor * e.scale);
            let held = r.nans == 0 && e.relative <= relative && e.max_abs <= max_abs;
            (held, format!("twice the reference in {dtype}: relative {relative:.1e}, max {max_abs:.1e}"))
        }
    };
    let ok = held && e.nans == 0;
    let worst = match want.get(e.worst) {
        Some(w) => format!("worst at row {} column {}: {} for {w}", e.worst / width, e.worst % width, got[e.worst]),
        None => "no elements".into(),
    };
    let nans = if e.nans > 0 { format!("{} elements are NaN on one side; ", e.nans) } else { String::new() };
    let message = format!(
        "{nans}relative {:.2e} (worst row {:.1e}), max {:.2e}, {} ulp; {worst}; limit: {limit}",
        e.relative, e.worst_row, e.max_abs, e.ulps
    );
    Comparison { ok, errors: Some(e), message }
}

impl Errors {
    /// Errors of `got` against `want`, both [rows, width] of equal length.
    fn measure(got: &[f32], want: &[f64], width: usize) -> Self {
        let mut e = Errors { max_abs: 0.0, worst: 0, relative: 0.0, worst_row: 0.0, ulps: 0, nans: 0, scale: 0.0 };
        let mut rows = Vec::with_capacity(want.len() / width);
        for (r, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
            let (mut error, mut norm) = (0.0, 0.0);
            for (c, (&g, &w)) in got.iter().zip(want).enumerate() {
                let same = f64::from(g) == w || (g.is_nan() && w.is_nan());
                let one_sided = g.is_nan() != w.is_nan();
                let distance = match (same, one_sided) {
                    (true, _) => 0.0,
                    (_, true) => f64::INFINITY,
                    _ => (f64::from(g) - w).abs(),
                };
                e.nans += usize::from(one_sided);
                e.ulps = e.ulps.max(if same { 0 } else { ulps(g, w as f32) });
                if distance > e.max_abs {
                    (e.max_abs, e.worst) = (distance, r * width + c);
                }
                error += distance * distance;
                if w.is_finite() {
                    norm += w * w;
                    e.scale = e.scale.max(w.abs());
                }
            }
            rows.push((error, norm));
        }
        let (error, norm) = rows.iter().fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d));
        let tiny = 1e-30;
        e.relative = error.sqrt() / (norm.sqrt() + tiny);
        let least = 0.01 * (norm / rows.len().max(1) as f64).sqrt() + tiny;
        e.worst_row = rows.iter().map(|(error, norm)| error.sqrt() / norm.sqrt().max(least)).fold(0.0, f64::max);
        e
    }
}

/// How many f32 numbers lie from `a` to `b`; the most there is when one of them is NaN.
fn ulps(a: f32, b: f32) -> u64 {
    let ordered = |v: f32| {
        let magnitude = i64::from(v.to_bits() & 0x7fff_ffff);
        if v.is_sign_negative() { -magnitude } else { magnitude }
    };
    if a.is_nan() || b.is_nan() { u64::MAX } else { ordered(a).abs_diff(ordered(b)) }
}
