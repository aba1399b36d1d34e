//! Tests of `job.rs`: every form that is accepted, and a table of what is refused.

use millrace_crds::job::{JOB_BYTES_MAX, JobHeaders, REQUESTS_MAX, header};
use millrace_crds::result::ErrorCode;
use proptest::prelude::*;
use serde::Deserialize;

use super::*;

const LIMITS: JobLimits = JobLimits { max_model_len: 512, vocabulary: 1000 };

fn headers(jsonl: bool) -> JobHeaders {
    let content = if jsonl { "application/jsonl" } else { "application/json" };
    JobHeaders::parse([(header::JOB_ID, "job-1"), (header::CONTENT_TYPE, content)], Default::default())
        .unwrap()
}

fn decode(body: &str) -> Result<TextRequest, Reject> {
    let job = Job::decode(headers(false), 1_700_000_000, body.as_bytes(), &LIMITS)?;
    assert_eq!(job.lines.len(), 1);
    job.lines.into_iter().next().unwrap().request
}

fn decode_lines(body: &str) -> Vec<RequestLine> {
    Job::decode(headers(true), 1_700_000_000, body.as_bytes(), &LIMITS).unwrap().lines
}

#[test]
fn a_prompt_alone_is_a_request() {
    let request = decode(r#"{"prompt":"Hi"}"#).unwrap();
    let prompts = vec![PromptInput::Text("Hi".into())];
    assert_eq!(request.input, Input::Prompts { prompts, add_special_tokens: true });
    assert_eq!(request.params.n, 1);
    assert_eq!(request.params.max_tokens, None);
    assert!(request.params.skip_special_tokens && !request.params.ignore_eos);
}

#[test]
fn prompts_come_in_four_forms() {
    let text = |text: &str| PromptInput::Text(text.into());
    let cases = [
        (r#""a""#, vec![text("a")]),
        (r#"["a","b"]"#, vec![text("a"), text("b")]),
        ("[1,2,3]", vec![PromptInput::Tokens(vec![1, 2, 3])]),
        ("[[1,2],[3]]", vec![PromptInput::Tokens(vec![1, 2]), PromptInput::Tokens(vec![3])]),
        (r#"["a",[999]]"#, vec![text("a"), PromptInput::Tokens(vec![999])]),
    ];
    for (prompt, expected) in cases {
        let request = decode(&format!(r#"{{"prompt":{prompt}}}"#)).unwrap();
        let Input::Prompts { prompts, .. } = request.input else { panic!("{prompt} is no chat") };
        assert_eq!(prompts, expected);
    }
}

#[test]
fn messages_come_as_text_or_parts() {
    let body = r#"{"messages":[
        {"role":"developer","content":"Be brief.","name":"ops"},
        {"role":"user","content":[{"type":"text","text":"Say "},{"type":"text","text":"hi"}]},
        {"role":"assistant","content":"hi","refusal":null,"tool_calls":null},
        {"role":"user","content":""}]}"#;
    let Input::Chat(chat) = decode(body).unwrap().input else { panic!("messages are a chat") };
    assert_eq!(chat.messages.len(), 4);
    let parts = r#"{"role":"user","content":[{"type":"text","text":"Say "},{"type":"text","text":"hi"}]}"#;
    assert_eq!(chat.messages[1], Json(parts.into()));
    assert!(chat.add_generation_prompt && !chat.continue_final_message);
}

#[test]
fn all_parameters() {
    let body = r#"{"prompt":"a","model":"m","temperature":0.5,"top_p":0.9,"top_k":-1,"min_p":0.1,
        "repetition_penalty":1.1,"presence_penalty":-2,"frequency_penalty":2,"logit_bias":{"7":-100,"3":1.5},
        "stop":["x","y"],"stop_token_ids":[5],"seed":-1,"max_tokens":9,"n":2,"logprobs":3,"echo":false,
        "ignore_eos":true,"stream":true,"stream_options":{"include_usage":true},"user":"u","metadata":{"a":"b"},
        "store":true,"service_tier":"auto","best_of":1,"suffix":null,"include_stop_str_in_output":true,
        "min_tokens":2,"bad_words":["z"],
        "allowed_token_ids":[4,5],"truncate_prompt_tokens":-1,"prompt_logprobs":1,"return_tokens_as_token_ids":true,
        "split_special_tokens":true,"skip_special_tokens":false,"add_special_tokens":false,"tools":[],
         "response_format":{"type":"text"}}"#;
    let params = decode(body).unwrap().params;
    let expected = Params {
        n: 2,
        max_tokens: Some(9),
        stop: vec!["x".into(), "y".into()],
        include_stop: true,
        stop_token_ids: vec![5],
        ignore_eos: true,
        skip_special_tokens: false,
        seed: Some(u64::MAX),
        logprobs: Some(3),
        temperature: Some(0.5),
        top_p: Some(0.9),
        top_k: Some(0),
        min_p: Some(0.1),
        repetition_penalty: Some(1.1),
        presence_penalty: -2.0,
        frequency_penalty: 2.0,
        logit_bias: vec![(3, 1.5), (7, -100.0)],
        min_tokens: 2,
        bad_words: vec!["z".into()],
        allowed_token_ids: vec![4, 5],
        truncate_prompt_tokens: Some(512),
        prompt_logprobs: Some(1),
        echo: false,
        tokens_as_ids: true,
        split_special_tokens: Some(true),
    };
    assert_eq!(params, expected);
}

#[test]
fn null_is_absent() {
    let nulls = r#"{"prompt":"a","max_tokens":null,"stop":null,"logit_bias":null,"seed":null,"tools":null,
        "response_format":null,"unheard_of":null}"#;
    assert_eq!(decode(nulls), decode(r#"{"prompt":"a"}"#));
}

#[test]
fn log_probabilities_of_chats_need_both_fields() {
    let chat = |extra: &str| {
        decode(&format!(r#"{{"messages":[{{"role":"user","content":"a"}}]{extra}}}"#))
            .map(|r| r.params.logprobs)
    };
    assert_eq!(chat(r#","logprobs":true"#).unwrap(), Some(0));
    assert_eq!(chat(r#","logprobs":true,"top_logprobs":20"#).unwrap(), Some(20));
    assert_eq!(chat(r#","logprobs":false,"top_logprobs":0"#).unwrap(), None);
}

/// A malformed body, and what its refusal must name: field, value, limit.
#[derive(Deserialize)]
struct Malformed {
    body: String,
    names: Vec<String>,
}

/// The table of the golden file, which the test through the engine reads too, and the bodies that are long.
fn malformed() -> Vec<Malformed> {
    let table = include_str!("../../../tests/golden/malformed-requests.json");
    let mut all: Vec<Malformed> = serde_json::from_str(table).unwrap();
    let many = |count: usize, one: &str| vec![one; count].join(",");
    let prompt = |rest: &str| format!(r#"{{"prompt":"a",{rest}}}"#);
    let mut add = |body: String, names: &[&str]| {
        all.push(Malformed { body, names: names.iter().map(|&name| name.to_owned()).collect() });
    };
    add(format!("{}1{}", "[".repeat(200), "]".repeat(200)), &["body", "recursion limit"]);
    add(format!(r#"{{"prompt":[{}]}}"#, many(513, "1")), &["prompt", "512"]);
    add(format!(r#"{{"prompt":[{}]}}"#, many(2049, "\"a\"")), &["prompt", "2048", "prompts"]);
    add(prompt(&format!(r#""stop":"{}""#, "x".repeat(257))), &["stop[0]", "257", "256"]);
    add(prompt(&format!(r#""model":"{}""#, "m".repeat(257))), &["model", "257", "256"]);
    all
}

#[test]
fn malformed_jobs_are_refused_by_field_value_and_limit() {
    let table = malformed();
    assert!(table.len() >= 60, "{} cases", table.len());
    for Malformed { body, names } in table {
        let shown: String = body.chars().take(120).collect();
        let reject = decode(&body).expect_err(&shown);
        assert_eq!(reject.code(), ErrorCode::InvalidRequest);
        let message = reject.to_string();
        assert!(message.starts_with(&names[0]), "{shown}\n{message}\nmust name {}", names[0]);
        for name in names {
            assert!(message.contains(&name), "{shown}\n{message}\nmust hold {name:?}");
        }
        assert!(message.len() < 400, "{message}");
    }
}

#[test]
fn a_body_over_the_limit_is_refused_before_it_is_read() {
    let body = vec![b' '; JOB_BYTES_MAX + 1];
    let message = Job::decode(headers(false), 0, &body, &LIMITS).unwrap_err().to_string();
    assert_eq!(message, "body: 1048577 bytes exceed the limit of 1048576");
    let mut claimed = headers(false);
    claimed.input = Some("s3://b/k".into());
    let message = Job::decode(claimed, 0, &vec![b' '; REQUEST_BYTES_MAX + 1], &LIMITS).unwrap_err();
    assert!(message.to_string().contains("4194304"));
}

#[test]
fn refusals_quote_no_prompt() {
    let secret = "a canary that no message may show";
    let bodies = [
        format!(r#"{{"messages":"{secret}"}}"#),
        format!(r#"{{"messages":["{secret}"]}}"#),
        format!(r#"{{"prompt":"{secret}","max_tokens":0}}"#),
        format!(r#"{{"prompt":{{"text":"{secret}"}}}}"#),
        format!(r#"{{"prompt":"{secret}" "#),
        format!(r#"{{"prompt":[["{secret}"]]}}"#),
    ];
    for body in &bodies[..5] {
        let message = decode(body).unwrap_err().to_string();
        assert!(!message.contains("canary"), "{message}");
    }
}

#[test]
fn a_bad_line_is_refused_alone() {
    let body = concat!(
        r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x"}}"#,
        "\n",
        "not json\n",
        "\n",
        r#"{"custom_id":"c","method":"GET","url":"/v1/completions","body":{"prompt":"x"}}"#,
        "\r\n",
        r#"{"custom_id":"d","url":"/v1/embeddings","body":{"prompt":"x"}}"#,
        "\n",
        r#"{"custom_id":"e","url":"/v1/chat/completions","body":{"prompt":"x"}}"#,
        "\n",
        r#"{"custom_id":"a","url":"/v1/completions","body":{"prompt":"y"}}"#,
        "\n",
        r#"{"method":"POST","url":"/v1/completions","body":{"prompt":"x"}}"#,
        "\n",
        r#"{"custom_id":"h","url":"/v1/completions"}"#,
        "\n",
        r#"{"custom_id":"i","url":"/v1/completions","body":{"prompt":"x"},"priority":1}"#,
        "\n",
        r#"{"prompt":"bare"}"#,
    );
    let lines = decode_lines(body);
    let errors: Vec<String> = lines
        .iter()
        .map(|line| line.request.as_ref().err().map(ToString::to_string).unwrap_or_default())
        .collect();
    let expected = [
        "",
        "line is not JSON",
        "method: \"GET\" is not \"POST\"",
        "url: \"/v1/embeddings\" is not",
        "messages: missing",
        "custom_id: \"a\" is already taken by line 0",
        "custom_id: missing",
        "body: missing",
        "priority: unknown field",
        "",
    ];
    assert_eq!(errors.len(), expected.len());
    for (error, expected) in errors.iter().zip(expected) {
        assert!(error.starts_with(expected) && error.is_empty() == expected.is_empty(), "{error}");
    }
    let ids: Vec<&str> = lines.iter().map(|line| line.custom_id.as_str()).collect();
    assert_eq!(ids, ["a", "job-1-1", "c", "d", "e", "a", "job-1-6", "h", "i", "job-1-9"]);
    assert_eq!(lines[9].id, "job-1-9");
}

#[test]
fn a_job_of_lines_has_at_least_one_and_not_too_many() {
    let refuse = |body: &str| {
        let mut headers = headers(true);
        headers.input = Some("s3://b/k".into());
        Job::decode(headers, 0, body.as_bytes(), &LIMITS).unwrap_err().to_string()
    };
    assert!(refuse(" \n\n").contains("at least 1 line"));
    let message = refuse(&"7\n".repeat(REQUESTS_MAX + 1));
    assert!(message.contains("50000"), "{message}");
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(body in prop::collection::vec(any::<u8>(), 0..200), jsonl: bool) {
        let _ = Job::decode(headers(jsonl), 0, &body, &LIMITS);
    }

    #[test]
    fn any_field_and_value_is_decoded_or_refused_by_name(
        name in "(n|stop|seed|top_k|top_p|min_p|logprobs|max_tokens|temperature|logit_bias|stop_token_ids)",
        value in "(-?[0-9]{1,20}(\\.[0-9]{1,3})?|true|\"x{0,300}\"|\\[\\]|\\{\\}|\\[1,\"a\"\\]|\\{\"5\":1e3\\})",
    ) {
        // A number such as 007 is not JSON at all.
        if let Err(reject) = decode(&format!(r#"{{"prompt":"a","{name}":{value}}}"#)) {
            let message = reject.to_string();
            prop_assert!(message.starts_with(&name) || message.starts_with("body is not JSON"), "{}", message);
        }
    }
}

#[test]
fn unknown_fields_are_ignored_and_listed_where_the_job_says_so() {
    let pairs = [(header::CONTENT_TYPE, "application/jsonl"), (header::UNKNOWN_FIELDS, "ignore")];
    let headers = JobHeaders::parse(pairs, Default::default()).unwrap();
    let body = concat!(
        r#"{"prompt":"a","top_a":0.1,"mystery":{"x":1}}"#,
        "\n",
        r#"{"messages":[{"role":"user","content":"a","mood":"x"}],"top_a":1}"#,
        "\n",
        r#"{"prompt":"a","max_tokens":"many"}"#,
    );
    let job = Job::decode(headers, 0, body.as_bytes(), &LIMITS).unwrap();
    assert_eq!(job.ignored_fields, ["messages[0].mood", "mystery", "top_a"]);
    let answered: Vec<bool> = job.lines.iter().map(|line| line.request.is_ok()).collect();
    assert_eq!(answered, [true, true, false], "a field that is known is still checked");
    assert!(decode(r#"{"prompt":"a","top_a":0.1}"#).is_err());
}

#[test]
fn emptiness_says_nothing() {
    let empties =
        r#","tools":[],"tool_choice":null,"functions":[],"logit_bias":{},"unheard_of":[],"other":{},"x":"""#;
    let request = decode(&format!(r#"{{"prompt":"a"{empties}}}"#)).unwrap();
    assert_eq!(request, decode(r#"{"prompt":"a"}"#).unwrap());
    let body = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","refusal":null,
        "annotations":[],"audio":null,"function_call":null,"tool_calls":[],"reasoning_content":null},
        {"role":"assistant","content":null,"refusal":""},{"role":"user","content":"z"}]}"#;
    assert!(decode(body).is_ok());
}

#[test]
fn what_other_servers_take_and_changes_nothing_is_read_over() {
    let neutral = r#","length_penalty":1.0,"early_stopping":false,"priority":0,"include_reasoning":true,
        "spaces_between_special_tokens":true,"function_call":"auto","response_format":{},"best_of":1"#;
    let request = decode(&format!(r#"{{"prompt":"a"{neutral}}}"#)).unwrap();
    assert_eq!(request, decode(r#"{"prompt":"a"}"#).unwrap());
    let message = decode(r#"{"prompt":"a","length_penalty":2}"#).unwrap_err().to_string();
    assert_eq!(message, "length_penalty: 2 is not 1, which alone is done");
    let chat = |field: &str| {
        decode(&format!(r#"{{"messages":[{{"role":"user","content":"q"}}],"add_special_tokens":{field}}}"#))
    };
    assert!(chat("false").is_ok());
    assert!(chat("true").unwrap_err().to_string().contains("the template writes them"));
    let whole = decode(r#"{"prompt":"a","max_tokens":16.0,"n":2.0}"#).unwrap().params;
    assert_eq!((whole.max_tokens, whole.n), (Some(16), 2));
}

#[test]
fn parts_of_openais_other_forms_are_text() {
    let parts = r#"["a",{"type":"input_text","text":"b"},{"type":"output_text","text":"c"},
        {"type":"refusal","refusal":"d"},{"type":"text","text":"e"}]"#;
    assert!(decode(&format!(r#"{{"messages":[{{"role":"user","content":{parts}}}]}}"#)).is_ok());
    let image = r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#;
    assert!(decode(image).unwrap_err().to_string().contains("image_url"));
}

#[test]
fn tools_and_their_results_keep_every_digit() {
    let body = r#"{"messages":[{"role":"user","content":"q"},
        {"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function",
            "function":{"name":"f","arguments":"{\"x\": 1e-7}"}}]},
        {"role":"tool","tool_call_id":"1","content":"r"}],
        "tools":[{"type":"function","function":{"name":"f","maximum":18446744073709551616}}],
        "chat_template_kwargs":{"n":1e-7,"list":[1]}}"#;
    let Input::Chat(chat) = decode(body).unwrap().input else { panic!("messages are a chat") };
    let tools = r#"[{"type":"function","function":{"name":"f","maximum":18446744073709551616}}]"#;
    assert_eq!(
        (chat.tools, chat.variables),
        (Some(Json(tools.into())), Some(Json(r#"{"n":1e-7,"list":[1]}"#.into())))
    );
}

#[test]
fn azures_urls_and_a_byte_order_mark_are_read() {
    let body = concat!(
        "\u{FEFF}",
        r#"{"custom_id":"a","url":"/chat/completions","body":{"messages":[{"role":"user","content":"x"}]}}"#,
        "\n",
        r#"{"custom_id":"b","url":"/completions","body":{"prompt":"x"}}"#,
    );
    let lines = decode_lines(body);
    assert!(lines.iter().all(|line| line.request.is_ok()), "{lines:?}");
    let joined = decode_lines(&format!("{body}\n\u{FEFF}{{\"prompt\":\"x\"}}"));
    assert!(joined[2].request.is_ok(), "{joined:?}");
    let utf16: Vec<u8> = [0xFF, 0xFE, b'{', 0].into();
    let message = Job::decode(headers(true), 0, &utf16, &LIMITS).unwrap_err().to_string();
    assert!(message.contains("UTF-16"), "{message}");
}
