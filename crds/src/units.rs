//! Durations and sizes as people write them: `30s`, `5m`, `24h`; `512Mi`, `10Gi`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What the text of a [`Span`] looks like: the forms that Rust, Go and CEL all read alike.
pub const SPAN_PATTERN: &str = r"^([0-9]{1,6}(ms|s|m|h)){1,4}$";
/// What the text of [`Bytes`] looks like.
pub const BYTES_PATTERN: &str = r"^[0-9]{1,18}(Ki|Mi|Gi|Ti)?$";

/// A duration written as text, such as `30s` or `1h30m`, in whole milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
#[schemars(transparent)]
pub struct Span(#[schemars(with = "String", regex(pattern = SPAN_PATTERN))] pub Duration);

impl Span {
    /// A span of whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map(Span)
            .map_err(|error| format!("{text:?} is not a duration such as 30s, 5m or 24h: {error}"))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.0.as_millis();
        if left == 0 {
            return f.write_str("0s");
        }
        for (suffix, unit) in [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
            if left >= unit {
                write!(f, "{}{suffix}", left / unit)?;
                left %= unit;
            }
        }
        Ok(())
    }
}

/// A number of bytes, written plainly or with a binary suffix: `1048576`, `512Ki`, `64Mi`, `10Gi`, `1Ti`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
#[schemars(transparent)]
pub struct Bytes(#[schemars(with = "String", regex(pattern = BYTES_PATTERN))] pub u64);

const SUFFIXES: [(&str, u64); 4] = [("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];

impl FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, unit) = SUFFIXES
            .iter()
            .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|digits| (digits, *unit)))
            .unwrap_or((text, 1));
        let number: Option<u64> = digits.parse().ok();
        number
            .and_then(|n| n.checked_mul(unit))
            .map(Bytes)
            .ok_or_else(|| format!("{text:?} is not a size such as 1048576, 64Mi or 10Gi"))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, unit) in SUFFIXES {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{suffix}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

macro_rules! as_text {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
as_text!(Span, Bytes);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn forms() {
        assert_eq!("10Gi".parse::<Bytes>().unwrap().0, 10 << 30);
        assert_eq!(Bytes(10 << 30).to_string(), "10Gi");
        assert_eq!(Bytes(1000).to_string(), "1000");
        assert_eq!("5m".parse::<Span>().unwrap(), Span::seconds(300));
        assert_eq!(Span::seconds(5400).to_string(), "1h30m");
        assert!("99999999Ti".parse::<Bytes>().unwrap_err().contains("99999999Ti"));
        assert!("soon".parse::<Span>().unwrap_err().contains("soon"));
    }

    proptest! {
        #[test]
        fn text_round_trips(bytes: u64, seconds in 0u64..4_000_000_000) {
            prop_assert_eq!(Bytes(bytes).to_string().parse::<Bytes>().unwrap(), Bytes(bytes));
            let span = Span::seconds(seconds);
            prop_assert_eq!(span.to_string().parse::<Span>().unwrap(), span);
        }
    }
}
