//! What a guest leaves in the x87 unit is nobody else's: what the hypervisor's interpreter computes with the same unit is
//! right, and is not hit by what waits there.

use crate::guest::NOTHING;
use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};
use metal::arch::interrupts;

/// The local APIC's interrupt command register, and an NMI for processor 0.
const COMMAND: usize = 0xFEE0_0300;
const NMI: u32 = 1 << 14 | 4 << 8;
/// CR0: x87 errors are exceptions.
const CR0_NE: u64 = 1 << 5;
/// All exceptions but that of a division by zero are masked.
static CONTROL: u16 = 0x37B;

static NMIS: AtomicU32 = AtomicU32::new(0);
static SUM: AtomicU32 = AtomicU32::new(0);

/// 1 + -1 with all other registers in use. -1 is read from where nothing is: the interpreter adds.
pub fn sum_with_a_full_stack() -> i32 {
    let mut sum = i32::MAX;
    // SAFETY: the unit is nobody's; reading there has no effect.
    unsafe {
        asm!(
            "fninit",
            ".rept 8",
            "fld1",
            ".endr",
            "fiadd dword ptr [{nothing}]",
            "fistp dword ptr [{sum}]",
            "fninit",
            nothing = in(reg) NOTHING,
            sum = in(reg) &raw mut sum,
        );
    }
    sum
}

/// 1 + 1 in a handler of NMIs for which another NMI waits: the interpreter runs it step by step. What it was called from
/// has made an error that is not masked and not yet told.
pub fn sum_while_an_error_waits() -> u32 {
    interrupts::on_nmi(handle_nmi);
    // SAFETY: the unit is nobody's; 1 is divided by 0.
    unsafe {
        asm!("mov {t}, cr0", "or {t}, {ne}", "mov cr0, {t}", t = out(reg) _, ne = const CR0_NE);
        asm!("fninit", "fldcw [{}]", "fld1", "fldz", "fdivp", in(reg) &raw const CONTROL);
    }
    send_nmi();
    while NMIS.load(SeqCst) < 2 {
        core::hint::spin_loop();
    }
    // SAFETY: as above.
    unsafe { asm!("fninit") };
    SUM.load(SeqCst)
}

fn handle_nmi() {
    if NMIS.fetch_add(1, SeqCst) > 0 {
        return;
    }
    send_nmi();
    let mut sum = 0;
    // SAFETY: whoever was interrupted begins anew with the unit.
    unsafe { asm!("fninit", "fld1", "fld1", "faddp", "fistp dword ptr [{}]", in(reg) &raw mut sum) };
    SUM.store(sum, SeqCst);
}

fn send_nmi() {
    let command = core::ptr::with_exposed_provenance_mut::<u32>(COMMAND);
    // SAFETY: a register of the local APIC, mapped one to one; the other half of the command is 0: processor 0.
    unsafe { command.write_volatile(NMI) };
}
