//! The APIC timer (SDM vol. 3, 11.5.4): one-shot and periodic counts, and the TSC deadline.
//!
//! Nothing ticks: a running timer is the moment at which it expires, and the count is derived from it.
//! Missed periods coalesce into one interrupt.

use crate::clock::ApicClock;
use crate::registers::TimerMode;
use guest_time::GuestNs;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ApicTimer {
    pub initial_count: u32,
    /// Divide configuration register.
    pub divide: u32,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    pub tsc_deadline: u64,
    /// When it expires, in either kind of mode.
    pub expires: Option<GuestNs>,
}

impl ApicTimer {
    /// Nanoseconds a count (one tick at 1 GHz is one).
    fn divisor(&self) -> u64 {
        let code = (self.divide & 3) | (self.divide >> 1 & 4);
        if code == 7 { 1 } else { 2 << code }
    }
    fn period(&self) -> u64 {
        u64::from(self.initial_count) * self.divisor()
    }

    pub fn set_initial_count(&mut self, now: GuestNs, count: u32) {
        self.initial_count = count;
        self.expires = (count != 0).then(|| now.saturating_add(self.period()));
    }

    pub fn current_count(&self, now: GuestNs) -> u32 {
        let left = self.expires.map_or(0, |at| at.saturating_sub(now));
        // A restored deadline may lie anywhere.
        left.div_ceil(self.divisor()).min(u64::from(self.initial_count)) as u32
    }

    /// A new divisor: what is left of the count goes on at the new pace.
    pub fn set_divide(&mut self, now: GuestNs, divide: u32) {
        let left = self.current_count(now);
        self.divide = divide;
        if self.expires.is_some() {
            self.expires = Some(now.saturating_add(u64::from(left) * self.divisor()));
        }
    }

    pub fn set_tsc_deadline(&mut self, clock: &ApicClock, now: GuestNs, tsc: u64) {
        self.tsc_deadline = tsc;
        self.expires = (tsc != 0).then(|| clock.ns_when_tsc(now, tsc));
    }

    /// Between counts and TSC deadline: disarmed.
    pub fn disarm(&mut self) {
        (self.expires, self.tsc_deadline) = (None, 0);
    }

    /// Whether it has expired by `now`; if so, goes on as its mode says.
    pub fn take_expired(&mut self, mode: TimerMode, now: GuestNs) -> bool {
        let Some(at) = self.expires.filter(|at| *at <= now) else { return false };
        self.expires = None;
        match mode {
            TimerMode::OneShot => {}
            TimerMode::TscDeadline => self.tsc_deadline = 0,
            TimerMode::Periodic => {
                let period = self.period();
                if let Some(missed) = (now - at).checked_div(period) {
                    self.expires = Some(at.saturating_add((missed + 1).saturating_mul(period)));
                }
            }
        }
        true
    }
}
