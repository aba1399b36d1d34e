//! Tests of this module: snippets that Jinja2 rendered (`tests/golden/jinja/render.py`), and the bounds.

use serde_json::Value as Json;

use super::*;

const NOW: i64 = 1_795_428_123;
const BOUNDS: Bounds = Bounds { instructions: 4_000_000, bytes: 8 << 20 };

/// The variables of the golden file, with every digit.
fn context() -> Context {
    let golden = include_str!("../../../tests/golden/jinja/expected.json");
    let Ok(Value::Dict(dict)) = json::parse(json::field(golden, "context").unwrap()) else {
        panic!("no context")
    };
    let variables = dict.entries().iter().map(|(name, value)| (name.to_text(), value.clone())).collect();
    Context { variables, now: NOW }
}

fn render(source: &str) -> Result<String, Fault> {
    Program::parse(source)?.render(&context(), BOUNDS)
}

#[test]
fn snippets_equal_those_of_jinja2() {
    let golden: Json =
        serde_json::from_str(include_str!("../../../tests/golden/jinja/expected.json")).unwrap();
    let mut wrong = Vec::new();
    let snippets = golden["snippets"].as_array().unwrap();
    assert!(snippets.len() >= 190, "{} snippets", snippets.len());
    for pair in snippets {
        let source = pair[0].as_str().unwrap();
        let parsed = Program::parse(source);
        let found = parsed.as_ref().map(|program| program.render(&context(), BOUNDS));
        let right = match (&found, &pair[1]) {
            (Ok(Ok(text)), Json::String(expected)) => text == expected,
            (Ok(Err(_)), expected) => expected.get("error").is_some(),
            // What Jinja2 refuses only when it runs may be refused before.
            (Err(_), expected) => expected.is_object(),
            _ => false,
        };
        if !right {
            wrong.push(format!("{source}\n   is {found:?}\n  not {}", pair[1]));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
