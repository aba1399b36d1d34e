//! The header of a GGUF file: counts, metadata, and the tensors' places in a file of 1 GiB.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace_engine::import::Gguf;

/// Larger than any input, so that a header alone is a good file.
const FILE_BYTES: u64 = 1 << 30;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = Gguf::read(data, FILE_BYTES) {
        for tensor in &header.tensors {
            let end = tensor.offset.checked_add(tensor.bytes).expect("in 64 bits");
            assert!(end <= FILE_BYTES, "{} ends at {end}", tensor.name);
            let blocks = tensor.elements() / tensor.format.elements() as u64;
            assert_eq!(blocks * tensor.format.bytes() as u64, tensor.bytes);
        }
    }
});
