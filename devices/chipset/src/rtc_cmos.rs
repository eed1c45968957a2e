//! The real-time clock and its battery-backed RAM (Motorola MC146818, as in PCs: century in byte 32h, bit 7
//! of the index port masks NMI).
//!
//! Called by: the bus, its timer through `poll`.
//!
//! The calendar follows the host's wall clock at the distance that the guest set; periodic interrupts come
//! from guest time. Nothing ticks: flags are brought up to date when somebody looks, and the timer is set
//! only for interrupts that are enabled and not yet flagged.
//!
//! A reset keeps what the battery keeps: RAM, alarm, and the distance to the wall clock.

mod calendar;
mod state;
#[cfg(test)]
mod tests;

use crate::MissedTicks;
use crate::legacy::LegacyReplacement;
use crate::rate::{Rate, SHORTEST_TIMER_NS};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use calendar::DateTime;
use device::{Device, IoError, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};
use guest_time::{GuestClock, GuestNs, Timer};
use saved_state::{from_blob, to_blob};

/// Bytes behind the index.
pub const CMOS_BYTES: usize = 128;

const SECONDS: u8 = 0;
const SECONDS_ALARM: u8 = 1;
const MINUTES: u8 = 2;
const MINUTES_ALARM: u8 = 3;
const HOURS: u8 = 4;
const HOURS_ALARM: u8 = 5;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REGISTER_A: u8 = 0x0A;
const REGISTER_B: u8 = 0x0B;
const REGISTER_C: u8 = 0x0C;
const REGISTER_D: u8 = 0x0D;
const CENTURY: u8 = 0x32;

/// Register A: 32.768 kHz, 1024 interrupts a second.
const A_RESET: u8 = 0x26;
const A_UPDATING: u8 = 1 << 7;
/// Register B: 24 hours.
const B_RESET: u8 = 0x02;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Enables in B, flags in C.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATED: u8 = 1 << 4;
const SOURCES: u8 = PERIODIC | ALARM | UPDATED;
/// Register C: interrupting. Register D: the battery is good.
const C_INTERRUPT: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;
const HOUR_PM: u8 = 1 << 7;
/// Alarm bytes from here on match anything.
const ANY: u8 = 0xC0;

const OSCILLATOR: Rate = Rate(32_768);
const SECOND_NS: u64 = 1_000_000_000;
/// Update in progress rises this long before the seconds change.
const UPDATE_NS: u64 = 2_228_000;
/// The wall clock may be set at any time: look again at least so often.
const LONGEST_WAIT_NS: u64 = 3_600 * SECOND_NS;

/// The calendar while it stands still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stopped {
    time: DateTime,
    /// The divider was held in reset: the first update is half a second after it is let go.
    divider_reset: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    index: u8,
    nmi_masked: bool,
    a: u8,
    b: u8,
    /// Flags.
    c: u8,
    /// Seconds, minutes, hours, as written.
    alarm: [u8; 3],
    /// What is no register.
    ram: [u8; CMOS_BYTES],
    /// The calendar minus the wall clock.
    offset_seconds: i64,
    offset_ns: u32,
    stopped: Option<Stopped>,
    /// Calendar second up to which C's flags are true.
    seen_second: i64,
    /// Periods up to which C's flags are true.
    seen_periods: u64,
    /// Periodic interrupts owed.
    backlog: u64,
}

/// What an RTC is connected to.
pub struct RtcWiring {
    /// IRQ 8.
    pub irq: IrqLine,
    /// All time.
    pub clock: GuestClock,
    /// Has the chip polled.
    pub timer: Box<dyn Timer>,
    /// Shared with the HPET.
    pub replaced: LegacyReplacement,
}

/// See the module's header. One region: index and data port.
pub struct RtcCmos {
    name: String,
    missed_ticks: MissedTicks,
    /// What the firmware puts into the RAM at each start.
    preset: Vec<(u8, u8)>,
    wiring: RtcWiring,
    registers: Registers,
}

/// The RAM bytes that tell the amount of memory, for [`RtcCmos::new`]: below and above 4 GiB.
pub fn memory_size_bytes(low_ram: u64, high_ram: u64) -> Vec<(u8, u8)> {
    let le = |value: u64, max: u64| value.min(max).to_le_bytes();
    let above_1m = le(low_ram.saturating_sub(1 << 20) >> 10, 0xFFFF);
    let above_16m = le(low_ram.saturating_sub(16 << 20) >> 16, 0xFFFF);
    let high = le(high_ram >> 16, 0xFF_FFFF);
    let base = le(640, 640);
    Vec::from([
        (0x15, base[0]),
        (0x16, base[1]),
        (0x17, above_1m[0]),
        (0x18, above_1m[1]),
        (0x30, above_1m[0]),
        (0x31, above_1m[1]),
        (0x34, above_16m[0]),
        (0x35, above_16m[1]),
        (0x5B, high[0]),
        (0x5C, high[1]),
        (0x5D, high[2]),
    ])
}

impl RtcCmos {
    /// An RTC that shows the host's wall clock (UTC). `preset` is put into the RAM at each reset.
    pub fn new(name: &str, missed_ticks: MissedTicks, wiring: RtcWiring, preset: &[(u8, u8)]) -> Self {
        let registers = Registers {
            index: 0,
            nmi_masked: false,
            a: A_RESET,
            b: B_RESET,
            c: 0,
            alarm: [0; 3],
            ram: [0; CMOS_BYTES],
            offset_seconds: 0,
            offset_ns: 0,
            stopped: None,
            seen_second: 0,
            seen_periods: 0,
            backlog: 0,
        };
        let mut rtc = Self { name: name.into(), missed_ticks, preset: preset.into(), wiring, registers };
        rtc.reset();
        rtc
    }

    /// Whether the guest masks NMI (bit 7 of the index port).
    pub fn is_nmi_masked(&self) -> bool {
        self.registers.nmi_masked
    }

    /// The calendar now: seconds since 1970 and nanoseconds.
    fn calendar(&self) -> (i64, u64) {
        let r = &self.registers;
        let wall = self.wiring.clock.wall_ns();
        let ns = wall % SECOND_NS + u64::from(r.offset_ns);
        let seconds = (wall / SECOND_NS) as i64 + (ns / SECOND_NS) as i64;
        (seconds.saturating_add(r.offset_seconds), ns % SECOND_NS)
    }

    /// Makes the calendar show `seconds` and `ns` now.
    fn set_calendar(&mut self, seconds: i64, ns: u64) {
        let wall = self.wiring.clock.wall_ns();
        let (wall_seconds, wall_ns) = ((wall / SECOND_NS) as i64, wall % SECOND_NS);
        let borrow = ns < wall_ns;
        let r = &mut self.registers;
        r.offset_ns = (ns + if borrow { SECOND_NS } else { 0 } - wall_ns) as u32;
        r.offset_seconds = seconds.saturating_sub(wall_seconds).saturating_sub(i64::from(borrow));
        r.seen_second = seconds;
    }

    fn time(&self) -> DateTime {
        match self.registers.stopped {
            Some(stopped) => stopped.time,
            None => DateTime::from_seconds(self.calendar().0),
        }
    }

    fn must_stand(&self) -> bool {
        self.registers.b & B_SET != 0 || self.divider_is_reset()
    }
    fn divider_is_reset(&self) -> bool {
        self.registers.a >> 5 & 3 == 3
    }

    /// A or B changed: stops or starts the calendar.
    fn stop_or_start(&mut self) {
        let (stand, reset) = (self.must_stand(), self.divider_is_reset());
        let time = self.time();
        match &mut self.registers.stopped {
            Some(stopped) if stand => stopped.divider_reset |= reset,
            Some(stopped) => {
                let Stopped { time, divider_reset } = *stopped;
                self.registers.stopped = None;
                let ns = if divider_reset { SECOND_NS / 2 } else { self.calendar().1 };
                self.set_calendar(time.to_seconds(), ns);
            }
            none if stand => *none = Some(Stopped { time, divider_reset: reset }),
            _ => {}
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.registers.b & B_BINARY != 0 { value } else { ((value / 10) << 4).wrapping_add(value % 10) }
    }
    fn decode(&self, value: u8) -> u8 {
        if self.registers.b & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0xF) }
    }
    fn encode_hour(&self, hour: u8) -> u8 {
        if self.registers.b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOUR_PM } else { 0 };
        self.encode((hour % 12 + 11) % 12 + 1) | pm
    }
    fn decode_hour(&self, value: u8) -> u8 {
        if self.registers.b & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & !HOUR_PM) % 12 + if value & HOUR_PM != 0 { 12 } else { 0 }
    }

    /// The first second after `after` that the alarm names.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let [second, minute, hour] = self.registers.alarm;
        let is = |alarm: u8, value: u8| alarm >= ANY || alarm == value;
        let midnight = after.div_euclid(86_400) * 86_400;
        for day in 0..2 {
            for h in (0..24).filter(|h| is(hour, self.encode_hour(*h))) {
                let at = midnight + day * 86_400 + i64::from(h) * 3600;
                if at + 3600 <= after {
                    continue;
                }
                for m in (0..60).filter(|m| is(minute, self.encode(*m))) {
                    let seconds = (0..60).filter(|s| is(second, self.encode(*s)));
                    let found = seconds.map(|s| at + i64::from(m) * 60 + i64::from(s)).find(|t| *t > after);
                    if found.is_some() {
                        return found;
                    }
                }
            }
        }
        None
    }

    /// Oscillator ticks of a periodic interrupt.
    fn period(&self) -> Option<u64> {
        match self.registers.a & 0xF {
            0 => None,
            // 256 and 128 a second, as with 8 and 9.
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn restart_periods(&mut self) {
        let ticks = OSCILLATOR.ticks(self.wiring.clock.now());
        self.registers.seen_periods = self.period().map_or(0, |p| ticks / p);
        self.registers.backlog = 0;
    }

    /// Brings the flags of C up to date.
    fn catch_up(&mut self) {
        if let Some(period) = self.period() {
            let periods = OSCILLATOR.ticks(self.wiring.clock.now()) / period;
            let reinject = self.missed_ticks == MissedTicks::Reinject;
            let r = &mut self.registers;
            let new = periods.saturating_sub(r.seen_periods);
            r.seen_periods = periods;
            if new > 0 {
                let merged = new - u64::from(r.c & PERIODIC == 0);
                r.c |= PERIODIC;
                if reinject && r.b & PERIODIC != 0 {
                    r.backlog = (r.backlog + merged).min(u64::from(OSCILLATOR.0) / period);
                }
            }
        }
        if self.registers.stopped.is_none() {
            let second = self.calendar().0;
            let seen = core::mem::replace(&mut self.registers.seen_second, second);
            if second != seen {
                self.registers.c |= UPDATED;
            }
            if second > seen && self.next_alarm(seen).is_some_and(|at| at <= second) {
                self.registers.c |= ALARM;
            }
        }
    }

    fn interrupts(&self) -> bool {
        self.registers.b & self.registers.c & SOURCES != 0 && !self.wiring.replaced.is_on()
    }

    /// Drives the line and sets the timer.
    fn update(&mut self) {
        let level = self.interrupts();
        self.wiring.irq.set(level);
        self.arm();
    }

    /// Guest time that passes in `ns` of the wall clock.
    fn guest_ns(&self, ns: u64) -> u64 {
        let clock = &self.wiring.clock;
        let per_second =
            clock.host_ns_until(clock.now().saturating_add(SECOND_NS)).unwrap_or(SECOND_NS).max(1);
        (u128::from(ns) * u128::from(SECOND_NS)).div_ceil(u128::from(per_second)).min(u128::from(u64::MAX))
            as u64
    }

    fn arm(&self) {
        let r = &self.registers;
        // What is flagged already has nothing new to tell.
        let waits = r.b & !r.c & SOURCES;
        let now = self.wiring.clock.now();
        let mut next: Option<GuestNs> = None;
        let mut at = |when: GuestNs| next = Some(next.map_or(when, |n| n.min(when)));
        if waits & PERIODIC != 0
            && let Some(period) = self.period()
        {
            at(OSCILLATOR.when(r.seen_periods.saturating_add(1).saturating_mul(period)));
        }
        if r.stopped.is_none() && waits & (UPDATED | ALARM) != 0 {
            let (second, ns) = self.calendar();
            let alarm = if waits & ALARM != 0 { self.next_alarm(second) } else { None };
            let until = if waits & UPDATED != 0 { Some(second.saturating_add(1)) } else { alarm };
            if let Some(until) = until {
                let wall = (until.saturating_sub(second) as u64).saturating_mul(SECOND_NS) - ns;
                at(now.saturating_add(self.guest_ns(wall.min(LONGEST_WAIT_NS))));
            }
        }
        match next {
            Some(when) => self.wiring.timer.arm(when.max(now.saturating_add(SHORTEST_TIMER_NS))),
            None => self.wiring.timer.cancel(),
        }
    }

    fn read(&mut self) -> u8 {
        self.catch_up();
        let time = self.time();
        let value = match self.registers.index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            index @ (SECONDS_ALARM | MINUTES_ALARM | HOURS_ALARM) => {
                self.registers.alarm[usize::from(index / 2)]
            }
            WEEKDAY => time.weekday(),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode((time.year % 100) as u8),
            CENTURY => self.encode((time.year / 100) as u8),
            REGISTER_A => {
                let updating = self.registers.stopped.is_none() && self.calendar().1 >= SECOND_NS - UPDATE_NS;
                self.registers.a | if updating { A_UPDATING } else { 0 }
            }
            REGISTER_B => self.registers.b,
            REGISTER_C => self.read_flags(),
            REGISTER_D => D_VALID,
            index => self.registers.ram[usize::from(index)],
        };
        self.update();
        value
    }

    /// Register C: reading it is the acknowledgement.
    fn read_flags(&mut self) -> u8 {
        let interrupting = self.registers.b & self.registers.c & SOURCES != 0;
        let flags = core::mem::take(&mut self.registers.c);
        self.wiring.irq.set(false);
        if self.registers.backlog > 0 {
            self.registers.backlog -= 1;
            self.registers.c = PERIODIC;
        }
        flags | if interrupting { C_INTERRUPT } else { 0 }
    }

    fn write(&mut self, value: u8) {
        self.catch_up();
        match self.registers.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => self.write_time(value),
            index @ (SECONDS_ALARM | MINUTES_ALARM | HOURS_ALARM) => {
                self.registers.alarm[usize::from(index / 2)] = value;
            }
            REGISTER_A => {
                let old = self.registers.a;
                self.registers.a = value & !A_UPDATING;
                if (old ^ value) & 0x0F != 0 {
                    self.restart_periods();
                }
                self.stop_or_start();
            }
            REGISTER_B => {
                if value & PERIODIC == 0 {
                    self.registers.backlog = 0;
                }
                self.registers.b = value;
                self.stop_or_start();
            }
            REGISTER_C | REGISTER_D => {}
            index => self.registers.ram[usize::from(index)] = value,
        }
        self.update();
    }

    fn write_time(&mut self, value: u8) {
        let mut time = self.time();
        let century = time.year / 100;
        match self.registers.index {
            SECONDS => time.second = self.decode(value),
            MINUTES => time.minute = self.decode(value),
            HOURS => time.hour = self.decode_hour(value),
            DAY => time.day = self.decode(value),
            MONTH => time.month = self.decode(value),
            YEAR => time.year = century * 100 + u16::from(self.decode(value)).min(99),
            CENTURY => time.year = u16::from(self.decode(value)).min(99) * 100 + time.year % 100,
            // The weekday follows from the date.
            _ => return,
        }
        match &mut self.registers.stopped {
            Some(stopped) => stopped.time = time,
            None => {
                let ns = self.calendar().1;
                self.set_calendar(time.to_seconds(), ns);
            }
        }
    }
}

impl IoHandler for RtcCmos {
    fn io_read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        // The index port cannot be read.
        for (at, byte) in (offset..2).zip(data) {
            if at == 1 {
                *byte = self.read();
            }
        }
        Ok(())
    }
    fn io_write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        for (at, byte) in (offset..2).zip(data) {
            if at == 0 {
                self.registers.index = byte & 0x7F;
                self.registers.nmi_masked = byte & 0x80 != 0;
            } else {
                self.write(*byte);
            }
        }
        Ok(())
    }
}

impl Device for RtcCmos {
    crate::registers_without_work!();
    fn poll(&mut self) {
        self.catch_up();
        self.update();
    }
    fn resume(&mut self) {
        self.poll();
    }
    fn reset(&mut self) {
        let r = &mut self.registers;
        (r.index, r.nmi_masked, r.a, r.b, r.c) = (0, false, A_RESET, B_RESET, 0);
        for (at, value) in &self.preset {
            r.ram[usize::from(at & 0x7F)] = *value;
        }
        self.stop_or_start();
        self.registers.seen_second = self.calendar().0;
        self.restart_periods();
        self.wiring.irq.set(false);
        self.wiring.timer.cancel();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&self.registers))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.registers = from_blob(blob)?;
        let level = self.interrupts();
        self.wiring.irq.restore(level);
        self.arm();
        Ok(())
    }
}
