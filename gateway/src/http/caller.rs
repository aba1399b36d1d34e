//! Who asks: found before anything else is done, and remembered for the audit.

use std::sync::{Arc, OnceLock};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use millrace_crds::names::{Class, JobId, ModelRef};

use crate::http::cache::{self, CacheUse};
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::http::keys::{self, KeyScopes, Verb};
use crate::http::limits::RateStanding;
use crate::http::limits::set::LimitSet;

/// Who asks, and what they may do.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Whose request it is; empty where everybody is let in.
    pub tenant: String,
    /// The id of the key, or `oidc:` and the subject of the token.
    pub key: String,
    /// What they may do.
    pub scopes: KeyScopes,
    /// How much the key may, as far as its record says.
    pub limits: LimitSet,
    /// How much its tenant may, as far as its record says.
    pub tenant_limits: LimitSet,
    /// The weight of the tenant where tenants share a model.
    pub weight: u32,
    /// Whether answers may come from stored outcomes, if the record says.
    pub cache: Option<CacheUse>,
}

impl Default for Caller {
    /// Everybody, where everybody is let in.
    fn default() -> Self {
        Self {
            tenant: String::new(),
            key: String::new(),
            scopes: KeyScopes::default(),
            limits: LimitSet::default(),
            tenant_limits: LimitSet::default(),
            weight: 1,
            cache: None,
        }
    }
}

impl Caller {
    /// Whether something may be done.
    ///
    /// # Errors
    /// [`ApiCode::InsufficientPermissions`].
    pub fn may(&self, verb: Verb) -> Result<(), ApiError> {
        if self.scopes.allow_verb(verb) {
            return Ok(());
        }
        let message = format!("this key may not do that: it lacks the verb {verb:?}").to_lowercase();
        Err(ApiError::new(ApiCode::InsufficientPermissions, message))
    }

    /// The class of a job: the one asked for, or the default, or the most urgent that is allowed.
    ///
    /// # Errors
    /// [`ApiCode::InsufficientPermissions`].
    pub fn class(&self, asked: Option<Class>, default: Class) -> Result<Class, ApiError> {
        match asked {
            None if self.scopes.allow_class(default) => Ok(default),
            None => {
                Ok(Class::ALL.into_iter().find(|class| self.scopes.allow_class(*class)).unwrap_or(default))
            }
            Some(class) if self.scopes.allow_class(class) => Ok(class),
            Some(class) => {
                let message = format!("this key may not publish jobs of class {class}");
                Err(ApiError::new(ApiCode::InsufficientPermissions, message))
            }
        }
    }
}

/// What is known of one request; shared by all that handle it.
#[derive(Debug)]
pub struct RequestContext {
    /// The request's id, which is that of its job.
    pub id: JobId,
    /// Who asks, once that is known.
    pub caller: OnceLock<Caller>,
    /// Which model, once that is known.
    pub model: OnceLock<ModelRef>,
    /// How the caller's limits stand, once that is known.
    pub standing: OnceLock<RateStanding>,
    /// Whether the answer came from a stored outcome, and of which job; where none was looked for nothing.
    pub cached: OnceLock<Option<JobId>>,
}

impl RequestContext {
    /// Of a request of which nothing is known yet.
    pub fn new(id: JobId) -> Arc<Self> {
        Arc::new(Self {
            id,
            caller: OnceLock::new(),
            model: OnceLock::new(),
            standing: OnceLock::new(),
            cached: OnceLock::new(),
        })
    }

    /// Writes the headers of what became known while the request was handled.
    pub fn write(&self, headers: &mut HeaderMap) {
        if let Some(standing) = self.standing.get() {
            standing.write(headers);
        }
        if let Some(cached) = self.cached.get() {
            let said = if cached.is_some() { "hit" } else { "miss" };
            headers.insert(cache::CACHE, HeaderValue::from_static(said));
            if let Some(Ok(job)) = cached.as_ref().map(|job| HeaderValue::from_str(job.as_str())) {
                headers.insert(cache::CACHED_JOB, job);
            }
        }
    }

    /// Who asks.
    ///
    /// # Errors
    /// [`ApiCode::InvalidApiKey`], which only a path without [`authenticate`] could give.
    pub fn caller(&self) -> Result<&Caller, ApiError> {
        self.caller.get().ok_or_else(missing)
    }
}

fn missing() -> ApiError {
    let message = "there is no API key: send the header `Authorization: Bearer KEY`";
    ApiError::new(ApiCode::InvalidApiKey, message)
}

/// Who has this key or token.
async fn who(front: &Front, key: &str) -> Result<Caller, ApiError> {
    if let Some(provider) = front.provider.as_ref().filter(|_| !keys::is_key(key)) {
        return provider.check(key).await;
    }
    let (id, record) = front.keys.check(key).await?;
    Ok(Caller {
        tenant: record.tenant,
        key: id,
        scopes: record.scopes,
        limits: record.limits,
        tenant_limits: record.tenant_limits,
        weight: record.weight.max(1),
        cache: record.cache,
    })
}

/// Who sends these headers.
///
/// # Errors
/// [`ApiCode::InvalidApiKey`], [`ApiCode::BrokerUnavailable`], [`ApiCode::ProviderUnavailable`].
pub async fn identify(front: &Front, headers: &HeaderMap) -> Result<Caller, ApiError> {
    if front.args.anonymous {
        let scopes = KeyScopes { verbs: Verb::ALL.to_vec(), ..KeyScopes::default() };
        return Ok(Caller { scopes, ..Caller::default() });
    }
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let (scheme, key) = value.and_then(|value| value.split_once(' ')).ok_or_else(missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(missing());
    }
    who(front, key.trim()).await
}

/// Finds out who asks.
///
/// # Errors
/// [`ApiCode::InvalidApiKey`], [`ApiCode::BrokerUnavailable`].
pub async fn authenticate(
    State(front): State<Arc<Front>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let caller = identify(&front, request.headers()).await?;
    if let Some(context) = request.extensions().get::<Arc<RequestContext>>() {
        let _ = context.caller.set(caller);
    }
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_one_that_is_allowed() {
        let scopes = KeyScopes { classes: vec![Class::Low], ..KeyScopes::default() };
        let caller = Caller { scopes, ..Caller::default() };
        assert_eq!(caller.class(None, Class::Normal), Ok(Class::Low));
        assert_eq!(caller.class(Some(Class::Low), Class::Normal), Ok(Class::Low));
        let refused = caller.class(Some(Class::High), Class::Normal).unwrap_err();
        assert_eq!(refused.code, ApiCode::InsufficientPermissions);
        assert_eq!(Caller::default().class(None, Class::Normal), Ok(Class::Normal));
    }
}
