//! From the boot code to a running hypervisor: the order of steps.

use crate::acpi::Acpi;
use crate::arch::dma::{self, ARENA_BYTES};
use crate::arch::iommu::{self, REGISTER_BYTES};
use crate::arch::paging::{self, PageTables};
use crate::arch::pci::VirtioFunction;
use crate::arch::{self, clock, image, interrupts, lapic, pci, processors, screen, serial};
use crate::boot_info::{BootInfo, ReadPhysical};
use crate::heap::Heap;
use crate::iommu::{DeviceId, Iommu};
use crate::memory::{FreeMemory, MemoryKind};
use crate::panic::refuse;
use crate::screen::Framebuffer;
use alloc::vec::Vec;
use virtio_drivers::transport::pci::bus::DeviceFunction;

/// The boot code maps this much; the heap must be in it.
const BOOT_MAPPED: u64 = 4 << 30;
/// The heap; a smaller machine gives an eighth.
const HEAP_BYTES: u64 = 64 << 20;
/// With less there is no use in starting.
const MIN_HEAP_BYTES: u64 = 4 << 20;
const MIB: u64 = 1 << 20;

/// Physical memory through the boot code's map.
struct OneToOne;

impl ReadPhysical for OneToOne {
    fn read(&self, at: u64, to: &mut [u8]) {
        for (n, byte) in (0..).zip(to) {
            let from = core::ptr::with_exposed_provenance::<u8>((at + n) as usize);
            // SAFETY: the boot code maps the first 4 GiB, where loaders put what they hand over; reading RAM or
            // registers there has no effect on us.
            *byte = if at + n < BOOT_MAPPED { unsafe { from.read_volatile() } } else { 0xFF };
        }
    }
}

/// Does not come back. `start_info` is the loader's structure.
pub fn start(start_info: u64, heap: &Heap) -> ! {
    serial::initialize();
    crate::log!("bedplate-metal {}", crate::VERSION);
    let info = match BootInfo::read(&OneToOne, start_info) {
        Ok(info) => info,
        Err(error) => refuse(format_args!("{error}")),
    };
    let framebuffer = framebuffer(&info);
    if let Some(framebuffer) = framebuffer.filter(|f| f.range().end <= BOOT_MAPPED) {
        // SAFETY: the boot code maps it, and `one_to_one` will; it is no RAM.
        unsafe { screen::set_framebuffer(framebuffer) };
    }
    show_memory(&info);
    let mut free = FreeMemory::of(&info.memory);
    let own = image::image();
    free.reserve(own.all.start, own.all.end - own.all.start);
    info.modules.iter().flatten().for_each(|module| free.reserve(module.start, module.bytes));
    claim_heap(heap, &mut free);
    let functions = pci::virtio_functions();
    let acpi = Acpi::read(&OneToOne, info.rsdp);
    let registers = functions.iter().flat_map(|function| function.registers.clone());
    let units = acpi.iommu.iter().flat_map(Iommu::registers);
    let registers = registers.chain(units.map(|at| at..at.saturating_add(REGISTER_BYTES)));
    let registers: Vec<_> = registers.chain(framebuffer.map(|f| f.range())).collect();
    let others = acpi.processors.len().saturating_sub(1);
    let guards = processors::take_stacks(others, &mut free);
    let tables = paging::set_own(PageTables::one_to_one(&info.memory, &own, &registers, &guards));
    // SAFETY: they map everything where the boot code has it, and live for ever; this processor is at level 0 in
    // 64-bit mode with interrupts off.
    unsafe {
        tables.activate();
        interrupts::install();
        processors::set_number(0);
    }
    let mapped =
        |f: &Framebuffer| [f.range().start, f.range().end - 1].iter().all(|at| tables.entry(*at) != 0);
    if let Some(framebuffer) = framebuffer.filter(mapped) {
        // SAFETY: its tables map it; it is no RAM.
        unsafe { screen::set_framebuffer(framebuffer) };
    }
    lapic::mask_legacy_controllers();
    clock::initialize();
    lapic::initialize();
    crate::log!(
        "processor {}: TSC {} kHz, APIC timer {} Hz",
        lapic::id(),
        clock::tsc_khz(),
        lapic::timer_hz()
    );
    crate::log!("free memory: {} MiB", free.bytes() / MIB);
    arch::enable_interrupts();
    crate::log!("processors: {}", acpi.processors.len().max(1));
    start_iommu(&acpi, &functions, &mut free);
    crate::ground::run(&info, &acpi, free, &functions)
}

/// What the loader tells of, if it is not in RAM.
fn framebuffer(info: &BootInfo) -> Option<Framebuffer> {
    let found = Framebuffer::parse(info.command_line())?;
    let place = found.range();
    let mut ram = info.memory.ranges().iter().filter(|range| range.kind != MemoryKind::Reserved);
    let free = ram.all(|range| range.end() <= place.start || range.start >= place.end);
    free.then_some(found)
}

fn show_memory(info: &BootInfo) {
    crate::log!("memory map:");
    for range in info.memory.ranges() {
        crate::log!("  {:#014x}-{:#014x} {}", range.start, range.end(), range.kind.name());
    }
    crate::log!("usable memory: {} MiB", info.memory.usable_bytes() / MIB);
}

/// Has the machine's IOMMUs hold devices to the arena.
fn start_iommu(acpi: &Acpi, functions: &[VirtioFunction], free: &mut FreeMemory) {
    let Some(iommu) = &acpi.iommu else { return crate::log!("IOMMU: none") };
    let (name, units) = (iommu.name(), iommu.registers().len());
    if units == 0 {
        return crate::log!("IOMMU: {name}, which is not used: it has no registers");
    }
    let Some(start) = free.take(ARENA_BYTES, 4096, BOOT_MAPPED) else {
        refuse(format_args!("no {} MiB of memory in one piece for devices", ARENA_BYTES / MIB));
    };
    let arena = start..start + ARENA_BYTES;
    let id = |place: DeviceFunction| {
        u16::from(place.bus) << 8 | u16::from(place.device) << 3 | u16::from(place.function)
    };
    let devices: Vec<_> = functions.iter().map(|function| DeviceId(id(function.place))).collect();
    // SAFETY: firmware tells of the units, and our tables map them; the arena was free; no driver was started.
    let tables = unsafe {
        dma::set_arena(arena.clone());
        iommu::start(iommu, &devices, arena)
    };
    match tables {
        Ok(tables) => crate::log!(
            "IOMMU: {name}, {units} in use: {} devices reach {} KiB and nothing else (tables {} KiB)",
            devices.len(),
            ARENA_BYTES >> 10,
            tables >> 10
        ),
        Err(error) => refuse(format_args!("{error}")),
    }
}

fn claim_heap(heap: &Heap, free: &mut FreeMemory) {
    let bytes = HEAP_BYTES.min(free.bytes() / 8) & !0xFFF;
    if bytes < MIN_HEAP_BYTES {
        refuse(format_args!("too little memory: {} MiB are free", free.bytes() / MIB));
    }
    let claimed = free.take(bytes, 4096, BOOT_MAPPED).is_some_and(|at| {
        let start = core::ptr::with_exposed_provenance_mut(at as usize);
        // SAFETY: the range was free RAM, is nobody else's from now on, and stays mapped one to one.
        unsafe { heap.claim(start, bytes as usize) }
    });
    if !claimed {
        refuse(format_args!("no {} MiB of memory in one piece for the heap", bytes / MIB));
    }
}
