//! Moves the bytes of one console port.
//!
//! Input stays in the backend until the driver has buffers and (with control queues) a program has the port
//! open. Output stays in the queue while the backend is busy; how much of the first chain went out already is
//! part of the saved state, so that nothing is printed twice.

use super::{Backend, PortState, Shared};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use device::Waker;
use sync::Mutex;
use virtio::{Chain, Queue, QueueRunner, QueueState};

/// Bytes that are copied at a time.
const CHUNK_BYTES: usize = 4096;
/// Bytes that one call sends at most.
const SEND_BUDGET: usize = 256 << 10;
/// What a chain costs of that besides its bytes.
const CHAIN_COST: usize = 64;

/// What a port's runner works with.
pub(super) struct Wiring {
    pub number: usize,
    pub backend: Backend,
    pub shared: Arc<Mutex<Shared>>,
    /// Opening and closing is told over the control queues.
    pub controlled: bool,
    pub rx: Queue,
    pub tx: Queue,
    pub waker: Waker,
}

pub(super) struct PortRunner {
    w: Wiring,
    quiesced: bool,
}

impl PortRunner {
    pub fn new(w: Wiring) -> Self {
        Self { w, quiesced: false }
    }

    fn state(&self) -> PortState {
        self.w.shared.lock().ports.get(self.w.number).copied().unwrap_or_default()
    }
    fn set_sent(&self, sent: u32) {
        if let Some(state) = self.w.shared.lock().ports.get_mut(self.w.number) {
            state.sent = sent;
        }
    }

    /// Gives input to the driver.
    fn receive(&mut self) {
        if self.quiesced || (self.w.controlled && !self.state().guest_open) {
            return;
        }
        let rx = &mut self.w.rx;
        rx.disarm();
        let mut budget = rx.size();
        let mut bytes = [0; CHUNK_BYTES];
        loop {
            if budget == 0 {
                self.w.waker.wake();
                break;
            }
            budget -= 1;
            match rx.pop() {
                Some(chain) => {
                    let mut writer = chain.writer(rx.dma());
                    let room = writer.remaining().min(CHUNK_BYTES as u64) as usize;
                    if room == 0 {
                        // An input buffer that cannot be written.
                        rx.fail();
                        break;
                    }
                    let n = self.w.backend.lock().read(&mut bytes[..room]).min(room);
                    if n == 0 {
                        rx.unpop(&chain);
                        break;
                    }
                    let written = writer.write(&bytes[..n]) as u32;
                    rx.push(chain.head(), written);
                }
                None if rx.arm() => {}
                None => break,
            }
        }
        rx.signal();
    }

    /// Takes output from the driver.
    fn transmit(&mut self) {
        if self.quiesced {
            return;
        }
        self.w.tx.disarm();
        let mut budget = SEND_BUDGET;
        while budget != 0 {
            let Some(chain) = self.w.tx.pop() else {
                if self.w.tx.arm() {
                    continue;
                }
                break;
            };
            let (sent, is_whole) = self.send(&chain, self.state().sent, &mut budget);
            if !is_whole {
                self.set_sent(sent);
                self.w.tx.unpop(&chain);
                break;
            }
            self.set_sent(0);
            self.w.tx.push(chain.head(), 0);
            // An empty chain is work, too.
            budget = budget.saturating_sub(CHAIN_COST);
        }
        if budget == 0 {
            self.w.waker.wake();
        }
        self.w.tx.signal();
    }

    /// Sends a chain from byte `sent` on; how far it came, and whether that is all.
    fn send(&self, chain: &Chain, mut sent: u32, budget: &mut usize) -> (u32, bool) {
        let mut reader = chain.reader(self.w.tx.dma());
        reader.take(sent.into());
        let mut bytes = [0; CHUNK_BYTES];
        while *budget != 0 && reader.remaining() != 0 {
            let n = reader.read(&mut bytes);
            let taken = self.w.backend.lock().write(&bytes[..n]).min(n);
            *budget = budget.saturating_sub(taken);
            sent += taken as u32;
            if taken < n {
                return (sent, false);
            }
        }
        (sent, reader.remaining() == 0)
    }
}

impl QueueRunner for PortRunner {
    fn kick(&mut self, queue: u16) {
        if queue == self.w.rx.index() {
            self.receive();
        } else {
            self.transmit();
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
        [&self.w.rx, &self.w.tx].map(|q| (q.index(), q.state([]))).into()
    }
}
