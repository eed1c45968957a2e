//! What is kept of a translated superblock: 32 bytes, so that two are in a cache line.

use super::{CAREFUL, Key};
use crate::budget::MOST_CODE;
use cpu_soft::translate::Place;

/// A translated superblock.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub struct Block {
    /// Linear address.
    pub linear: u64,
    /// Offset in the RAM span, below 2^48: the lower bits.
    low: u32,
    /// Where in the code memory its guarded entry is.
    code: u32,
    /// The mapping that the guard lets pass.
    pub exec_id: u32,
    /// The upper bits of the offset in the RAM span.
    high: u16,
    /// Bytes from the guarded entry to where a failed guard leads.
    miss: u16,
    /// See [`Block::sample`].
    samples: u16,
    /// See `Source::way`.
    pub way: u16,
    /// Context, perhaps [`CAREFUL`].
    pub key: u8,
    flags: u8,
}

const _: () = assert!(size_of::<Block>() == 32 && MOST_CODE <= u32::MAX as usize);

impl Block {
    /// Bytes of the guard up to its immediate, and behind its jump.
    pub const GUARD: u64 = 7;
    /// See [`Block::GUARD`].
    pub const BODY: u64 = 17;
    const LIVE: u8 = 1;
    const CHECKS_ITSELF: u8 = 2;

    /// Of `place`; its guarded entry is at offset `code` of the code memory.
    pub fn new(place: &Place, key: u8, code: u32) -> Self {
        let checks_itself = if place.checks_itself { Self::CHECKS_ITSELF } else { 0 };
        Self {
            linear: place.linear,
            low: place.at as u32,
            code,
            exec_id: 0,
            high: (place.at >> 32) as u16,
            miss: 0,
            samples: 0,
            way: 0,
            key,
            flags: Self::LIVE | checks_itself,
        }
    }

    /// Offset in the RAM span.
    pub fn at(&self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
    /// What names it.
    pub fn name(&self) -> Key {
        (self.linear, self.at(), self.key)
    }
    /// Whether this names it.
    pub fn is(&self, name: &Key) -> bool {
        self.name() == *name
    }
    /// Linear address of its page.
    pub fn linear_page(&self) -> u64 {
        self.linear & !0xFFF
    }
    /// RAM page whose stores end it.
    pub fn watched_page(&self) -> Option<u64> {
        (!self.checks_itself()).then_some(self.at() >> 12)
    }
    /// See [`Place::checks_itself`].
    pub fn checks_itself(&self) -> bool {
        self.flags & Self::CHECKS_ITSELF != 0
    }
    /// Its code may be entered.
    pub fn is_live(&self) -> bool {
        self.flags & Self::LIVE != 0
    }
    /// Its code may not be entered any more.
    pub fn die(&mut self) {
        self.flags &= !Self::LIVE;
    }
    /// Counts that it came next when the countdown ran out; how often it did. Behind 65,535 the count goes on from 32,768: who
    /// looks at it does so each so many samples, for ever.
    pub fn sample(&mut self) -> u32 {
        self.samples = self.samples.checked_add(1).unwrap_or(1 << 15);
        self.samples()
    }
    /// Its samples.
    pub fn samples(&self) -> u32 {
        self.samples.into()
    }
    /// It is for what a careful translation was asked for.
    pub fn is_careful(&self) -> bool {
        self.key & CAREFUL != 0
    }

    /// Entry with the guard, in code memory at `start`: for everybody who comes from another page.
    pub fn guarded(&self, start: u64) -> u64 {
        start + u64::from(self.code)
    }
    /// Behind the guard: for the same page.
    pub fn body(&self, start: u64) -> u64 {
        self.guarded(start) + Self::BODY
    }
    /// The guard's immediate.
    pub fn guard(&self, start: u64) -> u64 {
        self.guarded(start) + Self::GUARD
    }
    /// Where a failed guard leads.
    pub fn miss(&self, start: u64) -> u64 {
        self.guarded(start) + u64::from(self.miss)
    }
    /// A failed guard leads so many bytes behind the guarded entry. Panics if that is farther than any block is long.
    pub fn set_miss(&mut self, bytes: usize) {
        self.miss = u16::try_from(bytes).expect("a block of more than 64 KiB");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_emulate::ModeKey;

    /// Four billion instructions are a few seconds of a hot loop.
    #[test]
    fn samples_are_counted_for_ever() {
        let place = Place { linear: 0x40_0000, at: 0x1000, mode: ModeKey(0), checks_itself: false };
        let mut block = Block::new(&place, 0, 0);
        let counts: Vec<u32> = (0..200_000).map(|_| block.sample()).collect();
        assert!(counts.windows(16).all(|some| some.iter().any(|n| n.is_multiple_of(16))));
        assert!(
            counts[40_000..].iter().all(|n| *n >= 1 << 15)
                && counts[..1 << 15].iter().copied().eq(1..=1 << 15)
        );
    }
}
