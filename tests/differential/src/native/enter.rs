//! Entering and leaving a case: all registers are the case's from the jump to the exit.

use crate::layout::{DS, FS_BASE, GS_BASE};
use crate::state::Registers;
use core::arch::naked_asm;
use core::mem::offset_of;

/// What the child keeps beside the case's registers, at an address that needs no register.
#[repr(C, align(64))]
pub struct Context {
    /// Registers at the exit.
    pub out: Registers,
    host_rsp: u64,
    host_fs: u64,
    /// Where the case starts: offset and, for 32-bit code, selector.
    pub entry: u64,
    /// How the case ended.
    pub exit: u64,
    /// From the signal frame.
    pub trap: u64,
    /// From the signal frame.
    pub error: u64,
    /// From the signal frame.
    pub cr2: u64,
    /// From the signal frame.
    pub fault_rip: u64,
    mxcsr: u32,
}

/// `Context::exit`: the instruction behind was reached.
pub const FELL: u64 = 1;
/// `Context::exit`: the branch target was reached.
pub const TOOK: u64 = 2;
/// `Context::exit`: an exception.
pub const FAULTED: u64 = 3;

/// The child's context; only its one thread touches it.
pub static mut CONTEXT: Context = Context {
    out: Registers { xsave: [0; 832], gpr: [0; 16], flags: 0, rip: 0, selectors: [0; 8], bases: [0; 2] },
    host_fs: 0,
    host_rsp: 0,
    entry: 0,
    exit: 0,
    trap: 0,
    error: 0,
    cr2: 0,
    fault_rip: 0,
    mxcsr: 0x1F80,
};

/// Addresses that code leaves to: behind the instruction, at the branch target.
pub fn exits() -> [u64; 2] {
    [exit_fell as *const () as u64, exit_took as *const () as u64]
}

const GPR: usize = offset_of!(Registers, gpr);
const FLAGS: usize = offset_of!(Registers, flags);

macro_rules! enter {
    ($(#[$doc:meta])* $name:ident, $jump:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// `CONTEXT.entry` is code that leaves through an exit or a signal.
        #[unsafe(naked)]
        pub unsafe extern "sysv64" fn $name(registers: *const Registers) {
            naked_asm!(
                "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
                "mov [rip + {c} + {host_rsp}], rsp",
                "rdfsbase rax",
                "mov [rip + {c} + {host_fs}], rax",
                "mov eax, {fs}",
                "wrfsbase rax",
                "mov eax, 7",
                "xor edx, edx",
                "xrstor64 [rdi]",
                "push qword ptr [rdi + {flags}]",
                "popfq",
                "mov rax, [rdi + {gpr}]",
                "mov rcx, [rdi + {gpr} + 8]",
                "mov rdx, [rdi + {gpr} + 16]",
                "mov rbx, [rdi + {gpr} + 24]",
                "mov rsp, [rdi + {gpr} + 32]",
                "mov rbp, [rdi + {gpr} + 40]",
                "mov rsi, [rdi + {gpr} + 48]",
                "mov r8, [rdi + {gpr} + 64]",
                "mov r9, [rdi + {gpr} + 72]",
                "mov r10, [rdi + {gpr} + 80]",
                "mov r11, [rdi + {gpr} + 88]",
                "mov r12, [rdi + {gpr} + 96]",
                "mov r13, [rdi + {gpr} + 104]",
                "mov r14, [rdi + {gpr} + 112]",
                "mov r15, [rdi + {gpr} + 120]",
                "mov rdi, [rdi + {gpr} + 56]",
                $jump,
                c = sym CONTEXT,
                host_rsp = const offset_of!(Context, host_rsp),
                host_fs = const offset_of!(Context, host_fs),
                fs = const FS_BASE,
                entry = const offset_of!(Context, entry),
                gpr = const GPR,
                flags = const FLAGS,
            )
        }
    };
}
enter!(
    /// Runs 64-bit code with these registers.
    enter_64, "jmp qword ptr [rip + {c} + {entry}]");
enter!(
    /// Runs 32-bit code with these registers.
    enter_32, "jmp fword ptr [rip + {c} + {entry}]");

macro_rules! exit {
    ($name:ident, $kind:ident) => {
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name() {
            naked_asm!(
                "mov qword ptr [rip + {c} + {exit}], {kind}",
                "jmp {leave}",
                c = sym CONTEXT,
                exit = const offset_of!(Context, exit),
                kind = const $kind,
                leave = sym leave,
            )
        }
    };
}
exit!(exit_fell, FELL);
exit!(exit_took, TOOK);
exit!(exit_faulted, FAULTED);

/// Saves the case's registers and returns from `enter_*`.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave() {
    naked_asm!(
        "mov [rip + {c} + {gpr}], rax",
        "mov [rip + {c} + {gpr} + 8], rcx",
        "mov [rip + {c} + {gpr} + 16], rdx",
        "mov [rip + {c} + {gpr} + 24], rbx",
        "mov [rip + {c} + {gpr} + 32], rsp",
        "mov [rip + {c} + {gpr} + 40], rbp",
        "mov [rip + {c} + {gpr} + 48], rsi",
        "mov [rip + {c} + {gpr} + 56], rdi",
        "mov [rip + {c} + {gpr} + 64], r8",
        "mov [rip + {c} + {gpr} + 72], r9",
        "mov [rip + {c} + {gpr} + 80], r10",
        "mov [rip + {c} + {gpr} + 88], r11",
        "mov [rip + {c} + {gpr} + 96], r12",
        "mov [rip + {c} + {gpr} + 104], r13",
        "mov [rip + {c} + {gpr} + 112], r14",
        "mov [rip + {c} + {gpr} + 120], r15",
        "mov rsp, [rip + {c} + {host_rsp}]",
        "pushfq",
        "pop qword ptr [rip + {c} + {flags}]",
        "push 2",
        "popfq",
        "mov word ptr [rip + {c} + {selectors}], es",
        "mov word ptr [rip + {c} + {selectors} + 4], ss",
        "mov word ptr [rip + {c} + {selectors} + 6], ds",
        "mov word ptr [rip + {c} + {selectors} + 8], fs",
        "mov word ptr [rip + {c} + {selectors} + 10], gs",
        "rdfsbase rax",
        "mov [rip + {c} + {bases}], rax",
        "rdgsbase rax",
        "mov [rip + {c} + {bases} + 8], rax",
        "mov eax, {data}",
        "mov es, eax",
        "mov ss, eax",
        "mov ds, eax",
        "xor eax, eax",
        "mov fs, eax",
        "mov gs, eax",
        "mov rax, [rip + {c} + {host_fs}]",
        "wrfsbase rax",
        "mov eax, {gs}",
        "wrgsbase rax",
        "lea rdi, [rip + {c}]",
        "mov eax, 7",
        "xor edx, edx",
        "xsave64 [rdi]",
        "fninit",
        "ldmxcsr [rip + {c} + {mxcsr}]",
        "vzeroupper",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        c = sym CONTEXT,
        host_rsp = const offset_of!(Context, host_rsp),
        mxcsr = const offset_of!(Context, mxcsr),
        gpr = const GPR,
        flags = const FLAGS,
        host_fs = const offset_of!(Context, host_fs),
        selectors = const offset_of!(Registers, selectors),
        bases = const offset_of!(Registers, bases),
        data = const DS,
        gs = const GS_BASE,
    )
}

/// The signal handler (signal, siginfo, ucontext): notes trap, error code, CR2 and RIP, and makes the signal
/// return to `exit_faulted` in 64-bit code. The frame's other registers are the case's. Alignment checks may
/// be on here, so every access is aligned.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn on_signal(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    naked_asm!(
        "mov rax, [rdx + {g} + 8 * 20]",
        "mov [rip + {c} + {trap}], rax",
        "mov rax, [rdx + {g} + 8 * 19]",
        "mov [rip + {c} + {error}], rax",
        "mov rax, [rdx + {g} + 8 * 22]",
        "mov [rip + {c} + {cr2}], rax",
        "mov rax, [rdx + {g} + 8 * 16]",
        "mov [rip + {c} + {rip}], rax",
        "lea rax, [rip + {exit}]",
        "mov [rdx + {g} + 8 * 16], rax",
        "mov rax, [rdx + {g} + 8 * 18]",
        "mov ax, 0x33",
        "mov [rdx + {g} + 8 * 18], rax",
        "ret",
        g = const 40, // gregs in ucontext_t
        c = sym CONTEXT,
        trap = const offset_of!(Context, trap),
        error = const offset_of!(Context, error),
        cr2 = const offset_of!(Context, cr2),
        rip = const offset_of!(Context, fault_rip),
        exit = sym exit_faulted,
    )
}
