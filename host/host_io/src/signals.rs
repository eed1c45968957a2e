//! Requests to end from outside: SIGTERM, SIGINT and SIGHUP as events of the event loop.
//!
//! Called by: `vmm` when it starts a VM. The signals are blocked, so that nothing is interrupted, and read from a
//! signalfd. Threads inherit the mask: block before the first of them starts.
#![allow(unsafe_code)] // sigprocmask and signalfd, which rustix does not have

use crate::event_loop::{EventLoopHandle, FdWatch, Readiness};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const SIGNALS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// The signals are blocked in this thread and those that it starts from now on.
pub struct EndSignals {
    fd: OwnedFd,
}

impl EndSignals {
    /// Blocks the signals.
    pub fn block() -> io::Result<Self> {
        // SAFETY: `set` is a valid place for a signal set and is initialised by sigemptyset; the calls only read and
        // write it and this thread's mask.
        let fd = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in SIGNALS {
                libc::sigaddset(&mut set, signal);
            }
            if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Calls `ended` on the event loop's thread with each signal's name, until the watch is dropped.
    pub fn watch(
        self,
        events: &EventLoopHandle,
        mut ended: impl FnMut(&'static str) + Send + 'static,
    ) -> io::Result<FdWatch> {
        let reader = self.fd.try_clone()?;
        let readable = Readiness { readable: true, writable: false };
        events.watch(&self.fd, readable, move |_| {
            while let Some(signal) = read_signal(&reader) {
                ended(name(signal));
            }
        })
    }
}

fn read_signal(fd: &OwnedFd) -> Option<libc::c_int> {
    // SAFETY: all-zero is a valid signalfd_siginfo.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let size = size_of_val(&info);
    // SAFETY: `info` has room for the `size` bytes that the kernel writes.
    let read = unsafe { libc::read(fd.as_raw_fd(), (&raw mut info).cast(), size) };
    (read == size as isize).then_some(info.ssi_signo as libc::c_int)
}

fn name(signal: libc::c_int) -> &'static str {
    match signal {
        libc::SIGTERM => "SIGTERM",
        libc::SIGINT => "SIGINT",
        _ => "SIGHUP",
    }
}
