//! What a gateway counts, in Prometheus text form. Label sets are finite: path, status, reason; never a model, a
//! tenant or an id.

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

use crate::http::front::Front;
use crate::http::limits::set::Limited;

/// Seconds, from a millisecond to an hour.
const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 600.0, 3600.0];

/// All metrics of one gateway.
#[derive(Debug)]
pub struct GatewayMetrics {
    registry: Registry,
    requests: IntCounterVec,
    seconds: HistogramVec,
    /// Jobs published.
    pub published: IntCounter,
    /// Jobs cancelled because their client had left or their time was over.
    pub cancelled: IntCounter,
    /// Streams begun.
    pub streams: IntCounter,
    /// Streams of which the stored outcome gave text that no delta had brought.
    pub healed: IntCounter,
    /// Connections that were closed at once, because there were as many as may be.
    pub refused_connections: IntCounter,
    /// Deterministic requests that were answered from a stored outcome, and those that were not.
    pub cache_hits: IntCounter,
    /// Deterministic requests of which there was no stored outcome.
    pub cache_misses: IntCounter,
    limited: IntCounterVec,
    running: prometheus::IntGauge,
    waiting: prometheus::IntGauge,
    connections: prometheus::IntGauge,
    bytes: prometheus::IntGauge,
    held_back: prometheus::IntGauge,
}

impl GatewayMetrics {
    /// All at zero.
    pub fn new() -> Self {
        let name = |name: &str| format!("millrace_gateway_{name}");
        let counter = |n: &str, help: &str| IntCounter::new(name(n), help).expect("a constant name");
        let gauge = |n: &str, help: &str| prometheus::IntGauge::new(name(n), help).expect("a constant name");
        let requests = Opts::new(name("requests_total"), "Requests answered, by path and status");
        let seconds =
            HistogramOpts::new(name("request_seconds"), "From a request's head to its answer's head")
                .buckets(SECONDS.to_vec());
        let limited = Opts::new(name("limited_total"), "Requests refused by a limit of their key or tenant");
        let metrics = Self {
            registry: Registry::new(),
            requests: IntCounterVec::new(requests, &["path", "status"]).expect("constant labels"),
            seconds: HistogramVec::new(seconds, &["path"]).expect("constant labels"),
            published: counter("jobs_published_total", "Jobs published"),
            cancelled: counter(
                "jobs_cancelled_total",
                "Jobs cancelled: the client left, or the time was over",
            ),
            streams: counter("streams_total", "Streams begun"),
            healed: counter("streams_healed_total", "Streams completed by text of the stored outcome"),
            refused_connections: counter("connections_refused_total", "Connections closed: too many"),
            cache_hits: counter("cache_hits_total", "Requests answered from a stored outcome"),
            cache_misses: counter("cache_misses_total", "Requests that no stored outcome answers"),
            limited: IntCounterVec::new(limited, &["limit"]).expect("constant labels"),
            connections: gauge("connections", "Connections that are open"),
            bytes: gauge("held_bytes", "Bytes of requests and answers that are held"),
            held_back: gauge("jobs_held_back", "Requests that wait for their tenant's turn"),
            running: gauge("requests_running", "Requests for an answer that run"),
            waiting: gauge("outcomes_awaited", "Jobs whose outcome is awaited"),
        };
        let collectors: [Box<dyn prometheus::core::Collector>; 15] = [
            Box::new(metrics.requests.clone()),
            Box::new(metrics.seconds.clone()),
            Box::new(metrics.published.clone()),
            Box::new(metrics.cancelled.clone()),
            Box::new(metrics.streams.clone()),
            Box::new(metrics.healed.clone()),
            Box::new(metrics.refused_connections.clone()),
            Box::new(metrics.cache_hits.clone()),
            Box::new(metrics.cache_misses.clone()),
            Box::new(metrics.limited.clone()),
            Box::new(metrics.connections.clone()),
            Box::new(metrics.bytes.clone()),
            Box::new(metrics.held_back.clone()),
            Box::new(metrics.running.clone()),
            Box::new(metrics.waiting.clone()),
        ];
        for collector in collectors {
            metrics.registry.register(collector).expect("each name is registered once");
        }
        metrics
    }

    /// Counts an answer. `path` is a route's pattern, so that there are finitely many.
    pub fn answered(&self, path: &str, status: u16, seconds: f64) {
        self.requests.with_label_values(&[path, &status.to_string()]).inc();
        self.seconds.with_label_values(&[path]).observe(seconds);
    }

    /// Counts a request that a limit of its key or tenant refused; without one, its tenant's share of the model.
    pub fn limited(&self, limited: Option<Limited>) {
        self.limited.with_label_values(&[limited.map_or("share", Limited::as_str)]).inc();
    }

    /// The page.
    pub fn text(&self, front: &Front) -> String {
        self.running.set(front.running() as i64);
        self.waiting.set(front.waiters.count() as i64);
        self.connections.set(front.connections() as i64);
        self.bytes.set(front.memory.held() as i64);
        self.held_back.set(front.fair.held() as i64);
        let mut page = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut page).expect("a vector takes all");
        String::from_utf8_lossy(&page).into_owned()
    }
}

impl Default for GatewayMetrics {
    fn default() -> Self {
        Self::new()
    }
}
