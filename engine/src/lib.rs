//! A batched inference engine with paged attention: a model folder and prompts in, answers out.
//!
//! [`start::Engine`] loads a model folder and has `generate`, `generate_stream` and `generate_batch` on tokens;
//! [`text::prompt::Text`] turns text into tokens and back. A request's answer depends on its own prompt, parameters
//! and seed alone, never on the requests beside it. The crate knows no broker and no object store.
//!
//! ```no_run
//! use millrace_crds::config::EngineConfig;
//! use millrace_engine::schedule::request::Request;
//! use millrace_engine::start::Engine;
//! use millrace_engine::text::prompt::Text;
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
//!
//! | module | what |
//! |---|---|
//! | [`folder`] | a model folder: manifest, hashes, mapped files |
//! | [`import`] | a GGUF file into such a folder |
//! | [`model`] | the decoder families, described once over the ops of `millrace_kernels` |
//! | [`schedule`] | sequences, KV blocks, steps |
//! | [`text`] | requests, chat templates, tokens, answers |
//! | [`start`] | all of it put together on a device |

pub mod folder;
pub mod import;
pub mod memory;
pub mod model;
pub mod schedule;
pub mod start;
pub mod text;
