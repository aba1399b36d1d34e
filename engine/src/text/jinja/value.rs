//! Python's values: what they are, whether they are true, equal, in order, and what they hold.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use super::run::Round;
use super::{Outcome, raise};

/// Values within values. JSON has at most 128 levels; a template's own literals may add to them.
const NESTING_MAX: usize = 256;

/// A value. Clones share their contents.
#[derive(Debug, Clone)]
pub enum PyValue {
    /// What is not there, with the sentence that its use raises.
    Undefined(Rc<str>),
    /// `None`.
    None,
    /// `True` and `False`.
    Bool(bool),
    /// An integer. Python's have no end; these have 127 bits.
    Int(i128),
    /// A float.
    Float(f64),
    /// Text.
    Text(Rc<str>),
    /// A list or a tuple.
    List(Rc<List>),
    /// A mapping that keeps its order.
    Dict(Rc<Dict>),
    /// A mapping's keys, values or items.
    View(View, Rc<Dict>),
    /// `range(start, stop, step)`.
    Range(i128, i128, i128),
    /// What filters such as `map` give: it can be gone through once.
    Iterator(Rc<Stream>),
    /// `namespace()`, by its number.
    Namespace(usize),
    /// `loop`.
    Loop(Rc<Round>),
    /// A macro, by its number.
    Macro(usize),
    /// A function of the environment.
    Function(&'static str),
    /// A method with its value.
    Method(Rc<(PyValue, String)>),
}

/// Part of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// `keys()`.
    Keys,
    /// `values()`.
    Values,
    /// `items()`.
    Items,
}

/// A list or tuple.
#[derive(Debug)]
pub struct List {
    /// Its elements.
    pub items: Vec<PyValue>,
    /// A tuple differs from a list in its text and its equality.
    pub tuple: bool,
    depth: usize,
}

/// Elements that are taken one after the other.
#[derive(Debug)]
pub struct Stream {
    items: RefCell<VecDeque<PyValue>>,
    depth: usize,
}

/// A mapping.
#[derive(Debug, Default)]
pub struct Dict {
    entries: Vec<(PyValue, PyValue)>,
    /// Where text keys stand.
    index: HashMap<Rc<str>, usize>,
    depth: usize,
}

impl Dict {
    /// Sets a key; one that is there keeps its place.
    pub fn insert(&mut self, key: PyValue, value: PyValue) {
        self.depth = self.depth.max(key.depth()).max(value.depth());
        if let Some(at) = self.find(&key) {
            self.entries[at].1 = value;
            return;
        }
        if let PyValue::Text(text) = &key {
            self.index.insert(text.clone(), self.entries.len());
        }
        self.entries.push((key, value));
    }

    fn find(&self, key: &PyValue) -> Option<usize> {
        match key {
            PyValue::Text(text) => self.index.get(text).copied(),
            key => self.entries.iter().position(|(other, _)| other.equals(key)),
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &PyValue) -> Option<&PyValue> {
        self.find(key).map(|at| &self.entries[at].1)
    }

    /// The value of a text key.
    pub fn get_text(&self, key: &str) -> Option<&PyValue> {
        self.index.get(key).map(|&at| &self.entries[at].1)
    }

    /// Its entries in order.
    pub fn entries(&self) -> &[(PyValue, PyValue)] {
        &self.entries
    }
}

impl PyValue {
    /// Text.
    pub fn text(text: impl Into<Rc<str>>) -> PyValue {
        PyValue::Text(text.into())
    }

    /// What is not there.
    pub fn undefined(message: impl Into<Rc<str>>) -> PyValue {
        PyValue::Undefined(message.into())
    }

    /// A list, unless it nests too deep.
    pub(crate) fn list(items: Vec<PyValue>) -> Outcome<PyValue> {
        Self::sequence(items, false)
    }

    /// A tuple, unless it nests too deep.
    pub(crate) fn tuple(items: Vec<PyValue>) -> Outcome<PyValue> {
        Self::sequence(items, true)
    }

    fn sequence(items: Vec<PyValue>, tuple: bool) -> Outcome<PyValue> {
        let depth = nested(items.iter().map(PyValue::depth).max().unwrap_or(0))?;
        Ok(PyValue::List(Rc::new(List { items, tuple, depth })))
    }

    /// What can be gone through once.
    pub(crate) fn iterator(items: Vec<PyValue>) -> Outcome<PyValue> {
        let depth = nested(items.iter().map(PyValue::depth).max().unwrap_or(0))?;
        Ok(PyValue::Iterator(Rc::new(Stream { items: RefCell::new(items.into()), depth })))
    }

    /// A mapping, unless it nests too deep.
    pub(crate) fn dict(mut dict: Dict) -> Outcome<PyValue> {
        dict.depth = nested(dict.depth)?;
        Ok(PyValue::Dict(Rc::new(dict)))
    }

    fn depth(&self) -> usize {
        match self {
            PyValue::List(list) => list.depth,
            PyValue::Dict(dict) | PyValue::View(_, dict) => dict.depth + 1,
            PyValue::Iterator(stream) => stream.depth,
            PyValue::Method(method) => method.0.depth() + 1,
            _ => 0,
        }
    }

    /// Python's name of its type.
    pub fn type_name(&self) -> &'static str {
        match self {
            PyValue::Undefined(_) => "Undefined",
            PyValue::None => "NoneType",
            PyValue::Bool(_) => "bool",
            PyValue::Int(_) => "int",
            PyValue::Float(_) => "float",
            PyValue::Text(_) => "str",
            PyValue::List(list) if list.tuple => "tuple",
            PyValue::List(_) => "list",
            PyValue::Dict(_) => "dict",
            PyValue::View(View::Keys, _) => "dict_keys",
            PyValue::View(View::Values, _) => "dict_values",
            PyValue::View(View::Items, _) => "dict_items",
            PyValue::Range(..) => "range",
            PyValue::Iterator(_) => "generator",
            PyValue::Namespace(_) => "Namespace",
            PyValue::Loop(_) => "LoopContext",
            PyValue::Macro(_) => "Macro",
            PyValue::Function(_) => "function",
            PyValue::Method(_) => "method",
        }
    }

    /// Whether it counts as true.
    pub fn is_true(&self) -> bool {
        match self {
            PyValue::Undefined(_) | PyValue::None => false,
            PyValue::Bool(value) => *value,
            PyValue::Int(value) => *value != 0,
            PyValue::Float(value) => *value != 0.0,
            _ => self.length().is_none_or(|length| length > 0),
        }
    }

    /// `len()`, of what has one.
    pub fn length(&self) -> Option<usize> {
        match self {
            PyValue::Undefined(_) => Some(0),
            PyValue::Text(text) => Some(text.chars().count()),
            PyValue::List(list) => Some(list.items.len()),
            PyValue::Dict(dict) | PyValue::View(_, dict) => Some(dict.entries.len()),
            PyValue::Range(start, stop, step) => Some(range_length(*start, *stop, *step)),
            PyValue::Loop(round) => Some(round.items.len()),
            _ => None,
        }
    }

    /// As a number, where it is an integer or a Boolean.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            PyValue::Int(value) => Some(*value),
            PyValue::Bool(value) => Some(i128::from(*value)),
            _ => None,
        }
    }

    /// As a number.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            PyValue::Float(value) => Some(*value),
            other => other.as_int().map(|value| value as f64),
        }
    }

    /// `==`.
    pub fn equals(&self, other: &PyValue) -> bool {
        match (self, other) {
            (PyValue::Undefined(_), PyValue::Undefined(_)) | (PyValue::None, PyValue::None) => true,
            (PyValue::Text(a), PyValue::Text(b)) => a == b,
            (PyValue::List(a), PyValue::List(b)) => {
                a.tuple == b.tuple
                    && a.items.len() == b.items.len()
                    && a.items.iter().zip(&b.items).all(|(a, b)| a.equals(b))
            }
            (PyValue::Dict(a), PyValue::Dict(b)) => {
                a.entries.len() == b.entries.len()
                    && a.entries
                        .iter()
                        .all(|(key, value)| b.get(key).is_some_and(|other| other.equals(value)))
            }
            (PyValue::Range(a, b, c), PyValue::Range(d, e, f)) => (a, b, c) == (d, e, f),
            (PyValue::Namespace(a), PyValue::Namespace(b)) | (PyValue::Macro(a), PyValue::Macro(b)) => a == b,
            (PyValue::Function(a), PyValue::Function(b)) => a == b,
            (a, b) => match (a.as_int(), b.as_int()) {
                (Some(a), Some(b)) => a == b,
                _ => a.as_float().zip(b.as_float()).is_some_and(|(a, b)| a == b),
            },
        }
    }

    /// Order; `None` where a number is none.
    ///
    /// # Errors
    /// When Python does not compare the two.
    pub(crate) fn order(&self, other: &PyValue, operator: &str) -> Outcome<Option<Ordering>> {
        match (self, other) {
            (PyValue::Undefined(message), _) | (_, PyValue::Undefined(message)) => raise(&**message),
            (PyValue::Text(a), PyValue::Text(b)) => Ok(Some(a.cmp(b))),
            (PyValue::List(a), PyValue::List(b)) if a.tuple == b.tuple => {
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b) {
                        return a.order(b, operator);
                    }
                }
                Ok(Some(a.items.len().cmp(&b.items.len())))
            }
            (a, b) => match (a.as_int().zip(b.as_int()), a.as_float().zip(b.as_float())) {
                (Some((a, b)), _) => Ok(Some(a.cmp(&b))),
                (None, Some((a, b))) => Ok(a.partial_cmp(&b)),
                _ => raise(format!(
                    "'{operator}' not supported between instances of '{}' and '{}'",
                    self.type_name(),
                    other.type_name()
                )),
            },
        }
    }

    /// What a loop goes through.
    ///
    /// # Errors
    /// When Python cannot go through it.
    pub(crate) fn iterate(&self) -> Outcome<Vec<PyValue>> {
        Ok(match self {
            PyValue::Undefined(_) => Vec::new(),
            PyValue::Text(text) => {
                let mut buffer = [0; 4];
                text.chars().map(|c| PyValue::text(&*c.encode_utf8(&mut buffer))).collect()
            }
            PyValue::List(list) => list.items.clone(),
            PyValue::Dict(dict) | PyValue::View(View::Keys, dict) => {
                dict.entries.iter().map(|(key, _)| key.clone()).collect()
            }
            PyValue::View(View::Values, dict) => {
                dict.entries.iter().map(|(_, value)| value.clone()).collect()
            }
            PyValue::View(View::Items, dict) => {
                let pair =
                    |(key, value): &(PyValue, PyValue)| PyValue::tuple(vec![key.clone(), value.clone()]);
                dict.entries.iter().map(pair).collect::<Outcome<_>>()?
            }
            PyValue::Range(start, stop, step) => {
                let length = range_length(*start, *stop, *step);
                (0..length).map(|at| PyValue::Int(start + at as i128 * step)).collect()
            }
            PyValue::Iterator(stream) => std::mem::take(&mut *stream.items.borrow_mut()).into(),
            other => return raise(format!("'{}' object is not iterable", other.type_name())),
        })
    }

    /// Takes the first element of what can be gone through once.
    pub(crate) fn take_first(&self) -> Option<PyValue> {
        match self {
            PyValue::Iterator(stream) => stream.items.borrow_mut().pop_front(),
            _ => None,
        }
    }

    /// `in`.
    ///
    /// # Errors
    /// When Python cannot look into it.
    pub(crate) fn contains(&self, item: &PyValue) -> Outcome<bool> {
        match (self, item) {
            (PyValue::Text(text), PyValue::Text(part)) => Ok(text.contains(&**part)),
            (PyValue::Text(_), other) => {
                let found = other.type_name();
                raise(format!("'in <string>' requires string as left operand, not {found}"))
            }
            (PyValue::Dict(dict) | PyValue::View(View::Keys, dict), key) => {
                key.check_key()?;
                Ok(dict.get(key).is_some())
            }
            (other, item) => match other.iterate() {
                Ok(items) => Ok(items.iter().any(|other| other.equals(item))),
                Err(_) => raise(format!("argument of type '{}' is not iterable", other.type_name())),
            },
        }
    }

    /// Refuses what cannot be a mapping's key.
    pub(crate) fn check_key(&self) -> Outcome<()> {
        match self {
            PyValue::List(list) if list.tuple => list.items.iter().try_for_each(PyValue::check_key),
            PyValue::List(_) | PyValue::Dict(_) => raise(format!("unhashable type: '{}'", self.type_name())),
            _ => Ok(()),
        }
    }
}

fn nested(inner: usize) -> Outcome<usize> {
    if inner >= NESTING_MAX { raise(format!("values nest deeper than {NESTING_MAX}")) } else { Ok(inner + 1) }
}

/// The length of a range.
pub(crate) fn range_length(start: i128, stop: i128, step: i128) -> usize {
    let (distance, step) = if step > 0 { (stop - start, step) } else { (start - stop, -step) };
    if distance <= 0 { 0 } else { usize::try_from((distance - 1) / step + 1).unwrap_or(usize::MAX) }
}

/// Sorts, keeping the order of equals; the first comparison that fails ends it.
pub(crate) fn sorted<T: Clone>(
    items: Vec<T>,
    less: &mut dyn FnMut(&T, &T) -> Outcome<bool>,
) -> Outcome<Vec<T>> {
    if items.len() < 2 {
        return Ok(items);
    }
    let right = sorted(items[items.len() / 2..].to_vec(), less)?;
    let left = sorted(items[..items.len() / 2].to_vec(), less)?;
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    let mut merged = Vec::with_capacity(items.len());
    while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
        let next = if less(b, a)? { right.next() } else { left.next() };
        merged.extend(next);
    }
    merged.extend(left);
    merged.extend(right);
    Ok(merged)
}
