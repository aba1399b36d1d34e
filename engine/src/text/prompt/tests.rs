//! Tests of `prompt.rs`.

use super::tiny::*;
use serde_json::{Value, json};

use super::*;

fn limits() -> Limits {
    Limits { max_model_len: 100, max_sequences: 4, block_tokens: 16, kv_blocks: 64, vocabulary: 258 }
}

fn request(body: &str) -> TextRequest {
    let headers = millrace_crds::job::JobHeaders::parse([], 1).unwrap();
    let job = crate::text::job::Job::decode(headers, 0, body.as_bytes(), &limits().into()).unwrap();
    job.lines.into_iter().next().unwrap().request.unwrap()
}

#[test]
fn a_folder_is_read_whole() {
    let text = tiny();
    assert_eq!(text.model(), "tiny");
    assert_eq!(text.end_tokens(), [END]);
    assert!(text.has_template());
    assert_eq!(text.encode("Aé<|end|>", true).unwrap(), [65, 0xC3, 0xA9, END]);
    assert_eq!(text.pieces().bytes(END), b"<|end|>");
    assert_eq!(text.pieces().bytes(9999), b"");
}

#[test]
fn chats_go_through_the_template_and_prompts_do_not() {
    let text = tiny();
    let chat = text.prompts(&request(r#"{"messages":[{"role":"user","content":"Hi"}]}"#).input, 0).unwrap();
    let mut expected = vec![TURN];
    expected.extend(b"user: Hi\n".map(u32::from));
    expected.push(TURN);
    expected.extend(b"assistant: ".map(u32::from));
    assert_eq!(chat, [Prompt { tokens: expected }]);
    let plain = text.prompts(&request(r#"{"prompt":["Hi",[1,2]]}"#).input, 0).unwrap();
    assert_eq!(plain, [Prompt { tokens: vec![72, 105] }, Prompt { tokens: vec![1, 2] }]);
}

#[test]
fn limits_fill_what_a_request_leaves_open() {
    let text = tiny();
    let tokens = |body: &str, prompt: usize| {
        let prompt = Prompt { tokens: vec![1; prompt] };
        text.sequence(&request(body), &prompt, 0, &limits()).map(|sequence| sequence.max_tokens)
    };
    let chat = r#"{"messages":[{"role":"user","content":"a"}]}"#;
    assert_eq!(tokens(chat, 30).unwrap(), 70);
    assert_eq!(tokens(r#"{"prompt":"a"}"#, 30).unwrap(), COMPLETION_TOKENS_DEFAULT);
    assert_eq!(tokens(r#"{"prompt":"a"}"#, 95).unwrap(), 5);
    let error = tokens(r#"{"prompt":"a"}"#, 100).unwrap_err().to_string();
    assert!(error.contains("100") && error.contains("1 "), "{error}");
    let error = tokens(r#"{"prompt":"a","max_tokens":50}"#, 60).unwrap_err().to_string();
    assert!(error.contains("60") && error.contains("50") && error.contains("100"), "{error}");
    let cache = Limits { kv_blocks: 2, ..limits() };
    let prompt = Prompt { tokens: vec![1; 30] };
    assert_eq!(text.sequence(&request(chat), &prompt, 0, &cache).unwrap().max_tokens, 2);
}

#[test]
fn stop_tokens_are_the_models_and_the_callers() {
    let text = tiny();
    let stop = |body: &str| {
        let prompt = Prompt { tokens: vec![1] };
        text.sequence(&request(body), &prompt, 0, &limits()).unwrap().stop_tokens
    };
    assert_eq!(stop(r#"{"prompt":"a","stop_token_ids":[9,3,9]}"#), [3, 9, END]);
    assert_eq!(stop(r#"{"prompt":"a","stop_token_ids":[9],"ignore_eos":true}"#), [9]);
}

#[test]
fn the_authors_sampling_serves_where_the_request_is_silent() {
    let folder = tiny_folder();
    let generation = r#"{"temperature":0.6,"top_k":20,"top_p":0.95,"eos_token_id":[256,257]}"#;
    std::fs::write(folder.path().join("generation_config.json"), generation).unwrap();
    let text = Text::open(folder.path(), "tiny").unwrap();
    assert_eq!(text.end_tokens(), [END, TURN]);
    let prompt = Prompt { tokens: vec![1] };
    let sampling =
        text.sequence(&request(r#"{"prompt":"a","top_k":5}"#), &prompt, 0, &limits()).unwrap().sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.6, 5, 0.95));
    let openai = tiny().sequence(&request(r#"{"prompt":"a"}"#), &prompt, 0, &limits()).unwrap().sampling;
    assert_eq!((openai.temperature, openai.top_k, openai.top_p), (1.0, 0, 1.0));
}

#[test]
fn malformed_folders_are_refused_by_file() {
    type Spoil = fn(&std::path::Path);
    let cases: [(&str, Spoil, &[&str]); 12] = [
        ("no tokenizer", |f| std::fs::remove_file(f.join("tokenizer.json")).unwrap(), &["tokenizer.json"]),
        (
            "torn tokenizer",
            |f| std::fs::write(f.join("tokenizer.json"), "{\"ver").unwrap(),
            &["tokenizer.json"],
        ),
        ("no model", |f| std::fs::write(f.join("tokenizer.json"), "{}").unwrap(), &["tokenizer.json"]),
        (
            "unknown decoder",
            |f| spoil(f, "/decoder", json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
            &["tokenizer.json", "WordPiece", "ByteLevel"],
        ),
        ("no decoder", |f| spoil(f, "/decoder", Value::Null), &["tokenizer.json", "null", "ByteLevel"]),
        (
            "no object",
            |f| std::fs::write(f.join("tokenizer_config.json"), "[]").unwrap(),
            &["tokenizer_config.json", "object"],
        ),
        (
            "template does not compile",
            |f| std::fs::write(f.join("chat_template.jinja"), "{% for %}").unwrap(),
            &["chat_template.jinja", "does not compile", "line 1"],
        ),
        (
            "template too long",
            |f| std::fs::write(f.join("chat_template.jinja"), vec![b'a'; SOURCE + 1]).unwrap(),
            &["chat_template.jinja", "262145", "262144"],
        ),
        (
            "template no UTF-8",
            |f| std::fs::write(f.join("chat_template.jinja"), [0xFF]).unwrap(),
            &["chat_template.jinja", "utf-8"],
        ),
        (
            "end token",
            |f| std::fs::write(f.join("generation_config.json"), r#"{"eos_token_id":"x"}"#).unwrap(),
            &["generation_config.json", "eos_token_id", "\"x\""],
        ),
        (
            "temperature",
            |f| std::fs::write(f.join("generation_config.json"), r#"{"temperature":-1}"#).unwrap(),
            &["generation_config.json", "temperature", "-1", "100"],
        ),
        ("config", |f| std::fs::write(f.join("config.json"), "{").unwrap(), &["config.json"]),
    ];
    for (name, spoil, parts) in cases {
        let folder = tiny_folder();
        spoil(folder.path());
        let error = Text::open(folder.path(), "tiny").expect_err(name).to_string();
        for part in parts {
            assert!(error.contains(part), "{name}: {error}");
        }
    }
}

const SOURCE: usize = crate::text::template::SOURCE_BYTES_MAX;

fn spoil(folder: &Path, pointer: &str, value: Value) {
    let mut file = tokenizer();
    *file.pointer_mut(pointer).unwrap() = value;
    std::fs::write(folder.join("tokenizer.json"), file.to_string()).unwrap();
}

#[test]
fn the_real_model_speaks_chatml() {
    let Some(folder) = smollm2() else { return };
    let text = Text::open(&folder, "smollm2").unwrap();
    assert_eq!(text.end_tokens(), [2]);
    let chat = request(r#"{"messages":[{"role":"user","content":"Hi"}]}"#);
    let prompt = &text.prompts(&chat.input, 0).unwrap()[0];
    assert_eq!(prompt.tokens[0], 1, "a conversation begins with <|im_start|>");
    let mut rendered = String::new();
    let mut detokenizer = text.detokenizer(false);
    prompt.tokens.iter().for_each(|&id| detokenizer.push(id, &mut rendered));
    let expected = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
        <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(rendered, expected);
}
