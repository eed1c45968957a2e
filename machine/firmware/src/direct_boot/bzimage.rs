//! Linux bzImage: the 64-bit boot protocol, and the 32-bit one for i386 kernels.
//!
//! Called by `direct_boot`. The real-mode part of the file is not loaded: its setup header moves
//! into `boot_params`, which we fill as a boot loader would. `boot.rst` sections "64-bit Boot
//! Protocol" and "32-bit Boot Protocol"; offsets of `boot_params` from `zero-page.rst`.

use super::error::{DirectBootError, FileRole};
use super::fields::{FileView, put};
use super::low_memory::{COMMAND_LINE, ZERO_PAGE};
use super::{BootCpu, BootFiles, BootProtocol, Placement};
use alloc::borrow::Cow;
use alloc::vec;
use alloc::vec::Vec;
use guest_memory::Gpa;
use machine_spec::layout::{E820Entry, Span};

/// Offsets that file and `boot_params` share.
mod header {
    pub const SETUP_SECTS: u64 = 0x1F1;
    pub const SYSSIZE: u64 = 0x1F4;
    pub const BOOT_FLAG: u64 = 0x1FE;
    pub const JUMP_OFFSET: u64 = 0x201;
    pub const MAGIC: u64 = 0x202;
    pub const VERSION: u64 = 0x206;
    pub const LOADFLAGS: u64 = 0x211;
    pub const INITRD_ADDR_MAX: u64 = 0x22C;
    pub const KERNEL_ALIGNMENT: u64 = 0x230;
    pub const RELOCATABLE: u64 = 0x234;
    pub const XLOADFLAGS: u64 = 0x236;
    pub const CMDLINE_SIZE: u64 = 0x238;
    pub const PREF_ADDRESS: u64 = 0x258;
    pub const INIT_SIZE: u64 = 0x260;
    /// Where the room for the header ends in `boot_params`.
    pub const ROOM_END: u64 = 0x290;
}

/// Offsets of `boot_params` that we write.
mod zero_page {
    pub const SIZE: usize = 0x1000;
    pub const ACPI_RSDP_ADDR: usize = 0x70;
    pub const EXT_RAMDISK_IMAGE: usize = 0xC0;
    pub const EXT_RAMDISK_SIZE: usize = 0xC4;
    pub const E820_ENTRIES: usize = 0x1E8;
    pub const VID_MODE: usize = 0x1FA;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21C;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const SETUP_DATA: usize = 0x250;
    pub const E820_TABLE: usize = 0x2D0;
    pub const E820_MAX: usize = 128;
}

const MAGIC: &[u8; 4] = b"HdrS";
const BOOT_FLAG: u16 = 0xAA55;
/// First protocol with `pref_address` and `init_size` (Linux 2.6.31).
const VERSION_MIN: u16 = 0x020A;
/// First protocol with `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020C;
/// First protocol with `acpi_rsdp_addr`.
const VERSION_RSDP: u16 = 0x020E;
const LOADED_HIGH: u8 = 1 << 0;
const KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;
/// Where a bzImage that cannot move is loaded.
const DEFAULT_LOAD: u64 = 0x10_0000;
const LOADER_UNDEFINED: u8 = 0xFF;
const VID_MODE_NORMAL: u16 = 0xFFFF;
const SECTOR: u64 = 512;

/// Whether the file has a bzImage's setup header.
pub(super) fn matches(kernel: &[u8]) -> bool {
    let magic = header::MAGIC as usize;
    kernel.get(magic..magic + 4) == Some(MAGIC)
}

/// The fields of the setup header that decide how to load.
struct Setup {
    version: u16,
    long_mode: bool,
    initrd_limit: u64,
    alignment: u64,
    relocatable: bool,
    command_line_max: u64,
    pref_address: u64,
    init_size: u64,
    /// Where the protected-mode part lies in the file.
    code: Span,
}

/// Places kernel, RAM disk and `boot_params`.
pub(super) fn load<'a>(
    files: &BootFiles<'a>,
    memory: &[E820Entry],
    rsdp: Option<Gpa>,
    place: &mut Placement<'a>,
) -> Result<(BootCpu, BootProtocol), DirectBootError> {
    let file = FileView { role: FileRole::Kernel, bytes: files.kernel };
    let setup = Setup::parse(&file)?;
    if files.command_line.len() as u64 > setup.command_line_max {
        let limit = setup.command_line_max;
        return Err(DirectBootError::CommandLineTooLong { bytes: files.command_line.len(), limit });
    }
    let start = place_kernel(&file, &setup, place)?;
    // Claimed before the RAM disk looks for a place: nothing else may land here.
    place.claim(FileRole::BootData, ZERO_PAGE, zero_page::SIZE as u64)?;
    let initrd = match files.initrd {
        Some(bytes) => Some(place.add_initrd(bytes, setup.initrd_limit)?),
        None => None,
    };
    let params = boot_params(&file, &setup, start, initrd, memory, rsdp)?;
    place.fill(ZERO_PAGE, Cow::Owned(params), 0);
    if setup.long_mode {
        let cpu = BootCpu::long_mode(place, start + ENTRY_64, ZERO_PAGE)?;
        return Ok((cpu, BootProtocol::Linux64));
    }
    let cpu = BootCpu { rsi: ZERO_PAGE, ..BootCpu::protected32(place, start)? };
    Ok((cpu, BootProtocol::Linux32))
}

impl Setup {
    fn parse(file: &FileView<'_>) -> Result<Self, DirectBootError> {
        let flag = file.u16(header::BOOT_FLAG, "boot_flag")?;
        if flag != BOOT_FLAG {
            return Err(file.refuse("boot_flag", flag.into(), "not 0xAA55"));
        }
        let version = file.u16(header::VERSION, "version")?;
        if version < VERSION_MIN {
            return Err(file.refuse("version", version.into(), "boot protocol older than 2.10"));
        }
        let flags = file.u8(header::LOADFLAGS, "loadflags")?;
        if flags & LOADED_HIGH == 0 {
            return Err(file.refuse("loadflags", flags.into(), "a zImage, not a bzImage"));
        }
        let xloadflags = match version {
            VERSION_XLOADFLAGS.. => file.u16(header::XLOADFLAGS, "xloadflags")?,
            _ => 0,
        };
        let alignment = u64::from(file.u32(header::KERNEL_ALIGNMENT, "kernel_alignment")?);
        let relocatable = file.u8(header::RELOCATABLE, "relocatable_kernel")? != 0;
        if relocatable && !alignment.is_power_of_two() {
            return Err(file.refuse("kernel_alignment", alignment, "not a power of two"));
        }
        Ok(Self {
            version,
            long_mode: xloadflags & KERNEL_64 != 0,
            initrd_limit: u64::from(file.u32(header::INITRD_ADDR_MAX, "initrd_addr_max")?) + 1,
            alignment,
            relocatable,
            command_line_max: file.u32(header::CMDLINE_SIZE, "cmdline_size")?.into(),
            pref_address: file.u64(header::PREF_ADDRESS, "pref_address")?,
            init_size: file.u32(header::INIT_SIZE, "init_size")?.into(),
            code: code_span(file)?,
        })
    }
}

/// The protected-mode part: after the setup sectors, as long as `syssize` says. A signature may
/// follow; the last paragraph may be cut.
fn code_span(file: &FileView<'_>) -> Result<Span, DirectBootError> {
    let sectors = match file.u8(header::SETUP_SECTS, "setup_sects")? {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let start = (sectors + 1) * SECTOR;
    let paragraphs = u64::from(file.u32(header::SYSSIZE, "syssize")?);
    if paragraphs == 0 {
        return Err(file.refuse("syssize", 0, "the kernel is empty"));
    }
    let have = file.bytes.len() as u64;
    let end = start + paragraphs * 16;
    if have < end - 15 || have < start + ENTRY_64 {
        let (role, field) = (file.role, "the end of the code that syssize announces");
        return Err(DirectBootError::Cut { role, field, needed: end.max(start + ENTRY_64), have });
    }
    Ok(Span::between(start, end.min(have)))
}

/// Loads the code where the kernel will run if it may, so that it need not move itself; claims
/// all the memory that it unpacks into. Gives the load address.
fn place_kernel<'a>(
    file: &FileView<'a>,
    setup: &Setup,
    place: &mut Placement<'a>,
) -> Result<u64, DirectBootError> {
    let code = file.slice(setup.code.start.0, setup.code.size, "protected-mode code")?;
    let runs_in = setup.init_size.max(setup.code.size);
    let bytes = Cow::Borrowed(code);
    if setup.relocatable {
        let preferred = setup.pref_address;
        let aligned = preferred.is_multiple_of(setup.alignment);
        if aligned && preferred >= DEFAULT_LOAD && place.is_free(preferred, runs_in) {
            place.claim(file.role, preferred, runs_in)?;
            place.fill(preferred, bytes, 0);
            return check_entry(file, preferred);
        }
        // A relocatable kernel below its preferred address moves itself up to that.
        let lowest = DEFAULT_LOAD.next_multiple_of(setup.alignment.max(1));
        let end = preferred.max(lowest).saturating_add(runs_in);
        place.claim(file.role, lowest, end - lowest)?;
        place.fill(lowest, bytes, 0);
        return check_entry(file, lowest);
    }
    let end = setup.pref_address.max(DEFAULT_LOAD).saturating_add(runs_in);
    place.claim(file.role, DEFAULT_LOAD, end - DEFAULT_LOAD)?;
    place.fill(DEFAULT_LOAD, bytes, 0);
    Ok(DEFAULT_LOAD)
}

/// Both entry protocols reach only 4 GiB.
fn check_entry(file: &FileView<'_>, start: u64) -> Result<u64, DirectBootError> {
    match u32::try_from(start) {
        Ok(_) => Ok(start),
        Err(_) => Err(file.refuse("pref_address", start, "beyond 4 GiB")),
    }
}

/// `boot_params` as a boot loader leaves it.
fn boot_params(
    file: &FileView<'_>,
    setup: &Setup,
    start: u64,
    initrd: Option<Span>,
    memory: &[E820Entry],
    rsdp: Option<Gpa>,
) -> Result<Vec<u8>, DirectBootError> {
    let mut page = vec![0; zero_page::SIZE];
    let jump = u64::from(file.u8(header::JUMP_OFFSET, "jump")?);
    let end = (header::MAGIC + jump).min(header::ROOM_END);
    let from_file = file.slice(header::SETUP_SECTS, end - header::SETUP_SECTS, "setup header")?;
    put(&mut page, header::SETUP_SECTS as usize, from_file);

    page[zero_page::TYPE_OF_LOADER] = LOADER_UNDEFINED;
    page[zero_page::LOADFLAGS] = LOADED_HIGH;
    put(&mut page, zero_page::VID_MODE, &VID_MODE_NORMAL.to_le_bytes());
    put(&mut page, zero_page::CODE32_START, &(start as u32).to_le_bytes());
    put(&mut page, zero_page::CMD_LINE_PTR, &(COMMAND_LINE as u32).to_le_bytes());
    put(&mut page, zero_page::SETUP_DATA, &0u64.to_le_bytes());
    let (image, size) = initrd.map_or((0, 0), |span| (span.start.0, span.size));
    put(&mut page, zero_page::RAMDISK_IMAGE, &(image as u32).to_le_bytes());
    put(&mut page, zero_page::RAMDISK_SIZE, &(size as u32).to_le_bytes());
    put(&mut page, zero_page::EXT_RAMDISK_IMAGE, &((image >> 32) as u32).to_le_bytes());
    put(&mut page, zero_page::EXT_RAMDISK_SIZE, &((size >> 32) as u32).to_le_bytes());
    if setup.version >= VERSION_RSDP
        && let Some(Gpa(rsdp)) = rsdp
    {
        put(&mut page, zero_page::ACPI_RSDP_ADDR, &rsdp.to_le_bytes());
    }
    let entries = memory.iter().take(zero_page::E820_MAX);
    page[zero_page::E820_ENTRIES] = entries.len() as u8;
    for (index, entry) in entries.enumerate() {
        let at = zero_page::E820_TABLE + index * 20;
        put(&mut page, at, &entry.span.start.0.to_le_bytes());
        put(&mut page, at + 8, &entry.span.size.to_le_bytes());
        put(&mut page, at + 16, &(entry.kind as u32).to_le_bytes());
    }
    Ok(page)
}
