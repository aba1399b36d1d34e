//! `millrace results`: stored outcomes into JSON lines.
//!
//! For named requests or jobs the lines come in input order under the caller's ids; without any, all of the
//! model's outcomes come in the order in which they were stored, and `--follow` goes on with new ones.

use std::collections::HashSet;
use std::time::Instant;

use millrace_crds::names::JobId;

use crate::args::{Global, ResultsArgs};
use crate::collect::OutputFile;
use crate::connect::{self, Connection};
use crate::entries::Origin;
use crate::failure::{Failure, Verdict};
use crate::follow::{self, Follower};
use crate::gather::{Gatherer, Sink};
use crate::input;
use crate::output::{Printer, line, note};
use crate::plan::PlannedJob;
use crate::store::Bodies;
use crate::summary::Summary;

/// Runs the command.
///
/// # Errors
/// See [`Failure`].
pub async fn run(global: &Global, args: &ResultsArgs) -> Result<Verdict, Failure> {
    let by_id = !args.jobs.is_empty() || args.ids.is_some();
    let jobs = match (input::is_named(&args.input), by_id) {
        (true, true) => {
            let message = "name requests (files, --prompt) or job ids (--job, --ids), not both";
            return Err(Failure::Usage(message.to_owned()));
        }
        (true, false) => input::plan(&args.input, true)?,
        (false, true) => input::job_ids(&args.jobs, args.ids.as_deref())?.into_iter().map(as_asked).collect(),
        (false, false) if args.wait_all => {
            let message = "--wait-all: name the requests or jobs to wait for; without any, --follow goes on";
            return Err(Failure::Usage(message.to_owned()));
        }
        (false, false) => Vec::new(),
    };
    let file = args.output.as_deref().map(OutputFile::open).transpose()?;
    let broker = connect::connect(global).await?;
    broker.stream(broker.model.results_stream()).await?;
    let bodies = Bodies::new(args.store.config());
    let started = Instant::now();
    let printed_only = file.is_none();
    let summary = if jobs.is_empty() {
        all(&broker, args, file, bodies).await?
    } else {
        let sink = file.map_or(Sink::Print, Sink::File);
        named(&broker, args, Gatherer::new(&jobs, sink, bodies)?).await?
    };
    let summary = summary.close(std::time::Duration::ZERO, started.elapsed());
    note(&summary.sentence());
    if !printed_only {
        Printer { json: global.json }.object(&summary);
    }
    Ok(Verdict::of(summary.is_well()))
}

/// A job known by its id alone: its one line keeps the id as the caller's.
fn as_asked(id: JobId) -> PlannedJob {
    PlannedJob {
        custom_ids: vec![id.to_string()],
        body: bytes::Bytes::new(),
        jsonl: false,
        origin: Origin { file: "job".into(), line: 1 },
        id,
    }
}

async fn named(
    broker: &Connection,
    args: &ResultsArgs,
    mut gatherer: Gatherer<'_>,
) -> Result<Summary, Failure> {
    let mut follower = Follower::from_now(broker).await?;
    let outcomes = follow::stored(broker, &gatherer.missing()).await?;
    gatherer.take(outcomes, false).await?;
    let waited = match args.wait_all || args.follow {
        true => gatherer.wait(&mut follower, args.timeout.0).await,
        false => Ok(()),
    };
    let mut summary = gatherer.finish()?;
    waited?;
    summary.accepted = summary.jobs - summary.missing;
    Ok(summary)
}

/// All outcomes of the model, as they were stored.
async fn all(
    broker: &Connection,
    args: &ResultsArgs,
    mut file: Option<OutputFile>,
    bodies: Bodies,
) -> Result<Summary, Failure> {
    let present: HashSet<String> = file.iter().flat_map(|file| file.present().iter().cloned()).collect();
    let mut summary = Summary::default();
    let mut follower = Follower::from(broker, 1);
    loop {
        let outcomes = follower.next().await?;
        let found = !outcomes.is_empty();
        for mut outcome in outcomes {
            let lines = match bodies.fetch(&mut outcome).await? {
                Ok(()) => outcome.lines(),
                Err(reason) => Err(reason),
            };
            let lines = lines.unwrap_or_else(|error| {
                note(&format!("error: {error}"));
                summary.malformed += 1;
                Vec::new()
            });
            summary.jobs += 1;
            summary.accepted += 1;
            summary.count(&outcome, &lines, false);
            let wanted = lines.iter().filter(|line| !present.contains(&line.custom_id));
            let text: Vec<String> =
                wanted.map(|l| serde_json::to_string(l).expect("our own types are JSON")).collect();
            match &mut file {
                Some(file) => file.append(&text)?,
                None => text.iter().for_each(|text| line(text)),
            }
        }
        if !found && !args.follow {
            break;
        }
        follower.rest(found).await;
    }
    if let Some(file) = file {
        file.finish(&Default::default())?;
    }
    Ok(summary)
}
