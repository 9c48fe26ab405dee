//! `results.json`: what a benchmark run measured, as data. The writer, the report and the tests share these types.

use serde::{Deserialize, Serialize};

/// Stands near the start of every `results.json`.
pub const MARK: &str = "\"lawson\":";

/// One benchmark run: the whole of `results.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Results {
    /// Version of Lawson that measured.
    pub lawson: String,
    /// The machine it ran on.
    pub machine: Machine,
    /// One entry per measurement.
    pub results: Vec<Row>,
}

/// The machine, with its limits as measured in the same run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Processor or device name.
    pub name: String,
    /// Instruction set the kernels used.
    pub isa: String,
    /// Instruction-set features the machine offers.
    pub isa_features: Vec<String>,
    /// Physical cores; multiprocessors of a GPU.
    pub cores: Option<usize>,
    /// Threads the run used.
    pub threads: Option<usize>,
    /// Level-1 data cache per core, shared memory of a multiprocessor, bytes.
    pub l1_bytes: Option<u64>,
    /// Level-2 cache per core, of a whole GPU, bytes.
    pub l2_bytes: Option<u64>,
    /// Level-3 cache, bytes.
    pub l3_bytes: Option<u64>,
    /// Main memory, a GPU's own, bytes.
    pub memory_bytes: Option<u64>,
    /// Measured f32 peak of all threads, GFLOP/s: the greatest of the run.
    pub peak_gflops: Option<f64>,
    /// Measured bf16 peak of all threads, GFLOP/s.
    pub bf16_peak_gflops: Option<f64>,
    /// Measured int8 peak of all threads' vectors, 10⁹ operations a second; none on a GPU.
    pub int8_peak_gops: Option<f64>,
    /// Measured memory bandwidth of all threads, GB/s.
    pub bandwidth_gbps: Option<f64>,
    /// The least f32 peak of the run, GFLOP/s.
    pub peak_gflops_least: Option<f64>,
    /// The least bf16 peak of the run, GFLOP/s.
    pub bf16_peak_gflops_least: Option<f64>,
    /// The least bandwidth of the run, GB/s.
    pub bandwidth_gbps_least: Option<f64>,
    /// Operating system.
    pub os: Option<String>,
    /// Commit the binary was built from.
    pub commit: Option<String>,
    /// Date of the run, ISO 8601.
    pub date: Option<String>,
}

/// One measurement. A field that does not apply to the study is `None` (`null` in JSON).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Row {
    /// `qkv`, `softmax`, `rope`, `attention`, `decode`, `block`, `throughput`, `kernels` or `quality`.
    pub study: String,
    /// `unfused`, `minimal`, `moderate`, `maximal`, or `peer:NAME`.
    pub level: String,
    /// The level whose plan this one shares, where two coincide.
    pub same_as: Option<String>,
    /// Device measured on, such as `cpu`.
    pub device: String,
    /// Compute type.
    pub dtype: String,
    /// Type of the key/value cache.
    pub kv_dtype: Option<String>,
    /// Storage type of the weights.
    pub weights: Option<String>,
    /// Sequences in the batch, B.
    pub batch: Option<usize>,
    /// New tokens per sequence, S.
    pub seq: Option<usize>,
    /// Tokens already in the cache.
    pub past: Option<usize>,
    /// Hidden size, E.
    pub hidden: Option<usize>,
    /// Query heads, H.
    pub heads: Option<usize>,
    /// Key/value heads, G.
    pub kv_heads: Option<usize>,
    /// Width of a head, D.
    pub head_dim: Option<usize>,
    /// Whether a causal mask applied.
    pub causal: Option<bool>,
    /// Threads used.
    pub threads: Option<usize>,
    /// Median time of a call, milliseconds; `None` when it could not run (`note` says why).
    pub median_ms: Option<f64>,
    /// Tenth percentile, milliseconds.
    pub p10_ms: Option<f64>,
    /// Ninetieth percentile, milliseconds.
    pub p90_ms: Option<f64>,
    /// Median time of a call that finds nothing of what it reads in a GPU's second-level cache, milliseconds; the other times are of calls in a
    /// row, which find there what fits.
    pub cold_ms: Option<f64>,
    /// Timed calls.
    pub runs: Option<usize>,
    /// Peak bytes of one cold call above what is resident.
    pub peak_bytes: Option<u64>,
    /// Bytes of y, cache and weights, packed copies included.
    pub resident_bytes: Option<u64>,
    /// Bytes the plan says it reads and writes.
    pub traffic_bytes: Option<u64>,
    /// Floating-point operations of the problem, the same at every level.
    pub flops: Option<u64>,
    /// `flops` / median.
    pub gflops: Option<f64>,
    /// Compulsory bytes / median.
    pub gbps: Option<f64>,
    /// Steps of the plan.
    pub steps: Option<usize>,
    /// Matrix products of the plan.
    pub gemms: Option<usize>,
    /// Kernel launches of the plan.
    pub launches: Option<usize>,
    /// Largest absolute error against the float64 reference.
    pub max_abs_err: Option<f64>,
    /// Relative error (L2) against the float64 reference.
    pub rel_err: Option<f64>,
    /// Unfused median / this median, same run.
    pub speedup: Option<f64>,
    /// Share of the measured limit (peak or bandwidth) that binds, 0 to 1; `None` where it is exceeded, as by data in a cache.
    pub limit_share: Option<f64>,
    /// `kernels`: GFLOP/s as a share of those of plain causal attention of the same type, of the GEMM in bf16 for that with weights in int8, timed in
    /// turn with it.
    pub plain_share: Option<f64>,
    /// `kernels`: median time of a loop of all threads that only reads the same bytes, in turn with the kernel, over the kernel's median;
    /// cache for attention, packed weights and cache for the block.
    pub read_share: Option<f64>,
    /// `kernels`, decode attention: the greater of that loop's time and the time of its operations at the measured f32 peak, over the kernel's
    /// median.
    pub bound_share: Option<f64>,
    /// `kernels`: how many neighbours of this shape were measured, each in turn with it.
    pub neighbours: Option<usize>,
    /// `kernels`: the slowest neighbour's GFLOP/s as a share of this shape's.
    pub neighbours_least: Option<f64>,
    /// `kernels`: the median of the neighbours' shares.
    pub neighbours_median: Option<f64>,
    /// The plan, printed.
    pub plan: Option<String>,
    /// Which form of the study's operation: `alone`, `layer`, `three-pass`, `two-pass half`, `attention causal`, `decode cold` and so on.
    pub variant: Option<String>,
    /// `throughput`: decoded tokens per second over the whole batch.
    pub tokens_per_s: Option<f64>,
    /// `throughput`: sequences that fit in `memory_limit_bytes`.
    pub sequences_fit: Option<u64>,
    /// `throughput`: the memory that `sequences_fit` assumes.
    pub memory_limit_bytes: Option<u64>,
    /// `quality`: mean loss over the text, nats for each predicted token.
    pub mean_loss: Option<f64>,
    /// `quality`: mean loss over that of f32, less 1.
    pub loss_change: Option<f64>,
    /// `quality`: of each layer, ‖attention − attention in f32‖ / ‖attention in f32‖, on the same input.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layer_errors: Vec<f64>,
    /// The plan's steps, one by one.
    pub steps_table: Vec<StepRow>,
    /// Something the reader must know: a batch scaled down, a peer that is not installed.
    pub note: Option<String>,
}

/// One step of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepRow {
    /// What the step computes.
    pub op: String,
    /// The kernel that computes it.
    pub kernel: String,
    /// Measured median, milliseconds.
    pub median_ms: Option<f64>,
    /// The planner's prediction, milliseconds.
    pub predicted_ms: Option<f64>,
    /// Bytes read and written.
    pub bytes: Option<u64>,
    /// Floating-point operations.
    pub flops: Option<u64>,
    /// `flops` / time.
    pub gflops: Option<f64>,
}
