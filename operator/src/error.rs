//! What can stop a reconcile. One variant for each step; the category is the only label of a metric.

use crate::apply::ApplyError;
use crate::finalize::FinalizeError;
use crate::status::StatusError;

/// Why a reconcile did not come to its end. It is tried again, later and later.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The object in the API server cannot be read as an InferenceModel.
    #[error("the object cannot be read: {0}")]
    Unreadable(String),
    /// The API server or the broker kept it waiting.
    #[error("it took longer than {0:?}; the API server or the broker kept it waiting")]
    TimedOut(std::time::Duration),
    /// An object could not be applied or deleted.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The finalizer could not be set, or what it stands for could not be done.
    #[error(transparent)]
    Finalize(#[from] FinalizeError),
    /// The status could not be written.
    #[error(transparent)]
    Status(#[from] StatusError),
}

impl Error {
    /// A fixed word for the metric.
    pub fn category(&self) -> &'static str {
        match self {
            Error::Unreadable(_) => "unreadable",
            Error::TimedOut(_) => "timeout",
            Error::Apply(_) => "apply",
            Error::Finalize(_) => "finalize",
            Error::Status(_) => "status",
        }
    }
}
