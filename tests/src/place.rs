//! Temporary folders that do not outlive their process for long, even when it is killed.
//!
//! All folders of a process lie in one, beside a file that the process holds locked for as long as it lives.
//! A killed process cannot remove its folders; the next one finds the lock free and removes them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// The folder of this process, and the lock that says that it lives.
struct Own {
    folder: PathBuf,
    _lock: File,
}

static OWN: Mutex<Option<Own>> = Mutex::new(None);

/// A temporary folder whose name begins with `prefix`; removed when dropped.
///
/// # Errors
/// When the file system refuses it.
pub fn folder(prefix: &str) -> Result<TempDir> {
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    let own = match own.take() {
        Some(taken) => own.insert(taken),
        None => own.insert(take(&std::env::temp_dir().join("millrace-harness"), std::process::id())?),
    };
    Ok(tempfile::Builder::new().prefix(prefix).tempdir_in(&own.folder)?)
}

/// Removes the folder of this process, unless a folder in it is still in use. For a program's end.
pub fn leave() {
    let own = OWN.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(own) = own
        && fs::remove_dir(&own.folder).is_ok()
    {
        // An empty lock that stays is swept by the next process.
        let _ = fs::remove_file(own.folder.with_extension("lock"));
    }
}

/// Removes what dead processes left, and takes a folder for process `id`.
fn take(root: &Path, id: u32) -> Result<Own> {
    fs::create_dir_all(root).with_context(|| root.display().to_string())?;
    sweep(root)?;
    let folder = root.join(id.to_string());
    let lock = File::create(folder.with_extension("lock"))?;
    lock.lock()?;
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(Own { folder, _lock: lock })
}

fn sweep(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        // It may be gone already: others sweep too.
        let Ok(lock) = File::open(&path) else { continue };
        if lock.try_lock().is_ok() {
            let _ = fs::remove_dir_all(path.with_extension(""));
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folders_of_the_dead_are_removed_and_those_of_the_living_are_not() {
        let root = tempfile::tempdir().unwrap();
        let (living, dead) = (take(root.path(), 1).unwrap(), take(root.path(), 2).unwrap());
        for own in [&living, &dead] {
            fs::create_dir_all(own.folder.join("store")).unwrap();
        }
        let dead_folder = dead.folder.clone();
        drop(dead);
        sweep(root.path()).unwrap();
        assert!(living.folder.join("store").exists() && living.folder.with_extension("lock").exists());
        assert!(!dead_folder.exists() && !dead_folder.with_extension("lock").exists());
    }
}
