//! What the attention block computes, what the right answer is, and the plain data in which plans are written.
//!
//! Nothing here touches a device or a file. Letters used throughout: B batch, S new tokens of a sequence, T new tokens of all
//! sequences, P past rows, L rows of a cache, E hidden size, H query heads, G key/value heads, D head dimension.
#![forbid(unsafe_code)]

pub mod compare;
pub mod data;
mod dtype;
mod error;
pub mod int8;
pub mod kernel;
pub mod oracle;
pub mod plan;
pub mod problem;
pub mod quantised;
pub mod softmax_state;
mod view;

pub use dtype::{DType, round_to};
pub use error::{Error, ErrorKind, Result};
pub use int8::WeightKind;
pub use quantised::CacheDType;
pub use view::{DeviceElements, DeviceElementsMut, Storage, StorageMut, TensorMut, TensorRef};
