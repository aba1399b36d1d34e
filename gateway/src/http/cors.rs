//! Which pages of the web may use the API (CORS), by setting; none without it.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::failure::Failure;

/// How long a browser may remember what is allowed.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// Headers of answers that a page may read beside the harmless ones.
const EXPOSED: [HeaderName; 3] =
    [HeaderName::from_static("x-request-id"), HeaderName::from_static("x-should-retry"), header::RETRY_AFTER];

/// What tells browsers; without origins nothing does.
///
/// # Errors
/// [`Failure::Usage`] for what is no origin.
pub fn layer(origins: &[String]) -> Result<Option<CorsLayer>, Failure> {
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().map(|text| origin(text)).collect::<Result<Vec<_>, _>>()?)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // A key is sent by the page itself, never by the browser, so that headers give nobody's rights away.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(EXPOSED)
        .max_age(REMEMBERED);
    Ok(Some(layer))
}

fn origin(text: &str) -> Result<HeaderValue, Failure> {
    let wrong = || Failure::Usage(format!("--cors-origin {text:?}: it must look like https://chat.example"));
    let uri: Uri = text.parse().map_err(|_| wrong())?;
    let whole = match (uri.scheme_str(), uri.authority()) {
        (Some(scheme @ ("http" | "https")), Some(authority)) => format!("{scheme}://{authority}"),
        _ => return Err(wrong()),
    };
    if whole != text {
        return Err(wrong());
    }
    HeaderValue::from_str(text).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_has_no_path() {
        let checked = |text: &str| layer(&[text.to_owned()]);
        assert!(layer(&[]).unwrap().is_none());
        for fine in ["*", "https://chat.example", "http://localhost:3000"] {
            assert!(checked(fine).unwrap().is_some(), "{fine}");
        }
        for wrong in ["", "chat.example", "https://chat.example/", "ftp://x", "https://"] {
            assert!(checked(wrong).is_err(), "{wrong}");
        }
    }
}
