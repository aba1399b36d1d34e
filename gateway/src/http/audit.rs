//! The audit log: one JSON object a line for each request to the API, of who did what. It holds no body and no secret.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::failure::Failure;
use crate::http::caller::RequestContext;

/// Where the lines go.
#[derive(Debug)]
pub struct AuditLog {
    file: Option<Mutex<File>>,
}

impl AuditLog {
    /// Appends to a file, which is made if it is missing; without a path nothing is kept.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn open(path: Option<&Path>) -> Result<Self, Failure> {
        let open = |path: &Path| File::options().create(true).append(true).open(path);
        let wrong = |path: &Path, error| Failure::file(format!("--audit {}", path.display()), error);
        let file = path.map(|path| open(path).map_err(|error| wrong(path, error))).transpose()?;
        Ok(Self { file: file.map(Mutex::new) })
    }

    /// Writes one line.
    pub fn write(&self, context: &RequestContext, method: &str, path: &str, status: u16) {
        let Some(file) = &self.file else { return };
        let caller = context.caller.get();
        let line = json!({
            "time": OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            "request": context.id,
            "tenant": caller.map(|caller| &caller.tenant),
            "key": caller.map(|caller| &caller.key),
            "method": method,
            "path": path,
            "model": context.model.get().map(ToString::to_string),
            "cached": context.cached.get().and_then(Option::as_ref),
            "status": status,
        });
        let written =
            file.lock().unwrap_or_else(PoisonError::into_inner).write_all(format!("{line}\n").as_bytes());
        if let Err(error) = written {
            tracing::error!(%error, "an audit line was not written");
        }
    }
}
