//! virtio-blk, driven as a guest drives it: configuration space → BAR → notification → used ring → interrupt.

mod guest;

use device::{Device, Waker};
use guest::{Board, Driver, Rings, loose};
use guest_memory::DmaSpace;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Arc;
use sync::Mutex;
use virtio::feature::{RING_EVENT_IDX, RING_INDIRECT_DESC};
use virtio_devices::blk::feature;
use virtio_devices::{
    Blk, BlkConfig, BlockBackend, BlockError, BlockInfo, BlockOp, BlockRequest, Busy, Completion,
};

const DISK: usize = 64 << 10;

#[derive(Default)]
struct DiskState {
    data: Vec<u8>,
    bytes: u64,
    waiting: VecDeque<BlockRequest>,
    done: VecDeque<Completion>,
    log: Vec<&'static str>,
    /// Requests taken before it is busy.
    room: usize,
    /// Completes only when told to.
    manual: bool,
    fail: Option<BlockError>,
    waker: Option<Waker>,
}

/// A disk in memory.
#[derive(Clone)]
struct MemoryDisk {
    state: Arc<Mutex<DiskState>>,
    mem: Arc<Mutex<Option<DmaSpace>>>,
    read_only: bool,
}

impl MemoryDisk {
    fn new() -> Self {
        let data: Vec<u8> = (0..DISK).map(|i| (i / 512) as u8).collect();
        let state = DiskState { data, bytes: DISK as u64, room: 1000, ..DiskState::default() };
        Self { state: Arc::new(Mutex::new(state)), mem: Arc::default(), read_only: false }
    }

    /// Executes up to `n` of the requests that wait.
    fn complete(&self, n: usize) {
        let mem = self.mem.lock().clone().unwrap();
        let ram = mem.ram();
        let mut s = self.state.lock();
        for _ in 0..n {
            let Some(r) = s.waiting.pop_front() else { break };
            let mut result = Ok(());
            let mut cursor = match r.op {
                BlockOp::Read { offset } | BlockOp::Write { offset } => offset as usize,
                _ => 0,
            };
            for b in r.buffers.iter() {
                let range = cursor..cursor + b.len as usize;
                match r.op {
                    BlockOp::Read { .. } => ram.store_bytes(b.offset, &s.data[range]),
                    _ => ram.load_bytes(b.offset, &mut s.data[range]),
                }
                cursor += b.len as usize;
            }
            match r.op {
                BlockOp::Read { .. } => s.log.push("read"),
                BlockOp::Write { .. } => s.log.push("write"),
                BlockOp::Flush => s.log.push("flush"),
                BlockOp::Discard { offset, bytes } | BlockOp::WriteZeroes { offset, bytes, .. } => {
                    let is_discard = matches!(r.op, BlockOp::Discard { .. });
                    s.data[offset as usize..(offset + bytes) as usize].fill(if is_discard {
                        0xDD
                    } else {
                        0
                    });
                    s.log.push(if is_discard { "discard" } else { "zeroes" });
                }
            }
            if let Some(error) = s.fail {
                result = Err(error);
            }
            s.done.push_back(Completion { id: r.id, result });
        }
        if let Some(waker) = &s.waker {
            waker.wake();
        }
    }
}

impl BlockBackend for MemoryDisk {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            bytes: self.state.lock().bytes,
            read_only: self.read_only,
            block_bytes: 512,
            physical_block_bytes: 4096,
            discard: true,
            write_zeroes: true,
        }
    }
    fn set_waker(&mut self, waker: Waker) {
        self.state.lock().waker = Some(waker);
    }
    fn submit(&mut self, r: BlockRequest, mem: &DmaSpace) -> Result<(), Busy> {
        *self.mem.lock() = Some(mem.clone());
        let mut s = self.state.lock();
        if s.waiting.len() >= s.room {
            return Err(Busy);
        }
        assert!(r.buffers.iter().all(|b| b.len != 0));
        s.waiting.push_back(r);
        let manual = s.manual;
        drop(s);
        if !manual {
            self.complete(1);
        }
        Ok(())
    }
    fn next_completion(&mut self) -> Option<Completion> {
        self.state.lock().done.pop_front()
    }
}

const RINGS: u64 = 0x1_0000;
const HEADER: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const STATUS: u64 = 0x3_0000;
const ALL: u64 =
    RING_EVENT_IDX | RING_INDIRECT_DESC | feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;

const READ: u32 = 0;
const WRITE: u32 = 1;

fn blk(disk: &MemoryDisk) -> Blk {
    Blk::new(Box::new(disk.clone()), BlkConfig { serial: "serial-0001".into(), max_in_flight: 0 })
}

fn set_up<'b>(board: &'b Board, features: u64, msix: bool) -> (Driver<'b>, Rings<'b>) {
    let driver = Driver::probe(board, 1);
    assert!(driver.negotiate(features));
    if msix {
        driver.enable_msix();
    }
    let rings = driver.queue(0, 64, RINGS, features);
    driver.ready();
    (driver, rings)
}

fn header(board: &Board, n: u64, kind: u32, sector: u64) -> u64 {
    let at = HEADER + 16 * n;
    board.ram.store(at, kind);
    board.ram.store(at + 4, 0u32);
    board.ram.store(at + 8, sector);
    board.ram.store::<u8>(STATUS + n, 0xEE);
    at
}

fn status(board: &Board, n: u64) -> u8 {
    board.ram.load(STATUS + n)
}

/// Issues request `n` with `data`; the head.
fn issue(board: &Board, rings: &mut Rings<'_>, n: u64, kind: u32, sector: u64, data: &[guest::Piece]) -> u16 {
    let at = header(board, n, kind, sector);
    let mut pieces = vec![(at, 16, false)];
    pieces.extend_from_slice(data);
    pieces.push((STATUS + n, 1, true));
    let head = rings.add(&pieces);
    rings.kick();
    board.settle();
    head
}

#[test]
fn reads_and_writes_with_msix() {
    let mut board = Board::new();
    let disk = MemoryDisk::new();
    board.plug(blk(&disk));
    let (driver, mut rings) = set_up(&board, ALL, true);
    assert_eq!(board.read(driver.at.device, 8), DISK as u64 / 512);

    // Split over several buffers that no sector border respects.
    let head = issue(&board, &mut rings, 0, READ, 3, &[(DATA, 100, true), (DATA + 0x1000, 924, true)]);
    assert_eq!(rings.used(), [(head.into(), 1025)]);
    assert_eq!(status(&board, 0), 0);
    assert_eq!(board.messages.take(), [0x41]);
    assert!(!board.intx(1));
    let mut read = [0; 924];
    board.ram.load_bytes(DATA + 0x1000, &mut read);
    assert_eq!((board.ram.load::<u8>(DATA), read[411], read[412]), (3, 3, 4));

    board.ram.fill_bytes(DATA, 0xA5, 1024);
    let head = issue(&board, &mut rings, 1, WRITE, 5, &[(DATA, 1024, false)]);
    assert_eq!(rings.used(), [(head.into(), 1)]);
    assert_eq!(disk.state.lock().data[5 * 512..7 * 512], [0xA5; 1024]);
    issue(&board, &mut rings, 2, 4, 0, &[]);
    assert_eq!((status(&board, 2), rings.used().len()), (0, 1));
    assert_eq!(disk.state.lock().log, ["read", "write", "flush"]);
}

#[test]
fn intx_is_level_and_cleared_by_the_isr() {
    let mut board = Board::new();
    board.plug(blk(&MemoryDisk::new()));
    let (driver, mut rings) = set_up(&board, 0, false);
    issue(&board, &mut rings, 0, READ, 0, &[(DATA, 512, true)]);
    assert!(board.intx(1));
    assert_eq!(board.read(driver.at.isr, 1), 1);
    assert!(!board.intx(1));
    assert_eq!(board.read(driver.at.isr, 1), 0);
    assert_eq!(board.messages.take(), []);
    // The driver wants no interrupts.
    board.ram.store(rings.avail, 1u16);
    issue(&board, &mut rings, 1, READ, 0, &[(DATA, 512, true)]);
    assert!(!board.intx(1));
    assert_eq!(rings.used().len(), 2);
}

#[test]
fn indirect_tables_and_the_serial_number() {
    let mut board = Board::new();
    board.plug(blk(&MemoryDisk::new()));
    let (_, mut rings) = set_up(&board, ALL, true);
    let at = header(&board, 0, 8, 0);
    let head = rings.add_indirect(&[(at, 16, false), (DATA, 20, true), (STATUS, 1, true)]);
    rings.kick();
    assert_eq!(rings.used(), [(head.into(), 21)]);
    let mut id = [0; 20];
    board.ram.load_bytes(DATA, &mut id);
    assert_eq!(&id[..12], b"serial-0001\0");
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut board = Board::new();
    let disk = MemoryDisk::new();
    board.plug(blk(&disk));
    let (_, mut rings) = set_up(&board, ALL, true);
    let mut range = |n: u64, kind: u32, sector: u64, sectors: u32, flags: u32| {
        board.ram.store(DATA, sector);
        board.ram.store(DATA + 8, sectors);
        board.ram.store(DATA + 12, flags);
        issue(&board, &mut rings, n, kind, 0, &[(DATA, 16, false)]);
        status(&board, n)
    };
    assert_eq!(range(0, 11, 8, 8, 0), 0);
    assert_eq!(range(1, 13, 16, 8, 1), 0);
    assert_eq!(range(2, 11, 8, 8, 1), 2, "no unmap flag in discard");
    assert_eq!(range(3, 13, 8, 8, 6), 2);
    assert_eq!(range(4, 13, 120, 9, 0), 1, "beyond the end");
    assert_eq!(range(5, 13, u64::MAX, 1, 0), 1);
    assert_eq!(range(6, 11, 0, u32::MAX, 0), 1);
    let s = disk.state.lock();
    assert_eq!((s.data[8 * 512], s.data[16 * 512], s.data[24 * 512]), (0xDD, 0, 24));
}

#[test]
fn bad_requests_are_answered() {
    let mut board = Board::new();
    let disk = MemoryDisk { read_only: true, ..MemoryDisk::new() };
    board.plug(blk(&disk));
    let driver = Driver::probe(&board, 1);
    assert_eq!(driver.offered() & (feature::READ_ONLY | feature::DISCARD), feature::READ_ONLY);
    let (driver, mut rings) = set_up(&board, RING_EVENT_IDX | feature::READ_ONLY, true);
    let sectors = DISK as u64 / 512;
    for (n, (kind, sector, len, write, expected)) in [
        (READ, sectors, 512, true, 1),
        (READ, sectors - 1, 1024, true, 1),
        (READ, u64::MAX, 512, true, 1),
        (READ, 0, 100, true, 1),
        (WRITE, 0, 512, false, 1),
        (77, 0, 512, true, 2),
        (11, 0, 16, false, 2),
        (READ, sectors - 1, 512, true, 0),
    ]
    .into_iter()
    .enumerate()
    {
        issue(&board, &mut rings, n as u64, kind, sector, &[(DATA, len, write)]);
        assert_eq!(status(&board, n as u64), expected, "request {n}");
    }
    assert_eq!((rings.used().len(), driver.status()), (8, 0xF));
    disk.state.lock().fail = Some(BlockError::NoSpace);
    issue(&board, &mut rings, 9, READ, 0, &[(DATA, 512, true)]);
    assert_eq!(status(&board, 9), 1);
    // No room for a status: the device wants a reset and works after it.
    rings.add(&[(HEADER, 16, false)]);
    rings.kick();
    assert_eq!(driver.status(), 0x4F);
    assert_eq!(board.messages.take().last(), Some(&0x40));
    disk.state.lock().fail = None;
    let (_, mut rings) = set_up(&board, 0, true);
    issue(&board, &mut rings, 0, READ, 0, &[(DATA, 512, true)]);
    assert_eq!(status(&board, 0), 0);
}

#[test]
fn without_flush_every_write_is_flushed() {
    let mut board = Board::new();
    let disk = MemoryDisk::new();
    board.plug(blk(&disk));
    let (_, mut rings) = set_up(&board, 0, true);
    issue(&board, &mut rings, 0, WRITE, 0, &[(DATA, 512, false)]);
    assert_eq!((disk.state.lock().log.clone(), rings.used().len()), (vec!["write", "flush"], 1));
}

#[test]
fn busy_backends_lose_nothing() {
    let mut board = Board::new();
    let disk = MemoryDisk::new();
    (disk.state.lock().manual, disk.state.lock().room) = (true, 2);
    board.plug(blk(&disk));
    let (_, mut rings) = set_up(&board, ALL, true);
    for n in 0..7 {
        issue(&board, &mut rings, n, WRITE, n, &[(DATA, 512, false)]);
    }
    assert_eq!(rings.used(), []);
    for _ in 0..7 {
        disk.complete(1);
        board.settle();
    }
    assert_eq!(rings.used().len(), 7);
    assert!((0..7).all(|n| status(&board, n) == 0));
    assert_eq!(board.messages.take().len(), 1, "the driver did not ask again");
}

#[test]
fn the_cap_on_requests_holds() {
    let mut board = Board::new();
    let disk = MemoryDisk::new();
    disk.state.lock().manual = true;
    let config = BlkConfig { serial: String::new(), max_in_flight: 2 };
    board.plug(Blk::new(Box::new(disk.clone()), config));
    let (_, mut rings) = set_up(&board, ALL, true);
    for n in 0..5 {
        issue(&board, &mut rings, n, READ, n, &[(DATA, 512, true)]);
    }
    for waiting in [2, 2, 2, 2, 1, 0] {
        assert_eq!(disk.state.lock().waiting.len(), waiting);
        disk.complete(1);
        board.settle();
    }
    assert_eq!(rings.used().len(), 5);
}

#[test]
fn a_driver_that_floods_lets_others_have_their_turn() {
    let mut board = Board::new();
    let function = board.plug(blk(&MemoryDisk::new()));
    let (_, mut rings) = set_up(&board, 0, true);
    let at = header(&board, 0, READ, 0);
    let head = rings.add(&[(at, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    // The ring always looks full: 64 entries ahead of wherever the device stands.
    board.ram.fill_bytes(rings.avail + 4, head as u8, 128);
    for turn in 1..4u16 {
        board.ram.store(rings.avail + 2, turn * 64);
        rings.kick();
        assert_eq!(board.ram.load::<u16>(rings.used + 2), turn * 64);
    }
    board.ram.store(rings.avail + 2, 4 * 64u16);
    board.settle();
    assert_eq!(board.ram.load::<u16>(rings.used + 2), 4 * 64, "it woke itself for the rest");
    assert!(function.lock().quiesce().is_ready());
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let mut board = Board::new();
    let disk = MemoryDisk::new();
    disk.state.lock().manual = true;
    board.plug(blk(&disk));
    let (driver, mut rings) = set_up(&board, ALL, true);
    issue(&board, &mut rings, 0, READ, 0, &[(DATA, 512, true)]);
    driver.set_status(0);
    assert_ne!(driver.status(), 0);
    driver.set_status(0xF);
    disk.complete(1);
    assert_eq!(driver.status(), 0);
    board.settle();
    assert_eq!(driver.status(), 0);
}

#[test]
fn resizing_tells_the_driver() {
    let mut board = Board::new();
    let disk = MemoryDisk::new();
    board.plug(blk(&disk));
    let (driver, mut rings) = set_up(&board, ALL, true);
    let generation = board.read(driver.at.common + 0x15, 1);
    disk.state.lock().bytes = 8192;
    disk.complete_nothing();
    board.settle();
    assert_eq!(board.messages.take(), [0x40]);
    assert_ne!(board.read(driver.at.common + 0x15, 1), generation);
    assert_eq!(board.read(driver.at.device, 8), 16);
    issue(&board, &mut rings, 0, READ, 16, &[(DATA, 512, true)]);
    assert_eq!(status(&board, 0), 1);
}

impl MemoryDisk {
    fn complete_nothing(&self) {
        if let Some(waker) = &self.state.lock().waker {
            waker.wake();
        }
    }
}

#[test]
fn saved_in_mid_stream_and_restored_elsewhere() {
    let mut board = Board::new();
    let disk = MemoryDisk::new();
    (disk.state.lock().manual, disk.state.lock().room) = (true, 1);
    let function = board.plug(blk(&disk));
    let (_, mut rings) = set_up(&board, ALL, true);
    board.ram.fill_bytes(DATA, 0x77, 512);
    for n in 0..4 {
        issue(&board, &mut rings, n, WRITE, n, &[(DATA, 512, false)]);
    }
    // One is at the backend, one is parked, two were not taken.
    assert!(function.lock().quiesce().is_pending());
    disk.complete(1);
    assert!(function.lock().quiesce().is_ready());
    let saved = function.lock().save().unwrap();
    assert_eq!((rings.used().len(), disk.state.lock().waiting.len()), (1, 0));

    let mut target = Board::with_ram(board.ram.clone());
    let function = target.plug(blk(&disk));
    disk.state.lock().manual = false;
    function.lock().restore(&saved).unwrap();
    assert_eq!(function.lock().save().unwrap(), saved);
    function.lock().resume();
    target.settle();
    assert_eq!(rings.used().len(), 3);
    assert_eq!(disk.state.lock().data[..2048], [0x77; 2048]);
    assert_eq!(target.messages.take(), [0x41]);
    // It goes on where the guest was.
    let driver = Driver::probe(&target, 1);
    assert_eq!(driver.status(), 0xF);
}

#[test]
fn the_configuration_window_reaches_the_registers() {
    let mut board = Board::new();
    board.plug(blk(&MemoryDisk::new()));
    let driver = Driver::probe(&board, 1);
    let cap = driver.at.window_cap;
    let cfg = |offset| Board::config(1, cap + offset);
    board.write(cfg(4), 1, 0);
    board.write(cfg(8), 4, 0x2000);
    board.write(cfg(12), 4, 4);
    assert_eq!(board.read(cfg(16), 4), DISK as u64 / 512);
    board.write(cfg(8), 4, 0x14);
    board.write(cfg(12), 4, 1);
    board.write(cfg(16), 1, 3);
    assert_eq!(driver.status(), 3);
    assert_eq!(board.read(cfg(16), 1), 3);
    for bar in [1, 2, 255] {
        board.write(cfg(4), 1, bar);
        board.write(cfg(8), 4, 0xFFFF_FFFC);
        board.read(cfg(16), 4);
        board.write(cfg(16), 4, 0xFFFF_FFFF);
    }
}

device::device_conformance!(blk_conforms, || loose(blk(&MemoryDisk::new())), &[0x4000, 0x1000], |f| {
    use device::IoHandler;
    use pci::PciFunction;
    f.config_write(4, &[6, 0]);
    for status in [1, 3] {
        f.io_write(0, 0x14, &[status]).unwrap();
    }
    f.io_write(0, 8, &[1, 0, 0, 0]).unwrap();
    f.io_write(0, 12, &[1, 0, 0, 0]).unwrap();
    f.io_write(0, 0x14, &[0xB]).unwrap();
    f.io_write(0, 0x21, &[1]).unwrap_err();
    f.io_write(0, 0x20, &[0, 0, 1, 0]).unwrap();
    f.io_write(0, 0x28, &[0, 0, 2, 0]).unwrap();
    f.io_write(0, 0x30, &[0, 0, 3, 0]).unwrap();
    f.io_write(0, 0x1C, &[1, 0]).unwrap();
    f.io_write(0, 0x14, &[0xF]).unwrap();
    f.io_write(0, 0x3000, &[0, 0]).unwrap();
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 2))]
    /// Rings full of noise near valid values: nothing panics, nothing runs for ever, a reset helps.
    #[test]
    fn hostile_rings(
        words in proptest::collection::vec((0u64..0x800, 0u64..6, any::<u32>()), 0..200),
        heads in proptest::collection::vec(any::<u16>(), 1..40),
        features in prop_oneof![Just(0u64), Just(ALL)],
        next in any::<u16>(),
    ) {
        let mut board = Board::new();
        let disk = MemoryDisk::new();
        let function = board.plug(blk(&disk));
        let (driver, mut rings) = set_up(&board, features, true);
        for (at, kind, value) in words {
            let near = match kind {
                0 => u64::from(value),
                1 => u64::from(value & 0x7),
                2 => DATA | u64::from(value & 0xFFFF),
                3 => RINGS + u64::from(value & 0xFFF),
                4 => u64::from(value) << 32 | 0xFFFF_FFFF,
                _ => u64::from(value & 0x1FF) << 48 | 512,
            };
            board.ram.store(RINGS + 8 * at, near);
        }
        for head in heads {
            rings.publish(head % 80);
            rings.kick();
            board.settle();
        }
        board.ram.store(rings.avail + 2, next);
        rings.kick();
        board.settle();
        prop_assert!(function.lock().quiesce().is_ready());
        let saved = function.lock().save().unwrap();
        function.lock().restore(&saved).unwrap();
        function.lock().resume();
        board.settle();
        let (_, mut rings) = set_up(&board, ALL, true);
        issue(&board, &mut rings, 0, READ, 0, &[(DATA, 512, true)]);
        prop_assert_eq!((status(&board, 0), driver.status()), (0, 0xF));
    }

    /// Any sequence of register accesses at the BARs.
    #[test]
    fn hostile_registers(ops in proptest::collection::vec((0u64..0x3010, 0usize..4, any::<u64>(), any::<bool>()), 1..300)) {
        let mut board = Board::new();
        board.plug(blk(&MemoryDisk::new()));
        let driver = Driver::probe(&board, 1);
        for (offset, width, value, low) in ops {
            let bytes = 1usize << width;
            let offset = if low { offset & 0x3F } else { offset } & !(bytes as u64 - 1);
            board.write(driver.at.common + offset, bytes, value);
            board.read(driver.at.common + offset, bytes);
            board.settle();
        }
        let (_, mut rings) = set_up(&board, ALL, true);
        issue(&board, &mut rings, 0, READ, 0, &[(DATA, 512, true)]);
        prop_assert_eq!(status(&board, 0), 0);
    }
}
