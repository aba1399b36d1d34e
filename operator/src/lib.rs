//! The operator of Millrace: from an InferenceModel to its queue and its workers.
//!
//! One reconcile is a straight line: [`fetch`] (reads) -> [`validate`] (pure) -> [`scale`] (pure) -> [`build`]
//! (pure) -> [`apply`] (writes) -> [`status`] (pure, and one write). [`queue`] is the only file that creates
//! streams and consumers; [`apply`], [`status`] and [`lease`] are the only ones that write to the API server.
//! [`controller`] drives the line for each model, on every change and by the clock. [`load`] and [`wake`]
//! listen to the broker beside it. [`sim`] replays traffic through [`scale`] in virtual time.
//!
//! The operator may not panic: one bad model must not stop the others.

macro_rules! careful {
    ($($(#[$doc:meta])* $name:ident)+) => {
        $(
            $(#[$doc])*
            #[cfg_attr(
                not(test),
                deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
            )]
            pub mod $name;
        )+
    };
}

careful! {
    apply
    build
    caches
    config
    controller
    error
    fetch
    finalize
    lease
    load
    metrics
    names
    network
    pod_template
    workers
    queue
    scaling
    server
    status
    telemetry
    validate
    wake
    worker_config
}

pub mod scale;
pub mod sim;
