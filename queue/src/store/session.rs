//! How the object store is reached, and as whom: keys in files, a role that a token takes on, an authority, a proxy.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use async_nats::rustls::RootCertStore;
use async_nats::rustls::pki_types::CertificateDer;
use async_nats::rustls::pki_types::pem::PemObject;
use aws_config::SdkConfig;
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, future};
use aws_sdk_s3::config::SharedHttpClient;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{self, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, Connector};
use millrace_crds::config::{StoreConfig, WebIdentityConfig};

use super::StoreError;

/// For so long keys of files are believed. The SDK asks for new ones some seconds before the end.
const FRESH: Duration = Duration::from_secs(20);
/// What sessions of a role are called.
const SESSION_NAME: &str = "millrace";

/// The keys in a folder, read anew when those that are held end.
#[derive(Debug)]
pub(super) struct FileKeys(pub(super) PathBuf);

impl FileKeys {
    /// The keys as they are now.
    pub(super) fn read(&self) -> Result<Credentials, StoreError> {
        let read = |name: &str| {
            let path = self.0.join(name);
            std::fs::read_to_string(&path)
                .map(|text| text.trim().to_owned())
                .map_err(|source| StoreError::Credentials { file: path.display().to_string(), source })
        };
        let token =
            self.0.join("AWS_SESSION_TOKEN").exists().then(|| read("AWS_SESSION_TOKEN")).transpose()?;
        let (id, secret) = (read("AWS_ACCESS_KEY_ID")?, read("AWS_SECRET_ACCESS_KEY")?);
        Ok(Credentials::new(id, secret, token, Some(SystemTime::now() + FRESH), "files"))
    }
}

impl ProvideCredentials for FileKeys {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::ready(self.read().map_err(CredentialsError::provider_error))
    }
}

/// A role that the token of a file takes on, anew before each session ends.
#[derive(Debug)]
pub(super) struct WebIdentity {
    config: WebIdentityConfig,
    sts: aws_sdk_sts::Client,
}

impl WebIdentity {
    /// Over the same HTTP client, and in the same region, as the store.
    pub(super) fn new(config: &WebIdentityConfig, shared: &SdkConfig) -> Self {
        let mut sts = aws_sdk_sts::config::Builder::from(shared);
        // The store's own address is none of this service.
        sts.set_endpoint_url(config.endpoint.clone());
        Self { config: config.clone(), sts: aws_sdk_sts::Client::from_conf(sts.build()) }
    }

    async fn assume(&self) -> Result<Credentials, CredentialsError> {
        let path = &self.config.token_file;
        let token = tokio::fs::read_to_string(path).await;
        let token = token.map_err(|error| {
            CredentialsError::provider_error(format!("webIdentity.tokenFile: {}: {error}", path.display()))
        })?;
        let request = self.sts.assume_role_with_web_identity().role_arn(&self.config.role_arn);
        let request = request.role_session_name(SESSION_NAME).web_identity_token(token.trim());
        let answer = request.send().await.map_err(|error| {
            let said = error.into_service_error();
            CredentialsError::provider_error(format!("webIdentity: {}", said.meta()))
        })?;
        let none = || CredentialsError::provider_error("webIdentity: the answer holds no keys");
        let keys = answer.credentials().ok_or_else(none)?;
        let end = SystemTime::try_from(*keys.expiration()).map_err(CredentialsError::provider_error)?;
        let token = Some(keys.session_token().to_owned());
        Ok(Credentials::new(keys.access_key_id(), keys.secret_access_key(), token, Some(end), "web identity"))
    }
}

impl ProvideCredentials for WebIdentity {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.assume())
    }
}

/// The HTTP client, with the authority and the proxy of the configuration.
///
/// # Errors
/// When the authority's file holds no certificate, or the proxy's address is none.
pub(super) fn http_client(config: &StoreConfig) -> Result<SharedHttpClient, StoreError> {
    let wrong = |field, message: String| StoreError::Config { field, message };
    let trust = match &config.ca_file {
        Some(path) => TrustStore::empty().with_pem_certificate(authority(path)?),
        None => TrustStore::default(),
    };
    let context = TlsContext::builder().with_trust_store(trust).build();
    let context = context.map_err(|error| wrong("caFile", error.to_string()))?;
    let proxy = match &config.proxy {
        // The address may hold a password.
        Some(address) => ProxyConfig::all(address)
            .map_err(|_| wrong("proxy", "it is no address such as http://proxy:3128".to_owned()))?,
        // A service on this machine is reached by nobody else's way.
        None if config.endpoint.as_deref().is_some_and(is_loopback) => ProxyConfig::disabled(),
        None => ProxyConfig::from_env(),
    };
    Ok(Builder::new().build_with_connector_fn(move |settings, components| {
        let provider = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
        let mut connector = Connector::builder().proxy_config(proxy.clone());
        connector.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            connector.set_sleep_impl(components.sleep_impl());
        }
        connector.tls_provider(provider).tls_context(context.clone()).build()
    }))
}

/// Whether an address such as `http://127.0.0.1:9000` is on this machine.
fn is_loopback(endpoint: &str) -> bool {
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default();
    let name = match host.strip_prefix('[') {
        Some(inner) => inner.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The certificates of a file, each of them looked at: the SDK ends the process for one that is none.
fn authority(path: &Path) -> Result<Vec<u8>, StoreError> {
    let wrong = |message: String| StoreError::Config {
        field: "caFile",
        message: format!("{}: {message}", path.display()),
    };
    let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|error| wrong(format!("no PEM: {error}")))?;
        roots.add(certificate).map_err(|error| wrong(format!("a certificate is none: {error}")))?;
    }
    if roots.is_empty() {
        return Err(wrong("no certificate is in it".to_owned()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_credentials_name_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = FileKeys(folder.path().to_owned()).read().expect_err("no files").to_string();
        assert!(error.contains("AWS_ACCESS_KEY_ID"), "{error}");
    }

    #[test]
    fn keys_of_files_end_soon_and_are_read_anew() {
        let folder = tempfile::tempdir().unwrap();
        let keys = FileKeys(folder.path().to_owned());
        std::fs::write(folder.path().join("AWS_SECRET_ACCESS_KEY"), "s").unwrap();
        for id in ["one", "two"] {
            std::fs::write(folder.path().join("AWS_ACCESS_KEY_ID"), format!("{id}\n")).unwrap();
            let read = keys.read().unwrap();
            assert_eq!(read.access_key_id(), id);
            assert!(read.expiry().unwrap() <= SystemTime::now() + FRESH);
        }
    }

    #[test]
    fn services_of_this_machine_are_reached_directly() {
        for (endpoint, expected) in [
            ("http://127.0.0.1:8333", true),
            ("https://localhost/x", true),
            ("http://[::1]:80", true),
            ("http://10.0.0.1:80", false),
            ("https://s3.example.com", false),
        ] {
            assert_eq!(is_loopback(endpoint), expected, "{endpoint}");
        }
    }

    #[test]
    fn an_authority_or_a_proxy_that_is_none_is_refused_by_its_field() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.crt");
        let of = |config: StoreConfig| http_client(&config).expect_err("refused").to_string();
        let ca = || of(StoreConfig { ca_file: Some(file.clone()), ..StoreConfig::default() });
        assert!(ca().contains("store.caFile"), "missing: {}", ca());
        for text in ["", "-----BEGIN CERTIFICATE-----\n%%\n-----END CERTIFICATE-----\n"] {
            std::fs::write(&file, text).unwrap();
            assert!(ca().contains("store.caFile"), "{text:?}: {}", ca());
        }
        let block = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        std::fs::write(&file, block).unwrap();
        assert!(ca().contains("a certificate is none"), "{}", ca());
        let proxy = of(StoreConfig { proxy: Some("http://u:secret@".into()), ..StoreConfig::default() });
        assert!(proxy.contains("store.proxy") && !proxy.contains("secret"), "{proxy}");
    }
}
