//! Tests of `detokenize.rs`: whatever the tokens, piece by piece equals the full decode.

use std::sync::OnceLock;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn piecewise(pieces: &Pieces, ids: &[u32], skip: bool) -> String {
    let mut detokenizer = Detokenizer::new(pieces, skip);
    let mut out = String::new();
    for &id in ids {
        let before = out.clone();
        detokenizer.push(id, &mut out);
        assert!(out.starts_with(&before));
        assert!(detokenizer.pending.len() <= 3 || matches!(pieces.scheme, Scheme::ByteFallback { .. }));
    }
    detokenizer.finish(&mut out);
    out
}

struct Subject {
    tokenizer: Tokenizer,
    pieces: Pieces,
}

fn subject(file: serde_json::Value) -> Subject {
    let tokenizer = Tokenizer::from_bytes(file.to_string()).unwrap();
    let pieces = Pieces::new(&tokenizer, &file["decoder"]).unwrap();
    Subject { tokenizer, pieces }
}

/// As in Llama 2 and Mistral: text pieces with U+2581 for a space, and a token for each byte.
fn sentencepiece(strip: bool) -> Subject {
    let texts = ["<unk>", "<s>", "</s>", "▁", "▁the", "cat", "▁▁", "é", "<0x", "▁<0x41>"];
    let mut vocab: Vec<String> = texts.map(str::to_owned).to_vec();
    vocab.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    let vocab: serde_json::Map<String, Value> =
        vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if strip {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    subject(json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": []},
    }))
}

fn real() -> Option<&'static Subject> {
    static REAL: OnceLock<Option<Subject>> = OnceLock::new();
    REAL.get_or_init(|| {
        let file = crate::text::prompt::tiny::smollm2()?.join("tokenizer.json");
        Some(subject(serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()))
    })
    .as_ref()
}

fn check(subject: &Subject, ids: &[u32], skip: bool) {
    let expected = subject.tokenizer.decode(ids, skip).unwrap();
    assert_eq!(piecewise(&subject.pieces, ids, skip), expected, "{ids:?}");
}

#[test]
fn unfinished_characters_wait_and_end_as_replacements() {
    let text = crate::text::prompt::tiny::tiny();
    let mut detokenizer = text.detokenizer(true);
    let mut out = String::new();
    let mut seen = Vec::new();
    for byte in [0xF0u32, 0x9F, 0x98, 0x80, 0x41, 0x80, 0xE4, 0x41, 0xE4, 0xB8] {
        detokenizer.push(byte, &mut out);
        seen.push(out.len());
    }
    assert_eq!(out, "😀A\u{FFFD}\u{FFFD}A");
    assert_eq!(seen[..4], [0, 0, 0, 4], "half an emoji is no text");
    detokenizer.finish(&mut out);
    assert_eq!(out, "😀A\u{FFFD}\u{FFFD}A\u{FFFD}");
}

#[test]
fn special_tokens_leave_no_text_unless_wanted() {
    let text = crate::text::prompt::tiny::tiny();
    assert_eq!(piecewise(text.pieces(), &[65, 256, 66], true), "AB");
    assert_eq!(piecewise(text.pieces(), &[65, 256, 66], false), "A<|end|>B");
}

#[test]
fn a_run_of_bytes_is_judged_whole() {
    for strip in [false, true] {
        let subject = sentencepiece(strip);
        let byte = |b: u32| 10 + b;
        check(&subject, &[4, byte(0xE4), byte(0xBD), byte(0xA0), 5], true);
        check(&subject, &[byte(0xE4), byte(0xBD), 5, byte(0x41)], true);
        check(&subject, &[6, 4, 1, byte(0xF0), 2, byte(0x9F), byte(0x20)], true);
        check(&subject, &[byte(0x20), byte(0x20), 3], true);
    }
}

#[test]
fn other_decoders_are_refused() {
    for decoder in [json!(null), json!({"type": "Metaspace"}), json!({"type": "Sequence", "decoders": []})] {
        assert_eq!(scheme_of(&decoder), None, "{decoder}");
    }
}

proptest! {
    #[test]
    fn sentencepiece_equals_the_full_decode(
        ids in prop::collection::vec(0u32..266, 0..40), strip: bool, skip: bool,
    ) {
        static BOTH: OnceLock<[Subject; 2]> = OnceLock::new();
        let both = BOTH.get_or_init(|| [sentencepiece(false), sentencepiece(true)]);
        check(&both[usize::from(strip)], &ids, skip);
    }

    #[test]
    fn byte_level_equals_the_full_decode(ids in prop::collection::vec(0u32..49_160, 0..60), skip: bool) {
        if let Some(real) = real() {
            check(real, &ids, skip);
        }
    }

    /// Uniform ids rarely meet the tokens of single bytes; real text in many scripts does.
    #[test]
    fn text_cut_anywhere_equals_the_full_decode(
        text in "[a-zé漢字かな한국어😀👩🏽‍🚀🇩🇪 \n]{0,40}", cut in 0usize..40, skip: bool,
    ) {
        if let Some(real) = real() {
            let ids = real.tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
            check(real, &ids[cut.min(ids.len())..], skip);
            check(real, &ids[..ids.len() - cut.min(ids.len())], skip);
        }
    }

    #[test]
    fn single_bytes_equal_the_full_decode(bytes in prop::collection::vec(any::<u8>(), 0..30)) {
        if let Some(real) = real() {
            let of = byte_of_char();
            let char_of = |byte: u8| (0..BYTE_CHARS).find(|&c| of[c] == Some(byte)).unwrap();
            let token = |byte: u8| char::from_u32(char_of(byte) as u32).unwrap().to_string();
            // Bytes that no UTF-8 text holds have no token.
            let ids: Vec<u32> = bytes.iter().filter_map(|&b| real.tokenizer.token_to_id(&token(b))).collect();
            check(real, &ids, true);
        }
    }
}

/// A prompt's text and what follows it join to the whole decode, wherever the whole begins with the prompt's.
fn joins(subject: &Subject, ids: &[u32], at: usize) {
    for skip in [false, true] {
        let full = piecewise(&subject.pieces, ids, skip);
        let prompt = piecewise(&subject.pieces, &ids[..at], skip);
        let mut joined = String::new();
        let mut rest = Detokenizer::behind(&subject.pieces, skip, &ids[..at], &mut joined);
        assert_eq!(joined, prompt);
        ids[at..].iter().for_each(|&id| rest.push(id, &mut joined));
        rest.finish(&mut joined);
        if full.starts_with(&prompt) {
            assert_eq!(joined, full, "{ids:?} parted at {at}");
        }
    }
}

#[test]
fn a_completion_keeps_the_space_that_it_begins_with() {
    let subject = sentencepiece(true);
    let id = |token: &str| subject.tokenizer.token_to_id(token).unwrap();
    let mut prompt = String::new();
    let mut rest = Detokenizer::behind(&subject.pieces, true, &[id("<s>"), id("▁the")], &mut prompt);
    let mut text = String::new();
    rest.push(id("▁the"), &mut text);
    rest.push(id("cat"), &mut text);
    assert_eq!((prompt.as_str(), text.as_str()), ("the", " thecat"));
}

proptest! {
    #[test]
    fn prompts_and_completions_join(ids in prop::collection::vec(0u32..266, 1..24), at in 0usize..24, strip: bool) {
        joins(&sentencepiece(strip), &ids, at.min(ids.len()));
    }
}
