//! The end of a process that made a forbidden call: the terminal comes back, a line names the call, exit code [`EXIT_CODE`].
//!
//! Called by: the kernel, with SIGSYS, on the thread that made the call.
//!
//! Invariant: the handler makes async-signal-safe calls only, and all of them are in every thread's list.
#![allow(unsafe_code)]

use crate::Thread;
use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::OnceLock;
use syscalls::Sysno;

/// How the process exits.
pub const EXIT_CODE: i32 = 25;
/// `SYS_SECCOMP` (asm-generic/siginfo.h): a filter sent the signal.
const BY_FILTER: i32 = 1;

thread_local! {
    static HERE: Cell<Option<Thread>> = const { Cell::new(None) };
}
static LAST_ACT: OnceLock<fn()> = OnceLock::new();

/// The calling thread is this one, for the line.
pub fn this_is(thread: Thread) {
    HERE.set(Some(thread));
}

/// Has `act` done before the line is written; the first one counts. It must be async-signal-safe.
pub fn set_last_act(act: fn()) {
    let _ = LAST_ACT.set(act);
}

/// Answers SIGSYS from now on.
pub fn install() -> io::Result<()> {
    // SAFETY: an all-zero `sigaction` is a valid value; the handler is a function of the right type that lives for ever.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigsys as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSYS, &action, ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The beginning of `siginfo_t` for SIGSYS.
#[repr(C)]
struct SysInfo {
    signal: i32,
    errno: i32,
    code: i32,
    address: *const u8,
    call: i32,
}

extern "C" fn on_sigsys(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a whole `siginfo_t`, which begins like this for this signal.
    let SysInfo { code, call, .. } = unsafe { ptr::read(info.cast()) };
    if let Some(act) = LAST_ACT.get() {
        act();
    }
    let mut line = Line { bytes: [0; 256], len: 0 };
    line.add("bedplate: ");
    if code == BY_FILTER {
        let name = usize::try_from(call).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
        line.add("forbidden system call ").add(name).add(" (").number(call.unsigned_abs()).add(") in ");
        line.add(HERE.get().map_or("a thread", Thread::name));
        line.add("; the VM ends. It is a mistake of Bedplate's, or the guest attacked it\r\n");
    } else {
        line.add("signal SIGSYS; the VM ends\r\n");
    }
    // SAFETY: the line's own bytes; _exit does not return and runs nothing of ours.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(EXIT_CODE);
    }
}

/// Text without an allocator; what does not fit is cut off.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn add(&mut self, text: &str) -> &mut Self {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
        self
    }

    fn number(&mut self, mut n: u32) -> &mut Self {
        let mut digits = [0; 10];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (n % 10) as u8;
            n /= 10;
            if n == 0 {
                break;
            }
        }
        self.add(std::str::from_utf8(&digits[first..]).unwrap_or("?"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_written_without_an_allocator_and_never_too_long() {
        let mut line = Line { bytes: [0; 256], len: 0 };
        line.add("call ").number(0).add(" ").number(4_294_967_295);
        assert_eq!(&line.bytes[..line.len], b"call 0 4294967295");
        line.add(&"x".repeat(300));
        assert_eq!(line.len, 256);
    }
}
