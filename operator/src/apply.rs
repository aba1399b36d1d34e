//! Writes the objects of a model: server-side apply in a fixed order, then the orphans go.
//!
//! Nothing is written when nothing differs. An object differs when the hash of what was applied last is not
//! the hash of what is wanted, or when a wanted field has another value. What belongs to somebody else is never
//! touched: before the first write, the name is looked up.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::core::NamespaceResourceScope;
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::build::{self, ModelObjects, pod_monitor_kind};
use crate::fetch::{Existing, now_ms};
use crate::names::{APPLIED_ANNOTATION, DELETION_COST_ANNOTATION, FIELD_MANAGER};

/// A cache that does not show a write after this time is behind; then the write is made again.
const CACHE_LAG_MAX_MS: u64 = 10_000;
/// What the deletion of a pod that shall go costs; others cost 0.
const DELETE_FIRST: &str = "-1000";

/// Why an object could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// It belongs to somebody else.
    #[error("{kind} {name} exists and does not belong to this InferenceModel")]
    Foreign {
        /// The object's kind.
        kind: String,
        /// Its name.
        name: String,
    },
    /// The API server refused it, or did not answer.
    #[error("{kind} {name}: {source}")]
    Api {
        /// The object's kind.
        kind: String,
        /// Its name.
        name: String,
        /// What it said.
        source: Box<kube::Error>,
    },
    /// It cannot be written down.
    #[error("{kind} {name}: {source}")]
    Form {
        /// The object's kind.
        kind: String,
        /// Its name.
        name: String,
        /// Why.
        source: serde_json::Error,
    },
}

/// What is known to need no write: the hash of what is wanted, over the version that the cache showed.
#[derive(Debug, Clone)]
struct Settled {
    hash: String,
    version: Option<String>,
    /// Set when it was written and the cache has yet to show it.
    until_ms: Option<u64>,
}

/// Writes objects. Cheap to clone.
#[derive(Clone)]
pub struct Applier {
    client: Client,
    settled: Arc<Mutex<HashMap<String, Settled>>>,
}

/// Whose objects are written.
#[derive(Debug, Clone, Copy)]
struct Owner<'a> {
    namespace: &'a str,
    uid: &'a str,
}

impl Applier {
    /// Over a client.
    pub fn new(client: Client) -> Self {
        Self { client, settled: Arc::default() }
    }

    /// Applies all objects: identity, configuration and limits first, the workload last, so that no pod
    /// starts without what it needs. Then deletes what is no longer wanted. Returns the number of writes.
    /// The PodMonitor is [`Applier::monitor`]'s.
    ///
    /// # Errors
    /// With the first object that could not be written. What was written before stays; the next run goes on.
    pub async fn apply(
        &self,
        wanted: ModelObjects,
        existing: &Existing,
        uid: &str,
    ) -> Result<u32, ApplyError> {
        let ModelObjects {
            service_account, config_map, network_policy, disruption_budget, deployment, ..
        } = wanted;
        let namespace = config_map.namespace().unwrap_or_default();
        let owner = Owner { namespace: &namespace, uid };
        let mut writes = 0;
        if let Some(wanted) = &service_account {
            writes += self.one(self.api(owner), wanted, existing.service_account.as_ref(), owner).await?;
        }
        writes += self.one(self.api(owner), &config_map, existing.config_map.as_ref(), owner).await?;
        writes += self.one(self.api(owner), &network_policy, existing.network_policy.as_ref(), owner).await?;
        let budget = existing.disruption_budget.as_ref();
        writes += self.one(self.api(owner), &disruption_budget, budget, owner).await?;
        writes += self.one(self.api(owner), &deployment, existing.deployment.as_ref(), owner).await?;
        if service_account.is_none() {
            writes += self.orphan(&self.api(owner), existing.service_account.as_ref(), owner).await?;
        }
        Ok(writes)
    }

    /// Applies the PodMonitor, or deletes the one that is no longer wanted. Returns the number of writes. Apart from
    /// the rest, because its definition may go at any time, and the API server then refuses it: no model waits for it.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn monitor(
        &self,
        wanted: Option<&DynamicObject>,
        existing: &Existing,
        (namespace, uid): (&str, &str),
    ) -> Result<u32, ApplyError> {
        let owner = Owner { namespace, uid };
        let (api, found) = (self.monitors(owner), existing.pod_monitor.as_ref());
        match wanted {
            Some(wanted) => self.one(api, wanted, found, owner).await,
            None => self.orphan(&api, found, owner).await,
        }
    }

    fn api<K>(&self, owner: Owner<'_>) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), owner.namespace)
    }

    fn monitors(&self, owner: Owner<'_>) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), owner.namespace, &pod_monitor_kind())
    }

    /// Applies one object, if it differs.
    async fn one<K>(
        &self,
        api: Api<K>,
        wanted: &K,
        found: Option<&Arc<K>>,
        owner: Owner<'_>,
    ) -> Result<u32, ApplyError>
    where
        K: Resource + Clone + Serialize + DeserializeOwned + Debug,
    {
        let name = wanted.name_any();
        let (kind, form) = written(wanted, &name)?;
        let key = format!("{kind}/{}/{name}", owner.namespace);
        let hash = build::hash(&form);
        let version = found.and_then(|found| found.resource_version());
        if self.is_settled(&key, &hash, version.as_deref()) {
            return Ok(0);
        }
        match found {
            Some(found) => {
                self.must_be_ours(found.as_ref(), &kind, owner)?;
                if same(found.as_ref(), &form, &hash) {
                    self.settle(key, Settled { hash, version, until_ms: None });
                    return Ok(0);
                }
            }
            None => {
                let held = api.get_opt(&name).await.map_err(|source| refused(&kind, &name, source))?;
                if let Some(held) = held {
                    self.must_be_ours(&held, &kind, owner)?;
                }
            }
        }
        let mut form = form;
        if let Some(Value::Object(metadata)) = form.get_mut("metadata") {
            let annotations = metadata.entry("annotations").or_insert_with(|| json!({}));
            if let Value::Object(annotations) = annotations {
                annotations.insert(APPLIED_ANNOTATION.into(), Value::String(hash.clone()));
            }
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        api.patch(&name, &params, &Patch::Apply(&form)).await.map_err(|e| refused(&kind, &name, e))?;
        tracing::info!(kind, name, namespace = owner.namespace, "applied");
        let until_ms = Some(now_ms().saturating_add(CACHE_LAG_MAX_MS));
        self.settle(key, Settled { hash, version, until_ms });
        Ok(1)
    }

    fn is_settled(&self, key: &str, hash: &str, version: Option<&str>) -> bool {
        let settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        settled.get(key).is_some_and(|settled| {
            settled.hash == hash
                && settled.version.as_deref() == version
                && settled.until_ms.is_none_or(|until_ms| now_ms() < until_ms)
        })
    }

    fn settle(&self, key: String, settled: Settled) {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner).insert(key, settled);
    }

    /// Forgets what is known of a model's objects.
    pub fn forget(&self, namespace: &str, name: &str) {
        let end = format!("/{namespace}/{name}");
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        settled.retain(|key, _| !key.ends_with(&end));
    }

    fn must_be_ours<K: Resource>(&self, found: &K, kind: &str, owner: Owner<'_>) -> Result<(), ApplyError> {
        match found.owner_references().iter().any(|reference| reference.uid == owner.uid) {
            true => Ok(()),
            false => Err(ApplyError::Foreign { kind: kind.to_owned(), name: found.name_any() }),
        }
    }

    /// Deletes an object that is ours and no longer wanted.
    async fn orphan<K>(
        &self,
        api: &Api<K>,
        found: Option<&Arc<K>>,
        owner: Owner<'_>,
    ) -> Result<u32, ApplyError>
    where
        K: Resource + Clone + DeserializeOwned + Debug,
    {
        let Some(found) = found else { return Ok(0) };
        let name = found.name_any();
        let ours = found.owner_references().iter().any(|reference| reference.uid == owner.uid);
        if !ours || found.meta().deletion_timestamp.is_some() {
            return Ok(0);
        }
        // The very object that was seen: one of the same name made since then stays.
        let preconditions = Preconditions { uid: found.uid(), resource_version: None };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match api.delete(&name, &params).await {
            Ok(_) => {
                tracing::info!(name, namespace = owner.namespace, "deleted: no longer wanted");
                Ok(1)
            }
            Err(error) if is_gone(&error) => Ok(0),
            Err(source) => Err(refused("orphan", &name, source)),
        }
    }

    /// Marks the pods that shall go first when workers are removed, and unmarks the others.
    ///
    /// # Errors
    /// When the API server refuses. A pod that is gone needs no mark.
    pub async fn mark(&self, pods: &[Arc<Pod>], delete_first: &[String]) -> Result<u32, ApplyError> {
        let mut writes = 0;
        for pod in pods {
            let name = pod.name_any();
            let cost = pod.annotations().get(DELETION_COST_ANNOTATION).map(String::as_str);
            let wanted = if delete_first.contains(&name) { DELETE_FIRST } else { "0" };
            if cost.unwrap_or("0") == wanted {
                continue;
            }
            let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
            let patch = json!({"metadata": {"annotations": {DELETION_COST_ANNOTATION: wanted}}});
            match api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
                Ok(_) => writes += 1,
                Err(error) if is_gone(&error) => {}
                Err(source) => return Err(refused("Pod", &name, source)),
            }
        }
        Ok(writes)
    }

    /// Deletes a model's workload, so that its workers drain.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn delete_workload(&self, existing: &Existing, uid: &str) -> Result<u32, ApplyError> {
        let namespace = existing.deployment.as_ref().and_then(|found| found.namespace()).unwrap_or_default();
        let owner = Owner { namespace: &namespace, uid };
        self.orphan(&self.api(owner), existing.deployment.as_ref(), owner).await
    }

    /// Sets the finalizers of an InferenceModel, if it is still the version that was seen.
    ///
    /// # Errors
    /// When the API server refuses, or the object has changed since.
    pub async fn set_finalizers<K>(&self, api: &Api<K>, object: &K, list: &[String]) -> Result<(), ApplyError>
    where
        K: Resource + Clone + DeserializeOwned + Debug,
    {
        let name = object.name_any();
        let patch = json!({"metadata": {"finalizers": list, "resourceVersion": object.resource_version()}});
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        match api.patch(&name, &params, &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            Err(error) if is_gone(&error) => Ok(()),
            Err(source) => Err(refused("InferenceModel", &name, source)),
        }
    }
}

/// Whether an object is not there any more.
pub fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

fn refused(kind: &str, name: &str, source: kube::Error) -> ApplyError {
    ApplyError::Api { kind: kind.to_owned(), name: name.to_owned(), source: Box::new(source) }
}

/// An object as it is sent, and its kind.
fn written<K: Serialize>(wanted: &K, name: &str) -> Result<(String, Value), ApplyError> {
    let form = serde_json::to_value(wanted).map_err(|source| ApplyError::Form {
        kind: "object".into(),
        name: name.to_owned(),
        source,
    })?;
    let kind = form.get("kind").and_then(Value::as_str).unwrap_or("object").to_owned();
    Ok((kind, form))
}

/// Whether an object holds all that is wanted, and was last applied with the same wishes.
fn same<K: Resource + Serialize>(found: &K, form: &Value, hash: &str) -> bool {
    let applied = found.annotations().get(APPLIED_ANNOTATION).is_some_and(|applied| applied == hash);
    applied && serde_json::to_value(found).is_ok_and(|found| holds(&found, form))
}

/// Whether every wanted field has the wanted value. Fields that others set, and defaults, do not count.
fn holds(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => {
            wanted.iter().all(|(key, wanted)| match found.get(key) {
                Some(found) => holds(found, wanted),
                None => is_empty(wanted),
            })
        }
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len()
                && found.iter().zip(wanted).all(|(found, wanted)| holds(found, wanted))
        }
        _ => found == wanted,
    }
}

/// What an API server leaves out.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.values().all(is_empty),
        Value::Array(list) => list.is_empty(),
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_fields_must_be_there() {
        let found = json!({"a": 1, "b": {"c": [{"d": 1, "default": true}]}, "other": 5});
        assert!(holds(&found, &json!({"a": 1, "b": {"c": [{"d": 1}]}})));
        assert!(holds(&found, &json!({"a": 1, "readOnly": false, "empty": {}})));
        assert!(!holds(&found, &json!({"a": 2})));
        assert!(!holds(&found, &json!({"b": {"c": []}})));
        assert!(!holds(&found, &json!({"b": {"c": [{"d": 1}, {"d": 2}]}})));
        assert!(!holds(&found, &json!({"missing": 1})));
    }
}
