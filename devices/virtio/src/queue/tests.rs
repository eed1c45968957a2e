//! The queue alone: malformed chains, notifications in both modes, wrap-around, two threads at one ring.

use super::*;
use guest_memory::GuestRam;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU32};

#[derive(Default)]
struct Log {
    used: AtomicU32,
    needs_reset: AtomicBool,
}

impl Signals for Log {
    fn used(&self, _: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {}
    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }
}

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x8000;
const RAM: u64 = 0x10_000;
const SIZE: u16 = 8;
const LAYOUT: QueueLayout = QueueLayout { size: SIZE, descriptors: TABLE, available: AVAIL, used: USED };

struct Rig {
    ram: GuestRam,
    queue: Queue,
    log: Arc<Log>,
    next: u16,
}

fn rig(features: u64) -> Rig {
    let ram = GuestRam::for_test(RAM);
    let dma = DmaSpace::new(ram.clone());
    dma.set_enabled(true);
    let log = Arc::new(Log::default());
    let queue = Queue::new(0, Some(LAYOUT), features, dma, log.clone(), QueueState::default());
    Rig { ram, queue, log, next: 0 }
}

impl Rig {
    fn descriptor(&self, table: u64, i: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(i);
        self.ram.store(at, address);
        self.ram.store(at + 8, len);
        self.ram.store(at + 12, flags);
        self.ram.store(at + 14, next);
    }
    fn publish(&mut self, head: u16) {
        self.ram.store(AVAIL + 4 + 2 * u64::from(self.next % SIZE), head);
        self.next = self.next.wrapping_add(1);
        self.ram.store(AVAIL + 2, self.next);
    }
    fn used_index(&self) -> u16 {
        self.ram.load(USED + 2)
    }
    fn signals(&self) -> u32 {
        self.log.used.swap(0, Ordering::SeqCst)
    }
    fn breaks(mut self) {
        self.publish(0);
        assert_eq!(self.queue.pop(), None);
        assert!(self.queue.is_broken() && self.log.needs_reset.load(Ordering::SeqCst));
        assert_eq!((self.queue.pop(), self.queue.arm()), (None, false));
        self.queue.push(0, 1);
        assert_eq!(self.used_index(), 0);
    }
}

const W: u16 = 2;
const N: u16 = 1;
const I: u16 = 4;

#[test]
fn chains_are_taken_apart() {
    let mut r = rig(feature::RING_INDIRECT_DESC);
    r.descriptor(TABLE, 0, 0x4000, 16, N, 3);
    r.descriptor(TABLE, 3, 0x5000, 0, N, 1);
    r.descriptor(TABLE, 1, INDIRECT, 32, I, 7);
    r.descriptor(INDIRECT, 0, 0x6000, 5, N | W, 1);
    r.descriptor(INDIRECT, 1, 0x6010, 6, W, 0);
    r.publish(0);
    let chain = r.queue.pop().unwrap();
    assert_eq!(chain.readable(), [Buffer { offset: 0x4000, len: 16 }]);
    assert_eq!(chain.writable(), [Buffer { offset: 0x6000, len: 5 }, Buffer { offset: 0x6010, len: 6 }]);
    r.ram.store_bytes(0x4000, b"0123456789abcdef");
    let dma = r.queue.dma().clone();
    let mut reader = chain.reader(&dma);
    assert_eq!((reader.read_array::<4>(), reader.remaining()), (Some(*b"0123"), 12));
    assert_eq!(reader.take(5), [Buffer { offset: 0x4004, len: 5 }]);
    assert_eq!((reader.read_array::<8>(), reader.read_array::<1>()), (None, None));
    let mut writer = chain.writer(&dma);
    assert_eq!((writer.write(b"abc"), writer.write(b"defghijklm")), (3, 8));
    assert_eq!((writer.written(), writer.remaining()), (11, 0));
    let mut out = [0; 6];
    r.ram.load_bytes(0x6010, &mut out);
    assert_eq!(&out, b"fghijk");
    r.queue.push(chain.head(), 11);
    assert_eq!((r.used_index(), r.ram.load::<u64>(USED + 4)), (1, 11 << 32));
}

#[test]
fn malformed_chains_break_the_queue() {
    // Next out of range; a loop; a buffer outside of RAM, across its end, wrapping.
    for (address, len, flags, next) in [
        (0x4000, 1, N, 8),
        (0x4000, 1, N, 0),
        (RAM, 1, 0, 0),
        (RAM - 1, 2, 0, 0),
        (u64::MAX, 2, W, 0),
        (0x4000, u32::MAX, 0, 0),
    ] {
        let r = rig(feature::RING_INDIRECT_DESC);
        r.descriptor(TABLE, 0, address, len, flags, next);
        r.breaks();
    }
    // Writable before readable.
    let r = rig(0);
    r.descriptor(TABLE, 0, 0x4000, 1, N | W, 1);
    r.descriptor(TABLE, 1, 0x4000, 1, 0, 0);
    r.breaks();
    // Indirect: not negotiated, with a successor, empty, not whole, outside of RAM, nested, too long.
    let r = rig(0);
    r.descriptor(TABLE, 0, INDIRECT, 16, I, 0);
    r.breaks();
    for (address, len, flags) in
        [(INDIRECT, 16, I | N), (INDIRECT, 0, I), (INDIRECT, 17, I), (RAM, 16, I), (u64::MAX - 7, 16, I)]
    {
        let r = rig(feature::RING_INDIRECT_DESC);
        r.descriptor(TABLE, 0, address, len, flags, 0);
        r.breaks();
    }
    let r = rig(feature::RING_INDIRECT_DESC);
    r.descriptor(TABLE, 0, INDIRECT, 16, I, 0);
    r.descriptor(INDIRECT, 0, INDIRECT, 16, I, 0);
    r.breaks();
    // More entries than the ring has.
    let mut r = rig(0);
    r.next = SIZE;
    r.breaks();
}

/// A driver has as many chains as the ring has entries: one that publishes a head again before it came back would
/// have us hold more and more.
#[test]
fn more_chains_than_the_ring_has_entries_break_the_queue() {
    let mut r = rig(0);
    for head in 0..SIZE {
        r.descriptor(TABLE, head, 0x4000, 1, 0, 0);
        r.publish(head);
        assert!(r.queue.pop().is_some());
    }
    r.queue.push(3, 1);
    r.publish(3);
    let chain = r.queue.pop().expect("one came back, one may go");
    r.queue.unpop(&chain);
    r.publish(4);
    assert!(r.queue.pop().is_some_and(|chain| chain.head() == 3));
    assert_eq!(r.queue.pop(), None);
    assert!(r.queue.is_broken());
    // An index that goes back, to before what we took.
    let mut r = rig(0);
    for head in 0..4 {
        r.descriptor(TABLE, head, 0x4000, 1, 0, 0);
        r.publish(head);
        assert!(r.queue.pop().is_some());
    }
    r.ram.store(AVAIL + 2, 2u16);
    assert_eq!(r.queue.pop(), None);
    assert!(r.queue.is_broken());
}

/// Descriptors may name the same memory twice, also that of the rings: both are just memory.
#[test]
fn overlapping_buffers_and_rings_are_plain_memory() {
    let mut r = rig(0);
    r.descriptor(TABLE, 0, 0x4000, 16, N, 1);
    r.descriptor(TABLE, 1, 0x4008, 16, N | W, 2);
    r.descriptor(TABLE, 2, 0x4000, 16, N | W, 3);
    r.descriptor(TABLE, 3, TABLE, 64, W, 0);
    r.publish(0);
    let chain = r.queue.pop().unwrap();
    let dma = r.queue.dma().clone();
    let mut writer = chain.writer(&dma);
    assert_eq!((writer.remaining(), writer.write(&[0xAA; 96])), (96, 96));
    // The chain was read once: what its own data did to the table changes nothing any more.
    assert_eq!(chain.writer(&dma).remaining(), 96);
    let mut overwritten = [0; 64];
    r.ram.load_bytes(TABLE, &mut overwritten);
    assert_eq!(overwritten, [0xAA; 64]);
    r.queue.push(0, 96);
    r.publish(0);
    assert_eq!(r.queue.pop(), None);
    assert!(r.queue.is_broken(), "0xAAAA.. is not in RAM");

    // Rings on each other: what is used counts as available, and every look at it does bounded work.
    let mut r = rig(0);
    let layout = QueueLayout { used: AVAIL, ..LAYOUT };
    let (dma, log) = (r.queue.dma().clone(), r.log.clone());
    r.queue = Queue::new(0, Some(layout), 0, dma, log, QueueState::default());
    r.descriptor(TABLE, 0, 0x4000, 1, W, 0);
    r.publish(0);
    for _ in 0..100_000 {
        let Some(chain) = r.queue.pop() else { break };
        r.queue.push(chain.head(), 1);
    }
    assert!(r.queue.is_broken() || !r.queue.arm());
}

#[test]
fn rings_outside_of_ram_break_the_queue() {
    for layout in [
        QueueLayout { descriptors: RAM, ..LAYOUT },
        QueueLayout { available: RAM, ..LAYOUT },
        QueueLayout { available: RAM - 4, ..LAYOUT },
    ] {
        let mut r = rig(0);
        r.ram.store(RAM - 2, 1u16);
        let (dma, log) = (r.queue.dma().clone(), r.log.clone());
        r.queue = Queue::new(0, Some(layout), 0, dma, log, QueueState::default());
        r.publish(0);
        assert_eq!(r.queue.pop(), None);
        assert!(r.queue.is_broken());
    }
    for layout in [
        QueueLayout { size: 0, ..LAYOUT },
        QueueLayout { size: 6, ..LAYOUT },
        QueueLayout { descriptors: 8, ..LAYOUT },
        QueueLayout { available: 1, ..LAYOUT },
        QueueLayout { used: 2, ..LAYOUT },
        QueueLayout { used: u64::MAX - 15, ..LAYOUT },
    ] {
        assert!(!layout.is_valid(), "{layout:x?}");
    }
}

#[test]
fn without_bus_master_a_queue_waits() {
    let mut r = rig(0);
    r.descriptor(TABLE, 0, 0x4000, 1, 0, 0);
    r.publish(0);
    r.queue.dma().set_enabled(false);
    assert_eq!((r.queue.pop(), r.queue.arm(), r.queue.is_broken()), (None, false, false));
    r.queue.dma().set_enabled(true);
    assert!(r.queue.pop().is_some());
}

#[test]
fn interrupts_by_flag() {
    let mut r = rig(0);
    r.descriptor(TABLE, 0, 0x4000, 1, 0, 0);
    let take = |r: &mut Rig| {
        r.publish(0);
        assert!(r.queue.pop().is_some());
    };
    r.queue.signal();
    assert_eq!(r.signals(), 0);
    take(&mut r);
    r.queue.push(0, 0);
    r.queue.signal();
    r.queue.signal();
    assert_eq!(r.signals(), 1);
    r.ram.store(AVAIL, AVAIL_NO_INTERRUPT);
    take(&mut r);
    r.queue.push(0, 0);
    r.queue.signal();
    assert_eq!(r.signals(), 0);
    r.queue.disarm();
    assert_eq!(r.ram.load::<u16>(USED), USED_NO_NOTIFY);
    assert!(!r.queue.arm());
    assert_eq!(r.ram.load::<u16>(USED), 0);
    r.publish(0);
    assert!(r.queue.arm());
}

#[test]
fn interrupts_by_index() {
    let mut r = rig(feature::RING_EVENT_IDX);
    let event = AVAIL + 4 + 2 * u64::from(SIZE);
    // Wake me when entry 2 is used: not for 0 and 1.
    r.ram.store(event, 2u16);
    for expected in [0, 0, 1, 0] {
        r.queue.push(0, 0);
        r.queue.signal();
        assert_eq!(r.signals(), expected);
    }
    // In one batch that passes it.
    r.ram.store(event, 5u16);
    r.queue.push_all(&[(0, 0), (1, 0), (2, 0)]);
    r.queue.signal();
    assert_eq!((r.signals(), r.used_index()), (1, 7));
    assert!(!r.queue.arm());
    assert_eq!(r.ram.load::<u16>(USED + 4 + 8 * u64::from(SIZE)), 0);
    assert!(crossed(0xFFFF, 1, 0xFFFE) && !crossed(1, 1, 0xFFFE) && !crossed(0xFFFD, 1, 0xFFFE));
}

#[test]
fn what_was_in_flight_comes_first_again() {
    let mut r = rig(0);
    for i in 0..4 {
        r.descriptor(TABLE, i, 0x4000 + u64::from(i), 1, 0, 0);
        r.publish(i);
    }
    let first = r.queue.pop().unwrap();
    let second = r.queue.pop().unwrap();
    r.queue.unpop(&second);
    let state = r.queue.state([first.head()]);
    assert_eq!(state, QueueState { next_available: 2, next_used: 0, in_flight: alloc::vec![1, 0] });
    let (dma, log) = (r.queue.dma().clone(), r.log.clone());
    let mut restored = Queue::new(0, Some(LAYOUT), 0, dma, log, state);
    let heads: Vec<u16> = core::iter::from_fn(|| restored.pop()).map(|c| c.head()).collect();
    assert_eq!(heads, [1, 0, 2, 3]);
}

/// A driver thread and a device thread, each sleeping unless notified as the protocol says: a lost
/// notification would leave both asleep.
#[test]
fn no_notification_is_lost_between_threads() {
    for features in [0, feature::RING_EVENT_IDX] {
        let mut r = rig(features);
        let kicks = Arc::new(AtomicU32::new(0));
        for i in 0..SIZE {
            r.descriptor(TABLE, i, 0x4000, 8, 0, 0);
        }
        // As a device does when the driver gets ready: look once, without a notification.
        r.queue.arm();
        // Two full turns of the indices and more.
        const ROUNDS: u32 = 40_000;
        let (ram, log) = (r.ram.clone(), r.log.clone());
        let kicked = kicks.clone();
        let driver = std::thread::spawn(move || {
            let (mut next, mut seen) = (0u16, 0u16);
            for round in 0..ROUNDS {
                let (old, batch) = (next, (round % 4) as u16 + 1);
                while next.wrapping_sub(old) < batch && next.wrapping_sub(seen) < SIZE {
                    ram.store(AVAIL + 4 + 2 * u64::from(next % SIZE), next % SIZE);
                    next = next.wrapping_add(1);
                }
                fence(Ordering::Release);
                ram.store(AVAIL + 2, next);
                fence(Ordering::SeqCst);
                let wanted = if features != 0 {
                    crossed(ram.load(USED + 4 + 8 * u64::from(SIZE)), next, old)
                } else {
                    ram.load::<u16>(USED) & USED_NO_NOTIFY == 0
                };
                if wanted && next != old {
                    kicked.fetch_add(1, Ordering::SeqCst);
                }
                // Sleep until an interrupt, unless something is used already.
                ram.store(AVAIL + 4 + 2 * u64::from(SIZE), seen);
                fence(Ordering::SeqCst);
                let mut patience = 5_000_000u32;
                while ram.load::<u16>(USED + 2) == seen {
                    while log.used.swap(0, Ordering::SeqCst) == 0 {
                        patience = patience.checked_sub(1).expect("an interrupt was lost");
                        std::thread::yield_now();
                    }
                }
                seen = ram.load::<u16>(USED + 2);
            }
            next
        });
        let mut taken = 0u16;
        while !driver.is_finished() {
            if kicks.swap(0, Ordering::SeqCst) == 0 {
                std::thread::yield_now();
                continue;
            }
            r.queue.disarm();
            loop {
                match r.queue.pop() {
                    Some(chain) => {
                        taken = taken.wrapping_add(1);
                        r.queue.push(chain.head(), 0);
                    }
                    None if r.queue.arm() => {}
                    None => break,
                }
            }
            r.queue.signal();
        }
        let published = driver.join().unwrap();
        assert!(published.wrapping_sub(taken) < SIZE, "{published} {taken}");
        assert!(!r.queue.is_broken());
    }
}

proptest! {
    /// Tables of noise: pop ends, what it gives lies in RAM, and a queue that broke stays so.
    #[test]
    fn noise_never_panics(
        words in proptest::collection::vec(any::<u64>(), 16),
        near in proptest::collection::vec((0u64..RAM + 16, 0u32..0x9000, 0u16..8, 0u16..9), 8),
        heads in proptest::collection::vec(0u16..9, 1..10),
        noise in any::<bool>(),
    ) {
        let mut r = rig(feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX);
        for (i, (address, len, flags, next)) in near.into_iter().enumerate() {
            r.descriptor(TABLE, i as u16, address, len, flags, next);
            r.descriptor(INDIRECT, i as u16, address, len, flags & 3, next);
        }
        for (i, word) in words.into_iter().enumerate().filter(|_| noise) {
            r.ram.store(TABLE + 8 * i as u64, word);
        }
        for head in heads {
            r.publish(head);
            if let Some(chain) = r.queue.pop() {
                for b in chain.readable().iter().chain(chain.writable()) {
                    prop_assert!(b.len != 0 && b.offset + u64::from(b.len) <= RAM);
                }
                r.queue.push(chain.head(), 1);
                r.queue.signal();
            } else if r.queue.is_broken() {
                prop_assert_eq!(r.queue.pop(), None);
            }
            r.queue.arm();
        }
    }
}
