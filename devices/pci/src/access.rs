//! Configuration access: ECAM, and the ports 0xCF8–0xCFF (PCI Local Bus Specification 3.0, 3.2.2.3.2;
//! PCI Express Base Specification 5.0, 7.2.2).
//!
//! One device with two regions. It finds the function in the tree, then locks it: never the other way round.
//! Port 0xCF9, which lies inside the address port, is the chipset's reset control: byte accesses go there.

use crate::address::Devfn;
use crate::topology::Topology;
use alloc::string::String;
use alloc::sync::Arc;
use core::task::Poll;
use device::{Device, IoError, IoHandler, StateBlob, Unsavable, read_le, write_le};
use saved_state::{FieldWriter, Fields, RestoreError, SavedState};
use sync::Mutex;

/// Region of ECAM: 1 MiB for each bus.
pub const ECAM_REGION: usize = 0;
/// Region of the eight ports from 0xCF8.
pub const PORTS_REGION: usize = 1;

const ADDRESS_ENABLE: u32 = 1 << 31;
const ADDRESS_MASK: u32 = 0x80FF_FFFC;
/// 0xCF9, from 0xCF8.
const RESET_OFFSET: u64 = 1;

/// See the module's header.
pub struct ConfigAccess {
    name: String,
    topology: Arc<Topology>,
    address: u32,
    reset_control: Option<(Arc<Mutex<dyn Device>>, usize)>,
}

impl ConfigAccess {
    /// Access to all functions of `topology`.
    pub fn new(topology: Arc<Topology>) -> Self {
        Self { name: "pci-config".into(), topology, address: 0, reset_control: None }
    }

    /// Byte accesses to port 0xCF9 go to `region` of `device`, at offset 0.
    pub fn with_reset_control(mut self, device: Arc<Mutex<dyn Device>>, region: usize) -> Self {
        self.reset_control = Some((device, region));
        self
    }

    fn read(&self, bus: u8, devfn: Devfn, offset: u16, data: &mut [u8]) {
        match self.topology.find(bus, devfn) {
            Some(function) => function.lock().config_read(offset, data),
            None => data.fill(0xFF),
        }
    }

    fn write(&self, bus: u8, devfn: Devfn, offset: u16, data: &[u8]) {
        if let Some(function) = self.topology.find(bus, devfn) {
            function.lock().config_write(offset, data);
        }
    }

    /// Where an access to the data port goes, if the address port enables it.
    fn target(&self, port: u64) -> Option<(u8, Devfn, u16)> {
        let a = self.address;
        let offset = (a & 0xFC) as u16 + (port & 3) as u16;
        (a & ADDRESS_ENABLE != 0).then_some(((a >> 16) as u8, Devfn((a >> 8) as u8), offset))
    }
}

fn ecam_target(offset: u64) -> (u8, Devfn, u16) {
    ((offset >> 20) as u8, Devfn((offset >> 12) as u8), (offset & 0xFFF) as u16)
}

/// Runs `access` on naturally aligned pieces of at most four bytes.
fn pieces(offset: u64, len: usize, mut access: impl FnMut(u64, core::ops::Range<usize>)) {
    let mut at = 0;
    while at < len {
        let here = offset + at as u64;
        let n = (4 - (here & 3) as usize).min(len - at);
        access(here, at..at + n);
        at += n;
    }
}

impl IoHandler for ConfigAccess {
    fn io_read(&mut self, region: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        match (region, offset) {
            (ECAM_REGION, _) => pieces(offset, data.len(), |at, part| {
                let (bus, devfn, offset) = ecam_target(at);
                self.read(bus, devfn, offset, &mut data[part]);
            }),
            (PORTS_REGION, RESET_OFFSET) if data.len() == 1 => {
                if let Some((device, region)) = &self.reset_control {
                    return device.lock().as_io().ok_or(IoError::Offset)?.io_read(*region, 0, data);
                }
            }
            (PORTS_REGION, 0) if data.len() == 4 => write_le(data, u64::from(self.address)),
            (PORTS_REGION, 4..=7) if offset + data.len() as u64 <= 8 => {
                if let Some((bus, devfn, offset)) = self.target(offset) {
                    self.read(bus, devfn, offset, data);
                }
            }
            _ => return Err(IoError::Width),
        }
        Ok(())
    }

    fn io_write(&mut self, region: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        match (region, offset) {
            (ECAM_REGION, _) => pieces(offset, data.len(), |at, part| {
                let (bus, devfn, offset) = ecam_target(at);
                self.write(bus, devfn, offset, &data[part]);
            }),
            (PORTS_REGION, RESET_OFFSET) if data.len() == 1 => {
                if let Some((device, region)) = &self.reset_control {
                    return device.lock().as_io().ok_or(IoError::Offset)?.io_write(*region, 0, data);
                }
            }
            (PORTS_REGION, 0) if data.len() == 4 => self.address = read_le(data) as u32 & ADDRESS_MASK,
            (PORTS_REGION, 4..=7) if offset + data.len() as u64 <= 8 => {
                if let Some((bus, devfn, offset)) = self.target(offset) {
                    self.write(bus, devfn, offset, data);
                }
            }
            _ => return Err(IoError::Width),
        }
        Ok(())
    }
}

impl Device for ConfigAccess {
    fn name(&self) -> &str {
        &self.name
    }
    fn as_io(&mut self) -> Option<&mut dyn IoHandler> {
        Some(self)
    }
    fn poll(&mut self) {}
    fn quiesce(&mut self) -> Poll<()> {
        Poll::Ready(())
    }
    fn resume(&mut self) {}
    fn reset(&mut self) {
        self.address = 0;
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(saved_state::to_blob(&SavedAccess { address: self.address }))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.address = saved_state::from_blob::<SavedAccess>(blob)?.address & ADDRESS_MASK;
        Ok(())
    }
}

struct SavedAccess {
    address: u32,
}

impl SavedState for SavedAccess {
    const KIND: &'static str = "pci-config-access";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { address } = self;
        w.uint(1, *address);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self { address: r.uint(1)? })
    }
}
