//! Tests of `template.rs`: golden texts that Jinja2 rendered (`tests/golden/templates/render.py`), and limits.

use std::path::PathBuf;

use serde_json::Value as Json;

use super::*;
use crate::text::job::Json as Text;

const CREATED: i64 = 1_795_428_123;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/templates")
}

fn chat(case: &Json) -> Chat {
    let text = |value: &Json| Some(Text(value.to_string())).filter(|_| !value.is_null());
    Chat {
        messages: case["messages"].as_array().unwrap().iter().filter_map(text).collect(),
        tools: text(&case["tools"]),
        documents: text(&case["documents"]),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(true),
        continue_final_message: false,
        variables: text(&case["variables"]),
    }
}

fn template(source: &str) -> Template {
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")];
    Template::new(source, special.map(|(name, token)| (name.into(), token.into())).into()).unwrap()
}

fn said(content: &str) -> Chat {
    chat(&serde_json::json!({"messages": [{"role": "user", "content": content}]}))
}

#[test]
fn texts_equal_those_of_jinja2() {
    let read = |name: &str| std::fs::read_to_string(golden().join(name)).unwrap();
    let cases: Json = serde_json::from_str(&read("cases.json")).unwrap();
    let expected: Json = serde_json::from_str(&read("expected.json")).unwrap();
    let mut checked = 0;
    for (name, expected) in expected.as_object().unwrap() {
        let template = template(&read(&format!("{name}.jinja")));
        for (case, expected) in expected.as_object().unwrap() {
            match (template.render(&chat(&cases[case]), CREATED), &expected["text"], &expected["error"]) {
                (Ok(text), Json::String(expected), _) => assert_eq!(text, *expected, "{name}: {case}"),
                (Err(error), _, Json::String(expected)) => {
                    assert!(error.to_string().contains(expected), "{name}: {case}: {error}");
                }
                (rendered, ..) => panic!("{name}: {case}: {rendered:?} instead of {expected}"),
            }
            checked += 1;
        }
    }
    assert!(checked >= 54, "{checked} cases");
}

#[test]
fn a_template_cannot_run_for_long() {
    let endless = template("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}");
    let error = endless.render(&said("a"), 0).unwrap_err().to_string();
    assert!(error.contains("4000000 instructions"), "{error}");
}

#[test]
fn a_template_cannot_write_without_end() {
    let wide = template("{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}");
    let error = wide.render(&said(&"x".repeat(10_000)), 0).unwrap_err().to_string();
    assert!(error.contains("8388608 bytes"), "{error}");
}

#[test]
fn a_template_cannot_recurse_without_end() {
    let deep = template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}");
    let error = deep.render(&said("a"), 0).unwrap_err().to_string();
    assert!(error.contains("recursion"), "{error}");
}

#[test]
fn a_template_reads_no_other() {
    for source in ["{% include 'x' %}", "{% extends '/etc/passwd' %}", "{% import 'x' as y %}"] {
        if let Ok(template) = Template::new(source, Vec::new()) {
            assert!(template.render(&said("a"), 0).is_err(), "{source}");
        }
    }
}

#[test]
fn a_template_that_does_not_compile_is_refused_with_its_line() {
    let error = Template::new("a\n{% if %}", Vec::new()).unwrap_err().to_string();
    assert!(error.contains("does not compile") && error.contains("line 2"), "{error}");
}

#[test]
fn the_date_is_the_jobs() {
    let dated = template("{{ strftime_now('%d %b %Y') }}");
    assert_eq!(dated.render(&said("a"), 0).unwrap(), "01 Jan 1970");
    assert_eq!(dated.render(&said("a"), CREATED).unwrap(), "23 Nov 2026");
    let error = template("{{ strftime_now('%Q') }}").render(&said("a"), 0).unwrap_err().to_string();
    assert!(error.contains("%Q"), "{error}");
}

#[test]
fn the_final_message_is_continued() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}{% if \
        add_generation_prompt %}<assistant>{% endif %}";
    let mut chat = said("Count: 1,");
    chat.continue_final_message = true;
    chat.add_generation_prompt = false;
    assert_eq!(template(source).render(&chat, 0).unwrap(), "<user>Count: 1,");
    let kept = template("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}");
    let mut spaced = said("Count: ");
    (spaced.continue_final_message, spaced.add_generation_prompt) = (true, false);
    assert_eq!(kept.render(&spaced, 0).unwrap(), "<user>Count: ");
    assert!(template("{{ messages[0].role }}").render(&chat, 0).is_err());
}

/// A conversation of the golden file, with every digit of its numbers.
fn conversation(request: &str) -> Chat {
    let field = |name: &str| {
        json::field(request, name).filter(|text| *text != "[]").map(|text| Text(text.to_owned()))
    };
    let continues = field("continue_final_message").is_some_and(|text| text.0 == "true");
    let closed = field("add_generation_prompt").is_some_and(|text| text.0 == "false");
    let messages = json::elements(json::field(request, "messages").unwrap());
    Chat {
        messages: messages.into_iter().map(|text| Text(text.to_owned())).collect(),
        tools: field("tools"),
        documents: field("documents"),
        add_generation_prompt: !closed && !continues,
        continue_final_message: continues,
        variables: field("chat_template_kwargs"),
    }
}

/// `tests/golden/chats/render.py` has rendered the same with transformers.
#[test]
fn conversations_equal_those_of_transformers() {
    use sha2::{Digest, Sha256};
    let golden = include_str!("../../../tests/golden/chats/expected.json");
    let file: Json = serde_json::from_str(golden).unwrap();
    let conversations = json::field(golden, "conversations").unwrap();
    let (mut pairs, mut wrong) = (0, Vec::new());
    let shapes = file["expected"].as_object().unwrap();
    assert!(shapes.len() >= 60, "{} templates", shapes.len());
    for (name, expected) in shapes {
        let template = template(file["templates"][name].as_str().unwrap());
        for (talk, digest) in expected.as_object().unwrap() {
            let rendered = template.render(&conversation(json::field(conversations, talk).unwrap()), CREATED);
            let found = rendered.as_ref().map_or_else(
                |_| "error".to_owned(),
                |text| hex::encode(Sha256::digest(text.as_bytes()))[..16].to_owned(),
            );
            if found != digest.as_str().unwrap() {
                wrong.push(format!("render.py {name} {talk}: {rendered:?}"));
            }
            pairs += 1;
        }
    }
    assert!(pairs >= 60 * 30 && wrong.is_empty(), "{} of {pairs} differ:\n{}", wrong.len(), wrong.join("\n"));
}
