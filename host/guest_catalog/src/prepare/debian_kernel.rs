//! A Debian kernel by its metapackage, with the busybox initrd and the virtio modules of that same kernel.

use std::fs;

use super::{Place, file_starting, stage_kernel};
use crate::catalog::Architecture;
use crate::error::{CatalogError, IoContext};
use crate::initrd::{self, Extra};
use crate::manifest::Manifest;
use crate::modules;
use crate::progress::Progress;

pub(crate) fn prepare(
    metapackage: &str,
    architecture: Architecture,
    modules: &[&str],
    place: &Place<'_>,
    progress: &mut dyn Progress,
) -> Result<Manifest, CatalogError> {
    with_extras(metapackage, architecture, &Extras { modules, files: &[] }, place, progress)
}

/// What the initrd holds besides busybox and the modules of every guest.
pub(super) struct Extras<'a> {
    /// Modules by name.
    pub(super) modules: &'a [&'a str],
    /// Programs and libraries.
    pub(super) files: &'a [Extra],
}

/// The same with extras in the initrd.
pub(super) fn with_extras(
    metapackage: &str,
    architecture: Architecture,
    extras: &Extras<'_>,
    place: &Place<'_>,
    progress: &mut dyn Progress,
) -> Result<Manifest, CatalogError> {
    let of = |package: &str| format!("{package}:{}", architecture.debian());
    place.apt.refresh(progress)?;
    let image = place.apt.dependency(&of(metapackage), "linux-image-")?;
    // apt names the architecture of a foreign dependency, not of a native one.
    let image = of(image.split(':').next().unwrap_or(&image));
    let busybox = of("busybox-static");
    let packages = place.apt.download(&[image.as_str(), busybox.as_str()], place.work, progress)?;

    let mut manifest = Manifest::default();
    let unpacked = place.work.join("root");
    for package in &packages {
        package.unpack(&unpacked, progress)?;
        manifest.packages.push(format!("{} {}", package.name, package.version));
    }
    let kernel = file_starting(&unpacked.join("boot"), "vmlinuz-", &image)?;
    stage_kernel(&mut manifest, place, &kernel, progress)?;

    progress.step("build the initrd", None);
    let modules =
        modules::pick(&unpacked.join("lib/modules"), &[initrd::WANTED_MODULES, extras.modules].concat())?;
    let busybox_path = unpacked.join("bin/busybox");
    let busybox = fs::read(&busybox_path).context("read", &busybox_path)?;
    let path = place.staged.join("initrd.cpio");
    let archive = initrd::build(&path, &busybox, &modules, extras.files)?;
    fs::write(&path, archive).context("write", &path)?;
    manifest.add("initrd", place.staged, "initrd.cpio")?;
    Ok(manifest)
}
