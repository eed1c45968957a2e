//! A source of random numbers: virtio-rng.

use super::site::Site;
use super::{BuildError, virtio_pci};
use crate::host::HostServices;
use alloc::boxed::Box;
use alloc::format;
use machine_spec::RngSpec;
use virtio_devices::Rng;

/// Builds it.
pub fn build(spec: &mut RngSpec, site: &mut Site<'_>, host: &dyn HostServices) -> Result<(), BuildError> {
    let source = host
        .entropy()
        .map_err(|source| BuildError::Host { what: format!("random numbers `{}`", spec.id), source })?;
    virtio_pci::place(&spec.id, &mut spec.slot, Box::new(Rng::new(source)), site)
}
