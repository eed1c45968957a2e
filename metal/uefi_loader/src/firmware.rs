//! What talks to the firmware. The image is inside (`BEDPLATE_METAL_IMAGE` names it at build time: `cargo xtask metal build`
//! does); the bundle is `\bedplate\bundle.cpio` on the volume that we come from.

extern crate alloc;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::arch::asm;
use uefi::boot::{self, AllocateType, OpenProtocolAttributes, OpenProtocolParams};
use uefi::mem::memory_map::{MemoryMap, MemoryType};
use uefi::prelude::*;
use uefi::proto::console::gop::{GraphicsOutput, PixelFormat};
use uefi::table::cfg::ConfigTableEntry;
use uefi::{cstr16, fs, println, system};
use uefi_loader::elf::Image;
use uefi_loader::start_info::{self, MAX_BYTES, Range};

static IMAGE: &[u8] = include_bytes!(env!("BEDPLATE_METAL_IMAGE"));
const PAGE: u64 = 4096;
/// The image maps this much before it reads what it is handed.
const FOUR_GIB: u64 = 4 << 30;

/// Comes back only if the image cannot be entered.
pub fn run() -> Status {
    println!("bedplate-metal: UEFI loader");
    match load() {
        Ok(never) => match never {},
        Err(reason) => {
            println!("bedplate-metal cannot start: {reason}");
            Status::LOAD_ERROR
        }
    }
}

fn load() -> Result<core::convert::Infallible, String> {
    let image = Image::read(IMAGE).map_err(|error| error.to_string())?;
    let bundle = bundle();
    let block_pages = MAX_BYTES.div_ceil(PAGE as usize);
    let at =
        boot::allocate_pages(AllocateType::MaxAddress(FOUR_GIB - 1), MemoryType::LOADER_DATA, block_pages)
            .map_err(|error| format!("no memory for what is handed over: {error}"))?;
    check_place(&image)?;
    let rsdp = rsdp();
    let screen = screen().unwrap_or_default();
    // Room now: after boot services nothing can be allocated.
    let mut ranges = Vec::with_capacity(1024);
    // SAFETY: nothing of boot services is used from here on; interrupts are switched off at once.
    let map = unsafe {
        let map = boot::exit_boot_services(None);
        asm!("cli", options(nostack));
        map
    };
    for entry in map.entries() {
        let range = Range { start: entry.phys_start, bytes: entry.page_count * PAGE, kind: kind(entry.ty) };
        if ranges.len() < ranges.capacity() {
            start_info::add(&mut ranges, range);
        }
    }
    // SAFETY: the block's pages are ours; the image's place was free for it, as checked, and boot services, which
    // may have been there, are gone. Memory is mapped one to one (UEFI 2.10, 2.3.4).
    unsafe { enter(&image, at.as_ptr(), &ranges, bundle, rsdp, &screen) }
}

/// Start and length of the bundle; it is never freed.
fn bundle() -> Option<(u64, u64)> {
    let volume = match boot::get_image_file_system(boot::image_handle()) {
        Ok(volume) => volume,
        Err(error) => {
            println!("the volume cannot be read: {error}");
            return None;
        }
    };
    match fs::FileSystem::new(volume).read(cstr16!("\\bedplate\\bundle.cpio")) {
        Ok(bytes) => {
            println!("bundle: {} KiB", bytes.len() >> 10);
            let bytes = bytes.leak();
            Some((bytes.as_ptr().addr() as u64, bytes.len() as u64))
        }
        Err(error) => {
            println!("no bundle: {error}");
            None
        }
    }
}

/// The image lies at a fixed place: it must be RAM, and not where we are.
fn check_place(image: &Image) -> Result<(), String> {
    let map = boot::memory_map(MemoryType::LOADER_DATA).map_err(|error| format!("no memory map: {error}"))?;
    let place = image.extent();
    let mut covered = 0;
    for entry in map.entries() {
        let (start, end) = (entry.phys_start, entry.phys_start + entry.page_count * PAGE);
        let free =
            kind(entry.ty) == 1 && entry.ty != MemoryType::LOADER_CODE && entry.ty != MemoryType::LOADER_DATA;
        if free {
            covered += end.min(place.end).saturating_sub(start.max(place.start));
        }
    }
    if covered < place.end - place.start {
        return Err(format!(
            "memory at {:#x}-{:#x}, where the image goes, is not free",
            place.start, place.end
        ));
    }
    Ok(())
}

fn kind(ty: MemoryType) -> u32 {
    match ty {
        MemoryType::CONVENTIONAL
        | MemoryType::LOADER_CODE
        | MemoryType::LOADER_DATA
        | MemoryType::BOOT_SERVICES_CODE
        | MemoryType::BOOT_SERVICES_DATA => 1,
        MemoryType::ACPI_RECLAIM => 3,
        MemoryType::ACPI_NON_VOLATILE => 4,
        MemoryType::UNUSABLE => 5,
        _ => 2,
    }
}

/// The first screen, in the image's words; `None`: there is none whose pixels are in memory.
fn screen() -> Option<String> {
    let handle = boot::get_handle_for_protocol::<GraphicsOutput>().ok()?;
    let wanted = OpenProtocolParams { handle, agent: boot::image_handle(), controller: None };
    // SAFETY: firmware's console goes on using it; we only ask.
    let screen =
        unsafe { boot::open_protocol::<GraphicsOutput>(wanted, OpenProtocolAttributes::GetProtocol) };
    let mut screen = screen.ok()?;
    let mode = screen.current_mode_info();
    if mode.pixel_format() == PixelFormat::BltOnly {
        return None;
    }
    let ((width, height), at) = (mode.resolution(), screen.frame_buffer().as_mut_ptr().addr());
    Some(format!("screen={at},{width},{height},{}", mode.stride()))
}

fn rsdp() -> u64 {
    system::with_config_table(|tables| {
        let found =
            |guid| tables.iter().find(|table| table.guid == guid).map(|table| table.address.addr() as u64);
        found(ConfigTableEntry::ACPI2_GUID).or_else(|| found(ConfigTableEntry::ACPI_GUID)).unwrap_or(0)
    })
}

/// # Safety
/// Boot services are gone, interrupts off; `at` has room for the block, the image's place is free.
unsafe fn enter(
    image: &Image,
    at: *mut u8,
    ranges: &[Range],
    bundle: Option<(u64, u64)>,
    rsdp: u64,
    command_line: &str,
) -> ! {
    // What is allocated from here on comes from nowhere: so the block is made in place, without the allocator.
    let mut block = [0u8; MAX_BYTES];
    let bytes = start_info::write(&mut block, at.addr() as u64, ranges, bundle, rsdp, command_line);
    // SAFETY: the caller vouches for both places; they do not overlap what is read.
    unsafe {
        at.copy_from_nonoverlapping(block.as_ptr(), bytes);
        for segment in &image.segments {
            let to = core::ptr::with_exposed_provenance_mut::<u8>(segment.physical as usize);
            let from = &IMAGE[segment.file.clone()];
            to.write_bytes(0, segment.memory_bytes as usize);
            to.copy_from_nonoverlapping(from.as_ptr(), from.len());
        }
        asm!("mov rdi, {info}", "jmp {entry}", info = in(reg) at, entry = in(reg) image.entry, options(noreturn));
    }
}
