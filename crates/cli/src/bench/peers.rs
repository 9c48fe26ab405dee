//! Other engines, measured in child processes so that their runs interleave with ours.
//!
//! A peer is a small program under `bench/peers/`. It reads one line with the problem, answers when it is warm, and then makes one
//! timed call for each line `run`; `bench/peers/peer.py` states the conversation. The Python peers are part of this binary; candle's
//! is built by hand in `bench/peers/candle`.

use std::{
    cell::RefCell,
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    rc::Rc,
    str::FromStr,
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::Duration,
};

use lawson_core::{DType, Error, ErrorKind, Result};
use serde_json::{Value, json};

const PROTOCOL: &str = include_str!("../../../../bench/peers/peer.py");
const TORCH: &str = include_str!("../../../../bench/peers/torch_peer.py");
const ORT: &str = include_str!("../../../../bench/peers/ort_peer.py");

/// Loading a framework and compiling a graph with a C++ compiler take this long on a slow machine.
const START: Duration = Duration::from_secs(300);
/// Longest that one call, or writing its result, may take.
const CALL: Duration = Duration::from_secs(120);

/// An engine that `bench` can measure beside Lawson.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerKind {
    /// PyTorch.
    Torch,
    /// ONNX Runtime.
    Ort,
    /// candle.
    Candle,
}

impl PeerKind {
    /// Every peer.
    pub const ALL: [PeerKind; 3] = [PeerKind::Torch, PeerKind::Ort, PeerKind::Candle];

    /// The name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            PeerKind::Torch => "torch",
            PeerKind::Ort => "ort",
            PeerKind::Candle => "candle",
        }
    }

    /// The ways in which the peer computes `study`, best known first; none where it has no such thing.
    pub fn variants(self, study: &str) -> &'static [&'static str] {
        match (self, study) {
            (PeerKind::Torch, "block" | "attention") => &["sdpa", "compiled", "traditional"],
            (PeerKind::Torch, "decode") => &["sdpa", "compiled"],
            (PeerKind::Torch, "qkv") => &["fused", "separate"],
            (PeerKind::Ort, "attention") => &["mha", "attention", "gqa"],
            (PeerKind::Ort, "block" | "decode") => &["gqa"],
            (PeerKind::Ort, "qkv") => &["matmul"],
            (PeerKind::Candle, "block" | "attention") => &["flash", "traditional"],
            (PeerKind::Candle, "decode") => &["flash"],
            (PeerKind::Candle, "qkv") => &["fused"],
            _ => &[],
        }
    }

    /// As [`PeerKind::variants`], on a GPU and for elements of `dtype`: PyTorch's alone, each of its attention kernels by itself.
    pub fn variants_on_gpu(self, study: &str, dtype: DType) -> &'static [&'static str] {
        let wide = dtype == DType::F32;
        match (self, study) {
            (PeerKind::Torch, "block") if wide => &["sdpa-efficient", "compiled", "traditional"],
            (PeerKind::Torch, "block") => &["sdpa-cudnn", "sdpa-flash", "compiled", "traditional"],
            (PeerKind::Torch, "attention") if wide => &["sdpa-efficient", "traditional"],
            (PeerKind::Torch, "attention") => &["sdpa-cudnn", "sdpa-flash", "traditional"],
            (PeerKind::Torch, "decode") if wide => &["sdpa-efficient"],
            (PeerKind::Torch, "decode") => &["sdpa-cudnn", "sdpa-flash"],
            (PeerKind::Torch, "qkv") => &["fused", "separate"],
            (PeerKind::Torch, "softmax") => &["fused", "compiled", "traditional"],
            (PeerKind::Torch, "rope") => &["compiled", "traditional"],
            _ => &[],
        }
    }

    fn install(self) -> &'static str {
        match self {
            PeerKind::Torch => "pip install torch, then point LAWSON_PYTHON at that python",
            PeerKind::Ort => "pip install onnxruntime onnx numpy, then point LAWSON_PYTHON at that python",
            PeerKind::Candle => {
                "cargo build --release --manifest-path bench/peers/candle/Cargo.toml, and elsewhere point LAWSON_CANDLE_PEER at the program"
            }
        }
    }

    fn missing(self, found: &str) -> Error {
        let text = format!("the peer {} is not installed ({found}); to install it: {}", self.name(), self.install());
        Error::new(ErrorKind::Unavailable, text)
    }
}

impl FromStr for PeerKind {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        PeerKind::ALL
            .into_iter()
            .find(|k| k.name() == s)
            .ok_or_else(|| Error::invalid(format!("--peers does not know {s:?}; torch, ort and candle are accepted")))
    }
}

/// What a peer shall compute. Its inputs are tensors of a file that [`write_inputs`] made:
/// attention q [B, H, S, D], k, v [B, G, S, D]; decode q [B, H, 1, D], k, v [B, G, past, D]; qkv x [B, S, E] and
/// `q_proj.weight` … `v_proj.weight`; softmax x [B, H·S, L]; rope x [B, H, S, D]; block those of qkv, `o_proj.weight`, optional biases, and with a past `past_k`, `past_v` [B, G, past, D].
#[derive(Clone, Debug)]
pub struct PeerSpec {
    /// `block`, `attention`, `decode` or `qkv`; on a GPU also `softmax` and `rope`.
    pub study: &'static str,
    /// One of [`PeerKind::variants`].
    pub variant: &'static str,
    /// Sequences, B.
    pub batch: usize,
    /// New tokens of each, S.
    pub seq: usize,
    /// Rows in the cache before the call.
    pub past: usize,
    /// E.
    pub hidden: usize,
    /// H.
    pub heads: usize,
    /// G.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Whether a query sees only rows up to its own.
    pub causal: bool,
    /// Whether the block rotates q and k: half layout, theta 10000, the whole head.
    pub rope: bool,
    /// Compute dtype.
    pub dtype: DType,
    /// Threads.
    pub threads: usize,
    /// `cpu` or `cuda:N`. On a GPU the inputs may hold fewer sequences than the batch, which then repeats them.
    pub device: String,
    /// The file with the inputs.
    pub inputs: PathBuf,
}

/// The last result of a peer: attention and decode [B, H, S, D]; qkv [B, S, (H + 2G)·D]; block [B, S, E].
#[derive(Clone, Debug)]
pub struct PeerOutput {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub data: Vec<f32>,
}

/// A program that computes for one peer, or for several on a GPU. Dropping it ends it.
#[derive(Debug)]
pub struct Process {
    kind: PeerKind,
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
    complaints: Receiver<String>,
    folder: PathBuf,
    /// Whether it still answers.
    alive: bool,
    /// Problems that it was given since it was told to forget them.
    problems: usize,
}

/// A running peer, warm and waiting for [`Peer::time_once`].
#[derive(Debug)]
pub struct Peer {
    process: Rc<RefCell<Process>>,
    /// Which problem of the process it is.
    problem: usize,
    version: String,
}

/// The version of the peer `kind` when it is installed.
///
/// # Errors
/// `Unavailable`, saying how to install it.
pub fn available(kind: PeerKind) -> Result<String> {
    let (mut command, name) = match kind {
        PeerKind::Candle => return candle_program().map(|path| format!("candle ({})", path.display())),
        PeerKind::Torch => (python(), "import torch; print('PyTorch', torch.__version__)"),
        PeerKind::Ort => (python(), "import numpy, onnx, onnxruntime; print('ONNX Runtime', onnxruntime.__version__)"),
    };
    let output =
        command.args(["-c", name]).stdin(Stdio::null()).output().map_err(|e| kind.missing(&format!("{command:?}: {e}")))?;
    let text = |bytes: &[u8]| last_line(&String::from_utf8_lossy(bytes)).to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(kind.missing(&text(&output.stderr))) }
}

impl Peer {
    /// Starts a peer on `spec` and waits until it is warm.
    ///
    /// # Errors
    /// `Unavailable` when the peer is not installed, cannot compute `spec`, or fails; the sentence says which.
    pub fn start(kind: PeerKind, spec: &PeerSpec) -> Result<Peer> {
        let process = Process::start(kind, spec.threads)?;
        Self::join(&Rc::new(RefCell::new(process)), spec)
    }

    /// Gives a process `spec` as its next problem and waits until it is warm.
    ///
    /// # Errors
    /// As [`Peer::start`].
    pub fn join(process: &Rc<RefCell<Process>>, spec: &PeerSpec) -> Result<Peer> {
        let mut p = process.borrow_mut();
        let problem = p.problems;
        p.problems += 1;
        p.send(&problem_line(spec));
        let ready = p.answer(START)?;
        let version = ready["version"].as_str().unwrap_or(p.kind.name()).to_owned();
        Ok(Peer { process: Rc::clone(process), problem, version })
    }

    /// Name and version of the engine.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Makes one call and gives the seconds it took, as the peer measured them.
    ///
    /// # Errors
    /// `Unavailable` when the peer failed, ended or did not answer in time.
    pub fn time_once(&mut self) -> Result<f64> {
        let mut p = self.process.borrow_mut();
        let line = if p.problems == 1 { "run".to_owned() } else { json!({ "run": self.problem }).to_string() };
        p.send(&line);
        let answer = p.answer(CALL)?;
        answer["seconds"].as_f64().ok_or_else(|| p.failed(&format!("it answered {answer} to run")))
    }

    /// The result of the last call; `rows` of it, as wide as a token's or a row's result, where they are given.
    ///
    /// # Errors
    /// `Unavailable` when the peer failed or what it wrote cannot be read.
    pub fn output(&mut self, rows: Option<&[usize]>) -> Result<PeerOutput> {
        let mut p = self.process.borrow_mut();
        let path = p.folder.join("y.safetensors");
        let line = match (rows, p.problems) {
            (None, 1) => json!({ "output": path }),
            _ => json!({ "output": path, "problem": self.problem, "rows": rows }),
        };
        p.send(&line.to_string());
        p.answer(CALL)?;
        let bytes = fs::read(&path).map_err(|e| p.failed(&format!("its output could not be read: {e}")))?;
        parse_y(&bytes).ok_or_else(|| p.failed("its output holds no float32 tensor y"))
    }
}

impl Process {
    /// Starts a peer's program.
    ///
    /// # Errors
    /// `Unavailable` when it is not installed.
    pub fn start(kind: PeerKind, threads: usize) -> Result<Process> {
        if kind == PeerKind::Candle {
            candle_program()?;
        }
        let folder = scratch_folder()?;
        let started = Self::spawn(kind, threads, &folder);
        if started.is_err() {
            // Nothing refers to the folder any more; what cannot be removed the system clears.
            let _ = fs::remove_dir_all(&folder);
        }
        let (child, stdin, answers, complaints) = started?;
        Ok(Process { kind, child, stdin, answers, complaints, folder, alive: true, problems: 0 })
    }

    /// Whether it still answers.
    pub fn alive(&self) -> bool {
        self.alive
    }

    /// Frees what the problems so far took; their peers are of no use afterwards.
    ///
    /// # Errors
    /// `Unavailable` when it failed.
    pub fn forget(&mut self) -> Result<()> {
        self.problems = 0;
        self.send(&json!({ "forget": true }).to_string());
        self.answer(CALL).map(drop)
    }

    fn spawn(kind: PeerKind, threads: usize, folder: &Path) -> Result<(Child, ChildStdin, Receiver<String>, Receiver<String>)> {
        let mut command = match kind {
            PeerKind::Candle => Command::new(candle_program()?),
            PeerKind::Torch | PeerKind::Ort => {
                let script = if kind == PeerKind::Torch { TORCH } else { ORT };
                write_file(&folder.join("peer.py"), PROTOCOL.as_bytes())?;
                write_file(&folder.join("main.py"), script.as_bytes())?;
                let mut command = python();
                command.arg("-B").arg(folder.join("main.py"));
                command
            }
        };
        let threads = threads.to_string();
        for variable in ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"] {
            command.env(variable, &threads);
        }
        // Compile workers would outlive a killed peer.
        command.env("TORCHINDUCTOR_COMPILE_THREADS", "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| kind.missing(&format!("{:?}: {e}", command.get_program())))?;
        let (Some(stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
            return Err(Error::new(ErrorKind::Device, format!("the peer {} started without its pipes", kind.name())));
        };
        Ok((child, stdin, lines(stdout), lines(stderr)))
    }

    fn send(&mut self, line: &str) {
        // A peer that ended has said why; its answer is read next, or found missing.
        let _ = writeln!(self.stdin, "{line}").and_then(|()| self.stdin.flush());
    }

    fn answer(&mut self, limit: Duration) -> Result<Value> {
        let line = match self.answers.recv_timeout(limit) {
            Ok(line) => line,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.alive = false;
                return Err(self.failed(&format!("no answer within {} s", limit.as_secs())));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                self.alive = false;
                // stderr may still be on its way.
                thread::sleep(Duration::from_millis(100));
                let last = self.complaints.try_iter().filter(|l| !l.trim().is_empty()).last();
                return Err(self.failed(last.as_deref().unwrap_or("it ended without a word")));
            }
        };
        let answer: Value =
            serde_json::from_str(&line).map_err(|_| self.failed(&format!("it answered {line:?}, which is not JSON")))?;
        match answer["error"].as_str() {
            Some(e) => Err(self.failed(e)),
            None => Ok(answer),
        }
    }

    fn failed(&self, why: &str) -> Error {
        if why.starts_with("ModuleNotFoundError") || why.starts_with("ImportError") {
            return self.kind.missing(why);
        }
        Error::new(ErrorKind::Unavailable, format!("the peer {}: {why}", self.kind.name()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Each of these may find its object gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Writes float32 tensors, each a name, a shape and its elements, for a peer to read.
///
/// # Errors
/// `Device` when the file cannot be written.
pub fn write_inputs(path: &Path, tensors: &[(&str, &[usize], &[f32])]) -> Result<()> {
    let (mut header, mut offset) = (serde_json::Map::new(), 0);
    for (name, shape, data) in tensors {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "{name} has another number of elements than its shape");
        let end = offset + 4 * data.len();
        header.insert((*name).to_owned(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [offset, end] }));
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let write = || {
        let mut file = std::io::BufWriter::new(fs::File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for value in tensors.iter().flat_map(|t| t.2) {
            file.write_all(&value.to_le_bytes())?;
        }
        file.flush()
    };
    write().map_err(|e| cannot_write(path, &e))
}

fn parse_y(bytes: &[u8]) -> Option<PeerOutput> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (header, data) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let header: Value = serde_json::from_slice(header).ok()?;
    let y = &header["y"];
    let shape: Vec<usize> = y["shape"].as_array()?.iter().map(|n| n.as_u64().map(|n| n as usize)).collect::<Option<_>>()?;
    let (data, rest) = data.as_chunks::<4>();
    let data: Vec<f32> = data.iter().map(|b| f32::from_le_bytes(*b)).collect();
    (y["dtype"] == "F32" && rest.is_empty() && shape.iter().product::<usize>() == data.len())
        .then_some(PeerOutput { shape, data })
}

fn problem_line(spec: &PeerSpec) -> String {
    json!({
        "study": spec.study, "variant": spec.variant, "batch": spec.batch, "seq": spec.seq, "past": spec.past,
        "hidden": spec.hidden, "heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim,
        "causal": spec.causal, "rope": spec.rope, "dtype": spec.dtype.to_string(), "threads": spec.threads, "device": spec.device, "inputs": spec.inputs,
    })
    .to_string()
}

fn python() -> Command {
    Command::new(std::env::var_os("LAWSON_PYTHON").unwrap_or_else(|| "python3".into()))
}

/// Where the variable says, or in a checkout around this program or the current folder.
fn candle_program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("LAWSON_CANDLE_PEER").map(PathBuf::from) {
        let found = format!("LAWSON_CANDLE_PEER is {}, which is no file", path.display());
        return if path.is_file() { Ok(path) } else { Err(PeerKind::Candle.missing(&found)) };
    }
    let program = format!("bench/peers/candle/target/release/lawson-candle-peer{}", std::env::consts::EXE_SUFFIX);
    let starts = [std::env::current_exe().ok(), std::env::current_dir().ok()];
    let found = starts.iter().flatten().flat_map(|p| p.ancestors()).map(|p| p.join(&program)).find(|p| p.is_file());
    found.ok_or_else(|| PeerKind::Candle.missing("its program is not built"))
}

/// A new folder for files that a peer reads or writes; whoever asks removes it.
pub fn scratch_folder() -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("lawson-peer-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let folder = std::env::temp_dir().join(name);
    fs::create_dir_all(&folder).map_err(|e| cannot_write(&folder, &e))?;
    Ok(folder)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|e| cannot_write(path, &e))
}

fn cannot_write(path: &Path, e: &std::io::Error) -> Error {
    Error::new(ErrorKind::Device, format!("{} cannot be written: {e}", path.display()))
}

fn last_line(text: &str) -> &str {
    text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("").trim()
}

/// The lines of a pipe, read by a thread of its own so that waiting for one can end.
fn lines(pipe: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(std::io::Result::ok) {
            if send.send(line).is_err() {
                // Keep draining: a full pipe would block the peer.
                continue;
            }
        }
    });
    receive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_read_back() {
        let folder = scratch_folder().unwrap();
        let path = folder.join("in.safetensors");
        write_inputs(&path, &[("y", &[2, 3], &[1.0, -2.0, 3.5, f32::INFINITY, 0.0, 1e-30])]).unwrap();
        let y = parse_y(&fs::read(&path).unwrap()).unwrap();
        assert_eq!((y.shape, y.data), (vec![2, 3], vec![1.0, -2.0, 3.5, f32::INFINITY, 0.0, 1e-30]));
        assert!(parse_y(b"short").is_none());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn names_parse_back() {
        for kind in PeerKind::ALL {
            assert_eq!(kind.name().parse::<PeerKind>().unwrap(), kind);
        }
        assert!("onnx".parse::<PeerKind>().unwrap_err().to_string().contains("torch, ort and candle"));
    }

    /// Every peer that is installed agrees with attention computed here; one that is not says how to get it.
    #[test]
    fn installed_peers_compute_attention() {
        let (s, h, d) = (5, 2, 4);
        let numbers = |seed: usize| (0..h * s * d).map(|i| ((i * 37 + seed * 11) % 17) as f32 / 8.0 - 1.0).collect::<Vec<f32>>();
        let (q, k, v) = (numbers(1), numbers(2), numbers(3));
        let folder = scratch_folder().unwrap();
        let inputs = folder.join("in.safetensors");
        let shape = [1, h, s, d];
        write_inputs(&inputs, &[("q", &shape, &q), ("k", &shape, &k), ("v", &shape, &v)]).unwrap();
        for kind in PeerKind::ALL {
            let variant = kind.variants("attention")[0];
            let spec = PeerSpec {
                study: "attention",
                variant,
                batch: 1,
                seq: s,
                past: 0,
                hidden: h * d,
                heads: h,
                kv_heads: h,
                head_dim: d,
                causal: true,
                rope: false,
                dtype: DType::F32,
                threads: 1,
                device: "cpu".to_owned(),
                inputs: inputs.clone(),
            };
            let mut peer = match Peer::start(kind, &spec) {
                Ok(peer) => peer,
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
                    assert!(e.to_string().contains("to install it"), "{e}");
                    println!("could not run: {e}");
                    continue;
                }
            };
            assert!(peer.time_once().unwrap() > 0.0);
            let y = peer.output(None).unwrap();
            assert_eq!(y.shape, shape);
            for (row, got) in y.data.chunks(d).enumerate() {
                let (head, i) = (row / s, row % s);
                let weights: Vec<f64> = (0..=i)
                    .map(|j| (0..d).map(|c| f64::from(q[row * d + c]) * f64::from(k[(head * s + j) * d + c])).sum::<f64>())
                    .map(|score| (score / (d as f64).sqrt()).exp())
                    .collect();
                for (c, &got) in got.iter().enumerate() {
                    let weighted: f64 = weights.iter().enumerate().map(|(j, w)| w * f64::from(v[(head * s + j) * d + c])).sum();
                    let error = (f64::from(got) - weighted / weights.iter().sum::<f64>()).abs();
                    assert!(error < 1e-5, "{} row {row} column {c}: {error}", peer.version());
                }
            }
            println!("ran: {}", peer.version());
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
