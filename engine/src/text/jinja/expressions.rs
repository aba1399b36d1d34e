//! Tokens to expressions, with Jinja2's order of operators.

use super::lexer::Lexeme;
use super::parser::{DEPTH_MAX, Parser};
use super::syntax::{Arguments, BinaryOp, CompareOp, Expr, ExprKind, Literal};
use super::{Outcome, raise};

fn deepest<'a>(parts: impl IntoIterator<Item = &'a Expr>) -> usize {
    parts.into_iter().map(|part| part.depth).max().unwrap_or(0)
}

impl Arguments {
    /// Of the deepest of them.
    pub(super) fn depth(&self) -> usize {
        let spreads = self.spread.iter().chain(&self.spread_named).map(|expr| &**expr);
        deepest(self.positional.iter().chain(self.named.iter().map(|(_, value)| value)).chain(spreads))
    }
}

impl Parser {
    fn make(&self, line: usize, inner: usize, kind: ExprKind) -> Outcome<Expr> {
        self.built(Expr { line, depth: inner + 1, kind })
    }

    fn make1(&self, line: usize, of: Expr, kind: impl FnOnce(Box<Expr>) -> ExprKind) -> Outcome<Expr> {
        let depth = of.depth;
        self.make(line, depth, kind(Box::new(of)))
    }

    fn make2(
        &self,
        line: usize,
        (a, b): (Expr, Expr),
        kind: impl FnOnce(Box<Expr>, Box<Expr>) -> ExprKind,
    ) -> Outcome<Expr> {
        let depth = a.depth.max(b.depth);
        self.make(line, depth, kind(Box::new(a), Box::new(b)))
    }

    /// `a`, or `a, b` without brackets, up to what cannot begin an expression.
    pub(super) fn tuple(&mut self, conditional: bool, ends: &[&str]) -> Outcome<Expr> {
        let line = self.line();
        let mut parts = Vec::new();
        let mut tuple = false;
        while !self.tuple_ends(ends) {
            parts.push(self.expression(conditional)?);
            if !self.skip_symbol(",") {
                break;
            }
            tuple = true;
        }
        match parts.pop() {
            Some(only) if !tuple => Ok(only),
            None => self.unexpected("an expression"),
            last => {
                parts.extend(last);
                let depth = deepest(&parts);
                self.make(line, depth, ExprKind::Tuple(parts))
            }
        }
    }

    fn tuple_ends(&self, ends: &[&str]) -> bool {
        matches!(self.current(), Lexeme::PrintEnd | Lexeme::BlockEnd | Lexeme::Symbol(")"))
            || ends.iter().any(|name| self.is_name(name))
    }

    /// An expression; without `conditional`, `if` does not belong to it.
    pub(super) fn expression(&mut self, conditional: bool) -> Outcome<Expr> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return raise(format!("an expression nests deeper than {DEPTH_MAX}"));
        }
        let expr = if conditional { self.conditional_expression() } else { self.or() };
        self.depth -= 1;
        expr
    }

    fn conditional_expression(&mut self) -> Outcome<Expr> {
        let mut then = self.or()?;
        while self.is_name("if") {
            let line = self.line();
            self.next();
            let test = self.or()?;
            let other = if self.skip_name("else") { Some(Box::new(self.expression(true)?)) } else { None };
            let depth = deepest([&then, &test].into_iter().chain(other.as_deref()));
            let kind = ExprKind::Conditional(Box::new(then), Box::new(test), other);
            then = self.make(line, depth, kind)?;
        }
        Ok(then)
    }

    fn or(&mut self) -> Outcome<Expr> {
        let mut left = self.and()?;
        while self.is_name("or") {
            let line = self.line();
            self.next();
            let right = self.and()?;
            left = self.make2(line, (left, right), ExprKind::Or)?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Outcome<Expr> {
        let mut left = self.not()?;
        while self.is_name("and") {
            let line = self.line();
            self.next();
            let right = self.not()?;
            left = self.make2(line, (left, right), ExprKind::And)?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let mut negations = 0;
        while self.skip_name("not") {
            negations += 1;
        }
        let mut expr = self.comparison()?;
        for _ in 0..negations {
            expr = self.make1(line, expr, ExprKind::Not)?;
        }
        Ok(expr)
    }

    fn comparison(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut others = Vec::new();
        loop {
            let operator = match self.current() {
                Lexeme::Symbol("==") => CompareOp::Equal,
                Lexeme::Symbol("!=") => CompareOp::Unequal,
                Lexeme::Symbol("<") => CompareOp::Less,
                Lexeme::Symbol("<=") => CompareOp::LessOrEqual,
                Lexeme::Symbol(">") => CompareOp::Greater,
                Lexeme::Symbol(">=") => CompareOp::GreaterOrEqual,
                Lexeme::Name(name) if name == "in" => CompareOp::In,
                Lexeme::Name(name)
                    if name == "not" && matches!(self.following(), Lexeme::Name(n) if n == "in") =>
                {
                    self.next();
                    CompareOp::NotIn
                }
                _ => break,
            };
            self.next();
            others.push((operator, self.sum()?));
        }
        if others.is_empty() {
            return Ok(first);
        }
        let depth = deepest([&first].into_iter().chain(others.iter().map(|(_, other)| other)));
        self.make(line, depth, ExprKind::Compare(Box::new(first), others))
    }

    fn sum(&mut self) -> Outcome<Expr> {
        let mut left = self.concatenation()?;
        loop {
            let operator = match self.current() {
                Lexeme::Symbol("+") => BinaryOp::Add,
                Lexeme::Symbol("-") => BinaryOp::Subtract,
                _ => return Ok(left),
            };
            let line = self.line();
            self.next();
            let right = self.concatenation()?;
            left = self.make2(line, (left, right), |left, right| ExprKind::Binary(operator, left, right))?;
        }
    }

    fn concatenation(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let mut parts = vec![self.product()?];
        while self.skip_symbol("~") {
            parts.push(self.product()?);
        }
        match parts.pop() {
            Some(only) if parts.is_empty() => Ok(only),
            last => {
                parts.extend(last);
                let depth = deepest(&parts);
                self.make(line, depth, ExprKind::Concat(parts))
            }
        }
    }

    fn product(&mut self) -> Outcome<Expr> {
        let mut left = self.power()?;
        loop {
            let operator = match self.current() {
                Lexeme::Symbol("*") => BinaryOp::Multiply,
                Lexeme::Symbol("/") => BinaryOp::Divide,
                Lexeme::Symbol("//") => BinaryOp::FloorDivide,
                Lexeme::Symbol("%") => BinaryOp::Modulo,
                _ => return Ok(left),
            };
            let line = self.line();
            self.next();
            let right = self.power()?;
            left = self.make2(line, (left, right), |left, right| ExprKind::Binary(operator, left, right))?;
        }
    }

    fn power(&mut self) -> Outcome<Expr> {
        let mut left = self.unary(true)?;
        while self.is_symbol("**") {
            let line = self.line();
            self.next();
            let right = self.unary(true)?;
            left = self.make2(line, (left, right), |a, b| ExprKind::Binary(BinaryOp::Power, a, b))?;
        }
        Ok(left)
    }

    fn unary(&mut self, filters: bool) -> Outcome<Expr> {
        let line = self.line();
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return raise(format!("an expression nests deeper than {DEPTH_MAX}"));
        }
        let expr = if self.skip_symbol("-") {
            let of = self.unary(false)?;
            self.make1(line, of, ExprKind::Negative)?
        } else if self.skip_symbol("+") {
            let of = self.unary(false)?;
            self.make1(line, of, ExprKind::Positive)?
        } else {
            self.primary()?
        };
        self.depth -= 1;
        let expr = self.postfix(expr)?;
        if filters { self.filters(expr) } else { Ok(expr) }
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let kind = match self.current() {
            Lexeme::Symbol("[") => return self.list(),
            Lexeme::Symbol("{") => return self.dict(),
            Lexeme::Symbol("(") => {
                self.next();
                let inner = if self.is_symbol(")") {
                    self.make(line, 0, ExprKind::Tuple(Vec::new()))?
                } else {
                    self.tuple(true, &[])?
                };
                self.expect_symbol(")")?;
                return Ok(inner);
            }
            Lexeme::Name(_) | Lexeme::Text(_) | Lexeme::Int(_) | Lexeme::Float(_) => match self.next() {
                Lexeme::Name(name) => match name.as_str() {
                    "true" | "True" => ExprKind::Literal(Literal::Bool(true)),
                    "false" | "False" => ExprKind::Literal(Literal::Bool(false)),
                    "none" | "None" => ExprKind::Literal(Literal::None),
                    _ => self.read(name)?,
                },
                Lexeme::Text(mut text) => {
                    while let Lexeme::Text(more) = self.current() {
                        text.push_str(more);
                        self.next();
                    }
                    ExprKind::Literal(Literal::Text(text))
                }
                Lexeme::Int(value) => ExprKind::Literal(Literal::Int(value)),
                Lexeme::Float(value) => ExprKind::Literal(Literal::Float(value)),
                _ => return self.unexpected("an expression"),
            },
            _ => return self.unexpected("an expression"),
        };
        self.make(line, 0, kind)
    }

    fn list(&mut self) -> Outcome<Expr> {
        let line = self.line();
        self.expect_symbol("[")?;
        let mut parts = Vec::new();
        while !self.is_symbol("]") {
            if !parts.is_empty() {
                self.expect_symbol(",")?;
            }
            if self.is_symbol("]") {
                break;
            }
            parts.push(self.expression(true)?);
        }
        self.expect_symbol("]")?;
        let depth = deepest(&parts);
        self.make(line, depth, ExprKind::List(parts))
    }

    fn dict(&mut self) -> Outcome<Expr> {
        let line = self.line();
        self.expect_symbol("{")?;
        let mut parts = Vec::new();
        while !self.is_symbol("}") {
            if !parts.is_empty() {
                self.expect_symbol(",")?;
            }
            if self.is_symbol("}") {
                break;
            }
            let key = self.expression(true)?;
            self.expect_symbol(":")?;
            parts.push((key, self.expression(true)?));
        }
        self.expect_symbol("}")?;
        let depth = deepest(parts.iter().flat_map(|(key, value)| [key, value]));
        self.make(line, depth, ExprKind::Dict(parts))
    }

    /// `.name`, `[item]` and `(arguments)` behind a value.
    pub(super) fn postfix(&mut self, mut expr: Expr) -> Outcome<Expr> {
        loop {
            let line = self.line();
            expr = match self.current() {
                Lexeme::Symbol(".") => {
                    self.next();
                    match self.next() {
                        Lexeme::Name(name) => self.make1(line, expr, |of| ExprKind::Attribute(of, name))?,
                        Lexeme::Int(number) => {
                            let item = self.make(line, 0, ExprKind::Literal(Literal::Int(number)))?;
                            self.make2(line, (expr, item), ExprKind::Item)?
                        }
                        _ => return raise("expected name or number"),
                    }
                }
                Lexeme::Symbol("[") => {
                    self.next();
                    let item = self.subscript(expr, line)?;
                    self.expect_symbol("]")?;
                    item
                }
                Lexeme::Symbol("(") => self.call(expr)?,
                _ => return Ok(expr),
            };
        }
    }

    fn call(&mut self, of: Expr) -> Outcome<Expr> {
        let line = self.line();
        let arguments = self.arguments()?;
        let depth = of.depth.max(arguments.depth());
        self.make(line, depth, ExprKind::Call(Box::new(of), arguments))
    }

    fn subscript(&mut self, of: Expr, line: usize) -> Outcome<Expr> {
        let mut parts: [Option<Expr>; 3] = [None, None, None];
        if !self.is_symbol(":") {
            let item = self.expression(true)?;
            if self.is_symbol(",") {
                return raise("a subscript with commas is not supported");
            }
            if !self.is_symbol(":") {
                return self.make2(line, (of, item), ExprKind::Item);
            }
            parts[0] = Some(item);
        }
        for part in &mut parts[1..] {
            if !self.skip_symbol(":") {
                break;
            }
            if !self.is_symbol(":") && !self.is_symbol("]") {
                *part = Some(self.expression(true)?);
            }
        }
        let depth = of.depth.max(deepest(parts.iter().flatten()));
        self.make(line, depth, ExprKind::Slice(Box::new(of), Box::new(parts)))
    }

    fn filters(&mut self, mut expr: Expr) -> Outcome<Expr> {
        loop {
            expr = match self.current() {
                Lexeme::Symbol("|") => {
                    self.next();
                    self.filter(expr)?
                }
                Lexeme::Name(name) if name == "is" => {
                    self.next();
                    self.test(expr)?
                }
                Lexeme::Symbol("(") => self.call(expr)?,
                _ => return Ok(expr),
            };
        }
    }

    fn test(&mut self, of: Expr) -> Outcome<Expr> {
        let line = self.line();
        let negated = self.skip_name("not");
        let name = self.test_name()?;
        let arguments = match self.current() {
            Lexeme::Symbol("(") => self.arguments()?,
            Lexeme::Name(word) if matches!(word.as_str(), "else" | "or" | "and") => Arguments::default(),
            Lexeme::Name(word) if word == "is" => return raise("You cannot chain multiple tests with is"),
            Lexeme::Name(_)
            | Lexeme::Text(_)
            | Lexeme::Int(_)
            | Lexeme::Float(_)
            | Lexeme::Symbol("[" | "{") => {
                let argument = self.primary()?;
                Arguments { positional: vec![self.postfix(argument)?], ..Arguments::default() }
            }
            _ => Arguments::default(),
        };
        let depth = of.depth.max(arguments.depth());
        let test = self.make(line, depth, ExprKind::Test(Box::new(of), name, arguments))?;
        if negated { self.make1(line, test, ExprKind::Not) } else { Ok(test) }
    }

    /// Arguments in brackets.
    pub(super) fn arguments(&mut self) -> Outcome<Arguments> {
        let mut found = Arguments::default();
        self.expect_symbol("(")?;
        let mut first = true;
        while !self.is_symbol(")") {
            if !first {
                self.expect_symbol(",")?;
            }
            first = false;
            if self.is_symbol(")") {
                break;
            }
            let is_named =
                matches!(self.current(), Lexeme::Name(_)) && *self.following() == Lexeme::Symbol("=");
            let is_last = found.spread.is_some() || found.spread_named.is_some();
            if self.skip_symbol("**") {
                found.spread_named = Some(Box::new(self.expression(true)?));
            } else if self.skip_symbol("*") {
                found.spread = Some(Box::new(self.expression(true)?));
            } else if is_named {
                let name = self.name()?;
                self.expect_symbol("=")?;
                found.named.push((name, self.expression(true)?));
            } else if is_last || !found.named.is_empty() {
                return raise("invalid syntax for function call expression");
            } else {
                found.positional.push(self.expression(true)?);
            }
        }
        self.expect_symbol(")")?;
        Ok(found)
    }
}
