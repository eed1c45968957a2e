//! A disk: virtio-blk.

use super::site::Site;
use super::{BuildError, virtio_pci};
use crate::host::HostServices;
use alloc::boxed::Box;
use alloc::format;
use machine_spec::BlkSpec;
use virtio_devices::{Blk, BlkConfig};

/// Builds it.
pub fn build(spec: &mut BlkSpec, site: &mut Site<'_>, host: &dyn HostServices) -> Result<(), BuildError> {
    let disk = host
        .open_disk(&spec.disk)
        .map_err(|source| BuildError::Host { what: format!("disk `{}`", spec.id), source })?;
    let config = BlkConfig { serial: spec.serial.clone(), max_in_flight: 0 };
    virtio_pci::place(&spec.id, &mut spec.slot, Box::new(Blk::new(disk, config)), site)
}
