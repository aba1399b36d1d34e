//! What a gateway counts, in Prometheus text form. Label sets are finite: path, status, reason; never a model, a
//! tenant or an id.

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

use crate::http::front::Front;

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
    running: prometheus::IntGauge,
    waiting: prometheus::IntGauge,
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
            running: gauge("requests_running", "Requests for an answer that run"),
            waiting: gauge("outcomes_awaited", "Jobs whose outcome is awaited"),
        };
        let collectors: [Box<dyn prometheus::core::Collector>; 8] = [
            Box::new(metrics.requests.clone()),
            Box::new(metrics.seconds.clone()),
            Box::new(metrics.published.clone()),
            Box::new(metrics.cancelled.clone()),
            Box::new(metrics.streams.clone()),
            Box::new(metrics.healed.clone()),
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

    /// The page.
    pub fn text(&self, front: &Front) -> String {
        self.running.set(front.running() as i64);
        self.waiting.set(front.waiters.count() as i64);
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
