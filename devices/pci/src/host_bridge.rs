//! Function 00:00.0: the host bridge of a q35-like board. It has no function of its own beyond saying
//! where ECAM is (PCIEXBAR, read-only: the board's map never moves).

use crate::config::{ConfigSpace, Identity};
use crate::core_state::{FunctionCore, PciFunction, SavedFunction};
use crate::interrupts::Interrupts;
use alloc::sync::Arc;
use core::task::Poll;
use device::{Device, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};

const PCIEXBAR: u16 = 0x60;

/// See the module's header.
pub struct HostBridge {
    core: FunctionCore,
}

impl HostBridge {
    /// The bridge of a board with 256 buses of ECAM at `ecam`.
    pub fn new(ecam: u64) -> Self {
        let identity = Identity {
            vendor: 0x8086,
            device: 0x29C0,
            class: 0x06_0000,
            revision: 2,
            subsystem: (0x1AF4, 0x1100),
        };
        let mut config = ConfigSpace::endpoint(identity);
        config.init(PCIEXBAR, 8, ecam & !0xFFF_FFFF | 1);
        let interrupts = Arc::new(Interrupts::new(IrqLine::unconnected()));
        Self { core: FunctionCore::new(config, interrupts, None) }
    }
}

impl PciFunction for HostBridge {
    fn core(&self) -> &FunctionCore {
        &self.core
    }
    fn core_mut(&mut self) -> &mut FunctionCore {
        &mut self.core
    }
}

impl Device for HostBridge {
    fn name(&self) -> &str {
        "pci-host-bridge"
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
