//! The child process.

use super::enter::{self, CONTEXT};
use super::{Mapping, Native};
use crate::layout::*;
use crate::state::{Case, Outcome, Raised, Registers};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::Ordering;

const PAGE_FAULT: u64 = 14;
/// Error code of a page fault: an instruction fetch.
const FETCH: u64 = 1 << 4;
const SIGNAL_STACK_BYTES: usize = 64 << 10;
const HWCAP2_FSGSBASE: u64 = 2;

/// Sets the process up and runs batches until the pipe closes.
///
/// # Safety
/// Only in a child that has just been forked.
pub unsafe fn main(native: &Native, start: i32, done: i32) -> ! {
    // SAFETY: the caller's child is ours alone: mappings and signal handlers disturb nobody.
    unsafe {
        if set_up(native).is_none() {
            libc::_exit(1);
        }
        let mut byte = [0u8];
        if libc::write(done, byte.as_ptr().cast(), 1) != 1 {
            libc::_exit(1);
        }
        while libc::read(start, byte.as_mut_ptr().cast(), 1) == 1 {
            core::arch::x86_64::__cpuid(0); // serialises: the code was written through another mapping
            let shared = &mut *native.shared;
            for i in 0..(shared.count as usize).min(BATCH) {
                shared.current.store(i as u64, Ordering::SeqCst);
                run_case(&native.arena, &shared.cases[i], &mut shared.outcomes[i]);
            }
            if libc::write(done, byte.as_ptr().cast(), 1) != 1 {
                break;
            }
        }
        libc::_exit(0)
    }
}

/// # Safety
/// As `main`.
unsafe fn set_up(native: &Native) -> Option<()> {
    // SAFETY: see the caller.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &no_core);
        for (i, access) in PAGES.iter().enumerate() {
            let protection = match access {
                Access::Absent => continue,
                Access::ReadOnly => libc::PROT_READ,
                Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
            };
            let at = i as u64 * PAGE;
            map(&native.arena, ARENA + at, PAGE, at, protection)?;
        }
        map(&native.code, CODE, CODE_BYTES, 0, libc::PROT_READ | libc::PROT_EXEC)?;
        if libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE == 0 {
            return None; // the kernel is older than 5.9
        }
        // 32-bit code needs its data segments.
        core::arch::asm!("mov ds, {s:e}", "mov es, {s:e}", s = in(reg) u32::from(DS));
        core::arch::asm!("wrgsbase {}", in(reg) GS_BASE);

        let stack = libc::mmap(
            ptr::null_mut(),
            SIGNAL_STACK_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if stack == libc::MAP_FAILED {
            return None;
        }
        let stack = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: SIGNAL_STACK_BYTES };
        libc::sigaltstack(&stack, ptr::null_mut());
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = enter::on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            libc::sigaction(signal, &action, ptr::null_mut());
        }
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let strict = libc::SECCOMP_MODE_STRICT;
        (libc::prctl(libc::PR_SET_SECCOMP, strict, 0, 0, 0) == 0).then_some(())
    }
}

/// # Safety
/// Nothing of ours lies at `at`.
unsafe fn map(from: &Mapping, at: u64, bytes: u64, offset: u64, protection: i32) -> Option<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    // SAFETY: a fixed address that is refused if it is in use.
    let got = unsafe {
        libc::mmap(
            at as *mut _,
            bytes as usize,
            protection,
            flags,
            from.fd.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    (got as u64 == at).then_some(())
}

/// # Safety
/// In the child, after `set_up`.
unsafe fn run_case(arena: &Mapping, case: &Case, outcome: &mut Outcome) {
    let at = (case.window_at - ARENA) as usize;
    arena.write(at, &case.window);
    // SAFETY: one thread, and the case runs in between.
    unsafe {
        let context = &raw mut CONTEXT;
        (*context).entry = case.registers.rip;
        ptr::write_bytes((&raw mut (*context).out).cast::<u8>(), 0, size_of::<Registers>());
        if case.code.is_32 {
            // The far pointer: 32-bit offset and selector.
            (*context).entry = case.registers.rip & 0xFFFF_FFFF | u64::from(CS32) << 32;
            enter::enter_32(&case.registers);
        } else {
            enter::enter_64(&case.registers);
        }
        outcome.registers = (*context).out;
        outcome.raised = Raised { vector: Raised::NONE, ..Raised::default() };
        outcome.registers.rip = match (*context).exit {
            enter::FELL => case.registers.rip + u64::from(case.code.len),
            enter::TOOK => case.registers.rip - INSTRUCTION + TAKEN,
            // It arrived elsewhere, where nothing is: a branch.
            _ if (*context).trap == PAGE_FAULT
                && (*context).error & FETCH != 0
                && (*context).fault_rip != case.registers.rip =>
            {
                (*context).fault_rip
            }
            _ => {
                let (vector, error, address) = ((*context).trap, (*context).error, (*context).cr2);
                outcome.raised = Raised { vector, error, address };
                (*context).fault_rip
            }
        };
        ptr::copy_nonoverlapping(arena.view.add(at), outcome.window.as_mut_ptr(), WINDOW);
    }
}
