//! A ground and a guest for the engines' unit tests, which run no guest.

use crate::ground::Ground;
use core::sync::atomic::AtomicU32;
use hypervisor::{CpuModel, GuestRam, PartitionLayout};

/// A ground on which nothing runs, on a processor of 2 GHz.
#[derive(Default)]
pub struct Nowhere(AtomicU32);

impl Ground for Nowhere {
    fn physical(&self) -> fn(usize) -> u64 {
        |address| address as u64
    }
    fn tsc_khz(&self) -> u32 {
        2_000_000
    }
    fn before_entry(&self, _: Option<u64>) -> bool {
        false
    }
    fn interrupted(&self) -> &AtomicU32 {
        &self.0
    }
}

/// Three vCPUs and a MiB of RAM.
pub fn layout(tsc_khz: u32) -> PartitionLayout {
    let (_, clock) = guest_time::manual::ManualTime::clock();
    PartitionLayout {
        ram: GuestRam::for_test(0x10_0000),
        vcpus: 3,
        cpu_model: CpuModel::max(),
        tsc_khz,
        clock,
    }
}
