//! `strftime_now`: the part of C's `strftime` that templates use, in the C locale and UTC.

use std::fmt::Write as _;

use time::OffsetDateTime;

use super::{Outcome, raise};

/// Formats a time in Unix seconds.
pub fn strftime(seconds: i64, format: &str) -> Outcome<String> {
    let Ok(at) = OffsetDateTime::from_unix_timestamp(seconds) else {
        return raise(format!("strftime_now: {seconds} is not a time"));
    };
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next().unwrap_or('%');
        let padded = code != '-';
        if !padded {
            code = chars.next().unwrap_or('%');
        }
        let spaced = |value: u8| format!("{value:>2}");
        let (month, weekday) = (at.month().to_string(), at.weekday().to_string());
        let mut number = |value: u32, width: usize| {
            let width = if padded { width } else { 0 };
            let _ = write!(out, "{value:0width$}");
        };
        match code {
            'd' => number(at.day().into(), 2),
            'm' => number(u8::from(at.month()).into(), 2),
            'Y' => number(at.year().unsigned_abs(), 4),
            'y' => number(at.year().unsigned_abs() % 100, 2),
            'H' => number(at.hour().into(), 2),
            'I' => number(u32::from((at.hour() + 11) % 12) + 1, 2),
            'M' => number(at.minute().into(), 2),
            'S' => number(at.second().into(), 2),
            'j' => number(at.ordinal().into(), 3),
            'f' => number(0, 6),
            'u' => number(at.weekday().number_from_monday().into(), 1),
            'w' => number(at.weekday().number_days_from_sunday().into(), 1),
            'C' => number(at.year().unsigned_abs() / 100, 2),
            'G' => number(at.to_iso_week_date().0.unsigned_abs(), 4),
            'V' => number(at.iso_week().into(), 2),
            'U' => number(at.sunday_based_week().into(), 2),
            'W' => number(at.monday_based_week().into(), 2),
            's' => out.push_str(&seconds.to_string()),
            'k' => out.push_str(&spaced(at.hour())),
            'l' => out.push_str(&spaced((at.hour() + 11) % 12 + 1)),
            'e' => out.push_str(&spaced(at.day())),
            'B' => out.push_str(&month),
            'b' | 'h' => out.push_str(&month[..3]),
            'A' => out.push_str(&weekday),
            'a' => out.push_str(&weekday[..3]),
            'p' => out.push_str(if at.hour() < 12 { "AM" } else { "PM" }),
            'P' => out.push_str(if at.hour() < 12 { "am" } else { "pm" }),
            'r' => out.push_str(&strftime(seconds, "%I:%M:%S %p")?),
            // A time without a zone shows none.
            'z' | 'Z' => {}
            'F' => out.push_str(&strftime(seconds, "%Y-%m-%d")?),
            'T' | 'X' => out.push_str(&strftime(seconds, "%H:%M:%S")?),
            'D' | 'x' => out.push_str(&strftime(seconds, "%m/%d/%y")?),
            'R' => out.push_str(&strftime(seconds, "%H:%M")?),
            'c' => out.push_str(&strftime(seconds, "%a %b %e %H:%M:%S %Y")?),
            'n' => out.push('\n'),
            't' => out.push('\t'),
            '%' => out.push('%'),
            other => return raise(format!("strftime_now: %{other} is not supported")),
        }
    }
    Ok(out)
}
