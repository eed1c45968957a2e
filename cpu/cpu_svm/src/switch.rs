//! VMRUN and what must be around it: general registers, and the state that VMRUN leaves to VMLOAD and VMSAVE.
//!
//! Invariants: with the global interrupt flag clear, nothing of the host runs between the last look at what is wanted
//! and the guest, so that no wish is missed: an interrupt that comes meanwhile exits the guest at once. The host's own
//! code uses no vector registers; the interpreter's thunks do, and the guest's are parked before.

use crate::processor::host_area;
use crate::vmcb::Vmcb;
use core::arch::global_asm;
use core::sync::atomic::AtomicU32;
use cpu_hardware::Gate;

// RDI: general registers by encoding number. RSI: physical address of the VMCB. RDX: that of the host's VMSAVE area.
// RCX: a word with bits of which those in R8D keep the guest out; R9: another word, all of whose bits do.
// EAX: whether the guest ran. Interrupts are on in the host (RFLAGS.IF), so that they exit the guest.
global_asm!(
    ".global bedplate_svm_enter",
    "bedplate_svm_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "clgi",
    "xor eax, eax",
    "test dword ptr [rcx], r8d",
    "jnz 2f",
    "cmp dword ptr [r9], 0",
    "jne 2f",
    "push rdi",
    "push rdx",
    "mov rax, rsi",
    "vmload rax",
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
    "vmrun rax",
    "vmsave rax",
    "pop rax",
    "vmload rax",
    "pop rax",
    "mov [rax + 8], rcx",
    "mov [rax + 16], rdx",
    "mov [rax + 24], rbx",
    "mov [rax + 40], rbp",
    "mov [rax + 48], rsi",
    "mov [rax + 56], rdi",
    "mov [rax + 64], r8",
    "mov [rax + 72], r9",
    "mov [rax + 80], r10",
    "mov [rax + 88], r11",
    "mov [rax + 96], r12",
    "mov [rax + 104], r13",
    "mov [rax + 112], r14",
    "mov [rax + 120], r15",
    "mov eax, 1",
    "2:",
    "stgi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "sysv64" {
    fn bedplate_svm_enter(
        gpr: *mut u64,
        vmcb: u64,
        host: u64,
        attention: *const AtomicU32,
        mask: u32,
        interrupted: *const AtomicU32,
    ) -> u32;
}

/// Runs the guest up to an exit; `false`: the gate was shut.
///
/// # Safety
/// SVM is on here (`Svm::enable`). `vmcb` is complete, `at` its physical address; its permission maps and nested tables
/// are those of one guest, whose RAM nobody has references to. What is live in the vector registers is the guest's.
pub unsafe fn enter(gpr: &mut [u64; 32], vmcb: &mut Vmcb, at: u64, gate: &Gate<'_>) -> bool {
    debug_assert!(at.is_multiple_of(size_of_val(vmcb) as u64), "a VMCB is a page");
    // SAFETY: the caller vouches for the guest. The assembly keeps the ABI's registers, and the stack; it writes the
    // VMCB, which is borrowed, and 16 registers.
    unsafe {
        let host = host_area();
        bedplate_svm_enter(gpr.as_mut_ptr(), at, host, gate.attention, gate.mask, gate.interrupted) != 0
    }
}
