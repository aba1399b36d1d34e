//! A model folder: Hugging Face's layout with a [`manifest`] that names each file with its size and SHA-256.
//!
//! No file is used before its bytes were compared with the manifest. A folder without one gets the manifest that its
//! files make.

pub mod hash;
pub mod json;
pub mod manifest;
pub mod map;
pub mod wrapping;

use std::path::Path;

use manifest::{FileEntry, MANIFEST_NAME, Manifest, ManifestError, TEMPLATES_FOLDER, is_template};

/// Why a model folder is refused. The messages name file, value and limit.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The manifest is not valid.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The folder has none of the files of a model.
    #[error("{0} holds no config.json; it is not a model folder in Hugging Face layout")]
    NoModel(String),
    /// A file is not what the manifest says.
    #[error("{file}: {what} is {found}; the manifest says {wanted}")]
    Content {
        /// The file.
        file: String,
        /// Size or SHA-256.
        what: &'static str,
        /// As found.
        found: String,
        /// As the manifest has it.
        wanted: String,
    },
    /// A local file or folder.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Names an I/O error's path.
pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> FolderError {
    let path = path.display().to_string();
    move |source| FolderError::Io { path, source }
}

/// Whether a file of this name belongs to a model: tensors, configuration, tokenizer, chat templates. The rest of a
/// folder (readme files, other formats) is never pulled.
pub fn belongs(name: &str) -> bool {
    const NAMES: [&str; 9] = [
        "added_tokens.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "hf_quant_config.json",
        "quantize_config.json",
    ];
    let is_weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    NAMES.contains(&name) || is_weights && !name.contains('/') || is_template(name)
}

/// Names and sizes of the files in a folder and in its [`TEMPLATES_FOLDER`], sorted by name.
///
/// # Errors
/// When a folder or file cannot be read.
pub fn local_files(path: &Path) -> Result<Vec<(String, u64)>, FolderError> {
    let mut files = Vec::new();
    let templates = path.join(TEMPLATES_FOLDER);
    let below = [(path, ""), (templates.as_path(), TEMPLATES_FOLDER)];
    for (folder, prefix) in below.into_iter().filter(|(folder, prefix)| prefix.is_empty() || folder.is_dir())
    {
        for entry in std::fs::read_dir(folder).map_err(io(folder))? {
            let file = entry.map_err(io(folder))?.path();
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            // A link may lead nowhere; what does not belong to the model harms nobody then.
            match std::fs::metadata(&file) {
                Ok(data) if data.is_file() => files.push((name, data.len())),
                Err(error) if belongs(&name) => return Err(io(&file)(error)),
                _ => {}
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The manifest of a local folder, if it has one.
///
/// # Errors
/// When it cannot be read, or is no manifest.
pub fn read_manifest(path: &Path) -> Result<Option<Manifest>, FolderError> {
    let file = path.join(MANIFEST_NAME);
    match std::fs::metadata(&file) {
        Ok(data) if data.len() > manifest::MANIFEST_BYTES_MAX => {
            Err(ManifestError::TooLarge { bytes: data.len() }.into())
        }
        Ok(_) => Ok(Some(Manifest::parse(&std::fs::read(&file).map_err(io(&file))?)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(io(&file)(source)),
    }
}

/// The manifest of a folder that has none.
fn make_manifest(path: &Path, hash: HashFile) -> Result<Manifest, FolderError> {
    let names: Vec<String> =
        local_files(path)?.into_iter().map(|(name, _)| name).filter(|name| belongs(name)).collect();
    if !names.iter().any(|name| name == "config.json") {
        return Err(FolderError::NoModel(path.display().to_string()));
    }
    let entries = names.iter().map(|name| hash(&path.join(name), name));
    Ok(Manifest::new(entries.collect::<Result<_, _>>()?)?)
}

/// Hashes a file of a folder without a manifest.
pub type HashFile = fn(&Path, &str) -> Result<FileEntry, FolderError>;

/// Compares the files of a folder with its manifest by size and hash.
pub fn check_files(path: &Path, manifest: &Manifest) -> Result<(), FolderError> {
    for wanted in manifest.files() {
        let file = path.join(&wanted.name);
        compare(&file.display().to_string(), &hash::hash_as(&file, wanted)?, wanted)?;
    }
    Ok(())
}

/// The manifest of a local folder, with which its files were compared; without one, the files as they are make it.
pub fn verified(path: &Path, hash: HashFile) -> Result<Manifest, FolderError> {
    match read_manifest(path)? {
        Some(manifest) => check_files(path, &manifest).map(|()| manifest),
        None => make_manifest(path, hash),
    }
}

/// Whether a file is what the manifest says, by size and by the digest of its chunks or, where the manifest has none,
/// of the whole. A hash that is not known matches anything.
pub fn compare(file: &str, found: &FileEntry, wanted: &FileEntry) -> Result<(), FolderError> {
    let differs = |what, found: String, wanted: String| {
        Err(FolderError::Content { file: file.to_owned(), what, found, wanted })
    };
    if found.bytes != wanted.bytes {
        return differs("size", found.bytes.to_string(), wanted.bytes.to_string());
    }
    match (&found.chunks_sha256, &wanted.chunks_sha256) {
        (Some(found), Some(wanted)) if found == wanted => Ok(()),
        (found, Some(wanted)) => {
            differs("SHA-256 of its chunks", found.clone().unwrap_or_default(), wanted.clone())
        }
        (_, None) if wanted.sha256.is_empty() || found.sha256 == wanted.sha256 => Ok(()),
        (_, None) => differs("SHA-256", found.sha256.clone(), wanted.sha256.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_of_their_own_folder_belong_to_a_model() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        };
        let tool = "additional_chat_templates/tool_use.jinja";
        for name in [tool, "additional_chat_templates/readme.md", "config.json", "a.txt", "other/a.jinja"] {
            write(name);
        }
        let listed: Vec<String> =
            local_files(folder.path()).unwrap().into_iter().map(|file| file.0).collect();
        assert_eq!(listed, ["a.txt", "additional_chat_templates/readme.md", tool, "config.json"]);
        let manifest = verified(folder.path(), hash::hash_file).unwrap();
        let named: Vec<&str> = manifest.files().iter().map(|file| file.name.as_str()).collect();
        assert_eq!(named, [tool, "config.json"]);
        assert!(verified(folder.path(), hash::hash_file).is_ok());
    }

    #[test]
    fn a_file_is_compared_by_its_chunks_where_they_are_known() {
        let entry = |sha256: &str, chunks: Option<&str>| FileEntry {
            name: "a".into(),
            bytes: 1,
            sha256: sha256.into(),
            chunks_sha256: chunks.map(str::to_owned),
        };
        for (found, wanted, refusal) in [
            (entry("x", Some("c")), entry("y", Some("c")), None),
            (
                entry("x", Some("d")),
                entry("x", Some("c")),
                Some("SHA-256 of its chunks is d; the manifest says c"),
            ),
            (entry("x", None), entry("x", Some("c")), Some("SHA-256 of its chunks is ; ")),
            (entry("x", Some("c")), entry("y", None), Some("SHA-256 is x; the manifest says y")),
            (entry("x", None), entry("x", None), None),
            (entry("x", None), entry("", None), None),
        ] {
            let error = compare("a", &found, &wanted).err().map(|error| error.to_string());
            match refusal {
                None => assert_eq!(error, None),
                Some(text) => {
                    assert!(error.as_deref().is_some_and(|error| error.contains(text)), "{error:?}")
                }
            }
        }
    }
}
