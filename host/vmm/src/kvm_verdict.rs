//! What the probe of this host's KVM found, kept in the folder of control sockets until the next boot.
//!
//! Called by: [`crate::engine`], [`crate::doctor`].
//!
//! Invariant: a verdict of another boot or of another program counts as none; one that cannot be kept is no failure.

use crate::control::folder;
use cpu_kvm::Probe;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::UNIX_EPOCH;

const FILE: &str = "kvm-verdict.json";
/// It has some hundred.
const MAX_BYTES: u64 = 64 << 10;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// See [`mark`].
    of: String,
    cpuid_is_the_models: bool,
    problems: Vec<String>,
}

/// What was found since the host was booted, by this program.
pub fn known() -> Option<Probe> {
    read(&folder::open().ok()?, &mark()?)
}

/// Keeps what was found.
pub fn keep(probe: &Probe) {
    if let (Ok(folder), Some(mark)) = (folder::open(), mark()) {
        write(&folder, &mark, probe);
    }
}

/// Names this boot of the host and this program.
fn mark() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let program = fs::metadata(std::env::current_exe().ok()?).ok()?;
    let changed = program.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!("{} {} {}", boot.trim(), program.len(), changed.as_nanos()))
}

fn read(folder: &Path, mark: &str) -> Option<Probe> {
    let mut text = String::new();
    fs::File::open(folder.join(FILE)).ok()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
    let Kept { of, cpuid_is_the_models, problems } = serde_json::from_str(&text).ok()?;
    (of == mark).then_some(Probe { cpuid_is_the_models, problems })
}

fn write(folder: &Path, mark: &str, probe: &Probe) {
    let Probe { cpuid_is_the_models, problems } = probe.clone();
    let kept = Kept { of: mark.into(), cpuid_is_the_models, problems };
    let Ok(text) = serde_json::to_string(&kept) else { return };
    // Renamed into place: others read the old one or the new one.
    let fresh = folder.join(format!("{FILE}.{}", std::process::id()));
    if fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, folder.join(FILE))).is_err() {
        let _ = fs::remove_file(&fresh);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_counts_for_its_boot_and_program_only() {
        let folder = tempfile::tempdir().unwrap();
        let probe = Probe { cpuid_is_the_models: true, problems: vec!["it is slow".into()] };
        assert_eq!(read(folder.path(), "boot 1"), None);
        write(folder.path(), "boot 1", &probe);
        assert_eq!(read(folder.path(), "boot 1"), Some(probe));
        assert_eq!(read(folder.path(), "boot 2"), None);
        fs::write(folder.path().join(FILE), "{\"of\":\"boot 1\"}").unwrap();
        assert_eq!(read(folder.path(), "boot 1"), None);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_boot_has_one_mark() {
        assert!(mark().is_some_and(|one| Some(one) == mark()));
    }
}
