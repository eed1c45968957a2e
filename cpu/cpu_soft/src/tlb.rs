//! The soft TLB: from a linear page to a page of the RAM span, checked by one comparison.
//!
//! Three direct-mapped arrays, one for each way data is accessed: user, supervisor without AC (SMAP bites),
//! supervisor with AC or without SMAP. An entry has a tag for reading, writing and executing; an access is
//! allowed if `address ^ tag` is below the page size, which also catches the end of the page. Invariants:
//! - `write` is a valid tag only if the PTE is dirty and writable, and no code of the page is cached.
//! - Only RAM is entered: MMIO always takes the slow path.
//!
//! The layout (32-byte entries, one index for all) is what translated code will address.

use crate::walked::Walked;
use alloc::boxed::Box;
use alloc::vec;

/// Entries in each array.
pub const ENTRIES: usize = 2048;
/// Identities of executable mappings in each of the two arrays: as many pages as a kernel and its modules take.
pub const EXEC_ENTRIES: usize = 8192;
const PAGE: u64 = !0xFFF;

/// One entry. `host` is the page's offset in the RAM span.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct TlbEntry {
    /// Tag for reads.
    pub read: u64,
    /// Tag for writes.
    pub write: u64,
    /// Tag for instruction fetches.
    pub exec: u64,
    /// Offset of the page in the RAM span.
    pub host: u64,
}

/// What a walk found, to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Linear page.
    pub linear: u64,
    /// Offset of the page in the RAM span.
    pub host: u64,
    /// May be read.
    pub read: bool,
    /// May be written without a look (dirty already, no code).
    pub write: bool,
    /// May be executed.
    pub exec: bool,
    /// Survives a load of CR3.
    pub global: bool,
    /// Bytes of the guest's page.
    pub page_bytes: u64,
}

/// Bookkeeping of one array.
#[derive(Clone, Copy)]
struct Side {
    /// Words of `used` that may not be zero: most flushes find few.
    words: u32,
    used: [u64; ENTRIES / 64],
    global: [u64; ENTRIES / 64],
}

/// Bookkeeping of the identities of executable mappings.
#[derive(Clone)]
struct ExecSide {
    /// Linear pages.
    page: [u64; EXEC_ENTRIES],
    /// As in [`Side`].
    words: u128,
    used: [u64; EXEC_ENTRIES / 64],
    global: [u64; EXEC_ENTRIES / 64],
}

impl ExecSide {
    const fn new() -> Self {
        let bits = [0; EXEC_ENTRIES / 64];
        Self { page: [0; EXEC_ENTRIES], words: 0, used: bits, global: bits }
    }
}

/// See the module's header.
pub struct Tlb {
    /// The fourth stays empty (`core::ALIGNED_USER`); with it an index masked by 3 needs no bounds check.
    entries: [[TlbEntry; ENTRIES]; 4],
    sides: [Side; 3],
    /// Identity of the (linear page, host page) mapping that each slot can execute: [supervisor, user].
    /// 0: none. Caches of decoded code compare it; it never comes back for another mapping.
    exec_id: [[u32; EXEC_ENTRIES]; 2],
    /// Whose they are. They stand apart from the entries: data in the same slot does not drive code out.
    exec: [ExecSide; 2],
    ids: Ids,
    /// Linear ranges, one in each half, that hold every large page entered since the last full flush.
    large: [Option<(u64, u64)>; 2],
    /// The second level. Holds nothing that a flush of the first should have dropped.
    pub walked: Walked,
}

/// The tag that matches nothing in slot `slot`: an address whose slot differs.
#[inline(always)]
const fn invalid_tag(slot: usize) -> u64 {
    ((slot ^ 1) as u64) << 12
}

/// Slot of a linear address.
#[inline(always)]
pub const fn slot_of(linear: u64) -> usize {
    (linear >> 12) as usize & (ENTRIES - 1)
}

/// Slot of a linear address's identity as an executable mapping.
#[inline(always)]
pub const fn exec_slot_of(linear: u64) -> usize {
    (linear >> 12) as usize & (EXEC_ENTRIES - 1)
}

/// The half of the address space that `linear` is in.
fn half(linear: u64) -> usize {
    (linear >> 63) as usize
}

/// An entry that matches nothing.
fn empty(slot: usize) -> TlbEntry {
    let tag = invalid_tag(slot);
    TlbEntry { read: tag, write: tag, exec: tag, host: 0 }
}

impl Tlb {
    /// Offset of the arrays of entries.
    pub const ENTRIES_AT: usize = core::mem::offset_of!(Self, entries);
    /// Offset of the identities: supervisor's, then user's.
    pub const EXEC_ID_AT: usize = core::mem::offset_of!(Self, exec_id);

    /// An empty TLB.
    pub fn new() -> Self {
        let side = Side { words: 0, used: [0; ENTRIES / 64], global: [0; ENTRIES / 64] };
        Self {
            entries: [core::array::from_fn(empty); 4],
            sides: [side; 3],
            exec_id: [[0; EXEC_ENTRIES]; 2],
            exec: [const { ExecSide::new() }; 2],
            ids: Ids::new(),
            large: [None; 2],
            walked: Walked::new(),
        }
    }

    /// The entry that an access at `linear` would use.
    #[inline(always)]
    pub fn entry(&self, index: u8, linear: u64) -> &TlbEntry {
        &self.entries[usize::from(index & 3)][slot_of(linear)]
    }

    /// Identity of the executable mapping in `linear`'s slot, for user (`true`) or supervisor code; 0 if none.
    #[inline(always)]
    pub fn exec_id(&self, user: bool, linear: u64) -> u32 {
        self.exec_id[usize::from(user)][exec_slot_of(linear)]
    }

    /// Makes `linear`'s executable mapping in array `index` the one whose identity its slot shows. (Another page's
    /// may have stood there: the two arrays of supervisor accesses share the identities.) 0 if it has none.
    pub fn claim_exec_id(&mut self, index: u8, linear: u64) -> u32 {
        let e = self.entry(index, linear);
        let (exec, host) = (e.exec, e.host);
        if linear ^ exec >= 4096 {
            return 0;
        }
        let slot = slot_of(linear);
        let global = self.sides[usize::from(index).min(2)].global[slot / 64] >> (slot % 64) & 1 != 0;
        self.enter_exec(index == 0, linear & PAGE, host, global)
    }

    /// Makes `page` the one whose identity its slot shows, for user or supervisor code.
    fn enter_exec(&mut self, user: bool, page: u64, host: u64, global: bool) -> u32 {
        let slot = exec_slot_of(page);
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        let id = self.ids.get(page, host, user);
        let side = &mut self.exec[usize::from(user)];
        side.page[slot] = page;
        side.words |= 1 << word;
        side.used[word] |= bit;
        side.global[word] = side.global[word] & !bit | if global { bit } else { 0 };
        self.exec_id[usize::from(user)][slot] = id;
        id
    }

    fn drop_exec(&mut self, user: usize, slot: usize) {
        self.exec_id[user][slot] = 0;
        self.exec[user].used[slot / 64] &= !(1 << (slot % 64));
    }

    /// Forgets the identity of `page`, if its slot shows that.
    fn drop_exec_of(&mut self, user: usize, page: u64) {
        let slot = exec_slot_of(page);
        if self.exec[user].page[slot] == page {
            self.drop_exec(user, slot);
        }
    }

    /// Enters a mapping for accesses of kind `index`.
    pub fn insert(&mut self, index: u8, m: &Mapping) {
        let slot = slot_of(m.linear);
        let page = m.linear & PAGE;
        let no = invalid_tag(slot);
        let side = &mut self.sides[usize::from(index).min(2)];
        let tag = |allowed: bool| if allowed { page } else { no };
        self.entries[usize::from(index & 3)][slot] =
            TlbEntry { read: tag(m.read), write: tag(m.write), exec: tag(m.exec), host: m.host };
        side.words |= 1 << (slot / 64);
        side.used[slot / 64] |= 1 << (slot % 64);
        let bit = 1 << (slot % 64);
        if m.global {
            side.global[slot / 64] |= bit;
        } else {
            side.global[slot / 64] &= !bit;
        }
        let user = index == 0;
        if m.exec {
            self.enter_exec(user, page, m.host, m.global);
        } else {
            self.drop_exec_of(user.into(), page);
        }
        if m.page_bytes > 4096 {
            let start = m.linear & !(m.page_bytes - 1);
            let end = start | (m.page_bytes - 1);
            let large = &mut self.large[half(start)];
            let (s, e) = large.unwrap_or((start, end));
            *large = Some((s.min(start), e.max(end)));
        }
    }

    fn drop_slot(&mut self, index: usize, slot: usize) {
        self.entries[index][slot] = empty(slot);
        let side = &mut self.sides[index];
        side.used[slot / 64] &= !(1 << (slot % 64));
        side.global[slot / 64] &= !(1 << (slot % 64));
    }

    /// Forgets everything.
    pub fn flush_all(&mut self) {
        self.large = [None; 2];
        self.walked.forget_all();
        self.flush(|_| u64::MAX);
    }

    /// Forgets everything that is not global, but for what was walked (a load of CR3).
    pub fn flush_non_global(&mut self) {
        self.flush(|global| !global);
    }

    fn flush(&mut self, which: impl Fn(u64) -> u64) {
        for index in 0..self.sides.len() {
            let mut words = self.sides[index].words;
            while words != 0 {
                let word = words.trailing_zeros() as usize;
                words &= words - 1;
                let mut bits = self.sides[index].used[word] & which(self.sides[index].global[word]);
                while bits != 0 {
                    let slot = word * 64 + bits.trailing_zeros() as usize;
                    self.drop_slot(index, slot);
                    bits &= bits - 1;
                }
                let side = &mut self.sides[index];
                side.words &= !(u32::from(side.used[word] == 0) << word);
            }
        }
        for user in 0..2 {
            let mut words = self.exec[user].words;
            while words != 0 {
                let word = words.trailing_zeros() as usize;
                words &= words - 1;
                let mut bits = self.exec[user].used[word] & which(self.exec[user].global[word]);
                while bits != 0 {
                    self.drop_exec(user, word * 64 + bits.trailing_zeros() as usize);
                    bits &= bits - 1;
                }
                let side = &mut self.exec[user];
                side.words &= !(u128::from(side.used[word] == 0) << word);
            }
        }
    }

    /// Forgets the page of `linear` in the address space `pcid` (INVLPG): all of a large page if it may be one.
    pub fn flush_page(&mut self, pcid: u16, linear: u64) {
        if self.large[half(linear)].is_some_and(|(start, end)| (start..=end).contains(&linear)) {
            return self.flush_all();
        }
        self.walked.forget_page(pcid, linear);
        let slot = slot_of(linear);
        for index in 0..self.sides.len() {
            let e = &self.entries[index][slot];
            if [e.read, e.write, e.exec].iter().any(|tag| (tag ^ linear) & PAGE == 0) {
                self.drop_slot(index, slot);
            }
        }
        (0..2).for_each(|user| self.drop_exec_of(user, linear & PAGE));
    }

    /// Takes the right to write without a look from every mapping.
    pub fn drop_write_tags(&mut self) {
        self.revoke(|_| true);
    }

    /// Takes the right to write without a look from every mapping of the RAM page at `host`.
    pub fn revoke_write(&mut self, host: u64) {
        self.revoke(|e| e.host == host);
    }

    fn revoke(&mut self, which: impl Fn(&TlbEntry) -> bool) {
        for (side, entries) in self.sides.iter().zip(&mut self.entries) {
            for word in 0..ENTRIES / 64 {
                let mut bits = side.used[word];
                while bits != 0 {
                    let slot = word * 64 + bits.trailing_zeros() as usize;
                    let e = &mut entries[slot];
                    if which(e) {
                        e.write = invalid_tag(slot);
                    }
                    bits &= bits - 1;
                }
            }
        }
    }
}

impl Default for Tlb {
    fn default() -> Self {
        Self::new()
    }
}

/// Identities of executable mappings, remembered across flushes so that decoded code found by them stays
/// reachable after a change of address space and back.
struct Ids {
    /// The mapping in two numbers, and its identity, or 0: four of them are in a cache line.
    known: Box<[(u64, u32, u32)]>,
    next: u32,
}

impl Ids {
    const SIZE: usize = 16384;

    fn new() -> Self {
        Self { known: vec![(0, 0, 0); Self::SIZE].into_boxed_slice(), next: 0 }
    }

    fn get(&mut self, page: u64, host: u64, user: bool) -> u32 {
        // Offsets in RAM have `PHYSICAL_BITS`: ten bits of what numbers a linear page are free.
        let (page_number, host_number) = (page >> 12, host >> 12);
        let key = (page_number | u64::from(user) << 52 | host_number >> 32 << 53, host_number as u32);
        let hash = (page >> 12).wrapping_mul(0x9E37_79B9_7F4A_7C15)
            ^ (host >> 12).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
        let slot = &mut self.known[(hash >> 40) as usize % Self::SIZE];
        if (slot.0, slot.1) != key || slot.2 == 0 {
            // 2^32 mappings take days of nothing but page faults; identities start over with an empty memory.
            self.next = self.next.wrapping_add(1).max(1);
            *slot = (key.0, key.1, self.next);
        }
        slot.2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(linear: u64, host: u64) -> Mapping {
        Mapping { linear, host, read: true, write: true, exec: true, global: false, page_bytes: 4096 }
    }
    fn readable(tlb: &Tlb, index: u8, linear: u64, bytes: u64) -> bool {
        linear ^ tlb.entry(index, linear).read <= 4096 - bytes
    }

    #[test]
    fn empty_matches_nothing() {
        let tlb = Tlb::new();
        for linear in [0, 0x1000, 0x1FF000, PAGE, 0xFFFF_8000_0000_0000, 0x20_0000] {
            for index in 0..3 {
                assert!(!readable(&tlb, index, linear, 1), "{linear:#x}");
            }
        }
    }

    #[test]
    fn insert_revoke_flush() {
        let mut tlb = Tlb::new();
        tlb.insert(1, &mapping(0x5000, 0x9000));
        assert!(
            readable(&tlb, 1, 0x5FF8, 8) && !readable(&tlb, 1, 0x5FF9, 8) && !readable(&tlb, 0, 0x5000, 1)
        );
        let id = tlb.exec_id(false, 0x5000);
        assert!(id != 0 && tlb.exec_id(true, 0x5000) == 0);
        tlb.revoke_write(0x9000);
        assert!(0x5000 ^ tlb.entry(1, 0x5000).write >= 4096);
        tlb.flush_non_global();
        assert!(!readable(&tlb, 1, 0x5000, 1) && tlb.exec_id(false, 0x5000) == 0);
        tlb.insert(1, &mapping(0x5000, 0x9000));
        assert_eq!(tlb.exec_id(false, 0x5000), id, "the same mapping keeps its identity");
        tlb.insert(1, &mapping(0x5000, 0xA000));
        assert_ne!(tlb.exec_id(false, 0x5000), id);
    }

    #[test]
    fn identities_are_of_the_page_that_asks() {
        let mut tlb = Tlb::new();
        tlb.insert(1, &mapping(0x5000, 0x9000));
        let id = tlb.exec_id(false, 0x5000);
        // Another page in the same slot, by the other array of the supervisor's.
        let other = 0x5000 + (EXEC_ENTRIES as u64) * 4096;
        tlb.insert(2, &mapping(other, 0xA000));
        assert_ne!(tlb.exec_id(false, 0x5000), id);
        assert_eq!(tlb.claim_exec_id(1, 0x5000), id);
        assert_eq!(tlb.exec_id(false, 0x5000), id);
        assert_eq!(tlb.claim_exec_id(1, other), 0);
    }

    #[test]
    fn what_a_flush_leaves_the_next_one_finds() {
        let mut tlb = Tlb::new();
        let last = (ENTRIES as u64 - 1) << 12;
        for (linear, global) in [(0x5000, true), (0x6000, false), (last, false)] {
            tlb.insert(1, &Mapping { global, ..mapping(linear, 0x9000) });
        }
        tlb.flush_non_global();
        let readable_of = |tlb: &Tlb| [0x5000, 0x6000, last].map(|linear| readable(tlb, 1, linear, 1));
        assert_eq!(readable_of(&tlb), [true, false, false]);
        tlb.insert(1, &mapping(last, 0x9000));
        tlb.flush_all();
        assert_eq!(readable_of(&tlb), [false; 3]);
        assert_eq!([0x5000, 0x6000, last].map(|linear| tlb.exec_id(false, linear)), [0; 3]);
    }

    #[test]
    fn global_and_large_pages() {
        let mut tlb = Tlb::new();
        tlb.insert(2, &Mapping { global: true, page_bytes: 1 << 21, ..mapping(0x20_3000, 0x3000) });
        tlb.flush_non_global();
        assert!(readable(&tlb, 2, 0x20_3000, 1));
        tlb.flush_page(0, 0x3F_F000);
        assert!(!readable(&tlb, 2, 0x20_3000, 1), "another address of the same large page");
    }
}
