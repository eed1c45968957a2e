//! A PCI Express root port: a bridge from bus 0 to one slot (PCI Express Base Specification 5.0, 7.5.1.3
//! and 7.5.3).
//!
//! A hot-plug port says so from the first day, and its bus number and windows are reserved, so that nothing
//! moves when a function is plugged later. What is below it at power-on is told with `occupied`.

use crate::config::{ConfigSpace, Identity};
use crate::core_state::{FunctionCore, PciFunction, SavedFunction};
use crate::express::{self, PortKind, offset};
use crate::interrupts::Interrupts;
use alloc::string::String;
use alloc::sync::Arc;
use core::task::Poll;
use device::{Device, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};
use hypervisor::{EngineError, MsiSink};

/// See the module's header.
pub struct RootPort {
    name: String,
    core: FunctionCore,
}

impl RootPort {
    /// Port of physical slot `slot` (at least 1), which interrupts by one MSI or on `line`.
    pub fn new(
        name: impl Into<String>,
        slot: u16,
        hot_plug: bool,
        occupied: bool,
        line: IrqLine,
        msi: &dyn MsiSink,
    ) -> Result<Self, EngineError> {
        let identity =
            Identity { vendor: 0x1B36, device: 0x000C, class: 0x06_0400, revision: 0, subsystem: (0, 0) };
        let mut config = ConfigSpace::bridge(identity);
        let at = express::add(&mut config, PortKind::RootPort { slot, hot_plug });
        let present = if occupied { express::SLOT_PRESENCE } else { 0 };
        config.init(at + offset::SLOT_STATUS, 2, present);
        let active = if occupied { express::LINK_ACTIVE } else { 0 };
        config.init(at + offset::LINK_STATUS, 2, config.get(at + offset::LINK_STATUS, 2) | active);
        let interrupts = Interrupts::new(line).with_msi(msi, 1)?;
        let mut core = FunctionCore::new(config, Arc::new(interrupts), None);
        core.add_msi(0);
        core.add_intx();
        Ok(Self { name: name.into(), core })
    }
}

impl PciFunction for RootPort {
    fn core(&self) -> &FunctionCore {
        &self.core
    }
    fn core_mut(&mut self) -> &mut FunctionCore {
        &mut self.core
    }
}

impl Device for RootPort {
    fn name(&self) -> &str {
        &self.name
    }
    fn as_io(&mut self) -> Option<&mut dyn IoHandler> {
        None
    }
    fn poll(&mut self) {}
    fn quiesce(&mut self) -> Poll<()> {
        Poll::Ready(())
    }
    fn resume(&mut self) {}
    fn reset(&mut self) {
        self.core.reset();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(saved_state::to_blob(&self.core.save()))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.core.reset();
        self.core.restore(&saved_state::from_blob::<SavedFunction>(blob)?)
    }
}
