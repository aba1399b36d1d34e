//! The command line as it is typed: types only. Each command turns its own part into a plan before it acts.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use millrace_crds::names::{Class, ModelRef};
use millrace_crds::units::{Bytes, Span};
use millrace_queue::args::StoreArgs;

use crate::broker_args::BrokerArgs;
use crate::failure::{EXIT_CODES, Failure};
use crate::http::cache::CacheUse;
use crate::http::keys::Verb;
use crate::http::limits::set::LimitRule;

/// Job-queue inference: publish prompts to a durable queue, collect exactly one result for each.
#[derive(Debug, Parser)]
#[command(name = "millrace", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection and output")]
pub struct Global {
    /// How to reach the broker.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// Namespace of the model
    #[arg(long, short, env = "MILLRACE_NAMESPACE", default_value = "default", global = true)]
    pub namespace: String,
    /// Name of the model
    #[arg(long, short, env = "MILLRACE_MODEL", global = true)]
    pub model: Option<String>,
    /// Print JSON alone on standard output: one object, or one a line
    #[arg(long, global = true)]
    pub json: bool,
}

impl Global {
    /// The model that the command is about.
    ///
    /// # Errors
    /// [`Failure::Usage`] when it is missing or no name.
    pub fn model(&self) -> Result<ModelRef, Failure> {
        let Some(name) = &self.model else {
            let fix = "--model is missing: name the model, as in `-m smollm2`, or set MILLRACE_MODEL";
            return Err(Failure::Usage(fix.to_owned()));
        };
        let namespace = self
            .namespace
            .parse()
            .map_err(|e| Failure::Usage(format!("--namespace {:?}: {e}", self.namespace)))?;
        let name = name.parse().map_err(|e| Failure::Usage(format!("--model {name:?}: {e}")))?;
        Ok(ModelRef { namespace, name })
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publish jobs, once each: what has an outcome already is not published again
    Submit(SubmitArgs),
    /// Collect outcomes into JSON lines
    Results(ResultsArgs),
    /// Cancel jobs that have no outcome yet
    Cancel(CancelArgs),
    /// Look at jobs that were given up, and publish them again
    Dead(DeadArgs),
    /// Show depth, age and redeliveries of each class, and the workers
    Queue(QueueArgs),
    /// Make the model's streams and consumers, or compare them with what they should be
    Provision(ProvisionArgs),
    /// Turn a GGUF file into a model folder, and upload it if asked
    Import(WorkerArgs),
    /// Look at a model folder as a worker would at its start, without its weights
    Check(WorkerArgs),
    /// Make, list and revoke the keys of the HTTP API
    Key(KeyArgs),
    /// Print what a role needs of the broker, as permissions of a NATS user; with --json as in a JWT
    Permissions(PermissionsArgs),
    /// Check broker, streams, object store, model folder, clock and workers, and print each fix
    Doctor(DoctorArgs),
}

/// What an input file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// By the file's ending; standard input by its first character
    #[default]
    Auto,
    /// OpenAI batch lines, or a request body a line
    Jsonl,
    /// One request body
    Json,
    /// One prompt
    Text,
    /// One prompt a line
    Prompts,
}

/// How a job's id follows from its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum IdFrom {
    /// From custom_id and content: equal requests are one job, a changed one is a new job
    #[default]
    Content,
    /// The custom_id itself: it must be unique over all that is ever submitted to the model
    CustomId,
}

/// Which requests, and which ids they have.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Input")]
pub struct InputArgs {
    /// Files: .jsonl (OpenAI batch lines), .json (one request body), .txt (one prompt); - is standard input
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// What the files hold
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Put before each job id
    #[arg(long, default_value = "", value_name = "TEXT", hide_default_value = true)]
    pub id_prefix: String,
    /// How a job's id follows from its request
    #[arg(long, value_enum, default_value_t)]
    pub id_from: IdFrom,
    /// Send up to N lines of a .jsonl file as one job
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=50_000))]
    pub pack: Option<u32>,
    /// Prompts, beside or instead of files
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// Parameters of text prompts
    #[command(flatten)]
    pub parameters: PromptArgs,
}

/// Parameters of prompts that come as text; JSON inputs carry their own.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Parameters of text prompts")]
pub struct PromptArgs {
    /// Send the prompt as a user's chat message
    #[arg(long)]
    pub chat: bool,
    /// System message; implies --chat
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens to generate
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// 0 always takes the most probable token
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Take from the smallest set of tokens with this much probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Equal seeds give equal answers
    #[arg(long, value_name = "N")]
    pub seed: Option<i64>,
    /// Text that ends the answer; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

/// `millrace submit`
#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// Which requests
    #[command(flatten)]
    pub input: InputArgs,
    /// Class of service
    #[arg(long, default_value_t)]
    pub class: Class,
    /// Give the jobs up after this: a span such as 10m, or an RFC 3339 time
    #[arg(long, value_name = "WHEN")]
    pub deadline: Option<String>,
    /// Print the answer while it is made; for a single request
    #[arg(long)]
    pub stream: bool,
    /// Wait for all outcomes
    #[arg(long)]
    pub wait: bool,
    /// Collect the outcomes here, in input order; implies --wait. An existing file is completed
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Give up when nothing has progressed for this long: no job accepted, no outcome
    #[arg(long, default_value = "30m", value_name = "SPAN")]
    pub timeout: Span,
    /// s3://bucket/prefix for inputs that are too large for a message
    #[arg(long, value_name = "URI")]
    pub object_store: Option<String>,
    /// How to reach it
    #[command(flatten)]
    pub store: StoreArgs,
    /// Count a job as done whichever model answered it; by default only an answer of the model that is served counts
    #[arg(long)]
    pub any_model: bool,
    /// Check the input and print the job ids; publish nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `millrace results`
#[derive(Debug, Args)]
pub struct ResultsArgs {
    /// Which requests; without any, all outcomes of the model, as they were stored
    #[command(flatten)]
    pub input: InputArgs,
    /// Job ids; may be repeated
    #[arg(long = "job", value_name = "JOB")]
    pub jobs: Vec<String>,
    /// File with a job id a line; - is standard input
    #[arg(long, value_name = "FILE")]
    pub ids: Option<PathBuf>,
    /// Collect here, in input order, instead of printing. An existing file is completed
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print outcomes as they arrive, without end; for named jobs, until all have arrived
    #[arg(long)]
    pub follow: bool,
    /// Wait until all named jobs have an outcome
    #[arg(long)]
    pub wait_all: bool,
    /// Give up waiting when no outcome has arrived for this long
    #[arg(long, default_value = "30m", value_name = "SPAN")]
    pub timeout: Span,
    /// How to fetch outcomes that are too large for a message
    #[command(flatten)]
    pub store: StoreArgs,
}

/// `millrace cancel`
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// Job ids
    #[arg(value_name = "JOB")]
    pub jobs: Vec<String>,
    /// File with a job id a line; - is standard input
    #[arg(long, value_name = "FILE")]
    pub ids: Option<PathBuf>,
    /// All jobs in the queue, running ones included
    #[arg(long, conflicts_with_all = ["jobs", "ids"])]
    pub all_pending: bool,
}

/// `millrace dead`
#[derive(Debug, Args)]
pub struct DeadArgs {
    /// What to do with dead letters
    #[command(subcommand)]
    pub command: DeadCommand,
}

/// What to do with dead letters.
#[derive(Debug, Subcommand)]
pub enum DeadCommand {
    /// List them
    List,
    /// Print one, headers and body
    Show {
        /// Job id
        job: String,
    },
    /// Publish again under the id JOB-rN, since a job's outcome never changes; then remove the letter
    Requeue {
        /// Job ids
        jobs: Vec<String>,
        /// All of them
        #[arg(long, conflicts_with = "jobs")]
        all: bool,
    },
}

/// `millrace key`
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// What to do with keys
    #[command(subcommand)]
    pub command: KeyCommand,
}

/// What to do with keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it, the only time that it can be read
    Create(KeyCreateArgs),
    /// Say how much keys may; what is not given stays
    Limit(KeyLimitCommandArgs),
    /// List the keys, without their secrets
    List,
    /// Let keys in no more
    Revoke {
        /// Ids of keys
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

/// `millrace key create`. A list that is not given allows all.
#[derive(Debug, Args)]
pub struct KeyCreateArgs {
    /// Whose key it is
    #[arg(long, value_name = "NAME")]
    pub tenant: String,
    /// What it is for
    #[arg(long, default_value = "", value_name = "TEXT", hide_default_value = true)]
    pub label: String,
    /// When it ends: a span such as 90d, or an RFC 3339 time; never without it
    #[arg(long, value_name = "WHEN")]
    pub expires: Option<String>,
    /// Namespace of models that it may use; may be repeated
    #[arg(long, value_name = "NAMESPACE")]
    pub allow_namespace: Vec<String>,
    /// Model that it may use; may be repeated
    #[arg(long, value_name = "MODEL")]
    pub allow_model: Vec<String>,
    /// What it may do; may be repeated
    #[arg(long, value_enum, value_name = "VERB")]
    pub allow_verb: Vec<Verb>,
    /// Class that its jobs may have; may be repeated
    #[arg(long, value_name = "CLASS")]
    pub allow_class: Vec<Class>,
    /// How much it may.
    #[command(flatten)]
    pub limits: KeyLimitArgs,
    /// Copies of the bucket of keys, where this makes it
    #[arg(long, default_value = "1", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub replicas: u8,
}

/// How much a key and its tenant may.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Limits")]
pub struct KeyLimitArgs {
    /// Limit of this key: requests=60/min, input-tokens=100k/min, output-tokens=20k/min, concurrent=8 or
    /// batch-tokens=2M; may be repeated
    #[arg(long, value_name = "LIMIT")]
    pub key_limit: Vec<LimitRule>,
    /// Limit of its tenant with all its keys; may be repeated
    #[arg(long, value_name = "LIMIT")]
    pub tenant_limit: Vec<LimitRule>,
    /// Weight of its tenant where tenants share a model [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub weight: Option<u32>,
    /// Whether its deterministic requests are answered from stored outcomes; the gateway says without it
    #[arg(long, value_enum, value_name = "WHEN")]
    pub cache: Option<CacheUse>,
}

/// `millrace key limit`
#[derive(Debug, Args)]
pub struct KeyLimitCommandArgs {
    /// Ids of keys
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    /// How much they may.
    #[command(flatten)]
    pub limits: KeyLimitArgs,
    /// Take away all limits that it has, before others are set
    #[arg(long)]
    pub clear: bool,
}

/// Who one is to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleName {
    /// millrace-operator, and whoever makes streams and keys
    Operator,
    /// The workers of a model
    Worker,
    /// millrace-gateway, for all models
    Gateway,
    /// Who submits jobs to a model and collects their outcomes
    Tenant,
}

/// `millrace permissions`
#[derive(Debug, Args)]
pub struct PermissionsArgs {
    /// Whose permissions; those of worker and tenant are of one model
    #[arg(long, value_enum)]
    pub role: RoleName,
}

/// `millrace queue`
#[derive(Debug, Args)]
pub struct QueueArgs {
    /// Show again and again
    #[arg(long)]
    pub watch: bool,
    /// Pause between two looks
    #[arg(long, default_value = "2s", value_name = "SPAN")]
    pub interval: Span,
}

/// Settings of the streams and consumers.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Queue settings")]
pub struct QueueSettingArgs {
    /// Take queue and results from a worker's configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Most jobs in the queue
    #[arg(long, value_name = "N")]
    pub max_jobs: Option<u64>,
    /// Most bytes in the queue, such as 10Gi
    #[arg(long, value_name = "SIZE")]
    pub max_bytes: Option<Bytes>,
    /// Attempts before a job is dead
    #[arg(long, value_name = "N")]
    pub max_deliver: Option<u32>,
    /// How long a silent worker keeps a job
    #[arg(long, value_name = "SPAN")]
    pub ack_wait: Option<Span>,
    /// How long outcomes are kept: the broker remembers ids no longer; workers take it from their configuration
    #[arg(long, value_name = "SPAN")]
    pub results_ttl: Option<Span>,
    /// Most bytes of outcomes, such as 4Gi
    #[arg(long, value_name = "SIZE")]
    pub results_max_bytes: Option<Bytes>,
    /// How long dead letters are kept, and cancel markers and ledgers of jobs that have no outcome
    #[arg(long, value_name = "SPAN")]
    pub dead_ttl: Option<Span>,
    /// Most bytes of dead letters, such as 512Mi
    #[arg(long, value_name = "SIZE")]
    pub dead_max_bytes: Option<Bytes>,
    /// Copies of each stream
    #[arg(long, value_name = "N")]
    pub replicas: Option<u32>,
}

/// `millrace provision`
#[derive(Debug, Args)]
pub struct ProvisionArgs {
    /// Settings
    #[command(flatten)]
    pub settings: QueueSettingArgs,
    /// Only compare; exit code 1 when something is missing or differs
    #[arg(long, conflicts_with = "apply")]
    pub check: bool,
    /// Also change what differs; without it, what exists is left as it is and reported
    #[arg(long)]
    pub apply: bool,
}

/// `millrace import` and `millrace check`: the words are those of the same command of `millrace-worker`, whose
/// engine reads model files.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct WorkerArgs {
    /// What `millrace-worker` is told
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    pub words: Vec<OsString>,
}

/// `millrace doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Settings that the streams should have
    #[command(flatten)]
    pub settings: QueueSettingArgs,
    /// The broker's monitoring address, such as http://127.0.0.1:8222; the fsync policy is read there
    #[arg(long, value_name = "URL")]
    pub monitor: Option<String>,
    /// The model's folder: s3://bucket/prefix or file:///path
    #[arg(long, value_name = "URI")]
    pub model_uri: Option<String>,
    /// How to reach the object store
    #[command(flatten)]
    pub store: StoreArgs,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_model_is_needed_and_must_be_a_name() {
        let parse = |words: &[&str]| Cli::try_parse_from(words).unwrap().global;
        let error = parse(&["millrace", "queue", "-m", "a.b"]).model().unwrap_err().to_string();
        assert!(error.starts_with("--model \"a.b\""), "{error}");
        let model = parse(&["millrace", "-n", "team", "queue", "--model", "m"]).model().unwrap();
        assert_eq!(model.to_string(), "team/m");
    }
}
