//! What the devices need from the host: implemented by the host's side (files, TAP, user-mode network,
//! terminals) and by tests. No call may block for long: what takes time is done by the backend's own worker,
//! which calls the [`Waker`] when the device has something to fetch.

use alloc::sync::Arc;
use device::Waker;
use guest_memory::DmaSpace;
use virtio::Buffer;

/// The backend can take no more now. It calls its waker when it can again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the backend is busy")]
pub struct Busy;

/// Sector of the virtio-blk protocol in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// What a disk is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Capacity in bytes; what does not fill a sector of 512 bytes is out of reach.
    pub bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Logical block size in bytes: a power of two, at least 512.
    pub block_bytes: u32,
    /// Size of a physical block in bytes: a power of two, at least `block_bytes`.
    pub physical_block_bytes: u32,
    /// Whether `Discard` does anything.
    pub discard: bool,
    /// Whether `WriteZeroes` is taken.
    pub write_zeroes: bool,
}

/// One operation on a disk; ranges in bytes, inside the disk and not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOp {
    /// Fills the buffers from `offset` on.
    Read {
        /// First byte.
        offset: u64,
    },
    /// Writes the buffers from `offset` on.
    Write {
        /// First byte.
        offset: u64,
    },
    /// Makes everything that completed before durable.
    Flush,
    /// The range's content is no longer needed.
    Discard {
        /// First byte.
        offset: u64,
        /// Length.
        bytes: u64,
    },
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Length.
        bytes: u64,
        /// Its space may be given back.
        unmap: bool,
    },
}

/// A request to a disk.
#[derive(Clone, Debug)]
pub struct BlockRequest {
    /// Comes back in the [`Completion`]; never used twice.
    pub id: u64,
    /// What to do.
    pub op: BlockOp,
    /// Guest memory of `Read` and `Write`: their sum is the length of the operation.
    pub buffers: Arc<[Buffer]>,
}

impl BlockRequest {
    /// Sum of the buffers.
    pub fn buffer_bytes(&self) -> u64 {
        self.buffers.iter().map(|b| u64::from(b.len)).sum()
    }
}

/// Why a disk request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The host could not read or write.
    #[error("input/output error")]
    Io,
    /// The host's storage is full.
    #[error("no space left")]
    NoSpace,
    /// The disk cannot do this.
    #[error("operation not supported")]
    Unsupported,
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Of which request.
    pub id: u64,
    /// How it ended.
    pub result: Result<(), BlockError>,
}

/// A disk. Requests may complete in any order; each completes exactly once.
pub trait BlockBackend: Send {
    /// What it is like. A change of `bytes` (a resize) is announced by the waker.
    fn info(&self) -> BlockInfo;
    /// Called before the first request, and again when the waker changes.
    fn set_waker(&mut self, waker: Waker);
    /// Takes a request. `mem` gives access to the buffers: as copies, or as `mem.ram()`'s span. After
    /// `Busy` the device offers it again when the waker was called or something completed.
    fn submit(&mut self, request: BlockRequest, mem: &DmaSpace) -> Result<(), Busy>;
    /// A request that ended, if any. Until it is fetched here the request counts as in flight.
    fn next_completion(&mut self) -> Option<Completion>;
}

/// Longest Ethernet frame that devices and backends exchange (without FCS).
pub const MAX_FRAME_BYTES: usize = 65_550;

/// A network: frames out and in.
pub trait NetBackend: Send {
    /// Called before the first frame, and again when the waker changes. The backend wakes when `receive`
    /// has something after it had nothing, when it takes frames again after `Busy`, and when the link
    /// changes.
    fn set_waker(&mut self, waker: Waker);
    /// Sends an Ethernet frame; `Busy`: offer it again after a wake.
    fn send(&mut self, frame: &[u8]) -> Result<(), Busy>;
    /// The next frame's length, its bytes in `buf` (a longer frame is cut off or dropped).
    fn receive(&mut self, buf: &mut [u8]) -> Option<usize>;
    /// Whether the cable is plugged.
    fn link_up(&self) -> bool {
        true
    }
}

/// The other end of a console port: bytes out and in.
pub trait ConsoleBackend: Send {
    /// Called before the first byte, and again when the waker changes. The backend wakes when `read` has
    /// something after it had nothing, and when it takes bytes again after it took none.
    fn set_waker(&mut self, waker: Waker);
    /// Takes bytes from the guest; returns how many (0: busy).
    fn write(&mut self, data: &[u8]) -> usize;
    /// Gives bytes to the guest; returns how many.
    fn read(&mut self, buf: &mut [u8]) -> usize;
    /// Columns and rows, if it is a terminal.
    fn size(&self) -> Option<(u16, u16)> {
        None
    }
}

/// Where random bytes come from.
pub trait EntropySource: Send {
    /// Fills `buf` with bytes fit for keys.
    fn fill(&mut self, buf: &mut [u8]);
}
