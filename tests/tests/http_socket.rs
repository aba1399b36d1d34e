//! `/v1/stream`: many generations on one WebSocket, over real brokers and gateways.
//!
//! What holds here: what comes is the stored text, also after a cut and at another gateway; a generation that its
//! client does not take stalls no other; who leaves cancels; a drain finishes what runs.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::Gateway;
use millrace_tests::process::Signal;
use millrace_tests::scripted::{Bench, PATIENCE, until};
use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Message, WebSocket};

/// A client's end of a socket.
struct Client(WebSocket<TcpStream>);

impl Client {
    fn open(gateway: &Gateway, headers: &[(&'static str, &str)]) -> Result<Self> {
        let stream = TcpStream::connect(gateway.address())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut request = format!("ws://{}/v1/stream", gateway.address()).into_client_request()?;
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse()?);
        }
        let (socket, _) = tungstenite::client(request, stream).map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(Self(socket))
    }

    fn say(&mut self, message: &Value) -> Result<()> {
        Ok(self.0.send(Message::text(message.to_string()))?)
    }

    fn generate(&mut self, id: &str, script: &str, more: Value) -> Result<()> {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": script}]});
        let mut message = json!({"type": "generate", "id": id, "body": body});
        for (name, value) in more.as_object().into_iter().flatten() {
            message[name] = value.clone();
        }
        self.say(&message)
    }

    /// The next message; `None` when the gateway closed.
    fn hear(&mut self) -> Result<Option<Value>> {
        loop {
            match self.0.read()? {
                Message::Text(text) => return Ok(Some(serde_json::from_str(text.as_str())?)),
                Message::Close(_) => return Ok(None),
                _ => {}
            }
        }
    }

    /// Hears until this generation is over; gives all that was said meanwhile.
    fn until_done(&mut self, id: &str) -> Result<Vec<Value>> {
        let mut said = Vec::new();
        loop {
            let message = self.hear()?.context("the gateway closed")?;
            let over = message["id"] == id && matches!(message["type"].as_str(), Some("done" | "error"));
            said.push(message);
            if over {
                return Ok(said);
            }
        }
    }

    /// Reads nothing but pings, and answers them, for a while.
    fn idle(&mut self, span: Duration) -> Result<()> {
        let began = Instant::now();
        self.0.get_ref().set_read_timeout(Some(Duration::from_millis(20)))?;
        while began.elapsed() < span {
            match self.0.read() {
                Ok(Message::Ping(_)) => self.0.flush()?,
                Ok(other) => bail!("{other:?} is no ping"),
                Err(tungstenite::Error::Io(error))
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.0.get_ref().set_read_timeout(Some(PATIENCE))?)
    }

    fn error(&mut self) -> Result<(Value, String)> {
        let message = self.hear()?.context("the gateway closed")?;
        ensure!(message["type"] == "error", "{message}");
        Ok((message["id"].clone(), message["error"]["code"].as_str().unwrap_or_default().to_owned()))
    }
}

fn spelled(said: &[Value], id: &str) -> String {
    let own = said.iter().filter(|message| message["id"] == id && message["type"] == "delta");
    own.filter_map(|message| message["text"].as_str()).collect()
}

fn stored(done: &Value) -> &str {
    done["outcome"]["response"]["body"]["choices"][0]["message"]["content"].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_generations_share_a_connection() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Gateway::start(&bench.server, &["--keep-alive", "200ms"])?;
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let mut client = Client::open(&gateway, &[])?;
        let mut wanted = HashMap::new();
        for number in 0..24 {
            let word = ["say", "lose", "mute", "slow"][number % 4];
            let text: String = (0..20).map(|i| format!("w{number}-{i} ")).collect();
            client.generate(&format!("g{number}"), &format!("{word} {}", text.trim()), json!({}))?;
            wanted.insert(format!("g{number}"), text.trim().to_owned());
        }
        let (mut left, mut said) = (wanted.len(), Vec::new());
        while left > 0 {
            let message = client.hear()?.context("the gateway closed")?;
            left -= usize::from(message["type"] == "done");
            said.push(message);
        }
        for (id, text) in &wanted {
            ensure!(spelled(&said, id) == *text, "{id}: {}", spelled(&said, id));
            let own: Vec<_> = said.iter().filter(|message| message["id"] == id.as_str()).collect();
            ensure!(own[0]["type"] == "accepted" && own[0]["job"].is_string(), "{own:?}");
            ensure!(own.last().is_some_and(|done| stored(done) == text), "{own:?}");
            let numbers: Vec<_> = own.iter().filter_map(|message| message["number"].as_u64()).collect();
            ensure!(numbers.last() == Some(&(text.chars().count() as u64)), "{numbers:?}");
        }
        refusals(&mut client)?;
        // Who answers pings is there still; who does not is taken for gone.
        client.idle(Duration::from_secs(2))?;
        client.generate("late", "say still here", json!({}))?;
        ensure!(spelled(&client.until_done("late")?, "late") == "still here");
        std::thread::sleep(Duration::from_secs(2));
        let gone = client.generate("gone", "say x", json!({})).and_then(|()| client.until_done("gone"));
        ensure!(gone.is_err(), "{gone:?}");
        Ok(())
    });
    talked.await??;
    bench.until_empty().await
}

fn refusals(client: &mut Client) -> Result<()> {
    client.0.send(Message::text("{"))?;
    ensure!(client.error()? == (Value::Null, "invalid_json".into()));
    client.say(&json!({"type": "generate", "id": "x", "body": {"model": "m"}}))?;
    ensure!(client.error()? == (json!("x"), "missing_required_parameter".into()));
    client.say(&json!({"type": "generate", "id": "x", "body": {"model": "none", "prompt": "say x"}}))?;
    ensure!(client.error()? == (json!("x"), "model_not_found".into()));
    client.say(&json!({"type": "resume", "id": "x", "job": "default.m.1.other"}))?;
    ensure!(client.error()? == (json!("x"), "job_not_found".into()));
    client.say(&json!({"type": "cancel", "id": "none"}))?;
    ensure!(client.error()? == (json!("none"), "invalid_parameter".into()));
    // What the worker refuses is the generation's outcome.
    client.generate("bad", "nonsense", json!({}))?;
    let done = client.until_done("bad")?.pop().context("no message")?;
    ensure!(done["outcome"]["error"]["code"] == "INVALID_REQUEST", "{done}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_that_is_not_taken_stalls_no_other() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Gateway::start(&bench.server, &[])?;
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let mut client = Client::open(&gateway, &[])?;
        // Far more than waits for a client: the rest comes from the outcome.
        let long = "word ".repeat(30_000);
        let long = long.trim();
        client.generate("slow", &format!("say {long}"), json!({"window": 2}))?;
        let mut seen = Vec::new();
        while seen.len() < 3 {
            seen.push(client.hear()?.context("the gateway closed")?);
        }
        for number in 0..5 {
            let id = format!("quick{number}");
            client.generate(&id, "say hello there", json!({}))?;
            let said = client.until_done(&id)?;
            ensure!(spelled(&said, &id) == "hello there");
            ensure!(
                said.iter().all(|message| message["id"] == id.as_str()),
                "the other one has no window: {said:?}"
            );
        }
        client.say(&json!({"type": "more", "id": "slow", "count": 1000}))?;
        seen.extend(client.until_done("slow")?);
        ensure!(spelled(&seen, "slow") == long, "{} characters", spelled(&seen, "slow").len());
        Ok(())
    });
    talked.await?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_goes_on_at_another_gateway() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = ChatWorker::start(&bench, "w").await?;
    let (here, there) = (Gateway::start(&bench.server, &[])?, Gateway::start(&bench.server, &[])?);
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let words: String = (0..25).map(|i| format!(" wört{i}")).collect();
        let wanted = format!("begin{words}");
        let mut client = Client::open(&here, &[])?;
        client.generate("a", &format!("slow {wanted}"), json!({"background": true}))?;
        let mut said = Vec::new();
        while said.iter().filter(|message: &&Value| message["type"] == "delta").count() < 5 {
            said.push(client.hear()?.context("the gateway closed")?);
        }
        drop(client);
        let (job, place) = (said[0]["job"].clone(), spelled(&said, "a").chars().count());
        let mut client = Client::open(&there, &[])?;
        client.say(&json!({"type": "resume", "id": "a", "job": job, "after": [place]}))?;
        said.extend(client.until_done("a")?);
        ensure!(spelled(&said, "a") == wanted, "{}", spelled(&said, "a"));
        // Once more, of what has ended.
        client.say(&json!({"type": "resume", "id": "b", "job": job}))?;
        ensure!(spelled(&client.until_done("b")?, "b") == wanted);
        Ok(())
    });
    talked.await??;
    assert_eq!(worker.chats.dropped.load(Ordering::SeqCst), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_or_cancels_ends_a_generation() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Arc::new(Gateway::start(&bench.server, &[])?);
    let asking = gateway.clone();
    let client = tokio::task::spawn_blocking(move || -> Result<Client> {
        let mut client = Client::open(&asking, &[])?;
        client.generate("a", "hang", json!({}))?;
        client.generate("b", "hang", json!({}))?;
        client.hear()?;
        client.hear()?;
        Ok(client)
    });
    let client = client.await??;
    until("both run", || worker.chats.begun.load(Ordering::SeqCst) == 2).await;
    let client = tokio::task::spawn_blocking(move || -> Result<Client> {
        let mut client = client;
        client.say(&json!({"type": "cancel", "id": "a"}))?;
        let done = client.until_done("a")?.pop().context("no message")?;
        ensure!(done["outcome"]["error"]["code"] == "CANCELLED", "{done}");
        Ok(client)
    });
    let client = client.await??;
    assert_eq!(worker.chats.dropped.load(Ordering::SeqCst), 1);
    drop(client);
    until("the other one is cancelled too", || worker.chats.dropped.load(Ordering::SeqCst) == 2).await;
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_open_a_socket() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let open = Gateway::start(&bench.server, &["--cors-origin", "https://chat.example"])?;
    let mut closed = Gateway::launch(&bench.server.url(), &[])?;
    closed.wait_ready()?;
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        ensure!(Client::open(&closed, &[]).is_err(), "without a key");
        ensure!(Client::open(&closed, &[("authorization", "Bearer none")]).is_err(), "with a wrong one");
        // A page of elsewhere must not use what is open to all.
        ensure!(Client::open(&open, &[("origin", "https://evil.example")]).is_err());
        Client::open(&open, &[("origin", "https://chat.example")])?;
        Client::open(&open, &[("origin", &format!("http://{}", open.address()))])?;
        let plain = open.get("/v1/stream")?.error()?;
        ensure!(plain == (400, "invalid_parameter".into(), Some("upgrade".into())), "{plain:?}");
        // A message beyond the limit ends the connection, and nothing else.
        let mut client = Client::open(&open, &[])?;
        let _ = client.0.send(Message::text("x".repeat(2 << 20)));
        let ended = loop {
            match client.0.read() {
                Ok(Message::Close(frame)) => break frame.map(|frame| frame.code),
                Ok(_) => {}
                Err(_) => break None,
            }
        };
        ensure!(matches!(ended, None | Some(CloseCode::Size)), "{ended:?}");
        ensure!(open.get("/healthz")?.status == 200);
        Ok(())
    });
    talked.await?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_finishes_what_runs_on_sockets() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = ChatWorker::start(&bench, "w").await?;
    let mut gateway = Gateway::start(&bench.server, &["--drain-timeout", "20s"])?;
    let words: String = (0..20).map(|i| format!(" w{i}")).collect();
    let mut client = Client::open(&gateway, &[])?;
    client.generate("a", &format!("slow begin{words}"), json!({}))?;
    let mut said = vec![client.hear()?.context("the gateway closed")?];
    until("it runs", || worker.chats.begun.load(Ordering::SeqCst) == 1).await;
    gateway.signal(Signal::Terminate)?;
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        said.extend(client.until_done("a")?);
        ensure!(spelled(&said, "a") == format!("begin{words}"), "{said:?}");
        match client.0.read()? {
            Message::Close(Some(frame)) => ensure!(frame.code == CloseCode::Away, "{frame:?}"),
            other => bail!("{other:?} is no farewell"),
        }
        Ok(())
    });
    talked.await??;
    ensure!(gateway.wait(PATIENCE)?.success(), "{}", gateway.log());
    Ok(())
}
