//! VMLAUNCH and VMRESUME and what must be around them, and the other instructions of VMX.
//!
//! Invariants: with interrupts off, nothing of the host runs between the last look at what is wanted and the guest, so
//! that no wish is missed: an interrupt that comes meanwhile exits the guest at once, and is taken when they are on again.

use crate::vmcs::{Field, Fields, host};
use core::arch::{asm, global_asm};
use core::sync::atomic::AtomicU32;
use cpu_hardware::Gate;

// RDI: general registers by encoding number. ESI: whether this VMCS was launched. RDX: a word with bits of which those in
// ECX keep the guest out; R8: another word, all of whose bits do. EAX: see `Entered`.
global_asm!(
    ".global bedplate_vmx_enter",
    "bedplate_vmx_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cli",
    "xor eax, eax",
    "test dword ptr [rdx], ecx",
    "jnz 3f",
    "cmp dword ptr [r8], 0",
    "jne 3f",
    "push rdi",
    "mov eax, {host_rsp}",
    "vmwrite rax, rsp",
    "test esi, esi",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "jnz 2f",
    "vmlaunch",
    "jmp 4f",
    "2:",
    "vmresume",
    "4:",
    "pop rdi",
    "mov eax, 2",
    "jmp 3f",
    ".global bedplate_vmx_exit",
    "bedplate_vmx_exit:",
    "push rdi",
    "mov rdi, [rsp + 8]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 40], rbp",
    "mov [rdi + 48], rsi",
    "mov [rdi + 64], r8",
    "mov [rdi + 72], r9",
    "mov [rdi + 80], r10",
    "mov [rdi + 88], r11",
    "mov [rdi + 96], r12",
    "mov [rdi + 104], r13",
    "mov [rdi + 112], r14",
    "mov [rdi + 120], r15",
    "pop rax",
    "mov [rdi + 56], rax",
    "pop rdi",
    "mov eax, 1",
    "3:",
    "sti",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    host_rsp = const host::RSP.0,
);

unsafe extern "sysv64" {
    fn bedplate_vmx_enter(
        gpr: *mut u64,
        launched: u32,
        attention: *const AtomicU32,
        mask: u32,
        interrupted: *const AtomicU32,
    ) -> u32;
    static bedplate_vmx_exit: u8;
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// The gate was shut.
    KeptOut,
    /// The guest ran, up to an exit; or the processor refused its state, which is told as an exit.
    Ran,
    /// The processor refused the controls or the host's state.
    Refused,
}

/// Where an exit comes back to.
pub fn exit_address() -> u64 {
    (&raw const bedplate_vmx_exit).addr() as u64
}

/// Runs the guest of the current VMCS up to an exit. Interrupts are on before and after.
///
/// # Safety
/// VMX is on here (`Vmx::enable`). The current VMCS is complete; its bitmaps and tables are those of one guest, whose
/// RAM nobody has references to; its host state is this processor's. What is live in vector registers is the guest's.
pub unsafe fn enter(gpr: &mut [u64; 32], launched: bool, gate: &Gate<'_>) -> Entered {
    // SAFETY: the caller vouches for the guest. The assembly keeps the ABI's registers, and the stack; it writes 16
    // registers.
    let ran = unsafe {
        bedplate_vmx_enter(gpr.as_mut_ptr(), u32::from(launched), gate.attention, gate.mask, gate.interrupted)
    };
    match ran {
        0 => Entered::KeptOut,
        1 => Entered::Ran,
        _ => Entered::Refused,
    }
}

/// VMXON.
///
/// # Safety
/// `at` is the physical address of a region that is the processor's from now on; CR0, CR4 and FEATURE_CONTROL allow it.
pub unsafe fn vmxon(at: u64) {
    // SAFETY: the caller vouches for the region.
    unsafe { asm!("vmxon [{}]", in(reg) &at, options(nostack)) };
}

/// VMCLEAR: what the processor keeps of it goes to memory; it can be launched, on any processor.
///
/// # Safety
/// VMX is on; `at` is the physical address of a VMCS of the caller's.
pub unsafe fn vmclear(at: u64) {
    // SAFETY: the caller vouches for the VMCS.
    unsafe { asm!("vmclear [{}]", in(reg) &at, options(nostack)) };
}

/// INVEPT: of one pointer, or of all.
///
/// # Safety
/// VMX is on, and the processor has this kind.
pub unsafe fn invept(pointer: Option<u64>) {
    let kind: u64 = if pointer.is_some() { 1 } else { 2 };
    let descriptor = [pointer.unwrap_or(0), 0];
    // SAFETY: dropping translations is always sound.
    unsafe { asm!("invept {}, [{}]", in(reg) kind, in(reg) &descriptor, options(nostack)) };
}

/// INVVPID: of one identifier, or of all.
///
/// # Safety
/// VMX is on, and the processor has this kind.
pub unsafe fn invvpid(identifier: Option<u32>) {
    let kind: u64 = if identifier.is_some() { 1 } else { 2 };
    let descriptor = [u64::from(identifier.unwrap_or(0)), 0];
    // SAFETY: dropping translations is always sound.
    unsafe { asm!("invvpid {}, [{}]", in(reg) kind, in(reg) &descriptor, options(nostack)) };
}

/// The machine's NMI handler, as if the NMI that exited had come here: its IRET ends the blocking.
pub fn take_nmi() {
    // SAFETY: the host's handler for vector 2 is installed, on a stack of its own.
    unsafe { asm!("int 2") };
}

/// CR2, which an entry does not load.
pub fn cr2() -> u64 {
    let value: u64;
    // SAFETY: only reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Sets CR2.
pub fn set_cr2(value: u64) {
    // SAFETY: the host takes no page faults but its last.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

/// The VMCS that this processor works on.
pub struct Current(());

impl Current {
    /// VMPTRLD.
    ///
    /// # Safety
    /// VMX is on; `at` is the physical address of a VMCS of the caller's, which no other processor works on. As long as
    /// this is used, this processor has it as its current one.
    pub unsafe fn load(at: u64) -> Self {
        // SAFETY: the caller vouches for the VMCS.
        unsafe { asm!("vmptrld [{}]", in(reg) &at, options(nostack)) };
        Self(())
    }
}

impl Fields for Current {
    fn get(&self, field: Field) -> u64 {
        let value: u64;
        // SAFETY: there is a current VMCS; a field that does not exist leaves the register as it was.
        unsafe {
            asm!("vmread {v}, {f}", v = inout(reg) 0u64 => value, f = in(reg) u64::from(field.0), options(nostack))
        };
        value
    }

    fn set(&mut self, field: Field, value: u64) {
        // SAFETY: there is a current VMCS; what its fields may make the processor do is `enter`'s caller's to vouch for.
        unsafe {
            asm!("vmwrite {f}, {v}", v = in(reg) value, f = in(reg) u64::from(field.0), options(nostack))
        };
    }
}
