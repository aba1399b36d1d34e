//! The control plane's certificates: an authority of its own for each start, a server certificate for
//! loopback, client certificates whose subject is the Kubernetes user and group, and the key that signs
//! service account tokens. Keys are ECDSA P-256, lie in files of the plane's folder and die with it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose,
};

/// Names under which the API server is reached.
const SERVER_NAMES: [&str; 4] = ["127.0.0.1", "localhost", "kubernetes", "kubernetes.default.svc"];

/// The authority and the files that the servers read.
#[derive(Debug)]
pub struct Certificates {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

/// A certificate and its key, both PEM.
#[derive(Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

impl Certificates {
    /// Makes the authority and writes `ca.crt`, `server.crt`, `server.key`, `tokens.key` and `tokens.pub` into
    /// `folder`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn create(folder: &Path) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name("millrace-test-ca", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let made = Self { issuer, folder: folder.to_owned() };
        made.write("ca.crt", &made.authority())?;
        let names: Vec<String> = SERVER_NAMES.map(String::from).to_vec();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = name("kube-apiserver", None);
        let server = made.sign(params, ExtendedKeyUsagePurpose::ServerAuth)?;
        made.write("server.crt", &server.certificate)?;
        made.write("server.key", &server.key)?;
        let tokens = KeyPair::generate()?;
        made.write("tokens.key", &tokens.serialize_pem())?;
        made.write("tokens.pub", &tokens.public_key_pem())?;
        Ok(made)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.file(file);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn sign(&self, mut params: CertificateParams, usage: ExtendedKeyUsagePurpose) -> Result<Identity> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// The path of one of the files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The authority's certificate, PEM.
    pub fn authority(&self) -> String {
        self.issuer.as_ref().pem()
    }

    /// A client certificate for a Kubernetes user, in one group if any.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Identity> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(user, group);
        self.sign(params, ExtendedKeyUsagePurpose::ClientAuth)
    }
}

/// Kubernetes reads the user from the common name and the group from the organisation.
fn name(user: &str, group: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, user);
    if let Some(group) = group {
        name.push(DnType::OrganizationName, group);
    }
    name
}
