//! Text on its way to tokens and back: a request's body, its prompt, the answer.
//!
//! [`job`] reads bodies -> [`prompt`] renders [`template`]s and tokenizes -> [`generate`] runs the sequences ->
//! [`detokenize`] and [`stop`] make text of tokens -> [`completion`] writes the answer. All of it is pure but for
//! [`generate`](mod@generate), which waits for the engine.

pub mod completion;
mod conversation;
pub mod detokenize;
pub mod generate;
mod jinja;
pub mod job;
mod logprobs;
mod marks;
pub mod prompt;
pub mod stop;
pub mod template;
