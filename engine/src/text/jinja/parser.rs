//! Tokens to statements. Expressions stand in [`super::expressions`].

use super::lexer::Lexeme;
use super::syntax::{Arguments, AssignTarget, Expr, ExprKind, For, Macro, Statement};
use super::{Outcome, Raised, checks, filters, raise};

/// Blocks within blocks; an expression's parts within parts. Python's own limit is of this order.
pub const DEPTH_MAX: usize = 150;

/// Global functions of Jinja2 that no template for chats needs.
const UNSUPPORTED_GLOBALS: [&str; 3] = ["lipsum", "cycler", "joiner"];

/// Reads statements.
pub struct Parser {
    tokens: Vec<(Lexeme, usize)>,
    at: usize,
    pub(super) depth: usize,
    loops: usize,
    /// Names that were read, for what a macro takes.
    pub(super) names: Vec<String>,
}

impl Parser {
    /// Of tokens that end with [`Lexeme::End`].
    pub fn new(tokens: Vec<(Lexeme, usize)>) -> Self {
        Self { tokens, at: 0, depth: 0, loops: 0, names: Vec::new() }
    }

    /// Reads a whole template.
    pub fn template(mut self) -> Outcome<Vec<Statement>> {
        match self.body(&[]) {
            Ok((body, _)) => Ok(body),
            Err(raised) => Err(raised.at(self.line())),
        }
    }

    pub(super) fn line(&self) -> usize {
        self.tokens[self.at].1
    }

    pub(super) fn current(&self) -> &Lexeme {
        &self.tokens[self.at].0
    }

    pub(super) fn following(&self) -> &Lexeme {
        &self.tokens[(self.at + 1).min(self.tokens.len() - 1)].0
    }

    pub(super) fn next(&mut self) -> Lexeme {
        let token = self.current().clone();
        self.at = (self.at + 1).min(self.tokens.len() - 1);
        token
    }

    pub(super) fn is_symbol(&self, symbol: &str) -> bool {
        matches!(self.current(), Lexeme::Symbol(found) if *found == symbol)
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.current(), Lexeme::Name(found) if found == name)
    }

    pub(super) fn skip_symbol(&mut self, symbol: &str) -> bool {
        let found = self.is_symbol(symbol);
        if found {
            self.next();
        }
        found
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        if found {
            self.next();
        }
        found
    }

    pub(super) fn expect_symbol(&mut self, symbol: &'static str) -> Outcome<()> {
        if self.skip_symbol(symbol) { Ok(()) } else { self.unexpected(symbol) }
    }

    pub(super) fn unexpected<T>(&self, expected: &str) -> Outcome<T> {
        let found = match self.current() {
            Lexeme::Data(_) => "text".to_owned(),
            Lexeme::BlockBegin => "{%".into(),
            Lexeme::BlockEnd => "%}".into(),
            Lexeme::PrintBegin => "{{".into(),
            Lexeme::PrintEnd => "}}".into(),
            Lexeme::Name(name) => format!("'{name}'"),
            Lexeme::Text(_) => "a string".into(),
            Lexeme::Int(_) | Lexeme::Float(_) => "a number".into(),
            Lexeme::Symbol(symbol) => format!("'{symbol}'"),
            Lexeme::End => "the end of the template".into(),
        };
        Err(Raised { message: format!("expected {expected}, found {found}"), line: Some(self.line()) })
    }

    pub(super) fn name(&mut self) -> Outcome<String> {
        match self.next() {
            Lexeme::Name(name) => Ok(name),
            _ => {
                self.at = self.at.saturating_sub(1);
                self.unexpected("a name")
            }
        }
    }

    fn block_end(&mut self) -> Outcome<()> {
        match self.current() {
            Lexeme::BlockEnd => {
                self.next();
                Ok(())
            }
            _ => self.unexpected("%}"),
        }
    }

    /// Reads up to one of the tags that end a body; gives its name and stands behind it. Without such tags, up to
    /// the end of the template.
    fn body(&mut self, ends: &[&str]) -> Outcome<(Vec<Statement>, String)> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return raise(format!("blocks nest deeper than {DEPTH_MAX}"));
        }
        let mut nodes = Vec::new();
        loop {
            match self.current() {
                Lexeme::End if ends.is_empty() => {
                    self.depth -= 1;
                    return Ok((nodes, String::new()));
                }
                Lexeme::Data(_) => {
                    if let Lexeme::Data(text) = self.next() {
                        nodes.push(Statement::Text(text));
                    }
                }
                Lexeme::PrintBegin => {
                    self.next();
                    nodes.push(Statement::Print(self.tuple(true, &[])?));
                    match self.current() {
                        Lexeme::PrintEnd => self.next(),
                        _ => return self.unexpected("}}"),
                    };
                }
                Lexeme::BlockBegin => {
                    self.next();
                    let line = self.line();
                    let name = self.name()?;
                    if ends.contains(&name.as_str()) {
                        self.depth -= 1;
                        return Ok((nodes, name));
                    }
                    self.statement(&name, line, &mut nodes)?;
                    self.block_end()?;
                }
                _ => return self.unexpected(&format!("one of the tags {ends:?}")),
            }
        }
    }

    /// Reads a body from behind its opening tag's head.
    fn block(&mut self, ends: &[&str]) -> Outcome<(Vec<Statement>, String)> {
        self.skip_symbol(":");
        self.block_end()?;
        self.body(ends)
    }

    fn statement(&mut self, name: &str, line: usize, nodes: &mut Vec<Statement>) -> Outcome<()> {
        let node = match name {
            "if" => self.conditional()?,
            "for" => self.loops(line)?,
            "set" => self.assignment(line)?,
            "with" => self.with(line)?,
            "macro" => {
                let name = self.name()?;
                Statement::Macro(self.macro_body(name, "endmacro", None)?)
            }
            "call" => self.call_block()?,
            "filter" => {
                let filter = self.filter_chain(true)?;
                Statement::FilterBlock(filter, self.block(&["endfilter"])?.0)
            }
            "generation" => Statement::Scope(self.block(&["endgeneration"])?.0),
            "block" => {
                let name = self.name()?;
                self.skip_name("scoped");
                let body = self.block(&["endblock"])?.0;
                self.skip_name(&name);
                Statement::Scope(body)
            }
            "print" => {
                while *self.current() != Lexeme::BlockEnd {
                    nodes.push(Statement::Print(self.expression(true)?));
                    self.skip_symbol(",");
                }
                return Ok(());
            }
            "break" | "continue" if self.loops == 0 => return raise(format!("'{name}' outside of a loop")),
            "break" => Statement::Break,
            "continue" => Statement::Continue,
            "extends" | "include" | "import" | "from" => {
                return raise(format!("'{name}': a chat template cannot load another template"));
            }
            other => return raise(format!("unknown tag '{other}'")),
        };
        nodes.push(node);
        Ok(())
    }

    fn conditional(&mut self) -> Outcome<Statement> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, &[])?;
            let (body, end) = self.block(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match end.as_str() {
                "elif" => {}
                "else" => return Ok(Statement::If(branches, self.block(&["endif"])?.0)),
                _ => return Ok(Statement::If(branches, Vec::new())),
            }
        }
    }

    fn loops(&mut self, line: usize) -> Outcome<Statement> {
        let target = self.target(false)?;
        if !self.skip_name("in") {
            return self.unexpected("'in'");
        }
        let iterable = self.tuple(false, &["recursive"])?;
        let filter = if self.skip_name("if") { Some(self.expression(true)?) } else { None };
        let recursive = self.skip_name("recursive");
        self.loops += 1;
        let (body, end) = self.block(&["endfor", "else"])?;
        self.loops -= 1;
        let otherwise = if end == "else" { self.block(&["endfor"])?.0 } else { Vec::new() };
        Ok(Statement::For(For { target, iterable, filter, recursive, body, otherwise, line }))
    }

    fn assignment(&mut self, line: usize) -> Outcome<Statement> {
        let target = self.target(true)?;
        if self.skip_symbol("=") {
            return Ok(Statement::Set(target, self.tuple(true, &[])?, line));
        }
        let filter = self.filter_chain(false)?;
        Ok(Statement::SetBlock(target, filter, self.block(&["endset"])?.0, line))
    }

    fn with(&mut self, line: usize) -> Outcome<Statement> {
        let mut values = Vec::new();
        while *self.current() != Lexeme::BlockEnd {
            if !values.is_empty() {
                self.expect_symbol(",")?;
            }
            let target = self.target(false)?;
            self.expect_symbol("=")?;
            values.push((target, self.expression(true)?));
        }
        Ok(Statement::With(values, self.block(&["endwith"])?.0, line))
    }

    fn call_block(&mut self) -> Outcome<Statement> {
        let parameters = if self.is_symbol("(") { Some(self.parameters()?) } else { None };
        let call = self.expression(true)?;
        if !matches!(call.kind, ExprKind::Call(..)) {
            return self.unexpected("a call");
        }
        let caller = self.macro_body("caller".into(), "endcall", Some(parameters.unwrap_or_default()))?;
        Ok(Statement::CallBlock(call, caller))
    }

    fn macro_body(
        &mut self,
        name: String,
        end: &'static str,
        parameters: Option<Vec<(String, Option<Expr>)>>,
    ) -> Outcome<Macro> {
        let parameters = match parameters {
            Some(parameters) => parameters,
            None => self.parameters()?,
        };
        let outer = std::mem::take(&mut self.names);
        let loops = std::mem::take(&mut self.loops);
        let (body, _) = self.block(&[end])?;
        self.loops = loops;
        let names = ["caller", "kwargs", "varargs"]
            .into_iter()
            .filter(|name| self.names.iter().any(|read| read == name))
            .filter(|name| parameters.iter().all(|(parameter, _)| parameter != name))
            .collect();
        self.names.extend(outer);
        Ok(Macro { name, parameters, body, names })
    }

    fn parameters(&mut self) -> Outcome<Vec<(String, Option<Expr>)>> {
        self.expect_symbol("(")?;
        let mut parameters: Vec<(String, Option<Expr>)> = Vec::new();
        while !self.is_symbol(")") {
            if !parameters.is_empty() {
                self.expect_symbol(",")?;
            }
            let name = self.name()?;
            let default = if self.skip_symbol("=") { Some(self.expression(true)?) } else { None };
            if default.is_none() && parameters.iter().any(|(_, default)| default.is_some()) {
                return raise("non-default argument follows default argument");
            }
            parameters.push((name, default));
        }
        self.expect_symbol(")")?;
        Ok(parameters)
    }

    /// `a`, `a, b`, `(a, (b, c))`, and where allowed `a.b`.
    fn target(&mut self, with_attribute: bool) -> Outcome<AssignTarget> {
        let mut targets = Vec::new();
        let mut tuple = false;
        loop {
            if self.skip_symbol("(") {
                targets.push(self.target(with_attribute)?);
                self.expect_symbol(")")?;
            } else {
                let name = self.name()?;
                if matches!(name.as_str(), "true" | "false" | "none" | "True" | "False" | "None") {
                    return raise(format!("can't assign to '{name}'"));
                }
                if with_attribute && self.skip_symbol(".") {
                    targets.push(AssignTarget::Attribute(name, self.name()?));
                } else {
                    targets.push(AssignTarget::Name(name));
                }
            }
            if !self.skip_symbol(",") {
                break;
            }
            tuple = true;
            if !matches!(self.current(), Lexeme::Name(name) if name != "in") && !self.is_symbol("(") {
                break;
            }
        }
        match targets.pop() {
            Some(only) if !tuple && targets.is_empty() => Ok(only),
            last => {
                targets.extend(last);
                Ok(AssignTarget::Tuple(targets))
            }
        }
    }

    /// The filters over a block's text.
    fn filter_chain(&mut self, begun: bool) -> Outcome<Expr> {
        let mut chain = Expr { line: self.line(), depth: 1, kind: ExprKind::Body };
        let mut begun = begun;
        while begun || self.skip_symbol("|") {
            begun = false;
            chain = self.filter(chain)?;
        }
        Ok(chain)
    }

    /// The name and arguments of a filter, behind its `|`.
    pub(super) fn filter(&mut self, of: Expr) -> Outcome<Expr> {
        let line = self.line();
        let name = self.dotted_name()?;
        if !filters::is_known(&name) {
            return raise(format!("no filter named '{name}' is supported"));
        }
        let arguments = if self.is_symbol("(") { self.arguments()? } else { Arguments::default() };
        let depth = of.depth.max(arguments.depth()) + 1;
        self.built(Expr { line, depth, kind: ExprKind::Filter(Box::new(of), name, arguments) })
    }

    /// The name and argument of a test, behind its `is` and `not`.
    pub(super) fn test_name(&mut self) -> Outcome<String> {
        let name = self.dotted_name()?;
        if !checks::is_known(&name) {
            return raise(format!("no test named '{name}' is supported"));
        }
        Ok(name)
    }

    fn dotted_name(&mut self) -> Outcome<String> {
        let mut name = self.name()?;
        while self.skip_symbol(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name)
    }

    /// A name that is read.
    pub(super) fn read(&mut self, name: String) -> Outcome<ExprKind> {
        if UNSUPPORTED_GLOBALS.contains(&name.as_str()) && self.is_symbol("(") {
            return raise(format!("the function '{name}' is not supported"));
        }
        self.names.push(name.clone());
        Ok(ExprKind::Name(name))
    }

    /// An expression, unless it is too deep.
    pub(super) fn built(&self, expr: Expr) -> Outcome<Expr> {
        if expr.depth > DEPTH_MAX {
            return raise(format!("an expression nests deeper than {DEPTH_MAX}"));
        }
        Ok(expr)
    }
}
