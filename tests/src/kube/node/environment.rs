//! A container's environment, command and arguments as a kubelet makes them: `env`, `envFrom`, field and key
//! references, and `$(NAME)` expansion. Pure; the ConfigMaps and Secrets come as arguments.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapKeySelector, Container, EnvFromSource, EnvVar, ObjectFieldSelector, Pod, Secret,
    SecretKeySelector,
};

/// The ConfigMaps and Secrets that a pod names, by name; what does not exist is absent.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// ConfigMaps.
    pub config_maps: BTreeMap<String, ConfigMap>,
    /// Secrets.
    pub secrets: BTreeMap<String, Secret>,
}

impl Sources {
    /// All values of a ConfigMap, or `None` where it does not exist and may be absent.
    ///
    /// # Errors
    /// When it does not exist and must.
    pub fn config_map(&self, name: &str, optional: bool) -> Result<Option<BTreeMap<String, Vec<u8>>>> {
        let Some(map) = self.config_maps.get(name) else {
            return if optional { Ok(None) } else { bail!("configmap {name:?} not found") };
        };
        let texts = map.data.iter().flatten().map(|(key, text)| (key.clone(), text.clone().into_bytes()));
        let bytes = map.binary_data.iter().flatten().map(|(key, bytes)| (key.clone(), bytes.0.clone()));
        Ok(Some(texts.chain(bytes).collect()))
    }

    /// All values of a Secret, or `None` where it does not exist and may be absent.
    ///
    /// # Errors
    /// When it does not exist and must.
    pub fn secret(&self, name: &str, optional: bool) -> Result<Option<BTreeMap<String, Vec<u8>>>> {
        let Some(secret) = self.secrets.get(name) else {
            return if optional { Ok(None) } else { bail!("secret {name:?} not found") };
        };
        Ok(Some(secret.data.iter().flatten().map(|(key, bytes)| (key.clone(), bytes.0.clone())).collect()))
    }
}

/// What a container's environment is made from.
#[derive(Debug)]
pub struct Environment<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Its address.
    pub ip: Ipv4Addr,
    /// What it refers to.
    pub sources: &'a Sources,
}

impl Environment<'_> {
    /// The variables in the order of their definition, later ones last.
    ///
    /// # Errors
    /// When a reference leads nowhere or is not supported.
    pub fn variables(&self, container: &Container) -> Result<Vec<(String, String)>> {
        let mut found: Vec<(String, String)> = Vec::new();
        for source in container.env_from.iter().flatten() {
            found.extend(self.all_of(source)?);
        }
        for variable in container.env.iter().flatten() {
            let value = match &variable.value_from {
                None => Some(expand(variable.value.as_deref().unwrap_or_default(), &found)),
                Some(_) => self.value_from(variable).with_context(|| format!("env {}", variable.name))?,
            };
            if let Some(value) = value {
                found.retain(|(name, _)| *name != variable.name);
                found.push((variable.name.clone(), value));
            }
        }
        Ok(found)
    }

    fn all_of(&self, source: &EnvFromSource) -> Result<Vec<(String, String)>> {
        let mut values = BTreeMap::new();
        if let Some(map) = &source.config_map_ref {
            values
                .extend(self.sources.config_map(&map.name, map.optional == Some(true))?.unwrap_or_default());
        }
        if let Some(secret) = &source.secret_ref {
            values.extend(
                self.sources.secret(&secret.name, secret.optional == Some(true))?.unwrap_or_default(),
            );
        }
        let prefix = source.prefix.as_deref().unwrap_or_default();
        values
            .into_iter()
            .map(|(key, bytes)| Ok((format!("{prefix}{key}"), String::from_utf8(bytes)?)))
            .collect()
    }

    fn value_from(&self, variable: &EnvVar) -> Result<Option<String>> {
        let from = variable.value_from.as_ref().context("no valueFrom")?;
        if let Some(field) = &from.field_ref {
            return self.field(field).map(Some);
        }
        let (values, key, optional) = if let Some(selector) = &from.config_map_key_ref {
            let ConfigMapKeySelector { name, key, optional } = selector;
            (self.sources.config_map(name, *optional == Some(true))?, key, *optional == Some(true))
        } else if let Some(selector) = &from.secret_key_ref {
            let SecretKeySelector { name, key, optional } = selector;
            (self.sources.secret(name, *optional == Some(true))?, key, *optional == Some(true))
        } else {
            bail!("only fieldRef, configMapKeyRef and secretKeyRef are supported");
        };
        match values.and_then(|values| values.get(key).cloned()) {
            Some(bytes) => Ok(Some(String::from_utf8(bytes)?)),
            None if optional => Ok(None),
            None => bail!("couldn't find key {key}"),
        }
    }

    /// The value of a pod's field, as environment variables and downward API files show it.
    ///
    /// # Errors
    /// When the field is not one of those that a kubelet offers.
    pub fn field(&self, selector: &ObjectFieldSelector) -> Result<String> {
        let (metadata, spec) = (&self.pod.metadata, self.pod.spec.as_ref());
        let text = |value: Option<&String>| value.cloned().unwrap_or_default();
        let path = selector.field_path.as_str();
        Ok(match path {
            "metadata.name" => text(metadata.name.as_ref()),
            "metadata.namespace" => text(metadata.namespace.as_ref()),
            "metadata.uid" => text(metadata.uid.as_ref()),
            "metadata.labels" => lines(metadata.labels.as_ref()),
            "metadata.annotations" => lines(metadata.annotations.as_ref()),
            "spec.nodeName" => text(spec.and_then(|spec| spec.node_name.as_ref())),
            "spec.serviceAccountName" => text(spec.and_then(|spec| spec.service_account_name.as_ref())),
            "status.podIP" | "status.podIPs" => self.ip.to_string(),
            "status.hostIP" | "status.hostIPs" => Ipv4Addr::LOCALHOST.to_string(),
            _ => {
                let Some((map, key)) = path.strip_suffix("']").and_then(|path| path.split_once("['")) else {
                    bail!("unsupported fieldPath {path:?}");
                };
                let values = match map {
                    "metadata.labels" => metadata.labels.as_ref(),
                    "metadata.annotations" => metadata.annotations.as_ref(),
                    _ => bail!("unsupported fieldPath {path:?}"),
                };
                text(values.and_then(|values| values.get(key)))
            }
        })
    }
}

/// `key="value"` lines, as the downward API writes labels and annotations.
fn lines(values: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> =
        values.into_iter().flatten().map(|(key, value)| format!("{key}={value:?}")).collect();
    lines.join("\n")
}

/// Replaces `$(NAME)` by the variable's value where there is one; `$$` is a plain `$`.
pub fn expand(text: &str, variables: &[(String, String)]) -> String {
    let mut made = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        made.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            made.push('$');
            rest = after;
            continue;
        }
        let name = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let value = name.and_then(|(name, after)| {
            variables.iter().rev().find(|(known, _)| known == name).map(|(_, value)| (value, after))
        });
        if let Some((value, after)) = value {
            made.push_str(value);
            rest = after;
        } else {
            made.push('$');
        }
    }
    made.push_str(rest);
    made
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn expansion_follows_kubernetes() {
        let variables = [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())];
        let cases = [
            ("$(A)-$(B)", "1-2"),
            ("$$(A)", "$(A)"),
            ("$(C)", "$(C)"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
            ("plain", "plain"),
            ("$$$(A)", "$1"),
        ];
        for (text, expanded) in cases {
            assert_eq!(expand(text, &variables), expanded, "{text}");
        }
    }

    fn variables(container: serde_json::Value) -> Result<Vec<(String, String)>> {
        let pod = json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"app.kubernetes.io/name": "x"}},
            "spec": {"containers": [], "nodeName": "node"},
        });
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let sources = Sources {
            config_maps: BTreeMap::from([(
                "c".to_owned(),
                serde_json::from_value(json!({"data": {"k": "from-map"}})).unwrap(),
            )]),
            secrets: BTreeMap::from([(
                "s".to_owned(),
                serde_json::from_value(json!({"data": {"k": "aGlkZGVu"}})).unwrap(),
            )]),
        };
        let environment = Environment { pod: &pod, ip: Ipv4Addr::new(127, 1, 2, 3), sources: &sources };
        environment.variables(&serde_json::from_value(container).unwrap())
    }

    #[test]
    fn references_are_resolved_in_order() {
        let container = json!({"name": "a",
        "envFrom": [{"prefix": "M_", "configMapRef": {"name": "c"}}],
        "env": [
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "URL", "value": "http://$(IP):80/$(M_k)"},
            {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app.kubernetes.io/name']"}}},
            {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
            {"name": "O", "valueFrom": {"secretKeyRef": {"name": "none", "key": "k", "optional": true}}},
            {"name": "IP", "value": "last"},
        ]});
        let found = variables(container).unwrap();
        let wanted = [
            ("M_k", "from-map"),
            ("URL", "http://127.1.2.3:80/from-map"),
            ("APP", "x"),
            ("S", "hidden"),
            ("IP", "last"),
        ];
        assert_eq!(found, wanted.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn references_that_lead_nowhere_are_named() {
        let cases = [
            (json!({"configMapKeyRef": {"name": "none", "key": "k"}}), "\"none\" not found"),
            (json!({"secretKeyRef": {"name": "s", "key": "z"}}), "couldn't find key z"),
            (json!({"fieldRef": {"fieldPath": "spec.color"}}), "spec.color"),
            (json!({"resourceFieldRef": {"resource": "limits.cpu"}}), "fieldRef"),
        ];
        for (from, wanted) in cases {
            let container = json!({"name": "a", "env": [{"name": "X", "valueFrom": from}]});
            let error = format!("{:#}", variables(container).unwrap_err());
            assert!(error.contains("env X") && error.contains(wanted), "{error}");
        }
    }
}
