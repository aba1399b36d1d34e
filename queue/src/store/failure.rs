//! What a failed request to the object store means, and in which words.

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::{S3Uri, StoreError};

/// Codes of S3 and of MinIO for a name or a size that will never do.
const NEVER: [&str; 4] =
    ["EntityTooLarge", "KeyTooLongError", "XMinioInvalidObjectName", "XMinioInvalidResourceName"];

/// A request that failed.
pub(super) fn failed<E>(uri: &S3Uri, error: &SdkError<E>) -> StoreError
where
    E: std::error::Error + ProvideErrorMetadata + Send + Sync + 'static,
{
    let status = error.raw_response().map(|response| response.status().as_u16());
    if status == Some(404) && error.code() != Some("NoSuchBucket") {
        return StoreError::Missing(uri.clone());
    }
    let (uri, reason) = (uri.clone(), reason(error, status));
    match error.code() {
        Some(code) if NEVER.contains(&code) => StoreError::Refused { uri, reason },
        _ => StoreError::Service { uri, reason },
    }
}

/// What the service or the connection said, as one sentence: the first cause, without the client's layers around it.
fn reason<E>(error: &SdkError<E>, status: Option<u16>) -> String
where
    E: std::error::Error + ProvideErrorMetadata + Send + Sync + 'static,
{
    let status = status.map(|status| format!("HTTP {status}")).unwrap_or_default();
    let what = match error {
        SdkError::ServiceError(_) => {
            let said = [error.code().unwrap_or_default(), error.message().unwrap_or_default()];
            let said: Vec<&str> =
                [status.as_str()].into_iter().chain(said).filter(|s| !s.is_empty()).collect();
            return format!("the service refused: {}", said.join(", "));
        }
        SdkError::DispatchFailure(failure) if failure.is_io() => "the service cannot be reached",
        SdkError::DispatchFailure(failure) if failure.is_timeout() => "the service did not answer in time",
        SdkError::TimeoutError(_) => "the service did not answer in time",
        SdkError::ResponseError(_) => "the answer cannot be read",
        _ => "the request cannot be sent",
    };
    let outermost: &(dyn std::error::Error + 'static) = error;
    let first = std::iter::successors(Some(outermost), |error| error.source()).last().unwrap_or(outermost);
    // A search for credentials lists where it looked, line by line.
    let first = first.to_string();
    let first = first.lines().next().unwrap_or_default().trim_end_matches(" Attempted:");
    format!("{what}: {first}")
}

/// A body that broke off.
pub(super) fn broken(uri: &S3Uri, error: &(dyn std::error::Error + 'static)) -> StoreError {
    StoreError::Service { uri: uri.clone(), reason: format!("the transfer broke off: {error}") }
}
