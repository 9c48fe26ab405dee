//! Output buffers full of NaN between guard bands, so that missing and stray writes show.

use std::fmt::Debug;

use half::{bf16, f16};

/// An element with a bit pattern of NaN that no computation gives.
pub trait Element: Copy + Debug {
    /// The pattern.
    const POISON: Self;
    /// Whether this is exactly the pattern.
    fn is_poison(self) -> bool;
}

macro_rules! element {
    ($($t:ident $bits:literal),*) => {$(
        impl Element for $t {
            const POISON: Self = $t::from_bits($bits);
            fn is_poison(self) -> bool {
                self.to_bits() == $bits
            }
        }
    )*};
}
element!(f32 0x7fed_cba9, bf16 0x7fed, f16 0x7fed);

/// A poisoned buffer: every element and both guard bands hold [`Element::POISON`].
#[derive(Clone, Debug)]
pub struct Poisoned<T> {
    data: Vec<T>,
    len: usize,
}

/// Elements of each guard band: more than a vector register, a cache line and an unrolled step of them.
const GUARD: usize = 256;

impl<T: Element> Poisoned<T> {
    /// A buffer of `len` elements.
    pub fn new(len: usize) -> Self {
        Poisoned { data: vec![T::POISON; len + 2 * GUARD], len }
    }
    /// The elements between the guard bands.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.data[GUARD..GUARD + self.len]
    }
    /// The elements between the guard bands.
    pub fn as_slice(&self) -> &[T] {
        &self.data[GUARD..GUARD + self.len]
    }
    /// The buffer with its guard bands; the elements start at [`Poisoned::start`].
    pub fn whole_mut(&mut self) -> &mut [T] {
        &mut self.data
    }
    /// Index of the first element in [`Poisoned::whole_mut`].
    pub fn start(&self) -> usize {
        GUARD
    }

    /// Checks that every element was written and nothing outside was.
    ///
    /// # Errors
    /// A sentence that names the first offending index; negative ones lie before the buffer.
    pub fn check(&self) -> Result<(), String> {
        for (i, v) in self.data.iter().enumerate() {
            let (inside, index) = ((GUARD..GUARD + self.len).contains(&i), i as i64 - GUARD as i64);
            match (inside, v.is_poison()) {
                (true, true) => return Err(format!("element {index} of {} was not written", self.len)),
                (false, false) => return Err(format!("element {index} outside the {} elements was written: {v:?}", self.len)),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Element>(value: T) {
        let mut buffer = Poisoned::<T>::new(5);
        assert!(buffer.check().unwrap_err().contains("element 0 of 5 was not written"));
        buffer.as_mut_slice().fill(value);
        assert_eq!(buffer.check(), Ok(()));
        for (at, index) in [(-1, "-1"), (5, "5")] {
            let mut stray = buffer.clone();
            let start = stray.start() as i64;
            stray.whole_mut()[(start + at) as usize] = value;
            assert!(stray.check().unwrap_err().contains(&format!("element {index} outside")));
        }
        buffer.as_mut_slice()[4] = T::POISON;
        assert!(buffer.check().unwrap_err().contains("element 4 of 5"));
    }

    #[test]
    fn missing_and_stray_writes_show() {
        check(f32::NAN);
        check(half::bf16::NAN);
        check(half::f16::ZERO);
        assert!(f32::POISON.is_nan() && bf16::POISON.is_nan() && f16::POISON.is_nan());
    }
}
