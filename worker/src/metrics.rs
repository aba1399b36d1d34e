//! What the worker counts, in Prometheus text form.
//!
//! Where the meaning is vLLM's, so is the name (`vllm:...`), with its label `model_name`; the rest is
//! `millrace_...`. Label sets are finite: model, kind, category, class; never an id.

use std::sync::Mutex;
use std::time::Duration;

use millrace_crds::load::ColdStart;
use millrace_crds::names::{Class, ModelRef};
use millrace_crds::result::OutcomeKind;
use millrace_engine::schedule::handle::{EngineLoad, Limits};
use millrace_queue::fault::Fault;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::run::Answer;

/// Seconds, from a millisecond to an hour: vLLM's request buckets, finer below.
const SECONDS: [f64; 22] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0,
    300.0, 600.0, 1200.0, 1800.0, 3600.0,
];
/// Seconds between tokens.
const TOKEN_SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5];
/// Tokens of a request.
const TOKENS: [f64; 16] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];

/// All metrics of one worker.
#[derive(Debug)]
pub struct WorkerMetrics {
    registry: Registry,
    engine: Mutex<EngineMetrics>,
    jobs: IntCounterVec,
    faults: IntCounterVec,
    cold_start: GaugeVec,
    /// Deliveries pulled, by class.
    pub deliveries: IntCounterVec,
    /// Deliveries that were not the first of their job.
    pub redeliveries: IntCounter,
    /// Deliveries that found their outcome stored.
    pub already_done: IntCounter,
    /// Outcomes that somebody else had stored first.
    pub create_races_lost: IntCounter,
    /// Acks that the broker did not confirm.
    pub ack_failures: IntCounter,
    /// Keep-alives not sent, because the engine made no step.
    pub keep_alives_withheld: IntCounter,
    /// Pull requests sent.
    pub pulls: IntCounter,
    /// Pull requests that failed.
    pub pull_errors: IntCounter,
    /// Jobs held.
    pub held: IntGauge,
    /// From a job's stream timestamp to its start.
    pub queue_wait: Histogram,
    /// From a job's start to its first token.
    first_token: Histogram,
    /// Mean time per output token of a job.
    per_token: Histogram,
    /// The same, once for each token.
    between_tokens: Histogram,
    /// Sequences answered, by the reason of their end.
    success: IntCounterVec,
    cache_config: IntGaugeVec,
    /// From a job's stream timestamp to its stored outcome.
    pub end_to_end: Histogram,
    /// From a job's start to its outcome, without queue and storing.
    run: Histogram,
    /// From a job's outcome until it is stored and acknowledged.
    pub settle: Histogram,
    /// Prompt tokens of a job.
    prompt_tokens: Histogram,
    /// Output tokens of a job.
    output_tokens: Histogram,
    /// Deadline minus the end, of jobs that had one and met it.
    pub deadline_margin: Histogram,
}

/// Copies of the engine's own counters, brought up to date when somebody looks.
#[derive(Debug)]
struct EngineMetrics {
    running: IntGauge,
    waiting: IntGauge,
    kv_usage: Gauge,
    prompt_tokens: IntCounter,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    generation_tokens: IntCounter,
    preemptions: IntCounter,
    steps: IntCounter,
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: prometheus::Result<C>) -> C {
    let collector = collector.expect("a constant name, help and labels");
    registry.register(Box::new(collector.clone())).expect("each name is registered once");
    collector
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help))
}

fn counters(registry: &Registry, name: &str, help: &str, label: &str) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), &[label]))
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
}

impl WorkerMetrics {
    /// Every metric exists from the start, at zero.
    pub fn new(model: &ModelRef) -> Self {
        let labels = [("model_name".to_owned(), model.name.to_string())].into_iter().collect();
        let registry = Registry::new_custom(None, Some(labels)).expect("no prefix");
        let r = &registry;
        let metrics = Self {
            engine: Mutex::new(EngineMetrics::new(r)),
            jobs: counters(r, "millrace_jobs_total", "Outcomes stored, by kind.", "outcome"),
            faults: counters(
                r,
                "millrace_faults_total",
                "Attempts without an answer, by category.",
                "category",
            ),
            cold_start: register(
                r,
                GaugeVec::new(
                    Opts::new("millrace_cold_start_seconds", "Duration of each phase of the start."),
                    &["phase"],
                ),
            ),
            deliveries: counters(r, "millrace_deliveries_total", "Deliveries pulled, by class.", "class"),
            redeliveries: counter(r, "millrace_redeliveries_total", "Deliveries after a job's first one."),
            already_done: counter(
                r,
                "millrace_already_done_total",
                "Deliveries that found their outcome stored.",
            ),
            create_races_lost: counter(
                r,
                "millrace_create_races_lost_total",
                "Outcomes that another attempt had stored first.",
            ),
            ack_failures: counter(r, "millrace_ack_failures_total", "Acks that the broker did not confirm."),
            keep_alives_withheld: counter(
                r,
                "millrace_keep_alives_withheld_total",
                "Keep-alives not sent because the engine made no step.",
            ),
            pulls: counter(r, "millrace_pulls_total", "Pull requests sent."),
            pull_errors: counter(r, "millrace_pull_errors_total", "Pull requests that failed."),
            held: gauge(r, "millrace_jobs_held", "Jobs held, running or not."),
            queue_wait: histogram(
                r,
                "vllm:request_queue_time_seconds",
                "From the job's stream timestamp to its start.",
                &SECONDS,
            ),
            first_token: histogram(
                r,
                "vllm:time_to_first_token_seconds",
                "From a job's start to its first token.",
                &SECONDS,
            ),
            per_token: histogram(
                r,
                "vllm:request_time_per_output_token_seconds",
                "Mean time per output token of a job, after its first.",
                &TOKEN_SECONDS,
            ),
            between_tokens: histogram(
                r,
                "vllm:inter_token_latency_seconds",
                "Time between tokens; each of a job's tokens counts with the job's mean.",
                &TOKEN_SECONDS,
            ),
            end_to_end: histogram(
                r,
                "vllm:e2e_request_latency_seconds",
                "From the job's stream timestamp to its stored outcome.",
                &SECONDS,
            ),
            run: histogram(
                r,
                "vllm:request_inference_time_seconds",
                "From a job's start to its answer.",
                &SECONDS,
            ),
            settle: histogram(
                r,
                "millrace_settle_seconds",
                "From a job's answer until it is stored and acknowledged.",
                &SECONDS,
            ),
            success: counters(
                r,
                "vllm:request_success_total",
                "Sequences answered, by the reason of their end.",
                "finished_reason",
            ),
            cache_config: register(
                r,
                IntGaugeVec::new(
                    Opts::new("vllm:cache_config_info", "Sizes of the KV cache, as labels."),
                    &["block_size", "num_gpu_blocks"],
                ),
            ),
            prompt_tokens: histogram(r, "vllm:request_prompt_tokens", "Prompt tokens of a job.", &TOKENS),
            output_tokens: histogram(r, "vllm:request_generation_tokens", "Output tokens of a job.", &TOKENS),
            deadline_margin: histogram(
                r,
                "millrace_deadline_margin_seconds",
                "Deadline minus end of jobs that met it.",
                &SECONDS,
            ),
            registry,
        };
        metrics.touch_labels();
        metrics
    }

    /// A rate over a series that appears with its first event misses that event.
    fn touch_labels(&self) {
        for kind in [OutcomeKind::Completed, OutcomeKind::Rejected, OutcomeKind::Dead] {
            self.jobs.with_label_values(&[kind.as_str()]);
        }
        for category in Fault::CATEGORIES {
            self.faults.with_label_values(&[category]);
        }
        for reason in ["stop", "length"] {
            self.success.with_label_values(&[reason]);
        }
        for class in Class::ALL {
            self.deliveries.with_label_values(&[class.as_str()]);
        }
    }

    /// An outcome was stored.
    pub fn stored(&self, kind: OutcomeKind) {
        self.jobs.with_label_values(&[kind.as_str()]).inc();
    }

    /// Outcomes stored since the start.
    pub fn stored_total(&self) -> u64 {
        [OutcomeKind::Completed, OutcomeKind::Rejected, OutcomeKind::Dead]
            .iter()
            .map(|kind| self.jobs.with_label_values(&[kind.as_str()]).get())
            .sum()
    }

    /// An attempt ended with an answer after `run`.
    pub fn answered(&self, answer: &Answer, run: Duration) {
        let (sequences, tokens) = (answer.sequences.max(1), answer.output_tokens);
        self.run.observe(run.as_secs_f64());
        self.prompt_tokens.observe(answer.prompt_tokens as f64);
        self.output_tokens.observe(tokens as f64);
        let ends = [("stop", answer.stopped), ("length", answer.sequences.saturating_sub(answer.stopped))];
        for (reason, count) in ends {
            self.success.with_label_values(&[reason]).inc_by(count);
        }
        let Some(first_ms) = answer.first_token_ms else { return };
        self.first_token.observe(first_ms / 1000.0);
        if tokens <= sequences {
            return;
        }
        let rest_s = (run.as_secs_f64() - first_ms / 1000.0).max(0.0);
        let per_token_s = rest_s * sequences as f64 / (tokens - sequences) as f64;
        self.per_token.observe(per_token_s);
        let between = self.between_tokens.local();
        for _ in sequences..tokens {
            between.observe(per_token_s);
        }
        between.flush();
    }

    /// The engine is loaded: what its KV cache holds does not change any more.
    pub fn loaded(&self, limits: Limits) {
        let labels = [limits.block_tokens.to_string(), limits.kv_blocks.to_string()];
        self.cache_config.with_label_values(&labels).set(1);
    }

    /// An attempt ended without an answer.
    pub fn fault(&self, fault: &Fault) {
        self.faults.with_label_values(&[fault.category()]).inc();
    }

    /// The start is over.
    pub fn started(&self, cold_start: &ColdStart) {
        let phases = [
            ("connect", cold_start.connect_ms),
            ("pull", cold_start.pull_ms),
            ("load", cold_start.load_ms),
            ("warm_up", cold_start.warm_up_ms),
            ("total", cold_start.total_ms),
        ];
        for (phase, ms) in phases {
            self.cold_start.with_label_values(&[phase]).set(ms / 1000.0);
        }
    }

    /// All of it as Prometheus text; the engine's part as it is now, if it runs.
    pub fn text(&self, engine: Option<(&EngineLoad, Limits)>) -> Vec<u8> {
        if let Some((load, limits)) = engine {
            self.engine.lock().unwrap_or_else(std::sync::PoisonError::into_inner).update(load, limits);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("a vector takes all bytes");
        text
    }
}

impl EngineMetrics {
    fn new(r: &Registry) -> Self {
        Self {
            running: gauge(r, "vllm:num_requests_running", "Sequences in the running batch."),
            waiting: gauge(r, "vllm:num_requests_waiting", "Sequences that wait for room."),
            kv_usage: register(
                r,
                Gauge::new("vllm:kv_cache_usage_perc", "Used share of the KV cache, 1 is all."),
            ),
            prompt_tokens: counter(r, "vllm:prompt_tokens_total", "Prompt tokens."),
            prefix_queries: counter(
                r,
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache.",
            ),
            prefix_hits: counter(
                r,
                "vllm:prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache.",
            ),
            generation_tokens: counter(r, "vllm:generation_tokens_total", "Tokens generated."),
            preemptions: counter(r, "vllm:num_preemptions_total", "Sequences preempted."),
            steps: counter(r, "millrace_engine_steps_total", "Steps of the engine."),
        }
    }

    fn update(&self, load: &EngineLoad, limits: Limits) {
        let gauge = |value| i64::try_from(EngineLoad::get(value)).unwrap_or(i64::MAX);
        self.running.set(gauge(&load.running));
        self.waiting.set(gauge(&load.waiting));
        let used = EngineLoad::get(&load.kv_blocks_used) as f64;
        self.kv_usage.set(used / f64::from(limits.kv_blocks.max(1)));
        let prompt = EngineLoad::get(&load.prompt_tokens);
        let values = [
            (&self.prompt_tokens, prompt),
            (&self.prefix_queries, prompt),
            (&self.prefix_hits, EngineLoad::get(&load.cached_tokens)),
            (&self.generation_tokens, EngineLoad::get(&load.output_tokens)),
            (&self.preemptions, EngineLoad::get(&load.preemptions)),
            (&self.steps, EngineLoad::get(&load.steps)),
        ];
        for (counter, value) in values {
            // The engine's counters only grow; somebody else may have looked with a newer value meanwhile.
            counter.inc_by(value.saturating_sub(counter.get()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_vllms_names_and_the_models_label() {
        let metrics = WorkerMetrics::new(&ModelRef::new("default", "smollm2").unwrap());
        let load = EngineLoad::default();
        load.running.store(3, std::sync::atomic::Ordering::Relaxed);
        load.kv_blocks_used.store(5, std::sync::atomic::Ordering::Relaxed);
        load.output_tokens.store(7, std::sync::atomic::Ordering::Relaxed);
        let limits =
            Limits { max_model_len: 9, max_sequences: 9, block_tokens: 16, kv_blocks: 10, vocabulary: 9 };
        metrics.stored(OutcomeKind::Dead);
        metrics.text(Some((&load, limits)));
        let text = String::from_utf8(metrics.text(Some((&load, limits)))).unwrap();
        for line in [
            "vllm:num_requests_running{model_name=\"smollm2\"} 3",
            "vllm:kv_cache_usage_perc{model_name=\"smollm2\"} 0.5",
            "vllm:generation_tokens_total{model_name=\"smollm2\"} 7",
            "millrace_jobs_total{outcome=\"dead\",model_name=\"smollm2\"} 1",
            "millrace_jobs_total{outcome=\"completed\",model_name=\"smollm2\"} 0",
        ] {
            assert!(text.contains(line), "{line} is missing from:\n{text}");
        }
        assert_eq!(metrics.stored_total(), 1);
    }

    #[test]
    fn an_answer_counts_once_a_job_and_once_a_token() {
        let metrics = WorkerMetrics::new(&ModelRef::new("default", "m").unwrap());
        let answer = Answer {
            body: bytes::Bytes::new(),
            prompt_tokens: 7,
            output_tokens: 12,
            sequences: 2,
            stopped: 1,
            first_token_ms: Some(500.0),
            ignored_fields: Vec::new(),
        };
        metrics.answered(&answer, Duration::from_secs(3));
        let text = String::from_utf8(metrics.text(None)).unwrap();
        // Two sequences side by side made ten tokens after their first ones in 2.5 s.
        for line in [
            "vllm:request_time_per_output_token_seconds_sum{model_name=\"m\"} 0.5",
            "vllm:inter_token_latency_seconds_count{model_name=\"m\"} 10",
            "vllm:inter_token_latency_seconds_sum{model_name=\"m\"} 5",
            "vllm:time_to_first_token_seconds_sum{model_name=\"m\"} 0.5",
            "vllm:request_success_total{finished_reason=\"stop\",model_name=\"m\"} 1",
            "vllm:request_success_total{finished_reason=\"length\",model_name=\"m\"} 1",
            "vllm:request_generation_tokens_sum{model_name=\"m\"} 12",
        ] {
            assert!(text.contains(line), "{line} is missing from:\n{text}");
        }
    }
}
