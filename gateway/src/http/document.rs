//! What the API is, in OpenAPI's form, and the same as a page without outside assets.
//!
//! Handlers say of themselves what they take and give, in the place where they are registered; `schemas.json` has the
//! forms of bodies. What all paths below `/v1` have in common is added here.

use std::sync::Arc;

use axum::Extension;
use axum::http::header;
use axum::response::IntoResponse;
use bytes::Bytes;
use serde_json::{Map, Value, json};
use utoipa::IntoParams;
use utoipa::openapi::{InfoBuilder, OpenApi, OpenApiBuilder};

/// The forms of bodies.
const SCHEMAS: &str = include_str!("document/schemas.json");
/// How the page looks.
const STYLE: &str = include_str!("document/style.css");

/// The headers that each request for an answer may have.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
pub struct AskHeaders {
    /// The job's class: `high`, `normal` or `low`
    #[param(rename = "millrace-class", schema_with = class)]
    pub class: Option<String>,
    /// The job's deadline: a span such as `90s` or an RFC 3339 time
    #[param(rename = "millrace-deadline", pattern = "^[1-9][0-9]{0,2}s$", example = "90s")]
    pub deadline: Option<String>,
}

fn class() -> utoipa::openapi::Object {
    utoipa::openapi::ObjectBuilder::new()
        .schema_type(utoipa::openapi::Type::String)
        .enum_values(Some(["high", "normal", "low"]))
        .build()
}

/// The document as it begins: what the API is called.
pub fn about() -> OpenApi {
    let about = "Every request for an answer is a durable job, and every answer the job's one outcome.";
    let info =
        InfoBuilder::new().title("Millrace").version(env!("CARGO_PKG_VERSION")).description(Some(about));
    OpenApiBuilder::new().info(info.build()).build()
}

/// The finished document.
#[derive(Debug)]
pub struct Document {
    json: Bytes,
    page: Bytes,
}

impl Document {
    /// Of the paths that were registered.
    ///
    /// # Panics
    /// When the forms of bodies are no JSON, which a test shows.
    pub fn new(registered: &OpenApi) -> Self {
        let document = finished(registered);
        Self { json: document.to_string().into(), page: page(&document).into() }
    }
}

/// The whole document.
fn finished(registered: &OpenApi) -> Value {
    let mut document = serde_json::to_value(registered).expect("a document is JSON");
    document["components"]["schemas"] = serde_json::from_str(SCHEMAS).expect("the schemas are JSON");
    let scheme =
        json!({"type": "http", "scheme": "bearer", "description": "A key, or a token of the provider"});
    document["components"]["securitySchemes"] = json!({"key": scheme});
    let paths = document["paths"].as_object_mut().map(std::mem::take).unwrap_or_default();
    // A router's path may take several segments; the document's parameter is the same.
    let mut paths: Map<String, Value> =
        paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    for (path, item) in &mut paths {
        let operations = item.as_object_mut().into_iter().flat_map(|item| item.values_mut());
        for operation in operations.filter(|_| path.starts_with("/v1/")) {
            operation["security"] = json!([{"key": []}]);
            let error = json!({"$ref": "#/components/schemas/Error"});
            for (status, description) in [("4XX", "A refusal"), ("5XX", "A failure")] {
                let content = json!({"application/json": {"schema": error}});
                operation["responses"][status] = json!({"description": description, "content": content});
            }
        }
    }
    document["paths"] = Value::Object(paths);
    document
}

/// This document
#[utoipa::path(get, path = "/openapi.json", tag = "Gateway",
    responses((status = 200, description = "The document", body = ref("#/components/schemas/Document"))))]
pub async fn openapi(Extension(document): Extension<Arc<Document>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], document.json.clone())
}

/// This document as a page for people
#[utoipa::path(get, path = "/docs", tag = "Gateway",
    responses((status = 200, description = "The page", body = String, content_type = "text/html")))]
pub async fn docs(Extension(document): Extension<Arc<Document>>) -> impl IntoResponse {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
    let headers =
        [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, policy)];
    (headers, document.page.clone())
}

/// A text as HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn page(document: &Value) -> String {
    let text = |value: &Value| escaped(value.as_str().unwrap_or_default());
    let (title, version) = (text(&document["info"]["title"]), text(&document["info"]["version"]));
    let mut body = format!("<h1>{title} {version}</h1><p>{}</p>", text(&document["info"]["description"]));
    body += "<p>The same for programs: <a href=\"/openapi.json\">/openapi.json</a>. ";
    body += "Send the header <code>Authorization: Bearer KEY</code>.</p>";
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten() {
            body += &section(path, method, operation);
        }
    }
    body += "<h2>Bodies</h2>";
    for (name, schema) in document["components"]["schemas"].as_object().into_iter().flatten() {
        let shown = escaped(&serde_json::to_string_pretty(schema).unwrap_or_default());
        body +=
            &format!("<details id=\"{0}\"><summary>{0}</summary><pre>{shown}</pre></details>", escaped(name));
    }
    let head = format!("<meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style>");
    format!("<!doctype html><html lang=\"en\"><head>{head}</head><body>{body}</body></html>")
}

/// One operation on the page.
fn section(path: &str, method: &str, operation: &Value) -> String {
    let text = |value: &Value| escaped(value.as_str().unwrap_or_default());
    let mut html = format!(
        "<section><h2><b>{}</b> <code>{}</code></h2><p>{}</p>",
        escaped(&method.to_uppercase()),
        escaped(path),
        [text(&operation["summary"]), text(&operation["description"])].join(". ").trim_end_matches(". ")
    );
    let parameters: Vec<String> = operation["parameters"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|parameter| {
            let (name, place) = (text(&parameter["name"]), text(&parameter["in"]));
            format!(
                "<tr><td><code>{name}</code></td><td>{place}</td><td>{}</td></tr>",
                text(&parameter["description"])
            )
        })
        .collect();
    if !parameters.is_empty() {
        html += &format!("<table>{}</table>", parameters.concat());
    }
    html += &bodies("Body", &operation["requestBody"]);
    for (status, response) in operation["responses"].as_object().into_iter().flatten() {
        html += &bodies(&format!("{}: {}", escaped(status), text(&response["description"])), response);
    }
    html + "</section>"
}

/// The forms in which a body may come.
fn bodies(name: &str, described: &Value) -> String {
    let Some(forms) = described["content"].as_object() else { return String::new() };
    let forms = forms.iter().map(|(media, form)| {
        let schema = form["schema"]["$ref"].as_str().and_then(|path| path.rsplit('/').next());
        let link = schema.map(|name| format!(" <a href=\"#{0}\">{0}</a>", escaped(name)));
        format!("{}{}", escaped(media), link.unwrap_or_default())
    });
    format!("<p>{name}: {}</p>", forms.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All texts of a document under one key.
    fn under<'a>(key: &str, value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, value)| match value.as_str() {
                Some(text) if name == key => found.push(text),
                _ => under(key, value, found),
            }),
            Value::Array(items) => items.iter().for_each(|item| under(key, item, found)),
            _ => {}
        }
    }

    #[test]
    fn each_reference_leads_somewhere_and_each_schema_is_referred_to() {
        let document = finished(crate::http::routes::paths().1.get_openapi());
        let mut references = Vec::new();
        under("$ref", &document, &mut references);
        for reference in &references {
            assert!(document.pointer(&reference[1..]).is_some(), "{reference}");
        }
        for name in document["components"]["schemas"].as_object().unwrap().keys() {
            let path = format!("#/components/schemas/{name}");
            assert!(references.contains(&path.as_str()), "nothing refers to {name}");
        }
    }

    #[test]
    fn each_path_is_registered_with_its_description() {
        // The other way to register one would leave it without.
        let source = include_str!("routes.rs");
        assert!(!source.contains(".route("), "register by .routes(routes!(handler))");
        let document = finished(crate::http::routes::paths().1.get_openapi());
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                assert!(operation["summary"].is_string() && operation["tags"].is_array(), "{method} {path}");
                let answers = operation["responses"].as_object().unwrap();
                assert!(answers.keys().any(|status| status.starts_with(['1', '2'])), "{method} {path}");
            }
        }
    }

    #[test]
    fn the_page_needs_nothing_from_outside() {
        let page = page(&finished(crate::http::routes::paths().1.get_openapi()));
        assert!(page.contains("/v1/chat/completions") && page.contains("id=\"ChatRequest\""));
        for outside in ["http:", "https:", "<script", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
