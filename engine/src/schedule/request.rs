//! What the engine is asked and what it answers: tokens only, no text.

use millrace_crds::names::Class;
use millrace_kernels::sampling::TOP_LOGPROBS_MAX;

/// One sequence to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Most tokens to generate, at least one.
    pub max_tokens: u32,
    /// Tokens that end the sequence (end of sequence among them, unless it is to be ignored).
    /// The token that ended it is the last one reported.
    pub stop_tokens: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Seed of the counter-based random numbers; equal seeds give equal sequences, in any batch.
    pub seed: u64,
}

impl Request {
    /// The most probable continuation of a prompt, of exactly `max_tokens` tokens: no token ends it.
    pub fn greedy(prompt: Vec<u32>, max_tokens: u32) -> Self {
        Self { prompt, max_tokens, stop_tokens: Vec::new(), sampling: Sampling::default(), seed: 0 }
    }
}

/// What is served first: a class before those below it, and within a class an earlier deadline. Equals are served in
/// the order in which they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Urgency {
    /// The class of service.
    pub class: Class,
    /// When the answer is wanted, in Unix milliseconds; the greatest number where nobody said.
    pub deadline_ms: i64,
}

impl Default for Urgency {
    fn default() -> Self {
        Self { class: Class::default(), deadline_ms: i64::MAX }
    }
}

/// How the next token is chosen from the logits. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens with this much probability; 1 is off.
    pub top_p: f32,
    /// The most probable k tokens; 0 is off.
    pub top_k: u32,
    /// Tokens at least this share as probable as the most probable one; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report log probabilities: of the chosen token and of this many most probable ones.
    pub logprobs: Option<u32>,
    /// No stop token is chosen before so many tokens.
    pub min_tokens: u32,
    /// Runs of tokens that are never chosen whole.
    pub bad_words: Vec<Vec<u32>>,
    /// The first tokens of the output, whatever their probability: the rest of a prompt whose log probabilities are
    /// wanted. They count in `max_tokens`, and neither end the sequence nor count as output for penalties.
    pub forced: Vec<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
            min_tokens: 0,
            bad_words: Vec::new(),
            forced: Vec::new(),
        }
    }
}

impl Sampling {
    /// Whether the numbers make sense. Front ends have limits of their own; these are what the kernels need.
    ///
    /// # Errors
    /// When a value is outside of its range; the refusal names it.
    pub fn check(&self) -> Result<(), Refusal> {
        let ranges = [
            ("temperature", self.temperature, 0.0..=f32::MAX, "at least 0"),
            ("top_p", self.top_p, f32::MIN_POSITIVE..=1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, 0.0..=1.0, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE..=f32::MAX, "above 0"),
            ("presence_penalty", self.presence_penalty, f32::MIN..=f32::MAX, "a finite number"),
            ("frequency_penalty", self.frequency_penalty, f32::MIN..=f32::MAX, "a finite number"),
        ];
        for (field, value, range, expected) in ranges {
            if !range.contains(&value) {
                return Err(Refusal::Sampling { field, value: value.to_string(), expected });
            }
        }
        if let Some((_, bias)) = self.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
            let expected = "a finite number";
            return Err(Refusal::Sampling { field: "logit_bias", value: bias.to_string(), expected });
        }
        match self.logprobs {
            Some(count) if count > TOP_LOGPROBS_MAX => {
                Err(Refusal::Sampling { field: "logprobs", value: count.to_string(), expected: "at most 20" })
            }
            _ => Ok(()),
        }
    }
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log probability and those of the most probable tokens, if asked for, most probable first.
    pub logprobs: Option<Logprobs>,
}

/// Log probabilities at one position: natural logarithms of the softmax of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// Of the most probable tokens.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token.
    Stop,
    /// `max_tokens` or the model's length.
    Length,
}

/// What a sequence cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SequenceUsage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them found in the prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub output_tokens: u32,
}

/// What happens to a sequence, in order: tokens, then exactly one of the other two.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// One more token.
    Token(Token),
    /// The sequence ended.
    Finished(Finish, SequenceUsage),
    /// The engine failed on this sequence alone (its logits are not numbers).
    Failed(String),
}

/// Why a request can never run on this engine. The messages name value and limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The prompt has no token.
    #[error("the prompt has no tokens; at least 1 is needed")]
    EmptyPrompt,
    /// Prompt and output together are longer than the model allows.
    #[error(
        "prompt of {prompt} tokens plus max_tokens {max_tokens} exceeds the model length of {limit} tokens"
    )]
    TooLong {
        /// Tokens in the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: u32,
        /// The limit on both together.
        limit: u32,
    },
    /// The sequence could not fit into the KV cache even alone.
    #[error("the sequence needs {needed} KV blocks; the cache has {total}")]
    TooManyBlocks {
        /// Blocks needed at its end.
        needed: usize,
        /// Blocks in all.
        total: usize,
    },
    /// A token id is not in the vocabulary.
    #[error("token id {token} is not below the vocabulary size of {vocabulary}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// The vocabulary's size.
        vocabulary: u32,
    },
    /// A sampling option is outside of its range.
    #[error("{field} is {value}; it must be {expected}")]
    Sampling {
        /// The option.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The engine has ended; the process must end too.
    #[error("the engine has stopped")]
    Stopped,
}
