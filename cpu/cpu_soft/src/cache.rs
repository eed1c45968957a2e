//! Blocks of one vCPU, found by where they lie in RAM and the mode they run in.
//!
//! A block never leaves its page. It is keyed by (offset in the RAM span, mode key): no linear address is
//! in it, so that all mappings of a page share its blocks. How a linear address leads to one is cached
//! beside (`jumps`) under the identity that the TLB gives the mapping.
//!
//! Where there is no room for another one, those go that were run least of late, half of all or more.

use crate::block::{MAX_CHECKED, MAX_OPS};
use crate::core::{NO_PAGE, SoftCore};
use crate::mmu::{PHYSICAL_BITS, is_canonical};
use crate::places::{MOST_NUMBERS, Places};
use crate::translate::Note;
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use guest_memory::GuestRam;
use hashbrown::HashMap;
use x86_decode::MAX_LENGTH;
use x86_emulate::{ModeKey, Op};

/// Operations that are kept (32 bytes each), and blocks.
const fn sizes(vcpus: usize) -> (usize, usize) {
    match vcpus {
        0 | 1 => (256 << 10, 48 << 10),
        2 => (160 << 10, 32 << 10),
        _ => (128 << 10, 32 << 10),
    }
}
/// Operations from which on there is room for all: growing step by step would leave holes.
const FEW_OPS: usize = 16 << 10;
const JUMPS: usize = 8192;

/// Number of a block in its cache.
pub type BlockId = u32;

/// See the module's header. Two of them are in a cache line.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub struct Block {
    /// First operation in the arena.
    first: u32,
    /// Offset in the RAM span: the lower bits.
    low: u32,
    /// Its upper bits.
    high: u16,
    /// Bytes that its instructions take.
    pub bytes: u16,
    /// Times that it was run, to 65,535; for the translator.
    heat: u16,
    /// Times that it was run since room was made last, or it was built, to 255.
    recent: u8,
    /// Operations, the closing one included.
    ops: u8,
    /// [`Block::LIVE`] and [`Block::CHECKS_ITSELF`].
    state: u8,
    note: Note,
    mode: ModeKey,
    /// The next block of its page, or [`NO_BLOCK`].
    next_in_page: BlockId,
}

const NO_BLOCK: BlockId = u32::MAX;
const _: () = assert!(size_of::<Block>() == 32 && MAX_OPS < u8::MAX as usize && PHYSICAL_BITS <= 48);
const _: () = assert!(size_of::<Jump>() == 16 && MOST_NUMBERS <= 1 << Jump::ID_BITS);
const _: () = assert!(sizes(1).1 <= MOST_NUMBERS && sizes(2).1 <= MOST_NUMBERS);

impl Block {
    const LIVE: u8 = 1;
    /// See `mixed.rs`.
    const CHECKS_ITSELF: u8 = 2;

    #[inline(always)]
    fn is_live(&self) -> bool {
        self.state & Self::LIVE != 0
    }
    /// Offset in the RAM span.
    fn at(&self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
    /// RAM page.
    #[inline(always)]
    pub fn page(&self) -> u64 {
        self.at() >> 12
    }
    /// Instructions; the closing operation is none.
    #[inline(always)]
    pub fn instructions(&self) -> usize {
        usize::from(self.ops).max(2) - 1
    }
    /// The page in which a store ends it.
    #[inline(always)]
    pub fn watched_page(&self) -> u64 {
        if self.checks_itself() { NO_PAGE } else { self.page() }
    }
    /// What the translator noted.
    pub fn note(&self) -> Note {
        self.note
    }
    /// Whether it checks itself.
    #[inline(always)]
    pub fn checks_itself(&self) -> bool {
        self.state & Self::CHECKS_ITSELF != 0
    }
    fn is_at(&self, at: u64, mode: ModeKey) -> bool {
        self.at() == at && self.mode == mode
    }
    fn hash(&self) -> u32 {
        place_hash(self.at(), self.mode)
    }
}

/// For the table of blocks by place.
fn place_hash(at: u64, mode: ModeKey) -> u32 {
    ((at ^ u64::from(mode.0) << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32
}

/// A block, and where its operations are: both can be looked at at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The block.
    pub id: BlockId,
    first: u32,
}

/// How a linear address led to a block of some mode: four of them are in a cache line.
#[derive(Clone, Copy)]
struct Jump {
    /// The linear address, of which 48 bits say all, and the block.
    way: u64,
    exec_id: u32,
    first: u32,
}

impl Jump {
    const ID_BITS: u32 = u16::BITS;

    fn new(linear: u64, exec_id: u32, Found { id, first }: Found) -> Self {
        Self { way: linear << Self::ID_BITS | u64::from(id), exec_id, first }
    }
    fn id(&self) -> BlockId {
        self.way as u32 & ((1 << Self::ID_BITS) - 1)
    }
    /// Whether it is of `linear` as far as 48 bits say.
    #[inline(always)]
    fn is_of(&self, linear: u64) -> bool {
        (self.way ^ linear << Self::ID_BITS) >> Self::ID_BITS == 0
    }
}

/// See the module's header.
pub struct BlockCache {
    most_ops: usize,
    most_blocks: usize,
    arena: Vec<Op<SoftCore>>,
    /// Bytes that the blocks were made from that check themselves. There are few.
    originals: HashMap<BlockId, Box<[u8]>>,
    blocks: Vec<Block>,
    /// Live blocks by [`place_hash`].
    by_place: Places,
    /// The first block of each page that has some.
    by_page: HashMap<u64, BlockId>,
    jumps: Box<[Jump]>,
}

impl BlockCache {
    /// An empty cache of one of so many vCPUs.
    pub fn new(vcpus: usize) -> Self {
        let (most_ops, most_blocks) = sizes(vcpus);
        let none = Jump { way: 0, exec_id: 0, first: 0 };
        Self {
            most_ops,
            most_blocks,
            arena: Vec::new(),
            originals: HashMap::new(),
            blocks: Vec::new(),
            by_place: Places::new(),
            by_page: HashMap::new(),
            jumps: vec![none; JUMPS].into_boxed_slice(),
        }
    }

    #[inline(always)]
    fn jump_slot(linear: u64) -> usize {
        (linear ^ linear >> 13) as usize & (JUMPS - 1)
    }

    /// The block that `linear` led to before, if that still holds; see [`BlockCache::is_current`].
    #[inline(always)]
    pub fn jump(&self, linear: u64, exec_id: u32) -> Option<Found> {
        let j = &self.jumps[Self::jump_slot(linear)];
        let known = j.is_of(linear) && j.exec_id == exec_id && exec_id != 0 && is_canonical(linear);
        known.then_some(Found { id: j.id(), first: j.first })
    }

    /// Where `linear` leads: to block `id`.
    pub fn remember(&mut self, linear: u64, exec_id: u32, id: BlockId) -> Found {
        let found = Found { id, first: self.blocks[id as usize].first };
        self.jumps[Self::jump_slot(linear)] = Jump::new(linear, exec_id, found);
        found
    }

    /// The block and its operations, if it is still valid.
    #[inline(always)]
    pub fn get(&self, Found { id, first }: Found) -> Option<(&Block, &[Op<SoftCore>])> {
        let b = self.blocks.get(id as usize)?;
        let ops = self.arena.get(first as usize..first as usize + usize::from(b.ops))?;
        (b.is_live() && b.first == first).then_some((b, ops))
    }

    /// Counts that a block runs; how often it has, and the block.
    pub fn warm(&mut self, id: BlockId) -> Option<(u32, &Block)> {
        let b = self.blocks.get_mut(id as usize).filter(|b| b.is_live())?;
        b.heat = b.heat.saturating_add(1);
        b.recent = b.recent.saturating_add(1);
        Some((b.heat.into(), b))
    }

    /// Keeps what the translator notes about block `id`.
    pub fn set_note(&mut self, id: BlockId, note: Note) {
        if let Some(b) = self.blocks.get_mut(id as usize) {
            b.note = note;
        }
    }

    /// Times that a block at a place in RAM was run.
    pub fn heat(&self, at: u64, mode: ModeKey) -> u32 {
        let block = self.find(at, mode).and_then(|id| self.blocks.get(id as usize));
        block.map_or(0, |b| b.heat.into())
    }

    /// The block at a place in RAM.
    pub fn find(&self, at: u64, mode: ModeKey) -> Option<BlockId> {
        let same = |id: BlockId| self.blocks[id as usize].is_at(at, mode);
        self.by_place.find(place_hash(at, mode), same)
    }

    /// Whether block `id` is of `mode`, and what its bytes in RAM are now, as far as itself has to check that.
    #[inline(always)]
    pub fn is_current(&self, id: BlockId, mode: ModeKey, ram: &GuestRam) -> bool {
        let right = |b: &Block| b.is_live() && b.mode == mode;
        self.blocks
            .get(id as usize)
            .is_some_and(|b| right(b) && (!b.checks_itself() || self.is_original(id, b, ram)))
    }

    #[inline(never)]
    fn is_original(&self, id: BlockId, b: &Block, ram: &GuestRam) -> bool {
        let len = usize::from(b.bytes);
        let mut now = [0; MAX_CHECKED * MAX_LENGTH];
        let now = &mut now[..len.min(MAX_CHECKED * MAX_LENGTH)];
        ram.load_bytes(b.at(), now);
        self.originals.get(&id).is_some_and(|original| **original == *now)
    }

    /// Adds a block at a place in RAM, where there is none. `original`: its bytes, if it checks itself.
    pub fn insert(
        &mut self,
        at: u64,
        mode: ModeKey,
        ops: &[Op<SoftCore>],
        original: Option<&[u8]>,
    ) -> BlockId {
        if self.arena.len() + ops.len() > self.most_ops || self.blocks.len() == self.most_blocks {
            self.make_room();
        }
        if self.arena.len() > FEW_OPS && self.arena.capacity() < self.most_ops {
            self.arena.reserve_exact(self.most_ops - self.arena.len());
            self.blocks.reserve_exact(self.most_blocks - self.blocks.len());
        }
        let checks_itself = if original.is_some() { Block::CHECKS_ITSELF } else { 0 };
        let block = Block {
            first: self.arena.len() as u32,
            low: at as u32,
            high: (at >> 32) as u16,
            bytes: ops.last().map_or(0, |op| op.at),
            heat: 0,
            recent: 0,
            ops: ops.len() as u8,
            state: Block::LIVE | checks_itself,
            note: Note::EMPTY,
            mode,
            next_in_page: NO_BLOCK,
        };
        self.arena.extend_from_slice(ops);
        let id = self.blocks.len() as BlockId;
        if let Some(original) = original {
            self.originals.insert(id, original.into());
        }
        self.blocks.push(block);
        self.list(id);
        id
    }

    /// Makes block `id` known.
    fn list(&mut self, id: BlockId) {
        let b = &mut self.blocks[id as usize];
        b.next_in_page = self.by_page.insert(b.page(), id).unwrap_or(NO_BLOCK);
        // There is none at its place.
        let blocks = &self.blocks;
        self.by_place.insert(blocks[id as usize].hash(), id, |_| false, |id| blocks[id as usize].hash());
    }

    /// Drops what was run least since this was done last, half of all or more.
    fn make_room(&mut self) {
        let least = self.least_recent();
        self.by_place.clear();
        self.by_page.clear();
        let mut renamed = vec![None; self.blocks.len()];
        let mut originals = core::mem::take(&mut self.originals);
        let (mut kept, mut ops) = (0, 0);
        // They lie in the order of their numbers: what is kept moves down.
        for (n, renamed) in renamed.iter_mut().enumerate() {
            let mut b = self.blocks[n];
            if !b.is_live() || u32::from(b.recent) < least {
                continue;
            }
            let from = b.first as usize;
            self.arena.copy_within(from..from + usize::from(b.ops), ops);
            b.first = ops as u32;
            ops += usize::from(b.ops);
            if let Some(original) = originals.remove(&(n as BlockId)) {
                self.originals.insert(kept as BlockId, original);
            }
            b.recent = 0;
            self.blocks[kept] = b;
            *renamed = Some(kept as BlockId);
            kept += 1;
        }
        self.arena.truncate(ops);
        self.blocks.truncate(kept);
        (0..kept).for_each(|id| self.list(id as BlockId));
        for j in &mut self.jumps {
            match renamed.get(j.id() as usize).copied().flatten() {
                Some(id) => {
                    let found = Found { id, first: self.blocks[id as usize].first };
                    *j = Jump::new(j.way >> Jump::ID_BITS, j.exec_id, found);
                }
                None => j.exec_id = 0,
            }
        }
    }

    /// How often a block must have been run lately, a power of two, so that those that were take at most half of the room.
    fn least_recent(&self) -> u32 {
        let mut by_length = [(0, 0); 1 + u8::BITS as usize];
        for b in self.blocks.iter().filter(|b| b.is_live()) {
            let (ops, blocks) = &mut by_length[(u8::BITS - b.recent.leading_zeros()) as usize];
            (*ops, *blocks) = (*ops + usize::from(b.ops), *blocks + 1);
        }
        let mut kept = (0, 0);
        let lengths = by_length.iter().rev().take_while(|(ops, blocks)| {
            kept = (kept.0 + ops, kept.1 + blocks);
            kept.0 <= self.most_ops / 2 && kept.1 <= self.most_blocks / 2
        });
        (2 << u8::BITS >> lengths.count()) >> 1
    }

    /// Drops all code of a RAM page.
    pub fn drop_page(&mut self, page: u64) {
        let mut next = self.by_page.remove(&page).unwrap_or(NO_BLOCK);
        while let Some(block) = self.blocks.get(next as usize) {
            let id = core::mem::replace(&mut next, block.next_in_page);
            self.drop_block(id);
        }
    }

    /// Drops block `id`.
    pub fn drop_block(&mut self, id: BlockId) {
        let Some(b) = self.blocks.get_mut(id as usize) else { return };
        b.state &= !Block::LIVE;
        let (hash, blocks) = (b.hash(), &self.blocks);
        self.by_place.remove(hash, id, |id| blocks[id as usize].hash());
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.originals.clear();
        self.blocks.clear();
        self.by_place.clear();
        self.by_page.clear();
        for j in &mut self.jumps {
            j.exec_id = 0;
        }
    }
}

/// Bytes of a full cache of one of `vcpus`: operations, blocks, hash tables, arrays, and the names while room is made.
pub const fn most_bytes(vcpus: usize) -> usize {
    let (ops, blocks) = sizes(vcpus);
    ops * size_of::<Op<SoftCore>>()
        + blocks * (size_of::<Block>() + size_of::<Option<BlockId>>())
        + Places::bytes(blocks)
        + JUMPS * size_of::<Jump>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_emulate::Step;

    const MODE: ModeKey = ModeKey(1);

    fn nothing(_: &mut SoftCore, _: &Op<SoftCore>) -> Step {
        Step::Next
    }

    fn ops(n: u64) -> Vec<Op<SoftCore>> {
        vec![Op { at: n as u16, ..Op::new(nothing) }; 1 + n as usize * 7 % 13]
    }

    /// Of different lengths; every third one is dropped at once, some pages are, and every eighth block runs now and then.
    #[test]
    fn what_runs_is_kept() {
        let mut cache = BlockCache::new(3);
        let (most_ops, most_blocks) = sizes(3);
        let place = |n: u64| n * 24;
        let runs = |n: u64| n.is_multiple_of(8) && !n.is_multiple_of(3);
        for n in 0..100_000u64 {
            let original = (n % 5 == 0).then_some(&[1, 2, 3][..(n as usize * 7 % 4).min(3)]);
            let ops: Vec<_> =
                ops(n).into_iter().map(|op| Op { at: (n * 7 % 4).min(3) as u16, ..op }).collect();
            let id = cache.insert(place(n), MODE, &ops, original);
            _ = cache.remember(place(n), 1, id);
            _ = cache.warm(id);
            if n % 3 == 0 {
                cache.drop_block(id);
            }
            if n % 4096 == 4095 {
                for old in (0..n.min(12_000)).filter(|n| runs(*n)) {
                    let id = cache.find(place(old), MODE).expect("it runs often");
                    (0..2).for_each(|_| assert!(cache.warm(id).is_some()));
                }
            }
            assert!(cache.arena.len() <= most_ops && cache.blocks.len() <= most_blocks);
        }
        for n in 0..100_000 {
            let Some(id) = cache.find(place(n), MODE) else {
                assert!(!runs(n) || n > 12_000, "block {n}");
                continue;
            };
            let (block, ops) = cache.get(Found { id, first: cache.blocks[id as usize].first }).unwrap();
            assert_eq!((block.at(), ops.len()), (place(n), 1 + n as usize * 7 % 13));
            assert!(block.checks_itself() == (n % 5 == 0) && n % 3 != 0);
            let known = cache.jump(place(n), 1);
            assert!(cache.jump(place(n), 2).is_none());
            assert!([40, 48, 63].iter().all(|bit| cache.jump(place(n) | 1 << bit, 1).is_none()));
            assert!(
                known.is_none_or(|known| known.id == id && known.first == cache.blocks[id as usize].first)
            );
        }
        let page = place(16) >> 12;
        assert!(cache.find(place(16), MODE).is_some() && cache.heat(place(16), MODE) > 2);
        cache.drop_page(page);
        assert!((0..170).all(|n| cache.find(place(n), MODE).is_none()));
        cache.clear();
        assert!(cache.by_page.is_empty() && cache.jump(place(99_999), 1).is_none());
    }

    #[test]
    fn where_all_run_as_often_all_go() {
        let mut cache = BlockCache::new(3);
        let most_blocks = sizes(3).1 as u64;
        for n in 0..=most_blocks {
            let id = cache.insert(n, MODE, &ops(0), None);
            _ = cache.warm(id);
        }
        assert_eq!((cache.blocks.len(), cache.find(most_blocks, MODE)), (1, Some(0)));
    }
}
