//! Where the control plane's programs are: the folder in `KUBEBUILDER_ASSETS`, then the cache that
//! `scripts/kube` fills.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::tools;

/// The version that `scripts/kube-modules/go.mod` pins.
pub const VERSION: &str = "v1.34.4";
/// What a control plane with a node and a chart needs.
pub const PROGRAMS: [&str; 5] =
    ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "helm"];

/// One of the programs, such as `kube-apiserver`.
///
/// # Errors
/// When it is not there; the message says how to get it.
pub fn program(name: &str) -> Result<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let built = tools::cache()?.join("kube").join(VERSION);
    let places = assets.into_iter().chain([built.clone()]);
    let Some(file) = places.map(|folder| folder.join(name)).find(|file| file.is_file()) else {
        bail!("{} is missing: run `make kube`", built.join(name).display());
    };
    Ok(file)
}

/// Whether all programs are here. If not, says so, or fails where tools are required.
///
/// # Panics
/// When a program is missing and `MILLRACE_REQUIRE_TOOLS` is set.
pub fn have() -> bool {
    let missing = PROGRAMS.iter().find_map(|name| program(name).err());
    let Some(error) = missing else { return true };
    assert!(std::env::var_os("MILLRACE_REQUIRE_TOOLS").is_none(), "{error}");
    eprintln!("SKIPPED: {error}");
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_pinned_one() {
        let pins = include_str!("../../../scripts/kube-modules/go.mod");
        assert!(
            pins.contains(&format!("k8s.io/kubernetes {VERSION}\n")),
            "{VERSION} is not what go.mod pins"
        );
    }

    #[test]
    fn a_missing_program_is_named_with_its_remedy() {
        let error = program("kube-nothing").unwrap_err().to_string();
        assert!(error.contains("kube-nothing") && error.contains("make kube"), "{error}");
    }
}
