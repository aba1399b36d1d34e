//! Tokens of an identity provider (OIDC): JWTs whose signature, issuer, audience and time are checked here.
//!
//! The provider's public keys are read from where its own description says, or from where they are told to be. They
//! are believed for [`FRESH`], and read again for a key that is not among them, but not more often than once in
//! [`REREAD_MIN`]: a provider can change its keys, and a client that makes some up cannot load it.

use std::time::Duration;

use axum::http::Uri;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use millrace_crds::names::SubjectToken;
use serde_json::{Map, Value};

use crate::failure::Failure;
use crate::http::caller::Caller;
use crate::http::error::{ApiCode, ApiError};
use crate::http::kept::{Kept, KeptValue, ReadingLimits};
use crate::http::keys::KeyScopes;
use crate::http::options::OidcArgs;

/// How long the provider's keys are believed.
const FRESH: Duration = Duration::from_secs(600);
/// How long they are used while the provider does not answer.
const STALE_MAX: Duration = Duration::from_secs(3600);
/// Shortest time between two readings.
const REREAD_MIN: Duration = Duration::from_secs(5);
/// How long the provider may take.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest page of the provider, in bytes.
const PAGE_BYTES_MAX: usize = 1 << 20;
/// How far the provider's clock may be off.
const LEEWAY: Duration = Duration::from_secs(30);
/// Longest token, in bytes.
const TOKEN_BYTES_MAX: usize = 16 << 10;
/// What a token may be signed with: only what needs a private key.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
];

/// What a token must say.
#[derive(Debug, Clone)]
struct Rules {
    issuer: String,
    audience: String,
    tenant_claim: String,
    namespaces_claim: Option<String>,
}

/// An identity provider.
#[derive(Debug)]
pub struct Provider {
    rules: Rules,
    jwks: Option<Uri>,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    kept: Kept<JwkSet>,
}

impl Provider {
    /// The provider that the options name, if they name one.
    ///
    /// # Errors
    /// [`Failure::Usage`].
    pub fn new(args: &OidcArgs) -> Result<Option<Self>, Failure> {
        let (Some(issuer), Some(audience)) = (&args.oidc_issuer, &args.oidc_audience) else {
            return Ok(None);
        };
        address("--oidc-issuer", issuer)?;
        let jwks = args.oidc_jwks.as_ref().map(|text| address("--oidc-jwks", text)).transpose()?;
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .map_err(|error| Failure::Usage(format!("--oidc-issuer: the system's authorities: {error}")))?
            .https_or_http()
            .enable_http1()
            .build();
        let rules = Rules {
            issuer: issuer.clone(),
            audience: audience.clone(),
            tenant_claim: args.oidc_tenant_claim.clone(),
            namespaces_claim: args.oidc_namespaces_claim.clone(),
        };
        let client = Client::builder(TokioExecutor::new()).build(connector);
        let limits = ReadingLimits { timeout: READ_TIMEOUT, pause: REREAD_MIN, stale: STALE_MAX };
        Ok(Some(Self { rules, jwks, client, kept: Kept::new("the identity provider's keys", limits) }))
    }

    /// Who has this token.
    ///
    /// # Errors
    /// [`ApiCode::InvalidApiKey`], whatever is wrong with it; [`ApiCode::ProviderUnavailable`].
    pub async fn check(&self, token: &str) -> Result<Caller, ApiError> {
        let key_id = key_id_of(token).ok_or_else(refused)?;
        let keys = self.keys(FRESH).await?;
        if let Some(key) = find(&keys.value, key_id.as_deref()) {
            return verify(&self.rules, key, token);
        }
        // The provider may have a new key.
        let keys = self.keys(REREAD_MIN).await?;
        let unknown = || if keys.is_current { refused() } else { away() };
        verify(&self.rules, find(&keys.value, key_id.as_deref()).ok_or_else(unknown)?, token)
    }

    async fn keys(&self, age: Duration) -> Result<KeptValue<JwkSet>, ApiError> {
        self.kept.get(age, self.read()).await.ok_or_else(away)
    }

    async fn read(&self) -> Result<JwkSet, String> {
        let jwks = match &self.jwks {
            Some(uri) => uri.clone(),
            None => {
                let page =
                    format!("{}/.well-known/openid-configuration", self.rules.issuer.trim_end_matches('/'));
                let description: Value = self.get(page.parse().map_err(|e| format!("{page}: {e}"))?).await?;
                let named =
                    description["jwks_uri"].as_str().ok_or_else(|| format!("{page} has no jwks_uri"))?;
                address("jwks_uri", named).map_err(|failure| failure.to_string())?
            }
        };
        self.get(jwks).await
    }

    async fn get<T: serde::de::DeserializeOwned>(&self, uri: Uri) -> Result<T, String> {
        let answer = self.client.get(uri.clone()).await.map_err(|error| format!("{uri}: {error}"))?;
        if !answer.status().is_success() {
            return Err(format!("{uri}: status {}", answer.status()));
        }
        let page = Limited::new(answer.into_body(), PAGE_BYTES_MAX).collect().await;
        let page = page.map_err(|error| format!("{uri}: {error}"))?.to_bytes();
        serde_json::from_slice(&page).map_err(|error| format!("{uri}: {error}"))
    }
}

/// An address of the provider: `https`, or on loopback `http`.
fn address(name: &str, text: &str) -> Result<Uri, Failure> {
    let wrong = |why: &str| Failure::Usage(format!("{name} {text:?}: {why}"));
    let uri: Uri = text.parse().map_err(|_| wrong("it is no address"))?;
    let host = uri.host().unwrap_or_default();
    let loopback = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
    match uri.scheme_str() {
        Some("https") if !host.is_empty() => Ok(uri),
        Some("http") if loopback => Ok(uri),
        _ => Err(wrong("it must begin with https://, or http:// on loopback")),
    }
}

/// The id of the key that a token says it is signed with, if it has the form of a token.
fn key_id_of(token: &str) -> Option<Option<String>> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let header = decode_header(token).ok()?;
    ALGORITHMS.contains(&header.alg).then_some(header.kid)
}

/// The key of this id; without an id the only one there is.
fn find<'a>(keys: &'a JwkSet, id: Option<&str>) -> Option<&'a Jwk> {
    match (id, keys.keys.as_slice()) {
        (Some(id), _) => keys.find(id),
        (None, [only]) => Some(only),
        _ => None,
    }
}

/// Who has this token, if the key signed it and it keeps the rules.
fn verify(rules: &Rules, key: &Jwk, token: &str) -> Result<Caller, ApiError> {
    let header = decode_header(token).map_err(|_| refused())?;
    let named = key.common.key_algorithm.is_none_or(|named| named.to_string() == format!("{:?}", header.alg));
    let signs = !matches!(key.common.public_key_use, Some(PublicKeyUse::Encryption));
    // What a token calls critical and we do not know must not be passed over.
    if !ALGORITHMS.contains(&header.alg) || !named || !signs || header.crit.is_some() {
        return Err(refused());
    }
    let mut validation = Validation::new(header.alg);
    validation.leeway = LEEWAY.as_secs();
    validation.validate_nbf = true;
    validation.set_issuer(&[&rules.issuer]);
    validation.set_audience(&[&rules.audience]);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    let key = DecodingKey::from_jwk(key).map_err(|_| refused())?;
    let claims = decode::<Map<String, Value>>(token, &key, &validation).map_err(|_| refused())?.claims;
    let text = |name: &str| claims.get(name).and_then(Value::as_str).map(str::to_owned);
    let tenant = text(&rules.tenant_claim).filter(|tenant| !tenant.is_empty()).ok_or_else(refused)?;
    let namespaces = match &rules.namespaces_claim {
        None => Vec::new(),
        Some(name) => namespaces(claims.get(name)).ok_or_else(refused)?,
    };
    let key = format!("oidc:{}", text("sub").unwrap_or_default());
    Ok(Caller { tenant, key, scopes: KeyScopes { namespaces, ..KeyScopes::default() }, ..Caller::default() })
}

/// Namespaces in a list or in words; at least one, for an empty list would allow all.
fn namespaces(claim: Option<&Value>) -> Option<Vec<SubjectToken>> {
    let names: Vec<&str> = match claim? {
        Value::String(words) => words.split_whitespace().collect(),
        Value::Array(names) => names.iter().map(Value::as_str).collect::<Option<_>>()?,
        _ => return None,
    };
    let names: Vec<SubjectToken> = names.iter().map(|name| name.parse().ok()).collect::<Option<_>>()?;
    (!names.is_empty()).then_some(names)
}

fn away() -> ApiError {
    let message = "the identity provider does not answer, so the token cannot be checked";
    ApiError::new(ApiCode::ProviderUnavailable, message)
}

/// One message for all that can be wrong with a token.
fn refused() -> ApiError {
    ApiError::new(ApiCode::InvalidApiKey, "the token is wrong, expired or not for this service")
}

#[cfg(test)]
mod tests;
