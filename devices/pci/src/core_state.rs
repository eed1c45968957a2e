//! What every PCI function has in common, and the trait that the tree knows it by.
//!
//! A device owns a [`FunctionCore`] and lends it through [`PciFunction`]. Everything that follows from a
//! configuration write happens in [`FunctionCore::write`]: interrupts are masked or released, the bus-master
//! bit reaches the [`DmaSpace`], and the tree moves regions. Reset and restore go the same ways, so nobody
//! has to remember to synchronize.

use crate::config::ConfigSpace;
use crate::interrupts::Interrupts;
use crate::msi::MsiRegisters;
use crate::msix;
use crate::regs::{self, *};
use crate::topology::Place;
use alloc::sync::Arc;
use alloc::vec::Vec;
use device::{Device, Doorbell, Register};
use guest_memory::DmaSpace;
use hypervisor::Msi;
use saved_state::{FieldWriter, Fields, RestoreError, SavedState};

/// A function: a [`Device`] with configuration space. Its BAR accesses arrive as I/O with the BAR's number
/// as region. Both configuration calls run under the function's own lock.
pub trait PciFunction: Device {
    /// Its common part.
    fn core(&self) -> &FunctionCore;
    /// Its common part, to change.
    fn core_mut(&mut self) -> &mut FunctionCore;
    /// The guest reads 1, 2 or 4 bytes of configuration space, not across a 4-byte boundary.
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.core().read(offset, data);
    }
    /// The guest writes, likewise.
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.core_mut().write(offset, data);
    }
}

/// What a configuration write did beyond changing registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The bus-master bit went from 0 to 1: work that waited for memory access can go on.
    pub bus_master_on: bool,
}

/// See the module's header.
pub struct FunctionCore {
    config: ConfigSpace,
    interrupts: Arc<Interrupts>,
    dma: Option<DmaSpace>,
    place: Option<Place>,
    msi: Option<u16>,
    msix: Option<u16>,
    doorbells: Vec<(Register, Arc<dyn Doorbell>)>,
}

impl FunctionCore {
    /// A function with `config` and `interrupts`; `dma` follows its bus-master bit.
    pub fn new(config: ConfigSpace, interrupts: Arc<Interrupts>, dma: Option<DmaSpace>) -> Self {
        if let Some(dma) = &dma {
            dma.set_enabled(false);
        }
        Self { config, interrupts, dma, place: None, msi: None, msix: None, doorbells: Vec::new() }
    }

    /// Adds the MSI-X capability for the vectors of its interrupts; table and pending bits fill BAR `bar`,
    /// which this declares. The device hands accesses to it on to [`Interrupts::msix_read`] and its pair.
    pub fn add_msix(&mut self, bar: u8) {
        let vectors = self.interrupts.msix_vectors().max(1);
        self.config.add_bar(bar, crate::BarKind::Memory32, msix::msix_bar_bytes(vectors));
        let mut body = [0u8; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&u32::from(bar).to_le_bytes());
        let pba = msix::pba_offset(vectors) as u32 | u32::from(bar);
        body[6..].copy_from_slice(&pba.to_le_bytes());
        let at = self.config.add_capability(CAP_MSIX, &body);
        self.config.allow(at + 2, 2, 0xC000);
        self.msix = Some(at);
    }

    /// Adds the MSI capability (64-bit, maskable) for `1 << log_vectors` vectors.
    pub fn add_msi(&mut self, log_vectors: u8) {
        let log = log_vectors.min(5);
        let mut body = [0u8; 22];
        body[..2].copy_from_slice(&(0x180 | u16::from(log) << 1).to_le_bytes());
        let at = self.config.add_capability(CAP_MSI, &body);
        self.config.allow(at + 2, 2, 0x71);
        self.config.allow(at + 4, 4, 0xFFFF_FFFC);
        self.config.allow(at + 8, 4, 0xFFFF_FFFF);
        self.config.allow(at + 12, 2, 0xFFFF);
        self.config.allow(at + 16, 4, u64::from(u32::MAX >> (32 - (1u32 << log))));
        self.msi = Some(at);
    }

    /// Declares that it interrupts by INTA.
    pub fn add_intx(&mut self) {
        self.config.init(INTERRUPT_PIN, 1, 1);
    }

    /// Says that a register in one of its BARs (`region` is the BAR) has a doorbell, which follows the BAR. Before it is
    /// attached.
    pub fn add_doorbell(&mut self, register: Register, doorbell: Arc<dyn Doorbell>) {
        self.doorbells.push((register, doorbell));
    }

    pub(crate) fn doorbells(&self) -> &[(Register, Arc<dyn Doorbell>)] {
        &self.doorbells
    }

    /// Its registers.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }
    /// Its registers, for the device itself.
    pub fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    /// Its interrupts.
    pub fn interrupts(&self) -> &Arc<Interrupts> {
        &self.interrupts
    }

    pub(crate) fn set_place(&mut self, place: Place) {
        self.place = Some(place);
        self.moved();
    }

    /// The guest reads.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
        let (status, pending) = self.interrupts.status();
        let mut overlay = |at: u16, bits: &[u8]| {
            for (i, bits) in bits.iter().enumerate() {
                let index = (usize::from(at) + i).checked_sub(usize::from(offset));
                if let Some(byte) = index.and_then(|i| data.get_mut(i)) {
                    *byte |= bits;
                }
            }
        };
        if status {
            overlay(STATUS, &[STATUS_INTERRUPT]);
        }
        if let Some(at) = self.msi {
            overlay(at + 20, &pending.to_le_bytes());
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Written {
        let before = self.config.command();
        self.config.write(offset, data);
        let end = usize::from(offset) + data.len();
        if usize::from(offset) < usize::from(regs::DECODE_END) && end > usize::from(COMMAND) {
            self.moved();
        }
        self.apply(before)
    }

    fn apply(&mut self, before: u16) -> Written {
        let command = self.config.command();
        if let Some(dma) = &self.dma {
            dma.set_enabled(command & COMMAND_BUS_MASTER != 0);
        }
        let disabled = command & COMMAND_INTX_DISABLE != 0;
        self.interrupts.update(disabled, self.msi_registers(), self.msix_control());
        Written { bus_master_on: command & !before & COMMAND_BUS_MASTER != 0 }
    }

    fn msi_registers(&self) -> Option<MsiRegisters> {
        let at = self.msi?;
        let control = self.config.get(at + 2, 2);
        let message = Msi { address: self.config.get(at + 4, 8), data: self.config.get(at + 12, 2) as u32 };
        // Software may ask for more vectors than there are: it gets those that there are.
        let log_vectors = (control >> 4 & 7).min(control >> 1 & 7) as u8;
        Some(MsiRegisters {
            enabled: control & 1 != 0,
            log_vectors,
            message,
            mask: self.config.get(at + 16, 4) as u32,
        })
    }

    fn msix_control(&self) -> Option<(bool, bool)> {
        let control = self.config.get(self.msix? + 2, 2);
        Some((control & 0x8000 != 0, control & 0x4000 != 0))
    }

    /// Tells the tree what is decoded where.
    fn moved(&self) {
        if let Some(place) = &self.place {
            place.update(self.config.decoded(), self.config.forwarded());
        }
    }

    /// Back to power-up: decodes nothing, masters nothing, interrupts nobody.
    pub fn reset(&mut self) {
        self.config.reset();
        self.interrupts.reset();
        self.apply(0);
        self.moved();
    }

    /// Its state.
    pub fn save(&self) -> SavedFunction {
        let (intx_status, msi_pending, table) = self.interrupts.parts();
        let vectors = table.into_iter().map(|(msi, masked, pending)| {
            let flags = u8::from(masked) | u8::from(pending) << 1;
            SavedVector { address: msi.address, data: msi.data, flags }
        });
        SavedFunction { config: self.config.changed(), intx_status, msi_pending, vectors: vectors.collect() }
    }

    /// Takes over a saved state. On an error it is as after reset.
    pub fn restore(&mut self, saved: &SavedFunction) -> Result<(), RestoreError> {
        self.reset();
        let vectors = usize::from(self.interrupts.msix_vectors());
        if saved.vectors.len() != vectors && !saved.vectors.is_empty() {
            return Err(RestoreError::Value { tag: tag::VECTORS, reason: "another number of MSI-X vectors" });
        }
        for (offset, value) in &saved.config {
            if !self.config.restore_byte(*offset, *value) {
                self.config.reset();
                return Err(RestoreError::Value { tag: tag::CONFIG, reason: "beyond configuration space" });
            }
        }
        if let Some(dma) = &self.dma {
            dma.set_enabled(self.config.command() & COMMAND_BUS_MASTER != 0);
        }
        self.restore_interrupts(saved);
        self.moved();
        Ok(())
    }

    fn restore_interrupts(&self, saved: &SavedFunction) {
        let mut state = self.interrupts.state.lock();
        state.status = saved.intx_status;
        state.disabled = self.config.command() & COMMAND_INTX_DISABLE != 0;
        if let (Some(msi), Some(registers)) = (state.msi.as_mut(), self.msi_registers()) {
            msi.restore(registers, saved.msi_pending);
        }
        if let (Some(msix), Some((enabled, mask))) = (state.msix.as_mut(), self.msix_control()) {
            for (i, v) in saved.vectors.iter().enumerate() {
                let msi = Msi { address: v.address & !3, data: v.data };
                msix.restore_vector(i, msi, v.flags & 1 != 0, v.flags & 2 != 0);
            }
            msix.restore_control(enabled, mask);
        }
        state.drive_restored();
    }
}

mod tag {
    pub const CONFIG: u16 = 1;
    pub const INTX: u16 = 2;
    pub const MSI_PENDING: u16 = 3;
    pub const VECTORS: u16 = 4;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SavedVector {
    address: u64,
    data: u32,
    /// Bit 0: masked, bit 1: pending.
    flags: u8,
}

/// The saved state of a [`FunctionCore`], to be nested in the function's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedFunction {
    /// Writable bytes of configuration space that differ from those after reset.
    config: Vec<(u16, u8)>,
    intx_status: bool,
    msi_pending: u32,
    vectors: Vec<SavedVector>,
}

const CONFIG_RECORD: usize = 3;
const VECTOR_RECORD: usize = 13;

impl SavedState for SavedFunction {
    const KIND: &'static str = "pci-function";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { config, intx_status, msi_pending, vectors } = self;
        let mut bytes = Vec::new();
        for (offset, value) in config {
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.push(*value);
        }
        w.bytes(tag::CONFIG, &bytes).flag(tag::INTX, *intx_status).uint(tag::MSI_PENDING, *msi_pending);
        let mut bytes = Vec::new();
        for SavedVector { address, data, flags } in vectors {
            bytes.extend_from_slice(&address.to_le_bytes());
            bytes.extend_from_slice(&data.to_le_bytes());
            bytes.push(*flags);
        }
        w.bytes(tag::VECTORS, &bytes);
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let whole = |tag, bytes: &[u8], record: usize| match bytes.len() % record {
            0 => Ok(()),
            rest => Err(RestoreError::Length { tag, got: bytes.len(), expected: bytes.len() - rest }),
        };
        let bytes = r.bytes(tag::CONFIG, crate::config::CONFIG_BYTES * CONFIG_RECORD)?;
        whole(tag::CONFIG, bytes, CONFIG_RECORD)?;
        let config =
            bytes.chunks_exact(CONFIG_RECORD).map(|c| (u16::from_le_bytes([c[0], c[1]]), c[2])).collect();
        let intx_status = r.flag(tag::INTX)?;
        let msi_pending = r.uint(tag::MSI_PENDING)?;
        let bytes = r.bytes(tag::VECTORS, usize::from(msix::MAX_VECTORS) * VECTOR_RECORD)?;
        whole(tag::VECTORS, bytes, VECTOR_RECORD)?;
        let vectors = bytes.chunks_exact(VECTOR_RECORD).map(|c| SavedVector {
            address: device::read_le(&c[..8]),
            data: device::read_le(&c[8..12]) as u32,
            flags: c[12] & 3,
        });
        Ok(Self { config, intx_status, msi_pending, vectors: vectors.collect() })
    }
}
