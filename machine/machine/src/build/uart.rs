//! A serial port: COM1 to COM4.

use super::BuildError;
use super::site::{Range, Site};
use crate::host::{HostServices, SerialInput};
use alloc::format;
use chipset::Uart16550;
use machine_spec::UartSpec;
use machine_spec::layout::{irq, port};

const PORTS: u16 = 8;

/// Builds it.
pub fn build(spec: &UartSpec, site: &mut Site<'_>, host: &dyn HostServices) -> Result<(), BuildError> {
    let com = usize::from(spec.port) % port::COM.len();
    let name = format!("uart{com}");
    let input = SerialInput::default();
    let stream = host
        .open_serial(spec.stream.as_ref(), input.clone(), site.waker())
        .map_err(|source| BuildError::Host { what: format!("serial port COM{}", com + 1), source })?;
    let uart = Uart16550::new(&name, site.isa_irq(irq::COM[com]), stream);
    let uart = site.place(uart, &[Range::Ports(port::COM[com], PORTS)])?;
    input.fill(&uart);
    Ok(())
}
