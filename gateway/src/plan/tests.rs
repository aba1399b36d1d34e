//! Ids, packs and deadlines.

use proptest::prelude::*;

use super::*;

fn entry(line: usize, custom_id: &str, body: &str) -> RequestEntry {
    RequestEntry {
        origin: Origin { file: "f.jsonl".into(), line },
        custom_id: custom_id.to_owned(),
        body: Bytes::copy_from_slice(body.as_bytes()),
        url: "/v1/completions",
    }
}

fn options() -> PlanOptions {
    PlanOptions::new(&InputArgs::default(), false)
}

fn only(entry: RequestEntry, options: &PlanOptions) -> Result<PlannedJob, String> {
    match plan(&[entry], options) {
        Ok(mut jobs) => Ok(jobs.remove(0)),
        Err(problems) => Err(problems[0].to_string()),
    }
}

#[test]
fn ids_are_recognisable_and_pinned() {
    let id = |custom_id: &str| only(entry(1, custom_id, r#"{"prompt":"x"}"#), &options()).unwrap().id;
    // This exact id (computed by hand with another SHA-256) is a promise: a later version must not
    // publish the jobs of an earlier one again.
    assert_eq!(id("request-1").as_str(), "request-1-33d03041a6a79877");
    assert!(id("Ä b/c").as_str().starts_with("b-c-"), "{}", id("Ä b/c"));
    assert_eq!(id("..").as_str().len(), ID_DIGITS);
}

#[test]
fn a_changed_request_is_a_new_job() {
    let id = |custom_id: &str, body: &str| only(entry(1, custom_id, body), &options()).unwrap().id;
    assert_eq!(id("a", "{}"), id("a", "{}"));
    assert_ne!(id("a", "{}"), id("a", "{ }"));
    assert_ne!(id("a.", "{}"), id("a,", "{}"));
}

#[test]
fn custom_ids_as_job_ids() {
    let options = PlanOptions { id_from: IdFrom::CustomId, id_prefix: "run2-".into(), ..options() };
    assert_eq!(only(entry(1, "a", "{}"), &options).unwrap().id.as_str(), "run2-a");
    let error = only(entry(3, "a.b", "{}"), &options).unwrap_err();
    assert!(error.starts_with("f.jsonl:3: job id \"run2-a.b\" must match"), "{error}");
    assert!(error.contains("without --id-from custom-id"), "{error}");
    let options = PlanOptions { id_prefix: "x.".into(), ..self::options() };
    assert!(only(entry(1, "a", "{}"), &options).unwrap_err().contains("--id-prefix \"x.\""));
}

#[test]
fn packs_keep_order_and_limits() {
    let entries: Vec<RequestEntry> = (0..5).map(|i| entry(i + 1, &format!("c{i}"), "{\n}")).collect();
    let packed = |pack, bytes| {
        let options = PlanOptions { pack: Some(pack), body_bytes_max: bytes, ..options() };
        plan(&entries, &options).unwrap()
    };
    let jobs = packed(2, 1 << 20);
    assert_eq!(jobs.iter().map(|job| job.custom_ids.len()).collect::<Vec<_>>(), [2, 2, 1]);
    assert!(jobs.iter().all(|job| job.jsonl && job.body.ends_with(b"\n")));
    assert_eq!(
        jobs[2].body,
        "{\"custom_id\":\"c4\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{}}\n"
    );
    let line = jobs[2].body.len();
    assert_eq!(packed(5, 3 * line).iter().map(|job| job.custom_ids.len()).collect::<Vec<_>>(), [3, 2]);
    let error = only(entry(1, "a", "{}"), &PlanOptions { body_bytes_max: 1, ..options() }).unwrap_err();
    assert!(error.contains("2 bytes; a message holds 1: give --object-store"), "{error}");
    let options = PlanOptions { body_bytes_max: 1, claim_checks: true, ..options() };
    assert!(only(entry(1, "a", "{}"), &options).is_ok());
}

#[test]
fn deadlines() {
    let now = OffsetDateTime::parse("2026-11-23T10:00:00Z", &Rfc3339).unwrap();
    assert_eq!(deadline("90s", now).unwrap(), "2026-11-23T10:01:30Z");
    assert_eq!(deadline("2026-11-23T12:00:00+01:00", now).unwrap(), "2026-11-23T12:00:00+01:00");
    assert!(deadline("2026-11-23T09:00:00Z", now).unwrap_err().contains("not in the future"));
    assert!(deadline("tomorrow", now).unwrap_err().contains("\"tomorrow\" is neither"));
}

#[test]
fn lists_of_ids() {
    assert_eq!(job_ids("f", "a\n\n b \na\n").unwrap().len(), 2);
    assert_eq!(job_ids("f", "a\nb.c\n").unwrap_err()[0].to_string().split(": ").next(), Some("f:2"));
}

proptest! {
    #[test]
    fn any_custom_id_gives_a_valid_id(
        custom_id in "\\PC{1,200}",
        prefix in "[A-Za-z0-9][-_A-Za-z0-9]{0,100}",
    ) {
        let with_prefix = PlanOptions { id_prefix: prefix.clone(), ..options() };
        let job = only(entry(1, &custom_id, "{}"), &with_prefix).unwrap();
        prop_assert!(job.id.as_str().starts_with(&prefix));
        let without_prefix = only(entry(1, &custom_id, "{}"), &options());
        prop_assert!(without_prefix.is_ok());
    }

    #[test]
    fn packing_loses_nothing(count in 1usize..40, lines in 1usize..10, bytes in 80usize..400) {
        let entries: Vec<RequestEntry> = (0..count).map(|i| entry(i, &format!("c{i}"), "{}")).collect();
        let options = PlanOptions { pack: Some(lines), body_bytes_max: bytes, ..options() };
        let jobs = plan(&entries, &options).unwrap();
        let ids: Vec<&String> = jobs.iter().flat_map(|job| &job.custom_ids).collect();
        prop_assert_eq!(ids, entries.iter().map(|entry| &entry.custom_id).collect::<Vec<_>>());
        prop_assert!(jobs.iter().all(|job| job.custom_ids.len() <= lines && job.body.len() <= bytes));
    }
}
