//! Decoded code: straight runs of operations, found by where they lie in RAM and the mode they run in.
//!
//! A block never leaves its page. It is keyed by (offset in the RAM span, mode key): no linear address is
//! in it, so that all mappings of a page share its blocks. How a linear address leads to one is cached
//! beside (`jumps`) under the identity that the TLB gives the mapping.

use crate::core::{NO_PAGE, SoftCore};
use crate::mixed::may_change_code;
use crate::shared::Watch;
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::num::NonZeroU32;
use guest_memory::GuestRam;
use hashbrown::HashMap;
use x86_decode::{Decoded, FlowControl, Instruction, MAX_LENGTH};
use x86_defs::Exception;
use x86_defs::cpuid::FeatureSet;
use x86_defs::flags::STATUS;
use x86_emulate::core::Core;
use x86_emulate::lower::{self, LowerContext};
use x86_emulate::{ModeKey, Op, Step};

/// Longest block in instructions.
pub const MAX_OPS: usize = 64;
/// Longest one that checks itself.
pub const MAX_CHECKED: usize = 32;
/// Operations kept before everything is thrown away: 32 bytes each, 8 MiB in all.
const MAX_ARENA: usize = 256 << 10;
const JUMPS: usize = 8192;

/// Number of a block in its cache.
pub type BlockId = u32;

/// See the module's header.
#[derive(Clone, Copy)]
pub struct Block {
    /// First operation in the arena.
    first: u32,
    /// Operations, the closing one included.
    ops: u16,
    /// Instructions.
    pub instructions: u16,
    /// Bytes that they take.
    pub bytes: u16,
    /// RAM page.
    pub page: u64,
    /// Offset in the RAM span.
    at: u64,
    /// Times that it was run, to 2^32 - 1; for the translator.
    heat: u32,
    live: bool,
    /// Start of the bytes that it was made from among the originals, if it checks itself (`mixed.rs`).
    original: Option<NonZeroU32>,
}

impl Block {
    /// The page in which a store ends it.
    #[inline(always)]
    pub fn watched_page(&self) -> u64 {
        if self.original.is_some() { NO_PAGE } else { self.page }
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

/// Blocks of one vCPU.
pub struct BlockCache {
    arena: Vec<Op<SoftCore>>,
    /// Bytes of the blocks that check themselves, behind one that is nobody's.
    originals: Vec<u8>,
    blocks: Vec<Block>,
    by_place: HashMap<(u64, ModeKey), BlockId>,
    by_page: HashMap<u64, Vec<(u64, ModeKey)>>,
    jumps: Box<[Jump]>,
}

impl BlockCache {
    /// An empty cache.
    pub fn new() -> Self {
        let none = Jump { linear: 0, mode: ModeKey(0), exec_id: 0, block: 0 };
        Self {
            arena: Vec::new(),
            originals: vec![0],
            blocks: Vec::new(),
            by_place: HashMap::new(),
            by_page: HashMap::new(),
            jumps: vec![none; JUMPS].into_boxed_slice(),
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

    /// The block and its operations, if it is still valid.
    #[inline(always)]
    pub fn get(&self, id: BlockId) -> Option<(&Block, &[Op<SoftCore>])> {
        let b = self.blocks.get(id as usize)?;
        let ops = self.arena.get(b.first as usize..b.first as usize + usize::from(b.ops))?;
        b.live.then_some((b, ops))
    }

    /// Counts that a block runs; how often it has, its RAM page, and whether it checks itself.
    pub fn warm(&mut self, id: BlockId) -> Option<(u32, u64, bool)> {
        let b = self.blocks.get_mut(id as usize).filter(|b| b.live)?;
        b.heat = b.heat.saturating_add(1);
        Some((b.heat, b.page, b.checks_itself()))
    }

    /// Times that a block at a place in RAM was run.
    pub fn heat(&self, at: u64, mode: ModeKey) -> u32 {
        let block = self.find(at, mode).and_then(|id| self.blocks.get(id as usize));
        block.map_or(0, |b| b.heat)
    }

    /// The block at a place in RAM.
    pub fn find(&self, at: u64, mode: ModeKey) -> Option<BlockId> {
        self.by_place.get(&(at, mode)).copied()
    }

    /// Whether block `id` is what its bytes in RAM are now, as far as itself has to check that.
    #[inline(always)]
    pub fn is_current(&self, id: BlockId, ram: &GuestRam) -> bool {
        self.blocks
            .get(id as usize)
            .is_some_and(|b| b.live && (b.original.is_none() || self.is_original(b, ram)))
    }

    #[inline(never)]
    fn is_original(&self, b: &Block, ram: &GuestRam) -> bool {
        let (from, len) = (b.original.map_or(0, |o| o.get() as usize), usize::from(b.bytes));
        let mut now = [0; MAX_CHECKED * MAX_LENGTH];
        let now = &mut now[..len.min(MAX_CHECKED * MAX_LENGTH)];
        ram.load_bytes(b.at, now);
        self.originals.get(from..from + len) == Some(&*now)
    }

    /// Adds a block at a place in RAM. `original`: its bytes, if it checks itself.
    pub fn insert(
        &mut self,
        at: u64,
        mode: ModeKey,
        ops: &[Op<SoftCore>],
        original: Option<&[u8]>,
    ) -> BlockId {
        if self.arena.len() + ops.len() > MAX_ARENA {
            self.clear();
        }
        let id = self.blocks.len() as BlockId;
        self.blocks.push(Block {
            first: self.arena.len() as u32,
            ops: ops.len() as u16,
            instructions: ops.len().max(2) as u16 - 1,
            bytes: ops.last().map_or(0, |op| op.at),
            page: at >> 12,
            at,
            heat: 0,
            live: true,
            original: NonZeroU32::new(self.originals.len() as u32).filter(|_| original.is_some()),
        });
        self.originals.extend_from_slice(original.unwrap_or_default());
        self.arena.extend_from_slice(ops);
        self.by_place.insert((at, mode), id);
        self.by_page.entry(at >> 12).or_default().push((at, mode));
        id
    }

    /// Drops all code of a RAM page.
    pub fn drop_page(&mut self, page: u64) {
        for key in self.by_page.remove(&page).unwrap_or_default() {
            if let Some(id) = self.by_place.remove(&key)
                && let Some(b) = self.blocks.get_mut(id as usize)
            {
                b.live = false;
            }
        }
    }

    /// Drops block `id`.
    pub fn drop_block(&mut self, id: BlockId) {
        let Some(b) = self.blocks.get_mut(id as usize) else { return };
        b.live = false;
        let (at, page) = (b.at, b.page);
        let Some(keys) = self.by_page.get_mut(&page) else { return };
        if let Some(n) = keys.iter().position(|key| key.0 == at && self.by_place.get(key) == Some(&id)) {
            self.by_place.remove(&keys.swap_remove(n));
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.originals.truncate(1);
        self.blocks.clear();
        self.by_place.clear();
        self.by_page.clear();
        for j in &mut self.jumps {
            j.exec_id = 0;
        }
    }
}

impl Default for BlockCache {
    fn default() -> Self {
        Self::new()
    }
}

/// Room in which blocks are built, kept from one to the next.
#[derive(Default)]
pub struct Builder {
    decoded: Vec<(Instruction, u16)>,
    ops: Vec<Op<SoftCore>>,
}

impl Builder {
    /// Decodes up to `limit` instructions from `bytes`; if they check themselves (`mixed.rs`) only what then can be in a block.
    /// Their operations, the closing one included; none if not even one instruction fits the bytes.
    pub fn build(
        &mut self,
        bytes: &[u8],
        mode: ModeKey,
        features: FeatureSet,
        limit: usize,
        watch: Watch,
    ) -> &[Op<SoftCore>] {
        self.decoded.clear();
        self.ops.clear();
        let mut at = 0usize;
        let mut closing = None;
        while self.decoded.len() < limit.min(MAX_OPS) {
            match x86_decode::decode(&bytes[at..], mode.bitness(), at as u64, features) {
                Decoded::Instruction(insn) => {
                    self.decoded.push((insn, at as u16));
                    at += insn.len();
                    let ends = watch == Watch::Itself && may_change_code(&insn);
                    if insn.flow_control() != FlowControl::Next || ends {
                        break;
                    }
                }
                Decoded::Invalid | Decoded::TooLong if watch == Watch::Itself => break,
                Decoded::Invalid => {
                    closing = Some(Exception::InvalidOpcode);
                    break;
                }
                Decoded::TooLong => {
                    closing = Some(Exception::GeneralProtection);
                    break;
                }
                Decoded::NeedMore => break,
            }
        }
        if !self.decoded.is_empty() || closing.is_some() {
            self.lower(mode, features, at as u16, closing);
        }
        &self.ops
    }

    fn lower(&mut self, mode: ModeKey, features: FeatureSet, end: u16, closing: Option<Exception>) {
        let mut live = STATUS;
        let ctx = |at: u16, live_flags: u64| LowerContext { mode, features, at, live_flags };
        self.ops.resize(self.decoded.len(), Op::new(fall_through::<SoftCore>));
        for (op, (insn, at)) in self.ops.iter_mut().zip(&self.decoded).rev() {
            *op = lower::lower(insn, &ctx(*at, live));
            live = flags_before(insn, live);
        }
        self.ops.push(match closing {
            Some(exception) => lower::raising(exception, &ctx(end, STATUS)),
            None => Op { at: end, ..Op::new(fall_through::<SoftCore>) },
        });
    }
}

/// Flags that matter before `insn`, given those that matter after it. What may fault shows all of them to
/// the guest's handler.
fn flags_before(insn: &Instruction, live_after: u64) -> u64 {
    use x86_decode::{OpKind, flag_use};
    let pure = (0..insn.op_count()).all(|i| insn.op_kind(i) != OpKind::Memory)
        && insn.flow_control() == FlowControl::Next
        && !insn.is_privileged()
        && !insn.is_stack_instruction();
    if !pure || may_fault_or_keep_flags(insn) {
        return STATUS;
    }
    (live_after & !flag_use::modified(insn)) | flag_use::read(insn)
}

/// Only plain arithmetic and moves are looked at: division may fault, shifts by CL may change no flag.
fn may_fault_or_keep_flags(insn: &Instruction) -> bool {
    use x86_decode::Mnemonic as M;
    !matches!(
        insn.mnemonic(),
        M::Add
            | M::Sub
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Adc
            | M::Sbb
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Xchg
            | M::Bswap
    ) || insn.op0_register().is_segment_register()
        || insn.op1_register().is_segment_register()
        || insn.op0_register().is_cr()
        || insn.op1_register().is_cr()
}

/// Closes a block that no branch ends: goes on behind it.
fn fall_through<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    op.end_block(c)
}
