//! The machine's other processors: started one by one (INIT, SIPI: SDM vol. 3, 9.4.4), each with tables and a stack of
//! its own, and known by a number that its GS base leads to.
//!
//! Called by: [`crate::start`] (stacks, numbers), `ground` (once there is something to run). Processor 0 is the one that
//! was booted. Invariant: GS base is the hypervisor's wherever its code runs: engines give it back at every exit.

use super::{clock, image, interrupts, lapic, paging};
use crate::acpi::MAX_PROCESSORS;
use crate::memory::{FreeMemory, MemoryKind, MemoryMap};
use alloc::vec::Vec;
use core::convert::Infallible;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use spin::Once;
use x86_defs::msr;

const PAGE: u64 = 4096;
/// As large as the booted one's: a vCPU is built on it before it moves to the heap.
const STACK_BYTES: u64 = 2 << 20;
/// Stacks are where the boot code's tables map memory.
const BOOT_MAPPED: u64 = 4 << 30;
/// SIPI's vector is a page below this.
const REAL_MODE: u64 = 0xA_0000;
/// How long a processor may take to come (in nanoseconds).
const PATIENCE_NS: u64 = 1_000_000_000;
const INIT_NS: u64 = 10_000_000;
const SIPI_NS: u64 = 200_000;

/// What GS base leads to.
static NUMBERS: [u64; MAX_PROCESSORS] = numbers();

const fn numbers() -> [u64; MAX_PROCESSORS] {
    let mut all = [0; MAX_PROCESSORS];
    let mut n = 0;
    while n < MAX_PROCESSORS {
        all[n] = n as u64;
        n += 1;
    }
    all
}

/// What a processor does once it is ready; it does not come back.
pub type Entry = &'static (dyn Fn() -> Infallible + Sync);

/// The number of the processor that is starting.
static STARTING: AtomicUsize = AtomicUsize::new(0);
/// How many run.
static RUNNING: AtomicUsize = AtomicUsize::new(1);
static ENTRY: Once<Entry> = Once::new();
/// Stacks of processors 1 and on, without their guard pages.
static STACKS: Once<Vec<Range<u64>>> = Once::new();

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("processors.s"), started = sym started);

/// The number of the processor that runs this.
#[inline(always)]
pub fn number() -> usize {
    #[cfg(target_os = "none")]
    {
        let number: u64;
        // SAFETY: GS base leads to an element of `NUMBERS` from `set_number` on, which is before anybody asks.
        unsafe {
            core::arch::asm!("mov {}, gs:[0]", out(reg) number, options(nostack, pure, readonly, preserves_flags));
        }
        number as usize
    }
    #[cfg(not(target_os = "none"))]
    0
}

/// How many processors run.
pub fn running() -> usize {
    RUNNING.load(SeqCst)
}

/// This processor is `number` from now on.
///
/// # Safety
/// No other processor is, and this one runs at level 0.
pub unsafe fn set_number(number: usize) {
    // SAFETY: the register exists; nothing but `number` uses GS.
    unsafe { super::write_msr(msr::GS_BASE, (&raw const NUMBERS[number]).expose_provenance() as u64) };
}

/// Takes memory for the stacks of `count` processors; their guard pages, which are not to be mapped.
pub fn take_stacks(count: usize, free: &mut FreeMemory) -> Vec<u64> {
    let taken = (0..count).map_while(|_| free.take(PAGE + STACK_BYTES, PAGE, BOOT_MAPPED));
    let guards: Vec<u64> = taken.collect();
    STACKS.call_once(|| guards.iter().map(|at| at + PAGE..at + PAGE + STACK_BYTES).collect());
    guards
}

/// What the stacks take.
pub fn stack_bytes() -> u64 {
    STACKS.get().map_or(0, |all| all.len() as u64 * STACK_BYTES)
}

/// The stack that `address` lies on, if it is another processor's than the booted one's.
pub fn stack_of(address: u64) -> Option<Range<u64>> {
    STACKS.get()?.iter().find(|stack| stack.contains(&address)).cloned()
}

/// Whether `address` lies in the page below a stack.
pub fn is_guard(address: u64) -> bool {
    let below = |stack: &Range<u64>| (stack.start - PAGE..stack.start).contains(&address);
    image::image().guard.contains(&address) || STACKS.get().is_some_and(|all| all.iter().any(below))
}

/// A page of RAM below [`REAL_MODE`] for the first instructions.
fn low_page(map: &MemoryMap) -> Option<u64> {
    let usable = map.ranges().iter().filter(|range| range.kind == MemoryKind::Usable);
    let inside = |at: u64| {
        let clash = |range: &&crate::memory::MemoryRange| {
            range.kind != MemoryKind::Usable && range.start < at + PAGE && range.end() > at
        };
        !map.ranges().iter().any(|range| clash(&range))
    };
    let fits = |range: &crate::memory::MemoryRange| {
        let first = range.start.max(PAGE).next_multiple_of(PAGE);
        let last = range.end().min(REAL_MODE);
        (first..last).step_by(PAGE as usize).find(|at| at + PAGE <= last && inside(*at))
    };
    usable.filter_map(fits).min()
}

/// Starts the processors whose local APICs are `ids`, each with a stack; they do what `entry` says. How many came.
pub fn start(ids: &[u32], map: &MemoryMap, entry: Entry) -> usize {
    let (Some(stacks), Some(page)) = (STACKS.get(), low_page(map)) else { return 0 };
    ENTRY.call_once(|| entry);
    let (code, first_stack) = first_page();
    copy_page(code, page);
    for (number, (id, stack)) in (1..).zip(ids.iter().zip(stacks)) {
        STARTING.store(number, SeqCst);
        first_stack.store(stack.end, SeqCst);
        let before = running();
        lapic::send_init(*id);
        clock::wait(INIT_NS);
        for _ in 0..2 {
            lapic::send_start(*id, page);
            clock::wait(SIPI_NS);
        }
        let start = clock::now_ns();
        while running() == before && clock::now_ns() - start < PATIENCE_NS {
            core::hint::spin_loop();
        }
        if running() == before {
            // It may still come, and would take the next one's stack: no further.
            crate::log!("processor {id} does not start");
            break;
        }
    }
    running() - 1
}

/// The code for the first page, and the word in which it finds its stack.
#[cfg(target_os = "none")]
fn first_page() -> (&'static [u8], &'static AtomicU64) {
    unsafe extern "C" {
        static ap_page: u8;
        static ap_page_end: u8;
        static ap_stack: AtomicU64;
    }
    let (from, end) = (&raw const ap_page, &raw const ap_page_end);
    // SAFETY: the code lies between the symbols, and never changes; the word is an aligned integer.
    unsafe { (core::slice::from_raw_parts(from, end.addr() - from.addr()), &ap_stack) }
}

/// On a host there is none.
#[cfg(not(target_os = "none"))]
fn first_page() -> (&'static [u8], &'static AtomicU64) {
    static STACK: AtomicU64 = AtomicU64::new(0);
    (&[], &STACK)
}

fn copy_page(code: &[u8], page: u64) {
    let to = core::ptr::with_exposed_provenance_mut::<u8>(page as usize);
    // SAFETY: the code is less than a page; the page is RAM below 1 MiB, which nobody is ever given, mapped one to one.
    unsafe { to.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
}

/// From `processors.s`: on its own stack, with the boot code's tables, interrupts off.
#[cfg_attr(not(target_os = "none"), expect(dead_code, reason = "only the image has its caller"))]
extern "C" fn started() -> ! {
    let number = STARTING.load(SeqCst);
    // SAFETY: once on this processor, which nobody else is; the tables map what is in use where it is, and live for ever.
    unsafe {
        paging::own().activate();
        interrupts::install();
        set_number(number);
    }
    lapic::initialize();
    RUNNING.fetch_add(1, SeqCst);
    match ENTRY.get() {
        Some(entry) => match entry() {},
        None => super::stop(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryRange;

    #[test]
    fn the_first_page_is_ram_that_is_nobody_elses() {
        let map = |ranges: &[(u64, u64, MemoryKind)]| {
            let mut map = MemoryMap::default();
            ranges.iter().for_each(|(start, bytes, kind)| {
                map.add(MemoryRange { start: *start, bytes: *bytes, kind: *kind })
            });
            map
        };
        use MemoryKind::*;
        assert_eq!(low_page(&map(&[(0, 0x9_FC00, Usable)])), Some(0x1000));
        assert_eq!(low_page(&map(&[(0, 0x9_FC00, Usable), (0x1800, 0x1000, Reserved)])), Some(0x3000));
        assert_eq!(low_page(&map(&[(0x8_0001, 0x1FFF, Usable)])), Some(0x8_1000));
        assert_eq!(low_page(&map(&[(0x10_0000, 1 << 30, Usable)])), None);
    }
}
