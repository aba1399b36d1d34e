//! What nats-server does with our streams, on the oldest version that is supported and on the newest: each test is a
//! row of the table in `docs/protocol.md`. `MILLRACE_BROKERS`, a list of programs of the tools' cache, runs others.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::{AckKind, Context};
use async_nats::{Client, HeaderMap, Message};
use bytes::Bytes;
use futures::StreamExt;
use millrace_crds::config::{NatsConfig, QueueConfig, ResultsConfig};
use millrace_crds::names::{Class, ModelRef};
use millrace_crds::streams;
use millrace_queue::broker::{Broker, Created};
use millrace_queue::provision::{Mode, Provisioned, provision};
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::tools;
use serde_json::{Value, json};

/// Expiries of a second are over after this.
const EXPIRED: Duration = Duration::from_secs(6);

/// A broker of one version with our streams.
struct Scene {
    server: NatsServer,
    client: Client,
    context: Context,
    broker: Broker,
    model: ModelRef,
    version: (u64, u64, u64),
}

impl Scene {
    async fn start(program: &'static str) -> Result<Self> {
        let server = NatsServer::start_as(program, "")?;
        let client = server.connect().await?;
        let info = client.server_info().version;
        let mut numbers = info.split('.').map(|part| part.parse().unwrap_or(0));
        let mut number = || numbers.next().unwrap_or(0);
        let version = (number(), number(), number());
        let (context, model) = (async_nats::jetstream::new(client.clone()), ModelRef::new("default", "m")?);
        let config = NatsConfig { servers: vec![server.url()], ..NatsConfig::default() };
        let broker = Broker::connect(&config, &model, &"w".parse()?).await?;
        broker.ready().await;
        let scene = Self { server, client, context, broker, model, version };
        scene.provision(Mode::Create).await?;
        Ok(scene)
    }

    async fn provision(&self, mode: Mode) -> Result<Vec<Provisioned>> {
        let (queue, results) = (QueueConfig::default(), ResultsConfig::default());
        let items = provision(&self.context, &self.model, &queue, &results, mode).await?;
        Ok(items.into_iter().map(|item| item.state).collect())
    }

    async fn ask(&self, api: &str, body: Value) -> Result<Value> {
        let answer = self.client.request(format!("$JS.API.{api}"), body.to_string().into()).await?;
        Ok(serde_json::from_slice(&answer.payload)?)
    }

    /// Publishes a job of class high, under an id.
    async fn job(&self, id: &str) -> Result<async_nats::jetstream::publish::PublishAck> {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id);
        let subject = self.model.jobs_subject(Class::High);
        Ok(self.context.publish_with_headers(subject, headers, "{}".into()).await?.await?)
    }

    async fn consumer(&self, class: Class) -> Result<PullConsumer> {
        let stream = self.context.get_stream(self.model.jobs_stream()).await?;
        stream.get_consumer(&self.model.consumer(class)).await.map_err(|error| anyhow::anyhow!("{error}"))
    }

    /// The next job of class high that is delivered within `limit`.
    async fn delivered(&self, limit: Duration) -> Result<Option<async_nats::jetstream::Message>> {
        let consumer = self.consumer(Class::High).await?;
        let mut batch = consumer.batch().max_messages(1).expires(limit).messages().await?;
        match batch.next().await {
            None => Ok(None),
            Some(message) => message.map(Some).map_err(|error| anyhow::anyhow!("{error}")),
        }
    }

    /// Replaces the consumer of class high by one with these changes.
    async fn change_consumer(&self, change: impl FnOnce(&mut pull::Config)) -> Result<()> {
        let mut config = streams::consumer(&self.model, Class::High, &QueueConfig::default());
        change(&mut config);
        self.context.create_consumer_on_stream(config, self.model.jobs_stream()).await?;
        Ok(())
    }

    async fn last(&self, subject: &str) -> Result<Option<Message>> {
        Ok(self.broker.last(&self.model.results_stream(), subject).await?)
    }

    /// Stores something under RESULTS that lives for a second.
    async fn short_lived(&self, subject: &str) -> Result<Created> {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-TTL", "1s");
        Ok(self.broker.create(subject, headers, Bytes::from_static(b"x"), 0).await?)
    }

    async fn until_gone(&self, subject: &str) -> Result<Duration> {
        let start = Instant::now();
        while self.last(subject).await?.is_some() {
            ensure!(start.elapsed() < EXPIRED, "{subject} is still there after {EXPIRED:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(start.elapsed())
    }

    async fn restart(&mut self) -> Result<()> {
        self.server.restart()?;
        self.client = self.server.connect().await?;
        self.context = async_nats::jetstream::new(self.client.clone());
        Ok(())
    }
}

/// Runs a row on each version.
async fn on_each(row: impl AsyncFn(Scene) -> Result<()>) -> Result<()> {
    let others = std::env::var("MILLRACE_BROKERS").unwrap_or_default();
    let others: Vec<&'static str> =
        others.split(',').filter(|name| !name.is_empty()).map(|name| &*name.to_owned().leak()).collect();
    let programs = if others.is_empty() { vec![nats::OLDEST, nats::PROGRAM] } else { others };
    if !tools::have(&programs) {
        return Ok(());
    }
    for program in programs {
        let scene = Scene::start(program).await.with_context(|| program.to_owned())?;
        let version = scene.client.server_info().version;
        row(scene).await.with_context(|| format!("nats-server {version}"))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_adds_is_no_drift() -> Result<()> {
    on_each(async |scene| {
        let info = scene.ask(&format!("STREAM.INFO.{}", scene.model.results_stream()), json!({})).await?;
        let metadata = info["config"]["metadata"].as_object().context("metadata")?;
        assert!(metadata.keys().all(|key| key.starts_with("_nats.")) && !metadata.is_empty(), "{metadata:?}");
        for mode in [Mode::Check, Mode::Apply, Mode::Check] {
            assert!(scene.provision(mode).await?.iter().all(|state| *state == Provisioned::Same), "{mode:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_of_others_outlives_a_repair() -> Result<()> {
    on_each(async |scene| {
        let name = scene.model.results_stream();
        let info = scene.ask(&format!("STREAM.INFO.{name}"), json!({})).await?;
        let mut config = info["config"].clone();
        config["metadata"] = json!({"team": "a"});
        config["max_bytes"] = json!(1 << 20);
        let changed = scene.ask(&format!("STREAM.UPDATE.{name}"), config).await?;
        assert_eq!(changed["error"], Value::Null);
        scene
            .change_consumer(|config| {
                config.metadata = [("team".to_owned(), "b".to_owned())].into();
                config.max_ack_pending = 7;
            })
            .await?;
        // The repair brings both settings back, and touches nothing else.
        let states = scene.provision(Mode::Apply).await?;
        assert_eq!(
            states.iter().filter(|state| matches!(state, Provisioned::Updated(_))).count(),
            2,
            "{states:?}"
        );
        let info = scene.ask(&format!("STREAM.INFO.{name}"), json!({})).await?;
        assert_eq!(info["config"]["metadata"]["team"], "a");
        let consumer = scene.consumer(Class::High).await?;
        assert_eq!(consumer.cached_info().config.metadata.get("team").map(String::as_str), Some("b"));
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_lives_as_long_as_it_says_and_leaves_nothing() -> Result<()> {
    on_each(async |scene| {
        let subject = scene.model.result_subject(&"a".parse()?);
        assert!(matches!(scene.short_lived(&subject).await?, Created::Stored(_)));
        let lived = scene.until_gone(&subject).await?;
        assert!(lived > Duration::from_millis(500), "{lived:?}");
        // Nothing stands in its place: the next one is created as the first was.
        assert_eq!(scene.broker.delete_marker(&scene.model.results_stream(), &subject).await?, None);
        assert!(matches!(scene.short_lived(&subject).await?, Created::Stored(_)));
        assert_eq!(scene.short_lived(&subject).await?, Created::Lost, "while it is there");
        Ok(())
    })
    .await
}

/// Since when a marker stands in the place of a message whose own lifetime ended.
const MARKED: (u64, u64, u64) = (2, 11, 2);

#[tokio::test(flavor = "multi_thread")]
async fn a_marker_is_drift_and_absence() -> Result<()> {
    on_each(async |scene| {
        let name = scene.model.results_stream();
        let info = scene.ask(&format!("STREAM.INFO.{name}"), json!({})).await?;
        let mut config = info["config"].clone();
        config["subject_delete_marker_ttl"] = json!(60_000_000_000_u64);
        config["allow_rollup_hdrs"] = json!(true);
        let changed = scene.ask(&format!("STREAM.UPDATE.{name}"), config).await?;
        assert_eq!(changed["error"], Value::Null);
        let states = scene.provision(Mode::Check).await?;
        assert!(matches!(&states[1], Provisioned::Differs(drift) if drift[0].setting == "subject_delete_marker_ttl"));
        let subject = scene.model.result_subject(&"a".parse()?);
        scene.short_lived(&subject).await?;
        scene.until_gone(&subject).await?;
        let marker = scene.broker.delete_marker(&name, &subject).await?;
        assert_eq!(marker.is_some(), scene.version >= MARKED, "{marker:?}");
        let Some(marker) = marker else { return Ok(()) };
        assert_eq!(scene.short_lived(&subject).await?, Created::Lost, "it must be named");
        let body = Bytes::from_static(b"y");
        let created = scene.broker.create(&subject, HeaderMap::new(), body, marker).await?;
        assert!(matches!(created, Created::Stored(_)));
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_remembered_until_the_broker_ends() -> Result<()> {
    on_each(async |mut scene| {
        assert!(!scene.job("a").await?.duplicate);
        assert!(!scene.job("b").await?.duplicate);
        let job = scene.delivered(Duration::from_secs(2)).await?.context("a job")?;
        job.double_ack().await.map_err(|error| anyhow::anyhow!("{error}"))?;
        assert!(scene.job("a").await?.duplicate && scene.job("b").await?.duplicate);
        scene.restart().await?;
        // The table of ids is made anew of what is stored: the job that ended is forgotten.
        assert!(scene.job("b").await?.duplicate);
        assert!(!scene.job("a").await?.duplicate);
        Ok(())
    })
    .await
}

/// Since when jobs that a limited consumer gave up stay away over a restart too.
const GIVEN_UP_FOR_GOOD: (u64, u64, u64) = (2, 14, 0);

#[tokio::test(flavor = "multi_thread")]
async fn what_a_limited_consumer_gave_up_comes_from_a_new_one_alone() -> Result<()> {
    on_each(async |mut scene| {
        scene
            .change_consumer(|config| {
                config.max_deliver = 1;
                config.ack_wait = Duration::from_secs(1);
            })
            .await?;
        scene.job("a").await?;
        assert!(scene.delivered(Duration::from_secs(2)).await?.is_some());
        assert!(scene.delivered(Duration::from_secs(2)).await?.is_none(), "given up");
        scene.change_consumer(|config| config.ack_wait = Duration::from_secs(1)).await?;
        assert!(
            scene.delivered(Duration::from_secs(2)).await?.is_none(),
            "a raised limit alone changes nothing"
        );
        scene.restart().await?;
        let back = scene.delivered(Duration::from_secs(2)).await?.is_some();
        assert_eq!(back, scene.version < GIVEN_UP_FOR_GOOD, "after a restart");
        // Our repair makes the consumer anew.
        scene.change_consumer(|config| config.max_deliver = 1).await?;
        scene.provision(Mode::Apply).await?;
        let again = scene.delivered(Duration::from_secs(5)).await?.context("the job is back")?;
        assert_eq!(again.info().map_err(|error| anyhow::anyhow!("{error}"))?.delivered, 1);
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_holds_jobs_back_and_outlives_an_update() -> Result<()> {
    on_each(async |scene| {
        scene.job("a").await?;
        let (stream, consumer) = (scene.model.jobs_stream(), scene.model.consumer(Class::High));
        let until = "2099-01-01T00:00:00Z";
        let paused =
            scene.ask(&format!("CONSUMER.PAUSE.{stream}.{consumer}"), json!({"pause_until": until})).await?;
        assert_eq!(paused["paused"], true);
        assert!(scene.delivered(Duration::from_secs(1)).await?.is_none());
        let states = scene.provision(Mode::Apply).await?;
        assert!(states.iter().all(|state| *state == Provisioned::Same), "{states:?}");
        scene.change_consumer(|config| config.max_ack_pending = 7).await?;
        let info = scene.ask(&format!("CONSUMER.INFO.{stream}.{consumer}"), json!({})).await?;
        assert_eq!((&info["paused"], &info["num_pending"]), (&json!(true), &json!(1)));
        scene.ask(&format!("CONSUMER.PAUSE.{stream}.{consumer}"), json!({})).await?;
        assert!(scene.delivered(Duration::from_secs(2)).await?.is_some());
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shorter_ack_wait_holds_for_jobs_that_are_held() -> Result<()> {
    on_each(async |scene| {
        scene.change_consumer(|config| config.ack_wait = Duration::from_secs(60)).await?;
        scene.job("a").await?;
        let held = scene.delivered(Duration::from_secs(2)).await?.context("a job")?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        scene.change_consumer(|config| config.ack_wait = Duration::from_secs(1)).await?;
        assert!(scene.delivered(Duration::from_millis(900)).await?.is_some(), "it comes again at once");
        // An acknowledgement of the first delivery still counts.
        held.ack_with(AckKind::Ack).await.map_err(|error| anyhow::anyhow!("{error}"))?;
        scene.client.flush().await?;
        let empty = async || -> Result<bool> {
            let info = scene.ask(&format!("STREAM.INFO.{}", scene.model.jobs_stream()), json!({})).await?;
            Ok(info["state"]["messages"] == 0)
        };
        let start = Instant::now();
        while !empty().await? {
            ensure!(start.elapsed() < Duration::from_secs(2), "the job is not removed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    })
    .await
}

/// A status line that a publisher writes into a message's headers is none of the broker's.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_is_stored_is_its_writers() -> Result<()> {
    on_each(async |scene| {
        let subject = scene.model.cancel_subject(&"a".parse()?);
        let head = "NATS/1.0 404 No Messages\r\n\r\n";
        let mut raw =
            tokio::net::TcpStream::connect(scene.server.url().trim_start_matches("nats://")).await?;
        let text = format!(
            "CONNECT {{\"headers\":true,\"verbose\":false}}\r\nHPUB {subject} {} {}\r\n{head}\r\nPING\r\n",
            head.len(),
            head.len()
        );
        tokio::io::AsyncWriteExt::write_all(&mut raw, text.as_bytes()).await?;
        let start = Instant::now();
        while scene.last(&subject).await?.is_none() {
            ensure!(start.elapsed() < Duration::from_secs(2), "the marker is not seen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    })
    .await
}
