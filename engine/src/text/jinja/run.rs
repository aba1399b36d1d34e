//! Statements at work: variables, loops, macros, output, and the bounds of all of it.

use std::rc::Rc;

use super::syntax::{AssignTarget, For, Macro, Statement};
use super::value::{Dict, PyValue};
use super::{Outcome, RenderBounds, RenderContext, evaluate, raise};

/// Statements and expressions within each other while a template runs, calls of macros included.
const DEPTH_MAX: usize = 400;

/// What follows a statement.
#[derive(PartialEq, Eq)]
pub enum Flow {
    Next,
    Break,
    Continue,
}

/// One turn of a loop, as the template sees it.
#[derive(Debug)]
pub struct Round {
    pub items: Rc<Vec<PyValue>>,
    pub index: usize,
    /// From 0.
    pub depth: usize,
    /// Which loop it is, for `loop.changed`.
    pub number: usize,
    /// The recursive loop that `loop(...)` runs again.
    pub recursive: Option<usize>,
}

/// A macro with the variables that it sees.
#[derive(Clone, Copy)]
pub struct Closure<'p> {
    pub node: &'p Macro,
    pub scope: usize,
}

struct Scope<'p> {
    parent: Option<usize>,
    variables: Vec<(&'p str, PyValue)>,
}

/// A template that runs.
pub struct Machine<'p> {
    pub(super) context: &'p RenderContext,
    pub(super) bounds: RenderBounds,
    pub(super) fuel: u64,
    pub(super) depth: usize,
    scopes: Vec<Scope<'p>>,
    scope: usize,
    /// Scopes up to here are kept, because a macro sees them.
    kept: usize,
    pub(super) closures: Vec<Closure<'p>>,
    pub(super) recursive: Vec<(&'p For, usize)>,
    pub(super) namespaces: Vec<Dict>,
    /// What `loop.changed` saw last, by loop.
    pub(super) changed: Vec<Option<Vec<PyValue>>>,
    /// Texts of the blocks that filters stand over.
    pub(super) bodies: Vec<PyValue>,
    out: String,
}

impl<'p> Machine<'p> {
    pub fn new(context: &'p RenderContext, bounds: RenderBounds) -> Self {
        Self {
            context,
            bounds,
            fuel: bounds.instructions,
            depth: 0,
            scopes: vec![Scope { parent: None, variables: Vec::new() }],
            scope: 0,
            kept: 0,
            closures: Vec::new(),
            recursive: Vec::new(),
            namespaces: Vec::new(),
            changed: Vec::new(),
            bodies: Vec::new(),
            out: String::new(),
        }
    }

    pub fn render(mut self, body: &'p [Statement]) -> Outcome<String> {
        self.body(body)?;
        Ok(self.out)
    }

    /// Takes instructions.
    pub(super) fn spend(&mut self, instructions: usize) -> Outcome<()> {
        match self.fuel.checked_sub(instructions as u64) {
            Some(left) => {
                self.fuel = left;
                Ok(())
            }
            None => raise(format!("more than {} instructions", self.bounds.instructions)),
        }
    }

    pub(super) fn enter(&mut self) -> Outcome<()> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return raise(format!("recursion deeper than {DEPTH_MAX} statements and expressions"));
        }
        self.spend(1)
    }

    fn write(&mut self, text: &str) -> Outcome<()> {
        if self.out.len() + text.len() > self.bounds.bytes {
            return raise(format!("more than {} bytes of output", self.bounds.bytes));
        }
        self.spend(text.len() / 64)?;
        self.out.push_str(text);
        Ok(())
    }

    pub(super) fn lookup(&self, name: &str) -> Option<&PyValue> {
        let mut at = Some(self.scope);
        while let Some(scope) = at.and_then(|at| self.scopes.get(at)) {
            if let Some((_, value)) = scope.variables.iter().rev().find(|(other, _)| *other == name) {
                return Some(value);
            }
            at = scope.parent;
        }
        self.context.variables.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value)
    }

    fn define(&mut self, name: &'p str, value: PyValue) {
        let scope = &mut self.scopes[self.scope];
        match scope.variables.iter_mut().find(|(other, _)| *other == name) {
            Some((_, old)) => *old = value,
            None => scope.variables.push((name, value)),
        }
    }

    /// Runs something with variables of its own, inside of `parent`.
    fn scoped<T>(&mut self, parent: usize, work: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        let outer = self.scope;
        self.scope = self.scopes.len();
        self.scopes.push(Scope { parent: Some(parent), variables: Vec::new() });
        let own = self.scope;
        let result = work(self);
        self.scope = outer;
        if own > self.kept {
            self.scopes.truncate(own);
        }
        result
    }

    /// Runs something and takes its output.
    fn captured(&mut self, work: impl FnOnce(&mut Self) -> Outcome<()>) -> Outcome<String> {
        let outer = std::mem::take(&mut self.out);
        let result = work(self);
        let inner = std::mem::replace(&mut self.out, outer);
        result.map(|()| inner)
    }

    fn body(&mut self, nodes: &'p [Statement]) -> Outcome<Flow> {
        for node in nodes {
            self.enter()?;
            let flow = self.node(node);
            self.depth -= 1;
            match flow? {
                Flow::Next => {}
                other => return Ok(other),
            }
        }
        Ok(Flow::Next)
    }

    fn node(&mut self, node: &'p Statement) -> Outcome<Flow> {
        match node {
            Statement::Text(text) => self.write(text)?,
            Statement::Print(expr) => {
                let value = self.evaluate(expr)?;
                match &value {
                    PyValue::Text(text) => self.write(text),
                    other => self.write(&other.to_text()),
                }
                .map_err(|raised| raised.at(expr.line))?;
            }
            Statement::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.evaluate(test)?.is_true() {
                        return self.body(body);
                    }
                }
                return self.body(otherwise);
            }
            Statement::For(node) => {
                let iterable = self.evaluate(&node.iterable)?;
                return self.run_loop(node, &iterable, 0).map(|()| Flow::Next);
            }
            Statement::Set(target, expr, line) => {
                let value = self.evaluate(expr)?;
                self.assign(target, value).map_err(|raised| raised.at(*line))?;
            }
            Statement::SetBlock(target, filter, body, line) => {
                let text = self.filtered(filter, body)?;
                self.assign(target, text).map_err(|raised| raised.at(*line))?;
            }
            Statement::FilterBlock(filter, body) => {
                let text = self.filtered(filter, body)?.to_text();
                self.write(&text).map_err(|raised| raised.at(filter.line))?;
            }
            Statement::With(values, body, line) => {
                self.with(values, body).map_err(|raised| raised.at(*line))?
            }
            Statement::Macro(node) => {
                let value = self.close_over(node);
                self.kept = self.kept.max(self.scope);
                self.define(&node.name, value);
            }
            Statement::CallBlock(call, caller) => {
                let caller = self.close_over(caller);
                let text = self.call_with(call, Some(caller))?.to_text();
                self.write(&text).map_err(|raised| raised.at(call.line))?;
            }
            Statement::Scope(body) => {
                let parent = self.scope;
                self.scoped(parent, |machine| machine.body(body))?;
            }
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn close_over(&mut self, node: &'p Macro) -> PyValue {
        self.closures.push(Closure { node, scope: self.scope });
        PyValue::Macro(self.closures.len() - 1)
    }

    fn with(
        &mut self,
        values: &'p [(AssignTarget, super::syntax::Expr)],
        body: &'p [Statement],
    ) -> Outcome<()> {
        // The values do not see each other.
        let found: Vec<PyValue> =
            values.iter().map(|(_, expr)| self.evaluate(expr)).collect::<Outcome<_>>()?;
        let parent = self.scope;
        self.scoped(parent, |machine| {
            for ((target, _), value) in values.iter().zip(found) {
                machine.assign(target, value)?;
            }
            machine.body(body).map(|_| ())
        })
    }

    /// The text of a block, through its filters. The block has variables of its own.
    fn filtered(&mut self, filter: &'p super::syntax::Expr, body: &'p [Statement]) -> Outcome<PyValue> {
        let parent = self.scope;
        let text =
            self.captured(|machine| machine.scoped(parent, |machine| machine.body(body).map(|_| ())))?;
        self.bodies.push(PyValue::text(text));
        let value = self.evaluate(filter);
        self.bodies.pop();
        value
    }

    fn assign(&mut self, target: &'p AssignTarget, value: PyValue) -> Outcome<()> {
        match target {
            AssignTarget::Name(name) => self.define(name, value),
            AssignTarget::Attribute(name, attribute) => match self.lookup(name) {
                Some(&PyValue::Namespace(number)) => {
                    evaluate::check_attribute(attribute)?;
                    self.namespaces[number].insert(PyValue::text(attribute.as_str()), value);
                }
                _ => return raise("cannot assign attribute on non-namespace object"),
            },
            AssignTarget::Tuple(targets) => {
                let values = value.iterate()?;
                if values.len() != targets.len() {
                    let problem = if values.len() < targets.len() { "not enough" } else { "too many" };
                    return raise(format!("{problem} values to unpack (expected {})", targets.len()));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value)?;
                }
            }
        }
        Ok(())
    }

    fn run_loop(&mut self, node: &'p For, iterable: &PyValue, depth: usize) -> Outcome<()> {
        let mut items = iterable.iterate().map_err(|raised| raised.at(node.line))?;
        let parent = self.scope;
        if let Some(filter) = &node.filter {
            let mut kept = Vec::new();
            for item in items {
                let keep = self.scoped(parent, |machine| {
                    machine.assign(&node.target, item.clone())?;
                    Ok(machine.evaluate(filter)?.is_true())
                })?;
                kept.extend(keep.then_some(item));
            }
            items = kept;
        }
        if items.is_empty() {
            return self.scoped(parent, |machine| machine.body(&node.otherwise).map(|_| ()));
        }
        self.changed.push(None);
        let number = self.changed.len() - 1;
        let recursive = node.recursive.then(|| {
            self.recursive.push((node, parent));
            self.recursive.len() - 1
        });
        let items = Rc::new(items);
        for index in 0..items.len() {
            self.spend(1)?;
            let round = Round { items: items.clone(), index, depth, number, recursive };
            let flow = self.scoped(parent, |machine| {
                machine.define("loop", PyValue::Loop(Rc::new(round)));
                machine.assign(&node.target, items[index].clone()).map_err(|raised| raised.at(node.line))?;
                machine.body(&node.body)
            })?;
            if flow == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    /// `loop(items)`.
    pub(super) fn run_again(&mut self, number: usize, items: &PyValue, depth: usize) -> Outcome<PyValue> {
        let (node, parent) = self.recursive[number];
        let outer = std::mem::replace(&mut self.scope, parent);
        let text = self.captured(|machine| machine.run_loop(node, items, depth + 1));
        self.scope = outer;
        text.map(PyValue::text)
    }

    /// Runs a macro. An argument that is not given takes its default, which sees those before it.
    pub(super) fn run_macro(
        &mut self,
        closure: Closure<'p>,
        arguments: Vec<Option<PyValue>>,
        extras: Vec<(&'static str, PyValue)>,
    ) -> Outcome<PyValue> {
        if closure.scope >= self.scopes.len() {
            return raise("a caller is gone when its call has ended");
        }
        let text = self.captured(|machine| {
            machine.scoped(closure.scope, |machine| {
                for ((name, default), argument) in closure.node.parameters.iter().zip(arguments) {
                    let value = match (argument, default) {
                        (Some(value), _) => value,
                        (None, Some(default)) => machine.evaluate(default)?,
                        (None, None) => PyValue::undefined(format!("parameter '{name}' was not provided")),
                    };
                    machine.define(name, value);
                }
                for (name, value) in extras {
                    machine.define(name, value);
                }
                machine.body(&closure.node.body).map(|_| ())
            })
        })?;
        self.spend(text.len() / 64)?;
        Ok(PyValue::text(text))
    }
}
