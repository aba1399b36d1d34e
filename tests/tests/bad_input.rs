//! Malformed requests, headers, configurations and model folders: each is refused with a code of a closed set
//! and a message that names field, value and limit, and what runs beside it is not touched.
//!
//! Requests go through the real engine, folders through the worker's own way from files to an engine, and
//! configurations through the real process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result};
use futures::future::join_all;
use millrace_crds::config::{EngineConfig, WorkerConfig};
use millrace_crds::job::{JobHeaders, header};
use millrace_crds::names::Class;
use millrace_crds::result::ErrorCode;
use millrace_crds::units::Bytes;
use millrace_engine::start::Engine;
use millrace_engine::text::prompt::Text;
use millrace_queue::fault::{Disposition, Fault};
use millrace_tests::{checkpoint, tiny, tools};
use millrace_worker::ending::Ending;
use millrace_worker::run::{Answer, EngineRun, Run, Work};
use millrace_worker::{load, weights};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use time::OffsetDateTime;

// --- requests ---

/// A malformed body, and what its refusal must name: field, value, limit.
#[derive(Deserialize)]
struct Malformed {
    body: String,
    names: Vec<String>,
}

/// The table that the decoder's own test reads too.
fn malformed() -> Vec<Malformed> {
    let table = include_str!("../../engine/tests/golden/malformed-requests.json");
    serde_json::from_str(table).expect("a table")
}

/// An engine with the limits that the table speaks of: 512 tokens, a vocabulary of 1000.
fn engine() -> Result<(EngineRun, TempDir)> {
    let folder = tempfile::tempdir()?;
    tiny::write(folder.path(), 6)?;
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["vocab_size"] = json!(1000);
    checkpoint::write(folder.path(), &config, 6)?;
    let config = EngineConfig {
        max_model_len: Some(512),
        max_sequences: Some(8),
        max_batch_tokens: Some(64),
        kv_cache_bytes: Some(Bytes(16 << 20)),
        ..EngineConfig::default()
    };
    let engine = Engine::load(folder.path(), &config)?;
    Ok((EngineRun::new(Text::open(folder.path(), "tiny")?, engine.handle().clone()), folder))
}

fn work(id: &str, content: &str, body: &str) -> Work {
    let headers =
        JobHeaders::parse([(header::JOB_ID, id), (header::CONTENT_TYPE, content)], Default::default());
    Work {
        class: Class::Normal,
        headers: headers.expect("valid headers"),
        published: OffsetDateTime::UNIX_EPOCH,
        body: body.to_owned().into(),
    }
}

/// A request whose answer depends on its seed alone.
fn good(number: usize) -> Value {
    json!({"prompt": format!("good {number}"), "seed": number, "temperature": 0.9, "max_tokens": 12, "logprobs": 2})
}

fn lines_of(answer: &Answer) -> Vec<Value> {
    let text = std::str::from_utf8(&answer.body).expect("answers are text");
    text.lines().map(|line| serde_json::from_str(line).expect("answers are JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_lines_get_a_code_and_their_neighbours_their_answers() -> Result<()> {
    const GOOD: usize = 30;
    let (run, _folder) = engine()?;
    let good_line =
        |number: usize| json!({"custom_id": format!("good-{number}"), "body": good(number)}).to_string();
    let alone: Vec<String> = (0..GOOD).map(good_line).collect();
    let undisturbed = run.run(work("alone", "application/jsonl", &alone.join("\n")), None).await?;
    let table: Vec<Malformed> = malformed()
        .into_iter()
        // A byte order mark begins a body, not a line.
        .filter(|bad| {
            !bad.body.trim().is_empty() && !bad.body.contains('\n') && !bad.body.starts_with('\u{feff}')
        })
        .collect();
    assert!(table.len() >= 60, "{} malformed requests", table.len());
    let mut crowded = Vec::new();
    for (number, bad) in table.iter().enumerate() {
        crowded.push(bad.body.clone());
        crowded.extend((number % 3 == 0).then(|| alone.get(number / 3).cloned()).flatten());
    }
    crowded.extend(alone.iter().skip(table.len().div_ceil(3)).cloned());
    let answer = run.run(work("crowded", "application/jsonl", &crowded.join("\n")), None).await?;
    let (mut answered, mut refused) = (Vec::new(), Vec::new());
    for line in lines_of(&answer) {
        if line["error"].is_null() { answered.push(line) } else { refused.push(line) }
    }
    assert_eq!(refused.len(), table.len());
    for (line, bad) in refused.iter().zip(&table) {
        assert_eq!(line["error"]["code"], ErrorCode::InvalidRequest.as_str(), "{}", bad.body);
        let message = line["error"]["message"].as_str().expect("a message");
        // Of a line it is the line, not the body, that is no JSON.
        for name in bad.names.iter().filter(|name| *name != "body" && !name.starts_with("line 1")) {
            assert!(message.contains(name.as_str()), "{}: {message:?} lacks {name:?}", bad.body);
        }
    }
    let content = |line: &Value| (line["custom_id"].clone(), line["response"]["body"]["choices"].clone());
    let expected: Vec<_> = lines_of(&undisturbed).iter().map(content).collect();
    assert_eq!(answered.iter().map(content).collect::<Vec<_>>(), expected);
    assert_eq!(answer.output_tokens, undisturbed.output_tokens);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_job_is_rejected_while_others_run() -> Result<()> {
    let (run, _folder) = engine()?;
    let job = |number: usize| work(&format!("good-{number}"), "application/json", &good(number).to_string());
    let mut alone = Vec::new();
    for number in 0..12 {
        alone.push(run.run(job(number), None).await?.body);
    }
    let table = malformed();
    let good = join_all((0..12).map(|number| run.run(job(number), None)));
    let bad = join_all(table.iter().map(|bad| run.run(work("bad", "application/json", &bad.body), None)));
    let (good, bad) = tokio::join!(good, bad);
    for (answer, expected) in good.into_iter().zip(alone) {
        assert_eq!(answer?.body, expected);
    }
    for (outcome, case) in bad.into_iter().zip(&table) {
        let fault = outcome.expect_err(&case.body);
        assert_eq!(fault.disposition(), Disposition::Reject(ErrorCode::InvalidRequest), "{fault}");
        let message = fault.to_string();
        assert!(message.starts_with(&case.names[0]), "{message}");
        case.names.iter().for_each(|name| assert!(message.contains(name.as_str()), "{message} lacks {name}"));
    }
    Ok(())
}

/// What only the engine's sizes and the tokenizer can tell.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_can_never_run_is_rejected_with_both_numbers() -> Result<()> {
    let (run, _folder) = engine()?;
    let long = "x".repeat(600);
    let cases = [
        (json!({"prompt": long, "max_tokens": 1}), ["prompt", "600 tokens", "512 tokens"]),
        (json!({"prompt": "x".repeat(500), "max_tokens": 13}), ["prompt", "500 tokens", "max_tokens 13"]),
        (json!({"prompt": ["a", long]}), ["prompt[1]", "600 tokens", "512"]),
        (json!({"messages": [{"role": "user", "content": long}]}), ["messages", "tokens", "512"]),
        (json!({"prompt": ""}), ["prompt", "no tokens", "at least 1"]),
    ];
    for (body, parts) in cases {
        let outcome = run.run(work("late", "application/json", &body.to_string()), None).await;
        let fault = outcome.expect_err(&body.to_string());
        assert!(matches!(fault, Fault::Invalid { .. }));
        let message = fault.to_string();
        parts.iter().for_each(|part| assert!(message.contains(part), "{message:?} lacks {part:?}"));
    }
    Ok(())
}

// --- model folders ---

fn worker_config(folder: &Path, changes: &Value) -> Result<WorkerConfig> {
    let mut config = json!({
        "model": {"name": "tiny", "uri": format!("file://{}", folder.display())},
        "nats": {"servers": ["nats://127.0.0.1:1"]},
        "engine": {"kvCacheBytes": "16Mi"},
    });
    for (section, fields) in changes.as_object().context("changes are an object")? {
        for (field, value) in fields.as_object().context("changes are sections")? {
            config[section][field] = value.clone();
        }
    }
    Ok(serde_json::from_value(config)?)
}

/// The worker's way from an address to an engine.
async fn start(config: &WorkerConfig) -> Result<()> {
    let folder = weights::pull(&config.model).await?;
    load::load(config, folder).await?;
    Ok(())
}

/// A change of a good folder.
enum Change {
    Remove(&'static str),
    Write(&'static str, Vec<u8>),
    /// Sets a field of a JSON file.
    Set(&'static str, &'static str, Value),
    /// Cuts a file by so many bytes.
    Cut(&'static str, u64),
    /// Writes a manifest with a change.
    Manifest(fn(&mut Value)),
    /// Nothing about the files; the configuration is at fault.
    None,
}

impl Change {
    fn apply(&self, folder: &Path) -> Result<()> {
        match self {
            Change::Remove(file) => fs::remove_file(folder.join(file))?,
            Change::Write(file, bytes) => fs::write(folder.join(file), bytes)?,
            Change::Set(file, field, value) => {
                let mut json: Value = serde_json::from_slice(&fs::read(folder.join(file))?)?;
                json[*field] = value.clone();
                fs::write(folder.join(file), json.to_string())?;
            }
            Change::Cut(file, bytes) => {
                let file = fs::File::options().write(true).open(folder.join(file))?;
                file.set_len(file.metadata()?.len() - bytes)?;
            }
            Change::Manifest(change) => {
                let sha256 = "0".repeat(64);
                let bytes = fs::metadata(folder.join("config.json"))?.len();
                let file = json!({"name": "config.json", "bytes": bytes, "sha256": sha256});
                let mut manifest = json!({"version": 1, "files": [file]});
                change(&mut manifest);
                fs::write(folder.join("manifest.json"), manifest.to_string())?;
            }
            Change::None => {}
        }
        Ok(())
    }
}

/// A tensors' file of one tensor of a type that is not read.
fn integers() -> Vec<u8> {
    let header =
        r#"{"model.layers.0.input_layernorm.weight":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat()
}

type Names = &'static [&'static str];
type FolderCase = (Change, Value, Ending, Names);

fn bad_files() -> Vec<FolderCase> {
    use Change::{Cut, Manifest, Remove, Set, Write};
    let invalid = |change, names: Names| (change, json!({}), Ending::ModelInvalid, names);
    vec![
        invalid(Remove("config.json"), &["config.json", "Hugging Face"]),
        invalid(Write("config.json", b"{".to_vec()), &["config.json", "EOF"]),
        invalid(
            Set("config.json", "architectures", json!(["GPT2LMHeadModel"])),
            &["GPT2LMHeadModel", "Qwen3"],
        ),
        invalid(Set("config.json", "hidden_size", json!(0)), &["hidden_size is 0", "from 1 to 4194304"]),
        invalid(Set("config.json", "intermediate_size", json!(96)), &["gate_proj", "[128, 64]", "[96, 64]"]),
        invalid(Set("config.json", "vocab_size", json!(260)), &["embed_tokens", "[259, 64]", "[260, 64]"]),
        invalid(Set("config.json", "num_hidden_layers", json!(3)), &["no tensor \"model.layers.2."]),
        invalid(
            Set("config.json", "num_key_value_heads", json!(3)),
            &["num_key_value_heads is 3", "divisor"],
        ),
        invalid(Set("config.json", "rope_scaling", json!({"type": "spiral"})), &["spiral"]),
        invalid(
            Set("config.json", "quantization_config", json!({"quant_method": "bitsandbytes"})),
            &["quant_method", "bitsandbytes"],
        ),
        invalid(Set("config.json", "hidden_act", json!("gelu")), &["hidden_act", "gelu", "silu"]),
        invalid(Remove("model.safetensors"), &["model.safetensors"]),
        invalid(Write("model.safetensors", vec![]), &["model.safetensors", "is empty"]),
        invalid(Cut("model.safetensors", 1), &["model.safetensors", "incomplete"]),
        invalid(Write("model.safetensors", vec![255; 64]), &["size of the header", "67108864"]),
        invalid(Write("model.safetensors", integers()), &["input_layernorm.weight", "I64", "BF16"]),
        invalid(
            Write("model.safetensors.index.json", br#"{"weight_map":{"a":"../x"}}"#.to_vec()),
            &["index.json", "../x", "plain name"],
        ),
        invalid(Remove("tokenizer.json"), &["tokenizer.json"]),
        invalid(Write("tokenizer.json", b"[]".to_vec()), &["tokenizer.json"]),
        invalid(
            Set("tokenizer.json", "decoder", json!({"type": "WordPiece", "prefix": "#", "cleanup": true})),
            &["tokenizer.json", "WordPiece"],
        ),
        invalid(
            Write("tokenizer_config.json", b"7".to_vec()),
            &["tokenizer_config.json", "not a JSON object"],
        ),
        invalid(
            Set("tokenizer_config.json", "chat_template", json!("{% for %}")),
            &["tokenizer_config.json", "chat template", "line 1"],
        ),
        invalid(
            Set("generation_config.json", "temperature", json!("hot")),
            &["temperature", "hot", "0 to 100"],
        ),
        invalid(Manifest(|_| {}), &["config.json", "SHA-256", "0000"]),
        invalid(Manifest(|m| m["files"][0]["bytes"] = json!(1)), &["config.json", "size", "1"]),
        invalid(Manifest(|m| m["files"][0]["name"] = json!("../config.json")), &["../config.json", "name"]),
        invalid(Manifest(|m| m["files"][0]["sha256"] = json!("abc")), &["sha256", "abc", "64"]),
        invalid(Manifest(|m| m["files"] = json!([])), &["0 files", "1 to 1000"]),
        invalid(Manifest(|m| m["version"] = json!(9)), &["version is 9", "1"]),
        invalid(Manifest(|m| m["surplus"] = json!(9)), &["manifest", "surplus"]),
    ]
}

fn bad_fields() -> Vec<FolderCase> {
    let of_config = |changes, names: Names| (Change::None, changes, Ending::ConfigInvalid, names);
    let of_model = |changes, names: Names| (Change::None, changes, Ending::ModelInvalid, names);
    vec![
        of_config(json!({"engine": {"maxModelLen": 4096}}), &["engine.maxModelLen is 4096", "2048"]),
        of_config(
            json!({"engine": {"maxBatchTokens": 32}}),
            &["engine.maxBatchTokens is 32", "maxSequences, 64"],
        ),
        of_config(
            json!({"engine": {"dtype": "f32", "quantization": "int8"}}),
            &["engine.quantization is int8", "f32"],
        ),
        of_config(
            json!({"engine": {"dtype": "f32", "kvCacheDtype": "bf16"}}),
            &["engine.kvCacheDtype is bf16", "auto or fp8_e4m3"],
        ),
        of_config(
            json!({"engine": {"kvCacheBytes": "512Ki", "maxModelLen": 2048, "dtype": "f32"}}),
            &["524288 bytes", "2048", "kvCacheBytes"],
        ),
        of_config(json!({"model": {"uri": "ftp://a/b"}}), &["model.uri", "ftp://a/b", "s3://"]),
        of_config(
            json!({"model": {"uri": "s3://a/b", "store": {"credentialsDir": "/no/such"}}}),
            &["store.credentialsDir", "/no/such"],
        ),
        of_model(
            json!({"model": {"digest": format!("sha256:{}", "0".repeat(64))}}),
            &["model.digest is sha256:0000", "the files have sha256:"],
        ),
        of_model(json!({"model": {"bytesMax": "1Ki"}}), &["bytes", "model.bytesMax is 1024"]),
        (
            Change::None,
            json!({"model": {"uri": "file:///no/such/folder"}}),
            Ending::ModelUnavailable,
            &["/no/such/folder"],
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_folder_or_field_stops_the_start_with_a_code_and_a_name() -> Result<()> {
    let good = tempfile::tempdir()?;
    tiny::write(good.path(), 2)?;
    start(&worker_config(good.path(), &json!({}))?).await.context("the folder is good as it is")?;
    let mut wrong = Vec::new();
    for (number, (change, fields, ending, names)) in bad_files().into_iter().chain(bad_fields()).enumerate() {
        let folder = tempfile::tempdir()?;
        tiny::write(folder.path(), 2)?;
        change.apply(folder.path())?;
        let Err(error) = start(&worker_config(folder.path(), &fields)?).await else {
            wrong.push(format!("case {number}, {names:?}, was taken"));
            continue;
        };
        let (message, found) = (format!("{error:#}"), Ending::of(&error));
        if found != ending || !names.iter().all(|name| message.contains(name)) {
            wrong.push(format!("case {number}: {found}: {message:?}, not {ending} with {names:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

// --- processes ---

fn worker(arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(tools::program("millrace-worker")?).args(arguments).output()?)
}

fn expect(output: &Output, ending: Ending, names: &[&str]) {
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(ending.number().into()), "{printed}");
    assert!(printed.contains(&format!("millrace-worker: {ending}: ")), "{printed}");
    names.iter().for_each(|name| assert!(printed.contains(name), "{printed} lacks {name:?}"));
}

#[test]
fn the_process_refuses_a_bad_configuration_before_anything_else() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let base = "model: {name: m, uri: 's3://b/m'}\nnats: {servers: ['nats://127.0.0.1:1']}\n";
    let more = |extra: &str| format!("{base}{extra}\n");
    let cases: Vec<(String, &[&str])> = vec![
        (String::new(), &["worker.yaml", "missing field"]),
        ("{".to_owned(), &["worker.yaml", "line 2"]),
        (more("speed: 3"), &["unknown field `speed`"]),
        (more("engine: {maxSequences: 0}"), &["engine.maxSequences", "0", "1 to 4096"]),
        (more("engine: {maxSequences: many}"), &["engine.maxSequences", "many"]),
        (more("engine: {dtype: f8}"), &["engine.dtype", "f8", "bf16"]),
        (more("engine: {kvCacheBytes: 10 GB}"), &["engine.kvCacheBytes", "10 GB", "64Mi"]),
        (more("queue: {ackWait: 5}"), &["queue.ackWait", "5"]),
        (more("queue: {weights: {middle: 1}}"), &["queue.weights", "unknown field `middle`"]),
        (more("results: {ttl: 0s}"), &["results.ttl", "0s", "1s"]),
        (more("server: {listen: nowhere}"), &["server.listen"]),
        (base.replace("name: m", "name: A_b"), &["model.name", "A_b", "[a-z0-9]"]),
        (base.replace("s3://b/m", "/models/m"), &["model.uri", "/models/m", "s3://"]),
    ];
    for (text, names) in cases {
        let file = folder.path().join("worker.yaml");
        fs::write(&file, text)?;
        expect(&worker(&["serve", "--config", &file.display().to_string()])?, Ending::ConfigInvalid, names);
    }
    let missing = worker(&["serve", "--config", "/no/such/worker.yaml"])?;
    expect(&missing, Ending::ConfigInvalid, &["/no/such/worker.yaml"]);
    Ok(())
}

#[test]
fn the_process_refuses_a_bad_model_with_its_code() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    fs::create_dir(path("model"))?;
    tiny::write(&path("model"), 2)?;
    fs::write(path("in.jsonl"), "{\"prompt\":\"x\"}\n")?;
    let (model, input, output) = (
        path("model").display().to_string(),
        path("in.jsonl").display().to_string(),
        path("out").display().to_string(),
    );
    let arguments = ["batch", "--model", &model, "--input", &input, "--output", &output];
    Change::Set("config.json", "num_hidden_layers", json!(4)).apply(&path("model"))?;
    expect(&worker(&arguments)?, Ending::ModelInvalid, &["model.layers.2."]);
    tiny::write(&path("model"), 2)?;
    Change::Cut("model.safetensors", 7).apply(&path("model"))?;
    expect(&worker(&arguments)?, Ending::ModelInvalid, &["model.safetensors"]);
    assert!(!path("out").exists(), "nothing is written");
    let usage = worker(&["batch", "--model"])?;
    assert_eq!(
        usage.status.code(),
        Some(Ending::ConfigInvalid.number().into()),
        "wrong use has the same code"
    );
    Ok(())
}
