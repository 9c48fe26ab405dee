//! Medians and percentiles.

/// The value below which the share `p` of `sorted` lies, between neighbours in proportion; NaN of nothing.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = p * last as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[(place.ceil() as usize).min(last)]);
    low + (high - low) * place.fract()
}

/// Seconds of several calls.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<f64>);

impl Times {
    /// From calls in any order.
    pub fn new(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        Times(seconds)
    }
    /// How many calls.
    pub fn runs(&self) -> usize {
        self.0.len()
    }
    /// The median, in seconds.
    pub fn median(&self) -> f64 {
        percentile(&self.0, 0.5)
    }
    /// The share `p` of the calls took at most this many seconds.
    pub fn percentile(&self, p: f64) -> f64 {
        percentile(&self.0, p)
    }
}

#[cfg(test)]
mod tests {
    use super::Times;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let t = Times::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((t.median(), t.percentile(0.0), t.percentile(1.0)), (2.5, 1.0, 4.0));
        assert!((t.percentile(0.1) - 1.3).abs() < 1e-12);
        assert_eq!(Times::new(vec![7.0]).percentile(0.9), 7.0);
        assert!(Times::default().median().is_nan());
    }
}
