//! `lawson bench`: verifies, times, prints tables and writes a report.

mod fit;
mod flags;
mod inputs;
mod machine;
mod measure;
mod parallel;
pub mod peak;
mod peer_rows;
mod peers;
pub mod record;
mod rows;
mod session;
mod specs;
mod statistics;
mod studies;
mod table;
mod verify;

use std::{
    fs,
    io::{IsTerminal, Read},
    path::{Path, PathBuf},
    process::ExitCode,
};

use lawson::{CacheDType, Context, DType, Error, ErrorKind, Level, Result, WeightKind, weights_on_gpu};

use crate::{
    args::{self, Auto, Global},
    output, report, signals,
};
use measure::Budget;
use peers::PeerKind;
use record::{Results, Row};
use rows::Limits;
use session::Session;
use specs::{Case, Preset, Shape, Study};

const AFTER_HELP: &str = "\
Examples:
  lawson bench
  lawson bench attention --preset article
  lawson bench block --seq 1 --past 4096 --hidden 4096 --kv-heads 8 --dtype bf16
  lawson bench all --peers torch,ort --out report
  lawson bench kernels --preset article --neighbours 30
  lawson bench quality --checkpoint tiny-llama --tokens valid.u16

Writes index.html, which needs no other file, and results.json, in place of earlier ones.
A flag or a level that means nothing to a study is refused with what the study takes.";

/// Verify and time the block and its parts at each level of fusion, and write a report
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, default_value_t = Study::All)]
    study: Study,
    /// Which sizes
    #[arg(long, value_enum, default_value_t = Preset::Quick)]
    preset: Preset,
    /// Folder for the report
    #[arg(long, value_name = "DIR", default_value = "lawson-report")]
    out: PathBuf,
    /// Levels of fusion: unfused, minimal, moderate, maximal [default: all]
    #[arg(long, value_name = "LEVEL,…", value_delimiter = ',')]
    levels: Vec<Level>,
    /// Other engines to measure in the same run: torch, ort, candle
    #[arg(long, value_name = "PEER,…", value_delimiter = ',')]
    peers: Vec<PeerKind>,
    /// Memory for which `throughput` counts sequences, in bytes or as 512MiB, 8GiB [default: 4GiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, allow_negative_numbers = true)]
    memory: Option<u64>,
    /// Shapes near each kernel's own that `kernels` measures beside it, at most 1000: a token more or less, odd widths, other heads
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1000), allow_negative_numbers = true, default_value_t = 0)]
    neighbours: u16,
    /// `quality`: a Hugging Face checkpoint folder (Llama, Mistral, Qwen2, Qwen3) with the whole model
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// `quality`: a text as token ids of 16 bits, little-endian; 8 windows of 512 are read, 32 with --preset article
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeArgs,
}

/// Memory for which `throughput` counts sequences where nothing says another.
const MEMORY: u64 = 4 << 30;

/// Width of a head where nothing says another.
const HEAD_DIM: usize = 128;

/// Reads a size of a shape.
fn size(text: &str) -> Result<usize, String> {
    let accepted = || format!("accepted: {}", specs::SIZES);
    text.parse().ok().filter(|&n| specs::is_size(n)).ok_or_else(accepted)
}

/// Reads a number of sequences, of which a problem's line takes as many.
fn sequences(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=1 << 20).contains(n)).ok_or_else(|| "accepted: 1 to 2^20".to_owned())
}

/// One shape instead of a preset's.
#[derive(clap::Args, Clone, Copy, Debug)]
#[command(next_help_heading = "One shape instead of a preset's")]
struct ShapeArgs {
    /// Sequences [default: 1]
    #[arg(long, value_name = "B", value_parser = sequences, allow_negative_numbers = true, conflicts_with = "preset")]
    batch: Option<usize>,
    /// New tokens of each sequence [default: 1024; of decode behind a --past 1]
    #[arg(long, value_name = "S", value_parser = size, allow_negative_numbers = true, conflicts_with = "preset")]
    seq: Option<usize>,
    /// Tokens that are in the cache before the call [default: 0]
    #[arg(long, value_name = "P", value_parser = args::whole::<usize>, allow_negative_numbers = true, conflicts_with = "preset")]
    past: Option<usize>,
    /// Width of x and y [default: heads times head width, or 1024]
    #[arg(long, value_name = "E", value_parser = size, allow_negative_numbers = true, conflicts_with = "preset")]
    hidden: Option<usize>,
    /// Query heads [default: hidden size over head width]
    #[arg(long, value_name = "H", value_parser = size, allow_negative_numbers = true, conflicts_with = "preset")]
    heads: Option<usize>,
    /// Key/value heads [default: as many as query heads]
    #[arg(long, value_name = "G", value_parser = size, allow_negative_numbers = true, conflicts_with = "preset")]
    kv_heads: Option<usize>,
    /// Width of a head [default: hidden size over heads where both are given, else 128]
    #[arg(long, value_name = "D", value_parser = size, allow_negative_numbers = true, conflicts_with = "preset")]
    head_dim: Option<usize>,
    /// Compute type: f32, bf16 or f16 [default: f32]
    #[arg(long, value_name = "TYPE", conflicts_with = "preset")]
    dtype: Option<DType>,
    /// How the cache holds keys and values: f32, bf16, f16, int8 or int4 [default: the compute type]
    #[arg(long, value_name = "TYPE", value_parser = args::kv_dtype, conflicts_with = "preset")]
    kv_dtype: Option<Auto<CacheDType>>,
    /// How the projections' weights are held: auto or int8 [default: in the compute type]
    #[arg(long, value_name = "KIND", value_parser = args::weights, conflicts_with = "preset")]
    weights: Option<Auto<WeightKind>>,
    /// Whether a token sees only those before it [default: true]
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, conflicts_with = "preset")]
    causal: Option<bool>,
}

impl ShapeArgs {
    /// The flags that were given.
    fn given(&self) -> Vec<&'static str> {
        let flags = [
            ("--batch", self.batch.is_some()),
            ("--seq", self.seq.is_some()),
            ("--past", self.past.is_some()),
            ("--hidden", self.hidden.is_some()),
            ("--heads", self.heads.is_some()),
            ("--kv-heads", self.kv_heads.is_some()),
            ("--head-dim", self.head_dim.is_some()),
            ("--dtype", self.dtype.is_some()),
            ("--kv-dtype", self.kv_dtype.is_some()),
            ("--weights", self.weights.is_some()),
            ("--causal", self.causal.is_some()),
        ];
        flags.into_iter().filter(|f| f.1).map(|f| f.0).collect()
    }

    /// The shape, when any of it was given, for `study`.
    fn shape(&self, study: Study) -> Result<Option<Shape>> {
        if self.given().is_empty() {
            return Ok(None);
        }
        let head_dim = match (self.head_dim, self.hidden, self.heads) {
            (Some(d), _, _) => d,
            (None, Some(e), Some(h)) if e.is_multiple_of(h) => e / h,
            (None, Some(e), Some(h)) => {
                return Err(Error::invalid(format!("--head-dim is needed, as --hidden {e} is not a multiple of --heads {h}")));
            }
            (None, Some(e), None) if !e.is_multiple_of(HEAD_DIM) => {
                return Err(Error::invalid(format!(
                    "--head-dim or --heads is needed, as --hidden {e} is not a multiple of {HEAD_DIM}"
                )));
            }
            _ => HEAD_DIM,
        };
        let heads = self.heads.unwrap_or_else(|| (self.hidden.unwrap_or(1024) / head_dim.max(1)).max(1));
        let dtype = self.dtype.unwrap_or(DType::F32);
        let shape = Shape {
            batch: self.batch.unwrap_or(1),
            // Decode is of one new token behind a past.
            seq: self.seq.unwrap_or(if study == Study::Decode && self.past.is_some() { 1 } else { 1024 }),
            past: self.past.unwrap_or(0),
            hidden: self.hidden.unwrap_or_else(|| heads.saturating_mul(head_dim)),
            heads,
            kv_heads: self.kv_heads.unwrap_or(heads),
            head_dim,
            dtype,
            kv_dtype: self.kv_dtype.and_then(|kv| kv.0).unwrap_or(dtype.into()),
            weights: self.weights.and_then(|w| w.0).unwrap_or_default(),
            causal: self.causal.unwrap_or(true),
            rope: true,
        };
        shape.validate(study).map(|()| Some(shape))
    }
}

fn parse_bytes(text: &str) -> Result<u64> {
    let bad = || Error::invalid(format!("{text:?} is no amount of memory; write bytes, or 512MiB, 8GiB"));
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1u64 << 40), ("", 1)];
    let (digits, unit) = units.iter().find_map(|(name, n)| Some((text.strip_suffix(name)?, *n))).ok_or_else(bad)?;
    let amount: u64 = digits.trim().parse().map_err(|_| bad())?;
    amount.checked_mul(unit).filter(|&n| n > 0).ok_or_else(bad)
}

/// Runs the command.
///
/// # Errors
/// `InvalidInput` for a shape that is wrong or does not fit and for a folder that cannot be written, before anything is measured;
/// `Cancelled` on Ctrl-C. A result that is wrong is exit code 1, after the report was written.
pub fn execute(args: &BenchArgs, global: &Global) -> Result<ExitCode> {
    let existed = args.out.exists();
    let result = measure(args, global);
    if result.is_err() && !existed {
        // Only an empty folder goes: what was written stays.
        let _ = fs::remove_dir(&args.out);
    }
    result
}

fn measure(args: &BenchArgs, global: &Global) -> Result<ExitCode> {
    let mut given = args.shape.given();
    given.extend(args.memory.map(|_| "--memory"));
    given.extend((args.neighbours > 0).then_some("--neighbours"));
    given.extend(args.checkpoint.as_ref().map(|_| "--checkpoint"));
    given.extend(args.tokens.as_ref().map(|_| "--tokens"));
    let context = global.context()?;
    flags::check(args.study, context.gpu().is_some(), &given, &args.levels)?;
    if args.study == Study::Quality {
        return quality(args, global, &context);
    }
    let shape = args.shape.shape(args.study)?;
    if let (Some(shape), Some(_)) = (&shape, context.gpu()) {
        shape.kv_dtype.on_gpu().map_err(|e| e.at("--kv-dtype"))?;
        weights_on_gpu(shape.weights).map_err(|e| e.at("--weights"))?;
    }
    check_writable(&args.out)?;
    let mut cases = match shape {
        Some(shape) => specs::explicit(args.study, shape),
        None => specs::preset(args.study, args.preset, context.gpu().is_some()),
    };
    let session = start(args, global, context, &cases, shape.is_some());
    if session.context.gpu().is_some() {
        cases.retain(|case| case.study != Study::Kernels);
        let device = session.context.device();
        if cases.is_empty() {
            let text = format!(
                "the study kernels is of the CPU's kernels: --device cpu; on {device} qkv, attention, decode and block have the same kernels \
                 with their shares of the limit"
            );
            return Err(Error::new(ErrorKind::Unavailable, text));
        }
        let others: Vec<&str> = session.peers.iter().filter(|k| **k != PeerKind::Torch).map(|k| k.name()).collect();
        if !others.is_empty() && !global.quiet {
            eprintln!("on {device} torch alone is measured beside Lawson; --device cpu measures {}", others.join(", "));
        }
    }
    if shape.is_some() {
        cases.iter().try_for_each(|case| fit::check(&session, case))?;
    }
    if !global.json {
        output::print(format!("on {}", args::computes_on(&session.context)))?;
    }
    session.bar.set_message("measuring the machine's peak and bandwidth");
    let mut limits = Limits::measure(&session)?;
    session.check()?;
    let session = Session { bar: output::progress(cases.len(), "bench", global), limits, ..session };
    let plain = !global.quiet && !std::io::stderr().is_terminal();
    let mut results = Results {
        lawson: env!("CARGO_PKG_VERSION").to_owned(),
        machine: machine::describe(&session.context),
        results: Vec::new(),
    };
    let studies = 1 + cases.windows(2).filter(|pair| pair[0].study != pair[1].study).count();
    let (mut begun, mut lowest) = (0, limits);
    for (i, case) in cases.iter().enumerate() {
        session.check()?;
        if i == 0 || cases[i - 1].study != case.study {
            begun += 1;
            if plain {
                eprintln!("measuring {} ({begun} of {studies})…", case.study.name());
            }
        }
        let case = if shape.is_some() { case.clone() } else { fit::scaled(&session, case.clone())? };
        session.bar.set_message(case.name());
        let named = |e: Error| if e.kind() == ErrorKind::OutOfMemory { e.at(case.name()) } else { e };
        results.results.extend(studies::run(&session, &case).map_err(named)?);
        session.bar.inc(1);
        if cases.get(i + 1).is_none_or(|next| next.study != case.study) {
            let again = Limits::measure(&session)?;
            (limits, lowest) = (limits.max(again), lowest.min(again));
        }
    }
    session.bar.finish_and_clear();
    session.check()?;
    limits.describe(lowest, &mut results.machine);
    limits.fill_shares(&mut results.results);
    if !global.json {
        // Shares are of limits that the last study may still raise, so no table is printed before it.
        for rows in results.results.chunk_by(|a, b| a.study == b.study) {
            output::print(table::text(&rows[0].study, rows))?;
        }
        let [peak, bf16_peak] = [limits.peak_flops, limits.bf16_peak_flops].map(|v| report::gflops(v * 1e-9));
        let int8_peak = limits.int8_peak_ops.map_or(String::new(), |v| format!(", int8 peak {}", report::gflops(v * 1e-9)));
        let bandwidth = limits.bandwidth * 1e-9;
        output::print(format!(
            "measured limits: f32 peak {peak}, bf16 peak {bf16_peak}{int8_peak}, bandwidth {bandwidth:.1} GB/s"
        ))?;
        report::varied(&results.machine).map_or(Ok(()), output::print)?;
    }
    finish(args, global, &results)
}

/// The study of quality, which measures no times.
fn quality(args: &BenchArgs, global: &Global, context: &Context) -> Result<ExitCode> {
    let needed = |flag: &str, value: &Option<PathBuf>| {
        value.clone().ok_or_else(|| Error::invalid(format!("the study quality needs {flag}; see lawson bench --help")))
    };
    let (checkpoint, tokens) = (needed("--checkpoint DIR", &args.checkpoint)?, needed("--tokens FILE", &args.tokens)?);
    if context.gpu().is_some() {
        let text = "the study quality is of what the CPU quantises: --device cpu";
        return Err(Error::new(ErrorKind::Unavailable, text));
    }
    let made = (!args.out.exists()).then(|| args.out.clone());
    check_writable(&args.out)?;
    let bar = output::progress(studies::quality::FORMS.len(), "bench", global);
    let plain = !global.quiet && !std::io::stderr().is_terminal();
    let step = |name: &str| {
        bar.set_message(format!("quality: {name}"));
        bar.inc(1);
        if plain {
            eprintln!("measuring quality: {name} ({} of {})…", bar.position(), studies::quality::FORMS.len());
        }
    };
    let windows = studies::quality::windows(args.preset);
    let clean_up = {
        let bar = bar.clone();
        move || {
            bar.finish_and_clear();
            // Only an empty folder goes: what was written stays.
            made.map(fs::remove_dir);
        }
    };
    let run = || studies::quality::run(context, &checkpoint, &tokens, windows, &step);
    let rows = signals::droppable(clean_up, run)?;
    bar.finish_and_clear();
    let results = Results { lawson: env!("CARGO_PKG_VERSION").to_owned(), machine: machine::describe(context), results: rows };
    if !global.json {
        output::print(format!("on {}", args::computes_on(context)))?;
        output::print(table::text("quality", &results.results))?;
    }
    finish(args, global, &results)
}

/// Writes the report and says where it is and what failed.
fn finish(args: &BenchArgs, global: &Global, results: &Results) -> Result<ExitCode> {
    let json = serde_json::to_string_pretty(results);
    let json = json.map_err(|e| Error::new(ErrorKind::Corrupt, format!("the results cannot be written as JSON: {e}")))?;
    let page = args.out.join("index.html");
    let replaced = if page.exists() { " (in place of an earlier one)" } else { "" };
    write_all(&[(&args.out.join("results.json"), &json), (&page, &report::render(results))])?;
    if global.json {
        output::print(json)?;
    } else {
        output::print(format!("report: {}{replaced}", page.display()))?;
    }
    let failed: Vec<&Row> = results.results.iter().filter(|r| is_wrong(r)).collect();
    for row in &failed {
        eprintln!("{} {}: {}", row.study, row.level, row.note.as_deref().unwrap_or("failed"));
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Whether one of our own results was wrong.
fn is_wrong(row: &Row) -> bool {
    !row.level.starts_with("peer:") && row.median_ms.is_none() && !row.mean_loss.is_some_and(f64::is_finite)
}

/// What the run shares, its limits not yet measured.
fn start<'a>(args: &BenchArgs, global: &'a Global, context: Context, cases: &[Case], explicit: bool) -> Session<'a> {
    let mut levels = if args.levels.is_empty() { Level::ALL.to_vec() } else { args.levels.clone() };
    levels.sort_unstable();
    levels.dedup();
    let (mut peers, mut missing): (Vec<PeerKind>, Vec<(PeerKind, String)>) = (Vec::new(), Vec::new());
    for &kind in PeerKind::ALL.iter().filter(|k| args.peers.contains(k)) {
        if !cases.iter().any(|case| peer_rows::measures(kind, case, &context)) {
            let (peer, study) = (kind.name(), args.study.name());
            eprintln!(
                "the peer {peer} measures nothing here, in the study {study}; it measures {}",
                peer_rows::measured(&context)
            );
            continue;
        }
        match peers::available(kind) {
            Ok(_) => peers.push(kind),
            Err(e) => {
                eprintln!("{e}");
                missing.push((kind, e.to_string()));
            }
        }
    }
    let budget =
        if explicit { Budget { seconds: 2.0, least: 5, most: 100 } } else { args.preset.budget(context.gpu().is_some()) };
    let bar = output::progress(0, "bench", global);
    Session {
        context,
        global,
        levels,
        budget,
        limits: Limits { peak_flops: 1.0, bf16_peak_flops: 1.0, int8_peak_ops: None, bandwidth: 1.0 },
        memory_limit: args.memory.unwrap_or(MEMORY),
        neighbours: args.neighbours.into(),
        peers,
        missing,
        torch: std::cell::RefCell::default(),
        bar,
    }
}

/// Makes the folder and checks that files can be written there.
fn check_writable(folder: &Path) -> Result<()> {
    let failed = |e: std::io::Error| Error::invalid(format!("--out {}: the folder cannot be written: {e}", folder.display()));
    if folder.exists() && !folder.is_dir() {
        return Err(Error::invalid(format!("--out {}: it is not a folder, which a report needs", folder.display())));
    }
    fs::create_dir_all(folder).map_err(failed)?;
    for (name, mark) in [("results.json", record::MARK), ("index.html", report::MARK)] {
        let path = folder.join(name);
        if path.is_dir() {
            return Err(Error::invalid(format!("--out {}: {name} is a folder there", folder.display())));
        }
        if path.exists() && !starts_with_mark(&path, mark).map_err(failed)? {
            let folder = folder.display();
            return Err(Error::invalid(format!(
                "--out {folder}: lawson bench did not write the {name} there, which it would replace; accepted: another folder"
            )));
        }
    }
    let probe = temporary(&folder.join("results.json"));
    fs::write(&probe, b"").and_then(|()| fs::remove_file(&probe)).map_err(failed)
}

/// Whether `mark` stands near the start of a file.
fn starts_with_mark(path: &Path, mark: &str) -> std::io::Result<bool> {
    let mut start = Vec::new();
    fs::File::open(path)?.take(1024).read_to_end(&mut start)?;
    Ok(String::from_utf8_lossy(&start).contains(mark))
}

fn temporary(path: &Path) -> PathBuf {
    path.with_extension(format!("{}.tmp", std::process::id()))
}

/// Writes each text to its path: all of them whole, or none where the disk has no room.
fn write_all(files: &[(&Path, &str)]) -> Result<()> {
    let failed = |path: &Path, e| Error::new(ErrorKind::Device, format!("{} cannot be written: {e}", path.display()));
    let write = |&(path, text): &(&Path, &str)| fs::write(temporary(path), text).map_err(|e| failed(path, e));
    let place = |&(path, _): &(&Path, &str)| fs::rename(temporary(path), path).map_err(|e| failed(path, e));
    let written = files.iter().try_for_each(write).and_then(|()| files.iter().try_for_each(place));
    if written.is_err() {
        // Those that are in place, or were never made, are not there.
        files.iter().for_each(|(path, _)| drop(fs::remove_file(temporary(path))));
    }
    written
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{parse_bytes, temporary, write_all};

    #[test]
    fn files_are_written_all_or_none() {
        let dir = std::env::temp_dir().join(format!("lawson-write-all-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (first, second) = (dir.join("results.json"), dir.join("index.html"));
        let files = [(&*first, "one"), (&*second, "two")];
        // A folder in its way, as a full disk would be.
        fs::create_dir(temporary(&second)).unwrap();
        let error = write_all(&files).unwrap_err().to_string();
        assert!(error.contains("index.html cannot be written") && !first.exists() && !temporary(&first).exists(), "{error}");
        fs::remove_dir(temporary(&second)).unwrap();
        write_all(&files).unwrap();
        assert_eq!((fs::read_to_string(first).unwrap(), fs::read_to_string(second).unwrap()), ("one".into(), "two".into()));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn memory_reads_with_units() {
        assert_eq!(parse_bytes("8GiB").unwrap(), 8 << 30);
        assert_eq!(parse_bytes("4096").unwrap(), 4096);
        for bad in ["", "0", "GiB", "-1", "1.5GiB", "8GB", "99999999TiB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
