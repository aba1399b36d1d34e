//! Models from a real S3 server: what is pulled is what was put, whatever is in the cache already.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::Result;
use millrace_crds::config::ModelConfig;
use millrace_crds::units::Bytes;
use millrace_queue::store::Store;
use millrace_tests::s3::S3;
use millrace_tests::scripted::until;
use millrace_tests::tools;
use millrace_worker::weights::{self, Folder, PullError};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Several parts, the last one partial.
const TENSORS_BYTES: usize = (40 << 20) + 12_345;

/// A file of the one folder below a model's.
const TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";

/// A folder of files as large as a small model's. Their content does not matter here.
fn model() -> Result<TempDir> {
    let folder = TempDir::new()?;
    fs::write(folder.path().join("config.json"), "{}")?;
    fs::write(folder.path().join("tokenizer.json"), "{\"model\":null}")?;
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u8
    };
    let tensors: Vec<u8> = (0..TENSORS_BYTES).map(|_| random()).collect();
    fs::write(folder.path().join("model.safetensors"), tensors)?;
    fs::write(folder.path().join("README.md"), "not a part of the model")?;
    fs::create_dir(folder.path().join("additional_chat_templates"))?;
    fs::write(folder.path().join(TEMPLATE), "{{ messages }}")?;
    Ok(folder)
}

struct Setup {
    s3: S3,
    store: Store,
    model: TempDir,
}

impl Setup {
    async fn new() -> Result<Self> {
        let s3 = S3::start()?;
        s3.create_bucket("models").await?;
        let store = Store::connect(&s3.store_config()).await?;
        Ok(Self { s3, store, model: model()? })
    }

    fn config(&self, prefix: &str, cache: &Path) -> ModelConfig {
        ModelConfig {
            namespace: "default".parse().expect("a name"),
            name: "m".parse().expect("a name"),
            uri: format!("s3://models/{prefix}"),
            digest: None,
            store: self.s3.store_config(),
            cache_dir: cache.to_owned(),
            bytes_max: Bytes(1 << 30),
        }
    }

    /// Puts the model's files without a manifest.
    async fn put_bare(&self, prefix: &str) -> Result<()> {
        self.s3.put_folder(self.model.path(), "models", prefix).await?;
        let template = format!("s3://models/{prefix}/{TEMPLATE}").parse()?;
        Ok(self.store.put_file(&template, &self.model.path().join(TEMPLATE)).await?)
    }

    fn assert_equal(&self, folder: &Folder) -> Result<()> {
        for name in ["config.json", "tokenizer.json", "model.safetensors", TEMPLATE] {
            let pulled = fs::read(folder.path.join(name))?;
            assert!(pulled == fs::read(self.model.path().join(name))?, "{name} is what was put");
        }
        assert!(!folder.path.join("README.md").exists());
        Ok(())
    }
}

fn refused(result: Result<Folder, PullError>, fragments: &[&str]) {
    let error = result.expect_err("refused").to_string();
    for fragment in fragments {
        assert!(error.contains(fragment), "{error:?} names {fragment:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_are_pulled_once_verified_and_resumed() -> Result<()> {
    let setup = Setup::new().await?;
    let put = weights::upload(setup.model.path(), "s3://models/whole", &setup.store).await?;

    // Two workers that share a cache: one pulls, the other finds the work done.
    let cache = TempDir::new()?;
    let config = setup.config("whole", cache.path());
    let (first, second) = tokio::join!(weights::pull(&config), weights::pull(&config));
    let (first, second) = (first?, second?);
    assert_eq!(first.digest, put.digest);
    assert_eq!(first.path, second.path);
    let mut pulled = [first.pulled_bytes, second.pulled_bytes];
    pulled.sort_unstable();
    assert_eq!(pulled, [0, put.bytes]);
    setup.assert_equal(&first)?;

    is_checked(&setup)?;
    not_on_the_disk(&setup, &put).await?;
    resumes(&setup, &put).await?;
    goes_on(&setup, &put).await?;
    with_an_older_manifest(&setup, &put).await?;
    refuses(&setup, &put).await?;
    without_manifest(&setup).await
}

/// `millrace-worker check` reads the bucket as a pull does, and says in a sentence why it cannot.
fn is_checked(setup: &Setup) -> Result<()> {
    let checked = |uri: &str, endpoint: &str| -> Result<String> {
        let mut command = std::process::Command::new(tools::program("millrace-worker")?);
        command.args(["check", uri, "--s3-endpoint", endpoint, "--s3-credentials-dir"]);
        let output = command.arg(setup.s3.credentials_dir()).output()?;
        assert!(!output.status.success(), "no configuration of a decoder is in the folder");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let endpoint = setup.s3.endpoint();
    let said = checked("s3://models/whole", &endpoint)?;
    assert!(said.contains("4 files") && said.contains("tool_use serves chats with tools"), "{said}");
    for (uri, endpoint, what) in [
        ("s3://nosuch/m", endpoint.as_str(), "NoSuchBucket"),
        ("s3://models/nothing", &endpoint, "s3://models/nothing is empty"),
        ("s3://models/whole", "http://127.0.0.1:1", "the service cannot be reached: Connection refused"),
    ] {
        let said = checked(uri, endpoint)?;
        assert!(said.contains(what) && said.lines().count() == 2, "{said}");
    }
    Ok(())
}

/// A folder that a power cut may have torn is hashed before it is used, and pulled again where it is torn.
async fn not_on_the_disk(setup: &Setup, put: &Folder) -> Result<()> {
    let cache = TempDir::new()?;
    let config = setup.config("whole", cache.path());
    let tensors = weights::pull(&config).await?.path.join("model.safetensors");
    let mark = tensors.with_file_name(".settled");
    until("it has settled", || mark.exists()).await;
    fs::remove_file(&mark)?;
    assert_eq!(weights::pull(&config).await?.pulled_bytes, 0, "hashed, and found whole");
    until("it has settled again", || mark.exists()).await;
    for torn in ["model.safetensors", "manifest.json"] {
        fs::remove_file(&mark)?;
        let path = tensors.with_file_name(torn);
        let mut bytes = fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle..].fill(0);
        fs::remove_file(&path)?;
        fs::write(&path, bytes)?;
        let folder = weights::pull(&config).await?;
        assert_eq!(folder.pulled_bytes, put.bytes, "{torn} was torn");
        setup.assert_equal(&folder)?;
        until("it has settled once more", || mark.exists()).await;
    }
    Ok(())
}

/// A pull that was killed goes on; one whose leftovers are wrong starts again.
async fn resumes(setup: &Setup, put: &Folder) -> Result<()> {
    let done = TempDir::new()?;
    let whole = weights::pull(&setup.config("whole", done.path())).await?;
    let head = setup.store.head(&"s3://models/whole/model.safetensors".parse()?).await?;
    let journal = format!("{} {}\n0\n2\n3", head.bytes, head.etag);
    for (damage, pulled) in [(false, put.bytes - (3 << 23)), (true, put.bytes - (3 << 23) + head.bytes)] {
        let cache = TempDir::new()?;
        let partial = cache.path().join(format!("{}.partial", put.digest.hex()));
        fs::create_dir_all(&partial)?;
        let mut bytes = fs::read(whole.path.join("model.safetensors"))?;
        bytes[1 << 23..2 << 23].fill(0);
        if damage {
            bytes[5] ^= 1;
        }
        fs::write(partial.join("model.safetensors"), bytes)?;
        fs::write(partial.join(".model.safetensors.parts"), &journal)?;
        let folder = weights::pull(&setup.config("whole", cache.path())).await?;
        setup.assert_equal(&folder)?;
        assert_eq!(folder.pulled_bytes, pulled, "damaged: {damage}");
    }
    Ok(())
}

/// Transfers that break off.
const CUTS: usize = 3;
/// Bytes after which each of them does.
const CUT_BYTES: usize = 3 << 20;

/// A way to the server that breaks off its first transfers.
struct Brittle {
    endpoint: String,
    /// Bytes that came from the server.
    passed: Arc<AtomicUsize>,
    cuts_left: Arc<AtomicUsize>,
}

impl Brittle {
    async fn to(upstream: String) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let (passed, cuts_left) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(CUTS)));
        let way = Self { endpoint, passed: passed.clone(), cuts_left: cuts_left.clone() };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&upstream).await else { continue };
                tokio::spawn(relay(client, server, passed.clone(), cuts_left.clone()));
            }
        });
        Ok(way)
    }
}

async fn relay(client: TcpStream, server: TcpStream, passed: Arc<AtomicUsize>, cuts_left: Arc<AtomicUsize>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    let (mut buffer, mut here) = (vec![0; 1 << 16], 0);
    while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
        if to_client.write_all(&buffer[..count]).await.is_err() {
            break;
        }
        here += count;
        passed.fetch_add(count, Relaxed);
        let cut = |left: usize| left.checked_sub(1);
        if here > CUT_BYTES && cuts_left.fetch_update(Relaxed, Relaxed, cut).is_ok() {
            break;
        }
    }
    up.abort();
}

/// What breaks off goes on from there: no byte comes twice.
async fn goes_on(setup: &Setup, put: &Folder) -> Result<()> {
    let way = Brittle::to(setup.s3.endpoint().replace("http://", "")).await?;
    let cache = TempDir::new()?;
    let mut config = setup.config("whole", cache.path());
    config.store.endpoint = Some(way.endpoint.clone());
    let folder = weights::pull(&config).await?;
    setup.assert_equal(&folder)?;
    assert_eq!((folder.pulled_bytes, way.cuts_left.load(Relaxed)), (put.bytes, 0));
    let passed = way.passed.load(Relaxed);
    assert!(passed < put.bytes as usize + CUT_BYTES / 2, "{passed} bytes came for {}", put.bytes);
    Ok(())
}

/// Manifests without digests of chunks stay what they are: their files are compared by the digests of the whole.
async fn with_an_older_manifest(setup: &Setup, put: &Folder) -> Result<()> {
    let bytes = setup.store.get(&"s3://models/whole/manifest.json".parse()?, 1 << 20).await?;
    let mut manifest: serde_json::Value = serde_json::from_slice(&bytes)?;
    for file in manifest["files"].as_array_mut().expect("files") {
        file.as_object_mut().and_then(|file| file.remove("chunksSha256")).expect("the digest of its chunks");
    }
    setup.put_bare("older").await?;
    setup.store.put(&"s3://models/older/manifest.json".parse()?, manifest.to_string().into()).await?;
    let cache = TempDir::new()?;
    let config = setup.config("older", cache.path());
    let folder = weights::pull(&config).await?;
    setup.assert_equal(&folder)?;
    assert_ne!(folder.digest, put.digest);
    assert_eq!(fs::read(folder.path.join("manifest.json"))?, manifest.to_string().as_bytes());
    setup.store.put(&"s3://models/older/tokenizer.json".parse()?, "{\"model\":1234}".into()).await?;
    let config = setup.config("older", TempDir::new()?.path());
    refused(weights::pull(&config).await, &["tokenizer.json", "SHA-256 is"]);
    Ok(())
}

async fn refuses(setup: &Setup, put: &Folder) -> Result<()> {
    let cache = TempDir::new()?;
    let config = setup.config("whole", cache.path());
    let wrong = format!("sha256:{}", "0".repeat(64));
    let pinned = ModelConfig { digest: Some(wrong.clone()), ..config.clone() };
    refused(weights::pull(&pinned).await, &["model.digest", &wrong, put.digest.hex()]);
    let malformed = ModelConfig { digest: Some("md5:1".into()), ..config.clone() };
    refused(weights::pull(&malformed).await, &["md5:1", "64"]);
    let small = ModelConfig { bytes_max: Bytes(1000), ..config.clone() };
    refused(weights::pull(&small).await, &["model.bytesMax", "1000", &put.bytes.to_string()]);
    let absent = setup.config("absent", cache.path());
    refused(weights::pull(&absent).await, &["s3://models/absent", "config.json"]);
    let http = ModelConfig { uri: "http://a/b".into(), ..config.clone() };
    refused(weights::pull(&http).await, &["http://a/b", "s3://", "file:///"]);

    // An object that is not what the manifest says, by size and by content.
    let tokenizer = "s3://models/whole/tokenizer.json".parse()?;
    for (content, fragment) in [("{\"model\":1234}", "SHA-256 of its chunks is"), ("{}", "size is 2")] {
        setup.store.put(&tokenizer, content.into()).await?;
        refused(weights::pull(&config).await, &["tokenizer.json", fragment]);
    }
    Ok(())
}

async fn without_manifest(setup: &Setup) -> Result<()> {
    setup.put_bare("bare").await?;
    let cache = TempDir::new()?;
    let config = setup.config("bare", cache.path());
    let folder = weights::pull(&config).await?;
    setup.assert_equal(&folder)?;
    let again = weights::pull(&config).await?;
    assert_eq!((again.pulled_bytes, &again.digest), (0, &folder.digest));

    let local = ModelConfig { uri: format!("file://{}", folder.path.display()), ..config };
    let verified = weights::pull(&local).await?;
    assert_eq!((&verified.digest, verified.pulled_bytes), (&folder.digest, 0));
    let copy = model()?;
    fs::write(copy.path().join("manifest.json"), fs::read(folder.path.join("manifest.json"))?)?;
    fs::write(copy.path().join("config.json"), "[]")?;
    let damaged = ModelConfig { uri: format!("file://{}", copy.path().display()), ..local };
    refused(weights::pull(&damaged).await, &["config.json", "SHA-256"]);
    Ok(())
}
