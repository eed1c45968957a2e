//! `GuestClock`: all guest time comes from here. Devices and software engines never read host time.
//!
//! Guest nanoseconds start at 0 when the machine is powered on, stand still while it is paused, go on
//! from the saved value after a restore, and may run slower than the host (`rate`). They never go back.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering, fence};
use sync::{Mutex, MutexGuard};

/// Nanoseconds of guest time.
pub type GuestNs = u64;

/// The host's monotonic clock.
pub trait HostTime: Send + Sync {
    /// Nanoseconds since any fixed moment; never goes back.
    fn now_ns(&self) -> u64;
    /// Seconds since 1970 in the host's wall clock (UTC), with nanoseconds: for the RTC and kvmclock.
    fn wall_ns(&self) -> u64;
}

#[derive(Clone, Copy)]
struct State {
    /// Guest time at `host_base`.
    guest_base: GuestNs,
    /// Host time when the clock last started (or 0 while paused).
    host_base: u64,
    running: bool,
    /// Guest nanoseconds per host nanosecond: numerator and denominator.
    rate: (u32, u32),
    /// Counts the changes of what guest time is in host time.
    epoch: u64,
}

impl State {
    fn at(&self, host_now: u64) -> GuestNs {
        if !self.running {
            return self.guest_base;
        }
        let elapsed = host_now.saturating_sub(self.host_base);
        if self.rate.0 == self.rate.1 {
            return self.guest_base.saturating_add(elapsed);
        }
        let scaled = u128::from(elapsed) * u128::from(self.rate.0) / u128::from(self.rate.1);
        self.guest_base.saturating_add(scaled as u64)
    }
}

/// What [`GuestClock::now`] reads without a lock: it is on the way of every RDTSC.
///
/// A sequence lock: the number is odd while somebody writes, and another one behind each change.
#[derive(Default)]
struct Published {
    sequence: AtomicU64,
    guest_base: AtomicU64,
    host_base: AtomicU64,
    /// Numerator and denominator, 32 bits each; 0 while paused.
    rate: AtomicU64,
}

impl Published {
    /// Only with the lock of the state held.
    fn set(&self, state: &State) {
        let before = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        let (numerator, denominator) = state.rate;
        let rate = if state.running { u64::from(numerator) << 32 | u64::from(denominator) } else { 0 };
        self.guest_base.store(state.guest_base, Ordering::Relaxed);
        self.host_base.store(state.host_base, Ordering::Relaxed);
        self.rate.store(rate, Ordering::Relaxed);
        self.sequence.store(before.wrapping_add(2), Ordering::Release);
    }

    /// `None`: somebody is writing.
    fn get(&self) -> Option<State> {
        let before = self.sequence.load(Ordering::Acquire);
        let guest_base = self.guest_base.load(Ordering::Relaxed);
        let host_base = self.host_base.load(Ordering::Relaxed);
        let rate = self.rate.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let whole = before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before;
        let (running, rate) = (rate != 0, ((rate >> 32) as u32, rate as u32));
        whole.then_some(State { guest_base, host_base, running, rate, epoch: 0 })
    }
}

struct Inner {
    host: Box<dyn HostTime>,
    state: Mutex<State>,
    published: Published,
}

/// A change of the state: what others read is renewed at its end.
struct Change<'a> {
    state: MutexGuard<'a, State>,
    published: &'a Published,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.published.set(&self.state);
    }
}

/// See the module's header. Clones are the same clock.
#[derive(Clone)]
pub struct GuestClock(Arc<Inner>);

impl GuestClock {
    /// A paused clock at 0.
    pub fn new(host: Box<dyn HostTime>) -> Self {
        let state = State { guest_base: 0, host_base: 0, running: false, rate: (1, 1), epoch: 0 };
        Self(Arc::new(Inner { host, state: Mutex::new(state), published: Published::default() }))
    }

    fn change(&self) -> Change<'_> {
        Change { state: self.0.state.lock(), published: &self.0.published }
    }

    /// Guest time now.
    pub fn now(&self) -> GuestNs {
        let state = self.0.published.get().unwrap_or_else(|| *self.0.state.lock());
        if !state.running {
            return state.guest_base;
        }
        state.at(self.0.host.now_ns())
    }

    /// The host's wall clock (UTC) in nanoseconds since 1970.
    pub fn wall_ns(&self) -> u64 {
        self.0.host.wall_ns()
    }

    /// How many host nanoseconds from now the guest time `at` comes; 0 if it has passed, `None` while
    /// paused.
    pub fn host_ns_until(&self, at: GuestNs) -> Option<u64> {
        let state = *self.0.state.lock();
        if !state.running {
            return None;
        }
        let ahead = at.saturating_sub(state.at(self.0.host.now_ns()));
        let host = u128::from(ahead) * u128::from(state.rate.1);
        Some(host.div_ceil(u128::from(state.rate.0)).min(u128::from(u64::MAX)) as u64)
    }

    /// Whether time passes.
    pub fn is_running(&self) -> bool {
        self.0.state.lock().running
    }

    /// Stops guest time.
    pub fn pause(&self) {
        let now = self.0.host.now_ns();
        let mut change = self.change();
        let state = &mut change.state;
        state.guest_base = state.at(now);
        state.running = false;
    }

    /// Lets guest time go on.
    pub fn resume(&self) {
        let now = self.0.host.now_ns();
        let mut change = self.change();
        let state = &mut change.state;
        if !state.running {
            state.host_base = now;
            state.running = true;
            state.epoch += 1;
        }
    }

    /// A number that changes whenever guest time stood still or jumped, or goes at another rate: engines with
    /// clocks of their own set them anew then.
    pub fn epoch(&self) -> u64 {
        self.0.state.lock().epoch
    }

    /// Guest nanoseconds per host nanosecond, as a fraction.
    pub fn rate(&self) -> (u32, u32) {
        self.0.state.lock().rate
    }

    /// Moves guest time forward to `at` if it is not there yet: what an engine's own clock showed the guest
    /// is not to come again.
    pub fn advance_to(&self, at: GuestNs) {
        let now = self.0.host.now_ns();
        let mut change = self.change();
        let state = &mut change.state;
        let behind = at.saturating_sub(state.at(now));
        state.guest_base = state.guest_base.saturating_add(behind);
    }

    /// Guest nanoseconds per host nanosecond, as a fraction; zeroes count as one.
    pub fn set_rate(&self, numerator: u32, denominator: u32) {
        let now = self.0.host.now_ns();
        let mut change = self.change();
        let state = &mut change.state;
        state.guest_base = state.at(now);
        state.host_base = now;
        state.rate = (numerator.max(1), denominator.max(1));
        state.epoch += 1;
    }

    /// Sets a paused clock (restore). Refused (`false`) while it runs.
    pub fn set(&self, guest: GuestNs) -> bool {
        let mut change = self.change();
        let state = &mut change.state;
        if !state.running {
            state.guest_base = guest;
            state.epoch += 1;
        }
        !state.running
    }
}

/// A one-shot timer in guest time; its owner's `Device::poll` (or what it was made for) runs once after it
/// expires. Late, never lost; re-arming replaces the deadline.
pub trait Timer: Send {
    /// Fires at guest time `at` (at once if that has passed).
    fn arm(&self, at: GuestNs);
    /// Does not fire.
    fn cancel(&self);
}

/// Clock and timers for tests: time moves only when told.
pub mod manual {
    use super::*;
    use alloc::vec::Vec;
    use core::sync::atomic::{AtomicU64, Ordering};

    /// A host clock that a test moves.
    #[derive(Clone, Default)]
    pub struct ManualTime(Arc<AtomicU64>);

    impl ManualTime {
        /// A running [`GuestClock`] over a new manual clock at 0.
        pub fn clock() -> (Self, GuestClock) {
            let time = Self::default();
            let clock = GuestClock::new(Box::new(time.clone()));
            clock.resume();
            (time, clock)
        }
        /// Lets `ns` pass.
        pub fn advance(&self, ns: u64) {
            self.0.fetch_add(ns, Ordering::SeqCst);
        }
    }

    impl HostTime for ManualTime {
        fn now_ns(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
        fn wall_ns(&self) -> u64 {
            1_700_000_000_000_000_000 + self.now_ns()
        }
    }

    /// A timer that records what it was told. Clones share the record.
    #[derive(Clone, Default)]
    pub struct ManualTimer(Arc<Mutex<Vec<Option<GuestNs>>>>);

    impl ManualTimer {
        /// The deadline now, if armed.
        pub fn deadline(&self) -> Option<GuestNs> {
            self.0.lock().last().copied().flatten()
        }
    }

    impl Timer for ManualTimer {
        fn arm(&self, at: GuestNs) {
            let mut log = self.0.lock();
            log.clear();
            log.push(Some(at));
        }
        fn cancel(&self) {
            self.0.lock().clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stands_still_while_paused_and_scales() {
        let (time, clock) = manual::ManualTime::clock();
        time.advance(100);
        assert_eq!(clock.now(), 100);
        clock.pause();
        time.advance(1000);
        assert_eq!((clock.now(), clock.host_ns_until(200)), (100, None));
        clock.resume();
        clock.set_rate(1, 8);
        time.advance(80);
        assert_eq!(clock.now(), 110);
        assert_eq!(clock.host_ns_until(111), Some(8));
        assert_eq!(clock.host_ns_until(5), Some(0));
        assert!(!clock.set(7));
        clock.pause();
        assert!(clock.set(7));
        assert_eq!(clock.now(), 7);
    }

    #[test]
    fn whoever_reads_sees_whole_states() {
        extern crate std;
        let (time, clock) = manual::ManualTime::clock();
        std::thread::scope(|threads| {
            for _ in 0..2 {
                threads.spawn(|| {
                    while time.now_ns() < 200_000 {
                        let before = time.now_ns();
                        let now = clock.now();
                        assert!((before..=time.now_ns()).contains(&now), "{before} {now}");
                    }
                });
            }
            for _ in 0..200_000 {
                time.advance(1);
                clock.set_rate(1, 1);
            }
        });
    }

    #[test]
    fn moves_forward_only_and_counts_its_jumps() {
        let (time, clock) = manual::ManualTime::clock();
        let epoch = clock.epoch();
        time.advance(100);
        clock.advance_to(50);
        assert_eq!(clock.now(), 100);
        clock.advance_to(130);
        time.advance(1);
        assert_eq!((clock.now(), clock.epoch()), (131, epoch));
        clock.pause();
        clock.resume();
        assert_ne!(clock.epoch(), epoch);
    }
}
