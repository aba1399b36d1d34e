//! How broker and object stores are reached, and as whom.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An S3-compatible object store. Without `credentialsDir` and `webIdentity` the usual AWS chain is asked. Keys in
/// files are read again within 20 s. Without `proxy` the environment's `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` hold.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoreConfig {
    /// Address of the service; absent means AWS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Region; absent means the AWS chain's, then `us-east-1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Put the bucket into the path instead of the host name.
    #[serde(default)]
    pub path_style: bool,
    /// Folder with the files `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and, if any, `AWS_SESSION_TOKEN`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_dir: Option<PathBuf>,
    /// A role that is taken on by a token in a file, instead of `credentialsDir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web_identity: Option<WebIdentityConfig>,
    /// File with the certificate authority of the service; the system's authorities are believed without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Address of an HTTP proxy, such as `http://proxy:3128`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
}

/// A role that is taken on by the token of an identity provider (AssumeRoleWithWebIdentity).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WebIdentityConfig {
    /// File with the token; read anew for each session.
    pub token_file: PathBuf,
    /// The role, such as `arn:aws:iam::123456789012:role/models`.
    pub role_arn: String,
    /// Address of the security token service; absent means AWS's of the region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// The broker. At most one login: `credentialsFile`, `nkeyFile`, `userFile` with `passwordFile`, or `tokenFile`; a
/// client certificate may stand beside it. All files are read again at each connect, and when they change.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NatsConfig {
    /// Server addresses, such as `nats://nats.default.svc:4222`.
    #[schemars(length(min = 1))]
    pub servers: Vec<String>,
    /// File with a JWT and nkey seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_file: Option<PathBuf>,
    /// File with an nkey seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nkey_file: Option<PathBuf>,
    /// File with a user's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_file: Option<PathBuf>,
    /// File with the password of the user of `userFile`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// File with a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// File with the certificate authority of the servers; demands TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// File with a client certificate (PEM), for servers that ask for one; demands TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_file: Option<PathBuf>,
    /// File with the private key of `certificateFile` (PEM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// Begin with TLS, before the server's first word, as its `handshake_first` asks for.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tls_first: bool,
    /// JetStream's domain, where the servers are leaf nodes and the streams are elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Prefix of JetStream's API, such as `$JS.hub.API`, where an account imports it under another name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_prefix: Option<String>,
    /// The monitoring address (`http://host:8222`), if reachable; the fsync policy is read there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<String>,
    /// Create the streams and consumers when they are missing. The operator does it otherwise.
    #[serde(default)]
    pub provision: bool,
}

impl NatsConfig {
    /// What subjects of JetStream's API begin with.
    pub fn api(&self) -> String {
        match (&self.api_prefix, &self.domain) {
            (Some(prefix), _) => prefix.clone(),
            (None, Some(domain)) => format!("$JS.{domain}.API"),
            (None, None) => "$JS.API".to_owned(),
        }
    }
}
