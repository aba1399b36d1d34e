//! Tokens to text, one token at a time, exactly as the tokenizer decodes the whole sequence.
//!
//! Decoding windows of tokens again and again (as most engines do) costs more the longer a run of unfinished
//! bytes gets, and differs from the full decode where a decoder looks at its neighbours. Here each token's
//! bytes are looked up in a table that is made once, and an incremental decoder turns them into characters:
//! constant work per token, never half a character. Two families of decoders are known, which are all that
//! the supported architectures use; a model with another one is refused at the start, not decoded wrongly.

use serde_json::Value;
use tokenizers::Tokenizer;

/// Tokens that a table may hold. The largest vocabularies in use have 262,144.
const TOKENS_MAX: u32 = 1 << 20;

/// How tokens become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    /// Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): every token is bytes; what is no UTF-8 becomes U+FFFD,
    /// one for each maximal part, as `String::from_utf8_lossy` does.
    ByteLevel,
    /// SentencePiece with byte fallback (Llama 2, Mistral, Gemma): tokens are text, except for single bytes;
    /// a run of those is text if all of it is UTF-8, else one U+FFFD for each byte.
    ByteFallback {
        /// Spaces cut off at the beginning of the text.
        strip: usize,
    },
}

/// Why a tokenizer's decoder was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecoderError {
    /// It is none of the known ones.
    #[error(
        "decoder {decoder} is not supported; supported are ByteLevel, and Sequence of Replace, ByteFallback, \
         Fuse and Strip"
    )]
    Unsupported {
        /// What the file says, cut to 200 characters.
        decoder: String,
    },
    /// The vocabulary is too large.
    #[error("token id {id} is above the limit of {limit}")]
    TooManyTokens {
        /// The largest id.
        id: u32,
        /// The limit.
        limit: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Byte,
    Special,
    Absent,
}

/// The bytes of every token.
#[derive(Debug)]
pub struct Pieces {
    scheme: Scheme,
    bytes: Vec<u8>,
    /// Token `i` has `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
}

impl Pieces {
    /// Makes the table. `decoder` is that field of `tokenizer.json`.
    ///
    /// # Errors
    /// When the decoder is not a known one, or the vocabulary too large.
    pub fn new(tokenizer: &Tokenizer, decoder: &Value) -> Result<Self, DecoderError> {
        let scheme = scheme_of(decoder).ok_or_else(|| DecoderError::Unsupported {
            decoder: decoder.to_string().chars().take(200).collect(),
        })?;
        let last = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        if last > TOKENS_MAX {
            return Err(DecoderError::TooManyTokens { id: last, limit: TOKENS_MAX });
        }
        let mut pieces = Self { scheme, bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new() };
        let byte_of = byte_of_char();
        for id in 0..=last {
            let kind = match tokenizer.id_to_token(id) {
                None => Kind::Absent,
                Some(token) => {
                    let special = tokenizer.get_added_vocabulary().is_special_token(&token);
                    let kind = pieces.append(&token, &byte_of);
                    if special { Kind::Special } else { kind }
                }
            };
            pieces.kinds.push(kind);
            pieces.ends.push(u32::try_from(pieces.bytes.len()).unwrap_or(u32::MAX));
        }
        Ok(pieces)
    }

    fn append(&mut self, token: &str, byte_of: &[Option<u8>; BYTE_CHARS]) -> Kind {
        match self.scheme {
            Scheme::ByteLevel => {
                let lookup = |c: char| byte_of.get(c as usize).copied().flatten();
                match token.chars().map(lookup).collect::<Option<Vec<u8>>>() {
                    Some(bytes) => self.bytes.extend_from_slice(&bytes),
                    // An added token is text, not an image of bytes.
                    None => self.bytes.extend_from_slice(token.as_bytes()),
                }
                Kind::Text
            }
            Scheme::ByteFallback { .. } => match byte_token(token) {
                Some(byte) => {
                    self.bytes.push(byte);
                    Kind::Byte
                }
                None => {
                    self.bytes.extend_from_slice(token.replace('\u{2581}', " ").as_bytes());
                    Kind::Text
                }
            },
        }
    }

    /// The bytes of a token; none for an id that no token has.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let begin = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[begin as usize..end as usize]
    }

    fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Absent)
    }
}

/// Decodes one sequence.
#[derive(Debug)]
pub struct Detokenizer<'a> {
    pieces: &'a Pieces,
    skip_special: bool,
    /// Bytes that are no text yet.
    pending: Vec<u8>,
    /// Spaces still to be cut off.
    strip: usize,
    /// What the unfinished end of the prompt showed, and shows again when it is finished.
    shown: String,
}

impl<'a> Detokenizer<'a> {
    /// Begins a sequence. With `skip_special` special tokens leave no text.
    pub fn new(pieces: &'a Pieces, skip_special: bool) -> Self {
        let strip = match pieces.scheme {
            Scheme::ByteLevel => 0,
            Scheme::ByteFallback { strip } => strip,
        };
        Self { pieces, skip_special, pending: Vec::new(), strip, shown: String::new() }
    }

    /// Begins behind a prompt, whose text is appended: it and what follows join to what the whole sequence decodes to.
    pub fn behind(pieces: &'a Pieces, skip_special: bool, prompt: &[u32], out: &mut String) -> Self {
        let mut begun = Self::new(pieces, skip_special);
        prompt.iter().for_each(|&token| begun.push(token, out));
        let mut end =
            Self { pending: begun.pending.clone(), shown: String::new(), ..Self::new(pieces, skip_special) };
        end.strip = begun.strip;
        end.finish(&mut begun.shown);
        out.push_str(&begun.shown);
        begun
    }

    /// Takes the next token; appends the text that is certain now.
    pub fn push(&mut self, id: u32, out: &mut String) {
        let kind = self.pieces.kind(id);
        if kind == Kind::Absent || (kind == Kind::Special && self.skip_special) {
            return;
        }
        let bytes = self.pieces.bytes(id);
        match (self.pieces.scheme, kind) {
            (Scheme::ByteLevel, _) => {
                self.pending.extend_from_slice(bytes);
                let before = out.len();
                drain_lossy(&mut self.pending, out);
                self.drop_shown(before, out);
            }
            (Scheme::ByteFallback { .. }, Kind::Byte) => self.pending.extend_from_slice(bytes),
            (Scheme::ByteFallback { .. }, _) => {
                self.end_run(out);
                self.append(&String::from_utf8_lossy(bytes), out);
            }
        }
    }

    /// The sequence is over: unfinished bytes become U+FFFD, as in the full decode.
    pub fn finish(&mut self, out: &mut String) {
        match self.pieces.scheme {
            Scheme::ByteLevel if self.pending.is_empty() => {}
            Scheme::ByteLevel => {
                let before = out.len();
                out.push(char::REPLACEMENT_CHARACTER);
                self.pending.clear();
                self.drop_shown(before, out);
            }
            Scheme::ByteFallback { .. } => self.end_run(out),
        }
    }

    /// Whether a run of bytes is text shows only at its end.
    fn end_run(&mut self, out: &mut String) {
        let before = out.len();
        self.end_whole_run(out);
        self.drop_shown(before, out);
    }

    /// Takes off again what the prompt's end has shown already, once there is text behind `before`.
    fn drop_shown(&mut self, before: usize, out: &mut String) {
        if self.shown.is_empty() || out.len() == before {
            return;
        }
        let shown = std::mem::take(&mut self.shown);
        if out[before..].starts_with(&shown) {
            out.replace_range(before..before + shown.len(), "");
        }
    }

    fn end_whole_run(&mut self, out: &mut String) {
        let run = std::mem::take(&mut self.pending);
        match String::from_utf8(run) {
            Ok(text) => self.append(&text, out),
            Err(error) => {
                let count = error.as_bytes().len();
                self.append(&"\u{FFFD}".repeat(count), out);
            }
        }
    }

    fn append(&mut self, mut text: &str, out: &mut String) {
        while self.strip > 0 && !text.is_empty() {
            match text.strip_prefix(' ') {
                Some(rest) => {
                    text = rest;
                    self.strip -= 1;
                }
                None => self.strip = 0,
            }
        }
        out.push_str(text);
    }
}

/// Moves what is certain from `pending` to `out`; at most 3 bytes of an unfinished character stay.
fn drain_lossy(pending: &mut Vec<u8>, out: &mut String) {
    let mut done = 0;
    loop {
        match std::str::from_utf8(&pending[done..]) {
            Ok(text) => {
                out.push_str(text);
                pending.clear();
                return;
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                out.push_str(std::str::from_utf8(&pending[done..valid]).unwrap_or_default());
                done = valid;
                match error.error_len() {
                    Some(length) => {
                        out.push(char::REPLACEMENT_CHARACTER);
                        done += length;
                    }
                    None => {
                        pending.drain(..done);
                        return;
                    }
                }
            }
        }
    }
}

/// `<0x41>` is the byte 0x41.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// Characters that stand for bytes lie below this.
const BYTE_CHARS: usize = 0x144;

/// The inverse of GPT-2's images of bytes: printable bytes of Latin-1 stand for themselves, the others for
/// the characters from U+0100 on, in order (`bytes_to_unicode` of the GPT-2 encoder).
fn byte_of_char() -> [Option<u8>; BYTE_CHARS] {
    let mut table = [None; BYTE_CHARS];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let image = if printable {
            usize::from(byte)
        } else {
            next += 1;
            next - 1
        };
        table[image] = Some(byte);
    }
    table
}

fn scheme_of(decoder: &Value) -> Option<Scheme> {
    let kind = |step: &Value| step.get("type").and_then(Value::as_str).map(str::to_owned);
    if kind(decoder)? == "ByteLevel" {
        return Some(Scheme::ByteLevel);
    }
    let steps = decoder.get("decoders")?.as_array()?;
    let kinds: Vec<String> = steps.iter().filter_map(kind).collect();
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    match kinds.as_slice() {
        ["ByteLevel"] => Some(Scheme::ByteLevel),
        ["Replace", "ByteFallback", "Fuse"] if replaces_underline(&steps[0]) => {
            Some(Scheme::ByteFallback { strip: 0 })
        }
        ["Replace", "ByteFallback", "Fuse", "Strip"] if replaces_underline(&steps[0]) => {
            let strip = &steps[3];
            let number = |name: &str| strip.get(name).and_then(Value::as_u64);
            let spaces = strip.get("content").and_then(Value::as_str) == Some(" ");
            let begin = usize::try_from(number("start")?).ok()?;
            (spaces && number("stop")? == 0).then_some(Scheme::ByteFallback { strip: begin })
        }
        _ => None,
    }
}

fn replaces_underline(step: &Value) -> bool {
    step["pattern"]["String"] == "\u{2581}" && step["content"] == " "
}

#[cfg(test)]
mod tests;
