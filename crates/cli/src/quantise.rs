//! `lawson quantise`: writes a checkpoint with its attention projections in int8.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use lawson::{Checkpoint, Device, Error, ErrorKind, Result};
use serde_json::json;

use crate::{args::Global, output};

const AFTER_HELP: &str = "\
The projections q, k, v and o of every layer become codes of 8 bits with one scale for each output; all other tensors and
the files beside them are copied, and lawson.json says what was done. `run --checkpoint OUT` computes the same bits as
`run --checkpoint DIR --weights int8`.

Examples:
  lawson quantise Llama-3.2-1B Llama-3.2-1B-int8
  lawson run --checkpoint Llama-3.2-1B-int8 --layer 3 --tensors x.safetensors --out y.safetensors";

/// Write a checkpoint with its attention projections in int8
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct QuantiseArgs {
    /// A Hugging Face checkpoint folder (Llama, Mistral, Qwen2, Qwen3)
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The folder to write: new, or empty
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// `InvalidInput`, naming folder, file or tensor: nothing is written then; `Unavailable` for a GPU; `OutOfMemory`; `Device` when a disk fails.
pub fn execute(args: &QuantiseArgs, global: &Global) -> Result<ExitCode> {
    if matches!(global.device, Device::Cuda(_)) {
        let text = format!("--device {}: quantise computes on the CPU; accepted: auto, cpu", global.device);
        return Err(Error::new(ErrorKind::Unavailable, text));
    }
    let checkpoint = Checkpoint::open(&args.dir)?;
    let done = checkpoint.quantise(&args.out)?;
    if global.json {
        output::print_json(&json!({
            "from": args.dir,
            "out": args.out,
            "layers": checkpoint.layers(),
            "matrices": done.matrices,
            "bytes_before": done.bytes_before,
            "bytes_after": done.bytes_after,
        }))?;
    } else {
        let (before, after) = (output::bytes(done.bytes_before), output::bytes(done.bytes_after));
        let (layers, matrices, out) = (checkpoint.layers(), done.matrices, args.out.display());
        output::print(format!("{matrices} matrices of {layers} layers: {before} became {after}\nwrote {out}"))?;
    }
    Ok(ExitCode::SUCCESS)
}
