//! A float that can be a key.

use std::{
    fmt,
    hash::{Hash, Hasher},
};

/// A finite f64 with equality and hash by value (−0 is stored as 0), so that specifications can be map keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Real(f64);

impl Real {
    /// `v`, or `None` when it is NaN or infinite.
    pub fn new(v: f64) -> Option<Self> {
        v.is_finite().then_some(Real(v + 0.0))
    }
    /// The number.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl Eq for Real {}

impl Hash for Real {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}

impl fmt::Display for Real {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
