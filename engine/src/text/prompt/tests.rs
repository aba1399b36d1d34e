//! Tests of `prompt.rs`.

use super::tiny::*;
use serde_json::{Value, json};

use super::*;

fn limits() -> Limits {
    Limits { max_model_len: 100, max_sequences: 4, block_tokens: 16, kv_blocks: 64, vocabulary: 258 }
}

fn request(body: &str) -> TextRequest {
    let headers = millrace_crds::job::JobHeaders::parse([], Default::default()).unwrap();
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
    let chat = text.prompts(&request(r#"{"messages":[{"role":"user","content":"Hi"}]}"#), 0).unwrap();
    let mut expected = vec![TURN];
    expected.extend(b"user: Hi\n".map(u32::from));
    expected.push(TURN);
    expected.extend(b"assistant: ".map(u32::from));
    assert_eq!(chat, [Prompt { tokens: expected }]);
    let plain = text.prompts(&request(r#"{"prompt":["Hi",[1,2]]}"#), 0).unwrap();
    assert_eq!(plain, [Prompt { tokens: vec![72, 105] }, Prompt { tokens: vec![1, 2] }]);
}

#[test]
fn limits_fill_what_a_request_leaves_open() {
    let text = tiny();
    let tokens = |body: &str, prompt: usize| {
        let prompt = Prompt { tokens: vec![1; prompt] };
        text.sequence(&request(body), &prompt, (0, false), &limits()).map(|sequence| sequence.max_tokens)
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
    assert_eq!(text.sequence(&request(chat), &prompt, (0, false), &cache).unwrap().max_tokens, 2);
}

#[test]
fn stop_tokens_are_the_models_and_the_callers() {
    let text = tiny();
    let stop = |body: &str| {
        let prompt = Prompt { tokens: vec![1] };
        text.sequence(&request(body), &prompt, (0, false), &limits()).unwrap().stop_tokens
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
    let sampling = text
        .sequence(&request(r#"{"prompt":"a","top_k":5}"#), &prompt, (0, false), &limits())
        .unwrap()
        .sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.6, 5, 0.95));
    let openai =
        tiny().sequence(&request(r#"{"prompt":"a"}"#), &prompt, (0, false), &limits()).unwrap().sampling;
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
    // Its own end, and the two that llama.cpp knows by their texts.
    assert_eq!(text.end_tokens(), [0, 2, 4]);
    let chat = request(r#"{"messages":[{"role":"user","content":"Hi"}]}"#);
    let prompt = &text.prompts(&chat, 0).unwrap()[0];
    assert_eq!(prompt.tokens[0], 1, "a conversation begins with <|im_start|>");
    let mut rendered = String::new();
    let mut detokenizer = text.detokenizer(false);
    prompt.tokens.iter().for_each(|&id| detokenizer.push(id, &mut rendered));
    let expected = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
        <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(rendered, expected);
}

/// `tests/golden/folders/make.py` has asked transformers about the same folders.
#[test]
fn ids_equal_those_of_transformers() {
    let golden: Value =
        serde_json::from_str(include_str!("../../../tests/golden/folders/expected.json")).unwrap();
    let shapes = golden["shapes"].as_object().unwrap();
    assert!(shapes.len() >= 25, "{} shapes", shapes.len());
    let mut wrong = Vec::new();
    for (name, shape) in shapes {
        let folder = tempfile::TempDir::new().unwrap();
        let write = |file: &str, content: &Value| {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content.as_str().map_or_else(|| content.to_string(), str::to_owned))
                .unwrap();
        };
        write("tokenizer.json", &golden["tokenizers"][shape["tokenizer"].as_u64().unwrap() as usize]);
        write("tokenizer_config.json", &shape["config"]);
        shape["files"].as_object().unwrap().iter().for_each(|(file, content)| write(file, content));
        let text = Text::open(folder.path(), name).unwrap();
        let mut check = |what: String, found: Value, expected: &Value| {
            if found != *expected {
                wrong.push(format!("{name}: {what}: {found} instead of {expected}"));
            }
        };
        for (at, sample) in golden["texts"].as_array().unwrap().iter().enumerate() {
            let sample = sample.as_str().unwrap();
            let ids = text.encode(sample, true).unwrap();
            check(format!("decoded {sample:?}"), text.decode(ids.clone()).into(), &shape["decoded"][at]);
            check(format!("{sample:?}"), ids.into(), &shape["special"][at]);
            check(
                format!("{sample:?}, bare"),
                text.encode(sample, false).unwrap().into(),
                &shape["bare"][at],
            );
        }
        for (at, tools) in [json!([]), golden["tools"].clone()].into_iter().enumerate() {
            let body = json!({"messages": golden["messages"], "tools": tools}).to_string();
            let found = text.prompts(&request(&body), 0).ok().map(|mut prompts| prompts.remove(0).tokens);
            check(format!("chat {at}"), found.map_or(Value::Null, Value::from), &shape["chats"][at]);
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn special_tokens_of_callers_are_text_where_they_ask_for_it() {
    let text = tiny();
    let ids = |body: &str| text.prompts(&request(body), 0).unwrap().remove(0).tokens;
    assert_eq!(ids(r#"{"prompt":"a<|end|>"}"#), [97, END]);
    assert_eq!(ids(r#"{"prompt":"a<|end|>","split_special_tokens":true}"#).len(), 8);
    let chat = |rest: &str| ids(&format!(r#"{{"messages":[{{"role":"user","content":"<|turn|>"}}]{rest}}}"#));
    let forged = |tokens: &[u32]| tokens.iter().filter(|&&token| token == TURN).count();
    assert_eq!(forged(&chat("")), 3);
    let split = chat(r#","split_special_tokens":true"#);
    assert_eq!(forged(&split), 2);
    assert_eq!(split.len(), chat("").len() + "<|turn|>".len() - 1);
}

#[test]
fn other_added_tokens_of_callers_are_text_too() {
    let folder = tiny_folder();
    let mut file = tokenizer();
    file["added_tokens"][1]["special"] = false.into();
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
    let text = Text::open(folder.path(), "tiny").unwrap();
    let ids = |body: &str| text.prompts(&request(body), 0).unwrap().remove(0).tokens;
    assert_eq!(ids(r#"{"prompt":"a<|turn|>"}"#), [97, TURN]);
    let split = r#","split_special_tokens":true}"#;
    assert_eq!(ids(&format!(r#"{{"prompt":"a<|turn|>"{split}"#)).len(), 9);
    let chat = ids(&format!(r#"{{"messages":[{{"role":"user","content":"<|turn|>b"}}]{split}"#));
    assert_eq!(chat.iter().filter(|&&token| token == TURN).count(), 2, "the template's own turns");
}

#[test]
fn who_splits_special_tokens_is_decided_by_request_then_worker_then_model() {
    let chat = |said: &str| format!(r#"{{"messages":[{{"role":"user","content":"<|turn|>"}}]{said}}}"#);
    let turns = |text: &Text, said: &str| {
        let tokens = text.prompts(&request(&chat(said)), 0).unwrap().remove(0).tokens;
        tokens.iter().filter(|&&token| token == TURN).count()
    };
    let (yes, no) = (r#","split_special_tokens":true"#, r#","split_special_tokens":false"#);
    let folder = tiny_folder();
    let worker = Text::open_for(folder.path(), "tiny", true).unwrap();
    assert_eq!([turns(&worker, ""), turns(&worker, yes), turns(&worker, no)], [2, 2, 3]);
    let plain = worker.prompts(&request(r#"{"prompt":"a<|end|>"}"#), 0).unwrap().remove(0).tokens;
    assert_eq!(plain.len(), 8);
    let config = json!({"eos_token": "<|end|>", "chat_template": TEMPLATE, "split_special_tokens": true});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let model = Text::open(folder.path(), "tiny").unwrap();
    assert_eq!([turns(&model, ""), turns(&model, yes), turns(&model, no)], [0, 2, 3]);
    let both = Text::open_for(folder.path(), "tiny", true).unwrap();
    assert_eq!(turns(&both, ""), 2);
}

#[test]
fn a_class_names_the_end_where_no_file_does() {
    let ends = |config: Value, generation: Value| {
        let folder = tiny_folder();
        let class = r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#;
        std::fs::write(folder.path().join("tokenizer_config.json"), class).unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        if !generation.is_null() {
            std::fs::write(folder.path().join("generation_config.json"), generation.to_string()).unwrap();
        }
        Text::open(folder.path(), "tiny").unwrap().end_tokens().to_vec()
    };
    let llama = json!({"architectures": ["LlamaForCausalLM"]});
    assert_eq!(ends(llama.clone(), Value::Null), [2]);
    assert_eq!(ends(llama.clone(), json!({"temperature": 1})), [2]);
    assert_eq!(ends(llama, json!({"eos_token_id": 9})), [9]);
    assert_eq!(ends(json!({"model_type": "gemma3_text"}), Value::Null), [1]);
    assert_eq!(ends(json!({"model_type": "qwen3"}), Value::Null), [0; 0]);
    assert_eq!(ends(json!({"model_type": "llama", "eos_token_id": null}), Value::Null), [0; 0]);
    assert_eq!(ends(json!({"model_type": "llama", "eos_token_id": 256.0}), Value::Null), [256]);
    let nested =
        json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "eos_token_id": 7}});
    assert_eq!(ends(nested, Value::Null), [7]);
}

#[test]
fn long_prompts_keep_their_end_where_that_is_asked_for() {
    let text = tiny();
    let ids = |body: &str| text.prompts(&request(body), 0).unwrap().remove(0).tokens;
    assert_eq!(ids(r#"{"prompt":"abc","truncate_prompt_tokens":2}"#), [98, 99]);
    assert_eq!(ids(r#"{"prompt":"abc","truncate_prompt_tokens":9}"#), [97, 98, 99]);
    assert_eq!(ids(r#"{"prompt":"abc","truncate_prompt_tokens":-1}"#), [97, 98, 99]);
}

#[test]
fn several_parts_join_with_line_feeds_where_the_template_takes_none() {
    let body =
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]}"#;
    let tokens = tiny().prompts(&request(body), 0).unwrap().remove(0).tokens;
    let expected: Vec<u32> = b"user: a\nb\n".iter().map(|&byte| byte.into()).collect();
    assert_eq!(tokens[1..=expected.len()], expected);
}

#[test]
fn parts_of_every_kind_reach_the_template_as_text() {
    let parts = r#"["a",{"type":"input_text","text":"b"},{"type":"refusal","refusal":"c"}]"#;
    let body = format!(r#"{{"messages":[{{"role":"user","content":{parts}}}]}}"#);
    let folder = tiny_folder();
    let template =
        "{% for m in messages %}{% for p in m.content %}{{ p.type }}={{ p.text }};{% endfor %}{% endfor %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let decoded = |text: &Text| text.decode(text.prompts(&request(&body), 0).unwrap().remove(0).tokens);
    assert_eq!(decoded(&Text::open(folder.path(), "tiny").unwrap()), "text=a;text=b;text=c;");
    assert!(decoded(&tiny()).contains("a\nb\nc"));
}

#[test]
fn what_says_nothing_refuses_no_folder() {
    let folder = tiny_folder();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write(
        "generation_config.json",
        "\u{FEFF}{\"top_k\": -1, \"top_p\": 0, \"eos_token_id\": [256, 128009, -1, null]}",
    );
    write("config.json", r#"{"eos_token_id": -1, "rope_theta": Infinity}"#);
    let text = Text::open(folder.path(), "tiny").unwrap();
    assert_eq!((text.defaults().top_k, text.defaults().top_p), (0, f32::MIN_POSITIVE));
    let prompt = Prompt { tokens: vec![1] };
    let sequence = text.sequence(&request(r#"{"prompt":"a"}"#), &prompt, (0, false), &limits()).unwrap();
    assert_eq!(sequence.stop_tokens, [END], "a token beyond the vocabulary is never chosen");
}

#[test]
fn a_tokenizer_of_another_form_is_refused_with_the_command_that_converts_it() {
    for file in ["tokenizer.model", "tekken.json", "vocab.txt"] {
        let folder = tiny_folder();
        std::fs::rename(folder.path().join("tokenizer.json"), folder.path().join(file)).unwrap();
        let error = Text::open(folder.path(), "tiny").unwrap_err().to_string();
        assert!(error.starts_with(file) && error.contains("AutoTokenizer"), "{error}");
    }
}

#[test]
fn rules_for_tokens_become_biases() {
    let text = tiny();
    let prompt = Prompt { tokens: vec![1] };
    let asked = |body: &str| text.sequence(&request(body), &prompt, (0, false), &limits());
    let sampling =
        asked(r#"{"prompt":"a","allowed_token_ids":[5,6],"logit_bias":{"5":2}}"#).unwrap().sampling;
    assert_eq!(sampling.logit_bias, [(5, 2.0), (5, 1024.0), (6, 1024.0)]);
    let words = asked(r#"{"prompt":"a","bad_words":["no"]}"#).unwrap().sampling.bad_words;
    assert_eq!(words, [vec![110, 111]], "with a space before it, it has another number of tokens");
    let error = asked(r#"{"prompt":"a","allowed_token_ids":[5],"repetition_penalty":1.2}"#).unwrap_err();
    assert!(error.to_string().contains("repetition_penalty is 1.2"), "{error}");
    let many: Vec<u32> = (0..200).collect();
    let body = format!(
        r#"{{"prompt":"a","stop_token_ids":{many:?},"min_tokens":1,"allowed_token_ids":{:?}}}"#,
        [7; 900]
    );
    let error = asked(&body).unwrap_err().to_string();
    assert!(error.contains("1101 tokens") && error.contains("1024"), "{error}");
}

#[test]
fn a_scored_prompt_is_chosen_token_by_token() {
    let prompt = Prompt { tokens: vec![7, 8, 9] };
    let request = request(r#"{"prompt":[7,8,9],"prompt_logprobs":3,"max_tokens":4,"logprobs":1}"#);
    let sequence = tiny().sequence(&request, &prompt, (0, true), &limits()).unwrap();
    assert_eq!((sequence.prompt.as_slice(), sequence.max_tokens), ([7].as_slice(), 6));
    assert_eq!(
        (sequence.sampling.forced.as_slice(), sequence.sampling.logprobs),
        ([8, 9].as_slice(), Some(3))
    );
}

/// Recorded before the templates had an interpreter of their own: 64 chats and completions of a real model.
#[test]
fn the_real_models_prompts_are_what_they_were() {
    use sha2::{Digest, Sha256};
    let Some(folder) = smollm2() else { return };
    let text = Text::open(&folder, "smollm2").unwrap();
    let limits = crate::text::job::JobLimits { max_model_len: 8192, vocabulary: 49_152 };
    let (mut count, mut hash) = (0, Sha256::new());
    for (index, line) in include_str!("../../../../examples/prompts.jsonl").lines().enumerate() {
        let line = crate::text::job::RequestLine::decode(index, String::new(), line.as_bytes(), &limits);
        for prompt in text.prompts(&line.request.unwrap(), 0).unwrap() {
            count += prompt.tokens.len();
            prompt.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        }
    }
    let hash = hex::encode(hash.finalize());
    assert_eq!((count, &hash[..16]), (2836, "9392f395b8f84974"));
}
