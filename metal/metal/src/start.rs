//! From the boot code to a running hypervisor: the order of steps.

use crate::acpi::{Acpi, Iommu};
use crate::arch::paging::{self, PageTables};
use crate::arch::{self, clock, image, interrupts, lapic, pci, processors, serial};
use crate::boot_info::{BootInfo, ReadPhysical};
use crate::heap::Heap;
use crate::memory::FreeMemory;
use crate::panic::refuse;
use alloc::vec::Vec;

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
    show_memory(&info);
    let mut free = FreeMemory::of(&info.memory);
    let own = image::image();
    free.reserve(own.all.start, own.all.end - own.all.start);
    info.modules.iter().flatten().for_each(|module| free.reserve(module.start, module.bytes));
    claim_heap(heap, &mut free);
    let functions = pci::virtio_functions();
    let registers: Vec<_> = functions.iter().flat_map(|function| function.registers.clone()).collect();
    let acpi = Acpi::read(&OneToOne, info.rsdp);
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
    show_acpi(&acpi);
    crate::ground::run(&info, &acpi, free, &functions)
}

fn show_memory(info: &BootInfo) {
    crate::log!("memory map:");
    for range in info.memory.ranges() {
        crate::log!("  {:#014x}-{:#014x} {}", range.start, range.end(), range.kind.name());
    }
    crate::log!("usable memory: {} MiB", info.memory.usable_bytes() / MIB);
}

fn show_acpi(acpi: &Acpi) {
    let iommu = acpi.iommu.map_or("none", Iommu::name);
    crate::log!("processors: {}, IOMMU: {iommu}", acpi.processors.len().max(1));
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
