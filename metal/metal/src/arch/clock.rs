//! Time: the TSC, measured against the 8254, which every PC has.

use super::{in8, out8, rtc, tsc};
use alloc::vec::Vec;
use guest_time::HostTime;
use spin::Once;

/// How long a rate is measured at a time, how many of these windows must agree, and how many there are at most.
const WINDOW_MS: u32 = 5;
const AGREEING: usize = 3;
const WINDOWS: usize = 40;
/// Rates agree if they differ by less than one part of this.
const PRECISION: u64 = 1000;
/// Turns between two looks at the 8254: a look is slow where it is emulated.
const TURNS: u32 = 500;

const PIT_HZ: u32 = 1_193_182;
const PIT_CHANNEL_2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Commands for channel 2: count once from a number of two bytes; hold the count to be read.
const COUNT_ONCE: u8 = 0xB0;
const HOLD: u8 = 0x80;
/// Gate of channel 2 in bit 0, speaker in bit 1, its output in bit 5.
const SPEAKER: u16 = 0x61;

/// The TSC's ticks in a second by channel 2 of the 8254, which is asked how long the window was: it counts on behind its
/// end, which may be seen late. It comes around after 55 ms, and what has the processor between two reads is not seen.
fn window() -> u64 {
    let count = PIT_HZ / 1000 * WINDOW_MS;
    out8(SPEAKER, in8(SPEAKER) & !2 & !1);
    out8(PIT_COMMAND, COUNT_ONCE);
    out8(PIT_CHANNEL_2, count as u8);
    out8(PIT_CHANNEL_2, (count >> 8) as u8);
    out8(SPEAKER, in8(SPEAKER) & !2 | 1);
    let (from, start) = (channel_2(), tsc());
    while in8(SPEAKER) & 0x20 == 0 {
        (0..TURNS).for_each(|turn| _ = core::hint::black_box(turn));
    }
    let (to, end) = (channel_2(), tsc());
    rate(end.wrapping_sub(start), u64::from(from.wrapping_sub(to)), PIT_HZ.into())
}

/// What channel 2 counts down.
fn channel_2() -> u16 {
    out8(PIT_COMMAND, HOLD);
    u16::from_le_bytes([in8(PIT_CHANNEL_2), in8(PIT_CHANNEL_2)])
}

/// Ticks of a counter in a second, which made `ticks` while another made `others`, of `hz` in a second.
fn rate(ticks: u64, others: u64, hz: u64) -> u64 {
    let rate = u128::from(ticks) * u128::from(hz) / u128::from(others.max(1));
    rate.clamp(1, u128::from(u64::MAX)) as u64
}

/// A rate that several windows agree on. One in which an emulator or firmware had the processor may be wrong in any
/// direction, and is not believed. If none agree, it is what lies in the middle.
fn agreed(mut window: impl FnMut() -> u64) -> u64 {
    let mut rates = Vec::new();
    while rates.len() < WINDOWS {
        let rate = window();
        let at = rates.partition_point(|other| *other < rate);
        rates.insert(at, rate);
        let agree = |some: &&[u64]| some[AGREEING - 1] - some[0] < some[0] / PRECISION;
        if let Some(some) = rates.windows(AGREEING).find(agree) {
            return some[AGREEING / 2];
        }
    }
    rates[WINDOWS / 2]
}

/// Ticks of the TSC in a millisecond.
fn measure_khz() -> u32 {
    (agreed(window) / 1000).clamp(1, u64::from(u32::MAX)) as u32
}

/// Ticks of `counter` in a second, by the TSC, whose rate is known.
pub fn rate_of(counter: impl Fn() -> u64) -> u64 {
    let hz = u64::from(tsc_khz()) * 1000;
    let wanted = u64::from(tsc_khz()) * u64::from(WINDOW_MS);
    agreed(|| {
        let (from, start) = (counter(), tsc());
        while tsc().wrapping_sub(start) < wanted {
            core::hint::spin_loop();
        }
        let (to, end) = (counter(), tsc());
        rate(to.wrapping_sub(from), end.wrapping_sub(start), hz)
    })
}

struct Measured {
    khz: u32,
    /// TSC at the start of our time.
    base: u64,
    /// Wall clock then.
    wall_ns: u64,
}

static MEASURED: Once<Measured> = Once::new();

/// Measures the TSC; our time starts.
pub fn initialize() {
    MEASURED.call_once(|| Measured { khz: measure_khz(), base: tsc(), wall_ns: rtc::wall_ns() });
}

/// Rate of the TSC; 0 before it was measured.
pub fn tsc_khz() -> u32 {
    MEASURED.get().map_or(0, |m| m.khz)
}

/// Nanoseconds since our time started.
pub fn now_ns() -> u64 {
    MEASURED.get().map_or(0, |m| ns_of(tsc().saturating_sub(m.base), m.khz))
}

/// Does nothing for `ns` nanoseconds.
pub fn wait(ns: u64) {
    let start = now_ns();
    while now_ns() - start < ns {
        core::hint::spin_loop();
    }
}

fn ns_of(ticks: u64, khz: u32) -> u64 {
    let khz = u64::from(khz);
    (ticks / khz).wrapping_mul(1_000_000).wrapping_add(ticks % khz * 1_000_000 / khz)
}

/// The machine's time as guests' clocks are made of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct MachineTime;

impl HostTime for MachineTime {
    fn now_ns(&self) -> u64 {
        now_ns()
    }
    fn wall_ns(&self) -> u64 {
        MEASURED.get().map_or(0, |m| m.wall_ns) + now_ns()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is agreed on when windows tell these rates, over and over, and how many were needed.
    fn agreed_on(rates: &[u64]) -> (u64, usize) {
        let mut all = rates.iter().cycle();
        let mut windows = 0;
        let rate = agreed(|| {
            windows += 1;
            *all.next().unwrap()
        });
        (rate, windows)
    }

    #[test]
    fn windows_that_are_wrong_are_not_believed() {
        const GHZ: u64 = 1_000_000_000;
        assert_eq!(agreed_on(&[GHZ, GHZ + 5, GHZ - 5]), (GHZ, 3));
        // The processor was elsewhere: longer than was thought, or between two reads.
        assert_eq!(agreed_on(&[13 * GHZ, GHZ, 12 * GHZ, GHZ + 7, GHZ / 3, GHZ + 9]), (GHZ + 7, 6));
        assert_eq!(agreed_on(&[13 * GHZ, 12 * GHZ, 11 * GHZ, 9 * GHZ, GHZ, GHZ, GHZ]), (GHZ, 7));
    }

    #[test]
    fn windows_that_never_agree_have_an_end() {
        let mut rate = 1000;
        let middle = agreed(|| {
            rate += rate / 10;
            rate
        });
        assert!(middle > 1100 && middle < rate);
        assert_eq!(agreed_on(&[0]), (0, WINDOWS));
    }

    #[test]
    fn rates_are_ticks_by_ticks() {
        assert_eq!(rate(5_000_000, 5965, PIT_HZ.into()), 1_000_152_556);
        assert_eq!((rate(0, 0, 1000), rate(u64::MAX, 0, u64::MAX)), (1, u64::MAX));
    }

    #[test]
    fn ticks_become_nanoseconds() {
        assert_eq!(ns_of(0, 1), 0);
        assert_eq!(ns_of(2_000_000_000, 2_000_000), 1_000_000_000);
        assert_eq!(ns_of(3, 3_000_000), 1);
        // A century at 4 GHz.
        assert_eq!(ns_of(4_000_000_000 * 3_155_760_000, 4_000_000), 3_155_760_000_000_000_000);
    }
}
