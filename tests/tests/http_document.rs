//! The API's description and what a gateway does are the same.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::Gateway;
use millrace_tests::scripted::Bench;
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn each_path_is_there_as_it_is_described() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let gateway = Gateway::start(&bench.server, &["--cors-origin", "https://chat.example"])?;
    let asked = tokio::task::spawn_blocking(move || -> Result<()> {
        let document = gateway.get("/openapi.json")?;
        ensure!(document.status == 200 && document.header("content-type") == "application/json");
        let document = document.json()?;
        ensure!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{document}");
        let paths = document["paths"].as_object().context("no paths")?;
        let mut documented = BTreeSet::new();
        for (path, item) in paths {
            let concrete = path.replace("{id}", "x");
            for method in ["GET", "POST", "DELETE", "PUT", "PATCH"] {
                let described = item.get(method.to_lowercase()).is_some();
                // HEAD of what can be asked for is answered too; the rest is refused by its method.
                let reply = gateway.ask(method, &concrete, &[], "")?.whole()?;
                let code = reply
                    .json()
                    .ok()
                    .and_then(|body: Value| body["error"]["code"].as_str().map(str::to_owned));
                let there = !matches!(code.as_deref(), Some("unknown_url" | "method_not_allowed"))
                    && reply.status != 405;
                ensure!(
                    described == there,
                    "{method} {path}: described {described}, there {there}: {reply:?}"
                );
                if described {
                    documented.insert(format!("{method} {path}"));
                }
            }
        }
        ensure!(documented.len() >= 20, "{documented:?}");
        let page = gateway.get("/docs")?;
        ensure!(page.status == 200 && page.header("content-type").starts_with("text/html"), "{page:?}");
        let page = String::from_utf8_lossy(&page.body).into_owned();
        for path in paths.keys() {
            ensure!(page.contains(path.as_str()), "the page lacks {path}");
        }

        // Pages of the origin that was named may ask; nobody else's.
        for (origin, allowed) in
            [("https://chat.example", "https://chat.example"), ("https://evil.example", "")]
        {
            let headers = [
                ("origin", origin),
                ("access-control-request-method", "POST"),
                ("access-control-request-headers", "authorization,content-type"),
            ];
            let preflight = gateway.ask("OPTIONS", "/v1/chat/completions", &headers, "")?.whole()?;
            ensure!(preflight.header("access-control-allow-origin") == allowed, "{origin}: {preflight:?}");
        }
        Ok(())
    });
    asked.await?
}

/// What `scripts/schemathesis` runs: requests made from the document, right ones and wrong ones.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_document_allows_is_answered_as_it_says() -> Result<()> {
    // For minutes, and with packages of its own.
    let Ok(program) = std::env::var("MILLRACE_SCHEMATHESIS") else { return Ok(()) };
    let seconds = std::env::var("MILLRACE_SCHEMATHESIS_S").unwrap_or_else(|_| "600".to_owned());
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Gateway::start(&bench.server, &[])?;
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,\
                  response_headers_conformance,unsupported_method";
    let mut schemathesis = std::process::Command::new(program);
    schemathesis
        .args(["run", &format!("http://{}/openapi.json", gateway.address()), "--checks", checks])
        .args(["--max-time", &seconds, "--continue-on-failure", "--no-color", "--request-timeout", "30"])
        .args(["--phases", "examples,coverage,fuzzing", "--generation-database", "none"])
        .current_dir(std::env::temp_dir());
    let output = tokio::task::spawn_blocking(move || schemathesis.output()).await??;
    println!("{}", String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
