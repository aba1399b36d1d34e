//! The models that there are: each has a stream of jobs in the broker.
//!
//! The list is kept for [`FRESH`], and read again at once when a model is asked for that it lacks, but not more often
//! than once in [`REREAD_MIN`]: a client that asks for what is not there must not turn into load on the broker. While
//! the broker does not answer the list is used for [`STALE_MAX`].

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::response::Response;
use millrace_crds::names::{ModelRef, SubjectToken};
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::http::error::{ApiCode, ApiError};
use crate::http::kept::{Kept, KeptValue, ReadingLimits};
use crate::http::keys::KeyScopes;

/// How long a list is believed.
const FRESH: Duration = Duration::from_secs(10);
/// Shortest time between two readings.
const REREAD_MIN: Duration = Duration::from_millis(500);
/// How long a list is used while the broker does not answer.
const STALE_MAX: Duration = Duration::from_secs(60);
/// How long a reading may take.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Most pages of one list; the broker's have 256 streams.
const PAGES_MAX: usize = 64;

/// A model that takes jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedModel {
    /// Its address.
    pub model: ModelRef,
    /// When its queue was made, in Unix seconds.
    pub created: i64,
}

/// The list, shared by all requests.
#[derive(Debug)]
pub struct Catalog {
    jetstream: Context,
    namespace: SubjectToken,
    kept: Kept<Vec<ListedModel>>,
}

impl Catalog {
    /// `namespace` is that of models that are named without one.
    pub fn new(jetstream: Context, namespace: SubjectToken) -> Self {
        let limits = ReadingLimits { timeout: READ_TIMEOUT, pause: REREAD_MIN, stale: STALE_MAX };
        Self { jetstream, namespace, kept: Kept::new("the list of models", limits) }
    }

    /// All models, by name.
    ///
    /// # Errors
    /// [`ApiCode::BrokerUnavailable`].
    pub async fn list(&self) -> Result<Arc<Vec<ListedModel>>, ApiError> {
        Ok(self.known(FRESH).await?.value)
    }

    /// One model, by what a client calls it. One that the scopes hide is as good as none.
    ///
    /// # Errors
    /// [`ApiCode::ModelNotFound`], [`ApiCode::BrokerUnavailable`].
    pub async fn find(&self, name: &str, scopes: &KeyScopes) -> Result<ListedModel, ApiError> {
        let missing = || {
            let shown: String = name.chars().take(128).collect();
            let message = format!("the model {shown:?} does not exist or you do not have access to it");
            ApiError { code: ApiCode::ModelNotFound, message, param: Some("model".to_owned()) }
        };
        let model = self.parse(name).filter(|model| scopes.allow_model(model)).ok_or_else(missing)?;
        let mut is_current = true;
        for age in [FRESH, REREAD_MIN] {
            let known = self.known(age).await?;
            if let Some(found) = known.value.iter().find(|listed| listed.model == model) {
                return Ok(found.clone());
            }
            is_current = known.is_current;
        }
        // An old list does not say that there is no such model.
        Err(if is_current { missing() } else { away() })
    }

    /// `model` or `namespace/model`.
    fn parse(&self, name: &str) -> Option<ModelRef> {
        match name.split_once('/') {
            Some((namespace, name)) => ModelRef::new(namespace, name).ok(),
            None => Some(ModelRef { namespace: self.namespace.clone(), name: name.parse().ok()? }),
        }
    }

    /// What a model is called: the shortest name that finds it.
    pub fn id_of(&self, model: &ModelRef) -> String {
        if model.namespace == self.namespace { model.name.to_string() } else { model.to_string() }
    }

    /// OpenAI's object of a model.
    pub fn object_of(&self, listed: &ListedModel) -> Value {
        let owner = &listed.model.namespace;
        json!({"id": self.id_of(&listed.model), "object": "model", "created": listed.created, "owned_by": owner})
    }

    async fn known(&self, age: Duration) -> Result<KeptValue<Vec<ListedModel>>, ApiError> {
        self.kept.get(age, read(&self.jetstream)).await.ok_or_else(away)
    }
}

fn away() -> ApiError {
    ApiError::new(ApiCode::BrokerUnavailable, "the broker does not list the models at the moment")
}

#[derive(Debug, Deserialize)]
struct Page {
    total: usize,
    streams: Option<Vec<Listed>>,
}

#[derive(Debug, Deserialize)]
struct Listed {
    created: String,
    config: Named,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

async fn read(jetstream: &Context) -> Result<Vec<ListedModel>, String> {
    let mut models = Vec::new();
    let mut offset = 0;
    for _ in 0..PAGES_MAX {
        let ask = json!({"subject": "millrace.jobs.>", "offset": offset});
        let answer: Response<Page> =
            jetstream.request("STREAM.LIST", &ask).await.map_err(|e| e.to_string())?;
        let page = match answer {
            Response::Ok(page) => page,
            Response::Err { error } => return Err(error.to_string()),
        };
        let streams = page.streams.unwrap_or_default();
        offset += streams.len();
        models.extend(streams.iter().filter_map(listed));
        if streams.is_empty() || offset >= page.total {
            break;
        }
    }
    models.sort_by(|a, b| a.model.cmp(&b.model));
    Ok(models)
}

/// The model of a stream `JOBS_<namespace>_<model>`; neither name can hold `_`.
fn listed(stream: &Listed) -> Option<ListedModel> {
    let (namespace, name) = stream.config.name.strip_prefix("JOBS_")?.split_once('_')?;
    let created = OffsetDateTime::parse(&stream.created, &Rfc3339).ok()?.unix_timestamp();
    Some(ListedModel { model: ModelRef::new(namespace, name).ok()?, created })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_models() {
        let stream = |name: &str| {
            let json = json!({"created": "2026-11-30T10:00:00.5Z", "config": {"name": name}});
            listed(&serde_json::from_value(json).unwrap())
        };
        let found = stream("JOBS_team-a_smollm2").unwrap();
        assert_eq!((found.model.to_string().as_str(), found.created), ("team-a/smollm2", 1_796_032_800));
        for other in ["RESULTS_team-a_smollm2", "JOBS_x", "JOBS_a_b_c", "JOBS__m"] {
            assert_eq!(stream(other), None, "{other}");
        }
    }
}
