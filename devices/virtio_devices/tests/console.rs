//! virtio-console, driven as a guest drives it.

mod guest;

use device::{Device, Waker};
use guest::{Board, Driver, Rings, loose};
use proptest::prelude::*;
use std::sync::Arc;
use sync::Mutex;
use virtio::feature::RING_EVENT_IDX;
use virtio_devices::console::feature;
use virtio_devices::{Console, ConsoleBackend, ConsolePort};

#[derive(Default)]
struct TtyState {
    output: Vec<u8>,
    input: Vec<u8>,
    room: Option<usize>,
    size: Option<(u16, u16)>,
    waker: Option<Waker>,
}

/// The other end of a port.
#[derive(Clone, Default)]
struct Tty(Arc<Mutex<TtyState>>);

impl Tty {
    fn wake(&self, board: &Board) {
        if let Some(waker) = &self.0.lock().waker {
            waker.wake();
        }
        board.settle();
    }
    fn type_in(&self, board: &Board, text: &[u8]) {
        self.0.lock().input.extend_from_slice(text);
        self.wake(board);
    }
}

impl ConsoleBackend for Tty {
    fn set_waker(&mut self, waker: Waker) {
        self.0.lock().waker = Some(waker);
    }
    fn write(&mut self, data: &[u8]) -> usize {
        let mut s = self.0.lock();
        let n = data.len().min(s.room.unwrap_or(usize::MAX));
        if let Some(room) = &mut s.room {
            *room -= n;
        }
        s.output.extend_from_slice(&data[..n]);
        n
    }
    fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut s = self.0.lock();
        let n = buf.len().min(s.input.len());
        buf[..n].copy_from_slice(&s.input[..n]);
        s.input.drain(..n);
        n
    }
    fn size(&self) -> Option<(u16, u16)> {
        self.0.lock().size
    }
}

const RINGS: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;

fn bytes(board: &Board, at: u64, n: u32) -> Vec<u8> {
    let mut out = vec![0; n as usize];
    board.ram.load_bytes(at, &mut out);
    out
}

fn queues<'b>(driver: &Driver<'b>, n: u16, features: u64) -> Vec<Rings<'b>> {
    (0..n).map(|i| driver.queue(i, 16, RINGS + 0x8000 * u64::from(i), features)).collect()
}

#[test]
fn a_plain_console_talks() {
    let mut board = Board::new();
    let tty = Tty::default();
    tty.0.lock().size = Some((132, 43));
    board.plug(Console::terminal(Box::new(tty.clone())));
    let driver = Driver::probe(&board, 1);
    assert_eq!(driver.offered() & 3, feature::SIZE);
    assert!(driver.negotiate(feature::SIZE | RING_EVENT_IDX));
    driver.enable_msix();
    let mut q = queues(&driver, 2, RING_EVENT_IDX);
    driver.ready();
    assert_eq!(board.read(driver.at.device, 4), 43 << 16 | 132);

    board.ram.store_bytes(BUFFERS, b"hello, world");
    q[1].add(&[(BUFFERS, 5, false), (BUFFERS + 5, 7, false)]);
    q[1].kick();
    assert_eq!(tty.0.lock().output, b"hello, world");
    assert_eq!(q[1].used(), [(0, 0)]);
    tty.type_in(&board, b"typed before there was a buffer");
    q[0].add(&[(BUFFERS, 10, true)]);
    q[0].add(&[(BUFFERS + 0x100, 100, true)]);
    q[0].kick();
    assert_eq!(q[0].used(), [(0, 10), (1, 21)]);
    assert_eq!(bytes(&board, BUFFERS, 10), b"typed befo");
    assert_eq!(bytes(&board, BUFFERS + 0x100, 21), b"re there was a buffer");
    board.messages.take();
    tty.0.lock().size = Some((80, 25));
    tty.wake(&board);
    assert_eq!(board.messages.take(), [0x40]);
    assert_eq!(board.read(driver.at.device, 4), 25 << 16 | 80);
}

#[test]
fn a_slow_terminal_prints_everything_once() {
    let mut board = Board::new();
    let tty = Tty::default();
    tty.0.lock().room = Some(5000);
    let function = board.plug(Console::terminal(Box::new(tty.clone())));
    let driver = Driver::probe(&board, 1);
    assert!(driver.negotiate(0));
    let mut q = queues(&driver, 2, 0);
    driver.ready();
    let text: Vec<u8> = (0..12_000u32).map(|i| (i % 251) as u8).collect();
    board.ram.store_bytes(BUFFERS, &text);
    q[1].add(&[(BUFFERS, 12_000, false)]);
    q[1].kick();
    assert_eq!((tty.0.lock().output.len(), q[1].used().len()), (5000, 0));
    // Saved in the middle of the chain, restored into another device.
    assert!(function.lock().quiesce().is_ready());
    let saved = function.lock().save().unwrap();
    let mut target = Board::with_ram(board.ram.clone());
    let function = target.plug(Console::terminal(Box::new(tty.clone())));
    function.lock().restore(&saved).unwrap();
    assert_eq!(function.lock().save().unwrap(), saved);
    tty.0.lock().room = Some(1);
    function.lock().resume();
    tty.0.lock().room = None;
    tty.wake(&target);
    assert_eq!(tty.0.lock().output, text);
    assert_eq!(q[1].used().len(), 1);
}

/// Takes what the control queue gave: port, event, value, rest.
fn messages(board: &Board, q: &mut Rings<'_>) -> Vec<(u32, u16, u16, Vec<u8>)> {
    let used = q.used();
    let message = |(head, len): (u32, u32)| {
        let at = BUFFERS + 0x100 * u64::from(head);
        let rest = bytes(board, at + 8, len - 8);
        (board.ram.load(at), board.ram.load(at + 4), board.ram.load(at + 6), rest)
    };
    used.into_iter().map(message).collect()
}

fn control(board: &Board, q: &mut Rings<'_>, port: u32, event: u16, value: u16) {
    let at = BUFFERS + 0x1_0000;
    board.ram.store(at, port);
    board.ram.store(at + 4, event);
    board.ram.store(at + 6, value);
    q.add(&[(at, 8, false)]);
    q.kick();
    board.settle();
}

#[test]
fn ports_are_announced_and_opened() {
    let mut board = Board::new();
    let (tty, agent) = (Tty::default(), Tty::default());
    tty.0.lock().size = Some((80, 24));
    let ports = vec![
        ConsolePort { name: None, is_terminal: true, backend: Box::new(tty.clone()) },
        ConsolePort {
            name: Some("org.agent.0".into()),
            is_terminal: false,
            backend: Box::new(agent.clone()),
        },
    ];
    board.plug(Console::with_ports(ports));
    let driver = Driver::probe(&board, 1);
    assert!(driver.negotiate(feature::SIZE | feature::MULTIPORT));
    driver.enable_msix();
    assert_eq!(board.read(driver.at.device + 4, 4), 2);
    let mut q = queues(&driver, 6, 0);
    driver.ready();
    for i in 0..16 {
        q[2].add(&[(BUFFERS + 0x100 * i, 0x100, true)]);
    }
    control(&board, &mut q[3], 0xFFFF_FFFF, 0, 1);
    assert_eq!(messages(&board, &mut q[2]), [(0, 1, 1, vec![]), (1, 1, 1, vec![])]);
    control(&board, &mut q[3], 0, 3, 1);
    assert_eq!(
        messages(&board, &mut q[2]),
        [(0, 4, 1, vec![]), (0, 5, 0, vec![80, 0, 24, 0]), (0, 6, 1, vec![])]
    );
    control(&board, &mut q[3], 1, 3, 1);
    assert_eq!(messages(&board, &mut q[2]), [(1, 7, 1, b"org.agent.0".to_vec()), (1, 6, 1, vec![])]);
    control(&board, &mut q[3], 77, 3, 1);

    // Input waits until a program opens the port.
    q[4].add(&[(BUFFERS + 0x2_0000, 64, true)]);
    q[4].kick();
    agent.type_in(&board, b"sync");
    assert_eq!(q[4].used(), []);
    control(&board, &mut q[3], 1, 6, 1);
    assert_eq!(q[4].used(), [(0, 4)]);
    board.ram.store_bytes(BUFFERS + 0x2_0000, b"done");
    q[5].add(&[(BUFFERS + 0x2_0000, 4, false)]);
    q[5].kick();
    assert_eq!(agent.0.lock().output, b"done");
    tty.0.lock().size = Some((100, 30));
    tty.wake(&board);
    assert_eq!(messages(&board, &mut q[2]), [(0, 5, 0, vec![100, 0, 30, 0])]);
}

fn two_ports() -> Console {
    let port = |name: Option<&str>| ConsolePort {
        name: name.map(Into::into),
        is_terminal: name.is_none(),
        backend: Box::new(Tty::default()),
    };
    Console::with_ports(vec![port(None), port(Some("a"))])
}

device::device_conformance!(console_conforms, || loose(two_ports()), &[0x4000, 0x1000], |f| {
    f.as_io().unwrap().io_write(0, 0x14, &[1]).unwrap();
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 3))]
    #[test]
    fn hostile_rings(
        words in proptest::collection::vec((0u64..0x6000, 0u64..5, any::<u32>()), 0..300),
        heads in proptest::collection::vec((any::<u16>(), 0usize..6), 1..80),
    ) {
        let mut board = Board::new();
        let function = board.plug(two_ports());
        let driver = Driver::probe(&board, 1);
        assert!(driver.negotiate(feature::MULTIPORT));
        let mut q = queues(&driver, 6, 0);
        driver.ready();
        for (at, kind, value) in words {
            let near = match kind {
                0 => u64::from(value),
                1 => u64::from(value & 0x7),
                2 => RINGS + u64::from(value & 0x3_FFFF),
                3 => u64::from(value & 7) | u64::from(value >> 3 & 7) << 32 | 1 << 48,
                _ => u64::from(value & 0x1FF) << 48 | 0x10_0000,
            };
            board.ram.store(RINGS + 8 * at, near);
        }
        for (head, queue) in heads {
            q[queue].publish(head % 20);
            q[queue].kick();
            board.settle();
        }
        let saved = function.lock().save().unwrap();
        function.lock().restore(&saved).unwrap();
        function.lock().resume();
        board.settle();
        assert!(driver.negotiate(0));
        let mut q = queues(&driver, 2, 0);
        driver.ready();
        q[1].add(&[(BUFFERS, 5, false)]);
        q[1].kick();
        prop_assert_eq!(q[1].used(), [(0, 0)]);
    }
}
