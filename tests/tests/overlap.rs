//! Sequences that end while their next step is queued: stopped, cancelled or poisoned, they harm no other, and give
//! what they give where each step is waited for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_crds::config::{Device, EngineConfig};
use millrace_crds::units::Bytes;
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::files::Files;
use millrace_engine::model::source::{SourceError, StoredTensor, TensorSource};
use millrace_engine::schedule::handle::EngineLoad;
use millrace_engine::schedule::request::{Event, Finish, Request};
use millrace_engine::start::{Engine, Tuning};
use millrace_tests::tiny;

/// Bytes of an element of the tiny model.
const ELEMENT: usize = 4;
const EMBEDDING: &str = "model.embed_tokens.weight";
const LIMIT: Duration = Duration::from_secs(60);

/// The tiny model, one token of which has an embedding that is no number.
struct Poisoned<'a> {
    files: &'a Files,
    embedding: Vec<u8>,
}

impl<'a> Poisoned<'a> {
    fn new(files: &'a Files, token: u32) -> Result<Self> {
        let tensor = files.tensor(EMBEDDING)?;
        let (mut embedding, row) = (tensor.data.to_vec(), tensor.shape[1] * ELEMENT);
        embedding[token as usize * row..][..ELEMENT].copy_from_slice(&f32::NAN.to_le_bytes());
        Ok(Self { files, embedding })
    }
}

impl TensorSource for Poisoned<'_> {
    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>, SourceError> {
        let tensor = self.files.tensor(name)?;
        Ok(if name == EMBEDDING { StoredTensor { data: &self.embedding, ..tensor } } else { tensor })
    }
}

/// A folder with the tiny model.
fn folder() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    tiny::write(folder.path(), 8)?;
    Ok(folder)
}

fn engine(model: &DecoderConfig, source: &dyn TensorSource, overlap: bool) -> Result<Engine> {
    let config = EngineConfig {
        device: Device::Cpu,
        max_sequences: Some(8),
        max_batch_tokens: Some(64),
        kv_cache_bytes: Some(Bytes(16 << 20)),
        threads: Some(1),
        ..EngineConfig::default()
    };
    let tuning = Tuning { overlap: Some(overlap), ..Tuning::default() };
    Ok(Engine::start(model, source, &config, tuning, Box::new(()))?)
}

fn request(number: u32) -> Request {
    Request::greedy((0..8 + number % 5).map(|at| 3 + (number * 37 + at * 11) % 250).collect(), 24)
}

/// Tokens, and how the sequence ended.
type Answer = (Vec<u32>, Result<Finish, String>);

fn answers(engine: &Engine, requests: Vec<Request>) -> Result<Vec<Answer>> {
    let running: Vec<_> =
        requests.into_iter().map(|request| engine.generate_stream(request)).collect::<Result<_, _>>()?;
    let answer = |mut generation: millrace_engine::schedule::handle::Generation| {
        let mut tokens = Vec::new();
        loop {
            match generation.next_blocking().context("the engine lives")? {
                Event::Token(token) => tokens.push(token.id),
                Event::Finished(finish, _) => return Ok((tokens, Ok(finish))),
                Event::Failed(reason) => return Ok((tokens, Err(reason))),
            }
        }
    };
    running.into_iter().map(answer).collect()
}

/// The answers without stop tokens, poison or company.
fn alone(model: &DecoderConfig, files: &Files, count: u32) -> Result<Vec<Vec<u32>>> {
    let engine = engine(model, files, false)?;
    let answer = |number| Ok(answers(&engine, vec![request(number)])?.remove(0).0);
    (0..count).map(answer).collect()
}

/// A place past the first tokens where an answer has a token that is not in it before.
fn first_seen(tokens: &[u32]) -> Option<usize> {
    (3..tokens.len() - 3).find(|&at| !tokens[..at].contains(&tokens[at]))
}

#[test]
fn a_stop_token_ends_a_sequence_whose_next_step_is_queued() -> Result<()> {
    let folder = folder()?;
    let (model, files) = (DecoderConfig::read(folder.path())?, Files::read(folder.path())?);
    let expected = alone(&model, &files, 20)?;
    let mut stopped = 0;
    for overlap in [false, true] {
        let engine = engine(&model, &files, overlap)?;
        let stop = |tokens: &[u32]| first_seen(tokens).map(|at| tokens[at]);
        let requests = (0..20).zip(&expected);
        let requests = requests.map(|(number, tokens)| Request {
            stop_tokens: stop(tokens).into_iter().collect(),
            ..request(number)
        });
        let found = answers(&engine, requests.collect())?;
        for ((tokens, finish), expected) in found.iter().zip(&expected) {
            match first_seen(expected) {
                Some(at) => {
                    ensure!((&tokens[..], finish) == (&expected[..=at], &Ok(Finish::Stop)), "{tokens:?}")
                }
                None => ensure!((tokens, finish) == (expected, &Ok(Finish::Length)), "{tokens:?}"),
            }
            stopped += usize::from(*finish == Ok(Finish::Stop));
        }
        engine.join();
    }
    ensure!(stopped > 10, "{stopped} sequences stopped");
    Ok(())
}

#[test]
fn poison_ends_its_sequences_alone() -> Result<()> {
    let folder = folder()?;
    let (model, files) = (DecoderConfig::read(folder.path())?, Files::read(folder.path())?);
    let expected = alone(&model, &files, 20)?;
    let at = first_seen(&expected[7]).context("an answer with new tokens")?;
    let token = expected[7][at];
    for overlap in [false, true] {
        let engine = engine(&model, &Poisoned::new(&files, token)?, overlap)?;
        let found = answers(&engine, (0..20).map(request).collect())?;
        let (mut whole, mut poisoned) = (0, 0);
        for (number, ((tokens, finish), expected)) in (0..).zip(found.iter().zip(&expected)) {
            if request(number).prompt.contains(&token) {
                ensure!(tokens.is_empty() && finish.is_err(), "request {number}: {tokens:?}");
            } else if let Some(at) = expected[..expected.len() - 1].iter().position(|&found| found == token) {
                ensure!(tokens[..] == expected[..=at] && finish.is_err(), "request {number}: {tokens:?}");
                poisoned += 1;
            } else {
                ensure!((tokens, finish) == (expected, &Ok(Finish::Length)), "request {number}: {tokens:?}");
                whole += 1;
            }
        }
        ensure!(whole > 0 && poisoned > 0, "{whole} whole, {poisoned} poisoned");
        engine.join();
    }
    Ok(())
}

#[test]
fn cancelled_sequences_leave_the_others_alone() -> Result<()> {
    let folder = folder()?;
    let (model, files) = (DecoderConfig::read(folder.path())?, Files::read(folder.path())?);
    let expected = alone(&model, &files, 60)?;
    for overlap in [false, true] {
        let engine = engine(&model, &files, overlap)?;
        let mut running = Vec::new();
        for number in 0..60 {
            let mut generation = engine.generate_stream(request(number))?;
            if number % 3 == 0 {
                // Dropped at once, or while it runs; the next request may get its slot.
                for _ in 0..number % 4 {
                    ensure!(
                        matches!(generation.next_blocking(), Some(Event::Token(_))),
                        "request {number} runs"
                    );
                }
            } else {
                running.push((number, generation));
            }
        }
        for (number, mut generation) in running {
            for &expected in &expected[number as usize] {
                match generation.next_blocking() {
                    Some(Event::Token(token)) => ensure!(token.id == expected, "request {number}"),
                    other => anyhow::bail!("request {number}: {other:?}"),
                }
            }
            ensure!(matches!(generation.next_blocking(), Some(Event::Finished(Finish::Length, _))));
        }
        let (load, begun) = (engine.handle().load(), Instant::now());
        while EngineLoad::get(&load.running) + EngineLoad::get(&load.kv_blocks_used) > 0 {
            ensure!(begun.elapsed() < LIMIT, "every block is given back");
            std::thread::sleep(Duration::from_millis(1));
        }
        engine.join();
    }
    Ok(())
}
