//! One choice while it runs: tokens come in, text and deltas go out, until something ends it.

use std::time::Duration;

use millrace_crds::request::FinishReason;
use millrace_crds::tokens::TokenDelta;
use tokio::sync::mpsc;

use super::AnswerError;
use crate::schedule::handle::Generation;
use crate::schedule::request::{Event, Finish, Token};
use crate::text::completion::{Choice, TokenLogprobs};
use crate::text::conversation;
use crate::text::detokenize::Detokenizer;
use crate::text::job::{Input, TextRequest};
use crate::text::prompt::Text;
use crate::text::stop::Stops;

/// How long a finished choice waits for room for its last delta, the one that says why it ended.
const LAST_DELTA_WAIT: Duration = Duration::from_millis(100);

/// Feeds a generation's events to a choice until one of them ends it. The generation is cancelled by its
/// owner, which drops it.
pub(super) async fn listen(
    generation: &mut Generation,
    progress: &mut Progress<'_>,
    first_token: impl FnOnce(),
) -> Result<(), AnswerError> {
    let mut first_token = Some(first_token);
    loop {
        match generation.next().await {
            Some(Event::Token(token)) => {
                if let Some(note) = first_token.take() {
                    note();
                }
                if progress.push(token) {
                    return Ok(());
                }
            }
            Some(Event::Finished(Finish::Stop, _)) => {
                progress.end(FinishReason::Stop);
                return Ok(());
            }
            Some(Event::Finished(Finish::Length, _)) => {
                progress.end(FinishReason::Length);
                return Ok(());
            }
            Some(Event::Failed(message)) => return Err(AnswerError::Sequence(message)),
            None => return Err(AnswerError::Stopped),
        }
    }
}

/// A choice that is not finished.
pub(super) struct Progress<'a> {
    text: &'a Text,
    request: &'a TextRequest,
    detokenizer: Detokenizer<'a>,
    stops: Stops,
    stop_tokens: Vec<u32>,
    /// Tokens of the prompt that are still to be reported.
    forced: usize,
    /// Text as the detokenizer gives it, before the stop strings have seen it; empty between tokens.
    fresh: String,
    /// Characters of text so far, counted for the offsets of log probabilities.
    characters: usize,
    choice: Choice,
    deltas: Deltas,
}

impl<'a> Progress<'a> {
    pub(super) fn new(
        text: &'a Text,
        request: &'a TextRequest,
        (stop_tokens, deltas): (Vec<u32>, Deltas),
    ) -> Self {
        let params = &request.params;
        Self {
            text,
            request,
            detokenizer: text.detokenizer(params.skip_special_tokens),
            stops: Stops::new(&params.stop, params.include_stop),
            stop_tokens,
            forced: 0,
            fresh: String::new(),
            characters: 0,
            choice: Choice::default(),
            deltas,
        }
    }

    /// Puts a completion behind its prompt: the two join to what the whole sequence decodes to. With `scored` the
    /// first tokens that come are the prompt's, but for its first one.
    pub(super) fn begin(&mut self, prompt: &[u32], scored: bool) {
        let params = &self.request.params;
        let skip = params.skip_special_tokens;
        if params.echo || scored {
            let mut detokenizer = self.text.detokenizer(skip);
            let mut text = String::new();
            for &id in prompt {
                let offset = text.chars().count();
                self.choice.prompt.push(TokenLogprobs { id, offset, values: None });
                detokenizer.push(id, &mut text);
            }
        }
        if scored {
            self.forced = prompt.len().saturating_sub(1);
        }
        let mut text = String::new();
        match &self.request.input {
            // A character that the prompt leaves unfinished is shown when it is whole.
            Input::Prompts { .. } if params.echo => {
                prompt.iter().for_each(|&id| self.detokenizer.push(id, &mut text));
            }
            Input::Prompts { .. } => {
                self.detokenizer = self.text.detokenizer_behind(skip, prompt, &mut text);
            }
            Input::Chat(chat) if params.echo => text = conversation::continued(chat),
            Input::Chat(_) => {}
        }
        if params.echo {
            self.characters = text.chars().count();
            self.deltas.send(&text);
            self.choice.text = text;
        }
    }

    /// Takes a token; returns whether it ended the choice.
    fn push(&mut self, token: Token) -> bool {
        if self.forced > 0 {
            let place = self.choice.prompt.len() - self.forced;
            self.choice.prompt[place].values = token.logprobs;
            self.forced -= 1;
            return false;
        }
        if self.request.params.max_tokens == Some(0) {
            self.end(FinishReason::Length);
            return true;
        }
        self.choice.tokens += 1;
        if let Some(most) = self.request.params.logprobs {
            let mut values = token.logprobs;
            values.iter_mut().for_each(|values| values.top.truncate(most as usize));
            self.choice.logprobs.push(TokenLogprobs { id: token.id, offset: self.characters, values });
        }
        let stopped = self.stop_tokens.binary_search(&token.id).is_ok();
        // The text of a stop token is cut off, like that of a stop string.
        if !stopped || self.request.params.include_stop {
            self.detokenizer.push(token.id, &mut self.fresh);
        }
        let matched = self.release();
        if stopped && !matched {
            self.end(FinishReason::Stop);
        } else if matched {
            self.choice.finish = FinishReason::Stop;
        }
        stopped || matched
    }

    /// Nothing more comes: what was held back comes out, unless it holds a stop string after all.
    fn end(&mut self, finish: FinishReason) {
        self.choice.finish = finish;
        self.detokenizer.finish(&mut self.fresh);
        if self.release() {
            self.choice.finish = FinishReason::Stop;
        }
        let before = self.choice.text.len();
        self.stops.finish(&mut self.choice.text);
        self.deltas.send(&self.choice.text[before..]);
    }

    /// Moves fresh text through the stop strings; returns whether one ended the choice.
    fn release(&mut self) -> bool {
        if self.fresh.is_empty() {
            return false;
        }
        if self.request.params.logprobs.is_some() {
            self.characters += self.fresh.chars().count();
        }
        let before = self.choice.text.len();
        // Nothing stops a choice that must be longer.
        let watched = self.choice.tokens > u64::from(self.request.params.min_tokens);
        let matched = watched && self.stops.push(&self.fresh, &mut self.choice.text);
        if !watched {
            self.choice.text.push_str(&self.fresh);
        }
        self.fresh.clear();
        self.deltas.send(&self.choice.text[before..]);
        matched
    }

    pub(super) async fn finish(mut self) -> Choice {
        self.deltas.finish(self.choice.finish).await;
        self.choice
    }
}

/// The deltas of one choice. Sending never waits: text that finds no room joins the next delta.
pub(super) struct Deltas {
    sender: Option<mpsc::Sender<TokenDelta>>,
    next: TokenDelta,
}

impl Deltas {
    pub(super) fn new(sender: Option<mpsc::Sender<TokenDelta>>, request: usize, choice: u32) -> Self {
        let request = u32::try_from(request).unwrap_or(u32::MAX);
        let next = TokenDelta { number: 0, request, choice, text: String::new(), finish_reason: None };
        Self { sender, next }
    }

    fn send(&mut self, text: &str) {
        let Some(sender) = &self.sender else { return };
        self.next.text.push_str(text);
        if self.next.text.is_empty() {
            return;
        }
        let delta = TokenDelta { text: std::mem::take(&mut self.next.text), ..self.next.clone() };
        match sender.try_send(delta) {
            Ok(()) => self.next.number += 1,
            Err(mpsc::error::TrySendError::Full(delta)) => self.next.text = delta.text,
            Err(mpsc::error::TrySendError::Closed(_)) => self.sender = None,
        }
    }

    async fn finish(&mut self, finish: FinishReason) {
        let Some(sender) = self.sender.take() else { return };
        let reason = match finish {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        let last = TokenDelta { finish_reason: Some(reason.into()), ..self.next.clone() };
        // Nobody waits for a listener longer than this: the outcome holds the text.
        let _ = sender.send_timeout(last, LAST_DELTA_WAIT).await;
    }
}
