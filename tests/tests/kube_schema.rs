//! The custom resource's schema: generated files equal what the code prints, and no change within a version
//! breaks a resource that is already stored.
//!
//! `MILLRACE_UPDATE=1` writes the generated files anew. The frozen schema in `crds/frozen` is what users
//! have; it is replaced by hand when a release widens it, and never to make a breaking change pass. Until the
//! first release nobody has any, and it follows the code.

use std::fs;
use std::path::{Path, PathBuf};

use millrace_crds::model::rules::RULES;
use millrace_crds::model::{definition, docs};
use serde_json::{Value, json};

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
    for key in ["type", "pattern", "format", "x-kubernetes-int-or-string", "x-kubernetes-list-type"] {
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

#[test]
fn no_change_breaks_what_is_stored() {
    let file = root().join("crds/frozen/v1alpha1.json");
    let text = fs::read_to_string(&file).expect("the frozen schema");
    let frozen: Value = serde_json::from_str(&text).expect("the frozen schema is JSON");
    let mut found = Vec::new();
    breaking(&frozen, &definition::schema(), "", &mut found);
    assert!(found.is_empty(), "these changes need a new version:\n{}", found.join("\n"));
}

/// Each kind of breaking change is seen, so that the test above can fail.
#[test]
fn breaking_changes_are_seen() {
    let old = definition::schema();
    type Edit = fn(&mut Value);
    let edits: [(Edit, &str); 9] = [
        (|s| drop(spec(s).remove("drain")), ".spec.drain: the field is gone"),
        (|s| edit(s, "spec.model.uri", "maxLength", json!(10)), "maxLength is tighter"),
        (|s| edit(s, "spec.model.uri", "minLength", json!(1)), "minLength is tighter"),
        (|s| edit(s, "spec.queue.maxDeliver", "type", json!("string")), "type changes"),
        (|s| edit(s, "spec.queue.maxDeliver", "default", json!(6)), "default changes"),
        (|s| edit(s, "spec.engine.dtype", "enum", json!(["auto"])), "the value \"f32\" is gone"),
        (|s| edit(s, "spec", "required", json!(["model", "scaling"])), "\"scaling\" becomes required"),
        (|s| edit(s, "spec.drain", "x-kubernetes-validations", json!([{"rule": "false"}])), "a new rule"),
        (|s| edit(s, "spec.template.nodeSelector", "maxProperties", json!(1)), "maxProperties is tighter"),
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
