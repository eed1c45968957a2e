//! Tests of the crate as a whole: a board of test functions, reached as a guest reaches them.

use crate::regs::*;
use crate::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use core::task::Poll;
use device::{Bus, Device, IoError, IoHandler, IrqLine, LineSink, RestoreError, StateBlob, Unsavable};
use guest_memory::{DmaSpace, GuestRam};
use hypervisor::{EngineError, Msi, MsiRoute, MsiSink};
use proptest::prelude::*;
use sync::Mutex;

/// Records what was sent.
#[derive(Clone, Default)]
struct Messages(Arc<Mutex<Vec<Msi>>>);

impl Messages {
    fn take(&self) -> Vec<(u64, u32)> {
        core::mem::take(&mut *self.0.lock()).iter().map(|m| (m.address, m.data)).collect()
    }
}

struct Route {
    log: Messages,
    state: Mutex<(Msi, bool)>,
}

impl MsiRoute for Route {
    fn set(&self, msi: Msi) {
        self.state.lock().0 = msi;
    }
    fn fire(&self) {
        let (msi, masked) = *self.state.lock();
        assert!(!masked, "fired while masked");
        self.log.0.lock().push(msi);
    }
    fn mask(&self, masked: bool) {
        self.state.lock().1 = masked;
    }
}

impl MsiSink for Messages {
    fn route(&self) -> Result<Box<dyn MsiRoute>, EngineError> {
        Ok(Box::new(Route { log: self.clone(), state: Mutex::new((Msi::default(), true)) }))
    }
}

/// Records levels.
#[derive(Default)]
struct Levels(Mutex<Vec<(u32, bool)>>);

impl LineSink for Levels {
    fn set_level(&self, line: u32, level: bool) {
        self.0.lock().push((line, level));
    }
    fn restore_level(&self, line: u32, level: bool) {
        self.0.lock().push((line | 0x100, level));
    }
}

/// A function with a memory BAR that answers with its tag, an I/O BAR, a 64-bit BAR and MSI-X.
struct Sample {
    tag: u8,
    core: FunctionCore,
}

const SAMPLE: Identity =
    Identity { vendor: 0x1234, device: 0x5678, class: 0xFF_0000, revision: 1, subsystem: (1, 2) };

impl Sample {
    fn new(tag: u8, line: IrqLine, messages: &Messages, dma: DmaSpace) -> Self {
        let mut config = ConfigSpace::endpoint(SAMPLE);
        config.add_bar(0, BarKind::Memory32, 0x4000);
        config.add_bar(2, BarKind::Io, 0x20);
        config.add_bar(4, BarKind::Memory64 { prefetchable: true }, 0x10_0000);
        express::add(&mut config, express::PortKind::RootComplexEndpoint);
        let interrupts = Interrupts::new(line).with_msix(messages, 3).unwrap();
        let mut core = FunctionCore::new(config, Arc::new(interrupts), Some(dma));
        core.add_msix(1);
        core.add_intx();
        Self { tag, core }
    }
}

impl PciFunction for Sample {
    fn core(&self) -> &FunctionCore {
        &self.core
    }
    fn core_mut(&mut self) -> &mut FunctionCore {
        &mut self.core
    }
}

impl IoHandler for Sample {
    fn io_read(&mut self, region: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        match region {
            1 => self.core.interrupts().msix_read(offset, data),
            _ => {
                data.fill(self.tag + region as u8);
                Ok(())
            }
        }
    }
    fn io_write(&mut self, region: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        match region {
            1 => self.core.interrupts().msix_write(offset, data),
            _ => Ok(()),
        }
    }
}

impl Device for Sample {
    fn name(&self) -> &str {
        "sample"
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
        self.core.reset();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(saved_state::to_blob(&self.core.save()))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.core.reset();
        self.core.restore(&saved_state::from_blob::<SavedFunction>(blob)?)
    }
}

fn sample() -> Sample {
    let dma = DmaSpace::new(GuestRam::for_test(0x1000));
    Sample::new(0x10, IrqLine::unconnected(), &Messages::default(), dma)
}

const ECAM: u64 = 0xE000_0000;

struct Board {
    memory: Arc<Bus>,
    io: Arc<Bus>,
    topology: Arc<Topology>,
    messages: Messages,
    levels: Arc<Levels>,
    dma: Vec<DmaSpace>,
    samples: Vec<Arc<Mutex<Sample>>>,
}

impl Board {
    /// Host bridge, LPC, samples at 1.0 and 2.0 on bus 0, and one behind a root port at 3.0.
    fn new() -> Self {
        let (memory, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = Windows {
            io: alloc::vec![(0x1000, 0xFFFF)],
            memory32: alloc::vec![(0xC000_0000, 0xDFFF_FFFF)],
            memory64: alloc::vec![(0x80_0000_0000, 0xFF_FFFF_FFFF)],
        };
        let topology = Topology::new(windows, &memory, &io);
        let (messages, levels) = (Messages::default(), Arc::new(Levels::default()));
        let access = Arc::new(Mutex::new(ConfigAccess::new(topology.clone())));
        memory.insert(ECAM, 256 << 20, access.clone(), ECAM_REGION).unwrap();
        io.insert(0xCF8, 8, access, PORTS_REGION).unwrap();

        let line = |i| IrqLine::new(levels.clone(), i);
        let isa = alloc::vec![(5, line(5)), (11, line(11))];
        let pirqs = PirqLines::new(core::array::from_fn(|i| line(16 + i as u32)), isa);
        let root = |device| (Parent::Root, Devfn::new(device, 0));
        let attach = |(parent, devfn), f| topology.attach(parent, devfn, f).unwrap();
        attach(root(0), Arc::new(Mutex::new(HostBridge::new(ECAM))));
        let lpc = Arc::new(Mutex::new(LpcBridge::new(0x600, pirqs.router().clone())));
        topology.attach(Parent::Root, Devfn::new(31, 0), lpc).unwrap();
        let port = RootPort::new("rp0", 1, true, true, pirqs.line(pirq_of(3, 1)), &messages).unwrap();
        let port = topology.attach(Parent::Root, Devfn::new(3, 0), Arc::new(Mutex::new(port))).unwrap();

        let mut board = Self { memory, io, topology, messages, levels, dma: Vec::new(), samples: Vec::new() };
        for (i, (parent, device)) in
            [(Parent::Root, 1), (Parent::Root, 2), (Parent::Bridge(port), 0)].into_iter().enumerate()
        {
            let dma = DmaSpace::new(GuestRam::for_test(0x1000));
            let tag = 0x10 * (i as u8 + 1);
            let s = Sample::new(tag, pirqs.line(pirq_of(device, 1)), &board.messages, dma.clone());
            let s = Arc::new(Mutex::new(s));
            board.topology.attach(parent, Devfn::new(device, 0), s.clone()).unwrap();
            board.samples.push(s);
            board.dma.push(dma);
        }
        board
    }
    fn ecam(bus: u8, device: u8, offset: u16) -> u64 {
        ECAM | u64::from(bus) << 20 | u64::from(Devfn::new(device, 0).0) << 12 | u64::from(offset)
    }
    fn cfg_read(&self, bus: u8, device: u8, offset: u16) -> u32 {
        let mut data = [0; 4];
        assert!(self.memory.read(Self::ecam(bus, device, offset), &mut data));
        u32::from_le_bytes(data)
    }
    fn cfg_write(&self, bus: u8, device: u8, offset: u16, data: &[u8]) {
        assert!(self.memory.write(Self::ecam(bus, device, offset), data));
    }
    /// What a byte of memory answers, if anything does.
    fn mem(&self, at: u64) -> Option<u8> {
        let mut data = [0; 1];
        self.memory.read(at, &mut data).then_some(data[0])
    }
    fn write32(&self, at: u64, value: u32) {
        assert!(self.memory.write(at, &value.to_le_bytes()));
    }
    fn find_cap(&self, bus: u8, device: u8, id: u8) -> u16 {
        let mut at = (self.cfg_read(bus, device, CAPABILITIES) & 0xFF) as u16;
        while at != 0 {
            let head = self.cfg_read(bus, device, at);
            if head as u8 == id {
                return at;
            }
            at = (head >> 8 & 0xFF) as u16;
        }
        panic!("no capability {id:#x}");
    }
}

#[test]
fn functions_answer_by_ecam_and_by_ports() {
    let b = Board::new();
    assert_eq!(b.cfg_read(0, 0, 0), 0x29C0_8086);
    assert_eq!(b.cfg_read(0, 1, 0), 0x5678_1234);
    assert_eq!(b.cfg_read(0, 9, 0), 0xFFFF_FFFF);
    assert_eq!(b.cfg_read(7, 0, 0), 0xFFFF_FFFF);
    let mut data = [0; 4];
    b.io.write(0xCF8, &0x8000_F800u32.to_le_bytes());
    b.io.read(0xCFC, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x2918_8086);
    let mut word = [0; 2];
    b.io.read(0xCFE, &mut word);
    assert_eq!(u16::from_le_bytes(word), 0x2918);
    b.io.write(0xCF8, &0x0000_F800u32.to_le_bytes());
    b.io.read(0xCFC, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0xFFFF_FFFF);
}

#[test]
fn bars_size_move_and_wait_for_room() {
    let b = Board::new();
    b.cfg_write(0, 1, BAR0, &[0xFF; 4]);
    assert_eq!(b.cfg_read(0, 1, BAR0), 0xFFFF_C000);
    b.cfg_write(0, 1, BAR0 + 8, &[0xFF; 4]);
    assert_eq!(b.cfg_read(0, 1, BAR0 + 8), 0xFFFF_FFE1);
    b.cfg_write(0, 1, BAR0 + 16, &[0xFF; 8]);
    assert_eq!(b.cfg_read(0, 1, BAR0 + 16), 0xFFF0_000C);
    assert_eq!(b.cfg_read(0, 1, BAR0 + 20), 0xFFFF_FFFF);
    b.cfg_write(0, 1, BAR0 + 16, &[0; 8]);

    b.cfg_write(0, 1, BAR0, &0xC000_0000u32.to_le_bytes());
    assert_eq!(b.mem(0xC000_0000), None);
    b.cfg_write(0, 1, COMMAND, &[2, 0]);
    assert_eq!(b.mem(0xC000_0000), Some(0x10));
    assert_eq!(b.mem(0xC000_3FFF), Some(0x10));
    assert_eq!(b.mem(0xC000_4000), None);
    // A second function on the same place finds no room until the first has moved.
    let before = b.topology.stats.unplaced.load(Ordering::Relaxed);
    b.cfg_write(0, 2, BAR0, &0xC000_0000u32.to_le_bytes());
    b.cfg_write(0, 2, COMMAND, &[2, 0]);
    assert_eq!(b.mem(0xC000_0000), Some(0x10));
    assert!(b.topology.stats.unplaced.load(Ordering::Relaxed) > before);
    b.cfg_write(0, 1, BAR0, &0xC100_0000u32.to_le_bytes());
    assert_eq!((b.mem(0xC000_0000), b.mem(0xC100_0000)), (Some(0x20), Some(0x10)));
    // Outside of the windows it answers nowhere.
    b.cfg_write(0, 1, BAR0, &0x1000u32.to_le_bytes());
    assert_eq!((b.mem(0x1000), b.mem(0xC100_0000)), (None, None));
    b.cfg_write(0, 2, COMMAND, &[0, 0]);
    assert_eq!(b.mem(0xC000_0000), None);
    b.cfg_write(0, 2, COMMAND, &[2, 0]);
    b.samples[1].lock().reset();
    assert_eq!(b.mem(0xC000_0000), None);
}

#[test]
fn assignment_gives_everything_a_place() {
    let b = Board::new();
    b.topology.assign().unwrap();
    for device in [1, 2] {
        let bar = u64::from(b.cfg_read(0, device, BAR0) & !0xF);
        assert_eq!(b.mem(bar), Some(0x10 * device));
        let wide = u64::from(b.cfg_read(0, device, BAR0 + 16) & !0xF)
            | u64::from(b.cfg_read(0, device, BAR0 + 20)) << 32;
        assert!(wide >= 0x80_0000_0000);
        assert_eq!(b.mem(wide), Some(0x10 * device + 4));
        let mut data = [0];
        assert!(b.io.read(u64::from(b.cfg_read(0, device, BAR0 + 8) & !3), &mut data));
        assert_eq!(data[0], 0x10 * device + 2);
    }
    // Behind the root port, on bus 1.
    assert_eq!(b.cfg_read(0, 3, PRIMARY_BUS) & 0xFF_FFFF, 0x01_0100);
    assert_eq!(b.cfg_read(1, 0, 0), 0x5678_1234);
    let bar = u64::from(b.cfg_read(1, 0, BAR0) & !0xF);
    assert_eq!(b.mem(bar), Some(0x30));
    assert_eq!(b.topology.stats.unplaced.load(Ordering::Relaxed), 0);
    // The port's windows close over it.
    b.cfg_write(0, 3, MEMORY_BASE, &[0xF0, 0xFF, 0, 0]);
    assert_eq!(b.mem(bar), None);
    // The same machine is assigned the same way.
    let again = Board::new();
    again.topology.assign().unwrap();
    assert_eq!(u64::from(again.cfg_read(1, 0, BAR0) & !0xF), bar);
}

#[test]
fn a_root_port_has_room_for_what_is_plugged_later() {
    let windows = Windows {
        io: [(0x1000, 0xFFFF)].into(),
        memory32: [(0xC000_0000, 0xDFFF_FFFF)].into(),
        memory64: [(0x80_0000_0000, 0xFF_FFFF_FFFF)].into(),
    };
    let topology = Topology::new(windows, &Arc::new(Bus::new()), &Arc::new(Bus::new()));
    let port = Arc::new(Mutex::new(root_port()));
    topology.attach(Parent::Root, Devfn::new(3, 0), port.clone()).unwrap();
    topology.assign().unwrap();
    let forwarded = port.lock().core().config().forwarded().unwrap();
    assert_eq!(forwarded.io, Some((0x1000, 0x1FFF)));
    let memory = [Some((0xC000_0000, 0xC01F_FFFF)), Some((0x80_0000_0000, 0x80_3FFF_FFFF))];
    assert!(forwarded.memory.into_iter().eq(memory), "{:x?}", forwarded.memory);
}

#[test]
fn too_little_room_is_an_error() {
    let (memory, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let topology = Topology::new(Windows::default(), &memory, &io);
    topology.attach(Parent::Root, Devfn::new(4, 0), Arc::new(Mutex::new(sample()))).unwrap();
    let error = topology.assign().unwrap_err();
    assert!(matches!(error, AssignError::Room { bus: 0, devfn: Devfn(0x20), .. }), "{error}");
    let taken = topology.attach(Parent::Root, Devfn::new(4, 0), Arc::new(Mutex::new(sample())));
    assert_eq!(taken, Err(AttachError::Taken(Devfn(0x20))));
}

#[test]
fn detached_functions_are_gone() {
    let b = Board::new();
    let extra = Arc::new(Mutex::new(sample()));
    let id = b.topology.attach(Parent::Root, Devfn::new(9, 0), extra.clone()).unwrap();
    b.topology.assign().unwrap();
    let bar = u64::from(b.cfg_read(0, 9, BAR0) & !0xF);
    assert_eq!(b.mem(bar), Some(0x10));
    b.topology.detach(id);
    assert_eq!((b.mem(bar), b.cfg_read(0, 9, 0)), (None, 0xFFFF_FFFF));
    assert_eq!(Arc::strong_count(&extra), 1);
    extra.lock().reset();
}

#[test]
fn msix_masks_keep_what_is_pending() {
    let b = Board::new();
    b.topology.assign().unwrap();
    let table = u64::from(b.cfg_read(0, 1, BAR0 + 4) & !0xF);
    let cap = b.find_cap(0, 1, CAP_MSIX);
    assert_eq!(b.cfg_read(0, 1, cap) >> 16 & 0x7FF, 2);
    let interrupts = b.samples[0].lock().core.interrupts().clone();
    assert!(!interrupts.fire(0));
    for v in 0..3u64 {
        b.write32(table + 16 * v, 0xFEE0_1000);
        b.write32(table + 16 * v + 8, 0x40 + v as u32);
    }
    b.cfg_write(0, 1, cap + 2, &0x8000u16.to_le_bytes());
    assert!(interrupts.fire(1));
    assert_eq!(b.messages.take(), []);
    assert_eq!(b.mem(table + 0x800), Some(0xFF), "the pending bits take no bytes");
    let mut pba = [0; 8];
    b.memory.read(table + 0x800, &mut pba);
    assert_eq!(u64::from_le_bytes(pba), 2);
    b.write32(table + 16 + 12, 0);
    assert_eq!(b.messages.take(), [(0xFEE0_1000, 0x41)]);
    interrupts.fire(1);
    assert_eq!(b.messages.take(), [(0xFEE0_1000, 0x41)]);
    // The function mask holds all.
    b.cfg_write(0, 1, cap + 2, &0xC000u16.to_le_bytes());
    interrupts.fire(1);
    interrupts.fire(1);
    interrupts.fire(77);
    assert_eq!(b.messages.take(), []);
    b.cfg_write(0, 1, cap + 2, &0x8000u16.to_le_bytes());
    assert_eq!(b.messages.take(), [(0xFEE0_1000, 0x41)]);
}

#[test]
fn msi_of_the_root_port() {
    let b = Board::new();
    let cap = b.find_cap(0, 3, CAP_MSI);
    b.cfg_write(0, 3, cap + 4, &0xFEE0_2000u32.to_le_bytes());
    b.cfg_write(0, 3, cap + 12, &0x55u16.to_le_bytes());
    let (_, _, port) = b.topology.children(Parent::Root).swap_remove(3);
    let interrupts = port.lock().core().interrupts().clone();
    assert!(!interrupts.fire(0));
    b.cfg_write(0, 3, cap + 2, &1u16.to_le_bytes());
    assert!(interrupts.fire(0));
    assert_eq!(b.messages.take(), [(0xFEE0_2000, 0x55)]);
    b.cfg_write(0, 3, cap + 16, &1u32.to_le_bytes());
    interrupts.fire(0);
    assert_eq!((b.messages.take(), b.cfg_read(0, 3, cap + 20)), (Vec::new(), 1));
    b.cfg_write(0, 3, cap + 16, &0u32.to_le_bytes());
    assert_eq!((b.messages.take(), b.cfg_read(0, 3, cap + 20)), (alloc::vec![(0xFEE0_2000, 0x55)], 0));
}

#[test]
fn intx_reaches_its_pins() {
    let b = Board::new();
    let interrupts = b.samples[0].lock().core.interrupts().clone();
    interrupts.set_intx(true);
    assert_eq!(core::mem::take(&mut *b.levels.0.lock()), [(17, true)]);
    assert_eq!(b.cfg_read(0, 1, COMMAND) >> 16 & 8, 8);
    // PIRQB to ISA interrupt 11.
    b.cfg_write(0, 31, 0x61, &[11]);
    assert_eq!(core::mem::take(&mut *b.levels.0.lock()), [(11, true)]);
    b.cfg_write(0, 1, COMMAND, &0x400u16.to_le_bytes());
    assert_eq!(core::mem::take(&mut *b.levels.0.lock()), [(17, false), (11, false)]);
    assert_eq!(b.cfg_read(0, 1, COMMAND) >> 16 & 8, 8);
    b.cfg_write(0, 1, COMMAND, &[0, 0]);
    assert!(interrupts.intx_level());
    b.cfg_write(0, 31, 0x61, &[0x80]);
    interrupts.set_intx(false);
    assert_eq!(*b.levels.0.lock(), [(17, true), (11, true), (11, false), (17, false)]);
}

#[test]
fn bus_master_follows_the_command_register() {
    let b = Board::new();
    assert!(!b.dma[0].is_enabled());
    b.cfg_write(0, 1, COMMAND, &[4, 0]);
    assert!(b.dma[0].is_enabled() && !b.dma[1].is_enabled());
    let saved = b.samples[0].lock().save().unwrap();
    b.samples[0].lock().reset();
    assert!(!b.dma[0].is_enabled());
    b.samples[0].lock().restore(&saved).unwrap();
    assert!(b.dma[0].is_enabled());
}

#[test]
fn restore_brings_regions_and_vectors_back() {
    let b = Board::new();
    b.topology.assign().unwrap();
    let table = u64::from(b.cfg_read(0, 1, BAR0 + 4) & !0xF);
    let cap = b.find_cap(0, 1, CAP_MSIX);
    b.write32(table, 0xFEE0_1000);
    b.write32(table + 8, 0x77);
    b.cfg_write(0, 1, cap + 2, &0x8000u16.to_le_bytes());
    let interrupts = b.samples[0].lock().core.interrupts().clone();
    interrupts.fire(0);
    let saved = b.samples[0].lock().save().unwrap();
    b.samples[0].lock().reset();
    assert_eq!(b.mem(table + 0x10), None);
    b.samples[0].lock().restore(&saved).unwrap();
    assert_eq!(b.messages.take(), []);
    b.write32(table + 12, 0);
    assert_eq!(b.messages.take(), [(0xFEE0_1000, 0x77)]);
}

device::device_conformance!(sample_conforms, sample, &[0x4000, 0x1000], |s: &mut Sample| {
    s.config_write(COMMAND, &[7, 0]);
    s.config_write(BAR0, &0xC000_0000u32.to_le_bytes());
    let _ = s.io_write(1, 8, &[1, 2, 3, 4]);
    s.core.interrupts().set_intx(true);
});

device::device_conformance!(host_bridge_conforms, || HostBridge::new(ECAM), &[], |h: &mut HostBridge| {
    h.config_write(COMMAND, &[7, 0]);
});

fn lpc() -> LpcBridge {
    let pirqs = PirqLines::new(core::array::from_fn(|_| IrqLine::unconnected()), Vec::new());
    LpcBridge::new(0x600, pirqs.router().clone())
}

device::device_conformance!(lpc_conforms, lpc, &[], |l: &mut LpcBridge| {
    l.config_write(0x60, &[5, 6, 7, 10]);
});

fn root_port() -> RootPort {
    RootPort::new("rp", 3, true, false, IrqLine::unconnected(), &Messages::default()).unwrap()
}

device::device_conformance!(root_port_conforms, root_port, &[], |p: &mut RootPort| {
    p.config_write(SECONDARY_BUS, &[1, 1]);
    p.config_write(MEMORY_BASE, &[0, 0xC0, 0, 0xC0]);
});

fn access() -> ConfigAccess {
    ConfigAccess::new(Board::new().topology)
}

device::device_conformance!(access_conforms, access, &[256 << 20, 8], |a: &mut ConfigAccess| {
    let _ = a.io_write(PORTS_REGION, 0, &[0, 0, 0, 0x80]);
});

/// The bytes of version 1. They stay as they are; a new version adds its own.
fn golden(blob: &StateBlob, expected: &str) {
    let hex: alloc::string::String = blob.data.iter().map(|b| alloc::format!("{b:02x}")).collect();
    assert_eq!((hex.as_str(), blob.version), (expected, 1), "saved state of {}", blob.kind);
}

#[test]
fn golden_bytes() {
    let mut s = sample();
    s.config_write(COMMAND, &[6, 4]);
    s.config_write(BAR0, &0xC000_0000u32.to_le_bytes());
    s.io_write(1, 0, &[0, 0x10, 0xE0, 0xFE]).unwrap();
    s.io_write(1, 8, &[1, 2, 3, 4]).unwrap();
    let interrupts = s.core.interrupts().clone();
    let first = s.core.config().get(CAPABILITIES, 1) as u16;
    let msix = s.core.config().get(first + 1, 1) as u16;
    assert_eq!(s.core.config().get(msix, 1), u64::from(CAP_MSIX));
    s.config_write(msix + 2, &[0, 0x80]);
    interrupts.fire(2);
    interrupts.set_intx(true);
    golden(&s.save().unwrap(), SAVED_FUNCTION_V1);
    let mut port = root_port();
    port.config_write(COMMAND, &[4, 0]);
    port.config_write(SECONDARY_BUS, &[1, 1]);
    golden(&port.save().unwrap(), SAVED_PORT_V1);
    let mut a = access();
    a.io_write(PORTS_REGION, 0, &[0x3C, 0xF8, 0, 0x80]).unwrap();
    golden(&a.save().unwrap(), "0100040000003cf80080");
}

const SAVED_FUNCTION_V1: &str = concat!(
    "01000c0000000400060500041300c07f0080",
    "0200010000000104002700000000",
    "10e0fe0000000001020304010000000000000000000000000100000000000000000000000003",
);
const SAVED_PORT_V1: &str = "0100090000000400041900011a0001040000000000";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 4))]
    /// Any sequence of configuration accesses, with what it lets through to BARs: nothing panics, and no
    /// region ends up outside of the windows.
    #[test]
    fn hostile_configuration(ops in proptest::collection::vec((0usize..6, 0u16..0x120, any::<u32>(), 0usize..3), 1..300)) {
        let b = Board::new();
        b.topology.assign().unwrap();
        let targets = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 31), (1, 0)];
        for (target, offset, value, width) in ops {
            let (bus, device) = targets[target];
            let bytes = 1usize << width;
            let offset = offset & !(bytes as u16 - 1);
            b.cfg_write(bus, device, offset, &value.to_le_bytes()[..bytes]);
            b.cfg_read(bus, device, offset & !3);
        }
        for at in [0u64, 0x10_0000, 0xBFFF_F000, 0xFEC0_0000, 0xFEE0_0000, 0x1_0000_0000] {
            prop_assert_eq!(b.mem(at), None);
        }
        for port in [0u64, 0x20, 0x60, 0x3F8, 0xFFF] {
            prop_assert!(!b.io.read(port, &mut [0]));
        }
        for s in &b.samples {
            let mut s = s.lock();
            let saved = s.save().unwrap();
            s.restore(&saved).unwrap();
            prop_assert_eq!(s.save().unwrap(), saved);
        }
    }
}
