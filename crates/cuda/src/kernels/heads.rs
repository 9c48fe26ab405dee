//! What follows the QKV projection: `cu/qkv_epilogue.cu`.

use lawson_core::{DType, Error, Result};

use super::{QKV_EPILOGUE, cache::Cache, geometry};
use crate::{Instance, Kernel, KernelParams, Launch, Module};

/// As in the source.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Params {
    pub cache: Cache,
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub q_out: u64,
    pub k_out: u64,
    pub v_out: u64,
    pub x: u64,
    pub rstd: u64,
    pub q_bias: u64,
    pub k_bias: u64,
    pub v_bias: u64,
    pub q_norm: u64,
    pub k_norm: u64,
    pub frequencies: u64,
    pub starts: u64,
    pub past: u64,
    pub q_stride: i64,
    pub k_stride: i64,
    pub v_stride: i64,
    pub q_out_stride: i64,
    pub k_out_stride: i64,
    pub v_out_stride: i64,
    pub sequences: i32,
    pub tokens: i32,
    pub uniform: i32,
    pub q_heads: i32,
    pub k_heads: i32,
    pub v_heads: i32,
    pub head_dim: i32,
    pub rotary_dim: i32,
    pub interleaved: i32,
    pub hidden: i32,
    pub tokens_per_block: i32,
    pub slots_per_block: i32,
    pub input_norm_eps: f32,
    pub qk_norm_eps: f32,
    pub attention_factor: f32,
    /// Up to a multiple of 8 bytes.
    pub padding: i32,
}

// SAFETY: #[repr(C)], the fields of the source's struct in its order; the last is its padding.
unsafe impl KernelParams for Params {}

/// What a pass over heads works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Of what is read.
    pub from: DType,
    /// Of what is written, the cache aside.
    pub to: DType,
    /// Of the cache.
    pub kv: DType,
    /// D.
    pub head_dim: usize,
    /// Dimensions that turn; 0 for no RoPE.
    pub rotary_dim: usize,
    /// Whether dimensions 2d and 2d + 1 turn together.
    pub interleaved: bool,
    /// Heads of a token of q, k and v.
    pub heads: [usize; 3],
    /// New tokens.
    pub tokens: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
}

/// Most heads of one token that a group of lanes takes, and bytes that a lane has on their way: memory is kept busy, registers suffice.
const HEADS: usize = 8;
const LANE_BYTES: usize = 256;
/// Most items of a lane: a GPU reserves a lane's local memory for as many lanes as it can hold.
const MOST_ITEMS: usize = 32;
/// Tokens that count as few.
const FEW_TOKENS: usize = 64;
/// Threads of the largest block.
const THREADS: usize = 128;
/// Most tokens of a block.
const TOKENS: usize = 64;

impl Shape {
    fn vector(&self) -> usize {
        let half = if self.interleaved { self.head_dim } else { self.rotary_dim / 2 };
        geometry::vector(self.to, &[self.head_dim, half])
    }

    /// Lanes of a group, and items of each. Heads of odd sizes, which no model has, all take whole warps: each size is a kernel to compile.
    fn group(&self) -> (usize, usize) {
        let items = self.head_dim.div_ceil(2 * self.vector());
        let least = if self.vector() <= 2 { 32 } else { 8 };
        let group = items.next_power_of_two().clamp(least, 32);
        (group, items.div_ceil(group).next_power_of_two())
    }

    /// Many tokens share the sines of several heads; few spread their heads over all multiprocessors.
    fn heads_of_group(&self) -> usize {
        let (group, items) = self.group();
        if self.vector() <= 2 || self.tokens <= FEW_TOKENS {
            return 1;
        }
        // Groups of a whole warp also sum over more lanes.
        let most = if group == 32 { HEADS / 2 } else { HEADS };
        (most.min(LANE_BYTES / (2 * self.vector() * self.from.size())) / items).max(1)
    }

    /// What is compiled.
    pub fn instance(&self) -> Instance {
        let (group, items) = self.group();
        let mut macros = vec![
            ("DTYPE", geometry::code(self.to)),
            ("QKV_DTYPE", geometry::code(self.from)),
            ("VEC", self.vector() as i64),
            ("GROUP", group as i64),
            ("ITEMS", items as i64),
            ("HEADS", self.heads_of_group() as i64),
        ];
        macros.extend((self.kv != self.to).then_some(("KV_DTYPE", geometry::code(self.kv))));
        Instance::new(&QKV_EPILOGUE, &macros)
    }
}

/// The kernel with its geometry.
#[derive(Clone, Debug)]
pub struct HeadsPass {
    kernel: Kernel<Params>,
    launch: Launch,
    shape: Shape,
    tokens_per_block: usize,
    slots_per_block: usize,
}

impl HeadsPass {
    /// Of `shape`, from its loaded instance.
    ///
    /// # Errors
    /// `InvalidInput` when a head has more dimensions than a group of lanes can hold.
    pub fn new(module: &Module, shape: Shape) -> Result<Self> {
        let (group, items) = shape.group();
        if items > MOST_ITEMS {
            return Err(Error::invalid(format!("heads of {} dimensions are too wide for a GPU", shape.head_dim)));
        }
        let slots = shape.heads.iter().sum::<usize>().div_ceil(shape.heads_of_group()).max(1);
        let groups = THREADS / group;
        let mut slots_per_block = slots.min(groups);
        let mut tokens_per_block = (groups / slots_per_block).clamp(1, TOKENS);
        // Smaller blocks where few would leave multiprocessors idle.
        while shape.tokens.div_ceil(tokens_per_block) * slots.div_ceil(slots_per_block) < shape.multiprocessors
            && (tokens_per_block > 1 || slots_per_block * group > 64)
        {
            if tokens_per_block > 1 {
                tokens_per_block /= 2;
            } else {
                slots_per_block = slots_per_block.div_ceil(2);
            }
        }
        let threads = (tokens_per_block * slots_per_block * group).next_multiple_of(32);
        let grid = [shape.tokens.div_ceil(tokens_per_block) as u32, slots.div_ceil(slots_per_block) as u32, 1];
        let launch = Launch::new(grid, threads as u32).overlapping_previous();
        Ok(HeadsPass { kernel: module.kernel("qkv_epilogue")?, launch, shape, tokens_per_block, slots_per_block })
    }

    /// Enqueues it; what `shape` says is filled in.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn run(&self, params: Params, problem: &dyn std::fmt::Display) -> Result<()> {
        let s = &self.shape;
        let [q_heads, k_heads, v_heads] = s.heads.map(|n| n as i32);
        let params = Params {
            tokens: s.tokens as i32,
            q_heads,
            k_heads,
            v_heads,
            head_dim: s.head_dim as i32,
            rotary_dim: s.rotary_dim as i32,
            interleaved: i32::from(s.interleaved),
            tokens_per_block: self.tokens_per_block as i32,
            slots_per_block: self.slots_per_block as i32,
            ..params
        };
        // SAFETY: the caller's.
        unsafe { self.kernel.launch(&self.launch, &params, problem) }
    }
}
