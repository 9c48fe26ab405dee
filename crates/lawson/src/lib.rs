//! Lawson computes the attention block of a transformer at four levels of fusion: norm, QKV projection, RoPE, key/value cache,
//! attention, output projection.
//!
//! A [`Context`] is one device with its threads, workspace and plans. An [`AttentionBlock`] holds packed weights; a [`KvCache`] holds the
//! keys and values of all layers. [`AttentionBlock::forward`] computes one call, at the level of fusion the planner chose or the
//! caller asked for; all levels compute the same function. [`ops`] has the operators alone.
//!
//! Letters: B sequences, S new tokens of a sequence, T new tokens of all, P past rows, L rows of a cache, E hidden size, H query heads,
//! G key/value heads, D head dimension.

mod block;
pub mod block_file;
pub mod checkpoint;
mod compute;
mod context;
mod json;
mod kv_cache;
pub mod ops;
mod pages;
mod tensor;
pub mod tensor_file;
mod weights;

pub use block::{Args, AttentionBlock, AttentionBlockBuilder, CapturedCall, MaskRef};
pub use block_file::{BlockFile, Form};
pub use checkpoint::{Checkpoint, LayerWeights, QuantisedCheckpoint};
pub use compute::{PreparedCall, compute};
pub use context::{Context, ContextOptions, Device};
pub use kv_cache::{Batch, KvCache, LayerCache};
pub use lawson_compiler::{explain, weights_on_gpu};
pub use lawson_core::{
    CacheDType, DType, Error, ErrorKind, Result, TensorMut, TensorRef, WeightKind,
    data::{BlockData, BlockOutput},
    plan::BlockPlan,
    problem::{
        AttentionProblem, AttentionSpec, Biases, BlockProblem, BlockSpec, Lengths, Level, Real, RopeLayout, RopeScaling, RopeSpec,
    },
};
pub use lawson_cpu::{Isa, machine};
pub use lawson_cuda as cuda;
pub use pages::PagePool;
pub use tensor::{DeviceTensor, Tensor};
pub use weights::BlockWeights;
