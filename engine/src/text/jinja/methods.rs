//! What values can be called with: Python's methods of text, mappings, lists and numbers.

use std::rc::Rc;

use super::arguments::{Given, integer};
use super::value::{Dict, PyValue, View};
use super::{Outcome, raise, text};

const DICT: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
const DICT_UNSAFE: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const LIST: [&str; 3] = ["copy", "count", "index"];
const LIST_UNSAFE: [&str; 8] = ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];

/// An attribute of the value's type. One that would change the value, and one that begins with an underscore, is
/// undefined, and raises when it is used.
pub fn attribute(of: &PyValue, name: &str) -> Option<PyValue> {
    let (safe, barred): (&[&str], &[&str]) = match of {
        PyValue::Text(_) => (&text::METHODS, &[]),
        PyValue::Dict(_) => (&DICT, &DICT_UNSAFE),
        PyValue::List(list) if list.tuple => {
            // The pairs that `groupby` gives are named.
            match (name, list.items.as_slice()) {
                ("grouper", [grouper, _]) => return Some(grouper.clone()),
                ("list", [_, list]) => return Some(list.clone()),
                _ => (&LIST[1..], &[]),
            }
        }
        PyValue::List(_) => (&LIST, &LIST_UNSAFE),
        PyValue::Float(_) => (&["is_integer"], &[]),
        PyValue::Int(_) | PyValue::Bool(_) => (&["bit_length", "is_integer"], &[]),
        _ => (&[], &[]),
    };
    if safe.contains(&name) {
        return Some(PyValue::Method(Rc::new((of.clone(), name.to_owned()))));
    }
    let internal = name.starts_with("__") && name.ends_with("__");
    (barred.contains(&name) || internal).then(|| {
        PyValue::undefined(format!("access to attribute '{name}' of '{}' object is unsafe.", of.type_name()))
    })
}

/// Calls a method.
pub fn call(of: &PyValue, name: &str, given: &Given, bytes_max: usize) -> Outcome<PyValue> {
    match of {
        PyValue::Text(this) => text::call(this, name, given, bytes_max),
        PyValue::Dict(dict) => of_dict(dict, name, given),
        PyValue::List(list) => match name {
            "copy" => Ok(of.clone()),
            "count" => {
                let [item] = given.places(name)?;
                let item = item.unwrap_or(PyValue::None);
                Ok(PyValue::Int(list.items.iter().filter(|other| other.equals(&item)).count() as i128))
            }
            _ => {
                let [item, start, stop] = given.places(name)?;
                let item = item.unwrap_or(PyValue::None);
                let length = list.items.len() as i128;
                let bound = |value: Option<&PyValue>, default| {
                    let at = integer(name, value, default)?;
                    Ok((if at < 0 { at + length } else { at }).clamp(0, length) as usize)
                };
                let (start, stop) = (bound(start.as_ref(), 0)?, bound(stop.as_ref(), length)?);
                let part = list.items.get(start..stop).unwrap_or_default();
                match part.iter().position(|other| other.equals(&item)) {
                    Some(at) => Ok(PyValue::Int((start + at) as i128)),
                    None => raise(format!("{} is not in list", item.to_text())),
                }
            }
        },
        PyValue::Float(value) => Ok(PyValue::Bool(value.fract() == 0.0)),
        other if name == "bit_length" => {
            let bits = other.as_int().unwrap_or(0).unsigned_abs();
            Ok(PyValue::Int(i128::from(u128::BITS - bits.leading_zeros())))
        }
        _ => Ok(PyValue::Bool(true)),
    }
}

fn of_dict(dict: &Rc<Dict>, name: &str, given: &Given) -> Outcome<PyValue> {
    match name {
        "get" => {
            let [key, default] = given.places(name)?;
            let Some(key) = key else { return raise("get expected at least 1 argument, got 0") };
            key.check_key()?;
            Ok(dict.get(&key).cloned().or(default).unwrap_or(PyValue::None))
        }
        "fromkeys" => {
            let [keys, value] = given.places(name)?;
            let mut made = Dict::default();
            for key in keys.unwrap_or(PyValue::None).iterate()? {
                key.check_key()?;
                made.insert(key, value.clone().unwrap_or(PyValue::None));
            }
            PyValue::dict(made)
        }
        _ => {
            let [] = given.places(name)?;
            Ok(match name {
                "items" => PyValue::View(View::Items, dict.clone()),
                "keys" => PyValue::View(View::Keys, dict.clone()),
                "values" => PyValue::View(View::Values, dict.clone()),
                _ => PyValue::Dict(dict.clone()),
            })
        }
    }
}
