//! What a command prints: results for machines on standard output, everything else on standard error.
//!
//! With `--json` standard output holds JSON alone. A closed pipe ends the process quietly.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Where a command prints.
#[derive(Debug, Clone, Copy)]
pub struct Printer {
    /// Whether standard output is for machines.
    pub json: bool,
}

impl Printer {
    /// Prints one object on one line, if standard output is for machines.
    pub fn object<T: Serialize>(&self, value: &T) {
        if self.json {
            line(&serde_json::to_string(value).expect("our own types are JSON"));
        }
    }

    /// Prints one line, if standard output is for people.
    pub fn say(&self, text: &str) {
        if !self.json {
            line(text);
        }
    }
}

/// Prints one line on standard output.
pub fn line(text: &str) {
    piece(text);
    piece("\n");
}

/// Prints text on standard output at once.
pub fn piece(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        // The reader has gone, as in `millrace results | head`: there is nobody left to tell.
        std::process::exit(0);
    }
}

/// Prints one line on standard error.
pub fn note(text: &str) {
    // Standard error that cannot be written to must not end the work.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// How often the bar is drawn while nothing else happens.
const TICK: Duration = Duration::from_millis(200);

/// A progress bar on standard error; without a terminal, single lines at most every tenth of the way.
pub struct Progress {
    bar: ProgressBar,
    plain: Option<Plain>,
}

struct Plain {
    what: &'static str,
    total: u64,
    tenths_told: u64,
}

impl Progress {
    /// A bar that ends at `total`.
    pub fn start(what: &'static str, total: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            let plain = Plain { what, total, tenths_told: 0 };
            return Self { bar: ProgressBar::hidden(), plain: Some(plain) };
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let form = "{prefix:9} [{bar:32}] {pos}/{len}  {elapsed}  {msg}";
        bar.set_style(ProgressStyle::with_template(form).expect("a constant template").progress_chars("=> "));
        bar.set_prefix(what);
        bar.enable_steady_tick(TICK);
        Self { bar, plain: None }
    }

    /// Shows how far the work is.
    pub fn set(&mut self, position: u64, message: String) {
        self.bar.set_position(position);
        if let Some(plain) = &mut self.plain {
            let tenths = (position * 10).checked_div(plain.total).unwrap_or(10);
            if tenths > plain.tenths_told {
                plain.tenths_told = tenths;
                note(&format!("{} {position}/{} {message}", plain.what, plain.total));
            }
        }
        self.bar.set_message(message);
    }

    /// Takes the bar away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Rows under a head, in columns as wide as they need to be; the first column is flush left.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let format_row = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![format_row(head.to_vec())];
    lines.extend(rows.iter().map(|row| format_row(row.iter().map(String::as_str).collect())));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["high".to_owned(), "12".to_owned()], vec!["low".to_owned(), "3".to_owned()]];
        assert_eq!(table(&["class", "n"], &rows), "class   n\nhigh   12\nlow     3");
    }
}
