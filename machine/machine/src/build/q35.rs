//! The board: a q35-like PC. Its addresses and interrupts stand in `machine_spec::layout`, which the firmware's tables
//! are made from, too; this file puts the fixed chips there.
//!
//! Called by: `build`, once for each machine.

use super::chips::Chips;
use super::site::{Range, Site};
use super::{BuildError, Parts};
use crate::devices::{Devices, SharedDevice};
use crate::interrupts::BoardLines;
use crate::io::MachineIo;
use crate::requests::RequestQueue;
use crate::switch::Switch;
use crate::{Request, Verdict};
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use chipset::{
    InputPins, Ioapic, IoapicOutput, MessageSink, MissedTicks, MsiMessage, Pic8259, PlatformRequests,
};
use device::{Bus, IrqLine, LineSink};
use guest_memory::GuestRam;
use hypervisor::{IrqSink, Msi, MsiSink, Trigger};
use machine_spec::PciSlot;
use machine_spec::layout::{self, RamLayout, Span, irq, port, slot};
use pci::{ConfigAccess, HostBridge, LpcBridge, PirqLines, RootPort, Topology, Windows};
use sync::Mutex;

/// First of the root ports that wait for hot-plug; devices of the spec go below.
pub const FIRST_ROOT_PORT: u8 = 24;
/// Root ports that wait for hot-plug.
const ROOT_PORTS: u8 = 4;

/// What devices are put on. Grows by sites.
pub struct Board {
    pub(crate) ports: Arc<Bus>,
    pub(crate) memory: Arc<Bus>,
    pub(crate) ram: GuestRam,
    pub(crate) lines: BoardLines,
    pub(crate) pirq: PirqLines,
    pub(crate) msi: Arc<dyn MsiSink>,
    pub(crate) messages: Arc<dyn MessageSink>,
    /// Where doorbells come from.
    pub(crate) doorbells: Arc<Switch>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) devices: Devices,
    /// Taken PCI slots.
    pub(crate) slots: Vec<PciSlot>,
    pic: Arc<Mutex<Pic8259>>,
    pub(crate) ioapic: Arc<Mutex<Ioapic>>,
}

impl Board {
    /// A board around `partition` with its fixed chips: interrupt controllers, timers, power, PCI with its bridges and
    /// root ports. And those of the chips that the machine itself talks to.
    pub fn new(
        layout: &RamLayout,
        ram: GuestRam,
        partition: &Arc<Switch>,
        missed: MissedTicks,
        parts: &Parts<'_>,
    ) -> Result<(Self, Chips), BuildError> {
        let (ports, memory) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let intr = IrqLine::new(Arc::new(PicOutput(partition.irq_sink())), 0);
        let pic = Arc::new(Mutex::new(Pic8259::new("pic", intr)));
        let engine = Arc::new(ToEngine(partition.irq_sink()));
        let ioapic = Arc::new(Mutex::new(Ioapic::new("ioapic0", engine.clone())));
        let lines = BoardLines::new(Arc::new(InputPins(pic.clone())), Arc::new(InputPins(ioapic.clone())));
        let apic = core::array::from_fn(|pirq| lines.pin(irq::PIRQ_GSI + pirq as u32));
        let isa = irq::PIRQ_ISA_CHOICES.iter().map(|line| (*line, lines.isa(*line))).collect();
        let pirq = PirqLines::new(apic, isa);
        let topology = Topology::new(windows(layout), &memory, &ports);
        let (devices, slots, msi) = (Devices::default(), Vec::new(), partition.msi_sink());
        let mut board = Self {
            ports,
            memory,
            ram,
            lines,
            pirq,
            msi,
            messages: engine,
            doorbells: partition.clone(),
            topology,
            devices,
            slots,
            pic,
            ioapic,
        };
        board.place_interrupt_controllers(parts)?;
        let chips = super::chips::build(&mut board, layout, missed, parts)?;
        board.place_pci(chips.reset.clone(), parts)?;
        Ok((board, chips))
    }

    /// What vCPUs see of it.
    pub fn io(&self, chips: &Chips) -> MachineIo {
        MachineIo {
            pit: chips.pit.clone(),
            ports: self.ports.clone(),
            memory: self.memory.clone(),
            pic: self.pic.clone(),
            ioapic: self.ioapic.clone(),
        }
    }

    /// First on the board: they are restored before anybody drives a line into them.
    fn place_interrupt_controllers(&mut self, parts: &Parts<'_>) -> Result<(), BuildError> {
        let (pic, ioapic) = (self.pic.clone(), self.ioapic.clone());
        let mut site = Site::new(self, parts.host);
        site.place_shared(
            &pic,
            &[Range::Ports(port::PIC1, 2), Range::Ports(port::PIC2, 2), Range::Ports(port::ELCR, 2)],
        )?;
        site.commit();
        let mut site = Site::new(self, parts.host);
        site.place_shared(&ioapic, &[memory(layout::IOAPIC)])?;
        site.commit();
        Ok(())
    }

    fn place_pci(&mut self, reset: SharedDevice, parts: &Parts<'_>) -> Result<(), BuildError> {
        let mut site = Site::new(self, parts.host);
        site.attach(HostBridge::new(layout::ECAM.start.0), PciSlot { bus: 0, device: 0, function: 0 })?;
        site.commit();
        let lpc = LpcBridge::new(port::PM_BASE, self.pirq.router().clone());
        let mut site = Site::new(self, parts.host);
        site.attach(lpc, PciSlot { bus: 0, device: slot::LPC_DEVICE, function: 0 })?;
        site.commit();
        for number in 0..ROOT_PORTS {
            let device = FIRST_ROOT_PORT + number;
            let at = PciSlot { bus: 0, device, function: 0 };
            let mut site = Site::new(self, parts.host);
            let (name, line) = (format!("root-port{number}"), site.intx(at));
            let port = RootPort::new(name, u16::from(number) + 1, true, false, line, site.msi())?;
            site.attach(port, at)?;
            site.commit();
        }
        let access = ConfigAccess::new(self.topology.clone()).with_reset_control(reset, 0);
        let mut site = Site::new(self, parts.host);
        site.place(access, &[memory(layout::ECAM), Range::Ports(port::PCI_CONFIG, 8)])?;
        site.commit();
        Ok(())
    }
}

/// A span of the map as a place for registers.
pub fn memory(span: Span) -> Range {
    Range::Memory(span.start.0, span.size)
}

/// Where PCI functions may decode.
fn windows(layout: &RamLayout) -> Windows {
    let inclusive = |span: Span| (span.start.0, span.end() - 1);
    let low = Span::between(layout.low_end().max(layout::PCI_MMIO32.start.0), layout::PCI_MMIO32.end());
    Windows {
        io: [(u64::from(port::PCI_IO_START), 0xFFFF)].into(),
        memory32: [inclusive(low), inclusive(layout::PCI_MMIO32_UPPER)].into(),
        memory64: [inclusive(layout.pci_mmio64())].into(),
    }
}

/// The 8259's INTR output.
struct PicOutput(Arc<dyn IrqSink>);

impl LineSink for PicOutput {
    fn set_level(&self, _: u32, level: bool) {
        self.0.pic_line_changed(level);
    }
    fn restore_level(&self, _: u32, level: bool) {
        self.0.pic_line_changed(level);
    }
}

/// Messages of the I/O APIC and other chips.
struct ToEngine(Arc<dyn IrqSink>);

fn msi(message: MsiMessage) -> Msi {
    Msi { address: message.address, data: message.data }
}

impl MessageSink for ToEngine {
    fn send(&self, message: MsiMessage) {
        self.0.deliver(msi(message));
    }
}

impl IoapicOutput for ToEngine {
    fn send(&self, message: MsiMessage) {
        self.0.deliver(msi(message));
    }
    fn route_changed(&self, pin: u32, message: Option<MsiMessage>, level: bool) {
        let trigger = if level { Trigger::Level } else { Trigger::Edge };
        self.0.set_ioapic_route(pin, message.map(msi), trigger);
    }
}

/// Power and reset, as the guest asks for them.
pub struct GuestRequests(pub Arc<RequestQueue>);

impl PlatformRequests for GuestRequests {
    fn power_off(&self) {
        self.0.guest_asks(Request::Stop(Verdict::PoweredOff));
    }
    fn reset(&self) {
        self.0.guest_asks(Request::Reset);
    }
}
