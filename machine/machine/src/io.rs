//! The machine as a running vCPU sees it: ports and memory-mapped I/O, interrupt acknowledge, end of interrupt.
//!
//! Called by: engines, on vCPU threads, many at once. No lock is held here while a device works but the device's own.

use alloc::sync::Arc;
use chipset::{Ioapic, Pic8259, Pit8254};
use device::Bus;
use hypervisor::{Gpa, VcpuIo};
use machine_spec::layout::irq::TIMER;
use sync::Mutex;

/// See the module's header.
pub struct MachineIo {
    pub(crate) ports: Arc<Bus>,
    pub(crate) memory: Arc<Bus>,
    pub(crate) pic: Arc<Mutex<Pic8259>>,
    pub(crate) ioapic: Arc<Mutex<Ioapic>>,
    pub(crate) pit: Arc<Mutex<Pit8254>>,
}

/// Longest port access: what `IN` and `OUT` can do.
const PORT_BYTES: usize = 4;

impl VcpuIo for MachineIo {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        debug_assert!(matches!(data.len(), 1 | 2 | PORT_BYTES));
        self.ports.read(port.into(), data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        debug_assert!(matches!(data.len(), 1 | 2 | PORT_BYTES));
        self.ports.write(port.into(), data);
    }
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        self.memory.read(at.0, data);
    }
    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        self.memory.write(at.0, data);
    }
    fn pic_ack(&self) -> Option<u8> {
        // A request that is gone meanwhile gives the spurious vector, as on the real bus.
        let acknowledged = self.pic.lock().acknowledge_line();
        if acknowledged.line == Some(TIMER) {
            self.pit.lock().acknowledged();
        }
        Some(acknowledged.vector)
    }
    fn eoi(&self, vector: u8) {
        self.ioapic.lock().end_of_interrupt(vector);
    }
}
