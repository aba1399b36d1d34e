//! Jinja2's tests: what stands behind `is`.

use super::arguments::Given;
use super::operators::{binary, compare};
use super::syntax::{BinaryOp, CompareOp};
use super::value::PyValue;
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
pub fn check(name: &str, of: &PyValue, given: &Given) -> Outcome<bool> {
    let [argument] = given.bind(name, [if name == "divisibleby" { "num" } else { "other" }])?;
    let needed = || match &argument {
        Some(argument) => Ok(argument.clone()),
        None => raise(format!("the test '{name}' needs an argument")),
    };
    let compared = |comparison| compare(comparison, of, &needed()?);
    Ok(match name {
        "odd" | "even" | "divisibleby" => {
            let by = if name == "divisibleby" { needed()? } else { PyValue::Int(2) };
            let rest = binary(BinaryOp::Modulo, of, &by, 0)?;
            rest.equals(&PyValue::Int(i128::from(name == "odd")))
        }
        "defined" => !matches!(of, PyValue::Undefined(_)),
        "undefined" => matches!(of, PyValue::Undefined(_)),
        "filter" => matches!(of, PyValue::Text(name) if filters::is_known(name)),
        "test" => matches!(of, PyValue::Text(name) if is_known(name)),
        "none" => matches!(of, PyValue::None),
        "boolean" => matches!(of, PyValue::Bool(_)),
        "false" => matches!(of, PyValue::Bool(false)),
        "true" => matches!(of, PyValue::Bool(true)),
        "integer" => matches!(of, PyValue::Int(_)),
        "float" => matches!(of, PyValue::Float(_)),
        "number" => matches!(of, PyValue::Int(_) | PyValue::Float(_) | PyValue::Bool(_)),
        "string" => matches!(of, PyValue::Text(_)),
        "mapping" => matches!(of, PyValue::Dict(_)),
        "sequence" => {
            matches!(
                of,
                PyValue::Text(_)
                    | PyValue::List(_)
                    | PyValue::Dict(_)
                    | PyValue::Range(..)
                    | PyValue::Undefined(_)
            )
        }
        "iterable" => {
            !matches!(of, PyValue::None) && (of.length().is_some() || matches!(of, PyValue::Iterator(_)))
        }
        "callable" => {
            matches!(
                of,
                PyValue::Macro(_)
                    | PyValue::Function(_)
                    | PyValue::Method(_)
                    | PyValue::Loop(_)
                    | PyValue::Undefined(_)
            )
        }
        "lower" => text::is(&of.to_text(), "islower"),
        "upper" => text::is(&of.to_text(), "isupper"),
        "escaped" => false,
        "sameas" => same(of, &needed()?),
        "in" => compared(CompareOp::In)?,
        "==" | "eq" | "equalto" => compared(CompareOp::Equal)?,
        "!=" | "ne" => compared(CompareOp::Unequal)?,
        ">" | "gt" | "greaterthan" => compared(CompareOp::Greater)?,
        ">=" | "ge" => compared(CompareOp::GreaterOrEqual)?,
        "<" | "lt" | "lessthan" => compared(CompareOp::Less)?,
        "<=" | "le" => compared(CompareOp::LessOrEqual)?,
        other => return raise(format!("no test named '{other}'")),
    })
}

/// `is` of Python, as far as it does not depend on where values lie.
fn same(a: &PyValue, b: &PyValue) -> bool {
    match (a, b) {
        (PyValue::Bool(_), PyValue::Bool(_))
        | (PyValue::None, PyValue::None)
        | (PyValue::Int(_), PyValue::Int(_)) => a.equals(b),
        (PyValue::Text(a), PyValue::Text(b)) => a == b,
        (PyValue::List(a), PyValue::List(b)) => std::rc::Rc::ptr_eq(a, b),
        (PyValue::Dict(a), PyValue::Dict(b)) => std::rc::Rc::ptr_eq(a, b),
        (PyValue::Namespace(a), PyValue::Namespace(b)) => a == b,
        _ => false,
    }
}
