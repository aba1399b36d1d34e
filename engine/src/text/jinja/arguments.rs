//! The arguments of one call, bound to names as Python binds them.

use super::value::PyValue;
use super::{Outcome, raise};

/// Arguments by place and by name.
#[derive(Debug, Default, Clone)]
pub struct Given {
    pub positional: Vec<PyValue>,
    pub named: Vec<(String, PyValue)>,
}

impl Given {
    /// Arguments by place alone.
    pub fn of(positional: Vec<PyValue>) -> Self {
        Self { positional, named: Vec::new() }
    }

    /// The value of each name, given by place or by name.
    ///
    /// # Errors
    /// When there are too many, or one has no such name.
    pub fn bind<const N: usize>(&self, function: &str, names: [&str; N]) -> Outcome<[Option<PyValue>; N]> {
        let mut values = [const { None }; N];
        if self.positional.len() > N {
            let count = self.positional.len();
            return raise(format!("{function}() takes at most {N} arguments ({count} given)"));
        }
        for (slot, value) in values.iter_mut().zip(&self.positional) {
            *slot = Some(value.clone());
        }
        for (name, value) in &self.named {
            match names.iter().position(|other| other == name) {
                None => return raise(format!("{function}() got an unexpected keyword argument '{name}'")),
                Some(at) if values[at].is_some() => {
                    return raise(format!("{function}() got multiple values for argument '{name}'"));
                }
                Some(at) => values[at] = Some(value.clone()),
            }
        }
        Ok(values)
    }

    /// As [`Given::bind`], for a function that takes no names.
    pub fn places<const N: usize>(&self, function: &str) -> Outcome<[Option<PyValue>; N]> {
        if !self.named.is_empty() {
            return raise(format!("{function}() takes no keyword arguments"));
        }
        self.bind(function, [""; N])
    }
}

/// A text argument.
pub fn text(function: &str, value: &PyValue) -> Outcome<std::rc::Rc<str>> {
    match value {
        PyValue::Text(text) => Ok(text.clone()),
        PyValue::Undefined(message) => raise(&**message),
        other => raise(format!("{function}: expected str, found {}", other.type_name())),
    }
}

/// A text argument that may be absent or `None`.
pub fn optional_text(function: &str, value: Option<&PyValue>) -> Outcome<Option<std::rc::Rc<str>>> {
    match value {
        None | Some(PyValue::None) => Ok(None),
        Some(value) => text(function, value).map(Some),
    }
}

/// A whole number argument.
pub fn integer(function: &str, value: Option<&PyValue>, default: i128) -> Outcome<i128> {
    match value {
        None => Ok(default),
        Some(PyValue::Undefined(message)) => raise(&**message),
        Some(value) => match value.as_int() {
            Some(number) => Ok(number),
            None => raise(format!(
                "{function}: '{}' object cannot be interpreted as an integer",
                value.type_name()
            )),
        },
    }
}
