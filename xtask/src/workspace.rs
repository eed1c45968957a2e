//! The workspace as cargo sees it: root, target folder, members; and the commit that is checked out.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cargo_metadata::camino::Utf8PathBuf;
use cargo_metadata::{Message, Metadata, MetadataCommand};

use crate::exec;

/// What [`static_bedplate`] is built for.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";
const STATIC_FLAGS: &str = "-C target-feature=+crt-static";

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

/// Builds `bedplate` so that it needs no library of the system it runs on.
pub fn static_bedplate() -> Result<PathBuf> {
    let arguments = ["build", "--package", "bedplate", "--release", "--target", STATIC_TARGET];
    // With a target of its own: build scripts and macros are not linked statically.
    exec::run_with(&root(), "cargo", &arguments, &[("RUSTFLAGS", STATIC_FLAGS)])?;
    Ok(target_folder()?.join(STATIC_TARGET).join("release/bedplate"))
}

/// Builds the tests of the `kvm` engine in the same way; the programs.
pub fn static_engine_tests() -> Result<Vec<PathBuf>> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--no-run", "--package", "cpu_kvm", "--target", STATIC_TARGET]);
    cargo.args(["--message-format", "json-render-diagnostics"]).env("RUSTFLAGS", STATIC_FLAGS);
    eprintln!("$ cargo test --no-run --package cpu_kvm --target {STATIC_TARGET}");
    let done = cargo.current_dir(root()).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !done.status.success() {
        bail!("the engine's tests cannot be built");
    }
    let programs = Message::parse_stream(done.stdout.as_slice()).filter_map(|message| match message {
        Ok(Message::CompilerArtifact(artifact)) if artifact.profile.test => artifact.executable,
        _ => None,
    });
    Ok(programs.map(Utf8PathBuf::into_std_path_buf).collect())
}

/// Builds a package's binary of the same name and gives its path.
pub fn built(package: &str, profile: &str) -> Result<PathBuf> {
    exec::run(&root(), "cargo", &["build", "--package", package, "--profile", profile])?;
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(target_folder()?.join(folder).join(package))
}
