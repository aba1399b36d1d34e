//! A pod's volumes as folders of this machine: ConfigMap, Secret, downward API, projected and emptyDir.
//!
//! Files are written once, when the pod starts; a kubelet would also follow later changes and renew tokens.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, Volume, VolumeProjection};

use super::environment::Environment;

/// A kubelet's default for files of ConfigMaps and Secrets.
const FILE_MODE: i32 = 0o644;
/// Anyone may write into an emptyDir, as on a kubelet.
const EMPTY_DIR_MODE: u32 = 0o777;

/// A file of a volume: its path inside the volume, its bytes and its mode.
#[derive(Debug, Clone, PartialEq, Eq)]
struct File {
    path: PathBuf,
    bytes: Vec<u8>,
    mode: i32,
}

/// Makes the folders of a pod's volumes.
#[derive(Debug)]
pub struct Volumes<'a> {
    /// What references are resolved from.
    pub environment: Environment<'a>,
    /// The pod's service account token, where a volume asks for one.
    pub token: Option<String>,
    /// The group that owns the files, if the pod names one and this process may give files away.
    pub group: Option<u32>,
}

impl Volumes<'_> {
    /// Writes each volume into a folder of its name below `folder`, and returns the folders.
    ///
    /// # Errors
    /// When a reference leads nowhere, or a volume is of a kind that the node does not have.
    pub fn write(&self, volumes: &[Volume], folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
        let mut made = BTreeMap::new();
        for volume in volumes {
            let place = folder.join(&volume.name);
            self.write_one(volume, &place).with_context(|| format!("volume {:?}", volume.name))?;
            made.insert(volume.name.clone(), place);
        }
        Ok(made)
    }

    fn write_one(&self, volume: &Volume, place: &Path) -> Result<()> {
        fs::create_dir_all(place)?;
        if volume.empty_dir.is_some() {
            fs::set_permissions(place, fs::Permissions::from_mode(EMPTY_DIR_MODE))?;
            return chown(place, None, self.group).context("chgrp");
        }
        for file in self.files(volume)? {
            let path = place.join(&file.path);
            ensure!(
                file.path.components().all(|part| matches!(part, Component::Normal(_))),
                "{}: no plain relative path",
                file.path.display()
            );
            fs::create_dir_all(path.parent().unwrap_or(place))?;
            fs::write(&path, &file.bytes)?;
            chown(&path, None, self.group)?;
            // The group's members may read what the owner may.
            let shared = if self.group.is_some() { (file.mode & 0o400) >> 3 } else { 0 };
            fs::set_permissions(&path, fs::Permissions::from_mode(u32::try_from(file.mode | shared)?))?;
        }
        Ok(())
    }

    fn files(&self, volume: &Volume) -> Result<Vec<File>> {
        let sources = self.environment.sources;
        if let Some(map) = &volume.config_map {
            let values = sources.config_map(&map.name, map.optional == Some(true))?;
            return chosen(values, map.items.as_deref(), map.default_mode.unwrap_or(FILE_MODE));
        }
        if let Some(secret) = &volume.secret {
            let name = secret.secret_name.as_deref().context("no secretName")?;
            let values = sources.secret(name, secret.optional == Some(true))?;
            return chosen(values, secret.items.as_deref(), secret.default_mode.unwrap_or(FILE_MODE));
        }
        if let Some(downward) = &volume.downward_api {
            let items = downward.items.as_deref().unwrap_or_default();
            return self.downward(items, downward.default_mode.unwrap_or(FILE_MODE));
        }
        let Some(projected) = &volume.projected else {
            bail!("only configMap, secret, emptyDir, downwardAPI and projected are supported");
        };
        let mode = projected.default_mode.unwrap_or(FILE_MODE);
        let mut files = Vec::new();
        for source in projected.sources.iter().flatten() {
            files.extend(self.projected(source, mode)?);
        }
        Ok(files)
    }

    fn projected(&self, source: &VolumeProjection, mode: i32) -> Result<Vec<File>> {
        let sources = self.environment.sources;
        if let Some(map) = &source.config_map {
            let values = sources.config_map(&map.name, map.optional == Some(true))?;
            return chosen(values, map.items.as_deref(), mode);
        }
        if let Some(secret) = &source.secret {
            let values = sources.secret(&secret.name, secret.optional == Some(true))?;
            return chosen(values, secret.items.as_deref(), mode);
        }
        if let Some(downward) = &source.downward_api {
            return self.downward(downward.items.as_deref().unwrap_or_default(), mode);
        }
        let token = source.service_account_token.as_ref().context("an unsupported projection")?;
        let bytes = self.token.clone().context("the pod has no service account token")?.into_bytes();
        Ok(vec![File { path: PathBuf::from(&token.path), bytes, mode }])
    }

    fn downward(&self, items: &[DownwardAPIVolumeFile], default_mode: i32) -> Result<Vec<File>> {
        let file = |item: &DownwardAPIVolumeFile| {
            let field = item.field_ref.as_ref().context("only fieldRef is supported")?;
            let bytes = self.environment.field(field)?.into_bytes();
            Ok(File { path: PathBuf::from(&item.path), bytes, mode: item.mode.unwrap_or(default_mode) })
        };
        items.iter().map(file).collect()
    }
}

/// Whether a volume holds a service account token, and for which audience and how long.
pub fn asks_for_token(volume: &Volume) -> bool {
    let sources = volume.projected.as_ref().and_then(|projected| projected.sources.as_deref());
    sources.unwrap_or_default().iter().any(|source| source.service_account_token.is_some())
}

/// All values as files, or those that `items` chooses under the names that it gives.
fn chosen(
    values: Option<BTreeMap<String, Vec<u8>>>,
    items: Option<&[KeyToPath]>,
    mode: i32,
) -> Result<Vec<File>> {
    let Some(values) = values else { return Ok(Vec::new()) };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        let file = |(key, bytes)| File { path: PathBuf::from(key), bytes, mode };
        return Ok(values.into_iter().map(file).collect());
    };
    let file = |item: &KeyToPath| {
        let bytes =
            values.get(&item.key).with_context(|| format!("references non-existent key {:?}", item.key))?;
        let (path, mode) = (PathBuf::from(&item.path), item.mode.unwrap_or(mode));
        Ok(File { path, bytes: bytes.clone(), mode })
    };
    items.iter().map(file).collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use k8s_openapi::api::core::v1::{ConfigMap, Pod};
    use serde_json::json;

    use super::super::environment::Sources;
    use super::*;

    fn write(volume: serde_json::Value, folder: &Path) -> Result<PathBuf> {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"namespace": "team"}})).unwrap();
        let map: ConfigMap = serde_json::from_value(json!({"data": {"a": "1", "b": "2"}})).unwrap();
        let sources = Sources { config_maps: [("c".to_owned(), map)].into(), ..Sources::default() };
        let environment = Environment { pod: &pod, ip: Ipv4Addr::LOCALHOST, sources: &sources };
        let volumes = Volumes { environment, token: Some("secret".into()), group: None };
        let volume: Volume = serde_json::from_value(volume).unwrap();
        Ok(volumes.write(&[volume], folder)?.remove("v").unwrap())
    }

    #[test]
    fn files_follow_items_modes_and_projections() {
        let folder = tempfile::tempdir().unwrap();
        let all = write(json!({"name": "v", "configMap": {"name": "c"}}), folder.path()).unwrap();
        assert_eq!(fs::read_to_string(all.join("a")).unwrap(), "1");

        let items = json!([{"key": "b", "path": "sub/file", "mode": 0o400}]);
        let folder = tempfile::tempdir().unwrap();
        let some =
            write(json!({"name": "v", "configMap": {"name": "c", "items": items}}), folder.path()).unwrap();
        assert_eq!(fs::metadata(some.join("sub/file")).unwrap().permissions().mode() & 0o777, 0o400);
        assert!(!some.join("b").exists());

        let folder = tempfile::tempdir().unwrap();
        let projected = json!({"name": "v", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token"}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ]}});
        let account = write(projected, folder.path()).unwrap();
        assert_eq!(fs::read_to_string(account.join("token")).unwrap(), "secret");
        assert_eq!(fs::read_to_string(account.join("namespace")).unwrap(), "team");
    }

    #[test]
    fn refusals_name_volume_and_cause() {
        let cases = [
            (json!({"name": "v", "configMap": {"name": "none"}}), "\"none\" not found"),
            (json!({"name": "v", "configMap": {"name": "c", "items": [{"key": "z", "path": "z"}]}}), "\"z\""),
            (
                json!({"name": "v", "configMap": {"name": "c", "items": [{"key": "a", "path": "../z"}]}}),
                "../z",
            ),
            (json!({"name": "v", "hostPath": {"path": "/"}}), "only configMap"),
        ];
        for (volume, wanted) in cases {
            let folder = tempfile::tempdir().unwrap();
            let error = format!("{:#}", write(volume, folder.path()).unwrap_err());
            assert!(error.contains("volume \"v\"") && error.contains(wanted), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(
            write(json!({"name": "v", "configMap": {"name": "n", "optional": true}}), folder.path()).is_ok()
        );
    }
}
