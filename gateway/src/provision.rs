//! `millrace provision`: the model's streams and consumers, made or compared, without the operator.

use millrace_crds::config::{QueueConfig, ResultsConfig, WorkerConfig};
use millrace_queue::provision::{Item, Mode, Provisioned, provision};
use serde_json::{Value, json};

use crate::args::{Global, ProvisionArgs, QueueSettingArgs};
use crate::connect;
use crate::failure::{Failure, Verdict};
use crate::output::{Printer, note};

/// The settings that the streams should have.
///
/// # Errors
/// [`Failure::File`], [`Failure::Usage`] when the file is no worker's configuration.
pub fn settings(args: &QueueSettingArgs) -> Result<(QueueConfig, ResultsConfig), Failure> {
    let (mut queue, mut results) = match &args.config {
        None => (QueueConfig::default(), ResultsConfig::default()),
        Some(path) => {
            let shown = format!("--config {}", path.display());
            let text = std::fs::read_to_string(path).map_err(|e| Failure::file(&shown, e))?;
            let config: WorkerConfig =
                serde_yaml::from_str(&text).map_err(|e| Failure::Usage(format!("{shown}: {e}")))?;
            (config.queue, config.results)
        }
    };
    queue.max_jobs = args.max_jobs.unwrap_or(queue.max_jobs);
    queue.max_bytes = args.max_bytes.unwrap_or(queue.max_bytes);
    queue.max_deliver = args.max_deliver.unwrap_or(queue.max_deliver);
    queue.ack_wait = args.ack_wait.unwrap_or(queue.ack_wait);
    queue.replicas = args.replicas.unwrap_or(queue.replicas);
    results.ttl = args.results_ttl.unwrap_or(results.ttl);
    results.max_bytes = args.results_max_bytes.unwrap_or(results.max_bytes);
    results.dead_ttl = args.dead_ttl.unwrap_or(results.dead_ttl);
    results.dead_max_bytes = args.dead_max_bytes.unwrap_or(results.dead_max_bytes);
    if results.dead_ttl < results.ttl {
        return Err(Failure::Usage(format!(
            "--dead-ttl is {}; outcomes live for {}, and what speaks of a job must live as long",
            results.dead_ttl, results.ttl
        )));
    }
    let at_least_one = [
        ("--max-jobs", queue.max_jobs),
        ("--max-bytes", queue.max_bytes.0),
        ("--max-deliver", queue.max_deliver.into()),
        ("--replicas", queue.replicas.into()),
        ("--ack-wait", queue.ack_wait.0.as_secs()),
        ("--results-ttl", results.ttl.0.as_secs()),
        ("--results-max-bytes", results.max_bytes.0),
        ("--dead-max-bytes", results.dead_max_bytes.0),
    ];
    match at_least_one.iter().find(|(_, value)| *value == 0) {
        Some((name, _)) => Err(Failure::Usage(format!("{name} is 0; at least 1 (or 1s) is needed"))),
        None => Ok((queue, results)),
    }
}

/// Runs the command. Unwell when something is missing or differs after it.
///
/// # Errors
/// See [`Failure`].
pub async fn run(global: &Global, args: &ProvisionArgs) -> Result<Verdict, Failure> {
    let printer = Printer { json: global.json };
    let (queue, results) = settings(&args.settings)?;
    let mode = match (args.check, args.apply) {
        (true, _) => Mode::Check,
        (_, true) => Mode::Apply,
        _ => Mode::Create,
    };
    let broker = connect::connect(global).await?;
    let items = provision(&broker.jetstream, &broker.model, &queue, &results, mode)
        .await
        .map_err(|error| Failure::Refused(error.to_string()))?;
    for item in &items {
        printer.object(&json_of(item));
        printer.say(&text_of(item));
    }
    let well = items.iter().all(is_well);
    if !well {
        note(match mode {
            Mode::Check => "run `millrace provision --apply` with the same settings to make it so",
            _ => "what differs was left as it is; --apply changes it",
        });
    }
    Ok(Verdict::of(well))
}

/// Whether a stream or consumer is as it should be.
pub fn is_well(item: &Item) -> bool {
    matches!(item.state, Provisioned::Same | Provisioned::Created | Provisioned::Updated(_))
}

/// One line for people.
pub fn text_of(item: &Item) -> String {
    let (word, drift) = parts(item);
    let settings: Vec<String> =
        drift.iter().map(|d| format!("{} is {}, should be {}", d.setting, d.actual, d.expected)).collect();
    let settings = if settings.is_empty() { String::new() } else { format!(" ({})", settings.join("; ")) };
    format!("{}: {word}{settings}", item.name)
}

fn json_of(item: &Item) -> Value {
    let (word, drift) = parts(item);
    let drift: Vec<Value> = drift
        .iter()
        .map(|d| json!({"setting": d.setting, "actual": d.actual, "expected": d.expected}))
        .collect();
    json!({"name": item.name, "state": word, "drift": drift})
}

fn parts(item: &Item) -> (&'static str, &[millrace_crds::drift::Drift]) {
    match &item.state {
        Provisioned::Same => ("same", &[]),
        Provisioned::Missing => ("missing", &[]),
        Provisioned::Created => ("created", &[]),
        Provisioned::Updated(drift) => ("updated", drift),
        Provisioned::Differs(drift) => ("differs", drift),
    }
}
