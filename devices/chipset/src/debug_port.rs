//! Ports 80h (power-on self test codes) and 0EDh: kernels write there to pass a microsecond. The last value is
//! kept, because some read it back.
//!
//! Called by: the bus.

#[cfg(test)]
mod tests;

use alloc::string::String;
use device::{Device, IoError, IoHandler, RestoreError, StateBlob, Unsavable};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Registers {
    last: u8,
}

/// See the module's header. One region of 1 byte.
pub struct DebugPort {
    name: String,
    registers: Registers,
}

impl DebugPort {
    /// A port to which nothing was written.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), registers: Registers::default() }
    }
    /// The last value written: how far a firmware came.
    pub fn last(&self) -> u8 {
        self.registers.last
    }
}

impl IoHandler for DebugPort {
    fn io_read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        match data.first_mut() {
            Some(byte) if offset == 0 => *byte = self.registers.last,
            _ => return Err(IoError::Offset),
        }
        Ok(())
    }
    fn io_write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let Some(value) = data.first().filter(|_| offset == 0) else { return Err(IoError::Offset) };
        self.registers.last = *value;
        Ok(())
    }
}

impl Device for DebugPort {
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
    const KIND: &'static str = "debug_port";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { last } = self;
        w.uint(1, *last);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self { last: r.uint(1)? })
    }
}
