//! Direct boot: a kernel file becomes segments of guest RAM and the first CPU's registers, without
//! any firmware code run by the guest.
//!
//! Called by `machine` at start and at every reset. Three protocols, told apart by the kernel's
//! content: the Linux 64-bit boot protocol (bzImage), the Linux 32-bit boot protocol (bzImage of an
//! i386 kernel), and PVH (an ELF file with the Xen note `PHYS32_ENTRY`).
//!
//! Invariants: segments lie wholly in RAM of the given memory map and never overlap; a kernel file
//! of any content gives a result or an error, in time proportional to its size.
//!
//! Manuals: Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst`; Xen
//! `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`.

mod bzimage;
mod cpu;
mod elf;
mod error;
mod fields;
mod place;
mod pvh;

pub use cpu::{BootCpu, BootMode};
pub use error::{DirectBootError, FileRole};

use crate::Segment;
use alloc::borrow::Cow;
use alloc::vec::Vec;
use guest_memory::Gpa;
use machine_spec::layout::E820Entry;
use place::Placement;

/// Fixed places in conventional memory; everything below is free RAM of the guest once it has
/// read it.
mod low_memory {
    /// BIOS data area: where the EBDA is, and how much conventional memory there is.
    pub const BDA_EBDA_SEGMENT: u64 = 0x40E;
    /// GDT of the entry state.
    pub const GDT: u64 = 0x500;
    /// `hvm_start_info`, its memory map and its module list.
    pub const PVH_START_INFO: u64 = 0x6000;
    /// Linux `boot_params`.
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Top of the entry stack; one page.
    pub const STACK_TOP: u64 = 0x9000;
    /// PML4, PDPT and four page directories.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// Command line with its terminating zero.
    pub const COMMAND_LINE: u64 = 0x2_0000;
    /// Longest command line, without the zero; kernels take less.
    pub const COMMAND_LINE_MAX: usize = 0xFFFF;
}

/// What is to be booted.
#[derive(Clone, Copy, Debug)]
pub struct BootFiles<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// The initial RAM disk, if any.
    pub initrd: Option<&'a [u8]>,
    /// The kernel command line.
    pub command_line: &'a str,
}

/// Which protocol the kernel file asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootProtocol {
    /// bzImage entered in long mode.
    Linux64,
    /// bzImage entered in protected mode.
    Linux32,
    /// ELF entered by its Xen note.
    Pvh,
}

/// All that is needed to start: write the segments, set the registers, run.
#[derive(Clone, Debug)]
pub struct DirectBoot<'a> {
    /// What to write into RAM.
    pub segments: Vec<Segment<'a>>,
    /// Registers of the first CPU.
    pub entry: BootCpu,
    /// How the kernel is entered.
    pub protocol: BootProtocol,
}

/// Lays out `files` in the memory that `memory` (as from `RamLayout::e820`) calls RAM. `rsdp` is
/// where the ACPI root pointer was or will be loaded.
pub fn direct_boot<'a>(
    files: &BootFiles<'a>,
    memory: &[E820Entry],
    rsdp: Option<Gpa>,
) -> Result<DirectBoot<'a>, DirectBootError> {
    let mut place = Placement::new(memory);
    place_bios_data(&mut place)?;
    place_command_line(&mut place, files.command_line)?;
    let (entry, protocol) = if bzimage::matches(files.kernel) {
        bzimage::load(files, memory, rsdp, &mut place)?
    } else if elf::matches(files.kernel) {
        (pvh::load(files, memory, rsdp, &mut place)?, BootProtocol::Pvh)
    } else {
        return Err(DirectBootError::UnknownKernel { bytes: files.kernel.len() });
    };
    Ok(DirectBoot { segments: place.into_segments(), entry, protocol })
}

/// Kernels ask the BIOS data area where conventional memory ends.
fn place_bios_data(place: &mut Placement<'_>) -> Result<(), DirectBootError> {
    let ebda = machine_spec::layout::EBDA.start.0;
    let mut bytes = Vec::with_capacity(7);
    bytes.extend_from_slice(&((ebda >> 4) as u16).to_le_bytes());
    bytes.extend_from_slice(&[0; 3]);
    bytes.extend_from_slice(&((ebda >> 10) as u16).to_le_bytes());
    place.add(FileRole::BootData, low_memory::BDA_EBDA_SEGMENT, Cow::Owned(bytes), 0)
}

fn place_command_line(place: &mut Placement<'_>, line: &str) -> Result<(), DirectBootError> {
    if line.len() > low_memory::COMMAND_LINE_MAX {
        let limit = low_memory::COMMAND_LINE_MAX as u64;
        return Err(DirectBootError::CommandLineTooLong { bytes: line.len(), limit });
    }
    if let Some(at) = line.bytes().position(|b| b == 0) {
        return Err(DirectBootError::CommandLineHasZero { at });
    }
    let mut bytes = Vec::with_capacity(line.len() + 1);
    bytes.extend_from_slice(line.as_bytes());
    bytes.push(0);
    place.add(FileRole::CommandLine, low_memory::COMMAND_LINE, Cow::Owned(bytes), 0)
}

#[cfg(test)]
mod tests;
