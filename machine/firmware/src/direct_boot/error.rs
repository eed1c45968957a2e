//! What can be wrong with the files of a direct boot, naming the file and the field.

use core::fmt;

/// Which of the boot's inputs is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// The kernel file.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// The command line.
    CommandLine,
    /// What we add: zero page, page tables, descriptor table.
    BootData,
}

impl fmt::Display for FileRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::CommandLine => "command line",
            Self::BootData => "boot data",
        })
    }
}

/// Why a direct boot is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirectBootError {
    /// Neither bzImage nor ELF.
    #[error(
        "kernel: {bytes} bytes that are neither a Linux bzImage (`HdrS` at 0x202) nor an ELF file; \
         give the distribution's vmlinuz or a vmlinux built with CONFIG_PVH"
    )]
    UnknownKernel {
        /// Length of the file.
        bytes: usize,
    },
    /// The file ends before a field or before what a field announces.
    #[error("{role}: file ends before {field} (needs {needed} bytes, has {have})")]
    Cut {
        /// Which file.
        role: FileRole,
        /// What is missing.
        field: &'static str,
        /// Length needed.
        needed: u64,
        /// Length there.
        have: u64,
    },
    /// A field has a value that cannot be.
    #[error("{role}: field {field} has the value {value:#x}: {reason}")]
    Field {
        /// Which file.
        role: FileRole,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Why it is refused.
        reason: &'static str,
    },
    /// An ELF kernel without PVH entry.
    #[error(
        "kernel: ELF file without the Xen note PHYS32_ENTRY; build it with CONFIG_PVH, or give its bzImage"
    )]
    NoPvhNote,
    /// Something would lie outside RAM.
    #[error("{role}: {start:#x}..{end:#x} is not in the guest's RAM; give the machine more memory")]
    OutsideRam {
        /// What would be loaded.
        role: FileRole,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// Two pieces would lie on each other.
    #[error("{role}: {start:#x}..{end:#x} overlaps what is loaded for the {other}")]
    Overlap {
        /// What would be loaded.
        role: FileRole,
        /// What is already there.
        other: FileRole,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// No gap for the initial RAM disk.
    #[error("initrd: no room for {bytes} bytes of RAM below {limit:#x}; give the machine more memory")]
    NoRoomForInitrd {
        /// Its length.
        bytes: u64,
        /// Highest address that the kernel accepts, plus one.
        limit: u64,
    },
    /// Longer than the kernel or our area takes.
    #[error("command line: {bytes} bytes, the kernel takes at most {limit}")]
    CommandLineTooLong {
        /// Its length.
        bytes: usize,
        /// The most possible.
        limit: u64,
    },
    /// A zero byte would cut it.
    #[error("command line: zero byte at {at}")]
    CommandLineHasZero {
        /// Position.
        at: usize,
    },
}

impl DirectBootError {
    /// Which of the boot's inputs is wrong.
    pub fn role(&self) -> FileRole {
        match self {
            Self::UnknownKernel { .. } | Self::NoPvhNote => FileRole::Kernel,
            Self::NoRoomForInitrd { .. } => FileRole::Initrd,
            Self::CommandLineTooLong { .. } | Self::CommandLineHasZero { .. } => FileRole::CommandLine,
            Self::Cut { role, .. }
            | Self::Field { role, .. }
            | Self::OutsideRam { role, .. }
            | Self::Overlap { role, .. } => *role,
        }
    }
}
