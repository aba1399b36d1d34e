//! Folders of one file and of shards, and a table of refusals: each names its file.

use std::fs;

use serde_json::{Value, json};

use super::*;

/// A safetensors file: length of the header, header, data.
fn file(header: &Value, data: &[u8]) -> Vec<u8> {
    let text = header.to_string();
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.bytes());
    bytes.extend(data);
    bytes
}

/// A file of one tensor of two numbers.
fn pair(name: &str, dtype: &str, bytes: usize) -> Vec<u8> {
    let data: Vec<u8> = (1..=bytes as u8).collect();
    file(&json!({name: {"dtype": dtype, "shape": [2], "data_offsets": [0, bytes]}}), &data)
}

fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("written");
    }
    folder
}

fn index(places: &Value) -> Vec<u8> {
    json!({"metadata": {}, "weight_map": places}).to_string().into_bytes()
}

#[test]
fn one_file_and_shards_give_their_tensors() {
    let single = folder(&[(SINGLE, &pair("a", "F32", 8))]);
    let files = Files::read(single.path()).expect("read");
    let tensor = files.tensor("a").expect("there");
    assert_eq!(
        (tensor.dtype, tensor.shape, tensor.data),
        (StoredDtype::F32, vec![2], &[1, 2, 3, 4, 5, 6, 7, 8][..])
    );
    assert_eq!(files.tensor("b"), Err(SourceError::Missing("b".into())));
    let shards = folder(&[
        (INDEX, &index(&json!({"a": "2.safetensors", "b": "1.safetensors"}))),
        ("2.safetensors", &pair("a", "F16", 4)),
        ("1.safetensors", &pair("b", "BF16", 4)),
        ("stranger.safetensors", b"never looked at"),
    ]);
    let files = Files::read(shards.path()).expect("read");
    assert_eq!(files.tensor("a").expect("there").dtype, StoredDtype::F16);
    assert_eq!(files.tensor("b").expect("there").dtype, StoredDtype::Bf16);
    assert!(files.has("a") && !files.has("c"));
}

#[test]
fn refusals_name_the_file_and_what_is_wrong() {
    let good = pair("a", "F32", 8);
    let header_length = |length: u64| [length.to_le_bytes().as_slice(), b"{}"].concat();
    let entry = |shape: Value, end: u64, data: usize| {
        file(&json!({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}), &vec![0; data])
    };
    let single: Vec<(Vec<u8>, &str)> = vec![
        (b"".to_vec(), "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n".to_vec(), "git lfs pull"),
        (b"GGUF\x03\0\0\0".to_vec(), "millrace import"),
        (b"1234567".to_vec(), "too small"),
        (header_length(1000), "header length"),
        (header_length(u64::MAX), "size of the header is 18446744073709551615; the limit is 67108864"),
        (header_length((64 << 20) + 1), "size of the header is 67108865; the limit is 67108864"),
        (file(&json!([]), b""), "JSON"),
        (file(&json!({"a": 1}), b""), "JSON"),
        (pair("a", "F8", 2), "JSON"),
        (entry(json!([2]), 8, 9), "incomplete"),
        (entry(json!([2]), 8, 7), "incomplete"),
        (entry(json!([3]), 8, 8), "invalid"),
        (entry(json!([1_u64 << 33, 1_u64 << 33]), 8, 8), "overflow"),
        (good[..good.len() - 1].to_vec(), "incomplete"),
    ];
    for (bytes, what) in single {
        let folder = folder(&[(SINGLE, &bytes)]);
        let error = Files::read(folder.path()).expect_err(what).to_string();
        assert!(error.starts_with("model.safetensors: "), "{error}");
        assert!(error.contains(what), "{error:?} lacks {what:?}");
    }
    let plain = json!({"a": "x.safetensors"});
    let sharded: Vec<(Vec<u8>, &str)> = vec![
        (b"{".to_vec(), "EOF"),
        (b"{}".to_vec(), "weight_map"),
        (index(&json!({})), "at least 1"),
        (index(&json!({"a": 1})), "string"),
        (index(&json!({"a": "../x"})), "\"../x\" is not a plain name"),
        (index(&json!({"a": "/etc/passwd"})), "not a plain name"),
        (index(&json!({"a": ".x"})), "not a plain name"),
    ];
    for (bytes, what) in sharded {
        let other = pair("c", "F32", 8);
        let folder = folder(&[(INDEX, &bytes), ("x.safetensors", &good), ("y.safetensors", &other)]);
        let error = Files::read(folder.path()).expect_err(what).to_string();
        assert!(error.starts_with(INDEX) && error.contains(what), "{error:?} lacks {what:?}");
    }
    let missing = Files::read(folder(&[(INDEX, &index(&plain))]).path()).expect_err("missing").to_string();
    assert!(missing.starts_with("x.safetensors: "), "{missing}");
}

/// Of a folder with an index, what one tensor is: its first number, or the error.
fn tensor_of(places: &Value, files: &[(&str, &[u8])], name: &str) -> Result<u8, String> {
    let index = index(places);
    let folder = folder(&[&[(INDEX, index.as_slice())], files].concat());
    let files = Files::read(folder.path()).map_err(|error| error.to_string())?;
    files.tensor(name).map(|tensor| tensor.data[0]).map_err(|error| error.to_string())
}

#[test]
fn what_nobody_asks_for_refuses_nothing() {
    let (a, b) = (pair("a", "F32", 8), pair("b", "F32", 8));
    let odd = file(
        &json!({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "n": {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]}}),
        &[9; 16],
    );
    let places = json!({"a": "x.safetensors", "b": "x.safetensors", "c": "gone.safetensors"});
    let both: &[(&str, &[u8])] = &[("x.safetensors", &a), ("y.safetensors", &b)];
    assert_eq!(tensor_of(&places, both, "a"), Ok(1));
    for (places, files, name, what) in [
        (&places, both, "b", "says that it is in x.safetensors, and it is not"),
        (&places, both, "c", "names gone.safetensors, which is missing"),
        (&places, both, "d", "no tensor \"d\""),
        (
            &json!({"a": "x.safetensors"}),
            &[("x.safetensors", odd.as_slice())],
            "n",
            "it has type I64; where config.json names no quantization_config for it, F32",
        ),
        (
            &json!({"z": "x.safetensors", "y": "y.safetensors"}),
            &[("x.safetensors", &a), ("y.safetensors", &odd)],
            "a",
            "it is in x.safetensors and in y.safetensors",
        ),
    ] {
        let error = tensor_of(places, files, name).expect_err(what);
        assert!(error.contains(what), "{error:?} lacks {what:?}");
    }
}

#[test]
fn the_index_decides_where_a_tensor_lies() {
    let (a, other) = (
        pair("a", "F32", 8),
        file(&json!({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), &[9; 8]),
    );
    let files: &[(&str, &[u8])] = &[("x.safetensors", &a), ("y.safetensors", &other)];
    assert_eq!(tensor_of(&json!({"a": "y.safetensors", "q": "x.safetensors"}), files, "a"), Ok(9));
    // One file has it, the index names another.
    let files: &[(&str, &[u8])] = &[("x.safetensors", &a), ("y.safetensors", &pair("b", "F32", 8))];
    assert_eq!(tensor_of(&json!({"a": "y.safetensors", "q": "x.safetensors"}), files, "a"), Ok(1));
    // A single file beside an index is not read, and the message says so.
    let files: &[(&str, &[u8])] = &[("x.safetensors", &a), (SINGLE, &other)];
    assert_eq!(tensor_of(&json!({"a": "x.safetensors"}), files, "a"), Ok(1));
    let error = tensor_of(&json!({"a": "x.safetensors"}), files, "b").expect_err("absent");
    assert!(error.contains("model.safetensors beside the index is not read"), "{error}");
}

#[test]
fn names_without_their_prefix_and_inside_of_another_model_are_found() {
    for stored in ["norm.weight", "language_model.model.norm.weight", "model.language_model.norm.weight"] {
        let folder = folder(&[(SINGLE, &pair(stored, "F32", 8))]);
        assert!(Files::read(folder.path()).expect("read").has("model.norm.weight"), "{stored}");
    }
}

#[test]
fn shards_without_an_index_are_read_and_other_formats_are_named() {
    let shards = folder(&[
        ("model-00001-of-00002.safetensors", &pair("a", "F32", 8)),
        ("model-00002-of-00002.safetensors", &pair("b", "F32", 8)),
    ]);
    let files = Files::read(shards.path()).expect("read");
    assert!(files.has("a") && files.has("b"));
    for (name, what) in [
        ("pytorch_model.bin", "pytorch_model.bin is there: save it as safetensors"),
        ("m.gguf", "m.gguf is there: `millrace import`"),
        ("consolidated.safetensors", "consolidated.safetensors is there"),
    ] {
        let error = Files::read(folder(&[(name, b"x")]).path()).expect_err(what).to_string();
        assert!(error.starts_with("model.safetensors: it is missing; ") && error.contains(what), "{error}");
    }
}

#[test]
fn an_index_has_a_number_of_files_and_a_size() {
    let places: serde_json::Map<String, Value> =
        (0..=FILES_MAX).map(|i| (format!("t{i}"), json!(format!("{i}.safetensors")))).collect();
    let many = folder(&[(INDEX, &index(&Value::Object(places)))]);
    let error = Files::read(many.path()).expect_err("too many").to_string();
    assert!(error.contains("number of files is 1001; the limit is 1000"), "{error}");
    let large = folder(&[]);
    let file = fs::File::create(large.path().join(INDEX)).expect("created");
    file.set_len(INDEX_BYTES_MAX + 1).expect("sized");
    let error = Files::read(large.path()).expect_err("too large").to_string();
    assert!(error.contains("size in bytes is 67108865; the limit is 67108864"), "{error}");
}
