//! The architecture as a test: which crate may know which, which public type has which name, and which files of the
//! CPU kernels may import each other. `docs/architecture.md` says the same for people.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use millrace_tests::source::{code, test_lines};
use serde_json::Value;

/// What each crate may depend on, of ours.
const ARROWS: &[(&str, &[&str])] = &[
    ("crds", &[]),
    ("kernels", &[]),
    ("engine", &["crds", "kernels"]),
    ("queue", &["crds"]),
    ("worker", &["crds", "engine", "kernels", "queue"]),
    ("gateway", &["crds", "queue"]),
    ("autoscaler", &["crds"]),
    ("operator", &["autoscaler", "crds", "queue"]),
    ("sim", &["autoscaler", "crds"]),
    ("tests", &["crds", "engine", "kernels", "queue", "worker"]),
];

/// `(arguments of cargo tree, what is absent from all that the crate is built with)`.
const NEVER: &[(&[&str], &[&str])] = &[
    (&["millrace-kernels"], &["cudarc", "serde", "tokio"]),
    (&["millrace-engine"], &["async-nats", "aws-sdk-s3", "axum", "candle-core", "cudarc", "kube"]),
    (&["millrace-queue"], &["candle-core", "cudarc", "kube", "millrace-kernels", "tokenizers"]),
    (&["millrace-worker"], &["candle-core", "k8s-openapi", "kube"]),
    (&["millrace-worker", "--no-default-features"], &["cudarc"]),
    (&["millrace-autoscaler"], &["anyhow", "async-nats", "kube", "tokio"]),
    (&["millrace-sim"], &["async-nats", "kube", "tokio"]),
    (&["millrace-gateway"], &["candle-core", "cudarc", "kube", "millrace-engine", "tokenizers"]),
    (&["millrace-operator"], &["aws-sdk-s3", "candle-core", "cudarc", "millrace-kernels", "tokenizers"]),
];

/// Public types that share their name, with the reason.
const SHARED_NAMES: &[(&str, &str)] = &[
    ("Activation", "the rows of an activation buffer, on each device"),
    ("Arena", "all memory of a step, on each device"),
    ("Epilogue", "what becomes of a product's sums, on each device"),
    ("Matrix", "a loaded weight matrix, on each device"),
    ("Vector", "a loaded weight vector, on each device"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

fn cargo(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    let output = command.args(arguments).args(["--locked", "--offline"]).current_dir(root()).output();
    let output = output.expect("cargo runs");
    assert!(output.status.success(), "cargo {arguments:?}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("cargo prints text")
}

#[test]
fn arrows_between_crates_point_down() {
    let metadata = cargo(&["metadata", "--no-deps", "--format-version", "1"]);
    let metadata: Value = serde_json::from_str(&metadata).expect("JSON");
    let mut found = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let own =
            |name: &Value| name.as_str().and_then(|name| name.strip_prefix("millrace-")).map(str::to_owned);
        let dependencies = package["dependencies"].as_array().expect("dependencies").iter();
        let normal = dependencies.filter(|dependency| dependency["kind"].is_null());
        let targets: BTreeSet<String> = normal.filter_map(|dependency| own(&dependency["name"])).collect();
        found.insert(own(&package["name"]).expect("our packages are called millrace-"), targets);
    }
    let allowed: BTreeMap<String, BTreeSet<String>> = ARROWS
        .iter()
        .map(|(from, to)| ((*from).to_owned(), to.iter().map(|name| (*name).to_owned()).collect()))
        .collect();
    assert_eq!(found, allowed, "left: the manifests; right: the architecture");
}

#[test]
fn what_a_crate_must_not_know_is_not_built_with_it() {
    for (arguments, absent) in NEVER {
        let tree = cargo(
            &[&["tree", "-e", "normal", "--prefix", "none", "--format", "{p}", "-p"], *arguments].concat(),
        );
        let built: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
        assert!(built.contains(arguments[0]) && built.len() > 5, "cargo tree {arguments:?} says too little");
        let wrong: Vec<_> = absent.iter().filter(|name| built.contains(**name)).collect();
        assert!(wrong.is_empty(), "{arguments:?} is built with {wrong:?}");
    }
}

/// Rust files below a folder, without tests.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of the project") {
        let path = entry.expect("an entry").path();
        if path.is_dir() && !path.ends_with("tests") {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

/// The product's code of a file, without comments, literals and test modules.
fn product(path: &Path) -> String {
    let blanked = code(&fs::read_to_string(path).expect("a file of the project"));
    let tests = test_lines(&blanked);
    let kept = blanked.lines().zip(tests).filter(|(_, test)| !test).map(|(line, _)| line);
    kept.collect::<Vec<_>>().join("\n")
}

/// Public types by name, with the files that define them.
fn public_types() -> BTreeMap<String, Vec<String>> {
    let mut files = Vec::new();
    for (member, _) in ARROWS {
        sources(&root().join(member).join("src"), &mut files);
    }
    let mut types: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in files {
        for line in product(&path).lines() {
            let Some(rest) = line.trim_start().strip_prefix("pub ") else { continue };
            let mut words = rest.split(|c: char| !c.is_alphanumeric() && c != '_');
            if matches!(words.next(), Some("struct" | "enum" | "trait" | "type" | "union")) {
                let name = words.next().unwrap_or_default().to_owned();
                let relative = path.strip_prefix(root()).expect("below the root");
                types.entry(name).or_default().push(relative.display().to_string());
            }
        }
    }
    // An associated type of a trait is no type of its own.
    types.retain(|name, _| name.chars().next().is_some_and(char::is_uppercase));
    types
}

#[test]
fn one_public_type_a_name() {
    let types = public_types();
    assert!(types.len() > 300, "{} public types were found", types.len());
    let shared: BTreeMap<&str, &Vec<String>> = types
        .iter()
        .filter(|(_, files)| files.len() > 1)
        .map(|(name, files)| (name.as_str(), files))
        .collect();
    let allowed: BTreeSet<&str> = SHARED_NAMES.iter().map(|(name, _)| *name).collect();
    let wrong: Vec<_> = shared.iter().filter(|(name, _)| !allowed.contains(**name)).collect();
    assert!(wrong.is_empty(), "give each a name of its own, or a reason: {wrong:#?}");
    let unused: Vec<_> = allowed.iter().filter(|name| !shared.contains_key(**name)).collect();
    assert!(unused.is_empty(), "no longer shared, remove them: {unused:?}");
}

/// Each noun that the page explains is a public type of the workspace.
#[test]
fn the_nouns_of_the_page_exist() {
    let page = fs::read_to_string(root().join("docs/architecture.md")).expect("the page");
    let table = page.split("<!-- nouns -->").nth(1).and_then(|rest| rest.split("<!-- /nouns -->").next());
    let types = public_types();
    let mut count = 0;
    for row in table.expect("the marked table").lines().filter(|line| line.starts_with("| `")) {
        let noun = row.trim_start_matches("| `").split('`').next().unwrap_or_default();
        assert!(types.contains_key(noun), "docs/architecture.md explains {noun}, which is no public type");
        count += 1;
    }
    assert!(count >= 20, "{count} nouns are explained");
}

/// Names of sibling files that code imports: `super::name`, `super::{a, b}` and `crate::cpu::name`.
fn siblings(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for head in ["super::", "crate::cpu::"] {
        for (at, _) in code.match_indices(head) {
            if code[..at].ends_with("super::") {
                continue;
            }
            let rest = &code[at + head.len()..];
            let group = rest.strip_prefix('{').and_then(|rest| rest.split('}').next());
            for part in group.map_or_else(|| vec![rest], |group| group.split(',').collect()) {
                let end = part.trim_start().split(|c: char| !c.is_alphanumeric() && c != '_').next();
                found.extend(end.filter(|name| !name.is_empty()).map(str::to_owned));
            }
        }
    }
    found
}

/// A circle in the graph, if there is one.
fn circle(graph: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    let mut left = graph.clone();
    loop {
        let known: BTreeSet<String> = left.keys().cloned().collect();
        let free: Vec<String> =
            left.iter().filter(|(_, to)| to.is_disjoint(&known)).map(|(from, _)| from.clone()).collect();
        if free.is_empty() {
            return (!left.is_empty()).then(|| known.into_iter().collect());
        }
        free.iter().for_each(|name| drop(left.remove(name)));
    }
}

#[test]
fn the_cpu_kernels_import_one_way() {
    let mut files = Vec::new();
    sources(&root().join("kernels/src/cpu"), &mut files);
    let name = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let flat = files.iter().filter(|path| !path.ends_with("mod.rs"));
    let mut graph: BTreeMap<String, BTreeSet<String>> =
        flat.map(|path| (name(path), siblings(&product(path)))).collect();
    let known: BTreeSet<String> = graph.keys().cloned().collect();
    for (from, to) in &mut graph {
        to.retain(|name| known.contains(name) && name != from);
    }
    assert!(graph.values().map(BTreeSet::len).sum::<usize>() > 20, "{graph:?}");
    assert_eq!(circle(&graph), None, "these files, or some of them, import each other");
}

#[test]
fn a_circle_is_found() {
    let graph = |edges: &[(&str, &str)]| {
        let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in edges {
            graph.entry((*from).to_owned()).or_default().insert((*to).to_owned());
            graph.entry((*to).to_owned()).or_default();
        }
        circle(&graph)
    };
    assert_eq!(graph(&[("a", "b"), ("b", "c"), ("a", "c")]), None);
    assert_eq!(graph(&[("a", "b"), ("b", "c"), ("c", "b")]), Some(vec!["a".into(), "b".into(), "c".into()]));
    let code =
        "use super::tile::LANES;\nuse super::{arena, pack::Matrix};\nlet x = crate::cpu::rows::cut();\n";
    assert_eq!(siblings(code), ["arena", "pack", "rows", "tile"].map(str::to_owned).into());
    assert_eq!(siblings("use super::super::other;"), BTreeSet::from(["super".to_owned()]));
}
