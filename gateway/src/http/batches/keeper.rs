//! Which gateway runs which batch. Each looks at all batches that have not ended, and claims those that nobody runs:
//! new ones, ones that were given back, and ones whose record has not changed for [`LEASE`] by this gateway's own
//! clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::http::batches::held::HeldBatch;
use crate::http::batches::record::{ActiveBatch, BatchTask};
use crate::http::batches::run;
use crate::http::front::Front;
use crate::http::records::{RecordError, now};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// Whose record does not change for so long is run by nobody: four signs of life.
pub const LEASE: Duration = Duration::from_secs(8);
/// Seconds that a batch may have no record in, while it is being made.
const MAKING_SECONDS: i64 = 60;
/// Most batches of others that one look reads.
const LOOKED_AT_MAX: usize = 256;

/// Begins to keep batches, for as long as the process lives.
pub fn start(front: &Arc<Front>) {
    if front.args.files.batches_at_once > 0 {
        tokio::spawn(
            BatchKeeper { front: front.clone(), running: HashMap::new(), seen: HashMap::new() }.keep(),
        );
    }
}

struct BatchKeeper {
    front: Arc<Front>,
    running: HashMap<String, JoinHandle<()>>,
    /// The revision of each record of others, and since when it is that.
    seen: HashMap<String, (u64, Instant)>,
}

impl BatchKeeper {
    async fn keep(mut self) {
        while !self.front.is_draining() {
            let _ = tokio::time::timeout(PAUSE, self.front.archive.made.notified()).await;
            self.running.retain(|_, task| !task.is_finished());
            if let Err(error) = self.look().await {
                tracing::warn!(%error, "batches cannot be looked at");
            }
        }
    }

    async fn look(&mut self) -> Result<(), RecordError> {
        let mut active: Vec<(String, ActiveBatch)> = Vec::new();
        let archive = &self.front.archive;
        archive.active.each(None, |id, batch| active.push((id.to_owned(), batch.value))).await?;
        self.seen.retain(|id, _| active.iter().any(|(known, _)| known == id));
        active.retain(|(id, _)| !self.running.contains_key(id));
        active.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (id, batch) in active.into_iter().take(LOOKED_AT_MAX) {
            if self.running.len() >= self.front.args.files.batches_at_once as usize
                || self.front.is_draining()
            {
                break;
            }
            self.consider(id, batch).await?;
        }
        Ok(())
    }

    async fn consider(&mut self, id: String, batch: ActiveBatch) -> Result<(), RecordError> {
        let front = self.front.clone();
        let archive = &front.archive;
        let Some(read) = archive.batches.get(&batch.key).await? else {
            if batch.created_at + MAKING_SECONDS < now() {
                archive.active.remove(&id).await?;
            }
            return Ok(());
        };
        if !self.is_free(&id, read.value.claim.is_none(), read.revision) {
            return Ok(());
        }
        if read.value.task() == BatchTask::Rest {
            return archive.active.remove(&id).await;
        }
        let (key, from) = (batch.key, read.value.claim.is_some());
        let Some(held) = HeldBatch::claim(&front, &key, read).await? else { return Ok(()) };
        tracing::info!(batch = id, taken_over = from, "a batch runs here");
        // The end of a drain waits for it to be given back.
        let task = self.front.cancels.spawn(run::run(held));
        self.running.insert(id, task);
        Ok(())
    }

    /// Whether nobody runs a batch.
    fn is_free(&mut self, id: &str, unclaimed: bool, revision: u64) -> bool {
        let seen = self.seen.entry(id.to_owned()).or_insert((revision, Instant::now()));
        if seen.0 != revision {
            *seen = (revision, Instant::now());
        }
        unclaimed || seen.1.elapsed() >= LEASE
    }
}
