//! Bodies that are too large for a message: where inputs go, where outcomes come from.

use bytes::Bytes;
use millrace_crds::config::StoreConfig;
use millrace_crds::names::JobId;
use millrace_crds::result::OutputReference;

use crate::failure::Failure;

/// Access to bodies in an object store.
#[derive(Debug, Clone, Default)]
pub struct Bodies {
    /// How to reach it.
    pub config: StoreConfig,
}

impl Bodies {
    /// The body of an outcome, checked against what the outcome says of it.
    ///
    /// # Errors
    /// [`Failure::Refused`].
    pub async fn get(&self, job: &JobId, reference: &OutputReference) -> Result<Bytes, Failure> {
        Err(Failure::Refused(format!(
            "job {job}: the outcome lies at {} and cannot be fetched yet (endpoint {:?})",
            reference.output, self.config.endpoint
        )))
    }
}
