//! Tests of this module: snippets that Jinja2 rendered (`tests/golden/jinja/render.py`), and the bounds.

use serde_json::Value as Json;

use super::*;

const NOW: i64 = 1_795_428_123;
const BOUNDS: RenderBounds = RenderBounds { instructions: 4_000_000, bytes: 8 << 20 };

/// The variables of the golden file, with every digit.
fn context() -> RenderContext {
    let golden = include_str!("../../../tests/golden/jinja/expected.json");
    let Ok(PyValue::Dict(dict)) = json::parse(json::field(golden, "context").unwrap()) else {
        panic!("no context")
    };
    let variables = dict.entries().iter().map(|(name, value)| (name.to_text(), value.clone())).collect();
    RenderContext { variables, now: NOW }
}

fn render(source: &str) -> Result<String, TemplateFault> {
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

#[test]
fn values_and_texts_are_bounded() {
    let cases = [
        (
            "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}{% endfor %}",
            "nest deeper",
        ),
        ("{{ 'abc' * 9999999 }}", "the limit is 8388608"),
        ("{{ 'a'.center(9999999) }}", "8388608 bytes"),
        ("{{ [0] * 9999999 }}", "elements"),
        ("{{ '%9999d' % 1 }}", "4096"),
        ("{{ 10 ** 99 }}", "127 bits"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "instructions"),
    ];
    for (source, part) in cases {
        let message = render(source).unwrap_err().message;
        assert!(message.contains(part), "{source}: {message}");
    }
    let deep = "(".repeat(400) + "1" + &")".repeat(400);
    assert!(render(&format!("{{{{ {deep} }}}}")).unwrap_err().message.contains("nests deeper"));
    let long = vec!["1"; 400].join(" + ");
    assert!(render(&format!("{{{{ {long} }}}}")).unwrap_err().message.contains("nests deeper"));
}

#[test]
fn what_is_not_supported_is_refused_when_it_is_parsed() {
    let cases = [
        ("a\n{{ x|pprint }}", "'pprint'"),
        ("a\n{{ x is nothing_known }}", "'nothing_known'"),
        ("a\n{{ lipsum(3) }}", "'lipsum'"),
        ("a\n{% include 'x' %}", "'include'"),
        ("a\n{% trans %}", "'trans'"),
    ];
    for (source, part) in cases {
        let fault = Program::parse(source).unwrap_err();
        assert!(fault.message.contains(part) && fault.line == 2, "{source}: {fault}");
    }
}
