//! A wake-up that a poll loop can wait for: an eventfd that counts "something changed".
//!
//! Called by: every thread of this crate that sleeps in poll or epoll, and by whoever wants its attention.
//!
//! Invariants: `signal` never blocks and may be called from any thread; any number of signals before a `clear` are one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;

/// An eventfd used as a doorbell.
#[derive(Debug)]
pub struct WakeFd {
    fd: OwnedFd,
}

impl WakeFd {
    /// Makes a doorbell that has not rung.
    pub fn new() -> std::io::Result<WakeFd> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(WakeFd { fd })
    }

    /// Rings. A counter that is already at its maximum has rung enough, so the error is no error.
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Makes the doorbell silent again; says whether it had rung.
    pub fn clear(&self) -> bool {
        rustix::io::read(&self.fd, &mut [0u8; 8]).is_ok()
    }
}

impl AsFd for WakeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_signals_are_one_and_clear_silences() {
        let wake = WakeFd::new().unwrap();
        assert!(!wake.clear());
        wake.signal();
        wake.signal();
        assert!(wake.clear());
        assert!(!wake.clear());
    }
}
