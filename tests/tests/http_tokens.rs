//! Tokens of an identity provider: found by its description, with keys that change while the gateway runs.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::extract::State;
use axum::routing::get;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use millrace_tests::gateway::Gateway;
use millrace_tests::scripted::{Bench, PATIENCE};
use rcgen::KeyPair;
use serde_json::{Value, json};

/// What the provider publishes.
type Published = Arc<Mutex<Value>>;

/// A provider on a port of its own.
async fn provider(published: Published) -> Result<String> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let issuer = format!("http://{}", listener.local_addr()?);
    let description = json!({"issuer": issuer, "jwks_uri": format!("{issuer}/keys")}).to_string();
    let keys = |State(published): State<Published>| async move {
        published.lock().expect("no writer panics").to_string()
    };
    let pages = Router::new()
        .route("/.well-known/openid-configuration", get(move || async move { description }))
        .route("/keys", get(keys))
        .with_state(published);
    tokio::spawn(async move { axum::serve(listener, pages).await });
    Ok(issuer)
}

/// A key of the provider, and its public form.
fn key(id: &str) -> Result<(EncodingKey, Value)> {
    let key = EncodingKey::from_ec_der(&KeyPair::generate()?.serialize_der());
    let mut public = Jwk::from_encoding_key(&key, Algorithm::ES256)?;
    public.common.key_id = Some(id.to_owned());
    Ok((key, serde_json::to_value(public)?))
}

fn token(key: &EncodingKey, id: &str, issuer: &str, namespaces: &str) -> Result<String> {
    let claims = json!({"iss": issuer, "aud": "millrace", "sub": "u1", "exp": get_current_timestamp() + 60,
                        "spaces": namespaces});
    Ok(encode(&Header { kid: Some(id.to_owned()), ..Header::new(Algorithm::ES256) }, &claims, key)?)
}

fn status(gateway: &Gateway, token: &str) -> Result<u16> {
    let bearer = format!("Bearer {token}");
    let answer = gateway.ask("GET", "/v1/models/m", &[("authorization", bearer.as_str())], "")?;
    Ok(answer.status)
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_let_in_by_the_providers_present_keys() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let (first, first_public) = key("k1")?;
    let (second, second_public) = key("k2")?;
    let published: Published = Arc::new(Mutex::new(json!({"keys": [first_public]})));
    let issuer = provider(published.clone()).await?;
    let work = move || -> Result<()> {
        let options =
            ["--oidc-issuer", &issuer, "--oidc-audience", "millrace", "--oidc-namespaces-claim", "spaces"];
        let mut gateway = Gateway::launch(&bench.server.url(), &options)?;
        gateway.wait_ready()?;
        let good = token(&first, "k1", &issuer, "default other")?;
        ensure!(status(&gateway, &good)? == 200, "{}", gateway.log());
        ensure!(
            status(&gateway, &token(&first, "k1", &issuer, "other")?)? == 404,
            "another namespace's model"
        );
        ensure!(status(&gateway, &token(&second, "k1", &issuer, "default")?)? == 401, "another key");
        ensure!(
            status(&gateway, &token(&first, "k1", "http://127.0.0.1:1", "default")?)? == 401,
            "another issuer"
        );
        // The provider changes its keys: the new one is found at once, the old one is gone with it.
        let newer = token(&second, "k2", &issuer, "default")?;
        ensure!(status(&gateway, &newer)? == 401, "a key that is not published");
        *published.lock().expect("no reader panics") = json!({"keys": [second_public]});
        let began = Instant::now();
        while status(&gateway, &newer)? != 200 {
            ensure!(began.elapsed() < PATIENCE, "the new key is not found: {}", gateway.log());
            std::thread::sleep(Duration::from_millis(200));
        }
        ensure!(status(&gateway, &good)? == 401, "the old key is still believed");
        let signature = good.rsplit('.').next().context("a token has a signature")?;
        ensure!(!gateway.log().contains(signature), "a log holds a token");

        // Without the provider's keys nobody can be told from anybody.
        let closed = ["--oidc-issuer", "http://127.0.0.1:1", "--oidc-audience", "millrace"];
        let mut gateway = Gateway::launch(&bench.server.url(), &closed)?;
        gateway.wait_ready()?;
        ensure!(status(&gateway, &good)? == 503);
        Ok(())
    };
    tokio::task::spawn_blocking(work).await?
}
