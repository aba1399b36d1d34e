//! Tests of `generate.rs`: jobs through a scripted engine on the other end of the real handle.

use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use millrace_crds::job::{JobHeaders, header};
use millrace_crds::request::{ChatCompletion, FinishReason, TextCompletion};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::schedule::handle::{Limits, Submission, channel};
use crate::schedule::request::{Event, Finish, Logprobs, Request, SequenceUsage, Token};
use crate::text::prompt::tiny::{END, tiny};

const LIMITS: Limits =
    Limits { max_model_len: 512, max_sequences: 2, block_tokens: 16, kv_blocks: 64, vocabulary: 258 };

/// What the engine answers to a request: tokens, and how it ends unless a stop token or the limit did.
type Script = dyn Fn(&Request) -> Vec<u32> + Send + Sync;

/// A scripted engine; keeps what it was asked.
struct Engine {
    handle: EngineHandle,
    asked: Arc<Mutex<Vec<Request>>>,
    cancelled: Arc<AtomicUsize>,
}

impl Engine {
    fn new(script: impl Fn(&Request) -> Vec<u32> + Send + Sync + 'static) -> Self {
        let (handle, mut inbox) = channel(LIMITS);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let cancelled = Arc::new(AtomicUsize::new(0));
        let script: Arc<Script> = Arc::new(script);
        let (asking, cancelling) = (asked.clone(), cancelled.clone());
        std::thread::spawn(move || {
            while let Some(submission) = inbox.next_blocking() {
                asking.lock().unwrap().push(submission.request.clone());
                let (script, cancelled) = (script.clone(), cancelling.clone());
                // A thread for each, so that sequences end in any order.
                std::thread::spawn(move || run(submission, &*script, &cancelled));
            }
        });
        Self { handle, asked, cancelled }
    }

    /// Answers the bytes of a text, one token each, then the end of sequence.
    fn saying(text: &'static str) -> Self {
        Self::new(move |_| text.bytes().map(u32::from).chain([END]).collect())
    }
}

/// Runs one sequence as the engine does: up to a stop token, the limit, or its cancellation.
fn run(submission: Submission, script: &Script, cancelled: &AtomicUsize) {
    let Submission { request, events, .. } = submission;
    let mut finish = Finish::Length;
    for id in script(&request).into_iter().take(request.max_tokens as usize) {
        let logprobs = request.sampling.logprobs.map(|top| Logprobs {
            chosen: -0.25,
            top: [(id, -0.25), (END, f32::NEG_INFINITY)].into_iter().take(top as usize).collect(),
        });
        if events.blocking_send(Event::Token(Token { id, logprobs })).is_err() {
            cancelled.fetch_add(1, Ordering::SeqCst);
            return;
        }
        if request.stop_tokens.contains(&id) {
            finish = Finish::Stop;
            break;
        }
    }
    let _ = events.blocking_send(Event::Finished(finish, SequenceUsage::default()));
}

fn job(content: &str, body: &str) -> Job {
    let headers = [(header::JOB_ID, "j1"), (header::CONTENT_TYPE, content)];
    let headers = JobHeaders::parse(headers, Default::default()).unwrap();
    Job::decode(headers, 1_700_000_000, body.as_bytes(), &LIMITS.into()).unwrap()
}

fn one(body: &str) -> Job {
    job("application/json", body)
}

fn lines(body: &str) -> Job {
    job("application/jsonl", body)
}

async fn body_of(engine: &Engine, job: Job) -> Vec<Value> {
    let completion = generate(job, &tiny(), &engine.handle, None).await.unwrap();
    let text = std::str::from_utf8(&completion.body).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn answer_of<T: DeserializeOwned>(engine: &Engine, body: &str) -> T {
    let line = body_of(engine, one(body)).await.remove(0);
    serde_json::from_value(line["response"]["body"].clone()).unwrap()
}

const ASK: &str = r#"{"messages":[{"role":"user","content":"Hi"}]}"#;

#[tokio::test]
async fn a_chat_is_answered_in_openais_form() {
    let line = body_of(&Engine::saying("Hé!"), one(ASK)).await.remove(0);
    let expected = json!({
        "id": "j1", "custom_id": "j1", "error": null,
        "response": {"status_code": 200, "request_id": "j1", "body": {
            "id": "chatcmpl-j1", "object": "chat.completion", "created": 1_700_000_000, "model": "tiny",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hé!"}, "logprobs": null,
                         "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 22, "completion_tokens": 5, "total_tokens": 27}}},
    });
    assert_eq!(line, expected);
}

#[tokio::test]
async fn prompts_and_choices_lie_in_order() {
    let engine = Engine::new(|request| {
        // The first takes longest, so that the order of ends is not that of the prompts.
        std::thread::sleep(Duration::from_millis(u64::from(b'd' as u32 - request.prompt[0]) * 20));
        vec![request.prompt[0], request.prompt[0] + 1, END]
    });
    let body = r#"{"prompt":["a","b","c"],"n":2,"model":"other"}"#;
    let answer: TextCompletion = answer_of(&engine, body).await;
    let texts: Vec<&str> = answer.choices.iter().map(|choice| choice.text.as_str()).collect();
    assert_eq!(texts, ["ab", "ab", "bc", "bc", "cd", "cd"]);
    assert_eq!(answer.choices.iter().map(|choice| choice.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert_eq!((answer.usage.prompt_tokens, answer.usage.completion_tokens), (3, 18));
    assert_eq!(answer.model, "tiny", "the model that answered, whatever was asked for");
}

#[tokio::test]
async fn every_attempt_draws_the_same_numbers_and_every_choice_its_own() {
    let seeds = |body: &'static str| async move {
        let engine = Engine::saying("x");
        let _ = body_of(&engine, one(body)).await;
        let mut asked = engine.asked.lock().unwrap().clone();
        asked.sort_by_key(|request| request.prompt.clone());
        let mut seeds: Vec<u64> = asked.iter().map(|request| request.seed).collect();
        seeds.sort_unstable();
        seeds
    };
    let body = r#"{"prompt":["a","b"],"n":3}"#;
    let mut first = seeds(body).await;
    assert_eq!(first, seeds(body).await);
    first.dedup();
    assert_eq!(first.len(), 6);
    let given = seeds(r#"{"prompt":["a","b"],"n":2,"seed":5}"#).await;
    assert_eq!(given.iter().filter(|&&seed| seed == 5).count(), 2, "the caller's seed as it is");
    assert_eq!(given, seeds(r#"{"prompt":["c","d"],"n":2,"seed":5}"#).await);
}

#[tokio::test]
async fn a_stop_string_cuts_text_count_and_sequence() {
    let endless = |text: &'static str| {
        Engine::new(move |_| {
            text.bytes().map(u32::from).chain(std::iter::repeat_n(u32::from(b'z'), 400)).collect()
        })
    };
    let engine = endless("An answer.\nQ: next");
    let body = r#"{"prompt":"a","max_tokens":500,"stop":["\nQ:","never"]}"#;
    let answer: TextCompletion = answer_of(&engine, body).await;
    assert_eq!(answer.choices[0].text, "An answer.");
    assert_eq!(answer.choices[0].finish_reason, FinishReason::Stop);
    assert_eq!(answer.usage.completion_tokens, "An answer.\nQ:".len() as u64);
    let body = r#"{"prompt":"a","max_tokens":500,"stop":"\nQ:","include_stop_str_in_output":true}"#;
    let answer: TextCompletion = answer_of(&endless("An answer.\nQ: next"), body).await;
    assert_eq!(answer.choices[0].text, "An answer.\nQ:");
}

#[tokio::test]
async fn what_was_held_back_comes_out_at_the_end() {
    let body = r#"{"prompt":"a","max_tokens":7,"stop":"END"}"#;
    let answer: TextCompletion = answer_of(&Engine::saying("to be EN and on"), body).await;
    assert_eq!(answer.choices[0].text, "to be E");
    assert_eq!(answer.choices[0].finish_reason, FinishReason::Length);
    let answer: TextCompletion = answer_of(&Engine::saying("to be E"), body).await;
    assert_eq!(answer.choices[0].text, "to be E");
}

#[tokio::test]
async fn half_a_character_at_the_end_is_a_replacement() {
    let answer: TextCompletion = answer_of(&Engine::saying("aé"), r#"{"prompt":"a","max_tokens":2}"#).await;
    assert_eq!(answer.choices[0].text, "a\u{FFFD}");
    assert_eq!(answer.usage.completion_tokens, 2);
}

#[tokio::test]
async fn stop_tokens_leave_no_text_unless_wanted() {
    let text = |body: &'static str| async move {
        let answer: TextCompletion = answer_of(&Engine::saying("abc"), body).await;
        (answer.choices[0].text.clone(), answer.usage.completion_tokens, answer.choices[0].finish_reason)
    };
    let stop = FinishReason::Stop;
    assert_eq!(text(r#"{"prompt":"a","stop_token_ids":[98]}"#).await, ("a".into(), 2, stop));
    let kept = r#"{"prompt":"a","stop_token_ids":[98],"include_stop_str_in_output":true}"#;
    assert_eq!(text(kept).await, ("ab".into(), 2, stop));
    let ignored = r#"{"prompt":"a","ignore_eos":true,"skip_special_tokens":false}"#;
    assert_eq!(text(ignored).await, ("abc<|end|>".into(), 4, FinishReason::Length));
}

#[tokio::test]
async fn log_probabilities_in_both_forms() {
    let chat = r#"{"messages":[{"role":"user","content":"Hi"}],"logprobs":true,"top_logprobs":2}"#;
    let answer: ChatCompletion = answer_of(&Engine::saying("é"), chat).await;
    let content = &answer.choices[0].logprobs.as_ref().unwrap().content;
    assert_eq!(content.len(), 3, "two bytes and the end");
    assert_eq!((content[0].token.as_str(), &content[0].bytes[..]), ("\u{FFFD}", &[0xC3][..]));
    assert_eq!(content[0].logprob, -0.25);
    assert_eq!(content[0].top_logprobs[1].token, "<|end|>");
    assert_eq!(content[0].top_logprobs[1].logprob, -9999.0, "JSON has no infinity");
    let plain = r#"{"prompt":"a","logprobs":1}"#;
    let answer: TextCompletion = answer_of(&Engine::saying("aéb"), plain).await;
    let logprobs = answer.choices[0].logprobs.as_ref().unwrap();
    assert_eq!(logprobs.text_offset, [0, 1, 1, 2, 3]);
    assert_eq!(logprobs.tokens, ["a", "bytes:\\xc3", "bytes:\\xa9", "b", "<|end|>"]);
    assert_eq!(logprobs.token_logprobs, [Some(-0.25); 5]);
    assert_eq!(Value::from(logprobs.top_logprobs[0].clone()), json!({"a": -0.25}));
}

#[tokio::test]
async fn lines_are_answered_in_order_and_alone_in_their_faults() {
    let engine = Engine::new(|request| {
        std::thread::sleep(Duration::from_millis(u64::from(request.prompt[0] % 7)));
        vec![request.prompt[0], END]
    });
    let mut body = String::new();
    for i in 0..100u32 {
        body += &match i {
            7 => "{]\n".to_owned(),
            8 => format!("{}\n", json!({"custom_id": "long", "body": {"prompt": "x".repeat(600)}})),
            i => format!("{}\n", json!({"custom_id": format!("c{i}"), "body": {"prompt": [97 + i % 26]}})),
        };
    }
    let job = lines(&body);
    let completion = generate(job.clone(), &tiny(), &engine.handle, None).await.unwrap();
    assert_eq!((completion.answered, completion.refused), (98, 2));
    assert_eq!((completion.prompt_tokens, completion.output_tokens), (98, 196));
    let answers: Vec<Value> = completion
        .body
        .split(|&b| b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    assert_eq!(answers.len(), 100);
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer["id"], format!("j1-{i}"));
        match i {
            7 => assert!(answer["error"]["message"].as_str().unwrap().contains("not JSON")),
            8 => {
                let message = answer["error"]["message"].as_str().unwrap();
                assert!(
                    message.starts_with("prompt: ") && message.contains("600") && message.contains("512")
                );
                assert_eq!(answer["error"]["code"], "INVALID_REQUEST");
                assert_eq!(answer["custom_id"], "long");
            }
            i => assert_eq!(
                answer["response"]["body"]["choices"][0]["text"],
                char::from_u32(97 + i as u32 % 26).unwrap().to_string()
            ),
        }
    }
    let again = generate(job, &tiny(), &engine.handle, None).await.unwrap();
    assert_eq!(again.body, completion.body);
}

#[tokio::test]
async fn deltas_make_up_the_text_whatever_the_listeners_pace() {
    let text = "One, two, three — and four.";
    for (room, pause_ms) in [(1000, 0), (1, 1)] {
        let (sender, mut receiver) = mpsc::channel(room);
        let engine = Engine::saying("One, two, three — and four.");
        let listener = tokio::spawn(async move {
            let mut deltas = Vec::new();
            while let Some(delta) = receiver.recv().await {
                deltas.push(delta);
                tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            }
            deltas
        });
        let body = r#"{"prompt":["a","b"],"max_tokens":99,"stop":["zzz"]}"#;
        generate(one(body), &tiny(), &engine.handle, Some(sender)).await.unwrap();
        let deltas = listener.await.unwrap();
        for choice in 0..2 {
            let of: Vec<_> = deltas.iter().filter(|delta| delta.choice == choice).collect();
            assert_eq!(of.iter().map(|delta| delta.text.as_str()).collect::<String>(), text);
            assert!(of.iter().zip(0..).all(|(delta, number)| delta.number == number));
            assert_eq!(of.iter().filter(|delta| delta.finish_reason.is_some()).count(), 1);
            assert_eq!(of.last().unwrap().finish_reason.as_deref(), Some("stop"));
        }
    }
}

#[tokio::test]
async fn a_listener_that_left_harms_nothing() {
    let (sender, receiver) = mpsc::channel(1);
    drop(receiver);
    let answer = generate(one(ASK), &tiny(), &Engine::saying("Hi").handle, Some(sender)).await.unwrap();
    assert_eq!(answer.answered, 1);
}

#[tokio::test]
async fn dropping_the_job_cancels_its_sequences() {
    let started = Arc::new(AtomicBool::new(false));
    let flag = started.clone();
    let engine = Engine::new(move |_| {
        flag.store(true, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        vec![97; 400]
    });
    let (text, handle) = (tiny(), engine.handle.clone());
    let work = tokio::spawn(async move {
        generate(one(r#"{"prompt":["a","b"],"max_tokens":400}"#), &text, &handle, None).await
    });
    while !started.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    work.abort();
    assert!(work.await.unwrap_err().is_cancelled());
    for _ in 0..500 {
        if engine.cancelled.load(Ordering::SeqCst) == engine.asked.lock().unwrap().len() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} of the sequences were cancelled", engine.cancelled.load(Ordering::SeqCst));
}

#[tokio::test]
async fn the_engines_faults_are_told_apart() {
    let (handle, mut inbox) = channel(LIMITS);
    std::thread::spawn(move || {
        while let Some(submission) = inbox.next_blocking() {
            match submission.request.prompt[0] {
                97 => drop(submission.events.blocking_send(Event::Failed("not a number".into()))),
                98 => drop(
                    submission
                        .events
                        .blocking_send(Event::Finished(Finish::Length, SequenceUsage::default())),
                ),
                _ => return,
            }
        }
    });
    let fault = generate(one(r#"{"prompt":"a"}"#), &tiny(), &handle, None).await.unwrap_err();
    assert_eq!(fault, AnswerError::Sequence("not a number".into()));
    let both = "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}";
    let completion = generate(lines(both), &tiny(), &handle, None).await.unwrap();
    assert_eq!((completion.answered, completion.refused), (1, 1));
    let line: Value = serde_json::from_slice(completion.body.split(|&b| b == b'\n').next().unwrap()).unwrap();
    assert_eq!(line["error"]["code"], "INFERENCE_ERROR");
    for job in [one(r#"{"prompt":"c"}"#), lines("{\"prompt\":\"b\"}\n{\"prompt\":\"c\"}")] {
        assert_eq!(generate(job, &tiny(), &handle, None).await.unwrap_err(), AnswerError::Stopped);
    }
}

#[tokio::test]
async fn a_job_keeps_a_bounded_number_of_sequences_in_flight() {
    let running = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let (now, peak) = (running.clone(), most.clone());
    let engine = Engine::new(move |_| {
        peak.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(5));
        now.fetch_sub(1, Ordering::SeqCst);
        vec![END]
    });
    let body: String = (0..60).map(|_| "{\"prompt\":[\"a\",\"b\"]}\n").collect();
    assert_eq!(body_of(&engine, lines(&body)).await.len(), 60);
    let most = most.load(Ordering::SeqCst);
    assert!(most <= SEQUENCES_AHEAD * LIMITS.max_sequences as usize, "{most}");
    assert!(most >= LIMITS.max_sequences as usize, "{most}");
}

#[tokio::test]
async fn an_echo_begins_with_the_prompt_and_its_log_probabilities() {
    let engine =
        Engine::new(|request| request.sampling.forced.iter().copied().chain([b'!'.into(), END]).collect());
    let body = r#"{"prompt":"ab","echo":true,"logprobs":1,"n":2,"max_tokens":5}"#;
    let answer: TextCompletion = answer_of(&engine, body).await;
    assert_eq!(answer.usage.completion_tokens, 4);
    for choice in &answer.choices {
        assert_eq!(choice.text, "ab!");
        let logprobs = choice.logprobs.as_ref().unwrap();
        assert_eq!(logprobs.tokens, ["a", "b", "!", "<|end|>"]);
        assert_eq!(logprobs.text_offset, [0, 1, 2, 3]);
        assert_eq!(logprobs.token_logprobs, [None, Some(-0.25), Some(-0.25), Some(-0.25)]);
        assert!(logprobs.top_logprobs[0].is_none() && logprobs.top_logprobs[1].is_some());
    }
    let scored: Vec<usize> =
        engine.asked.lock().unwrap().iter().map(|asked| asked.sampling.forced.len()).collect();
    assert_eq!(scored.iter().sum::<usize>(), 1, "only the first choice of a prompt reports it: {scored:?}");
}

#[tokio::test]
async fn an_echo_shows_a_character_that_prompt_and_answer_share_whole() {
    let body = r#"{"prompt":[195],"echo":true,"max_tokens":2}"#;
    let answer: TextCompletion = answer_of(&Engine::new(|_| vec![0xA9, END]), body).await;
    assert_eq!(answer.choices[0].text, "é");
}

#[tokio::test]
async fn a_prompt_can_be_scored_without_an_answer() {
    let engine =
        Engine::new(|request| request.sampling.forced.iter().copied().chain([b'!'.into(), END]).collect());
    for body in [
        r#"{"prompt":"ab","echo":true,"logprobs":1,"max_tokens":0}"#,
        r#"{"prompt":"ab","echo":true,"max_tokens":0}"#,
        r#"{"prompt":"ab","prompt_logprobs":1,"max_tokens":0}"#,
    ] {
        let answer: TextCompletion = answer_of(&engine, body).await;
        let choice = &answer.choices[0];
        assert_eq!(choice.text, if body.contains("echo") { "ab" } else { "" });
        assert_eq!((answer.usage.completion_tokens, choice.finish_reason), (0, FinishReason::Length));
        let tokens = choice.logprobs.as_ref().map(|logprobs| logprobs.tokens.clone());
        assert_eq!(tokens, body.contains(r#""logprobs""#).then(|| vec!["a".to_owned(), "b".to_owned()]));
    }
}

#[tokio::test]
async fn a_chats_echo_begins_with_what_is_continued() {
    let text = |body: &'static str| async move {
        let answer: ChatCompletion = answer_of(&Engine::saying("Hi"), body).await;
        answer.choices[0].message.content.clone()
    };
    let continued = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"So: "}],
        "continue_final_message":true,"echo":true}"#;
    assert_eq!(text(continued).await, "So: Hi");
    let asked = r#"{"messages":[{"role":"user","content":"a"}],"echo":true}"#;
    assert_eq!(text(asked).await, "Hi");
}

#[tokio::test]
async fn prompts_have_log_probabilities_in_vllms_form() {
    let engine = Engine::new(|request| request.sampling.forced.iter().copied().chain([END]).collect());
    let line = body_of(&engine, one(r#"{"prompt":"ab","prompt_logprobs":2}"#)).await.remove(0);
    let expected = json!([null, {
        "98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"},
        "256": {"logprob": -9999.0, "rank": 2, "decoded_token": "<|end|>"},
    }]);
    let choice = &line["response"]["body"]["choices"][0];
    assert_eq!((&choice["prompt_logprobs"], &choice["logprobs"]), (&expected, &Value::Null));
    assert_eq!(line["response"]["body"]["usage"]["completion_tokens"], 1);
    let chat = body_of(&engine, one(&ASK.replacen('{', r#"{"prompt_logprobs":0,"#, 1))).await.remove(0);
    assert_eq!(chat["response"]["body"]["prompt_logprobs"].as_array().unwrap().len(), 22);
}

#[tokio::test]
async fn tokens_of_one_text_keep_their_own_values() {
    let engine = Engine::new(|_| vec![0xC3, 0xE2]);
    let answer: TextCompletion = answer_of(&engine, r#"{"prompt":"a","logprobs":2,"max_tokens":2}"#).await;
    let logprobs = answer.choices[0].logprobs.as_ref().unwrap();
    assert_eq!(logprobs.tokens, ["bytes:\\xc3", "bytes:\\xe2"]);
    let named: TextCompletion =
        answer_of(&engine, r#"{"prompt":"a","logprobs":2,"max_tokens":2,"return_tokens_as_token_ids":true}"#)
            .await;
    assert_eq!(named.choices[0].logprobs.as_ref().unwrap().tokens, ["token_id:195", "token_id:226"]);
}

#[tokio::test]
async fn no_stop_ends_a_choice_that_must_be_longer() {
    let engine = Engine::saying("abcabc");
    let answer: TextCompletion = answer_of(&engine, r#"{"prompt":"x","stop":"b","min_tokens":3}"#).await;
    assert_eq!(answer.choices[0].text, "abca");
    assert_eq!(engine.asked.lock().unwrap()[0].sampling.min_tokens, 3);
}
