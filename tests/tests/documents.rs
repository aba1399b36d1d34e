//! The documents say what is: commands, options, make targets, links, paths and tests that they name exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use millrace_tests::tools;

/// Programs whose command lines the documents show.
const PROGRAMS: [&str; 4] = ["millrace", "millrace-gateway", "millrace-worker", "millrace-operator"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

/// The pages for people, and the examples.
fn documents() -> Vec<(String, String)> {
    let mut found = vec![root().join("README.md")];
    for folder in ["docs", "examples", "findings"] {
        let entries = fs::read_dir(root().join(folder)).expect("a folder of the project");
        found.extend(entries.map(|entry| entry.expect("an entry").path()));
    }
    let read = |path: PathBuf| {
        let known = path.extension().is_some_and(|e| e == "md" || e == "yaml");
        let name = path.strip_prefix(root()).expect("below the root").display().to_string();
        known.then(|| (name, fs::read_to_string(&path).expect("a text file")))
    };
    let documents: Vec<_> = found.into_iter().filter_map(read).collect();
    assert!(documents.len() > 8, "{} documents were found", documents.len());
    documents
}

/// The pieces of a text that stand for what is typed: code spans, lines of code blocks, comments of examples.
fn typed(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut block = false;
    let mut line_before = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            block = !block;
        } else if block {
            line_before += line.trim_end_matches('\\');
            if !line.ends_with('\\') {
                found.push(std::mem::take(&mut line_before));
            }
        } else {
            let comment = name.ends_with(".yaml") && !line.trim_start().starts_with('#');
            if !comment {
                found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
            }
        }
    }
    found
}

/// Words of a shell line up to its comment, pipe or next command.
fn words(line: &str) -> Vec<String> {
    let line = line.split(" #").next().unwrap_or_default();
    let end = line.find(['|', ';', '&', '>', '<']).unwrap_or(line.len());
    line[..end].split_whitespace().map(|word| word.trim_matches(['[', ']']).to_owned()).collect()
}

/// The command lines of one program in a piece: from its name on.
fn calls(piece: &str, program: &str) -> Option<Vec<String>> {
    let words = words(piece);
    let is_it = |word: &String| Path::new(word).file_name().is_some_and(|name| name == program);
    // Variables may stand before it.
    let at = words.iter().position(|word| !word.contains('=')).filter(|&at| is_it(&words[at]))?;
    Some(words[at + 1..].to_vec())
}

fn help(program: &str, commands: &[String]) -> Option<String> {
    let output = Command::new(tools::program(program).expect("built")).args(commands).arg("--help").output();
    let output = output.expect("it runs");
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What is wrong with a command line: a command or an option that its `--help` does not know.
fn fault_of(program: &str, arguments: &[String]) -> Option<String> {
    let is_command =
        |word: &&String| word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-');
    let mut commands = Vec::new();
    let mut text = help(program, &[])?;
    // Global options and their values may stand before the command.
    for word in arguments.iter().filter(is_command) {
        let listed = text.lines().any(|line| line.trim_start().split(' ').next() == Some(word.as_str()));
        if !listed {
            continue;
        }
        commands.push(word.clone());
        text = help(program, &commands)?;
    }
    let has_commands = text.contains("\nCommands:\n");
    if has_commands && arguments.iter().any(|word| is_command(&word)) {
        return Some(format!("{program} {}: no such command", arguments.join(" ")));
    }
    for option in arguments.iter().filter(|word| word.starts_with("--") && word.len() > 2) {
        let name = option.split('=').next().unwrap_or(option);
        let known = text.split(|c: char| !(c.is_alphanumeric() || c == '-')).any(|word| word == name);
        if !known {
            return Some(format!("{program} {}: {name} is not in its help", arguments.join(" ")));
        }
    }
    None
}

#[test]
fn commands_and_options_exist() {
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    for (name, text) in documents() {
        for piece in typed(&name, &text) {
            for program in PROGRAMS {
                let Some(arguments) = calls(&piece, program) else { continue };
                if seen.insert((program, arguments.clone())) {
                    wrong.extend(fault_of(program, &arguments).map(|fault| format!("{name}: {fault}")));
                }
            }
        }
    }
    assert!(seen.len() > 15, "{} command lines were found", seen.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_wrong_command_line_is_found() {
    let fault = |line: &str| {
        let arguments = calls(line, "millrace").expect("a command line");
        fault_of("millrace", &arguments)
    };
    assert!(fault("millrace upload FOLDER").is_some());
    assert!(fault("millrace -m smollm2 submit FILE --waits").is_some());
    assert_eq!(fault("NATS_URL=x target/release/millrace -m smollm2 submit FILE --wait | head"), None);
    assert_eq!(fault("millrace import FILE.gguf --out FOLDER"), None);
}

#[test]
fn make_targets_exist() {
    let makefile = fs::read_to_string(root().join("Makefile")).expect("the Makefile");
    let is_target = |name: &str| makefile.lines().any(|line| line.starts_with(&format!("{name}:")));
    let mut count = 0;
    for (name, text) in documents() {
        for piece in typed(&name, &text) {
            let Some(arguments) = calls(&piece, "make") else { continue };
            for target in arguments.iter().filter(|word| !word.contains('=')) {
                assert!(is_target(target), "{name}: `make {target}` is no target of the Makefile");
                count += 1;
            }
        }
    }
    assert!(count > 5, "{count} targets are named");
}

#[test]
fn links_and_paths_lead_somewhere() {
    let folders =
        ["crds/", "kernels/", "engine/", "queue/", "worker/", "gateway/", "autoscaler/", "operator/"];
    let more = ["sim/", "tests/", "docs/", "examples/", "scripts/", "charts/", "findings/", "fuzz/"];
    let mut count = 0;
    for (name, text) in documents() {
        let folder = root().join(&name).parent().expect("a folder").to_owned();
        let linked = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let linked = linked.filter(|link| !link.contains("://") && !link.starts_with(['#', '[']));
        let linked = linked.map(|link| folder.join(link.split('#').next().unwrap_or(link)));
        let spans = text.split('`').skip(1).step_by(2).filter(|span| {
            let is_path = folders.iter().chain(&more).any(|folder| span.starts_with(folder));
            is_path && !span.contains([' ', '*', '<', '{', '\n']) && !span.chars().any(char::is_uppercase)
                || is_path && span.ends_with(".md") && !span.contains("NAME")
        });
        for path in linked.chain(spans.map(|span| root().join(span))) {
            assert!(path.exists(), "{name} names {}, which is not there", path.display());
            count += 1;
        }
    }
    assert!(count > 60, "{count} paths are named");
}

/// Names of functions below the folders of tests and sources.
fn functions() -> BTreeSet<String> {
    let mut folders = vec![root()];
    let mut found = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of the project") {
            let path = entry.expect("an entry").path();
            let skipped = path.ends_with("target") || path.ends_with(".git");
            if path.is_dir() && !skipped {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("a text file");
                let names = text.match_indices("fn ").map(|(at, head)| &text[at + head.len()..]);
                let name = |rest: &str| {
                    rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned)
                };
                found.extend(names.filter_map(name));
            }
        }
    }
    found
}

/// A promise names the test that shows it, as `file::test`.
#[test]
fn tests_that_promises_name_exist() {
    let functions = functions();
    let mut count = 0;
    for (name, text) in
        documents().into_iter().filter(|(name, _)| name == "README.md" || name == "docs/protocol.md")
    {
        for span in text.split('`').skip(1).step_by(2) {
            let Some((file, test)) = span.split_once("::") else { continue };
            if [file, test]
                .iter()
                .all(|part| part.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit()))
            {
                assert!(functions.contains(test), "{name} names the test {span}, which does not exist");
                count += 1;
            }
        }
    }
    assert!(count > 15, "{count} tests are named");
}
