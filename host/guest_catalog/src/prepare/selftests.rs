//! Linux' own tests of x86, built from Debian's kernel source against Debian's C library, in an initrd for a Debian
//! kernel. The 64-bit kernel gets the 32- and 64-bit tests, the 32-bit one (which has virtual-8086 mode) the 32-bit
//! ones. Only gcc comes from the host; headers and libraries are unpacked from packages.

use std::fs;
use std::path::Path;

use super::{Place, debian_kernel};
use crate::catalog::Architecture;
use crate::error::{CatalogError, IoContext};
use crate::initrd::Extra;
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::tools;

const SOURCE: &str = "linux-source-6.1";
const LIBRARIES: &[&str] = &[
    "libc6",
    "libc6-dev",
    "libgcc-12-dev",
    "linux-libc-dev",
    "libc6-i386",
    "libc6-dev-i386",
    "lib32gcc-12-dev",
];
pub(super) const SCRIPT: &str = include_str!("selftests.sh");

/// What the programs load when they start: (path in the packages, path in the initrd).
const RUN_32: &[(&str, &str)] = &[
    ("lib32/ld-linux.so.2", "lib/ld-linux.so.2"),
    ("lib32/libc.so.6", "lib32/libc.so.6"),
    ("lib32/libm.so.6", "lib32/libm.so.6"),
    ("lib32/libpthread.so.0", "lib32/libpthread.so.0"),
    ("lib32/librt.so.1", "lib32/librt.so.1"),
    ("lib32/libdl.so.2", "lib32/libdl.so.2"),
];
const RUN_64: &[(&str, &str)] = &[
    ("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2"),
    ("lib/x86_64-linux-gnu/libc.so.6", "lib/x86_64-linux-gnu/libc.so.6"),
    ("lib/x86_64-linux-gnu/libm.so.6", "lib/x86_64-linux-gnu/libm.so.6"),
    ("lib/x86_64-linux-gnu/libpthread.so.0", "lib/x86_64-linux-gnu/libpthread.so.0"),
    ("lib/x86_64-linux-gnu/librt.so.1", "lib/x86_64-linux-gnu/librt.so.1"),
    ("lib/x86_64-linux-gnu/libdl.so.2", "lib/x86_64-linux-gnu/libdl.so.2"),
];

pub(crate) fn prepare(
    metapackage: &str,
    architecture: Architecture,
    place: &Place<'_>,
    progress: &mut dyn Progress,
) -> Result<Manifest, CatalogError> {
    tools::GCC.find()?;
    tools::XZ.find()?;
    place.apt.refresh(progress)?;
    let names: Vec<&str> = std::iter::once(SOURCE).chain(LIBRARIES.iter().copied()).collect();
    let packages = place.apt.download(&names, place.work, progress)?;
    let (source, sysroot, out) =
        (place.work.join("source"), place.work.join("sysroot"), place.work.join("selftests"));
    for package in &packages {
        let folder = if package.name == SOURCE { &source } else { &sysroot };
        package.unpack(folder, progress)?;
    }

    progress.step("build the selftests", None);
    let (widths, libraries): (&str, Vec<_>) = match architecture {
        Architecture::Amd64 => ("32 64", RUN_32.iter().chain(RUN_64).collect()),
        Architecture::I386 => ("32", RUN_32.iter().collect()),
    };
    let script = place.work.join("selftests.sh");
    fs::write(&script, SCRIPT).context("write", &script)?;
    let archive = source.join("usr/src").join(format!("{SOURCE}.tar.xz"));
    let mut build = tools::SHELL.command()?;
    build.args([&script, &archive, &source, &sysroot, &out]).arg(widths);
    tools::run(build, &place.work.join("selftests.log"), "", &mut || progress.at(0))?;

    let mut extras = Vec::new();
    for (from, to) in libraries {
        extras.push(extra(&sysroot.join(from), (*to).to_string())?);
    }
    for entry in fs::read_dir(&out).context("list", &out)? {
        let path = entry.context("list", &out)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        extras.push(extra(&path, format!("lib/bedplate/selftests/{name}"))?);
    }
    extras.sort_by(|a, b| a.path.cmp(&b.path));
    let extras = debian_kernel::Extras { modules: &[], files: &extras };
    let mut manifest = debian_kernel::with_extras(metapackage, architecture, &extras, place, progress)?;
    manifest.packages.extend(packages.iter().map(|package| format!("{} {}", package.name, package.version)));
    Ok(manifest)
}

fn extra(from: &Path, path: String) -> Result<Extra, CatalogError> {
    Ok(Extra { path, data: fs::read(from).context("read", from)? })
}
