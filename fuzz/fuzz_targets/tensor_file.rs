//! A safetensors file, each tensor read in every way.
#![no_main]

use lawson::tensor_file::TensorFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = TensorFile::from_bytes("fuzz", bytes.to_vec()) else { return };
    for name in file.names() {
        let shape = file.shape(name).expect("a tensor that is listed has a shape");
        if let Ok(tensor) = file.tensor(name) {
            assert_eq!(tensor.shape(), shape);
            let _ = tensor.as_ref().to_f32();
        }
        let _ = (file.doubles(name), file.integers(name), file.flags(name));
    }
});
