//! A quantised cache in host memory.
//!
//! Keys of the group behind a sequence's last whole one lie in a half of its tail, as f32. A call leaves them there and writes the keys of a
//! later group to the other half, so that it can be repeated until it is committed; codes of groups behind the valid rows are free for it. A
//! commit that passes into another group changes the halves; one that stops before a group which the call has finished, and a truncation into
//! a finished group, give back its rows from their codes.

use lawson_core::{
    Error, Result,
    quantised::{Codes, GROUP},
};
use lawson_cpu::{arena::AlignedBytes, kernels::codes::CodeRows};

/// Codes, scales and tails of all layers.
pub(super) struct CodeCache {
    memory: AlignedBytes,
    codes: Codes,
    /// G, D and the rows of a sequence.
    shape: [usize; 3],
    /// Where the parts of a layer start, and its bytes.
    starts: [usize; 7],
    /// Which half of its tail each sequence's unfinished group lies in.
    halves: Vec<usize>,
    /// Rows of each sequence that the last call has left in each layer, [layers, B].
    written: Vec<usize>,
}

impl CodeCache {
    /// An empty one of `layers` layers and `sequences` sequences; `shape` is G, D and the rows of a sequence.
    ///
    /// # Errors
    /// `InvalidInput` when it is too large to address, `OutOfMemory`.
    pub fn new(codes: Codes, layers: usize, sequences: usize, shape: [usize; 3]) -> Result<Self> {
        let starts = CodeRows::layout(codes, sequences, shape[0], shape[1], shape[2]);
        let bytes = starts.and_then(|starts| starts[6].checked_mul(layers)).filter(|&n| n <= isize::MAX as usize);
        let (Some(starts), Some(bytes)) = (starts, bytes) else {
            let [_, _, rows] = shape;
            return Err(Error::invalid(format!("{layers} layers of {sequences} sequences and {rows} rows are too large")));
        };
        let (memory, halves, written) = (AlignedBytes::new(bytes)?, vec![0; sequences], vec![0; layers * sequences]);
        Ok(CodeCache { memory, codes, shape, starts, halves, written })
    }

    pub fn memory(&self) -> &AlignedBytes {
        &self.memory
    }
    pub fn codes(&self) -> Codes {
        self.codes
    }

    /// Where kernels find a layer; `lengths` are the valid rows of each sequence, and stay where they are meanwhile.
    pub fn rows(&self, layer: usize, lengths: &[usize]) -> CodeRows {
        let memory = self.memory.as_ptr().wrapping_add(layer * self.starts[6]);
        CodeRows::new(self.codes, self.shape, memory, &self.starts, [self.halves.as_ptr(), lengths.as_ptr()])
    }

    /// Rows of sequence `b` in `layer` as one finds them who reads `rows` of them: those of a call that was not committed count where they are
    /// asked for.
    pub fn len(&self, layer: usize, b: usize, rows: usize, lengths: &[usize]) -> usize {
        if rows <= lengths[b] { lengths[b] } else { self.written[layer * lengths.len() + b] }
    }

    /// Notes that a call has written rows up to `ends` of each sequence in `layer`.
    pub fn wrote(&mut self, layer: usize, ends: impl Iterator<Item = usize>) {
        self.written[layer * self.halves.len()..].iter_mut().zip(ends).for_each(|(written, end)| *written = end);
    }

    /// Sets the valid rows of sequence `b` to `len`: more, up to what calls have written, or fewer.
    pub fn set_len(&mut self, b: usize, len: usize, lengths: &mut [usize]) {
        let (old, sequences) = (std::mem::replace(&mut lengths[b], len), lengths.len());
        let moves = old / GROUP != len / GROUP;
        if moves && len > old {
            self.halves[b] ^= 1;
        }
        for layer in 0..self.written.len() / sequences {
            let written = std::mem::replace(&mut self.written[layer * sequences + b], len);
            // What it has of that group is codes: the rows themselves were overwritten.
            if moves && written.max(old) / GROUP > len / GROUP {
                let rows = self.rows(layer, lengths);
                // SAFETY: the rows are the cache's, and `self` is borrowed mutably.
                (0..rows.kv_heads).for_each(|head| unsafe { rows.reopen(b, head, len) });
            }
        }
    }

    /// Replaces sequence `b` of `layer` by `rows` rows of `k` and `v` [G, rows, D], which then are the valid ones of every layer.
    pub fn import(&mut self, layer: usize, b: usize, rows: usize, [k, v]: [&[f32]; 2], lengths: &mut [usize]) {
        self.set_len(b, rows, lengths);
        let (to, d) = (self.rows(layer, lengths), self.shape[1]);
        for (i, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            // SAFETY: k and v are rows of D elements, the places are the cache's, rows come in their order, and `self` is borrowed mutably.
            unsafe {
                to.append_key(b, i / rows, i % rows, k.as_ptr());
                to.append_values(b, i / rows, i % rows, v.as_ptr());
            }
        }
    }
}
