//! Moves frames between the queues of a network card and its backend.
//!
//! Received frames wait in the backend, except one that was fetched and found no buffers (*held*): the driver
//! notifies when it has given some. Frames to send stay in the queue while the backend is busy. Neither
//! keeps a descriptor, so nothing is ever in flight.

use super::offload::{self, HEADER_BYTES};
use super::{Backend, RX, TX, feature};
use crate::backend::{Busy, MAX_FRAME_BYTES};
use alloc::vec::Vec;
use core::task::Poll;
use device::Waker;
use virtio::{Activation, Chain, Queue, QueueRunner, QueueState};

/// See the module's header.
pub struct NetRunner {
    backend: Backend,
    rx: Queue,
    tx: Queue,
    mergeable: bool,
    /// Room for a header and a frame.
    received: Vec<u8>,
    /// Header and frame in `received` that wait for buffers: their length.
    held: Option<usize>,
    sending: Vec<u8>,
    /// Pieces of the packet at the head of the send queue that the backend has taken already.
    sent_pieces: usize,
    waker: Waker,
    quiesced: bool,
}

enum Delivery {
    Done,
    NoBuffers,
}

impl NetRunner {
    pub fn new(backend: Backend, activation: Activation) -> Self {
        let Activation { features, dma, queues, signals, waker } = activation;
        let mut queues = queues.into_iter();
        let mut next = |index| {
            let inert = || Queue::new(index, None, 0, dma.clone(), signals.clone(), QueueState::default());
            queues.next().unwrap_or_else(inert)
        };
        Self {
            backend,
            rx: next(RX),
            tx: next(TX),
            mergeable: features & feature::MERGEABLE != 0,
            received: alloc::vec![0; HEADER_BYTES + MAX_FRAME_BYTES],
            held: None,
            sending: Vec::new(),
            sent_pieces: 0,
            waker,
            quiesced: false,
        }
    }

    /// Gives frames to the driver until there are none or no buffers, or one ring's worth is done.
    fn receive(&mut self) {
        if self.quiesced || self.rx.size() == 0 || self.rx.is_broken() {
            return;
        }
        self.rx.disarm();
        let mut budget = self.rx.size();
        loop {
            if budget == 0 {
                self.waker.wake();
                break;
            }
            budget -= 1;
            if self.held.is_none() {
                let frame = &mut self.received[HEADER_BYTES..];
                let Some(bytes) = self.backend.lock().receive(frame) else { break };
                self.held = Some(HEADER_BYTES + bytes.min(MAX_FRAME_BYTES));
            }
            match self.deliver() {
                Delivery::Done => self.held = None,
                Delivery::NoBuffers if self.rx.arm() => {}
                Delivery::NoBuffers => break,
            }
        }
        self.rx.signal();
    }

    /// Puts the held frame into buffers.
    fn deliver(&mut self) -> Delivery {
        let Some(total) = self.held else { return Delivery::Done };
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < total as u64 {
            let Some(chain) = self.rx.pop() else {
                for chain in chains.iter().rev() {
                    self.rx.unpop(chain);
                }
                return Delivery::NoBuffers;
            };
            let more = chain.writer(self.rx.dma()).remaining();
            room += more;
            chains.push(chain);
            if more == 0 {
                // A receive buffer that cannot be written.
                self.rx.fail();
                return Delivery::Done;
            }
            if !self.mergeable && room < total as u64 {
                // It will never fit: the frame is lost, the buffer is not.
                chains.iter().for_each(|chain| self.rx.unpop(chain));
                return Delivery::Done;
            }
        }
        let buffers = chains.len() as u16;
        self.received[..HEADER_BYTES].fill(0);
        self.received[HEADER_BYTES - 2..HEADER_BYTES].copy_from_slice(&buffers.to_le_bytes());
        let mut rest = &self.received[..total];
        let mut used = Vec::with_capacity(chains.len());
        for chain in &chains {
            let n = chain.writer(self.rx.dma()).write(rest);
            rest = &rest[n..];
            used.push((chain.head(), n as u32));
        }
        self.rx.push_all(&used);
        Delivery::Done
    }

    /// Sends what the driver gave until there is no more or the backend is busy, or one ring's worth is done.
    fn transmit(&mut self) {
        if self.quiesced {
            return;
        }
        self.tx.disarm();
        let mut budget = self.tx.size();
        loop {
            if budget == 0 {
                self.waker.wake();
                break;
            }
            budget -= 1;
            match self.tx.pop() {
                Some(chain) => {
                    if self.send(&chain).is_err() {
                        // The backend's waker brings us back.
                        self.tx.unpop(&chain);
                        break;
                    }
                    self.sent_pieces = 0;
                    self.tx.push(chain.head(), 0);
                }
                None if self.tx.arm() => {}
                None => break,
            }
        }
        self.tx.signal();
    }

    /// Sends one packet: as one frame, or as many. What makes no sense is dropped.
    fn send(&mut self, chain: &Chain) -> Result<(), Busy> {
        let mut reader = chain.reader(self.tx.dma());
        let Some(header) = reader.read_array::<HEADER_BYTES>() else { return Ok(()) };
        let bytes = reader.remaining();
        if bytes > MAX_FRAME_BYTES as u64 {
            return Ok(());
        }
        self.sending.resize(bytes as usize, 0);
        reader.read(&mut self.sending);
        let mut backend = self.backend.lock();
        let mut piece = 0;
        offload::frames(&header, &mut self.sending, |frame| {
            if piece >= self.sent_pieces {
                backend.send(frame)?;
                self.sent_pieces += 1;
            }
            piece += 1;
            Ok(())
        })
    }
}

impl QueueRunner for NetRunner {
    fn kick(&mut self, queue: u16) {
        match queue {
            RX => self.receive(),
            _ => self.transmit(),
        }
    }
    fn poll(&mut self) {
        self.transmit();
        self.receive();
    }
    fn quiesce(&mut self) -> Poll<()> {
        self.quiesced = true;
        Poll::Ready(())
    }
    fn resume(&mut self) {
        self.quiesced = false;
        self.poll();
    }
    fn queue_states(&self) -> Vec<(u16, QueueState)> {
        [&self.rx, &self.tx].map(|q| (q.index(), q.state([]))).into()
    }
}
