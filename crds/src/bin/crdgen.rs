//! Prints what is generated from the custom resource's types: the CustomResourceDefinition as YAML, the field
//! reference or the runbook as Markdown. It writes no file.

use std::process::ExitCode;

use millrace_crds::model::{definition, docs};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        None | Some("crd") => print!("{}", definition::yaml()),
        Some("reference") => print!("{}", docs::reference()),
        Some("runbook") => print!("{}", docs::runbook()),
        Some(other) => {
            eprintln!("crdgen: {other:?} is not crd, reference or runbook");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
