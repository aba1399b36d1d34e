//! Who the object store's client is and how it gets there: keys that are rotated, a role by a token, an authority of
//! one's own, a proxy.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{any, post};
use millrace_crds::config::{StoreConfig, WebIdentityConfig};
use millrace_queue::store::{S3Uri, Store};
use millrace_tests::certificates::Certificates;
use millrace_tests::ports::Port;
use millrace_tests::s3::{self, S3};
use millrace_tests::{place, tools};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Keys are believed for 20 s.
const FOLLOWED: Duration = Duration::from_secs(40);
/// How long a session of the mock lives: the SDK asks for another one some 10 s before its end.
const SESSION: Duration = Duration::from_secs(14);

async fn until_ok(what: &str, store: &Store, uri: &S3Uri) -> Result<()> {
    let start = Instant::now();
    while let Err(error) = store.put(uri, Bytes::from_static(b"x")).await {
        ensure!(start.elapsed() < FOLLOWED, "{what}: not within {FOLLOWED:?}: {error}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rotated_keys_are_followed_and_an_authority_is_believed() -> Result<()> {
    if !tools::have(&[s3::PROGRAM]) {
        return Ok(());
    }
    let (ours, others) = (place::folder("ca-")?, place::folder("ca-")?);
    let (certificates, foreign) = (Certificates::create(ours.path())?, Certificates::create(others.path())?);
    let port = Port::reserve()?;
    let mut server = S3::start_with(|_| {
        vec![
            format!("-s3.port.https={}", port.number()),
            format!("-s3.cert.file={}", certificates.file("server.crt").display()),
            format!("-s3.key.file={}", certificates.file("server.key").display()),
        ]
    })?;
    server.create_bucket("keys").await?;
    let uri: S3Uri = "s3://keys/a".parse()?;
    let secure = |ca_file: Option<PathBuf>| StoreConfig {
        endpoint: Some(format!("https://127.0.0.1:{}", port.number())),
        ca_file,
        ..server.store_config()
    };
    let store = Store::connect(&secure(Some(certificates.file("ca.crt")))).await?;
    store.put(&uri, Bytes::from_static(b"x")).await?;
    for ca_file in [None, Some(foreign.file("ca.crt"))] {
        let outside = Store::connect(&secure(ca_file)).await?;
        let error = outside.put(&uri, Bytes::from_static(b"x")).await.expect_err("not believed").to_string();
        ensure!(error.contains("certificate"), "{error}");
    }

    server.rekey("other", "other-secret")?;
    let error = store.put(&uri, Bytes::from_static(b"x")).await.expect_err("the keys are none").to_string();
    ensure!(error.contains("InvalidAccessKeyId"), "{error}");
    std::fs::write(server.credentials_dir().join("AWS_ACCESS_KEY_ID"), "other")?;
    std::fs::write(server.credentials_dir().join("AWS_SECRET_ACCESS_KEY"), "other-secret")?;
    until_ok("the new keys", &store, &uri).await
}

/// A token service that takes one token, and a store that takes the keys of the last session alone.
#[derive(Debug, Default)]
struct Sessions {
    token: String,
    count: u32,
    /// Host names that requests were for, as a proxy sees them.
    hosts: Vec<String>,
}

type Shared = Arc<Mutex<Sessions>>;

fn lock(shared: &Shared) -> std::sync::MutexGuard<'_, Sessions> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn assume(State(shared): State<Shared>, body: String) -> impl IntoResponse {
    let mut sessions = lock(&shared);
    let field = |name: &str| body.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let asked = (field("Action"), field("WebIdentityToken"), field("RoleArn"));
    if asked
        != (
            Some("AssumeRoleWithWebIdentity"),
            Some(&sessions.token),
            Some("arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fm"),
        )
    {
        let error = "<ErrorResponse><Error><Type>Sender</Type><Code>InvalidIdentityToken</Code>\
                     <Message>not this one</Message></Error></ErrorResponse>";
        return (StatusCode::BAD_REQUEST, error.to_owned());
    }
    sessions.count += 1;
    let end = OffsetDateTime::from(SystemTime::now() + SESSION).format(&Rfc3339).expect("a time");
    let answer = format!(
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
         <AccessKeyId>KEY{0}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>\
         <SessionToken>session{0}</SessionToken><Expiration>{end}</Expiration></Credentials>\
         </AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
        sessions.count
    );
    (StatusCode::OK, answer)
}

async fn put(State(shared): State<Shared>, headers: HeaderMap, request: Request) -> impl IntoResponse {
    let mut sessions = lock(&shared);
    sessions.hosts.push(request.uri().host().unwrap_or_default().to_owned());
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let key = format!("Credential=KEY{}/", sessions.count);
    let right = text("authorization").contains(&key)
        && text("x-amz-security-token") == format!("session{}", sessions.count);
    match right {
        true => (StatusCode::OK, String::new()),
        false => (StatusCode::FORBIDDEN, "<Error><Code>ExpiredToken</Code></Error>".to_owned()),
    }
}

async fn mock(token: &str) -> Result<(SocketAddr, Shared)> {
    let shared = Shared::default();
    lock(&shared).token = token.to_owned();
    let pages = Router::new().route("/", post(assume)).fallback(any(put)).with_state(shared.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, pages).await });
    Ok((address, shared))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_takes_on_a_role_and_its_sessions_are_renewed_through_a_proxy() -> Result<()> {
    let folder = place::folder("token-")?;
    let token_file = folder.path().join("token");
    std::fs::write(&token_file, "one\n")?;
    let (address, shared) = mock("one").await?;
    let config = StoreConfig {
        // Nobody knows this host; the proxy does.
        endpoint: Some("http://store.invalid:9000".into()),
        path_style: true,
        proxy: Some(format!("http://{address}")),
        web_identity: Some(WebIdentityConfig {
            token_file: token_file.clone(),
            role_arn: "arn:aws:iam::1:role/m".into(),
            endpoint: Some("http://sts.invalid:9001".into()),
        }),
        ..StoreConfig::default()
    };
    let store = Store::connect(&config).await?;
    let uri: S3Uri = "s3://bucket/a".parse()?;
    store.put(&uri, Bytes::from_static(b"x")).await?;
    assert_eq!(lock(&shared).count, 1);
    store.put(&uri, Bytes::from_static(b"x")).await?;
    assert_eq!(lock(&shared).count, 1, "one session serves many requests");
    assert!(lock(&shared).hosts.iter().all(|host| host == "store.invalid"), "{:?}", lock(&shared).hosts);

    // The identity provider gives out another token, and the service takes the first one no more.
    std::fs::write(&token_file, "two")?;
    lock(&shared).token = "two".to_owned();
    let start = Instant::now();
    while lock(&shared).count < 2 {
        store.put(&uri, Bytes::from_static(b"x")).await.context("no request fails between two sessions")?;
        ensure!(start.elapsed() < SESSION * 2, "the session is not renewed");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    std::fs::write(&token_file, "wrong")?;
    let other = Store::connect(&config).await?;
    let error = other.put(&uri, Bytes::from_static(b"x")).await.expect_err("a wrong token").to_string();
    ensure!(error.contains("webIdentity") && error.contains("InvalidIdentityToken"), "{error}");
    Ok(())
}
