//! The engine as a library, without any queue: one text, a text as it comes, and many texts at once.
//!
//! `cargo run --release -p millrace-engine --example generate -- MODEL_FOLDER PROMPT...`

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use millrace_crds::config::EngineConfig;
use millrace_engine::schedule::request::{Event, Request, Sampling};
use millrace_engine::start::Engine;
use millrace_engine::text::prompt::Text;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().context("usage: generate MODEL_FOLDER PROMPT...")?;
    let prompts: Vec<String> = arguments.collect();
    let prompts =
        if prompts.is_empty() { vec!["The three states of matter are".to_owned()] } else { prompts };
    for answer in run(Path::new(&folder), &prompts, &mut std::io::stdout())? {
        println!("{answer}");
    }
    Ok(())
}

/// Continues the first prompt alone and token by token, then all of them together; returns all answers, which
/// are the same texts: what runs beside a request does not change it.
pub fn run(folder: &Path, prompts: &[String], shown: &mut impl Write) -> anyhow::Result<Vec<String>> {
    let text = Text::open(folder, "example")?;
    let engine = Engine::load(folder, &EngineConfig::default())?;
    let request = |prompt: &String| -> anyhow::Result<Request> {
        Ok(Request {
            stop_tokens: text.end_tokens().to_vec(),
            sampling: Sampling { temperature: 0.7, top_p: 0.9, ..Sampling::default() },
            seed: 1,
            ..Request::greedy(text.encode(prompt, true)?, 48)
        })
    };
    let requests: Vec<Request> = prompts.iter().map(request).collect::<Result<_, _>>()?;
    let mut answers = Vec::new();
    if let Some(first) = requests.first() {
        let generated = engine.generate(first.clone())?;
        answers.push(text.decode(generated.tokens.iter().map(|token| token.id)));

        let mut generation = engine.generate_stream(first.clone())?;
        let (mut detokenizer, mut answer) = (text.detokenizer(true), String::new());
        while let Some(event) = generation.next_blocking() {
            let from = answer.len();
            match event {
                Event::Token(token) => detokenizer.push(token.id, &mut answer),
                Event::Finished(..) => detokenizer.finish(&mut answer),
                Event::Failed(reason) => anyhow::bail!(reason),
            }
            write!(shown, "{}", &answer[from..])?;
        }
        writeln!(shown)?;
        answers.push(answer);
    }
    for generated in engine.generate_batch(requests) {
        answers.push(text.decode(generated?.tokens.iter().map(|token| token.id)));
    }
    Ok(answers)
}
