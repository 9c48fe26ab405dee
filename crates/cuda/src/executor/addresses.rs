//! One call: the addresses that each step's kernels and products take.

use lawson_core::{
    DType, Result,
    plan::{BlockPlan, BufferName, Op, Operand as PlanOperand, Part, Projection},
};

use super::{
    Operands, missing,
    ready::{Ready, Sizes},
};
use crate::{
    DeviceBuffer,
    blas::{Matmul, Operands as Matrices},
    kernels::{
        attention, heads,
        rows::{ScoreOp, ScoresParams, SoftmaxParams, TransposeParams},
    },
};

/// The addresses of one call.
pub(super) struct Run<'a> {
    pub plan: &'a BlockPlan,
    pub operands: &'a Operands<'a>,
    pub sizes: Sizes<'a>,
    pub workspace: u64,
    pub counters: u64,
    pub starts: u64,
    pub past: u64,
    pub frequencies: u64,
}

impl Run<'_> {
    fn buffer(&self, name: BufferName) -> Result<u64> {
        let buffer = self.plan.buffer(name).ok_or_else(|| missing(name.name()))?;
        Ok(self.workspace + buffer.offset as u64)
    }

    /// Queries and the elements from a token to the next: x where the plan is attention alone.
    fn queries(&self) -> Result<(u64, usize)> {
        let a = &self.plan.problem.spec.attention;
        if self.plan.buffer(BufferName::Q).is_some() {
            return Ok((self.buffer(BufferName::Q)?, a.q_dim()));
        }
        match self.plan.buffer(BufferName::Qkv) {
            Some(_) => Ok((self.buffer(BufferName::Qkv)?, a.qkv_dim())),
            None => Ok((self.operands.x, a.q_dim())),
        }
    }

    /// Where attention's result goes: y where the plan is attention alone.
    fn attended(&self) -> Result<u64> {
        match self.plan.buffer(BufferName::Attention) {
            Some(_) => self.buffer(BufferName::Attention),
            None => Ok(self.operands.y),
        }
    }

    fn optional(&self, b: &Option<DeviceBuffer>) -> u64 {
        b.as_ref().map_or(0, DeviceBuffer::ptr)
    }

    /// Enqueues one step.
    pub unsafe fn step(&self, op: &Op, writes: &[PlanOperand], ready: &Ready) -> Result<()> {
        let (o, p, s) = (self.operands, &self.plan.problem, &self.sizes);
        let a = &p.spec.attention;
        // SAFETY: for each launch, the caller's: the addresses are of this call's operands and of the plan's buffers, with the planned shapes.
        unsafe {
            match (op, ready) {
                (Op::InputNorm, Ready::Norm(norm)) => {
                    let eps = p.spec.input_norm.map_or(0.0, |e| e.get());
                    norm.run(o.x, self.optional(&o.weights.input_norm), eps, self.buffer(BufferName::H)?, p)
                }
                (Op::Projection(projection), Ready::Product(product)) => {
                    product.run(&self.projection(projection, product.matmul(), writes)?)
                }
                (Op::Projection(projection), Ready::OneRow(product)) => {
                    product.run(&self.projection(projection, product.matmul(), writes)?, p)
                }
                (Op::QkNorm | Op::Rope | Op::Append | Op::HeadEpilogue { .. }, Ready::Heads(passes)) => {
                    passes.iter().enumerate().try_for_each(|(i, pass)| pass.run(self.heads(op, i)?, p))
                }
                (Op::TransposeQ | Op::TransposeO | Op::Gather, Ready::Copy(copy)) => copy.run(&self.copy(op)?, p),
                (Op::Scores, Ready::Product(product)) => {
                    let keys = if s.gathers { self.buffer(BufferName::KHeads)? } else { o.cache.k };
                    product.run(&Matrices::new(self.buffer(BufferName::QHeads)?, keys, self.buffer(BufferName::Scores)?))
                }
                (Op::WeightedValues, Ready::Product(product)) => {
                    let values = if s.gathers { self.buffer(BufferName::VHeads)? } else { o.cache.v };
                    product.run(&Matrices::new(self.buffer(BufferName::Scores)?, values, self.buffer(BufferName::OHeads)?))
                }
                (_, Ready::Scores(op, scores)) => scores.run(&self.scores(*op)?, p),
                (Op::Softmax, Ready::Softmax(softmax)) => {
                    let scores = self.buffer(BufferName::Scores)?;
                    let params = SoftmaxParams {
                        x: scores,
                        y: scores,
                        sinks: self.optional(&o.weights.sinks),
                        x_stride: s.scores_stride as i64,
                        y_stride: (s.scores_stride * 4 / s.dtype().size()) as i64,
                        rows: s.score_rows() as i32,
                        width: s.columns as i32,
                        plane_rows: s.new as i32,
                        heads: a.heads as i32,
                    };
                    softmax.run(&params, p)
                }
                (Op::Attention(_), Ready::Attention(attention)) => attention.run(&self.attention()?, p),
                (Op::Residual, Ready::Residual(residual)) => residual.run(self.buffer(BufferName::Projected)?, o.x, o.y, p),
                (other, _) => Err(missing(other.name())),
            }
        }
    }

    fn projection(&self, p: &Projection, matmul: &Matmul, writes: &[PlanOperand]) -> Result<Matrices> {
        let (o, spec) = (self.operands, &self.plan.problem.spec);
        let w = o.weights;
        let (first, _) = self.sizes.columns(p.part);
        let size = matmul.dtype.size() as u64;
        let (a, b) = if p.part == Part::O {
            (self.buffer(BufferName::Attention)?, w.o.ptr())
        } else {
            let weights = if p.norm { w.folded.as_ref().ok_or_else(|| missing("folded weights"))? } else { &w.qkv };
            let normed = spec.input_norm.is_some() && !p.norm;
            let x = if normed { self.buffer(BufferName::H)? } else { o.x };
            (x, weights.ptr() + (first * spec.hidden_size) as u64 * size)
        };
        let d = match writes {
            [PlanOperand::Buffer(name)] => self.buffer(*name)?,
            _ => o.y,
        } + (first * matmul.out.size()) as u64;
        let bias = if p.part == Part::O { &w.o_bias } else { &w.qkv_bias };
        let bias = bias.as_ref().map_or(0, |b| {
            let b = if matmul.out == DType::F32 { &b.f32 } else { &b.narrow };
            b.ptr() + (first * matmul.out.size()) as u64
        });
        let c = if p.residual { o.x } else { 0 };
        Ok(Matrices { a, b, bias: if matmul.bias { bias } else { 0 }, c, d, scale: 1.0 })
    }

    /// What pass `i` of a step over heads reads and writes.
    fn heads(&self, op: &Op, i: usize) -> Result<heads::Params> {
        let (o, spec, s) = (self.operands, &self.plan.problem.spec, &self.sizes);
        let (a, w) = (&spec.attention, o.weights);
        let (q_dim, kv_dim) = (a.q_dim(), a.kv_dim());
        let qkv = self.buffer(BufferName::Qkv)?;
        let size = s.buffer_dtype(BufferName::Qkv).size() as u64;
        let stride = a.qkv_dim() as i64;
        let (k, v) = (qkv + q_dim as u64 * size, qkv + (q_dim + kv_dim) as u64 * size);
        let turned = self.plan.buffer(BufferName::Q).is_some();
        let (norm, rope, append) = match op {
            Op::QkNorm => (true, false, false),
            Op::Rope => (false, true, false),
            Op::Append => (false, false, true),
            _ => (true, true, true),
        };
        let mut params = heads::Params {
            q: qkv,
            k,
            v,
            q_out: qkv,
            k_out: k,
            starts: self.starts,
            past: self.past,
            q_stride: stride,
            k_stride: stride,
            v_stride: stride,
            q_out_stride: stride,
            k_out_stride: stride,
            sequences: s.sequences as i32,
            uniform: if o.new.iter().all(|&n| n == s.new) { s.new as i32 } else { 0 },
            ..heads::Params::default()
        };
        // The last pass before the append rounds q and k into buffers of their own.
        if turned && (rope || spec.rope.is_none()) && !append {
            params.q_out = self.buffer(BufferName::Q)?;
            params.k_out = self.buffer(BufferName::K)?;
            (params.q_out_stride, params.k_out_stride) = (q_dim as i64, kv_dim as i64);
        }
        if matches!(op, Op::HeadEpilogue { .. }) && turned {
            params.q_out = self.buffer(BufferName::Q)?;
            params.q_out_stride = q_dim as i64;
        }
        if append {
            params.cache = o.cache;
            (params.k_out, params.v_out) = (0, 0);
            if turned && i == 0 && matches!(op, Op::Append) {
                params.k = self.buffer(BufferName::K)?;
                params.k_stride = kv_dim as i64;
            }
        }
        if norm && let Some(eps) = spec.qk_norm {
            (params.q_norm, params.k_norm) = (self.optional(&w.q_norm), self.optional(&w.k_norm));
            params.qk_norm_eps = eps.get() as f32;
        }
        if rope && let Some(f) = o.frequencies {
            params.frequencies = self.frequencies;
            params.attention_factor = f.attention_factor as f32;
        }
        if let Op::HeadEpilogue { norm } = op {
            if let Some(bias) = &w.qkv_bias {
                let at = |first: usize| bias.f32.ptr() + 4 * first as u64;
                (params.q_bias, params.k_bias, params.v_bias) = (at(0), at(q_dim), at(q_dim + kv_dim));
            }
            if *norm {
                params.x = o.x;
                params.hidden = spec.hidden_size as i32;
                params.input_norm_eps = spec.input_norm.map_or(0.0, |e| e.get()) as f32;
            }
        }
        Ok(params)
    }

    fn copy(&self, op: &Op) -> Result<TransposeParams> {
        let (p, s) = (&self.plan.problem, &self.sizes);
        let (a, gathers) = (&p.spec.attention, *op == Op::Gather);
        let dtype = if gathers { s.kv_dtype() } else { p.dtype };
        let size = dtype.size();
        let mut params = TransposeParams {
            starts: self.starts,
            past: self.past,
            sequences: s.sequences as i32,
            heads: if gathers { a.kv_heads } else { a.heads } as i32,
            rows: if gathers { s.rows } else { s.new } as i32,
            row_bytes: (a.head_dim * size) as i32,
            element_size: size as i32,
            token_stride: (a.q_dim() * size) as i64,
            ..TransposeParams::default()
        };
        match op {
            Op::Gather => {
                params.cache = self.operands.cache;
                (params.k, params.v) = (self.buffer(BufferName::KHeads)?, self.buffer(BufferName::VHeads)?);
            }
            Op::TransposeQ => {
                let (q, stride) = self.queries()?;
                (params.x, params.token_stride) = (q, (stride * size) as i64);
                params.y = self.buffer(BufferName::QHeads)?;
            }
            _ => (params.x, params.y) = (self.buffer(BufferName::OHeads)?, self.attended()?),
        }
        Ok(params)
    }

    fn scores(&self, op: ScoreOp) -> Result<ScoresParams> {
        let (o, s) = (self.operands, &self.sizes);
        let a = &self.plan.problem.spec.attention;
        let mask = o.mask.unwrap_or_default();
        Ok(ScoresParams {
            scores: self.buffer(BufferName::Scores)?,
            slopes: self.optional(&o.weights.alibi_slopes),
            mask: mask.address,
            starts: self.starts,
            past: self.past,
            row_stride: s.scores_stride as i64,
            mask_sequence_stride: mask.sequence_stride,
            mask_head_stride: mask.head_stride,
            mask_row_stride: mask.row_stride,
            heads: a.heads as i32,
            seq: s.new as i32,
            columns: s.columns as i32,
            operations: op as i32,
            causal: i32::from(a.causal),
            window: a.window.map_or(0, |w| i32::try_from(w).unwrap_or(i32::MAX / 2)),
            scale: a.scale() as f32,
            softcap: a.softcap.map_or(0.0, |c| c.get() as f32),
        })
    }

    fn attention(&self) -> Result<attention::Call> {
        let (o, a) = (self.operands, &self.plan.problem.spec.attention);
        let mask = o.mask.unwrap_or_default();
        let (q, q_stride) = self.queries()?;
        Ok(attention::Call {
            cache: o.cache,
            q,
            q_stride: q_stride as i64,
            out: self.attended()?,
            out_stride: a.q_dim() as i64,
            lse: o.lse,
            starts: self.starts,
            past: self.past,
            sinks: self.optional(&o.weights.sinks),
            slopes: self.optional(&o.weights.alibi_slopes),
            mask: mask.address,
            mask_sequence_stride: mask.sequence_stride,
            mask_head_stride: mask.head_stride,
            mask_row_stride: mask.row_stride,
            parts: if self.plan.buffer(BufferName::Parts).is_some() { self.buffer(BufferName::Parts)? } else { 0 },
            counters: self.counters,
        })
    }
}
