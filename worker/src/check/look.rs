//! What the engine makes of a folder: its decoder, its weights by name, its text side with a sample.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use millrace_crds::check::Check;
use millrace_engine::folder::belongs;
use millrace_engine::folder::manifest::{MANIFEST_NAME, is_template};
use millrace_engine::model::binding::{names, stored};
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::files::Files;
use millrace_engine::model::rope::RopeScaling;
use millrace_engine::text::job::{Input, JobLimits, RequestLine};
use millrace_engine::text::prompt::Text;

const CONFIG: &str = "model config";
const WEIGHTS: &str = "weights";
const TEXT: &str = "tokenizer";
const SAMPLE: &str = "sample";
const DEVICE: &str = "device";
const FILES: &str = "files";
const OTHERS: &str = "other files";
const AGAIN: &str = "import the model again, or choose one of the supported architectures";
/// Widths of heads that a GPU's kernels are made for.
const GPU_HEADS: [usize; 4] = [64, 96, 128, 256];
/// What the sample says.
const SAID: &str = "Name the three states of matter.";
/// Files that other tools keep a tokenizer in.
const OTHER_TOKENIZERS: [&str; 4] = ["tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"];

/// The decoder, and what it needs of a device.
pub fn config(folder: &Path) -> (Vec<Check>, Option<DecoderConfig>) {
    let config = match DecoderConfig::read(folder) {
        Ok(config) => config,
        Err(error) => return (vec![Check::fail(CONFIG, error.to_string(), AGAIN)], None),
    };
    let windows: BTreeSet<u32> = config.windows.iter().flatten().copied().collect();
    let slid = config.windows.iter().flatten().count();
    let mut said = format!(
        "{:?}: {} layers, {} parameters; hidden {}, {} heads of {}, {} for keys and values, vocabulary {}, context {}",
        config.architecture,
        config.layers(),
        config.parameters(),
        config.hidden,
        config.heads,
        config.head_dim,
        config.kv_heads,
        config.vocabulary,
        config.positions_max,
    );
    if slid > 0 {
        said += &format!("; {slid} layers with a window of {windows:?}");
    }
    if let Some(quantised) = &config.quantised {
        said += &format!("; quantised as {quantised}");
    }
    for rope in &config.ropes {
        said += &match &rope.scaling {
            RopeScaling::None => format!("; RoPE of base {}", rope.theta),
            scaling => format!("; RoPE of base {}, {scaling:?}", rope.theta),
        };
    }
    said += if config.tied { "; the head is the embedding" } else { "; a head of its own" };
    let device = device(&config);
    (vec![Check::ok(CONFIG, said), device], Some(config))
}

/// What can run it.
fn device(config: &DecoderConfig) -> Check {
    const FIX: &str = "set engine.device to cpu";
    if !GPU_HEADS.contains(&config.head_dim) {
        let found =
            format!("a GPU takes heads of {GPU_HEADS:?}, not of {}; a processor does", config.head_dim);
        return Check::warn(DEVICE, found, FIX);
    }
    Check::ok(DEVICE, "a processor or a GPU can run it")
}

/// Whether all tensors are there, in their shapes and in types that are read.
pub fn weights(folder: &Path, config: &DecoderConfig) -> Vec<Check> {
    let files = match Files::read(folder) {
        Ok(files) => files,
        Err(error) => {
            return vec![Check::fail(WEIGHTS, error.to_string(), "download or convert the weights again")];
        }
    };
    let needed = names(config);
    for name in &needed {
        if let Err(wrong) = stored(config, &files, name) {
            return vec![Check::fail(WEIGHTS, wrong.to_string(), "download or convert the weights again")];
        }
    }
    let mut checks: Vec<Check> = files
        .notes()
        .into_iter()
        .map(|note| Check::warn(WEIGHTS, note, "remove the file that is not read"))
        .collect();
    checks.push(Check::ok(WEIGHTS, format!("{} tensors are there, in their shapes", needed.len())));
    checks
}

/// The text side, and how it reads a sample.
pub fn text(folder: &Path, sizes: &BTreeMap<String, u64>) -> Vec<Check> {
    let text = match Text::open(folder, "check") {
        Ok(text) => text,
        Err(error) => {
            let other = OTHER_TOKENIZERS.iter().find(|name| sizes.contains_key(**name));
            let fix = match other.filter(|_| !sizes.contains_key("tokenizer.json")) {
                Some(name) => format!(
                    "convert {name}: python -c 'from transformers import AutoTokenizer as T; \
                     T.from_pretrained(\".\").save_pretrained(\".\")'"
                ),
                None => AGAIN.to_owned(),
            };
            return vec![Check::fail(TEXT, error.to_string(), fix)];
        }
    };
    let note =
        |note: &String| Check::warn(TEXT, note.clone(), "compare ids, if the model was trained with it");
    let mut checks: Vec<Check> = text.notes().iter().map(note).collect();
    checks.push(ends(&text));
    checks.push(match sample(&text) {
        Ok(found) => Check::ok(SAMPLE, found),
        Err(error) => Check::fail(SAMPLE, error, "mend the chat template"),
    });
    checks
}

fn ends(text: &Text) -> Check {
    let shown = |&id: &u32| {
        let mut piece = String::new();
        let mut detokenizer = text.detokenizer(false);
        detokenizer.push(id, &mut piece);
        detokenizer.finish(&mut piece);
        format!("{id} {piece:?}")
    };
    let ends: Vec<String> = text.end_tokens().iter().map(shown).collect();
    let template = if text.has_template() { "with a chat template" } else { "without a chat template" };
    if ends.is_empty() {
        let found = format!("{template}; no token ends an answer");
        return Check::warn(TEXT, found, "name eos_token_id in generation_config.json");
    }
    let defaults = text.defaults();
    let found = format!(
        "{template}; answers end at {}; temperature {}, top_p {}, top_k {}, min_p {}, repetition_penalty {} by default",
        ends.join(", "),
        defaults.temperature,
        defaults.top_p,
        defaults.top_k,
        defaults.min_p,
        defaults.repetition_penalty
    );
    Check::ok(TEXT, found)
}

/// How a chat, or without a template a completion, is read.
fn sample(text: &Text) -> Result<String, String> {
    let body = if text.has_template() {
        serde_json::json!({"messages": [{"role": "user", "content": SAID}]})
    } else {
        serde_json::json!({"prompt": SAID})
    };
    let limits = JobLimits { max_model_len: 1 << 20, vocabulary: u32::MAX };
    let line = RequestLine::decode(0, "check".into(), body.to_string().as_bytes(), &limits);
    let request = line.request.map_err(|reject| reject.to_string())?;
    let prompts = text.prompts(&request, 0).map_err(|reject| reject.to_string())?;
    let tokens = prompts.into_iter().next().map(|prompt| prompt.tokens).unwrap_or_default();
    let mut rendered = String::new();
    let mut detokenizer = text.detokenizer(false);
    tokens.iter().for_each(|&token| detokenizer.push(token, &mut rendered));
    detokenizer.finish(&mut rendered);
    let kind = if matches!(request.input, Input::Chat(_)) { "chat" } else { "completion" };
    Ok(format!("the {kind} {SAID:?} is {} tokens, {tokens:?}, of the text {rendered:?}", tokens.len()))
}

/// What a file of a folder says.
fn role(name: &str) -> &'static str {
    match name {
        "config.json" => "sizes and choices of the decoder",
        "generation_config.json" => "tokens that end an answer, and sampling where a request leaves it open",
        "tokenizer.json" => "vocabulary, splitting, decoding",
        "tokenizer_config.json" => "special tokens, and the chat template where no file of its own has it",
        "chat_template.jinja" => "the chat template",
        "special_tokens_map.json" => "special tokens, above those of tokenizer_config.json",
        "added_tokens.json" => "added tokens and their ids",
        _ if is_template(name) => "a chat template: tool_use serves chats with tools, default the others",
        _ if name.ends_with(".safetensors") => "weights",
        _ if name.ends_with(".safetensors.index.json") => "which file has which weights",
        _ => "what the text side reads from it",
    }
}

/// What each file is read for, and which are not read.
pub fn files(sizes: &BTreeMap<String, u64>) -> Vec<Check> {
    let read = sizes.keys().filter(|name| belongs(name));
    let read: Vec<String> = read.map(|name| format!("{name} ({})", role(name))).collect();
    let mut checks = vec![Check::ok(FILES, format!("read: {}", read.join(", ")))];
    checks.extend(others(sizes));
    checks
}

/// Files that contribute nothing.
fn others(sizes: &BTreeMap<String, u64>) -> Option<Check> {
    let unread: Vec<&str> =
        sizes.keys().map(String::as_str).filter(|name| !belongs(name) && *name != MANIFEST_NAME).collect();
    (!unread.is_empty()).then(|| Check::ok(OTHERS, format!("not read: {}", unread.join(", "))))
}
