//! Disks of guests: a store that answers at once, behind virtio-blk.
//!
//! However much a request asks for, it does not hold a processor for long: what is more than a step goes on when the device
//! is polled, and other requests wait until then.
//!
//! Called by: a guest's virtio-blk device, through [`BlockBackend`]. `ground` makes the stores: [`RamDisk`] here, disks
//! of the machine elsewhere. Ranges are checked by the device; a store checks them once more.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use device::Waker;
use guest_memory::DmaSpace;
use sync::Mutex;
use virtio::Buffer;
use virtio_devices::{BlockBackend, BlockError, BlockInfo, BlockOp, BlockRequest, Busy, Completion};

/// Bytes that are moved at a time: a multiple of every sector size.
const PIECE_BYTES: usize = 64 << 10;

/// Bytes that are moved before others have their turn.
const STEP_BYTES: u64 = 1 << 20;

/// What holds a disk's bytes. Places and lengths are multiples of [`BlockInfo::block_bytes`].
pub trait Store: Send {
    /// What it is like.
    fn info(&self) -> BlockInfo;
    /// Fills `to` from byte `at` on.
    fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), BlockError>;
    /// Writes `from` from byte `at` on.
    fn write(&mut self, at: u64, from: &[u8]) -> Result<(), BlockError>;
    /// What was written before is durable afterwards.
    fn flush(&mut self) -> Result<(), BlockError>;
}

/// A store that outlives the device in front of it.
pub type SharedStore = Arc<Mutex<Box<dyn Store>>>;

impl Store for SharedStore {
    fn info(&self) -> BlockInfo {
        self.lock().info()
    }
    fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), BlockError> {
        self.lock().read(at, to)
    }
    fn write(&mut self, at: u64, from: &[u8]) -> Result<(), BlockError> {
        self.lock().write(at, from)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.lock().flush()
    }
}

/// See the module's header.
pub struct Disk {
    store: Box<dyn Store>,
    done: VecDeque<Completion>,
    waker: Option<Waker>,
    piece: Vec<u8>,
    /// What is under way.
    job: Option<Job>,
    /// Bytes that may be moved in this step.
    room: u64,
}

/// A request, its memory, and how many bytes of it are moved.
struct Job {
    request: BlockRequest,
    memory: DmaSpace,
    at: u64,
}

impl Disk {
    /// Of what `store` holds.
    pub fn new(store: Box<dyn Store>) -> Self {
        let (done, piece) = (VecDeque::new(), alloc::vec![0; PIECE_BYTES]);
        Self { store, done, waker: None, piece, job: None, room: STEP_BYTES }
    }

    /// Goes on with what is under way, as far as the step goes.
    fn work(&mut self) {
        let Some(mut job) = self.job.take() else { return };
        // The driver may have taken the bus away meanwhile.
        let result = if job.memory.is_enabled() { self.advance(&mut job) } else { Err(BlockError::Io) };
        match result {
            Ok(false) => self.job = Some(job),
            Ok(true) => self.done.push_back(Completion { id: job.request.id, result: Ok(()) }),
            Err(error) => self.done.push_back(Completion { id: job.request.id, result: Err(error) }),
        }
        if let Some(waker) = &self.waker {
            waker.wake();
        }
    }

    /// Moves pieces; whether all are.
    fn advance(&mut self, job: &mut Job) -> Result<bool, BlockError> {
        let bytes = match job.request.op {
            BlockOp::Read { .. } | BlockOp::Write { .. } => job.request.buffer_bytes(),
            BlockOp::WriteZeroes { bytes, .. } => bytes,
            BlockOp::Flush => return self.store.flush().map(|()| true),
            // A hint, offered because guests that come from a host may use it: the bytes stay.
            BlockOp::Discard { .. } => return Ok(true),
        };
        while job.at < bytes && self.room > 0 {
            let length = (bytes - job.at).min(PIECE_BYTES as u64);
            self.move_piece(job, length as usize)?;
            job.at += length;
            self.room = self.room.saturating_sub(length);
        }
        Ok(job.at == bytes)
    }

    /// Moves the next `length` bytes.
    fn move_piece(&mut self, job: &Job, length: usize) -> Result<(), BlockError> {
        let (at, ram, buffers) = (job.at, job.memory.ram(), &job.request.buffers);
        let piece = &mut self.piece[..length];
        match job.request.op {
            BlockOp::Read { offset } => {
                self.store.read(offset + at, piece)?;
                each_part(buffers, at, length, |place, part| {
                    ram.store_bytes(place, &piece[part.clone()]);
                    ram.note_write(place, part.len() as u64);
                });
                Ok(())
            }
            BlockOp::Write { offset } => {
                each_part(buffers, at, length, |place, part| ram.load_bytes(place, &mut piece[part]));
                self.store.write(offset + at, piece)
            }
            BlockOp::WriteZeroes { offset, .. } => {
                piece.fill(0);
                self.store.write(offset + at, piece)
            }
            BlockOp::Flush | BlockOp::Discard { .. } => Ok(()),
        }
    }
}

/// Calls `f` with the place in RAM, and the place in the piece, of each part of `at..at + len` of a transfer.
fn each_part(buffers: &[Buffer], mut at: u64, len: usize, mut f: impl FnMut(u64, Range<usize>)) {
    let mut done = 0;
    for buffer in buffers {
        let bytes = u64::from(buffer.len);
        let part = bytes.saturating_sub(at).min((len - done) as u64) as usize;
        if part > 0 {
            f(buffer.offset + at, done..done + part);
        }
        done += part;
        at = at.saturating_sub(bytes);
    }
}

impl BlockBackend for Disk {
    fn info(&self) -> BlockInfo {
        self.store.info()
    }

    fn set_waker(&mut self, waker: Waker) {
        // What a device before it asked for goes no further: its driver may use the memory for something else.
        self.job = None;
        self.waker = Some(waker);
    }

    fn submit(&mut self, request: BlockRequest, memory: &DmaSpace) -> Result<(), Busy> {
        if self.job.is_some() {
            return Err(Busy);
        }
        self.job = Some(Job { request, memory: memory.clone(), at: 0 });
        self.work();
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        if self.done.is_empty() {
            self.room = STEP_BYTES;
            self.work();
        }
        self.done.pop_front()
    }
}

/// Memory as a disk; what was written is gone with the machine.
pub struct RamDisk(&'static mut [u8]);

impl RamDisk {
    /// Of memory that is nobody else's.
    pub fn new(memory: &'static mut [u8]) -> Self {
        Self(memory)
    }

    fn range(&mut self, at: u64, bytes: usize) -> Result<&mut [u8], BlockError> {
        let start = usize::try_from(at).map_err(|_| BlockError::Io)?;
        let end = start.checked_add(bytes).ok_or(BlockError::Io)?;
        self.0.get_mut(start..end).ok_or(BlockError::Io)
    }
}

impl Store for RamDisk {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            bytes: self.0.len() as u64,
            read_only: false,
            block_bytes: 512,
            physical_block_bytes: 4096,
            discard: true,
            write_zeroes: true,
        }
    }
    fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), BlockError> {
        to.copy_from_slice(self.range(at, to.len())?);
        Ok(())
    }
    fn write(&mut self, at: u64, from: &[u8]) -> Result<(), BlockError> {
        self.range(at, from.len())?.copy_from_slice(from);
        Ok(())
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_memory::GuestRam;

    /// A disk of a MiB and a guest's memory of one.
    fn example() -> (Disk, DmaSpace) {
        let memory = std::boxed::Box::leak(std::vec![0u8; 1 << 20].into_boxed_slice());
        let space = DmaSpace::new(GuestRam::for_test(1 << 20));
        space.set_enabled(true);
        (Disk::new(Box::new(RamDisk::new(memory))), space)
    }

    fn ask(disk: &mut Disk, space: &DmaSpace, op: BlockOp, buffers: &[(u64, u32)]) -> Result<(), BlockError> {
        let buffers = buffers.iter().map(|(offset, len)| Buffer { offset: *offset, len: *len }).collect();
        disk.submit(BlockRequest { id: 7, op, buffers }, space).unwrap();
        let done = disk.next_completion().unwrap();
        assert_eq!((done.id, disk.next_completion()), (7, None));
        done.result
    }

    /// A disk of 8 MiB that counts what is written to it.
    #[derive(Clone, Default)]
    struct Counting(Arc<Mutex<u64>>);

    impl Store for Counting {
        fn info(&self) -> BlockInfo {
            BlockInfo { bytes: 8 << 20, ..RamDisk::new(&mut []).info() }
        }
        fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), BlockError> {
            Ok(())
        }
        fn write(&mut self, at: u64, from: &[u8]) -> Result<(), BlockError> {
            let mut written = self.0.lock();
            assert_eq!(at, *written, "one after the other");
            *written += from.len() as u64;
            Ok(())
        }
        fn flush(&mut self) -> Result<(), BlockError> {
            Ok(())
        }
    }

    #[test]
    fn a_long_request_lets_others_have_their_turn() {
        let (_, space) = example();
        let store = Counting::default();
        let mut disk = Disk::new(Box::new(store.clone()));
        let wakes = Arc::new(Mutex::new(0));
        let count = wakes.clone();
        disk.set_waker(Waker::new(move || *count.lock() += 1));
        let op = BlockOp::WriteZeroes { offset: 0, bytes: (5 << 20) + 512, unmap: false };
        let request = |id| BlockRequest { id, op, buffers: Arc::new([]) };
        disk.submit(request(1), &space).unwrap();
        assert!(disk.submit(request(2), &space).is_err(), "one at a time");
        let mut turns = 1;
        let done = loop {
            assert!(*store.0.lock() <= turns * STEP_BYTES, "turn {turns}");
            assert_eq!(*wakes.lock(), turns, "whoever waits is told");
            turns += 1;
            if let Some(done) = disk.next_completion() {
                break done;
            }
        };
        assert_eq!((done.id, done.result, turns, *store.0.lock()), (1, Ok(()), 6, (5 << 20) + 512));
        // Another driver: what the last one asked for goes no further.
        *store.0.lock() = 0;
        disk.submit(request(3), &space).unwrap();
        disk.set_waker(Waker::new(|| {}));
        assert_eq!((disk.next_completion(), *store.0.lock()), (None, STEP_BYTES));
    }

    #[test]
    fn many_requests_share_a_step() {
        let (_, space) = example();
        let store = Counting::default();
        let mut disk = Disk::new(Box::new(store.clone()));
        let half = STEP_BYTES / 2 + 512;
        for n in 0..2 {
            let op = BlockOp::WriteZeroes { offset: n * half, bytes: half, unmap: false };
            disk.submit(BlockRequest { id: n, op, buffers: Arc::new([]) }, &space).unwrap();
        }
        assert!(*store.0.lock() <= STEP_BYTES + PIECE_BYTES as u64);
        assert_eq!(disk.next_completion().map(|done| done.id), Some(0));
        assert_eq!(disk.next_completion().map(|done| done.id), Some(1));
    }

    #[test]
    fn what_is_written_is_read_in_other_pieces() {
        let (mut disk, space) = example();
        let bytes: Vec<u8> = (0..200_704u32).map(|n| ((n * 7) >> 3) as u8).collect();
        space.ram().store_bytes(100, &bytes);
        let written = [(100, 1), (101, 70_000), (70_101, 130_703)];
        ask(&mut disk, &space, BlockOp::Write { offset: 512 }, &written).unwrap();
        ask(&mut disk, &space, BlockOp::Read { offset: 512 }, &[(300_000, 200_000), (510_000, 704)]).unwrap();
        let mut back = std::vec![0; bytes.len()];
        space.ram().load_bytes(300_000, &mut back[..200_000]);
        space.ram().load_bytes(510_000, &mut back[200_000..]);
        assert_eq!(back, bytes);
        let zeroes = BlockOp::WriteZeroes { offset: 1024, bytes: 512, unmap: false };
        ask(&mut disk, &space, zeroes, &[]).unwrap();
        ask(&mut disk, &space, BlockOp::Read { offset: 512 }, &[(0, 1024)]).unwrap();
        space.ram().load_bytes(0, &mut back[..1024]);
        assert_eq!(back[..512], bytes[..512]);
        assert_eq!(back[512..1024], [0; 512]);
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let (mut disk, space) = example();
        let beyond = BlockOp::Read { offset: (1 << 20) - 512 };
        assert_eq!(ask(&mut disk, &space, beyond, &[(0, 1024)]), Err(BlockError::Io));
        assert_eq!(ask(&mut disk, &space, BlockOp::Flush, &[]), Ok(()));
        space.set_enabled(false);
        assert_eq!(ask(&mut disk, &space, BlockOp::Read { offset: 0 }, &[(0, 512)]), Err(BlockError::Io));
    }
}
