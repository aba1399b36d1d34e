//! Figures with their origin: result files, and `docs/figures.md`, which is made of them.
//!
//! A result file lies in `docs/figures/` and holds what one command measured on one machine. Its name says its kind:
//! `cpu-amd-epyc-9r14-2-cores.json` is of kind `cpu`. The page depends on nothing but these files.

pub mod page;
pub mod soak;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::format_description::well_known::Iso8601;
use time::{Date, OffsetDateTime};

/// Prints the commit of the tree.
const COMMIT_SCRIPT: &str = "scripts/commit";
/// Digits of a figure that are kept.
const DIGITS: usize = 5;
/// Of what a processor can do, that which decides how it multiplies.
const FLAGS: [&str; 5] = ["avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile"];

/// A least or a most value, in the unit of its figure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bar {
    /// The figure may not be smaller.
    Least(f64),
    /// The figure may not be larger.
    Most(f64),
}

/// One measured number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// The number; absent where it could not be measured, and then the note says why.
    pub value: Option<f64>,
    /// The numbers of the single runs that the value was chosen from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<f64>,
    /// Of one of them: `tokens/s`, `ms`, `%`, `x` for a ratio.
    pub unit: String,
    /// What the value shall reach or keep.
    pub bar: Option<Bar>,
    /// What else there is to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Figure {
    /// A figure without a bar. A value that is no number was not measured.
    pub fn new(name: &str, value: f64, unit: &str) -> Self {
        let note = (!value.is_finite()).then(|| "it gave no number".to_owned());
        let value = value.is_finite().then(|| rounded(value));
        Self { name: name.into(), value, values: Vec::new(), unit: unit.into(), bar: None, note }
    }

    /// What could not be measured, and why.
    pub fn failed(name: &str, error: &anyhow::Error) -> Self {
        let mut figure = Self::new(name, f64::NAN, "");
        figure.note = Some(format!("{error:#}"));
        figure
    }

    /// With the least value that it shall have.
    pub fn least(self, bar: f64) -> Self {
        Self { bar: Some(Bar::Least(bar)), ..self }
    }

    /// With the most value that it shall have.
    pub fn most(self, bar: f64) -> Self {
        Self { bar: Some(Bar::Most(bar)), ..self }
    }

    /// With the numbers of its single runs.
    pub fn of_runs(self, runs: impl IntoIterator<Item = f64>) -> Self {
        Self { values: runs.into_iter().map(rounded).collect(), ..self }
    }

    /// Whether it was measured, and its bar, if it has one, is met.
    pub fn is_met(&self) -> bool {
        match (self.value, self.bar) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(value), Some(Bar::Least(bar))) => value >= bar,
            (Some(value), Some(Bar::Most(bar))) => value <= bar,
        }
    }
}

/// A finite number to [`DIGITS`] digits.
fn rounded(value: f64) -> f64 {
    format!("{value:.*e}", DIGITS - 1).parse().unwrap_or(value)
}

/// What one command measured on one machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResultFile {
    /// Its processor and cores, or its GPU.
    pub machine: String,
    /// The day in UTC, as `2026-01-31`.
    pub date: String,
    /// The short commit of what was measured; a `+` behind it tells that its tree had changes.
    pub commit: String,
    /// The command line.
    pub command: String,
    /// What it measured.
    pub figures: Vec<Figure>,
}

impl ResultFile {
    /// Figures of this machine, today, at the commit of the tree in which it runs.
    ///
    /// # Errors
    /// When the commit cannot be told.
    pub fn new(command: &str, figures: Vec<Figure>) -> Result<Self> {
        let output = Command::new(COMMIT_SCRIPT).output().context(COMMIT_SCRIPT)?;
        ensure!(output.status.success(), "{COMMIT_SCRIPT}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self {
            machine: machine(),
            date: OffsetDateTime::now_utc().date().to_string(),
            commit: String::from_utf8(output.stdout)?.trim().to_owned(),
            command: command.into(),
            figures,
        })
    }

    /// Reads and checks the text of a result file.
    ///
    /// # Errors
    /// When a field is missing, unknown or says nothing.
    pub fn parse(text: &str) -> Result<Self> {
        let file: Self = serde_json::from_str(text)?;
        let is_day = |day: Date| day.to_string() == file.date;
        let day = Date::parse(&file.date, &Iso8601::DATE);
        ensure!(day.is_ok_and(is_day), "date is {:?}; it must be a day, as 2026-01-31", file.date);
        let hash = file.commit.strip_suffix('+').unwrap_or(&file.commit);
        let is_hash = hash.len() >= 7 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        ensure!(is_hash, "commit is {:?}; it must be a short hash, with a + for changes", file.commit);
        ensure!(!file.machine.is_empty(), "machine is empty");
        ensure!(!file.command.is_empty(), "command is empty");
        ensure!(!file.figures.is_empty(), "figures is empty");
        for Figure { name, value, note, .. } in &file.figures {
            ensure!(!name.is_empty(), "a figure has no name");
            ensure!(value.is_some() || note.is_some(), "{name}: neither a value nor a note that says why");
        }
        Ok(file)
    }

    /// Its JSON, one figure a line.
    ///
    /// # Errors
    /// None in practice: all fields are plain data.
    pub fn text(&self) -> Result<String> {
        let head = [&self.machine, &self.date, &self.commit, &self.command].map(|field| json!(field));
        let [machine, date, commit, command] = head;
        let figures = self.figures.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
        let figures = figures.join(",\n    ");
        Ok(format!(
            "{{\n  \"machine\": {machine},\n  \"date\": {date},\n  \"commit\": {commit},\n  \
             \"command\": {command},\n  \"figures\": [\n    {figures}\n  ]\n}}\n"
        ))
    }

    /// Writes it into the folder, under the name of its kind and machine. There is one simulation for all machines.
    ///
    /// # Errors
    /// When the kind is unknown, or the file cannot be written.
    pub fn write(&self, folder: &Path, kind: &str) -> Result<PathBuf> {
        ensure!(page::is_kind(kind), "no kind {kind:?}");
        let name = if kind == "sim" { kind.to_owned() } else { format!("{kind}-{}", slug(&self.machine)) };
        let path = folder.join(name).with_extension("json");
        std::fs::write(&path, self.text()?).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

/// All result files of a folder, by their names without the extension.
///
/// # Errors
/// When one cannot be read; the error names it.
pub fn read(folder: &Path) -> Result<Vec<(String, ResultFile)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let shown = || path.display().to_string();
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        ensure!(is_json && page::is_kind(page::kind_of(&name)), "{}: no result file", shown());
        let text = std::fs::read_to_string(&path).with_context(shown)?;
        files.push((name, ResultFile::parse(&text).with_context(shown)?));
    }
    files.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(files)
}

/// Writes the page of the folder's result files beside the folder: `docs/figures` gives `docs/figures.md`.
///
/// # Errors
/// When a file cannot be read, or the page cannot be written.
pub fn write_page(folder: &Path) -> Result<()> {
    let page = folder.with_extension("md");
    std::fs::write(&page, page::render(&read(folder)?)).with_context(|| page.display().to_string())
}

/// This machine's processor, cores, and what they multiply with, as the kernel tells them.
pub fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.split_once(": "));
    let name = field("model name").map_or("unknown processor", |(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let flags: Vec<&str> = field("flags").map_or_else(Vec::new, |(_, flags)| flags.split(' ').collect());
    let flags: Vec<&str> = FLAGS.into_iter().filter(|flag| flags.contains(flag)).collect();
    format!("{name}, {cores} cores ({})", flags.join(", "))
}

/// A machine's name as part of a file name, without what stands in brackets.
fn slug(machine: &str) -> String {
    let mut depth = 0_usize;
    let mut words = String::new();
    for letter in machine.chars() {
        match letter {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ if depth > 0 => {}
            letter if letter.is_ascii_alphanumeric() => words.push(letter.to_ascii_lowercase()),
            _ => words.push(' '),
        }
    }
    words.split_whitespace().collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn docs() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("docs")
    }

    /// `docs/figures.md` is what the result files give; this also reads and checks each of them.
    #[test]
    fn the_page_is_what_the_files_give() -> Result<()> {
        let files = read(&docs().join("figures"))?;
        let page = std::fs::read_to_string(docs().join("figures.md"))?;
        ensure!(page == page::render(&files), "run `target/release/millrace-figures --render docs/figures`");
        for (name, file) in &files {
            let text = std::fs::read_to_string(docs().join("figures").join(name).with_extension("json"))?;
            ensure!(text.len() < 1 << 16, "{name}: {} bytes are no small file", text.len());
            ensure!(ResultFile::parse(&file.text()?)? == *file, "{name}: it does not survive its own text");
        }
        Ok(())
    }

    #[test]
    fn a_result_file_names_its_origin_and_nothing_else() {
        let good = json!({"machine": "m", "date": "2026-01-31", "commit": "0123abc+", "command": "make bench",
            "figures": [{"name": "speed", "value": 2.0, "unit": "x", "bar": {"least": 1}}]});
        let parse = |value: &serde_json::Value| ResultFile::parse(&value.to_string());
        assert!(parse(&good).unwrap().figures[0].is_met());
        for (field, bad) in [
            ("machine", json!("")),
            ("date", json!("2026-02-31")),
            ("commit", json!("main")),
            ("command", json!("")),
            ("figures", json!([])),
            ("figures", json!([{"name": "speed", "value": null, "unit": "x", "bar": null}])),
            ("figures", json!([{"name": "speed", "value": 1, "unit": "x", "bar": {"about": 1}}])),
            ("figures", json!([{"name": "speed", "value": 1, "unit": "x", "bar": null, "met": true}])),
            ("host", json!("m")),
        ] {
            let mut file = good.clone();
            file[field] = bad;
            assert!(parse(&file).is_err(), "{file}");
            file.as_object_mut().unwrap().remove(field);
            assert!(field == "host" || parse(&file).is_err(), "without {field}");
        }
    }

    #[test]
    fn a_bar_is_met_at_its_value_and_by_nothing_that_was_not_measured() {
        let figure = |value| Figure::new("speed", value, "x");
        assert!(figure(5.0).least(5.0).is_met() && figure(5.0).most(5.0).is_met());
        assert!(!figure(4.999).least(5.0).is_met() && !figure(5.001).most(5.0).is_met());
        assert!(!figure(f64::NAN).most(5.0).is_met() && !figure(f64::NAN).is_met());
        assert_eq!(figure(12_345.678).value, Some(12_346.0));
    }

    #[test]
    fn file_names_are_those_of_machines() {
        assert_eq!(slug("Intel(R) Xeon(R) Gold 6430, 2 cores (avx2)"), "intel-xeon-gold-6430-2-cores");
    }
}
