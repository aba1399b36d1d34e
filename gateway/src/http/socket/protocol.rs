//! What is said on a socket: JSON texts, one message each.
//!
//! A client begins generations under ids of its own choice, goes on with them after a cut, cancels them, and may say
//! how many messages of one it takes before it asks for more.

use millrace_crds::names::Class;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::http::error::{ApiCode, ApiError};
use crate::http::texts::{ChoicePiece, PLACES_MAX};

/// Longest id of a generation, in bytes.
const ID_BYTES_MAX: usize = 128;

/// The fields of all messages.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    #[serde(rename = "type")]
    kind: String,
    id: String,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
    class: Option<Class>,
    deadline: Option<String>,
    background: Option<bool>,
    job: Option<String>,
    after: Option<Vec<u64>>,
    window: Option<u32>,
    count: Option<u32>,
}

/// A message of a client, of the generation that it names.
#[derive(Debug, PartialEq, Eq)]
pub struct ClientMessage {
    /// The client's id of it.
    pub id: String,
    /// What it wants.
    pub wish: ClientWish,
}

/// What a client wants.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientWish {
    /// Begin a generation.
    Generate {
        /// That of a chat or a completion.
        body: String,
        /// Its class.
        class: Option<Class>,
        /// Its deadline.
        deadline: Option<String>,
        /// Whether it goes on when the connection ends.
        background: bool,
        /// Messages that it may send before the client asks for more.
        window: Option<u32>,
    },
    /// Go on with one.
    Resume {
        /// Its job.
        job: String,
        /// The places behind what the client has, of the choices in their order.
        after: Vec<u64>,
        /// Messages that it may send before the client asks for more.
        window: Option<u32>,
    },
    /// Take more messages of it.
    More(u32),
    /// End it.
    Cancel,
}

fn wrong(id: Option<&str>, error: ApiError) -> (Option<String>, ApiError) {
    (id.map(str::to_owned), error)
}

/// Reads a message.
///
/// # Errors
/// What is wrong with it, and the id of the generation that it names if that can be read.
pub fn read(text: &str) -> Result<ClientMessage, (Option<String>, ApiError)> {
    let invalid =
        |error: serde_json::Error| ApiError::new(ApiCode::InvalidJson, format!("the message: {error}"));
    if !text.trim_start().starts_with('{') {
        return Err(wrong(None, ApiError::new(ApiCode::InvalidJson, "the message is not a JSON object")));
    }
    let fields: Fields<'_> = serde_json::from_str(text).map_err(|error| wrong(None, invalid(error)))?;
    if fields.id.is_empty() || fields.id.len() > ID_BYTES_MAX {
        let message = format!("it has {} bytes; 1 to {ID_BYTES_MAX} are allowed", fields.id.len());
        return Err(wrong(None, ApiError::of(ApiCode::InvalidParameter, "id", message)));
    }
    let id = fields.id.clone();
    let wish = wish(fields).map_err(|error| wrong(Some(&id), error))?;
    Ok(ClientMessage { id, wish })
}

fn wish(fields: Fields<'_>) -> Result<ClientWish, ApiError> {
    let missing = |name: &str| ApiError::of(ApiCode::MissingParameter, name, "missing");
    let allowed: &[&str] = match fields.kind.as_str() {
        "generate" => &["body", "class", "deadline", "background", "window"],
        "resume" => &["job", "after", "window"],
        "more" => &["count"],
        "cancel" => &[],
        other => {
            let shown: String = other.chars().take(40).collect();
            let message = format!("{shown:?} is not generate, resume, more or cancel");
            return Err(ApiError::of(ApiCode::InvalidParameter, "type", message));
        }
    };
    let given = [
        ("body", fields.body.is_some()),
        ("class", fields.class.is_some()),
        ("deadline", fields.deadline.is_some()),
        ("background", fields.background.is_some()),
        ("job", fields.job.is_some()),
        ("after", fields.after.is_some()),
        ("window", fields.window.is_some()),
        ("count", fields.count.is_some()),
    ];
    if let Some((name, _)) = given.iter().find(|(name, given)| *given && !allowed.contains(name)) {
        let message = format!("a message of type {:?} has no such field", fields.kind);
        return Err(ApiError::of(ApiCode::InvalidParameter, name, message));
    }
    if fields.window == Some(0) {
        return Err(ApiError::of(ApiCode::InvalidParameter, "window", "0; at least 1 is needed"));
    }
    Ok(match fields.kind.as_str() {
        "generate" => ClientWish::Generate {
            body: fields.body.ok_or_else(|| missing("body"))?.get().to_owned(),
            class: fields.class,
            deadline: fields.deadline,
            background: fields.background.unwrap_or(false),
            window: fields.window,
        },
        "resume" => {
            let after = fields.after.unwrap_or_default();
            if after.len() > PLACES_MAX || after.iter().any(|place| *place >= 1 << 53) {
                let message = format!("at most {PLACES_MAX} places below 2^53 are allowed");
                return Err(ApiError::of(ApiCode::InvalidParameter, "after", message));
            }
            ClientWish::Resume {
                job: fields.job.ok_or_else(|| missing("job"))?,
                after,
                window: fields.window,
            }
        }
        "more" => ClientWish::More(fields.count.ok_or_else(|| missing("count"))?),
        _ => ClientWish::Cancel,
    })
}

/// The generation runs, as this job.
pub fn accepted(id: &str, job: &str) -> String {
    json!({"type": "accepted", "id": id, "job": job}).to_string()
}

/// More text of a choice; the number is the place behind it.
pub fn delta(id: &str, piece: &ChoicePiece) -> String {
    json!({"type": "delta", "id": id, "index": piece.index, "text": piece.text, "number": piece.end})
        .to_string()
}

/// The generation is over; `outcome` is the stored line.
pub fn done(id: &str, outcome: &str) -> String {
    format!("{{\"type\":\"done\",\"id\":{},\"outcome\":{outcome}}}", Value::from(id))
}

/// A message was refused, or a generation cannot go on.
pub fn error(id: Option<&str>, error: &ApiError) -> String {
    json!({"type": "error", "id": id, "error": error.body()["error"]}).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_stays_as_it_came() {
        let text =
            r#"{"type":"generate","id":"a","body":{"z": 1.10, "model":"m"},"class":"high","window":3}"#;
        let message = read(text).unwrap();
        let ClientWish::Generate { body, class, background, window, .. } = message.wish else {
            panic!("no wish")
        };
        assert_eq!((body.as_str(), class), (r#"{"z": 1.10, "model":"m"}"#, Some(Class::High)));
        assert_eq!((message.id.as_str(), background, window), ("a", false, Some(3)));
    }

    #[test]
    fn what_is_no_message_is_refused_by_its_field() {
        let refused = |text: &str| {
            let (id, error) = read(text).unwrap_err();
            (id, error.param)
        };
        let of = |id: &str, param: &str| (Some(id.to_owned()), Some(param.to_owned()));
        for none in ["", "[]", "{", r#"{"type":"cancel"}"#, r#"{"type":"cancel","id":"a","x":1}"#] {
            assert_eq!(refused(none), (None, None), "{none}");
        }
        assert_eq!(refused(r#"{"type":"cancel","id":""}"#).1.as_deref(), Some("id"));
        assert_eq!(refused(r#"{"type":"speak","id":"a"}"#), of("a", "type"));
        assert_eq!(refused(r#"{"type":"generate","id":"a"}"#), of("a", "body"));
        assert_eq!(refused(r#"{"type":"resume","id":"a"}"#), of("a", "job"));
        assert_eq!(refused(r#"{"type":"cancel","id":"a","count":1}"#), of("a", "count"));
        assert_eq!(refused(r#"{"type":"generate","id":"a","body":{},"window":0}"#), of("a", "window"));
        let after = format!(r#"{{"type":"resume","id":"a","job":"j","after":[{}]}}"#, 1u64 << 53);
        assert_eq!(refused(&after), of("a", "after"));
    }

    #[test]
    fn what_is_said_is_json() {
        let said: Value = serde_json::from_str(&done("a\"b", "{\"x\":1.10}")).unwrap();
        assert_eq!((&said["id"], &said["outcome"]["x"]), (&json!("a\"b"), &json!(1.1)));
        let refused = ApiError::of(ApiCode::InvalidParameter, "id", "x");
        let said: Value = serde_json::from_str(&error(None, &refused)).unwrap();
        assert_eq!((&said["id"], &said["error"]["param"]), (&Value::Null, &json!("id")));
    }
}
