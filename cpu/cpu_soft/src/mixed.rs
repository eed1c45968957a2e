//! Pages that hold code and are written all the time.
//!
//! Noticing each write costs more than all that is done between two. A page whose code was built anew after each of some
//! writes in a short time is not tracked any more: its blocks *check themselves*. They compare the bytes that they were made
//! from each time they are entered, and end behind every instruction that may write memory, so that the next one is seen as
//! it is then. After a while the page is tracked again: it may have become something else. Blocks that check themselves are
//! right whatever the page is.

use alloc::collections::VecDeque;
use guest_time::GuestNs;
use x86_decode::{Instruction, InstructionInfoFactory, OpAccess};

/// Writes that make a page one of these. (A kernel that patches its own text must not come there.)
const WRITES: u32 = 32;
/// Longest time between two of them, in ns.
const NEAR: GuestNs = 500_000;
/// How long a page stays one, in ns.
const STAYS: GuestNs = 10_000_000_000;
/// Pages that are at a time: with more the oldest is none any more.
const MAX_PAGES: usize = 256;
/// Pages whose writes are counted at a time.
const COUNTED: usize = 64;

#[derive(Clone, Copy)]
struct Count {
    page: u64,
    writes: u32,
    last: GuestNs,
}

/// See the module's header.
pub struct Mixed {
    counts: [Count; COUNTED],
    /// Pages and when they became such, the oldest first.
    pages: VecDeque<(u64, GuestNs)>,
}

impl Mixed {
    /// No page is.
    pub const fn new() -> Self {
        Self { counts: [Count { page: u64::MAX, writes: 0, last: 0 }; COUNTED], pages: VecDeque::new() }
    }

    /// Whether code of `page` has to check itself.
    pub fn contains(&self, page: u64) -> bool {
        self.pages.iter().any(|p| p.0 == page)
    }

    /// Whether no page is.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Code of `page` was written at `now`, and with it went what was built.
    pub fn written(&mut self, page: u64, now: GuestNs) {
        let count = &mut self.counts[page as usize % COUNTED];
        let goes_on = count.page == page && now.saturating_sub(count.last) <= NEAR;
        let writes = if goes_on { count.writes + 1 } else { 1 };
        *count = Count { page, writes, last: now };
        if writes >= WRITES {
            count.writes = 0;
            self.add(page, now);
        }
    }

    /// Makes `page` one.
    pub fn add(&mut self, page: u64, now: GuestNs) {
        if !self.contains(page) {
            self.pages.push_back((page, now));
        }
    }

    /// A page that was one for long enough, or for which there is no more room: it is none any more.
    pub fn expired(&mut self, now: GuestNs) -> Option<u64> {
        let old = |since: GuestNs| now.saturating_sub(since) > STAYS;
        let full = self.pages.len() > MAX_PAGES;
        let (page, _) = self.pages.front().filter(|(_, since)| full || old(*since))?;
        let page = *page;
        self.pages.pop_front();
        Some(page)
    }
}

/// Whether an instruction may write memory, or ends what a processor may have fetched ahead: behind it code is fetched anew.
pub fn may_change_code(insn: &Instruction) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let reads = |access| {
        matches!(access, OpAccess::None | OpAccess::NoMemAccess | OpAccess::Read | OpAccess::CondRead)
    };
    let serializes = insn.is_privileged() || insn.mnemonic() == x86_decode::Mnemonic::Cpuid;
    serializes || factory.info(insn).used_memory().iter().any(|used| !reads(used.access()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_writes_in_a_short_time() {
        let mut m = Mixed::new();
        for n in 0..u64::from(WRITES) - 1 {
            m.written(5, n);
            m.written(6, n * 2 * NEAR);
        }
        assert!(m.is_empty());
        m.written(5, NEAR);
        assert!(m.contains(5) && !m.contains(6));
        assert_eq!(m.expired(NEAR + STAYS), None);
        assert_eq!(m.expired(NEAR + STAYS + 1), Some(5));
        assert!(m.is_empty());
    }

    #[test]
    fn the_oldest_goes_when_there_are_too_many() {
        let mut m = Mixed::new();
        for page in 0..=MAX_PAGES as u64 {
            m.add(page, 0);
            assert_eq!(m.expired(0), (page == MAX_PAGES as u64).then_some(0));
        }
        assert_eq!(m.pages.len(), MAX_PAGES);
    }
}
