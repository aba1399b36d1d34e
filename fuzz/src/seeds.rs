//! Writes the good inputs that are not text below the folder in `MILLRACE_FUZZ_CORPUS`: a fuzzer finds the way from
//! there. Those that are text lie under `seeds`. It is itself linked as a target, because all of this workspace is
//! built with coverage.

#![no_main]

#[allow(dead_code)]
#[path = "../../worker/tests/gguf/mod.rs"]
mod gguf;

use std::fs;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use libfuzzer_sys::fuzz_target;
use millrace_engine::import::Gguf;
use serde_json::json;

fuzz_target!(init: write_and_end(), |_input: &[u8]| {});

fn write_and_end() {
    seeds().expect("the seeds are written");
    std::process::exit(0);
}

fn seeds() -> std::io::Result<()> {
    let folder = std::env::var("MILLRACE_FUZZ_CORPUS").expect("MILLRACE_FUZZ_CORPUS names the folder");
    let write = |target: &str, name: &str, bytes: &[u8]| -> std::io::Result<()> {
        let folder = Path::new(&folder).join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), bytes)
    };
    for (family, format) in
        [("llama", GgmlDType::Q4_0), ("qwen2", GgmlDType::Q8_0), ("qwen3", GgmlDType::F16)]
    {
        let file = gguf::Model::new(family, format, 2).bytes();
        let data = Gguf::read(&file[..], file.len() as u64).expect("good").tensors[0].offset as usize;
        write("gguf", family, &file[..data])?;
    }
    write("safetensors", "three", &safetensors())
}

fn safetensors() -> Vec<u8> {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F16", "shape": [0], "data_offsets": [32, 32]},
    });
    let text = header.to_string();
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.bytes());
    bytes.extend(0..32_u8);
    bytes
}
