//! A virtqueue over memory that is all the driver's: rings that overlap, loop, lie outside of RAM, indices that jump.
//!
//! What must hold: every buffer lies in RAM and has bytes; a chain is bounded; a ring gives no more chains than it has
//! entries before some come back; a queue that broke stays broken; where it stands can be saved and restored.

use crate::edits::Number;
use arbitrary::Arbitrary;
use guest_memory::{DmaSpace, GuestRam};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use virtio::{Chain, Queue, QueueLayout, QueueState, Signals, feature};

const RAM: u64 = 0x1_0000;
/// Most that one script does.
const STEPS: usize = 512;

#[derive(Arbitrary, Debug)]
struct Script {
    size_log: u8,
    descriptors: Spot,
    available: Spot,
    used: Spot,
    event_idx: bool,
    indirect: bool,
    start: u16,
    steps: Vec<Step>,
}

/// An address.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Spot {
    /// Page-aligned, in RAM.
    Page(u8),
    /// In RAM.
    In(u16),
    /// Near its end.
    End(i8),
    Any(u64),
}

impl Spot {
    fn address(self) -> u64 {
        match self {
            Self::Page(n) => u64::from(n & 0xF) << 12,
            Self::In(n) => u64::from(n) & !1,
            Self::End(n) => RAM.wrapping_add_signed(n.into()),
            Self::Any(n) => n,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A descriptor of the table, or of another one.
    Describe {
        table: Option<Spot>,
        index: u8,
        address: Spot,
        len: Number,
        flags: u8,
        next: u8,
    },
    /// The next entry of the available ring.
    Publish(u16),
    /// The available index, as it pleases.
    Index(u16),
    Store {
        at: u16,
        value: u16,
    },
    Pop,
    Push {
        which: u8,
        written: u32,
    },
    Unpop,
    Read {
        which: u8,
        bytes: u16,
    },
    Write {
        which: u8,
        bytes: u16,
    },
    Signal,
    Arm,
    Disarm,
    Master(bool),
    Fail,
    SaveRestore,
}

#[derive(Default)]
struct Count(AtomicU32);

impl Signals for Count {
    fn used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self) {
        self.0.fetch_add(1, SeqCst);
    }
}

struct Rig {
    ram: GuestRam,
    dma: DmaSpace,
    layout: QueueLayout,
    features: u64,
    queue: Queue,
    resets: Arc<Count>,
    /// Chains that were popped and not pushed.
    held: Vec<Chain>,
}

/// Plays a script.
pub fn run(data: &[u8]) {
    let Some(script) = crate::script::<Script>(data) else { return };
    let mut rig = Rig::new(&script);
    for step in script.steps.iter().take(STEPS) {
        rig.play(step);
        rig.check();
    }
}

impl Rig {
    fn new(script: &Script) -> Self {
        let ram = GuestRam::for_test(RAM);
        let dma = DmaSpace::new(ram.clone());
        dma.set_enabled(true);
        let layout = QueueLayout {
            size: (1u32 << (script.size_log % 17)) as u16,
            descriptors: script.descriptors.address() & !0xF,
            available: script.available.address(),
            used: script.used.address() & !3,
        };
        let bit = |on: bool, feature: u64| if on { feature } else { 0 };
        let features = bit(script.event_idx, feature::RING_EVENT_IDX)
            | bit(script.indirect, feature::RING_INDIRECT_DESC);
        let resets = Arc::new(Count::default());
        let state = QueueState { next_available: script.start, next_used: script.start, in_flight: vec![] };
        let queue = Queue::new(0, Some(layout), features, dma.clone(), resets.clone(), state);
        let rig = Self { ram, dma, layout, features, queue, resets, held: Vec::new() };
        rig.put(layout.available.wrapping_add(2), script.start);
        rig
    }

    fn put<T: guest_memory::Word>(&self, at: u64, value: T) {
        if self.ram.offset(at, T::BYTES.into()).is_some() {
            self.ram.store(at, value);
        }
    }

    fn play(&mut self, step: &Step) {
        let layout = self.layout;
        let slot =
            |index: u16| layout.available.wrapping_add(4 + 2 * u64::from(index & (layout.size.max(1) - 1)));
        match *step {
            Step::Describe { table, index, address, len, flags, next } => {
                let table = table.map_or(layout.descriptors, Spot::address);
                let at = table.wrapping_add(16 * u64::from(index));
                self.put(at, address.address());
                self.put(at.wrapping_add(8), len.value() as u32);
                self.put(at.wrapping_add(12), u16::from(flags & 7));
                self.put(at.wrapping_add(14), u16::from(next));
            }
            Step::Publish(head) => {
                let at = layout.available.wrapping_add(2);
                let Some(offset) = self.ram.offset(at, 2) else { return };
                let index: u16 = self.ram.load(offset);
                self.put(slot(index), head % layout.size.max(1));
                self.put(at, index.wrapping_add(1));
            }
            Step::Index(index) => self.put(layout.available.wrapping_add(2), index),
            Step::Store { at, value } => self.put(at.into(), value),
            Step::Pop => self.held.extend(self.queue.pop()),
            Step::Push { which, written } => {
                if let Some(chain) = self.take(which) {
                    self.queue.push(chain.head(), written);
                }
            }
            Step::Unpop => {
                if let Some(chain) = self.held.pop() {
                    self.queue.unpop(&chain);
                }
            }
            Step::Read { which, bytes } => self.read(which, bytes.into()),
            Step::Write { which, bytes } => self.write(which, bytes.into()),
            Step::Signal => self.queue.signal(),
            Step::Arm => _ = self.queue.arm(),
            Step::Disarm => self.queue.disarm(),
            Step::Master(on) => self.dma.set_enabled(on),
            Step::Fail => self.queue.fail(),
            Step::SaveRestore => self.save_restore(),
        }
    }

    fn take(&mut self, which: u8) -> Option<Chain> {
        let count = self.held.len();
        (count != 0).then(|| self.held.remove(usize::from(which) % count))
    }

    fn read(&self, which: u8, bytes: usize) {
        let Some(chain) = self.held.get(usize::from(which) % self.held.len().max(1)) else { return };
        let mut reader = chain.reader(&self.dma);
        let before = reader.remaining();
        let got = reader.read(&mut vec![0; bytes]);
        assert_eq!(reader.remaining() + got as u64, before);
        let rest: u64 = reader.take(u64::MAX).iter().map(|b| u64::from(b.len)).sum();
        assert_eq!(rest + got as u64, before);
    }

    fn write(&self, which: u8, bytes: usize) {
        let Some(chain) = self.held.get(usize::from(which) % self.held.len().max(1)) else { return };
        let mut writer = chain.writer(&self.dma);
        let before = writer.remaining();
        let got = writer.write(&vec![0xC5; bytes]);
        assert_eq!((writer.remaining() + got as u64, writer.written()), (before, got as u32));
    }

    fn save_restore(&mut self) {
        let state = self.queue.state(self.held.drain(..).map(|chain| chain.head()));
        assert!(state.in_flight.len() <= usize::from(self.layout.size), "its own state would be refused");
        let (layout, dma, resets) = (self.layout, self.dma.clone(), self.resets.clone());
        let was_broken = self.queue.is_broken();
        self.queue = Queue::new(0, Some(layout), self.features, dma, resets, state.clone());
        assert_eq!(self.queue.state([]), state);
        if was_broken {
            // The transport's status keeps that; the queue's own state does not.
            self.queue.fail();
        }
    }

    fn check(&mut self) {
        assert!(self.held.len() <= usize::from(self.layout.size), "more chains than entries");
        if let Some(chain) = self.held.last() {
            let buffers = || chain.readable().iter().chain(chain.writable());
            assert!(buffers().count() <= virtio::queue::MAX_CHAIN as usize);
            for buffer in buffers() {
                assert!(buffer.len != 0 && buffer.offset + u64::from(buffer.len) <= RAM, "{buffer:?}");
            }
        }
        if self.queue.is_broken() {
            assert!(self.resets.0.load(SeqCst) != 0);
            assert!(self.queue.pop().is_none() && !self.queue.arm());
        }
    }
}
