//! A job's body, as one request or as lines: each line has a bounded number of sequences or a code.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace_crds::job::{JobHeaders, REQUESTS_MAX, header};
use millrace_engine::text::job::{Job, JobLimits};

const LIMITS: JobLimits = JobLimits { max_model_len: 512, vocabulary: 1000 };

fuzz_target!(|data: &[u8]| {
    for content in ["application/json", "application/jsonl"] {
        let named = [(header::JOB_ID, "job-1"), (header::CONTENT_TYPE, content)];
        let headers = JobHeaders::parse(named, Default::default()).expect("good headers");
        match Job::decode(headers, 1_700_000_000, data, &LIMITS) {
            Ok(job) => {
                assert!((1..=REQUESTS_MAX).contains(&job.lines.len()));
                for refused in job.lines.iter().filter_map(|line| line.request.as_ref().err()) {
                    assert!(!refused.to_string().is_empty() && refused.to_string().len() < 4096);
                }
            }
            Err(refused) => assert!(refused.to_string().len() < 4096, "{:?}", refused.code()),
        }
    }
});
