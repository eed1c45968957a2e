//! The local APIC of the processor that we run on: its timer, and messages to other processors. In xAPIC mode through
//! its page, in x2APIC mode (as some firmware leaves it) through MSRs.

use super::interrupts::{SPURIOUS_VECTOR, TIMER_VECTOR, WAKE_VECTOR};
use super::{clock, out8, read_msr, write_msr};
use core::sync::atomic::{AtomicU64, Ordering};
use x86_defs::msr;

const ID: u32 = 0x2;
const EOI: u32 = 0xB;
const SPURIOUS: u32 = 0xF;
const LVT_TIMER: u32 = 0x32;
const INITIAL_COUNT: u32 = 0x38;
const CURRENT_COUNT: u32 = 0x39;
const DIVIDE: u32 = 0x3E;
const MASKED: u32 = 1 << 16;
/// Software enable.
const ENABLE: u32 = 1 << 8;
/// Divide by 16.
const BY_16: u32 = 3;

/// Timer ticks in a second; 0 before calibration.
static HZ: AtomicU64 = AtomicU64::new(0);

fn base() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { read_msr(msr::APIC_BASE) }
}

fn page(base: u64, register: u32) -> *mut u32 {
    core::ptr::with_exposed_provenance_mut(((base & 0xF_FFFF_F000) + u64::from(register) * 16) as usize)
}

fn read(register: u32) -> u32 {
    let base = base();
    // SAFETY: in x2APIC mode the registers are MSRs, otherwise they are in a page that is mapped uncached.
    unsafe {
        if base & msr::APIC_BASE_X2APIC != 0 {
            read_msr(msr::X2APIC_FIRST + register) as u32
        } else {
            page(base, register).read_volatile()
        }
    }
}

fn write(register: u32, value: u32) {
    let base = base();
    // SAFETY: as above; the registers written here affect this processor's interrupts only.
    unsafe {
        if base & msr::APIC_BASE_X2APIC != 0 {
            write_msr(msr::X2APIC_FIRST + register, u64::from(value));
        } else {
            page(base, register).write_volatile(value);
        }
    }
}

/// This processor's id.
pub fn id() -> u32 {
    // SAFETY: as in `base`.
    let wide = base() & msr::APIC_BASE_X2APIC != 0;
    if wide { read(ID) } else { read(ID) >> 24 }
}

/// Silences the 8259s, whose vectors are the exceptions'.
pub fn mask_legacy_controllers() {
    out8(0x21, 0xFF);
    out8(0xA1, 0xFF);
}

/// Enables it; without a timer.
pub fn enable() {
    write(SPURIOUS, ENABLE | u32::from(SPURIOUS_VECTOR));
}

/// Enables it, with the timer not running, and measures the timer (on the first processor).
pub fn initialize() {
    enable();
    write(DIVIDE, BY_16);
    write(LVT_TIMER, MASKED | u32::from(TIMER_VECTOR));
    if HZ.load(Ordering::Relaxed) == 0 {
        write(INITIAL_COUNT, u32::MAX);
        let hz = clock::rate_of(|| u64::from(u32::MAX - read(CURRENT_COUNT)));
        write(INITIAL_COUNT, 0);
        HZ.store(hz, Ordering::Relaxed);
    }
    write(LVT_TIMER, u32::from(TIMER_VECTOR));
}

/// Timer ticks in a second.
pub fn timer_hz() -> u64 {
    HZ.load(Ordering::Relaxed)
}

/// One timer interrupt `ns` from now, in place of any that was to come.
pub fn interrupt_in(ns: u64) {
    let ticks = u128::from(ns) * u128::from(timer_hz()) / 1_000_000_000;
    write(INITIAL_COUNT, ticks.clamp(1, u128::from(u32::MAX)) as u32);
}

/// Whether messages reach the local APIC `id`. Without x2APIC mode a destination has eight bits, and 255 is everybody.
pub fn is_in_reach(id: u32) -> bool {
    reaches(base() & msr::APIC_BASE_X2APIC != 0, id)
}

fn reaches(x2apic: bool, id: u32) -> bool {
    id < if x2apic { u32::MAX } else { 0xFF }
}

/// Interrupt command register: delivery modes and the like (SDM vol. 3, 11.6.1).
const COMMAND: u32 = 0x30;
const COMMAND_HIGH: u32 = 0x31;
const ASSERT: u32 = 1 << 14;
const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const START_UP: u32 = 6 << 8;
const ALL_BUT_SELF: u32 = 3 << 18;
/// Delivery status: the last command is under way. Not in x2APIC mode.
const UNDER_WAY: u32 = 1 << 12;

fn send(id: u32, command: u32) {
    if base() & msr::APIC_BASE_X2APIC != 0 {
        // SAFETY: as in `write`; one register in this mode.
        unsafe { write_msr(msr::X2APIC_FIRST + COMMAND, u64::from(id) << 32 | u64::from(command)) };
        return;
    }
    // An interrupt handler may send, too: the two halves belong together.
    let on = super::interrupts_are_on();
    super::disable_interrupts();
    while read(COMMAND) & UNDER_WAY != 0 {
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, id << 24);
    write(COMMAND, command);
    if on {
        super::enable_interrupts();
    }
}

/// The processor whose local APIC is `id` is reset, and waits for [`send_start`].
pub fn send_init(id: u32) {
    send(id, INIT | ASSERT);
}

/// It starts in real mode at `page`, below 1 MiB.
pub fn send_start(id: u32, page: u64) {
    send(id, START_UP | ASSERT | (page >> 12) as u32 & 0xFF);
}

/// It looks up from what it does.
pub fn send_wake(id: u32) {
    send(id, ASSERT | u32::from(WAKE_VECTOR));
}

/// All other processors do nothing any more.
pub fn stop_others() {
    super::interrupts::stop_at_nmi();
    if super::processors::running() > 1 {
        send(0, NMI | ASSERT | ALL_BUT_SELF);
    }
}

/// The interrupt under way is done.
pub fn end_of_interrupt() {
    write(EOI, 0);
}

#[cfg(test)]
mod tests {
    use super::reaches;

    #[test]
    fn destinations_have_eight_bits_without_x2apic() {
        assert!(reaches(false, 0) && reaches(false, 254));
        assert!(!reaches(false, 255) && !reaches(false, 256 + 1), "everybody, and another processor");
        assert!(reaches(true, 255) && reaches(true, 0x1_0000) && !reaches(true, u32::MAX));
    }
}
