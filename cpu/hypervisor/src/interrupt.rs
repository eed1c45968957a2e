//! Interrupts into a partition. The local APICs are the engine's; the I/O APIC, the 8259 and the PCI
//! functions are devices, whose messages and lines `machine` brings here.
//!
//! Everything is callable from any thread at any time; nothing here calls back into a device.

use crate::doorbell::Bell;
use crate::engine::EngineError;
use alloc::boxed::Box;
use alloc::sync::Arc;

/// A message-signalled interrupt as PCI writes it (SDM vol. 3, 11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Address: destination, redirection hint and mode.
    pub address: u64,
    /// Data: vector, delivery mode, trigger.
    pub data: u32,
}

/// How an I/O APIC pin is triggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// By its rising edge.
    Edge,
    /// By its level, until the EOI.
    Level,
}

/// Where the interrupt controllers of the chipset send.
pub trait IrqSink: Send + Sync {
    /// An interrupt message of the I/O APIC: it reaches the local APICs that it names.
    fn deliver(&self, msi: Msi);
    /// What the I/O APIC sends for `pin` from now on (`None`: masked). An engine that filters the EOIs it
    /// reports ([`VcpuIo::eoi`](crate::VcpuIo::eoi)) keeps the level-triggered vectors of these.
    fn set_ioapic_route(&self, pin: u32, msi: Option<Msi>, trigger: Trigger);
    /// The 8259's INTR output, wired to LINT0 of the boot processor. When it is taken the engine asks
    /// [`VcpuIo::pic_ack`](crate::VcpuIo::pic_ack) for the vector.
    fn pic_line_changed(&self, level: bool);
}

/// Where functions with MSI or MSI-X get their routes.
pub trait MsiSink: Send + Sync {
    /// A new route, masked until its first `set`.
    fn route(&self) -> Result<Box<dyn MsiRoute>, EngineError>;
}

/// One vector of a function. Dropping it gives it back.
pub trait MsiRoute: Send + Sync {
    /// What `fire` sends.
    fn set(&self, msi: Msi);
    /// Sends the message; while masked it is lost (the function keeps its own pending bit).
    fn fire(&self);
    /// Masks or unmasks.
    fn mask(&self, masked: bool);
    /// From now on a ring of `bell` fires it, too, for who completes in the host's kernel or in another process; a ring while
    /// it is masked fires at the unmask. After an error somebody has to hear the bell and call `fire`.
    fn attach(&self, bell: &Arc<dyn Bell>) -> Result<(), EngineError> {
        let _ = bell;
        Err(EngineError::Exhausted("ways for a bell to interrupt"))
    }
}
