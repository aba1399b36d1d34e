//! How the process ends when it cannot work: a closed set of codes, each with one exit code.
//!
//! The codes are a promise to whoever starts the process: an operator tells from them whether to change the
//! configuration, to replace the model's files, or to wait. What is none of the known refusals is `FAILED`.
//! The message beside the code says each cause once.

use std::fmt;
use std::process::ExitCode;

use millrace_engine::folder::FolderError;
use millrace_engine::import::ImportError;
use millrace_engine::start::StartError;
use millrace_engine::text::prompt::TextError;
use millrace_queue::broker::BrokerError;
use millrace_queue::store::StoreError;

use crate::config::WorkerConfigError;
use crate::weights::PullError;

/// The exit codes, as `--help` prints them.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  FAILED: anything else; the message says what
  2  CONFIG_INVALID: an option or a field of the configuration is wrong
  3  MODEL_INVALID: the model's files are not those of a model that can be served
  4  MODEL_UNAVAILABLE: the model's files cannot be had; trying again may help
  5  BROKER_REFUSED: the broker lets this worker's login or certificate in no more";

/// Why the process cannot work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// An option or a field of the configuration is wrong.
    ConfigInvalid,
    /// The model's files are not those of a model that can be served, or not those that are wanted.
    ModelInvalid,
    /// The model's files cannot be had.
    ModelUnavailable,
    /// The broker lets this login or certificate in no more.
    BrokerRefused,
    /// Anything else.
    Failed,
}

impl Ending {
    /// All of them.
    pub const ALL: [Ending; 5] = [
        Ending::ConfigInvalid,
        Ending::ModelInvalid,
        Ending::ModelUnavailable,
        Ending::BrokerRefused,
        Ending::Failed,
    ];

    /// Finds the refusal behind an error, whatever was said around it.
    pub fn of(error: &anyhow::Error) -> Self {
        if error.downcast_ref::<WorkerConfigError>().is_some() {
            return Ending::ConfigInvalid;
        }
        if error.downcast_ref::<TextError>().is_some() || error.downcast_ref::<ImportError>().is_some() {
            return Ending::ModelInvalid;
        }
        match error.downcast_ref::<BrokerError>() {
            Some(BrokerError::Config { .. }) => return Ending::ConfigInvalid,
            Some(BrokerError::Refused(_)) => return Ending::BrokerRefused,
            _ => {}
        }
        if let Some(error) = error.downcast_ref::<StartError>() {
            return Self::of_start(error);
        }
        error.downcast_ref::<PullError>().map_or(Ending::Failed, Self::of_pull)
    }

    fn of_start(error: &StartError) -> Self {
        match error {
            StartError::Config(_) | StartError::Files(_) | StartError::Bind(_) => Ending::ModelInvalid,
            StartError::Field { .. } | StartError::Cache { .. } | StartError::Plan(_) => {
                Ending::ConfigInvalid
            }
            _ => Ending::Failed,
        }
    }

    fn of_pull(error: &PullError) -> Self {
        match error {
            PullError::Scheme(_)
            | PullError::Store(
                StoreError::Address(_) | StoreError::Credentials { .. } | StoreError::Config { .. },
            ) => Ending::ConfigInvalid,
            PullError::Folder(FolderError::Io { .. }) | PullError::Store(_) | PullError::Disk { .. } => {
                Ending::ModelUnavailable
            }
            PullError::Folder(_) | PullError::TooLarge { .. } | PullError::Digest { .. } => {
                Ending::ModelInvalid
            }
        }
    }

    /// The code as it stands in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Ending::ConfigInvalid => "CONFIG_INVALID",
            Ending::ModelInvalid => "MODEL_INVALID",
            Ending::ModelUnavailable => "MODEL_UNAVAILABLE",
            Ending::BrokerRefused => "BROKER_REFUSED",
            Ending::Failed => "FAILED",
        }
    }

    /// The exit code.
    pub fn number(self) -> u8 {
        match self {
            Ending::Failed => 1,
            Ending::ConfigInvalid => 2,
            Ending::ModelInvalid => 3,
            Ending::ModelUnavailable => 4,
            Ending::BrokerRefused => 5,
        }
    }
}

/// An error and its causes in one line. Many errors already say what caused them; what was said is not repeated.
pub fn message(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| {
        if said.is_empty() {
            cause
        } else if said.ends_with(&cause) {
            said
        } else {
            format!("{said}: {cause}")
        }
    })
}

impl From<Ending> for ExitCode {
    fn from(ending: Ending) -> Self {
        ExitCode::from(ending.number())
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn the_refusal_is_found_behind_what_was_said_around_it() {
        let refused: Result<(), _> = Err(PullError::from(FolderError::NoModel("/models/a".into())));
        let error = refused.context("the model").context("the start").unwrap_err();
        assert_eq!(Ending::of(&error), Ending::ModelInvalid);
        assert_eq!(Ending::of(&anyhow::anyhow!("a broken pipe")), Ending::Failed);
        let store = PullError::Store(StoreError::Address("s3:/x".into()));
        assert_eq!(Ending::of(&store.into()), Ending::ConfigInvalid);
        assert_eq!(Ending::of(&BrokerError::Refused("no".into()).into()), Ending::BrokerRefused);
    }

    #[test]
    fn each_cause_is_said_once() {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let says_its_cause = FolderError::Io { path: "/models/a".into(), source: missing() };
        let error = anyhow::Error::from(says_its_cause).context("the model");
        assert_eq!(message(&error), "the model: /models/a: entity not found");
        let error = anyhow::Error::from(missing()).context("the model");
        assert_eq!(message(&error), "the model: entity not found");
    }

    #[test]
    fn the_help_lists_every_code() {
        for ending in Ending::ALL {
            assert!(EXIT_CODES.contains(&format!("{}  {ending}: ", ending.number())), "{ending}");
        }
    }
}
