//! Function 00:1f.0: the ISA bridge, with the routing of PIRQA–H to ISA interrupts and the base of the
//! power management ports (ICH9 datasheet, 13.1). The ports' base is where the board put it and read-only.

use crate::config::{ConfigSpace, Identity};
use crate::core_state::{FunctionCore, PciFunction, SavedFunction};
use crate::interrupts::Interrupts;
use crate::pirq::{PIRQ_OFF, PIRQS, PirqRouter};
use alloc::sync::Arc;
use core::task::Poll;
use device::{Device, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};

const PM_BASE: u16 = 0x40;
const ACPI_CONTROL: u16 = 0x44;
/// ACPI control: the ports at `PM_BASE` are decoded.
const ACPI_ENABLE: u64 = 0x80;
/// Offsets of the routing registers of PIRQA–D and PIRQE–H in configuration space.
pub const PIRQ_ROUTES: [u16; PIRQS] = [0x60, 0x61, 0x62, 0x63, 0x68, 0x69, 0x6A, 0x6B];

/// See the module's header.
pub struct LpcBridge {
    core: FunctionCore,
    router: Arc<PirqRouter>,
}

impl LpcBridge {
    /// The bridge of a board with its power management ports at `pm_base`.
    pub fn new(pm_base: u16, router: Arc<PirqRouter>) -> Self {
        let identity = Identity {
            vendor: 0x8086,
            device: 0x2918,
            class: 0x06_0100,
            revision: 2,
            subsystem: (0x1AF4, 0x1100),
        };
        let mut config = ConfigSpace::endpoint(identity);
        config.init(PM_BASE, 4, u64::from(pm_base & 0xFF80) | 1);
        config.init(ACPI_CONTROL, 1, ACPI_ENABLE);
        for route in PIRQ_ROUTES {
            config.init(route, 1, u64::from(PIRQ_OFF));
            config.allow(route, 1, 0x8F);
        }
        let interrupts = Arc::new(Interrupts::new(IrqLine::unconnected()));
        let bridge = Self { core: FunctionCore::new(config, interrupts, None), router };
        bridge.router.set_routes(bridge.routes());
        bridge
    }

    fn routes(&self) -> [u8; PIRQS] {
        PIRQ_ROUTES.map(|route| self.core.config().get(route, 1) as u8)
    }
}

impl PciFunction for LpcBridge {
    fn core(&self) -> &FunctionCore {
        &self.core
    }
    fn core_mut(&mut self) -> &mut FunctionCore {
        &mut self.core
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        let before = self.routes();
        self.core.write(offset, data);
        let after = self.routes();
        if before != after {
            self.router.set_routes(after);
        }
    }
}

impl Device for LpcBridge {
    fn name(&self) -> &str {
        "lpc"
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
        self.router.set_routes(self.routes());
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(saved_state::to_blob(&self.core.save()))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        let restored = self.core.restore(&saved_state::from_blob::<SavedFunction>(blob)?);
        self.router.restore_routes(self.routes());
        restored
    }
}
