//! The host's state, which every exit comes back to: that of the processor that runs this, as it is now.

use crate::switch;
use crate::vmcs::{Fields, host};
use core::arch::asm;
use cpu_hardware::processor::{cpuid, read_msr};
use x86_defs::msr;

#[repr(C, packed)]
#[derive(Default)]
struct TablePointer {
    limit: u16,
    base: u64,
}

/// This processor's number among the machine's.
pub fn processor_number() -> u32 {
    match cpuid(0, 0)[0] {
        0xB.. if cpuid(0xB, 0)[1] != 0 => cpuid(0xB, 0)[3],
        _ => cpuid(1, 0)[1] >> 24,
    }
}

/// Writes it down.
///
/// # Safety
/// In 64-bit mode at privilege level 0, with a task register loaded from the current GDT.
pub unsafe fn write(fields: &mut impl Fields) {
    let (mut gdt, mut idt) = (TablePointer::default(), TablePointer::default());
    let (cs, ss, tr): (u16, u16, u16);
    let (cr0, cr3, cr4): (u64, u64, u64);
    // SAFETY: only reads registers.
    unsafe {
        asm!("sgdt [{}]", "sidt [{}]", in(reg) &raw mut gdt, in(reg) &raw mut idt, options(nostack));
        asm!("mov {0:x}, cs", "mov {1:x}, ss", "str {2:x}", out(reg) cs, out(reg) ss, out(reg) tr,
            options(nomem, nostack));
        asm!("mov {}, cr0", "mov {}, cr3", "mov {}, cr4", out(reg) cr0, out(reg) cr3, out(reg) cr4,
            options(nomem, nostack));
    }
    let descriptor = core::ptr::with_exposed_provenance::<u64>(gdt.base as usize + usize::from(tr & !7));
    // SAFETY: the caller vouches for the task register; its descriptor has two words.
    let (low, high) = unsafe { (descriptor.read_unaligned(), descriptor.add(1).read_unaligned()) };
    let tr_base = low >> 16 & 0xFF_FFFF | (low >> 56) << 24 | high << 32;
    // SAFETY: every 64-bit processor has them.
    let read = |number| unsafe { read_msr(number) };
    for (field, value) in [
        (host::CS, u64::from(cs & !7)),
        (host::SS, u64::from(ss & !7)),
        (host::DS, u64::from(ss & !7)),
        (host::ES, u64::from(ss & !7)),
        (host::FS, 0),
        (host::GS, 0),
        (host::TR, u64::from(tr & !7)),
        (host::CR0, cr0),
        (host::CR3, cr3),
        (host::CR4, cr4),
        (host::FS_BASE, read(msr::FS_BASE)),
        (host::GS_BASE, read(msr::GS_BASE)),
        (host::TR_BASE, tr_base),
        (host::GDTR_BASE, gdt.base),
        (host::IDTR_BASE, idt.base),
        (host::EFER, read(msr::EFER)),
        (host::PAT, read(msr::PAT)),
        // The host's code makes no system calls.
        (host::SYSENTER_CS, 0),
        (host::SYSENTER_ESP, 0),
        (host::SYSENTER_EIP, 0),
        (host::RIP, switch::exit_address()),
    ] {
        fields.set(field, value);
    }
}
