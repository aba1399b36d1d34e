//! `millrace-worker`, which has the engine: what reads model files is one of its commands.
//!
//! The program is the one beside this one, else the one of the `PATH`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use millrace_crds::check::Check;

use crate::args::{DoctorArgs, Global};
use crate::failure::{Failure, Verdict};

const PROGRAM: &str = "millrace-worker";
/// Its exit code when the model's files cannot be had.
const UNAVAILABLE: i32 = 4;

fn program() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(PROGRAM));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| PROGRAM.into())
}

fn missing(error: &std::io::Error) -> String {
    format!("{PROGRAM}: {error}; install it beside this program or in the PATH, for it has the engine")
}

/// Runs one of its commands in the place of this process's own.
///
/// # Errors
/// [`Failure::Usage`] when it refuses what it was given; it has said why.
pub fn run(command: &str, global: &Global, words: &[OsString]) -> Result<Verdict, Failure> {
    let status = Command::new(program())
        .arg(command)
        .args(global.json.then_some("--json"))
        .args(words)
        .status()
        .map_err(|error| Failure::Usage(missing(&error)))?;
    match (command, status.code()) {
        (_, Some(0)) => Ok(Verdict::Well),
        ("check", Some(1)) => Ok(Verdict::Unwell),
        (_, Some(UNAVAILABLE)) => Err(Failure::Refused(format!("{PROGRAM} {command}: {status}"))),
        _ => Err(Failure::Usage(format!("{PROGRAM} {command}: {status}"))),
    }
}

/// What it finds in the model folder that the doctor was given.
pub fn check(args: &DoctorArgs) -> Vec<Check> {
    const NAME: &str = "model folder";
    let Some(uri) = &args.model_uri else {
        return vec![Check::warn(NAME, "not looked at", "give --model-uri s3://bucket/prefix")];
    };
    let mut command = Command::new(program());
    command.args(["check", "--json"]).args(words(args)).arg("--").arg(uri);
    match command.stdin(Stdio::null()).stderr(Stdio::inherit()).output() {
        Err(error) => {
            let fix = "look from a machine that has the worker's program";
            vec![Check::warn(NAME, missing(&error), fix)]
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let checks: Vec<Check> =
                text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            if checks.is_empty() {
                let found = format!("{PROGRAM} check: {}", output.status);
                return vec![Check::fail(NAME, found, "see what it says above")];
            }
            checks
        }
    }
}

fn words(args: &DoctorArgs) -> Vec<OsString> {
    let store = &args.store;
    let option = |name: &str, value: Option<&OsStr>| {
        value.map_or_else(Vec::new, |value| vec![OsString::from(name), value.to_owned()])
    };
    let mut words = option("--s3-endpoint", store.s3_endpoint.as_deref().map(OsStr::new));
    words.extend(option("--s3-region", store.s3_region.as_deref().map(OsStr::new)));
    words.extend(option(
        "--s3-credentials-dir",
        store.s3_credentials_dir.as_deref().map(|dir| dir.as_os_str()),
    ));
    words.extend(store.s3_path_style.then(|| "--s3-path-style".into()));
    words
}
