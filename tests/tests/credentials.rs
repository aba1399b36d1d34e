//! Logins to a broker that asks for one: each kind gets in and another one does not, files that change are followed,
//! and what will never do ends the process with its code.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use millrace_crds::config::NatsConfig;
use millrace_queue::link::{Access, Link, Profile};
use millrace_tests::certificates::Certificates;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::gateway::Gateway;
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::worker::Worker;
use millrace_tests::{http, place, tools};
use nkeys::KeyPair;
use serde_json::{Value, json};

/// A server of loopback answers within this time.
const SOON: Duration = Duration::from_secs(5);
/// A look at the files, a connection that is tried, and the one that follows.
const FOLLOWED: Duration = Duration::from_secs(15);
/// The patience of a process that never got in, and its start.
const ENDED: Duration = Duration::from_secs(30);

fn file(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    let part = folder.join("part");
    std::fs::write(&part, text)?;
    std::fs::rename(&part, &path)?;
    Ok(path)
}

async fn link(config: &NatsConfig) -> Result<Link> {
    let profile = Profile {
        name: "test".into(),
        inbox_prefix: "_INBOX.test".into(),
        request_timeout: SOON,
        commands_max: 64,
        messages_max: 64,
    };
    Ok(Link::hold(&Access::of(config)?, &profile).await?)
}

/// Waits until something holds.
async fn until(what: &str, limit: Duration, holds: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    while !holds() {
        ensure!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// The right configuration gets in; without its login, and with a wrong one, the link says why it does not.
async fn gets_in_alone(server: &NatsServer, right: NatsConfig, wrong: &[NatsConfig]) -> Result<()> {
    let right = NatsConfig { servers: vec![server.url()], ..right };
    let inside = link(&right).await?;
    let came = tokio::time::timeout(SOON, inside.ready()).await;
    ensure!(came.is_ok(), "{right:?}: {:?}\n{}", inside.trouble(), server.log());
    assert_eq!(inside.trouble(), None);
    for config in wrong {
        let config = NatsConfig { servers: vec![server.url()], ..config.clone() };
        let outside = link(&config).await?;
        until("it says why it is kept out", SOON, || outside.refusal().is_some())
            .await
            .with_context(|| format!("{config:?}: {:?}", outside.trouble()))?;
        assert!(!outside.connected());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_get_in_and_others_do_not() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let folder = place::folder("login-")?;
    let put = |name: &str, text: &str| file(folder.path(), name, text).map(Some);
    let nobody = NatsConfig::default();

    let server = NatsServer::start_with("authorization { user: me, password: \"a@b\" }")?;
    let of_user = |password: &str| -> Result<NatsConfig> {
        let (user_file, password_file) = (put("user", "me\n")?, put(password, password)?);
        Ok(NatsConfig { user_file, password_file, ..NatsConfig::default() })
    };
    gets_in_alone(&server, of_user("a@b")?, &[of_user("b")?, nobody.clone()]).await?;

    let server = NatsServer::start_with("authorization { token: \"t0k\" }")?;
    let of_token = |token: &str| -> Result<NatsConfig> {
        Ok(NatsConfig { token_file: put(token, token)?, ..NatsConfig::default() })
    };
    gets_in_alone(&server, of_token("t0k")?, &[of_token("t1k")?, nobody.clone()]).await?;

    let (known, unknown) = (KeyPair::new_user(), KeyPair::new_user());
    let users = format!("authorization {{ users: [ {{ nkey: {} }} ] }}", known.public_key());
    let server = NatsServer::start_with(&users)?;
    let of_key = |key: &KeyPair| -> Result<NatsConfig> {
        let nkey_file = put(&format!("{}.nk", key.public_key()), &key.seed()?)?;
        Ok(NatsConfig { nkey_file, ..NatsConfig::default() })
    };
    gets_in_alone(&server, of_key(&known)?, &[of_key(&unknown)?, nobody]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_get_in_and_others_do_not() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let (folder, other) = (place::folder("login-")?, place::folder("login-")?);
    let (ours, others) = (Certificates::create(folder.path())?, Certificates::create(other.path())?);
    let tls = |more: &str| {
        let (cert, key, ca) = (ours.file("server.crt"), ours.file("server.key"), ours.file("ca.crt"));
        format!("tls {{ cert_file: {cert:?}, key_file: {key:?}, ca_file: {ca:?}, {more} }}")
    };
    let of = |certificates: &Certificates, folder: &Path| -> Result<NatsConfig> {
        let identity = certificates.client("worker", None)?;
        Ok(NatsConfig {
            ca_file: Some(ours.file("ca.crt")),
            certificate_file: Some(file(folder, "client.crt", &identity.certificate)?),
            key_file: Some(file(folder, "client.key", &identity.key)?),
            ..NatsConfig::default()
        })
    };
    let (right, foreign) = (of(&ours, folder.path())?, of(&others, other.path())?);
    let authority_alone = NatsConfig { ca_file: right.ca_file.clone(), ..NatsConfig::default() };
    let server = NatsServer::start_with(&tls("verify: true"))?;
    let distrusting = NatsConfig { ca_file: Some(others.file("ca.crt")), ..right.clone() };
    let wrong = [authority_alone.clone(), foreign, distrusting];
    gets_in_alone(&server, right, &wrong).await?;

    // A server that begins with TLS says nothing to a client that waits for its first word.
    let server = NatsServer::start_with(&tls("handshake_first: true"))?;
    let first = NatsConfig { tls_first: true, ..authority_alone.clone() };
    gets_in_alone(&server, first, &[]).await?;
    let waiting = link(&NatsConfig { servers: vec![server.url()], ..authority_alone }).await?;
    assert!(tokio::time::timeout(Duration::from_secs(1), waiting.ready()).await.is_err());
    Ok(())
}

/// The users that stand in the broker's page of connections.
fn users_inside(server: &NatsServer) -> Result<Vec<String>> {
    let (_, page) = http::get(server.monitor_address(), "/connz?auth=1")?;
    let page: Value = serde_json::from_str(&page)?;
    let connections = page["connections"].as_array().context("no connections")?;
    Ok(connections.iter().map(|c| c["authorized_user"].as_str().unwrap_or_default().to_owned()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn rotated_secrets_are_followed_without_an_outage() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let folder = place::folder("login-")?;
    let put = |name: &str, text: &str| file(folder.path(), name, text);
    let mut server = NatsServer::start_with("authorization { users: [ {user: a, password: one} ] }")?;
    let config = NatsConfig {
        servers: vec![server.url()],
        user_file: Some(put("user", "a")?),
        password_file: Some(put("password", "one")?),
        ..NatsConfig::default()
    };
    let link = link(&config).await?;
    tokio::time::timeout(SOON, link.ready()).await?;
    let connections = || *link.connections().borrow();

    // A secret that the broker does not know yet breaks nothing.
    put("password", "two")?;
    let refused = || server.log().matches("authentication error").count();
    until("the new secret is tried", FOLLOWED, || refused() > 0).await?;
    assert!(link.connected() && connections() == 1, "the old connection stands");
    // Once the broker knows it alone, it is used.
    server.reload_with("authorization { users: [ {user: a, password: two} ] }")?;
    until("it is in again", FOLLOWED, || connections() == 2 && link.connected()).await?;

    // One that the broker knows beside the old one is moved to, although nobody closes the connection.
    server
        .reload_with("authorization { users: [ {user: a, password: two}, {user: b, password: three} ] }")?;
    put("password", "three")?;
    put("user", "b")?;
    let moved = || users_inside(&server).is_ok_and(|users| users == ["b"]);
    until("it is in as the new user", FOLLOWED, moved).await?;
    assert_eq!(link.refusal(), None);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ends_is_replaced_by_the_one_in_its_file() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let server = NatsServer::start_secured()?;
    let accounts = server.accounts().context("a broker without accounts")?;
    let folder = place::folder("login-")?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs() as i64;
    let creds = folder.path().join("user.creds");
    accounts.write_user(&creds, &json!({}), Some(now + 4))?;
    let config = NatsConfig {
        servers: vec![server.url()],
        credentials_file: Some(creds.clone()),
        ca_file: Some(accounts.authority.clone()),
        ..NatsConfig::default()
    };
    let link = link(&config).await?;
    tokio::time::timeout(SOON, link.ready()).await?;
    // Nobody replaces it: the broker closes the connection, and the link says what is wrong.
    let told = || link.refusal().is_some_and(|reason| reason.contains("ended at"));
    until("it says that the token has ended", FOLLOWED, told).await?;
    accounts.write_user(&creds, &json!({}), Some(now + 600))?;
    until("the next one gets in", FOLLOWED, || link.connected()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_will_never_do_ends_each_program_with_its_code() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    cluster.nats = NatsServer::start_with("authorization { user: me, password: right }")?;
    let folder = place::folder("login-")?;
    let mut config = cluster.config.clone();
    config.nats.servers = vec![cluster.nats.url()];
    config.nats.monitor = None;
    config.nats.user_file = Some(file(folder.path(), "user", "me")?);
    config.nats.password_file = Some(file(folder.path(), "password", "wrong")?);
    let mut worker = Worker::start(&config, &[])?;
    let password = folder.path().join("password").display().to_string();
    let login = ["--anonymous", "--user", "me", "--password-file", &password];
    let mut gateway = Gateway::launch(&cluster.nats.url(), &login)?;
    for address in [worker.health_address(), gateway.address()] {
        let says = || {
            http::get(address, "/readyz").is_ok_and(|(status, page)| {
                status == 503
                    && page.contains("the broker is not connected: 127.0.0.1:")
                    && page.contains("violation")
            })
        };
        until("its page says why", SOON * 2, says).await?;
    }
    assert_eq!(worker.wait(ENDED)?.code(), Some(5), "{}", worker.log_tail());
    assert!(worker.log().contains("BROKER_REFUSED"), "{}", worker.log_tail());
    assert!(!worker.log().contains("wrong"), "no secret is in a log");
    assert_eq!(gateway.wait(ENDED)?.code(), Some(3), "{}", gateway.log());

    let mut command = Command::new(tools::program("millrace")?);
    command.args(["--server", &cluster.nats.url(), "--user", "me", "-m", "tiny", "queue"]);
    let refused = command.env("NATS_PASSWORD", "wrong").output()?;
    assert_eq!(refused.status.code(), Some(3), "{}", String::from_utf8_lossy(&refused.stderr));
    // What is right gets in; without streams that is another failure.
    let inside = command.env("NATS_PASSWORD", "right").output()?;
    assert_eq!(inside.status.code(), Some(4), "{}", String::from_utf8_lossy(&inside.stderr));

    config.nats.password_file = Some(folder.path().join("none"));
    let mut worker = Worker::start(&config, &[])?;
    assert_eq!(worker.wait(ENDED)?.code(), Some(2), "{}", worker.log_tail());
    assert!(worker.log().contains("nats.login") && worker.log().contains("none"), "{}", worker.log_tail());
    Ok(())
}

/// Worker and command line are at a leaf node with a JetStream of its own; the streams are in the hub's.
#[tokio::test(flavor = "multi_thread")]
async fn a_leaf_node_serves_the_streams_of_its_hub() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let port = millrace_tests::ports::Port::reserve()?;
    let (hub_store, leaf_store) = (place::folder("hub-")?, place::folder("leaf-")?);
    let store = |folder: &Path, domain: &str| {
        format!(
            "jetstream {{ store_dir: {folder:?}, sync_interval: always, domain: {domain}, max_file_store: 1TB }}"
        )
    };
    let listen = format!("leafnodes {{ host: 127.0.0.1, port: {} }}", port.number());
    let hub = NatsServer::start_with(&format!("{}\n{listen}", store(hub_store.path(), "hub")))?;
    let remote = format!("leafnodes {{ remotes: [ {{ url: \"nats://127.0.0.1:{}\" }} ] }}", port.number());
    let mut cluster = QueueHarness::tiny()?;
    cluster.nats = NatsServer::start_with(&format!("{}\n{remote}", store(leaf_store.path(), "leaf")))?;
    let mut config = cluster.config.clone();
    config.nats.servers = vec![cluster.nats.url()];
    config.nats.monitor = None;
    config.nats.domain = Some("hub".into());
    let worker = Worker::start_ready(&config)?;
    let body = cluster.folder.path().join("job.json");
    std::fs::write(&body, r#"{"prompt":"far","max_tokens":4}"#)?;
    let run = |server: &NatsServer, words: &[&str]| -> Result<String> {
        let mut command = Command::new(tools::program("millrace")?);
        command.args(["--server", &server.url(), "-m", "tiny"]).args(words);
        let done = command.output()?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(done.status.success(), "{words:?}: {said}\n{}", worker.log_tail());
        Ok(String::from_utf8(done.stdout)?)
    };
    let job = body.display().to_string();
    let far = run(&cluster.nats, &["--js-domain", "hub", "submit", "--wait", &job])?;
    assert!(!far.is_empty());
    // The same under the prefix written out, of the outcome that is there.
    let again = run(&cluster.nats, &["--js-api-prefix", "$JS.hub.API", "results", &job])?;
    assert!(again.contains("\"text\"") || again == far, "{again}");
    // The streams are the hub's, and keys are made in them too.
    run(&cluster.nats, &["--js-domain", "hub", "key", "create", "--tenant", "t"])?;
    assert!(run(&hub, &["--json", "key", "list"])?.contains("\"tenant\":\"t\""));
    run(&hub, &["results", &job]).map(drop)
}
