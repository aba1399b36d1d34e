//! The queue worker: job in, one durable result out, over its own inference engine.
//!
//! A job's way is a straight line; the README's map names the files in the order in which it travels.
//!
//! The engine also runs alone, as a library: [`start::Engine`] has `generate`, `generate_stream` and
//! `generate_batch` on tokens, and [`prompt::Text`] turns text into tokens and back.
//!
//! ```no_run
//! use millrace_crds::config::EngineConfig;
//! use millrace_worker::engine::request::Request;
//! use millrace_worker::prompt::Text;
//! use millrace_worker::start::Engine;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = std::path::Path::new("models/smollm2");
//! let (text, engine) = (Text::open(folder, "smollm2")?, Engine::load(folder, &EngineConfig::default())?);
//! let generated = engine.generate(Request::greedy(text.encode("The three states of matter are", true)?, 32))?;
//! println!("{}", text.decode(generated.tokens.iter().map(|token| token.id)));
//! # Ok(())
//! # }
//! ```
//!
//! `examples/generate.rs` shows streams and batches.

pub mod batch;
pub mod bench;
pub mod broker;
pub mod cancel;
pub mod capacity;
pub mod claim;
pub mod classes;
pub mod completion;
pub mod config;
pub mod detokenize;
pub mod ending;
pub mod engine;
pub mod failpoint;
pub mod fault;
pub mod generate;
pub mod health;
pub mod import;
pub mod job;
pub mod load;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod monitor;
pub mod prompt;
pub mod provision;
pub mod pull;
pub mod queue;
pub mod report;
pub mod results;
pub mod run;
pub mod serve;
pub mod start;
pub mod stop;
pub mod store;
pub mod telemetry;
pub mod template;
pub mod tokens;
pub mod watchdog;
pub mod weights;
pub mod worker;
