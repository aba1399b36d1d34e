//! The items of a response's input, in pages.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::http::error::{ApiCode, ApiError};
use crate::http::responses::records::ResponseRecord;

/// Items of a page where the client does not say.
const LIMIT: usize = 20;
/// Most items of a page.
const LIMIT_MAX: usize = 100;

/// Which page.
#[derive(Debug, PartialEq, Eq)]
pub struct ItemPage {
    limit: usize,
    ascending: bool,
    after: Option<String>,
}

fn wrong(name: &str, text: &str, expected: &str) -> ApiError {
    let shown: String = text.chars().take(80).collect();
    ApiError::of(ApiCode::InvalidParameter, name, format_args!("{shown:?} is not {expected}"))
}

impl ItemPage {
    /// Reads a query.
    ///
    /// # Errors
    /// [`ApiCode::InvalidParameter`].
    pub fn read(fields: &HashMap<String, String>) -> Result<Self, ApiError> {
        let limit = match fields.get("limit") {
            None => LIMIT,
            Some(text) => text
                .parse()
                .ok()
                .filter(|limit| (1..=LIMIT_MAX).contains(limit))
                .ok_or_else(|| wrong("limit", text, &format!("a number of 1 to {LIMIT_MAX}")))?,
        };
        let ascending = match fields.get("order").map(String::as_str) {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(other) => return Err(wrong("order", other, "asc or desc")),
        };
        Ok(Self { limit, ascending, after: fields.get("after").cloned() })
    }

    /// The page of a response's own input.
    ///
    /// # Errors
    /// [`ApiCode::InvalidParameter`] where there is no such item to go on after.
    pub fn of(&self, job: &str, record: &ResponseRecord) -> Result<Value, ApiError> {
        let own = &record.conversation[record.conversation.len().saturating_sub(record.own)..];
        let mut items: Vec<Value> =
            own.iter().enumerate().map(|(at, message)| item(job, at, message)).collect();
        if !self.ascending {
            items.reverse();
        }
        let from = match &self.after {
            None => 0,
            Some(after) => {
                let at = items.iter().position(|item| item["id"] == after.as_str());
                at.ok_or_else(|| wrong("after", after, "an item of this response"))? + 1
            }
        };
        let more = items.len() > from + self.limit;
        let page: Vec<Value> = items.into_iter().skip(from).take(self.limit).collect();
        let id = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
        let (first, last) = (id(page.first()), id(page.last()));
        Ok(json!({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more}))
    }
}

fn item(job: &str, at: usize, message: &Value) -> Value {
    let kind = if message["role"] == "assistant" { "output_text" } else { "input_text" };
    let content = json!([{"type": kind, "text": message["content"]}]);
    let id = format!("msg_{job}_{at}");
    json!({"id": id, "type": "message", "status": "completed", "role": message["role"], "content": content})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(words: &[(&str, &str)]) -> Result<ItemPage, ApiError> {
        ItemPage::read(&words.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn pages_follow_each_other() {
        let message = |text: &str| json!({"role": "user", "content": text});
        let conversation = vec![message("before"), message("a"), message("b"), message("c")];
        let record = ResponseRecord { conversation, own: 3, ..ResponseRecord::default() };
        let texts = |page: &Value| -> Vec<String> {
            let items = page["data"].as_array().unwrap();
            items.iter().map(|item| item["content"][0]["text"].as_str().unwrap().to_owned()).collect()
        };
        let first = page(&[("limit", "2"), ("order", "asc")]).unwrap().of("j", &record).unwrap();
        assert_eq!((texts(&first), &first["has_more"]), (vec!["a".into(), "b".into()], &json!(true)));
        let after = first["last_id"].as_str().unwrap();
        let second = page(&[("order", "asc"), ("after", after)]).unwrap().of("j", &record).unwrap();
        assert_eq!((texts(&second), &second["has_more"]), (vec!["c".into()], &json!(false)));
        assert_eq!(texts(&page(&[]).unwrap().of("j", &record).unwrap()), ["c", "b", "a"]);
        for (name, value) in [("limit", "0"), ("limit", "101"), ("limit", "x"), ("order", "up")] {
            assert_eq!(page(&[(name, value)]).unwrap_err().param.as_deref(), Some(name));
        }
        assert!(page(&[("after", "msg_other")]).unwrap().of("j", &record).is_err());
    }
}
