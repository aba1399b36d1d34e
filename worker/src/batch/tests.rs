//! Tests of `batch.rs`: interrupted runs end with the bytes of undisturbed ones, over a scripted engine.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use millrace_engine::schedule::handle::{Limits, channel};
use millrace_engine::schedule::request::{Event, Finish, SequenceUsage, Token};
use millrace_engine::text::prompt::tiny::{END, tiny};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const LIMITS: Limits =
    Limits { max_model_len: 512, max_sequences: 3, block_tokens: 16, kv_blocks: 64, vocabulary: 258 };

/// Answers a prompt with itself; with a number, dies after so many sequences.
fn engine(deaths: Option<usize>) -> (EngineHandle, Arc<AtomicUsize>) {
    let (handle, mut inbox) = channel(LIMITS);
    let begun = Arc::new(AtomicUsize::new(0));
    let count = begun.clone();
    std::thread::spawn(move || {
        while let Some(submission) = inbox.next_blocking() {
            if deaths.is_some_and(|deaths| count.fetch_add(1, Ordering::SeqCst) == deaths) {
                return;
            }
            let request = submission.request;
            for &id in request.prompt.iter().take(request.max_tokens as usize - 1).chain([&END]) {
                let _ = submission.events.blocking_send(Event::Token(Token { id, logprobs: None }));
            }
            let _ = submission.events.blocking_send(Event::Finished(Finish::Stop, SequenceUsage::default()));
        }
    });
    (handle, begun)
}

struct Files {
    folder: TempDir,
}

impl Files {
    fn new(input: &str) -> Self {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("in.jsonl"), input).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn output(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// One run; `deaths` as for [`engine`].
    fn run_with(&self, output: &str, settings: &str, deaths: Option<usize>) -> anyhow::Result<Summary> {
        let (input, output) = (self.path("in.jsonl"), self.path(output));
        let (handle, _) = engine(deaths);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let files = FilePair { input: &input, output: &output, settings };
        runtime.block_on(answer_file(&files, &tiny(), &handle))
    }

    fn run(&self, output: &str) -> anyhow::Result<Summary> {
        self.run_with(output, "settings", None)
    }
}

/// Batch lines, bare bodies, blank lines and every kind of bad line.
fn input(requests: usize) -> String {
    let mut text = String::new();
    for i in 0..requests {
        text += &match i % 10 {
            3 => "not json\n".to_owned(),
            4 => format!("\n{}\n", json!({"prompt": format!("bare {i}"), "max_tokens": 100})),
            7 => format!("{}\n", json!({"custom_id": "c0", "body": {"prompt": "twice"}})),
            8 => format!("{}\r\n", json!({"custom_id": format!("c{i}"), "body": {"prompt": "x", "n": 0}})),
            _ => {
                let body = json!({"messages": [{"role": "user", "content": format!("request {i} é😀")}]});
                let url = "/v1/chat/completions";
                let line = json!({"custom_id": format!("c{i}"), "method": "POST", "url": url, "body": body});
                format!("{line}\n")
            }
        };
    }
    text
}

#[test]
fn answers_stand_in_the_inputs_order() {
    let files = Files::new(&input(20));
    let summary = files.run("out.jsonl").unwrap();
    assert_eq!((summary.resumed, summary.totals.answered, summary.totals.refused), (0, 14, 6));
    let output = String::from_utf8(files.output("out.jsonl")).unwrap();
    let lines: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 20);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line["id"], format!("batch-{i}"));
        assert_eq!(line["error"].is_null(), !matches!(i % 10, 3 | 7 | 8), "{line}");
    }
    assert_eq!(lines[4]["custom_id"], "batch-4");
    assert_eq!(lines[4]["response"]["body"]["choices"][0]["text"], "bare 4");
    assert!(lines[7]["error"]["message"].as_str().unwrap().contains("line 0"));
    let created = lines[0]["response"]["body"]["created"].as_i64().unwrap();
    assert_eq!(created, input::fingerprint(&files.path("in.jsonl")).unwrap().1);
    let again = files.run("out.jsonl").unwrap();
    assert_eq!((again.resumed, again.totals), (20, Totals::default()));
    assert_eq!(files.output("out.jsonl"), output.as_bytes());
}

#[test]
fn a_byte_order_mark_is_read_over_and_utf_16_is_named() {
    let plain = Files::new(&input(2));
    plain.run("out.jsonl").unwrap();
    let marked = Files::new(&format!("\u{feff}{}", input(2)));
    marked.run("out.jsonl").unwrap();
    let answers = |files: &Files| String::from_utf8(files.output("out.jsonl")).unwrap();
    let choices = |text: &str| -> Vec<Value> {
        text.lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["response"]["body"]["choices"].clone())
            .collect()
    };
    assert_eq!(choices(&answers(&marked)), choices(&answers(&plain)));
    let wide = Files::new("");
    let bytes: Vec<u8> = input(1).encode_utf16().flat_map(u16::to_le_bytes).collect();
    fs::write(wide.path("in.jsonl"), bytes).unwrap();
    let error = format!("{:#}", wide.run("out.jsonl").unwrap_err());
    assert!(error.contains("UTF-16"), "{error}");
}

#[test]
fn an_input_may_be_empty() {
    let files = Files::new("\n \n");
    assert_eq!(files.run("out.jsonl").unwrap().totals, Totals::default());
    assert_eq!(files.output("out.jsonl"), b"");
}

#[test]
fn a_line_over_the_limit_is_refused_alone() {
    let limit = millrace_engine::text::job::REQUEST_BYTES_MAX;
    let bare = |text: usize| format!("{{\"prompt\":\"{}\"}}", "x".repeat(text));
    let exact = bare(limit - bare(0).len());
    assert_eq!(exact.len(), limit);
    let files = Files::new(&format!("{}\n{{\"prompt\":\"a\"}}\n{exact}\n{}", bare(limit), bare(3 * limit)));
    assert_eq!(files.run("out.jsonl").unwrap().totals.answered, 1);
    let output = String::from_utf8(files.output("out.jsonl")).unwrap();
    let lines: Vec<&str> = output.lines().collect();
    assert!(lines[0].contains(&format!("line: {} bytes exceed the limit of {limit}", limit + bare(0).len())));
    assert!(lines[1].contains("\"error\":null"));
    assert!(lines[2].contains("exceeds the model length of 512 tokens"), "{}", lines[2]);
    assert!(lines[3].contains(&format!("line: {} bytes", 3 * limit + bare(0).len())));
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let files = Files::new(&input(5));
    files.run("out.jsonl").unwrap();
    let refusal = |error: anyhow::Error| format!("{error:#}");
    let error = refusal(files.run_with("out.jsonl", "other settings", None).unwrap_err());
    assert!(error.contains("out.jsonl") && error.contains("model or setting"), "{error}");
    let before = files.output("out.jsonl");
    fs::write(files.path("in.jsonl"), input(6)).unwrap();
    let error = refusal(files.run("out.jsonl").unwrap_err());
    assert!(error.contains("another input"), "{error}");
    fs::write(files.path("mine.txt"), "not an output").unwrap();
    let error = refusal(files.run("mine.txt").unwrap_err());
    assert!(error.contains("13 bytes") && error.contains("mine.txt.state"), "{error}");
    assert_eq!(files.output("mine.txt"), b"not an output");
    assert_eq!(files.output("out.jsonl"), before, "a refusal changes nothing");
    let error = refusal(files.run("no/such/folder/out.jsonl").unwrap_err());
    assert!(error.contains("no/such/folder"), "{error}");
}

#[test]
fn a_copy_of_the_input_goes_on_where_the_first_run_stopped() {
    let files = Files::new(&input(12));
    files.run("undisturbed.jsonl").unwrap();
    let expected = files.output("undisturbed.jsonl");
    let _ = files.run_with("out.jsonl", "settings", Some(4));
    // The same bytes, written later: content decides, and the answers keep the first run's time.
    fs::write(files.path("in.jsonl"), input(12)).unwrap();
    let file = fs::File::options().write(true).open(files.path("in.jsonl")).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.set_modified(modified + Duration::from_secs(500)).unwrap();
    let summary = files.run("out.jsonl").unwrap();
    assert!(summary.resumed > 0, "something was answered before");
    assert_eq!(files.output("out.jsonl"), expected);
}

#[test]
fn a_file_of_which_every_line_failed_is_told() {
    let bad = "{\"prompt\":\"x\",\"n\":0}\n";
    let files = Files::new(&bad.repeat(3));
    let failed = |files: &Files| files.run("out.jsonl").unwrap().all_failed;
    assert!(failed(&files));
    assert!(failed(&files), "an earlier run's errors are errors still");
    assert!(!failed(&Files::new(&format!("{bad}{{\"prompt\":\"a\"}}\n"))));
    assert!(!failed(&Files::new("")));
}

#[test]
fn two_runs_do_not_write_one_file() {
    let files = Files::new(&input(3));
    let state = State { input_sha256: "a".into(), settings_sha256: "b".into(), created: 0 };
    let first = Output::open(&files.path("out.jsonl"), &state).unwrap();
    let error = Output::open(&files.path("out.jsonl"), &state).unwrap_err().to_string();
    assert!(error.contains("another run"), "{error}");
    drop(first);
    Output::open(&files.path("out.jsonl"), &state).unwrap();
}

#[test]
fn many_requests_stream_through() {
    let requests = 20_000;
    let text: String = (0..requests).map(|i| format!("{{\"prompt\":[{}]}}\n", i % 258)).collect();
    let files = Files::new(&text);
    let summary = files.run("out.jsonl").unwrap();
    assert_eq!(summary.totals.answered + summary.totals.refused, requests);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn interrupted_runs_end_with_the_same_bytes(
        requests in 1usize..60,
        interruptions in prop::collection::vec(
            (0usize..40, 0usize..200, prop::collection::vec(any::<u8>(), 0..80)),
            0..6,
        ),
    ) {
        let files = Files::new(&input(requests));
        files.run("undisturbed.jsonl").unwrap();
        let mut expected_resume = 0;
        for (deaths, torn, garbage) in interruptions {
            // The engine dies at some sequence; then the file loses its end, and gets another.
            let _ = files.run_with("out.jsonl", "settings", Some(deaths));
            let mut bytes = files.output("out.jsonl");
            let lines = bytes.iter().filter(|&&byte| byte == b'\n').count();
            prop_assert!(lines >= expected_resume, "{} answers became {}", expected_resume, lines);
            bytes.truncate(bytes.len().saturating_sub(torn));
            expected_resume = bytes.iter().filter(|&&byte| byte == b'\n').count();
            bytes.extend(garbage);
            fs::write(files.path("out.jsonl"), bytes).unwrap();
        }
        let summary = files.run("out.jsonl").unwrap();
        prop_assert_eq!(summary.resumed, expected_resume);
        prop_assert_eq!(files.output("out.jsonl"), files.output("undisturbed.jsonl"));
    }
}
