//! Expressions at work: names, attributes, calls.

use std::rc::Rc;

use super::arguments::{Given, integer, text};
use super::run::Machine;
use super::syntax::{Arguments, Expr, ExprKind, Literal};
use super::value::{Dict, PyValue, View, range_length};
use super::{Outcome, Raised, checks, clock, filters, methods, operators, raise};

/// Functions of the environment.
const FUNCTIONS: [&str; 5] = ["range", "dict", "namespace", "raise_exception", "strftime_now"];
/// The sandbox's longest range.
const RANGE_MAX: usize = 100_000;

/// Namespaces take no names that begin with an underscore, as in transformers.
pub fn check_attribute(name: &str) -> Outcome<()> {
    if name.starts_with('_') {
        return raise(format!(
            "chat templates cannot store underscore-prefixed attributes on a namespace, but got '{name}'"
        ));
    }
    Ok(())
}

impl<'p> Machine<'p> {
    pub(super) fn evaluate(&mut self, expr: &'p Expr) -> Outcome<PyValue> {
        self.enter()?;
        let value = match &expr.kind {
            ExprKind::Call(..) => self.call_with(expr, None),
            kind => self.kind(kind),
        };
        self.depth -= 1;
        value.map_err(|raised| raised.at(expr.line))
    }

    fn kind(&mut self, kind: &'p ExprKind) -> Outcome<PyValue> {
        match kind {
            ExprKind::Literal(literal) => Ok(match literal {
                Literal::None => PyValue::None,
                Literal::Bool(value) => PyValue::Bool(*value),
                Literal::Int(value) => PyValue::Int(*value),
                Literal::Float(value) => PyValue::Float(*value),
                Literal::Text(text) => PyValue::text(text.as_str()),
            }),
            ExprKind::Name(name) => Ok(self.name(name)),
            ExprKind::Body => Ok(self.bodies.last().cloned().unwrap_or(PyValue::None)),
            ExprKind::List(parts) => PyValue::list(self.all(parts)?),
            ExprKind::Tuple(parts) => PyValue::tuple(self.all(parts)?),
            ExprKind::Dict(parts) => self.dict(parts),
            ExprKind::Attribute(of, name) => {
                let of = self.evaluate(of)?;
                self.attribute(&of, name)
            }
            ExprKind::Item(of, item) => {
                let (of, item) = (self.evaluate(of)?, self.evaluate(item)?);
                self.item(&of, &item)
            }
            ExprKind::Slice(of, parts) => {
                let of = self.evaluate(of)?;
                let mut values = [const { None }; 3];
                for (value, part) in values.iter_mut().zip(parts.iter()) {
                    *value = part.as_ref().map(|part| self.evaluate(part)).transpose()?;
                }
                self.spend_on(&of)?;
                if let PyValue::Undefined(message) = &of {
                    return raise(&**message);
                }
                operators::slice(&of, values)
            }
            ExprKind::Filter(of, name, arguments) => {
                let of = self.evaluate(of)?;
                let given = self.given(arguments)?;
                self.filter(name, of, given)
            }
            ExprKind::Test(of, name, arguments) => {
                let of = self.evaluate(of)?;
                let given = self.given(arguments)?;
                checks::check(name, &of, &given).map(PyValue::Bool)
            }
            other => self.operation(other),
        }
    }

    fn operation(&mut self, kind: &'p ExprKind) -> Outcome<PyValue> {
        match kind {
            ExprKind::Not(of) => Ok(PyValue::Bool(!self.evaluate(of)?.is_true())),
            ExprKind::Negative(of) => operators::signed(&self.evaluate(of)?, true),
            ExprKind::Positive(of) => operators::signed(&self.evaluate(of)?, false),
            ExprKind::And(left, right) => {
                let left = self.evaluate(left)?;
                if left.is_true() { self.evaluate(right) } else { Ok(left) }
            }
            ExprKind::Or(left, right) => {
                let left = self.evaluate(left)?;
                if left.is_true() { Ok(left) } else { self.evaluate(right) }
            }
            ExprKind::Binary(operator, left, right) => {
                let (left, right) = (self.evaluate(left)?, self.evaluate(right)?);
                self.spend_on(&left)?;
                let value = operators::binary(*operator, &left, &right, self.bounds.bytes)?;
                self.spend_on(&value)?;
                Ok(value)
            }
            ExprKind::Compare(first, others) => {
                let mut left = self.evaluate(first)?;
                for (comparison, right) in others {
                    let right = self.evaluate(right)?;
                    self.spend_on(&right)?;
                    if !operators::compare(*comparison, &left, &right)? {
                        return Ok(PyValue::Bool(false));
                    }
                    left = right;
                }
                Ok(PyValue::Bool(true))
            }
            ExprKind::Concat(parts) => {
                let mut out = String::new();
                for part in parts {
                    out.push_str(&self.evaluate(part)?.to_text());
                }
                self.bounded(PyValue::text(out))
            }
            ExprKind::Conditional(then, test, other) => {
                if self.evaluate(test)?.is_true() {
                    return self.evaluate(then);
                }
                match other {
                    Some(other) => self.evaluate(other),
                    None => Ok(PyValue::undefined(
                        "the inline if-expression evaluated to false and no else was given",
                    )),
                }
            }
            _ => raise("an expression of no kind"),
        }
    }

    fn all(&mut self, parts: &'p [Expr]) -> Outcome<Vec<PyValue>> {
        parts.iter().map(|part| self.evaluate(part)).collect()
    }

    fn dict(&mut self, parts: &'p [(Expr, Expr)]) -> Outcome<PyValue> {
        let mut dict = Dict::default();
        for (key, value) in parts {
            let key = self.evaluate(key)?;
            key.check_key()?;
            dict.insert(key, self.evaluate(value)?);
        }
        PyValue::dict(dict)
    }

    fn name(&self, name: &str) -> PyValue {
        match self.lookup(name) {
            Some(value) => value.clone(),
            None => match FUNCTIONS.iter().find(|function| **function == name) {
                Some(function) => PyValue::Function(function),
                None => PyValue::undefined(format!("'{name}' is undefined")),
            },
        }
    }

    /// Takes instructions for work on the whole of a value.
    pub(super) fn spend_on(&mut self, value: &PyValue) -> Outcome<()> {
        match value {
            PyValue::Text(text) => self.spend(text.len() / 64),
            PyValue::List(list) => self.spend(list.items.len()),
            PyValue::Dict(dict) | PyValue::View(_, dict) => self.spend(dict.entries().len() / 8),
            PyValue::Range(start, stop, step) => self.spend(range_length(*start, *stop, *step)),
            _ => Ok(()),
        }
    }

    /// A value that was made, unless it is too large.
    pub(super) fn bounded(&mut self, value: PyValue) -> Outcome<PyValue> {
        if let PyValue::Text(text) = &value
            && text.len() > self.bounds.bytes
        {
            return raise(format!("a text of more than {} bytes", self.bounds.bytes));
        }
        self.spend_on(&value)?;
        Ok(value)
    }

    /// `of.name`: the attribute, else the item.
    pub(super) fn attribute(&mut self, of: &PyValue, name: &str) -> Outcome<PyValue> {
        let found = match of {
            PyValue::Undefined(message) => return raise(&**message),
            PyValue::Namespace(number) => self.namespaces[*number].get_text(name).cloned(),
            PyValue::Loop(round) => round.attribute(name)?,
            _ => None,
        };
        Ok(found
            .or_else(|| methods::attribute(of, name))
            .or_else(|| named(of, name))
            .unwrap_or_else(|| missing(of, name)))
    }

    /// `of[item]`: the item, else the attribute.
    pub(super) fn item(&mut self, of: &PyValue, item: &PyValue) -> Outcome<PyValue> {
        if let PyValue::Undefined(message) = of {
            return raise(&**message);
        }
        if matches!(of, PyValue::Text(_)) {
            self.spend_on(of)?;
        }
        if let Some(value) = operators::element(of, item) {
            return Ok(value);
        }
        match item {
            PyValue::Text(name) => {
                let name = name.clone();
                self.attribute(of, &name)
            }
            other => Ok(missing(of, &other.to_text())),
        }
    }

    pub(super) fn given(&mut self, arguments: &'p Arguments) -> Outcome<Given> {
        let mut given = Given { positional: self.all(&arguments.positional)?, named: Vec::new() };
        for (name, value) in &arguments.named {
            let value = self.evaluate(value)?;
            given.named.push((name.clone(), value));
        }
        if let Some(spread) = &arguments.spread {
            given.positional.extend(self.evaluate(spread)?.iterate()?);
        }
        if let Some(spread) = &arguments.spread_named {
            let PyValue::Dict(dict) = self.evaluate(spread)? else {
                return raise("argument after ** must be a mapping");
            };
            for (key, value) in dict.entries() {
                given.named.push((text("keywords", key)?.to_string(), value.clone()));
            }
        }
        Ok(given)
    }

    /// A call; with `caller` from a `{% call %}` block.
    pub(super) fn call_with(&mut self, expr: &'p Expr, caller: Option<PyValue>) -> Outcome<PyValue> {
        let ExprKind::Call(callee, arguments) = &expr.kind else { return raise("expected a call") };
        let callee = self.evaluate(callee)?;
        let mut given = self.given(arguments)?;
        given.named.extend(caller.map(|caller| ("caller".to_owned(), caller)));
        self.call(&callee, given).map_err(|raised| raised.at(expr.line))
    }

    fn call(&mut self, callee: &PyValue, given: Given) -> Outcome<PyValue> {
        match callee {
            PyValue::Undefined(message) => raise(&**message),
            PyValue::Function(name) => self.function(name, &given),
            PyValue::Macro(number) => self.call_macro(*number, given),
            PyValue::Method(method) => {
                let (of, name) = &**method;
                self.spend_on(of)?;
                if let PyValue::Loop(round) = of {
                    return self.call_loop(round.number, round.index, name, given.positional);
                }
                let value = methods::call(of, name, &given, self.bounds.bytes)?;
                self.bounded(value)
            }
            PyValue::Loop(round) => match (round.recursive, given.positional.as_slice()) {
                (Some(number), [items]) => self.run_again(number, items, round.depth),
                _ => raise("the loop must have the 'recursive' marker to be called"),
            },
            other => raise(format!("'{}' object is not callable", other.type_name())),
        }
    }

    /// `loop.cycle(...)` and `loop.changed(...)`.
    fn call_loop(
        &mut self,
        number: usize,
        index: usize,
        name: &str,
        values: Vec<PyValue>,
    ) -> Outcome<PyValue> {
        if name == "cycle" {
            let Some(count) = std::num::NonZeroUsize::new(values.len()) else {
                return raise("no items for cycling given");
            };
            return Ok(values[index % count].clone());
        }
        let same = self.changed[number].as_ref().is_some_and(|last| {
            last.len() == values.len() && last.iter().zip(&values).all(|(a, b)| a.equals(b))
        });
        self.changed[number] = Some(values);
        Ok(PyValue::Bool(!same))
    }

    fn call_macro(&mut self, number: usize, given: Given) -> Outcome<PyValue> {
        let closure = self.closures[number];
        let Given { positional, named } = given;
        let node = closure.node;
        let mut arguments: Vec<Option<PyValue>> = vec![None; node.parameters.len()];
        let mut places = positional.into_iter();
        for (slot, value) in arguments.iter_mut().zip(places.by_ref()) {
            *slot = Some(value);
        }
        let rest: Vec<PyValue> = places.collect();
        let (mut extra, mut caller) = (Dict::default(), None);
        for (name, value) in named {
            match node.parameters.iter().position(|(parameter, _)| *parameter == name) {
                Some(at) if arguments[at].is_some() => {
                    return raise(format!("macro '{}' got multiple values for argument '{name}'", node.name));
                }
                Some(at) => arguments[at] = Some(value),
                None if name == "caller" => caller = Some(value),
                None if node.names.contains(&"kwargs") => extra.insert(PyValue::text(name), value),
                None => return raise(format!("macro '{}' takes no keyword argument '{name}'", node.name)),
            }
        }
        if !rest.is_empty() && !node.names.contains(&"varargs") {
            let count = node.parameters.len();
            return raise(format!("macro '{}' takes not more than {count} argument(s)", node.name));
        }
        let mut extras = Vec::new();
        for name in &node.names {
            extras.push((
                *name,
                match *name {
                    "varargs" => PyValue::tuple(rest.clone())?,
                    "kwargs" => PyValue::dict(std::mem::take(&mut extra))?,
                    _ => caller.take().unwrap_or_else(|| PyValue::undefined("No caller defined")),
                },
            ));
        }
        if caller.is_some() {
            return raise(format!(
                "macro '{}' was invoked with two values for the special caller argument or takes none",
                node.name
            ));
        }
        self.run_macro(closure, arguments, extras)
    }

    fn function(&mut self, name: &str, given: &Given) -> Outcome<PyValue> {
        match name {
            "range" => range(given),
            "strftime_now" => {
                let [format] = given.bind(name, ["format"])?;
                let format = text(name, &format.unwrap_or(PyValue::None))?;
                clock::strftime(self.context.now, &format).map(PyValue::text)
            }
            "raise_exception" => {
                let [message] = given.bind(name, ["message"])?;
                Err(Raised { message: message.unwrap_or(PyValue::None).to_text(), line: None })
            }
            _ => {
                let mut dict = Dict::default();
                for part in &given.positional {
                    if let PyValue::Dict(part) = part {
                        part.entries()
                            .iter()
                            .for_each(|(key, value)| dict.insert(key.clone(), value.clone()));
                        continue;
                    }
                    for pair in part.iterate()? {
                        let pair = pair.iterate()?;
                        let [key, value] = pair.as_slice() else {
                            return raise("a pair must have two elements");
                        };
                        key.check_key()?;
                        dict.insert(key.clone(), value.clone());
                    }
                }
                for (name, value) in &given.named {
                    dict.insert(PyValue::text(name.as_str()), value.clone());
                }
                if name == "dict" {
                    return PyValue::dict(dict);
                }
                for (key, _) in dict.entries() {
                    check_attribute(&key.to_text())?;
                }
                // Only a dictionary's own nesting is checked.
                PyValue::dict(Dict::default())?;
                self.namespaces.push(dict);
                Ok(PyValue::Namespace(self.namespaces.len() - 1))
            }
        }
    }

    fn filter(&mut self, name: &str, of: PyValue, given: Given) -> Outcome<PyValue> {
        self.spend_on(&of)?;
        let value = filters::apply(self, name, of, given)?;
        self.bounded(value)
    }
}

/// `of[name]` where the attribute is not there.
fn named(of: &PyValue, name: &str) -> Option<PyValue> {
    match of {
        PyValue::Dict(dict) => dict.get_text(name).cloned(),
        _ => None,
    }
}

fn missing(of: &PyValue, name: &str) -> PyValue {
    match of {
        PyValue::None => PyValue::undefined(format!("'None' has no attribute '{name}'")),
        other => PyValue::undefined(format!("'{} object' has no attribute '{name}'", other.type_name())),
    }
}

fn range(given: &Given) -> Outcome<PyValue> {
    let [a, b, c] = given.places("range")?;
    let bound = |value: &Option<PyValue>, default| {
        let number = integer("range", value.as_ref(), default)?;
        if i64::try_from(number).is_ok() {
            Ok(number)
        } else {
            raise(format!("range: {number} exceeds 64 bits"))
        }
    };
    let (start, stop) = match (&a, &b) {
        (None, _) => return raise("range expected at least 1 argument, got 0"),
        (Some(_), None) => (0, bound(&a, 0)?),
        _ => (bound(&a, 0)?, bound(&b, 0)?),
    };
    let step = bound(&c, 1)?;
    if step == 0 {
        return raise("range() arg 3 must not be zero");
    }
    let length = range_length(start, stop, step);
    if length > RANGE_MAX {
        return raise(format!("range too big: the sandbox allows {RANGE_MAX} elements, not {length}"));
    }
    Ok(PyValue::Range(start, stop, step))
}

impl super::run::Round {
    /// What a template reads of `loop`.
    fn attribute(self: &Rc<Self>, name: &str) -> Outcome<Option<PyValue>> {
        let int = |number: usize| Some(PyValue::Int(number as i128));
        let neighbour = |at: Option<usize>, what: &str| {
            let item = at.and_then(|at| self.items.get(at)).cloned();
            Some(item.unwrap_or_else(|| PyValue::undefined(format!("there is no {what} item"))))
        };
        let length = self.items.len();
        Ok(match name {
            "index" => int(self.index + 1),
            "index0" => int(self.index),
            "revindex" => int(length - self.index),
            "revindex0" => int(length - self.index - 1),
            "length" => int(length),
            "first" => Some(PyValue::Bool(self.index == 0)),
            "last" => Some(PyValue::Bool(self.index + 1 == length)),
            "depth" => int(self.depth + 1),
            "depth0" => int(self.depth),
            "previtem" => neighbour(self.index.checked_sub(1), "previous"),
            "nextitem" => neighbour(Some(self.index + 1), "next"),
            "cycle" | "changed" => {
                Some(PyValue::Method(Rc::new((PyValue::Loop(self.clone()), name.to_owned()))))
            }
            _ => None,
        })
    }
}

/// All items of a mapping, for filters that want pairs.
pub fn items(dict: &Rc<Dict>) -> Outcome<Vec<PyValue>> {
    PyValue::View(View::Items, dict.clone()).iterate()
}
