//! How one function interrupts: INTx, MSI and MSI-X.
//!
//! Shared (`Arc`) between the function, whose configuration writes change it, and whoever completes work
//! for it, on any thread. Its lock comes after the function's and before the interrupt controllers'; it
//! never calls a device.

use crate::msi::{MsiRegisters, MsiVectors};
use crate::msix::Msix;
use device::{IoError, IrqLine};
use hypervisor::{EngineError, Msi, MsiSink};
use sync::Mutex;

pub(crate) struct State {
    line: IrqLine,
    /// The function wants service by INTx: the status register's bit.
    pub status: bool,
    pub disabled: bool,
    pub msi: Option<MsiVectors>,
    pub msix: Option<Msix>,
}

impl State {
    fn messages(&self) -> bool {
        self.msix.as_ref().is_some_and(|m| m.enabled)
            || self.msi.as_ref().is_some_and(|m| m.registers.enabled)
    }
    fn wanted(&self) -> bool {
        self.status && !self.disabled && !self.messages()
    }
    pub fn drive(&mut self) {
        let level = self.wanted();
        self.line.set(level);
    }
    pub fn drive_restored(&mut self) {
        let level = self.wanted();
        self.line.restore(level);
    }
}

/// See the module's header.
pub struct Interrupts {
    pub(crate) state: Mutex<State>,
}

impl Interrupts {
    /// INTx on `line` only.
    pub fn new(line: IrqLine) -> Self {
        Self { state: Mutex::new(State { line, status: false, disabled: false, msi: None, msix: None }) }
    }
    /// Adds `count` MSI-X vectors.
    pub fn with_msix(self, sink: &dyn MsiSink, count: u16) -> Result<Self, EngineError> {
        self.state.lock().msix = Some(Msix::new(sink, count)?);
        Ok(self)
    }
    /// Adds `count` MSI vectors: a power of two up to 32.
    pub fn with_msi(self, sink: &dyn MsiSink, count: u8) -> Result<Self, EngineError> {
        self.state.lock().msi = Some(MsiVectors::new(sink, count)?);
        Ok(self)
    }

    /// Sends `vector` by MSI-X or MSI; `false` if the guest enabled neither (then INTx is to be used).
    pub fn fire(&self, vector: u16) -> bool {
        let mut state = self.state.lock();
        if let Some(msix) = state.msix.as_mut().filter(|m| m.enabled) {
            msix.fire(vector);
            return true;
        }
        if let Some(msi) = state.msi.as_mut().filter(|m| m.registers.enabled) {
            msi.fire(vector);
            return true;
        }
        false
    }

    /// The function wants service by INTx, or no longer.
    pub fn set_intx(&self, status: bool) {
        let mut state = self.state.lock();
        state.status = status;
        state.drive();
    }

    /// Whether MSI-X is enabled.
    pub fn msix_enabled(&self) -> bool {
        self.state.lock().msix.as_ref().is_some_and(|m| m.enabled)
    }
    /// Number of MSI-X vectors.
    pub fn msix_vectors(&self) -> u16 {
        self.state.lock().msix.as_ref().map_or(0, |m| m.vectors.len() as u16)
    }
    /// The level that INTx is driven at.
    pub fn intx_level(&self) -> bool {
        self.state.lock().line.level()
    }

    /// A read of the BAR with the MSI-X table.
    pub fn msix_read(&self, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        self.state.lock().msix.as_ref().ok_or(IoError::Offset)?.io_read(offset, data)
    }
    /// A write to the BAR with the MSI-X table.
    pub fn msix_write(&self, offset: u64, data: &[u8]) -> Result<(), IoError> {
        self.state.lock().msix.as_mut().ok_or(IoError::Offset)?.io_write(offset, data)
    }

    /// The registers in configuration space changed.
    pub(crate) fn update(&self, disabled: bool, msi: Option<MsiRegisters>, msix: Option<(bool, bool)>) {
        let mut state = self.state.lock();
        state.disabled = disabled;
        if let (Some(vectors), Some(registers)) = (state.msi.as_mut(), msi) {
            vectors.update(registers);
        }
        if let (Some(vectors), Some((enabled, mask))) = (state.msix.as_mut(), msix) {
            vectors.control(enabled, mask);
        }
        state.drive();
    }

    pub(crate) fn reset(&self) {
        let mut state = self.state.lock();
        (state.status, state.disabled) = (false, false);
        if let Some(msi) = state.msi.as_mut() {
            msi.reset();
        }
        if let Some(msix) = state.msix.as_mut() {
            msix.reset();
        }
        state.drive();
    }

    /// What the guest reads in configuration space: INTx status, MSI pending bits.
    pub(crate) fn status(&self) -> (bool, u32) {
        let state = self.state.lock();
        (state.status, state.msi.as_ref().map_or(0, |m| m.pending))
    }

    /// Everything that configuration space does not hold: INTx status, MSI pending bits, the MSI-X table.
    pub(crate) fn parts(&self) -> (bool, u32, alloc::vec::Vec<(Msi, bool, bool)>) {
        let state = self.state.lock();
        let vectors = state.msix.iter().flat_map(|m| &m.vectors);
        let table = vectors.map(|v| (v.msi, v.masked, v.pending)).collect();
        (state.status, state.msi.as_ref().map_or(0, |m| m.pending), table)
    }
}
