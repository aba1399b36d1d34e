//! The rules of this code base that a program can check, and the invariants within crates: what is absent
//! from where. Those between crates are `architecture.rs`'. Every rule that fails names file, line and rule.
//!
//! An exception stands in [`EXCEPTIONS`] with its reason; one that is no longer needed fails the test too, so
//! that the list can only shrink.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use millrace_tests::source::{code, functions, test_lines};

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 500;
const ARGUMENTS_MAX: usize = 5;
/// rustfmt keeps code within 110 columns; what it leaves alone, comments and texts, may be a little longer.
const COLUMNS_MAX: usize = 120;

/// `(rule, file, reason)`.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("function-length", "worker/src/metrics.rs", "a table of metrics, to be split"),
    (
        "arguments",
        "kernels/src/sampling/tests.rs",
        "a table's row is spread over the arguments; to be a struct",
    ),
    ("names", "gateway/src/http/connections.rs", "a type that the server's trait asks for by this name"),
];

/// Files with `unsafe` outside of `kernels`: the mapping of weight files.
const UNSAFE_ALLOWED: &[&str] = &["engine/src/folder/map.rs"];

/// One file of the project.
struct File {
    /// Relative to the root, with `/`.
    path: String,
    text: String,
}

/// One broken rule.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    rule: &'static str,
    path: String,
    line: usize,
    what: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

/// All text files, without what builds and tools leave behind.
fn files() -> Vec<File> {
    let root = root();
    let mut folders = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the project") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if matches!(name.as_str(), ".git" | "target" | "corpus" | "artifacts" | "__pycache__") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(text) = fs::read_to_string(&path) {
                let relative = path.strip_prefix(&root).expect("below the root");
                found.push(File { path: relative.to_string_lossy().replace('\\', "/"), text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whole files of tests, benchmarks, examples and fuzz targets.
    fn is_test(&self) -> bool {
        let parts: Vec<&str> = self.path.split('/').collect();
        let in_folder = |name: &str| parts[..parts.len() - 1].iter().skip(1).any(|part| *part == name);
        self.path.ends_with("/tests.rs")
            || ["tests", "benches", "examples"].iter().any(|name| in_folder(name))
            || parts[0] == "fuzz"
    }

    fn finding(&self, rule: &'static str, line: usize, what: impl Into<String>) -> Finding {
        Finding { rule, path: self.path.clone(), line, what: what.into() }
    }

    /// Code lines outside of test modules, numbered from 1.
    fn product_lines(&self) -> Vec<(usize, String)> {
        if self.is_test() {
            return Vec::new();
        }
        let blanked = code(&self.text);
        let marks = test_lines(&blanked);
        let kept = blanked.lines().enumerate().filter(|(at, _)| !marks[*at]);
        kept.map(|(at, line)| (at + 1, line.to_owned())).collect()
    }
}

fn sizes(file: &File, found: &mut Vec<Finding>) {
    if !file.text.starts_with("//!") {
        found.push(file.finding("module-docs", 1, "the file does not open with //!"));
    }
    let blanked = code(&file.text);
    let product = test_lines(&blanked).iter().filter(|test| !**test).count();
    if !file.is_test() && product > FILE_LINES_MAX {
        found.push(file.finding("file-length", 1, format!("{product} lines; {FILE_LINES_MAX} are allowed")));
    }
    for function in functions(&blanked) {
        if function.lines > FUNCTION_LINES_MAX {
            let what =
                format!("fn {}: {} lines; {FUNCTION_LINES_MAX} are allowed", function.name, function.lines);
            found.push(file.finding("function-length", function.line, what));
        }
        if function.arguments > ARGUMENTS_MAX {
            let what = format!(
                "fn {}: {} arguments; {ARGUMENTS_MAX} are allowed",
                function.name, function.arguments
            );
            found.push(file.finding("arguments", function.line, what));
        }
    }
    for (at, line) in file.text.lines().enumerate() {
        let columns = line.chars().count();
        if columns > COLUMNS_MAX {
            found.push(file.finding("columns", at + 1, format!("{columns}; {COLUMNS_MAX} are allowed")));
        }
    }
}

fn names(file: &File, found: &mut Vec<Finding>) {
    let blanked = code(&file.text);
    let modules: BTreeSet<&str> = blanked
        .lines()
        .filter_map(|line| line.trim().trim_start_matches("pub ").strip_prefix("mod "))
        .map(|rest| rest.trim_end_matches([';', '{', ' ']))
        .collect();
    for (at, line) in blanked.lines().enumerate() {
        let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        for pair in words.windows(2) {
            let vague = |suffix: &&str| pair[1].ends_with(*suffix);
            if matches!(pair[0], "struct" | "enum" | "trait" | "type")
                && ["Manager", "Helper", "Handler", "Service", "Util", "Utils"].iter().any(vague)
            {
                found.push(file.finding("names", at + 1, format!("{} says nothing", pair[1])));
            }
            if pair[0] == "mod"
                && matches!(pair[1], "util" | "utils" | "helper" | "helpers" | "common" | "misc")
            {
                found.push(file.finding("names", at + 1, format!("mod {} says nothing", pair[1])));
            }
        }
        if let Some(used) = line.trim().strip_prefix("pub use ") {
            let first = used.split("::").next().unwrap_or(used);
            if !matches!(first, "crate" | "self" | "super") && !modules.contains(first) {
                found.push(file.finding("foreign-reexport", at + 1, line.trim()));
            }
        }
    }
}

/// Words that code may not hold. They are put together here, so that this file does not hold them.
fn unfinished(file: &File, found: &mut Vec<Finding>) {
    let words =
        [["to", "do!"], ["FIX", "ME"], ["XX", "X"], ["#[ig", "nore"], ["unimpl", "emented!"], ["db", "g!("]];
    let words: Vec<String> = words.iter().map(|halves| halves.concat()).collect();
    for (at, line) in file.text.lines().enumerate() {
        for word in words.iter().filter(|word| line.contains(word.as_str())) {
            found.push(file.finding("unfinished", at + 1, word.clone()));
        }
    }
}

fn channels(file: &File, found: &mut Vec<Finding>) {
    for (line, text) in file.product_lines() {
        if text.contains("unbounded") && !text.contains("fn ") {
            found.push(file.finding("bounded", line, "an unbounded channel"));
        }
        // What a watch channel is made with is its first value.
        for (at, _) in text.match_indices("channel(").filter(|(at, _)| !text[..*at].ends_with("watch::")) {
            let size = text[at + "channel(".len()..].trim_start();
            if size.starts_with(')') && text.contains("mpsc") {
                found.push(file.finding("bounded", line, "an unbounded channel"));
            }
            if size.starts_with(|c: char| c.is_ascii_digit()) && !size.starts_with("1)") {
                found.push(file.finding("bounded", line, "a channel's size has no name"));
            }
        }
    }
}

fn unsafe_code(file: &File, found: &mut Vec<Finding>) {
    if file.path.starts_with("kernels/") || UNSAFE_ALLOWED.contains(&file.path.as_str()) {
        return;
    }
    let blanked = code(&file.text);
    for (at, line) in blanked.lines().enumerate() {
        if line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe") {
            found.push(file.finding("unsafe", at + 1, line.trim()));
        }
    }
}

/// `(where, what is absent from there, except in)`.
const ABSENCES: &[(&str, &[&str], &[&str])] = &[
    (
        "engine/src/schedule/",
        &[
            "async_nats",
            "aws_sdk",
            "aws_config",
            "serde_json",
            "tokio::net",
            "tokio::fs",
            "tokio::io",
            "tokio::time",
            "tokio::process",
            "Instant",
            "SystemTime",
            "std::fs",
            "std::net",
        ],
        &[],
    ),
    ("engine/src/model/", &["scheduler", "Scheduler", "tokio"], &[]),
    ("engine/src/text/", &["std::net", "tokio::net", "tokio::time", "SystemTime"], &[]),
    ("kernels/src/", &["Sequence"], &[]),
    // Who writes to the API server, and who makes and deletes streams.
    (
        "operator/src/",
        &["PatchParams", "PostParams", "DeleteParams"],
        &["operator/src/apply.rs", "operator/src/status.rs", "operator/src/lease.rs"],
    ),
    (
        "operator/src/",
        &["create_stream", "update_stream", "delete_stream", "create_consumer"],
        &["operator/src/queue.rs"],
    ),
];

fn absences(file: &File, found: &mut Vec<Finding>) {
    for (place, words, except) in ABSENCES {
        if !file.path.starts_with(place) || except.contains(&file.path.as_str()) {
            continue;
        }
        for (line, text) in file.product_lines() {
            for word in words.iter().filter(|word| text.contains(**word)) {
                found.push(file.finding("invariant", line, format!("{place} must not know {word}")));
            }
        }
    }
}

/// Nothing here may depend on one machine or name a package registry's host.
fn machine(file: &File, found: &mut Vec<Finding>) {
    if file.path == "Cargo.lock" || file.path.ends_with("/Cargo.lock") {
        return;
    }
    let words = [
        ["/wo", "rk/"],
        ["/ro", "ot/"],
        ["/fa", "rm/"],
        ["pypi", ".org"],
        ["crates", ".io"],
        ["debian", ".org"],
    ];
    let words: Vec<String> = words.iter().map(|halves| halves.concat()).collect();
    for (at, line) in file.text.lines().enumerate() {
        for word in words.iter().filter(|word| line.contains(word.as_str())) {
            found.push(file.finding("machine", at + 1, word.clone()));
        }
    }
}

fn check(files: &[File]) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in files {
        machine(file, &mut found);
        if file.is_rust() {
            sizes(file, &mut found);
            names(file, &mut found);
            unfinished(file, &mut found);
            channels(file, &mut found);
            unsafe_code(file, &mut found);
            absences(file, &mut found);
        }
    }
    found.sort();
    found
}

#[test]
fn the_code_keeps_its_rules() {
    let found = check(&files());
    let excepted = |finding: &Finding| {
        EXCEPTIONS.iter().position(|(rule, path, _)| *rule == finding.rule && *path == finding.path)
    };
    let used: BTreeSet<usize> = found.iter().filter_map(excepted).collect();
    let broken: Vec<String> = found
        .iter()
        .filter(|finding| excepted(finding).is_none())
        .map(|f| format!("{}:{}: {}: {}", f.path, f.line, f.rule, f.what))
        .collect();
    assert!(broken.is_empty(), "{} findings\n{}", broken.len(), broken.join("\n"));
    let unused: Vec<_> =
        (0..EXCEPTIONS.len()).filter(|at| !used.contains(at)).map(|at| EXCEPTIONS[at]).collect();
    assert!(unused.is_empty(), "these exceptions are no longer needed, remove them: {unused:#?}");
}

/// Each rule finds what it is for: a rule that cannot fail guards nothing.
#[test]
fn every_rule_can_fail() {
    let long = format!(
        "//! Doc.\nfn long(a: u8, b: u8, c: u8, d: u8, e: u8, f: u8) {{\n{}}}\n",
        "    x();\n".repeat(600)
    );
    let cases: &[(&str, &str, &str)] = &[
        ("worker/src/a.rs", "fn a() {}\n", "module-docs"),
        ("worker/src/a.rs", &long, "file-length"),
        ("worker/src/a.rs", &long, "function-length"),
        ("worker/src/a.rs", &long, "arguments"),
        ("worker/src/a.rs", &format!("//! {}\n", "x".repeat(COLUMNS_MAX)), "columns"),
        ("worker/src/a.rs", "//! D.\npub use serde::Serialize;\n", "foreign-reexport"),
        ("worker/src/a.rs", "//! D.\nstruct JobManager;\n", "names"),
        ("worker/src/a.rs", "//! D.\nmod utils;\n", "names"),
        ("worker/src/a.rs", &format!("//! D.\n// {}\n", ["FIX", "ME"].concat()), "unfinished"),
        ("worker/src/a.rs", "//! D.\nfn a() {\n    let x = unbounded_channel();\n}\n", "bounded"),
        ("worker/src/a.rs", "//! D.\nfn a() {\n    let x = mpsc::channel(64);\n}\n", "bounded"),
        ("worker/src/a.rs", "//! D.\nfn a() {\n    unsafe { b() }\n}\n", "unsafe"),
        ("engine/src/schedule/a.rs", "//! D.\nuse std::time::Instant;\n", "invariant"),
        ("kernels/src/a.rs", "//! D.\nstruct Sequence;\n", "invariant"),
        ("operator/src/a.rs", "//! D.\nuse kube::api::PatchParams;\n", "invariant"),
        ("README.md", &format!("see {}x\n", ["/wo", "rk/"].concat()), "machine"),
    ];
    for (path, text, rule) in cases {
        let file = File { path: (*path).to_owned(), text: (*text).to_owned() };
        let found = check(std::slice::from_ref(&file));
        assert!(found.iter().any(|finding| finding.rule == *rule), "{rule} misses {text:?}: {found:?}");
    }
    let clean = File {
        path: "engine/src/schedule/a.rs".into(),
        text: "//! D.\nmod b;\npub use b::C;\n/// Says unsafe and Instant in words.\nfn a() {}\n\
               #[cfg(test)]\nmod tests {\n    use std::time::Instant;\n}\n"
            .into(),
    };
    assert_eq!(check(&[clean]), []);
}

#[test]
fn the_project_is_whole() {
    for file in ["LICENSE", "Cargo.lock", "Makefile", ".ci/run", "CHANGELOG.md", "examples/prompts.jsonl"] {
        assert!(root().join(file).is_file(), "{file} is missing");
    }
    let lock = fs::read_to_string(root().join("Cargo.lock")).expect("the lock file");
    assert!(!lock.contains("\"git+"), "a dependency comes from git; only registries are pinned by digest");
    for member in
        ["crds", "kernels", "engine", "queue", "worker", "gateway", "autoscaler", "operator", "sim", "tests"]
    {
        let manifest = fs::read_to_string(root().join(member).join("Cargo.toml")).expect("a manifest");
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{member} does not take the workspace's lints"
        );
    }
}

#[test]
fn the_code_is_formatted() {
    let present = Command::new("cargo").args(["fmt", "--version"]).output().is_ok_and(|o| o.status.success());
    if !present {
        eprintln!("SKIPPED: cargo fmt is missing: rustup component add rustfmt");
        return;
    }
    let checked = Command::new("cargo").args(["fmt", "--all", "--", "--check"]).current_dir(root()).output();
    let checked = checked.expect("cargo runs");
    assert!(checked.status.success(), "run `make fmt`\n{}", String::from_utf8_lossy(&checked.stdout));
}
