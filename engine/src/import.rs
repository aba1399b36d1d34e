//! `millrace import`: a GGUF file becomes a model folder in Hugging Face layout.
//!
//! The straight line is `gguf` (header, bounded) -> `layout` (sizes, names, completeness) and `tokenizer` ->
//! `output` (dequantised safetensors, JSON files, manifest). The worker itself never reads a GGUF: it serves the
//! folder, whose files are pinned by one digest. Refused: whatever is malformed, incomplete, not understood or
//! not to be served by the worker, with a message that names the field, its value and the limit.

mod blocks;
mod gguf;
mod layout;
mod output;
mod parts;
mod rope;
mod sentencepiece;
mod tokenizer;
mod vocabulary;

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use blocks::BlockFormat;
pub use gguf::{Gguf, GgufError, TensorInfo, Value};

use self::layout::ModelLayout;
use self::output::{OutputFolder, TensorShape};
use self::parts::Parts;
use self::vocabulary::Vocabulary;
use crate::folder::manifest::ManifestError;
use crate::model::config::{DecoderConfig, ModelConfigError};
use crate::text::prompt::{Text, TextError};

/// Bytes of tensor data in one safetensors file, as Hugging Face writes them.
const SHARD_BYTES_MAX: u64 = 5_000_000_000;
/// Bytes of a chat template; the longest published ones have some 20 KB.
const CHAT_TEMPLATE_BYTES_MAX: usize = 256 << 10;

/// Numeric type of the tensors that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImportDtype {
    /// 16-bit brain floats: what the checkpoints were trained in.
    #[default]
    Bf16,
    /// 16-bit IEEE floats; refused when a weight is beyond their range.
    F16,
    /// 32-bit floats: no rounding after dequantisation.
    F32,
}

impl ImportDtype {
    const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    const fn safetensors(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        }
    }

    const fn torch(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }
}

impl FromStr for ImportDtype {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            "f32" => Ok(Self::F32),
            other => Err(format!("dtype is {other:?}, it must be bf16, f16 or f32")),
        }
    }
}

/// Choices of an import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// Numeric type of the tensors.
    pub dtype: ImportDtype,
    /// Name of the pre-tokenizer, for files that name none or an unknown one.
    pub pre_tokenizer: Option<String>,
    /// Most bytes of tensor data in one file; 5 GB when absent.
    pub shard_bytes_max: Option<u64>,
    /// Write all but the tensors, whose data are not read then: for a look at what an import would give.
    pub without_tensors: bool,
}

/// What an import wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// The folder.
    pub folder: PathBuf,
    /// `sha256:` digest of its manifest.
    pub digest: String,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of all files.
    pub bytes: u64,
    /// What the file left open and how it was decided, a sentence each.
    pub notes: Vec<String>,
}

/// Why an import failed.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file is another thing.
    #[error("it {what}")]
    NotGguf {
        /// What it is.
        what: &'static str,
    },
    /// The header of the GGUF was refused.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A tensor that the architecture needs is absent.
    #[error("tensor {name} is missing")]
    TensorMissing {
        /// Its name in the GGUF.
        name: String,
    },
    /// A tensor that the architecture does not have.
    #[error("tensor {name} is not part of this architecture")]
    TensorUnknown {
        /// Its name in the GGUF.
        name: String,
    },
    /// A tensor whose shape contradicts the metadata.
    #[error("tensor {name} has shape {found:?}, the metadata imply {expected:?}")]
    Shape {
        /// Its name in the GGUF.
        name: String,
        /// The shape in the file, outermost dimension first.
        found: Vec<u64>,
        /// The shape that the metadata imply.
        expected: Vec<u64>,
    },
    /// A row or rotary head that is too long, or rows that do not divide into heads.
    #[error("tensor {name}: {elements} numbers belong together, which is beyond the limit or no whole part")]
    RowLength {
        /// Its name in the GGUF.
        name: String,
        /// Numbers in the row or head.
        elements: u64,
    },
    /// The data of a tensor could not be read.
    #[error("cannot read tensor {name} at offset {offset}: {source}")]
    TensorRead {
        /// Its name in the GGUF.
        name: String,
        /// Where in the file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// A weight that is infinite or no number in the output type.
    #[error("tensor {name} holds {value}, which is not finite in {dtype}")]
    NotFinite {
        /// Its name in the GGUF.
        name: String,
        /// The weight.
        value: f32,
        /// The output type.
        dtype: &'static str,
    },
    /// The chat template is too long.
    #[error("tokenizer.chat_template has {bytes} bytes, the limit is {CHAT_TEMPLATE_BYTES_MAX}")]
    ChatTemplate {
        /// Its length.
        bytes: usize,
    },
    /// The target folder holds something.
    #[error("{path} exists and is not an empty folder; choose another --out or remove it")]
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// The target has no name of its own.
    #[error("{path} does not end in the name of a folder")]
    OutputName {
        /// The path.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The manifest of what was written broke its own rules.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The configuration that the metadata give is none that the worker takes.
    #[error("the metadata give a configuration that cannot be served: {0}")]
    Config(#[from] ModelConfigError),
    /// The tokenizer or chat template is none that the worker takes.
    #[error("the vocabulary or chat template cannot be served: {0}")]
    Text(#[from] TextError),
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> ImportError {
    ImportError::Io { action, path: path.to_owned(), source }
}

/// Converts the GGUF at `gguf` (of a split one the first part) into the folder `out`, which must not exist or be empty.
pub fn run(gguf: &Path, out: &Path, options: &ImportOptions) -> Result<Imported, ImportError> {
    let parts = Parts::open(gguf)?;
    let header = &parts.header;
    let mut notes = Vec::new();
    let factors = rope_factors(&parts)?;
    let layout = ModelLayout::read(header, factors.as_deref(), &mut notes)?;
    let tensors = layout.plan(header)?;
    if let Some(template) = header.text("tokenizer.chat_template")?
        && template.len() > CHAT_TEMPLATE_BYTES_MAX
    {
        return Err(ImportError::ChatTemplate { bytes: template.len() });
    }
    let vocabulary = Vocabulary::read(header, layout.vocabulary, &mut notes)?;
    let files = tokenizer::build(header, &vocabulary, options.pre_tokenizer.as_deref())?;
    let config = layout.config(&vocabulary.special_ids(), options.dtype.torch());
    DecoderConfig::parse(&config.to_string(), None)?;
    let mut folder = OutputFolder::create(out)?;
    folder.write_json("config.json", &config)?;
    folder.write_json("generation_config.json", &files.generation)?;
    folder.write_json("tokenizer.json", &files.tokenizer)?;
    folder.write_json("tokenizer_config.json", &files.config)?;
    Text::open(folder.partial(), "imported")?;
    let shard_bytes_max = options.shard_bytes_max.unwrap_or(SHARD_BYTES_MAX);
    if !options.without_tensors {
        folder.write_tensors(&parts, &tensors, &TensorShape { dtype: options.dtype, shard_bytes_max })?;
    }
    let manifest = folder.finish()?;
    Ok(Imported {
        folder: out.to_owned(),
        digest: manifest.digest().to_string(),
        parameters: tensors.iter().map(|tensor| tensor.source.elements()).sum(),
        tensors: tensors.len(),
        bytes: manifest.total_bytes(),
        notes,
    })
}

/// The frequency factors of Llama 3, if the file has them.
fn rope_factors(parts: &Parts) -> Result<Option<Vec<f32>>, ImportError> {
    let Some(tensor) = parts.header.tensors.iter().find(|tensor| tensor.name == rope::FACTORS_TENSOR) else {
        return Ok(None);
    };
    if tensor.elements() > rope::FACTORS_MAX {
        let (field, value) = (format!("number of elements of tensor {}", tensor.name), tensor.elements());
        return Err(GgufError::Limit { field, value, limit: rope::FACTORS_MAX }.into());
    }
    let mut bytes = vec![0; tensor.bytes as usize];
    parts.read(tensor, 0, &mut bytes)?;
    let mut factors = vec![0.0; tensor.elements() as usize];
    tensor.format.dequantize(&bytes, &mut factors);
    Ok(Some(factors))
}
