//! A counter that runs at a fixed frequency of guest time: its value is derived, nothing ticks.

use guest_time::GuestNs;

/// Timers are not set closer than this: a guest that asks for more gets its ticks coalesced.
pub const SHORTEST_TIMER_NS: u64 = 50_000;

/// Ticks a second of guest time.
#[derive(Clone, Copy)]
pub struct Rate(pub u32);

impl Rate {
    /// Ticks until `now`.
    pub fn ticks(self, now: GuestNs) -> u64 {
        (u128::from(now) * u128::from(self.0) / 1_000_000_000) as u64
    }
    /// The first moment at which `ticks` have passed.
    pub fn when(self, ticks: u64) -> GuestNs {
        let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(self.0));
        ns.min(u128::from(u64::MAX)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_is_the_first_moment() {
        for rate in [Rate(1_193_182), Rate(3_579_545), Rate(32_768)] {
            for ticks in [1, 2, 1000, 65_535, 1 << 40] {
                let at = rate.when(ticks);
                assert_eq!((rate.ticks(at), rate.ticks(at - 1)), (ticks, ticks - 1));
            }
            assert_eq!(rate.when(u64::MAX), u64::MAX);
        }
    }
}
