//! The reset control register (port 0CF9h of Intel's south bridges).
//!
//! Called by: the bus (through the PCI configuration ports, which the register lies among).

#[cfg(test)]
mod tests;

use crate::PlatformRequests;
use alloc::string::String;
use alloc::sync::Arc;
use device::{Device, IoError, IoHandler, RestoreError, StateBlob, Unsavable};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

/// System reset: a hard one. Full reset: with a power cycle.
const WRITABLE: u8 = 1 << 1 | RESET | 1 << 3;
/// Rising: resets.
const RESET: u8 = 1 << 2;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Registers {
    control: u8,
}

/// See the module's header. One region of 1 byte.
pub struct ResetControl {
    name: String,
    requests: Arc<dyn PlatformRequests>,
    registers: Registers,
}

impl ResetControl {
    /// The register after power-up.
    pub fn new(name: &str, requests: Arc<dyn PlatformRequests>) -> Self {
        Self { name: name.into(), requests, registers: Registers::default() }
    }
}

impl IoHandler for ResetControl {
    fn io_read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        match data.first_mut() {
            Some(byte) if offset == 0 => *byte = self.registers.control,
            _ => return Err(IoError::Offset),
        }
        Ok(())
    }
    fn io_write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let Some(value) = data.first().filter(|_| offset == 0) else { return Err(IoError::Offset) };
        let rises = value & !self.registers.control & RESET != 0;
        self.registers.control = value & WRITABLE;
        if rises {
            self.requests.reset();
        }
        Ok(())
    }
}

impl Device for ResetControl {
    crate::registers_without_work!();
    fn poll(&mut self) {}
    fn resume(&mut self) {}
    fn reset(&mut self) {
        self.registers = Registers::default();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&self.registers))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.registers = from_blob(blob)?;
        Ok(())
    }
}

impl SavedState for Registers {
    const KIND: &'static str = "reset_control";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { control } = self;
        w.uint(1, *control);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self { control: r.uint::<u8>(1)? & WRITABLE })
    }
}
