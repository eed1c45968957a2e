//! The i8042 keyboard controller (IBM AT Technical Reference; PS/2), with nothing plugged in: self tests, the
//! command byte, A20 and the reset line.
//!
//! Called by: the bus.
//!
//! Decision: no keyboard and no mouse. What a driver sends to the keyboard comes back at once as a time-out
//! (status bit 6, data FEh), as the controller says of an empty socket, so that a probe ends without waiting.
//! There is no auxiliary port: its tests fail. A20 is kept as a bit, the address line itself is always open.

#[cfg(test)]
mod tests;

use crate::PlatformRequests;
use alloc::string::String;
use alloc::sync::Arc;
use device::{Device, IoError, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

/// Region of port 60h.
pub const DATA_REGION: usize = 0;
/// Region of port 64h.
pub const COMMAND_REGION: usize = 1;

/// Status register.
mod status {
    pub const OUTPUT_FULL: u8 = 1 << 0;
    pub const SYSTEM: u8 = 1 << 2;
    pub const COMMAND: u8 = 1 << 3;
    pub const UNLOCKED: u8 = 1 << 4;
    pub const TIMEOUT: u8 = 1 << 6;
}
/// Command byte.
mod command_byte {
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub const SYSTEM: u8 = 1 << 2;
    pub const KEYBOARD_OFF: u8 = 1 << 4;
    pub const AUXILIARY_OFF: u8 = 1 << 5;
}
/// Output port.
mod output_port {
    pub const NOT_RESET: u8 = 1 << 0;
    pub const A20: u8 = 1 << 1;
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 4;
}

/// Commands (port 64h).
mod command {
    pub const READ_RAM: u8 = 0x20;
    pub const READ_RAM_LAST: u8 = 0x3F;
    pub const WRITE_RAM: u8 = 0x60;
    pub const WRITE_RAM_LAST: u8 = 0x7F;
    pub const AUXILIARY_OFF: u8 = 0xA7;
    pub const AUXILIARY_ON: u8 = 0xA8;
    pub const TEST_AUXILIARY: u8 = 0xA9;
    pub const SELF_TEST: u8 = 0xAA;
    pub const TEST_KEYBOARD: u8 = 0xAB;
    pub const KEYBOARD_OFF: u8 = 0xAD;
    pub const KEYBOARD_ON: u8 = 0xAE;
    pub const READ_INPUT: u8 = 0xC0;
    pub const READ_OUTPUT: u8 = 0xD0;
    pub const WRITE_OUTPUT: u8 = 0xD1;
    pub const WRITE_KEYBOARD_BUFFER: u8 = 0xD2;
    pub const WRITE_AUXILIARY_BUFFER: u8 = 0xD3;
    pub const WRITE_AUXILIARY: u8 = 0xD4;
    pub const PULSE: u8 = 0xF0;
}

/// Answers.
const SELF_TEST_PASSED: u8 = 0x55;
const PORT_FINE: u8 = 0x00;
const CLOCK_STUCK_LOW: u8 = 0x01;
const NO_ANSWER: u8 = 0xFE;
/// Keyboard not locked.
const INPUT_PORT: u8 = 0x80;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    /// The controller's RAM; byte 0 is the command byte.
    ram: [u8; 32],
    output_port: u8,
    /// The output buffer: a byte, and whether it stands for a time-out.
    output: Option<u8>,
    timed_out: bool,
    /// The last write was a command (port 64h).
    was_command: bool,
    /// The command that the next data byte belongs to; 0 for none.
    pending: u8,
}

impl Registers {
    fn reset() -> Self {
        let mut ram = [0; 32];
        ram[0] = command_byte::KEYBOARD_OFF | command_byte::AUXILIARY_OFF;
        Self {
            ram,
            output_port: output_port::NOT_RESET | output_port::A20,
            output: None,
            timed_out: false,
            was_command: false,
            pending: 0,
        }
    }
    fn interrupts(&self) -> bool {
        self.output.is_some() && self.ram[0] & command_byte::KEYBOARD_INTERRUPT != 0
    }
}

/// See the module's header. Two regions of 1 byte: data, command and status.
pub struct I8042 {
    name: String,
    irq: IrqLine,
    requests: Arc<dyn PlatformRequests>,
    registers: Registers,
}

impl I8042 {
    /// A controller after power-up; `irq` is the keyboard's.
    pub fn new(name: &str, irq: IrqLine, requests: Arc<dyn PlatformRequests>) -> Self {
        Self { name: name.into(), irq, requests, registers: Registers::reset() }
    }

    fn answer(&mut self, byte: u8) {
        self.registers.output = Some(byte);
        self.registers.timed_out = false;
    }

    fn status(&self) -> u8 {
        let r = &self.registers;
        let mut value = status::UNLOCKED;
        value |= if r.output.is_some() { status::OUTPUT_FULL } else { 0 };
        value |= if r.output.is_some() && r.timed_out { status::TIMEOUT } else { 0 };
        value |= if r.was_command { status::COMMAND } else { 0 };
        value | if r.ram[0] & command_byte::SYSTEM != 0 { status::SYSTEM } else { 0 }
    }

    fn write_command(&mut self, value: u8) {
        self.registers.was_command = true;
        self.registers.pending = 0;
        let ram = &mut self.registers.ram;
        match value {
            command::READ_RAM..=command::READ_RAM_LAST => {
                let byte = ram[usize::from(value & 0x1F)];
                self.answer(byte);
            }
            command::WRITE_RAM..=command::WRITE_RAM_LAST
            | command::WRITE_OUTPUT..=command::WRITE_AUXILIARY => self.registers.pending = value,
            command::AUXILIARY_OFF => ram[0] |= command_byte::AUXILIARY_OFF,
            command::AUXILIARY_ON => ram[0] &= !command_byte::AUXILIARY_OFF,
            command::TEST_AUXILIARY => self.answer(CLOCK_STUCK_LOW),
            command::SELF_TEST => {
                ram[0] |= command_byte::SYSTEM | command_byte::KEYBOARD_OFF;
                self.answer(SELF_TEST_PASSED);
            }
            command::TEST_KEYBOARD => self.answer(PORT_FINE),
            command::KEYBOARD_OFF => ram[0] |= command_byte::KEYBOARD_OFF,
            command::KEYBOARD_ON => ram[0] &= !command_byte::KEYBOARD_OFF,
            command::READ_INPUT => self.answer(INPUT_PORT),
            command::READ_OUTPUT => {
                let full = if self.registers.output.is_some() { output_port::KEYBOARD_INTERRUPT } else { 0 };
                self.answer(self.registers.output_port | full);
            }
            // Pulses the lines whose bits are 0; line 0 resets.
            command::PULSE.. if value & 1 == 0 => self.requests.reset(),
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.registers.was_command = false;
        match core::mem::take(&mut self.registers.pending) {
            pending @ command::WRITE_RAM..=command::WRITE_RAM_LAST => {
                self.registers.ram[usize::from(pending & 0x1F)] = value;
            }
            command::WRITE_OUTPUT => {
                self.registers.output_port = value & (output_port::NOT_RESET | output_port::A20);
                if value & output_port::NOT_RESET == 0 {
                    self.requests.reset();
                }
            }
            // Loops back; without an auxiliary port the second comes as if from the keyboard.
            command::WRITE_KEYBOARD_BUFFER | command::WRITE_AUXILIARY_BUFFER => self.answer(value),
            // To a device: there is none.
            _ => {
                self.answer(NO_ANSWER);
                self.registers.timed_out = true;
            }
        }
    }

    fn update(&mut self) {
        let level = self.registers.interrupts();
        self.irq.set(level);
    }
}

impl IoHandler for I8042 {
    fn io_read(&mut self, region: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        let Some(byte) = data.first_mut().filter(|_| offset == 0) else { return Err(IoError::Offset) };
        *byte = match region {
            DATA_REGION => self.registers.output.take().unwrap_or(0),
            COMMAND_REGION => self.status(),
            _ => return Err(IoError::Offset),
        };
        self.update();
        Ok(())
    }
    fn io_write(&mut self, region: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let Some(value) = data.first().filter(|_| offset == 0) else { return Err(IoError::Offset) };
        // A new byte in the output buffer is a new edge, whether or not the last was read.
        self.irq.set(false);
        match region {
            DATA_REGION => self.write_data(*value),
            COMMAND_REGION => self.write_command(*value),
            _ => return Err(IoError::Offset),
        }
        self.update();
        Ok(())
    }
}

impl Device for I8042 {
    crate::registers_without_work!();
    fn poll(&mut self) {}
    fn resume(&mut self) {}
    fn reset(&mut self) {
        self.registers = Registers::reset();
        self.irq.set(false);
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&self.registers))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.registers = from_blob(blob)?;
        let level = self.registers.interrupts();
        self.irq.restore(level);
        Ok(())
    }
}

impl SavedState for Registers {
    const KIND: &'static str = "i8042";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { ram, output_port, output, timed_out, was_command, pending } = self;
        w.bytes(1, ram).uint(2, *output_port).uint(3, output.map_or(0, |byte| u16::from(byte) + 1));
        w.flag(4, *timed_out).flag(5, *was_command).uint(6, *pending);
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let output = r.uint::<u16>(3)?.checked_sub(1).map(u8::try_from).transpose();
        Ok(Self {
            ram: r.array(1)?,
            output_port: r.uint::<u8>(2)? & (output_port::NOT_RESET | output_port::A20),
            output: output.map_err(|_| RestoreError::Value { tag: 3, reason: "more than a byte" })?,
            timed_out: r.flag(4)?,
            was_command: r.flag(5)?,
            pending: r.uint(6)?,
        })
    }
}
