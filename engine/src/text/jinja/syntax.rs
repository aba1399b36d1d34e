//! A parsed template: statements and expressions, each with the line where it begins.

/// A value that stands in the source.
#[derive(Debug, Clone)]
pub enum Literal {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
}

/// An expression.
#[derive(Debug)]
pub struct Expr {
    pub line: usize,
    /// Expressions on the way to the innermost one, itself included.
    pub depth: usize,
    pub kind: ExprKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BinaryOp {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareOp {
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}

#[derive(Debug)]
pub enum ExprKind {
    Literal(Literal),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, String),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, Box<[Option<Expr>; 3]>),
    Call(Box<Expr>, Arguments),
    Filter(Box<Expr>, String, Arguments),
    Test(Box<Expr>, String, Arguments),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    Binary(BinaryOp, Box<Expr>, Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Compare(Box<Expr>, Vec<(CompareOp, Expr)>),
    Concat(Vec<Expr>),
    /// `then if test else other`.
    Conditional(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
    /// The text of the block that a filter stands over.
    Body,
}

/// Arguments of a call.
#[derive(Debug, Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(String, Expr)>,
    /// `*list`.
    pub spread: Option<Box<Expr>>,
    /// `**mapping`.
    pub spread_named: Option<Box<Expr>>,
}

/// What a value is assigned to.
#[derive(Debug)]
pub enum AssignTarget {
    Name(String),
    Tuple(Vec<AssignTarget>),
    /// `namespace.attribute`.
    Attribute(String, String),
}

/// A statement, with the line of its tag where it can fail by itself.
#[derive(Debug)]
pub enum Statement {
    Text(String),
    Print(Expr),
    If(Vec<(Expr, Vec<Statement>)>, Vec<Statement>),
    For(For),
    Set(AssignTarget, Expr, usize),
    /// `{% set x %}body{% endset %}`, with the filters over [`ExprKind::Body`].
    SetBlock(AssignTarget, Expr, Vec<Statement>, usize),
    With(Vec<(AssignTarget, Expr)>, Vec<Statement>, usize),
    Macro(Macro),
    /// The call, and its `caller`.
    CallBlock(Expr, Macro),
    FilterBlock(Expr, Vec<Statement>),
    /// A body with variables of its own.
    Scope(Vec<Statement>),
    Break,
    Continue,
}

#[derive(Debug)]
pub struct For {
    pub target: AssignTarget,
    pub iterable: Expr,
    pub filter: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Statement>,
    pub otherwise: Vec<Statement>,
    pub line: usize,
}

#[derive(Debug)]
pub struct Macro {
    pub name: String,
    /// Names, and the defaults of the last of them.
    pub parameters: Vec<(String, Option<Expr>)>,
    pub body: Vec<Statement>,
    /// What its body refers to beyond its parameters: `varargs`, `kwargs` and `caller` are taken only then.
    pub names: Vec<&'static str>,
}
