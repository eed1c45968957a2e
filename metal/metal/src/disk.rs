//! Disks of guests: a store that answers at once, behind virtio-blk.
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
}

impl Disk {
    /// Of what `store` holds.
    pub fn new(store: Box<dyn Store>) -> Self {
        Self { store, done: VecDeque::new(), waker: None, piece: alloc::vec![0; PIECE_BYTES] }
    }

    fn perform(&mut self, request: &BlockRequest, memory: &DmaSpace) -> Result<(), BlockError> {
        let bytes = request.buffer_bytes();
        match request.op {
            BlockOp::Read { offset } => self.in_pieces(bytes, |store, at, piece| {
                store.read(offset + at, piece)?;
                let ram = memory.ram();
                each_part(&request.buffers, at, piece.len(), |place, part| {
                    ram.store_bytes(place, &piece[part.clone()]);
                    ram.note_write(place, part.len() as u64);
                });
                Ok(())
            }),
            BlockOp::Write { offset } => self.in_pieces(bytes, |store, at, piece| {
                let ram = memory.ram();
                each_part(&request.buffers, at, piece.len(), |place, part| {
                    ram.load_bytes(place, &mut piece[part]);
                });
                store.write(offset + at, piece)
            }),
            BlockOp::WriteZeroes { offset, bytes, .. } => self.in_pieces(bytes, |store, at, piece| {
                piece.fill(0);
                store.write(offset + at, piece)
            }),
            BlockOp::Flush => self.store.flush(),
            // A hint, offered because guests that come from a host may use it: the bytes stay.
            BlockOp::Discard { .. } => Ok(()),
        }
    }

    /// Calls `f` with each piece of `bytes`: where it starts, and room for it.
    fn in_pieces(
        &mut self,
        bytes: u64,
        mut f: impl FnMut(&mut dyn Store, u64, &mut [u8]) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let length = (bytes - at).min(PIECE_BYTES as u64) as usize;
            f(&mut *self.store, at, &mut self.piece[..length])?;
        }
        Ok(())
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
        self.waker = Some(waker);
    }

    fn submit(&mut self, request: BlockRequest, memory: &DmaSpace) -> Result<(), Busy> {
        let result = if memory.is_enabled() { self.perform(&request, memory) } else { Err(BlockError::Io) };
        self.done.push_back(Completion { id: request.id, result });
        if let Some(waker) = &self.waker {
            waker.wake();
        }
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
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
