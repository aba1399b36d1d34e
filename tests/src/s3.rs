//! A real S3 server: SeaweedFS, all its parts in one process, on 127.0.0.1.
//!
//! SeaweedFS is made of a master, a volume server, a filer and a gateway that find each other by name, and
//! its own start order takes about three seconds. So tests share one server where they can, with a bucket
//! each.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::primitives::ByteStream;
use millrace_crds::config::StoreConfig;
use tempfile::TempDir;

use crate::ports::Port;
use crate::process::Process;
use crate::{http, place, tools};

/// The start takes 3.3 s on an idle machine.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// The program's place in the tools' cache.
pub const PROGRAM: &str = "bin/weed";
/// Keys of the one identity; they open nothing but this server.
const ACCESS_KEY: &str = "millrace-test";
const SECRET_KEY: &str = "millrace-test-secret";
/// The region that signatures name; SeaweedFS takes any.
const REGION: &str = "us-east-1";

/// A running S3 server.
#[derive(Debug)]
pub struct S3 {
    process: Process,
    ports: Ports,
    folder: TempDir,
    flags: Vec<String>,
}

#[derive(Debug)]
struct Ports {
    master: [Port; 2],
    volume: [Port; 2],
    filer: [Port; 2],
    s3: [Port; 2],
}

impl Ports {
    fn reserve() -> Result<Self> {
        let pair = || -> Result<[Port; 2]> { Ok([Port::reserve()?, Port::reserve()?]) };
        Ok(Self { master: pair()?, volume: pair()?, filer: pair()?, s3: pair()? })
    }

    fn named(&self) -> [(&'static str, &[Port; 2]); 4] {
        [("master", &self.master), ("volume", &self.volume), ("filer", &self.filer), ("s3", &self.s3)]
    }

    /// `-master.port=N -master.port.grpc=M` and so on.
    fn flags(&self) -> Vec<String> {
        let two = |(name, [http, grpc]): (&str, &[Port; 2])| {
            [format!("-{name}.port={}", http.number()), format!("-{name}.port.grpc={}", grpc.number())]
        };
        self.named().into_iter().flat_map(two).collect()
    }

    /// The Unix sockets that SeaweedFS makes beside its ports and leaves behind when killed.
    fn sockets(&self) -> Vec<PathBuf> {
        let two = |(name, [http, grpc]): (&str, &[Port; 2])| {
            [
                format!("seaweedfs-{name}-{}.sock", http.number()),
                format!("seaweedfs-{name}-grpc-{}.sock", grpc.number()),
            ]
        };
        self.named().into_iter().flat_map(two).map(|file| Path::new("/tmp").join(file)).collect()
    }
}

impl Ports {
    fn remove_sockets(&self) {
        for socket in self.sockets() {
            // It may never have been made.
            let _ = fs::remove_file(socket);
        }
    }
}

impl S3 {
    /// Starts a server with an empty store and waits until it answers.
    ///
    /// # Errors
    /// When the program is missing or does not come up; the message holds the end of its log.
    pub fn start() -> Result<Self> {
        Self::start_with(|_| Vec::new())
    }

    /// The same with more flags, which may name files that are put into the server's folder.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(flags: impl FnOnce(&Path) -> Vec<String>) -> Result<Self> {
        let folder = place::folder("s3-")?;
        let ports = Ports::reserve()?;
        fs::create_dir(folder.path().join("data"))?;
        write_credentials(folder.path())?;
        let flags = flags(folder.path());
        let process = Self::launch(&folder, &ports, &flags)?;
        Ok(Self { process, ports, folder, flags })
    }

    /// Starts it again on its ports and store, after killing it, and waits until it answers.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.process = Self::launch(&self.folder, &self.ports, &self.flags)?;
        Ok(())
    }

    /// Starts it again with other keys, and takes the former ones no more.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn rekey(&mut self, access_key: &str, secret_key: &str) -> Result<()> {
        write_identities(self.folder.path(), access_key, secret_key)?;
        self.restart()
    }

    /// Kills it.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.ports.remove_sockets();
        Ok(())
    }

    fn launch(folder: &TempDir, ports: &Ports, flags: &[String]) -> Result<Process> {
        let data = folder.path().join("data");
        let mut command = Command::new(tools::tool(PROGRAM)?);
        // It logs into the common temporary folder too, unless told another one.
        command
            .arg(format!("-logdir={}", folder.path().display()))
            .arg("server")
            .arg(format!("-dir={}", data.display()))
            .arg(format!("-s3.config={}", folder.path().join("identities.json").display()))
            .args(ports.flags())
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"])
            // Parts that would listen on fixed ports or call home.
            .args(["-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"])
            // Few large volumes: the defaults reserve room for many.
            .args(["-master.volumeSizeLimitMB=4096", "-volume.max=20"])
            .args(flags)
            .current_dir(folder.path());
        let mut process = Process::start(&command, &folder.path().join("weed.log"))?;
        let address = SocketAddr::from(([127, 0, 0, 1], ports.s3[0].number()));
        let ready = || http::get(address, "/status").is_ok_and(|(status, _)| status == 200);
        process.wait_until(READY_LIMIT, ready)?;
        Ok(process)
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.s3[0].number())
    }

    /// Folder with the files `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.
    pub fn credentials_dir(&self) -> PathBuf {
        self.folder.path().join("credentials")
    }

    /// The keys, for clients that take them from the environment.
    pub fn credentials_environment(&self) -> [(&'static str, &'static str); 3] {
        [("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY), ("AWS_REGION", REGION)]
    }

    /// How a worker reaches this server.
    pub fn store_config(&self) -> StoreConfig {
        StoreConfig {
            endpoint: Some(self.endpoint()),
            region: Some(REGION.to_owned()),
            path_style: true,
            credentials_dir: Some(self.credentials_dir()),
            ..StoreConfig::default()
        }
    }

    /// A client of the SDK.
    pub fn client(&self) -> aws_sdk_s3::Client {
        let http = aws_smithy_http_client::Builder::new().build_http();
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .http_client(http)
            .endpoint_url(self.endpoint())
            .region(Region::new(REGION))
            .credentials_provider(Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "test"))
            .force_path_style(true)
            .build();
        aws_sdk_s3::Client::from_conf(config)
    }

    /// Creates a bucket.
    ///
    /// # Errors
    /// When the server refuses it.
    pub async fn create_bucket(&self, bucket: &str) -> Result<()> {
        let request = self.client().create_bucket().bucket(bucket);
        request.send().await.with_context(|| format!("cannot create bucket {bucket}"))?;
        Ok(())
    }

    /// Puts the files of a flat folder under `prefix`.
    ///
    /// # Errors
    /// When a file cannot be read or the server refuses it.
    pub async fn put_folder(&self, folder: &Path, bucket: &str, prefix: &str) -> Result<()> {
        let client = self.client();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if !entry.file_type()?.is_file() {
                continue;
            }
            let key = format!("{prefix}/{}", entry.file_name().to_string_lossy());
            let body = ByteStream::from_path(entry.path()).await?;
            let request = client.put_object().bucket(bucket).key(&key).body(body);
            request.send().await.with_context(|| format!("cannot put {key}"))?;
        }
        Ok(())
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.ports.remove_sockets();
    }
}

fn write_identities(folder: &Path, access_key: &str, secret_key: &str) -> Result<()> {
    let identities = serde_json::json!({"identities": [{
        "name": "millrace",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }]});
    Ok(fs::write(folder.join("identities.json"), identities.to_string())?)
}

fn write_credentials(folder: &Path) -> Result<()> {
    write_identities(folder, ACCESS_KEY, SECRET_KEY)?;
    let credentials = folder.join("credentials");
    fs::create_dir(&credentials)?;
    fs::write(credentials.join("AWS_ACCESS_KEY_ID"), ACCESS_KEY)?;
    fs::write(credentials.join("AWS_SECRET_ACCESS_KEY"), SECRET_KEY)?;
    Ok(())
}
