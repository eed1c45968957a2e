//! Doorbells: registers whose writes mean only "look", so that whoever executes the guest may take them without stopping
//! its processor, and have the device called later, on another thread.

/// A register of a device, as its [`IoHandler`](crate::IoHandler) knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Its region.
    pub region: usize,
    /// Where in the region.
    pub offset: u64,
}

/// The doorbell of one register, behind which somebody writes to that register each time it rings (once for many rings,
/// whatever was written).
pub trait Doorbell: Send + Sync {
    /// The register stands at `at` on the memory bus from now on; `None`: nowhere. Called under the device's lock.
    fn set_place(&self, at: Option<u64>);
}
