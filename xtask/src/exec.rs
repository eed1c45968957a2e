//! Runs commands with their output on the terminal, after saying what is run.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Runs it in `folder`; an exit status other than zero is an error.
pub fn run(folder: &Path, program: &str, arguments: &[impl AsRef<OsStr>]) -> Result<()> {
    run_with(folder, program, arguments, &[])
}

/// As [`run`], with variables added to the environment.
pub fn run_with(
    folder: &Path,
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    environment: &[(&str, &str)],
) -> Result<()> {
    let words: Vec<_> = arguments.iter().map(|a| a.as_ref().to_string_lossy().into_owned()).collect();
    let line = format!("{program} {}", words.join(" "));
    eprintln!("$ {line}");
    let mut command = Command::new(program);
    command.current_dir(folder).args(arguments).envs(environment.iter().copied());
    let status = command.status().with_context(|| format!("cannot run {program}; is it installed?"))?;
    if !status.success() {
        bail!("`{line}` ended with {status}");
    }
    Ok(())
}

/// The standard output of a command that must succeed.
pub fn output(folder: &Path, program: &str, arguments: &[&str]) -> Result<String> {
    let done = Command::new(program)
        .current_dir(folder)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}; is it installed?"))?;
    if !done.status.success() {
        bail!("`{program} {}` ended with {}", arguments.join(" "), done.status);
    }
    Ok(String::from_utf8_lossy(&done.stdout).trim().to_string())
}

/// Where a program is, if it is installed.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}
