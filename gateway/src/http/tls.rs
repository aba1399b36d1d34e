//! TLS: the gateway's certificate, and the authorities of its clients' where they need one; read again when the
//! files change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum_server::tls_rustls::RustlsConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::failure::Failure;

/// How often the files are looked at.
const LOOK_PAUSE: Duration = Duration::from_secs(5);
/// What is spoken, the best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The files.
#[derive(Debug, Clone)]
struct TlsFiles {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

/// The certificate, read again when its files change. With `client_ca` nobody connects without a certificate of one of
/// these authorities.
///
/// # Errors
/// [`Failure::File`].
pub async fn certificate(
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
) -> Result<RustlsConfig, Failure> {
    // Another library may have chosen the same provider before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let files = TlsFiles { cert, key, client_ca };
    let config =
        RustlsConfig::from_config(Arc::new(files.read().map_err(|(shown, e)| Failure::file(shown, e))?));
    let reloading = config.clone();
    tokio::spawn(async move {
        let mut seen = files.changed_at().await;
        loop {
            tokio::time::sleep(LOOK_PAUSE).await;
            let now = files.changed_at().await;
            if now == seen {
                continue;
            }
            match files.read() {
                Ok(read) => {
                    tracing::info!("the certificate was read again");
                    reloading.reload_from_config(Arc::new(read));
                    seen = now;
                }
                // The old one stays; the next look tries again.
                Err((shown, error)) => tracing::warn!(%error, "{shown}"),
            }
        }
    });
    Ok(config)
}

/// The option that names a file, and what is wrong with it.
type FileError = (String, std::io::Error);

fn certificates(option: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let wrong = |error: &dyn std::fmt::Display| {
        (format!("{option} {}", path.display()), std::io::Error::other(error.to_string()))
    };
    let read = CertificateDer::pem_file_iter(path).map_err(|error| wrong(&error))?;
    let found: Vec<_> = read.collect::<Result<_, _>>().map_err(|error| wrong(&error))?;
    if found.is_empty() { Err(wrong(&"it holds no certificate")) } else { Ok(found) }
}

impl TlsFiles {
    fn read(&self) -> Result<ServerConfig, FileError> {
        let shown = |option: &str, path: &Path| format!("{option} {}", path.display());
        let wrong = |option: &str, path: &Path, error: &dyn std::fmt::Display| {
            (shown(option, path), std::io::Error::other(error.to_string()))
        };
        let chain = certificates("--tls-cert", &self.cert)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|e| wrong("--tls-key", &self.key, &e))?;
        let builder = match &self.client_ca {
            None => ServerConfig::builder().with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates("--tls-client-ca", path)? {
                    roots.add(authority).map_err(|e| wrong("--tls-client-ca", path, &e))?;
                }
                let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
                let verifier = verifier.map_err(|e| wrong("--tls-client-ca", path, &e))?;
                ServerConfig::builder().with_client_cert_verifier(verifier)
            }
        };
        let mut config =
            builder.with_single_cert(chain, key).map_err(|e| wrong("--tls-cert", &self.cert, &e))?;
        config.alpn_protocols = PROTOCOLS.iter().map(|name| name.to_vec()).collect();
        Ok(config)
    }

    async fn changed_at(&self) -> Vec<Option<SystemTime>> {
        let mut times = Vec::new();
        for path in [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()].into_iter().flatten() {
            let metadata = tokio::fs::metadata(path).await;
            times.push(metadata.ok().and_then(|metadata| metadata.modified().ok()));
        }
        times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_file_is_said_of_its_option() {
        let folder = tempfile::tempdir().unwrap();
        let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let write = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (cert, key) = (write("cert", made.cert.pem()), write("key", made.signing_key.serialize_pem()));
        let _ = rustls::crypto::ring::default_provider().install_default();
        let good = TlsFiles { cert: cert.clone(), key: key.clone(), client_ca: None };
        assert_eq!(good.read().unwrap().alpn_protocols, PROTOCOLS);
        assert!(TlsFiles { client_ca: Some(cert.clone()), ..good.clone() }.read().is_ok());
        for (files, option) in [
            (TlsFiles { client_ca: Some(key.clone()), ..good.clone() }, "--tls-client-ca"),
            (TlsFiles { cert: folder.path().join("none"), ..good.clone() }, "--tls-cert"),
            (TlsFiles { key: cert, ..good.clone() }, "--tls-key"),
        ] {
            let (shown, _) = files.read().unwrap_err();
            assert!(shown.starts_with(option), "{shown}");
        }
    }
}
