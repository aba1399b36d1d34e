//! Arithmetic, subscripts and slices, as Python has them.

use super::syntax::{Comparison, Operator};
use super::value::{Value, range_length};
use super::{Outcome, format, raise};

/// Elements of a list that a template makes.
const ELEMENTS_MAX: usize = 1 << 20;

fn unsupported<T>(symbol: &str, left: &Value, right: &Value) -> Outcome<T> {
    for value in [left, right] {
        if let Value::Undefined(message) = value {
            return raise(&**message);
        }
    }
    raise(format!(
        "unsupported operand type(s) for {symbol}: '{}' and '{}'",
        left.type_name(),
        right.type_name()
    ))
}

/// `left operator right`. `bytes_max` bounds texts.
pub fn binary(operator: Operator, left: &Value, right: &Value, bytes_max: usize) -> Outcome<Value> {
    match (operator, left, right) {
        (Operator::Modulo, Value::Text(text), arguments) => format::percent(text, arguments).map(Value::text),
        (Operator::Add, Value::Text(a), Value::Text(b)) => {
            bounded(a.len() + b.len(), bytes_max)?;
            Ok(Value::text([&**a, &**b].concat()))
        }
        (Operator::Add, Value::Text(_), other) if !matches!(other, Value::Undefined(_)) => {
            raise(format!("can only concatenate str (not \"{}\") to str", other.type_name()))
        }
        (Operator::Add, Value::List(a), Value::List(b)) if a.tuple == b.tuple => {
            bounded(a.items.len() + b.items.len(), ELEMENTS_MAX)?;
            let items = [a.items.as_slice(), b.items.as_slice()].concat();
            if a.tuple { Value::tuple(items) } else { Value::list(items) }
        }
        (Operator::Multiply, Value::Text(_) | Value::List(_), count) if count.as_int().is_some() => {
            repeat(left, count.as_int().unwrap_or(0), bytes_max)
        }
        (Operator::Multiply, count, Value::Text(_) | Value::List(_)) if count.as_int().is_some() => {
            repeat(right, count.as_int().unwrap_or(0), bytes_max)
        }
        _ => arithmetic(operator, left, right),
    }
}

fn bounded(size: usize, limit: usize) -> Outcome<()> {
    if size > limit {
        raise(format!("a value of {size} bytes or elements; the limit is {limit}"))
    } else {
        Ok(())
    }
}

fn repeat(value: &Value, count: i128, bytes_max: usize) -> Outcome<Value> {
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    match value {
        Value::Text(text) => {
            bounded(text.len().saturating_mul(count), bytes_max)?;
            Ok(Value::text(text.repeat(if text.is_empty() { 0 } else { count })))
        }
        Value::List(list) => {
            bounded(list.items.len().saturating_mul(count), ELEMENTS_MAX)?;
            let count = if list.items.is_empty() { 0 } else { count };
            let items = std::iter::repeat_n(&list.items, count).flatten().cloned().collect();
            if list.tuple { Value::tuple(items) } else { Value::list(items) }
        }
        other => unsupported("*", other, &Value::Int(0)),
    }
}

fn arithmetic(operator: Operator, left: &Value, right: &Value) -> Outcome<Value> {
    let symbol = match operator {
        Operator::Add => "+",
        Operator::Subtract => "-",
        Operator::Multiply => "*",
        Operator::Divide => "/",
        Operator::FloorDivide => "//",
        Operator::Modulo => "%",
        Operator::Power => "** or pow()",
    };
    let Some((a, b)) = left.as_float().zip(right.as_float()) else { return unsupported(symbol, left, right) };
    let divides = matches!(operator, Operator::Divide | Operator::FloorDivide | Operator::Modulo);
    if divides && b == 0.0 {
        return raise(if operator == Operator::Divide {
            "division by zero"
        } else {
            "integer division or modulo by zero"
        });
    }
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        let whole = match operator {
            Operator::Add => a.checked_add(b),
            Operator::Subtract => a.checked_sub(b),
            Operator::Multiply => a.checked_mul(b),
            Operator::FloorDivide => a.checked_div_euclid(b).map(|_| floor_divide(a, b)),
            Operator::Modulo => Some(a - floor_divide(a, b) * b),
            Operator::Power if b >= 0 => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
            Operator::Divide => return Ok(Value::Float(a as f64 / b as f64)),
            Operator::Power => return Ok(Value::Float((a as f64).powf(b as f64))),
        };
        return match whole {
            Some(value) => Ok(Value::Int(value)),
            None => raise(format!("{a} {symbol} {b} exceeds 127 bits")),
        };
    }
    Ok(Value::Float(match operator {
        Operator::Add => a + b,
        Operator::Subtract => a - b,
        Operator::Multiply => a * b,
        Operator::Divide => a / b,
        Operator::FloorDivide => (a / b).floor(),
        Operator::Modulo => a - (a / b).floor() * b,
        Operator::Power => a.powf(b),
    }))
}

fn floor_divide(a: i128, b: i128) -> i128 {
    let quotient = a.wrapping_div(b);
    if a.wrapping_rem(b) != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient }
}

/// `-value` and `+value`.
pub fn signed(value: &Value, negative: bool) -> Outcome<Value> {
    match (value, value.as_int()) {
        (Value::Float(number), _) => Ok(Value::Float(if negative { -number } else { *number })),
        (_, Some(number)) => Ok(Value::Int(if negative { -number } else { number })),
        (Value::Undefined(message), _) => raise(&**message),
        _ => raise(format!(
            "bad operand type for unary {}: '{}'",
            if negative { '-' } else { '+' },
            value.type_name()
        )),
    }
}

/// One comparison.
pub fn compare(comparison: Comparison, left: &Value, right: &Value) -> Outcome<bool> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    Ok(match comparison {
        Comparison::Equal => left.equals(right),
        Comparison::Unequal => !left.equals(right),
        Comparison::In => right.contains(left)?,
        Comparison::NotIn => !right.contains(left)?,
        Comparison::Less => left.order(right, "<")? == Some(Less),
        Comparison::Greater => left.order(right, ">")? == Some(Greater),
        Comparison::LessOrEqual => matches!(left.order(right, "<=")?, Some(Less | Equal)),
        Comparison::GreaterOrEqual => matches!(left.order(right, ">=")?, Some(Greater | Equal)),
    })
}

/// Which element an index means.
fn place(index: i128, length: usize) -> Option<usize> {
    let length = length as i128;
    let at = if index < 0 { index + length } else { index };
    if (0..length).contains(&at) { usize::try_from(at).ok() } else { None }
}

/// `value[item]`, where the value holds it.
pub fn element(value: &Value, item: &Value) -> Option<Value> {
    match (value, item.as_int()) {
        (Value::Dict(dict), _) => dict.get(item).cloned(),
        (Value::List(list), Some(index)) => place(index, list.items.len()).map(|at| list.items[at].clone()),
        (Value::Text(text), Some(index)) => {
            let at = place(index, text.chars().count())?;
            text.chars().nth(at).map(|c| Value::text(c.to_string()))
        }
        (Value::Range(start, stop, step), Some(index)) => {
            let at = place(index, range_length(*start, *stop, *step))?;
            Some(Value::Int(start + at as i128 * step))
        }
        _ => None,
    }
}

/// `value[start:stop:step]`.
pub fn slice(value: &Value, parts: [Option<Value>; 3]) -> Outcome<Value> {
    let mut numbers = [None; 3];
    for (number, part) in numbers.iter_mut().zip(parts) {
        *number = match part {
            None | Some(Value::None) => None,
            Some(part) => match part.as_int() {
                Some(number) => Some(number),
                None => return raise("slice indices must be integers or None"),
            },
        };
    }
    let picks = |length: usize| picks(numbers, length);
    match value {
        Value::Text(text) => {
            let chars: Vec<char> = text.chars().collect();
            Ok(Value::text(picks(chars.len())?.into_iter().map(|at| chars[at]).collect::<String>()))
        }
        Value::List(list) => {
            let items = picks(list.items.len())?.into_iter().map(|at| list.items[at].clone()).collect();
            if list.tuple { Value::tuple(items) } else { Value::list(items) }
        }
        // Python gives a range; its elements are the same.
        Value::Range(..) => {
            let items = value.iterate()?;
            Value::list(picks(items.len())?.into_iter().map(|at| items[at].clone()).collect())
        }
        other => Ok(Value::undefined(format!("'{} object' has no such slice", other.type_name()))),
    }
}

/// The places that a slice takes.
fn picks([start, stop, step]: [Option<i128>; 3], length: usize) -> Outcome<Vec<usize>> {
    let step = step.unwrap_or(1);
    if step == 0 {
        return raise("slice step cannot be zero");
    }
    let length = length as i128;
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |index: i128| (if index < 0 { index.saturating_add(length) } else { index }).clamp(low, high);
    let mut at = start.map_or(if step > 0 { 0 } else { length - 1 }, clamp);
    let stop = stop.map_or(if step > 0 { length } else { -1 }, clamp);
    let mut found = Vec::new();
    while if step > 0 { at < stop } else { at > stop } {
        found.extend(usize::try_from(at).ok());
        at = at.saturating_add(step);
    }
    Ok(found)
}
