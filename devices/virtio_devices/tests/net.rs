//! virtio-net and virtio-rng, driven as a guest drives them.

mod guest;

use device::{Device, Waker};
use guest::{Board, Driver, Rings, loose};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Arc;
use sync::Mutex;
use virtio::feature::{RING_EVENT_IDX, RING_INDIRECT_DESC};
use virtio_devices::net::feature;
use virtio_devices::{Busy, EntropySource, Net, NetBackend, NetConfig, Rng};

#[derive(Default)]
struct WireState {
    sent: Vec<Vec<u8>>,
    arriving: VecDeque<Vec<u8>>,
    room: Option<usize>,
    unplugged: bool,
    waker: Option<Waker>,
}

/// A network cable with both ends in hand.
#[derive(Clone, Default)]
struct Wire(Arc<Mutex<WireState>>);

impl Wire {
    fn wake(&self) {
        if let Some(waker) = &self.0.lock().waker {
            waker.wake();
        }
    }
    fn arrive(&self, board: &Board, frame: Vec<u8>) {
        self.0.lock().arriving.push_back(frame);
        self.wake();
        board.settle();
    }
}

impl NetBackend for Wire {
    fn set_waker(&mut self, waker: Waker) {
        self.0.lock().waker = Some(waker);
    }
    fn send(&mut self, frame: &[u8]) -> Result<(), Busy> {
        let mut s = self.0.lock();
        if let Some(room) = &mut s.room {
            *room = room.checked_sub(1).ok_or(Busy)?;
        }
        s.sent.push(frame.to_vec());
        Ok(())
    }
    fn receive(&mut self, buf: &mut [u8]) -> Option<usize> {
        let frame = self.0.lock().arriving.pop_front()?;
        buf[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }
    fn link_up(&self) -> bool {
        !self.0.lock().unplugged
    }
}

const RX_RINGS: u64 = 0x1_0000;
const TX_RINGS: u64 = 0x1_8000;
const BUFFERS: u64 = 0x10_0000;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const ALL: u64 =
    RING_EVENT_IDX | RING_INDIRECT_DESC | feature::MERGEABLE | feature::CSUM | feature::HOST_TSO4;

fn net(wire: &Wire) -> Net {
    Net::new(Box::new(wire.clone()), NetConfig { mac: MAC, mtu: Some(1500) })
}

fn set_up<'b>(board: &'b Board, features: u64) -> (Driver<'b>, Rings<'b>, Rings<'b>) {
    let driver = Driver::probe(board, 1);
    assert!(driver.negotiate(features));
    driver.enable_msix();
    let rx = driver.queue(0, 64, RX_RINGS, features);
    let tx = driver.queue(1, 64, TX_RINGS, features);
    driver.ready();
    (driver, rx, tx)
}

fn bytes(board: &Board, at: u64, n: usize) -> Vec<u8> {
    let mut out = vec![0; n];
    board.ram.load_bytes(at, &mut out);
    out
}

#[test]
fn frames_go_out_and_come_in() {
    let mut board = Board::new();
    let wire = Wire::default();
    board.plug(net(&wire));
    let (driver, mut rx, mut tx) = set_up(&board, 0);
    assert_eq!(bytes_of(&driver, 6), MAC);
    assert_eq!(board.read(driver.at.device + 6, 2), 1);
    assert_eq!(board.read(driver.at.device + 10, 2), 1500);

    board.ram.fill_bytes(BUFFERS, 0, 12);
    board.ram.fill_bytes(BUFFERS + 12, 0x5A, 60);
    tx.add(&[(BUFFERS, 12, false), (BUFFERS + 12, 60, false)]);
    tx.add(&[(BUFFERS, 72, false)]);
    tx.add(&[(BUFFERS, 5, false)]);
    tx.kick();
    assert_eq!(wire.0.lock().sent, [[0x5A; 60], [0x5A; 60]]);
    assert_eq!(tx.used().len(), 3);
    assert_eq!(board.messages.take(), [0x42]);

    // A frame that comes before there are buffers waits.
    wire.arrive(&board, vec![7; 100]);
    rx.add(&[(BUFFERS, 2048, true)]);
    rx.kick();
    assert_eq!(rx.used(), [(0, 112)]);
    assert_eq!(board.messages.take(), [0x41]);
    let mut expected = vec![0; 12];
    expected[10] = 1;
    expected.extend_from_slice(&[7; 100]);
    assert_eq!(bytes(&board, BUFFERS, 112), expected);
    // One too long for the buffer is lost, the buffer is not.
    rx.add(&[(BUFFERS, 512, true)]);
    wire.arrive(&board, vec![8; 1000]);
    assert_eq!(rx.used(), []);
    wire.arrive(&board, vec![9; 60]);
    assert_eq!(rx.used(), [(1, 72)]);
}

fn bytes_of(driver: &Driver<'_>, n: u64) -> Vec<u8> {
    (0..n).map(|i| driver.board.read(driver.at.device + i, 1) as u8).collect()
}

#[test]
fn mergeable_buffers_share_a_frame() {
    let mut board = Board::new();
    let wire = Wire::default();
    board.plug(net(&wire));
    let (_, mut rx, _) = set_up(&board, ALL);
    let frame: Vec<u8> = (0..250).collect();
    for i in 0..2 {
        rx.add(&[(BUFFERS + 0x1000 * i, 100, true)]);
    }
    wire.arrive(&board, frame.clone());
    assert_eq!(rx.used(), []);
    rx.add(&[(BUFFERS + 0x2000, 100, true)]);
    rx.kick();
    assert_eq!(rx.used(), [(0, 100), (1, 100), (2, 62)]);
    assert_eq!(bytes(&board, BUFFERS + 10, 2), [3, 0]);
    let mut got = bytes(&board, BUFFERS + 12, 88);
    got.extend(bytes(&board, BUFFERS + 0x1000, 100));
    got.extend(bytes(&board, BUFFERS + 0x2000, 62));
    assert_eq!(got, frame);
}

#[test]
fn a_busy_network_loses_and_doubles_nothing() {
    let mut board = Board::new();
    let wire = Wire::default();
    wire.0.lock().room = Some(1);
    let function = board.plug(net(&wire));
    let (_, _, mut tx) = set_up(&board, ALL);
    // One packet that is cut into three, then two short ones.
    let mut packet = vec![0; 12];
    (packet[0], packet[1]) = (1, 1);
    packet[4..6].copy_from_slice(&1000u16.to_le_bytes());
    packet[6] = 34;
    packet[8] = 16;
    packet.extend_from_slice(&[2; 12]);
    packet.extend_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    packet.extend_from_slice(&[0, 80, 0, 81, 0, 0, 0, 0, 1, 2, 3, 4, 0x50, 0x10, 0x10, 0, 0, 0, 0, 0]);
    packet.resize(12 + 54 + 2500, 0x33);
    board.ram.store_bytes(BUFFERS, &packet);
    tx.add(&[(BUFFERS, packet.len() as u32, false)]);
    board.ram.fill_bytes(BUFFERS + 0x4000, 0, 12);
    for i in 0..2u8 {
        let at = BUFFERS + 0x4000 + 0x100 * u64::from(i);
        board.ram.store_bytes(at, &[[0; 12], [i; 12]].concat());
        tx.add(&[(at, 24, false)]);
    }
    tx.kick();
    for room in [0, 1, 0, 2] {
        wire.0.lock().room = Some(room);
        wire.wake();
        board.settle();
    }
    // In the middle, saved and restored.
    assert!(function.lock().quiesce().is_ready());
    let saved = function.lock().save().unwrap();
    function.lock().restore(&saved).unwrap();
    wire.0.lock().room = None;
    function.lock().resume();
    board.settle();
    let lengths: Vec<usize> = wire.0.lock().sent.iter().map(Vec::len).collect();
    assert_eq!(lengths, [1054, 1054, 554, 12, 12]);
    assert_eq!(wire.0.lock().sent[4], [1; 12]);
    assert_eq!(tx.used().len(), 3);
}

#[test]
fn unplugging_tells_the_driver() {
    let mut board = Board::new();
    let wire = Wire::default();
    board.plug(net(&wire));
    let (driver, ..) = set_up(&board, 0);
    wire.0.lock().unplugged = true;
    wire.wake();
    board.settle();
    assert_eq!(board.messages.take(), [0x40]);
    assert_eq!(board.read(driver.at.device + 6, 2), 0);
}

struct Count(u8);

impl EntropySource for Count {
    fn fill(&mut self, buf: &mut [u8]) {
        for b in buf {
            self.0 = self.0.wrapping_add(1);
            *b = self.0;
        }
    }
}

#[test]
fn entropy_fills_buffers() {
    let mut board = Board::new();
    board.plug(Rng::new(Box::new(Count(0))));
    let driver = Driver::probe(&board, 1);
    assert!(driver.negotiate(RING_EVENT_IDX));
    driver.enable_msix();
    let mut rings = driver.queue(0, 8, RX_RINGS, RING_EVENT_IDX);
    driver.ready();
    rings.add(&[(BUFFERS, 3, true), (BUFFERS + 8, 2, true)]);
    rings.add(&[(BUFFERS + 0x1000, 0x1_0000, true)]);
    rings.add(&[(BUFFERS, 8, false)]);
    rings.kick();
    assert_eq!(rings.used(), [(0, 5), (2, 4096), (3, 0)]);
    assert_eq!((bytes(&board, BUFFERS, 3), bytes(&board, BUFFERS + 8, 2)), (vec![1, 2, 3], vec![4, 5]));
    assert_eq!(board.messages.take(), [0x41]);
}

device::device_conformance!(net_conforms, || loose(net(&Wire::default())), &[0x4000, 0x1000], |f| {
    f.as_io().unwrap().io_write(0, 0x14, &[1]).unwrap();
});
proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 3))]
    #[test]
    fn hostile_rings_of_entropy(
        words in proptest::collection::vec((0u64..0x60, 0u64..4, any::<u32>()), 0..80),
        heads in proptest::collection::vec(any::<u16>(), 1..40),
        features in prop_oneof![Just(0u64), Just(RING_EVENT_IDX | RING_INDIRECT_DESC)],
    ) {
        let mut board = Board::new();
        let function = board.plug(Rng::new(Box::new(Count(0))));
        let driver = Driver::probe(&board, 1);
        assert!(driver.negotiate(features));
        let mut rings = driver.queue(0, 8, RX_RINGS, features);
        driver.ready();
        for (at, kind, value) in words {
            let near = match kind {
                0 => u64::from(value),
                1 => RX_RINGS | u64::from(value & 0x7FF),
                2 => u64::from(value & 7) << 48 | u64::from(value & 7) << 32 | 512,
                _ => BUFFERS | u64::from(value & 0xFFFF),
            };
            board.ram.store(RX_RINGS + 8 * at, near);
        }
        for head in heads {
            rings.publish(head % 12);
            rings.kick();
            board.settle();
        }
        let saved = function.lock().save().unwrap();
        function.lock().restore(&saved).unwrap();
        function.lock().resume();
        board.settle();
        assert!(driver.negotiate(0));
        let mut rings = driver.queue(0, 8, RX_RINGS, 0);
        driver.ready();
        rings.add(&[(BUFFERS, 5, true)]);
        rings.kick();
        prop_assert_eq!(rings.used(), [(0, 5)]);
    }
}

device::device_conformance!(rng_conforms, || loose(Rng::new(Box::new(Count(0)))), &[0x4000, 0x1000], |f| {
    f.as_io().unwrap().io_write(0, 0x14, &[3]).unwrap();
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 3))]
    #[test]
    fn hostile_rings(
        words in proptest::collection::vec((0u64..0x2000, 0u64..5, any::<u32>()), 0..300),
        heads in proptest::collection::vec((any::<u16>(), any::<bool>()), 1..60),
        features in prop_oneof![Just(0u64), Just(ALL)],
    ) {
        let mut board = Board::new();
        let wire = Wire::default();
        let function = board.plug(net(&wire));
        let (_, mut rx, mut tx) = set_up(&board, features);
        for (at, kind, value) in words {
            let near = match kind {
                0 => u64::from(value),
                1 => u64::from(value & 0x7),
                2 => BUFFERS | u64::from(value & 0xFFFF),
                3 => u64::from(value & 0xFFFF) << 32 | u64::from(value & 0x7FF),
                _ => u64::from(value & 0x1FF) << 48 | 512,
            };
            board.ram.store(RX_RINGS + 8 * at, near);
        }
        for (head, to_rx) in heads {
            let rings = if to_rx { &mut rx } else { &mut tx };
            rings.publish(head % 80);
            rings.kick();
            wire.arrive(&board, vec![1; 700]);
        }
        let saved = function.lock().save().unwrap();
        function.lock().restore(&saved).unwrap();
        function.lock().resume();
        board.settle();
        wire.0.lock().sent.clear();
        let (_, _, mut tx) = set_up(&board, 0);
        board.ram.fill_bytes(BUFFERS, 0, 80);
        tx.add(&[(BUFFERS, 80, false)]);
        tx.kick();
        prop_assert_eq!(wire.0.lock().sent.last().map(Vec::len), Some(68));
    }
}
