//! Named places at which a test may end the process, as a power cut would.
//!
//! `MILLRACE_FAILPOINT=after_publish` aborts the process the first time that place is reached, and
//! `after_publish:7` the seventh time. `while_running@JOB` aborts where that job runs, and with `!panic` behind it
//! another thread panics instead. It is compiled into every build, because the build that runs in
//! production is the one whose crashes must be safe; unset, a place costs one atomic load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace_crds::names::JobId;

/// The environment variable.
pub const VARIABLE: &str = "MILLRACE_FAILPOINT";

/// Every place, in the order in which a job passes them.
pub const NAMES: [&str; 13] = [
    "after_pull",
    "after_lookup",
    "before_start_record",
    "after_start_record",
    "before_run",
    "while_running",
    "after_run",
    "before_output_put",
    "before_publish",
    "after_publish",
    "after_dead_copy",
    "before_ack",
    "after_ack",
];

struct Armed {
    name: String,
    /// The job that it is about; any, if none is named.
    job: Option<String>,
    left: AtomicU64,
    panics: bool,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

/// Reads the environment once.
///
/// # Errors
/// When the variable names no known place or its count is not a number from 1.
pub fn arm() -> Result<(), String> {
    let armed = match std::env::var(VARIABLE) {
        Ok(value) => Some(parse(&value)?),
        Err(_) => None,
    };
    let _ = ARMED.set(armed);
    Ok(())
}

fn parse(value: &str) -> Result<Armed, String> {
    let (place, panics) = value.strip_suffix("!panic").map_or((value, false), |place| (place, true));
    let (place, count) = place.split_once(':').unwrap_or((place, "1"));
    let (name, job) = place.split_once('@').map_or((place, None), |(name, job)| (name, Some(job.to_owned())));
    if !NAMES.contains(&name) {
        return Err(format!("{VARIABLE}: {name:?} is not one of {}", NAMES.join(", ")));
    }
    match count.parse::<u64>() {
        Ok(left @ 1..) => Ok(Armed { name: name.to_owned(), job, left: AtomicU64::new(left), panics }),
        _ => Err(format!("{VARIABLE}: {count:?} is not a count from 1")),
    }
}

/// Ends the process here if the environment asks for it.
pub fn reach(name: &'static str) {
    reached(name, None);
}

/// Ends the process here if the environment asks for it, for this job or for any.
pub fn reach_with(name: &'static str, job: &JobId) {
    reached(name, Some(job));
}

fn reached(name: &'static str, job: Option<&JobId>) {
    debug_assert!(NAMES.contains(&name), "{name} is not in the list of fail points");
    let Some(Some(armed)) = ARMED.get() else { return };
    let meant = armed.job.as_deref().is_none_or(|wanted| job.is_some_and(|job| job.as_str() == wanted));
    if armed.name == name && meant && armed.left.fetch_sub(1, Ordering::Relaxed) == 1 {
        if armed.panics {
            // As the engine's thread would, while the jobs' own go on.
            std::thread::spawn(|| panic!("asked for by {VARIABLE}"));
        } else {
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_variable_may_say() {
        assert_eq!(parse("after_pull").map(|a| (a.name, a.left.into_inner())), Ok(("after_pull".into(), 1)));
        assert_eq!(parse("before_ack:7").map(|a| a.left.into_inner()), Ok(7));
        let of_a_job = parse("while_running@a-1:2!panic").expect("valid");
        assert_eq!((of_a_job.job.as_deref(), of_a_job.panics), (Some("a-1"), true));
        for (value, fragment) in [("lunch", "lunch"), ("after_pull:0", "\"0\""), ("after_pull:x", "\"x\"")] {
            let error = parse(value).err().unwrap_or_default();
            assert!(error.contains(fragment), "{value}: {error}");
        }
        reach("after_pull");
    }
}
