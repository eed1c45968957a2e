//! Ways from code to code: jumps that are patched together, guarded entries, and what stale code is led to.

use super::{Block, CAREFUL, Engine};
use crate::budget::{MOST_BLOCKS, MOST_CODE};
use crate::runtime;
use crate::table::TABLE_ENTRIES;
use cpu_soft::SoftCore;
use cpu_soft::translate::{Exit, Place};

/// A jump out of a block to a fixed address. There are many.
#[derive(Clone, Copy)]
pub struct ExitSite {
    /// Where it leads in the guest.
    pub target: u64,
    /// Number of the block, and instructions up to here.
    from: u32,
    /// Where in the code the jump's displacement is, and two flags: see `new`.
    jump: u32,
}

impl ExitSite {
    const CAREFUL: u32 = 1;
    const GUARDED: u32 = 2;
    const BLOCK_BITS: u32 = 18;

    /// `from`: the block, and how many of its instructions were done. `jump`: where in the code its displacement is. `careful`: to
    /// a careful translation. `guarded`: to another mode's code, with a guard even in the same page.
    pub fn new(from: (u32, u16), target: u64, jump: u32, careful: bool, guarded: bool) -> Self {
        const { assert!(MOST_CODE < 1 << 30 && MOST_BLOCKS <= 1 << Self::BLOCK_BITS) };
        let from = from.0 | u32::from(from.1) << Self::BLOCK_BITS;
        let flags = if careful { Self::CAREFUL } else { 0 } | if guarded { Self::GUARDED } else { 0 };
        Self { target, from, jump: jump << 2 | flags }
    }
    /// Number of the block.
    pub fn block(self) -> u32 {
        self.from & ((1 << Self::BLOCK_BITS) - 1)
    }
    /// Instructions of the block up to here.
    pub fn done(self) -> u16 {
        (self.from >> Self::BLOCK_BITS) as u16
    }
    /// Where in the code the jump's displacement is.
    pub fn jump(self) -> u64 {
        u64::from(self.jump >> 2)
    }
    /// It leads to a careful translation.
    pub fn careful(self) -> bool {
        self.jump & Self::CAREFUL != 0
    }
    /// Whether it may go without a guard to a place in the RAM page of `block`, whose exit it is.
    fn stays_in_page(self, block: &Block) -> bool {
        self.jump & Self::GUARDED == 0 && (self.target ^ block.linear) & !0xFFF == 0
    }
}

impl Engine {
    /// Makes the guarded entry of a block pass for the mapping `exec_id`; its address.
    pub(super) fn admit(&mut self, id: u32, exec_id: u32) -> u64 {
        let start = self.memory.start();
        let b = &mut self.blocks[id as usize];
        if b.exec_id != exec_id {
            b.exec_id = exec_id;
            self.memory.patch(b.guard(start), &exec_id.to_le_bytes());
        }
        let guarded = b.guarded(start);
        if !b.is_careful() {
            let table = &mut self.contexts[usize::from(b.key)].table;
            table[b.linear as usize & (TABLE_ENTRIES - 1)] = [b.linear, guarded];
        }
        guarded
    }

    /// Where to go on at RIP: a translation, or out. For emitted code.
    pub fn go_on(&mut self, core: &mut SoftCore) -> u64 {
        core.hot.raw_flags = core.cpu.flags.bits();
        self.exit = Exit::Branch;
        if !runtime::may_go_on(core) {
            return self.thunks.leave;
        }
        let Some(context) = self.context(core) else { return self.thunks.leave };
        let linear = core.linear_ip();
        let e = self.contexts[usize::from(context)].table[linear as usize & (TABLE_ENTRIES - 1)];
        if e[0] == linear { e[1] } else { self.known(core, context) }
    }

    /// As `go_on`, when the table's entry cannot be trusted.
    pub fn go_on_checked(&mut self, core: &mut SoftCore) -> u64 {
        self.exit = Exit::Branch;
        if !runtime::may_go_on(core) {
            return self.thunks.leave;
        }
        match self.context(core) {
            Some(context) => self.known(core, context),
            None => self.thunks.leave,
        }
    }

    /// Where to go on at RIP by the handlers as far as memory goes: for the one instruction there at least.
    /// It is in the RAM page of exit `exit`, by which it was come to: that is tracked, or checks itself.
    pub fn go_on_carefully(&mut self, core: &mut SoftCore, exit: usize) -> u64 {
        self.exit = Exit::Branch;
        if !runtime::may_go_on(core) {
            return self.thunks.leave;
        }
        let linear = core.linear_ip();
        let from = self.blocks[self.exits[exit].block() as usize];
        let place = core.known_place(linear).filter(|p| (p.at ^ from.at()) >> 12 == 0);
        let place = place.map(|p| Place { checks_itself: from.checks_itself(), ..p });
        if let (Some(context), Some(place)) = (self.context(core), place) {
            let key = context | CAREFUL;
            // Not if all had to be dropped: emitted code waits for us.
            let known = self.find(&place, key).is_some();
            let id =
                if known || !self.is_full() { self.careful_translation(core, &place, key) } else { None };
            self.show_tables(core);
            if let Some(id) = id {
                return self.admit(id, core.claim_exec_id(linear));
            }
        }
        self.careful_at = Some(linear);
        self.thunks.leave
    }

    pub(super) fn known(&mut self, core: &mut SoftCore, context: u8) -> u64 {
        let linear = core.linear_ip();
        let place = core.refilled_place(linear);
        let id = place.and_then(|p| self.find(&p, context));
        match id {
            Some(id) => self.admit(id, core.claim_exec_id(linear)),
            None => self.thunks.leave,
        }
    }

    /// Makes exit `n` lead to the translation of its target, which is where `core` is.
    pub fn link(&mut self, n: usize, core: &mut SoftCore) {
        let Some(context) = self.context(core) else { return };
        // Data may have driven it out of the TLB: then, too, it is to be linked.
        let site = self.exits[n];
        let Some(place) = core.refilled_place(site.target) else { return };
        let key = if site.careful() { context | CAREFUL } else { context };
        if let Some(id) = self.find(&place, key) {
            let (from, b) = (&self.blocks[site.block() as usize], &self.blocks[id as usize]);
            let same = site.stays_in_page(from) && (from.at() ^ place.at) >> 12 == 0;
            let start = self.memory.start();
            let to = if same { b.body(start) } else { b.guarded(start) };
            self.memory.patch_jump(start + site.jump(), to);
        }
    }

    /// Makes ways to block `old` lead to the guarded entry `to` of what it became, if it was forgotten: code of pages that are
    /// written now and then is called from others for ever.
    pub fn replace(&mut self, old: usize, to: u64) {
        let b = self.blocks[old];
        if !b.is_live() && !b.is_careful() {
            self.lead(b.guarded(self.memory.start()), to);
        }
    }

    /// Leaves where a block was, in a way that makes progress: what a careful translation was made
    /// for leads to it again and again.
    pub fn leave_from(&mut self, block: &Block) -> u64 {
        if block.is_careful() {
            self.careful_at = Some(block.linear);
        }
        self.exit = Exit::Branch;
        self.thunks.leave
    }

    /// As `replace`, for ways into the body of a block that found itself changed.
    pub fn replace_body(&mut self, old: usize, to: u64) {
        self.lead(self.blocks[old].body(self.memory.start()), to);
    }

    /// Makes code at `from` a jump to `to`.
    pub(super) fn lead(&mut self, from: u64, to: u64) {
        let mut jump = [0xE9, 0, 0, 0, 0];
        jump[1..].copy_from_slice(&(to.wrapping_sub(from + 5) as u32).to_le_bytes());
        self.memory.patch(from, &jump);
    }
}
