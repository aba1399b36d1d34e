//! What a check found: one line of `millrace doctor` and `millrace check`.

use serde::{Deserialize, Serialize};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Ok,
    /// It could not be looked at, or works and has a risk.
    Warn,
    /// It does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub check: String,
    /// How it came out.
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    /// All is as it should be.
    pub fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self { check: check.into(), grade: Grade::Ok, found: found.into(), fix: None }
    }

    /// It could not be looked at, or works and has a risk.
    pub fn warn(check: impl Into<String>, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check: check.into(), grade: Grade::Warn, found: found.into(), fix: Some(fix.into()) }
    }

    /// It does not work.
    pub fn fail(check: impl Into<String>, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { grade: Grade::Fail, ..Self::warn(check, found, fix) }
    }

    /// The lines for people.
    pub fn lines(&self) -> String {
        let mark = match self.grade {
            Grade::Ok => "ok  ",
            Grade::Warn => "warn",
            Grade::Fail => "FAIL",
        };
        let fix = self.fix.iter().map(|fix| format!("\n      fix: {fix}"));
        format!("{mark}  {}: {}{}", self.check, self.found, fix.collect::<String>())
    }
}
