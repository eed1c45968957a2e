//! Port 92h of the PS/2: fast gate of A20 and fast reset.
//!
//! Called by: the bus. The address line A20 itself is always open, as on every processor that a guest of ours
//! expects; the bit is kept for those that read it back.

#[cfg(test)]
mod tests;

use crate::PlatformRequests;
use alloc::string::String;
use alloc::sync::Arc;
use device::{Device, IoError, IoHandler, RestoreError, StateBlob, Unsavable};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

/// Rising: resets.
const RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    value: u8,
}

/// See the module's header. One region of 1 byte.
pub struct Port92 {
    name: String,
    requests: Arc<dyn PlatformRequests>,
    registers: Registers,
}

impl Port92 {
    /// The port after power-up (A20 open).
    pub fn new(name: &str, requests: Arc<dyn PlatformRequests>) -> Self {
        Self { name: name.into(), requests, registers: Registers { value: A20 } }
    }
}

impl IoHandler for Port92 {
    fn io_read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        match data.first_mut() {
            Some(byte) if offset == 0 => *byte = self.registers.value,
            _ => return Err(IoError::Offset),
        }
        Ok(())
    }
    fn io_write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let Some(value) = data.first().filter(|_| offset == 0) else { return Err(IoError::Offset) };
        let rises = value & !self.registers.value & RESET != 0;
        self.registers.value = value & (RESET | A20);
        if rises {
            self.requests.reset();
        }
        Ok(())
    }
}

impl Device for Port92 {
    crate::registers_without_work!();
    fn poll(&mut self) {}
    fn resume(&mut self) {}
    fn reset(&mut self) {
        self.registers = Registers { value: A20 };
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
    const KIND: &'static str = "port92";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { value } = self;
        w.uint(1, *value);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self { value: r.uint::<u8>(1)? & (RESET | A20) })
    }
}
