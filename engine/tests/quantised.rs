//! Every quantised format against the package that owns it: files that the package wrote, and what it makes of them.
//!
//! The files are made by `golden/quantised/make.py`, which `scripts/oracle-weights` runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::files::Files;
use millrace_engine::model::source::TensorSource;
use serde_json::{Value, json};

const MODULE: &str = "model.layers.0.mlp.down_proj";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/quantised")
}

fn cases() -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(golden().join("cases.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn config(quantization: &Value) -> DecoderConfig {
    let config = json!({"architectures": ["LlamaForCausalLM"], "quantization_config": quantization});
    DecoderConfig::parse(&config.to_string(), None).unwrap()
}

fn files(case: &str) -> (tempfile::TempDir, Files) {
    let folder = tempfile::tempdir().unwrap();
    let file = golden().join(format!("{case}.safetensors"));
    std::fs::copy(file, folder.path().join("model.safetensors")).unwrap();
    let files = Files::read(folder.path()).unwrap();
    (folder, files)
}

/// A number as the package holds it.
fn rounded(value: f32, dtype: &str) -> f32 {
    match dtype {
        "bfloat16" => bf16::from_f32(value).to_f32(),
        "float16" => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

#[test]
fn every_format_gives_the_weights_that_its_package_gives() {
    let cases = cases();
    assert!(cases.len() >= 23, "{} cases", cases.len());
    for (name, case) in cases {
        let (_folder, files) = files(&name);
        let shape = [0, 1].map(|index| case["shape"][index].as_u64().unwrap() as usize);
        let quantised = config(&case["config"]).quantised.unwrap();
        let matrix = quantised.matrix(&files, &format!("{MODULE}.weight"), (shape[0], shape[1]));
        let matrix = matrix.unwrap_or_else(|error| panic!("{name}: {error}")).expect(&name);
        let mut found = vec![0.0; shape[0] * shape[1]];
        matrix.read_f32(0, &mut found);
        let expected = files.tensor("expected").unwrap();
        let dtype = case["dtype"].as_str().unwrap();
        for (index, (found, bytes)) in found.iter().zip(expected.data.as_chunks::<4>().0).enumerate() {
            let expected = f32::from_le_bytes(*bytes);
            assert_eq!(rounded(*found, dtype), expected, "{name}: element {index}, {found} before rounding");
        }
    }
}

/// Every part that a matrix needs is missed by name, and a matrix of another shape is refused.
#[test]
fn what_is_missing_or_does_not_fit_is_named() {
    for (name, case) in cases() {
        let (folder, files) = files(&name);
        let shape = [0, 1].map(|index| case["shape"][index].as_u64().unwrap() as usize);
        let quantised = config(&case["config"]).quantised.unwrap();
        let weight = format!("{MODULE}.weight");
        let wrong = quantised.matrix(&files, &weight, (shape[0] + 16, shape[1])).unwrap_err().to_string();
        assert!(wrong.contains(MODULE), "{name}: {wrong}");
        let bytes = std::fs::read(golden().join(format!("{name}.safetensors"))).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for part in tensors.names() {
            // These may be absent, and are read where they are there.
            let optional =
                ["weight_shape", "weight_g_idx", "g_idx", "weight_zero_point", "input_scale", "expected"];
            if optional.iter().any(|optional| part.ends_with(optional)) {
                continue;
            }
            let others: Vec<_> = tensors.iter().filter(|(other, _)| *other != part).collect();
            let less = safetensors::serialize(others, None).unwrap();
            std::fs::write(folder.path().join("model.safetensors"), less).unwrap();
            let files = Files::read(folder.path()).unwrap();
            let error = quantised.matrix(&files, &weight, (shape[0], shape[1])).unwrap_err().to_string();
            let named = part.replace("weight_scale_inv", "weight_scale");
            assert!(error.contains(&named), "{name} without {part}: {error}");
        }
    }
}

/// A matrix that is stored as floats is none of codes, whatever the configuration lists.
#[test]
fn floats_stay_floats() {
    let (_folder, files) = files("ct-w4a16");
    let quantised = config(&cases()["ct-w4a16"]["config"]).quantised.unwrap();
    assert!(quantised.matrix(&files, "expected", (64, 96)).unwrap().is_none());
}
