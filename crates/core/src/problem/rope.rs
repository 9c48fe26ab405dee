//! Rotary position embedding (arXiv:2104.09864) and its length scalings, as transformers' `modeling_rope_utils` states them.

use std::f64::consts::PI;

use super::Real;
use crate::{Error, Result};

/// Which dimensions of a head turn together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// d and d + rotary_dim/2 (Llama, GPT-NeoX).
    #[default]
    Half,
    /// 2d and 2d + 1 (GPT-J).
    Interleaved,
}

/// Rotary position embedding of q and k.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: Real,
    /// Which dimensions turn together.
    pub layout: RopeLayout,
    /// How many leading dimensions turn; all when `None`.
    pub rotary_dim: Option<usize>,
    /// How frequencies change for long sequences.
    pub scaling: RopeScaling,
}

/// Parameters of [`RopeScaling::Yarn`] (arXiv:2309.00071).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Yarn {
    /// Stretch of the context.
    pub factor: Real,
    /// Context length before the stretch.
    pub original: usize,
    /// Rotations above which a dimension is left alone; 32 when absent.
    pub beta_fast: Option<Real>,
    /// Rotations below which a dimension is fully interpolated; 1 when absent.
    pub beta_slow: Option<Real>,
    /// Whether the correction range is rounded outwards to whole dimensions.
    pub truncate: bool,
    /// Multiplies cos and sin; derived from the other fields when absent.
    pub attention_factor: Option<Real>,
    /// Numerator of the derived attention factor, used with `mscale_all_dim`.
    pub mscale: Option<Real>,
    /// Denominator of the derived attention factor, used with `mscale`.
    pub mscale_all_dim: Option<Real>,
}

/// How RoPE frequencies change for long sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum RopeScaling {
    /// Unscaled.
    #[default]
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// Stretch of the context.
        factor: Real,
    },
    /// NTK-aware base that grows with the longest sequence of the call.
    Dynamic {
        /// Stretch of the context.
        factor: Real,
        /// Context length before the stretch.
        original: usize,
    },
    /// Interpolation by frequency band.
    Yarn(Yarn),
    /// Llama 3.1's smooth interpolation.
    Llama3 {
        /// Stretch of the context.
        factor: Real,
        /// Wavelengths above original/low are divided by `factor`.
        low: Real,
        /// Wavelengths below original/high stay.
        high: Real,
        /// Context length before the stretch.
        original: usize,
    },
    /// Two tables of divisors, chosen by the longest sequence of the call (arXiv:2402.13753).
    LongRope {
        /// Divisors up to `original`, one for each frequency.
        short: Vec<Real>,
        /// Divisors beyond `original`, one for each frequency.
        long: Vec<Real>,
        /// Context length before the stretch.
        original: usize,
        /// Stretch from which the attention factor follows.
        factor: Option<Real>,
        /// Multiplies cos and sin.
        attention_factor: Option<Real>,
    },
}

/// What a call needs of a [`RopeSpec`].
#[derive(Clone, Debug, PartialEq)]
pub struct RopeFrequencies {
    /// Radians per position of each pair, rotary_dim/2 of them.
    pub inverse: Vec<f64>,
    /// Multiplies cos and sin.
    pub attention_factor: f64,
}

impl RopeSpec {
    /// Rotation of all dimensions with base `theta`, half layout, no scaling.
    ///
    /// # Panics
    /// When `theta` is not finite.
    pub fn new(theta: f64) -> Self {
        let theta = Real::new(theta).expect("theta is finite");
        RopeSpec { theta, layout: RopeLayout::Half, rotary_dim: None, scaling: RopeScaling::Default }
    }

    /// How many dimensions turn in a head of `head_dim`.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        self.rotary_dim.unwrap_or(head_dim)
    }

    /// A number that is equal for calls with equal frequencies, `longest` being the rows of their longest sequence.
    pub fn length_key(&self, longest: usize) -> usize {
        match &self.scaling {
            RopeScaling::Dynamic { original, .. } => longest.max(*original),
            RopeScaling::LongRope { original, .. } => usize::from(longest > *original),
            _ => 0,
        }
    }

    /// Checks every range.
    ///
    /// # Errors
    /// `InvalidInput`, naming the field by its block-file key.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        let bad = |what: String| Err(Error::invalid(what));
        let rd = self.rotary_dim(head_dim);
        if self.rotary_dim.is_none() && (!rd.is_multiple_of(2) || rd < 2) {
            return bad(format!("head_dim must be even, as RoPE turns pairs of its dimensions, got {head_dim}"));
        }
        if !rd.is_multiple_of(2) || rd < 2 || rd > head_dim {
            return bad(format!("rope.rotary_dim must be even and between 2 and head_dim ({head_dim}), got {rd}"));
        }
        if self.theta.get() <= 0.0 {
            return bad(format!("rope.theta must be > 0, got {}", self.theta));
        }
        let positive = |name: &str, v: &Real| {
            if v.get() > 0.0 { Ok(()) } else { Err(Error::invalid(format!("rope.scaling.{name} must be > 0, got {v}"))) }
        };
        let original_ok = |n: usize, least: usize| {
            if n >= least && n <= 1 << 40 {
                Ok(())
            } else {
                Err(Error::invalid(format!("rope.scaling.original_max_position_embeddings must be at least {least}, got {n}")))
            }
        };
        match &self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", factor),
            RopeScaling::Dynamic { factor, original } => {
                positive("factor", factor)?;
                original_ok(*original, 1)?;
                if rd <= 2 {
                    return bad(format!("rope.scaling 'dynamic' needs rotary_dim > 2, got {rd}"));
                }
                Ok(())
            }
            RopeScaling::Yarn(y) => {
                positive("factor", &y.factor)?;
                original_ok(y.original, 1)?;
                if self.theta.get() <= 1.0 {
                    return bad(format!("rope.theta must be > 1 for yarn, got {}", self.theta));
                }
                for (name, v) in
                    [("beta_fast", &y.beta_fast), ("beta_slow", &y.beta_slow), ("attention_factor", &y.attention_factor)]
                {
                    v.as_ref().map_or(Ok(()), |v| positive(name, v))?;
                }
                Ok(())
            }
            RopeScaling::Llama3 { factor, low, high, original } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low)?;
                original_ok(*original, 1)?;
                if low.get() >= high.get() {
                    return bad(format!("rope.scaling.low_freq_factor ({low}) must be less than high_freq_factor ({high})"));
                }
                Ok(())
            }
            RopeScaling::LongRope { short, long, original, factor, attention_factor } => {
                for (name, list) in [("short_factor", short), ("long_factor", long)] {
                    if list.len() != rd / 2 {
                        return bad(format!("rope.scaling.{name} needs rotary_dim/2 = {} numbers, got {}", rd / 2, list.len()));
                    }
                    list.iter().try_for_each(|v| positive(name, v))?;
                }
                if factor.is_none() && attention_factor.is_none() {
                    return bad("rope.scaling 'longrope' needs factor or attention_factor".into());
                }
                factor.as_ref().map_or(Ok(()), |v| positive("factor", v))?;
                attention_factor.as_ref().map_or(Ok(()), |v| positive("attention_factor", v))?;
                original_ok(*original, if attention_factor.is_none() { 2 } else { 1 })
            }
        }
    }

    /// Frequencies of a call whose longest sequence has `longest` rows after the append.
    pub fn frequencies(&self, head_dim: usize, longest: usize) -> RopeFrequencies {
        let rd = self.rotary_dim(head_dim);
        let theta = self.theta.get();
        let base = |theta: f64| (0..rd / 2).map(move |i| theta.powf(-((2 * i) as f64) / rd as f64));
        let plain = || base(theta).collect::<Vec<_>>();
        let (inverse, attention_factor) = match &self.scaling {
            RopeScaling::Default => (plain(), 1.0),
            RopeScaling::Linear { factor } => (base(theta).map(|f| f / factor.get()).collect(), 1.0),
            RopeScaling::Dynamic { factor, original } => {
                let (f, l0) = (factor.get(), *original as f64);
                let grown = f * (longest.max(*original) as f64) / l0 - (f - 1.0);
                (base(theta * grown.powf(rd as f64 / (rd as f64 - 2.0))).collect(), 1.0)
            }
            RopeScaling::Llama3 { factor, low, high, original } => {
                let (factor, low, high, l0) = (factor.get(), low.get(), high.get(), *original as f64);
                let scaled = |f: f64| {
                    let wavelength = 2.0 * PI / f;
                    let smooth = (l0 / wavelength - low) / (high - low);
                    if wavelength > l0 / low {
                        f / factor
                    } else if wavelength < l0 / high {
                        f
                    } else {
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                (base(theta).map(scaled).collect(), 1.0)
            }
            RopeScaling::Yarn(y) => (y.inverse(base(theta), rd, theta), y.attention_factor()),
            RopeScaling::LongRope { short, long, original, factor, attention_factor } => {
                let divisors = if longest > *original { long } else { short };
                let derived = || match factor.map_or(1.0, Real::get) {
                    f if f <= 1.0 => 1.0,
                    f => (1.0 + f.ln() / (*original as f64).ln()).sqrt(),
                };
                (base(theta).zip(divisors).map(|(f, d)| f / d.get()).collect(), attention_factor.map_or_else(derived, Real::get))
            }
        };
        RopeFrequencies { inverse, attention_factor }
    }
}

impl Yarn {
    fn attention_factor(&self) -> f64 {
        let mscale = |m: f64| if self.factor.get() <= 1.0 { 1.0 } else { 0.1 * m * self.factor.get().ln() + 1.0 };
        let given = |v: Option<Real>| v.map(Real::get).filter(|&v| v != 0.0);
        match (self.attention_factor, given(self.mscale), given(self.mscale_all_dim)) {
            (Some(a), ..) => a.get(),
            (None, Some(m), Some(all)) => mscale(m) / mscale(all),
            _ => mscale(1.0),
        }
    }

    fn inverse(&self, base: impl Iterator<Item = f64>, rotary_dim: usize, theta: f64) -> Vec<f64> {
        let rd = rotary_dim as f64;
        let dimension = |rotations: f64| rd * (self.original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let mut low = dimension(self.beta_fast.map_or(32.0, Real::get));
        let mut high = dimension(self.beta_slow.map_or(1.0, Real::get));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(rd - 1.0));
        if low == high {
            high += 0.001;
        }
        let blend = |(i, f): (usize, f64)| {
            let keep = 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / self.factor.get() * (1.0 - keep) + f * keep
        };
        base.enumerate().map(blend).collect()
    }
}
