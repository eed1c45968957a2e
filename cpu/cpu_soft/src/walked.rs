//! What page walks found, kept across address spaces: the second level of the soft TLB.
//!
//! An entry is of the address space (PCID) that was current, or global. It is good while it bears the stamp of that;
//! a flush takes the stamp away, from one address space or from all, so that it costs the same however much there is. Stamps
//! are numbers that never come back.

use crate::tlb::Mapping;
use alloc::boxed::Box;
use alloc::vec;

const ENTRIES: usize = 8192;
const PCIDS: usize = 4096;
const PAGE: u64 = !0xFFF;

/// Bytes of the second level.
pub const BYTES: usize = ENTRIES * size_of::<Entry>() + PCIDS * size_of::<u64>();

/// A mapping in few bytes: the more of them stay in the host's caches.
#[derive(Clone, Copy)]
struct Entry {
    /// Linear page, and the index of the TLB's array in its low bits.
    key: u64,
    /// 0: of nothing.
    stamp: u64,
    /// Page in the RAM span; in its low bits the rights, and log2 of the guest's page.
    host: u64,
}

impl Entry {
    const READ: u64 = 1;
    const WRITE: u64 = 2;
    const EXEC: u64 = 4;
    const GLOBAL: u64 = 8;
    const LOG2: u32 = 4;

    fn new(key: u64, stamp: u64, m: &Mapping) -> Self {
        let bit = |has: bool, bit: u64| if has { bit } else { 0 };
        let rights = bit(m.read, Self::READ) | bit(m.write, Self::WRITE) | bit(m.exec, Self::EXEC);
        let log2 = u64::from(m.page_bytes.trailing_zeros()) << Self::LOG2;
        Self { key, stamp, host: m.host & PAGE | rights | bit(m.global, Self::GLOBAL) | log2 }
    }

    fn mapping(&self) -> Mapping {
        let has = |bit: u64| self.host & bit != 0;
        Mapping {
            linear: self.key & PAGE,
            host: self.host & PAGE,
            read: has(Self::READ),
            write: has(Self::WRITE),
            exec: has(Self::EXEC),
            global: has(Self::GLOBAL),
            page_bytes: 1 << (self.host >> Self::LOG2 & 0x3F),
        }
    }
}

/// See the module's header.
pub struct Walked {
    entries: Box<[Entry]>,
    /// Stamps of the PCIDs; one that is not above `all` is none any more.
    stamps: Box<[u64]>,
    /// The last flush of all PCIDs.
    all: u64,
    /// Stamp of global entries.
    global: u64,
    next: u64,
}

/// Slot of an entry; `space` is 0 for global ones.
fn slot(key: u64, space: usize) -> usize {
    let spread = (space as u64).wrapping_mul(0x9E37_79B9) ^ key >> 12 ^ (key & 3) << 11 ^ key >> 25;
    spread as usize & (ENTRIES - 1)
}

/// Slot of an entry of `pcid`.
fn slot_of(key: u64, pcid: u16) -> usize {
    slot(key, usize::from(pcid) % PCIDS + 1)
}

impl Walked {
    /// Nothing was walked yet.
    pub fn new() -> Self {
        let entries = vec![Entry { key: 0, stamp: 0, host: 0 }; ENTRIES].into_boxed_slice();
        Self { entries, stamps: vec![0; PCIDS].into_boxed_slice(), all: 1, global: 2, next: 2 }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// What is known of `linear` in the address space `pcid` for accesses of kind `index`.
    pub fn find(&self, pcid: u16, index: u8, linear: u64) -> Option<Mapping> {
        let key = linear & PAGE | u64::from(index);
        let stamp = self.stamps[usize::from(pcid) % PCIDS];
        let global = &self.entries[slot(key, 0)];
        if global.key == key && global.stamp == self.global {
            return Some(global.mapping());
        }
        let own = &self.entries[slot_of(key, pcid)];
        (own.key == key && own.stamp == stamp && stamp > self.all).then(|| own.mapping())
    }

    /// Keeps what a walk in `pcid` for an access of kind `index` found; `write` as if no code were in the page.
    pub fn keep(&mut self, pcid: u16, index: u8, mapping: &Mapping) {
        let key = mapping.linear & PAGE | u64::from(index);
        let (at, stamp) = match mapping.global {
            true => (slot(key, 0), self.global),
            false => (slot_of(key, pcid), self.stamp(pcid)),
        };
        self.entries[at] = Entry::new(key, stamp, mapping);
    }

    /// The stamp of `pcid`, a new one if it has none.
    fn stamp(&mut self, pcid: u16) -> u64 {
        let pcid = usize::from(pcid) % PCIDS;
        if self.stamps[pcid] <= self.all {
            self.stamps[pcid] = self.number();
        }
        self.stamps[pcid]
    }

    /// Forgets the page of `linear` in the address space `pcid` and, as all that may be one, of global entries.
    pub fn forget_page(&mut self, pcid: u16, linear: u64) {
        for index in 0..3 {
            let key = linear & PAGE | index;
            for at in [slot(key, 0), slot_of(key, pcid)] {
                let e = &mut self.entries[at];
                if e.key == key {
                    e.stamp = 0;
                }
            }
        }
    }

    /// Forgets all of one address space that is not global.
    pub fn forget_space(&mut self, pcid: u16) {
        self.stamps[usize::from(pcid) % PCIDS] = 0;
    }

    /// Forgets all that is not global.
    pub fn forget_spaces(&mut self) {
        self.all = self.number();
    }

    /// Forgets everything.
    pub fn forget_all(&mut self) {
        self.global = self.number();
        self.forget_spaces();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(linear: u64, global: bool) -> Mapping {
        Mapping {
            linear,
            host: linear + 0x1000,
            read: true,
            write: true,
            exec: true,
            global,
            page_bytes: 4096,
        }
    }

    #[test]
    fn what_is_kept_is_found() {
        let mut w = Walked::new();
        for n in 0..64u64 {
            let has = |bit: u32| n >> bit & 1 != 0;
            let m = Mapping {
                linear: n << 40 | 0x9000,
                host: (1 << 46) - 0x1000 * (n + 1),
                read: has(0),
                write: has(1),
                exec: has(2),
                global: has(3),
                page_bytes: 1 << [12, 21, 22, 30][n as usize >> 4],
            };
            w.keep(1, 2, &m);
            assert_eq!(w.find(1, 2, m.linear | 0xABC), Some(m));
        }
    }

    #[test]
    fn address_spaces_keep_their_own() {
        let mut w = Walked::new();
        w.keep(0, 0, &mapping(0x5000, false));
        w.keep(0, 1, &mapping(0x6000, true));
        assert!(w.find(7, 0, 0x5000).is_none() && w.find(7, 1, 0x6008).is_some());
        assert!(w.find(7, 2, 0x6000).is_none());
        w.keep(7, 0, &mapping(0x5000, false));
        assert!(w.find(0, 0, 0x5000).is_some());
        w.forget_space(0);
        assert!(w.find(0, 0, 0x5000).is_none());
        assert_eq!(w.find(7, 0, 0x5FFF).map(|m| m.host), Some(0x6000));
        w.forget_spaces();
        assert!(w.find(7, 0, 0x5000).is_none() && w.find(7, 1, 0x6000).is_some());
        w.forget_all();
        assert!(w.find(7, 1, 0x6000).is_none());
    }

    #[test]
    fn one_page_is_forgotten_in_one_space() {
        let mut w = Walked::new();
        [3, 4].into_iter().for_each(|pcid| w.keep(pcid, 0, &mapping(0x7000, false)));
        w.keep(4, 2, &mapping(0x8000, true));
        w.forget_page(3, 0x7123);
        assert!(w.find(4, 0, 0x7000).is_some() && w.find(3, 0, 0x7000).is_none());
        w.forget_page(3, 0x8000);
        assert!(w.find(4, 2, 0x8000).is_none());
    }
}
