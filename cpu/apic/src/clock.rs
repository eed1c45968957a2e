//! What the local APIC knows of time: guest nanoseconds and the TSC that is derived from them.

use guest_time::{GuestClock, GuestNs};

/// Rate of the APIC timer at a divisor of 1: one tick a nanosecond, on every engine. CPUID leaf 0x15 (crystal)
/// and 0x4000_0010 (bus) must say the same.
pub const TIMER_HZ: u64 = 1_000_000_000;

/// The guest clock and one processor's view of the TSC: `TSC = ns · tsc_khz / 10⁶ + tsc_offset` (wrapping).
#[derive(Clone)]
pub struct ApicClock {
    /// All guest time.
    pub clock: GuestClock,
    /// Frequency of the TSC in kHz.
    pub tsc_khz: u32,
    /// This processor's TSC minus what the clock gives.
    pub tsc_offset: u64,
}

impl ApicClock {
    /// Guest time now.
    pub fn now(&self) -> GuestNs {
        self.clock.now()
    }
    /// The TSC now.
    pub fn tsc(&self) -> u64 {
        self.tsc_at(self.now())
    }
    /// The TSC at guest time `at`.
    pub fn tsc_at(&self, at: GuestNs) -> u64 {
        // In two parts: exact, and without a 128-bit division on the way of every RDTSC.
        let khz = u64::from(self.tsc_khz);
        let ticks = (at / 1_000_000).wrapping_mul(khz).wrapping_add(at % 1_000_000 * khz / 1_000_000);
        ticks.wrapping_add(self.tsc_offset)
    }
    /// When the TSC reaches `tsc`, `now` or later.
    pub fn ns_when_tsc(&self, now: GuestNs, tsc: u64) -> GuestNs {
        let ahead = tsc.saturating_sub(self.tsc_at(now));
        let ns = (u128::from(ahead) * 1_000_000).div_ceil(u128::from(self.tsc_khz.max(1)));
        now.saturating_add(ns.min(u128::from(u64::MAX)) as u64)
    }
}
