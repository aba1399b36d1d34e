//! Lines in input order, and a file that is completed over several runs.

use proptest::prelude::*;

use super::*;
use crate::entries::Origin;

fn ids(count: usize) -> Vec<JobId> {
    (0..count).map(|i| format!("j{i}").parse().unwrap()).collect()
}

fn job(id: &JobId) -> PlannedJob {
    PlannedJob {
        id: id.clone(),
        custom_ids: vec![format!("c-{id}")],
        body: bytes::Bytes::new(),
        jsonl: false,
        origin: Origin { file: "f".into(), line: 1 },
    }
}

fn line(id: &JobId) -> String {
    format!(r#"{{"id":"{id}","custom_id":"c-{id}","response":null,"error":null}}"#)
}

#[test]
fn the_second_outcome_of_a_job_is_noticed() {
    let ids = ids(2);
    let mut collector = Collector::new(&ids);
    assert_eq!(collector.put(&ids[1], vec!["b".into()]), Placed::New);
    assert_eq!(collector.put(&ids[1], vec!["b".into()]), Placed::Again);
    assert_eq!(collector.put(&"x".parse().unwrap(), vec![]), Placed::Foreign);
    assert!(collector.take_in_order().is_empty());
    assert_eq!(collector.missing(9), [&ids[0]]);
    assert_eq!(collector.take_all(), ["b"]);
    collector.put(&ids[0], vec!["a".into()]);
    assert_eq!(collector.take_in_order(), ["a"]);
    assert_eq!(collector.missing_count(), 0);
}

proptest! {
    #[test]
    fn any_order_of_arrival_gives_input_order(
        order in Just((0..12usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let ids = ids(12);
        let mut collector = Collector::new(&ids);
        let mut lines = Vec::new();
        for place in order {
            collector.put(&ids[place], vec![ids[place].to_string()]);
            lines.extend(collector.take_in_order());
        }
        prop_assert_eq!(lines, ids.iter().map(ToString::to_string).collect::<Vec<_>>());
    }
}

#[test]
fn a_file_is_completed_and_put_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.jsonl");
    let ids = ids(3);
    let jobs: Vec<PlannedJob> = ids.iter().map(job).collect();
    let order: HashMap<&str, usize> =
        jobs.iter().enumerate().map(|(i, job)| (job.custom_ids[0].as_str(), i)).collect();

    let mut file = OutputFile::open(&path).unwrap();
    for place in [0, 2] {
        file.append(&[line(&ids[place])]).unwrap();
    }
    file.finish(&order).unwrap();
    // A process that dies while it writes leaves a torn line.
    let torn = std::fs::read_to_string(&path).unwrap() + "{\"id\":\"j1\",";
    std::fs::write(&path, torn).unwrap();

    let mut file = OutputFile::open(&path).unwrap();
    let present = file.jobs_present(&jobs).unwrap();
    assert!(present.contains(&ids[0]) && present.contains(&ids[2]) && !present.contains(&ids[1]));
    file.append(&[line(&ids[1])]).unwrap();
    file.finish(&order).unwrap();
    let expected: String = ids.iter().map(|id| line(id) + "\n").collect();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);

    let error = OutputFile::open(&path).unwrap().jobs_present(&jobs[..2]).unwrap_err().to_string();
    assert!(error.contains("line 3 is of custom_id \"c-j2\", which is not in the input"), "{error}");
    std::fs::write(&path, "hello\n").unwrap();
    let error = OutputFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("line 1 is no output line"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "hello\n", "a foreign file is left alone");
}
