//! Blocks of one vCPU, found by where they lie in RAM and the mode they run in.
//!
//! A block never leaves its page. It is keyed by (offset in the RAM span, mode key): no linear address is
//! in it, so that all mappings of a page share its blocks. How a linear address leads to one is cached
//! beside (`jumps`) under the identity that the TLB gives the mapping.
//!
//! Blocks and their operations lie in two rings: what is new takes the place of what is oldest. How often that ran is kept
//! a while (`past`), so that code which is hot stays so for the translator.

use crate::block::MAX_CHECKED;
use crate::core::{NO_PAGE, SoftCore};
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use guest_memory::GuestRam;
use hashbrown::{HashMap, HashTable};
use x86_decode::MAX_LENGTH;
use x86_emulate::{ModeKey, Op};

/// Operations that are kept (32 bytes each), and blocks: a power of two.
const fn sizes(vcpus: usize) -> (usize, usize) {
    match vcpus {
        0 | 1 => (256 << 10, 64 << 10),
        2 => (160 << 10, 32 << 10),
        _ => (128 << 10, 32 << 10),
    }
}
/// Operations from which on there is room for all: growing step by step would leave holes.
const FEW_OPS: usize = 16 << 10;
const JUMPS: usize = 8192;
/// Places whose blocks were dropped for want of room.
const PAST: usize = 32 << 10;
/// Least heat that is kept of those.
const LUKEWARM: u32 = 2;

/// Number of a block. They come back after 2^32 blocks only.
pub type BlockId = u32;

/// Number of no block.
const NOBODY: BlockId = BlockId::MAX;

/// See the module's header.
pub struct Block {
    /// Its number; of one that was dropped the complement, which is looked for elsewhere.
    id: BlockId,
    /// First operation in the ring.
    first: u32,
    /// Operations, the closing one included.
    ops: u16,
    /// Instructions.
    pub instructions: u16,
    /// Bytes that they take.
    pub bytes: u16,
    /// Mode of its code.
    mode: ModeKey,
    /// Offset in the RAM span.
    at: u64,
    /// Times that it was run, to 2^32 - 1; for the translator.
    heat: u32,
    /// Its neighbours among the blocks of its page.
    before: BlockId,
    behind: BlockId,
    /// The bytes that it was made from, if it checks itself (`mixed.rs`).
    original: Option<Box<[u8]>>,
}

impl Block {
    /// The page in which a store ends it.
    #[inline(always)]
    pub fn watched_page(&self) -> u64 {
        if self.original.is_some() { NO_PAGE } else { self.at >> 12 }
    }
    /// Whether it checks itself.
    pub fn checks_itself(&self) -> bool {
        self.original.is_some()
    }
}

/// How a linear address led to a block.
#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    mode: ModeKey,
    exec_id: u32,
    block: BlockId,
}

/// Heat of a block that was dropped: a part of its place's hash, and how often it ran.
type Past = (u16, u16);

/// See the module's header.
pub struct BlockCache {
    /// Operations and blocks at most.
    most_ops: usize,
    most_blocks: usize,
    ops: Vec<Op<SoftCore>>,
    /// Where in `ops` the next block goes.
    next_op: usize,
    /// By number, modulo `most_blocks`.
    blocks: Vec<Block>,
    /// Numbers of the oldest block that is kept, and of the next one.
    oldest: BlockId,
    next: BlockId,
    by_place: HashTable<BlockId>,
    /// The newest block of each page.
    by_page: HashMap<u64, BlockId>,
    jumps: Box<[Jump]>,
    past: Box<[Past]>,
}

fn place_hash(at: u64, mode: ModeKey) -> u64 {
    let mixed = (at ^ u64::from(mode.0) << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ mixed >> 32
}

/// Slot in `past` and what names the place there.
fn past_slot(at: u64, mode: ModeKey) -> (usize, u16) {
    let hash = place_hash(at, mode);
    (hash as usize % PAST, (hash >> 40) as u16)
}

impl BlockCache {
    /// An empty cache, of one of `vcpus`.
    pub fn new(vcpus: usize) -> Self {
        let (most_ops, most_blocks) = sizes(vcpus);
        let none = Jump { linear: 0, mode: ModeKey(0), exec_id: 0, block: 0 };
        Self {
            most_ops,
            most_blocks,
            ops: Vec::new(),
            next_op: 0,
            blocks: Vec::new(),
            oldest: 0,
            next: 0,
            by_place: HashTable::new(),
            by_page: HashMap::new(),
            jumps: vec![none; JUMPS].into_boxed_slice(),
            past: vec![(0, 0); PAST].into_boxed_slice(),
        }
    }

    #[inline(always)]
    fn jump_slot(linear: u64) -> usize {
        (linear ^ linear >> 13) as usize & (JUMPS - 1)
    }

    /// The block that `linear` led to before, if that still holds.
    #[inline(always)]
    pub fn jump(&self, linear: u64, mode: ModeKey, exec_id: u32) -> Option<BlockId> {
        let j = &self.jumps[Self::jump_slot(linear)];
        (j.linear == linear && j.mode == mode && j.exec_id == exec_id && exec_id != 0).then_some(j.block)
    }

    /// Remembers where `linear` led.
    pub fn remember(&mut self, linear: u64, mode: ModeKey, exec_id: u32, block: BlockId) {
        self.jumps[Self::jump_slot(linear)] = Jump { linear, mode, exec_id, block };
    }

    #[inline(always)]
    fn slot(&self, id: BlockId) -> usize {
        id as usize & (self.most_blocks - 1)
    }

    #[inline(always)]
    fn block(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(self.slot(id)).filter(|b| b.id == id)
    }
    fn block_mut(&mut self, id: BlockId) -> Option<&mut Block> {
        let slot = self.slot(id);
        self.blocks.get_mut(slot).filter(|b| b.id == id)
    }

    /// The block and its operations, if it is still valid.
    #[inline(always)]
    pub fn get(&self, id: BlockId) -> Option<(&Block, &[Op<SoftCore>])> {
        let b = self.block(id)?;
        let ops = self.ops.get(b.first as usize..b.first as usize + usize::from(b.ops))?;
        Some((b, ops))
    }

    /// Counts that a block runs; how often it has, its RAM page, and whether it checks itself.
    pub fn warm(&mut self, id: BlockId) -> Option<(u32, u64, bool)> {
        let b = self.block_mut(id)?;
        b.heat = b.heat.saturating_add(1);
        Some((b.heat, b.at >> 12, b.checks_itself()))
    }

    /// Times that a block at a place in RAM was run.
    pub fn heat(&self, at: u64, mode: ModeKey) -> u32 {
        let block = self.find(at, mode).and_then(|id| self.block(id));
        block.map_or(0, |b| b.heat)
    }

    /// The block at a place in RAM.
    pub fn find(&self, at: u64, mode: ModeKey) -> Option<BlockId> {
        let same = |id: &BlockId| self.block(*id).is_some_and(|b| b.at == at && b.mode == mode);
        self.by_place.find(place_hash(at, mode), same).copied()
    }

    /// Whether block `id` is what its bytes in RAM are now, as far as itself has to check that.
    #[inline(always)]
    pub fn is_current(&self, id: BlockId, ram: &GuestRam) -> bool {
        self.block(id).is_some_and(|b| b.original.is_none() || Self::is_original(b, ram))
    }

    #[inline(never)]
    fn is_original(b: &Block, ram: &GuestRam) -> bool {
        let mut now = [0; MAX_CHECKED * MAX_LENGTH];
        let now = &mut now[..usize::from(b.bytes).min(MAX_CHECKED * MAX_LENGTH)];
        ram.load_bytes(b.at, now);
        b.original.as_deref() == Some(&*now)
    }

    /// Adds a block at a place in RAM. `original`: its bytes, if it checks itself.
    pub fn insert(
        &mut self,
        at: u64,
        mode: ModeKey,
        ops: &[Op<SoftCore>],
        original: Option<&[u8]>,
    ) -> BlockId {
        let first = self.make_room(ops.len());
        // Those of a block that was dropped for its bytes are of other bytes.
        let heat = if original.is_none() { self.recall(at, mode) } else { 0 };
        let (id, page) = (self.next, at >> 12);
        let behind = self.by_page.insert(page, id).unwrap_or(NOBODY);
        if let Some(b) = self.block_mut(behind) {
            b.before = id;
        }
        let block = Block {
            id,
            first: first as u32,
            ops: ops.len() as u16,
            instructions: ops.len().max(2) as u16 - 1,
            bytes: ops.last().map_or(0, |op| op.at),
            mode,
            at,
            heat,
            before: NOBODY,
            behind,
            original: original.map(Box::from),
        };
        let slot = self.slot(id);
        put(&mut self.blocks, slot, [block]);
        put(&mut self.ops, first, ops.iter().copied());
        self.next_op = first + ops.len();
        self.next += 1;
        let (blocks, most) = (&self.blocks, self.most_blocks);
        let hash = |id: &BlockId| {
            let b = &blocks[*id as usize & (most - 1)];
            place_hash(b.at, b.mode)
        };
        self.by_place.insert_unique(place_hash(at, mode), id, hash);
        id
    }

    /// Drops the oldest blocks until there is room for one more, of `count` operations; where in the ring these go.
    fn make_room(&mut self, count: usize) -> usize {
        if self.next == NOBODY {
            self.clear();
        }
        let mut first = self.next_op;
        if first + count > self.most_ops {
            // What is left at the end is not used in this turn.
            self.drop_oldest(first..self.most_ops);
            first = 0;
        }
        self.drop_oldest(first..first + count);
        if (self.next - self.oldest) as usize == self.most_blocks {
            self.drop_first();
        }
        if self.ops.len() > FEW_OPS && self.ops.capacity() < self.most_ops {
            self.ops.reserve_exact(self.most_ops - self.ops.len());
            self.blocks.reserve_exact(self.most_blocks - self.blocks.len());
        }
        first
    }

    /// Drops the oldest blocks as far as their operations begin in `range`. (Those of this turn lie in front of it.)
    fn drop_oldest(&mut self, range: core::ops::Range<usize>) {
        while self.oldest != self.next
            && range.contains(&(self.blocks[self.slot(self.oldest)].first as usize))
        {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        if let Some(&Block { at, mode, heat, original: None, .. }) = self.block(self.oldest) {
            self.keep(at, mode, heat);
        }
        self.drop_block(self.oldest);
        self.oldest += 1;
    }

    /// Keeps how hot a block was.
    fn keep(&mut self, at: u64, mode: ModeKey, heat: u32) {
        let (slot, name) = past_slot(at, mode);
        let (known, count) = &mut self.past[slot];
        if *known == name || heat > u32::from(*count) && heat >= LUKEWARM {
            (*known, *count) = (name, heat.min(u16::MAX.into()) as u16);
        } else {
            // Somebody else's, for a while.
            *count /= 2;
        }
    }

    /// How hot the block that was there was.
    fn recall(&self, at: u64, mode: ModeKey) -> u32 {
        let (slot, name) = past_slot(at, mode);
        let (known, count) = self.past[slot];
        if known == name { count.into() } else { 0 }
    }

    /// Drops all code of a RAM page.
    pub fn drop_page(&mut self, page: u64) {
        while let Some(&id) = self.by_page.get(&page) {
            self.drop_block(id);
        }
    }

    /// Drops block `id`.
    pub fn drop_block(&mut self, id: BlockId) {
        let Some(b) = self.block_mut(id) else { return };
        b.id = !id;
        b.original = None;
        let (at, mode, before, behind) = (b.at, b.mode, b.before, b.behind);
        if let Ok(entry) = self.by_place.find_entry(place_hash(at, mode), |known| *known == id) {
            entry.remove();
        }
        if let Some(b) = self.block_mut(behind) {
            b.before = before;
        }
        match self.block_mut(before) {
            Some(b) => b.behind = behind,
            None if behind == NOBODY => _ = self.by_page.remove(&(at >> 12)),
            None => _ = self.by_page.insert(at >> 12, behind),
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.blocks.clear();
        (self.next_op, self.oldest, self.next) = (0, 0, 0);
        self.by_place.clear();
        self.by_page.clear();
        for j in &mut self.jumps {
            j.exec_id = 0;
        }
        self.past.fill((0, 0));
    }
}

/// Bytes of a full cache of one of `vcpus`: rings, hash tables, arrays.
pub const fn most_bytes(vcpus: usize) -> usize {
    let (ops, blocks) = sizes(vcpus);
    ops * size_of::<Op<SoftCore>>()
        + blocks * (size_of::<Block>() + 2 * (size_of::<BlockId>() + 1))
        + JUMPS * size_of::<Jump>()
        + PAST * size_of::<Past>()
}

/// Writes to `ring` from `at` on, where it goes on or has been.
fn put<T>(ring: &mut Vec<T>, at: usize, items: impl IntoIterator<Item = T>) {
    for (n, item) in items.into_iter().enumerate() {
        match ring.get_mut(at + n) {
            Some(place) => *place = item,
            None => ring.push(item),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_emulate::Step;

    fn nothing(_: &mut SoftCore, _: &Op<SoftCore>) -> Step {
        Step::Next
    }

    /// Of different lengths, so that borders fall everywhere; every third one is dropped at once, and some pages are.
    #[test]
    fn rings_keep_what_is_newest() {
        let mode = ModeKey(0);
        let mut cache = BlockCache::new(3);
        let (most_ops, most_blocks) = sizes(3);
        let place = |n: u64| n * 24;
        let (mut ids, mut total) = (Vec::new(), 0);
        for n in 0..100_000u64 {
            let ops = vec![Op { at: n as u16, ..Op::new(nothing) }; 1 + n as usize * 7 % 13];
            let original = (n % 5 == 0).then_some(&[1, 2, 3][..]);
            let id = cache.insert(place(n), mode, &ops, original);
            total += ops.len();
            ids.push(id);
            if n % 3 == 0 {
                cache.drop_block(id);
            }
            if n % 1000 == 999 {
                cache.drop_page(place(n - 500) >> 12);
            }
            assert!(cache.ops.len() <= most_ops && cache.blocks.len() <= most_blocks);
        }
        assert!(total > 4 * most_ops);
        let mut kept = 0;
        for (n, id) in ids.iter().enumerate() {
            let found = cache.find(place(n as u64), mode);
            assert!(found.is_none_or(|found| found == *id) && n % 3 != 0 || found.is_none());
            assert_eq!(cache.get(*id).is_some(), found.is_some(), "block {n}");
            if let Some((block, ops)) = cache.get(*id) {
                assert!(ops.iter().all(|op| op.at == n as u16) && ops.len() == 1 + n * 7 % 13);
                assert_eq!(block.checks_itself(), n % 5 == 0);
                kept += 1;
            }
        }
        // Two thirds of 18,700, less a page in each thousand.
        assert!((10_000..11_000).contains(&kept), "{kept}");
        let linked: usize = cache
            .by_page
            .values()
            .map(|first| core::iter::successors(cache.block(*first), |b| cache.block(b.behind)).count())
            .sum();
        assert_eq!(linked, kept);
        cache.clear();
        assert!(ids.iter().all(|id| cache.get(*id).is_none()) && cache.by_page.is_empty());
    }

    #[test]
    fn heat_outlives_a_block_that_had_to_go() {
        let mode = ModeKey(1);
        let mut cache = BlockCache::new(3);
        let most_blocks = sizes(3).1;
        let op = [Op::new(nothing)];
        let id = cache.insert(0x1000, mode, &op, None);
        (0..20).for_each(|_| _ = cache.warm(id));
        (0..most_blocks as u64).for_each(|n| _ = cache.insert(0x10_0000 + n, mode, &op, None));
        assert!(cache.get(id).is_none());
        let again = cache.insert(0x1000, mode, &op, None);
        assert_eq!((cache.heat(0x1000, mode), cache.warm(again).map(|w| w.0)), (20, Some(21)));
        let itself = cache.insert(0x1000, ModeKey(2), &op, Some(&[0]));
        assert_eq!(cache.warm(itself), Some((1, 1, true)));
    }
}
