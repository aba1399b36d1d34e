//! The queue costs nothing: in a test build on a shared machine only the order of magnitude is asserted; the
//! figure itself comes from `make bench`.

use anyhow::Result;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::{nats, overhead, tools};

#[tokio::test(flavor = "multi_thread")]
async fn one_token_jobs_pass_quickly() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let cluster = QueueHarness::tiny()?;
    let _worker = cluster.worker()?;
    let figures = overhead::measure(&cluster, 200, 1000).await?;
    eprintln!("{figures:?}");
    assert!(
        figures.p50_ms < 20.0 && figures.p99_ms < 250.0,
        "{figures:?}; the bar of a release build is p99 10 ms"
    );
    assert!(figures.jobs_per_s > 100.0, "{figures:?}; the bar of a release build is 400 jobs/s");
    Ok(())
}
