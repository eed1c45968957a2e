//! A running machine gets another engine: what devices and controllers had told the first, the second knows.

use hypervisor::{Capabilities, EngineError, Hypervisor, Partition, PartitionLayout};
use machine::MoveError;
use machine::testing::TestMachine;
use machine::testing::engine::ScriptEngine;
use machine_spec::layout::{self, port};

/// The same under another name.
#[derive(Clone, Default)]
struct Other(ScriptEngine);

impl Hypervisor for Other {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "other", ..self.0.capabilities() }
    }
    fn create_partition(&self, layout: &PartitionLayout) -> Result<Box<dyn Partition>, EngineError> {
        self.0.create_partition(layout)
    }
}

/// One that has room for nobody.
struct Full;

impl Hypervisor for Full {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "full", ..ScriptEngine::default().capabilities() }
    }
    fn create_partition(&self, _: &PartitionLayout) -> Result<Box<dyn Partition>, EngineError> {
        Err(EngineError::Exhausted("room"))
    }
}

/// COM1's interrupt as vector 0x31 on pin 4 of the I/O APIC.
fn with_serial_interrupt() -> TestMachine {
    let test = TestMachine::started();
    let (com1, ioapic) = (port::COM[0], layout::IOAPIC.start.0);
    test.write(ioapic, 4, 0x10 + 2 * 4);
    test.write(ioapic + 0x10, 4, 0x31);
    test.port_out(com1 + 4, 1, 0x08);
    test.port_out(com1 + 1, 1, 0x01);
    test
}

#[test]
fn interrupts_reach_the_new_engine_only() {
    let test = with_serial_interrupt();
    let other = Other::default();
    test.machine.move_to(&other, &test.host).unwrap();
    assert_eq!(test.machine.engine_name(), "other");
    assert_eq!(test.host.type_text(b"x"), 1);
    assert!(test.engine.take_messages().is_empty());
    let messages = other.0.take_messages();
    assert_eq!(messages.iter().map(|m| m.data & 0xFF).collect::<Vec<_>>(), [0x31]);
    // And back.
    test.machine.move_to(&test.engine, &test.host).unwrap();
    assert_eq!(test.port_in(port::COM[0], 1), u64::from(b'x'));
    assert_eq!(test.host.type_text(b"y"), 1);
    assert_eq!((test.engine.take_messages().len(), other.0.take_messages().len()), (1, 0));
}

#[test]
fn the_line_of_the_8259_is_told_again() {
    let test = TestMachine::started();
    // Initialised, all but interrupt 4 masked; COM1 asks.
    for (at, value) in [(0, 0x11), (1, 0x20), (1, 4), (1, 1), (1, 0xEF)] {
        test.port_out(port::PIC1 + at, 1, value);
    }
    test.port_out(port::COM[0] + 4, 1, 0x08);
    test.port_out(port::COM[0] + 1, 1, 0x01);
    test.host.type_text(b"x");
    assert!(test.engine.pic_level());
    let other = Other::default();
    test.machine.move_to(&other, &test.host).unwrap();
    assert!(other.0.pic_level());
}

#[test]
fn a_move_that_fails_changes_nothing() {
    let test = with_serial_interrupt();
    assert!(matches!(test.machine.move_to(&Full, &test.host), Err(MoveError::Engine(_))));
    let again = test.machine.move_to(&test.engine, &test.host);
    assert!(matches!(again, Err(MoveError::SameEngine("script"))), "{again:?}");
    test.host.type_text(b"x");
    assert_eq!(test.engine.take_messages().len(), 1);
}

/// Virtio's notification registers, one for each queue.
#[test]
fn doorbells_follow_their_bars_and_the_engine() {
    const NOTIFY: u64 = 0x3000;
    let test = TestMachine::started();
    let disk = layout::ECAM.start.0 + (1 << 15);
    let bar = test.read(disk + 0x10, 4) & !0xF;
    let first = test.engine.bells();
    assert!(first.contains_key(&(bar + NOTIFY)), "{first:x?}");
    // Disk 1, network 2, console 2, random numbers 1.
    assert_eq!(first.len(), 6, "{first:x?}");
    // Elsewhere, and nowhere.
    test.write(disk + 0x10, 4, bar + 0x80_0000);
    let moved = test.engine.bells();
    assert_eq!(moved.get(&(bar + 0x80_0000 + NOTIFY)), first.get(&(bar + NOTIFY)));
    assert_eq!(moved.len(), 6);
    let command = test.read(disk + 4, 2);
    test.write(disk + 4, 2, command & !2);
    assert_eq!(test.engine.bells().len(), 5);
    test.write(disk + 4, 2, command);
    let other = Other::default();
    test.machine.move_to(&other, &test.host).unwrap();
    assert_eq!(other.0.bells(), moved);
    // From now on the new engine alone is told.
    test.write(disk + 0x10, 4, bar);
    assert_eq!((test.engine.bells(), other.0.bells()), (moved, first));
}

/// What rings is answered as the write itself would be: the device looks at its queue.
#[test]
fn a_bell_is_answered_like_the_write() {
    let test = TestMachine::started();
    let random = virtio::Driver::start(&test, 4);
    for round in 1..3 {
        random.offer_buffer(&test);
        test.host.ring(test.engine.bells()[&random.notify]);
        test.host.settle();
        assert_eq!(random.used(&test), round);
    }
}

/// A driver of one queue, just enough.
mod virtio {
    use super::*;

    const RING: u64 = 0x20_0000;
    const AVAILABLE: u64 = RING + 0x1000;
    const USED: u64 = RING + 0x2000;

    pub struct Driver {
        pub notify: u64,
    }

    impl Driver {
        /// Queue 0 of the device in slot `device`, with 8 places.
        pub fn start(test: &TestMachine, device: u64) -> Self {
            let config = layout::ECAM.start.0 + (device << 15);
            let bar = test.read(config + 0x10, 4) & !0xF;
            test.write(config + 4, 2, 6);
            test.write(bar + 0x14, 1, 3);
            test.write(bar + 0x8, 4, 1);
            test.write(bar + 0xC, 4, 1);
            test.write(bar + 0x14, 1, 0xB);
            test.write(bar + 0x18, 2, 8);
            for (at, address) in [(0x20, RING), (0x28, AVAILABLE), (0x30, USED)] {
                test.write(bar + at, 4, address);
            }
            test.write(bar + 0x1C, 2, 1);
            test.write(bar + 0x14, 1, 0xF);
            // One descriptor: 16 bytes that the device writes.
            test.machine.ram().store::<u64>(RING, 0x30_0000);
            test.machine.ram().store::<u64>(RING + 8, 2 << 32 | 16);
            Self { notify: bar + 0x3000 }
        }
        pub fn offer_buffer(&self, test: &TestMachine) {
            let ram = test.machine.ram();
            ram.store::<u16>(AVAILABLE + 2, ram.load::<u16>(AVAILABLE + 2) + 1);
        }
        pub fn used(&self, test: &TestMachine) -> u16 {
            test.machine.ram().load(USED + 2)
        }
    }
}
