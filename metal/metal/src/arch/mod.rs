//! The processor and the board that we run on: the only code of this crate with privileged instructions.
//!
//! Called by: all of `metal`. Invariants: guest code never runs on these tables; interrupt handlers take no lock and
//! allocate nothing.

pub mod clock;
pub mod dma;
pub mod image;
pub mod interrupts;
pub mod iommu;
pub mod lapic;
pub mod msix;
pub mod paging;
pub mod pci;
pub mod processors;
pub mod rtc;
pub mod screen;
pub mod serial;
pub mod transport;

use core::arch::asm;
pub use cpu_hardware::processor::{read_msr, tsc, write_msr};

/// IN of a byte.
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: ports are the hypervisor's own; no memory is touched.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// OUT of a byte.
pub fn out8(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// IN of four bytes.
pub fn in32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// OUT of four bytes.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// OUT of two bytes.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// Switches interrupts on.
pub fn enable_interrupts() {
    // SAFETY: handlers are installed before anybody calls this; they take no locks.
    unsafe { asm!("sti", options(nostack)) };
}

/// Switches interrupts off.
pub fn disable_interrupts() {
    // SAFETY: nothing depends on interrupts to stay sound.
    unsafe { asm!("cli", options(nostack)) };
}

/// Whether they are on.
pub fn interrupts_are_on() -> bool {
    let flags: u64;
    // SAFETY: only reads the flags.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags, options(preserves_flags)) };
    flags & x86_defs::flags::IF != 0
}

/// Waits for an interrupt, with interrupts on from the same moment on: none is missed in between. The caller has them
/// off.
pub fn wait_for_interrupt() {
    // SAFETY: STI holds interrupts off for one instruction, so that HLT sees what comes after it.
    unsafe { asm!("sti", "hlt", options(nostack)) };
}

/// Writes back whatever is in this processor's caches only: for hardware that does not look there.
pub fn write_caches_back() {
    // SAFETY: memory stays as it is.
    unsafe { asm!("wbinvd", options(nostack, preserves_flags)) };
}

/// The frame pointer of the caller.
#[inline(always)]
pub fn frame_pointer() -> u64 {
    let value: u64;
    // SAFETY: only reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Ends the machine that we run on if it is an emulator that listens; otherwise stops this processor for good. `good`:
/// whether it ends as it should.
pub fn power_off(good: bool) -> ! {
    lapic::stop_others();
    // QEMU's isa-debug-exit: status 2·value + 1.
    out8(0xF4, if good { 0x10 } else { 0x11 });
    b"Shutdown".iter().for_each(|byte| out8(0x8900, *byte));
    stop()
}

/// This processor does nothing any more.
pub fn stop() -> ! {
    loop {
        disable_interrupts();
        // SAFETY: nothing more is to happen.
        unsafe { asm!("hlt", options(nomem, nostack)) };
    }
}
