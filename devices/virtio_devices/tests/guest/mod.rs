//! A board without processors, and a tiny driver that does what a guest's would: it finds the device in
//! configuration space, sets up rings in RAM, and does everything else through BARs.
#![allow(dead_code, reason = "each test file uses its part")]

use device::{Bus, Device, LineSink, Waker};
use guest_memory::{DmaSpace, GuestRam};
use hypervisor::{EngineError, Msi, MsiRoute, MsiSink};
use pci::{ConfigAccess, Devfn, ECAM_REGION, Parent, PirqLines, Topology, Windows, pirq_of};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use sync::Mutex;
use virtio::{VirtioDevice, VirtioPci, VirtioPciConfig};

pub const RAM_BYTES: u64 = 4 << 20;
const ECAM: u64 = 0xE000_0000;

/// Records messages.
#[derive(Clone, Default)]
pub struct Messages(Arc<Mutex<Vec<Msi>>>);

impl Messages {
    /// Data of the messages since the last call.
    pub fn take(&self) -> Vec<u32> {
        std::mem::take(&mut *self.0.lock()).iter().map(|m| m.data).collect()
    }
}

struct Route(Messages, Mutex<(Msi, bool)>);

impl MsiRoute for Route {
    fn set(&self, msi: Msi) {
        self.1.lock().0 = msi;
    }
    fn fire(&self) {
        let (msi, masked) = *self.1.lock();
        assert!(!masked, "fired while masked");
        self.0.0.lock().push(msi);
    }
    fn mask(&self, masked: bool) {
        self.1.lock().1 = masked;
    }
}

impl MsiSink for Messages {
    fn route(&self) -> Result<Box<dyn MsiRoute>, EngineError> {
        Ok(Box::new(Route(self.clone(), Mutex::new((Msi::default(), true)))))
    }
}

/// Levels of the I/O APIC's pins.
#[derive(Default)]
pub struct Pins(Mutex<std::collections::BTreeMap<u32, bool>>);

impl LineSink for Pins {
    fn set_level(&self, line: u32, level: bool) {
        self.0.lock().insert(line, level);
    }
    fn restore_level(&self, line: u32, level: bool) {
        self.0.lock().insert(line, level);
    }
}

/// See the module's header.
pub struct Board {
    pub ram: GuestRam,
    pub messages: Messages,
    pub pins: Arc<Pins>,
    memory: Arc<Bus>,
    topology: Arc<Topology>,
    pirqs: PirqLines,
    devices: Vec<(Arc<Mutex<VirtioPci>>, Arc<AtomicBool>)>,
}

/// A virtio function that hangs on no board, for conformance tests.
pub fn loose(device: impl VirtioDevice + 'static) -> VirtioPci {
    let config = VirtioPciConfig {
        name: "loose".into(),
        dma: DmaSpace::new(GuestRam::for_test(RAM_BYTES)),
        line: device::IrqLine::unconnected(),
        waker: Waker::new(|| {}),
        on_root_bus: true,
    };
    VirtioPci::new(Box::new(device), config, &Messages::default()).unwrap()
}

impl Board {
    pub fn new() -> Self {
        Self::with_ram(GuestRam::for_test(RAM_BYTES))
    }

    /// A board around RAM that lives on: the target of a restore.
    pub fn with_ram(ram: GuestRam) -> Self {
        let (memory, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = Windows { io: vec![], memory32: vec![(0xC000_0000, 0xDFFF_FFFF)], memory64: vec![] };
        let topology = Topology::new(windows, &memory, &io);
        let access = Arc::new(Mutex::new(ConfigAccess::new(topology.clone())));
        memory.insert(ECAM, 256 << 20, access, ECAM_REGION).unwrap();
        let pins = Arc::new(Pins::default());
        let line = |i: usize| device::IrqLine::new(pins.clone(), 16 + i as u32);
        let pirqs = PirqLines::new(std::array::from_fn(line), vec![]);
        Self { ram, messages: Messages::default(), pins, memory, topology, pirqs, devices: Vec::new() }
    }

    /// Plugs a device into slot `1 + n` and assigns its BARs.
    pub fn plug(&mut self, device: impl VirtioDevice + 'static) -> Arc<Mutex<VirtioPci>> {
        let slot = 1 + self.devices.len() as u8;
        let woken = Arc::new(AtomicBool::new(false));
        let flag = woken.clone();
        let config = VirtioPciConfig {
            name: format!("virtio{slot}"),
            dma: DmaSpace::new(self.ram.clone()),
            line: self.pirqs.line(pirq_of(slot, 1)),
            waker: Waker::new(move || flag.store(true, Ordering::SeqCst)),
            on_root_bus: true,
        };
        let function = VirtioPci::new(Box::new(device), config, &self.messages).unwrap();
        let function = Arc::new(Mutex::new(function));
        self.topology.attach(Parent::Root, Devfn::new(slot, 0), function.clone()).unwrap();
        self.topology.assign().unwrap();
        self.devices.push((function.clone(), woken));
        function
    }

    /// Polls devices as long as one of them was woken.
    pub fn settle(&self) {
        for _ in 0..10_000 {
            let mut any = false;
            for (device, woken) in &self.devices {
                if woken.swap(false, Ordering::SeqCst) {
                    any = true;
                    device.lock().poll();
                }
            }
            if !any {
                return;
            }
        }
        panic!("a device wakes itself for ever");
    }

    /// Level of the pin of slot `slot`'s INTA.
    pub fn intx(&self, slot: u8) -> bool {
        self.pins.0.lock().get(&(16 + u32::from(pirq_of(slot, 1)))).copied().unwrap_or(false)
    }

    pub fn read(&self, at: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.memory.read(at, &mut data[..bytes]), "nothing answers at {at:#x}");
        device::read_le(&data[..bytes])
    }
    pub fn write(&self, at: u64, bytes: usize, value: u64) {
        assert!(self.memory.write(at, &value.to_le_bytes()[..bytes]), "nothing answers at {at:#x}");
    }
    /// Address of a configuration register.
    pub fn config(slot: u8, offset: u64) -> u64 {
        ECAM | u64::from(slot) << 15 | offset
    }
}

/// A capability's structure: where it stands in memory.
#[derive(Clone, Copy, Default, Debug)]
pub struct Structures {
    pub common: u64,
    pub notify: u64,
    pub multiplier: u64,
    pub isr: u64,
    pub device: u64,
    pub msix_table: u64,
    pub msix_cap: u64,
    pub window_cap: u64,
}

/// A driver of one device.
pub struct Driver<'b> {
    pub board: &'b Board,
    pub slot: u8,
    pub at: Structures,
}

pub const STATUS: u64 = 0x14;

impl<'b> Driver<'b> {
    /// Finds the device in `slot` and its structures, and turns bus mastering on.
    pub fn probe(board: &'b Board, slot: u8) -> Self {
        let cfg = |offset, bytes| board.read(Board::config(slot, offset), bytes);
        assert_eq!(cfg(0, 2), 0x1AF4);
        assert!(cfg(2, 2) > 0x1040);
        board.write(Board::config(slot, 4), 2, 6);
        let bar = |i: u64| cfg(0x10 + 4 * i, 4) & !0xF;
        let mut at = Structures::default();
        let mut cap = cfg(0x34, 1);
        while cap != 0 {
            let structure = || bar(cfg(cap + 4, 1)) + cfg(cap + 8, 4);
            match (cfg(cap, 1), cfg(cap + 3, 1)) {
                (9, 1) => at.common = structure(),
                (9, 2) => (at.notify, at.multiplier) = (structure(), cfg(cap + 16, 4)),
                (9, 3) => at.isr = structure(),
                (9, 4) => at.device = structure(),
                (9, 5) => at.window_cap = cap,
                (0x11, _) => {
                    let table = cfg(cap + 4, 4);
                    (at.msix_table, at.msix_cap) = (bar(table & 7) + (table & !7), cap);
                }
                _ => {}
            }
            cap = cfg(cap + 1, 1);
        }
        Self { board, slot, at }
    }

    pub fn status(&self) -> u8 {
        self.board.read(self.at.common + STATUS, 1) as u8
    }
    pub fn set_status(&self, status: u8) {
        self.board.write(self.at.common + STATUS, 1, status.into());
    }
    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |all, half| {
            self.board.write(self.at.common, 4, half);
            all | self.board.read(self.at.common + 4, 4) << (32 * half)
        })
    }

    /// Resets the device and negotiates `wanted` (plus version 1); returns whether it was accepted.
    pub fn negotiate(&self, wanted: u64) -> bool {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        let features = wanted | 1 << 32;
        for half in 0..2 {
            self.board.write(self.at.common + 8, 4, half);
            self.board.write(self.at.common + 12, 4, features >> (32 * half) & 0xFFFF_FFFF);
        }
        self.set_status(0xB);
        self.status() & 8 != 0
    }

    /// Gives queue `index` rings at `at` (16 KiB are enough for 256 entries), interrupting by MSI-X vector
    /// `index + 1`.
    pub fn queue(&self, index: u16, size: u16, at: u64, features: u64) -> Rings<'b> {
        let common = self.at.common;
        self.board.write(common + 0x16, 2, index.into());
        assert!(self.board.read(common + 0x18, 2) >= size.into());
        let rings = Rings::new(self.board, size, at, features);
        self.board.write(common + 0x18, 2, size.into());
        self.board.write(common + 0x1A, 2, u64::from(index) + 1);
        for (i, address) in [rings.table, rings.avail, rings.used].into_iter().enumerate() {
            self.board.write(common + 0x20 + 8 * i as u64, 4, address & 0xFFFF_FFFF);
            self.board.write(common + 0x24 + 8 * i as u64, 4, address >> 32);
        }
        let notify_offset = self.board.read(common + 0x1E, 2);
        self.board.write(common + 0x1C, 2, 1);
        assert_eq!(self.board.read(common + 0x1C, 2), 1);
        Rings { notify: self.at.notify + notify_offset * self.at.multiplier, ..rings }
    }

    pub fn ready(&self) {
        self.set_status(0xF);
    }

    /// Enables MSI-X: vector `v` sends `0x40 + v`.
    pub fn enable_msix(&self) {
        let count = self.board.read(Board::config(self.slot, self.at.msix_cap + 2), 2) & 0x7FF;
        for v in 0..=count {
            let entry = self.at.msix_table + 16 * v;
            self.board.write(entry, 4, 0xFEE0_0000);
            self.board.write(entry + 8, 4, 0x40 + v);
            self.board.write(entry + 12, 4, 0);
        }
        self.board.write(Board::config(self.slot, self.at.msix_cap + 2), 2, 0x8000);
        self.board.write(self.at.common + 0x10, 2, 0);
    }
}

/// A piece of a request: address, length, whether the device writes it.
pub type Piece = (u64, u32, bool);

/// The driver's side of a queue.
pub struct Rings<'b> {
    board: &'b Board,
    pub size: u16,
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    pub notify: u64,
    indirect_at: u64,
    event_idx: bool,
    pub next: u16,
    pub seen: u16,
    free: u16,
}

impl<'b> Rings<'b> {
    pub fn new(board: &'b Board, size: u16, at: u64, features: u64) -> Self {
        let n = u64::from(size);
        let avail = at + 16 * n;
        let used = (avail + 6 + 2 * n).next_multiple_of(4);
        board.ram.fill_bytes(at, 0, used + 6 + 8 * n - at);
        let event_idx = features & virtio::feature::RING_EVENT_IDX != 0;
        let indirect_at = at + 0x3000;
        Self {
            board,
            size,
            table: at,
            avail,
            used,
            notify: 0,
            indirect_at,
            event_idx,
            next: 0,
            seen: 0,
            free: 0,
        }
    }

    pub fn descriptor(&self, table: u64, i: u16, piece: Piece, flags: u16, next: u16) {
        let (address, len, write) = piece;
        let flags = flags | if write { 2 } else { 0 };
        let at = table + 16 * u64::from(i);
        self.board.ram.store(at, address);
        self.board.ram.store(at + 8, len);
        self.board.ram.store(at + 12, u32::from(flags) | u32::from(next) << 16);
    }

    /// Makes a chain of `pieces` available; returns its head. Descriptors are used round robin.
    pub fn add(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.free % self.size;
        for (i, piece) in pieces.iter().enumerate() {
            let (this, next) = (self.free % self.size, (self.free + 1) % self.size);
            let last = i + 1 == pieces.len();
            self.descriptor(self.table, this, *piece, u16::from(!last), next);
            self.free = self.free.wrapping_add(1);
        }
        self.publish(head);
        head
    }

    /// As `add`, with all pieces in an indirect table.
    pub fn add_indirect(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.free % self.size;
        let table = self.indirect_at;
        for (i, piece) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            self.descriptor(table, i as u16, *piece, u16::from(!last), i as u16 + 1);
        }
        self.descriptor(self.table, head, (table, 16 * pieces.len() as u32, false), 4, 0);
        self.free = self.free.wrapping_add(1);
        self.publish(head);
        head
    }

    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next % self.size);
        self.board.ram.store(self.avail + 4 + 2 * slot, head);
        self.next = self.next.wrapping_add(1);
        self.board.ram.store(self.avail + 2, self.next);
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.board.write(self.notify, 2, 0);
    }

    /// What was used since the last call.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let index: u16 = self.board.ram.load(self.used + 2);
        let mut out = Vec::new();
        while self.seen != index {
            let at = self.used + 4 + 8 * u64::from(self.seen % self.size);
            out.push((self.board.ram.load(at), self.board.ram.load(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        if self.event_idx {
            // Interrupt us with the next one.
            self.board.ram.store(self.avail + 4 + 2 * u64::from(self.size), self.seen);
        }
        out
    }

    /// Whether the device wants to be notified (as the driver has to decide it).
    pub fn wants_kick(&self, old: u16) -> bool {
        if self.event_idx {
            let event: u16 = self.board.ram.load(self.used + 4 + 8 * u64::from(self.size));
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old)
        } else {
            self.board.ram.load::<u16>(self.used) & 1 == 0
        }
    }
}
