//! The I/O APIC: edges, levels and their EOI, routes, saved state.

use super::*;
use crate::testing::{Access, MessageLog, golden};
use alloc::vec::Vec;
use proptest::prelude::*;
use sync::Mutex;

#[derive(Default)]
struct Output {
    sent: MessageLog,
    routes: Mutex<Vec<(u32, Option<MsiMessage>, bool)>>,
}

impl IoapicOutput for Output {
    fn send(&self, message: MsiMessage) {
        self.sent.0.lock().push(message);
    }
    fn route_changed(&self, pin: u32, message: Option<MsiMessage>, level: bool) {
        self.routes.lock().push((pin, message, level));
    }
}

fn ioapic() -> (Ioapic, Arc<Output>) {
    let output = Arc::new(Output::default());
    (Ioapic::new("ioapic", output.clone()), output)
}

impl Ioapic {
    fn rd(&mut self, index: u8) -> u32 {
        self.put(0, SELECT, 4, index.into()).unwrap();
        self.get(0, WINDOW, 4) as u32
    }
    fn wr(&mut self, index: u8, value: u32) {
        self.put(0, SELECT, 4, index.into()).unwrap();
        self.put(0, WINDOW, 4, value.into()).unwrap();
    }
    /// Entry `pin`, both halves.
    fn set(&mut self, pin: u8, high: u32, low: u32) {
        self.wr(0x11 + pin * 2, high);
        self.wr(0x10 + pin * 2, low);
    }
}

#[test]
fn registers() {
    let (mut io, out) = ioapic();
    assert_eq!((io.rd(0), io.rd(1), io.rd(0x10), io.rd(0x3F), io.rd(0x40)), (0, 0x0017_0020, 0x1_0000, 0, 0));
    io.wr(0, 0xFF00_0000);
    assert_eq!((io.rd(0), io.rd(2)), (0x0F00_0000, 0x0F00_0000));
    io.set(2, 0x03FE_0000, 0x0000_F931);
    assert_eq!((io.rd(0x15), io.rd(0x14)), (0x03FE_0000, 0xA931));
    let route = MsiMessage { address: 0xFEE0_3FE4, data: 0xC131 };
    assert_eq!(out.routes.lock().last(), Some(&(2, Some(route), true)));
    assert_eq!(io.put(0, WINDOW, 1, 0), Err(IoError::Width));
}

#[test]
fn edges() {
    let (mut io, out) = ioapic();
    io.set_level(4, true);
    io.set(4, 0, 0x31);
    assert!(out.sent.take().is_empty(), "an edge while masked is lost");
    io.set_level(4, true);
    io.set_level(4, false);
    assert!(out.sent.take().is_empty());
    io.set_level(4, true);
    io.set_level(4, true);
    assert_eq!(out.sent.take(), [MsiMessage { address: 0xFEE0_0000, data: 0x31 }]);
    io.end_of_interrupt(0x31);
    io.restore_level(4, false);
    io.restore_level(4, true);
    io.set_level(99, true);
    assert!(out.sent.take().is_empty());
}

#[test]
fn levels_wait_for_the_eoi() {
    let (mut io, out) = ioapic();
    io.set(16, 0, 0x8042);
    io.set_level(16, true);
    io.set_level(16, true);
    assert_eq!(out.sent.take().len(), 1);
    assert_eq!(io.rd(0x30) >> 14 & 1, 1);
    io.end_of_interrupt(0x41);
    assert!(out.sent.take().is_empty());
    io.put(0, EOI, 4, 0x42).unwrap();
    assert_eq!(out.sent.take().len(), 1, "still asserted");
    io.set_level(16, false);
    io.end_of_interrupt(0x42);
    assert_eq!((out.sent.take().len(), io.rd(0x30)), (0, 0x8042));
    io.set(16, 0, 0x1_8042);
    io.set_level(16, true);
    assert!(out.sent.take().is_empty());
    io.set(16, 0, 0x8042);
    assert_eq!(out.sent.take().len(), 1, "unmasked while asserted");
    io.set(16, 0, 0x1_0042);
    io.set(16, 0, 0x8042);
    assert_eq!(out.sent.take().len(), 1, "edge and back cleared remote IRR");
}

fn stir(io: &mut Ioapic) {
    io.wr(0, 0x0200_0000);
    io.set(16, 0x0300_0000, 0x8042);
    io.set(4, 0, 0x31);
    io.set_level(16, true);
}

#[test]
fn golden_bytes_of_version_1() {
    let (mut io, _) = ioapic();
    stir(&mut io);
    golden(
        &io.save().unwrap(),
        "01000100000002020001000000180300030000000000010400c000000000000100000000000000010000000000000001
         000000000000000100000000003100000000000000000001000000000000000100000000000000010000000000000001
         000000000000000100000000000000010000000000000001000000000000000100000000000000010000000000000001
         0000000000000001000000000042c0000000000003000001000000000000000100000000000000010000000000000001
         0000000000000001000000000000000100000000000000010000000000",
    );
}

#[test]
fn restore_sends_nothing_and_tells_routes() {
    let (mut io, _) = ioapic();
    stir(&mut io);
    let (mut copy, out) = ioapic();
    copy.restore(&io.save().unwrap()).unwrap();
    copy.restore_level(16, true);
    assert!(out.sent.take().is_empty());
    assert_eq!(out.routes.lock().iter().filter(|r| r.1.is_some()).count(), 2);
    copy.end_of_interrupt(0x42);
    assert_eq!(out.sent.take().len(), 1);
}

// Lines are not the chip's to lower, so the stir lets them go again.
device::device_conformance!(conformance, || ioapic().0, &[0x1000], |io: &mut Ioapic| {
    stir(io);
    io.set_level(16, false);
});

proptest! {
    /// Level-triggered: never two messages without an EOI between them, and none lost.
    #[test]
    fn random_traffic(steps in proptest::collection::vec((0u8..6, 0u32..26, any::<u32>()), 0..300)) {
        let (mut io, out) = ioapic();
        for (what, pin, value) in steps {
            match what {
                0 => io.set_level(pin, value & 1 != 0),
                1 => io.end_of_interrupt(value as u8),
                2 => io.wr(value as u8, value.rotate_left(8)),
                3 => io.set(pin as u8 % 24, value, 0x8030 | (value & 0xF) | (value & 0x1_0000)),
                4 => { io.rd(value as u8); }
                _ => {
                    let before = out.sent.take().len();
                    prop_assert!(before < 1000);
                    let blob = io.save().unwrap();
                    io.restore(&blob).unwrap();
                    prop_assert_eq!(out.sent.take().len(), 0);
                }
            }
            for pin in 0..PINS {
                let e = io.registers.table[pin];
                let due = is_level(e) && e & entry::MASKED == 0 && io.asserted(pin);
                prop_assert!(!due || e & entry::REMOTE_IRR != 0);
                prop_assert!(is_level(e) || e & entry::REMOTE_IRR == 0);
            }
        }
    }
}
