//! A folder with one safetensors file: every tensor that the header names can be read whole.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace_fuzz::folder_with;
use millrace_engine::model::files::Files;
use millrace_engine::model::source::TensorSource;

fuzz_target!(|data: &[u8]| {
    if let Ok(files) = Files::read(folder_with("model.safetensors", data)) {
        for tensor in ["a", "b", "c"].iter().filter_map(|name| files.tensor(name).ok()) {
            let elements: usize = tensor.shape.iter().product();
            assert_eq!(tensor.data.len(), elements * tensor.dtype.bytes());
            std::hint::black_box(tensor.data.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)));
        }
    }
});
