//! ACPI fixed hardware (ACPI 6.4, 4.8): PM1a events and control, the PM timer, one block of general-purpose
//! events, the power button.
//!
//! Called by: the bus, the machine (power button, general-purpose events), its timer through `poll`.
//!
//! Always in ACPI mode (the FADT has no SMI command). One region, laid out as on the q35's LPC bridge:
//! 0 PM1a status and enable, 4 PM1a control, 8 PM timer, 20h GPE0 status and enable.

#[cfg(test)]
mod tests;

use crate::PlatformRequests;
use crate::rate::Rate;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use device::{Device, IoError, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};
use guest_time::{GuestClock, Timer};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

/// Bytes of the region.
pub const REGION_BYTES: u64 = 0x80;
/// Ticks a second of the PM timer.
pub const TIMER_RATE: Rate = Rate(3_579_545);
/// General-purpose events.
pub const GPES: u8 = 64;

const STATUS: u64 = 0x00;
const ENABLE: u64 = 0x02;
const CONTROL: u64 = 0x04;
const TIMER: u64 = 0x08;
const GPE_STATUS: u64 = 0x20;
const GPE_ENABLE: u64 = 0x28;

/// Bits of PM1 status and enable.
mod event {
    pub const TIMER: u16 = 1 << 0;
    pub const GLOBAL: u16 = 1 << 5;
    pub const POWER_BUTTON: u16 = 1 << 8;
    pub const RTC: u16 = 1 << 10;
    pub const WAKE: u16 = 1 << 15;
    pub const STATUS: u16 = TIMER | GLOBAL | POWER_BUTTON | RTC | WAKE;
    pub const ENABLE: u16 = TIMER | GLOBAL | POWER_BUTTON | RTC;
}
/// Bits of PM1 control.
mod control {
    pub const SCI_ENABLE: u16 = 1 << 0;
    pub const SLEEP_TYPE: u16 = 7 << 10;
    pub const SLEEP: u16 = 1 << 13;
    pub const WRITABLE: u16 = SLEEP_TYPE | 1 << 1;
}

/// Width of the PM timer, as the FADT says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerWidth {
    /// 24 bits.
    Bits24,
    /// 32 bits (TMR_VAL_EXT).
    Bits32,
}

impl TimerWidth {
    fn bits(self) -> u32 {
        match self {
            Self::Bits24 => 24,
            Self::Bits32 => 32,
        }
    }
}

/// Configuration of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmConfig {
    /// SLP_TYP that turns the machine off (`\_S5`).
    pub sleep_type_s5: u8,
    /// Width of the timer.
    pub timer_width: TimerWidth,
}

/// What the block is connected to.
pub struct PmWiring {
    /// The SCI: level, active high.
    pub sci: IrqLine,
    /// All time.
    pub clock: GuestClock,
    /// Has the block polled.
    pub timer: Box<dyn Timer>,
    /// Power off.
    pub requests: Arc<dyn PlatformRequests>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    /// Changes of the timer's top bit that the status has seen.
    seen_carries: u64,
}

/// See the module's header.
pub struct PowerManagement {
    name: String,
    config: PmConfig,
    wiring: PmWiring,
    registers: Registers,
}

impl PowerManagement {
    /// A block after power-up.
    pub fn new(name: &str, config: PmConfig, wiring: PmWiring) -> Self {
        let mut pm = Self { name: name.into(), config, wiring, registers: Registers::default() };
        pm.registers.seen_carries = pm.carries();
        pm
    }

    /// Somebody presses the power button.
    pub fn press_power_button(&mut self) {
        self.registers.status |= event::POWER_BUTTON;
        self.update();
    }

    /// A general-purpose event happens (numbers from [`GPES`] on are none).
    pub fn raise_gpe(&mut self, number: u8) {
        if number < GPES {
            self.registers.gpe_status |= 1 << number;
            self.update();
        }
    }

    /// How often the timer's top bit has changed.
    fn carries(&self) -> u64 {
        TIMER_RATE.ticks(self.wiring.clock.now()) >> (self.config.timer_width.bits() - 1)
    }

    fn timer_value(&self) -> u64 {
        TIMER_RATE.ticks(self.wiring.clock.now()) & ((1 << self.config.timer_width.bits()) - 1)
    }

    fn catch_up(&mut self) {
        let carries = self.carries();
        if core::mem::replace(&mut self.registers.seen_carries, carries) != carries {
            self.registers.status |= event::TIMER;
        }
    }

    fn sci(&self) -> bool {
        let r = &self.registers;
        r.status & r.enable & event::ENABLE != 0 || r.gpe_status & r.gpe_enable != 0
    }

    fn arm(&self) {
        let r = &self.registers;
        if r.enable & !r.status & event::TIMER != 0 {
            let tick = r.seen_carries.saturating_add(1).checked_shl(self.config.timer_width.bits() - 1);
            self.wiring.timer.arm(TIMER_RATE.when(tick.unwrap_or(u64::MAX)));
        } else {
            self.wiring.timer.cancel();
        }
    }

    fn update(&mut self) {
        let level = self.sci();
        self.wiring.sci.set(level);
        self.arm();
    }

    fn read_byte(&self, at: u64, timer: u64) -> u8 {
        let r = &self.registers;
        let (register, value) = match at {
            STATUS..ENABLE => (STATUS, r.status.into()),
            ENABLE..CONTROL => (ENABLE, r.enable.into()),
            CONTROL..0x06 => (CONTROL, (r.control | control::SCI_ENABLE).into()),
            TIMER..0x0C => (TIMER, timer),
            GPE_STATUS..GPE_ENABLE => (GPE_STATUS, r.gpe_status),
            GPE_ENABLE..0x30 => (GPE_ENABLE, r.gpe_enable),
            _ => return 0,
        };
        (value >> (8 * (at - register))) as u8
    }

    fn write_byte(&mut self, at: u64, value: u8) {
        let r = &mut self.registers;
        let replace = |old: u64, register: u64| {
            let shift = 8 * (at - register);
            (old & !(0xFF << shift)) | u64::from(value) << shift
        };
        match at {
            STATUS..ENABLE => r.status &= !(replace(0, STATUS) as u16),
            ENABLE..CONTROL => r.enable = replace(r.enable.into(), ENABLE) as u16 & event::ENABLE,
            CONTROL..0x06 => {
                let value = replace(r.control.into(), CONTROL) as u16;
                r.control = value & control::WRITABLE;
                let sleep_type = (value & control::SLEEP_TYPE) >> 10;
                // Other sleep states are not offered to the guest.
                if value & control::SLEEP != 0 && sleep_type == u16::from(self.config.sleep_type_s5) {
                    self.wiring.requests.power_off();
                }
            }
            GPE_STATUS..GPE_ENABLE => r.gpe_status &= !replace(0, GPE_STATUS),
            GPE_ENABLE..0x30 => r.gpe_enable = replace(r.gpe_enable, GPE_ENABLE),
            _ => {}
        }
    }
}

impl IoHandler for PowerManagement {
    fn io_read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        // The hot path of guests that keep time with it: one look at the clock.
        if offset == TIMER {
            device::write_le(data, self.timer_value());
            return Ok(());
        }
        self.catch_up();
        let timer = self.timer_value();
        for (at, byte) in (offset..REGION_BYTES).zip(data) {
            *byte = self.read_byte(at, timer);
        }
        self.update();
        Ok(())
    }
    fn io_write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        self.catch_up();
        for (at, byte) in (offset..REGION_BYTES).zip(data) {
            self.write_byte(at, *byte);
        }
        self.update();
        Ok(())
    }
}

impl Device for PowerManagement {
    crate::registers_without_work!();
    fn poll(&mut self) {
        self.catch_up();
        self.update();
    }
    fn resume(&mut self) {
        self.poll();
    }
    fn reset(&mut self) {
        self.registers = Registers { seen_carries: self.carries(), ..Registers::default() };
        self.wiring.sci.set(false);
        self.wiring.timer.cancel();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&self.registers))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.registers = from_blob(blob)?;
        let level = self.sci();
        self.wiring.sci.restore(level);
        self.arm();
        Ok(())
    }
}

impl SavedState for Registers {
    const KIND: &'static str = "pm";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { status, enable, control, gpe_status, gpe_enable, seen_carries } = self;
        w.uint(1, *status).uint(2, *enable).uint(3, *control).uint(4, *gpe_status).uint(5, *gpe_enable);
        w.uint(6, *seen_carries);
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self {
            status: r.uint::<u16>(1)? & event::STATUS,
            enable: r.uint::<u16>(2)? & event::ENABLE,
            control: r.uint::<u16>(3)? & control::WRITABLE,
            gpe_status: r.uint(4)?,
            gpe_enable: r.uint(5)?,
            seen_carries: r.uint(6)?,
        })
    }
}
