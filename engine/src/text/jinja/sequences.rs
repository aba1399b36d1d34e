//! Jinja2's filters on sequences.

use super::arguments::{Given, integer};
use super::run::Machine;
use super::value::{PyValue, sorted};
use super::{Outcome, checks, evaluate, filters, raise};

/// Filters of this file.
pub const NAMES: [&str; 22] = [
    "batch",
    "count",
    "dictsort",
    "first",
    "groupby",
    "join",
    "last",
    "length",
    "list",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "select",
    "selectattr",
    "slice",
    "sort",
    "sum",
    "unique",
    "urlencode",
];

/// Runs a filter.
pub fn apply(machine: &mut Machine<'_>, name: &str, of: PyValue, given: Given) -> Outcome<PyValue> {
    match name {
        "length" | "count" => match of.length() {
            Some(length) => Ok(PyValue::Int(length as i128)),
            None => raise(format!("object of type '{}' has no len()", of.type_name())),
        },
        "list" => PyValue::list(of.iterate()?),
        "first" => Ok(of
            .take_first()
            .or_else(|| {
                if matches!(of, PyValue::Iterator(_)) { None } else { Some(of.iterate()) }?
                    .ok()?
                    .into_iter()
                    .next()
            })
            .map_or_else(|| checked(&of, "No first item, sequence was empty."), Ok)?),
        "last" if matches!(of, PyValue::Iterator(_)) => raise("'generator' object is not reversible"),
        "last" => of.iterate()?.pop().map_or_else(|| checked(&of, "No last item, sequence was empty."), Ok),
        "reverse" => match &of {
            PyValue::Text(text) => Ok(PyValue::text(text.chars().rev().collect::<String>())),
            other => PyValue::iterator(other.iterate()?.into_iter().rev().collect()),
        },
        "join" => join(machine, &of, &given),
        "map" => map(machine, &of, given),
        "select" | "reject" | "selectattr" | "rejectattr" => select(machine, name, &of, given),
        "sort" | "dictsort" | "groupby" | "unique" | "min" | "max" => ordered(machine, name, &of, &given),
        "sum" => {
            let [attribute, start] = given.bind(name, ["attribute", "start"])?;
            let mut sum = start.unwrap_or(PyValue::Int(0));
            if matches!(sum, PyValue::Text(_)) {
                return raise("sum() can't sum strings [use ''.join(seq) instead]");
            }
            for item in of.iterate()? {
                let item = path(machine, &item, attribute.as_ref())?;
                sum = filters::add(&sum, &item, machine.bounds.bytes)?;
            }
            Ok(sum)
        }
        "urlencode" => url_encode(&of),
        _ => groups(name, &of, &given),
    }
}

fn checked(of: &PyValue, message: &str) -> Outcome<PyValue> {
    if !matches!(of, PyValue::Iterator(_)) {
        of.iterate()?;
    }
    Ok(PyValue::undefined(message))
}

/// The attribute of an item that a path names, such as `function.name` or `0`.
fn path(machine: &mut Machine<'_>, item: &PyValue, attribute: Option<&PyValue>) -> Outcome<PyValue> {
    let mut value = item.clone();
    match attribute {
        None | Some(PyValue::None) => {}
        Some(PyValue::Text(names)) => {
            for name in names.split('.') {
                let number = name.parse::<u32>().ok().map(|number| PyValue::Int(number.into()));
                value = machine.item(&value, &number.unwrap_or_else(|| PyValue::text(name)))?;
            }
        }
        Some(other) => value = machine.item(&value, other)?,
    }
    Ok(value)
}

fn join(machine: &mut Machine<'_>, of: &PyValue, given: &Given) -> Outcome<PyValue> {
    let [separator, attribute] = given.bind("join", ["d", "attribute"])?;
    let separator = separator.map(|separator| separator.to_text()).unwrap_or_default();
    let mut out = String::new();
    for (at, item) in of.iterate()?.iter().enumerate() {
        out.push_str(if at == 0 { "" } else { &separator });
        out.push_str(&path(machine, item, attribute.as_ref())?.to_text());
        if out.len() > machine.bounds.bytes {
            return raise(format!("a text of more than {} bytes", machine.bounds.bytes));
        }
    }
    Ok(PyValue::text(out))
}

fn map(machine: &mut Machine<'_>, of: &PyValue, mut given: Given) -> Outcome<PyValue> {
    let mut made = Vec::new();
    if given.positional.is_empty() && given.named.iter().any(|(name, _)| name == "attribute") {
        let [attribute, default] = given.bind("map", ["attribute", "default"])?;
        for item in of.iterate()? {
            machine.spend(1)?;
            let value = path(machine, &item, attribute.as_ref())?;
            made.push(match (&value, &default) {
                (PyValue::Undefined(_), Some(default)) if !matches!(default, PyValue::None) => {
                    default.clone()
                }
                _ => value,
            });
        }
        return PyValue::iterator(made);
    }
    if given.positional.is_empty() {
        return raise("map requires a filter argument");
    }
    let name = given.positional.remove(0).to_text();
    if !filters::is_known(&name) {
        return raise(format!("no filter named '{name}' is supported"));
    }
    for item in of.iterate()? {
        machine.spend(1)?;
        machine.spend_on(&item)?;
        machine.enter()?;
        let value = filters::apply(machine, &name, item, given.clone())?;
        machine.depth -= 1;
        made.push(machine.bounded(value)?);
    }
    PyValue::iterator(made)
}

fn select(machine: &mut Machine<'_>, name: &str, of: &PyValue, mut given: Given) -> Outcome<PyValue> {
    if !of.is_true() {
        return PyValue::iterator(Vec::new());
    }
    let mut attribute = None;
    if name.ends_with("attr") {
        if given.positional.is_empty() {
            return raise("Missing parameter for attribute name");
        }
        attribute = Some(given.positional.remove(0));
    }
    let test = if given.positional.is_empty() { None } else { Some(given.positional.remove(0).to_text()) };
    let wanted = name.starts_with("select");
    let mut kept = Vec::new();
    for item in of.iterate()? {
        machine.spend(1)?;
        let value = path(machine, &item, attribute.as_ref())?;
        let holds = match &test {
            Some(test) => checks::check(test, &value, &given)?,
            None => value.is_true(),
        };
        kept.extend((holds == wanted).then_some(item));
    }
    PyValue::iterator(kept)
}

fn lower(value: PyValue, case_sensitive: bool) -> PyValue {
    match &value {
        PyValue::Text(text) if !case_sensitive => PyValue::text(text.to_lowercase()),
        _ => value,
    }
}

fn ordered(machine: &mut Machine<'_>, name: &str, of: &PyValue, given: &Given) -> Outcome<PyValue> {
    let is_true = |value: &Option<PyValue>| value.as_ref().is_some_and(PyValue::is_true);
    let (mut reverse, mut by_value, mut default) = (false, false, None);
    let (attribute, case) = match name {
        "sort" => {
            let [backwards, case, attribute] =
                given.bind(name, ["reverse", "case_sensitive", "attribute"])?;
            reverse = is_true(&backwards);
            (attribute, is_true(&case))
        }
        "dictsort" => {
            let [case, by, backwards] = given.bind(name, ["case_sensitive", "by", "reverse"])?;
            reverse = is_true(&backwards);
            by_value = match by.map(|by| by.to_text()).as_deref() {
                None | Some("key") => false,
                Some("value") => true,
                Some(_) => return raise("You can only sort by either \"key\" or \"value\""),
            };
            (None, is_true(&case))
        }
        "groupby" => {
            let [attribute, other, case] = given.bind(name, ["attribute", "default", "case_sensitive"])?;
            default = other;
            (attribute, is_true(&case))
        }
        _ => {
            let [case, attribute] = given.bind(name, ["case_sensitive", "attribute"])?;
            (attribute, is_true(&case))
        }
    };
    let items = match of {
        PyValue::Dict(dict) if name == "dictsort" => evaluate::items(dict)?,
        other if name == "dictsort" => {
            return raise(format!("'{}' object has no attribute 'items'", other.type_name()));
        }
        other => other.iterate()?,
    };
    let mut keyed = Vec::with_capacity(items.len());
    for item in items {
        machine.spend(1)?;
        let key = match (&item, name) {
            (PyValue::List(pair), "dictsort") => lower(pair.items[usize::from(by_value)].clone(), case),
            _ => key_of(machine, &item, (attribute.as_ref(), name == "sort"), (case, default.as_ref()))?,
        };
        keyed.push((key, item));
    }
    match name {
        "unique" => unique(keyed),
        "min" | "max" => extreme(keyed, name),
        _ => {
            // Equals keep their order backwards too.
            let mut less = |a: &(PyValue, PyValue), b: &(PyValue, PyValue)| {
                let order = a.0.order(&b.0, "<")?;
                Ok(order.is_some_and(|order| if reverse { order.is_gt() } else { order.is_lt() }))
            };
            let keyed = sorted(keyed, &mut less)?;
            if name == "groupby" {
                return grouped(machine, keyed, (attribute.as_ref(), default.as_ref()));
            }
            PyValue::list(keyed.into_iter().map(|(_, item)| item).collect())
        }
    }
}

fn unique(mut keyed: Vec<(PyValue, PyValue)>) -> Outcome<PyValue> {
    let mut seen = super::value::Dict::default();
    keyed.iter().try_for_each(|(key, _)| key.check_key())?;
    keyed.retain(|(key, _)| {
        let fresh = seen.get(key).is_none();
        seen.insert(key.clone(), PyValue::None);
        fresh
    });
    PyValue::iterator(keyed.into_iter().map(|(_, item)| item).collect())
}

/// What an item is ordered by: the attributes that a comma parts, where it is `sort`.
fn key_of(
    machine: &mut Machine<'_>,
    item: &PyValue,
    (attribute, several): (Option<&PyValue>, bool),
    (case, default): (bool, Option<&PyValue>),
) -> Outcome<PyValue> {
    match attribute {
        Some(PyValue::Text(names)) if several => {
            let parts = names
                .split(',')
                .map(|name| Ok(lower(path(machine, item, Some(&PyValue::text(name)))?, case)));
            PyValue::list(parts.collect::<Outcome<_>>()?)
        }
        attribute => {
            let key = path(machine, item, attribute)?;
            Ok(match (&key, default) {
                (PyValue::Undefined(_), Some(default)) => lower(default.clone(), case),
                _ => lower(key, case),
            })
        }
    }
}

fn extreme(keyed: Vec<(PyValue, PyValue)>, name: &str) -> Outcome<PyValue> {
    let mut best: Option<(PyValue, PyValue)> = None;
    for (key, item) in keyed {
        let better = match &best {
            None => true,
            Some((other, _)) => {
                let order = key.order(other, if name == "min" { "<" } else { ">" })?;
                order.is_some_and(|order| if name == "min" { order.is_lt() } else { order.is_gt() })
            }
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(best.map_or_else(|| PyValue::undefined("No aggregated item, sequence was empty."), |(_, item)| item))
}

fn grouped(
    machine: &mut Machine<'_>,
    keyed: Vec<(PyValue, PyValue)>,
    (attribute, default): (Option<&PyValue>, Option<&PyValue>),
) -> Outcome<PyValue> {
    let mut groups: Vec<(PyValue, Vec<PyValue>)> = Vec::new();
    for (key, item) in keyed {
        match groups.last_mut() {
            Some((last, items)) if last.equals(&key) => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let mut made = Vec::new();
    for (_, items) in groups {
        // The group is named as its first item writes it.
        let name = match (path(machine, &items[0], attribute)?, default) {
            (PyValue::Undefined(_), Some(default)) => default.clone(),
            (name, _) => name,
        };
        made.push(PyValue::tuple(vec![name, PyValue::list(items)?])?);
    }
    PyValue::list(made)
}

/// `slice` and `batch`.
fn groups(name: &str, of: &PyValue, given: &Given) -> Outcome<PyValue> {
    let [count, fill] =
        given.bind(name, [if name == "slice" { "slices" } else { "linecount" }, "fill_with"])?;
    let count = usize::try_from(integer(name, count.as_ref(), 0)?).unwrap_or(0);
    let fill = fill.filter(|fill| !matches!(fill, PyValue::None));
    if count == 0 || count > 1 << 16 {
        return raise(format!("{name}: {count} is not from 1 to 65536"));
    }
    let items = of.iterate()?;
    let mut made = Vec::new();
    if name == "batch" {
        for part in items.chunks(count) {
            let mut part = part.to_vec();
            if let Some(fill) = &fill {
                part.resize(count, fill.clone());
            }
            made.push(PyValue::list(part)?);
        }
        return PyValue::iterator(made);
    }
    let (each, longer) = (items.len() / count, items.len() % count);
    let mut rest = items.as_slice();
    for number in 0..count {
        let (part, after) = rest.split_at(each + usize::from(number < longer));
        let mut part = part.to_vec();
        part.extend(fill.clone().filter(|_| number >= longer));
        made.push(PyValue::list(part)?);
        rest = after;
    }
    PyValue::iterator(made)
}

fn url_encode(of: &PyValue) -> Outcome<PyValue> {
    let quote = |value: &PyValue, path: bool| {
        let mut out = String::new();
        for byte in value.to_text().bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                    out.push(char::from(byte))
                }
                b'/' if path => out.push('/'),
                b' ' if !path => out.push('+'),
                other => out.push_str(&format!("%{other:02X}")),
            }
        }
        out
    };
    let pairs = match of {
        PyValue::Dict(dict) => evaluate::items(dict)?,
        PyValue::List(list) => list.items.clone(),
        other => return Ok(PyValue::text(quote(other, true))),
    };
    let mut parts = Vec::new();
    for pair in pairs {
        let pair = pair.iterate()?;
        let [key, value] = pair.as_slice() else { return raise("urlencode: a pair must have two elements") };
        parts.push(format!("{}={}", quote(key, false), quote(value, false)));
    }
    Ok(PyValue::text(parts.join("&")))
}
