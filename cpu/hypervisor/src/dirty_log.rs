//! Which pages of RAM were written: what a live migration or an incremental backup copies again.
//!
//! Implemented by engines, for writes of their vCPUs and of devices alike.

use crate::engine::EngineError;
use alloc::vec;
use alloc::vec::Vec;

/// A partition's log. One user at a time.
///
/// A write that ended before `take` began is in what `take` gives, or in what an earlier one gave; one that happens
/// meanwhile is in this one or in the next. With vCPUs parked and devices quiet the last `take` is complete.
pub trait DirtyLog: Send + Sync {
    /// Starts with all pages clean.
    fn start(&self) -> Result<(), EngineError>;
    /// Pages of the span that were written since `start` or the last `take`; they are clean from now on.
    fn take(&self) -> Result<PageSet, EngineError>;
    /// Ends it; nothing is tracked any more.
    fn stop(&self);
}

/// Pages of the span of guest RAM, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// Without any of `pages` pages.
    pub fn empty(pages: u64) -> Self {
        Self { pages, words: vec![0; pages.div_ceil(64) as usize] }
    }

    /// Adds one; beyond the span it is none.
    pub fn insert(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Adds those of a bitmap whose first bit is page `first`.
    pub fn insert_bitmap(&mut self, first: u64, bitmap: &[u64]) {
        for (at, word) in (first..).step_by(64).zip(bitmap) {
            let mut rest = *word;
            while rest != 0 {
                self.insert(at + u64::from(rest.trailing_zeros()));
                rest &= rest - 1;
            }
        }
    }

    /// Adds those of `other`.
    pub fn union(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(mine, other)| *mine |= other);
    }

    /// Whether it has `page`.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Its pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let bits = |(at, word): (u64, &u64)| {
            let word = *word;
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| at + bit)
        };
        (0..).step_by(64).zip(&self.words).flat_map(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_out_as_they_went_in() {
        let mut set = PageSet::empty(130);
        set.insert(129);
        set.insert(1 << 40);
        set.insert_bitmap(60, &[1 << 4 | 1, 1 << 63]);
        assert_eq!(set.iter().collect::<Vec<_>>(), [60, 64, 129]);
        let mut other = PageSet::empty(130);
        other.insert(3);
        other.union(&set);
        assert_eq!(other.iter().collect::<Vec<_>>(), [3, 60, 64, 129]);
        assert!(other.contains(64) && !other.contains(65) && !other.contains(u64::MAX));
    }
}
