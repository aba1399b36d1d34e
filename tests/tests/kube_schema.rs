//! The custom resource's schema: generated files equal what the code prints, and no change within a version
//! breaks a resource that is already stored.
//!
//! `MILLRACE_UPDATE=1` writes the generated files anew. The frozen schema in `crds/frozen` is what users
//! have; it is replaced by hand when a release widens it, and never to make a breaking change pass. Until the
//! first release nobody has any, and it follows the code; from then on it is pinned by its digest.

use std::fs;
use std::path::{Path, PathBuf};

use millrace_crds::model::rules::RULES;
use millrace_crds::model::{definition, docs};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// SHA-256 of the frozen schema as the last release has it; none before the first one.
const RELEASED: Option<&str> = None;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

fn check_generated(path: &str, printed: &str) {
    let file = root().join(path);
    if std::env::var_os("MILLRACE_UPDATE").is_some() {
        fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
        fs::write(&file, printed).expect("a generated file");
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == printed,
        "{path} is not what the code prints; run MILLRACE_UPDATE=1 cargo test --test kube_schema"
    );
}

#[test]
fn generated_files_are_what_the_code_prints() {
    check_generated("crds/inferencemodels.yaml", &definition::yaml());
    check_generated("charts/millrace/crds.yaml", &definition::yaml());
    check_generated("crds/REFERENCE.md", &docs::reference());
    check_generated("crds/RUNBOOK.md", &docs::runbook());
}

/// What a change from `old` to `new` would take away from resources that exist, as sentences.
fn breaking(old: &Value, new: &Value, path: &str, found: &mut Vec<String>) {
    let unchanging = [
        "type",
        "pattern",
        "format",
        "x-kubernetes-int-or-string",
        "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-preserve-unknown-fields",
    ];
    for key in unchanging {
        if old.get(key) != new.get(key) {
            found.push(format!("{path}: {key} changes from {:?} to {:?}", old.get(key), new.get(key)));
        }
    }
    if let Some(default) = old.get("default")
        && !contains(new.get("default").unwrap_or(&Value::Null), default)
    {
        found.push(format!("{path}: default changes from {default} to {:?}", new.get("default")));
    }
    bounds(old, new, path, found);
    let texts = |value: &Value, key: &str| -> Vec<String> {
        value.get(key).and_then(Value::as_array).into_iter().flatten().map(Value::to_string).collect()
    };
    let allowed = texts(new, "enum");
    for value in texts(old, "enum").into_iter().filter(|value| !allowed.contains(value)) {
        found.push(format!("{path}: the value {value} is gone"));
    }
    let needed = texts(old, "required");
    for field in texts(new, "required").into_iter().filter(|field| !needed.contains(field)) {
        found.push(format!("{path}: {field} becomes required"));
    }
    let rules = texts(old, "x-kubernetes-validations");
    for rule in texts(new, "x-kubernetes-validations").into_iter().filter(|rule| !rules.contains(rule)) {
        found.push(format!("{path}: a new rule {rule}"));
    }
    for (name, field) in old.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let path = format!("{path}.{name}");
        match new.get("properties").and_then(|fields| fields.get(name)) {
            Some(field_now) => breaking(field, field_now, &path, found),
            None => found.push(format!("{path}: the field is gone")),
        }
    }
    for key in ["items", "additionalProperties"] {
        match (old.get(key), new.get(key)) {
            (Some(old), Some(new)) => breaking(old, new, &format!("{path}[]"), found),
            (Some(_), None) => found.push(format!("{path}: {key} is gone")),
            _ => {}
        }
    }
}

/// Whether all of `part` is in `whole`: an object's default may get further fields.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(key, value)| whole.get(key).is_some_and(|found| contains(found, value)))
        }
        _ => whole == part,
    }
}

fn bounds(old: &Value, new: &Value, path: &str, found: &mut Vec<String>) {
    for (key, upper) in [
        ("maximum", true),
        ("maxLength", true),
        ("maxItems", true),
        ("maxProperties", true),
        ("minimum", false),
        ("minLength", false),
        ("minItems", false),
    ] {
        let number = |value: &Value| value.get(key).and_then(Value::as_f64);
        let tighter = match (number(old), number(new)) {
            (None, Some(_)) => true,
            (Some(old), Some(new)) => {
                if upper {
                    new < old
                } else {
                    new > old
                }
            }
            (_, None) => false,
        };
        if tighter {
            found.push(format!("{path}: {key} is tighter: {:?} after {:?}", new.get(key), old.get(key)));
        }
    }
}

fn frozen() -> String {
    fs::read_to_string(root().join("crds/frozen/v1alpha1.json")).expect("the frozen schema")
}

#[test]
fn no_change_breaks_what_is_stored() {
    let frozen: Value = serde_json::from_str(&frozen()).expect("the frozen schema is JSON");
    let mut found = Vec::new();
    breaking(&frozen, &definition::schema(), "", &mut found);
    assert!(found.is_empty(), "these changes need a new version:\n{}", found.join("\n"));
}

/// Whoever writes the frozen schema anew after a release is stopped here, and whoever releases is reminded.
#[test]
fn what_is_released_stays() {
    let changelog = fs::read_to_string(root().join("CHANGELOG.md")).expect("a changelog");
    let version = |line: &str| {
        line.strip_prefix("## ").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    match (changelog.lines().any(version), RELEASED) {
        (false, None) => {
            let frozen: Value = serde_json::from_str(&frozen()).expect("the frozen schema is JSON");
            assert!(
                frozen == definition::schema(),
                "nothing is released yet: write the schema into crds/frozen anew"
            );
        }
        (true, Some(digest)) => {
            assert_eq!(
                hex::encode(Sha256::digest(frozen())),
                digest,
                "what users have stored must stay readable"
            );
        }
        (released, digest) => panic!("released: {released}, but the frozen schema's digest is {digest:?}"),
    }
}

/// Each kind of breaking change is seen, so that the test above can fail.
#[test]
fn breaking_changes_are_seen() {
    let old = definition::schema();
    type Edit = fn(&mut Value);
    let edits: [(Edit, &str); 18] = [
        (|s| drop(spec(s).remove("drain")), ".spec.drain: the field is gone"),
        (|s| edit(s, "spec.model.uri", "maxLength", json!(10)), "maxLength is tighter"),
        (|s| edit(s, "spec.model.uri", "minLength", json!(1)), "minLength is tighter"),
        (|s| edit(s, "spec.queue.maxDeliver", "type", json!("string")), "type changes"),
        (|s| edit(s, "spec.queue.maxDeliver", "default", json!(6)), "default changes"),
        (|s| edit(s, "spec.engine.dtype", "enum", json!(["auto"])), "the value \"f32\" is gone"),
        (|s| edit(s, "spec", "required", json!(["model", "scaling"])), "\"scaling\" becomes required"),
        (|s| edit(s, "spec.drain", "x-kubernetes-validations", json!([{"rule": "false"}])), "a new rule"),
        (|s| edit(s, "spec.template.nodeSelector", "maxProperties", json!(1)), "maxProperties is tighter"),
        (|s| edit(s, "spec.queue.backoff", "maxItems", json!(1)), "maxItems is tighter"),
        (|s| edit(s, "spec.queue.backoff", "minItems", json!(2)), "minItems is tighter"),
        (|s| edit(s, "spec.queue.maxDeliver", "maximum", json!(5)), "maximum is tighter"),
        (|s| edit(s, "spec.queue.maxDeliver", "minimum", json!(2)), "minimum is tighter"),
        (|s| edit(s, "spec.model.uri", "pattern", json!("^s3")), "pattern changes"),
        (|s| edit(s, "spec.queue.maxDeliver", "format", json!("int16")), "format changes"),
        (
            |s| edit(s, "spec.template.affinity", PRESERVE, Value::Null),
            "x-kubernetes-preserve-unknown-fields changes",
        ),
        (|s| take(s, "spec.queue.backoff", "items"), "items is gone"),
        (|s| take(s, "spec.template.nodeSelector", "additionalProperties"), "additionalProperties is gone"),
    ];
    for (change, words) in edits {
        let mut new = old.clone();
        change(&mut new);
        let mut found = Vec::new();
        breaking(&old, &new, "", &mut found);
        assert!(found.iter().any(|line| line.contains(words)), "{words:?} is not in {found:?}");
    }
    let mut wider = old.clone();
    spec(&mut wider).insert("new".into(), json!({"type": "string"}));
    edit(&mut wider, "spec.model.uri", "maxLength", json!(4096));
    let mut found = Vec::new();
    breaking(&old, &wider, "", &mut found);
    assert_eq!(found, Vec::<String>::new());
}

fn spec(schema: &mut Value) -> &mut serde_json::Map<String, Value> {
    schema.pointer_mut("/properties/spec/properties").and_then(Value::as_object_mut).expect("the spec")
}

const PRESERVE: &str = "x-kubernetes-preserve-unknown-fields";

fn take(schema: &mut Value, path: &str, key: &str) {
    let field = definition::at(schema, path).expect("a field");
    field.as_object_mut().and_then(|field| field.remove(key)).expect("what is taken away was there");
}

fn edit(schema: &mut Value, path: &str, key: &str, value: Value) {
    let field = definition::at(schema, path).expect("a field");
    field.as_object_mut().expect("a schema").insert(key.into(), value);
}

/// The API server's limits on a schema: the types are structural, and rules that loop have a bound.
#[test]
fn the_schema_is_one_that_an_api_server_takes() {
    let mut schema = definition::schema();
    let mut stack = vec![(String::new(), schema.clone())];
    while let Some((path, field)) = stack.pop() {
        for absent in ["$ref", "nullable", "anyOf", "oneOf", "allOf", "title"] {
            assert!(field.get(absent).is_none(), "{path} has {absent}");
        }
        let typed = field.get("type").is_some() || field.get("x-kubernetes-int-or-string").is_some();
        assert!(typed, "{path} has no type");
        if path.starts_with(".spec") && !path.is_empty() {
            assert!(path.ends_with("[]") || field.get("description").is_some(), "{path} has no description");
        }
        for (name, below) in field.get("properties").and_then(Value::as_object).into_iter().flatten() {
            stack.push((format!("{path}.{name}"), below.clone()));
        }
        for key in ["items", "additionalProperties"] {
            if let Some(below) = field.get(key).filter(|below| below.is_object()) {
                stack.push((format!("{path}[]"), below.clone()));
            }
        }
    }
    for rule in RULES {
        let field = definition::at(&mut schema, rule.at).expect("a field");
        if rule.rule.contains("self.all(") {
            assert!(field.get("maxProperties").is_some(), "{} loops without a bound", rule.at);
        }
        if field.get("type").and_then(Value::as_str) == Some("string") {
            assert!(field.get("maxLength").is_some(), "{} has a rule and no longest length", rule.at);
        }
    }
}
