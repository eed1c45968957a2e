//! The I/O APIC (Intel 82093AA, with the EOI register of version 0x20): 24 pins, each with an entry of the
//! redirection table that says which message it sends.
//!
//! Called by: the bus (registers), interrupt lines ([`InterruptInputs`]: a high level is an asserted line,
//! whatever polarity the entry says), and the engine's end of interrupt.
//!
//! Invariant: a level-triggered pin sends when it is asserted, unmasked and its remote IRR is clear; sending
//! sets remote IRR, the EOI of its vector clears it.

use crate::MsiMessage;
use crate::lines::InterruptInputs;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use device::{Device, IoError, IoHandler, RestoreError, StateBlob, Unsavable};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

/// Pins.
pub const PINS: usize = 24;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const INDEX_ID: u8 = 0;
const INDEX_VERSION: u8 = 1;
const INDEX_ARBITRATION: u8 = 2;
const INDEX_TABLE: u8 = 0x10;
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

/// Bits of a redirection entry.
mod entry {
    pub const VECTOR: u64 = 0xFF;
    pub const MODE: u64 = 7 << 8;
    pub const LOGICAL: u64 = 1 << 11;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    /// All but delivery status and remote IRR. Bits 49–55 are the extended destination.
    pub const WRITABLE: u64 = 0xFFFE_0000_0001_AFFF;
}

/// Where messages go, and who wants to know what the pins would send.
pub trait IoapicOutput: Send + Sync {
    /// Sends `message` to the local APICs.
    fn send(&self, message: MsiMessage);
    /// From now on `pin` sends `message` (`None`: masked), and is level-triggered or not. An engine that
    /// delivers lines itself keeps its own table with this.
    fn route_changed(&self, pin: u32, message: Option<MsiMessage>, level: bool);
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    id: u8,
    select: u8,
    /// Asserted inputs, a bit a pin.
    inputs: u32,
    table: [u64; PINS],
}

impl Registers {
    fn reset() -> Self {
        Self { id: 0, select: 0, inputs: 0, table: [entry::MASKED; PINS] }
    }
}

/// Level-triggered and of a mode that has an EOI: INIT, NMI and the like are edges whatever the entry says.
fn is_level(e: u64) -> bool {
    e & entry::LEVEL != 0 && (e & entry::MODE) >> 8 <= 1
}

/// The message of an entry (82093AA 3.2.4; bits 49–55 as KVM_FEATURE_MSI_EXT_DEST_ID has them).
fn message(e: u64) -> MsiMessage {
    let destination = e >> 56 << 12 | (e >> 49 & 0x7F) << 5;
    let logical = (e & entry::LOGICAL) >> 11 << 2;
    let level = if is_level(e) { 1 << 15 | 1 << 14 } else { 0 };
    MsiMessage {
        address: 0xFEE0_0000 | destination | logical,
        data: (e & (entry::VECTOR | entry::MODE)) as u32 | level,
    }
}

/// See the module's header. One region: the register page.
pub struct Ioapic {
    name: String,
    output: Arc<dyn IoapicOutput>,
    registers: Registers,
}

impl Ioapic {
    /// An I/O APIC after power-up: all pins masked.
    pub fn new(name: &str, output: Arc<dyn IoapicOutput>) -> Self {
        Self { name: name.into(), output, registers: Registers::reset() }
    }

    /// A local APIC ended level-triggered `vector`.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let e = &mut self.registers.table[pin];
            if *e & entry::REMOTE_IRR != 0 && *e & entry::VECTOR == u64::from(vector) {
                *e &= !entry::REMOTE_IRR;
                self.service_level(pin);
            }
        }
    }

    /// Vectors of level-triggered interrupts that were sent and whose end was not told yet.
    pub fn awaited_ends(&self) -> Vec<u8> {
        let waits = |e: &&u64| **e & entry::REMOTE_IRR != 0;
        self.registers.table.iter().filter(waits).map(|e| (e & entry::VECTOR) as u8).collect()
    }

    fn asserted(&self, pin: usize) -> bool {
        self.registers.inputs & 1 << pin != 0
    }

    fn service_level(&mut self, pin: usize) {
        let e = self.registers.table[pin];
        let waits = e & (entry::REMOTE_IRR | entry::MASKED) != 0;
        if is_level(e) && !waits && self.asserted(pin) {
            self.registers.table[pin] |= entry::REMOTE_IRR;
            self.output.send(message(e));
        }
    }

    /// Returns whether the pin was asserted before.
    fn set_input(&mut self, pin: usize, level: bool) -> bool {
        let was = self.asserted(pin);
        self.registers.inputs = (self.registers.inputs & !(1 << pin)) | u32::from(level) << pin;
        was
    }

    fn tell_route(&self, pin: usize) {
        let e = self.registers.table[pin];
        let message = (e & entry::MASKED == 0).then(|| message(e));
        self.output.route_changed(pin as u32, message, is_level(e));
    }

    fn write_entry(&mut self, pin: usize, value: u64) {
        let old = self.registers.table[pin];
        let mut new = (value & entry::WRITABLE) | (old & entry::REMOTE_IRR);
        if new & entry::LEVEL == 0 {
            // How guests clear a stuck remote IRR: edge and back.
            new &= !entry::REMOTE_IRR;
        }
        self.registers.table[pin] = new;
        if (old ^ new) & !entry::REMOTE_IRR != 0 {
            self.tell_route(pin);
        }
        self.service_level(pin);
    }

    fn read_window(&self) -> u32 {
        let r = &self.registers;
        match r.select {
            INDEX_ID | INDEX_ARBITRATION => u32::from(r.id) << 24,
            INDEX_VERSION => VERSION,
            index => match self.entry_of(index) {
                Some((pin, false)) => r.table[pin] as u32,
                Some((pin, true)) => (r.table[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_window(&mut self, value: u32) {
        match self.registers.select {
            INDEX_ID => self.registers.id = (value >> 24) as u8 & 0xF,
            index => {
                let Some((pin, high)) = self.entry_of(index) else { return };
                let (old, value) = (self.registers.table[pin], u64::from(value));
                let new = if high { (old & 0xFFFF_FFFF) | value << 32 } else { old >> 32 << 32 | value };
                self.write_entry(pin, new);
            }
        }
    }

    /// Pin of a table index, and whether it is its high half.
    fn entry_of(&self, index: u8) -> Option<(usize, bool)> {
        let index = index.checked_sub(INDEX_TABLE)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, index & 1 != 0))
    }
}

impl InterruptInputs for Ioapic {
    fn set_level(&mut self, line: u32, level: bool) {
        let pin = line as usize;
        if pin >= PINS {
            return;
        }
        let rose = !self.set_input(pin, level) && level;
        let e = self.registers.table[pin];
        if is_level(e) {
            self.service_level(pin);
        } else if rose && e & entry::MASKED == 0 {
            // An edge while masked is lost.
            self.output.send(message(e));
        }
    }
    fn restore_level(&mut self, line: u32, level: bool) {
        let pin = line as usize;
        if pin < PINS {
            self.set_input(pin, level);
            self.service_level(pin);
        }
    }
}

impl IoHandler for Ioapic {
    fn io_read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        let value = match offset & !3 {
            SELECT => self.registers.select.into(),
            WINDOW => self.read_window(),
            EOI => 0,
            _ => return Err(IoError::Offset),
        };
        device::write_le(data, u64::from(value) >> (8 * (offset & 3)));
        Ok(())
    }
    fn io_write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let value = device::read_le(data) as u32;
        match offset {
            SELECT => self.registers.select = value as u8,
            WINDOW if data.len() >= 4 => self.write_window(value),
            WINDOW => return Err(IoError::Width),
            EOI => self.end_of_interrupt(value as u8),
            _ => return Err(IoError::Offset),
        }
        Ok(())
    }
}

impl Device for Ioapic {
    crate::registers_without_work!();
    fn poll(&mut self) {}
    fn resume(&mut self) {}
    fn reset(&mut self) {
        // The inputs are the devices': those that reset lower their own.
        self.registers = Registers::reset();
        (0..PINS).for_each(|pin| self.tell_route(pin));
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&self.registers))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.registers = from_blob(blob)?;
        (0..PINS).for_each(|pin| self.tell_route(pin));
        Ok(())
    }
}

impl SavedState for Registers {
    const KIND: &'static str = "ioapic";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { id, select, inputs, table } = self;
        w.uint(1, *id).uint(2, *select).uint(3, *inputs).uints(4, table.iter().copied());
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let (id, select, inputs) = (r.uint::<u8>(1)? & 0xF, r.uint(2)?, r.uint::<u32>(3)?);
        let entries = r.uints(4, PINS)?;
        let mut table: [u64; PINS] =
            entries.try_into().map_err(|_| RestoreError::Value { tag: 4, reason: "not 24 entries" })?;
        for e in &mut table {
            *e &= entry::WRITABLE | if is_level(*e) { entry::REMOTE_IRR } else { 0 };
        }
        Ok(Self { id, select, inputs: inputs & ((1 << PINS) - 1), table })
    }
}

#[cfg(test)]
mod tests;
