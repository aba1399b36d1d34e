//! `millrace-worker batch` as a process: a file of requests becomes a file of answers, and a run that is killed
//! goes on to the same bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use millrace_tests::process::Process;
use millrace_tests::random::Random;
use millrace_tests::{tiny, tools};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Requests of the file; one in eight is malformed.
const REQUESTS: usize = 600;
/// How often the run is killed.
const KILLS: usize = 6;
/// A run of the whole file takes some seconds, also in a test build on a busy machine.
const RUN_LIMIT: Duration = Duration::from_secs(120);

struct Setting {
    folder: TempDir,
}

impl Setting {
    fn new(input: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::create_dir(folder.path().join("model"))?;
        tiny::write(&folder.path().join("model"), 4)?;
        fs::write(folder.path().join("in.jsonl"), input)?;
        Ok(Self { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, output: &str, extra: &[&str]) -> Result<Process> {
        let mut command = Command::new(tools::program("millrace-worker")?);
        command.arg("batch").arg("--model").arg(self.path("model"));
        command.arg("--input").arg(self.path("in.jsonl")).arg("--output").arg(self.path(output));
        command.args(["--name", "tiny", "--kv-cache-bytes", "16Mi"]).args(extra);
        Process::start(&command, &self.path("log"))
    }

    fn run(&self, output: &str, extra: &[&str]) -> Result<()> {
        let mut process = self.start(output, extra)?;
        let status = process.wait(RUN_LIMIT)?;
        anyhow::ensure!(status.success(), "{status}\n{}", process.log_tail());
        Ok(())
    }
}

fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path)?;
    text.lines().map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
}

/// Chats and prompts, greedy and sampled, single and several; and every kind of bad line between them.
fn input() -> String {
    let mut text = String::new();
    for i in 0..REQUESTS {
        let (id, url) = (format!("c{i}"), "/v1/chat/completions");
        let chat = |body: Value| json!({"custom_id": id, "method": "POST", "url": url, "body": body});
        let ask = json!([{"role": "user", "content": format!("Question {i}: é or 😀?")}]);
        let line = match i % 8 {
            0 => chat(json!({"messages": ask, "max_tokens": 24})).to_string(),
            1 => chat(json!({"messages": ask, "max_tokens": 30, "temperature": 1, "n": 2})).to_string(),
            2 => json!({"prompt": format!("Once {i}"), "max_tokens": 16, "logprobs": 2}).to_string(),
            3 => json!({"prompt": [format!("a {i}"), "b"], "max_tokens": 8, "temperature": 0.7}).to_string(),
            4 => json!({"prompt": "seeded", "seed": i, "temperature": 1.3, "max_tokens": 20}).to_string(),
            5 => chat(json!({"messages": ask, "max_tokens": 40, "stop": ["e", "\n"]})).to_string(),
            6 => json!({"prompt": [1, 2, 3], "max_tokens": 12, "ignore_eos": true}).to_string(),
            _ => match i / 8 % 5 {
                0 => "{\"prompt\": ".to_owned(),
                1 => json!({"prompt": "x", "max_tokens": 0}).to_string(),
                2 => json!({"custom_id": "c0", "body": {"prompt": "twice"}}).to_string(),
                3 => json!({"prompt": "x".repeat(5000)}).to_string(),
                _ => json!({"prompt": "x", "temperature": "hot"}).to_string(),
            },
        };
        text += &line;
        text.push('\n');
    }
    text
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() -> Result<()> {
    let setting = Setting::new(&input())?;
    setting.run("undisturbed.jsonl", &[])?;
    let expected = fs::read(setting.path("undisturbed.jsonl"))?;
    let mut random = Random::from_environment("batch", 17);
    let output = setting.path("out.jsonl");
    let (mut killed, mut answered) = (0, 0);
    while killed < KILLS {
        // Each run has other sizes: what it answers may not depend on them.
        let (sequences, budget) =
            ([3, 16, 64][killed % 3].to_string(), [64, 128, 512][killed % 3].to_string());
        let mut process =
            setting.start("out.jsonl", &["--max-sequences", &sequences, "--max-batch-tokens", &budget])?;
        let target = answered + 1 + random.within(0..80) as usize;
        let count = || fs::read(&output).map_or(0, |bytes| bytes.iter().filter(|&&b| b == b'\n').count());
        let begun = Instant::now();
        while count() < target && process.ended()?.is_none() {
            anyhow::ensure!(begun.elapsed() < RUN_LIMIT, "no answer\n{}", process.log_tail());
            std::thread::sleep(Duration::from_micros(random.within(200..3000)));
        }
        anyhow::ensure!(
            process.ended()?.is_none(),
            "the run ended before it was killed\n{}",
            process.log_tail()
        );
        process.kill()?;
        let bytes = fs::read(&output)?;
        anyhow::ensure!(expected.starts_with(&bytes), "after kill {killed} the answers are no beginning");
        anyhow::ensure!(count() >= answered, "answers were lost");
        (killed, answered) = (killed + 1, count());
    }
    anyhow::ensure!(answered < REQUESTS, "something is left to do");
    setting.run("out.jsonl", &[])?;
    anyhow::ensure!(fs::read(&output)? == expected, "the resumed run ends with other bytes");
    // Nothing is left to do: the same command changes nothing.
    setting.run("out.jsonl", &[])?;
    anyhow::ensure!(fs::read(&output)? == expected);
    Ok(())
}

#[test]
fn a_bad_row_does_not_stop_the_others() -> Result<()> {
    let setting = Setting::new(&input())?;
    setting.run("out.jsonl", &[])?;
    let answers = lines(&setting.path("out.jsonl"))?;
    assert_eq!(answers.len(), REQUESTS);
    let parts = [
        "not JSON",
        "max_tokens: 0",
        "custom_id: \"c0\"",
        "model length of 2048 tokens",
        "temperature: \"hot\"",
    ];
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer["id"], format!("batch-{i}"));
        if i % 8 == 7 {
            let error = &answer["error"];
            assert_eq!(
                (error["code"].as_str(), &answer["response"]),
                (Some("INVALID_REQUEST"), &Value::Null)
            );
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(parts[i / 8 % 5]), "{message}");
        } else {
            assert_eq!((&answer["error"], &answer["response"]["status_code"]), (&Value::Null, &json!(200)));
            let tokens = answer["response"]["body"]["usage"]["completion_tokens"].as_u64().unwrap();
            assert!(tokens >= 1, "{answer}");
        }
    }
    Ok(())
}

#[test]
fn a_model_or_setting_that_cannot_work_is_told_and_nothing_is_written() -> Result<()> {
    let setting = Setting::new("{\"prompt\":\"x\"}\n")?;
    let cases: [(&[&str], &[&str]); 5] = [
        (&["--max-model-len", "4096"], &["engine.maxModelLen", "4096", "2048"]),
        (&["--max-sequences", "0"], &["engine.maxSequences", "0", "1 to 4096"]),
        (&["--max-batch-tokens", "4"], &["engine.maxBatchTokens", "4", "16 to 65536"]),
        (&["--dtype", "f8"], &["--dtype", "f8", "bf16"]),
        (&["--model", "/no/such/folder"], &["/no/such/folder"]),
    ];
    for (extra, parts) in cases {
        // The last --model counts where two are given.
        let mut process = match extra {
            ["--model", folder] => {
                let mut command = Command::new(tools::program("millrace-worker")?);
                command.args(["batch", "--model", folder, "--input"]).arg(setting.path("in.jsonl"));
                command.arg("--output").arg(setting.path("out.jsonl"));
                Process::start(&command, &setting.path("log"))?
            }
            _ => setting.start("out.jsonl", extra)?,
        };
        let status = process.wait(RUN_LIMIT)?;
        let log = process.log_tail();
        anyhow::ensure!(!status.success(), "{extra:?} was taken");
        for part in parts {
            anyhow::ensure!(log.contains(part), "{extra:?}: {log} lacks {part:?}");
        }
        anyhow::ensure!(!setting.path("out.jsonl").exists(), "{extra:?} wrote something");
    }
    Ok(())
}
