//! Options of command lines that reach an object store.

use std::path::PathBuf;

use clap::Args;
use millrace_crds::config::{StoreConfig, WebIdentityConfig};

/// How to reach the object store, where one is needed.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Object store")]
pub struct StoreArgs {
    /// Address of an S3-compatible service; AWS without it
    #[arg(long, env = "AWS_ENDPOINT_URL", value_name = "URL")]
    pub s3_endpoint: Option<String>,
    /// Region
    #[arg(long, env = "AWS_REGION", value_name = "NAME")]
    pub s3_region: Option<String>,
    /// Put the bucket into the path instead of the host name; always so with --s3-endpoint
    #[arg(long)]
    pub s3_path_style: bool,
    /// Folder with the files AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; the usual AWS chain without it
    #[arg(long, value_name = "FOLDER")]
    pub s3_credentials_dir: Option<PathBuf>,
    /// File with the service's certificate authority; the system's authorities without it
    #[arg(long, value_name = "FILE")]
    pub s3_ca: Option<PathBuf>,
    /// Address of an HTTP proxy; HTTPS_PROXY, HTTP_PROXY and NO_PROXY hold without it
    #[arg(long, value_name = "URL")]
    pub s3_proxy: Option<String>,
    /// Role that the token of --s3-token-file takes on
    #[arg(long, requires = "s3_token_file", conflicts_with = "s3_credentials_dir", value_name = "ARN")]
    pub s3_role_arn: Option<String>,
    /// File with the token of an identity provider
    #[arg(long, requires = "s3_role_arn", value_name = "FILE")]
    pub s3_token_file: Option<PathBuf>,
    /// Address of the security token service; AWS's without it
    #[arg(long, requires = "s3_role_arn", value_name = "URL")]
    pub s3_sts_endpoint: Option<String>,
}

impl StoreArgs {
    /// As the worker's configuration says it.
    pub fn config(&self) -> StoreConfig {
        StoreConfig {
            endpoint: self.s3_endpoint.clone(),
            region: self.s3_region.clone(),
            path_style: self.s3_path_style || self.s3_endpoint.is_some(),
            credentials_dir: self.s3_credentials_dir.clone(),
            web_identity: self.s3_token_file.clone().map(|token_file| WebIdentityConfig {
                token_file,
                role_arn: self.s3_role_arn.clone().unwrap_or_default(),
                endpoint: self.s3_sts_endpoint.clone(),
            }),
            ca_file: self.s3_ca.clone(),
            proxy: self.s3_proxy.clone(),
        }
    }
}
