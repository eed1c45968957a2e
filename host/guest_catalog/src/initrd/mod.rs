//! Builds the busybox initrd of the kernel guests: an uncompressed newc archive, so that a slow CPU engine spends
//! nothing on unpacking. Its init (`init.sh`) is the other half of the guest trials' protocol.

use std::collections::BTreeSet;
use std::path::Path;

use crate::cpio::CpioWriter;
use crate::error::{CatalogError, IoContext};
use crate::modules::Module;

/// The line on the console that says user space runs; boot times are measured to it.
pub const INIT_MARKER: &str = "BEDPLATE-MARKER init reached";
/// The line that says all modules are loaded and verbs are about to run.
pub const READY_MARKER: &str = "BEDPLATE-READY";

/// Drivers a guest may need; those that its kernel has built in are skipped.
pub(crate) const WANTED_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "pvpanic-mmio",
    "pvpanic-pci",
];

const INIT: &str = include_str!("init.sh");
const VERBS: &str = include_str!("verbs.sh");
const DHCP: &str = include_str!("dhcp.sh");
/// All scripts inside.
pub(crate) const SCRIPTS: [&str; 3] = [INIT, VERBS, DHCP];

/// A further program or library.
#[derive(Debug)]
pub(crate) struct Extra {
    /// Path in the initrd.
    pub(crate) path: String,
    /// Its content.
    pub(crate) data: Vec<u8>,
}

/// The archive's bytes. `path` is where it will stand, for error messages.
pub(crate) fn build(
    path: &Path,
    busybox: &[u8],
    modules: &[Module],
    extras: &[Extra],
) -> Result<Vec<u8>, CatalogError> {
    write(busybox, modules, extras).context("build", path)
}

fn write(busybox: &[u8], modules: &[Module], extras: &[Extra]) -> std::io::Result<Vec<u8>> {
    let mut cpio = CpioWriter::new(Vec::new());
    for folder in ["bin", "dev", "etc", "lib", "lib/bedplate", "root", "tmp"] {
        cpio.directory(folder)?;
    }
    cpio.char_device("dev/console", 5, 1)?;
    cpio.executable("init", INIT.as_bytes())?;
    cpio.executable("bin/busybox", busybox)?;
    cpio.file("lib/bedplate/verbs.sh", VERBS.as_bytes())?;
    cpio.executable("lib/bedplate/dhcp.sh", DHCP.as_bytes())?;
    let mut order = String::new();
    for module in modules {
        order.push_str(&module.name);
        order.push('\n');
        cpio.file(&format!("lib/bedplate/{}.ko", module.name), &module.data)?;
    }
    cpio.file("lib/bedplate/modules", order.as_bytes())?;
    let mut folders = BTreeSet::from(["lib"]);
    for extra in extras {
        if let Some((folder, _)) = extra.path.rsplit_once('/')
            && folders.insert(folder)
        {
            cpio.directory(folder)?;
        }
        cpio.executable(&extra.path, &extra.data)?;
    }
    cpio.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::entries;

    #[test]
    fn init_modules_and_their_order_are_inside() {
        let modules = ["virtio", "virtio_ring"].map(|name| Module { name: name.into(), data: name.into() });
        let archive = build(
            Path::new("initrd.cpio"),
            b"busybox",
            &modules,
            &[Extra { path: "lib64/libc.so.6".into(), data: b"libc".to_vec() }],
        )
        .unwrap();
        let entries = entries(&archive).unwrap();
        let find = |path: &str| entries.iter().find(|e| e.path == path).unwrap().data;
        assert_eq!(find("lib/bedplate/modules"), b"virtio\nvirtio_ring\n");
        assert_eq!(find("lib/bedplate/virtio_ring.ko"), b"virtio_ring");
        assert_eq!(find("lib64/libc.so.6"), b"libc");
        assert_eq!(find("lib64"), b"");
        let init = std::str::from_utf8(find("init")).unwrap();
        assert!(
            init.starts_with("#!/bin/busybox sh")
                && init.contains(INIT_MARKER)
                && init.contains(READY_MARKER)
        );
    }
}
