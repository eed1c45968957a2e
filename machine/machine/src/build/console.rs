//! A paravirtual console: virtio-console.

use super::site::Site;
use super::{BuildError, virtio_pci};
use crate::host::HostServices;
use alloc::boxed::Box;
use alloc::format;
use machine_spec::ConsoleSpec;
use virtio_devices::Console;

/// Builds it.
pub fn build(spec: &mut ConsoleSpec, site: &mut Site<'_>, host: &dyn HostServices) -> Result<(), BuildError> {
    let backend = host
        .open_console(spec.stream.as_ref())
        .map_err(|source| BuildError::Host { what: format!("console `{}`", spec.id), source })?;
    virtio_pci::place(&spec.id, &mut spec.slot, Box::new(Console::terminal(backend)), site)
}
