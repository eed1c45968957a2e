//! Split virtqueues, device side (VIRTIO 1.2, section 2.7).
//!
//! Owned by a runner; the driver works on the same rings from other threads at any time. Everything read from
//! the rings is hostile: what breaks the protocol makes the queue *broken* (it never has work again, and
//! the driver is told to reset), never a panic, and never more work than the ring has entries.
//!
//! Ordering. Ring accesses are single instructions; fences stand where the protocol needs them:
//! the available index before the entries it publishes (acquire), used entries before the used index
//! (release), and the index that we published before the event that decides about a notification (a full fence
//! on both sides).

mod buffer;
mod chain;
mod chain_io;
#[cfg(test)]
mod tests;

pub use buffer::Buffer;
pub use chain::{Chain, MAX_CHAIN};
pub use chain_io::{ChainReader, ChainWriter};

use crate::device::Signals;
use crate::feature;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};
use guest_memory::{DmaSpace, NotRam};

/// Largest queue that the protocol allows.
pub const MAX_QUEUE_SIZE: u16 = 32768;

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Where the driver put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Entries: a power of two.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Driver area: available ring.
    pub available: u64,
    /// Device area: used ring.
    pub used: u64,
}

impl QueueLayout {
    /// Whether the protocol allows it.
    pub fn is_valid(&self) -> bool {
        let Self { size, descriptors, available, used } = *self;
        let aligned = descriptors % 16 == 0 && available % 2 == 0 && used % 4 == 0;
        let room = |base: u64, bytes: u64| base.checked_add(bytes).is_some();
        let n = u64::from(size);
        let fits = room(descriptors, 16 * n) && room(available, 6 + 2 * n) && room(used, 6 + 8 * n);
        size.is_power_of_two() && size <= MAX_QUEUE_SIZE && aligned && fits
    }
}

/// Where a queue stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Next entry of the available ring to be taken.
    pub next_available: u16,
    /// Next entry of the used ring to be written.
    pub next_used: u16,
    /// Heads of chains that were taken and are not used yet, in the order they were taken.
    pub in_flight: Vec<u16>,
}

/// See the module's header.
pub struct Queue {
    index: u16,
    layout: Option<QueueLayout>,
    dma: DmaSpace,
    signals: Arc<dyn Signals>,
    event_idx: bool,
    indirect: bool,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the driver was last told, or decided not to be.
    signalled: u16,
    reissue: Vec<u16>,
    broken: bool,
}

impl Queue {
    /// Queue `index` at `layout` (none: the driver left it out), with the negotiated `features`.
    pub fn new(
        index: u16,
        layout: Option<QueueLayout>,
        features: u64,
        dma: DmaSpace,
        signals: Arc<dyn Signals>,
        state: QueueState,
    ) -> Self {
        let QueueState { next_available, next_used, in_flight } = state;
        Self {
            index,
            layout: layout.filter(QueueLayout::is_valid),
            dma,
            signals,
            event_idx: features & feature::RING_EVENT_IDX != 0,
            indirect: features & feature::RING_INDIRECT_DESC != 0,
            next_available,
            next_used,
            signalled: next_used,
            reissue: in_flight,
            broken: false,
        }
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }
    /// Its entries; 0 if the driver left it out.
    pub fn size(&self) -> u16 {
        self.layout.map_or(0, |l| l.size)
    }
    /// Guest memory.
    pub fn dma(&self) -> &DmaSpace {
        &self.dma
    }
    /// Whether the driver broke the protocol.
    pub fn is_broken(&self) -> bool {
        self.broken
    }
    /// Where it stands; the owner adds the heads that it holds.
    pub fn state(&self, in_flight: impl IntoIterator<Item = u16>) -> QueueState {
        let in_flight = self.reissue.iter().copied().chain(in_flight).collect();
        QueueState { next_available: self.next_available, next_used: self.next_used, in_flight }
    }

    /// The driver broke the protocol, in the rings or in what its buffers say.
    pub fn fail(&mut self) {
        if !self.broken {
            self.broken = true;
            self.signals.needs_reset();
        }
    }

    /// Its place, if it may be worked on now. Without the bus-master bit a queue only waits.
    fn active(&self) -> Option<QueueLayout> {
        self.layout.filter(|_| !self.broken && self.dma.is_enabled())
    }

    /// Runs `access` on the rings; a ring outside of RAM breaks the queue.
    fn ring<T>(&mut self, access: impl FnOnce(&DmaSpace) -> Result<T, NotRam>) -> Option<T> {
        let result = access(&self.dma).ok();
        if result.is_none() {
            self.fail();
        }
        result
    }

    /// How many chains wait.
    fn waiting(&mut self, layout: &QueueLayout) -> Option<u16> {
        let published: u16 = self.ring(|dma| dma.load(layout.available + 2))?;
        // Those that we hold count: without that, one head published over and over would make us hold any number.
        let held = self.next_available.wrapping_sub(self.next_used);
        let waiting = published.wrapping_sub(self.next_available);
        if u32::from(held) + u32::from(waiting) > layout.size.into() {
            self.fail();
            return None;
        }
        Some(waiting)
    }

    /// The next chain: first those that were in flight when the state was saved, then the driver's.
    pub fn pop(&mut self) -> Option<Chain> {
        let layout = self.active()?;
        if !self.reissue.is_empty() {
            let head = self.reissue.remove(0);
            return self.walk(&layout, head);
        }
        if self.waiting(&layout)? == 0 {
            return None;
        }
        fence(Ordering::Acquire);
        let slot = u64::from(self.next_available & (layout.size - 1));
        let head = self.ring(|dma| dma.load::<u16>(layout.available + 4 + 2 * slot))?;
        let chain = self.walk(&layout, head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Some(chain)
    }

    fn walk(&mut self, layout: &QueueLayout, head: u16) -> Option<Chain> {
        match chain::walk(&self.dma, layout, head, self.indirect) {
            Ok(chain) => Some(chain),
            Err(chain::Malformed) => {
                self.fail();
                None
            }
        }
    }

    /// Puts the chain that was popped last back: it will be popped again.
    pub fn unpop(&mut self, chain: &Chain) {
        // As a chain to reissue, so that it also stays the first one across a save.
        self.reissue.insert(0, chain.head);
    }

    /// Gives a chain back to the driver with `written` bytes written into it.
    pub fn push(&mut self, head: u16, written: u32) {
        self.push_all(&[(head, written)]);
    }

    /// Gives several chains back at once: the driver sees all of them or none.
    pub fn push_all(&mut self, used: &[(u16, u32)]) {
        let Some(layout) = self.active() else { return };
        let mut next = self.next_used;
        for (head, written) in used {
            let slot = u64::from(next & (layout.size - 1));
            let element = u64::from(*head) | u64::from(*written) << 32;
            if self.ring(|dma| dma.store(layout.used + 4 + 8 * slot, element)).is_none() {
                return;
            }
            next = next.wrapping_add(1);
        }
        fence(Ordering::Release);
        if self.ring(|dma| dma.store(layout.used + 2, next)).is_some() {
            self.next_used = next;
        }
    }

    /// Interrupts the driver, if it wants to hear of what was pushed since the last call.
    pub fn signal(&mut self) {
        if self.signalled == self.next_used {
            return;
        }
        let Some(layout) = self.active() else { return };
        fence(Ordering::SeqCst);
        let (old, new) = (core::mem::replace(&mut self.signalled, self.next_used), self.next_used);
        let wanted = if self.event_idx {
            let at = layout.available + 4 + 2 * u64::from(layout.size);
            self.ring(|dma| dma.load::<u16>(at)).map(|event| crossed(event, new, old))
        } else {
            self.ring(|dma| dma.load::<u16>(layout.available)).map(|flags| flags & AVAIL_NO_INTERRUPT == 0)
        };
        if wanted == Some(true) {
            self.signals.used(self.index);
        }
    }

    /// Asks the driver not to notify: we look ourselves.
    pub fn disarm(&mut self) {
        let Some(layout) = self.active() else { return };
        if !self.event_idx {
            self.ring(|dma| dma.store(layout.used, USED_NO_NOTIFY));
        }
        // With event indices an old index keeps it silent.
    }

    /// Asks the driver to notify with the next chain. `true`: there is one already, and no notification
    /// will come for it.
    pub fn arm(&mut self) -> bool {
        let Some(layout) = self.active() else { return false };
        let next = self.next_available;
        let stored = if self.event_idx {
            let at = layout.used + 4 + 8 * u64::from(layout.size);
            self.ring(|dma| dma.store(at, next))
        } else {
            self.ring(|dma| dma.store(layout.used, 0u16))
        };
        fence(Ordering::SeqCst);
        stored.is_some() && self.waiting(&layout).is_some_and(|n| n != 0)
    }
}

/// Whether going from `old` to `new` passed `event` (VIRTIO 1.2, 2.7.7.2: `vring_need_event`).
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
