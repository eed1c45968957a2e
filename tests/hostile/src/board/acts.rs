//! What a script may do to a board.

use super::driver::{self, Spot, Step};
use crate::edits::Number;
use arbitrary::Arbitrary;
use cpu_soft::SoftHypervisor;
use machine::testing::TestMachine;
use machine_spec::layout::{self, port};

/// One act.
#[derive(Arbitrary, Clone, Debug)]
#[allow(missing_docs)]
pub enum Act {
    In { port: Port, width: Width },
    Out { port: Port, width: Width, value: Number },
    Read { place: Place, offset: u16, width: Width },
    Write { place: Place, offset: u16, width: Width, value: Number },
    Config(Config),
    Store { at: Spot, value: Number },
    Drive(Step),
    Arrive(#[arbitrary(with = crate::up_to::<80, _>)] Vec<u8>),
    Type(#[arbitrary(with = crate::up_to::<32, _>)] Vec<u8>),
    TypeAtConsole(#[arbitrary(with = crate::up_to::<32, _>)] Vec<u8>),
    Mood { busy: bool, late: bool },
    Settle,
    Pass { log: u8, more: u8 },
    Acknowledge,
    Eoi(u8),
    Code([u8; 24]),
    Button,
    Whole(Whole),
}

/// What is done to the whole machine, and takes its time.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Whole {
    /// Nothing.
    Nothing,
    /// It is saved, and goes on in a new machine.
    RestoreAnew,
    /// It is reset.
    Reset,
    /// Nobody masters the bus any more.
    WithoutBusMaster,
}

/// A port: where something is, or any.
#[derive(Arbitrary, Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Port {
    Low(u8),
    Com { which: u8, register: u8 },
    Power(u8),
    Config(u8),
    Debug(u8),
    Any(u16),
}

impl Port {
    pub fn number(self) -> u16 {
        match self {
            Self::Low(n) => n.into(),
            Self::Com { which, register } => port::COM[usize::from(which & 3)] + u16::from(register & 7),
            Self::Power(n) => port::PM_BASE + u16::from(n) % port::PM_SIZE,
            Self::Config(n) => port::PCI_CONFIG + u16::from(n & 7),
            Self::Debug(n) => 0x400 + u16::from(n),
            Self::Any(n) => n,
        }
    }
}

/// Bytes of an access.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Width(u8);

impl Width {
    /// What IN and OUT can do.
    pub fn port(self) -> usize {
        [1, 2, 4, 1][usize::from(self.0 & 3)]
    }
    /// What memory-mapped accesses can be; odd ones are what a page boundary leaves.
    pub fn memory(self) -> usize {
        match self.0 {
            n @ 0..8 => usize::from(n) + 1,
            n => 1 << (n & 3),
        }
    }
}

/// Registers in memory.
#[derive(Arbitrary, Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Place {
    IoApic,
    Hpet,
    LocalApic,
    Vga,
    Flash,
    Ecam(u8),
    Bar { device: u8, bar: bool },
    Any(u64),
}

/// The address of a register.
pub fn address(test: &TestMachine<SoftHypervisor>, place: Place, offset: u16) -> u64 {
    let offset = u64::from(offset);
    match place {
        Place::IoApic => layout::IOAPIC.start.0 + offset % 0x20,
        Place::Hpet => layout::HPET.start.0 + offset % layout::HPET.size,
        Place::LocalApic => layout::LAPIC.start.0 + offset % 0x1000,
        Place::Vga => layout::VGA_HOLE.start.0 + offset,
        Place::Flash => layout::FLASH.start.0 + offset,
        Place::Ecam(bus) => layout::ECAM.start.0 + (u64::from(bus) << 20) + offset * 16,
        Place::Bar { device, bar } => driver::bar(test, device, bar) + offset % 0x4000,
        // RAM is not for the bus: an engine never asks it.
        Place::Any(at) => at.max(machine::testing::RAM_BYTES).wrapping_add(offset),
    }
}

/// An access to configuration space.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Config {
    /// Which function: one that is there, or any.
    function: u8,
    there: bool,
    bus: u8,
    offset: u16,
    width: Width,
    write: Option<Number>,
    by_ports: bool,
}

impl Config {
    pub fn play(self, test: &TestMachine<SoftHypervisor>) {
        let functions = driver::functions();
        let function = if self.there {
            functions[usize::from(self.function) % functions.len()]
        } else {
            u64::from(self.bus & 7) << 20 | u64::from(self.function) << 12
        };
        let (at, width) = (u64::from(self.offset & 0xFFF), self.width.port());
        if self.by_ports {
            let address = 1 << 31 | (function >> 4) & 0xFF_FF00 | at & 0xFC;
            test.port_out(port::PCI_CONFIG, 4, address);
            let data = port::PCI_CONFIG + 4 + (at & 3) as u16;
            match self.write {
                Some(value) => test.port_out(data, width, value.value()),
                None => _ = test.port_in(data, width),
            }
            return;
        }
        let at = layout::ECAM.start.0 + function + at;
        match self.write {
            Some(value) => test.write(at, self.width.memory(), value.value()),
            None => _ = test.read(at, self.width.memory()),
        }
    }
}

/// A script that does something with every part.
pub fn stir() -> Vec<Act> {
    let out = |at: u16, value: u8| {
        let value = Number::Small(value);
        Act::Out { port: Port::Any(at), width: Width(0), value }
    };
    let com1 = port::COM[0];
    let mut acts: Vec<Act> = [
        (com1 + 1, 0x03),
        (com1 + 4, 0x0B),
        (port::PIT + 3, 0x34),
        (port::PIT, 0x10),
        (port::PIT, 0x20),
        (port::PIC1 + 1, 0xAA),
        (port::RTC, 0x0B),
        (port::RTC + 1, 0x42),
        (port::I8042_COMMAND, 0x20),
    ]
    .into_iter()
    .map(|(at, value)| out(at, value))
    .collect();
    let write =
        |place, offset, value| Act::Write { place, offset, width: Width(3), value: Number::Small(value) };
    acts.extend([
        write(Place::IoApic, 0, 0x18),
        write(Place::IoApic, 0x10, 0x41),
        write(Place::Hpet, 0x10, 1),
        Act::Type(b"typed".to_vec()),
    ]);
    for device in 0..4 {
        acts.push(Act::Drive(Step::Begin {
            device,
            features: 0xFF,
            size_log: 4,
            rings: driver::Rings::Apart,
        }));
        let pieces =
            vec![(Spot::Data(0), 16, false), (Spot::Data(0x200), 512, true), (Spot::Data(0x500), 1, true)];
        acts.push(Act::Drive(Step::Chain { device, queue: 0, pieces, indirect: device & 1 == 0 }));
        acts.push(Act::Drive(Step::Kick { device, queue: 0 }));
    }
    acts.extend([Act::Pass { log: 20, more: 3 }, Act::Code([0xF4; 24])]);
    acts
}
