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

/// A template is code from a model's folder: no loop, text, nesting or recursion of it goes without a bound.
#[test]
fn what_is_too_much_is_refused() {
    let nested = |open: &str, inner: &str, close: &str| {
        format!("{}{inner}{}", open.repeat(10_000), close.repeat(10_000))
    };
    let sources = [
        "{% for a in range(100000000) %}{% endfor %}".to_owned(),
        "{% for a in range(5000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}".to_owned(),
        "{{ 'x' * 100000000 }}".to_owned(),
        "{% set ns = namespace(t='x') %}{% for a in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
            .to_owned(),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_owned(),
        format!("{{{{ {} }}}}", nested("(", "1", ")")),
        format!("{{{{ {} }}}}", nested("[", "", "]")),
        format!("{{{{ {}1 }}}}", "not ".repeat(100_000)),
        format!("{{{{ {}1 }}}}", "- ".repeat(100_000)),
        nested("{% if 1 %}", "x", "{% endif %}"),
    ];
    for source in sources {
        let began = std::time::Instant::now();
        assert!(render(&source).is_err(), "{}", &source[..60.min(source.len())]);
        assert!(began.elapsed().as_secs() < 20, "{}", &source[..60.min(source.len())]);
    }
    assert_eq!(render("{{ 'x' * 3 }}").unwrap(), "xxx");
}
