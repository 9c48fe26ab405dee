//! Plans for a GPU: each step is one pass over all tokens of the call, q, k and v lie side by side in one buffer, and the GEMMs are a
//! library's, whose epilogue holds bias and residual at most.

use lawson_core::{
    DType,
    kernel::KernelOp,
    plan::{BufferName, Op, Operand, Part, Projection, Rejected, TiledAttention},
    problem::Level,
};

use super::{Draft, count};

/// Most new tokens of a sequence whose attention takes the decode kernel, which reads a key once for 16 packed rows of queries.
const DECODE_TOKENS: usize = 8;
/// Rows of queries, heads of a group packed, of a block of the decode kernel.
const DECODE_ROWS: usize = 16;
/// Rows of queries, heads of a group packed, of a block of the prefill kernel, for heads of up to 128 dimensions and for wider ones.
const PREFILL_ROWS: [usize; 2] = [128, 64];
/// Rows of the cache that a part of a split attention has at least.
const LEAST_SPLIT: usize = 128;

fn buffer(name: BufferName) -> Operand {
    Operand::Buffer(name)
}

impl Draft<'_> {
    /// The steps of a level.
    pub(super) fn gpu(&mut self, level: Level) {
        self.begin(None);
        let mixed = self.problem.kv_dtype != self.problem.dtype;
        match level {
            Level::Unfused | Level::Minimal if !mixed => self.gpu_materialised(level),
            _ => self.gpu_tiled(level),
        }
        if mixed && level <= Level::Minimal {
            let why = "the library's products read one dtype, and the cache has another: attention is that of moderate";
            self.rejected.push(Rejected { what: "scores in memory".into(), why: why.into() });
        }
    }

    /// Elements and dtype of a buffer.
    pub(super) fn gpu_elements(&self, name: BufferName) -> (usize, DType) {
        let (a, p) = (&self.problem.spec.attention, self.problem);
        let (t, b) = (self.tokens(), p.batch.sequences());
        let (new, rows) = (p.batch.max_new(), p.batch.max_len());
        let product = |factors: &[usize]| factors.iter().fold(1usize, |n, &f| n.saturating_mul(f));
        match name {
            BufferName::H => (product(&[t, p.spec.hidden_size]), p.dtype),
            BufferName::Qkv => (product(&[t, a.qkv_dim()]), self.gpu_qkv_dtype()),
            BufferName::Q | BufferName::Attention => (product(&[t, a.q_dim()]), p.dtype),
            BufferName::K => (product(&[t, a.kv_dim()]), p.dtype),
            BufferName::QHeads | BufferName::OHeads => (product(&[b, new, a.q_dim()]), p.dtype),
            BufferName::KHeads | BufferName::VHeads => (product(&[b, rows, a.kv_dim()]), p.kv_dtype.rounds_to(p.dtype)),
            BufferName::Scores => (product(&[b, a.heads, new, rows.next_multiple_of(8)]), DType::F32),
            BufferName::Projected => (product(&[t, p.spec.hidden_size]), DType::F32),
            BufferName::Parts => {
                let tiles = self.gpu_tiles();
                let of_rows = match (tiles.split, tiles.shares) {
                    (Some(split), _) => product(&[t, a.heads, rows.div_ceil(split)]),
                    // A share goes on with an item that another block began, and begins one that another goes on with.
                    (_, Some(shares)) if shares > 1 => {
                        let of_group = new * a.group();
                        product(&[2, shares, of_group.div_ceil(DECODE_ROWS), of_group.min(DECODE_ROWS)])
                    }
                    _ => 0,
                };
                // Kernels pad heads, to multiples of 64 at most.
                (product(&[of_rows, a.head_dim.next_multiple_of(64) + 2]), DType::F32)
            }
            _ => (0, DType::F32),
        }
    }

    /// q, k and v are f32 where they are normed or turned after the product, the last pass rounds, and either several passes do so or they
    /// stay in second-level cache, where width costs nothing.
    fn gpu_qkv_dtype(&self) -> DType {
        let (spec, machine) = (&self.problem.spec, self.planner.machine);
        let turned = spec.rope.is_some() || spec.qk_norm.is_some();
        let bytes = (self.tokens() * spec.attention.qkv_dim()).saturating_mul(DType::F32.size());
        let wide = self.level <= Level::Minimal || bytes <= machine.l2_bytes / 2;
        if turned && wide { DType::F32 } else { self.problem.dtype }
    }

    /// Queries of a block; for few queries, how the keys are divided so that no multiprocessor is idle.
    fn gpu_tiles(&self) -> TiledAttention {
        let (a, batch) = (&self.problem.spec.attention, &self.problem.batch);
        let rows = batch.max_new() * a.group();
        if batch.max_new() > DECODE_TOKENS {
            let block = PREFILL_ROWS[usize::from(a.head_dim > 128)];
            return TiledAttention { query_tile: (block / a.group()).max(1), split: None, shares: None };
        }
        let (tiles, multiprocessors) = (rows.div_ceil(DECODE_ROWS), self.planner.machine.threads);
        let (heads, most) = (batch.sequences() * a.kv_heads, batch.max_len().div_ceil(LEAST_SPLIT));
        let p = self.problem;
        if p.dtype != DType::F32 && p.kv_dtype == p.dtype && a.head_dim <= 256 {
            // One block fills a multiprocessor with copies on their way. Shares that begin and end with a head of equal lengths have
            // little to merge, which is worth a few idle multiprocessors.
            let blocks = (multiprocessors / tiles).max(1);
            let even = if heads <= blocks { blocks - blocks % heads } else { heads / heads.div_ceil(blocks) };
            let shares = if even * 16 >= blocks * 15 { even } else { blocks }.min(heads * most);
            return TiledAttention { query_tile: 0, split: None, shares: Some(shares) };
        }
        let blocks = heads * tiles;
        let parts = if blocks >= 4 * multiprocessors { 2 } else { multiprocessors / blocks.max(1) }.clamp(1, most.min(256));
        TiledAttention { query_tile: 0, split: (parts > 1).then(|| batch.max_len().div_ceil(parts)), shares: None }
    }

    fn gpu_projection(&mut self, part: Part, folded: bool, residual: bool, reads: Operand, write: Operand, why: &str) {
        let (a, e) = (&self.problem.spec.attention, self.problem.spec.hidden_size);
        let k = if part == Part::O { a.q_dim() } else { e };
        // The kernel reads 16 bytes at a time.
        let alone = self.level >= Level::Moderate && self.tokens() == 1 && (k * self.problem.dtype.size()).is_multiple_of(16);
        let row_tile = usize::from(alone);
        let why = if alone { &format!("{why}; one row: weights are read while the kernel before still runs") } else { why };
        let p = Projection { part, norm: folded, append: false, residual, row_tile };
        let mut reads = vec![reads, Operand::Weights];
        reads.extend(residual.then_some(Operand::X));
        self.step(Op::Projection(p), KernelOp::Gemm, &reads, &[write], why);
    }

    fn gpu_output(&mut self, fused: bool) {
        let o = buffer(BufferName::Attention);
        let why = self.output_epilogue(fused);
        match (self.problem.spec.residual, fused) {
            (true, true) => self.gpu_projection(Part::O, false, true, o, Operand::Y, &why),
            (true, false) => {
                let projected = buffer(BufferName::Projected);
                self.gpu_projection(Part::O, false, false, o, projected, &why);
                self.step(
                    Op::Residual,
                    KernelOp::Norm,
                    &[projected, Operand::X],
                    &[Operand::Y],
                    "a pass of its own at this level",
                );
            }
            (false, _) => self.gpu_projection(Part::O, false, false, o, Operand::Y, &why),
        }
    }

    fn gpu_materialised(&mut self, level: Level) {
        let spec = &self.problem.spec;
        let x = self.normed_x();
        let qkv = buffer(BufferName::Qkv);
        if level == Level::Unfused {
            for (part, why) in [(Part::Q, "three products, each reads x"), (Part::K, "as q"), (Part::V, "as q")] {
                self.gpu_projection(part, false, false, x, qkv, why);
            }
        } else {
            self.gpu_projection(Part::Qkv, false, false, x, qkv, "one product from concatenated weights");
        }
        // The last pass over q and k rounds them into buffers of their own.
        let turned = [buffer(BufferName::Q), buffer(BufferName::K)];
        let passes = spec.rope.is_some() || spec.qk_norm.is_some();
        if spec.qk_norm.is_some() {
            let writes: &[Operand] = if spec.rope.is_some() { &[qkv] } else { &turned };
            self.step(Op::QkNorm, KernelOp::Norm, &[qkv], writes, "a pass of its own at this level");
        }
        if spec.rope.is_some() {
            self.step(Op::Rope, KernelOp::Rope, &[qkv], &turned, "a pass of its own at this level");
        }
        let (q, k): (Operand, &[Operand]) = if passes { (turned[0], &[turned[1], qkv]) } else { (qkv, &[qkv]) };
        self.step(Op::Append, KernelOp::Rope, k, &[Operand::Cache], "a copy of its own at this level");
        let o = buffer(BufferName::Attention);
        self.gpu_materialised_attention(q, o);
        self.gpu_output(false);
        self.rejected.push(Rejected { what: "tiled attention".into(), why: format!("level {level} keeps the scores in memory") });
    }

    /// Attention of `q` [T, H·D] over the cache into `o`, scores in memory.
    fn gpu_materialised_attention(&mut self, q: Operand, o: Operand) {
        let (a, batch) = (&self.problem.spec.attention, &self.problem.batch);
        let [qs, s, os] = [BufferName::QHeads, BufferName::Scores, BufferName::OHeads].map(buffer);
        let prefill = KernelOp::AttentionPrefill;
        self.step(Op::TransposeQ, prefill, &[q], &[qs], "heads apart, as a batch of products reads them");
        // Rows behind the valid ones may hold anything, also what is no number.
        let uneven = batch.past().iter().any(|&p| p > 0) || batch.new_tokens().iter().any(|&n| n != batch.max_new());
        let paged = self.problem.page_size.is_some();
        let (keys, values) = if uneven || paged {
            let heads = [BufferName::KHeads, BufferName::VHeads].map(buffer);
            let why = if paged {
                "the library's products read contiguous rows: out of the pages, zeros behind the valid rows of each sequence"
            } else {
                "zeros behind the valid rows of each sequence"
            };
            self.step(Op::Gather, prefill, &[Operand::Cache], &heads, why);
            (heads[0], heads[1])
        } else {
            (Operand::Cache, Operand::Cache)
        };
        self.step(Op::Scores, KernelOp::Gemm, &[qs, keys], &[s], "scores of every row, visible or not, through memory");
        self.step(Op::Scale, KernelOp::Softmax, &[s], &[s], "element-wise, in place");
        if a.softcap.is_some() {
            self.step(Op::Softcap, KernelOp::Softmax, &[s], &[s], "element-wise, in place");
        }
        if a.alibi {
            self.step(Op::Alibi, KernelOp::Softmax, &[s], &[s], "element-wise, in place");
        }
        if a.causal || self.problem.mask.is_some() || uneven {
            let reads: &[Operand] = if self.problem.mask.is_some() { &[s, Operand::Mask] } else { &[s] };
            self.step(Op::Mask, KernelOp::Softmax, reads, &[s], "element-wise, in place");
        }
        self.step(Op::Softmax, KernelOp::Softmax, &[s], &[s], "in place, in the one score buffer");
        self.step(Op::WeightedValues, KernelOp::Gemm, &[s, values], &[os], "probabilities of every row");
        self.step(Op::TransposeO, prefill, &[os], &[o], "back to tokens");
    }

    fn gpu_tiled(&mut self, level: Level) {
        let spec = &self.problem.spec;
        let qkv = buffer(BufferName::Qkv);
        let folded = level == Level::Maximal && spec.input_norm.is_some();
        let x = if folded { Operand::X } else { self.normed_x() };
        let why = if folded { "the input norm's weight lies in W" } else { "one product from concatenated weights" };
        self.gpu_projection(Part::Qkv, folded, false, x, qkv, why);
        let reads: &[Operand] = if folded { &[qkv, Operand::X] } else { &[qkv] };
        let q = if self.gpu_qkv_dtype() == self.problem.dtype { qkv } else { buffer(BufferName::Q) };
        let writes = [q, Operand::Cache];
        self.step(Op::HeadEpilogue { norm: folded }, KernelOp::Rope, reads, &writes, "each element is read and written once");
        self.gpu_tiled_attention(q, buffer(BufferName::Attention));
        self.gpu_output(level == Level::Maximal);
        if level == Level::Maximal && spec.input_norm.is_none() && !spec.residual {
            let why = "this block has no norm to fold and no residual to add: the steps are those of moderate";
            self.rejected.push(Rejected { what: "more fusion".into(), why: why.into() });
        }
        self.rejected.push(Rejected { what: "scores in memory".into(), why: "tiled attention moves fewer bytes".into() });
    }

    /// Attention of `q` [T, H·D] over the cache into `o`, in tiles.
    fn gpu_tiled_attention(&mut self, q: Operand, o: Operand) {
        let tiled = self.gpu_tiles();
        let kernel = if tiled.query_tile == 0 { KernelOp::AttentionDecode } else { KernelOp::AttentionPrefill };
        let mut reads = vec![q, Operand::Cache];
        reads.extend(self.problem.mask.map(|_| Operand::Mask));
        let why = match (tiled.query_tile, tiled.split, tiled.shares) {
            (0, Some(s), _) => {
                format!("few queries: keys in parts of {s} rows fill the multiprocessors, and the parts are merged")
            }
            (0, _, Some(n)) if n > 1 => {
                format!("few queries: {n} blocks read even shares of all keys, and the last block of a head merges its parts")
            }
            (0, ..) => "few queries: a key is read once for all heads of its group".to_string(),
            (n, ..) => format!("each tile of keys serves {} of a head; scores stay in registers", count(n, "query", "queries")),
        };
        let parts = buffer(BufferName::Parts);
        let writes: &[Operand] = if self.gpu_elements(BufferName::Parts).0 > 0 { &[parts, o] } else { &[o] };
        self.step(Op::Attention(tiled), kernel, &reads, writes, why);
    }

    /// Attention alone: x is q [T, H·D], the cache has all keys and values, y is the result.
    pub(super) fn gpu_attention(&mut self, level: Level) {
        self.begin(None);
        if level <= Level::Minimal && self.problem.kv_dtype == self.problem.dtype {
            self.gpu_materialised_attention(Operand::X, Operand::Y);
        } else {
            self.gpu_tiled_attention(Operand::X, Operand::Y);
        }
    }
}

#[cfg(test)]
mod tests {
    use lawson_core::{
        ErrorKind,
        kernel::{DeviceKind, MachineProfile},
        problem::BlockProblem,
    };

    use super::*;
    use crate::{Planner, Scratch};

    struct Nothing;

    impl Scratch for Nothing {
        fn gemm(&self, _: &BlockProblem, _: usize) -> usize {
            0
        }
        fn attention(&self, _: &BlockProblem, _: usize) -> usize {
            0
        }
        fn other(&self, _: &BlockProblem) -> usize {
            0
        }
        fn codes(&self, _: usize, _: usize) -> usize {
            0
        }
    }

    fn machine(kind: DeviceKind) -> MachineProfile {
        MachineProfile {
            kind,
            name: "a machine".into(),
            isa: "sm_90a".into(),
            threads: 132,
            l1_bytes: 228 << 10,
            l2_bytes: 50 << 20,
            peak_flops: 6e13,
            bf16_peak_flops: 9e14,
            int8_peak_flops: 1.8e15,
            bandwidth: 3e12,
            launch_seconds: 2e-6,
        }
    }

    #[test]
    fn a_paged_cache_is_gathered_for_products_and_attended_in_place_by_tiles() {
        let machine = machine(DeviceKind::Gpu);
        let planner = Planner { machine: &machine, kernels: &[], scratch: &Nothing };
        for line in [
            "block b=2 s=64 past=0 e=256 h=4/2 d=64 full bf16",
            "block b=2 s=64 past=0 e=256 h=4/2 d=64 causal rope=half bf16",
            "block b=2 s=64 past=100 e=256 h=4/2 d=64 causal rope=half bf16",
            "block b=2 s=1 past=100,7 e=256 h=4/2 d=64 full bf16 kv=f32",
        ] {
            let contiguous: BlockProblem = line.parse().expect("a problem");
            let paged = BlockProblem { page_size: Some(64), ..contiguous.clone() };
            for level in Level::ALL {
                let plan = |p: &BlockProblem| planner.plan(p, level).expect("a plan");
                let ops = |p: &BlockProblem| plan(p).steps().map(|s| s.op).filter(|op| *op != Op::Gather).collect::<Vec<_>>();
                assert_eq!(ops(&paged), ops(&contiguous), "{line} {level}: beside the gather the steps are the same");
                assert_ne!(plan(&paged).id(), plan(&contiguous).id(), "kernels are kept by the plan's number");
                let products = plan(&paged).steps().any(|s| s.op == Op::Scores);
                let gather = plan(&paged).steps().find(|s| s.op == Op::Gather).cloned();
                assert_eq!(gather.is_some(), products, "{line} {level}");
                assert!(gather.is_none_or(|g| g.why.contains("out of the pages")), "{line} {level}");
            }
        }
    }

    #[test]
    fn a_paged_cache_is_a_gpus() {
        let machine = machine(DeviceKind::Cpu);
        let planner = Planner { machine: &machine, kernels: &[], scratch: &Nothing };
        let problem: BlockProblem = "block b=1 s=1 past=9 e=64 h=4 page=32".parse().expect("a problem");
        for refused in [planner.plan(&problem, Level::Moderate).unwrap_err(), planner.auto(&problem).unwrap_err()] {
            assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
        }
    }
}
