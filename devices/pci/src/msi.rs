//! MSI with per-vector masking (PCI Express Base Specification 5.0, 7.7.1).
//!
//! Owned by [`crate::Interrupts`], which is told of the capability's registers after each write.

use alloc::boxed::Box;
use alloc::vec::Vec;
use hypervisor::{EngineError, Msi, MsiRoute, MsiSink};

/// What the capability's registers say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MsiRegisters {
    pub enabled: bool,
    /// Logarithm of the vectors that software gave.
    pub log_vectors: u8,
    pub message: Msi,
    pub mask: u32,
}

pub(crate) struct MsiVectors {
    routes: Vec<Box<dyn MsiRoute>>,
    pub registers: MsiRegisters,
    pub pending: u32,
}

impl MsiVectors {
    /// `count` is a power of two up to 32.
    pub fn new(sink: &dyn MsiSink, count: u8) -> Result<Self, EngineError> {
        let routes = (0..count.clamp(1, 32)).map(|_| sink.route()).collect::<Result<_, _>>()?;
        Ok(Self { routes, registers: MsiRegisters::default(), pending: 0 })
    }

    /// Vectors that exist, as a mask.
    pub fn all(&self) -> u32 {
        u32::MAX >> (32 - self.routes.len().clamp(1, 32))
    }

    pub fn fire(&mut self, vector: u16) {
        // Software that gave fewer vectors than asked for gets them folded together.
        let given = 1usize << self.registers.log_vectors.min(5);
        let i = usize::from(vector) % given.min(self.routes.len());
        if self.registers.mask >> i & 1 != 0 {
            self.pending |= 1 << i;
        } else if let Some(route) = self.routes.get(i) {
            route.fire();
        }
    }

    /// The registers changed.
    pub fn update(&mut self, registers: MsiRegisters) {
        if registers == self.registers {
            return;
        }
        self.registers = registers;
        self.settle();
    }

    fn settle(&mut self) {
        let r = self.registers;
        for (i, route) in self.routes.iter().enumerate() {
            let masked = !r.enabled || r.mask >> i & 1 != 0;
            if !masked {
                let low = (1u32 << r.log_vectors.min(5)) - 1;
                route.set(Msi { address: r.message.address, data: r.message.data & !low | i as u32 & low });
            }
            route.mask(masked);
            if !masked && self.pending >> i & 1 != 0 {
                self.pending &= !(1 << i);
                route.fire();
            }
        }
    }

    pub fn reset(&mut self) {
        self.registers = MsiRegisters::default();
        self.pending = 0;
        self.routes.iter().for_each(|route| route.mask(true));
    }

    pub fn restore(&mut self, registers: MsiRegisters, pending: u32) {
        self.registers = registers;
        self.pending = pending & self.all();
        self.settle();
    }
}
