//! A `millrace-gateway` process, and a small HTTP/1 client that reads answers as they come.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::nats::NatsServer;
use crate::ports::Port;
use crate::process::{Process, Signal};
use crate::{http, place, tools};

/// A gateway answers within this time.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Longest silence that the client bears.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// A running gateway. Dropping it kills it.
#[derive(Debug)]
pub struct Gateway {
    process: Process,
    port: Port,
    _folder: TempDir,
}

impl Gateway {
    /// Starts one for everybody and waits until it is ready.
    ///
    /// # Errors
    /// When it does not come up; the message holds the end of its log.
    pub fn start(nats: &NatsServer, options: &[&str]) -> Result<Self> {
        let mut gateway = Self::launch(&nats.url(), &[&["--anonymous"], options].concat())?;
        gateway.wait_ready()?;
        Ok(gateway)
    }

    /// Starts one with these options, and does not wait for it.
    ///
    /// # Errors
    /// When the program was not built.
    pub fn launch(broker: &str, options: &[&str]) -> Result<Self> {
        let folder = place::folder("gateway-")?;
        let port = Port::reserve()?;
        let mut command = Command::new(tools::program("millrace-gateway")?);
        let listen = format!("127.0.0.1:{}", port.number());
        command.args(["--server", broker, "--listen", &listen]).args(options);
        for name in ["NATS_CREDS", "NATS_CA", "MILLRACE_NAMESPACE", "MILLRACE_INBOX_PREFIX", "MILLRACE_CLASS"]
        {
            command.env_remove(name);
        }
        let process = Process::start(&command, &folder.path().join("gateway.log"))?;
        Ok(Self { process, port, _folder: folder })
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// When it does not come up; the message holds the end of its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let address = self.address();
        let ready = || http::get(address, "/readyz").is_ok_and(|(status, _)| status == 200);
        self.process.wait_until(READY_LIMIT, ready).map(drop)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port.number()).into()
    }

    /// The sum over all label sets of one metric; 0 when it has not been counted yet.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let (_, page) = http::get(self.address(), "/metrics")?;
        Ok(crate::worker::sum_of(&page, name))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it is still there after `limit`; the message holds the end of its log.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.wait(limit)
    }

    /// Its resident memory, in bytes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn resident_bytes(&self) -> Result<u64> {
        Ok(self.process.memory()?.0)
    }

    /// Processor time that it used so far, in seconds.
    ///
    /// # Errors
    /// When it has ended.
    pub fn processor_s(&self) -> Result<f64> {
        self.process.processor_s()
    }

    /// The most memory that it had, in bytes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn peak_bytes(&self) -> Result<u64> {
        Ok(self.process.memory()?.1)
    }

    /// Kills it, and leaves its port free.
    ///
    /// # Errors
    /// When the wait fails.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// All that it logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Sends a request and reads the head of its answer. Blocks.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<HttpAnswer> {
        let mut stream = TcpStream::connect(self.address())?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        // HTTP/1.0: the body comes without chunks and ends with the connection.
        let mut head =
            format!("{method} {path} HTTP/1.0\r\nHost: test\r\nContent-Length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
            head += "Content-Type: application/json\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes())?;
        stream.write_all(body.as_bytes())?;
        HttpAnswer::read(stream)
    }

    /// Sends a JSON body and reads the whole answer. Blocks.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn post(&self, path: &str, body: &Value) -> Result<HttpReply> {
        self.ask("POST", path, &[], &body.to_string())?.whole()
    }

    /// The whole answer of a path. Blocks.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn get(&self, path: &str) -> Result<HttpReply> {
        self.ask("GET", path, &[], "")?.whole()
    }
}

/// An answer whose body is not read yet.
#[derive(Debug)]
pub struct HttpAnswer {
    /// The status.
    pub status: u16,
    headers: Vec<(String, String)>,
    body: BufReader<TcpStream>,
}

/// A whole answer.
#[derive(Debug)]
pub struct HttpReply {
    /// The status.
    pub status: u16,
    headers: Vec<(String, String)>,
    /// The body's bytes.
    pub body: Vec<u8>,
}

fn header_of<'a>(headers: &'a [(String, String)], name: &str) -> &'a str {
    let found = headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    found.map_or("", |(_, value)| value)
}

impl HttpAnswer {
    fn read(stream: TcpStream) -> Result<Self> {
        let mut body = BufReader::new(stream);
        let mut line = String::new();
        body.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.with_context(|| format!("no status: {line:?}"))?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            body.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_owned(), value.to_owned()));
        }
        Ok(Self { status, headers, body })
    }

    /// A header's value; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        header_of(&self.headers, name)
    }

    /// The next line of the body as it comes, `None` at its end.
    ///
    /// # Errors
    /// When nothing comes for 30 s.
    pub fn line(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        let read = self.body.read_line(&mut line)?;
        Ok((read > 0).then(|| line.trim_end().to_owned()))
    }

    /// The rest of the body.
    ///
    /// # Errors
    /// When nothing comes for 30 s.
    pub fn whole(mut self) -> Result<HttpReply> {
        let mut body = Vec::new();
        self.body.read_to_end(&mut body)?;
        Ok(HttpReply { status: self.status, headers: self.headers, body })
    }
}

impl HttpReply {
    /// A header's value; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        header_of(&self.headers, name)
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<Value> {
        let shown = || String::from_utf8_lossy(&self.body).into_owned();
        serde_json::from_slice(&self.body).with_context(shown)
    }

    /// Status, code and param of an error in OpenAI's form.
    ///
    /// # Errors
    /// When the body is none.
    pub fn error(&self) -> Result<(u16, String, Option<String>)> {
        let body = self.json()?;
        let error = &body["error"];
        let code = error["code"].as_str().with_context(|| body.to_string())?;
        ensure!(error["message"].is_string() && error["type"].is_string(), "{body}");
        Ok((self.status, code.to_owned(), error["param"].as_str().map(str::to_owned)))
    }

    /// The chunks of a stream, which must end with `[DONE]`.
    ///
    /// # Errors
    /// When a line is not of the form that all clients accept.
    pub fn chunks(&self) -> Result<Vec<Value>> {
        let text = std::str::from_utf8(&self.body)?;
        let mut events: Vec<&str> = text.split_terminator("\n\n").collect();
        ensure!(events.pop() == Some("data: [DONE]") && text.ends_with("\n\n"), "no end: {text}");
        let events = events.into_iter().filter(|event| *event != ": ping");
        let data = events.map(|event| event.strip_prefix("data: ").with_context(|| format!("{event:?}")));
        data.map(|data| Ok(serde_json::from_str(data?)?)).collect()
    }

    /// The text of one choice of a streamed answer.
    ///
    /// # Errors
    /// As [`Self::chunks`].
    pub fn spelled(&self, index: u64) -> Result<String> {
        let chunks = self.chunks()?;
        let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().into_iter().flatten());
        let own = choices.filter(|choice| choice["index"] == index);
        Ok(own.filter_map(|c| c["delta"]["content"].as_str().or(c["text"].as_str())).collect())
    }
}
