//! Turns packages into the files of a guest. One file per recipe; called by [`crate::Cache`], which owns the work
//! folder and moves the result into place.

mod debian_disk;
mod debian_kernel;
mod selftests;
mod wheel;

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::catalog::{Guest, Recipe};
use crate::error::CatalogError;
use crate::fetch::apt::Apt;
use crate::initrd;
use crate::manifest::{Manifest, hex};
use crate::progress::Progress;

/// Where a recipe works.
pub(crate) struct Place<'a> {
    /// For downloads and unpacked packages; removed afterwards.
    pub(crate) work: &'a Path,
    /// For the guest's files.
    pub(crate) staged: &'a Path,
    pub(crate) apt: &'a Apt,
}

/// Identifies the recipe that made a guest: caches of another one are prepared again.
pub(crate) fn recipe_stamp(guest: &Guest) -> String {
    let initrd = initrd::SCRIPTS.concat();
    // A number is raised when the recipe's program makes something else than before.
    match guest.recipe {
        Recipe::DebianKernel { .. } => stamp("debian-kernel 4", &initrd),
        Recipe::Selftests { .. } => stamp("selftests 3", &(initrd + selftests::SCRIPT)),
        Recipe::DebianDisk { .. } => stamp("debian-disk 2", &debian_disk::SCRIPTS.concat()),
        Recipe::Wheel { .. } => stamp("wheel 1", ""),
    }
}

/// A recipe's name and revision, and the scripts that go into its guest.
fn stamp(recipe: &str, scripts: &str) -> String {
    format!("{recipe} {}", hex(&Sha256::digest(scripts)))
}

/// Fills `place.staged`, the manifest included.
pub(crate) fn prepare(
    guest: &Guest,
    place: &Place<'_>,
    progress: &mut dyn Progress,
) -> Result<(), CatalogError> {
    let mut manifest = match guest.recipe {
        Recipe::DebianKernel { metapackage, modules } => {
            debian_kernel::prepare(metapackage, guest.architecture, modules, place, progress)?
        }
        Recipe::Selftests { metapackage } => {
            selftests::prepare(metapackage, guest.architecture, place, progress)?
        }
        Recipe::DebianDisk { suite, kernel, disk_mib } => {
            debian_disk::prepare(&debian_disk::Disk { suite, kernel, mib: disk_mib }, place, progress)?
        }
        Recipe::Wheel { project, version, python, platform, image } => {
            wheel::prepare(&wheel::Wheel { project, version, python, platform, image }, place, progress)?
        }
    };
    manifest.recipe = recipe_stamp(guest);
    manifest.write(place.staged)
}

/// Copies `from` to `name` in the staged folder and records it.
fn stage(
    manifest: &mut Manifest,
    place: &Place<'_>,
    role: &str,
    from: &Path,
    name: &str,
) -> Result<(), CatalogError> {
    use crate::error::IoContext;
    let to = place.staged.join(name);
    std::fs::copy(from, &to).context("copy", from)?;
    manifest.add(role, place.staged, name)
}

/// Puts the kernel in its place, and its vmlinux beside it if it can be booted by PVH.
fn stage_kernel(
    manifest: &mut Manifest,
    place: &Place<'_>,
    kernel: &Path,
    progress: &mut dyn Progress,
) -> Result<(), CatalogError> {
    use crate::error::IoContext;
    progress.step("unpack the kernel", None);
    let malformed = |reason: String| CatalogError::Malformed { path: kernel.to_path_buf(), reason };
    let image = std::fs::read(kernel).context("read", kernel)?;
    let vmlinux = crate::bzimage::extract_vmlinux(&image).map_err(|e| malformed(e.to_string()))?;
    manifest.version =
        crate::bzimage::release(&image).ok_or_else(|| malformed("its header names no version".into()))?;
    stage(manifest, place, "kernel", kernel, "vmlinuz")?;
    if crate::elf::pvh_entry(&vmlinux).is_some() {
        let path = place.staged.join("vmlinux");
        std::fs::write(&path, vmlinux).context("write", &path)?;
        manifest.add("vmlinux", place.staged, "vmlinux")?;
    }
    Ok(())
}

/// The file in `folder` whose name starts with `prefix` (there is one kernel in a kernel package).
fn file_starting(folder: &Path, prefix: &str, package: &str) -> Result<std::path::PathBuf, CatalogError> {
    let missing = || CatalogError::PackageShape {
        package: package.to_string(),
        wanted: format!("{}/{prefix}*", folder.file_name().unwrap_or_default().to_string_lossy()),
    };
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .map_err(|_| missing())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort();
    found.pop().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_script_makes_another_recipe() {
        let guest = crate::find("cloud").unwrap();
        assert_eq!(recipe_stamp(guest), stamp("debian-kernel 4", &initrd::SCRIPTS.concat()));
        assert_ne!(stamp("debian-kernel 4", "echo 1"), stamp("debian-kernel 4", "echo 2"));
    }
}
