//! `lawson run`: computes one attention block from files.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::{ArgGroup, Args};
use lawson::{
    BlockData, BlockFile, BlockOutput, BlockPlan, BlockProblem, CacheDType, Checkpoint, Context, DType, Error, Form, KvCache,
    Level, PreparedCall, Result, Tensor, WeightKind,
    block_file::{write_block_file, write_output},
    machine,
    tensor_file::TensorFile,
};
use lawson_testkit::inputs::{Sharpness, data_for};
use serde_json::{Value, json};

use crate::{
    args::{self, Auto, Global},
    output, signals,
};

const AFTER_HELP: &str = "\
Examples:
  lawson run --block block.json --tensors in.safetensors --out y.safetensors
  lawson run --checkpoint Llama-3.2-1B --layer 3 --tensors x.safetensors --out y.safetensors
  lawson run --problem 'block b=2 s=64 past=256 e=512 h=8/2 rope=half bf16' --write case

The output holds y [B, S, E] and the caches after the append, k and v [B, G, P+S, D], in the compute dtype.
It is written whole or not at all. It, and what --write makes, may replace earlier files. Ctrl-C and SIGTERM
end the computation at once, with nothing written; files that are being written are finished.

";

/// The examples, and what a problem is made of.
fn after_help() -> String {
    format!("{AFTER_HELP}{}", args::PROBLEM_HELP)
}

/// Compute one attention block from files, or make such files with random numbers
#[derive(Args, Debug)]
#[command(after_help = after_help(), group = ArgGroup::new("what").required(true).args(["block", "checkpoint", "problem"]))]
pub struct RunArgs {
    /// The block's description (block.json); its weights and input come from --tensors
    #[arg(long, value_name = "FILE")]
    block: Option<PathBuf>,
    /// A Hugging Face checkpoint folder (Llama, Mistral, Qwen2, Qwen3): the self-attention of one layer
    #[arg(long, value_name = "DIR", requires = "layer")]
    checkpoint: Option<PathBuf>,
    /// The problem as one line, to be filled with N(0, 1) inputs and weights; needs --out to run it, --write to keep it, or both
    #[arg(long, value_name = "PROBLEM", conflicts_with = "tensors")]
    problem: Option<BlockProblem>,

    /// Input (safetensors). With --block: x, the weights and what else the block asks for; with --checkpoint: x and optionally
    /// past_k, past_v, lengths, mask
    #[arg(long, value_name = "FILE", required_unless_present = "problem")]
    tensors: Option<PathBuf>,
    /// Where to write y, k and v (safetensors). With --problem: optional beside --write
    #[arg(long, value_name = "FILE", required_unless_present = "problem")]
    out: Option<PathBuf>,

    /// The checkpoint's layer, from 0
    #[arg(long, value_name = "N", value_parser = args::whole::<usize>, allow_negative_numbers = true, conflicts_with_all = ["block", "problem"])]
    layer: Option<usize>,
    /// With the layer's input norm before the attention and the residual after it
    #[arg(long, conflicts_with_all = ["block", "problem"])]
    with_norm: bool,

    /// Seed of the random numbers
    #[arg(long, value_name = "N", value_parser = args::whole::<u64>, allow_negative_numbers = true, default_value_t = 0, conflicts_with_all = ["block", "checkpoint"])]
    seed: u64,
    /// Folder for block.json and in.safetensors, in the compute dtype. How weights and cache are held is not stored: give --weights and
    /// --kv-dtype again when the block file is run
    #[arg(long, value_name = "DIR", conflicts_with_all = ["block", "checkpoint"])]
    write: Option<PathBuf>,

    /// Level of fusion: auto (the planner's choice), unfused, minimal, moderate, maximal
    #[arg(long, value_name = "LEVEL", default_value = "auto", value_parser = args::level)]
    fusion: Auto<Level>,
    /// Compute dtype: auto (that of x; with --problem, the problem's), f32, bf16, f16
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = args::dtype)]
    dtype: Auto<DType>,
    /// Dtype of the cache: auto (the compute dtype, or another that the problem gives with kv=), f32, bf16, f16; int8 or int4:
    /// quantised, on a CPU
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = args::kv_dtype)]
    kv_dtype: Auto<CacheDType>,
    /// How the projections' weights are held: auto (as the checkpoint or the problem says, else in the compute dtype); int8: quantised for each output,
    /// activations for each token, on a CPU
    #[arg(long, value_name = "KIND", default_value = "auto", value_parser = args::weights)]
    weights: Auto<WeightKind>,
}

/// Runs the command.
///
/// # Errors
/// `InvalidInput`, naming the file, key, tensor or flag; `OutOfMemory`; `Device` when a disk fails; `Cancelled`.
pub fn execute(args: &RunArgs, global: &Global) -> Result<ExitCode> {
    // Everything that can be refused is refused before the work.
    if args.problem.is_some() && args.out.is_none() && args.write.is_none() {
        return Err(Error::invalid("--problem needs --out to run it, --write to keep it, or both"));
    }
    args.out.as_deref().map_or(Ok(()), |out| check_input(args, out).and_then(|()| check_writable(out)))?;
    args.write.as_deref().map_or(Ok(()), check_folder)?;
    let context = global.context()?;
    let work = || {
        let (problem, data) = match &args.problem {
            Some(problem) => make(args, &context, problem)?,
            None => read(args)?.into_parts(),
        };
        let ran = args.out.as_ref().map(|_| compute(&context, &problem, &data, args.fusion.0, global.quiet)).transpose()?;
        Ok((problem, data, ran))
    };
    // Until a file is written there is nothing that a signal could leave behind; but a program must not end within a call of the CUDA driver.
    let (problem, data, ran) = if context.gpu().is_some() { work() } else { signals::droppable(|| (), work) }?;
    signals::check()?;
    let mut result = json!({});
    if let Some(dir) = &args.write {
        let replaced = BLOCK_FILES.iter().any(|name| dir.join(name).exists());
        write_block_file(dir, &problem, &data).map_err(|e| e.at("--write"))?;
        let flags = not_stored(&problem);
        merge(
            &mut result,
            json!({"problem": problem.to_string(), "seed": args.seed, "written": dir, "written_replaced": replaced, "not_stored": flags}),
        );
        if !global.json {
            let (verb, dir, seed) = (wrote(replaced), dir.display(), args.seed);
            output::print(format!("{problem}\n{verb} {dir}/block.json and in.safetensors (seed {seed})"))?;
            if !flags.is_empty() {
                output::print(format!(
                    "a block file does not say how weights and cache are held; run it with {flags} for the same"
                ))?;
            }
        }
    }
    if let (Some(out), Some(ran)) = (&args.out, ran) {
        signals::check()?;
        let replaced = out.exists();
        let BlockOutput { y, k, v } = &ran.output;
        write_output(out, &problem, y, k, v, data.cache_rows(&problem))?;
        if !global.json {
            output::print(ran.text(&problem, out, replaced))?;
        }
        merge(&mut result, ran.json(&problem, out, replaced));
    }
    if global.json {
        output::print_json(&result)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The flags without which a block file is computed otherwise than `problem`, whose files hold neither.
fn not_stored(problem: &BlockProblem) -> String {
    let weights = (problem.weights == WeightKind::Int8).then(|| format!("--weights {}", problem.weights));
    let cache = (problem.kv_dtype != CacheDType::from(problem.dtype)).then(|| format!("--kv-dtype {}", problem.kv_dtype));
    [weights, cache].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// What --write makes.
const BLOCK_FILES: [&str; 2] = ["block.json", "in.safetensors"];

/// How to say that a file was written.
fn wrote(replaced: bool) -> &'static str {
    if replaced { "replaced" } else { "wrote" }
}

/// Refuses to make block files in what is no folder.
fn check_folder(dir: &Path) -> Result<()> {
    if dir.exists() && !dir.is_dir() {
        let dir = dir.display();
        return Err(Error::invalid(format!(
            "--write {dir}: cannot be made: it is not a folder; accepted: a folder, which is made when missing"
        )));
    }
    Ok(())
}

/// Adds the keys of `more` to `object`.
fn merge(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

/// Whether two paths lead to one file: by whatever names, links included, and also when it does not exist yet.
fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    if let (Ok(a), Ok(b)) = (a.metadata(), b.metadata()) {
        use std::os::unix::fs::MetadataExt;
        return (a.dev(), a.ino()) == (b.dev(), b.ino());
    }
    let place = |path: &Path| {
        path.canonicalize().ok().or_else(|| {
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Some(folder.canonicalize().ok()?.join(path.file_name()?))
        })
    };
    place(a).is_some_and(|a| place(b) == Some(a))
}

/// Refuses an output in the place of an input, or of what --write makes.
fn check_input(args: &RunArgs, out: &Path) -> Result<()> {
    let mut inputs: Vec<(&str, PathBuf)> = Vec::new();
    inputs.extend(args.block.iter().map(|p| ("--block", p.clone())));
    inputs.extend(args.tensors.iter().map(|p| ("--tensors", p.clone())));
    inputs.extend(args.write.iter().flat_map(|dir| BLOCK_FILES.map(|name| ("--write", dir.join(name)))));
    // A checkpoint folder that cannot be listed is refused where it is opened.
    let files = args.checkpoint.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    inputs.extend(files.map(|f| ("--checkpoint", f.path())));
    match inputs.iter().find(|(_, path)| same_file(path, out)) {
        None => Ok(()),
        Some((flag, path)) => {
            let (out, path) = (out.display(), path.display());
            Err(Error::invalid(format!("--out {out}: it would overwrite {path}, which {flag} names; give it another name")))
        }
    }
}

/// Whether a file can be put at `path`, found out by putting an empty one beside it.
fn check_writable(path: &Path) -> Result<()> {
    let accepted = "accepted: the name of a file in a folder that exists";
    let refused =
        |why: &dyn std::fmt::Display| Error::invalid(format!("--out {}: cannot be written: {why}; {accepted}", path.display()));
    if path.is_dir() {
        return Err(refused(&"it is a folder"));
    }
    let Some(name) = path.file_name() else { return Err(refused(&"it names no file")) };
    if path.metadata().is_ok_and(|m| !m.is_file()) {
        // A finished file is renamed to it, which would put the file in the place of a device or a pipe.
        return Err(refused(&"it is not a regular file"));
    }
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty() && !p.is_dir()) {
        return Err(refused(&format_args!("there is no folder {}", folder.display())));
    }
    let probe = path.with_file_name(format!(".{}.{}.probe", name.to_string_lossy(), std::process::id()));
    File::create_new(&probe).and_then(|_| fs::remove_file(&probe)).map_err(|e| refused(&e))
}

fn given<'a, T>(flag: &str, value: &'a Option<T>) -> Result<&'a T> {
    value.as_ref().ok_or_else(|| Error::invalid(format!("{flag} is missing")))
}

/// Problem and data of --block or --checkpoint.
fn read(args: &RunArgs) -> Result<BlockFile> {
    let (dtype, kv_dtype) = (args.dtype.0, args.kv_dtype.0);
    let tensors = given("--tensors", &args.tensors)?;
    if let Some(block) = &args.block {
        return BlockFile::open(block, tensors, Form { dtype, kv_dtype, weights: args.weights.0.unwrap_or_default() });
    }
    let checkpoint = Checkpoint::open(given("--checkpoint", &args.checkpoint)?)?;
    let layer = *given("--layer", &args.layer)?;
    let (spec, weights) = (checkpoint.block_spec(layer, args.with_norm)?, checkpoint.weights(layer, args.with_norm)?);
    let form = Form { dtype, kv_dtype, weights: args.weights.0.unwrap_or(checkpoint.weight_kind()) };
    BlockFile::with_weights(spec, &weights.as_ref(), &TensorFile::open(tensors)?, form)
}

/// The problem, in the dtypes that are asked for, with random numbers.
fn make(args: &RunArgs, context: &Context, problem: &BlockProblem) -> Result<(BlockProblem, BlockData)> {
    let dtype = args.dtype.0.unwrap_or(problem.dtype);
    // A cache in the problem's compute dtype is one in the compute dtype, whichever that is.
    let own = if problem.kv_dtype == CacheDType::from(problem.dtype) { dtype.into() } else { problem.kv_dtype };
    let kv_dtype = args.kv_dtype.0.unwrap_or(own);
    let weights = args.weights.0.unwrap_or(problem.weights);
    let problem = BlockProblem { dtype, weights, kv_dtype, ..problem.clone() };
    let new = problem.batch.new_tokens();
    if let (Some(rows), Some(_)) = (problem.page_size, &args.write) {
        let text = format!("--write: a block file has no pages, and its cache is contiguous: leave page={rows} away");
        return Err(Error::invalid(text));
    }
    if let Some(other) = new.iter().find(|&&n| n != new[0]) {
        let what = "--problem: a block file needs the same number of new tokens in every sequence";
        return Err(Error::invalid(format!("{what}, got {} and {other}", new[0])));
    }
    problem.validate().map_err(|e| e.at("--problem"))?;
    let memory = machine::memory_bytes().unwrap_or(usize::MAX);
    let check = |needed: f64| {
        let (needs, has) = (output::bytes(needed as usize), output::bytes(memory));
        let text = format!("--problem '{problem}': needs about {needs} of memory, this machine has {has}");
        if needed > memory as f64 { Err(Error::invalid(text)) } else { Ok(()) }
    };
    // First without a plan, which takes long where there are very many sequences.
    let mut needed = data_bytes(&problem);
    check(needed)?;
    if args.out.is_some() && context.gpu().is_none() {
        let (a, batch) = (&problem.spec.attention, &problem.batch);
        let rows = batch.sequences() as f64 * batch.max_len().next_multiple_of(KvCache::ROW_TILE) as f64;
        needed += rows * a.kv_heads as f64 * problem.kv_dtype.row_bytes(a.head_dim);
        check(needed)?;
        needed += context.plan(&problem, args.fusion.0)?.peak_bytes() as f64;
        check(needed)?;
    }
    let data = data_for(&problem, args.seed, Sharpness::Ordinary);
    Ok((problem, data))
}

/// Bytes of a problem's numbers as f32 and, at the same time, as they are stored.
fn data_bytes(problem: &BlockProblem) -> f64 {
    let (a, batch) = (&problem.spec.attention, &problem.batch);
    let (e, sequences) = (problem.spec.hidden_size as f64, batch.sequences() as f64);
    let weights = e * (a.qkv_dim() + a.q_dim()) as f64;
    let rows = sequences * batch.max_len() as f64;
    let mask = problem.mask.map_or(0.0, |m| {
        let masks = if m.per_sequence { sequences } else { 1.0 } * if m.per_head { a.heads as f64 } else { 1.0 };
        masks * (batch.max_new() * batch.max_len()) as f64
    });
    let floats = weights + batch.tokens() as f64 * e + 2.0 * rows * a.kv_dim() as f64;
    floats * (4 + problem.dtype.size()) as f64 + 2.0 * mask
}

/// What one call did.
struct Ran {
    /// Where it was computed.
    on: Place,
    output: BlockOutput,
    plan: std::sync::Arc<BlockPlan>,
    /// Of the whole call.
    seconds: f64,
    /// Of each of the plan's steps.
    step_seconds: Vec<f64>,
    /// Values of y, k and v that are NaN or infinite.
    non_finite: [(&'static str, usize); 3],
}

/// Where a call was computed.
struct Place {
    words: String,
    device: String,
    /// Instruction set, or architecture of a GPU.
    isa: String,
    /// None on a GPU.
    threads: Option<usize>,
    /// Why `--device auto` took the CPU.
    fallback: Option<String>,
}

impl Place {
    fn of(context: &Context) -> Self {
        Place {
            words: args::computes_on(context),
            device: context.device().to_string(),
            isa: context.machine().isa.clone(),
            threads: context.gpu().is_none().then(|| context.threads()),
            fallback: context.fallback().map(str::to_owned),
        }
    }
}

/// Runs whose predicted time is longer say so.
const LONG: f64 = 3.0;

fn compute(context: &Context, problem: &BlockProblem, data: &BlockData, level: Option<Level>, quiet: bool) -> Result<Ran> {
    let mut call = PreparedCall::new(context, problem, data, level)?;
    // NaN, so that an element that no step writes cannot pass for a result.
    let shape = [problem.batch.tokens(), problem.spec.hidden_size];
    let mut y = Tensor::from_f32(&vec![f32::NAN; shape[0] * shape[1]], problem.dtype, &shape)?;
    let block = call.block.clone();
    let predicted = context.plan(problem, level)?.seconds();
    if predicted > LONG && !quiet {
        eprintln!("computing, about {predicted:.0} s predicted; Ctrl-C ends it");
    }
    let start = Instant::now();
    let (plan, step_seconds) = block.forward_timed(call.args(&mut y)?)?;
    let seconds = start.elapsed().as_secs_f64();
    let output = call.output(&y)?;
    let non_finite = [("y", &output.y), ("k", &output.k), ("v", &output.v)];
    let non_finite = non_finite.map(|(name, values)| (name, values.iter().filter(|v| !v.is_finite()).count()));
    Ok(Ran { on: Place::of(context), output, plan, seconds, step_seconds, non_finite })
}

impl Ran {
    fn text(&self, problem: &BlockProblem, out: &Path, replaced: bool) -> String {
        let plan = &self.plan;
        let non_finite = self.non_finite.iter().filter(|(_, n)| *n > 0).map(|(name, n)| match n {
            1 => format!("\n{name} holds 1 value that is not finite"),
            _ => format!("\n{name} holds {n} values that are not finite"),
        });
        let non_finite: String = non_finite.collect();
        format!(
            "{problem}\non {}, level {}, plan {:016x}: {} steps, {} GEMMs, {} launches\n{} for one call; {} of memory predicted \
             beyond weights, cache, x and y{non_finite}\n{} {}",
            self.on.words,
            plan.level,
            plan.id(),
            plan.steps().count(),
            plan.gemms(),
            plan.launches(),
            output::seconds(self.seconds),
            output::bytes(plan.peak_bytes()),
            wrote(replaced),
            out.display()
        )
    }

    fn json(&self, problem: &BlockProblem, out: &Path, replaced: bool) -> Value {
        let steps = self.plan.steps().zip(&self.step_seconds);
        let steps: Vec<_> = steps
            .map(|(s, seconds)| json!({"op": s.op.name_in(&problem.spec), "kernel": s.kernel, "ms": seconds * 1e3}))
            .collect();
        json!({
            "problem": problem.to_string(),
            "device": self.on.device,
            "isa": self.on.isa,
            "threads": self.on.threads,
            "fallback": self.on.fallback,
            "level": self.plan.level.name(),
            "plan": self.plan.to_string(),
            "steps": steps,
            "ms": self.seconds * 1e3,
            "peak_bytes": self.plan.peak_bytes(),
            "non_finite": self.non_finite.iter().map(|(_, n)| n).sum::<usize>(),
            "out": out,
            "out_replaced": replaced,
        })
    }
}
