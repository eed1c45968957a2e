//! A driver of the board's virtio devices that does it nearly right, or right ([`disk_works`]).

use crate::edits::Number;
use arbitrary::Arbitrary;
use cpu_soft::SoftHypervisor;
use machine::testing::{RAM_BYTES, TestMachine};
use machine_spec::layout::ECAM;
use machine_spec::{DeviceSpec, PciSlot};

type Test = TestMachine<SoftHypervisor>;

/// Devices 1 to 4 of bus 0 are virtio: disk, network, console, entropy.
const DEVICES: u8 = 4;
const QUEUES: u8 = 6;
/// Where rings stand: 64 KiB for each device, 8 KiB for each queue.
const RINGS: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
const NOTIFY: u64 = 0x3000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Offsets of the common configuration.
mod common {
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0C;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_ENABLE: u64 = 0x1C;
    pub const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// An address in RAM, or just outside.
#[derive(Arbitrary, Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Spot {
    Data(u16),
    Ring { device: u8, offset: u16 },
    Low(u16),
    End(i8),
    Any(u64),
}

impl Spot {
    /// The address.
    pub fn address(self) -> u64 {
        match self {
            Self::Data(n) => DATA + u64::from(n),
            Self::Ring { device, offset } => RINGS + (u64::from(device % DEVICES) << 16) + u64::from(offset),
            Self::Low(n) => n.into(),
            Self::End(n) => RAM_BYTES.wrapping_add_signed(n.into()),
            Self::Any(n) => n,
        }
    }
}

/// How a driver lays its rings out.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rings {
    /// As it should.
    Apart,
    /// The used ring on the available one.
    Same,
    /// All three on each other.
    Heap,
    /// Reaching to the end of RAM, or beyond it.
    End(u8),
    /// Anywhere.
    At(u64, u64, u64),
}

/// A step of a driver.
#[derive(Arbitrary, Clone, Debug)]
pub enum Step {
    /// Resets a device, negotiates, sets all queues up, and is ready.
    Begin { device: u8, features: u64, size_log: u8, rings: Rings },
    /// Writes a descriptor.
    Describe { device: u8, queue: u8, index: u8, address: Spot, len: Number, flags: u8, next: u8 },
    /// Makes a chain and publishes it.
    Chain {
        device: u8,
        queue: u8,
        #[arbitrary(with = crate::up_to::<16, _>)]
        pieces: Vec<(Spot, u16, bool)>,
        indirect: bool,
    },
    /// A request to the disk.
    Disk { kind: u8, sector: Number, len: u16, flags: u8 },
    /// A packet to the network, with a header.
    Send {
        header: [u8; 12],
        #[arbitrary(with = crate::up_to::<200, _>)]
        frame: Vec<u8>,
    },
    /// Publishes a head, or jumps.
    Publish { device: u8, queue: u8, head: u8, by: u8 },
    /// Notifies.
    Kick { device: u8, queue: u8 },
}

/// Offsets in ECAM of the functions that are there.
pub fn functions() -> [u64; 10] {
    [0u64, 1, 2, 3, 4, 24, 25, 26, 27, 31].map(|device| device << 15)
}

/// Where a BAR of virtio device `device` stands now; 0 if it decodes nowhere.
pub fn bar(test: &Test, device: u8, second: bool) -> u64 {
    let function = ECAM.start.0 + (u64::from(1 + device % DEVICES) << 15);
    test.read(function + 0x10 + 4 * u64::from(second), 4) & !0xF
}

/// Writes RAM, if it is there.
pub fn put<T: guest_memory::Word>(test: &Test, at: u64, value: T) {
    let ram = test.machine.ram();
    if let Some(offset) = ram.offset(at, T::BYTES.into()) {
        ram.store(offset, value);
        ram.note_write(offset, T::BYTES.into());
    }
}

/// Notifies every queue of every device.
pub fn kick_everything(test: &Test) {
    for device in 0..DEVICES {
        let bar = bar(test, device, false);
        for queue in 0..u64::from(QUEUES) {
            write(test, bar, NOTIFY + 4 * queue, 2, queue);
        }
    }
}

/// A register behind a BAR; nothing if that stands nowhere (what is there may be RAM).
fn write(test: &Test, bar: u64, offset: u64, width: usize, value: u64) {
    if bar >= RAM_BYTES {
        test.write(bar + offset, width, value);
    }
}

/// Rings of a queue: descriptors, available, used.
fn rings(device: u8, queue: u8, size: u16, how: Rings) -> [u64; 3] {
    let n = u64::from(size);
    let at = RINGS + (u64::from(device % DEVICES) << 16) + (u64::from(queue % QUEUES) << 13);
    let available = at + 16 * n;
    let used = (available + 6 + 2 * n).next_multiple_of(4);
    match how {
        Rings::Apart => [at, available, used],
        Rings::Same => [at, available & !3, available & !3],
        Rings::Heap => [at, at, at],
        Rings::End(below) => [at, available, (RAM_BYTES - 6 - 8 * n + u64::from(below)) & !3],
        Rings::At(descriptors, available, used) => [descriptors & !0xF, available & !1, used & !3],
    }
}

/// Rings as the device has them: size, then the three addresses.
fn rings_of(test: &Test, device: u8, queue: u8) -> (u16, [u64; 3]) {
    let bar = bar(test, device, false);
    if bar < RAM_BYTES {
        return (0, [0; 3]);
    }
    write(test, bar, common::QUEUE_SELECT, 2, (queue % QUEUES).into());
    let address = |register| test.read(bar + register, 8);
    let size = test.read(bar + common::QUEUE_SIZE, 2) as u16;
    (size, [common::QUEUE_DESCRIPTORS, common::QUEUE_DRIVER, common::QUEUE_DEVICE].map(address))
}

fn begin(test: &Test, device: u8, features: u64, size_log: u8, how: Rings) {
    let function = ECAM.start.0 + (u64::from(1 + device % DEVICES) << 15);
    test.write(function + 4, 2, 6);
    let bar = bar(test, device, false);
    let set = |register, width, value| write(test, bar, register, width, value);
    for status in [0, 1, 3] {
        set(common::STATUS, 1, status);
    }
    for half in 0..2 {
        set(common::DRIVER_FEATURE_SELECT, 4, half);
        // What it does not offer would be refused, and nothing reached.
        set(0, 4, half);
        let offered = if bar >= RAM_BYTES { test.read(bar + 4, 4) } else { 0 };
        set(common::DRIVER_FEATURE, 4, offered & (features | 1 << 32) >> (32 * half));
    }
    set(common::STATUS, 1, 0xB);
    for queue in 0..QUEUES {
        let size = 1u16 << (size_log % 9);
        set(common::QUEUE_SELECT, 2, queue.into());
        set(common::QUEUE_SIZE, 2, size.into());
        let [descriptors, available, used] = rings(device, queue, size, how);
        if how == Rings::Apart {
            let ram = test.machine.ram();
            ram.fill_bytes(available, 0, 0x2000 - (available & 0x1FFF));
        }
        set(common::QUEUE_DESCRIPTORS, 8, descriptors);
        set(common::QUEUE_DRIVER, 8, available);
        set(common::QUEUE_DEVICE, 8, used);
        set(common::QUEUE_ENABLE, 2, 1);
    }
    set(common::STATUS, 1, 0xF);
}

fn describe(test: &Test, table: u64, index: u64, address: u64, len: u32, flags: u16, next: u16) {
    let at = table.wrapping_add(16 * index);
    put(test, at, address);
    put(test, at.wrapping_add(8), len);
    put(test, at.wrapping_add(12), flags);
    put(test, at.wrapping_add(14), next);
}

/// Publishes `head`, and moves the index on `by`.
fn publish(test: &Test, size: u16, available: u64, head: u16, by: u16) {
    let ram = test.machine.ram();
    let Some(offset) = ram.offset(available.wrapping_add(2), 2) else { return };
    let index: u16 = ram.load(offset);
    let slot = u64::from(index & size.max(1).wrapping_sub(1));
    put(test, available.wrapping_add(4 + 2 * slot), head);
    put(test, available.wrapping_add(2), index.wrapping_add(by));
}

/// A chain of `pieces`: address, length, whether the device writes it.
fn chain(test: &Test, device: u8, queue: u8, pieces: &[(u64, u32, bool)], indirect: bool) {
    let (size, [descriptors, available, _]) = rings_of(test, device, queue);
    if size == 0 || pieces.is_empty() {
        return;
    }
    let table = if indirect { DATA + 0xF000 } else { descriptors };
    let last = pieces.len() - 1;
    for (i, (address, len, written)) in pieces.iter().enumerate() {
        let flags = if i == last { 0 } else { NEXT } | if *written { WRITE } else { 0 };
        describe(test, table, i as u64, *address, *len, flags, i as u16 + 1);
    }
    if indirect {
        describe(test, descriptors, 0, table, 16 * pieces.len() as u32, INDIRECT, 0);
    }
    publish(test, size, available, 0, 1);
}

impl Step {
    /// Does it.
    pub fn play(&self, test: &Test) {
        match self {
            Self::Begin { device, features, size_log, rings } => {
                begin(test, *device, *features, *size_log, *rings)
            }
            Self::Describe { device, queue, index, address, len, flags, next } => {
                let (_, [table, ..]) = rings_of(test, *device, *queue);
                let (flags, next) = (u16::from(flags & 7), u16::from(*next));
                describe(test, table, (*index).into(), address.address(), len.value() as u32, flags, next);
            }
            Self::Chain { device, queue, pieces, indirect } => {
                let piece =
                    |(at, len, written): &(Spot, u16, bool)| (at.address(), u32::from(*len), *written);
                let pieces: Vec<_> = pieces.iter().map(piece).collect();
                chain(test, *device, *queue, &pieces, *indirect);
            }
            Self::Disk { kind, sector, len, flags } => {
                put(test, DATA, u64::from(kind % 16));
                put(test, DATA + 8, sector.value());
                // For discard and write-zeroes: a range.
                put(test, DATA + 16, sector.value());
                put(test, DATA + 24, u64::from(*len) | u64::from(*flags) << 32);
                let data = (DATA + 16, u32::from(*len), !matches!(kind % 16, 1 | 11 | 13));
                chain(test, 0, 0, &[(DATA, 16, false), data, (DATA + 0x1_1000, 1, true)], flags & 0x80 != 0);
                kick(test, 0, 0);
            }
            Self::Send { header, frame } => {
                test.machine.ram().store_bytes(DATA, header);
                test.machine.ram().store_bytes(DATA + 12, frame);
                chain(test, 1, 1, &[(DATA, 12 + frame.len() as u32, false)], false);
                kick(test, 1, 1);
            }
            Self::Publish { device, queue, head, by } => {
                let (size, [_, available, _]) = rings_of(test, *device, *queue);
                publish(test, size, available, (*head).into(), (*by).into());
            }
            Self::Kick { device, queue } => kick(test, *device, *queue),
        }
    }
}

fn kick(test: &Test, device: u8, queue: u8) {
    let queue = u64::from(queue % QUEUES);
    write(test, bar(test, device, false), NOTIFY + 4 * queue, 2, queue);
    test.host.settle();
}

/// Whether the disk is in the slot of the test's own machine; the spec of a saved one may name another.
pub fn disk_is_in_its_place(test: &Test) -> bool {
    test.machine.spec().devices.iter().any(|device| {
        matches!(device, DeviceSpec::Blk(disk) if disk.slot == Some(PciSlot { bus: 0, device: 1, function: 0 }))
    })
}

/// A sector is read from the disk, on a machine that was just reset.
pub fn disk_works(test: &Test) {
    begin(test, 0, 0, 3, Rings::Apart);
    test.machine.ram().store_bytes(DATA, &[0; 16]);
    put(test, DATA + 0x400, 0xFFu8);
    chain(test, 0, 0, &[(DATA, 16, false), (DATA + 0x100, 512, true), (DATA + 0x400, 1, true)], false);
    kick(test, 0, 0);
    let status: u8 = test.machine.ram().load(DATA + 0x400);
    assert_eq!(status, 0, "the disk after a reset");
}
