//! `millrace doctor`: what must hold for jobs to flow, checked one by one, each with its fix.
//!
//! It only looks; nothing is changed. What it could not look at is a warning, never a silent pass.

use std::time::Instant;

use async_nats::Client;
use millrace_crds::check::{Check, Grade};
use millrace_crds::job::JOB_BYTES_MAX;
use millrace_crds::load::Phase;
use millrace_crds::names::Class;
use millrace_queue::monitor::{self, Fsync};
use millrace_queue::provision::{Mode, Provisioned, provision};
use serde_json::Value;
use time::OffsetDateTime;

use crate::args::{DoctorArgs, Global};
use crate::connect::{self, Connection};
use crate::failure::{Failure, Verdict};
use crate::output::Printer;
use crate::provision as provisioned;
use crate::queue;
use crate::summary::counted;
use crate::worker;

/// Oldest broker with everything that is used here.
const BROKER_VERSION_MIN: (u32, u32) = (2, 11);
/// A clock that is further off makes deadlines start or end jobs at the wrong time.
const SKEW_MAX_S: f64 = 2.0;

/// Runs the command. Unwell when a check fails; warnings do not count.
///
/// # Errors
/// [`Failure::Usage`] for a wrong option. An unreachable broker is a failed check, and its exit code is
/// the failure's.
pub async fn run(global: &Global, args: &DoctorArgs) -> Result<Verdict, Failure> {
    let printer = Printer { json: global.json };
    let (queue, results) = provisioned::settings(&args.settings)?;
    let mut well = true;
    let mut show = |check: Check| {
        well &= check.grade != Grade::Fail;
        printer.object(&check);
        printer.say(&check.lines());
    };
    let broker = match connect::connect(global).await {
        Ok(broker) => broker,
        Err(failure @ Failure::Usage(_)) => return Err(failure),
        Err(failure) => {
            let fix = "start the broker, or give its address with --server and its login with --creds";
            show(Check::fail("broker", failure.to_string(), fix));
            return Err(failure);
        }
    };
    show(version(&broker.client));
    show(payload(&broker.client));
    show(jetstream(&broker).await);
    show(fsync(args.monitor.as_deref()).await);
    let (namespace, name) = (&broker.model.namespace, &broker.model.name);
    let command = format!("millrace provision --namespace {namespace} --model {name}");
    match provision(&broker.jetstream, &broker.model, &queue, &results, Mode::Check).await {
        Err(error) => show(Check::fail("streams", error.to_string(), command)),
        Ok(items) => items.iter().for_each(|item| {
            let text = provisioned::text_of(item);
            show(match item.state {
                Provisioned::Missing => {
                    Check::fail("streams", text, format!("{command} (or let the operator do it)"))
                }
                Provisioned::Differs(_) => {
                    Check::fail("streams", text, format!("{command} --apply, with the settings you want"))
                }
                _ => Check::ok("streams", text),
            });
        }),
    }
    delivery(&broker).await.into_iter().for_each(&mut show);
    worker::check(args).into_iter().for_each(&mut show);
    show(clock(&broker).await);
    show(workers(&broker).await);
    Ok(Verdict::of(well))
}

/// Whether the consumers will deliver all that lies in the queue. Nothing to say where there is no queue.
async fn delivery(broker: &Connection) -> Vec<Check> {
    const NAME: &str = "delivery";
    let stream = broker.model.jobs_stream();
    let Ok(jobs) = broker.stream(stream.clone()).await else { return Vec::new() };
    let (classes, undeliverable) = match queue::count(broker, &jobs).await {
        Ok(counted) => counted,
        // That a consumer is missing was said above.
        Err(_) => return Vec::new(),
    };
    let paused = classes.iter().filter(|class| class.paused).map(|class| {
        let found = format!("class {} is paused; {} wait", class.class, counted(class.pending, "job"));
        let fix = format!("nats consumer resume {stream} {}", broker.model.consumer(class.class));
        Check::fail(NAME, found, fix)
    });
    let mut checks: Vec<Check> = paused.collect();
    checks.push(match undeliverable {
        None => Check::ok(NAME, "jobs come and go"),
        Some(0) => Check::ok(NAME, "each job waits for a worker or is held by one"),
        Some(jobs) => {
            let found = format!("{jobs} jobs that no consumer will deliver");
            let fix = format!(
                "make the consumers anew: `nats consumer rm {stream} {}` (and those of the other classes), then \
                 `millrace provision`; jobs that run come again and find their outcome",
                broker.model.consumer(Class::Normal)
            );
            Check::fail(NAME, found, fix)
        }
    });
    checks
}

fn version(client: &Client) -> Check {
    let version = client.server_info().version;
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = BROKER_VERSION_MIN;
    match found >= BROKER_VERSION_MIN {
        true => Check::ok("broker version", version),
        false => {
            Check::fail("broker version", version, format!("upgrade nats-server to {major}.{minor} or later"))
        }
    }
}

fn payload(client: &Client) -> Check {
    let limit = client.server_info().max_payload;
    let found = format!("{limit} bytes");
    // Headers travel with the body and count too.
    if limit >= JOB_BYTES_MAX + (16 << 10) {
        return Check::ok("largest message", found);
    }
    let fix =
        format!("jobs near {JOB_BYTES_MAX} bytes will be refused: set max_payload: 2MB in the broker's file");
    Check::warn("largest message", found, fix)
}

async fn jetstream(broker: &Connection) -> Check {
    let fix = "enable it: `jetstream { store_dir: ..., sync_interval: always }` in the broker's file";
    match broker.jetstream.query_account().await {
        Ok(account) => {
            let found = format!("enabled; {} streams, {} bytes stored", account.streams, account.storage);
            Check::ok("JetStream", found)
        }
        Err(error) => Check::fail("JetStream", error.to_string(), fix),
    }
}

async fn fsync(address: Option<&str>) -> Check {
    const NAME: &str = "fsync policy";
    let fix =
        "set `sync_interval: always` in the broker's jetstream block, or jobs may be lost with the power";
    let Some(address) = address else {
        let look = "give --monitor http://HOST:8222 to check for sync_interval: always";
        return Check::warn(NAME, "unknown", look);
    };
    match monitor::fsync(address).await {
        Ok(Fsync::Always) => Check::ok(NAME, "always"),
        Ok(Fsync::Every(time)) => Check::fail(NAME, format!("every {time}"), fix),
        Err(error) => Check::warn(NAME, format!("unknown: {error}"), "check --monitor"),
    }
}

/// The broker's clock, by the time in its answer about a stream, against ours half a round trip ago.
async fn clock(broker: &Connection) -> Check {
    const NAME: &str = "clock";
    let asked = (Instant::now(), OffsetDateTime::now_utc());
    let info: Result<Value, _> =
        broker.jetstream.request(format!("STREAM.INFO.{}", broker.model.jobs_stream()), &()).await;
    let middle = asked.1 + asked.0.elapsed() / 2;
    let told = info.ok().and_then(|info| {
        let text = info.get("ts")?.as_str()?.to_owned();
        OffsetDateTime::parse(&text, &time::format_description::well_known::Rfc3339).ok()
    });
    let Some(told) = told else {
        return Check::warn(NAME, "unknown: the broker tells no time", "make the streams first");
    };
    let skew_s = (middle - told).as_seconds_f64();
    let found =
        format!("{:.3} s {} the broker's", skew_s.abs(), if skew_s < 0.0 { "behind" } else { "before" });
    match skew_s.abs() <= SKEW_MAX_S {
        true => Check::ok(NAME, found),
        false => {
            Check::fail(NAME, found, "run NTP on this machine and on the broker's; deadlines depend on it")
        }
    }
}

async fn workers(broker: &Connection) -> Check {
    const NAME: &str = "workers";
    match queue::workers(broker).await {
        Err(failure) => Check::warn(NAME, failure.to_string(), "allow subscribing to millrace.load.>"),
        Ok(workers) if workers.is_empty() => {
            Check::warn(NAME, "none reports", "start millrace-worker serve, or let the operator scale up")
        }
        Ok(workers) => {
            let ready = workers.iter().filter(|worker| worker.phase == Phase::Ready).count();
            let reports = counted(workers.len() as u64, "report");
            Check::ok(NAME, format!("{reports}, {ready} ready"))
        }
    }
}
