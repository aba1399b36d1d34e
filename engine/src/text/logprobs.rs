//! Log probabilities in the forms of OpenAI's API and vLLM. Tokens are told apart by their ids, whatever their texts.

use std::fmt::Write as _;

use millrace_crds::request::{ChatLogprobs, ChatTokenLogprob, TextLogprobs, TopLogprob};
use serde_json::{Map, Value, json};

use crate::text::completion::TokenLogprobs;
use crate::text::detokenize::Pieces;

/// Names tokens.
#[derive(Debug, Clone, Copy)]
pub struct Namer<'a> {
    /// Their bytes.
    pub pieces: &'a Pieces,
    /// By their ids alone (`return_tokens_as_token_ids` of vLLM).
    pub as_ids: bool,
}

impl Namer<'_> {
    /// A token's text; bytes that are no text as OpenAI's completions show them.
    fn name(&self, id: u32) -> String {
        if self.as_ids {
            return by_id(id);
        }
        match std::str::from_utf8(self.pieces.bytes(id)) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let mut name = String::from("bytes:");
                for byte in self.pieces.bytes(id) {
                    let _ = write!(name, "\\x{byte:02x}");
                }
                name
            }
        }
    }

    /// A token's text in a chat, beside which its bytes stand.
    fn text(&self, id: u32) -> String {
        if self.as_ids { by_id(id) } else { String::from_utf8_lossy(self.pieces.bytes(id)).into_owned() }
    }
}

fn by_id(id: u32) -> String {
    format!("token_id:{id}")
}

/// JSON has no infinity: a token of probability 0 gets -9999, as in OpenAI's API. The shortest decimal form
/// of the 32-bit number is kept, which a cast would lengthen.
fn number(value: f32) -> f64 {
    format!("{}", value.max(-9999.0)).parse().unwrap_or(-9999.0)
}

/// Of a chat's choice.
pub fn of_chat(tokens: &[TokenLogprobs], namer: Namer<'_>) -> ChatLogprobs {
    let bytes = |id: u32| namer.pieces.bytes(id).to_vec();
    let top = |&(id, value): &(u32, f32)| TopLogprob {
        token: namer.text(id),
        logprob: number(value),
        bytes: bytes(id),
    };
    let entry = |at: &TokenLogprobs| {
        let values = at.values.as_ref();
        ChatTokenLogprob {
            token: namer.text(at.id),
            logprob: number(values.map_or(f32::NEG_INFINITY, |values| values.chosen)),
            bytes: bytes(at.id),
            top_logprobs: values.map(|values| values.top.iter().map(top).collect()).unwrap_or_default(),
        }
    };
    ChatLogprobs { content: tokens.iter().map(entry).collect() }
}

/// Of a completion's choice: the `most` most probable tokens of each place, and the chosen one.
pub fn of_text<'t>(
    tokens: impl Iterator<Item = &'t TokenLogprobs>,
    most: usize,
    namer: Namer<'_>,
) -> TextLogprobs {
    let mut made = TextLogprobs {
        text_offset: Vec::new(),
        token_logprobs: Vec::new(),
        tokens: Vec::new(),
        top_logprobs: Vec::new(),
    };
    for at in tokens {
        made.text_offset.push(at.offset);
        let Some(values) = &at.values else {
            made.tokens.push(namer.name(at.id));
            made.token_logprobs.push(None);
            made.top_logprobs.push(None);
            continue;
        };
        let mut entries: Vec<(u32, f32)> = values.top.iter().take(most).copied().collect();
        if !entries.iter().any(|(id, _)| *id == at.id) {
            entries.push((at.id, values.chosen));
        }
        let mut top = Map::new();
        let mut chosen = namer.name(at.id);
        for (id, value) in entries {
            let name = namer.name(id);
            // A text that another token of this place has already is no name.
            let name = if top.contains_key(&name) { by_id(id) } else { name };
            if id == at.id {
                chosen.clone_from(&name);
            }
            top.insert(name, number(value).into());
        }
        made.tokens.push(chosen);
        made.token_logprobs.push(Some(number(values.chosen)));
        made.top_logprobs.push(Some(top));
    }
    made
}

/// Of a prompt, as vLLM reports it: by id; `rank` where it is among the most probable ones.
pub fn of_prompt(tokens: &[TokenLogprobs], most: u32, pieces: &Pieces) -> Vec<Value> {
    let namer = Namer { pieces, as_ids: false };
    let place = |at: &TokenLogprobs| {
        let Some(values) = &at.values else { return Value::Null };
        let mut found = Map::new();
        let mut add = |id: u32, value: f32, rank: Option<usize>| {
            let entry = json!({"logprob": number(value), "rank": rank, "decoded_token": namer.text(id)});
            found.insert(id.to_string(), entry);
        };
        let rank = values.top.iter().position(|(id, _)| *id == at.id).map(|rank| rank + 1);
        add(at.id, values.chosen, rank);
        for (rank, &(id, value)) in values.top.iter().take(most as usize).enumerate() {
            add(id, value, Some(rank + 1));
        }
        Value::Object(found)
    };
    tokens.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::request::Logprobs;
    use crate::text::prompt::tiny::{tiny_folder, tokenizer};

    #[test]
    fn two_tokens_of_one_text_have_two_names() {
        // The special token's text is also that of an ordinary token.
        let folder = tiny_folder();
        let mut file = tokenizer();
        file["model"]["vocab"]["Ċ"] = 10.into();
        file["added_tokens"][0]["content"] = "\n".into();
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), "{}").unwrap();
        let text = crate::text::prompt::Text::open(folder.path(), "tiny").unwrap();
        let values = Logprobs { chosen: -2.0, top: vec![(10, -0.5), (65, -1.0)] };
        let place = TokenLogprobs { id: 256, offset: 0, values: Some(values) };
        let made = of_text([&place].into_iter(), 2, Namer { pieces: text.pieces(), as_ids: false });
        let expected = json!({"\n": -0.5, "A": -1.0, "token_id:256": -2.0});
        assert_eq!(
            (made.tokens, Value::from(made.top_logprobs[0].clone())),
            (vec!["token_id:256".to_owned()], expected)
        );
    }
}
