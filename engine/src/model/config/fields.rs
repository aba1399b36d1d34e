//! Typed reading of a JSON object that Python wrote: several spellings of a key, `null` beside absent, whole numbers
//! that stand as floats.

use serde_json::{Map, Value};

use super::{ModelConfigError, refuse};

/// An object of a configuration.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The first of these spellings that holds something; the newest stands first.
    pub fn any(&self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names
            .iter()
            .find_map(|&name| self.0.get(name).filter(|value| !value.is_null()).map(|value| (name, value)))
    }

    /// The value of a key that holds something.
    pub fn value(&self, name: &'static str) -> Option<&'a Value> {
        self.any(&[name]).map(|(_, value)| value)
    }

    /// Whether the key stands there with `null`.
    pub fn is_null(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(Value::is_null)
    }

    /// A whole number from 0 on.
    pub fn count(&self, name: &'static str) -> Result<Option<usize>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        // 2^53: above it a float is no longer exact.
        let whole =
            value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..9.007_199_254_740_992e15).contains(f));
        match value.as_u64().or(whole.map(|f| f as u64)) {
            Some(count) => Ok(Some(count as usize)),
            None => refuse(name, value, "a whole number from 0 on"),
        }
    }

    /// A number.
    pub fn number(&self, name: &'static str) -> Result<Option<f64>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => refuse(name, value, "a number"),
        }
    }

    /// True or false; as in Python, 0 and 1 mean the same.
    pub fn flag(&self, name: &'static str) -> Result<Option<bool>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_bool().or(value.as_u64().filter(|&bit| bit < 2).map(|bit| bit == 1)) {
            Some(flag) => Ok(Some(flag)),
            None => refuse(name, value, "true or false"),
        }
    }

    /// A string.
    pub fn text(&self, name: &'static str) -> Result<Option<&'a str>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => refuse(name, value, "a string"),
        }
    }

    /// An object with something in it.
    pub fn object(&self, name: &'static str) -> Result<Option<Fields<'a>>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_object() {
            Some(object) => Ok(Some(Fields(object)).filter(|_| !object.is_empty())),
            None => refuse(name, value, "an object"),
        }
    }

    /// A list of one entry for each of `layers`; further ones are for layers that the model does not have.
    pub fn by_layer(
        &self,
        name: &'static str,
        layers: usize,
    ) -> Result<Option<&'a [Value]>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_array() {
            Some(entries) if entries.len() >= layers => Ok(Some(&entries[..layers])),
            Some(entries) => refuse(name, format!("{} entries", entries.len()), format!("{layers} entries")),
            None => refuse(name, value, "a list"),
        }
    }
}
