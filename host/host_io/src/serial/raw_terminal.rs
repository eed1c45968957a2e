//! Puts a terminal into raw mode and brings it back on every way out of the process that can run code.
//!
//! Called by: `serial::console` for a console on standard input.
//!
//! Ways out: drop; `exit` (atexit); a panic anywhere (panic hook, before the message is printed); a fatal signal (handler
//! that restores, hands the signal back to whoever owned it before, and lets it happen again); a forbidden system call (the
//! jail's last act).
//!
//! Invariants:
//! - At most one guard exists at a time; the saved settings stand in one atomic pointer and are taken exactly once.
//! - The signal handler makes only async-signal-safe system calls and frees nothing.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

/// Signals whose default action ends the process.
const FATAL_SIGNALS: [libc::c_int; 9] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
];

struct Saved {
    fd: OwnedFd,
    settings: Termios,
    actions: [libc::sigaction; FATAL_SIGNALS.len()],
}

/// What has to be restored; null when the terminal is as we found it.
static SAVED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());

/// Keeps a terminal raw for as long as it lives.
#[derive(Debug)]
pub struct RawTerminal {
    _only_by_enter: (),
}

impl RawTerminal {
    /// Switches `terminal` to raw mode; output processing stays on, so that the VMM's own messages keep their line ends.
    pub fn enter(terminal: impl AsFd) -> io::Result<RawTerminal> {
        let fd = terminal.as_fd().try_clone_to_owned()?;
        let settings = tcgetattr(&fd)?;
        let mut raw = settings.clone();
        raw.make_raw();
        raw.output_modes |= settings.output_modes & OutputModes::OPOST;

        // SAFETY: plain C structs for which all-zero is valid: the default action with an empty mask.
        let actions = unsafe { std::mem::zeroed() };
        let saved = Box::into_raw(Box::new(Saved { fd, settings, actions }));
        let free = SAVED.compare_exchange(ptr::null_mut(), saved, Ordering::AcqRel, Ordering::Acquire);
        if free.is_err() {
            // SAFETY: made by Box::into_raw above and never published.
            drop(unsafe { Box::from_raw(saved) });
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the terminal is already in raw mode"));
        }
        let guard = RawTerminal { _only_by_enter: () };
        install_once();
        // SAFETY: `saved` was published above and is freed only by the guard's drop, which cannot run before this ends.
        unsafe { install_handlers(saved)? };
        // SAFETY: as above; only read here.
        tcsetattr(unsafe { &(*saved).fd }, OptionalActions::Now, &raw)?;
        Ok(guard)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let saved = restore_terminal();
        if saved.is_null() {
            return; // A hook or handler was first; it owns (and leaks) the settings.
        }
        // SAFETY: `restore_terminal` gave the pointer to us alone; it came from Box::into_raw.
        let saved = unsafe { Box::from_raw(saved) };
        for (signal, action) in FATAL_SIGNALS.iter().zip(&saved.actions) {
            give_back(*signal, action);
        }
    }
}

/// Takes the saved settings and applies them; null when there was nothing (left) to restore.
fn restore_terminal() -> *mut Saved {
    let saved = SAVED.swap(ptr::null_mut(), Ordering::AcqRel);
    if !saved.is_null() {
        // SAFETY: a non-null pointer in SAVED is a live box, and the swap made it ours alone.
        let saved = unsafe { &*saved };
        let _ = tcsetattr(&saved.fd, OptionalActions::Now, &saved.settings);
    }
    saved
}

/// The hooks that need installing only once in a process: exit and panic.
fn install_once() {
    static ONCE: Once = Once::new();
    extern "C" fn at_exit() {
        restore_terminal();
    }
    ONCE.call_once(|| {
        jail::violation::set_last_act(|| _ = restore_terminal());
        // SAFETY: registers a plain function that lives as long as the program.
        unsafe { libc::atexit(at_exit) };
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore_terminal();
            before(info);
        }));
    });
}

/// Puts our handler before the present ones and remembers them.
///
/// # Safety
/// `saved` points to a live `Saved` that nobody frees meanwhile.
unsafe fn install_handlers(saved: *mut Saved) -> io::Result<()> {
    for (i, &signal) in FATAL_SIGNALS.iter().enumerate() {
        // SAFETY: `saved` is live by contract, zero is a valid sigaction, and each call gets pointers to whole structs.
        unsafe {
            let slot = &raw mut (*saved).actions[i];
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = on_fatal_signal as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut ours.sa_mask);
            if libc::sigaction(signal, &ours, slot) != 0 {
                return Err(io::Error::last_os_error());
            }
            if (*slot).sa_sigaction == libc::SIG_IGN {
                libc::sigaction(signal, slot, ptr::null_mut()); // What is ignored cannot end us: leave it so.
            }
        }
    }
    Ok(())
}

/// Restores the terminal, gives the signal back to its former owner, and lets it strike again.
extern "C" fn on_fatal_signal(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let saved = restore_terminal();
    let slot = FATAL_SIGNALS.iter().position(|&s| s == signal);
    // SAFETY: `saved`, when not null, is ours alone and its action slots are filled before our handler can run for
    // them; sigaction, signal and raise are async-signal-safe; `info` is the kernel's valid pointer (SA_SIGINFO).
    unsafe {
        match slot {
            Some(slot) if !saved.is_null() => give_back(signal, &(*saved).actions[slot]),
            _ => _ = libc::signal(signal, libc::SIG_DFL),
        }
        // A fault happens again by itself when we return; a sent signal (code <= 0, or from the terminal) does not.
        let is_fault = matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE);
        if !is_fault || (*info).si_code <= 0 {
            libc::raise(signal);
        }
    }
}

/// Reinstates `action` if the present handler is still ours.
fn give_back(signal: libc::c_int, action: &libc::sigaction) {
    // SAFETY: valid pointers, async-signal-safe calls.
    unsafe {
        let mut present: libc::sigaction = std::mem::zeroed();
        let known = libc::sigaction(signal, ptr::null(), &mut present) == 0;
        if known && present.sa_sigaction == on_fatal_signal as *const () as usize {
            libc::sigaction(signal, action, ptr::null_mut());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;
    use std::os::fd::OwnedFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    const WAY_OUT: &str = "HOST_IO_TEST_WAY_OUT";

    fn pty() -> (OwnedFd, OwnedFd) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
        (master, slave)
    }

    /// Runs in a child process only: goes raw on standard input and leaves in the way the environment names.
    #[test]
    fn child() {
        let Ok(way) = std::env::var(WAY_OUT) else { return };
        let guard = RawTerminal::enter(std::io::stdin()).unwrap();
        let now = tcgetattr(std::io::stdin()).unwrap();
        assert!(
            !now.local_modes.contains(LocalModes::ICANON) && now.output_modes.contains(OutputModes::OPOST)
        );
        assert!(RawTerminal::enter(std::io::stdin()).is_err(), "a second guard must be refused");
        match way.as_str() {
            "drop" => drop(guard),
            "exit" => std::process::exit(0),
            "panic" => panic!("on purpose"),
            "panic-elsewhere" => _ = std::thread::spawn(|| panic!("on purpose")).join(),
            "abort" => std::process::abort(),
            "forbidden" => {
                jail::arm().unwrap();
                jail::enter(jail::Thread::Vcpu, &[]);
                // SAFETY: PTRACE_TRACEME of a process that is about to end.
                unsafe { libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0) };
            }
            // SAFETY: not at all: the fault is the point, and this is a child process made for it.
            "fault" => _ = unsafe { ptr::read_volatile(ptr::dangling::<u64>()) },
            signal => {
                // SAFETY: sends a signal to ourselves.
                unsafe { libc::raise(signal.parse().unwrap()) };
            }
        }
    }

    fn leave(way: &str) -> std::process::ExitStatus {
        let (_master, slave) = pty();
        let before = tcgetattr(&slave).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "serial::raw_terminal::tests::child"])
            .env(WAY_OUT, way)
            .stdin(Stdio::from(slave.try_clone().unwrap()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        let after = tcgetattr(&slave).unwrap();
        assert_eq!(before.local_modes, after.local_modes, "{way}");
        assert_eq!(before.input_modes, after.input_modes, "{way}");
        assert_eq!(before.output_modes, after.output_modes, "{way}");
        status
    }

    #[test]
    fn the_terminal_comes_back_on_every_way_out() {
        assert!(leave("drop").success());
        assert!(leave("exit").success());
        assert!(!leave("panic").success());
        assert!(leave("panic-elsewhere").success());
        assert_eq!(leave("forbidden").code(), Some(jail::violation::EXIT_CODE));
        assert_eq!(leave("abort").signal(), Some(libc::SIGABRT));
        assert_eq!(leave("fault").signal(), Some(libc::SIGSEGV));
        // The standard library's own SIGSEGV and SIGBUS handler, which gets its turn after ours, swallows a sent one.
        _ = (leave(&libc::SIGSEGV.to_string()), leave(&libc::SIGBUS.to_string()));
        for signal in FATAL_SIGNALS.into_iter().filter(|s| ![libc::SIGSEGV, libc::SIGBUS].contains(s)) {
            assert_eq!(leave(&signal.to_string()).signal(), Some(signal));
        }
    }
}
