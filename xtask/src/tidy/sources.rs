//! Laws about source files: headers, sizes, words, names, `forbid(unsafe_code)`, `no_std`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cargo_metadata::{Metadata, Package, TargetKind};

use super::{Findings, layers};

const LINES_FAIL: usize = 1000;
const LINES_WARN: usize = 600;

/// Crates that may hold unsafe code. `differential` runs instructions on the host's own processor.
const UNSAFE_CRATES: &[&str] = &[
    "guest_memory",
    "x86_host_ops",
    "cpu_translate",
    "cpu_kvm",
    "cpu_hardware",
    "cpu_svm",
    "cpu_vmx",
    "host_io",
    "jail",
    "metal",
    "uefi_loader",
    "differential",
];
/// Crates with std in folders that are otherwise without.
const STD_CRATES: &[&str] = &["cpu_translate", "cpu_kvm"];
const NO_STD_FOLDERS: &[&str] = &["base", "cpu", "devices", "machine", "metal"];
const FORBIDDEN_MODULES: &[&str] = &["common", "util", "utils", "helper", "helpers", "manager", "managers"];

pub fn check(metadata: &Metadata, findings: &mut Findings) -> Result<()> {
    let root = metadata.workspace_root.as_std_path();
    check_witness(metadata, findings);
    for package in metadata.workspace_packages() {
        let folder = package.manifest_path.parent().context("a manifest without a folder")?.as_std_path();
        let manifest = fs::read_to_string(&package.manifest_path).context("cannot read a Cargo.toml")?;
        let inherits =
            manifest.contains("[lints]\nworkspace = true") || manifest.contains("lints.workspace = true");
        if !inherits {
            findings.violation(format!("{}: does not take the workspace's lints", package.name));
        }
        check_roots(metadata, package, findings)?;
        let mut files = Vec::new();
        rust_files(folder, &mut files)?;
        for path in files {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            check_file(&name, &path, &text, root, findings);
        }
    }
    Ok(())
}

/// The witness links every crate without std; one that it does not know is not held to it.
fn check_witness(metadata: &Metadata, findings: &mut Findings) {
    let manifest = metadata.workspace_root.join("witness/Cargo.toml");
    let Ok(text) = fs::read_to_string(&manifest) else {
        return findings.violation("witness/Cargo.toml: there is no witness of what builds without std");
    };
    for package in metadata.workspace_packages() {
        let name = package.name.as_str();
        let folder = layers::folder_of(metadata, package).unwrap_or_default();
        let bound = NO_STD_FOLDERS.contains(&folder.as_str()) && !STD_CRATES.contains(&name);
        let named = text.lines().any(|line| line.split([' ', '=']).next() == Some(name));
        if bound && !named {
            findings
                .violation(format!("{name}: {folder}/ is no_std, but witness/Cargo.toml does not link it"));
        }
    }
}

/// What each crate's root file must declare.
fn check_roots(metadata: &Metadata, package: &Package, findings: &mut Findings) -> Result<()> {
    let name = package.name.as_str();
    let folder = layers::folder_of(metadata, package).unwrap_or_default();
    for target in &package.targets {
        let library = target.kind.contains(&TargetKind::Lib);
        if !library && !target.kind.contains(&TargetKind::Bin) {
            continue;
        }
        let text = fs::read_to_string(&target.src_path)
            .with_context(|| format!("cannot read {}", target.src_path))?;
        if !UNSAFE_CRATES.contains(&name) && !text.contains("#![forbid(unsafe_code)]") {
            findings.violation(format!(
                "{name}: lacks #![forbid(unsafe_code)] and is not on the list of unsafe crates"
            ));
        }
        let must_be_no_std =
            library && NO_STD_FOLDERS.contains(&folder.as_str()) && !STD_CRATES.contains(&name);
        let is_no_std = text.contains("#![no_std]") || text.contains("#![cfg_attr(not(test), no_std)]");
        if must_be_no_std && !is_no_std {
            findings.violation(format!("{name}: {folder}/ is no_std"));
        }
    }
    Ok(())
}

fn check_file(name: &str, path: &Path, text: &str, root: &Path, findings: &mut Findings) {
    let lines = text.lines().count();
    if lines > LINES_FAIL {
        findings.violation(format!("{name}: {lines} lines; {LINES_FAIL} is too much"));
    } else if lines > LINES_WARN {
        findings.warning(format!("{name}: {lines} lines; think again at {LINES_WARN}"));
    }
    if !text.starts_with("//!") {
        findings.violation(format!("{name}: does not open with what it is (//!)"));
    }
    let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    if FORBIDDEN_MODULES.contains(&stem) {
        findings.violation(format!("{name}: the module's name says nothing"));
    }
    for (number, line) in text.lines().enumerate() {
        if let Some(word) = forbidden_word(line) {
            findings.violation(format!("{name}:{}: {word}", number + 1));
        }
        if line.contains(&*root.to_string_lossy()) {
            findings.violation(format!("{name}:{}: names a path of this machine", number + 1));
        }
    }
}

/// The words are put together here so that this file does not hold them itself.
fn forbidden_word(line: &str) -> Option<String> {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let code = [concat!("#[ig", "nore"), concat!("to", "do!("), concat!("unimple", "mented!(")];
    let whole_word = |word: &&str| line.split(|c: char| !c.is_ascii_alphanumeric()).any(|part| part == *word);
    marks
        .iter()
        .find(|word| whole_word(word))
        .or_else(|| code.iter().find(|part| line.contains(**part)))
        .map(|word| (*word).to_string())
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            // A nested package or build output is not this crate's source.
            let foreign = path.join("Cargo.toml").is_file() || path.ends_with("target");
            if !foreign {
                rust_files(&path, files)?;
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(name: &str, text: &str) -> Vec<String> {
        let mut findings = Findings::default();
        check_file(name, Path::new(name), text, Path::new("/somewhere/bedplate"), &mut findings);
        findings.violations
    }

    #[test]
    fn files_that_break_a_law_are_named() {
        assert!(violations("a.rs", "//! Fine.\n").is_empty());
        assert_eq!(violations("a.rs", "fn a() {}\n").len(), 1);
        assert_eq!(violations("util.rs", "//! Odd.\n").len(), 1);
        assert_eq!(violations("a.rs", &format!("//! Long.\n{}", "\n".repeat(1000))).len(), 1);
        assert_eq!(violations("a.rs", concat!("//! Mark.\n// TO", "DO later\n")).len(), 1);
        assert_eq!(violations("a.rs", concat!("//! Test.\n#[ig", "nore]\n")).len(), 1);
        assert_eq!(violations("a.rs", "//! Path.\nlet a = \"/somewhere/bedplate/x\";\n").len(), 1);
        assert!(violations("a.rs", concat!("//! A word inside another: TO", "DOS.\n")).is_empty());
    }
}
