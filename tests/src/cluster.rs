//! A broker, a model and the configuration of the workers that serve it: what most tests begin with.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use millrace_crds::config::WorkerConfig;
use millrace_crds::names::ModelRef;
use millrace_crds::units::{Bytes, Span};
use tempfile::TempDir;

use crate::jobs::Pipeline;
use crate::nats::NatsServer;
use crate::worker::Worker;
use crate::{place, tiny};

/// Short, so that a killed worker's jobs come back soon.
const ACK_WAIT: Duration = Duration::from_secs(2);
const BACKOFF: Duration = Duration::from_millis(100);
/// The tiny model's blocks are small: room for many sequences.
const KV_CACHE_BYTES: u64 = 32 << 20;
/// The tiny model's seed.
const MODEL_SEED: u64 = 1;

/// A broker and a model.
#[derive(Debug)]
pub struct QueueHarness {
    /// The broker.
    pub nats: NatsServer,
    /// The workers' configuration; change it before the first one starts.
    pub config: WorkerConfig,
    /// Holds the model and the cache of weights.
    pub folder: TempDir,
}

impl QueueHarness {
    /// A broker and the tiny model, read from a folder.
    ///
    /// # Errors
    /// When the broker does not come up.
    pub fn tiny() -> Result<Self> {
        let folder = place::folder("cluster-")?;
        let model = folder.path().join("model");
        fs::create_dir(&model)?;
        tiny::write(&model, MODEL_SEED)?;
        let uri = format!("file://{}", model.display());
        let mut cluster = Self::of(folder, "tiny", &uri)?;
        cluster.config.engine.kv_cache_bytes = Some(Bytes(KV_CACHE_BYTES));
        cluster.config.engine.max_batch_tokens = Some(256);
        // Tests run side by side on few cores.
        cluster.config.engine.threads = Some(1);
        Ok(cluster)
    }

    /// A broker and a model from anywhere; `folder` becomes the cache of weights.
    ///
    /// # Errors
    /// When the broker does not come up.
    pub fn of(folder: TempDir, name: &str, uri: &str) -> Result<Self> {
        let nats = NatsServer::start()?;
        let mut config: WorkerConfig = serde_json::from_value(serde_json::json!({
            "model": {"name": name, "uri": uri, "cacheDir": folder.path().join("cache")},
            "nats": {"servers": [nats.url()], "monitor": nats.monitor_url(), "provision": true},
        }))?;
        config.queue.backoff = vec![Span(BACKOFF)];
        let mut harness = Self { nats, config, folder };
        harness.set_ack_wait(ACK_WAIT);
        Ok(harness)
    }

    /// Sets how long a silent worker keeps a job, and with it how long a step may take.
    pub fn set_ack_wait(&mut self, wait: Duration) {
        self.config.queue.ack_wait = Span(wait);
        self.config.engine.step_timeout = Span(wait / 2);
    }

    /// The model's address.
    pub fn model(&self) -> ModelRef {
        self.config.model_ref()
    }

    /// The folder of the tiny model.
    pub fn model_folder(&self) -> std::path::PathBuf {
        Path::new(self.folder.path()).join("model")
    }

    /// Starts a worker and waits until it takes jobs; the first one makes the streams.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn worker(&self) -> Result<Worker> {
        Worker::start_ready(&self.config)
    }

    /// The pipeline's side.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn queue(&self) -> Result<Pipeline> {
        Pipeline::connect(&self.nats, &self.model()).await
    }
}
