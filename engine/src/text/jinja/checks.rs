//! Jinja2's tests: what stands behind `is`.

use super::arguments::Given;
use super::operators::{binary, compare};
use super::syntax::{Comparison, Operator};
use super::value::Value;
use super::{Outcome, filters, raise, text};

const NAMES: [&str; 39] = [
    "odd",
    "even",
    "divisibleby",
    "defined",
    "undefined",
    "filter",
    "test",
    "none",
    "boolean",
    "false",
    "true",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "sameas",
    "escaped",
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
];

/// Whether there is a test of the name.
pub fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// Runs a test.
pub fn check(name: &str, of: &Value, given: &Given) -> Outcome<bool> {
    let [argument] = given.bind(name, [if name == "divisibleby" { "num" } else { "other" }])?;
    let needed = || match &argument {
        Some(argument) => Ok(argument.clone()),
        None => raise(format!("the test '{name}' needs an argument")),
    };
    let compared = |comparison| compare(comparison, of, &needed()?);
    Ok(match name {
        "odd" | "even" | "divisibleby" => {
            let by = if name == "divisibleby" { needed()? } else { Value::Int(2) };
            let rest = binary(Operator::Modulo, of, &by, 0)?;
            rest.equals(&Value::Int(i128::from(name == "odd")))
        }
        "defined" => !matches!(of, Value::Undefined(_)),
        "undefined" => matches!(of, Value::Undefined(_)),
        "filter" => matches!(of, Value::Text(name) if filters::is_known(name)),
        "test" => matches!(of, Value::Text(name) if is_known(name)),
        "none" => matches!(of, Value::None),
        "boolean" => matches!(of, Value::Bool(_)),
        "false" => matches!(of, Value::Bool(false)),
        "true" => matches!(of, Value::Bool(true)),
        "integer" => matches!(of, Value::Int(_)),
        "float" => matches!(of, Value::Float(_)),
        "number" => matches!(of, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => matches!(of, Value::Text(_)),
        "mapping" => matches!(of, Value::Dict(_)),
        "sequence" => {
            matches!(
                of,
                Value::Text(_) | Value::List(_) | Value::Dict(_) | Value::Range(..) | Value::Undefined(_)
            )
        }
        "iterable" => {
            !matches!(of, Value::None) && (of.length().is_some() || matches!(of, Value::Iterator(_)))
        }
        "callable" => {
            matches!(
                of,
                Value::Macro(_)
                    | Value::Function(_)
                    | Value::Method(_)
                    | Value::Loop(_)
                    | Value::Undefined(_)
            )
        }
        "lower" => text::is(&of.to_text(), "islower"),
        "upper" => text::is(&of.to_text(), "isupper"),
        "escaped" => false,
        "sameas" => same(of, &needed()?),
        "in" => compared(Comparison::In)?,
        "==" | "eq" | "equalto" => compared(Comparison::Equal)?,
        "!=" | "ne" => compared(Comparison::Unequal)?,
        ">" | "gt" | "greaterthan" => compared(Comparison::Greater)?,
        ">=" | "ge" => compared(Comparison::GreaterOrEqual)?,
        "<" | "lt" | "lessthan" => compared(Comparison::Less)?,
        "<=" | "le" => compared(Comparison::LessOrEqual)?,
        other => return raise(format!("no test named '{other}'")),
    })
}

/// `is` of Python, as far as it does not depend on where values lie.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Bool(_), Value::Bool(_)) | (Value::None, Value::None) | (Value::Int(_), Value::Int(_)) => {
            a.equals(b)
        }
        (Value::Text(a), Value::Text(b)) => a == b,
        (Value::List(a), Value::List(b)) => std::rc::Rc::ptr_eq(a, b),
        (Value::Dict(a), Value::Dict(b)) => std::rc::Rc::ptr_eq(a, b),
        (Value::Namespace(a), Value::Namespace(b)) => a == b,
        _ => false,
    }
}
