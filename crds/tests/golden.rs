//! Every JSON form of the contracts against a file that people can read and other programs can be written from.
//!
//! A change of the wire shows up here as a change of a file. `MILLRACE_GOLDEN=write` writes the files anew.
//! What is read is what was written: each form goes through its own type and comes back the same, and types
//! that must not guess refuse a field that they do not know, at every depth.

use std::fs;
use std::path::Path;

use async_nats::jetstream::consumer::IntoConsumerConfig;
use millrace_crds::attempts::AttemptRecord;
use millrace_crds::config::{EngineConfig, ObjectStoreConfig, QueueConfig, ResultsConfig, WorkerConfig};
use millrace_crds::job::{INPUT_BYTES_MAX, JOB_BYTES_MAX, JobHeaders, REQUESTS_MAX, header};
use millrace_crds::load::{ColdStart, LoadReport, Phase};
use millrace_crds::names::{Class, JobId, JobPlace, ModelRef, SubjectToken};
use millrace_crds::request::{
    BatchLine, CHAT_COMPLETIONS, ChatChoice, ChatCompletion, ChatLogprobs, ChatMessage, ChatTokenLogprob,
    FinishReason, TextChoice, TextCompletion, TextLogprobs, TopLogprob, Usage,
};
use millrace_crds::result::{ErrorCode, LineError, OutcomeKind, OutputLine, OutputReference, Response};
use millrace_crds::scaling::ScalingSpec;
use millrace_crds::streams;
use millrace_crds::tokens::TokenDelta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Compares a form with its file.
fn golden(name: &str, found: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = format!("{found:#}\n");
    if std::env::var_os("MILLRACE_GOLDEN").is_some_and(|value| value == "write") {
        fs::write(&path, &text).expect("the golden file is written");
        return;
    }
    let expected = fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; write it with MILLRACE_GOLDEN=write", path.display()));
    assert_eq!(text, expected, "{name} has changed: is that a change of the wire that others can follow?");
}

/// Compares values with their file, and sees to it that each comes back from its JSON as it was.
fn golden_of<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(name: &str, values: &[T]) {
    for value in values {
        let text = serde_json::to_string(value).expect("it serialises");
        assert_eq!(&serde_json::from_str::<T>(&text).expect("it reads what it wrote"), value);
    }
    golden(name, &serde_json::to_value(values).expect("it serialises"));
}

fn model() -> ModelRef {
    ModelRef::new("default", "smollm2").expect("a model")
}

fn job() -> JobId {
    "job-1".parse().expect("an id")
}

fn worker() -> SubjectToken {
    "smollm2-0".parse().expect("a name")
}

fn config(yaml: &str) -> WorkerConfig {
    serde_yaml::from_str(yaml).expect("a configuration")
}

const CONFIG_SHORT: &str = "
model: {name: smollm2, uri: 's3://models/smollm2'}
nats: {servers: ['nats://nats.default.svc:4222']}
";

const CONFIG_FULL: &str = "
model:
  namespace: team-a
  name: smollm2
  uri: s3://models/smollm2
  digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
  store:
    endpoint: http://s3.storage.svc:8333
    region: eu-1
    pathStyle: true
    credentialsDir: /etc/s3
    webIdentity: {tokenFile: /etc/token, roleArn: 'arn:aws:iam::1:role/m', endpoint: 'https://sts'}
    caFile: /etc/s3-ca/ca.crt
    proxy: http://proxy:3128
  cacheDir: /cache
  bytesMax: 20Gi
nats:
  servers: ['nats://a:4222', 'nats://b:4222']
  credentialsFile: /etc/nats/user.creds
  nkeyFile: /etc/nats/user.nk
  userFile: /etc/nats/user
  passwordFile: /etc/nats/password
  tokenFile: /etc/nats/token
  caFile: /etc/nats/ca.crt
  certificateFile: /etc/nats/tls.crt
  keyFile: /etc/nats/tls.key
  tlsFirst: true
  domain: hub
  apiPrefix: $JS.hub.API
  monitor: http://nats:8222
  provision: true
engine:
  device: cpu
  deviceIndex: 1
  dtype: bf16
  quantization: int8
  kvCacheDtype: fp8_e4m3
  maxModelLen: 4096
  maxSequences: 256
  maxBatchTokens: 8192
  kvCacheFraction: 0.9
  kvCacheBytes: 64Gi
  prefixCache: false
  threads: 8
  stepTimeout: 20s
  splitSpecialTokens: true
queue:
  maxDeliver: 7
  ackWait: 45s
  backoff: [1s, 1m]
  maxJobs: 1000
  maxBytes: 1Gi
  replicas: 3
  attemptTimeout: 10m
  weights: {high: 8, normal: 2, low: 1}
results:
  ttl: 48h
  maxBytes: 1Gi
  deadTtl: 1000h
  deadMaxBytes: 100Mi
  inlineBytesMax: 512Ki
  objectStore: {uri: 's3://results/a', store: {endpoint: 'http://s3:8333'}}
drain: {timeout: 5m}
server: {listen: '127.0.0.1:9100'}
";

#[test]
fn worker_configuration() {
    golden_of("worker-config-defaults.json", &[config(CONFIG_SHORT)]);
    golden_of("worker-config-full.json", &[config(CONFIG_FULL)]);
}

#[test]
fn job_headers() {
    let headers = [
        (header::JOB_ID, "job-1"),
        (header::DEADLINE, "2026-11-23T10:00:00Z"),
        (header::REPLY_SUBJECT, "replies.a"),
        (header::STREAM, "true"),
        (header::INPUT, "s3://jobs/in.jsonl"),
        (header::OUTPUT, "s3://jobs/out.jsonl"),
        (header::TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        (header::CONTENT_TYPE, "application/jsonl"),
        (header::UNKNOWN_FIELDS, "ignore"),
        (header::RESULT_JOB_ID, "job-1"),
    ];
    let shown = |job: &JobHeaders| {
        json!({
            "id": job.id.as_str(), "deadline": job.deadline.map(|at| at.unix_timestamp()),
            "replySubject": job.reply_subject, "stream": job.stream, "input": job.input, "output": job.output,
            "traceparent": job.traceparent, "jsonl": job.jsonl, "ignoreUnknown": job.ignore_unknown,
        })
    };
    let place = JobPlace { stream_created_ms: 1_764_540_000_123, sequence: 7 };
    let full = JobHeaders::parse(headers, place).expect("valid headers");
    let bare = JobHeaders::parse([], place).expect("no headers");
    let of_outcomes = [
        header::RESULT_JOB_ID,
        header::OUTCOME,
        header::ATTEMPT,
        header::WORKER,
        header::MODEL_DIGEST,
        header::BODY_DIGEST,
        header::QUEUE_WAIT_MS,
        header::RUN_MS,
        header::IGNORED_FIELDS,
        header::TRACEPARENT,
    ];
    let of_dead_letters =
        [header::RESULT_JOB_ID, header::ATTEMPT, header::WORKER, header::REASON, header::CLASS];
    let all: serde_json::Map<String, Value> =
        headers.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    golden(
        "job-headers.json",
        &json!({
            "job": all, "read as": shown(&full), "no headers, stream sequence 7, read as": shown(&bare),
            "on outcomes": of_outcomes, "on dead letters": of_dead_letters,
            "limits": {"jobBytes": JOB_BYTES_MAX, "inputBytes": INPUT_BYTES_MAX, "requests": REQUESTS_MAX},
        }),
    );
}

fn refused(code: ErrorCode, message: &str) -> OutputLine {
    let error = Some(LineError { code, message: message.into() });
    OutputLine { id: "job-1".into(), custom_id: "job-1".into(), response: None, error }
}

fn answered(body: Value) -> OutputLine {
    let response = Response { status_code: 200, request_id: "job-1-0".into(), body };
    OutputLine { id: "job-1-0".into(), custom_id: "mine".into(), response: Some(response), error: None }
}

fn chat() -> ChatCompletion {
    let top = TopLogprob { token: "é".into(), logprob: -0.25, bytes: "é".into() };
    let token =
        ChatTokenLogprob { token: "é".into(), logprob: -0.25, bytes: "é".into(), top_logprobs: vec![top] };
    let message = ChatMessage { role: "assistant".into(), content: "é".into() };
    ChatCompletion {
        id: "chatcmpl-job-1-0".into(),
        object: "chat.completion".into(),
        created: 1_795_428_000,
        model: "smollm2".into(),
        choices: vec![ChatChoice {
            index: 0,
            message,
            logprobs: Some(ChatLogprobs { content: vec![token] }),
            finish_reason: FinishReason::Stop,
        }],
        usage: Usage { prompt_tokens: 9, completion_tokens: 1, total_tokens: 10 },
        prompt_logprobs: None,
    }
}

fn completion() -> TextCompletion {
    let top = json!({" solid": -0.5}).as_object().expect("an object").clone();
    TextCompletion {
        id: "cmpl-job-1-0".into(),
        object: "text_completion".into(),
        created: 1_795_428_000,
        model: "smollm2".into(),
        choices: vec![TextChoice {
            index: 0,
            text: " solid".into(),
            logprobs: Some(TextLogprobs {
                text_offset: vec![0],
                token_logprobs: vec![Some(-0.5)],
                tokens: vec![" solid".into()],
                top_logprobs: vec![Some(top)],
            }),
            finish_reason: FinishReason::Length,
            prompt_logprobs: None,
        }],
        usage: Usage { prompt_tokens: 6, completion_tokens: 1, total_tokens: 7 },
    }
}

#[test]
fn result_lines_of_each_kind() {
    golden_of("result-completed.json", &[answered(json!(chat())), answered(json!(completion()))]);
    golden_of(
        "result-rejected.json",
        &[
            refused(ErrorCode::InvalidRequest, "max_tokens: 0 is not from 1 to 2048"),
            refused(ErrorCode::DeadlineExceeded, "the deadline 2026-11-23T10:00:00Z has passed"),
            refused(ErrorCode::Cancelled, "the job was cancelled"),
        ],
    );
    golden_of(
        "result-dead.json",
        &[
            refused(ErrorCode::InferenceError, "the engine failed on the job: logits are not numbers"),
            refused(ErrorCode::WorkerLost, "5 attempts were begun and none came to an end"),
            refused(ErrorCode::IdReused, "job id job-1 was used before with another body"),
        ],
    );
    let reference =
        OutputReference { output: "s3://results/a/job-1".into(), bytes: 1_048_577, sha256: "0".repeat(64) };
    golden_of("result-reference.json", &[reference]);
    let kinds = [OutcomeKind::Completed, OutcomeKind::Rejected, OutcomeKind::Dead];
    for kind in kinds {
        assert_eq!(json!(kind), kind.as_str(), "the header says what the JSON says");
    }
    golden_of("outcome-kinds.json", &kinds);
}

#[test]
fn answers_and_batch_lines() {
    golden_of("chat-completion.json", &[chat()]);
    golden_of("text-completion.json", &[completion()]);
    let line = BatchLine {
        custom_id: "mine".into(),
        method: "POST".into(),
        url: CHAT_COMPLETIONS.into(),
        body: json!({"messages": [{"role": "user", "content": "Hi"}]}),
    };
    golden_of("batch-line.json", &[line]);
}

#[test]
fn error_codes_are_a_closed_set() {
    let all = [
        ErrorCode::InvalidRequest,
        ErrorCode::DeadlineExceeded,
        ErrorCode::Cancelled,
        ErrorCode::InferenceError,
        ErrorCode::WorkerLost,
        ErrorCode::IdReused,
    ];
    for code in all {
        assert_eq!(json!(code), code.as_str());
    }
    golden_of("error-codes.json", &all);
    serde_json::from_str::<ErrorCode>("\"TIMEOUT\"").expect_err("no other code is read");
}

#[test]
fn load_reports() {
    let report = LoadReport {
        worker: worker(),
        phase: Phase::Loading,
        uptime_s: 1.5,
        kv_blocks_used: 0,
        kv_blocks_total: 4096,
        sequences_running: 0,
        sequences_waiting: 0,
        jobs_held: 0,
        prompt_tokens_per_s: 0.0,
        output_tokens_per_s: 0.0,
        jobs_finished: 0,
        model_digest: None,
        cold_start: None,
    };
    let cold_start =
        ColdStart { connect_ms: 12.5, pull_ms: 800.0, load_ms: 350.0, warm_up_ms: 40.0, total_ms: 1202.5 };
    let ready = LoadReport {
        phase: Phase::Ready,
        uptime_s: 61.5,
        kv_blocks_used: 512,
        sequences_running: 64,
        sequences_waiting: 3,
        jobs_held: 20,
        prompt_tokens_per_s: 1200.5,
        output_tokens_per_s: 500.25,
        jobs_finished: 1000,
        model_digest: Some(format!("sha256:{}", "0".repeat(64))),
        cold_start: Some(cold_start),
        ..report.clone()
    };
    let phase = |phase| LoadReport { phase, ..report.clone() };
    refuses_surplus(&ready, 2);
    golden_of("load-report.json", &[phase(Phase::Pulling), report.clone(), ready, phase(Phase::Draining)]);
}

#[test]
fn token_deltas_and_the_ledger_of_attempts() {
    let delta = TokenDelta { number: 0, request: 2, choice: 1, text: " a\n".into(), finish_reason: None };
    let last =
        TokenDelta { number: 1, text: String::new(), finish_reason: Some("stop".into()), ..delta.clone() };
    golden_of("token-delta.json", &[delta, last]);
    golden_of("attempt-record.json", &[AttemptRecord { starts: 2, ..AttemptRecord::unstarted(worker()) }]);
}

#[test]
fn subjects_streams_and_consumers() {
    let (model, job, worker) = (model(), job(), worker());
    let place = JobPlace { stream_created_ms: 1_764_540_000_123, sequence: 7 };
    let classes = |name: &dyn Fn(Class) -> String| -> Value {
        Class::ALL.iter().map(|&class| (class.as_str().to_owned(), json!(name(class)))).collect()
    };
    golden(
        "subjects.json",
        &json!({
            "jobs": classes(&|class| model.jobs_subject(class)),
            "result": model.result_subject(&job), "results": model.results_wildcard(),
            "dead": model.dead_subject(&job), "dead letters": model.dead_wildcard(),
            "tokens": model.tokens_subject(&job),
            "cancel": model.cancel_subject(&job), "cancel markers": model.cancel_wildcard(),
            "attempts": model.attempts_subject(&job), "ledgers": model.attempts_wildcard(),
            "load": model.load_subject(&worker), "load reports": model.load_wildcard(),
            "job id without a header": JobId::of_place(place).as_str(),
            "id of a job whose id was used before": job.reused(1_764_540_000_123, 7).as_str(),
        }),
    );
    let (queue, results) = (QueueConfig::default(), ResultsConfig::default());
    let streams = [
        streams::jobs(&model, &queue, &results),
        streams::results(&model, &queue, &results),
        streams::dead(&model, &queue, &results),
    ];
    golden("streams.json", &json!(streams));
    let consumer = |class| streams::consumer(&model, class, &queue).into_consumer_config();
    golden("consumers.json", &json!(Class::ALL.map(consumer)));
}

#[test]
fn scaling() {
    golden_of("scaling-defaults.json", &[ScalingSpec::default()]);
}

/// Every copy of `value` that has one more field, in one of its objects.
fn with_one_more_field(value: &Value) -> Vec<Value> {
    let mut copies = Vec::new();
    match value {
        Value::Object(map) => {
            let mut copy = map.clone();
            copy.insert("surplus".into(), json!(1));
            copies.push(Value::Object(copy));
            for (name, inner) in map {
                for changed in with_one_more_field(inner) {
                    let mut copy = map.clone();
                    copy[name] = changed;
                    copies.push(Value::Object(copy));
                }
            }
        }
        Value::Array(items) => {
            for (at, inner) in items.iter().enumerate() {
                for changed in with_one_more_field(inner) {
                    let mut copy = items.clone();
                    copy[at] = changed;
                    copies.push(Value::Array(copy));
                }
            }
        }
        _ => {}
    }
    copies
}

fn refuses_surplus<T: Serialize + DeserializeOwned + std::fmt::Debug>(value: &T, objects: usize) {
    let copies = with_one_more_field(&serde_json::to_value(value).expect("it serialises"));
    assert_eq!(copies.len(), objects, "objects in {value:?}");
    for copy in copies {
        let error = serde_json::from_value::<T>(copy.clone()).expect_err(&copy.to_string()).to_string();
        assert!(error.contains("unknown field `surplus`"), "{error}");
    }
}

#[test]
fn what_configures_or_is_acted_on_refuses_unknown_fields_at_every_depth() {
    refuses_surplus(&config(CONFIG_SHORT), 10);
    refuses_surplus(&config(CONFIG_FULL), 13);
    refuses_surplus(&EngineConfig::default(), 1);
    refuses_surplus(&ObjectStoreConfig { uri: "s3://a/b".into(), store: Default::default() }, 2);
    refuses_surplus(&ScalingSpec::default(), 3);
    let reference = OutputReference { output: "s3://a/b".into(), bytes: 1, sha256: "0".repeat(64) };
    refuses_surplus(&reference, 1);
    let line = BatchLine {
        custom_id: "a".into(),
        method: "POST".into(),
        url: CHAT_COMPLETIONS.into(),
        body: json!(1),
    };
    refuses_surplus(&line, 1);
}

/// Readers of answers and deltas may be older than the worker that wrote them.
#[test]
fn what_is_only_read_by_callers_may_grow() {
    let delta: TokenDelta = serde_json::from_str(r#"{"number":1,"text":"a","surplus":1}"#).expect("read");
    assert_eq!((delta.number, delta.request, delta.choice), (1, 0, 0));
    let mut line = serde_json::to_value(refused(ErrorCode::Cancelled, "x")).expect("it serialises");
    line["surplus"] = json!(1);
    assert_eq!(serde_json::from_value::<OutputLine>(line).expect("read"), refused(ErrorCode::Cancelled, "x"));
}
