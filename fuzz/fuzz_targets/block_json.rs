//! A block file: the JSON up to the first 0 byte, the safetensors file after it, or a good one when there is none.
#![no_main]

use lawson::{BlockFile, Form, tensor_file::TensorFile};
use libfuzzer_sys::fuzz_target;

/// x [1, 1, 2], four weights of one head of two dimensions, all zero.
fn good() -> Vec<u8> {
    let mut header = String::from("{");
    for (i, (name, shape)) in [
        ("x", "[1,1,2]"),
        ("q_proj.weight", "[2,2]"),
        ("k_proj.weight", "[2,2]"),
        ("v_proj.weight", "[2,2]"),
        ("o_proj.weight", "[2,2]"),
    ]
    .into_iter()
    .enumerate()
    {
        let (start, end) = if i == 0 { (0, 8) } else { (16 * i - 8, 16 * i + 8) };
        let comma = if i == 0 { "" } else { "," };
        header += &format!("{comma}\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}");
    }
    header.push('}');
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 72]].concat()
}

fuzz_target!(|bytes: &[u8]| {
    let (json, tensors) = match bytes.iter().position(|&b| b == 0) {
        Some(end) => (&bytes[..end], bytes[end + 1..].to_vec()),
        None => (bytes, good()),
    };
    let Ok(tensors) = TensorFile::from_bytes("fuzz", tensors) else { return };
    if let Ok(block) = BlockFile::parse(json, &tensors, Form::default()) {
        block.problem().validate().expect("a block that was read is valid");
    }
});
