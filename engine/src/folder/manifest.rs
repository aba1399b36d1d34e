//! `manifest.json`: every file of a model folder with its size and SHA-256.
//!
//! The digest of a model is the SHA-256 of the canonical form: compact JSON, files sorted by name. The file is
//! written in exactly that form, so `sha256sum manifest.json` prints the digest. Pure; it refuses names that
//! could leave the folder, repeated names, and more files or bytes than the limits say.
//!
//! A file has two digests. `sha256` is what `sha256sum` prints. But it is one chain, which nothing can hash at more
//! than the speed of one thread, and only from the first byte to the last: where the network is faster, a model's
//! start waits for it. `chunksSha256` is the SHA-256 of the digests, 32 bytes each, of the file's chunks of 512 KiB, in
//! order; the last chunk is what is left, and an empty file has none:
//!
//! ```sh
//! split -b 512K --filter='openssl dgst -sha256 -binary' FILE | sha256sum
//! ```
//!
//! Chunks are hashed in any order and many at once. Either digest covers every byte, so that a file is compared by one
//! of them: by that of the chunks where the manifest has it. The model's digest covers both; that they are of the same
//! bytes is the word of who wrote the manifest.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Name of the manifest in a model folder.
pub const MANIFEST_NAME: &str = "manifest.json";
/// Files in one model; the largest published checkpoints have some 200 shards.
pub const FILES_MAX: usize = 1000;
/// Bytes of a manifest: 1000 files of at most 500 bytes each, with room to spare.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a file name, as file systems limit it, less room for the suffixes of partial files.
pub const NAME_BYTES_MAX: usize = 200;
/// Bytes of a chunk; a part of the format.
pub const CHUNK_BYTES: u64 = 512 << 10;
/// The one folder below a model's: chat templates beside the default one, as transformers keeps them.
pub const TEMPLATES_FOLDER: &str = "additional_chat_templates";
/// What its files' names end with.
const TEMPLATE_SUFFIX: &str = ".jinja";
/// Most files in it.
pub const TEMPLATES_MAX: usize = 16;
/// The only version of the format.
const VERSION: u32 = 1;

/// Why a manifest or a name in it was refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is larger than a manifest may be.
    #[error("manifest has {bytes} bytes, the limit is {MANIFEST_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// It is not the JSON of a manifest.
    #[error("manifest is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// It was written by another version.
    #[error("manifest version is {found}, this program reads {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Too many files, or none.
    #[error("manifest lists {files} files, it may list 1 to {FILES_MAX}")]
    FileCount {
        /// How many.
        files: usize,
    },
    /// Too many chat templates.
    #[error("manifest lists {files} files in {TEMPLATES_FOLDER}, it may list up to {TEMPLATES_MAX}")]
    TemplateCount {
        /// How many.
        files: usize,
    },
    /// A file name that could leave the folder or collide with the cache's own files.
    #[error("file name {name:?} in the manifest: {rule}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        rule: &'static str,
    },
    /// A hash that is not 64 lower-case hex digits.
    #[error("{field} of {name} in the manifest is {found:?}, it must be 64 lower-case hex digits")]
    Hash {
        /// Which of the file's hashes.
        field: &'static str,
        /// The file.
        name: String,
        /// The text found.
        found: String,
    },
    /// The sizes add up to more than 2^63.
    #[error("sizes of the files in the manifest overflow")]
    Overflow,
    /// A digest that is not `sha256:` and 64 hex digits.
    #[error("model digest is {found:?}, it must be \"sha256:\" and 64 lower-case hex digits")]
    Digest {
        /// The text found.
        found: String,
    },
}

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Name in the folder, or `additional_chat_templates/NAME.jinja`; there are no other folders below it.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 in lower-case hex.
    pub sha256: String,
    /// SHA-256 of the SHA-256 of each chunk, in lower-case hex.
    #[serde(default, rename = "chunksSha256", skip_serializing_if = "Option::is_none")]
    pub chunks_sha256: Option<String>,
}

impl FileEntry {
    /// A file of which no digest is known. No manifest takes it.
    pub fn unknown(name: String, bytes: u64) -> Self {
        Self { name, bytes, sha256: String::new(), chunks_sha256: None }
    }
}

/// Every file of a model, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    version: u32,
    files: Vec<FileEntry>,
}

impl Manifest {
    /// A manifest of these files, checked and sorted.
    pub fn new(mut files: Vec<FileEntry>) -> Result<Self, ManifestError> {
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let manifest = Self { version: VERSION, files };
        manifest.check()?;
        Ok(manifest)
    }

    /// Parses and checks the bytes of a `manifest.json`.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge { bytes: bytes.len() as u64 });
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        if manifest.version != VERSION {
            return Err(ManifestError::Version { found: manifest.version });
        }
        Self::new(manifest.files)
    }

    /// The files, sorted by name.
    pub fn files(&self) -> &[FileEntry] {
        &self.files
    }

    /// The file of this name.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.binary_search_by(|file| file.name.as_str().cmp(name)).ok().map(|at| &self.files[at])
    }

    /// Size of all files together; the check at creation ruled out overflow.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// The canonical form, whose SHA-256 is the digest.
    pub fn canonical(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and integers always serialise")
    }

    /// The model's digest.
    pub fn digest(&self) -> ModelDigest {
        ModelDigest(hex::encode(Sha256::digest(self.canonical())))
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.files.is_empty() || self.files.len() > FILES_MAX {
            return Err(ManifestError::FileCount { files: self.files.len() });
        }
        match self.files.iter().filter(|file| file.name.contains('/')).count() {
            files if files > TEMPLATES_MAX => return Err(ManifestError::TemplateCount { files }),
            _ => {}
        }
        let mut total: u64 = 0;
        for (index, file) in self.files.iter().enumerate() {
            check_name(&file.name)?;
            if file.name == MANIFEST_NAME {
                return Err(name_error(&file.name, "the manifest does not list itself"));
            }
            if index > 0 && self.files[index - 1].name == file.name {
                return Err(name_error(&file.name, "it is listed twice"));
            }
            let chunks = file.chunks_sha256.iter().map(|hash| ("chunksSha256", hash));
            for (field, hash) in [("sha256", &file.sha256)].into_iter().chain(chunks) {
                if !is_hash(hash) {
                    return Err(ManifestError::Hash { field, name: file.name.clone(), found: hash.clone() });
                }
            }
            total = total
                .checked_add(file.bytes)
                .filter(|total| *total <= i64::MAX as u64)
                .ok_or(ManifestError::Overflow)?;
        }
        Ok(())
    }
}

/// `sha256:` and the SHA-256 of a canonical manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelDigest(String);

impl ModelDigest {
    /// Parses `sha256:<64 hex digits>`.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        match text.strip_prefix("sha256:") {
            Some(hash) if is_hash(hash) => Ok(Self(hash.to_owned())),
            _ => Err(ManifestError::Digest { found: text.to_owned() }),
        }
    }

    /// The 64 hex digits alone.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

fn name_error(name: &str, rule: &'static str) -> ManifestError {
    // A hostile name may be long; the message shows its beginning.
    ManifestError::Name { name: name.chars().take(80).collect(), rule }
}

/// Whether a name is that of a chat template in [`TEMPLATES_FOLDER`].
pub fn is_template(name: &str) -> bool {
    let inner = name.strip_prefix(TEMPLATES_FOLDER).and_then(|rest| rest.strip_prefix('/'));
    inner.is_some_and(|inner| inner.ends_with(TEMPLATE_SUFFIX) && check_component(inner).is_ok())
}

/// Checks that a name stays in its folder: one path component of letters, digits, `.`, `_` and `-`, or such a chat
/// template in [`TEMPLATES_FOLDER`].
pub fn check_name(name: &str) -> Result<(), ManifestError> {
    if is_template(name) { Ok(()) } else { check_component(name) }
}

fn check_component(name: &str) -> Result<(), ManifestError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(name_error(name, "names have 1 to 200 bytes"));
    }
    if name.contains('/') || name.contains('\\') {
        let rule = "names hold no path separator, but for additional_chat_templates/NAME.jinja";
        return Err(name_error(name, rule));
    }
    if name.starts_with('.') {
        return Err(name_error(name, "names do not begin with a dot"));
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        return Err(name_error(name, "names hold ASCII letters, digits, '.', '_' and '-'"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> FileEntry {
        FileEntry { name: name.into(), bytes: 3, sha256: "ab".repeat(32), chunks_sha256: None }
    }

    fn with_chunks(name: &str) -> FileEntry {
        FileEntry { chunks_sha256: Some("cd".repeat(32)), ..entry(name) }
    }

    #[test]
    fn canonical_form_is_stable() {
        let manifest = Manifest::new(vec![with_chunks("model.safetensors"), entry("config.json")]).unwrap();
        let (hash, chunks) = ("ab".repeat(32), "cd".repeat(32));
        let file =
            |name: &str, more: &str| format!(r#"{{"name":"{name}","bytes":3,"sha256":"{hash}"{more}}}"#);
        let chunks = file("model.safetensors", &format!(r#","chunksSha256":"{chunks}""#));
        let files = format!("{},{chunks}", file("config.json", ""));
        let expected = format!(r#"{{"version":1,"files":[{files}]}}"#);
        assert_eq!(String::from_utf8(manifest.canonical()).unwrap(), expected);
        assert_eq!(Manifest::parse(expected.as_bytes()).unwrap(), manifest);
        let pretty = serde_json::to_vec_pretty(&manifest).unwrap();
        assert_eq!(Manifest::parse(&pretty).unwrap().digest(), manifest.digest());
        assert_eq!(ModelDigest::parse(&manifest.digest().to_string()).unwrap(), manifest.digest());
        assert_eq!(manifest.total_bytes(), 6);
        assert_eq!(manifest.file("config.json").unwrap().bytes, 3);
        assert!(manifest.file("absent").is_none());
    }

    #[test]
    fn refuses() {
        for (name, fragment) in [
            ("../config.json", "path separator"),
            ("/etc/passwd", "path separator"),
            ("a\\b", "path separator"),
            ("other/a.jinja", "path separator"),
            ("additional_chat_templates/a.txt", "path separator"),
            ("additional_chat_templates/../a.jinja", "path separator"),
            ("additional_chat_templates/b/a.jinja", "path separator"),
            ("additional_chat_templates/.a.jinja", "path separator"),
            ("additional_chat_templates//a.jinja", "path separator"),
            ("..", "begin with a dot"),
            (".lock", "begin with a dot"),
            ("", "1 to 200"),
            (&"x".repeat(201), "1 to 200"),
            ("a b", "ASCII letters"),
            ("caf\u{e9}", "ASCII letters"),
            ("a\0b", "ASCII letters"),
            ("manifest.json", "does not list itself"),
        ] {
            let error = Manifest::new(vec![entry(name)]).unwrap_err().to_string();
            assert!(error.contains(fragment), "{name:?}: {error}");
        }
        let twice = Manifest::new(vec![entry("a"), entry("a")]).unwrap_err().to_string();
        assert!(twice.contains("listed twice"), "{twice}");
        let many = (0..=FILES_MAX).map(|n| entry(&format!("f{n}"))).collect();
        assert!(Manifest::new(many).unwrap_err().to_string().contains("1001 files"));
        let template = |n: usize| entry(&format!("{TEMPLATES_FOLDER}/t{n}.jinja"));
        assert!(Manifest::new((0..TEMPLATES_MAX).map(template).collect()).is_ok());
        let many = Manifest::new((0..=TEMPLATES_MAX).map(template).collect()).unwrap_err().to_string();
        assert!(many.contains("17 files") && many.contains("16"), "{many}");
        let huge = Manifest::new(vec![
            FileEntry { bytes: u64::MAX, ..entry("a") },
            FileEntry { bytes: 2, ..entry("b") },
        ]);
        assert!(huge.unwrap_err().to_string().contains("overflow"));
        let hash = Manifest::new(vec![FileEntry { sha256: "AB".repeat(32), ..entry("a") }]);
        assert!(hash.unwrap_err().to_string().starts_with("sha256 of a in the manifest is \"ABAB"));
        for chunks in ["", "ab", &"AB".repeat(32), &"g".repeat(64)] {
            let hash =
                Manifest::new(vec![FileEntry { chunks_sha256: Some(chunks.to_owned()), ..entry("a") }]);
            let error = hash.unwrap_err().to_string();
            assert!(error.starts_with("chunksSha256 of a in the manifest is"), "{chunks:?}: {error}");
        }
        for (text, fragment) in [
            ("{", "not valid"),
            (r#"{"version":2,"files":[]}"#, "version is 2"),
            (r#"{"version":1,"files":[]}"#, "lists 0 files"),
            (r#"{"version":1,"files":[],"more":1}"#, "unknown field `more`"),
        ] {
            let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(fragment), "{text}: {error}");
        }
        assert!(ModelDigest::parse("sha256:12").unwrap_err().to_string().contains("sha256:12"));
        assert!(ModelDigest::parse(&"a".repeat(64)).is_err());
    }
}
