//! Jinja2 as Hugging Face's `apply_chat_template` runs it: version 3.1.6 in its sandbox, with Python's values.
//!
//! Templates are programs that were written against Python: their authors use its string methods, its `%`, its
//! numbers and its comparisons, and rely on what these refuse. So values here are Python's (integers, floats, text by
//! code points, tuples, methods as attributes), and what Jinja2 raises is an error here. Nothing can be changed in
//! place but a namespace, as in the sandbox; there is no loader. What a template uses and this module does not know is
//! refused when it is parsed. Programs are bounded in instructions, depth and output.
//!
//! | module | what |
//! |---|---|
//! | [`lexer`], [`parser`], [`expressions`] | source -> [`syntax`] |
//! | [`run`], [`evaluate`] | statements and expressions at work |
//! | [`value`], [`print`](mod@print), [`operators`] | Python's values: equality, order, text, arithmetic |
//! | [`methods`], [`text`] | what values can be called with |
//! | [`filters`], [`sequences`], [`checks`] | Jinja2's filters and tests |
//! | [`format`](mod@format), [`json`], [`clock`] | `%` and `str.format`, `tojson`, `strftime_now` |

mod arguments;
mod checks;
mod clock;
mod evaluate;
mod expressions;
mod filters;
mod format;
pub mod json;
mod lexer;
mod methods;
mod operators;
mod parser;
mod print;
mod run;
mod sequences;
mod syntax;
#[cfg(test)]
mod tests;
mod text;
pub mod value;

use value::PyValue;

/// A parsed template.
#[derive(Debug)]
pub struct Program {
    body: Vec<syntax::Statement>,
}

/// Bounds of one rendering.
#[derive(Debug, Clone, Copy)]
pub struct RenderBounds {
    /// Instructions: one for each statement and expression, and for each 64 bytes or 1 element that they work on.
    pub instructions: u64,
    /// Bytes of the output, and of each text on the way.
    pub bytes: usize,
}

/// What a template does not control: its variables and its clock.
#[derive(Debug)]
pub struct RenderContext {
    /// By name; a later one hides an earlier one of its name.
    pub variables: Vec<(String, PyValue)>,
    /// `strftime_now`, in Unix seconds.
    pub now: i64,
}

/// Why a template cannot be parsed or rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} (line {line} of the template)")]
pub struct TemplateFault {
    /// What is wrong.
    pub message: String,
    /// Where, from 1.
    pub line: usize,
}

/// A fault on its way up, before its line is known.
#[derive(Debug)]
pub(crate) struct Raised {
    message: String,
    line: Option<usize>,
}

type Outcome<T> = Result<T, Raised>;

fn raise<T>(message: impl Into<String>) -> Outcome<T> {
    Err(Raised { message: message.into(), line: None })
}

impl Raised {
    /// Gives the fault a line unless an inner place did.
    fn at(mut self, line: usize) -> Self {
        self.line.get_or_insert(line);
        self
    }

    fn fault(self) -> TemplateFault {
        TemplateFault { message: self.message, line: self.line.unwrap_or(1) }
    }
}

impl Program {
    /// Parses a template, with `trim_blocks` and `lstrip_blocks`.
    ///
    /// # Errors
    /// When it is no template, or uses what is not known here.
    pub fn parse(source: &str) -> Result<Program, TemplateFault> {
        let tokens = lexer::tokens(source).map_err(Raised::fault)?;
        let body = parser::Parser::new(tokens).template().map_err(Raised::fault)?;
        Ok(Program { body })
    }

    /// Renders it.
    ///
    /// # Errors
    /// What the template raises, and what exceeds the bounds.
    pub fn render(&self, context: &RenderContext, bounds: RenderBounds) -> Result<String, TemplateFault> {
        run::Machine::new(context, bounds).render(&self.body).map_err(Raised::fault)
    }
}
