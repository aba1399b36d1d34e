//! Result files in, `docs/figures.md` out.

use super::{Bar, Figure, ResultFile};

/// One sort of result files, and its section of the page.
struct Kind {
    /// How the names of its files begin.
    name: &'static str,
    title: &'static str,
    about: &'static str,
    /// How a result file comes to be.
    how: &'static str,
}

const KINDS: [Kind; 5] = [
    Kind {
        name: "cpu",
        title: "On a processor",
        about: "SmolLM2-135M with its real weights; broker, object store and worker share the machine. *The list* is the
64 requests of `examples/bench/cpu-64.jsonl`; *sequences* have 64 tokens in and 128 out. The machine's limit is the
longer of reading each step's bytes and computing its operations, at the rates that the same run measures. A job's
overhead is the time from its publication until its outcome is on the broker's disk, without what the engine took; the
broker syncs each write. The pull hashes every byte; s5cmd, beside it on the same server and disk, hashes none.",
        how: "`make figures`",
    },
    Kind {
        name: "gpu",
        title: "On an NVIDIA GPU",
        about: "\
`make gpu-kit` packs worker, tests and benchmarks; `run.sh` in the kit runs them on a host with a driver of
CUDA 13, and leaves `figures.json`. Weights are random, of the models' true shapes, temperature 0.6. *The list* is the
256 requests of `examples/bench/nano-vllm-256.jsonl`; *one sequence* has 128 tokens in and 256 out. The limit is
computed from the bandwidth that the same run measures. Shapes of attention are sequences x context, heads / heads of
keys and values. The bars were set for an H100, whose memory is slower than an H200's: an H200 that meets one does not
show that an H100 would.",
        how: "`run.sh` of the GPU kit",
    },
    Kind {
        name: "race",
        title: "Beside other engines",
        about: "\
`tests/race/run.sh KIT OUTPUT` runs one list on this engine and on others, on one GPU, one after the other, and
leaves `race.json`; [its README](../tests/race/README.md) has the terms. Ours runs before the others and again after
them; a ratio is of the slower of the two.",
        how: "`tests/race/run.sh`",
    },
    Kind {
        name: "sim",
        title: "The autoscaler, in simulation",
        about: "\
An hour of Azure traffic of 2023 (`sim/traces`) goes through the autoscaler's own function at its defaults, in
virtual time: the figures do not depend on the machine. A worker takes 30 s to start, and jobs should wait at most 60 s.
*KEDA tuned* is KEDA's rule with hindsight: of all settings of a grid that keep that wait at p95, the cheapest for this
trace; *as a user sizes it* and *defaults* are without. *The bound* knows the future; *its plan as it runs* is that plan
in the same cluster. *Tuned likewise* is the autoscaler with the cheapest settings that keep tuned KEDA's own p95.

![Workers over time, code trace](../sim/assets/azure-code-replicas.svg)

![Workers over time, conversation trace](../sim/assets/azure-conv-replicas.svg)",
        how: "`make sim`",
    },
    Kind {
        name: "soak",
        title: "The long runs",
        about: "`make soak` kills workers and the broker under real jobs, and has one operator look after many models.",
        how: "`make soak`",
    },
];

/// The head of the page.
const HEAD: &str = "# Figures

Generated from the result files in [figures/](figures/); edit neither. `make figures` measures this machine, \
`make bench`
does so without writing, and `make sim`, the GPU kit and the race leave result files of their own
(`millrace-figures --render docs/figures` makes this page anew from those that are copied there). Each table names its
machine, its day, the commit (with a `+` where the tree had changes) and the command.
";

/// Whether there is such a kind of result files.
pub fn is_kind(kind: &str) -> bool {
    KINDS.iter().any(|known| known.name == kind)
}

/// The kind that a result file's name tells.
pub fn kind_of(name: &str) -> &str {
    name.split('-').next().unwrap_or(name)
}

/// The page of these files, given by name.
pub fn render(files: &[(String, ResultFile)]) -> String {
    let mut page = format!("{HEAD}\n{}", summary(files));
    for kind in &KINDS {
        page += &format!("\n## {}\n\n{}\n", kind.title, kind.about);
        let mut found = false;
        for (_, file) in files.iter().filter(|(name, _)| kind_of(name) == kind.name) {
            let ResultFile { machine, date, commit, command, figures } = file;
            page +=
                &format!("\n### {machine}\n\n{date}, commit `{commit}`, `{command}`\n\n{}", table(figures));
            found = true;
        }
        if !found {
            page += &format!("\nNo result file of {} is here.\n", kind.how);
        }
    }
    page
}

/// How many bars are met, and which are not.
fn summary(files: &[(String, ResultFile)]) -> String {
    let all = || files.iter().flat_map(|(_, file)| file.figures.iter().map(|figure| (&file.machine, figure)));
    let bars = all().filter(|(_, figure)| figure.bar.is_some()).count();
    let missed: Vec<_> = all().filter(|(_, figure)| !figure.is_met()).collect();
    let unmet = missed.iter().filter(|(_, figure)| figure.bar.is_some()).count();
    let mut text = format!("{} of {bars} bars are met.\n", bars - unmet);
    for (at, (machine, figure)) in missed.into_iter().enumerate() {
        let (gap, machine) = (if at == 0 { "\n" } else { "" }, machine.split(" (").next().unwrap_or(machine));
        text += &format!("{gap}- {}: {}; {machine}\n", verdict(figure), figure.name);
    }
    text
}

/// A table of figures, each with its bar.
pub fn table(figures: &[Figure]) -> String {
    let mut text = "| figure | measured | bar | |\n|---|---|---|---|\n".to_owned();
    for figure in figures {
        let cells = [figure.name.clone(), measured(figure), bar(figure), verdict(figure).to_owned()];
        let cells = cells.map(|cell| cell.replace('|', "\\|").replace('\n', " "));
        text += &format!("| {} |\n", cells.join(" | "));
    }
    text
}

fn verdict(figure: &Figure) -> &'static str {
    match (figure.value, figure.bar) {
        (None, _) => "**not measured**",
        (_, None) => "",
        (..) if figure.is_met() => "met",
        _ => "**missed**",
    }
}

fn measured(figure: &Figure) -> String {
    let mut text = match figure.value {
        Some(value) => {
            let short = number(value);
            // A missed bar does not look met.
            let exact = !figure.is_met() && limit(figure).is_some_and(|bar| number(bar) == short);
            with_unit(if exact { value.to_string() } else { short }, &figure.unit)
        }
        None => String::new(),
    };
    if let [_, _, ..] = figure.values[..] {
        let (least, most) =
            (figure.values.iter().copied().fold(f64::INFINITY, f64::min), figure.values.iter());
        let most = most.copied().fold(f64::NEG_INFINITY, f64::max);
        text += &format!(" ({} to {} in {} runs)", number(least), number(most), figure.values.len());
    }
    match &figure.note {
        Some(note) if text.is_empty() => note.clone(),
        Some(note) => format!("{text}; {note}"),
        None => text,
    }
}

fn limit(figure: &Figure) -> Option<f64> {
    figure.bar.map(|(Bar::Least(value) | Bar::Most(value))| value)
}

fn bar(figure: &Figure) -> String {
    let sign = match figure.bar {
        None => return String::new(),
        Some(Bar::Least(_)) => ">=",
        Some(Bar::Most(_)) => "<=",
    };
    format!("{sign} {}", limit(figure).map_or_else(String::new, number))
}

fn with_unit(number: String, unit: &str) -> String {
    match unit {
        "" => number,
        "x" => format!("{number}x"),
        unit => format!("{number} {unit}"),
    }
}

/// Three digits or all of the whole part, with its thousands set off.
fn number(value: f64) -> String {
    let decimals = [100.0, 10.0].iter().position(|&least| value.abs() >= least).unwrap_or(2);
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_once('.').unwrap_or((&text, ""));
    let (sign, digits) = whole.strip_prefix('-').map_or(("", whole), |digits| ("-", digits));
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    let rest = rest.trim_end_matches('0');
    if rest.is_empty() { format!("{sign}{grouped}") } else { format!("{sign}{grouped}.{rest}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(figures: Vec<Figure>) -> ResultFile {
        let [machine, date, commit, command] =
            ["A mill (old)", "2026-01-31", "0123abc", "make figures"].map(str::to_owned);
        ResultFile { machine, date, commit, command, figures }
    }

    #[test]
    fn a_row_shows_what_was_measured_and_how_it_stands_to_its_bar() {
        let rows = [
            (Figure::new("a", 1241.4, "tokens/s").least(1200.0), "| a | 1,241 tokens/s | >= 1,200 | met |"),
            (Figure::new("a", 1.34, "x").most(1.33), "| a | 1.34x | <= 1.33 | **missed** |"),
            (Figure::new("a", 499.6, "jobs/s").least(500.0), "| a | 499.6 jobs/s | >= 500 | **missed** |"),
            (Figure::new("a", 5.0, "s").of_runs([4.0, 5.0, 6.25]), "| a | 5 s (4 to 6.25 in 3 runs) |  |  |"),
            (
                Figure::failed("a", &anyhow::anyhow!("no | mill")).least(1.0),
                "| a | no \\| mill | >= 1 | **not measured** |",
            ),
        ];
        for (figure, row) in rows {
            assert_eq!(table(&[figure]).lines().nth(2), Some(row));
        }
    }

    #[test]
    fn the_page_tells_origin_missed_bars_and_what_is_not_there() {
        let figures = vec![
            Figure::new("grist", 2.0, "x").least(1.0),
            Figure::new("flour", 2.0, "x").least(3.0),
            Figure::new("bran", f64::NAN, ""),
        ];
        let page = render(&[("cpu-a-mill".into(), file(figures))]);
        assert!(
            page.contains("1 of 2 bars are met.\n\n- **missed**: flour; A mill\n- **not measured**: bran; ")
        );
        assert!(
            page.contains("### A mill (old)\n\n2026-01-31, commit `0123abc`, `make figures`\n\n| figure |")
        );
        assert!(!page.contains("No result file of `make figures`"));
        assert!(page.contains("No result file of `make sim` is here."));
    }
}
