//! Lists in pages, as OpenAI's clients read them: the next page begins behind the id of the last item.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::error::{ApiCode, ApiError};

/// What a client asks of a list. An unknown parameter is passed over.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct PageQuery {
    /// The id behind which the page begins.
    pub after: Option<String>,
    /// Most items.
    pub limit: Option<String>,
    /// `desc`, newest first, or `asc`.
    pub order: Option<String>,
    /// Of files: which ones.
    pub purpose: Option<String>,
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// The items, in their order.
    pub items: Vec<(String, T)>,
    /// Whether more follow.
    pub has_more: bool,
}

impl PageQuery {
    /// The page of these items, which are named by ids whose order is that of their making. `default` and `most` are
    /// numbers of items.
    ///
    /// # Errors
    /// [`ApiCode::InvalidParameter`].
    pub fn page<T>(
        &self,
        mut items: Vec<(String, T)>,
        (default, most): (usize, usize),
    ) -> Result<Page<T>, ApiError> {
        let wrong = |name: &str, value: &str, expected: String| {
            let shown: String = value.chars().take(80).collect();
            ApiError::of(ApiCode::InvalidParameter, name, format_args!("{shown:?} is not {expected}"))
        };
        let limit = match self.limit.as_deref() {
            None => default,
            Some(text) => {
                let limit = text.parse().ok().filter(|limit| (1..=most).contains(limit));
                limit.ok_or_else(|| wrong("limit", text, format!("a number from 1 to {most}")))?
            }
        };
        items.sort_by(|(a, _), (b, _)| a.cmp(b));
        let ascending = match self.order.as_deref() {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(text) => return Err(wrong("order", text, "asc or desc".into())),
        };
        if !ascending {
            items.reverse();
        }
        if let Some(after) = &self.after {
            items.retain(|(id, _)| if ascending { id > after } else { id < after });
        }
        let has_more = items.len() > limit;
        items.truncate(limit);
        Ok(Page { items, has_more })
    }
}

impl<T> Page<T> {
    /// OpenAI's object.
    pub fn object(self, item: impl Fn(T) -> Value) -> Value {
        let id = |entry: Option<&(String, T)>| entry.map(|(id, _)| id.clone());
        let (first, last) = (id(self.items.first()), id(self.items.last()));
        let data: Vec<Value> = self.items.into_iter().map(|(_, value)| item(value)).collect();
        json!({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": self.has_more})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(query: &PageQuery) -> (Vec<String>, bool) {
        let items = ["b", "d", "a", "c"].map(|id| (id.to_owned(), ()));
        let page = query.page(items.into(), (3, 4)).unwrap();
        (page.items.into_iter().map(|(id, ())| id).collect(), page.has_more)
    }

    #[test]
    fn pages_join_into_the_list() {
        let query = |after: Option<&str>, limit: Option<&str>, order: Option<&str>| PageQuery {
            after: after.map(str::to_owned),
            limit: limit.map(str::to_owned),
            order: order.map(str::to_owned),
            purpose: None,
        };
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(ids(&query(None, None, None)), (names(&["d", "c", "b"]), true));
        assert_eq!(ids(&query(Some("b"), None, None)), (names(&["a"]), false));
        assert_eq!(ids(&query(None, Some("2"), Some("asc"))), (names(&["a", "b"]), true));
        // What was deleted in between does not break the list.
        assert_eq!(ids(&query(Some("bb"), Some("4"), Some("asc"))), (names(&["c", "d"]), false));
        assert_eq!(ids(&query(Some("a"), None, None)), (vec![], false));
        for (limit, order) in [(Some("0"), None), (Some("5"), None), (Some("x"), None), (None, Some("up"))] {
            let error = query(None, limit, order).page::<()>(vec![], (3, 4)).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(if order.is_some() { "order" } else { "limit" }));
        }
    }
}
