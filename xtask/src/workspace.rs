//! The workspace as cargo sees it: root, target folder, members; and the commit that is checked out.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cargo_metadata::{Metadata, MetadataCommand};

use crate::exec;

/// The workspace root. xtask is built from inside it, so cargo's own variable is the start.
pub fn root() -> PathBuf {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    own.parent().map_or_else(|| own.clone(), Path::to_path_buf)
}

/// `cargo metadata` without the dependencies' own dependencies.
pub fn metadata() -> Result<Metadata> {
    MetadataCommand::new()
        .current_dir(root())
        .no_deps()
        .exec()
        .context("cargo metadata failed: a Cargo.toml of the workspace is broken")
}

/// Where cargo puts what it builds.
pub fn target_folder() -> Result<PathBuf> {
    Ok(metadata()?.target_directory.into_std_path_buf())
}

/// The short commit, with a mark if files differ from it.
pub fn commit() -> String {
    let root = root();
    let commit = exec::output(&root, "git", &["rev-parse", "--short=12", "HEAD"]);
    let changed = exec::output(&root, "git", &["status", "--porcelain"]).is_ok_and(|text| !text.is_empty());
    match commit {
        Ok(commit) if changed => format!("{commit} (with uncommitted changes)"),
        Ok(commit) => commit,
        Err(_) => "unknown".into(),
    }
}

/// The processor of this host, for reports.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    format!("{} × {count}", model.map_or("unknown processor", |(_, name)| name))
}

/// Builds the `bedplate` command and gives its path.
pub fn bedplate(profile: &str) -> Result<PathBuf> {
    built("bedplate", profile)
}

/// Builds a package's binary of the same name and gives its path.
pub fn built(package: &str, profile: &str) -> Result<PathBuf> {
    exec::run(&root(), "cargo", &["build", "--package", package, "--profile", profile])?;
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(target_folder()?.join(folder).join(package))
}
