//! `cargo xtask fuzz`: libFuzzer (through cargo-fuzz) on the targets of `fuzz/`, whose logic is `tests/hostile`.
//!
//! Works with the stable toolchain: coverage needs no sanitizer, and guest memory is checked by our own bounds.

use std::fs;

use anyhow::{Context, Result, bail};
use clap::Args;
use guest_trials::Outcome;

use crate::summary::Summary;
use crate::{exec, workspace};

/// Seconds of each target, unless told otherwise.
pub const DEFAULT_SECONDS: u32 = 60;

/// Limits of one input: a hang is a finding, and so is a host that runs out of memory.
/// Inputs may be long from the start: libFuzzer would try short ones for minutes first.
const LIMITS: [&str; 4] = ["-timeout=30", "-rss_limit_mb=2048", "-max_len=4096", "-len_control=0"];

#[derive(Debug, Args)]
pub struct FuzzOptions {
    /// One target; all of them if left out.
    target: Option<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = DEFAULT_SECONDS)]
    seconds: u32,
}

pub fn run(options: &FuzzOptions) -> Result<()> {
    let mut summary = Summary::new(format!("cargo xtask fuzz, commit {}", workspace::commit()));
    steps(&mut summary, options.target.as_deref(), options.seconds)?;
    summary.finish()
}

/// A step for each target, or for one.
pub fn steps(summary: &mut Summary, only: Option<&str>, seconds: u32) -> Result<()> {
    let all = targets()?;
    let chosen: Vec<&String> = all.iter().filter(|name| only.is_none_or(|only| only == **name)).collect();
    if chosen.is_empty() {
        bail!("`{}` is no fuzz target; there are {}", only.unwrap_or_default(), all.join(", "));
    }
    summary.step("cargo-fuzz", || install().map(|()| Outcome::Passed));
    for target in chosen {
        summary.step(&format!("fuzz/{target}"), || fuzz(target, seconds).map(|()| Outcome::Passed));
    }
    Ok(())
}

/// The names of the targets, as their files have them.
fn targets() -> Result<Vec<String>> {
    let folder = workspace::root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".rs").map(str::to_string));
    }
    names.sort();
    Ok(names)
}

fn install() -> Result<()> {
    if exec::output(&workspace::root(), "cargo", &["fuzz", "--version"]).is_ok() {
        return Ok(());
    }
    eprintln!("cargo-fuzz is missing: building it");
    exec::run(&workspace::root(), "cargo", &["install", "--locked", "cargo-fuzz"])
}

fn fuzz(target: &str, seconds: u32) -> Result<()> {
    let time = format!("-max_total_time={seconds}");
    let mut words = vec!["fuzz", "run", "--sanitizer", "none", target, "--", &time];
    words.extend(LIMITS);
    // cargo-fuzz asks for flags that rustc calls unstable.
    let environment = [("RUSTC_BOOTSTRAP", "1")];
    exec::run_with(&workspace::root().join("fuzz"), "cargo", &words, &environment).with_context(|| {
        format!("the input is below fuzz/artifacts/{target}; replay it with `cargo run -p hostile --example replay`")
    })
}

#[cfg(test)]
mod tests {
    /// The fuzz crate's files and its manifest say the same.
    #[test]
    fn every_target_is_in_the_manifest() {
        let manifest = crate::workspace::root().join("fuzz/Cargo.toml");
        let manifest = std::fs::read_to_string(manifest).unwrap();
        let targets = super::targets().unwrap();
        assert_eq!(targets.len(), 7);
        for target in targets {
            assert!(manifest.contains(&format!("name = \"{target}\"")), "{target}");
        }
    }
}
