//! Arithmetic, subscripts and slices, as Python has them.

use super::syntax::{BinaryOp, CompareOp};
use super::value::{PyValue, range_length};
use super::{Outcome, format, raise};

/// Elements of a list that a template makes.
const ELEMENTS_MAX: usize = 1 << 20;

fn unsupported<T>(symbol: &str, left: &PyValue, right: &PyValue) -> Outcome<T> {
    for value in [left, right] {
        if let PyValue::Undefined(message) = value {
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
pub fn binary(operator: BinaryOp, left: &PyValue, right: &PyValue, bytes_max: usize) -> Outcome<PyValue> {
    match (operator, left, right) {
        (BinaryOp::Modulo, PyValue::Text(text), arguments) => {
            format::percent(text, arguments).map(PyValue::text)
        }
        (BinaryOp::Add, PyValue::Text(a), PyValue::Text(b)) => {
            bounded(a.len() + b.len(), bytes_max)?;
            Ok(PyValue::text([&**a, &**b].concat()))
        }
        (BinaryOp::Add, PyValue::Text(_), other) if !matches!(other, PyValue::Undefined(_)) => {
            raise(format!("can only concatenate str (not \"{}\") to str", other.type_name()))
        }
        (BinaryOp::Add, PyValue::List(a), PyValue::List(b)) if a.tuple == b.tuple => {
            bounded(a.items.len() + b.items.len(), ELEMENTS_MAX)?;
            let items = [a.items.as_slice(), b.items.as_slice()].concat();
            if a.tuple { PyValue::tuple(items) } else { PyValue::list(items) }
        }
        (BinaryOp::Multiply, PyValue::Text(_) | PyValue::List(_), count) if count.as_int().is_some() => {
            repeat(left, count.as_int().unwrap_or(0), bytes_max)
        }
        (BinaryOp::Multiply, count, PyValue::Text(_) | PyValue::List(_)) if count.as_int().is_some() => {
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

fn repeat(value: &PyValue, count: i128, bytes_max: usize) -> Outcome<PyValue> {
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    match value {
        PyValue::Text(text) => {
            bounded(text.len().saturating_mul(count), bytes_max)?;
            Ok(PyValue::text(text.repeat(if text.is_empty() { 0 } else { count })))
        }
        PyValue::List(list) => {
            bounded(list.items.len().saturating_mul(count), ELEMENTS_MAX)?;
            let count = if list.items.is_empty() { 0 } else { count };
            let items = std::iter::repeat_n(&list.items, count).flatten().cloned().collect();
            if list.tuple { PyValue::tuple(items) } else { PyValue::list(items) }
        }
        other => unsupported("*", other, &PyValue::Int(0)),
    }
}

fn arithmetic(operator: BinaryOp, left: &PyValue, right: &PyValue) -> Outcome<PyValue> {
    let symbol = match operator {
        BinaryOp::Add => "+",
        BinaryOp::Subtract => "-",
        BinaryOp::Multiply => "*",
        BinaryOp::Divide => "/",
        BinaryOp::FloorDivide => "//",
        BinaryOp::Modulo => "%",
        BinaryOp::Power => "** or pow()",
    };
    let Some((a, b)) = left.as_float().zip(right.as_float()) else { return unsupported(symbol, left, right) };
    let divides = matches!(operator, BinaryOp::Divide | BinaryOp::FloorDivide | BinaryOp::Modulo);
    if divides && b == 0.0 {
        return raise(if operator == BinaryOp::Divide {
            "division by zero"
        } else {
            "integer division or modulo by zero"
        });
    }
    if operator == BinaryOp::Power && a == 0.0 && b < 0.0 {
        return raise("0.0 cannot be raised to a negative power");
    }
    if operator == BinaryOp::Power && a < 0.0 && b.fract() != 0.0 {
        return raise("complex numbers are not supported");
    }
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        let whole = match operator {
            BinaryOp::Add => a.checked_add(b),
            BinaryOp::Subtract => a.checked_sub(b),
            BinaryOp::Multiply => a.checked_mul(b),
            BinaryOp::FloorDivide => a.checked_div_euclid(b).map(|_| floor_divide(a, b)),
            BinaryOp::Modulo => Some(a - floor_divide(a, b) * b),
            BinaryOp::Power if b >= 0 => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
            BinaryOp::Divide => return Ok(PyValue::Float(a as f64 / b as f64)),
            BinaryOp::Power => return Ok(PyValue::Float((a as f64).powf(b as f64))),
        };
        return match whole {
            Some(value) => Ok(PyValue::Int(value)),
            None => raise(format!("{a} {symbol} {b} exceeds 127 bits")),
        };
    }
    Ok(PyValue::Float(match operator {
        BinaryOp::Add => a + b,
        BinaryOp::Subtract => a - b,
        BinaryOp::Multiply => a * b,
        BinaryOp::Divide => a / b,
        BinaryOp::FloorDivide => (a / b).floor(),
        BinaryOp::Modulo => a - (a / b).floor() * b,
        BinaryOp::Power => a.powf(b),
    }))
}

fn floor_divide(a: i128, b: i128) -> i128 {
    let quotient = a.wrapping_div(b);
    if a.wrapping_rem(b) != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient }
}

/// `-value` and `+value`.
pub fn signed(value: &PyValue, negative: bool) -> Outcome<PyValue> {
    match (value, value.as_int()) {
        (PyValue::Float(number), _) => Ok(PyValue::Float(if negative { -number } else { *number })),
        (_, Some(number)) => Ok(PyValue::Int(if negative { -number } else { number })),
        (PyValue::Undefined(message), _) => raise(&**message),
        _ => raise(format!(
            "bad operand type for unary {}: '{}'",
            if negative { '-' } else { '+' },
            value.type_name()
        )),
    }
}

/// One comparison.
pub fn compare(comparison: CompareOp, left: &PyValue, right: &PyValue) -> Outcome<bool> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    Ok(match comparison {
        CompareOp::Equal => left.equals(right),
        CompareOp::Unequal => !left.equals(right),
        CompareOp::In => right.contains(left)?,
        CompareOp::NotIn => !right.contains(left)?,
        CompareOp::Less => left.order(right, "<")? == Some(Less),
        CompareOp::Greater => left.order(right, ">")? == Some(Greater),
        CompareOp::LessOrEqual => matches!(left.order(right, "<=")?, Some(Less | Equal)),
        CompareOp::GreaterOrEqual => matches!(left.order(right, ">=")?, Some(Greater | Equal)),
    })
}

/// Which element an index means.
fn place(index: i128, length: usize) -> Option<usize> {
    let length = length as i128;
    let at = if index < 0 { index + length } else { index };
    if (0..length).contains(&at) { usize::try_from(at).ok() } else { None }
}

/// `value[item]`, where the value holds it.
pub fn element(value: &PyValue, item: &PyValue) -> Option<PyValue> {
    match (value, item.as_int()) {
        (PyValue::Dict(dict), _) => dict.get(item).cloned(),
        (PyValue::List(list), Some(index)) => place(index, list.items.len()).map(|at| list.items[at].clone()),
        (PyValue::Text(text), Some(index)) => {
            let at = place(index, text.chars().count())?;
            text.chars().nth(at).map(|c| PyValue::text(c.to_string()))
        }
        (PyValue::Range(start, stop, step), Some(index)) => {
            let at = place(index, range_length(*start, *stop, *step))?;
            Some(PyValue::Int(start + at as i128 * step))
        }
        _ => None,
    }
}

/// `value[start:stop:step]`.
pub fn slice(value: &PyValue, parts: [Option<PyValue>; 3]) -> Outcome<PyValue> {
    let mut numbers = [None; 3];
    for (number, part) in numbers.iter_mut().zip(parts) {
        *number = match part {
            None | Some(PyValue::None) => None,
            Some(part) => match part.as_int() {
                Some(number) => Some(number),
                None => return raise("slice indices must be integers or None"),
            },
        };
    }
    let picks = |length: usize| picks(numbers, length);
    match value {
        PyValue::Text(text) => {
            let chars: Vec<char> = text.chars().collect();
            Ok(PyValue::text(picks(chars.len())?.into_iter().map(|at| chars[at]).collect::<String>()))
        }
        PyValue::List(list) => {
            let items = picks(list.items.len())?.into_iter().map(|at| list.items[at].clone()).collect();
            if list.tuple { PyValue::tuple(items) } else { PyValue::list(items) }
        }
        // Python gives a range; its elements are the same.
        PyValue::Range(..) => {
            let items = value.iterate()?;
            PyValue::list(picks(items.len())?.into_iter().map(|at| items[at].clone()).collect())
        }
        other => Ok(PyValue::undefined(format!("'{} object' has no such slice", other.type_name()))),
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
