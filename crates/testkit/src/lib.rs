//! Doubts every other room: cases that cross all features, inputs that make bugs visible, poisoned outputs, and the one definition
//! of "this kernel is right".
#![forbid(unsafe_code)]

pub mod cases;
pub mod conformance;
pub mod inputs;
mod kernel_cases;
pub mod model;
pub mod poison;
pub mod rng;
