//! How a command ends: its verdict or its failure, each with one exit code.
//!
//! The codes are a promise to scripts; `millrace --help` prints this table.

use std::process::ExitCode;

/// The exit codes, as `--help` prints them.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    done, but not all well: jobs rejected or dead, a check failed, something differs
  2    wrong use or bad input; nothing was published
  3    the broker cannot be reached or refuses the login
  4    the model's streams do not exist; `millrace provision` makes them
  5    nothing progressed for as long as --timeout says
  6    the broker or the object store refused a request
  7    a file cannot be read or written
  130  interrupted; what was written stays valid, and the same command goes on from there";

/// How a command that ran to its end came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Everything is well.
    Well,
    /// It ran, and found something that is not well.
    Unwell,
}

impl Verdict {
    /// Well when `well` holds.
    pub fn of(well: bool) -> Self {
        if well { Verdict::Well } else { Verdict::Unwell }
    }

    /// The exit code.
    pub fn code(self) -> ExitCode {
        match self {
            Verdict::Well => ExitCode::from(0),
            Verdict::Unwell => ExitCode::from(1),
        }
    }
}

/// Why a command could not run to its end. Each message names what was wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// An option or an input is wrong.
    #[error("{0}")]
    Usage(String),
    /// No connection.
    #[error("--server {server}: {reason}")]
    Unreachable {
        /// The address as given.
        server: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A stream or consumer of the model is missing.
    #[error(
        "stream {stream} does not exist; \
         `millrace provision --namespace {namespace} --model {model}` makes it"
    )]
    NotProvisioned {
        /// Its name.
        stream: String,
        /// The model's namespace.
        namespace: String,
        /// The model's name.
        model: String,
    },
    /// Time ran out.
    #[error("{0}")]
    Stalled(String),
    /// The broker or the object store refused.
    #[error("{0}")]
    Refused(String),
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Ctrl-C.
    #[error("interrupted; {0}")]
    Interrupted(String),
}

impl Failure {
    /// A failure of a file.
    pub fn file(path: impl std::fmt::Display, source: std::io::Error) -> Self {
        Failure::File { path: path.to_string(), source }
    }

    /// One word of a closed set, for machines.
    pub fn category(&self) -> &'static str {
        match self {
            Failure::Usage(_) => "usage",
            Failure::Unreachable { .. } => "unreachable",
            Failure::NotProvisioned { .. } => "not_provisioned",
            Failure::Stalled(_) => "stalled",
            Failure::Refused(_) => "refused",
            Failure::File { .. } => "file",
            Failure::Interrupted(_) => "interrupted",
        }
    }

    /// The exit code's number.
    pub fn number(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            Failure::Unreachable { .. } => 3,
            Failure::NotProvisioned { .. } => 4,
            Failure::Stalled(_) => 5,
            Failure::Refused(_) => 6,
            Failure::File { .. } => 7,
            Failure::Interrupted(_) => 130,
        }
    }

    /// The exit code.
    pub fn code(&self) -> ExitCode {
        ExitCode::from(self.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_is_in_the_printed_table() {
        let failures = [
            Failure::Usage(String::new()),
            Failure::Unreachable { server: String::new(), reason: String::new() },
            Failure::NotProvisioned { stream: String::new(), namespace: String::new(), model: String::new() },
            Failure::Stalled(String::new()),
            Failure::Refused(String::new()),
            Failure::file("x", std::io::Error::other("y")),
            Failure::Interrupted(String::new()),
        ];
        let mut numbers: Vec<u8> = failures.iter().map(Failure::number).collect();
        for number in &numbers {
            let start = format!("  {number:<4} ");
            assert!(EXIT_CODES.lines().any(|line| line.starts_with(&start)), "{number}");
        }
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), failures.len());
    }
}
