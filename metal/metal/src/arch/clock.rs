//! Time: the TSC, measured against the 8254, which every PC has.

use super::{in8, out8, rtc, tsc};
use guest_time::HostTime;
use spin::Once;

/// How long the TSC is measured, and how often.
const WINDOW_MS: u32 = 5;
const WINDOWS: usize = 5;
/// Turns between two looks at the 8254: a look is slow where it is emulated.
const TURNS: u32 = 500;

const PIT_HZ: u32 = 1_193_182;
const PIT_CHANNEL_2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Gate of channel 2 in bit 0, speaker in bit 1, its output in bit 5.
const SPEAKER: u16 = 0x61;

/// Waits by channel 2 of the 8254; at most 54 ms.
pub fn wait_ms(ms: u32) {
    let count = (PIT_HZ / 1000 * ms).min(0xFFFF);
    out8(SPEAKER, in8(SPEAKER) & !2 & !1);
    out8(PIT_COMMAND, 0xB0);
    out8(PIT_CHANNEL_2, count as u8);
    out8(PIT_CHANNEL_2, (count >> 8) as u8);
    out8(SPEAKER, in8(SPEAKER) & !2 | 1);
    while in8(SPEAKER) & 0x20 == 0 {
        (0..TURNS).for_each(|turn| _ = core::hint::black_box(turn));
    }
}

/// Ticks of the TSC in a millisecond. An emulator or firmware that has the processor meanwhile only makes a window
/// longer: the shortest of several is right.
fn measure_khz() -> u32 {
    let window = || {
        let before = tsc();
        wait_ms(WINDOW_MS);
        tsc().wrapping_sub(before)
    };
    let shortest = (0..WINDOWS).map(|_| window()).min().unwrap_or(0);
    (shortest / u64::from(WINDOW_MS)).clamp(1, u64::from(u32::MAX)) as u32
}

/// Ticks of `counter` in a second, by the TSC, whose rate is known.
pub fn rate_of(counter: impl Fn() -> u64) -> u64 {
    let (from, start) = (counter(), tsc());
    let wanted = u64::from(tsc_khz()) * u64::from(WINDOW_MS);
    while tsc().wrapping_sub(start) < wanted {
        core::hint::spin_loop();
    }
    let (ticks, passed) = (counter().wrapping_sub(from), tsc().wrapping_sub(start));
    let rate = u128::from(ticks) * u128::from(tsc_khz()) * 1000 / u128::from(passed.max(1));
    rate.clamp(1, u128::from(u64::MAX)) as u64
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

    #[test]
    fn ticks_become_nanoseconds() {
        assert_eq!(ns_of(0, 1), 0);
        assert_eq!(ns_of(2_000_000_000, 2_000_000), 1_000_000_000);
        assert_eq!(ns_of(3, 3_000_000), 1);
        // A century at 4 GHz.
        assert_eq!(ns_of(4_000_000_000 * 3_155_760_000, 4_000_000), 3_155_760_000_000_000_000);
    }
}
