//! What each role needs of the broker: the subjects that it publishes to and those that it hears, and no more.
//!
//! A JetStream consumer reads a stream with the server's rights, so who may create consumers may read everything;
//! only the operator may. Names of streams are one token, `JOBS_<namespace>_<model>`, so a role that works for all
//! models has a `*` in its place: the stronger wall between tenants is an account for each.

use serde_json::{Value, json};

use crate::names::{Class, ModelRef};

/// The stream of the bucket of API keys.
const KEYS_STREAM: &str = "KV_MILLRACE_KEYS";
/// The subjects of its keys.
const KEYS_SUBJECTS: &str = "$KV.MILLRACE_KEYS.>";
/// The stream of records of the Responses API.
const RESPONSES_STREAM: &str = "MILLRACE_RESPONSES";
/// Buckets of what gateways share.
const GATEWAY_BUCKETS: [&str; 6] = [
    "MILLRACE_LIMITS",
    "MILLRACE_ANSWERS",
    "MILLRACE_FILES",
    "MILLRACE_UPLOADS",
    "MILLRACE_BATCHES",
    "MILLRACE_BATCHES_ACTIVE",
];
/// The bucket of their files' bytes, where they have no object store.
const FILES_BUCKET: &str = "MILLRACE_FILES";

/// Who one is to the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// `millrace-operator`, and whoever makes streams and keys with the command line.
    Operator,
    /// `millrace-gateway`, for all models.
    Gateway,
    /// The workers of a model.
    Worker(ModelRef),
    /// Who submits jobs to a model and collects their outcomes.
    Tenant(ModelRef),
}

/// What a role may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permissions {
    /// What the subjects of its replies begin with: the `--inbox-prefix` of the command line.
    pub inbox_prefix: String,
    /// Subjects that it may publish to.
    pub publish: Vec<String>,
    /// Subjects that it may subscribe to.
    pub subscribe: Vec<String>,
}

impl Permissions {
    /// Of a role, where subjects of JetStream's API begin with `api`.
    pub fn of(role: &Role, api: &str) -> Self {
        match role {
            Role::Operator => operator(api),
            Role::Gateway => gateway(api),
            Role::Worker(model) => worker(model, api),
            Role::Tenant(model) => tenant(model, api),
        }
    }

    /// As the block of a user in a server's configuration file.
    pub fn text(&self) -> String {
        let list = |subjects: &[String]| {
            let lines: Vec<String> = subjects.iter().map(|subject| format!("      {subject:?}")).collect();
            lines.join("\n")
        };
        let of = |kind: &str, subjects: &[String]| {
            format!("  {kind} {{\n    allow: [\n{}\n    ]\n  }}\n", list(subjects))
        };
        let (publish, subscribe) = (of("publish", &self.publish), of("subscribe", &self.subscribe));
        format!("permissions {{\n{publish}{subscribe}}}\n")
    }

    /// As they stand under `nats` in a user's JWT.
    pub fn json(&self) -> Value {
        json!({"pub": {"allow": self.publish}, "sub": {"allow": self.subscribe}})
    }

    fn new(inbox_prefix: String, publish: Vec<String>, subscribe: &[String]) -> Self {
        let mut heard = vec![format!("{inbox_prefix}.>")];
        heard.extend_from_slice(subscribe);
        Self { inbox_prefix, publish, subscribe: heard }
    }
}

fn operator(api: &str) -> Permissions {
    let streams = ["CREATE", "UPDATE", "DELETE", "INFO"].map(|verb| format!("{api}.STREAM.{verb}.*"));
    // A consumer is created under its stream, and under its name and filter where it has them.
    let consumers = ["CREATE.*", "CREATE.*.*", "CREATE.*.*.>", "DELETE.*.*", "INFO.*.*"];
    let mut publish = streams.to_vec();
    publish.extend(consumers.map(|rest| format!("{api}.CONSUMER.{rest}")));
    publish.push(format!("{api}.INFO"));
    publish.extend(keys(api));
    // Lists of keys come with flow control.
    publish.push(format!("$JS.FC.{KEYS_STREAM}.>"));
    publish.push(KEYS_SUBJECTS.to_owned());
    if api != "$JS.API" {
        publish.push(format!("{api}.{KEYS_SUBJECTS}"));
    }
    let heard = ["millrace.jobs.*.*.*".to_owned(), "millrace.load.>".to_owned()];
    Permissions::new("_INBOX.operator".into(), publish, &heard)
}

/// Reading keys.
fn keys(api: &str) -> [String; 2] {
    [format!("{api}.DIRECT.GET.{KEYS_STREAM}.>"), format!("{api}.STREAM.INFO.{KEYS_STREAM}")]
}

fn gateway(api: &str) -> Permissions {
    let mut publish = vec![
        "millrace.jobs.*.*.*".to_owned(),
        "millrace.cancel.*.*.*".to_owned(),
        format!("{api}.STREAM.LIST"),
        format!("{api}.STREAM.INFO.*"),
        format!("{api}.DIRECT.GET.*"),
        format!("{api}.DIRECT.GET.*.millrace.>"),
        // Dead letters that are run again are removed.
        format!("{api}.STREAM.MSG.DELETE.*"),
        // What gateways share: who waits for a model, and records of responses.
        "millrace.share.*.*".to_owned(),
        "millrace.responses.*.*.*".to_owned(),
        format!("{api}.STREAM.CREATE.{RESPONSES_STREAM}"),
        format!("{api}.STREAM.PURGE.{RESPONSES_STREAM}"),
    ];
    // Limits of keys, answers that are given again, files and batches, in buckets that the first gateway makes.
    for bucket in GATEWAY_BUCKETS {
        publish.extend(["CREATE", "PURGE"].map(|verb| format!("{api}.STREAM.{verb}.KV_{bucket}")));
        publish.push(format!("{api}.DIRECT.GET.KV_{bucket}.>"));
        publish.push(format!("$KV.{bucket}.>"));
    }
    publish.extend(["CREATE", "PURGE"].map(|verb| format!("{api}.STREAM.{verb}.OBJ_{FILES_BUCKET}")));
    publish.push(format!("{api}.DIRECT.GET.OBJ_{FILES_BUCKET}.>"));
    publish.push(format!("$O.{FILES_BUCKET}.>"));
    publish.extend(keys(api));
    // Outcomes as they are stored are heard by who follows somebody else's job.
    let heard =
        ["millrace.tokens.*.*.*", "millrace.results.*.*.*", "millrace.load.*.*.*", "millrace.share.*.*"]
            .map(str::to_owned);
    Permissions::new("_INBOX.gateway".into(), publish, &heard)
}

fn worker(model: &ModelRef, api: &str) -> Permissions {
    let (jobs, results) = (model.jobs_stream(), model.results_stream());
    let pulls = Class::ALL.map(|class| format!("{api}.CONSUMER.MSG.NEXT.{jobs}.{}", model.consumer(class)));
    let mut publish = pulls.to_vec();
    publish.extend([
        // Acknowledgements, in the form that is used now and in the one with domain and account.
        format!("$JS.ACK.{jobs}.>"),
        format!("$JS.ACK.*.*.{jobs}.>"),
        format!("{api}.STREAM.INFO.{jobs}"),
        format!("{api}.DIRECT.GET.{results}.>"),
        model.results_wildcard(),
        model.attempts_wildcard(),
        model.cancel_wildcard(),
        model.dead_wildcard(),
        model.tokens_wildcard(),
        model.load_wildcard(),
        // Copies of outcomes, for requests that wait in a gateway.
        "_INBOX.gateway.>".to_owned(),
    ]);
    let inbox = format!("_INBOX.worker.{}.{}", model.namespace, model.name);
    Permissions::new(inbox, publish, &[model.cancel_wildcard()])
}

fn tenant(model: &ModelRef, api: &str) -> Permissions {
    let streams = [model.jobs_stream(), model.results_stream(), model.dead_stream()];
    let mut publish =
        vec![format!("millrace.jobs.{}.{}.*", model.namespace, model.name), model.cancel_wildcard()];
    for stream in &streams {
        publish.push(format!("{api}.STREAM.INFO.{stream}"));
        publish.push(format!("{api}.DIRECT.GET.{stream}"));
        publish.push(format!("{api}.DIRECT.GET.{stream}.>"));
    }
    publish.extend(
        Class::ALL
            .map(|class| format!("{api}.CONSUMER.INFO.{}.{}", model.jobs_stream(), model.consumer(class))),
    );
    // What the doctor asks first.
    publish.push(format!("{api}.INFO"));
    // A dead letter that is published again is removed.
    publish.push(format!("{api}.STREAM.MSG.DELETE.{}", model.dead_stream()));
    let inbox = format!("_INBOX.tenant.{}.{}", model.namespace, model.name);
    Permissions::new(inbox, publish, &[model.tokens_wildcard(), model.load_wildcard()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_hold_the_same_subjects() {
        let model = ModelRef::new("team", "m").unwrap();
        for role in [Role::Operator, Role::Gateway, Role::Worker(model.clone()), Role::Tenant(model)] {
            let permissions = Permissions::of(&role, "$JS.hub.API");
            let (text, json) = (permissions.text(), permissions.json());
            for (kind, subjects) in [("pub", &permissions.publish), ("sub", &permissions.subscribe)] {
                assert_eq!(json[kind]["allow"].as_array().unwrap().len(), subjects.len());
                for subject in subjects {
                    assert!(text.contains(&format!("{subject:?}")), "{role:?}: {subject}");
                    assert!(!subject.contains("$JS.API"), "{role:?}: {subject}");
                }
            }
        }
    }

    #[test]
    fn only_the_operator_makes_consumers_and_streams() {
        let model = ModelRef::new("team", "m").unwrap();
        for role in [Role::Gateway, Role::Worker(model.clone()), Role::Tenant(model)] {
            let permissions = Permissions::of(&role, "$JS.API");
            for subject in &permissions.publish {
                let makes = [".CREATE.", ".UPDATE.", ".PURGE", "STREAM.DELETE", "CONSUMER.DELETE", "$KV."];
                // The gateways' own streams are theirs.
                let shared =
                    [RESPONSES_STREAM].into_iter().chain(GATEWAY_BUCKETS).any(|name| subject.contains(name));
                let own = role == Role::Gateway && shared;
                assert!(own || !makes.iter().any(|verb| subject.contains(verb)), "{role:?}: {subject}");
            }
        }
    }
}
