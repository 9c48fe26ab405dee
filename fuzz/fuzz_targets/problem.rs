//! Problem lines: what parses prints a line that parses back to the same.
#![no_main]

use std::{fmt::Display, str::FromStr};

use lawson::{AttentionProblem, BlockProblem, RopeSpec};
use libfuzzer_sys::fuzz_target;

fn round_trip<T: FromStr<Err = lawson::Error> + Display + PartialEq>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let line = value.to_string();
        assert!(line.parse::<T>().is_ok_and(|again| again == value), "{line}");
    }
}

fuzz_target!(|text: &str| {
    round_trip::<BlockProblem>(text);
    round_trip::<AttentionProblem>(text);
    round_trip::<RopeSpec>(text);
});
