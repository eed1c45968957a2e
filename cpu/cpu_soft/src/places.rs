//! A hash table of numbers: which block is at a place. Whoever has the blocks compares.
//!
//! A slot holds the hash beside the number, so that a place that is not in it costs one cache line, and one that is, the block's
//! besides: where code is cold nothing else is near (ADR 6).

use alloc::boxed::Box;
use alloc::vec;

/// Slots of an empty table.
const LEAST: usize = 1024;

/// A number and the hash of its place; [`EMPTY`] of none.
#[derive(Clone, Copy)]
struct Slot {
    hash: u32,
    id: u32,
}

/// The number that nobody has.
const EMPTY: Slot = Slot { hash: 0, id: u32::MAX };

/// See the module's header.
pub struct Places {
    /// A power of two of them, of which one in eight or more is empty.
    slots: Box<[Slot]>,
    used: usize,
}

impl Places {
    /// Without any.
    pub fn new() -> Self {
        Self { slots: vec![EMPTY; LEAST].into_boxed_slice(), used: 0 }
    }

    /// Bytes of a table of so many.
    pub const fn bytes(numbers: usize) -> usize {
        let slots = (numbers + numbers / 7 + 1).next_power_of_two();
        if slots < LEAST { LEAST * size_of::<Slot>() } else { slots * size_of::<Slot>() }
    }

    fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    /// The slot with a number of hash `hash` that is the `same`, or the empty one where it would be.
    #[inline]
    fn slot(&self, hash: u32, same: impl Fn(u32) -> bool) -> usize {
        let mut at = hash as usize & self.mask();
        loop {
            let slot = self.slots[at];
            if slot.id == EMPTY.id || slot.hash == hash && same(slot.id) {
                return at;
            }
            at = (at + 1) & self.mask();
        }
    }

    /// The number of hash `hash` that is the `same`.
    #[inline]
    pub fn find(&self, hash: u32, same: impl Fn(u32) -> bool) -> Option<u32> {
        let id = self.slots[self.slot(hash, same)].id;
        (id != EMPTY.id).then_some(id)
    }

    /// Puts a number in, in place of the one that is the `same`. `id` is not `u32::MAX`.
    pub fn insert(&mut self, hash: u32, id: u32, same: impl Fn(u32) -> bool) {
        debug_assert_ne!(id, EMPTY.id);
        let mut at = self.slot(hash, same);
        if self.slots[at].id == EMPTY.id {
            if (self.used + 1) * 8 > self.slots.len() * 7 {
                self.grow();
                at = self.slot(hash, |_| false);
            }
            self.used += 1;
        }
        self.slots[at] = Slot { hash, id };
    }

    fn grow(&mut self) {
        let more = vec![EMPTY; self.slots.len() * 2].into_boxed_slice();
        let old = core::mem::replace(&mut self.slots, more);
        for slot in old.iter().filter(|slot| slot.id != EMPTY.id) {
            let at = self.slot(slot.hash, |_| false);
            self.slots[at] = *slot;
        }
    }

    /// Takes the number `id` of hash `hash` out, if it is in it.
    pub fn remove(&mut self, hash: u32, id: u32) {
        let mut hole = self.slot(hash, |known| known == id);
        if self.slots[hole].id == EMPTY.id {
            return;
        }
        self.used -= 1;
        // What was put behind it because it was in the way moves up.
        let mut at = hole;
        loop {
            at = (at + 1) & self.mask();
            let slot = self.slots[at];
            if slot.id == EMPTY.id {
                break;
            }
            let home = slot.hash as usize & self.mask();
            let (way, back) = (at.wrapping_sub(home) & self.mask(), at.wrapping_sub(hole) & self.mask());
            if way >= back {
                self.slots[hole] = slot;
                hole = at;
            }
        }
        self.slots[hole] = EMPTY;
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.slots.fill(EMPTY);
        self.used = 0;
    }
}

impl Default for Places {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        /// Few hashes, near each other and around the end of the table: chains of all kinds.
        #[test]
        fn it_is_as_a_map(steps in prop::collection::vec((0u32..3, 0u32..6, 0u32..40), 1..4000)) {
            let mut places = Places::new();
            let mut map = BTreeMap::new();
            let hash = |place: u32| (place * 7 % 23).wrapping_sub(9);
            let mut names: Vec<u32> = Vec::new();
            for (what, more, place) in steps {
                let place = place + more * 1000;
                let hash = hash(place);
                match what {
                    0 | 1 => {
                        names.push(place);
                        let id = names.len() as u32 - 1;
                        places.insert(hash, id, |id| names[id as usize] == place);
                        map.insert(place, id);
                    }
                    _ => {
                        let known = map.remove(&place);
                        places.remove(hash, known.unwrap_or(u32::MAX - 1));
                    }
                }
            }
            for place in (0..6).flat_map(|more| (0..40).map(move |place| place + more * 1000)) {
                prop_assert_eq!(
                    places.find(hash(place), |id| names[id as usize] == place),
                    map.get(&place).copied()
                );
            }
            prop_assert_eq!(places.used, map.len());
        }
    }

    #[test]
    fn it_grows_and_forgets() {
        let mut places = Places::new();
        for n in 0..100_000u32 {
            places.insert(n.wrapping_mul(0x9E37_79B9), n, |known| known == n);
        }
        assert_eq!(places.slots.len() * size_of::<Slot>(), Places::bytes(100_000));
        let find = |places: &Places, n: u32| places.find(n.wrapping_mul(0x9E37_79B9), |known| known == n);
        assert!((0..100_000).all(|n| find(&places, n) == Some(n)));
        places.clear();
        assert!((0..100_000).all(|n| find(&places, n).is_none()));
    }
}
