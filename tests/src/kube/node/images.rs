//! Images without a registry: an image's name stands for a program that is already on this machine.
//!
//! Nothing is pulled. An image that nobody announced stays `ErrImageNeverPull`, as on a node that may not pull.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;

use crate::tools;

/// What a container of an image finds and runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// The entry point that a container's `command` replaces.
    pub entrypoint: Vec<String>,
    /// Programs that appear in `/usr/local/bin` and in `/`, by file name.
    pub programs: BTreeMap<String, PathBuf>,
}

/// Images by the last part of their name, without tag and digest.
#[derive(Debug, Clone, Default)]
pub struct Images(BTreeMap<String, Image>);

impl Images {
    /// Programs of this workspace, each an image of its own name whose entry point it is.
    ///
    /// # Errors
    /// When one was not built.
    pub fn of_programs(names: &[&str]) -> Result<Self> {
        let mut images = Self::default();
        for name in names {
            let programs = BTreeMap::from([((*name).to_owned(), tools::program(name)?)]);
            images = images.with(name, Image { entrypoint: vec![(*name).to_owned()], programs });
        }
        Ok(images)
    }

    /// Adds an image whose containers run a program of this machine's `/usr/bin`.
    #[must_use]
    pub fn with(mut self, name: &str, image: Image) -> Self {
        self.0.insert(name.to_owned(), image);
        self
    }

    /// The image of a reference such as `registry.example/team/millrace-worker:0.1.0`.
    pub fn find(&self, reference: &str) -> Option<&Image> {
        let last = reference.rsplit('/').next().unwrap_or(reference);
        self.0.get(last.split(['@', ':']).next().unwrap_or(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_found_by_its_last_part() {
        let images = Images::default().with("worker", Image::default());
        let digest = format!("worker@sha256:{}", "0".repeat(64));
        for reference in ["worker", "worker:1", "a.example:5000/b/worker:1.2", digest.as_str()] {
            assert!(images.find(reference).is_some(), "{reference}");
        }
        for reference in ["worker-cuda:1", "a/b", ""] {
            assert!(images.find(reference).is_none(), "{reference}");
        }
    }
}
