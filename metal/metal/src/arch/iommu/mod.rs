//! The machine's IOMMUs, switched on so that devices reach the arena of [`super::dma`] and nothing else.
//!
//! Called by: [`crate::start`], before any driver is started; [`tell`] by whoever looks after devices.

mod amd;
mod intel;

use super::clock;
use crate::iommu::{DeviceId, Iommu};
use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Bytes of registers that are used at most: Intel's tell their offsets, which are below this.
pub const REGISTER_BYTES: u64 = 0x5000;
/// A unit that does not answer in this time does not.
const PATIENCE_NS: u64 = 100_000_000;
/// What is told at most: a device that firmware left running does not fill the log.
const MAX_TOLD: u32 = 64;

static TOLD: AtomicU32 = AtomicU32::new(0);

/// Why devices are not held to anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotStarted {
    /// A unit does not do what it is told.
    #[error("the IOMMU does not answer")]
    Silent,
    /// Intel's: there is no one format of tables for all units.
    #[error("the machine's IOMMUs have no depth of page tables in common")]
    Levels,
}

/// Lets `devices` reach `arena`, and all others nothing; bytes that the tables take.
///
/// # Safety
/// Units' registers are at their addresses and mapped; no device is in use that is to reach anything else.
pub unsafe fn start(iommu: &Iommu, devices: &[DeviceId], arena: Range<u64>) -> Result<u64, NotStarted> {
    // SAFETY: as the caller says.
    unsafe {
        match iommu {
            Iommu::Amd(units) => amd::start(units, devices, arena),
            Iommu::Intel(units) => intel::start(units, devices, arena),
        }
    }
}

/// Says what devices were kept from.
pub fn tell() {
    let mut say = |what: core::fmt::Arguments<'_>| match TOLD.fetch_add(1, Relaxed) {
        0..MAX_TOLD => crate::log!("IOMMU: {what}"),
        MAX_TOLD => crate::log!("IOMMU: more of this is not told"),
        _ => TOLD.store(MAX_TOLD + 1, Relaxed),
    };
    amd::tell(&mut say);
    intel::tell(&mut say);
}

/// Whether `condition` comes true before patience ends.
fn comes_true(condition: impl Fn() -> bool) -> bool {
    let deadline = clock::now_ns() + PATIENCE_NS;
    while !condition() && clock::now_ns() < deadline {
        core::hint::spin_loop();
    }
    condition()
}
