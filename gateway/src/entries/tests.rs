//! Input forms, and each malformed line with its place.

use super::*;

fn source(name: &str, text: &str) -> Source {
    Source {
        name: name.into(),
        stem: "in".to_owned(),
        format: Format::Auto,
        bytes: Bytes::copy_from_slice(text.as_bytes()),
    }
}

fn check(name: &str, text: &str) -> (Vec<RequestEntry>, Vec<String>) {
    let (entries, problems) = read(&[source(name, text)], &PromptArgs::default());
    (entries, problems.iter().map(ToString::to_string).collect())
}

const LINE: &str =
    r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x","z":1,"b":2}}"#;

#[test]
fn batch_lines_keep_the_order_of_fields() {
    let (entries, problems) = check("x.jsonl", &format!("{LINE}\n\n{}\n", LINE.replace("\"a\"", "\"b\"")));
    assert_eq!(problems, [""; 0]);
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0].body, r#"{"prompt":"x","z":1,"b":2}"#);
    assert_eq!(entries[1].custom_id, "b");
    assert_eq!(entries[1].origin.to_string(), "x.jsonl:3");
}

#[test]
fn bare_bodies_get_numbered_ids() {
    let (entries, problems) = check(
        "x.jsonl",
        "{\"prompt\":\"x\"}\n{\"messages\":[]}\n{\"custom_id\":\"c\",\"body\":{\"prompt\":1}}",
    );
    assert_eq!(problems, [""; 0]);
    let ids: Vec<&str> = entries.iter().map(|e| e.custom_id.as_str()).collect();
    assert_eq!(ids, ["in-1", "in-2", "c"]);
    assert_eq!(entries[1].url, CHAT_COMPLETIONS);
    assert_eq!(entries[2].url, COMPLETIONS);
}

#[test]
fn each_bad_line_is_named_with_its_fault() {
    let good = LINE.to_owned();
    let cases = [
        ("[1]", "not a JSON object"),
        ("{\"prompt\":", "not a JSON object"),
        ("{}", "neither is there"),
        (r#"{"prompt":"x","messages":[]}"#, "not both"),
        (&good.replace("\"a\"", "\"\""), "custom_id has 0 bytes; 1 to 512"),
        (&good.replace("\"a\"", &format!("{:?}", "y".repeat(513))), "513 bytes"),
        (&good.replace("\"a\"", "7"), "invalid type: integer `7`, expected a string"),
        (&good.replace("POST", "GET"), "method is \"GET\"; it must be \"POST\""),
        (&good.replace("/v1/completions", "/v1/embeddings"), "\"/v1/embeddings\"; it must be"),
        (
            &good.replace("/v1/completions", "/v1/chat/completions"),
            "but the body is one of \"/v1/completions\"",
        ),
        (&good.replace("\"url\"", "\"uri\""), "unknown field `uri`"),
        (&good.replace("\"body\"", "\"bdoy\""), "unknown field `bdoy`"),
        (&good.replace("{\"prompt\":\"x\",\"z\":1,\"b\":2}", "[]"), "body must be an object"),
        (&good.replace("\"prompt\"", "\"prmpt\""), "body: a request has"),
        (&good.replace("\"/v1/completions\"", "3"), "url is 3; it must be text"),
        (&"[".repeat(500), "not a JSON object"),
    ];
    for (line, fragment) in cases {
        let (_, problems) = check("f.jsonl", &format!("{{\"prompt\":\"first\"}}\n{line}\n"));
        assert_eq!(problems.len(), 1, "{line}: {problems:?}");
        assert!(problems[0].starts_with("f.jsonl:2: ") && problems[0].contains(fragment), "{problems:?}");
    }
}

#[test]
fn a_custom_id_is_used_once() {
    let (_, problems) = check("x.jsonl", &format!("{LINE}\n{LINE}\n{LINE}\n"));
    assert_eq!(problems.len(), 2);
    for (problem, line) in problems.iter().zip([2, 3]) {
        assert!(
            problem.starts_with(&format!("x.jsonl:{line}: custom_id \"a\" stands at x.jsonl:1")),
            "{problem}"
        );
    }
}

#[test]
fn formats_by_ending_and_by_look() {
    let body = "{\n \"prompt\": \"x\"\n}\n";
    assert_eq!(check("x.json", body).0[0].body, body.trim());
    assert_eq!(check("-", body).0[0].custom_id, "in");
    assert_eq!(check("-", "{\"prompt\":\"x\"}\n{\"prompt\":\"y\"}").0.len(), 2);
    assert_eq!(check("-", "tell me {x}\nmore\n").0[0].body, r#"{"prompt":"tell me {x}\nmore"}"#);
    let (_, problems) = check("x.txt", " \n");
    assert_eq!(problems, ["x.txt:1: the prompt is empty"]);
    let (_, problems) = check("x.jsonl", "\n");
    assert_eq!(problems, ["x.jsonl:1: the input is empty; at least one request is needed"]);
}

#[test]
fn text_that_is_not_utf8_is_refused_at_its_line() {
    let bytes = Bytes::from_static(b"ok\nno\xff");
    let bad = Source { bytes, ..source("x.txt", "") };
    let (_, problems) = read(&[bad], &PromptArgs::default());
    assert_eq!(problems[0].to_string(), "x.txt:2: byte 5 is not UTF-8");
}

#[test]
fn parameters_of_prompts() {
    let parameters = PromptArgs {
        system: Some("be short".into()),
        max_tokens: Some(5),
        temperature: Some(0.5),
        stop: vec!["\n".into()],
        ..PromptArgs::default()
    };
    let prompts = Source { format: Format::Prompts, ..source("p.txt", "one\ntwo\n") };
    let (entries, _) = read(&[prompts], &parameters);
    assert_eq!(entries.len(), 2);
    assert_eq!(
        entries[1].body,
        concat!(
            r#"{"messages":[{"role":"system","content":"be short"},{"role":"user","content":"two"}],"#,
            r#""max_tokens":5,"temperature":0.5,"stop":["\n"]}"#
        )
    );
}
