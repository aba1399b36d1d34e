//! A chat template: it compiles and renders within its limits, or is refused.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace_engine::text::job::{Chat, Json};
use millrace_engine::text::template::Template;

fn message(role: &str, content: &str) -> Json {
    Json(format!(r#"{{"role":"{role}","content":"{content}"}}"#))
}

fuzz_target!(|source: &str| {
    let Ok(template) = Template::new(source, vec![("bos_token".into(), "<s>".into())]) else { return };
    let chat = Chat {
        messages: vec![message("system", "Be brief."), message("user", "Hi")],
        tools: Some(Json(r#"[{"type":"function","function":{"name":"f"}}]"#.into())),
        documents: None,
        add_generation_prompt: true,
        continue_final_message: false,
        variables: None,
    };
    let _ = template.render(&chat, 1_700_000_000);
});
