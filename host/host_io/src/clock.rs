//! The host's clocks.
//!
//! Called by: `event_loop` for deadlines, and `vmm`, which gives `HostClock` to the VM's `GuestClock` and to nothing else.
//!
//! Invariants: `monotonic_ns` never goes back, is the same in every thread and process, and is what timerfd counts.

use guest_time::HostTime;
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn monotonic_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::Monotonic))
}

/// Linux's clocks as the machine's source of time.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl HostTime for HostClock {
    fn now_ns(&self) -> u64 {
        monotonic_ns()
    }

    fn wall_ns(&self) -> u64 {
        nanoseconds(clock_gettime(ClockId::Realtime))
    }
}

fn nanoseconds(time: Timespec) -> u64 {
    u64::try_from(time.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64)
}
