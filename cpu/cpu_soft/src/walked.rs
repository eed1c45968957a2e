//! What page walks found, kept across address spaces: the second level of the soft TLB.
//!
//! An entry is of the address space (PCID) that was current, or global. It is good while it bears the stamp of that;
//! a flush gives a new stamp, to one address space or to all, so that it costs the same however much there is. Stamps never
//! come back.

use crate::tlb::Mapping;
use alloc::boxed::Box;
use alloc::vec;

const ENTRIES: usize = 8192;
const PCIDS: usize = 4096;
const PAGE: u64 = !0xFFF;

/// Bytes of the second level.
pub const BYTES: usize = ENTRIES * size_of::<Entry>() + PCIDS * size_of::<u64>();

/// Number of an address space's flushes, and of those of all; 0 of all for global entries.
type Stamp = (u64, u64);

#[derive(Clone, Copy)]
struct Entry {
    /// Linear page, and the index of the TLB's array in its low bits.
    key: u64,
    stamp: Stamp,
    mapping: Mapping,
}

/// See the module's header.
pub struct Walked {
    entries: Box<[Entry]>,
    /// First numbers of the PCIDs' stamps.
    stamps: Box<[u64]>,
    /// Second number of all PCIDs' stamps.
    all: u64,
    /// First number of the stamp of global entries.
    global: u64,
    next: u64,
}

/// Slot of an entry; `space` is 0 for global ones.
fn slot(key: u64, space: usize) -> usize {
    let spread = (space as u64).wrapping_mul(0x9E37_79B9) ^ key >> 12 ^ (key & 3) << 11 ^ key >> 25;
    spread as usize & (ENTRIES - 1)
}

impl Walked {
    /// Nothing was walked yet.
    pub fn new() -> Self {
        let mapping = Mapping {
            linear: 0,
            host: 0,
            read: false,
            write: false,
            exec: false,
            global: false,
            page_bytes: 4096,
        };
        let entries = vec![Entry { key: 0, stamp: (0, 0), mapping }; ENTRIES].into_boxed_slice();
        let stamps = (1..=PCIDS as u64).collect();
        Self { entries, stamps, all: 1, global: PCIDS as u64 + 1, next: PCIDS as u64 + 2 }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Where an entry of `key` is: if it is global, and if it is of `pcid`.
    fn places(&self, pcid: u16, key: u64) -> [(usize, Stamp); 2] {
        let pcid = usize::from(pcid) % PCIDS;
        [(slot(key, 0), (self.global, 0)), (slot(key, pcid + 1), (self.stamps[pcid], self.all))]
    }

    /// What is known of `linear` in the address space `pcid` for accesses of kind `index`.
    pub fn find(&self, pcid: u16, index: u8, linear: u64) -> Option<Mapping> {
        let key = linear & PAGE | u64::from(index);
        let found = self.places(pcid, key).into_iter().map(|(at, stamp)| (self.entries[at], stamp));
        found.filter(|(e, stamp)| e.key == key && e.stamp == *stamp).map(|(e, _)| e.mapping).next()
    }

    /// Keeps what a walk in `pcid` for an access of kind `index` found; `write` as if no code were in the page.
    pub fn keep(&mut self, pcid: u16, index: u8, mapping: &Mapping) {
        let key = mapping.linear & PAGE | u64::from(index);
        let (at, stamp) = self.places(pcid, key)[usize::from(!mapping.global)];
        self.entries[at] = Entry { key, stamp, mapping: *mapping };
    }

    /// Forgets the page of `linear` in the address space `pcid` and, as all that may be one, of global entries.
    pub fn forget_page(&mut self, pcid: u16, linear: u64) {
        for index in 0..3 {
            let key = linear & PAGE | index;
            for (at, _) in self.places(pcid, key) {
                let e = &mut self.entries[at];
                if e.key == key {
                    e.stamp = (0, 0);
                }
            }
        }
    }

    /// Forgets all of one address space that is not global.
    pub fn forget_space(&mut self, pcid: u16) {
        self.stamps[usize::from(pcid) % PCIDS] = self.number();
    }

    /// Forgets all that is not global.
    pub fn forget_spaces(&mut self) {
        self.all += 1;
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
        Mapping { linear, host: linear + 1, read: true, write: true, exec: true, global, page_bytes: 4096 }
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
        assert_eq!(w.find(7, 0, 0x5FFF).map(|m| m.host), Some(0x5001));
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
