//! Options of command lines that reach an object store.

use std::path::PathBuf;

use clap::Args;
use millrace_crds::config::StoreConfig;

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
}

impl StoreArgs {
    /// As the worker's configuration says it.
    pub fn config(&self) -> StoreConfig {
        StoreConfig {
            endpoint: self.s3_endpoint.clone(),
            region: self.s3_region.clone(),
            path_style: self.s3_path_style || self.s3_endpoint.is_some(),
            credentials_dir: self.s3_credentials_dir.clone(),
        }
    }
}
