//! The field reference and the runbook, printed from schema, rules and reasons, so that none is missing.

use std::fmt::Write;

use serde_json::Value;

use super::definition;
use super::reason::{ConditionType, Reason};
use super::rules::RULES;

/// The field reference in Markdown: one line a field, then the rules across fields.
pub fn reference() -> String {
    let schema = definition::schema();
    let mut text = String::from(
        "# InferenceModel, field by field\n\n\
         Printed by `cargo run -p millrace-crds --features kube --bin crdgen -- reference`; do not edit.\n\n\
         Group `millrace.dev`, version `v1alpha1`, short name `imodel`. An object that breaks a bound or a rule \
         is refused by the API server with a message that names the field and the fix.\n",
    );
    for part in ["spec", "status"] {
        let _ = write!(
            text,
            "\n## {part}\n\n| field | type | default | bounds | meaning |\n|---|---|---|---|---|\n"
        );
        if let Some(top) = schema.pointer(&format!("/properties/{part}")) {
            fields(&mut text, top, part);
        }
    }
    text += "\n## Rules\n\n| on | message |\n|---|---|\n";
    for rule in RULES {
        let on = if rule.at.is_empty() { "the object" } else { rule.at };
        let _ = writeln!(text, "| `{on}` | {} |", cell(rule.message));
    }
    text
}

fn fields(text: &mut String, schema: &Value, path: &str) {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    for (name, field) in properties {
        let path = format!("{path}.{name}");
        let default = match field.get("default") {
            Some(Value::Object(_)) => String::new(),
            Some(value) => format!("`{value}`"),
            None if required.contains(&name.as_str()) => "required".into(),
            None => String::new(),
        };
        let _ = writeln!(
            text,
            "| `{path}` | {} | {default} | {} | {} |",
            kind(field),
            bounds(field),
            cell(field.get("description").and_then(Value::as_str).unwrap_or_default()),
        );
        fields(text, field, &path);
        if let Some(items) = field.get("items") {
            fields(text, items, &format!("{path}[]"));
        }
    }
}

/// The unit of a duration or size, which stands in the message of its first rule.
fn unit(field: &Value) -> Option<&'static str> {
    let message = field.pointer("/x-kubernetes-validations/0/message").and_then(Value::as_str)?;
    let units = [(" must be a duration such as", "duration"), (" must be a size such as", "size")];
    units.into_iter().find(|(words, _)| message.contains(words)).map(|(_, unit)| unit)
}

fn kind(field: &Value) -> String {
    if field.get("x-kubernetes-int-or-string").is_some() {
        return "quantity".into();
    }
    if let Some(unit) = unit(field) {
        return unit.into();
    }
    if let Some(values) = field.get("enum").and_then(Value::as_array) {
        let values: Vec<String> = values.iter().filter_map(Value::as_str).map(|v| format!("`{v}`")).collect();
        return values.join(", ");
    }
    let name = field.get("type").and_then(Value::as_str).unwrap_or("object");
    match (name, field.get("items"), field.get("additionalProperties")) {
        ("array", Some(items), _) => format!("list of {}", kind(items)),
        (_, _, Some(values)) => format!("map to {}", kind(values)),
        _ => name.into(),
    }
}

fn bounds(field: &Value) -> String {
    if unit(field).is_some() {
        return String::new();
    }
    let number = |name: &str| field.get(name).and_then(Value::as_f64).map(|number| number.to_string());
    let range = |least: Option<String>, most: Option<String>, what: &str| match (least, most) {
        (Some(least), Some(most)) => Some(format!("{least} to {most}{what}")),
        (Some(least), None) => Some(format!("at least {least}{what}")),
        (None, Some(most)) => Some(format!("at most {most}{what}")),
        (None, None) => None,
    };
    let parts = [
        range(number("minimum"), number("maximum"), ""),
        range(number("minLength"), number("maxLength"), " bytes"),
        range(number("minItems"), number("maxItems"), " items"),
        range(None, number("maxProperties"), " entries"),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// The runbook in Markdown: each condition, each reason, what it means and what to do.
pub fn runbook() -> String {
    let mut text = String::from(
        "# Runbook\n\n\
         Printed by `cargo run -p millrace-crds --features kube --bin crdgen -- runbook`; do not edit.\n\n\
         `kubectl describe imodel NAME` shows conditions, the last decision of the autoscaler as a sentence, and \
         events. Each condition and event has one of the reasons below.\n\n\
         ## Conditions\n\n| condition | means | when healthy |\n|---|---|---|\n",
    );
    for kind in ConditionType::ALL {
        let _ = writeln!(text, "| `{kind}` | {} | {} |", cell(kind.meaning()), kind.healthy());
    }
    text += "\n## Reasons\n";
    for reason in Reason::ALL {
        let _ = write!(text, "\n### {reason}\n\n{}\n\nWhat to do: {}\n", reason.meaning(), reason.remedy());
    }
    text
}
