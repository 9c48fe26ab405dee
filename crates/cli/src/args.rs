//! What several commands take.

use std::str::FromStr;

use clap::Args;
use lawson::{CacheDType, Context, ContextOptions, DType, Device, Isa, Level, Result, WeightKind, cuda};

/// What a problem's line is made of, as help texts show it.
pub const PROBLEM_HELP: &str = "\
A problem is the word block and then, each at most once:
  b=1            sequences [default: as many as s= or past= list, where one lists several]
  s=128          new tokens of each sequence, or s=3,5 (explain only)
  past=256       rows in the cache before the call, or past=2,4 [default: 0]
  e=4096         hidden size
  h=32/8         query heads / key-value heads, or h=32 when they are as many
  d=128          head dimension [default: e over the query heads]
  causal | full  whether a token sees only those before it [default: causal]
  window=W scale=X softcap=X sinks alibi
  mask | mask=b | mask=h | mask=bh
                 one mask, or one for each sequence, head or both
  qk_norm=1e-6 input_norm=1e-6 residual
  bias=qkvo      any of the letters q, k, v, o
  rope=half | rope=interleaved
                 then ,theta=10000 ,dim=64 and one scaling, such as ,linear:2
  f32 | bf16 | f16
                 compute dtype [default: f32]
  weights=int8   projections in int8, on a CPU [default: in the compute dtype]
  kv=bf16        dtype of the cache, or kv=int8, kv=int4: quantised, on a CPU
                 [default: the compute dtype]
  page=32 | page=64 | page=128
                 rows of a page of a paged cache, on a GPU
                 [default: contiguous]";

/// Flags of every command.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Every command")]
pub struct Global {
    /// Where to compute: auto (the best of this machine), cpu, cuda or cuda:N
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,
    /// CPU threads [default: as many as the process may use]
    #[arg(long, global = true, value_name = "N", value_parser = threads, allow_negative_numbers = true)]
    pub threads: Option<usize>,
    /// Show no progress on stderr
    #[arg(long, global = true)]
    pub quiet: bool,
    /// Print one JSON document on stdout, and nothing else there
    #[arg(long, global = true)]
    pub json: bool,
}

impl Global {
    /// The context that the flags ask for, on the instruction set of `LAWSON_ISA` or the fastest there is.
    pub fn context(&self) -> Result<Context> {
        self.context_on(None)
    }

    /// As [`Global::context`], on `isa`.
    pub fn context_on(&self, isa: Option<Isa>) -> Result<Context> {
        let context = Context::new(ContextOptions { device: self.device, threads: self.threads, isa })?;
        if let Some(why) = context.fallback()
            && !self.quiet
            && cuda::has_driver()
        {
            // On a machine without a driver the CPU is what anybody expects; `devices` tells of it.
            eprintln!("computing on the CPU, as no GPU can be used: {why}");
        }
        Ok(context)
    }
}

/// What `context` computes on, in words.
pub fn computes_on(context: &Context) -> String {
    match context.gpu() {
        Some(gpu) => format!("{} ({})", context.device(), gpu.device().info().name),
        None => {
            let threads = if context.threads() == 1 { "1 thread".into() } else { format!("{} threads", context.threads()) };
            format!("cpu ({}, {threads})", context.isa())
        }
    }
}

/// Reads a number of threads, whose range is the context's to check.
fn threads(s: &str) -> Result<usize, String> {
    s.parse().map_err(|_| "accepted: 1 to 1024".to_string())
}

/// Reads a whole number.
pub fn whole<T: FromStr>(s: &str) -> Result<T, String> {
    s.parse().map_err(|_| "accepted: whole numbers, 0 or greater".to_string())
}

/// A choice that may be left to the program.
#[derive(Clone, Copy, Debug)]
pub struct Auto<T>(pub Option<T>);

/// Reads `auto` or a level of fusion.
pub fn level(s: &str) -> Result<Auto<Level>, String> {
    let accepted = "accepted: auto, unfused, minimal, moderate, maximal";
    one_of(s).ok_or_else(|| accepted.to_string())
}

/// Reads `auto` or a dtype.
pub fn dtype(s: &str) -> Result<Auto<DType>, String> {
    one_of(s).ok_or_else(|| "accepted: auto, f32, bf16, f16".to_string())
}

/// Reads `auto` or the dtype of a cache.
pub fn kv_dtype(s: &str) -> Result<Auto<CacheDType>, String> {
    one_of(s).ok_or_else(|| planned(s, &["fp8"], "accepted: auto, f32, bf16, f16, int8, int4"))
}

/// Reads `auto` or how weights are held.
pub fn weights(s: &str) -> Result<Auto<WeightKind>, String> {
    one_of(s).ok_or_else(|| "accepted: auto, int8".to_string())
}

fn one_of<T: std::str::FromStr>(s: &str) -> Option<Auto<T>> {
    if s == "auto" { Some(Auto(None)) } else { s.parse().ok().map(|v| Auto(Some(v))) }
}

/// `accepted`, with a word for names that only a later version takes.
fn planned(s: &str, later: &[&str], accepted: &str) -> String {
    if later.contains(&s) { format!("not available in this version; {accepted}") } else { accepted.to_string() }
}
