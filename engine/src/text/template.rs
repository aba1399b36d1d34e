//! Chat templates: a conversation to the text that a model was trained on.
//!
//! Templates are programs of a model's author. They run in [`crate::text::jinja`] with the settings and functions of
//! Hugging Face's `apply_chat_template`, without a loader, under limits of source, instructions, depth and output. A
//! template sees no clock: `strftime_now` gives the time at which the job was published, in UTC, so that every
//! attempt renders the same text.

use crate::text::conversation::{self, Abilities};
use crate::text::jinja::value::PyValue;
use crate::text::jinja::{Program, RenderBounds, RenderContext, TemplateFault, json};
use crate::text::job::{Chat, Reject};
use crate::text::marks::Marker;

/// Longest source; the longest in use (with tools and documents) have about 30 KiB.
pub const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Instructions per rendering: some hundred for each of the most messages that a job may have.
const INSTRUCTIONS_MAX: u64 = 4_000_000;
/// Longest rendered text: the largest request, and as much again for what the template adds.
const OUTPUT_BYTES_MAX: usize = 2 * crate::text::job::REQUEST_BYTES_MAX;
/// Characters of a template's error that go into a message.
const ERROR_CHARS_MAX: usize = 300;
/// Marks the end of the message that is continued. The blank shows whether the template trims.
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A parsed chat template.
#[derive(Debug)]
pub struct Template {
    program: Program,
    /// `bos_token` and the like, as variables.
    special_tokens: Vec<(String, String)>,
    abilities: Abilities,
}

/// Why a template was refused at the start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Its source is too long.
    #[error("the chat template has {bytes} bytes; the limit is {limit}")]
    TooLong {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// It does not parse, or uses what is not supported.
    #[error("the chat template does not compile: {0}")]
    Syntax(String),
}

impl Template {
    /// Parses a template. `special_tokens` are variables such as `bos_token`.
    ///
    /// # Errors
    /// When the source is too long, does not parse, or uses a filter, test or function that is not supported.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(TemplateError::TooLong { bytes: source.len(), limit: SOURCE_BYTES_MAX });
        }
        let program = Program::parse(source).map_err(|fault| TemplateError::Syntax(describe(&fault)))?;
        let abilities = Abilities {
            developer: source.contains("developer"),
            content: source.contains("content"),
            parts: true,
        };
        let mut template = Self { program, special_tokens, abilities };
        template.abilities.parts = template.writes_parts();
        Ok(template)
    }

    /// Whether the template writes the texts of a message that comes in parts, and not the parts themselves.
    fn writes_parts(&self) -> bool {
        let parts =
            ["FIRST PART", "SECOND PART"].map(|text| serde_json::json!({"type": "text", "text": text}));
        let probe = serde_json::json!({"role": "user", "content": parts});
        let Ok(message) = json::parse(&probe.to_string()) else { return false };
        let rendered = self.run(&[message], &[], 0);
        rendered.is_ok_and(|text| {
            text.contains("FIRST PART")
                && text.contains("SECOND PART")
                && !text.contains("'text'")
                && !text.contains("\"text\"")
        })
    }

    fn run(
        &self,
        messages: &[PyValue],
        variables: &[(String, PyValue)],
        created: i64,
    ) -> Result<String, Reject> {
        let text = |token: &str| PyValue::text(token);
        let mut all: Vec<(String, PyValue)> =
            self.special_tokens.iter().map(|(name, token)| (name.clone(), text(token))).collect();
        all.push(("tools".into(), PyValue::None));
        all.push(("documents".into(), PyValue::None));
        all.push(("add_generation_prompt".into(), PyValue::Bool(true)));
        all.push(("messages".into(), conversation::list(messages.to_vec())?));
        all.extend(variables.iter().cloned());
        let bounds = RenderBounds { instructions: INSTRUCTIONS_MAX, bytes: OUTPUT_BYTES_MAX };
        let context = RenderContext { variables: all, now: created };
        self.program.render(&context, bounds).map_err(|fault| Reject::Template(describe(&fault)))
    }

    /// Renders a conversation of a job that was published at `created` (Unix seconds).
    ///
    /// # Errors
    /// When the template refuses the conversation or breaks a limit.
    pub fn render(&self, chat: &Chat, created: i64) -> Result<String, Reject> {
        self.render_marked(chat, created, None)
    }

    /// As [`Template::render`], with marks around tokens that the caller wrote.
    pub(super) fn render_marked(
        &self,
        chat: &Chat,
        created: i64,
        marker: Option<&Marker>,
    ) -> Result<String, Reject> {
        let mut messages = conversation::messages(chat, self.abilities)?;
        let mut variables = conversation::variables(chat)?;
        if let Some(marker) = marker {
            messages.iter_mut().for_each(|message| *message = marker.marked(message));
            variables.iter_mut().for_each(|(_, value)| *value = marker.marked(value));
        }
        variables.push(("add_generation_prompt".into(), PyValue::Bool(chat.add_generation_prompt)));
        if !chat.continue_final_message {
            return self.run(&messages, &variables, created);
        }
        if !self.abilities.content {
            return Err(Reject::Template("it reads no content, which is to be continued".into()));
        }
        let last = conversation::mark_end(&mut messages, TAG)?;
        let rendered = self.run(&messages, &variables, created)?;
        cut_at_tag(rendered, last.trim())
    }
}

/// Cuts what the template put behind the last message, so that the model continues it, as transformers does.
fn cut_at_tag(mut rendered: String, last: &str) -> Result<String, Reject> {
    let at = rendered.rfind(TAG.trim_end()).filter(|_| rendered.contains(last));
    let Some(at) = at else {
        return Err(Reject::Template("it does not show the final message, which is to be continued".into()));
    };
    let trims = !rendered[at..].starts_with(TAG);
    rendered.truncate(at);
    if trims {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}

/// The message of the template's author or of the renderer, with the line.
fn describe(fault: &TemplateFault) -> String {
    let message: String = fault.message.chars().take(ERROR_CHARS_MAX).collect();
    format!("{message} (line {} of the template)", fault.line)
}

#[cfg(test)]
mod tests;
