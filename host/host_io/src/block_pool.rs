//! Worker threads that carry out block requests against a store, so that neither a vCPU nor the event loop waits for a disk.
//!
//! Called by: `vmm`, which puts virtio-blk's backend on top: a request comes in with a token of the caller's choice and
//! its buffer, the completion gives both back.
//!
//! Invariants:
//! - Every accepted request completes exactly once. `submit` and `next_completion` never wait for I/O.
//! - At most `depth` requests are accepted and not yet completed by a worker; one more is `Busy` and comes back whole.
//! - `wake` is called after a completion is queued, unless one was waiting already that nobody has taken.
//! - Requests run concurrently and in any order, as VIRTIO 1.2 §5.2.6 allows; a flush covers every write that completed
//!   before the flush was submitted.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use guest_memory::DmaSpace;

use crate::block_store::BlockStore;

/// Data moves between store and buffer in pieces of at most this size.
const BOUNCE_BYTES: usize = 256 << 10;

/// Memory that a request reads from or writes to; need not be contiguous.
pub trait IoBuffer: Send + 'static {
    /// Its length in bytes.
    fn len(&self) -> u64;
    /// Whether there is nothing to transfer.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Copies `to.len()` bytes from position `at` out of the buffer.
    fn copy_out(&self, at: u64, to: &mut [u8]) -> Result<(), BufferGone>;
    /// Copies `from` into the buffer at position `at`.
    fn copy_in(&mut self, at: u64, from: &[u8]) -> Result<(), BufferGone>;
}

/// The buffer cannot be accessed (any more): a guest that turned bus mastering off, or gave a bad address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request's buffer is not accessible")]
pub struct BufferGone;

impl IoBuffer for Vec<u8> {
    fn len(&self) -> u64 {
        self.len() as u64
    }

    fn copy_out(&self, at: u64, to: &mut [u8]) -> Result<(), BufferGone> {
        let from = usize::try_from(at).ok().and_then(|at| self.get(at..at.checked_add(to.len())?));
        to.copy_from_slice(from.ok_or(BufferGone)?);
        Ok(())
    }

    fn copy_in(&mut self, at: u64, from: &[u8]) -> Result<(), BufferGone> {
        let to = usize::try_from(at).ok().and_then(|at| self.get_mut(at..at.checked_add(from.len())?));
        to.ok_or(BufferGone)?.copy_from_slice(from);
        Ok(())
    }
}

/// Pieces of guest memory, in the order of the transfer, as a descriptor chain gives them.
#[derive(Clone, Debug)]
pub struct GuestSpans {
    memory: DmaSpace,
    /// Guest address and length of each piece.
    spans: Vec<(u64, u64)>,
}

impl GuestSpans {
    /// Spans of `memory` as (guest address, length). They are checked when they are accessed.
    pub fn new(memory: DmaSpace, spans: Vec<(u64, u64)>) -> GuestSpans {
        GuestSpans { memory, spans }
    }

    /// Calls `f` with guest address and place in the transfer for each piece of `at..at + len`.
    fn pieces(
        &self,
        mut at: u64,
        len: usize,
        mut f: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), BufferGone>,
    ) -> Result<(), BufferGone> {
        let mut done = 0;
        for &(gpa, span) in &self.spans {
            if done == len {
                break;
            }
            if at >= span {
                at -= span;
                continue;
            }
            let piece = (span - at).min((len - done) as u64) as usize;
            f(gpa.checked_add(at).ok_or(BufferGone)?, done..done + piece)?;
            done += piece;
            at = 0;
        }
        if done == len { Ok(()) } else { Err(BufferGone) }
    }
}

impl IoBuffer for GuestSpans {
    fn len(&self) -> u64 {
        self.spans.iter().fold(0, |sum: u64, (_, len)| sum.saturating_add(*len))
    }

    fn copy_out(&self, at: u64, to: &mut [u8]) -> Result<(), BufferGone> {
        let len = to.len();
        self.pieces(at, len, |gpa, piece| self.memory.read(gpa, &mut to[piece]).map_err(|_| BufferGone))
    }

    fn copy_in(&mut self, at: u64, from: &[u8]) -> Result<(), BufferGone> {
        self.pieces(at, from.len(), |gpa, piece| self.memory.write(gpa, &from[piece]).map_err(|_| BufferGone))
    }
}

/// What a request asks for. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOp {
    /// Disk to buffer.
    Read {
        /// Where on the disk.
        offset: u64,
    },
    /// Buffer to disk.
    Write {
        /// Where on the disk.
        offset: u64,
    },
    /// Make completed writes durable.
    Flush,
    /// The range is not needed any more.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// The range shall read as zero.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether its space may go back to the host.
        may_unmap: bool,
    },
}

/// One request: what to do, with which memory, and the caller's name for it.
#[derive(Debug)]
pub struct BlockRequest<T, B> {
    /// Given back with the completion.
    pub token: T,
    /// What to do.
    pub op: BlockOp,
    /// The memory of a read or write; given back with the completion.
    pub buffer: B,
}

/// Why a request failed; a guest sees VIRTIO_BLK_S_IOERR for either.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The store refused or failed.
    #[error("disk: {0}")]
    Store(#[from] io::Error),
    /// The memory could not be reached.
    #[error(transparent)]
    Buffer(#[from] BufferGone),
}

/// A finished request.
#[derive(Debug)]
pub struct BlockCompletion<T, B> {
    /// The request's token.
    pub token: T,
    /// The request's memory.
    pub buffer: B,
    /// How it went.
    pub result: Result<(), BlockError>,
}

/// How many threads, and how many requests at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Threads, at least one.
    pub workers: usize,
    /// Requests accepted and not completed, at least one.
    pub depth: usize,
}

impl Default for PoolConfig {
    fn default() -> PoolConfig {
        PoolConfig { workers: 4, depth: 256 }
    }
}

/// The pool; dropping it completes what was accepted (nobody is woken for it any more) and ends the threads.
pub struct BlockPool<T, B> {
    shared: Arc<Shared<T, B>>,
    threads: Vec<JoinHandle<()>>,
    depth: usize,
}

impl<T, B> fmt::Debug for BlockPool<T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workers = self.threads.len();
        f.debug_struct("BlockPool").field("workers", &workers).field("depth", &self.depth).finish()
    }
}

struct Shared<T, B> {
    state: Mutex<State<T, B>>,
    work: Condvar,
    idle: Condvar,
    wake: Box<dyn Fn() + Send + Sync>,
}

struct State<T, B> {
    store: Arc<dyn BlockStore>,
    queued: VecDeque<BlockRequest<T, B>>,
    completed: VecDeque<BlockCompletion<T, B>>,
    running: usize,
    ending: bool,
}

impl<T: Send + 'static, B: IoBuffer> BlockPool<T, B> {
    /// Starts the workers; `wake` tells the caller to look for completions.
    pub fn start(
        store: Arc<dyn BlockStore>,
        config: PoolConfig,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> io::Result<BlockPool<T, B>> {
        let state =
            State { store, queued: VecDeque::new(), completed: VecDeque::new(), running: 0, ending: false };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), work: Condvar::new(), idle: Condvar::new(), wake });
        let mut pool = BlockPool { shared, threads: Vec::new(), depth: config.depth.max(1) };
        for i in 0..config.workers.max(1) {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new().name(format!("block-{i}"));
            pool.threads.push(thread.spawn(move || {
                jail::enter(jail::Thread::Disk, &[]);
                shared.work();
            })?);
        }
        Ok(pool)
    }

    /// Accepts a request, or gives it back when the pool is full; a completion (and its `wake`) will make room.
    pub fn submit(&self, request: BlockRequest<T, B>) -> Result<(), BlockRequest<T, B>> {
        let mut state = self.shared.lock();
        if state.queued.len() + state.running >= self.depth {
            return Err(request);
        }
        state.queued.push_back(request);
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }

    /// A finished request, if there is one.
    pub fn next_completion(&self) -> Option<BlockCompletion<T, B>> {
        self.shared.lock().completed.pop_front()
    }

    /// Requests that no worker has completed yet.
    pub fn in_flight(&self) -> usize {
        let state = self.shared.lock();
        state.queued.len() + state.running
    }

    /// Waits until nothing is in flight; completions stay queued. For quiescing: the caller submits nothing meanwhile.
    pub fn wait_idle(&self) {
        drop(self.shared.lock_idle());
    }

    /// Waits until nothing is in flight and puts another store in place (an overlay); gives the former one back.
    pub fn replace_store(&self, store: Arc<dyn BlockStore>) -> Arc<dyn BlockStore> {
        std::mem::replace(&mut self.shared.lock_idle().store, store)
    }
}

impl<T, B> Drop for BlockPool<T, B> {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl<T, B> Shared<T, B> {
    fn lock(&self) -> MutexGuard<'_, State<T, B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_idle(&self) -> MutexGuard<'_, State<T, B>> {
        let busy = |s: &mut State<T, B>| !s.queued.is_empty() || s.running > 0;
        self.idle.wait_while(self.lock(), busy).unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, B: IoBuffer> Shared<T, B> {
    /// A worker's life.
    fn work(&self) {
        let mut bounce = vec![0u8; BOUNCE_BYTES];
        loop {
            let nothing = |s: &mut State<T, B>| s.queued.is_empty() && !s.ending;
            let mut state =
                self.work.wait_while(self.lock(), nothing).unwrap_or_else(PoisonError::into_inner);
            let Some(mut request) = state.queued.pop_front() else { return };
            state.running += 1;
            let store = state.store.clone();
            drop(state);

            let result = carry_out(&*store, request.op, &mut request.buffer, &mut bounce);
            drop(store);

            let mut state = self.lock();
            state.running -= 1;
            let first = state.completed.is_empty();
            let ending = state.ending;
            state.completed.push_back(BlockCompletion {
                token: request.token,
                buffer: request.buffer,
                result,
            });
            if state.running == 0 && state.queued.is_empty() {
                self.idle.notify_all();
            }
            drop(state);
            if first && !ending {
                (self.wake)();
            }
        }
    }
}

fn carry_out<B: IoBuffer>(
    store: &dyn BlockStore,
    op: BlockOp,
    buffer: &mut B,
    bounce: &mut [u8],
) -> Result<(), BlockError> {
    match op {
        BlockOp::Read { offset } => in_pieces(store, offset, buffer, bounce, |at, disk, piece, buffer| {
            store.read_at(piece, disk)?;
            Ok(buffer.copy_in(at, piece)?)
        }),
        BlockOp::Write { offset } => in_pieces(store, offset, buffer, bounce, |at, disk, piece, buffer| {
            buffer.copy_out(at, piece)?;
            Ok(store.write_at(piece, disk)?)
        }),
        BlockOp::Flush => Ok(store.flush()?),
        BlockOp::Discard { offset, len } => Ok(store.discard(offset, len)?),
        BlockOp::WriteZeroes { offset, len, may_unmap } => Ok(store.write_zeroes(offset, len, may_unmap)?),
    }
}

/// Walks a transfer in pieces of the bounce buffer, after checking that the whole of it lies on the disk.
fn in_pieces<B: IoBuffer>(
    store: &dyn BlockStore,
    offset: u64,
    buffer: &mut B,
    bounce: &mut [u8],
    mut step: impl FnMut(u64, u64, &mut [u8], &mut B) -> Result<(), BlockError>,
) -> Result<(), BlockError> {
    let len = buffer.len();
    crate::block_store::check_range(offset, len, store.size_bytes())?;
    let mut at = 0;
    while at < len {
        let piece = (len - at).min(bounce.len() as u64);
        step(at, offset + at, &mut bounce[..piece as usize], buffer)?;
        at += piece;
    }
    Ok(())
}
