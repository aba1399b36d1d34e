//! Tells an address that a batch has ended, as the Standard Webhooks specification says: an event in JSON, signed by
//! HMAC-SHA256 over its id, its time and its body.
//!
//! Addresses come from clients, so a request must not reach what only this machine reaches. A name is resolved here,
//! and the connection goes to the very addresses that were looked at; redirects are not followed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{Request, Uri, header};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use sha2::Sha256;

use crate::http::batches::held::{HeldBatch, RunError};
use crate::http::batches::record::{BatchRecord, BatchStatus, WebhookTarget};
use crate::http::records::now;

/// How long one try may take.
const TRY_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest address, in bytes.
const URL_BYTES_MAX: usize = 2048;
/// Bytes of a secret, as the specification says.
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// Waits until a try is due, and makes it.
///
/// # Errors
/// See [`RunError`].
pub async fn notify(held: &HeldBatch, record: &BatchRecord) -> Result<(), RunError> {
    let Some(target) = &record.webhook else { return Ok(()) };
    let wait = target.due_at.unwrap_or_default() - now();
    tokio::time::sleep(Duration::from_secs(wait.max(0) as u64)).await;
    let told = tell(target, record, held.front.args.files.webhook_private);
    let told =
        tokio::time::timeout(TRY_TIMEOUT, told).await.unwrap_or_else(|_| Err("no answer in time".into()));
    if let Err(reason) = &told {
        tracing::warn!(batch = record.id, tries = target.tries + 1, reason, "a webhook was not delivered");
    }
    held.change(|record| record.notified(told.is_ok(), now())).await
}

/// Checks an address and a secret before they are kept.
///
/// # Errors
/// What is wrong with which of them.
pub fn check(url: &str, secret: &str, private: bool) -> Result<(), (&'static str, String)> {
    let wrong = |reason: String| ("webhook.url", reason);
    if url.len() > URL_BYTES_MAX {
        return Err(wrong(format!("it has {} bytes; {URL_BYTES_MAX} are allowed", url.len())));
    }
    let uri: Uri = url.parse().map_err(|error| wrong(format!("it is no address: {error}")))?;
    match uri.scheme_str() {
        Some("https") => {}
        Some("http") if private => {}
        _ => return Err(wrong("it must begin with https://".into())),
    }
    let host = uri.host().unwrap_or_default();
    if host.is_empty() || uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(wrong("it must name a host, and no user".into()));
    }
    if let Ok(ip) = host.trim_matches(['[', ']']).parse::<IpAddr>()
        && !private
        && !is_public(ip)
    {
        return Err(wrong(format!("{ip} is not a public address")));
    }
    key(secret).map(|_| ()).map_err(|reason| ("webhook.secret", reason))
}

fn key(secret: &str) -> Result<Vec<u8>, String> {
    let bytes = secret.strip_prefix("whsec_").and_then(|text| STANDARD.decode(text).ok());
    let bytes = bytes.filter(|bytes| SECRET_BYTES.contains(&bytes.len()));
    let (least, most) = (SECRET_BYTES.start(), SECRET_BYTES.end());
    bytes.ok_or_else(|| format!("it must be whsec_ and {least} to {most} bytes in base64"))
}

/// The signature of an event.
fn sign(key: &[u8], id: &str, seconds: i64, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length will do");
    mac.update(format!("{id}.{seconds}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

async fn tell(target: &WebhookTarget, record: &BatchRecord, private: bool) -> Result<(), String> {
    check(&target.url, &target.secret, private).map_err(|(field, reason)| format!("{field}: {reason}"))?;
    let kind = match record.status {
        BatchStatus::Completed => "batch.completed",
        BatchStatus::Failed => "batch.failed",
        BatchStatus::Expired => "batch.expired",
        _ => "batch.cancelled",
    };
    // The same at each try: who hears it twice knows it by its id.
    let id = format!("evt_{}", record.id.trim_start_matches(super::record::PREFIX));
    let (seconds, data) = (now(), json!({"id": record.id}));
    let event = json!({"id": id, "object": "event", "created_at": seconds, "type": kind, "data": data});
    let body = event.to_string();
    let request = Request::post(&target.url)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::USER_AGENT, concat!("millrace-gateway/", env!("CARGO_PKG_VERSION")))
        .header("webhook-id", &id)
        .header("webhook-timestamp", seconds)
        .header("webhook-signature", sign(&key(&target.secret)?, &id, seconds, &body))
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| error.to_string())?;
    let mut connector = HttpConnector::new_with_resolver(PublicResolver { private });
    connector.enforce_http(false);
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
        .map_err(|error| format!("the system's authorities: {error}"))?
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build(connector);
    let answer = client.request(request).await.map_err(|error| chain(&error))?;
    match answer.status().is_success() {
        true => Ok(()),
        false => Err(format!("it answered {}", answer.status())),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// Resolves a name to its public addresses alone.
#[derive(Debug, Clone)]
struct PublicResolver {
    private: bool,
}

impl tower_service::Service<Name> for PublicResolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let private = self.private;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|found| private || is_public(found.ip())).collect();
            if allowed.is_empty() {
                return Err(std::io::Error::other("the name has no public address"));
            }
            Ok(allowed.into_iter())
        })
    }
}

/// Whether an address is one of the public network (IANA's registries of special-purpose addresses).
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let special = ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_multicast()
        || ip.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (b == 18 || b == 19));
    !special
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    if let Some(mapped) = ip.to_ipv4_mapped() {
        return is_public_v4(mapped);
    }
    let [a, b, ..] = ip.segments();
    // Only 2000::/3 is given out; in it, tunnels into IPv4 and documentation are not.
    let special = !(0x2000..0x4000).contains(&a)
        || a == 0x2002
        || (a == 0x2001 && (b < 0x200 || b == 0xdb8))
        || a == 0x3fff;
    !special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_reached() {
        for private in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "192.0.2.1",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "2001:0:1::",
            "2001:db8::1",
            "ff02::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        for public in
            ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8"]
        {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }

    #[tokio::test]
    async fn a_name_of_this_machine_is_not_resolved() {
        use tower_service::Service;
        let name = || "localhost".parse::<Name>().unwrap();
        assert!(PublicResolver { private: false }.call(name()).await.is_err());
        assert!(PublicResolver { private: true }.call(name()).await.unwrap().next().is_some());
    }

    #[test]
    fn an_event_is_signed_as_the_specification_says() {
        // The example of the specification's reference libraries.
        let key = key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = sign(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn addresses_and_secrets_are_checked_before_they_are_kept() {
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        assert_eq!(check("https://example.com/hook", secret, false), Ok(()));
        assert_eq!(check("http://127.0.0.1:9/hook", secret, true), Ok(()));
        for (url, secret, field) in [
            ("http://example.com/hook", secret, "webhook.url"),
            ("https://127.0.0.1/hook", secret, "webhook.url"),
            ("https://[::1]/hook", secret, "webhook.url"),
            ("https://user@example.com/", secret, "webhook.url"),
            ("/hook", secret, "webhook.url"),
            ("ftp://example.com/", secret, "webhook.url"),
            ("https://example.com/", "whsec_AAAA", "webhook.secret"),
            ("https://example.com/", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "webhook.secret"),
        ] {
            assert_eq!(check(url, secret, false).map_err(|(field, _)| field), Err(field), "{url}");
        }
    }
}
