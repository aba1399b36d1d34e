//! Names on the wire: one validated token type, and every subject, stream and consumer name made from it.
//!
//! Subjects have fixed arity, so a name that could hold a dot, a space or a wildcard must never reach them:
//! the types here can only be made from checked text.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest namespace or model name, in bytes. Kubernetes allows 63 for a namespace.
pub const TOKEN_BYTES_MAX: usize = 63;
/// Longest job id, in bytes.
pub const JOB_ID_BYTES_MAX: usize = 128;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty or longer than the limit.
    #[error("{what} {value:?} has {length} bytes; 1 to {limit} are allowed")]
    Length {
        /// What kind of name it is.
        what: &'static str,
        /// The refused text, cut to 80 characters.
        value: String,
        /// Its length in bytes.
        length: usize,
        /// The longest length allowed.
        limit: usize,
    },
    /// A character is not allowed where it stands.
    #[error("{what} {value:?} must match {pattern}")]
    Pattern {
        /// What kind of name it is.
        what: &'static str,
        /// The refused text, cut to 80 characters.
        value: String,
        /// The pattern that it must match.
        pattern: &'static str,
    },
}

/// What a kind of name looks like.
struct Form {
    what: &'static str,
    bytes_max: usize,
    pattern: &'static str,
    /// Bytes allowed at both ends and between.
    edge: fn(u8) -> bool,
    /// Bytes allowed between the ends only.
    separators: &'static [u8],
}

const TOKEN: Form = Form {
    what: "name",
    bytes_max: TOKEN_BYTES_MAX,
    pattern: "[a-z0-9]([-a-z0-9]*[a-z0-9])?",
    edge: |b| b.is_ascii_lowercase() || b.is_ascii_digit(),
    separators: b"-",
};

const JOB_ID: Form = Form {
    what: "job id",
    bytes_max: JOB_ID_BYTES_MAX,
    pattern: "[A-Za-z0-9]([-_A-Za-z0-9]*[A-Za-z0-9])?",
    edge: |b| b.is_ascii_alphanumeric(),
    separators: b"-_",
};

impl Form {
    fn check(&self, value: &str) -> Result<(), NameError> {
        let shown = || value.chars().take(80).collect::<String>();
        let bytes = value.as_bytes();
        if bytes.is_empty() || bytes.len() > self.bytes_max {
            let (what, length, limit) = (self.what, bytes.len(), self.bytes_max);
            return Err(NameError::Length { what, value: shown(), length, limit });
        }
        let edges = (self.edge)(bytes[0]) && (self.edge)(bytes[bytes.len() - 1]);
        if !edges || !bytes.iter().all(|b| (self.edge)(*b) || self.separators.contains(b)) {
            return Err(NameError::Pattern { what: self.what, value: shown(), pattern: self.pattern });
        }
        Ok(())
    }
}

/// One subject token: `[a-z0-9]([-a-z0-9]*[a-z0-9])?`, at most [`TOKEN_BYTES_MAX`] bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct SubjectToken(
    #[schemars(length(max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))] String,
);

impl FromStr for SubjectToken {
    type Err = NameError;
    fn from_str(value: &str) -> Result<Self, NameError> {
        TOKEN.check(value)?;
        Ok(Self(value.to_owned()))
    }
}

/// A job id: `[A-Za-z0-9]([-_A-Za-z0-9]*[A-Za-z0-9])?`, at most [`JOB_ID_BYTES_MAX`] bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(
    #[schemars(length(max = 128), regex(pattern = r"^[A-Za-z0-9]([-_A-Za-z0-9]*[A-Za-z0-9])?$"))] String,
);

/// Where a job's message lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobPlace {
    /// When its JOBS stream was created, in Unix milliseconds.
    pub stream_created_ms: u64,
    /// Its sequence in that stream.
    pub sequence: u64,
}

impl JobId {
    /// The id of a job that came without one: `seq-`, the creation of the JOBS stream in Unix milliseconds, and the
    /// message's sequence. Every delivery of a message has the same id, and a stream that was made anew other ones.
    pub fn of_place(place: JobPlace) -> Self {
        Self(format!("seq-{}-{}", place.stream_created_ms, place.sequence))
    }

    /// The id under which a job is refused whose own id was used before with another body; `published_ms` is when
    /// the broker stored it. An id that would be too long loses bytes before its end.
    pub fn reused(&self, published_ms: i64, sequence: u64) -> Self {
        let ending = format!("-dup-{}-{sequence}", published_ms.unsigned_abs());
        let stem = &self.0[..self.0.len().min(JOB_ID_BYTES_MAX.saturating_sub(ending.len()))];
        Self(format!("{stem}{ending}"))
    }
}

impl FromStr for JobId {
    type Err = NameError;
    fn from_str(value: &str) -> Result<Self, NameError> {
        JOB_ID.check(value)?;
        Ok(Self(value.to_owned()))
    }
}

macro_rules! text {
    ($($name:ident),*) => {$(
        impl $name {
            /// The checked text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(value: String) -> Result<Self, NameError> {
                value.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }
    )*};
}
text!(SubjectToken, JobId);

/// A job's class of service. Workers serve the classes by weight; none starves.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Served first by weight.
    High,
    /// The default.
    #[default]
    Normal,
    /// Served with what the others leave, and at least its weight.
    Low,
}

impl Class {
    /// All classes, most urgent first.
    pub const ALL: [Class; 3] = [Class::High, Class::Normal, Class::Low];

    /// The subject token.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::High => "high",
            Class::Normal => "normal",
            Class::Low => "low",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Class {
    type Err = NameError;
    fn from_str(value: &str) -> Result<Self, NameError> {
        Class::ALL.into_iter().find(|class| class.as_str() == value).ok_or_else(|| NameError::Pattern {
            what: "class",
            value: value.chars().take(80).collect(),
            pattern: "high|normal|low",
        })
    }
}

/// One model's address: its namespace and name, from which all names on the wire follow.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelRef {
    /// The Kubernetes namespace, or `default` outside of Kubernetes.
    pub namespace: SubjectToken,
    /// The name of the InferenceModel.
    pub name: SubjectToken,
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl ModelRef {
    /// A model's address from unchecked text.
    ///
    /// # Errors
    /// When either part is not a [`SubjectToken`].
    pub fn new(namespace: &str, name: &str) -> Result<Self, NameError> {
        Ok(Self { namespace: namespace.parse()?, name: name.parse()? })
    }

    fn subject(&self, kind: &str, last: &str) -> String {
        format!("millrace.{kind}.{}.{}.{last}", self.namespace, self.name)
    }

    /// Where jobs of a class are published.
    pub fn jobs_subject(&self, class: Class) -> String {
        self.subject("jobs", class.as_str())
    }

    /// Where the one outcome of a job is stored.
    pub fn result_subject(&self, job: &JobId) -> String {
        self.subject("results", job.as_str())
    }

    /// All outcomes of this model.
    pub fn results_wildcard(&self) -> String {
        self.subject("results", "*")
    }

    /// Where the copy of a job that was given up is stored.
    pub fn dead_subject(&self, job: &JobId) -> String {
        self.subject("dead", job.as_str())
    }

    /// All dead letters of this model.
    pub fn dead_wildcard(&self) -> String {
        self.subject("dead", "*")
    }

    /// Where the token deltas of a job are published, best effort.
    pub fn tokens_subject(&self, job: &JobId) -> String {
        self.subject("tokens", job.as_str())
    }

    /// All token deltas of the model.
    pub fn tokens_wildcard(&self) -> String {
        self.subject("tokens", "*")
    }

    /// Where a job is cancelled. The RESULTS stream stores what is published here, as the marker that
    /// outlives a restart; running workers hear the very same message.
    pub fn cancel_subject(&self, job: &JobId) -> String {
        self.subject("cancel", job.as_str())
    }

    /// Where the ledger of a job's attempts is kept, once the job was delivered a second time.
    pub fn attempts_subject(&self, job: &JobId) -> String {
        self.subject("attempts", job.as_str())
    }

    /// All ledgers of attempts of this model.
    pub fn attempts_wildcard(&self) -> String {
        self.subject("attempts", "*")
    }

    /// All cancellations of this model.
    pub fn cancel_wildcard(&self) -> String {
        self.subject("cancel", "*")
    }

    /// Where a worker publishes its load report.
    pub fn load_subject(&self, worker: &SubjectToken) -> String {
        self.subject("load", worker.as_str())
    }

    /// All load reports of this model.
    pub fn load_wildcard(&self) -> String {
        self.subject("load", "*")
    }

    /// The work-queue stream of this model's jobs.
    pub fn jobs_stream(&self) -> String {
        format!("JOBS_{}_{}", self.namespace, self.name)
    }

    /// The stream of outcomes, cancel markers and ledgers of attempts.
    pub fn results_stream(&self) -> String {
        format!("RESULTS_{}_{}", self.namespace, self.name)
    }

    /// The stream of dead letters.
    pub fn dead_stream(&self) -> String {
        format!("DEAD_{}_{}", self.namespace, self.name)
    }

    /// The durable pull consumer of one class, shared by all workers.
    pub fn consumer(&self, class: Class) -> String {
        format!("workers-{class}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn subjects_have_five_tokens() {
        let model = ModelRef::new("team-a", "smollm2").unwrap();
        let job: JobId = "Job_1-x".parse().unwrap();
        let worker: SubjectToken = "worker-0".parse().unwrap();
        let subjects = [
            model.jobs_subject(Class::High),
            model.result_subject(&job),
            model.dead_subject(&job),
            model.tokens_subject(&job),
            model.cancel_subject(&job),
            model.attempts_subject(&job),
            model.load_subject(&worker),
        ];
        for subject in subjects {
            assert_eq!(subject.split('.').count(), 5, "{subject}");
        }
        assert_eq!(model.jobs_subject(Class::High), "millrace.jobs.team-a.smollm2.high");
        assert_eq!(model.jobs_stream(), "JOBS_team-a_smollm2");
    }

    #[test]
    fn made_ids_are_ids() {
        let bare = JobId::of_place(JobPlace { stream_created_ms: 1_764_540_000_123, sequence: 7 });
        assert_eq!(bare.as_str(), "seq-1764540000123-7");
        for text in ["a", &"x".repeat(JOB_ID_BYTES_MAX)] {
            let id = text.parse::<JobId>().unwrap().reused(1_764_540_000_123, u64::MAX);
            assert!(id.as_str().ends_with(&format!("-dup-1764540000123-{}", u64::MAX)), "{id}");
            assert_eq!(id.as_str().parse::<JobId>().unwrap(), id);
        }
    }

    #[test]
    fn refusals_name_value_and_limit() {
        let error = "a.b".parse::<SubjectToken>().unwrap_err().to_string();
        assert_eq!(error, "name \"a.b\" must match [a-z0-9]([-a-z0-9]*[a-z0-9])?");
        let error = "x".repeat(64).parse::<SubjectToken>().unwrap_err().to_string();
        assert!(error.contains("64 bytes") && error.contains("63"), "{error}");
        assert!("".parse::<JobId>().is_err());
        assert!("urgent".parse::<Class>().is_err());
    }

    proptest! {
        #[test]
        fn accepted_text_is_one_subject_token(text in "\\PC{0,140}") {
            let clean = |s: &str| !s.is_empty() && !s.contains(['.', '*', '>', ' ', '\t', '\r', '\n', '/']);
            if let Ok(token) = text.parse::<SubjectToken>() {
                prop_assert!(clean(token.as_str()));
            }
            if let Ok(job) = text.parse::<JobId>() {
                prop_assert!(clean(job.as_str()));
            }
        }

        #[test]
        fn valid_names_pass(text in "[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?") {
            prop_assert!(text.parse::<SubjectToken>().is_ok());
            prop_assert!(text.parse::<JobId>().is_ok());
        }
    }
}
