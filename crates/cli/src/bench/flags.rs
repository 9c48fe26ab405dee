//! Which flags and levels mean something to each study. Others are refused, so that none is passed over in silence.

use lawson::{Error, Level, Result};

use super::specs::Study;

/// The flags of a shape with a cache that may hold something else than the compute type.
const CACHED: [&str; 10] =
    ["--batch", "--seq", "--past", "--hidden", "--heads", "--kv-heads", "--head-dim", "--dtype", "--kv-dtype", "--causal"];
/// The flags of a shape with weights and a cache that may hold something else than the compute type.
const HELD: [&str; 11] = [
    "--batch",
    "--seq",
    "--past",
    "--hidden",
    "--heads",
    "--kv-heads",
    "--head-dim",
    "--dtype",
    "--kv-dtype",
    "--weights",
    "--causal",
];
/// The flags of a shape with weights.
const SHAPE: [&str; 10] =
    ["--batch", "--seq", "--past", "--hidden", "--heads", "--kv-heads", "--head-dim", "--dtype", "--weights", "--causal"];

/// What one study takes.
struct Takes {
    /// Flags of a shape.
    shape: &'static [&'static str],
    /// A flag that few others take.
    own: Option<&'static str>,
    levels: &'static [Level],
}

fn takes(study: Study, gpu: bool) -> Takes {
    use Level::{Maximal, Minimal, Moderate, Unfused};
    let (shape, own, levels): (&[&str], _, &[Level]) = match study {
        Study::All | Study::Throughput => (&HELD, Some("--memory"), &Level::ALL),
        Study::Block => (&HELD, None, &Level::ALL),
        // Without a mask and without a past, as in the article.
        Study::Qkv => (
            &["--batch", "--seq", "--hidden", "--heads", "--kv-heads", "--head-dim", "--dtype", "--weights"],
            None,
            &[Unfused, Minimal],
        ),
        // [B, H, S, past + S] scores in f32.
        Study::Softmax => (&["--batch", "--seq", "--past", "--heads"], None, &[Unfused, Minimal, Moderate]),
        // [B, S, H, D], on a GPU also the pass that appends k and v; in f32 on the CPU.
        Study::Rope if gpu => (
            &["--batch", "--seq", "--past", "--hidden", "--heads", "--kv-heads", "--head-dim", "--dtype"],
            None,
            &[Unfused, Maximal],
        ),
        Study::Rope => (&["--batch", "--seq", "--past", "--hidden", "--heads", "--head-dim"], None, &[Unfused, Maximal]),
        Study::Attention => (&CACHED, None, &[Unfused, Maximal]),
        Study::Decode => (&CACHED, None, &[Maximal]),
        Study::Quality => (&["--checkpoint", "--tokens"], None, &[Maximal]),
        Study::Kernels => (&SHAPE, Some("--neighbours"), &[Maximal]),
    };
    Takes { shape, own, levels }
}

/// Checks that `study`, on a GPU or the CPU, takes every one of the flags and has every one of the levels that were given.
///
/// # Errors
/// `InvalidInput`, naming the first that it does not and what there is.
pub fn check(study: Study, gpu: bool, given: &[&str], levels: &[Level]) -> Result<()> {
    let (takes, name) = (takes(study, gpu), study.name());
    let flags: Vec<&str> = takes.shape.iter().copied().chain(takes.own).collect();
    if let Some(flag) = given.iter().find(|flag| !flags.contains(flag)) {
        let flags = flags.join(", ");
        return Err(Error::invalid(format!("{flag} means nothing to the study {name}, which takes {flags}")));
    }
    // These read no x: its width only stands in for a number of heads.
    let narrow = matches!(study, Study::Rope | Study::Attention | Study::Decode);
    if narrow && ["--hidden", "--heads", "--head-dim"].iter().all(|flag| given.contains(flag)) {
        return Err(Error::invalid(format!("--hidden means nothing to the study {name} beside --heads and --head-dim")));
    }
    if let Some(level) = levels.iter().find(|level| !takes.levels.contains(level)) {
        let has: Vec<_> = takes.levels.iter().map(|l| l.name()).collect();
        return Err(Error::invalid(format!("--levels {level}: the study {name} has {}", has.join(", "))));
    }
    Ok(())
}
