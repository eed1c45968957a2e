//! Serves the queue of a disk.
//!
//! Chains go to the backend as far as it takes them and the cap allows; completions come back in any order
//! when the waker fires. Requests that the backend was too busy for are *parked* and offered first next time;
//! no new chain overtakes them. Heads in flight are saved and reissued after a restore: that is only safe for what
//! never reached the backend, so `quiesce` waits for the rest.

use super::request::{self, Parsed, Status};
use super::{BlkConfig, MAX_RANGE_SECTORS, QUEUE_SIZE, Shared, feature};
use crate::backend::{BlockError, BlockOp, BlockRequest, Completion};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use device::Waker;
use sync::Mutex;
use virtio::{Activation, Buffer, Chain, Queue, QueueRunner, QueueState};

const SERIAL_BYTES: usize = 20;

/// A request on its way.
struct InFlight {
    chain: Chain,
    op: BlockOp,
    buffers: Arc<[Buffer]>,
}

/// See the module's header.
pub struct BlkRunner {
    shared: Arc<Mutex<Shared>>,
    serial: [u8; SERIAL_BYTES],
    max_in_flight: usize,
    /// The driver knows no flush: every write is followed by one of ours.
    write_through: bool,
    queue: Queue,
    waker: Waker,
    in_flight: BTreeMap<u64, InFlight>,
    parked: VecDeque<InFlight>,
    quiesced: bool,
}

impl BlkRunner {
    pub fn new(shared: Arc<Mutex<Shared>>, config: &BlkConfig, a: Activation) -> Self {
        let Activation { features, dma, queues, signals, waker } = a;
        let mut serial = [0; SERIAL_BYTES];
        let n = config.serial.len().min(SERIAL_BYTES);
        serial[..n].copy_from_slice(&config.serial.as_bytes()[..n]);
        let max_in_flight = match config.max_in_flight {
            0 => QUEUE_SIZE,
            n => n.min(QUEUE_SIZE),
        };
        let inert = || Queue::new(0, None, 0, dma.clone(), signals.clone(), QueueState::default());
        Self {
            shared,
            serial,
            max_in_flight: max_in_flight.into(),
            write_through: features & feature::FLUSH == 0,
            queue: queues.into_iter().next().unwrap_or_else(inert),
            waker,
            in_flight: BTreeMap::new(),
            parked: VecDeque::new(),
            quiesced: false,
        }
    }

    /// Takes chains until there are none, the backend is busy, or one ring's worth is done.
    fn run(&mut self) {
        if self.quiesced {
            return;
        }
        self.queue.disarm();
        let mut budget = self.queue.size();
        loop {
            if !self.unpark() || self.in_flight.len() >= self.max_in_flight {
                break;
            }
            if budget == 0 {
                // The driver adds as fast as we take: let others have their turn.
                self.waker.wake();
                break;
            }
            budget -= 1;
            match self.queue.pop() {
                Some(chain) => self.begin(chain),
                None if self.queue.arm() => {}
                None => break,
            }
        }
        self.queue.signal();
    }

    /// Offers the parked requests again; `false` if any stays parked.
    fn unpark(&mut self) -> bool {
        while let Some(request) = self.parked.pop_front() {
            if let Some(busy) = self.submit(request) {
                self.parked.push_front(busy);
                return false;
            }
        }
        true
    }

    fn begin(&mut self, chain: Chain) {
        let info = self.shared.lock().info;
        match request::parse(&chain, self.queue.dma(), &info, MAX_RANGE_SECTORS) {
            Parsed::Broken => self.queue.fail(),
            Parsed::Done(status) => self.finish(&chain, 0, status),
            Parsed::Id => {
                let dma = self.queue.dma();
                let room = request::data_in_bytes(&chain, dma).unwrap_or(0).min(SERIAL_BYTES as u64) as usize;
                let written = chain.writer(dma).write(&self.serial[..room]) as u32;
                self.finish(&chain, written, Status::Ok);
            }
            Parsed::Backend { op, buffers } => {
                if let Some(busy) = self.submit(InFlight { chain, op, buffers }) {
                    self.parked.push_back(busy);
                }
            }
        }
    }

    /// Offers a request to the backend; gives it back if that is busy.
    fn submit(&mut self, request: InFlight) -> Option<InFlight> {
        let mut shared = self.shared.lock();
        let id = shared.next_id;
        let offer = BlockRequest { id, op: request.op, buffers: request.buffers.clone() };
        if shared.backend.submit(offer, self.queue.dma()).is_err() {
            return Some(request);
        }
        shared.next_id += 1;
        self.in_flight.insert(id, request);
        None
    }

    /// Fetches what completed.
    fn complete(&mut self) {
        loop {
            let completion = self.shared.lock().backend.next_completion();
            let Some(Completion { id, result }) = completion else { break };
            // What an earlier runner asked for is nobody's now.
            let Some(mut request) = self.in_flight.remove(&id) else { continue };
            let is_write = matches!(request.op, BlockOp::Write { .. } | BlockOp::WriteZeroes { .. });
            if result.is_ok() && is_write && self.write_through {
                (request.op, request.buffers) = (BlockOp::Flush, Arc::new([]));
                self.parked.push_back(request);
                continue;
            }
            let status = match result {
                Ok(()) => Status::Ok,
                Err(BlockError::Unsupported) => Status::Unsupported,
                Err(BlockError::Io | BlockError::NoSpace) => Status::IoError,
            };
            let mut written = 0;
            if let BlockOp::Read { .. } = request.op {
                let ram = self.queue.dma().ram();
                for buffer in request.buffers.iter() {
                    ram.note_write(buffer.offset, u64::from(buffer.len));
                    written += buffer.len;
                }
            }
            self.finish(&request.chain, written, status);
        }
        if !self.quiesced {
            self.unpark();
        }
        self.queue.signal();
    }

    /// Writes the status and gives the chain back; `written` bytes of data came before it.
    fn finish(&mut self, chain: &Chain, written: u32, status: Status) {
        let dma = self.queue.dma();
        let mut writer = chain.writer(dma);
        let data = writer.remaining().saturating_sub(1);
        writer.take(data);
        writer.write(&[status as u8]);
        // The used length covers everything up to the last byte written.
        let used = if u64::from(written) == data { written.saturating_add(1) } else { written.max(1) };
        self.queue.push(chain.head(), used);
    }
}

impl QueueRunner for BlkRunner {
    fn kick(&mut self, _: u16) {
        self.run();
        // A backend that answers at once saves us the way through the waker.
        self.complete();
    }
    fn poll(&mut self) {
        self.complete();
        self.run();
    }
    fn quiesce(&mut self) -> Poll<()> {
        self.quiesced = true;
        self.complete();
        if self.in_flight.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }
    fn resume(&mut self) {
        self.quiesced = false;
        self.run();
    }
    fn queue_states(&self) -> Vec<(u16, QueueState)> {
        let heads = self.in_flight.values().chain(&self.parked).map(|r| r.chain.head());
        alloc::vec![(self.queue.index(), self.queue.state(heads))]
    }
}
