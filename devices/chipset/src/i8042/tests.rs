//! The keyboard controller: Linux's probe, reset, saved state.

use super::*;
use crate::testing::{Access, LineLog, RequestLog, golden};

fn controller() -> (I8042, LineLog, Arc<RequestLog>) {
    let (log, requests) = (LineLog::default(), Arc::new(RequestLog::default()));
    (I8042::new("i8042", log.line(1), requests.clone()), log, requests)
}

impl I8042 {
    fn command(&mut self, value: u8) -> u8 {
        self.outb(COMMAND_REGION, 0, value);
        self.inb(DATA_REGION, 0)
    }
    fn command_with(&mut self, value: u8, data: u8) -> u8 {
        self.outb(COMMAND_REGION, 0, value);
        self.outb(DATA_REGION, 0, data);
        self.inb(DATA_REGION, 0)
    }
}

/// What Linux's driver asks, in its order.
#[test]
fn linux_probes() {
    let (mut c, log, _) = controller();
    assert_eq!(c.inb(COMMAND_REGION, 0) & 1, 0, "nothing to flush");
    assert_eq!(c.command(0xAA), 0x55);
    assert_eq!(c.command(0x20), 0x34);
    c.command_with(0x60, 0x74);
    assert_eq!((c.command(0x20), c.inb(COMMAND_REGION, 0)), (0x74, 0x1C));
    c.outb(COMMAND_REGION, 0, 0xD3);
    c.outb(DATA_REGION, 0, 0x5A);
    assert_eq!(c.inb(COMMAND_REGION, 0) & 0x21, 1, "not from an auxiliary port");
    assert_eq!(c.inb(DATA_REGION, 0), 0x5A);
    assert_ne!(c.command(0xA9), 0, "the auxiliary port fails its test");
    assert_eq!(c.command(0xAB), 0, "the keyboard's does not");
    c.command_with(0x60, 0x45);
    assert_eq!(log.take_edges(1), 0);
    c.outb(DATA_REGION, 0, 0xF2);
    assert_eq!(c.inb(COMMAND_REGION, 0) & 0x41, 0x41, "time-out at once");
    assert_eq!((c.inb(DATA_REGION, 0), log.take_edges(1)), (0xFE, 1));
    assert_eq!(c.inb(COMMAND_REGION, 0) & 0x41, 0);
}

#[test]
fn reset_and_a20() {
    let (mut c, _, requests) = controller();
    assert_eq!(c.command(0xD0), 3);
    c.command_with(0xD1, 1);
    assert_eq!((c.command(0xD0), requests.0.lock().1), (1, 0));
    c.command(0xFF);
    assert_eq!(requests.0.lock().1, 0);
    c.command(0xFE);
    c.command_with(0xD1, 0x02);
    assert_eq!(requests.0.lock().1, 2);
}

fn stir(c: &mut I8042) {
    c.command_with(0x61, 0x99);
    c.command_with(0x60, 0x01);
    c.outb(DATA_REGION, 0, 0xED);
    c.outb(COMMAND_REGION, 0, 0xD1);
}

#[test]
fn golden_bytes_of_version_1() {
    let (mut c, ..) = controller();
    stir(&mut c);
    golden(
        &c.save().unwrap(),
        "010020000000019900000000000000000000000000000000000000000000000000000000000002000100000003030001
         000000ff0400010000000105000100000001060001000000d1",
    );
}

#[test]
fn restored_without_an_edge() {
    let (mut c, ..) = controller();
    stir(&mut c);
    let (mut copy, log, _) = controller();
    copy.restore(&c.save().unwrap()).unwrap();
    assert_eq!((log.take_edges(1), copy.irq.level(), copy.inb(DATA_REGION, 0)), (0, true, 0xFE));
}

device::device_conformance!(conformance, || controller().0, &[1, 1], stir);

proptest::proptest! {
    #[test]
    fn random_traffic_never_panics(steps in proptest::collection::vec(proptest::prelude::any::<(bool, u8)>(), 0..200)) {
        let (mut c, log, _) = controller();
        for (command, value) in steps {
            c.outb(usize::from(command), 0, value);
            proptest::prop_assert_eq!(log.level(1), c.registers.interrupts());
            if value & 1 == 0 { c.inb(DATA_REGION, 0); }
        }
    }
}
