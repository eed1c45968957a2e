//! The high precision event timer (IA-PC HPET 1.0a): a 64-bit counter at 100 MHz of guest time and three
//! timers, each one-shot or periodic, by line, legacy replacement or message.
//!
//! Called by: the bus, its timer through `poll`.
//!
//! Nothing ticks: each running timer knows the tick at which it is due. Missed periods coalesce.

mod state;
#[cfg(test)]
mod tests;

use crate::legacy::LegacyReplacement;
use crate::rate::SHORTEST_TIMER_NS;
use crate::{MessageSink, MsiMessage};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use device::{Device, IoError, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};
use guest_time::{GuestClock, Timer};
use saved_state::{from_blob, to_blob};

/// Bytes of the region.
pub const REGION_BYTES: u64 = 0x400;
/// Timers.
pub const TIMERS: usize = 3;
/// Nanoseconds of a tick.
const TICK_NS: u64 = 10;

/// Period in femtoseconds; revision 1, three timers, 64 bits, legacy replacement, vendor 8086h.
const CAPABILITIES: u64 = (TICK_NS * 1_000_000) << 32 | 0x8086_A201;

const CAPABILITIES_AT: u64 = 0x000;
const CONFIG_AT: u64 = 0x010;
const STATUS_AT: u64 = 0x020;
const COUNTER_AT: u64 = 0x0F0;
const TIMERS_AT: u64 = 0x100;
const TIMER_BYTES: u64 = 0x20;

/// General configuration.
mod general {
    pub const ENABLE: u64 = 1 << 0;
    pub const LEGACY: u64 = 1 << 1;
}

/// A timer's configuration.
mod config {
    pub const LEVEL: u64 = 1 << 1;
    pub const INTERRUPT: u64 = 1 << 2;
    pub const PERIODIC: u64 = 1 << 3;
    pub const PERIODIC_CAPABLE: u64 = 1 << 4;
    pub const SIZE_64: u64 = 1 << 5;
    pub const SET_VALUE: u64 = 1 << 6;
    pub const FORCE_32: u64 = 1 << 8;
    pub const ROUTE: u64 = 0x1F << 9;
    pub const MESSAGE: u64 = 1 << 14;
    pub const MESSAGE_CAPABLE: u64 = 1 << 15;
    pub const WRITABLE: u64 = LEVEL | INTERRUPT | PERIODIC | SET_VALUE | FORCE_32 | ROUTE | MESSAGE;
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct HpetTimer {
    /// Writable bits of the configuration.
    config: u64,
    comparator: u64,
    period: u64,
    /// Message: data below, address above.
    message: u64,
    /// Tick of guest time at which it fires next.
    due: Option<u64>,
}

impl HpetTimer {
    fn reset() -> Self {
        Self { config: 0, comparator: u64::MAX, period: 0, message: 0, due: None }
    }
    fn has(&self, bits: u64) -> bool {
        self.config & bits == bits
    }
    fn route(&self) -> u8 {
        ((self.config & config::ROUTE) >> 9) as u8
    }
    fn mask(&self) -> u64 {
        if self.has(config::FORCE_32) { u64::from(u32::MAX) } else { u64::MAX }
    }

    /// Due when the counter, which stands at `counter` at `tick`, reaches the comparator.
    fn schedule(&mut self, tick: u64, counter: u64) {
        let ahead = self.comparator.wrapping_sub(counter) & self.mask();
        self.due = tick.checked_add(ahead);
    }

    /// Whether it was due by `tick`; if so, goes on to its next match.
    fn take_due(&mut self, tick: u64) -> bool {
        let Some(due) = self.due.filter(|due| *due <= tick) else { return false };
        self.due = None;
        if self.has(config::PERIODIC) {
            let period = self.period & self.mask();
            if let Some(missed) = (tick - due).checked_div(period) {
                let step = period.saturating_mul(missed + 1);
                self.comparator = self.comparator.wrapping_add(step) & self.mask();
                self.due = due.checked_add(step);
            }
        } else if self.has(config::FORCE_32) {
            // Again when 32 bits have wrapped.
            let wrap = 1 << 32;
            self.due = due.checked_add(((tick - due) / wrap + 1) * wrap);
        }
        true
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    config: u64,
    /// Level-triggered interrupts that are active.
    status: u64,
    /// The counter while it stands; while it runs, what it is ahead of the ticks of guest time.
    counter: u64,
    timers: [HpetTimer; TIMERS],
}

impl Registers {
    fn reset() -> Self {
        Self { config: 0, status: 0, counter: 0, timers: core::array::from_fn(|_| HpetTimer::reset()) }
    }
    fn is_running(&self) -> bool {
        self.config & general::ENABLE != 0
    }
    fn counter_at(&self, tick: u64) -> u64 {
        if self.is_running() { self.counter.wrapping_add(tick) } else { self.counter }
    }
}

/// What an HPET is connected to.
pub struct HpetWiring {
    /// The I/O APIC pins that its timers may use, with their lines.
    pub lines: Vec<(u8, IrqLine)>,
    /// IRQ 0 and IRQ 8, for legacy replacement.
    pub legacy: [IrqLine; 2],
    /// For timers that send messages; without it none can.
    pub messages: Option<Arc<dyn MessageSink>>,
    /// All time.
    pub clock: GuestClock,
    /// Has the chip polled.
    pub timer: Box<dyn Timer>,
    /// Shared with the 8254 and the RTC.
    pub replaced: LegacyReplacement,
}

/// See the module's header.
pub struct Hpet {
    name: String,
    wiring: HpetWiring,
    registers: Registers,
}

impl Hpet {
    /// An HPET after power-up.
    pub fn new(name: &str, wiring: HpetWiring) -> Self {
        Self { name: name.into(), wiring, registers: Registers::reset() }
    }

    fn tick(&self) -> u64 {
        self.wiring.clock.now() / TICK_NS
    }

    /// Pins that timers may be routed to, a bit a pin.
    fn routes(&self) -> u32 {
        self.wiring.lines.iter().fold(0, |bits, (pin, _)| bits | 1u32.checked_shl((*pin).into()).unwrap_or(0))
    }

    /// Configuration bits that are what the hardware is.
    fn fixed_config(&self) -> u64 {
        let message = if self.wiring.messages.is_some() { config::MESSAGE_CAPABLE } else { 0 };
        config::PERIODIC_CAPABLE | config::SIZE_64 | message | u64::from(self.routes()) << 32
    }

    fn catch_up(&mut self) {
        let tick = self.tick();
        for i in 0..TIMERS {
            if self.registers.timers[i].take_due(tick) && self.registers.timers[i].has(config::INTERRUPT) {
                self.fire(i);
            }
        }
    }

    fn is_replacing(&self, timer: usize) -> bool {
        timer < 2 && self.registers.config & general::LEGACY != 0
    }

    fn fire(&mut self, i: usize) {
        let replacing = self.is_replacing(i);
        let timer = &self.registers.timers[i];
        if !replacing && timer.has(config::MESSAGE) {
            if let Some(messages) = &self.wiring.messages {
                messages.send(MsiMessage { address: timer.message >> 32, data: timer.message as u32 });
            }
        } else if timer.has(config::LEVEL) {
            self.registers.status |= 1 << i;
        } else if replacing {
            self.wiring.legacy[i].pulse();
        } else {
            let route = timer.route();
            if let Some((_, line)) = self.wiring.lines.iter_mut().find(|(pin, _)| *pin == route) {
                line.pulse();
            }
        }
    }

    /// The levels of pin `route`, and of a legacy line.
    fn levels(&self) -> (u32, [bool; 2]) {
        let (mut pins, mut legacy) = (0, [false; 2]);
        for (i, timer) in self.registers.timers.iter().enumerate() {
            if self.registers.status & 1 << i == 0 || !timer.has(config::INTERRUPT | config::LEVEL) {
                continue;
            }
            if self.is_replacing(i) {
                legacy[i] = true;
            } else if !timer.has(config::MESSAGE) {
                pins |= 1 << timer.route();
            }
        }
        (pins, legacy)
    }

    /// Drives the level-triggered lines and sets the timer.
    fn update(&mut self) {
        let (pins, legacy) = self.levels();
        for (pin, line) in &mut self.wiring.lines {
            line.set(pins >> (*pin & 31) & 1 != 0);
        }
        for (line, level) in self.wiring.legacy.iter_mut().zip(legacy) {
            line.set(level);
        }
        self.arm();
    }

    fn arm(&self) {
        let due =
            self.registers.timers.iter().filter(|t| t.has(config::INTERRUPT)).filter_map(|t| t.due).min();
        let earliest = self.wiring.clock.now().saturating_add(SHORTEST_TIMER_NS);
        match due.and_then(|tick| tick.checked_mul(TICK_NS)) {
            Some(at) => self.wiring.timer.arm(at.max(earliest)),
            None => self.wiring.timer.cancel(),
        }
    }

    fn schedule(&mut self, i: usize) {
        let (tick, r) = (self.tick(), &mut self.registers);
        let counter = r.counter_at(tick);
        if r.is_running() {
            r.timers[i].schedule(tick, counter);
        } else {
            r.timers[i].due = None;
        }
    }

    /// The 64-bit register at `at`.
    fn read(&self, at: u64) -> u64 {
        let r = &self.registers;
        match at {
            CAPABILITIES_AT => CAPABILITIES,
            CONFIG_AT => r.config,
            STATUS_AT => r.status,
            COUNTER_AT => r.counter_at(self.tick()),
            _ => match timer_register(at) {
                Some((i, 0x00)) => r.timers[i].config | self.fixed_config(),
                Some((i, 0x08)) => r.timers[i].comparator,
                Some((i, 0x10)) => r.timers[i].message,
                _ => 0,
            },
        }
    }

    /// Writes the bits of `mask` of the register at `at`.
    fn write(&mut self, at: u64, value: u64, mask: u64) {
        let merged = |old: u64| (old & !mask) | (value & mask);
        match at {
            CONFIG_AT => self.write_config(merged(self.registers.config)),
            STATUS_AT => self.registers.status &= !(value & mask),
            COUNTER_AT => {
                let tick = self.tick();
                let counter = merged(self.registers.counter_at(tick));
                let base = if self.registers.is_running() { tick } else { 0 };
                self.registers.counter = counter.wrapping_sub(base);
                (0..TIMERS).for_each(|i| self.schedule(i));
            }
            _ => match timer_register(at) {
                Some((i, 0x00)) => self.write_timer_config(i, merged(self.registers.timers[i].config)),
                Some((i, 0x08)) => self.write_comparator(i, value, mask),
                Some((i, 0x10)) => {
                    let message = merged(self.registers.timers[i].message);
                    self.registers.timers[i].message = message;
                }
                _ => {}
            },
        }
    }

    fn write_config(&mut self, value: u64) {
        let tick = self.tick();
        let counter = self.registers.counter_at(tick);
        self.registers.config = value & (general::ENABLE | general::LEGACY);
        let base = if self.registers.is_running() { tick } else { 0 };
        self.registers.counter = counter.wrapping_sub(base);
        self.wiring.replaced.set(value & general::LEGACY != 0);
        for i in 0..TIMERS {
            if !self.registers.is_running() || self.registers.timers[i].due.is_none() {
                self.schedule(i);
            }
        }
    }

    fn write_timer_config(&mut self, i: usize, value: u64) {
        let routes = self.routes();
        let can_send = self.wiring.messages.is_some();
        let timer = &mut self.registers.timers[i];
        let (old, mut new) = (timer.config, value & config::WRITABLE);
        if routes & 1 << ((new & config::ROUTE) >> 9) == 0 {
            new = (new & !config::ROUTE) | (old & config::ROUTE);
        }
        if !can_send {
            new &= !config::MESSAGE;
        }
        timer.config = new;
        timer.comparator &= timer.mask();
        if new & config::LEVEL == 0 {
            self.registers.status &= !(1 << i);
        }
        if (old ^ new) & (config::FORCE_32 | config::PERIODIC) != 0 {
            self.schedule(i);
        }
    }

    /// In periodic mode a write is the period; with "set value" it is the next match as well.
    fn write_comparator(&mut self, i: usize, value: u64, mask: u64) {
        let timer = &mut self.registers.timers[i];
        let merged = |old: u64| (old & !mask) | (value & mask);
        let periodic = timer.has(config::PERIODIC);
        let sets = !periodic || timer.has(config::SET_VALUE);
        timer.config &= !config::SET_VALUE;
        if periodic {
            timer.period = merged(timer.period) & timer.mask();
        }
        if sets {
            timer.comparator = merged(timer.comparator) & timer.mask();
        }
        if sets || timer.due.is_none() {
            self.schedule(i);
        }
    }
}

/// Timer and offset in its registers.
fn timer_register(at: u64) -> Option<(usize, u64)> {
    let at = at.checked_sub(TIMERS_AT)?;
    let timer = (at / TIMER_BYTES) as usize;
    (timer < TIMERS).then_some((timer, at % TIMER_BYTES))
}

impl IoHandler for Hpet {
    fn io_read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        let (at, shift) = (offset & !7, offset & 7);
        if shift + data.len() as u64 > 8 {
            return Err(IoError::Width);
        }
        // The counter is read all the time: what it shows has nothing to do with the timers.
        if at != COUNTER_AT {
            self.catch_up();
        }
        device::write_le(data, self.read(at) >> (8 * shift));
        if at != COUNTER_AT {
            self.update();
        }
        Ok(())
    }
    fn io_write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let value = device::read_le(data);
        self.catch_up();
        match (offset & 7, data.len()) {
            (0, 8) => self.write(offset, value, u64::MAX),
            (0, 4) => self.write(offset, value, 0xFFFF_FFFF),
            (4, 4) => self.write(offset - 4, value << 32, 0xFFFF_FFFF << 32),
            _ => return Err(IoError::Width),
        }
        self.catch_up();
        self.update();
        Ok(())
    }
}

impl Device for Hpet {
    crate::registers_without_work!();
    fn poll(&mut self) {
        self.catch_up();
        self.update();
    }
    fn resume(&mut self) {
        self.poll();
    }
    fn reset(&mut self) {
        self.registers = Registers::reset();
        self.wiring.replaced.set(false);
        self.update();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&self.registers))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        let mut registers: Registers = from_blob(blob)?;
        let allowed = if self.wiring.messages.is_some() { u64::MAX } else { !config::MESSAGE };
        registers.timers.iter_mut().for_each(|t| t.config &= allowed);
        self.registers = registers;
        self.wiring.replaced.set(self.registers.config & general::LEGACY != 0);
        let (pins, legacy) = self.levels();
        for (pin, line) in &mut self.wiring.lines {
            line.restore(pins >> (*pin & 31) & 1 != 0);
        }
        for (line, level) in self.wiring.legacy.iter_mut().zip(legacy) {
            line.restore(level);
        }
        self.arm();
        Ok(())
    }
}
