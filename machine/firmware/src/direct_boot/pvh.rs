//! PVH: an ELF kernel entered in 32-bit protected mode with `hvm_start_info`.
//!
//! Called by `direct_boot`. Layouts from Xen's `public/arch-x86/hvm/start_info.h`, version 1.

use super::elf::ElfKernel;
use super::error::{DirectBootError, FileRole};
use super::fields::FileView;
use super::low_memory::{COMMAND_LINE, PVH_START_INFO};
use super::{BootCpu, BootFiles, Placement};
use alloc::borrow::Cow;
use alloc::vec::Vec;
use guest_memory::Gpa;
use machine_spec::layout::{E820Entry, Span};

const MAGIC: u32 = 0x336E_C578;
const VERSION: u32 = 1;
const START_INFO_SIZE: u64 = 56;
const MODULE_SIZE: u64 = 32;
/// The memory map begins after start info and one module.
const MEMORY_MAP: u64 = PVH_START_INFO + START_INFO_SIZE + MODULE_SIZE;
const MEMORY_MAP_MAX: usize = 128;
/// As Linux announces in its bzImage: what a 64-bit kernel maps early, and an i386 kernel's low
/// memory.
const INITRD_LIMIT_64: u64 = 0x8000_0000;
const INITRD_LIMIT_32: u64 = 0x3800_0000;

/// Places kernel, RAM disk and start info.
pub(super) fn load<'a>(
    files: &BootFiles<'a>,
    memory: &[E820Entry],
    rsdp: Option<Gpa>,
    place: &mut Placement<'a>,
) -> Result<BootCpu, DirectBootError> {
    let file = FileView { role: FileRole::Kernel, bytes: files.kernel };
    let kernel = ElfKernel::parse(&file)?;
    let entry = kernel.pvh_entry.ok_or(DirectBootError::NoPvhNote)?;
    check_entry(&file, &kernel, entry)?;
    let limit = if kernel.is_64_bit { INITRD_LIMIT_64 } else { INITRD_LIMIT_32 };
    for segment in kernel.segments {
        let bytes = Cow::Borrowed(segment.bytes);
        place.add(FileRole::Kernel, segment.physical, bytes, segment.zeros_after)?;
    }
    let map_size = memory.len().min(MEMORY_MAP_MAX) as u64 * 24;
    place.claim(FileRole::BootData, PVH_START_INFO, MEMORY_MAP - PVH_START_INFO + map_size)?;
    let initrd = match files.initrd {
        Some(bytes) => Some(place.add_initrd(bytes, limit)?),
        None => None,
    };
    place.fill(PVH_START_INFO, Cow::Owned(start_info(initrd, memory, rsdp)), 0);
    let cpu = BootCpu::protected32(place, entry)?;
    Ok(BootCpu { rbx: PVH_START_INFO, ..cpu })
}

/// The entry must lie in bytes that the file loads.
fn check_entry(file: &FileView<'_>, kernel: &ElfKernel<'_>, entry: u64) -> Result<(), DirectBootError> {
    let inside = kernel.segments.iter().any(|segment| {
        entry.checked_sub(segment.physical).is_some_and(|offset| offset < segment.bytes.len() as u64)
    });
    if !inside || entry > u64::from(u32::MAX) {
        return Err(file.refuse("PHYS32_ENTRY", entry, "not in a loaded segment below 4 GiB"));
    }
    Ok(())
}

/// `hvm_start_info`, its module list, its memory map: in one piece.
fn start_info(initrd: Option<Span>, memory: &[E820Entry], rsdp: Option<Gpa>) -> Vec<u8> {
    let memory = &memory[..memory.len().min(MEMORY_MAP_MAX)];
    let modules = PVH_START_INFO + START_INFO_SIZE;
    let mut info = Vec::new();
    let mut put32 = |value: u32| info.extend_from_slice(&value.to_le_bytes());
    put32(MAGIC);
    put32(VERSION);
    put32(0); // flags: not the control domain
    put32(initrd.is_some().into());
    let mut put64 = |value: u64| info.extend_from_slice(&value.to_le_bytes());
    put64(if initrd.is_some() { modules } else { 0 });
    put64(COMMAND_LINE);
    put64(rsdp.map_or(0, |rsdp| rsdp.0));
    put64(MEMORY_MAP);
    put64(memory.len() as u64); // 32 bits of count, 32 reserved
    let (image, size) = initrd.map_or((0, 0), |span| (span.start.0, span.size));
    put64(image);
    put64(size);
    put64(0); // the module's own command line
    put64(0); // reserved
    for entry in memory {
        put64(entry.span.start.0);
        put64(entry.span.size);
        put64(u64::from(entry.kind as u32)); // 32 bits of type, 32 reserved
    }
    info
}
