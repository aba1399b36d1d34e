//! Inputs as typed to requests and jobs: reads the files, then hands over to what is pure.

use std::io::Read;
use std::path::Path;

use bytes::Bytes;
use millrace_crds::job::INPUT_BYTES_MAX;
use millrace_crds::names::JobId;

use crate::args::{Format, InputArgs};
use crate::entries::{self, Problem, Source};
use crate::failure::Failure;
use crate::plan::{self, PlanOptions, PlannedJob};

/// Problems that are listed; the rest is counted.
const PROBLEMS_SHOWN_MAX: usize = 20;

/// Reads and plans all that was named.
///
/// # Errors
/// [`Failure::Usage`] with everything that is wrong, [`Failure::File`].
pub fn plan(args: &InputArgs, claim_checks: bool) -> Result<Vec<PlannedJob>, Failure> {
    if args.pack.is_some() && args.id_from == crate::args::IdFrom::CustomId {
        let message = "--pack: a job of many requests has no custom_id; leave --id-from custom-id out";
        return Err(Failure::Usage(message.to_owned()));
    }
    let sources = sources(args)?;
    let (entries, problems) = entries::read(&sources, &args.parameters);
    refuse(problems)?;
    let options = PlanOptions::new(args, claim_checks);
    plan::plan(&entries, &options).or_else(|problems| refuse(problems).map(|()| Vec::new()))
}

/// Whether any request was named.
pub fn is_named(args: &InputArgs) -> bool {
    !args.files.is_empty() || !args.prompt.is_empty()
}

/// Reads a file of job ids, together with ids as typed.
///
/// # Errors
/// As [`plan()`].
pub fn job_ids(typed: &[String], file: Option<&Path>) -> Result<Vec<JobId>, Failure> {
    let mut text = typed.join("\n") + "\n";
    let name = file.map_or("command line".to_owned(), |path| path.display().to_string());
    if let Some(path) = file {
        let bytes = read(path)?;
        // The file's lines keep their numbers in messages when no id was typed beside it.
        let lines = String::from_utf8_lossy(&bytes);
        text = if typed.is_empty() { lines.into_owned() } else { text + &lines };
    }
    plan::job_ids(&name, &text).or_else(|problems| refuse(problems).map(|()| Vec::new()))
}

fn sources(args: &InputArgs) -> Result<Vec<Source>, Failure> {
    if !is_named(args) {
        let message = "no input: name files, - for standard input, or give --prompt TEXT";
        return Err(Failure::Usage(message.to_owned()));
    }
    let prompts = args.prompt.iter().enumerate().map(|(index, prompt)| {
        Ok(Source {
            name: "--prompt".into(),
            stem: if args.prompt.len() == 1 { "prompt".into() } else { format!("prompt-{}", index + 1) },
            format: Format::Text,
            bytes: Bytes::copy_from_slice(prompt.as_bytes()),
        })
    });
    let files = args.files.iter().map(|path| {
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let stem = stem.filter(|stem| stem != "-").unwrap_or_else(|| "stdin".to_owned());
        let name = path.display().to_string().into();
        Ok(Source { name, stem, format: args.format, bytes: read(path)?.into() })
    });
    prompts.chain(files).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let fail = |e| Failure::file(path.display(), e);
    let limit = INPUT_BYTES_MAX + 1;
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(fail)?;
    } else {
        std::fs::File::open(path).map_err(fail)?.take(limit).read_to_end(&mut bytes).map_err(fail)?;
    }
    if bytes.len() as u64 > INPUT_BYTES_MAX {
        let message = format!("{}: more than {INPUT_BYTES_MAX} bytes; split the file", path.display());
        return Err(Failure::Usage(message));
    }
    Ok(bytes)
}

fn refuse(problems: Vec<Problem>) -> Result<(), Failure> {
    if problems.is_empty() {
        return Ok(());
    }
    let mut lines: Vec<String> = problems.iter().take(PROBLEMS_SHOWN_MAX).map(ToString::to_string).collect();
    if problems.len() > PROBLEMS_SHOWN_MAX {
        lines.push(format!("... and {} more", problems.len() - PROBLEMS_SHOWN_MAX));
    }
    lines.push("nothing was published".to_owned());
    Err(Failure::Usage(lines.join("\n")))
}
