//! The API server's audit log: who asked for what, and what it was answered.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// A rule that logs each request of one user without bodies: when it is answered, and a watch when it begins.
pub fn rule_for(user: &str) -> String {
    format!("- level: Metadata\n  users: [\"{user}\"]\n  omitStages: [RequestReceived]\n- level: None")
}

/// One finished request.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditEntry {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: String,
    /// The path and query.
    #[serde(rename = "requestURI")]
    pub uri: String,
    /// What it was about; absent for paths that are no resources.
    #[serde(default)]
    pub object_ref: Option<ObjectRef>,
    /// The answer.
    #[serde(default)]
    pub response_status: Option<AuditedAnswer>,
}

/// The object of a request.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObjectRef {
    /// The plural, such as `deployments`.
    pub resource: String,
    /// Such as `status`.
    pub subresource: String,
    /// Empty for the core group.
    pub api_group: String,
    /// Empty where it has none.
    pub namespace: String,
    /// Empty where it has none.
    pub name: String,
}

/// The answer to a request.
#[derive(Debug, Clone, Deserialize)]
pub struct AuditedAnswer {
    /// The HTTP status code.
    pub code: u16,
}

/// The status code of an apply that made an object.
const CREATED: u16 = 201;

/// What a rule of a role allows: API group, resource (with its subresource) and verb.
pub type Right = (String, String, String);

impl AuditEntry {
    /// The answer's HTTP status code.
    pub fn code(&self) -> u16 {
        self.response_status.as_ref().map_or(0, |answer| answer.code)
    }

    /// Whether it changes something.
    pub fn is_write(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch")
    }

    /// The right that it needed, if it was about a resource.
    pub fn right(&self) -> Option<Right> {
        let object = self.object_ref.as_ref()?;
        let resource = match object.subresource.as_str() {
            "" => object.resource.clone(),
            part => format!("{}/{part}", object.resource),
        };
        Some((object.api_group.clone(), resource, self.verb.clone()))
    }
}

/// All entries of a log so far. A last line that is still being written is left out.
///
/// # Errors
/// When the log cannot be read or a line is not an audit event.
pub fn read(log: &Path) -> Result<Vec<AuditEntry>> {
    let text = std::fs::read_to_string(log).with_context(|| format!("cannot read {}", log.display()))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// The rights that the entries used. A server-side apply that makes an object needs `create` beside `patch`.
pub fn rights_used(entries: &[AuditEntry]) -> BTreeSet<Right> {
    let used = |entry: &AuditEntry| {
        let right = entry.right()?;
        let made = (entry.verb == "patch" && entry.code() == CREATED)
            .then(|| (right.0.clone(), right.1.clone(), "create".to_owned()));
        Some([Some(right), made])
    };
    entries.iter().filter_map(used).flatten().flatten().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn entries_name_the_right_that_they_needed() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let patch = json!({
            "verb": "patch", "requestURI": "/apis/apps/v1/x", "responseStatus": {"code": 403},
            "objectRef": {"resource": "deployments", "subresource": "scale", "apiGroup": "apps", "name": "a"},
        });
        let get = json!({"verb": "get", "requestURI": "/version", "responseStatus": {"code": 200}});
        let lines = format!("{patch}\n{get}\n{{\"verb\":\"li");
        std::fs::write(&log, lines).unwrap();
        let entries = read(&log).unwrap();
        assert_eq!(entries.len(), 2, "the line that is not finished is left out");
        assert!(entries[0].is_write() && entries[0].code() == 403 && !entries[1].is_write());
        let wanted = ("apps".to_owned(), "deployments/scale".to_owned(), "patch".to_owned());
        assert_eq!(rights_used(&entries), BTreeSet::from([wanted]));
    }
}
