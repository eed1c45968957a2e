//! The UART: detection, interrupts, a full host, loopback, saved state.

use super::*;
use crate::testing::{Access, LineLog, golden};
use alloc::sync::Arc;
use alloc::vec::Vec;
use proptest::prelude::*;
use sync::Mutex;

/// A host with room for so many bytes.
#[derive(Default)]
struct Host {
    room: usize,
    sent: Vec<u8>,
    asked: u32,
}

#[derive(Clone, Default)]
struct HostEnd(Arc<Mutex<Host>>);

impl SerialOut for HostEnd {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut host = self.0.lock();
        let n = host.room.min(bytes.len());
        host.room -= n;
        host.sent.extend(&bytes[..n]);
        n
    }
    fn input_room(&mut self) {
        self.0.lock().asked += 1;
    }
}

fn uart(room: usize) -> (Uart16550, LineLog, HostEnd) {
    let (log, host) = (LineLog::default(), HostEnd::default());
    host.0.lock().room = room;
    (Uart16550::new("uart0", log.line(4), Box::new(host.clone())), log, host)
}

#[test]
fn linux_finds_a_16550a() {
    let (mut u, ..) = uart(0);
    u.outb(0, 2, 1);
    assert_eq!(u.inb(0, 2) >> 6, 3);
    u.outb(0, 2, 0);
    assert_eq!(u.inb(0, 2), 1);
    u.outb(0, 7, 0x5A);
    assert_eq!(u.inb(0, 7), 0x5A);
    u.outb(0, 3, 0x83);
    u.put(0, 0, 2, 0x0102).unwrap();
    assert_eq!((u.get(0, 0, 2), u.inb(0, 3)), (0x0102, 0x83));
    u.outb(0, 3, 3);
    assert_eq!((u.inb(0, 1), u.inb(0, 5), u.inb(0, 6)), (0, 0x60, 0xB0));
}

#[test]
fn transmits_and_interrupts() {
    let (mut u, log, host) = uart(100);
    u.outb(0, 4, 8);
    u.outb(0, 1, ier::TRANSMIT);
    assert!(log.level(4), "enabling with an empty transmitter interrupts");
    assert_eq!((u.inb(0, 2), log.level(4), u.inb(0, 2)), (iir::TRANSMIT, false, iir::NONE));
    u.outb(0, 0, b'x');
    assert!(log.level(4));
    assert_eq!(host.0.lock().sent, b"x");
    u.outb(0, 4, 0);
    assert!(!log.level(4), "OUT2 gates");
}

#[test]
fn a_full_host_holds_thre_back() {
    let (mut u, log, host) = uart(3);
    u.outb(0, 2, 1);
    u.outb(0, 4, 8);
    u.outb(0, 1, ier::TRANSMIT);
    u.inb(0, 2);
    for byte in b"0123456789" {
        u.outb(0, 0, *byte);
    }
    assert_eq!((u.inb(0, 5), log.level(4)), (0, false));
    host.0.lock().room = 4;
    u.poll();
    assert_eq!((u.inb(0, 5), log.level(4)), (0, false));
    host.0.lock().room = 40;
    u.poll();
    assert_eq!((u.inb(0, 5), log.level(4)), (0x60, true));
    assert_eq!(host.0.lock().sent, b"0123456789");
}

#[test]
fn receives_at_the_trigger_and_by_timeout() {
    let (mut u, log, host) = uart(0);
    u.outb(0, 4, 8);
    assert_eq!(u.receive(b"ab"), 1, "one byte without FIFOs");
    assert_eq!(u.inb(0, 0), b'a');
    assert_eq!(host.0.lock().asked, 1);
    u.outb(0, 2, 0x81);
    u.outb(0, 1, ier::RECEIVED);
    assert_eq!(u.receive(b"1234567"), 7);
    assert_eq!((u.inb(0, 2) & 0xF, log.level(4)), (iir::TIMEOUT, true));
    assert_eq!(u.receive(b"890123456789"), 9);
    assert_eq!(u.inb(0, 2) & 0xF, iir::RECEIVED);
    let read: Vec<u8> = (0..16).map(|_| u.inb(0, 0)).collect();
    assert_eq!(read, b"1234567890123456");
    assert_eq!((u.inb(0, 5) & 1, log.level(4), host.0.lock().asked), (0, false, 2));
}

#[test]
fn loopback() {
    let (mut u, _, host) = uart(9);
    u.outb(0, 4, 0x1A); // LOOP, OUT2, RTS
    assert_eq!(u.inb(0, 6) & 0xF0, 0x90);
    u.outb(0, 4, 0x10);
    assert_eq!(u.inb(0, 6), 0x09);
    u.outb(0, 1, ier::LINE);
    u.outb(0, 0, b'a');
    assert_eq!(u.receive(b"z"), 0);
    u.outb(0, 0, b'b');
    assert_eq!((u.inb(0, 2), u.inb(0, 5), u.inb(0, 0)), (iir::LINE, 0x63, b'a'));
    assert!(host.0.lock().sent.is_empty());
    u.outb(0, 4, 0);
    assert_eq!(host.0.lock().asked, 1, "the host may send again");
}

fn stir(u: &mut Uart16550) {
    for (at, value) in [(3, 0x80), (0, 1), (3, 3), (2, 0xC1), (4, 0x0B), (1, 0x0F), (7, 0x77), (0, b'q')] {
        u.outb(0, at, value);
    }
    u.receive(b"hello");
}

#[test]
fn golden_bytes_of_version_1() {
    let (mut u, ..) = uart(0);
    stir(&mut u);
    golden(
        &u.save().unwrap(),
        "010001000000010200010000000f030001000000c1040001000000030500010000000b060001000000770a0005000000
         68656c6c6f0b000100000071",
    );
}

#[test]
fn restored_without_an_edge() {
    let (mut u, ..) = uart(0);
    stir(&mut u);
    let (mut copy, log, host) = uart(9);
    copy.restore(&u.save().unwrap()).unwrap();
    assert_eq!(log.take_edges(4), 0);
    copy.resume();
    assert_eq!(host.0.lock().sent, b"q");
    assert_eq!(copy.inb(0, 0), b'h');
}

device::device_conformance!(conformance, || uart(2).0, &[8], stir);

proptest! {
    #[test]
    fn what_is_sent_arrives_in_order(writes in proptest::collection::vec((any::<u8>(), 0usize..4), 0..200)) {
        let (mut u, _, host) = uart(0);
        u.outb(0, 2, 1);
        let mut expected = Vec::new();
        for (byte, room) in writes {
            host.0.lock().room = room;
            u.poll();
            if u.inb(0, 5) & 0x20 != 0 {
                u.outb(0, 0, byte);
                expected.push(byte);
            }
        }
        host.0.lock().room = 100;
        u.poll();
        prop_assert_eq!(&host.0.lock().sent, &expected);
    }

    #[test]
    fn random_traffic_never_panics(steps in proptest::collection::vec((0u64..8, any::<u8>(), 0usize..40), 0..200)) {
        let (mut u, ..) = uart(50);
        for (at, value, n) in steps {
            u.outb(0, at, value);
            u.inb(0, u64::from(value & 7));
            prop_assert!(u.receive(&[value; 40][..n]) <= 16);
        }
    }
}
