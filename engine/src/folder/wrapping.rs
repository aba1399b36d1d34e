//! What common tools put in a file's place or around its content.
//!
//! A byte order mark is read over. What is another thing than the file's name says (a Git LFS pointer, UTF-16, an
//! archive, a web page) is named with the way out, instead of a parser's complaint about its first byte.

/// UTF-8's byte order mark, as Windows' tools write it before a text.
pub const MARK: &[u8] = b"\xef\xbb\xbf";
/// Bytes that are looked at.
const LOOKED_AT: usize = 512;

/// First bytes, and what a file that begins with them is.
const KNOWN: [(&[u8], &str); 13] = [
    (b"version https://git-lfs", LFS),
    (b"version https://hawser", LFS),
    (
        b"# xet version",
        "is a pointer of Git Xet, not the file itself: fetch it with `git xet pull`, or download it",
    ),
    (b"\xff\xfe", UTF16),
    (b"\xfe\xff", UTF16),
    (b"PK\x03\x04", "is a ZIP archive, as PyTorch's .bin and .pt files are: save the model as safetensors"),
    (b"\x80\x02", "is a Python pickle (an old PyTorch file): save the model as safetensors"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it"),
    (b"\xfd7zXZ", "is compressed with xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it"),
    (b"ggjt", GGML),
    (b"tjgg", GGML),
    (b"lmgg", GGML),
];
const LFS: &str =
    "is a Git LFS pointer, not the file itself: run `git lfs pull` in the clone, or download the file";
const UTF16: &str = "is UTF-16 text: save it as UTF-8";
const GGML: &str = "is of a format before GGUF: convert the model again with today's llama.cpp";
const GGUF: &str = "is a GGUF file: `millrace import` makes a model folder of it";
const WEB_PAGE: &str = "is a web page, most likely the login or error page of where it was downloaded from";

/// What a file is instead of what its name says, as the rest of a sentence that begins with the name.
pub fn stands_in(bytes: &[u8]) -> Option<&'static str> {
    let head = &bytes[..bytes.len().min(LOOKED_AT)];
    if head.is_empty() {
        return Some("is empty: its download or copy was cut off");
    }
    if let Some((_, what)) = KNOWN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(what);
    }
    if head.starts_with(b"GGUF") {
        return Some(GGUF);
    }
    // UTF-16 without a mark: of the first characters, which are ASCII, each second byte is 0.
    let pairs = head[..head.len().min(8)].as_chunks::<2>().0;
    if pairs.len() > 1
        && (pairs.iter().all(|p| p[0] == 0 && p[1] != 0) || pairs.iter().all(|p| p[1] == 0 && p[0] != 0))
    {
        return Some(UTF16);
    }
    let text = head.trim_ascii_start().to_ascii_lowercase();
    [&b"<!doctype html"[..], b"<html"].iter().any(|tag| text.starts_with(tag)).then_some(WEB_PAGE)
}

/// The bytes of a text file without a byte order mark.
///
/// # Errors
/// When the file is no text of its kind; the message is the rest of a sentence that begins with the file's name.
pub fn text_of(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let text = bytes.strip_prefix(MARK).unwrap_or(bytes);
    match stands_in(text) {
        None => Ok(text),
        Some(what) => Err(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::prompt::Text;
    use crate::text::prompt::tiny::tiny_folder;

    #[test]
    fn a_mark_is_read_over_and_strangers_are_named() {
        assert_eq!(text_of(b"\xef\xbb\xbf{}"), Ok(&b"{}"[..]));
        assert_eq!(text_of(b"{\"a\": 1}"), Ok(&b"{\"a\": 1}"[..]));
        assert_eq!(text_of(b"[1]"), Ok(&b"[1]"[..]));
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2\n".to_vec();
        for (bytes, what) in [
            (pointer.clone(), "git lfs pull"),
            ([MARK, &pointer].concat(), "git lfs pull"),
            (utf16("\u{feff}{\"a\": 1}"), "UTF-16"),
            (utf16("{\"a\": 1}"), "UTF-16"),
            ("{\"a\": 1}".encode_utf16().flat_map(u16::to_be_bytes).collect(), "UTF-16"),
            (b"PK\x03\x04rest".to_vec(), "ZIP"),
            (b"GGUF\x03\0\0\0".to_vec(), "millrace import"),
            (b"\n<!DOCTYPE html><html>".to_vec(), "web page"),
            (Vec::new(), "is empty"),
            (MARK.to_vec(), "is empty"),
        ] {
            let found = text_of(&bytes).expect_err(what);
            assert!(found.contains(what), "{found}");
        }
    }

    #[test]
    fn the_text_side_opens_what_tools_write() {
        let folder = tiny_folder();
        let config = "\u{feff}{\"eos_token\": \"<|end|>\", \"model_max_length\": Infinity}";
        std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("written");
        let tokenizer = std::fs::read(folder.path().join("tokenizer.json")).expect("there");
        std::fs::write(folder.path().join("tokenizer.json"), [MARK, &tokenizer].concat()).expect("written");
        assert_eq!(Text::open(folder.path(), "tiny").expect("opened").end_tokens(), [256]);
        std::fs::write(folder.path().join("tokenizer.json"), "version https://git-lfs.github.com/spec/v1\n")
            .expect("written");
        let error = Text::open(folder.path(), "tiny").expect_err("a pointer").to_string();
        assert!(error.starts_with("tokenizer.json: it is a Git LFS pointer"), "{error}");
    }

    #[test]
    fn a_safetensors_header_is_no_stranger() {
        // Its length comes first: 123 in eight bytes, then the JSON.
        assert_eq!(stands_in(b"\x7b\0\0\0\0\0\0\0{\"a\":{}}"), None);
    }
}
