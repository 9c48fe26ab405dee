//! The studies: each measures one configuration and gives its rows, one per form and peer.

mod attention;
mod block;
mod block_gpu;
mod kernels;
pub mod operators_gpu;
mod qkv;
pub mod quality;
mod rope;
mod softmax;
mod throughput;

use lawson::Result;

use super::{
    record::Row,
    session::Session,
    specs::{Case, Study},
};

/// Seed of every configuration's inputs.
const SEED: u64 = 1;

/// Measures `case`.
///
/// # Errors
/// `Cancelled` when Ctrl-C was pressed; else what the first failing call reports. A wrong result is none: its row says so.
pub fn run(session: &Session, case: &Case) -> Result<Vec<Row>> {
    let gpu = session.context.gpu().is_some();
    match case.study {
        Study::Qkv if gpu && case.variant == Some("alone") => operators_gpu::qkv(session, case),
        Study::Softmax if gpu => operators_gpu::softmax(session, case),
        Study::Rope if gpu => operators_gpu::rope(session, case),
        Study::Attention | Study::Decode if gpu => operators_gpu::attention(session, case),
        Study::Block => block::run(session, case),
        Study::Qkv if case.variant == Some("layer") => block::run(session, case),
        Study::Qkv => qkv::run(session, case),
        Study::Softmax => softmax::run(session, case),
        Study::Rope => rope::run(session, case),
        Study::Attention => attention::run(session, case),
        Study::Decode => attention::decode(session, case),
        Study::Throughput => throughput::run(session, case),
        Study::Kernels => kernels::run(session, case),
        // It has no shapes of its own, but a model's.
        Study::All | Study::Quality => Ok(Vec::new()),
    }
}
