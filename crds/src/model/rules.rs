//! What the types cannot say: CEL rules of the schema, each with a message that names the field and the fix.
//!
//! One table. [`definition`](super::definition) puts each rule where it belongs, the reference prints all of
//! them, and the operator repeats in code what it relies on. Rules that loop stand on lists and maps with a
//! bound, because the API server refuses a schema whose rules could cost too much.

/// One rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The field that it stands on; empty for the whole object. Names are joined by dots, `[]` is an item.
    pub at: &'static str,
    /// The CEL expression; `self` is the field.
    pub rule: &'static str,
    /// What is wrong and what to do.
    pub message: &'static str,
}

const fn rule(at: &'static str, rule: &'static str, message: &'static str) -> Rule {
    Rule { at, rule, message }
}

/// A bucket and a prefix. No `?`, `#` or space, so that the address has one reading.
const S3_URI: &str = r"self.matches('^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^ ?#]*)?$')";

/// All rules. Those on one object stand together.
pub const RULES: &[Rule] = &[
    rule(
        "",
        "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 40",
        "metadata.name must be at most 40 lower-case letters, digits and dashes, because it is a token of NATS \
         subjects; rename the model (a dot becomes a dash)",
    ),
    rule(
        "spec",
        "has(self.replicas) != has(self.scaling)",
        "set exactly one of spec.replicas and spec.scaling: 'scaling: {}' follows the queue, 'replicas: 1' keeps \
         a number",
    ),
    rule(
        "spec",
        "!has(self.resources.requests) || !('nvidia.com/gpu' in self.resources.requests) || \
         (has(self.resources.limits) && 'nvidia.com/gpu' in self.resources.limits)",
        "spec.resources.requests: ask for nvidia.com/gpu in spec.resources.limits; Kubernetes takes GPUs from \
         there",
    ),
    rule(
        "spec",
        "!has(self.resources.limits) || !('nvidia.com/gpu' in self.resources.limits) || \
         string(self.resources.limits['nvidia.com/gpu']) == string(self.parallelism.tensor)",
        "spec.resources.limits: nvidia.com/gpu must equal spec.parallelism.tensor (1), because each worker uses \
         that many GPUs; raise spec.scaling.maxReplicas to use more GPUs",
    ),
    rule(
        "spec",
        "duration(self.queue.ackWait) >= duration(self.engine.stepTimeout) + duration(self.engine.stepTimeout)",
        "spec.queue.ackWait must be at least twice spec.engine.stepTimeout, or a slow step loses its jobs; raise \
         ackWait, or lower stepTimeout",
    ),
    rule(
        "spec.parallelism",
        "self.tensor == 1",
        "spec.parallelism.tensor must be 1: this version runs each copy of a model on one GPU",
    ),
    rule(
        "spec.model",
        "self.uri == oldSelf.uri || (has(self.revision) ? self.revision : '') != \
         (has(oldSelf.revision) ? oldSelf.revision : '')",
        "spec.model.uri can only change together with spec.model.revision, because answers change with the \
         weights; set spec.model.revision to a new value in the same change",
    ),
    rule(
        "spec.model",
        "self.uri.startsWith('s3://') || !(has(self.endpoint) || has(self.region) || self.pathStyle || \
         has(self.credentialsSecretRef))",
        "spec.model: endpoint, region, pathStyle and credentialsSecretRef are for s3:// only; remove them, or use \
         an s3:// uri",
    ),
    rule(
        "spec.model",
        "!(has(self.credentialsSecretRef) && has(self.webIdentity))",
        "spec.model: credentialsSecretRef and webIdentity are two logins; remove one of them",
    ),
    rule(
        "spec.model.caSecretRef.name",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.model.caSecretRef.name must be the name of a Secret of this namespace",
    ),
    rule(
        "spec.model.proxy",
        "self.matches('^https?://[^/@ ?#]+/?$')",
        "spec.model.proxy must be http://host:port or https://host:port, without a path and \
         without credentials",
    ),
    rule(
        "spec.model.webIdentity.endpoint",
        "self.matches('^https?://[^/@ ?#]+/?$')",
        "spec.model.webIdentity.endpoint must be http://host:port or https://host:port, without a path and \
         without credentials",
    ),
    rule(
        "spec.results.objectStore",
        "!(has(self.credentialsSecretRef) && has(self.webIdentity))",
        "spec.results.objectStore: credentialsSecretRef and webIdentity are two logins; remove one of them",
    ),
    rule(
        "spec.results.objectStore.caSecretRef.name",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.results.objectStore.caSecretRef.name must be the name of a Secret of this namespace",
    ),
    rule(
        "spec.results.objectStore.proxy",
        "self.matches('^https?://[^/@ ?#]+/?$')",
        "spec.results.objectStore.proxy must be http://host:port or https://host:port, without a path and \
         without credentials",
    ),
    rule(
        "spec.results.objectStore.webIdentity.endpoint",
        "self.matches('^https?://[^/@ ?#]+/?$')",
        "spec.results.objectStore.webIdentity.endpoint must be http://host:port or https://host:port, without a path \
         and without credentials",
    ),
    rule(
        "spec.queue.credentialsSecretRef.name",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.queue.credentialsSecretRef.name must be the name of a Secret of this namespace",
    ),
    rule(
        "spec.model.uri",
        "self.startsWith('s3://') || self.startsWith('pvc://') || self.startsWith('file:///')",
        "spec.model.uri must begin with s3://, pvc:// or file:///; for a model of a hub, import it into a bucket \
         first ('millrace import')",
    ),
    rule(
        "spec.model.uri",
        r"!self.startsWith('s3://') || self.matches('^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^ ?#]*)?$')",
        "spec.model.uri must be s3://bucket/prefix, with a bucket of 3 to 63 lower-case letters, digits, dots and \
         dashes, without '?', '#' and spaces",
    ),
    rule(
        "spec.model.uri",
        r"!self.startsWith('pvc://') || self.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^ ?#]*)?$')",
        "spec.model.uri must be pvc://claim/path, with the name of a PersistentVolumeClaim of this namespace",
    ),
    rule(
        "spec.model.uri",
        r"!self.startsWith('file:///') || self.matches('^file:///[^ ?#]+$')",
        "spec.model.uri must be file:///path, with the path of a folder in the image",
    ),
    rule(
        "spec.model.uri",
        r"!self.matches('(^|/)[.][.]?(/|$)')",
        "spec.model.uri must not contain the parts '.' and '..'; write the path out",
    ),
    rule(
        "spec.model.revision",
        "self.matches('^[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$')",
        "spec.model.revision must be a label value: letters, digits, '-', '_' and '.', at most 63, a letter or \
         digit at both ends",
    ),
    rule(
        "spec.model.digest",
        "self.matches('^sha256:[0-9a-f]{64}$')",
        "spec.model.digest must be 'sha256:' and 64 lower-case hex digits; 'millrace doctor' prints it",
    ),
    rule(
        "spec.model.endpoint",
        "self.matches('^https?://[^/@ ?#]+/?$')",
        "spec.model.endpoint must be http://host:port or https://host:port, without a path and without \
         credentials; those belong into the Secret of credentialsSecretRef",
    ),
    rule(
        "spec.model.cacheSize",
        "quantity(self).isGreaterThan(quantity('0'))",
        "spec.model.cacheSize must be above 0; give it the size of the model and some room, such as 50Gi",
    ),
    rule(
        "spec.model.cacheClaim",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.model.cacheClaim must be the name of a PersistentVolumeClaim of this namespace",
    ),
    rule(
        "spec.model.credentialsSecretRef.name",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.model.credentialsSecretRef.name must be the name of a Secret of this namespace",
    ),
    rule(
        "spec.engine.kvCacheFraction",
        "self > 0.0 && self <= 0.95",
        "spec.engine.kvCacheFraction must be above 0 and at most 0.95; 0.9 suits a GPU of its own",
    ),
    rule(
        "spec.engine.maxModelLen",
        "self >= 2 && self <= 16777216",
        "spec.engine.maxModelLen must be between 2 and 16777216 tokens; leave it out for the model's own limit",
    ),
    rule(
        "spec.engine.threads",
        "self >= 1 && self <= 1024",
        "spec.engine.threads must be between 1 and 1024; leave it out for all cores",
    ),
    rule(
        "spec.engine.kvCacheBytes",
        "quantity(self).compareTo(quantity('1Mi')) >= 0",
        "spec.engine.kvCacheBytes must be at least 1Mi; leave it out to take engine.kvCacheFraction of the free \
         memory",
    ),
    rule(
        "spec.engine.stepTimeout",
        "duration(self) >= duration('100ms') && duration(self) <= duration('1h')",
        "spec.engine.stepTimeout must be between 100ms and 1h; a step of a healthy engine takes far below a \
         second",
    ),
    rule(
        "spec.queue",
        "duration(self.attemptTimeout) >= duration(self.ackWait)",
        "spec.queue.attemptTimeout must not be shorter than spec.queue.ackWait; raise attemptTimeout",
    ),
    rule(
        "spec.queue.ackWait",
        "duration(self) >= duration('1s') && duration(self) <= duration('1h')",
        "spec.queue.ackWait must be between 1s and 1h; 60s suits most, because workers that live prolong it",
    ),
    rule(
        "spec.queue.attemptTimeout",
        "duration(self) >= duration('1s') && duration(self) <= duration('720h')",
        "spec.queue.attemptTimeout must be between 1s and 720h",
    ),
    rule(
        "spec.queue.backoff[]",
        "duration(self) <= duration('24h')",
        "spec.queue.backoff: each delay must be at most 24h",
    ),
    rule(
        "spec.queue.maxBytes",
        "quantity(self).isGreaterThan(quantity('0'))",
        "spec.queue.maxBytes must be above 0; publishers are refused beyond it",
    ),
    rule(
        "spec.results.ttl",
        "duration(self) >= duration('1s') && duration(self) <= duration('720h')",
        "spec.results.ttl must be between 1s and 720h; outcomes to be kept longer belong into a store of yours",
    ),
    rule(
        "spec.results.deadTtl",
        "duration(self) <= duration('8760h')",
        "spec.results.deadTtl must be at most 8760h",
    ),
    rule(
        "spec.results",
        "duration(self.deadTtl) >= duration(self.ttl)",
        "spec.results.deadTtl must not be shorter than spec.results.ttl; a marker must outlive what it speaks of",
    ),
    rule(
        "spec.results.maxBytes",
        "quantity(self).isGreaterThan(quantity('0'))",
        "spec.results.maxBytes must be above 0; beyond it answers wait in their workers",
    ),
    rule(
        "spec.results.deadMaxBytes",
        "quantity(self).isGreaterThan(quantity('0'))",
        "spec.results.deadMaxBytes must be above 0; beyond it dead jobs stay in the queue",
    ),
    rule(
        "spec.results.inlineBytesMax",
        "quantity(self).isGreaterThan(quantity('0')) && quantity(self).compareTo(quantity('64Mi')) <= 0",
        "spec.results.inlineBytesMax must be above 0 and at most 64Mi, and below the broker's max_payload",
    ),
    rule("spec.results.objectStore.uri", S3_URI, "spec.results.objectStore.uri must be s3://bucket/prefix"),
    rule(
        "spec.results.objectStore.endpoint",
        "self.matches('^https?://[^/@ ?#]+/?$')",
        "spec.results.objectStore.endpoint must be http://host:port or https://host:port, without a path and \
         without credentials",
    ),
    rule(
        "spec.results.objectStore.credentialsSecretRef.name",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.results.objectStore.credentialsSecretRef.name must be the name of a Secret of this namespace",
    ),
    rule(
        "spec.scaling",
        "self.minReplicas <= self.maxReplicas",
        "spec.scaling.minReplicas must not exceed spec.scaling.maxReplicas; lower minReplicas or raise \
         maxReplicas",
    ),
    rule(
        "spec.scaling",
        "self.minReplicas > 0 || duration(self.idleAfter) >= duration('1s')",
        "spec.scaling.idleAfter must be at least 1s where minReplicas is 0, and should exceed the time of a \
         start; raise it, or set minReplicas to 1",
    ),
    rule(
        "spec.scaling.idleAfter",
        "duration(self) <= duration('168h')",
        "spec.scaling.idleAfter must be at most 168h; to keep a worker always, set minReplicas to 1",
    ),
    rule(
        "spec.scaling.targets.queueWait",
        "duration(self) >= duration('1s') && duration(self) <= duration('168h')",
        "spec.scaling.targets.queueWait must be between 1s and 168h",
    ),
    rule(
        "spec.scaling.stabilization.up",
        "duration(self) <= duration('168h')",
        "spec.scaling.stabilization.up must be at most 168h",
    ),
    rule(
        "spec.scaling.stabilization.down",
        "duration(self) <= duration('168h')",
        "spec.scaling.stabilization.down must be at most 168h",
    ),
    rule(
        "spec.drain.timeout",
        "duration(self) <= duration('24h')",
        "spec.drain.timeout must be at most 24h; jobs that take longer are handed back and run again",
    ),
    rule(
        "spec.start.timeout",
        "duration(self) >= duration('10s') && duration(self) <= duration('24h')",
        "spec.start.timeout must be between 10s and 24h",
    ),
    rule(
        "spec.template.tolerations[]",
        "!has(self.operator) || self.operator != 'Exists' || !has(self.value)",
        "spec.template.tolerations: operator Exists takes no value; remove the value, or use operator Equal",
    ),
    rule(
        "spec.template.tolerations[]",
        "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
        "spec.template.tolerations: without a key the operator must be Exists; name the key",
    ),
    rule(
        "spec.template.labels",
        "self.all(k, !k.startsWith('millrace.dev/') && !k.startsWith('app.kubernetes.io/'))",
        "spec.template.labels must not set labels of millrace.dev/ and app.kubernetes.io/; the operator does",
    ),
    rule(
        "spec.template.labels",
        "self.all(k, k.matches('^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$') \
         && self[k].matches('^([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?$'))",
        "spec.template.labels: keys and values must be valid labels",
    ),
    rule(
        "spec.template.annotations",
        "self.all(k, !k.startsWith('millrace.dev/') && !k.startsWith('container.'))",
        "spec.template.annotations must not set annotations of millrace.dev/, nor AppArmor's old ones",
    ),
    rule(
        "spec.template.env",
        "self.all(k, k.matches('^[A-Za-z_][A-Za-z0-9_]*$'))",
        "spec.template.env: names must be letters, digits and '_', not starting with a digit",
    ),
    rule(
        "spec.template.env",
        "self.all(k, !k.startsWith('MILLRACE_') && !k.startsWith('AWS_SECRET') && k != 'AWS_SESSION_TOKEN')",
        "spec.template.env must not set MILLRACE_ variables, which are spec fields, nor AWS secrets, which belong \
         into the Secret of credentialsSecretRef",
    ),
    rule(
        "spec.template.serviceAccountName",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.template.serviceAccountName must be the name of a ServiceAccount of this namespace",
    ),
    rule(
        "spec.template.priorityClassName",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.template.priorityClassName must be the name of a PriorityClass",
    ),
    rule(
        "spec.template.runtimeClassName",
        "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
        "spec.template.runtimeClassName must be the name of a RuntimeClass",
    ),
    rule(
        "spec.template.image",
        "self.matches('^[^ @]+(@sha256:[0-9a-f]{64})?$')",
        "spec.template.image must be an image reference, such as registry/name:tag or registry/name@sha256:...",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_field() {
        for rule in RULES {
            let field = rule.at.trim_end_matches("[]");
            let last = field.rsplit('.').next().unwrap_or_default();
            let named = if rule.at.is_empty() { "metadata.name" } else { last };
            assert!(rule.message.contains(named), "{:?} does not name {named}", rule.message);
            assert!(rule.message.len() <= 240, "{:?} is long", rule.message);
        }
    }
}
