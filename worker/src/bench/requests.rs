//! The work of a benchmark: a request list, or random prompts of one length.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, bail};
use serde::Deserialize;

/// Largest request list.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Most requests of a synthetic list, and most tokens of each of their parts.
const SYNTHETIC_MAX: u32 = 1 << 20;

/// One request.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Item {
    /// Tokens in.
    #[serde(rename = "prompt_token_ids")]
    pub prompt: Vec<u32>,
    /// Tokens out.
    pub max_tokens: u32,
}

/// Reads a request list.
pub(super) fn read(path: &Path, vocabulary: usize) -> anyhow::Result<Vec<Item>> {
    let file = path.display();
    let bytes = std::fs::metadata(path).with_context(|| file.to_string())?.len();
    if bytes > FILE_BYTES_MAX {
        bail!("{file} has {bytes} bytes; the limit is {FILE_BYTES_MAX}");
    }
    let text = std::fs::read_to_string(path).with_context(|| file.to_string())?;
    let mut items = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = || format!("{file}, line {}", index + 1);
        let item: Item = serde_json::from_str(line).with_context(at)?;
        if item.prompt.is_empty() || item.max_tokens == 0 {
            bail!("{}: a prompt and max_tokens of at least 1 token are needed", at());
        }
        if let Some(token) = item.prompt.iter().find(|&&token| token as usize >= vocabulary) {
            bail!("{}: token {token} is not below the vocabulary size of {vocabulary}", at());
        }
        items.push(item);
    }
    if items.is_empty() {
        bail!("{file} has no requests; at least 1 is needed");
    }
    Ok(items)
}

/// Requests of equal lengths with random prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synthetic {
    requests: u32,
    prompt: u32,
    output: u32,
}

impl FromStr for Synthetic {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Vec<u32> = text.split(',').map_while(|part| part.trim().parse().ok()).collect();
        match numbers[..] {
            [requests, prompt, output]
                if text.split(',').count() == 3
                    && numbers.iter().all(|number| (1..=SYNTHETIC_MAX).contains(number)) =>
            {
                Ok(Self { requests, prompt, output })
            }
            _ => Err(format!("{text:?} is not N,PROMPT,OUTPUT, each from 1 to {SYNTHETIC_MAX}")),
        }
    }
}

impl Synthetic {
    /// Draws the prompts; equal seeds give equal ones.
    pub(super) fn draw(self, seed: u64, vocabulary: usize) -> Vec<Item> {
        let mut state = seed;
        let mut token = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as usize % vocabulary) as u32
        };
        (0..self.requests)
            .map(|_| Item { prompt: (0..self.prompt).map(|_| token()).collect(), max_tokens: self.output })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synthetic_lists_are_read_and_drawn() {
        let synthetic: Synthetic = "3,5,7".parse().expect("valid");
        let items = synthetic.draw(0, 10);
        assert_eq!(items.len(), 3);
        assert!(items.iter().all(|item| item.prompt.len() == 5 && item.max_tokens == 7));
        assert!(items.iter().flat_map(|item| &item.prompt).all(|&token| token < 10));
        assert_ne!(items[0].prompt, items[1].prompt);
        for bad in ["", "3", "3,5", "3,5,0", "3,5,7,9", "a,b,c", "3,5,-1", "3,5,9999999"] {
            assert!(bad.parse::<Synthetic>().is_err(), "{bad}");
        }
    }

    #[test]
    fn request_lists_name_the_bad_line() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("list.jsonl");
        let check = |text: &str, wanted: &str| {
            std::fs::write(&path, text).expect("written");
            let error = format!("{:#}", read(&path, 100).expect_err(text));
            assert!(error.contains(wanted), "{error}");
        };
        check("", "no requests");
        check("{\"prompt_token_ids\":[1],\"max_tokens\":2}\n{}\n", "line 2");
        check("{\"prompt_token_ids\":[],\"max_tokens\":2}", "at least 1 token");
        check("{\"prompt_token_ids\":[100],\"max_tokens\":2}", "token 100 is not below");
        check("{\"prompt_token_ids\":[1],\"max_tokens\":2,\"n\":3}", "n");
    }
}
