//! Where programs and models are: the tools' cache that `scripts/tools` fills, and the build folder.
//!
//! A missing tool is skipped loudly, but not where `MILLRACE_REQUIRE_TOOLS` is set, as `make test` does: a
//! run that counts must not skip.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The tools' cache: `MILLRACE_CACHE`, or `.cache/millrace` in the home folder.
///
/// # Errors
/// When neither variable is set.
pub fn cache() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("MILLRACE_CACHE") {
        return Ok(folder.into());
    }
    let home = std::env::var_os("HOME").context("neither MILLRACE_CACHE nor HOME is set")?;
    Ok(Path::new(&home).join(".cache/millrace"))
}

/// A file of the tools' cache, such as `bin/nats-server`.
///
/// # Errors
/// When it is not there; the message says how to get it.
pub fn tool(path: &str) -> Result<PathBuf> {
    let file = cache()?.join(path);
    if !file.exists() {
        bail!("{} is missing: run `make tools`", file.display());
    }
    Ok(file)
}

/// Whether these tools are here. If not, says so, or fails where tools are required.
///
/// # Panics
/// When a tool is missing and `MILLRACE_REQUIRE_TOOLS` is set.
pub fn have(paths: &[&str]) -> bool {
    let missing: Vec<String> =
        paths.iter().filter_map(|path| tool(path).err()).map(|error| error.to_string()).collect();
    if missing.is_empty() {
        return true;
    }
    let required = std::env::var_os("MILLRACE_REQUIRE_TOOLS").is_some();
    assert!(!required, "{}", missing.join("; "));
    eprintln!("SKIPPED: {}", missing.join("; "));
    false
}

/// A program of this workspace, from the build folder and profile of the running one.
///
/// # Errors
/// When it was not built; the message says how to.
pub fn program(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let folder = me.parent().context("the running program has no folder")?;
    // Test programs lie one folder deeper, in `deps`.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let file = folder.join(name);
    if !file.exists() {
        bail!("{} is missing: run `cargo build --workspace --bins` first (make test does)", file.display());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named_with_its_remedy() {
        let error = tool("bin/no-such-tool").unwrap_err().to_string();
        assert!(error.contains("bin/no-such-tool") && error.contains("make tools"), "{error}");
        let error = program("no-such-program").unwrap_err().to_string();
        assert!(error.contains("no-such-program") && error.contains("cargo build"), "{error}");
    }
}
