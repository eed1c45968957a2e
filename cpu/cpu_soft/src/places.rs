//! A hash table of numbers: which block is at a place. Whoever has the blocks compares.
//!
//! A slot holds half of the hash beside the number, so that a place that is not in the table costs one cache line, and one that
//! is, the block's besides: where code is cold nothing else is near (ADR 6). Slots are small for the same reason.

use alloc::boxed::Box;
use alloc::vec;

/// Slots of an empty table, and of the largest: then hashes have 16 bits besides.
const LEAST: usize = 1024;
const MOST: usize = 1 << 16;
/// Numbers are less than this.
pub const MOST_NUMBERS: usize = MOST / 8 * 7;

/// A number, and the upper half of the hash of its place.
#[derive(Clone, Copy)]
struct Slot {
    half: u16,
    id: u16,
}

/// The number that nobody has.
const EMPTY: Slot = Slot { half: 0, id: u16::MAX };

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
        let slots = (numbers * 8).div_ceil(7).next_power_of_two();
        if slots < LEAST { LEAST * size_of::<Slot>() } else { slots * size_of::<Slot>() }
    }

    fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    /// The slot with a number of hash `hash` that is the `same`, or the empty one where it would be.
    #[inline]
    fn slot(&self, hash: u32, same: impl Fn(u32) -> bool) -> usize {
        let (mut at, half) = (hash as usize & self.mask(), (hash >> 16) as u16);
        loop {
            let slot = self.slots[at];
            if slot.id == EMPTY.id || slot.half == half && same(slot.id.into()) {
                return at;
            }
            at = (at + 1) & self.mask();
        }
    }

    /// The number of hash `hash` that is the `same`.
    #[inline]
    pub fn find(&self, hash: u32, same: impl Fn(u32) -> bool) -> Option<u32> {
        let id = self.slots[self.slot(hash, same)].id;
        (id != EMPTY.id).then_some(id.into())
    }

    /// Puts a number in, in place of the one that is the `same`; `hash_of` knows the hashes of those that are in. Panics if
    /// `id` is not less than [`MOST_NUMBERS`].
    pub fn insert(&mut self, hash: u32, id: u32, same: impl Fn(u32) -> bool, hash_of: impl Fn(u32) -> u32) {
        assert!((id as usize) < MOST_NUMBERS, "number {id} in a table of places");
        let mut at = self.slot(hash, same);
        if self.slots[at].id == EMPTY.id {
            if (self.used + 1) * 8 > self.slots.len() * 7 {
                self.grow(hash_of);
                at = self.slot(hash, |_| false);
            }
            self.used += 1;
        }
        self.slots[at] = Slot { half: (hash >> 16) as u16, id: id as u16 };
    }

    fn grow(&mut self, hash_of: impl Fn(u32) -> u32) {
        let more = vec![EMPTY; self.slots.len() * 2].into_boxed_slice();
        let old = core::mem::replace(&mut self.slots, more);
        for slot in old.iter().filter(|slot| slot.id != EMPTY.id) {
            let at = self.slot(hash_of(slot.id.into()), |_| false);
            self.slots[at] = *slot;
        }
    }

    /// Takes the number `id` of hash `hash` out, if it is in it. `hash_of`: see [`Places::insert`].
    pub fn remove(&mut self, hash: u32, id: u32, hash_of: impl Fn(u32) -> u32) {
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
            let home = hash_of(slot.id.into()) as usize & self.mask();
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
            let hash = |place: u32| (place * 7 % 23).wrapping_sub(9) ^ (place % 3) << 16;
            let mut names: Vec<u32> = Vec::new();
            for (what, more, place) in steps {
                let place = place + more * 1000;
                match what {
                    0 | 1 => {
                        names.push(place);
                        let id = names.len() as u32 - 1;
                        places.insert(hash(place), id, |id| names[id as usize] == place, |id| hash(names[id as usize]));
                        map.insert(place, id);
                    }
                    _ => {
                        let known = map.remove(&place);
                        places.remove(hash(place), known.unwrap_or(u32::MAX), |id| hash(names[id as usize]));
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
        let hash = |n: u32| n.wrapping_mul(0x9E37_79B9);
        let all = MOST_NUMBERS as u32;
        (0..all).for_each(|n| places.insert(hash(n), n, |known| known == n, hash));
        assert_eq!(places.slots.len() * size_of::<Slot>(), Places::bytes(MOST_NUMBERS));
        let find = |places: &Places, n: u32| places.find(hash(n), |known| known == n);
        assert!((0..all).all(|n| find(&places, n) == Some(n)));
        (0..all).step_by(2).for_each(|n| places.remove(hash(n), n, hash));
        assert!((0..all).all(|n| find(&places, n).is_none() == (n % 2 == 0)));
        places.clear();
        assert!((0..all).all(|n| find(&places, n).is_none()));
    }
}
