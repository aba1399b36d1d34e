//! The front door: OpenAI's API over the queue.
//!
//! Every request for an answer is a durable job, every answer is the job's one outcome. A gateway keeps nothing of
//! its own, so any number of them can run. [`server`] listens and drains; [`routes`] has the paths; [`inference`]
//! makes a request a job and its outcome an answer, in one piece or, by [`stream`] and [`chunk`], while it is made;
//! [`awaited`] publishes, awaits and cancels, and [`jobs`] leaves that to the client; [`waiting`] hears outcomes;
//! [`responses`] are jobs too, of which more is kept; what is [`followed`] goes on after any [`passage`] of the
//! [`texts`]; [`socket`] has many generations on one connection;
//! [`catalog`] knows the models, which are [`kept`]; [`keys`], [`token`] and [`caller`] say who may, [`audit`] who did;
//! [`limits`] say how much, [`fair`] in which turn and [`room`] whether at all; [`cache`] answers what was answered
//! before; [`connections`] and [`memory`] have bounds, whatever comes; [`state`] is what gateways share in the broker;
//! [`files`] and [`batches`] are what clients leave here, in the [`archive`], in [`records`] and [`blobs`];
//! [`error`] is the closed table of errors; [`document`] describes all paths; [`front`] is what all requests share;
//! [`tls`] and [`cors`] say who may connect, and which pages; [`pages`] and [`meters`] show how it is.

pub mod archive;
pub mod audit;
pub mod awaited;
pub mod batches;
pub mod blobs;
pub mod cache;
pub mod caller;
pub mod catalog;
pub mod chunk;
pub mod claimed;
pub mod connections;
pub mod cors;
pub mod digests;
pub mod document;
pub mod error;
pub mod fair;
pub mod files;
pub mod followed;
pub mod front;
pub mod inference;
pub mod jobs;
pub mod kept;
pub mod keys;
pub mod limits;
pub mod log;
pub mod memory;
pub mod meters;
pub mod multipart;
pub mod options;
pub mod pages;
pub mod paging;
pub mod passage;
pub mod records;
pub mod responses;
pub mod room;
pub mod routes;
pub mod server;
pub mod socket;
pub mod state;
pub mod stream;
pub mod texts;
pub mod tls;
pub mod token;
pub mod waiting;

use crate::failure::Failure;

/// Serves until SIGTERM or SIGINT and the drain that follows.
///
/// # Errors
/// When an option is wrong, the address cannot be bound, or the broker will not let this gateway in.
pub async fn run(args: options::GatewayArgs) -> Result<(), Failure> {
    log::start().map_err(Failure::Usage)?;
    args.check()?;
    let front = front::Front::connect(args).await?;
    batches::keeper::start(&front);
    files::sweep::start(&front);
    tokio::select! {
        served = server::serve(front.clone()) => served,
        failure = front.refused() => Err(failure),
    }
}
