//! What a folder says of its quantisation: `quantization_config` of `config.json`, or the files that other tools
//! keep it
//! in. What is not read is refused by name, with the reason.

use serde_json::{Map, Value};

use super::Quantised;
use super::compressed::{Compressed, Scheme, StoredCodes};
use super::gptq::GptqForm;
use super::modules::Modules;
use crate::model::config::ModelConfigError;
use crate::model::config::fields::Fields;

/// Files beside `config.json` that say it where that does not: ModelOpt's, and GPTQ's and AWQ's old one.
pub const FILES: [&str; 2] = ["hf_quant_config.json", "quantize_config.json"];
/// Most groups of a configuration. Published ones have one to five.
const GROUPS_MAX: usize = 1024;
/// Most entries of a list of modules.
const ENTRIES_MAX: usize = 1 << 16;

type Parsed<T> = Result<T, ModelConfigError>;

fn refuse<T>(field: impl Into<String>, value: impl ToString, expected: impl Into<String>) -> Parsed<T> {
    Err(ModelConfigError::Quantised {
        field: field.into(),
        value: value.to_string(),
        expected: expected.into(),
    })
}

/// Reads it from `config.json`; `None` where that says nothing of it.
///
/// # Errors
/// When it is not read; the error names the field.
pub fn of_config(config: Fields<'_>) -> Parsed<Option<Quantised>> {
    // The second is how compressed-tensors wrote it at first.
    let Some((field, value)) = config.any(&["quantization_config", "compression_config"]) else {
        return Ok(None);
    };
    match value.as_object() {
        Some(object) if object.is_empty() => Ok(None),
        Some(object) => parse(field, object),
        None => refuse(field, value, "an object"),
    }
}

/// Reads it from one of [`FILES`].
///
/// # Errors
/// As [`of_config`].
pub fn of_file(name: &'static str, object: &Map<String, Value>) -> Parsed<Option<Quantised>> {
    match object.get("quantization").and_then(Value::as_object) {
        Some(inner) if inner.contains_key("quant_algo") => modelopt(name, inner),
        _ if object.contains_key("quant_method") => parse(name, object),
        // AutoGPTQ wrote no method.
        _ if object.contains_key("bits") => gptq(name, object),
        _ => Ok(None),
    }
}

fn parse(field: &str, object: &Map<String, Value>) -> Parsed<Option<Quantised>> {
    let text = |key: &str| object.get(key).and_then(Value::as_str);
    let by_format = object.contains_key("config_groups") && object.contains_key("format");
    let method = text("quant_method").or(by_format.then_some("compressed-tensors"));
    match method.unwrap_or("absent") {
        "compressed-tensors" => compressed(field, object),
        "fp8" => fp8(field, object),
        "fbgemm_fp8" => Ok(Some(Quantised::Fp8 { block: None })),
        "modelopt" | "modelopt_fp4" | "modelopt_fp8" => modelopt(field, object),
        "gptq" => gptq(field, object),
        "awq" => awq(field, object),
        "auto-round" if text("packing_format") == Some("auto_round:auto_gptq") => gptq(field, object),
        other => refuse(
            format!("{field}.quant_method"),
            other,
            "compressed-tensors, fp8, fbgemm_fp8, modelopt, gptq or awq; others are not read",
        ),
    }
}

/// A whole number, or `None` where the key is absent or null.
fn whole(field: &str, object: &Map<String, Value>, keys: &[&str]) -> Parsed<Option<i64>> {
    let found = keys
        .iter()
        .find_map(|&key| object.get(key).filter(|value| !value.is_null()).map(|value| (key, value)));
    match found {
        None => Ok(None),
        Some((key, value)) => match value.as_i64() {
            Some(number) => Ok(Some(number)),
            None => refuse(format!("{field}.{key}"), value, "a whole number"),
        },
    }
}

/// A size of blocks; -1 is all columns.
fn group(field: &str, number: Option<i64>) -> Parsed<Option<usize>> {
    match number {
        None | Some(-1) => Ok(None),
        Some(size) if (1..=1 << 20).contains(&size) => Ok(Some(size as usize)),
        Some(size) => refuse(format!("{field}.group_size"), size, "from 1 to 1048576, or -1"),
    }
}

/// Two sizes of a block.
fn block(field: &str, value: Option<&Value>) -> Parsed<Option<(usize, usize)>> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let sizes: Option<Vec<u64>> =
        value.as_array().map(|sizes| sizes.iter().filter_map(Value::as_u64).collect());
    match sizes.as_deref() {
        Some(&[rows, columns]) if (1..=1 << 20).contains(&rows) && (1..=1 << 20).contains(&columns) => {
            Ok(Some((rows as usize, columns as usize)))
        }
        _ => refuse(field, value, "two whole numbers from 1 to 1048576"),
    }
}

fn fp8(field: &str, object: &Map<String, Value>) -> Parsed<Option<Quantised>> {
    match object.get("fmt").and_then(Value::as_str) {
        None | Some("e4m3" | "float8_e4m3fn") => {}
        Some(other) => return refuse(format!("{field}.fmt"), other, "e4m3"),
    }
    let block = block(&format!("{field}.weight_block_size"), object.get("weight_block_size"))?;
    Ok(Some(Quantised::Fp8 { block }))
}

fn modelopt(field: &str, object: &Map<String, Value>) -> Parsed<Option<Quantised>> {
    match object.get("quant_algo").and_then(Value::as_str) {
        Some("FP8" | "FP8_PER_CHANNEL_PER_TOKEN") => Ok(Some(Quantised::Fp8 { block: None })),
        Some("FP8_PB_WO") => Ok(Some(Quantised::Fp8 { block: Some((128, 128)) })),
        Some("NVFP4" | "W4A16_NVFP4") => Ok(Some(Quantised::ModelOptFp4)),
        other => refuse(
            format!("{field}.quant_algo"),
            other.unwrap_or("absent"),
            "FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4 or W4A16_NVFP4; others are not read",
        ),
    }
}

fn gptq(field: &str, object: &Map<String, Value>) -> Parsed<Option<Quantised>> {
    let bits = whole(field, object, &["bits", "w_bit"])?;
    if !matches!(bits, Some(4 | 8)) {
        let bits = bits.map_or("absent".to_owned(), |bits| bits.to_string());
        return refuse(format!("{field}.bits"), bits, "4 or 8: codes of other widths cross words");
    }
    let format = object.get("checkpoint_format").and_then(Value::as_str).unwrap_or("gptq");
    if !matches!(format, "gptq" | "gptq_v2") {
        let expected = "gptq or gptq_v2: other layouts are made for one kernel";
        return refuse(format!("{field}.checkpoint_format"), format, expected);
    }
    let group = group(field, whole(field, object, &["group_size", "groupsize"])?)?;
    Ok(Some(Quantised::Gptq(GptqForm { group, second_version: format == "gptq_v2" })))
}

fn awq(field: &str, object: &Map<String, Value>) -> Parsed<Option<Quantised>> {
    let bits = whole(field, object, &["bits", "w_bit"])?.unwrap_or(4);
    if bits != 4 {
        return refuse(format!("{field}.bits"), bits, "4");
    }
    let version = object.get("version").and_then(Value::as_str).unwrap_or("gemm").to_lowercase();
    if version != "gemm" {
        return refuse(format!("{field}.version"), version, "gemm: the others are packed for one kernel");
    }
    match object.get("zero_point").and_then(Value::as_bool) {
        Some(false) => {
            refuse(format!("{field}.zero_point"), false, "true: AWQ writes no codes without zeros")
        }
        _ => Ok(Some(Quantised::Awq)),
    }
}

/// Whether a part of a configuration says something.
fn says(object: &Map<String, Value>, key: &str) -> bool {
    object.get(key).is_some_and(|value| match value {
        Value::Null => false,
        Value::Object(inner) => !inner.is_empty(),
        _ => true,
    })
}

fn compressed(field: &str, object: &Map<String, Value>) -> Parsed<Option<Quantised>> {
    if says(object, "transform_config") {
        return refuse(format!("{field}.transform_config"), "present", "absent: rotations are not computed");
    }
    if let Some(sparsity) = object.get("sparsity_config").and_then(Value::as_object) {
        match sparsity.get("format").and_then(Value::as_str) {
            None | Some("dense") => {}
            Some(other) => {
                return refuse(
                    format!("{field}.sparsity_config.format"),
                    other,
                    "dense: sparse files are not read",
                );
            }
        }
    }
    let format = object.get("format").and_then(Value::as_str);
    let groups = object.get("config_groups").and_then(Value::as_object);
    let Some(groups) = groups.filter(|groups| (1..=GROUPS_MAX).contains(&groups.len())) else {
        return refuse(
            format!("{field}.config_groups"),
            "absent or empty",
            format!("1 to {GROUPS_MAX} groups"),
        );
    };
    let schemes = groups.iter().map(|(name, group)| {
        let place = format!("{field}.config_groups.{name}");
        match group.as_object() {
            Some(group) => scheme(&place, group, format),
            None => refuse(place, group, "an object"),
        }
    });
    let schemes = schemes.collect::<Parsed<Vec<_>>>()?;
    let ignored = modules(&format!("{field}.ignore"), object.get("ignore"))?;
    Ok(Some(Quantised::Compressed(Compressed { schemes, ignored })))
}

fn modules(field: &str, value: Option<&Value>) -> Parsed<Modules> {
    let entries = value.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    if entries.len() > ENTRIES_MAX {
        return refuse(field, format!("{} entries", entries.len()), format!("at most {ENTRIES_MAX}"));
    }
    Modules::new(entries.iter().filter_map(Value::as_str))
        .or_else(|reason| refuse(field, reason, "names and regular expressions"))
}

fn scheme(place: &str, group: &Map<String, Value>, format: Option<&str>) -> Parsed<Scheme> {
    let targets = modules(&format!("{place}.targets"), group.get("targets"))?;
    let Some(weights) = group.get("weights").and_then(Value::as_object) else {
        return Ok(Scheme { targets, written: None, block: None });
    };
    let own = group.get("format").and_then(Value::as_str);
    let format = own.or(format).unwrap_or("dense");
    let bits = whole(place, weights, &["num_bits"])?.unwrap_or(8);
    let is_float = weights.get("type").and_then(Value::as_str) == Some("float");
    let written = match (format, is_float, bits) {
        ("dense", ..) => return Ok(Scheme { targets, written: None, block: None }),
        ("pack-quantized", false, 4 | 8) => StoredCodes::Packed { bits: bits as usize },
        ("int-quantized" | "naive-quantized", false, 1..=8) => StoredCodes::Int8,
        ("float-quantized" | "naive-quantized", true, 8) => StoredCodes::Fp8,
        ("nvfp4-pack-quantized", true, 4) => StoredCodes::NvFp4,
        ("mxfp4-pack-quantized", true, 4) => StoredCodes::MxFp4,
        _ => {
            let kind = if is_float { "float" } else { "int" };
            let value = format!("{format} with weights of {bits} bits, {kind}");
            let expected = "pack-quantized (int, 4 or 8 bits), int-quantized (int), float-quantized (float, 8), \
                            nvfp4-pack-quantized or mxfp4-pack-quantized (float, 4); others are not read";
            return refuse(format!("{place}.format"), value, expected);
        }
    };
    let size = group_size(place, weights)?;
    let block = match weights.get("strategy").and_then(Value::as_str) {
        Some("block") => block(&format!("{place}.weights.block_structure"), weights.get("block_structure"))?,
        Some("tensor" | "channel") => None,
        None | Some("group" | "tensor_group") => size.map(|size| (1, size)),
        Some(other) => {
            let expected = "tensor, channel, group, tensor_group or block";
            return refuse(format!("{place}.weights.strategy"), other, expected);
        }
    };
    Ok(Scheme { targets, written: Some(written), block })
}

fn group_size(place: &str, weights: &Map<String, Value>) -> Parsed<Option<usize>> {
    group(&format!("{place}.weights"), whole(place, weights, &["group_size"])?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(quantization: Value) -> Result<Option<Quantised>, String> {
        let config = json!({ "quantization_config": quantization });
        of_config(Fields(config.as_object().unwrap())).map_err(|error| error.to_string())
    }

    fn group(format: &str, weights: Value) -> Value {
        let groups = json!({"group_0": {"targets": ["Linear"], "weights": weights}});
        json!({"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]})
    }

    #[test]
    fn what_is_read_is_recognised() {
        let cases = [
            (
                json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
                "8-bit floats in blocks of 128 x 128",
            ),
            (json!({"quant_method": "fp8", "activation_scheme": "static"}), "8-bit floats"),
            (json!({"quant_method": "modelopt", "quant_algo": "FP8"}), "8-bit floats"),
            (json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}), "4-bit floats in groups of 16"),
            (json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": true}), "GPTQ"),
            (json!({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": true}), "AWQ"),
            (
                group(
                    "pack-quantized",
                    json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
                ),
                "compressed-tensors: 4 bits in groups of 128",
            ),
            (
                group("float-quantized", json!({"num_bits": 8, "type": "float", "strategy": "channel"})),
                "compressed-tensors: 8-bit floats",
            ),
        ];
        for (config, expected) in cases {
            assert_eq!(of(config.clone()).unwrap().unwrap().to_string(), expected, "{config}");
        }
        assert_eq!(of(json!({})), Ok(None));
        assert_eq!(of(Value::Null), Ok(None));
    }

    #[test]
    fn what_is_not_read_is_refused_by_name() {
        let cases = [
            (json!("gptq"), "quantization_config is"),
            (json!({"quant_method": "bitsandbytes"}), "quant_method is bitsandbytes"),
            (json!({"quant_method": "mxfp4"}), "quant_method is mxfp4"),
            (json!({"bits": 4}), "quant_method is absent"),
            (json!({"quant_method": "gptq", "bits": 3}), "bits is 3"),
            (json!({"quant_method": "gptq"}), "bits is absent"),
            (
                json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
                "checkpoint_format is marlin",
            ),
            (json!({"quant_method": "gptq", "bits": 4, "group_size": 0}), "group_size is 0"),
            (json!({"quant_method": "awq", "version": "gemv"}), "version is gemv"),
            (json!({"quant_method": "awq", "zero_point": false}), "zero_point is false"),
            (json!({"quant_method": "awq", "bits": 8}), "bits is 8"),
            (json!({"quant_method": "fp8", "weight_block_size": [128]}), "weight_block_size is [128]"),
            (json!({"quant_method": "fp8", "fmt": "e5m2"}), "fmt is e5m2"),
            (json!({"quant_method": "modelopt", "quant_algo": "MXFP8"}), "quant_algo is MXFP8"),
            (group("marlin-24", json!({"num_bits": 4, "type": "int"})), "format is marlin-24"),
            (group("pack-quantized", json!({"num_bits": 3, "type": "int"})), "of 3 bits"),
            (group("int-quantized", json!({"num_bits": 8, "strategy": "token"})), "strategy is token"),
            (json!({"quant_method": "compressed-tensors", "format": "int-quantized"}), "config_groups"),
        ];
        for (config, expected) in cases {
            let error = of(config.clone()).unwrap_err();
            assert!(error.contains(expected), "{config}: {error}");
        }
        let mut rotated = group("int-quantized", json!({"num_bits": 8}));
        rotated["transform_config"] = json!({"config_groups": {}});
        assert!(of(rotated).unwrap_err().contains("transform_config"));
        let mut sparse = group("int-quantized", json!({"num_bits": 8}));
        sparse["sparsity_config"] = json!({"format": "sparse-24-bitmask"});
        assert!(of(sparse).unwrap_err().contains("sparsity_config.format"));
    }

    #[test]
    fn other_files_are_read_where_the_configuration_is_silent() {
        let file =
            json!({"producer": {}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}});
        let found = of_file(FILES[0], file.as_object().unwrap()).unwrap();
        assert_eq!(found, Some(Quantised::Fp8 { block: None }));
        let file = json!({"bits": 4, "group_size": 128, "damp_percent": 0.01});
        let found = of_file(FILES[1], file.as_object().unwrap()).unwrap();
        assert_eq!(found, Some(Quantised::Gptq(GptqForm { group: Some(128), second_version: false })));
    }
}
