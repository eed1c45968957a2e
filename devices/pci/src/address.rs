//! Addresses of functions: bus, device, function.

use core::fmt;

/// Device and function on a bus, as PCI packs them: device in bits 7–3, function in bits 2–0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Devfn(pub u8);

impl Devfn {
    /// From device (0–31) and function (0–7); higher bits are ignored.
    pub const fn new(device: u8, function: u8) -> Self {
        Self((device & 0x1F) << 3 | (function & 7))
    }
    /// Device number.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }
    /// Function number.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

impl fmt::Display for Devfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.device(), self.function())
    }
}

/// Bus, device and function: a function's address in configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// Bus number.
    pub bus: u8,
    /// Device and function.
    pub devfn: Devfn,
}

impl Bdf {
    /// From its three parts.
    pub const fn new(bus: u8, device: u8, function: u8) -> Self {
        Self { bus, devfn: Devfn::new(device, function) }
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{}", self.bus, self.devfn)
    }
}
