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
