//! What may be limited and how much, as it is written: `requests=60/min`, `concurrent=8`.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Largest amount of a limit: far above what a broker could carry, and safe to add up.
const AMOUNT_MAX: u64 = 1_000_000_000_000;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limited {
    /// Requests for an answer and jobs, in any minute.
    Requests,
    /// Tokens of prompts, in any minute.
    InputTokens,
    /// Tokens of answers, in any minute.
    OutputTokens,
    /// Requests for an answer at once.
    Concurrent,
    /// Tokens of batches that are not done, of each model.
    BatchTokens,
}

impl Limited {
    /// All of them.
    pub const ALL: [Limited; 5] = [
        Limited::Requests,
        Limited::InputTokens,
        Limited::OutputTokens,
        Limited::Concurrent,
        Limited::BatchTokens,
    ];
    /// Those that are counted over a minute, in the order of [`crate::http::limits::window::Amounts`].
    pub const RATES: [Limited; 3] = [Limited::Requests, Limited::InputTokens, Limited::OutputTokens];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Limited::Requests => "requests",
            Limited::InputTokens => "input-tokens",
            Limited::OutputTokens => "output-tokens",
            Limited::Concurrent => "concurrent",
            Limited::BatchTokens => "batch-tokens",
        }
    }

    /// Whether it is counted over a minute.
    pub fn is_rate(self) -> bool {
        Limited::RATES.contains(&self)
    }
}

/// One limit as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitRule {
    /// Of what.
    pub limited: Limited,
    /// How much, in a minute where it is a rate.
    pub amount: u64,
}

impl FromStr for LimitRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Limited::ALL.map(Limited::as_str).join(", ");
        let (name, amount) =
            text.split_once('=').ok_or("it must look like requests=60/min or concurrent=8")?;
        let limited = Limited::ALL.into_iter().find(|limited| limited.as_str() == name);
        let limited = limited.ok_or_else(|| format!("{name:?} is none of {}", names()))?;
        let number = match (limited.is_rate(), amount.strip_suffix("/min")) {
            (true, Some(number)) => number,
            (true, None) => return Err(format!("{name} is a rate, such as {name}=60/min")),
            (false, Some(_)) => return Err(format!("{name} is no rate; it must look like {name}=8")),
            (false, None) => amount,
        };
        let (digits, unit) = match number.as_bytes().last() {
            Some(b'k') => (&number[..number.len() - 1], 1_000),
            Some(b'M') => (&number[..number.len() - 1], 1_000_000),
            _ => (number, 1),
        };
        let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let amount = is_number.then(|| digits.parse::<u64>().ok()?.checked_mul(unit)).flatten();
        match amount {
            Some(amount @ 1..=AMOUNT_MAX) => Ok(Self { limited, amount }),
            _ => Err(format!("{number:?} is not 1 to {AMOUNT_MAX}; k and M stand for 1000 and 1000000")),
        }
    }
}

/// The limits of one key or of one tenant; what is absent is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LimitSet {
    /// Requests in any minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// Tokens of prompts in any minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_tokens: Option<u64>,
    /// Tokens of answers in any minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_tokens: Option<u64>,
    /// Requests at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrent: Option<u64>,
    /// Tokens of batches that are not done, of each model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_tokens: Option<u64>,
}

impl LimitSet {
    /// The limits that were written.
    ///
    /// # Errors
    /// When one is written twice.
    pub fn of(rules: &[LimitRule]) -> Result<Self, String> {
        let mut set = Self::default();
        for rule in rules {
            let place = set.place(rule.limited);
            if place.replace(rule.amount).is_some() {
                return Err(format!("{} is given twice", rule.limited.as_str()));
            }
        }
        Ok(set)
    }

    fn place(&mut self, limited: Limited) -> &mut Option<u64> {
        match limited {
            Limited::Requests => &mut self.requests,
            Limited::InputTokens => &mut self.input_tokens,
            Limited::OutputTokens => &mut self.output_tokens,
            Limited::Concurrent => &mut self.concurrent,
            Limited::BatchTokens => &mut self.batch_tokens,
        }
    }

    /// One of them.
    pub fn get(&self, limited: Limited) -> Option<u64> {
        let mut set = *self;
        *set.place(limited)
    }

    /// These, and for what they leave open the others.
    pub fn or(self, others: Self) -> Self {
        let mut set = self;
        for limited in Limited::ALL {
            let place = set.place(limited);
            *place = place.or(others.get(limited));
        }
        set
    }

    /// Whether a request has to be counted.
    pub fn limits_requests(&self) -> bool {
        Limited::ALL.into_iter().any(|one| one != Limited::BatchTokens && self.get(one).is_some())
    }

    /// Each at most `1 / parts` of itself, and at least 1.
    pub fn part(&self, parts: u64) -> Self {
        let mut set = *self;
        for limited in Limited::ALL {
            let place = set.place(limited);
            *place = place.map(|amount| (amount / parts.max(1)).max(1));
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_as_they_are_written() {
        let rule = |text: &str| text.parse::<LimitRule>().map(|rule| (rule.limited, rule.amount));
        assert_eq!(rule("requests=60/min"), Ok((Limited::Requests, 60)));
        assert_eq!(rule("output-tokens=250k/min"), Ok((Limited::OutputTokens, 250_000)));
        assert_eq!(rule("batch-tokens=2M"), Ok((Limited::BatchTokens, 2_000_000)));
        assert_eq!(rule("concurrent=8"), Ok((Limited::Concurrent, 8)));
        for (wrong, named) in [
            ("requests=60", "requests=60/min"),
            ("requests", "requests=60/min"),
            ("concurrent=8/min", "no rate"),
            ("tokens=5/min", "input-tokens"),
            ("requests=0/min", "\"0\" is not 1"),
            ("requests=-1/min", "\"-1\""),
            ("requests=k/min", "\"k\""),
            ("requests=/min", "\"\""),
            ("requests=99999999999999999999/min", "99999999999999999999"),
            ("batch-tokens=9999999999M", "9999999999M"),
        ] {
            let refused = rule(wrong).unwrap_err();
            assert!(refused.contains(named), "{wrong}: {refused}");
        }
    }

    #[test]
    fn a_set_takes_what_it_lacks_from_another() {
        let set = |texts: &[&str]| {
            let rules: Vec<LimitRule> = texts.iter().map(|text| text.parse().unwrap()).collect();
            LimitSet::of(&rules)
        };
        let own = set(&["requests=60/min"]).unwrap();
        let whole = own.or(set(&["requests=5/min", "concurrent=2"]).unwrap());
        assert_eq!((whole.requests, whole.concurrent, whole.input_tokens), (Some(60), Some(2), None));
        assert_eq!(whole.part(3), set(&["requests=20/min", "concurrent=1"]).unwrap());
        assert!(set(&["concurrent=1", "concurrent=1"]).unwrap_err().contains("twice"));
        assert!(!set(&["batch-tokens=5"]).unwrap().limits_requests() && own.limits_requests());
        // What an older gateway wrote is read, and it reads what a newer one writes.
        assert_eq!(serde_json::from_str::<LimitSet>(r#"{"requests":60,"later":1}"#).unwrap(), own);
        assert_eq!(serde_json::to_string(&own).unwrap(), r#"{"requests":60}"#);
    }
}
