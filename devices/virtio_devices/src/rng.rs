//! virtio-rng: entropy (VIRTIO 1.2, section 5.4). One queue, no configuration, no state.

use crate::backend::EntropySource;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use device::{RestoreError, StateBlob, Waker};
use saved_state::{FieldWriter, Fields, SavedState};
use sync::Mutex;
use virtio::{Activation, DeviceType, Queue, QueueRunner, QueueState, Runner, Signals, VirtioDevice};

const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets; the driver asks again for more.
const MAX_BYTES: usize = 4096;

type Source = Arc<Mutex<Box<dyn EntropySource>>>;

/// See the module's header.
pub struct Rng {
    source: Source,
}

impl Rng {
    /// Entropy of `source`.
    pub fn new(source: Box<dyn EntropySource>) -> Self {
        Self { source: Arc::new(Mutex::new(source)) }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::ENTROPY
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE]
    }
    fn config_read(&self, _: usize, _: &mut [u8]) {}
    fn config_write(&mut self, _: usize, _: &[u8]) {}
    fn start(&mut self, activation: Activation) -> Vec<Runner> {
        let Activation { queues, waker, .. } = activation;
        let run = |queue: Queue| -> Runner {
            let source = self.source.clone();
            let waker = waker.clone();
            let queues = alloc::vec![queue.index()];
            Runner { queues, run: Box::new(RngRunner { source, queue, waker, quiesced: false }) }
        };
        queues.into_iter().map(run).collect()
    }
    fn poll(&mut self, _: &dyn Signals) {}
    fn reset(&mut self) {}
    fn save(&self) -> StateBlob {
        saved_state::to_blob(&Nothing)
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        saved_state::from_blob::<Nothing>(blob).map(|_| ())
    }
}

struct RngRunner {
    source: Source,
    queue: Queue,
    waker: Waker,
    quiesced: bool,
}

impl RngRunner {
    fn run(&mut self) {
        if self.quiesced {
            return;
        }
        self.queue.disarm();
        let mut budget = self.queue.size();
        loop {
            if budget == 0 {
                self.waker.wake();
                break;
            }
            budget -= 1;
            match self.queue.pop() {
                Some(chain) => {
                    let mut writer = chain.writer(self.queue.dma());
                    let mut bytes = [0; MAX_BYTES];
                    let part = &mut bytes[..writer.remaining().min(MAX_BYTES as u64) as usize];
                    self.source.lock().fill(part);
                    let written = writer.write(part) as u32;
                    self.queue.push(chain.head(), written);
                }
                None if self.queue.arm() => {}
                None => break,
            }
        }
        self.queue.signal();
    }
}

impl QueueRunner for RngRunner {
    fn kick(&mut self, _: u16) {
        self.run();
    }
    fn poll(&mut self) {
        self.run();
    }
    fn quiesce(&mut self) -> Poll<()> {
        self.quiesced = true;
        Poll::Ready(())
    }
    fn resume(&mut self) {
        self.quiesced = false;
        self.run();
    }
    fn queue_states(&self) -> Vec<(u16, QueueState)> {
        alloc::vec![(self.queue.index(), self.queue.state([]))]
    }
}

/// The source has no state that the guest could know.
struct Nothing;

impl SavedState for Nothing {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
    fn encode(&self, _: &mut FieldWriter) {}
    fn decode(_: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self)
    }
}
