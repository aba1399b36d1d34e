//! A sequence: one request's tokens, how many of them have their keys and values in the cache, and where.
//!
//! Prompt and output are one list of tokens, so that a step only ever asks for the next rows after those
//! computed: a prefill chunk is several of them, a decode is one, and recomputing after a preemption is a
//! prefill like any other. While a step that samples is in flight, the sequence's next token is *awaited*: it counts,
//! has a place in the cache and may be computed in the step that follows, but it is not known. Pure.

use super::blocks::{BlockId, Chain, PREFIX_ROOT, PrefixHash, extend_hash};
use super::request::{Finish, Request, Sampling, SequenceUsage, Urgency};

/// Added to the logit of a token that must or must not be chosen: beyond all logits, and far from infinite.
const DECISIVE: f32 = 1e30;

/// A sequence's place among those that wait or run: what is less goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// It has waited while many others were admitted.
    Due,
    /// By what was said of it.
    By(Urgency),
}

/// One request on its way.
#[derive(Debug)]
pub struct Sequence {
    tokens: Vec<u32>,
    prompt_len: usize,
    max_tokens: usize,
    stop_tokens: Vec<u32>,
    /// How its tokens are chosen.
    pub sampling: Sampling,
    /// Seed of its random numbers.
    pub seed: u64,
    /// The biases that make each forced token the choice.
    forced: Vec<(u32, f32)>,
    /// The biases while stop tokens are barred.
    early: Vec<(u32, f32)>,
    /// The biases of the next token where words are barred: they change with every token.
    current: Vec<(u32, f32)>,
    /// The sampled row of the step in flight whose choice is the next token.
    pub(super) awaited: Option<u32>,
    /// Tokens whose keys and values are in the cache, or will be after the steps that are queued.
    pub(super) computed: usize,
    /// Blocks that hold them, in order.
    pub(super) table: Vec<BlockId>,
    /// Prefix hash at the end of each full block of known tokens.
    pub(super) hashes: Vec<PrefixHash>,
    /// Blocks of `table` that have been offered to the prefix cache.
    pub(super) registered: usize,
    /// The chain that the last of those ends; `None` once one could not be registered.
    pub(super) chain: Option<Chain>,
    /// Prompt tokens counted as computed or found.
    pub(super) prompt_counted: usize,
    /// Prompt tokens found in the prefix cache when it was first admitted.
    pub(super) cached: usize,
    /// Whether it has been admitted before.
    pub(super) admitted: bool,
    /// Steps for which it let others compute a prefix that it shares.
    pub(super) deferred: u32,
    /// Others of its turn that the longest-first window admitted before it.
    pub(super) bypassed: u32,
    /// Its place among those that wait or run.
    pub(super) turn: Turn,
    /// How many sequences have been admitted when its turn comes whatever its urgency.
    pub(super) due_at: u64,
}

impl Sequence {
    /// Takes a request in, for blocks of `block_tokens`. All room it will need on the host is taken here.
    pub fn new(request: Request, block_tokens: usize) -> Self {
        let Request { prompt, max_tokens, stop_tokens, sampling, seed } = request;
        let total = prompt.len() + max_tokens as usize;
        let prompt_len = prompt.len();
        let mut tokens = prompt;
        tokens.reserve_exact(max_tokens as usize);
        let forced = sampling.forced.iter().map(|&token| (token, DECISIVE)).collect();
        let barred = stop_tokens.iter().map(|&token| (token, -DECISIVE));
        let early = if sampling.min_tokens > 0 {
            sampling.logit_bias.iter().copied().chain(barred).collect()
        } else {
            Vec::new()
        };
        let mut sequence = Self {
            tokens,
            prompt_len,
            max_tokens: max_tokens as usize,
            stop_tokens,
            sampling,
            seed,
            forced,
            early,
            current: Vec::new(),
            awaited: None,
            computed: 0,
            table: Vec::with_capacity(total.div_ceil(block_tokens)),
            hashes: Vec::with_capacity(total.div_ceil(block_tokens)),
            registered: 0,
            chain: Some(Chain::ROOT),
            prompt_counted: 0,
            cached: 0,
            admitted: false,
            deferred: 0,
            bypassed: 0,
            turn: Turn::By(Urgency::default()),
            due_at: u64::MAX,
        };
        sequence.hash_full_blocks(block_tokens);
        sequence.bar_words();
        sequence
    }

    /// What is added to the logits of the next token.
    pub fn bias(&self) -> &[(u32, f32)] {
        match self.forced.get(self.length() - self.prompt_len) {
            Some(forced) => std::slice::from_ref(forced),
            None if !self.sampling.bad_words.is_empty() => &self.current,
            None => self.plain_bias(),
        }
    }

    fn plain_bias(&self) -> &[(u32, f32)] {
        let chosen = self.length() - self.prompt_len - self.forced.len().min(self.length() - self.prompt_len);
        if chosen < self.sampling.min_tokens as usize { &self.early } else { &self.sampling.logit_bias }
    }

    /// Bars the last token of each word whose other tokens stand at the end.
    fn bar_words(&mut self) {
        if self.sampling.bad_words.is_empty() {
            return;
        }
        let output = self.tokens.get(self.prompt_len + self.forced.len()..).unwrap_or_default();
        let barred = |word: &Vec<u32>| match word.split_last() {
            Some((last, before)) if output.ends_with(before) => Some((*last, -DECISIVE)),
            _ => None,
        };
        let barred: Vec<(u32, f32)> = self.sampling.bad_words.iter().filter_map(barred).collect();
        self.current = self.plain_bias().iter().copied().chain(barred).collect();
    }

    /// Prompt and output, as far as they are known.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens, with the one that is awaited.
    pub fn length(&self) -> usize {
        self.tokens.len() + usize::from(self.awaited.is_some())
    }

    /// The sampled row of the step in flight whose choice is the next token.
    pub fn awaited(&self) -> Option<u32> {
        self.awaited
    }

    /// Tokens in the prompt.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Tokens generated, with the one that is awaited.
    pub fn generated(&self) -> usize {
        self.length() - self.prompt_len
    }

    /// The tokens generated so far.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// Most tokens that it may still generate, after the one that is awaited.
    pub fn remaining(&self) -> usize {
        self.prompt_len + self.max_tokens - self.length()
    }

    /// Tokens whose keys and values are wanted and not in the cache. A decode has exactly one; a sequence that ends
    /// with the token that is awaited has none.
    pub fn pending(&self) -> usize {
        if self.remaining() == 0 { 0 } else { self.length() - self.computed }
    }

    /// The blocks that hold its keys and values, in order.
    pub fn table(&self) -> &[BlockId] {
        &self.table
    }

    /// KV blocks that it holds after so many tokens more, or at its end if that comes before. One token more than
    /// there are now is always counted: a sequence that is let in can make progress.
    pub(super) fn blocks_after(&self, tokens: usize, block_tokens: usize) -> usize {
        (self.length() + tokens.max(1).min(self.remaining())).div_ceil(block_tokens)
    }

    /// KV blocks that it holds at its end if it generates all the tokens it may.
    pub fn blocks_max(&self, block_tokens: usize) -> usize {
        (self.prompt_len + self.max_tokens).div_ceil(block_tokens)
    }

    /// Adds a generated token, which is not awaited any more; says whether the sequence ends with it.
    pub(super) fn append(&mut self, token: u32, block_tokens: usize) -> Option<Finish> {
        self.awaited = None;
        assert!(self.remaining() > 0, "a sequence that has its tokens is not run again");
        self.tokens.push(token);
        self.hash_full_blocks(block_tokens);
        self.bar_words();
        let is_forced = self.tokens.len() <= self.prompt_len + self.forced.len();
        if !is_forced && self.stop_tokens.contains(&token) {
            Some(Finish::Stop)
        } else {
            (self.remaining() == 0).then_some(Finish::Length)
        }
    }

    /// What it cost so far.
    pub fn usage(&self) -> SequenceUsage {
        SequenceUsage {
            prompt_tokens: self.prompt_len as u32,
            cached_tokens: self.cached as u32,
            output_tokens: self.output().len() as u32,
        }
    }

    /// Full blocks that may come from the prefix cache: the last token is always computed, since its logits
    /// are wanted.
    pub(super) fn blocks_matchable(&self, block_tokens: usize) -> usize {
        (self.length() - 1) / block_tokens
    }

    /// Tokens of the block with this index in the table.
    pub(super) fn block(&self, index: usize, block_tokens: usize) -> &[u32] {
        &self.tokens[index * block_tokens..(index + 1) * block_tokens]
    }

    fn hash_full_blocks(&mut self, block_tokens: usize) {
        while (self.hashes.len() + 1) * block_tokens <= self.tokens.len() {
            let parent = self.hashes.last().copied().unwrap_or(PREFIX_ROOT);
            let hash = extend_hash(parent, self.block(self.hashes.len(), block_tokens));
            self.hashes.push(hash);
        }
    }
}
