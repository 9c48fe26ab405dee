//! The `lawson` command: benchmarks, runs, explains and checks attention blocks.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod check;
mod devices;
mod explain;
mod output;
mod quantise;
mod report;
mod run;
mod signals;

use std::{io::Write, process::ExitCode, sync::OnceLock};

use args::Global;
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind as Usage};
use lawson::{Error, ErrorKind, Isa, Result};

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 2;

const AFTER_HELP: &str = "\
Examples:
  lawson bench
  lawson run --problem 'block b=1 s=128 e=512 h=8/2 rope=half' --write case
  lawson run --block case/block.json --tensors case/in.safetensors --out y.safetensors
  lawson explain 'block b=1 s=2048 e=4096 h=32/8 rope=half bf16'

Exit codes: 0 done; 1 the machine or a verification failed; 2 bad usage or bad input; 130 interrupted.
Ctrl-C or SIGTERM ends run and bench quality at once, and other work cleanly at its next step; a second ends the program.
The environment variable LAWSON_ISA forces an instruction set: portable, avx2, avx2_vnni, avx512, avx512_vnni,
avx512_bf16, amx, neon or neon_bf16.";

/// Computes, measures and explains the attention block of transformers at four levels of fusion.
#[derive(Parser)]
#[command(name = "lawson", version = version(), arg_required_else_help = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(Box<bench::BenchArgs>),
    Run(Box<run::RunArgs>),
    Explain(explain::ExplainArgs),
    Devices(devices::DevicesArgs),
    Quantise(quantise::QuantiseArgs),
    Check(check::CheckArgs),
    /// What `bench` runs in a child process
    #[command(name = bench::peak::COMMAND, hide = true)]
    MeasurePeak(bench::peak::MeasureArgs),
}

/// Version, commit and the instruction set in use.
fn version() -> &'static str {
    static VERSION: OnceLock<String> = OnceLock::new();
    VERSION.get_or_init(|| {
        let isa = Isa::choose().map_or_else(|e| e.to_string(), |isa| isa.to_string());
        format!("{} (commit {}, {isa})", env!("CARGO_PKG_VERSION"), env!("LAWSON_COMMIT"))
    })
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    execute(&cli).unwrap_or_else(|e| failed(&e))
}

fn execute(cli: &Cli) -> Result<ExitCode> {
    Isa::choose()?;
    signals::listen()?;
    let global = &cli.global;
    match &cli.command {
        Command::Bench(args) => bench::execute(args, global),
        Command::Run(args) => run::execute(args, global),
        Command::Explain(args) => explain::execute(args, global),
        Command::Devices(args) => devices::execute(args, global),
        Command::Quantise(args) => quantise::execute(args, global),
        Command::Check(args) => check::execute(args, global),
        Command::MeasurePeak(args) => bench::peak::execute(args, global),
    }
}

/// Prints help and version as they are, and what is wrong with the command line as one line.
fn usage(e: &clap::Error) -> ExitCode {
    use Usage::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    if matches!(e.kind(), DisplayHelp | DisplayVersion | DisplayHelpOnMissingArgumentOrSubcommand) {
        // Nobody reads the text when it cannot be written.
        let _ = e.print();
        return if e.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
    }
    let text = e.render().to_string();
    // A negative number is never meant as an argument behind `--`, which is what that tip is about.
    let beside = ["Usage:", "For more", "tip: to pass"];
    let said = text.split("\n\n").map(str::trim).filter(|part| !beside.iter().any(|b| part.starts_with(b)));
    let mut sentences: Vec<String> = said.map(|part| sentence(part.trim_start_matches("tip: "), e.kind())).collect();
    if e.kind() == Usage::InvalidSubcommand {
        let command = Cli::command();
        let names: Vec<_> = command.get_subcommands().filter(|c| !c.is_hide_set()).map(clap::Command::get_name).collect();
        sentences.truncate(1);
        sentences.push(format!("accepted: {}", names.join(", ")));
    }
    eprintln!("{}; see --help", sentences.join("; "));
    ExitCode::from(EXIT_USAGE)
}

/// A paragraph of clap's as one line.
fn sentence(paragraph: &str, kind: Usage) -> String {
    let lines: Vec<String> = paragraph.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    match lines.split_first() {
        Some((first, missing)) if kind == Usage::MissingRequiredArgument && !missing.is_empty() => {
            // Which others are needed depends on the one that is chosen.
            match missing.iter().find(|arg| arg.contains('|')) {
                Some(choice) => {
                    let choices = choice.trim_start_matches('<').replace(">>", ">").replace('|', ", ");
                    format!("error: one of these is needed: {choices}")
                }
                None => format!("{first} {}", missing.join(", ")),
            }
        }
        _ => match lines.join(" ").split_once(" [possible values: ") {
            Some((wrong, values)) => format!("{wrong}; accepted: {}", values.trim_end_matches(']')),
            None => lines.join(" "),
        },
    }
}

fn failed(e: &Error) -> ExitCode {
    // A closed stderr must not change the exit code.
    let _ = writeln!(std::io::stderr(), "error: {}", e.to_string().replace(['\n', '\r'], " "));
    ExitCode::from(match e.kind() {
        ErrorKind::InvalidInput | ErrorKind::Unavailable => EXIT_USAGE,
        ErrorKind::Cancelled => signals::EXIT_INTERRUPTED,
        _ => EXIT_FAILED,
    })
}
