//! Attention: `cu/attention_prefill.cu` (on Hopper `cu/attention_prefill_sm90.cu`) and `cu/attention_decode.cu` on tensor cores, `cu/attention_f32.cu`
//! for f32 and whatever those do not take.

use std::{
    collections::HashMap,
    fmt::Display,
    sync::{Mutex, PoisonError},
};

use lawson_core::{DType, Error, Result, problem::AttentionSpec};

use super::{ATTENTION_DECODE, ATTENTION_F32, ATTENTION_PREFILL, ATTENTION_PREFILL_SM90, cache::Cache, geometry};
use crate::{
    Device, DeviceInfo, Instance, Kernel, KernelParams, Launch, Module,
    launch::{Swizzle, TensorMap},
};

/// Addresses and strides of one call. Strides are in elements.
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    /// The cache.
    pub cache: Cache,
    /// Queries; token t, head h at t·q_stride + h·D.
    pub q: u64,
    /// From a token to the next in q.
    pub q_stride: i64,
    /// Results, as q.
    pub out: u64,
    /// From a token to the next in `out`.
    pub out_stride: i64,
    /// Log-sum-exp, [T, H], or 0; the prefill kernels write it only for shapes whose scores have features.
    pub lse: u64,
    /// First token of each sequence, [B + 1].
    pub starts: u64,
    /// Past rows of each sequence, `[B]`.
    pub past: u64,
    /// `[H]` or 0.
    pub sinks: u64,
    /// `[H]` or 0.
    pub slopes: u64,
    /// Visible where nonzero, or 0.
    pub mask: u64,
    /// From a sequence's mask to the next.
    pub mask_sequence_stride: i64,
    /// From a head's mask to the next.
    pub mask_head_stride: i64,
    /// From a query's mask to the next.
    pub mask_row_stride: i64,
    /// Partial results, where keys are split or shared.
    pub parts: u64,
    /// Zeros, one for each (sequence, tile of rows, key/value head), where keys are shared; zeros again afterwards.
    pub counters: u64,
}

/// What attention works on.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Heads, masking and score rules.
    pub spec: AttentionSpec,
    /// Of q and the result.
    pub dtype: DType,
    /// Of the cache.
    pub kv_dtype: DType,
    /// Whether the cache lies in pages.
    pub paged: bool,
    /// Whether a copy engine can read the cache: its strides are multiples of 16 bytes.
    pub copied: bool,
    /// Sequences.
    pub sequences: usize,
    /// New tokens of all sequences.
    pub tokens: usize,
    /// Most new tokens of a sequence.
    pub new: usize,
    /// Most rows of a sequence.
    pub rows: usize,
    /// Whether there is an arbitrary mask.
    pub mask: bool,
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
    /// Whether the decode kernel is asked for.
    pub decode: bool,
    /// Parts that keys are split into in f32, at least 1.
    pub splits: usize,
    /// Blocks of the decode kernel that share the keys of all sequences and heads for one tile of rows, at least 1.
    pub shares: usize,
}

/// Parameters of `attention_prefill`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PrefillParams {
    pub q: u64,
    pub out: u64,
    pub lse: u64,
    pub starts: u64,
    pub past: u64,
    pub sinks: u64,
    pub slopes: u64,
    pub mask: u64,
    pub q_stride: i64,
    pub out_stride: i64,
    pub mask_sequence_stride: i64,
    pub mask_head_stride: i64,
    pub mask_row_stride: i64,
    pub cache: Cache,
    pub scale: f32,
    pub softcap: f32,
    pub batch: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub causal: i32,
    pub window: i32,
    pub section: i32,
    pub tiles: i32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order, without padding.
unsafe impl KernelParams for PrefillParams {}

/// Parameters of `attention_prefill_sm90`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperParams {
    pub k_map: TensorMap,
    pub v_map: TensorMap,
    pub call: PrefillParams,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order; the kernel reads no padding, which is at the end.
unsafe impl KernelParams for HopperParams {}

/// Parameters of `attention_decode`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DecodeParams {
    pub q: u64,
    pub out: u64,
    pub lse: u64,
    pub parts: u64,
    pub states: u64,
    pub counters: u64,
    pub starts: u64,
    pub past: u64,
    pub sinks: u64,
    pub slopes: u64,
    pub mask: u64,
    pub q_stride: i64,
    pub out_stride: i64,
    pub mask_sequence_stride: i64,
    pub mask_head_stride: i64,
    pub mask_row_stride: i64,
    pub cache: Cache,
    pub scale: f32,
    pub softcap: f32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub sequences: i32,
    pub causal: i32,
    pub window: i32,
    pub part_rows: i32,
    pub reserved: i32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order, without padding.
unsafe impl KernelParams for DecodeParams {}

/// Parameters of `attention_decode` where the copy engine brings keys and values.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CopiedDecodeParams {
    pub k_map: TensorMap,
    pub v_map: TensorMap,
    pub call: DecodeParams,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order; the kernel reads no padding, which is at the end.
unsafe impl KernelParams for CopiedDecodeParams {}

/// Parameters of `attention_f32` and `attention_f32_merge`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct F32Params {
    pub cache: Cache,
    pub q: u64,
    pub out: u64,
    pub lse: u64,
    pub sinks: u64,
    pub slopes: u64,
    pub mask: u64,
    pub starts: u64,
    pub past: u64,
    pub partial: u64,
    pub q_stride: i64,
    pub out_stride: i64,
    pub mask_sequence_stride: i64,
    pub mask_head_stride: i64,
    pub mask_row_stride: i64,
    pub sequences: i32,
    pub tokens: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub splits: i32,
    pub causal: i32,
    pub window: i32,
    pub aligned: i32,
    pub scale: f32,
    pub softcap: f32,
    /// Up to a multiple of 8 bytes.
    pub padding: i32,
}
// SAFETY: #[repr(C)], the fields of the source's struct in its order; the last is its padding.
unsafe impl KernelParams for F32Params {}

/// Dimensions of a head that the tensor-core kernels are compiled for; others take the next.
const PADDED: [usize; 7] = [32, 64, 80, 96, 128, 192, 256];
/// Rows of queries of a block of the decode kernel.
const DECODE_ROWS: usize = 16;
/// Keys that a warp of the decode kernel takes at a time: `STEP` of the source.
const DECODE_STEP: usize = 16;
/// Tensor maps that are kept, of as many caches.
const MOST_MAPS: usize = 256;
/// Compute capability of the GPUs with warpgroup products.
const HOPPER: (u32, u32) = (9, 0);
/// From which on GPUs have a copy engine.
const COPY_ENGINE: (u32, u32) = (9, 0);
/// Shared memory of a block that the sources' own tiles are made for; less asks for fewer stages.
const HOPPER_SHARED: u32 = 227 * 1024;

impl Shape {
    /// Whether tensor cores take it.
    fn fits_tensor_cores(&self) -> bool {
        self.dtype != DType::F32 && self.dtype == self.kv_dtype && self.spec.head_dim <= 256
    }

    fn padded(&self) -> usize {
        PADDED.into_iter().find(|&d| d >= self.spec.head_dim).unwrap_or(256)
    }

    /// Whether scores take more than a positive scale.
    fn score_rules(&self) -> bool {
        self.spec.softcap.is_some() || self.spec.alibi || self.mask || self.spec.scale() < 0.0
    }

    /// As the prefill kernels are compiled: what has no rules to apply does not write the log-sum-exp either.
    fn score_features(&self) -> bool {
        self.score_rules() || self.lse
    }

    fn row_tiles(&self) -> usize {
        (self.new * self.spec.group()).div_ceil(DECODE_ROWS)
    }

    /// Counters that a call of the decode kernel needs.
    pub fn counters(&self) -> usize {
        self.sequences * self.row_tiles() * self.spec.kv_heads
    }

    fn tile_rows(&self) -> usize {
        let rows = self.new * self.spec.group();
        let most = if self.spec.head_dim > 128 { 32 } else { 64 };
        if rows <= 16 { 16 } else { most.min(rows.next_power_of_two()) }
    }

    /// What is compiled.
    pub fn instance(&self, info: &DeviceInfo) -> Instance {
        self.instance_for(info.compute_capability, info.shared_memory_per_block)
    }

    /// The same where a block can have `shared` bytes of shared memory.
    pub(super) fn instance_for(&self, capability: (u32, u32), shared: u32) -> Instance {
        if !self.fits_tensor_cores() {
            let chunked = self.spec.head_dim > 256;
            let padded = if chunked { 256 } else { self.f32_padded() };
            let macros = [
                ("DTYPE", geometry::code(self.dtype)),
                ("KV_DTYPE", geometry::code(self.kv_dtype)),
                ("HEAD_DIM_PADDED", padded as i64),
                ("TILE_M", self.tile_rows() as i64),
                ("CHUNKED", i64::from(chunked)),
            ];
            return Instance::new(&ATTENTION_F32, &macros);
        }
        let macros = |padded: usize, features: bool| {
            let dtype = geometry::code(self.dtype);
            vec![("DTYPE", dtype), ("HEAD_DIM_PADDED", padded as i64), ("SCORE_FEATURES", i64::from(features))]
        };
        if let Some(own) = self.decode_tiles(capability, shared).filter(|_| self.decode) {
            let mut macros = macros(own.padded, self.score_rules());
            macros.extend([("WARPS", own.warps as i64), ("STAGES", own.stages as i64), ("COPY_ENGINE", i64::from(own.copied))]);
            return Instance::new(&ATTENTION_DECODE, &macros);
        }
        let mut macros = macros(self.padded(), self.score_features());
        if self.hopper_tiles(capability).is_some() {
            return Instance::new(&ATTENTION_PREFILL_SM90, &macros);
        }
        macros.push(("PAGED", i64::from(self.paged)));
        let (own, usual) = (self.prefill_tiles(shared), self.prefill_tiles(HOPPER_SHARED));
        macros.extend((usual.keys != own.keys).then_some(("KEYS", own.keys as i64)));
        macros.extend((usual.stages != own.stages).then_some(("STAGES", own.stages as i64)));
        Instance::new(&ATTENTION_PREFILL, &macros)
    }

    fn f32_padded(&self) -> usize {
        [32, 64, 128, 192].into_iter().find(|&d| d >= self.spec.head_dim).unwrap_or(256)
    }

    /// Tiles of the decode kernel where a block can have `shared` bytes; none where two stages do not fit: the prefill kernel takes few queries
    /// too.
    fn decode_tiles(&self, capability: (u32, u32), shared: u32) -> Option<DecodeTiles> {
        // The engine's boxes have 64 columns; what it cannot copy is rare beside it and shares the paddings.
        let engine = capability >= COPY_ENGINE;
        let (p, copied) = (if engine { self.spec.head_dim.next_multiple_of(64) } else { self.padded() }, engine && self.copied);
        let most = shared.min(HOPPER_SHARED) as usize;
        // K and V of a step of a warp; what warps merge; queries that have no room in registers, and what the layout is aligned by.
        let step = if copied { 4 * DECODE_STEP * p + 16 } else { 4 * DECODE_STEP * (p + 8) };
        let merging = 16 * (p + 8) + 128;
        let rest = 128 + if p > 128 { 2 * DECODE_ROWS * p } else { 0 } + if copied { 1024 } else { 0 };
        let of = |warps: usize| {
            let stages = (most.saturating_sub(warps * merging + rest) / (warps * step)).min(8);
            (stages >= 2).then_some(DecodeTiles {
                padded: p,
                warps,
                stages,
                copied,
                shared: warps * (stages * step + merging) + rest,
            })
        };
        if p <= 128 { of(8).or_else(|| of(4)) } else { of(4) }
    }

    /// Tiles of the kernel for Hopper, if it takes the shape there.
    fn hopper_tiles(&self, capability: (u32, u32)) -> Option<HopperTiles> {
        let p = self.padded();
        let (rows, keys) = match p {
            64 if self.score_features() => (192, 64),
            64 => (192, 128),
            128 => (128, 128),
            256 => (128, 64),
            _ => return None,
        };
        let shared = 2 * p * (rows + 4 * keys) + 64 + 1024;
        let takes = capability == HOPPER && self.copied && self.spec.head_dim.is_multiple_of(8);
        takes.then_some(HopperTiles { rows, keys, shared })
    }

    /// Tiles of the prefill kernel where a block can have `shared` bytes: two stages where two such blocks fit a multiprocessor.
    fn prefill_tiles(&self, shared: u32) -> PrefillTiles {
        let (p, features) = (self.padded(), self.score_features());
        let rows = if p <= 128 { 128 } else { 64 };
        let usual = match p {
            ..=64 if !features => 128,
            97..=128 if features => 32,
            _ => 64,
        };
        let bytes = |keys: usize, stages: usize| 2 * (p + 8) * (rows + 2 * stages * keys) + 8 * rows + 64;
        let stages = if p <= 96 && 2 * bytes(usual, 2) <= shared as usize { 2 } else { 1 };
        let keys = if bytes(usual, stages) <= shared as usize { usual } else { usual / 2 };
        PrefillTiles { rows, keys, stages, shared: bytes(keys, stages) }
    }
}

/// What a block of the kernel for Hopper holds.
#[derive(Clone, Copy, Debug)]
struct HopperTiles {
    rows: usize,
    keys: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

/// What a block of the decode kernel holds.
#[derive(Clone, Copy, Debug)]
struct DecodeTiles {
    /// Dimensions of a head that the kernel is compiled for.
    padded: usize,
    warps: usize,
    stages: usize,
    /// Whether the copy engine brings keys and values.
    copied: bool,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

/// What a block of the prefill kernel holds.
#[derive(Clone, Copy)]
struct PrefillTiles {
    rows: usize,
    keys: usize,
    stages: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

/// Keys that a query sees, 0 for all.
fn window(a: &AttentionSpec) -> i32 {
    a.window.map_or(0, |w| i32::try_from(w).unwrap_or(i32::MAX / 2))
}

/// The kernel that a shape takes, with its geometry.
#[derive(Debug)]
pub struct Attention {
    kind: Kind,
    shape: Shape,
    section: usize,
    /// Of the caches of earlier calls, one for each layer of a model: the driver takes its time to make them.
    maps: Mutex<HashMap<Cache, (TensorMap, TensorMap)>>,
}

#[derive(Debug)]
enum Kind {
    Prefill(Kernel<PrefillParams>, Launch, usize),
    Hopper(Kernel<HopperParams>, Launch, HopperTiles),
    Decode(Kernel<DecodeParams>, Launch, DecodeTiles),
    CopiedDecode(Kernel<CopiedDecodeParams>, Launch, DecodeTiles),
    F32 { kernel: Kernel<F32Params>, launch: Launch, merge: Option<Kernel<F32Params>> },
}

impl Attention {
    /// Of `shape`, from its loaded instance.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn new(module: &Module, shape: Shape, info: &DeviceInfo) -> Result<Self> {
        let a = &shape.spec;
        let (rows, pairs, d) = (shape.new * a.group(), shape.sequences * a.kv_heads, a.head_dim);
        let kind = if !shape.fits_tensor_cores() {
            let chunked = d > 256;
            let (m, width) = (shape.tile_rows(), if chunked { 256 } else { shape.f32_padded() });
            let q_buffers = if chunked { 2 } else { 1 };
            let shared = 4 * (q_buffers * m * (if chunked { 32 } else { width } + 4) + 2 * 64 * 36 + 2 * 16 * width + m * 68);
            let chunks = if chunked { d.div_ceil(256) } else { 1 };
            let grid = [(rows.div_ceil(m) * shape.splits) as u32, a.kv_heads as u32, (shape.sequences * chunks) as u32];
            let launch = Launch::new(grid, 256).shared(shared as u32).overlapping_previous();
            let merge = if shape.splits > 1 { Some(module.kernel("attention_f32_merge")?) } else { None };
            Kind::F32 { kernel: module.kernel("attention_f32")?, launch, merge }
        } else if let Some(tiles) =
            shape.decode_tiles(info.compute_capability, info.shared_memory_per_block).filter(|_| shape.decode)
        {
            let grid = [shape.shares as u32, shape.row_tiles() as u32, 1];
            let launch = Launch::new(grid, 32 * tiles.warps as u32).shared(tiles.shared as u32).overlapping_previous();
            if tiles.copied {
                Kind::CopiedDecode(module.kernel("attention_decode")?, launch, tiles)
            } else {
                Kind::Decode(module.kernel("attention_decode")?, launch, tiles)
            }
        } else if let Some(tiles) = shape.hopper_tiles(info.compute_capability) {
            let blocks = (rows.div_ceil(tiles.rows) * pairs).min(info.multiprocessors as usize);
            let threads = 128 * (1 + tiles.rows / 64);
            let launch = Launch::new([blocks as u32, 1, 1], threads as u32).shared(tiles.shared as u32).overlapping_previous();
            Kind::Hopper(module.kernel("attention_prefill_sm90")?, launch, tiles)
        } else {
            let tiles = shape.prefill_tiles(info.shared_memory_per_block);
            let grid = [(rows.div_ceil(tiles.rows) * pairs) as u32, 1, 1];
            let launch = Launch::new(grid, 128).shared(tiles.shared as u32).overlapping_previous();
            Kind::Prefill(module.kernel("attention_prefill")?, launch, tiles.rows)
        };
        // So many pairs of sequence and head run side by side that their K and V stay in half of the second-level cache.
        let section = (info.l2_bytes as usize / 2 / (4 * d * shape.rows).max(1)).clamp(1, pairs.max(1));
        Ok(Attention { kind, shape, section, maps: Mutex::default() })
    }

    fn prefill_params(&self, c: &Call, rows: usize) -> PrefillParams {
        let (s, a) = (&self.shape, &self.shape.spec);
        PrefillParams {
            q: c.q,
            out: c.out,
            lse: c.lse,
            starts: c.starts,
            past: c.past,
            sinks: c.sinks,
            slopes: c.slopes,
            mask: c.mask,
            q_stride: c.q_stride,
            out_stride: c.out_stride,
            mask_sequence_stride: c.mask_sequence_stride,
            mask_head_stride: c.mask_head_stride,
            mask_row_stride: c.mask_row_stride,
            cache: c.cache,
            scale: a.scale() as f32,
            softcap: a.softcap.map_or(0.0, |c| c.get() as f32),
            batch: s.sequences as i32,
            heads: a.heads as i32,
            kv_heads: a.kv_heads as i32,
            head_dim: a.head_dim as i32,
            causal: i32::from(a.causal),
            window: window(a),
            section: self.section as i32,
            tiles: (s.new * a.group()).div_ceil(rows) as i32,
        }
    }

    fn decode_params(&self, c: &Call, tiles: &DecodeTiles) -> DecodeParams {
        let (s, a) = (&self.shape, &self.shape.spec);
        let (part_rows, shared) = ((s.new * a.group()).min(DECODE_ROWS), s.shares > 1);
        let states = c.parts + (2 * s.shares * s.row_tiles() * part_rows * tiles.padded * 4) as u64;
        DecodeParams {
            q: c.q,
            out: c.out,
            lse: c.lse,
            parts: if shared { c.parts } else { 0 },
            states: if shared { states } else { 0 },
            counters: if shared { c.counters } else { 0 },
            starts: c.starts,
            past: c.past,
            sinks: c.sinks,
            slopes: c.slopes,
            mask: c.mask,
            q_stride: c.q_stride,
            out_stride: c.out_stride,
            mask_sequence_stride: c.mask_sequence_stride,
            mask_head_stride: c.mask_head_stride,
            mask_row_stride: c.mask_row_stride,
            cache: c.cache,
            scale: a.scale() as f32,
            softcap: a.softcap.map_or(0.0, |c| c.get() as f32),
            heads: a.heads as i32,
            kv_heads: a.kv_heads as i32,
            head_dim: a.head_dim as i32,
            sequences: s.sequences as i32,
            causal: i32::from(a.causal),
            window: window(a),
            part_rows: part_rows as i32,
            reserved: 0,
        }
    }

    /// Keys and values as the copy engine sees them, in boxes of at most `keys` rows.
    fn cache_maps(&self, c: &Call, keys: usize, device: &Device) -> Result<(TensorMap, TensorMap)> {
        let (s, a, cache) = (&self.shape, &self.shape.spec, &c.cache);
        // Sequences of one pool have tables of their own and the same maps.
        let key = Cache { table: u64::from(cache.table != 0), table_stride: 0, ..*cache };
        let mut made = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&maps) = made.get(&key) {
            return Ok(maps);
        }
        // Of a page, or those of a head that lie in memory: a box that reaches behind them gets 0.
        let rows = cache.page.max(1);
        let outer = if cache.table == 0 { s.sequences as u64 } else { i32::MAX as u64 };
        let dims = [a.head_dim as u64, rows as u64, a.kv_heads as u64, outer];
        let strides = [cache.row_stride, cache.head_stride, cache.sequence_stride].map(|s| 2 * s as u64);
        let tile = [64, if cache.table == 0 { keys } else { keys.min(rows as usize) } as u32, 1, 1];
        let map = |base| TensorMap::tiled(device, s.kv_dtype, base, &dims, &strides, &tile, Swizzle::B128);
        let maps = (map(cache.k)?, map(cache.v)?);
        if made.len() == MOST_MAPS {
            made.clear();
        }
        made.insert(key, maps);
        Ok(maps)
    }

    /// Launches of one call.
    pub fn launches(&self) -> usize {
        1 + usize::from(matches!(self.kind, Kind::F32 { merge: Some(_), .. }))
    }

    /// Enqueues it.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// The addresses are of memory of the planned shapes and dtypes, as [`Kernel::launch`] demands.
    pub unsafe fn run(&self, c: &Call, problem: &dyn Display) -> Result<()> {
        let (s, a) = (&self.shape, &self.shape.spec);
        let scale = a.scale() as f32;
        let softcap = a.softcap.map_or(0.0, |c| c.get() as f32);
        let window = window(a);
        let (heads, kv_heads, head_dim, causal) = (a.heads as i32, a.kv_heads as i32, a.head_dim as i32, i32::from(a.causal));
        match &self.kind {
            Kind::Prefill(kernel, launch, rows) => {
                // SAFETY: the caller's.
                unsafe { kernel.launch(launch, &self.prefill_params(c, *rows), problem) }
            }
            Kind::Hopper(kernel, launch, tiles) => {
                if [c.q, c.out].iter().any(|p| p % 16 != 0) || [c.q_stride, c.out_stride].iter().any(|s| s % 8 != 0) {
                    return Err(Error::invalid("attention on this GPU: queries and results must be aligned to 16 bytes"));
                }
                let (k_map, v_map) = self.cache_maps(c, tiles.keys, kernel.function().device())?;
                let params = HopperParams { k_map, v_map, call: self.prefill_params(c, tiles.rows) };
                // SAFETY: the caller's.
                unsafe { kernel.launch(launch, &params, problem) }
            }
            Kind::Decode(kernel, launch, tiles) => {
                // SAFETY: the caller's.
                unsafe { kernel.launch(launch, &self.decode_params(c, tiles), problem) }
            }
            Kind::CopiedDecode(kernel, launch, tiles) => {
                let (k_map, v_map) = self.cache_maps(c, DECODE_STEP, kernel.function().device())?;
                let params = CopiedDecodeParams { k_map, v_map, call: self.decode_params(c, tiles) };
                // SAFETY: the caller's.
                unsafe { kernel.launch(launch, &params, problem) }
            }
            Kind::F32 { kernel, launch, merge } => {
                let strides = [c.q_stride, c.out_stride, c.cache.sequence_stride, c.cache.head_stride, c.cache.row_stride];
                let addresses = [c.q, c.out, c.cache.k, c.cache.v];
                let even = strides.iter().all(|s| s % 8 == 0) && a.head_dim.is_multiple_of(8);
                let params = F32Params {
                    cache: c.cache,
                    q: c.q,
                    out: c.out,
                    lse: c.lse,
                    sinks: c.sinks,
                    slopes: c.slopes,
                    mask: c.mask,
                    starts: c.starts,
                    past: c.past,
                    partial: c.parts,
                    q_stride: c.q_stride,
                    out_stride: c.out_stride,
                    mask_sequence_stride: c.mask_sequence_stride,
                    mask_head_stride: c.mask_head_stride,
                    mask_row_stride: c.mask_row_stride,
                    sequences: s.sequences as i32,
                    tokens: s.tokens as i32,
                    heads,
                    kv_heads,
                    head_dim,
                    splits: s.splits as i32,
                    causal,
                    window,
                    aligned: i32::from(even && addresses.iter().all(|p| p % 16 == 0)),
                    scale,
                    softcap,
                    padding: 0,
                };
                // SAFETY: the caller's.
                unsafe { kernel.launch(launch, &params, problem)? };
                let Some(merge) = merge else { return Ok(()) };
                let launch = Launch::new([(s.tokens * a.heads) as u32, 1, 1], 128).overlapping_previous();
                // SAFETY: the caller's.
                unsafe { merge.launch(&launch, &params, problem) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_every_gpu() {
        for (shared, copied) in [99 * 1024, 163 * 1024, 227 * 1024].into_iter().flat_map(|s| [(s, false), (s, true)]) {
            for head_dim in 1..=256 {
                for softcap in [None, lawson_core::problem::Real::new(1.0)] {
                    let spec = AttentionSpec { softcap, ..AttentionSpec::new(1, 1, head_dim) };
                    let shape = Shape {
                        spec,
                        dtype: DType::BF16,
                        kv_dtype: DType::BF16,
                        paged: false,
                        copied,
                        sequences: 1,
                        tokens: 1,
                        new: 1,
                        rows: 1,
                        mask: false,
                        lse: false,
                        decode: true,
                        splits: 1,
                        shares: 1,
                    };
                    let tiles = shape.prefill_tiles(shared);
                    assert!(tiles.shared <= shared as usize, "{head_dim}: {} of {shared}", tiles.shared);
                    for capability in [(8, 0), COPY_ENGINE] {
                        let tiles = shape.decode_tiles(capability, shared);
                        assert!(tiles.is_none_or(|t| t.shared <= shared as usize), "{head_dim} of {shared}");
                    }
                }
            }
        }
    }
}
