//! Specifications of attention and of the block.

use std::{f64::consts::LOG2_E, ops::Range};

use super::{Real, RopeSpec};
use crate::{Error, Result};

/// Heads, masking and score rules of attention.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AttentionSpec {
    /// Query heads, H.
    pub heads: usize,
    /// Key/value heads, G; H is a multiple of it. Query head h reads key/value head ⌊h / (H/G)⌋ (GQA, arXiv:2305.13245).
    pub kv_heads: usize,
    /// Dimensions of a head, D.
    pub head_dim: usize,
    /// Whether a query at position i sees rows j ≤ i only.
    pub causal: bool,
    /// Row j is visible iff i − window < j ≤ i; needs `causal`.
    pub window: Option<usize>,
    /// Multiplies QKᵀ; 1/√D when `None`.
    pub scale: Option<Real>,
    /// c·tanh(s/c) after the scale (Gemma 2, arXiv:2408.00118).
    pub softcap: Option<Real>,
    /// One extra logit per head in the softmax denominator, with no value.
    pub sinks: bool,
    /// −slope·(i − j) after the softcap (ALiBi, arXiv:2108.12409).
    pub alibi: bool,
}

impl AttentionSpec {
    /// Causal attention of `heads` query heads over `kv_heads` key/value heads of `head_dim`, nothing else.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            causal: true,
            window: None,
            scale: None,
            softcap: None,
            sinks: false,
            alibi: false,
        }
    }
    /// Columns of q, H·D.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Columns of k or v, G·D.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    /// Columns of q, k and v together, (H + 2G)·D.
    pub fn qkv_dim(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Query heads that share a key/value head, H/G.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
    /// The factor of QKᵀ.
    pub fn scale(&self) -> f64 {
        self.scale.map_or_else(|| 1.0 / (self.head_dim as f64).sqrt(), Real::get)
    }
    /// Rows that the query at `position` may see, of a sequence of `len` rows after the append.
    pub fn visible_range(&self, position: usize, len: usize) -> Range<usize> {
        let end = if self.causal { (position + 1).min(len) } else { len };
        let start = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        start.min(end)..end
    }

    /// Checks every range.
    ///
    /// # Errors
    /// `InvalidInput`, naming the field by its block-file key.
    pub fn validate(&self) -> Result<()> {
        let positive = [("num_attention_heads", self.heads), ("num_key_value_heads", self.kv_heads), ("head_dim", self.head_dim)];
        for (name, v) in positive {
            if v == 0 || v > 1 << 24 {
                return Err(Error::invalid(format!("{name} must be between 1 and 2^24, got {v}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::invalid(format!(
                "num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
                self.heads, self.kv_heads
            )));
        }
        if self.heads.checked_mul(3).and_then(|h| h.checked_mul(self.head_dim)).is_none_or(|n| n > 1 << 31) {
            return Err(Error::invalid(format!("{} heads of {} dimensions are too many", self.heads, self.head_dim)));
        }
        match self.window {
            Some(0) => return Err(Error::invalid("sliding_window must be at least 1, got 0")),
            Some(w) if !self.causal => {
                return Err(Error::invalid(format!("sliding_window ({w}) needs causal attention, but causal is false")));
            }
            _ => {}
        }
        if self.scale.is_some_and(|s| s.get() == 0.0 || !f32_range(s)) {
            return Err(Error::invalid("scale must be finite and not 0, also as f32"));
        }
        if let Some(c) = self.softcap {
            // Kernels multiply by these two in f32.
            let derived = [self.scale() / c.get(), c.get() * LOG2_E];
            if c.get() <= 0.0 || !f32_range(c) || derived.iter().any(|&f| !(f as f32).is_normal()) {
                return Err(Error::invalid(format!("softcap must be > 0 and in the range of f32, scale/softcap too, got {c}")));
            }
        } else if !((self.scale() * LOG2_E) as f32).is_normal() {
            return Err(Error::invalid("scale must stay in the range of f32 when it is multiplied by log2(e)"));
        }
        Ok(())
    }
}

/// Whether a nonzero number stays finite and normal as f32.
fn f32_range(v: Real) -> bool {
    (v.get() as f32).is_normal()
}

/// Which projections have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Biases {
    /// Bias of the query projection.
    pub q: bool,
    /// Bias of the key projection.
    pub k: bool,
    /// Bias of the value projection.
    pub v: bool,
    /// Bias of the output projection.
    pub o: bool,
}

/// The attention block: everything about it but its numbers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockSpec {
    /// Width of x and y, E.
    pub hidden_size: usize,
    /// Heads, masking and score rules.
    pub attention: AttentionSpec,
    /// eps of the RMSNorm over D on new q and k after the bias, before RoPE.
    pub qk_norm: Option<Real>,
    /// eps of the RMSNorm of x over E (arXiv:1910.07467).
    pub input_norm: Option<Real>,
    /// Whether y += x.
    pub residual: bool,
    /// Rotary position embedding of q and k.
    pub rope: Option<RopeSpec>,
    /// Which projections have a bias.
    pub biases: Biases,
}

impl BlockSpec {
    /// A block around `attention` without norms, RoPE, biases or residual.
    pub fn new(hidden_size: usize, attention: AttentionSpec) -> Self {
        BlockSpec {
            hidden_size,
            attention,
            qk_norm: None,
            input_norm: None,
            residual: false,
            rope: None,
            biases: Biases::default(),
        }
    }

    /// Checks every range.
    ///
    /// # Errors
    /// `InvalidInput`, naming the field by its block-file key.
    pub fn validate(&self) -> Result<()> {
        if self.hidden_size == 0 || self.hidden_size > 1 << 24 {
            return Err(Error::invalid(format!("hidden_size must be between 1 and 2^24, got {}", self.hidden_size)));
        }
        self.attention.validate()?;
        for (name, eps) in [("qk_norm.eps", self.qk_norm), ("input_norm.eps", self.input_norm)] {
            if eps.is_some_and(|e| e.get() < 0.0) {
                return Err(Error::invalid(format!("{name} must be at least 0")));
            }
        }
        self.rope.as_ref().map_or(Ok(()), |r| r.validate(self.attention.head_dim))
    }
}
