//! The life of a batch under gateways that come and go, cancel and are late: a model of many runs.
//!
//! A bucket holds one record and takes a write only on the revision that its writer read, as the broker does. Gateways
//! do what the runner does, one effect at a time, and are stopped and taken over between any two of them: also one that
//! still believes that the batch is its own.

use millrace_crds::names::Class;
use proptest::prelude::*;

use super::*;
use crate::http::blobs::BlobPlace;

const TOTAL: u64 = 7;

fn batch() -> BatchRecord {
    serde_json::from_value(json!({
        "id": "batch_0", "tenant": "t", "endpoint": "/v1/completions", "input_file_id": "f", "output": [],
        "completion_window": "24h", "class": Class::Low, "scopes": {}, "created_at": 0, "expires_at": 100,
        "webhook": {"url": "https://example.com", "secret": "s", "tries": 0, "due_at": null},
        "status": "validating", "times": {}, "errors": [], "counts": {"total": 0, "completed": 0, "failed": 0},
        "written": 0, "answered": 0, "tokens": {"input": 0, "output": 0}, "error_output": [], "late": false,
    }))
    .unwrap()
}

/// The bucket, with all that was ever stored beside it.
struct Bucket {
    record: BatchRecord,
    revision: u64,
    /// Lines in each blob that was stored, whether or not it is of any use.
    stored: Vec<Vec<u64>>,
}

/// A gateway's view.
#[derive(Clone)]
struct Gateway {
    record: BatchRecord,
    revision: u64,
    claim: String,
}

impl Bucket {
    /// The write of one gateway, as `HeldBatch::change` makes it; `false` where the batch is another's.
    fn change(&mut self, gateway: &mut Gateway, change: impl Fn(&mut BatchRecord)) -> bool {
        loop {
            let mut value = gateway.record.clone();
            change(&mut value);
            if gateway.revision == self.revision {
                self.revision += 1;
                self.record = value.clone();
                (gateway.record, gateway.revision) = (value, self.revision);
                return true;
            }
            if self.record.claim.as_ref() != Some(&gateway.claim) {
                return false;
            }
            (gateway.record, gateway.revision) = (self.record.clone(), self.revision);
        }
    }

    fn store(&mut self, lines: impl Iterator<Item = u64>) -> Option<Blob> {
        let lines: Vec<u64> = lines.collect();
        if lines.is_empty() {
            return None;
        }
        self.stored.push(lines);
        Some(Blob { id: (self.stored.len() - 1).to_string(), at: BlobPlace::Broker, bytes: 1 })
    }
}

/// One effect of a gateway that holds the batch. Even lines have answers.
fn work(bucket: &mut Bucket, gateway: &mut Gateway, now: i64, most: u64) -> bool {
    let before = gateway.record.clone();
    let model = ModelRef::new("default", "m").unwrap();
    match before.task() {
        BatchTask::Validate => bucket.change(gateway, |record| record.validated("m", &model, TOTAL, now)),
        BatchTask::Run => {
            let stop = before.stop(now);
            let lines = before.written..(before.written + most.max(1)).min(TOTAL);
            let good = |line: &u64| line.is_multiple_of(2) && stop.is_none();
            let segment = ResultSegment {
                from: before.written,
                lines: lines.end - lines.start,
                completed: lines.clone().filter(good).count() as u64,
                output: bucket.store(lines.clone().filter(good)),
                errors: bucket.store(lines.clone().filter(|line| !good(line))),
                late: stop == Some(BatchStatus::Expired),
                ..ResultSegment::default()
            };
            bucket.change(gateway, |record| record.wrote(segment.clone()))
        }
        BatchTask::Finish => {
            bucket.change(gateway, |record| record.finalize(now))
                && bucket.change(gateway, |record| {
                    let name = |blobs: &[Blob], name: &str| (!blobs.is_empty()).then(|| name.to_owned());
                    record.end((name(&before.output, "output"), name(&before.error_output, "errors")), now);
                })
        }
        BatchTask::Notify => bucket.change(gateway, |record| record.notified(now % 3 == 0, now)),
        BatchTask::Rest => true,
    }
}

/// What is true after each step.
fn check(before: &BatchRecord, after: &BatchRecord, stored: &[Vec<u64>]) {
    let written = after.output.iter().chain(&after.error_output);
    let mut lines: Vec<u64> =
        written.flat_map(|blob| stored[blob.id.parse::<usize>().unwrap()].clone()).collect();
    lines.sort_unstable();
    assert_eq!(lines, (0..after.written).collect::<Vec<_>>(), "each line is written once");
    assert!(after.written >= before.written && after.written <= TOTAL);
    let counts = after.counts;
    assert!(counts.completed >= before.counts.completed && counts.failed >= before.counts.failed);
    if before.status.has_ended() {
        let still = |record: &BatchRecord| BatchRecord { claim: None, webhook: None, ..record.clone() };
        assert_eq!(still(before), still(after), "what has ended stays as it is");
    }
    let ends =
        [after.times.completed_at, after.times.failed_at, after.times.expired_at, after.times.cancelled_at];
    assert_eq!(ends.into_iter().flatten().count(), usize::from(after.status.has_ended()));
    if matches!(after.status, BatchStatus::Completed | BatchStatus::Expired) {
        assert_eq!(counts.completed + counts.failed, TOTAL);
        assert_eq!(after.output_file_id.is_some(), counts.completed > 0);
        assert_eq!(after.error_file_id.is_some(), counts.failed > 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn each_line_is_written_once_whatever_becomes_of_the_gateways(
        steps in proptest::collection::vec((0..3usize, 0..12u8, 1..4u64), 1..80)
    ) {
        let mut bucket = Bucket { record: batch(), revision: 1, stored: Vec::new() };
        let mut gateways: [Option<Gateway>; 3] = [None, None, None];
        let (mut now, mut claims) = (0, 0);
        let mut before = bucket.record.clone();
        // In the end one gateway is left, which works on.
        let rest = std::iter::repeat_n((0, 3, 3), 60);
        for (who, what, most) in steps.into_iter().chain(rest) {
            now += i64::from(what == 11) * 40;
            match (what, gateways[who].take()) {
                // It dies.
                (0, _) => {}
                // The client cancels, through any gateway.
                (1, held) => {
                    let mut value = bucket.record.clone();
                    if value.cancel(now) && value != bucket.record {
                        bucket.revision += 1;
                        bucket.record = value;
                    }
                    gateways[who] = held;
                }
                // It takes the batch, whoever holds it: that one seemed to be dead.
                (_, None) => {
                    claims += 1;
                    let claim = claims.to_string();
                    bucket.revision += 1;
                    bucket.record.claim = Some(claim.clone());
                    let (record, revision) = (bucket.record.clone(), bucket.revision);
                    gateways[who] = Some(Gateway { record, revision, claim });
                }
                (_, Some(mut held)) => {
                    if work(&mut bucket, &mut held, now, most) {
                        gateways[who] = Some(held);
                    }
                }
            }
            check(&before, &bucket.record, &bucket.stored);
            before = bucket.record.clone();
        }
        prop_assert!(bucket.record.status.has_ended(), "{:?}", bucket.record);
        prop_assert_eq!(bucket.record.task(), BatchTask::Rest);
    }
}

#[test]
fn a_wrong_input_fails_the_batch() {
    let mut record = batch();
    let fault = LineFault { code: "empty_file".into(), line: None, message: "m".into(), param: None };
    record.refused(vec![fault], 5);
    assert_eq!((record.status, record.task()), (BatchStatus::Failed, BatchTask::Notify));
    let object = record.object();
    assert_eq!(
        (&object["failed_at"], &object["errors"]["data"][0]["code"]),
        (&json!(5), &json!("empty_file"))
    );
    assert!(!record.cancel(6), "it has ended");
}

#[test]
fn a_webhook_is_tried_as_often_as_it_may() {
    let mut record = batch();
    record.refused(Vec::new(), 0);
    let mut now = 0;
    while record.task() == BatchTask::Notify {
        now = record.webhook.as_ref().unwrap().due_at.unwrap();
        record.notified(false, now);
    }
    assert_eq!(record.webhook.as_ref().unwrap().tries as usize, WEBHOOK_PAUSES.len());
    assert_eq!(now, WEBHOOK_PAUSES.iter().sum::<i64>());
    assert!(!record.is_forgotten(KEPT_SECONDS - 1) && record.is_forgotten(KEPT_SECONDS));
}

#[test]
fn what_was_seen_is_not_taken_back() {
    let mut record = batch();
    record.validated("m", &ModelRef::new("default", "m").unwrap(), TOTAL, 1);
    record.saw(5, 1);
    // Another gateway begins to look anew.
    record.saw(0, 0);
    assert_eq!(record.counts, LineCounts { total: TOTAL, completed: 5, failed: 1 });
    record.wrote(ResultSegment { lines: TOTAL, completed: 6, ..ResultSegment::default() });
    assert_eq!(record.counts, LineCounts { total: TOTAL, completed: 6, failed: 1 });
}
