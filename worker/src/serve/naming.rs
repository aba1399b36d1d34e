//! Which job a delivery is: by its own id, or by its place in the stream.

use millrace_crds::job::{JobHeaders, own_id};
use millrace_crds::names::{JobId, JobPlace};
use millrace_queue::delivery::Delivery;
use millrace_queue::fault::Fault;

use super::{ServingLine, backoff};
use crate::run::Run;

/// Where the message lies, as far as its id depends on that. `None` if nobody says so: it was handed back.
pub async fn place_of<R: Run>(line: &ServingLine<R>, delivery: &Delivery) -> Option<JobPlace> {
    let sequence = delivery.stream_sequence;
    let own = own_id(delivery.header_pairs()).filter(|(_, id)| id.parse::<JobId>().is_ok());
    if own.is_some() {
        return Some(JobPlace { stream_created_ms: 0, sequence });
    }
    let stream = line.model.jobs_stream();
    let created = tokio::select! {
        created = line.broker.stream_created_ms(&stream) => created.map_err(Fault::from),
        () = line.drain_over.cancelled() => Err(Fault::Draining),
    };
    match created {
        Ok(stream_created_ms) => Some(JobPlace { stream_created_ms, sequence }),
        Err(fault) => {
            line.metrics.fault(&fault);
            let handed = delivery.retry(backoff(&line.queue, delivery.delivered)).await;
            tracing::warn!(sequence, %fault, confirmed = handed.is_ok(), "a job without an id was handed back");
            None
        }
    }
}

/// The headers of a job whose own could not be read: its id if that is sound, and nothing else.
pub fn bare_headers(delivery: &Delivery, place: JobPlace) -> JobHeaders {
    let id = own_id(delivery.header_pairs()).filter(|(_, value)| value.parse::<JobId>().is_ok());
    JobHeaders::parse(id, place).expect("an id that was checked, or none")
}
