//! Tensor files in memory and folders to write in.

use std::{collections::BTreeMap, path::PathBuf};

use lawson::tensor_file::StoredDType;
use lawson_core::{Error, ErrorKind};

/// Dtype, shape and bytes of each tensor.
pub type Tensors = BTreeMap<String, (StoredDType, Vec<usize>, Vec<u8>)>;

/// Adds an f32 tensor whose elements count up.
pub fn f32s(tensors: &mut Tensors, name: &str, shape: &[usize]) {
    let n: usize = shape.iter().product();
    let bytes = (0..n).flat_map(|i| (i as f32 * 0.25 - 1.0).to_le_bytes()).collect();
    tensors.insert(name.to_owned(), (StoredDType::F32, shape.to_vec(), bytes));
}

/// The safetensors file of `tensors`, its header padded by `pad` spaces.
pub fn pack(tensors: &Tensors, pad: usize) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = serde_json::json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
        data.extend_from_slice(bytes);
    }
    let mut text = serde_json::Value::Object(header).to_string();
    text.extend(std::iter::repeat_n(' ', (8 - text.len() % 8) % 8 + pad));
    with_header(&text, &data)
}

/// The file of a header and data, right or wrong.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// An empty folder for the test `name`.
pub fn folder(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Asserts that `result` is `InvalidInput` and that its message holds every one of `parts`.
#[track_caller]
pub fn refused<T>(result: Result<T, Error>, parts: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("accepted, but must be refused naming {parts:?}"));
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
    }
}
