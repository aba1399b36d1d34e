//! The CustomResourceDefinition, as code prints it: the derived schema, made plain, with the rules in place.
//!
//! Made plain means: no `nullable` (an explicit null is dropped, as if the field were absent), formats that
//! Kubernetes knows, and descriptions on one line. Durations and sizes are checked by rules instead of bare
//! patterns, so that the refusal says what a duration looks like.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

use super::InferenceModel;
use super::rules::RULES;
use crate::units::{BYTES_PATTERN, SPAN_PATTERN};

/// Longest text of a duration or size: bounds what a rule on it can cost.
const UNIT_BYTES_MAX: u64 = 40;

/// The definition, with `helm.sh/resource-policy: keep`, so that removing a chart removes no model.
pub fn definition() -> CustomResourceDefinition {
    let mut crd = InferenceModel::crd();
    crd.metadata.annotations =
        Some([("helm.sh/resource-policy".to_owned(), "keep".to_owned())].into_iter().collect());
    for version in &mut crd.spec.versions {
        let Some(properties) = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.take()) else {
            continue;
        };
        let mut schema = serde_json::to_value(properties).expect("a schema is JSON");
        plain(&mut schema, "");
        for rule in RULES {
            let target = at(&mut schema, rule.at).unwrap_or_else(|| panic!("no field {:?}", rule.at));
            let guarded = match target.get("x-millrace-unit").and_then(Value::as_str) {
                Some(pattern) => format!("!self.matches('{pattern}') || ({})", rule.rule),
                None => rule.rule.to_owned(),
            };
            validations(target).push(json!({ "rule": guarded, "message": rule.message }));
        }
        unmark(&mut schema);
        if let Some(holder) = version.schema.as_mut() {
            holder.open_api_v3_schema =
                Some(serde_json::from_value(schema).expect("still a schema that Kubernetes' types read"));
        }
    }
    crd
}

/// The schema of the whole object, for documentation and comparison.
pub fn schema() -> Value {
    let crd = definition();
    let version = crd.spec.versions.into_iter().next().expect("one version");
    serde_json::to_value(version.schema.and_then(|s| s.open_api_v3_schema)).expect("a schema is JSON")
}

/// The definition as YAML, with a head that says where it comes from.
pub fn yaml() -> String {
    let value = serde_json::to_value(definition()).expect("a definition is JSON");
    let body = serde_yaml::to_string(&value).expect("a definition is YAML");
    format!("# Printed by `cargo run -p millrace-crds --features kube --bin crdgen`; do not edit.\n{body}")
}

/// The field of a schema at a dotted path; `[]` steps into the items of a list.
pub fn at<'s>(schema: &'s mut Value, path: &str) -> Option<&'s mut Value> {
    let mut field = schema;
    for part in path.split('.').filter(|part| !part.is_empty()) {
        let (name, items) = part.strip_suffix("[]").map_or((part, false), |name| (name, true));
        field = field.get_mut("properties")?.get_mut(name)?;
        if items {
            field = field.get_mut("items")?;
        }
    }
    Some(field)
}

fn validations(schema: &mut Value) -> &mut Vec<Value> {
    let map = schema.as_object_mut().expect("a schema is an object");
    let list = map.entry("x-kubernetes-validations").or_insert_with(|| json!([]));
    list.as_array_mut().expect("rules are a list")
}

fn plain(schema: &mut Value, path: &str) {
    let Some(map) = schema.as_object_mut() else { return };
    map.remove("nullable");
    map.remove("title");
    if let Some(format) = map.get_mut("format")
        && format.as_str().is_some_and(|name| name.starts_with("uint"))
    {
        *format = json!("int64");
    }
    if let Some(Value::String(text)) = map.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ").replace("[`", "`").replace("`]", "`");
    }
    unit(map, path);
    let below = |name: &str| match path {
        "" => name.to_owned(),
        _ => format!("{path}.{name}"),
    };
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        for (name, property) in properties {
            plain(property, &below(name));
        }
    }
    if let Some(items) = map.get_mut("items") {
        plain(items, path);
    }
    if let Some(values) = map.get_mut("additionalProperties") {
        plain(values, path);
    }
}

/// Turns the pattern of a duration or size into a rule with a message.
fn unit(map: &mut Map<String, Value>, path: &str) {
    let form = match map.get("pattern").and_then(Value::as_str) {
        Some(SPAN_PATTERN) => (SPAN_PATTERN, "a duration such as 500ms, 30s, 5m or 24h"),
        Some(BYTES_PATTERN) => (BYTES_PATTERN, "a size such as 1048576, 64Mi or 10Gi"),
        _ => return,
    };
    map.remove("pattern");
    map.insert("maxLength".into(), json!(UNIT_BYTES_MAX));
    map.insert("x-millrace-unit".into(), json!(form.0));
    let rule = json!({
        "rule": format!("self.matches('{}')", form.0),
        "message": format!("{path} must be {}", form.1),
    });
    map.insert("x-kubernetes-validations".into(), json!([rule]));
}

fn unmark(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("x-millrace-unit");
            map.values_mut().for_each(unmark);
        }
        Value::Array(list) => list.iter_mut().for_each(unmark),
        _ => {}
    }
}
