//! From verified files to an engine that runs: text and weights of one folder.

use anyhow::Context;
use millrace_crds::config::WorkerConfig;
use millrace_engine::schedule::handle::EngineHandle;
use millrace_engine::start::{Engine, Hardware};
use millrace_engine::text::prompt::Text;

use crate::weights::Folder;

/// A model that runs.
#[derive(Debug)]
pub struct Model {
    /// Its text side.
    pub text: Text,
    /// Its engine.
    pub engine: EngineHandle,
    /// Digest of its files.
    pub digest: String,
}

/// Loads text and weights, and starts the engine.
///
/// # Errors
/// When a file, the configuration or the machine does not allow it.
pub async fn load(config: &WorkerConfig, folder: Folder) -> anyhow::Result<Model> {
    let (engine, name) = (config.engine.clone(), config.model.name.clone());
    let loading = move || {
        let path = &folder.path;
        let text = Text::open_for(path, name.as_str(), engine.split_special_tokens)
            .with_context(|| path.display().to_string())?;
        let engine = Engine::load(path, &engine).with_context(|| path.display().to_string())?;
        let info = engine.info();
        tracing::info!(
            precision = ?info.precision,
            hardware = %info.hardware,
            weight_bytes = info.weight_bytes,
            kv_cache_bytes = info.kv_cache_bytes,
            limits = ?info.limits,
            digest = %folder.digest,
            "loaded"
        );
        if let (Some(quantised), Hardware::Cuda { .. }) = (&info.model.quantised, &info.hardware) {
            let weight_bytes = info.weight_bytes;
            let message = "a GPU computes this checkpoint as bf16, and takes the memory of that";
            tracing::warn!(%quantised, weight_bytes, "{message}");
        }
        anyhow::Ok(Model { text, engine: engine.handle().clone(), digest: folder.digest.to_string() })
    };
    tokio::task::spawn_blocking(loading).await?
}
