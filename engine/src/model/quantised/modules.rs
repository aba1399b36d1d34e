//! Which modules a list of targets means, as compressed-tensors reads it: exact names, class names, and regular
//! expressions after `re:`, which match from the start of a module's name.

use fancy_regex::{Regex, RegexBuilder};

/// Steps that a regular expression may take on a name. Real ones take some hundred.
const STEPS_MAX: usize = 100_000;
/// Classes that every matrix here is of, by their own name and their parents'.
const CLASSES: [&str; 2] = ["Linear", "Module"];
/// Longest pattern. Lists of layers written out have some thousand bytes.
const PATTERN_BYTES_MAX: usize = 1 << 16;

/// One entry of a list.
#[derive(Debug, Clone)]
enum Entry {
    /// A module's name, or a class.
    Name(String),
    Pattern(Box<Regex>),
}

/// A list of modules.
#[derive(Debug, Clone, Default)]
pub struct Modules(Vec<Entry>);

impl PartialEq for Modules {
    fn eq(&self, other: &Self) -> bool {
        self.texts().eq(other.texts())
    }
}

impl Modules {
    /// Reads a list.
    ///
    /// # Errors
    /// When a pattern is no regular expression; the error is in words.
    pub fn new<'a>(entries: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let read = |entry: &'a str| match entry.strip_prefix("re:") {
            None => Ok(Entry::Name(entry.to_owned())),
            Some(pattern) if pattern.len() > PATTERN_BYTES_MAX => {
                Err(format!("a pattern of {} bytes; the limit is {PATTERN_BYTES_MAX}", pattern.len()))
            }
            Some(pattern) => {
                let built = RegexBuilder::new(&format!("^(?:{pattern})")).backtrack_limit(STEPS_MAX).build();
                built
                    .map(|regex| Entry::Pattern(Box::new(regex)))
                    .map_err(|error| format!("{entry:?}: {error}"))
            }
        };
        entries.map(read).collect::<Result<_, _>>().map(Self)
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|entry| match entry {
            Entry::Name(name) => name.as_str(),
            Entry::Pattern(regex) => regex.as_str(),
        })
    }

    /// Whether a module is meant by its own name, and not by its class alone.
    pub fn names(&self, module: &str) -> bool {
        self.0.iter().any(|entry| match entry {
            Entry::Name(name) => name == module,
            // One that takes too many steps matches nothing.
            Entry::Pattern(regex) => regex.is_match(module).unwrap_or(false),
        })
    }

    /// Whether a module is meant.
    pub fn mean(&self, module: &str) -> bool {
        let class = |entry: &Entry| matches!(entry, Entry::Name(name) if CLASSES.contains(&name.as_str()));
        self.names(module) || self.0.iter().any(class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_names_classes_and_patterns_from_the_start() {
        let of = |entries: &[&str]| Modules::new(entries.iter().copied()).unwrap();
        let module = "model.layers.3.mlp.down_proj";
        for entries in [
            &["Linear"][..],
            &[module],
            &["re:.*down_proj"],
            &["re:model.layers"],
            &["re:^(?!.*self_attn).*"],
        ] {
            assert!(of(entries).mean(module), "{entries:?}");
        }
        for entries in [&["down_proj"][..], &["re:mlp"], &["re:.*lm_head"], &["LayerNorm"], &[]] {
            assert!(!of(entries).mean(module), "{entries:?}");
        }
        assert!(!of(&["Linear"]).names(module) && of(&["re:.*mlp.*"]).names(module));
        assert!(Modules::new(["re:("].into_iter()).is_err());
        // Neither hangs.
        assert!(!of(&["re:(.*)*\\1x$"]).mean(&"a".repeat(64)));
    }
}
