//! The harness itself: a broker that keeps what it acknowledged over SIGKILL, an S3 server that keeps bytes.

use anyhow::Result;
use async_nats::jetstream;
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::s3::{self, S3};
use millrace_tests::{http, tools};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_keeps_acknowledged_messages_and_fsyncs() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut server = NatsServer::start()?;
    let client = server.connect().await?;
    let jetstream = jetstream::new(client);
    let config =
        jetstream::stream::Config { name: "S".into(), subjects: vec!["s.>".into()], ..Default::default() };
    jetstream.create_stream(config).await?;
    for n in 0..20 {
        jetstream.publish(format!("s.{n}"), "x".into()).await?.await?;
    }
    server.kill()?;
    server.restart()?;
    // A new client: a request of the old one may still go to the dead connection and be lost.
    let jetstream = jetstream::new(server.connect().await?);
    let mut stream = jetstream.get_stream("S").await?;
    assert_eq!(stream.info().await?.state.messages, 20);
    let (_, page) = http::get(server.monitor_address(), "/varz")?;
    let page: serde_json::Value = serde_json::from_str(&page)?;
    assert_eq!(page["jetstream"]["config"]["sync_always"], true);
    Ok(())
}

#[tokio::test]
async fn s3_returns_what_was_put() -> Result<()> {
    if !tools::have(&[s3::PROGRAM]) {
        return Ok(());
    }
    let server = S3::start()?;
    server.create_bucket("models").await?;
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("a.bin"), vec![7u8; 5 << 20])?;
    server.put_folder(folder.path(), "models", "m").await?;
    let object = server.client().get_object().bucket("models").key("m/a.bin").range("bytes=5242870-");
    let bytes = object.send().await?.body.collect().await?.into_bytes();
    assert_eq!(bytes.as_ref(), &[7u8; 10]);
    // Keys are demanded.
    let address = server.endpoint().trim_start_matches("http://").parse()?;
    assert_eq!(http::get(address, "/models/m/a.bin")?.0, 403);
    Ok(())
}
