//! A network card: virtio-net.

use super::site::Site;
use super::{BuildError, virtio_pci};
use crate::host::HostServices;
use alloc::boxed::Box;
use alloc::format;
use machine_spec::NetSpec;
use virtio_devices::{Net, NetConfig};

/// Builds it.
pub fn build(spec: &mut NetSpec, site: &mut Site<'_>, host: &dyn HostServices) -> Result<(), BuildError> {
    let (backend, mtu) = host
        .open_net(&spec.backend)
        .map_err(|source| BuildError::Host { what: format!("network `{}`", spec.id), source })?;
    let config = NetConfig { mac: spec.mac.0, mtu: Some(mtu) };
    virtio_pci::place(&spec.id, &mut spec.slot, Box::new(Net::new(backend, config)), site)
}
