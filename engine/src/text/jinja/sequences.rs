//! Jinja2's filters on sequences.

use super::arguments::{Given, integer};
use super::run::Machine;
use super::value::{Value, sorted};
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
pub fn apply(machine: &mut Machine<'_>, name: &str, of: Value, given: Given) -> Outcome<Value> {
    match name {
        "length" | "count" => match of.length() {
            Some(length) => Ok(Value::Int(length as i128)),
            None => raise(format!("object of type '{}' has no len()", of.type_name())),
        },
        "list" => Value::list(of.iterate()?),
        "first" => Ok(of
            .take_first()
            .or_else(|| {
                if matches!(of, Value::Iterator(_)) { None } else { Some(of.iterate()) }?
                    .ok()?
                    .into_iter()
                    .next()
            })
            .map_or_else(|| checked(&of, "No first item, sequence was empty."), Ok)?),
        "last" if matches!(of, Value::Iterator(_)) => raise("'generator' object is not reversible"),
        "last" => of.iterate()?.pop().map_or_else(|| checked(&of, "No last item, sequence was empty."), Ok),
        "reverse" => match &of {
            Value::Text(text) => Ok(Value::text(text.chars().rev().collect::<String>())),
            other => Value::iterator(other.iterate()?.into_iter().rev().collect()),
        },
        "join" => join(machine, &of, &given),
        "map" => map(machine, &of, given),
        "select" | "reject" | "selectattr" | "rejectattr" => select(machine, name, &of, given),
        "sort" | "dictsort" | "groupby" | "unique" | "min" | "max" => ordered(machine, name, &of, &given),
        "sum" => {
            let [attribute, start] = given.bind(name, ["attribute", "start"])?;
            let mut sum = start.unwrap_or(Value::Int(0));
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

fn checked(of: &Value, message: &str) -> Outcome<Value> {
    if !matches!(of, Value::Iterator(_)) {
        of.iterate()?;
    }
    Ok(Value::undefined(message))
}

/// The attribute of an item that a path names, such as `function.name` or `0`.
fn path(machine: &mut Machine<'_>, item: &Value, attribute: Option<&Value>) -> Outcome<Value> {
    let mut value = item.clone();
    match attribute {
        None | Some(Value::None) => {}
        Some(Value::Text(names)) => {
            for name in names.split('.') {
                let number = name.parse::<u32>().ok().map(|number| Value::Int(number.into()));
                value = machine.item(&value, &number.unwrap_or_else(|| Value::text(name)))?;
            }
        }
        Some(other) => value = machine.item(&value, other)?,
    }
    Ok(value)
}

fn join(machine: &mut Machine<'_>, of: &Value, given: &Given) -> Outcome<Value> {
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
    Ok(Value::text(out))
}

fn map(machine: &mut Machine<'_>, of: &Value, mut given: Given) -> Outcome<Value> {
    let mut made = Vec::new();
    if given.positional.is_empty() && given.named.iter().any(|(name, _)| name == "attribute") {
        let [attribute, default] = given.bind("map", ["attribute", "default"])?;
        for item in of.iterate()? {
            machine.spend(1)?;
            let value = path(machine, &item, attribute.as_ref())?;
            made.push(match (&value, &default) {
                (Value::Undefined(_), Some(default)) if !matches!(default, Value::None) => default.clone(),
                _ => value,
            });
        }
        return Value::iterator(made);
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
    Value::iterator(made)
}

fn select(machine: &mut Machine<'_>, name: &str, of: &Value, mut given: Given) -> Outcome<Value> {
    if !of.is_true() {
        return Value::iterator(Vec::new());
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
    Value::iterator(kept)
}

fn lower(value: Value, case_sensitive: bool) -> Value {
    match &value {
        Value::Text(text) if !case_sensitive => Value::text(text.to_lowercase()),
        _ => value,
    }
}

fn ordered(machine: &mut Machine<'_>, name: &str, of: &Value, given: &Given) -> Outcome<Value> {
    let is_true = |value: &Option<Value>| value.as_ref().is_some_and(Value::is_true);
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
        Value::Dict(dict) if name == "dictsort" => evaluate::items(dict)?,
        other if name == "dictsort" => {
            return raise(format!("'{}' object has no attribute 'items'", other.type_name()));
        }
        other => other.iterate()?,
    };
    let mut keyed = Vec::with_capacity(items.len());
    for item in items {
        machine.spend(1)?;
        let key = match (&item, name) {
            (Value::List(pair), "dictsort") => lower(pair.items[usize::from(by_value)].clone(), case),
            _ => key_of(machine, &item, (attribute.as_ref(), name == "sort"), (case, default.as_ref()))?,
        };
        keyed.push((key, item));
    }
    match name {
        "unique" => unique(keyed),
        "min" | "max" => extreme(keyed, name),
        _ => {
            // Equals keep their order backwards too.
            let mut less = |a: &(Value, Value), b: &(Value, Value)| {
                let order = a.0.order(&b.0, "<")?;
                Ok(order.is_some_and(|order| if reverse { order.is_gt() } else { order.is_lt() }))
            };
            let keyed = sorted(keyed, &mut less)?;
            if name == "groupby" {
                return grouped(machine, keyed, (attribute.as_ref(), default.as_ref()));
            }
            Value::list(keyed.into_iter().map(|(_, item)| item).collect())
        }
    }
}

fn unique(mut keyed: Vec<(Value, Value)>) -> Outcome<Value> {
    let mut seen = super::value::Dict::default();
    keyed.iter().try_for_each(|(key, _)| key.check_key())?;
    keyed.retain(|(key, _)| {
        let fresh = seen.get(key).is_none();
        seen.insert(key.clone(), Value::None);
        fresh
    });
    Value::iterator(keyed.into_iter().map(|(_, item)| item).collect())
}

/// What an item is ordered by: the attributes that a comma parts, where it is `sort`.
fn key_of(
    machine: &mut Machine<'_>,
    item: &Value,
    (attribute, several): (Option<&Value>, bool),
    (case, default): (bool, Option<&Value>),
) -> Outcome<Value> {
    match attribute {
        Some(Value::Text(names)) if several => {
            let parts =
                names.split(',').map(|name| Ok(lower(path(machine, item, Some(&Value::text(name)))?, case)));
            Value::list(parts.collect::<Outcome<_>>()?)
        }
        attribute => {
            let key = path(machine, item, attribute)?;
            Ok(match (&key, default) {
                (Value::Undefined(_), Some(default)) => lower(default.clone(), case),
                _ => lower(key, case),
            })
        }
    }
}

fn extreme(keyed: Vec<(Value, Value)>, name: &str) -> Outcome<Value> {
    let mut best: Option<(Value, Value)> = None;
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
    Ok(best.map_or_else(|| Value::undefined("No aggregated item, sequence was empty."), |(_, item)| item))
}

fn grouped(
    machine: &mut Machine<'_>,
    keyed: Vec<(Value, Value)>,
    (attribute, default): (Option<&Value>, Option<&Value>),
) -> Outcome<Value> {
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
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
            (Value::Undefined(_), Some(default)) => default.clone(),
            (name, _) => name,
        };
        made.push(Value::tuple(vec![name, Value::list(items)?])?);
    }
    Value::list(made)
}

/// `slice` and `batch`.
fn groups(name: &str, of: &Value, given: &Given) -> Outcome<Value> {
    let [count, fill] =
        given.bind(name, [if name == "slice" { "slices" } else { "linecount" }, "fill_with"])?;
    let count = usize::try_from(integer(name, count.as_ref(), 0)?).unwrap_or(0);
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
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
            made.push(Value::list(part)?);
        }
        return Value::iterator(made);
    }
    let (each, longer) = (items.len() / count, items.len() % count);
    let mut rest = items.as_slice();
    for number in 0..count {
        let (part, after) = rest.split_at(each + usize::from(number < longer));
        let mut part = part.to_vec();
        part.extend(fill.clone().filter(|_| number >= longer));
        made.push(Value::list(part)?);
        rest = after;
    }
    Value::iterator(made)
}

fn url_encode(of: &Value) -> Outcome<Value> {
    let quote = |value: &Value, path: bool| {
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
        Value::Dict(dict) => evaluate::items(dict)?,
        Value::List(list) => list.items.clone(),
        other => return Ok(Value::text(quote(other, true))),
    };
    let mut parts = Vec::new();
    for pair in pairs {
        let pair = pair.iterate()?;
        let [key, value] = pair.as_slice() else { return raise("urlencode: a pair must have two elements") };
        parts.push(format!("{}={}", quote(key, false), quote(value, false)));
    }
    Ok(Value::text(parts.join("&")))
}
