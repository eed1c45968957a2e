//! Translations of one vCPU, and the way into them and out again.

mod record;
mod ways;

pub use record::Block;
pub use ways::ExitSite;

use crate::asm::Asm;
use crate::budget::Budget;
use crate::code_memory::CodeMemory;
use crate::feedback::{Feedback, KnownWay, WayOut};
use crate::journal::Journal;
use crate::path::MAX_INSTRUCTIONS;
use crate::table::{TABLE_ENTRIES, Table, nothing};
use crate::thunks::{Thunks, slot};
use crate::{block, host, plan, runtime, x87};
use cpu_soft::SoftCore;
use cpu_soft::places::Places;
use cpu_soft::translate::{Exit, Heat, Note, Place, Translator};
use guest_memory::GuestRam;
use hashbrown::HashMap;
use std::io;
use std::sync::Arc;
use x86_defs::cpuid::FeatureSet;
use x86_emulate::{ModeKey, Op};

/// Room that a block is sure to find.
pub const BLOCK_BYTES: usize = 64 << 10;
/// Contexts; with one more everything starts anew.
const MAX_CONTEXTS: usize = 16;
/// Notes about places that careful translations are wanted of.
const CAREFUL_NOTES: usize = 1 << 10;
/// The mask bits of MXCSR.
const MXCSR_MASKS: u32 = 0x1F80;
/// In the key of a translation beside the number of its context: one that goes on where the range of a group of memory
/// accesses cannot be had as a whole (`elide.rs`).
pub const CAREFUL: u8 = 0x80;
/// 32-bit protected mode with flat segments: what 32-bit code is translated for.
pub const FLAT_32: u32 = ModeKey::PROTECTED
    | ModeKey::BIG_CODE
    | ModeKey::BIG_STACK
    | ModeKey::FLAT_CS
    | ModeKey::FLAT_SS
    | ModeKey::FLAT_DS
    | ModeKey::FLAT_ES;
/// What names a translation: linear address, offset in the RAM span, context (perhaps [`CAREFUL`]).
pub type Key = (u64, u64, u8);

/// An operation as a block calls it.
pub struct Site {
    /// The operation.
    pub op: Op<SoftCore>,
    /// Number of the block.
    pub block: u32,
    /// May change how code runs: whatever is behind it is looked up anew.
    pub barrier: bool,
    /// Instructions of the block up to this one.
    pub done: u16,
    /// May look at the x87 unit or change it.
    pub sees_x87: bool,
}

/// What, besides place and bytes, decides what code a block becomes.
struct Context {
    mode: ModeKey,
    mmu_index: u8,
    /// MXCSR masks every exception.
    masked: bool,
    /// The x87 control word does, and none is pending.
    x87_masked: bool,
    table: Table,
}

/// See the module's header.
pub struct Engine {
    threshold: u32,
    budget: Budget,
    /// Hears of what is translated.
    pub journal: Option<Arc<Journal>>,
    ram_base: u64,
    /// What the guest's processor has.
    pub features: FeatureSet,
    /// What the host's has, and which vector instructions it runs.
    host: plan::Host,
    pub memory: CodeMemory,
    /// Bytes of the fixed pieces in front.
    fixed: usize,
    pub thunks: Thunks,
    pub sites: Vec<Site>,
    pub blocks: Vec<Block>,
    pub exits: Vec<ExitSite>,
    /// Numbers of the blocks by [`place_hash`].
    by_place: Places,
    by_page: HashMap<u64, Vec<u32>>,
    contexts: Vec<Context>,
    /// Notes about places that emitted code wants careful translations of, by a hash.
    careful: Box<[Note]>,
    /// Why emitted code leaves.
    pub exit: Exit,
    /// The next translation is to be a careful one if it is at this address.
    careful_at: Option<u64>,
    /// The block that found itself changed, while emitted code runs.
    pub stale: Option<u32>,
    /// What is known of hot blocks.
    pub feedback: Feedback,
    /// Number of the guess that was given last.
    pub next_guess: usize,
    /// The way of the block that the next translation takes the place of.
    pub renewed: Option<KnownWay>,
    /// For the next translation.
    pub scratch: Option<block::Scratch>,
    /// Times that the countdown ran out.
    expired: u32,
}

impl Engine {
    /// A translator without translations.
    pub fn new(ram: &GuestRam, features: FeatureSet, threshold: u32, budget: Budget) -> io::Result<Self> {
        let mut memory = CodeMemory::new(budget.code)?;
        let mut a = Asm::new(memory.next());
        let thunks = Thunks::emit(&mut a);
        memory.append(&a.code);
        Ok(Self {
            threshold,
            budget,
            journal: None,
            ram_base: ram.host_base() as u64,
            features,
            host: plan::Host { general: host::features(), vector: host::vector_features(), x87: true },
            fixed: memory.used(),
            memory,
            thunks,
            // All at once: what is not used yet costs nothing, and nothing is copied.
            sites: Vec::with_capacity(budget.sites),
            blocks: Vec::with_capacity(budget.blocks),
            exits: Vec::with_capacity(budget.exits),
            by_place: Places::new(),
            by_page: HashMap::new(),
            contexts: Vec::new(),
            careful: vec![Note::EMPTY; CAREFUL_NOTES].into_boxed_slice(),
            exit: Exit::Branch,
            careful_at: None,
            stale: None,
            feedback: Feedback::new(threshold == 0),
            next_guess: 0,
            scratch: None,
            expired: 0,
            renewed: None,
        })
    }

    /// With one context, on a host that has everything.
    #[cfg(test)]
    pub fn for_golden(ram: &GuestRam, features: FeatureSet) -> Self {
        let mut engine = Self::new(ram, features, 0, Budget::of(1)).expect("memory for code");
        engine.host = plan::Host { general: features, vector: Some(features), x87: true };
        let (mode, table) = (ModeKey(0), Table::new());
        engine.contexts.push(Context { mode, mmu_index: 2, masked: true, x87_masked: true, table });
        engine
    }

    /// Number of the context of `core`, if there is translated code for it.
    fn context(&self, core: &SoftCore) -> Option<u8> {
        let key = (core.cpu.mode, core.cpu.mmu_index, masks_all(core), x87::masks_all(&core.cpu));
        let known = self.contexts.iter().position(|c| (c.mode, c.mmu_index, c.masked, c.x87_masked) == key);
        known.map(|n| n as u8)
    }

    /// As `context`, made if need be; `None`: this code is not for us. Not while translated code runs.
    fn make_context(&mut self, core: &SoftCore) -> Option<u8> {
        if let Some(n) = self.context(core) {
            return Some(n);
        }
        let (mode, mmu_index) = (core.cpu.mode, core.cpu.mmu_index);
        let refused = ModeKey::TRAP | ModeKey::BREAKPOINTS | ModeKey::ALIGN;
        if !(mode.is_long() || mode.has(FLAT_32)) || mode.0 & refused != 0 {
            return None;
        }
        if self.contexts.len() == MAX_CONTEXTS {
            self.clear();
            self.contexts.clear();
        }
        let (masked, x87_masked) = (masks_all(core), x87::masks_all(&core.cpu));
        self.contexts.push(Context { mode, mmu_index, masked, x87_masked, table: Table::new() });
        Some(self.contexts.len() as u8 - 1)
    }

    /// The context that `context` becomes with another mode and MMU index, made if there is room.
    pub fn sibling(&mut self, context: u8, mode: ModeKey, mmu_index: u8) -> Option<u8> {
        let Context { masked, x87_masked, .. } = self.contexts[usize::from(context)];
        let key = (mode, mmu_index, masked, x87_masked);
        let known = self.contexts.iter().position(|c| (c.mode, c.mmu_index, c.masked, c.x87_masked) == key);
        if known.is_none() {
            if self.contexts.len() == MAX_CONTEXTS {
                return None;
            }
            self.contexts.push(Context { mode, mmu_index, masked, x87_masked, table: Table::new() });
        }
        Some(known.unwrap_or(self.contexts.len() - 1) as u8)
    }

    /// Tells emitted code where the tables are.
    fn show_tables(&self, core: &mut SoftCore) {
        for (n, c) in self.contexts.iter().enumerate() {
            core.hot.slots[slot::TABLES + n] = c.table.as_ptr() as u64;
        }
    }

    /// The translation at `place`, made if it was wanted often enough. Code that is hot in one process is cold at the address
    /// that the next one has it at.
    fn translation(
        &mut self,
        core: &SoftCore,
        place: &Place,
        key: u8,
        heat: &Heat<'_>,
        note: &mut Note,
    ) -> Option<u32> {
        let asker = place.linear >> 12 ^ place.linear >> 28 ^ u64::from(key) << 8;
        let asker = asker as u16;
        if note.asker == asker && note.id == Note::NONE && u32::from(note.times) < self.threshold {
            // It is not translated yet: no need to look.
            note.times += 1;
            return None;
        }
        let name = (place.linear, place.at, key);
        let known = self.blocks.get(note.id as usize).filter(|b| b.is_live() && b.is(&name));
        let id = known.map(|_| note.id).or_else(|| self.find_key(&name));
        (note.asker, note.id) = (asker, id.unwrap_or(Note::NONE));
        if id.is_some() {
            return id;
        }
        // The count goes on: two that take turns would never be translated else.
        if u32::from(note.times) < self.threshold {
            note.times += 1;
            return None;
        }
        note.times = 0;
        // Tests translate everything: what hot code does, too.
        let hot = self.threshold == 0 && key & CAREFUL == 0 && !place.checks_itself;
        let id = self.translate(core, place, key, heat, hot);
        note.id = id.unwrap_or(Note::NONE);
        id
    }

    /// The careful translation at `place`, made if it was wanted often enough.
    fn careful_translation(&mut self, core: &SoftCore, place: &Place, key: u8) -> Option<u32> {
        let slot = (place.linear ^ place.linear >> 12 ^ place.linear >> 24) as usize % CAREFUL_NOTES;
        let mut note = self.careful[slot];
        let id = self.translation(core, place, key, &|_| 0, &mut note);
        self.careful[slot] = note;
        id
    }

    /// Translates what is at `place`; `hot`: with guesses.
    fn translate(
        &mut self,
        core: &SoftCore,
        place: &Place,
        key: u8,
        heat: &Heat<'_>,
        hot: bool,
    ) -> Option<u32> {
        if self.is_full() {
            self.clear();
        }
        let id = self.blocks.len() as u32;
        let block = block::translate(self, core, place, key, heat, hot)?;
        self.blocks.push(block);
        let (blocks, name) = (&self.blocks, block.name());
        // What is translated anew takes the place of what was there.
        let hash = |id: u32| place_hash(&blocks[id as usize].name());
        self.by_place.insert(place_hash(&name), id, |known| blocks[known as usize].is(&name), hash);
        self.by_page.entry(place.at >> 12).or_default().push(id);
        Some(id)
    }

    /// Translates the block at `place` anew, as a hot one: ways to it lead to what it becomes. Not while translated code runs.
    fn renew(&mut self, core: &SoftCore, place: &Place, context: u8, heat: &Heat<'_>) -> Option<u32> {
        let key = (place.linear, place.at, context);
        let old = self.find_key(&key)?;
        let count = self.blocks.len();
        // The interpreter no longer counts where such code leads.
        self.renewed = Some(self.way_of(old));
        let renewed = self.translate(core, place, context, heat, true);
        self.renewed = None;
        let Some(id) = renewed else {
            return self.find_key(&key);
        };
        // All others may have been dropped.
        if id as usize == count {
            let start = self.memory.start();
            let [from, to] = [old, id].map(|id| self.blocks[id as usize]);
            let entries = [(from.guarded(start), to.guarded(start)), (from.body(start), to.body(start))];
            for site in self.exits.iter().filter(|site| site.target == place.linear) {
                let jump = start + site.jump();
                let leads = self.memory.jump_target(jump);
                if let Some((_, to)) = entries.into_iter().find(|(from, _)| leads == *from) {
                    self.memory.patch_jump(jump, to);
                }
            }
            entries.into_iter().for_each(|(from, to)| self.lead(from, to));
            self.blocks[old as usize].die();
        }
        Some(id)
    }

    /// What is known of the way of the translation at the linear address and the place in RAM.
    pub fn known_way(&self, linear: u64, at: u64, key: u8) -> Option<KnownWay> {
        self.find_key(&(linear, at, key)).map(|id| self.way_of(id))
    }
    /// What is known of the way of block `id`.
    pub fn way_of(&self, id: u32) -> KnownWay {
        KnownWay { way: self.blocks[id as usize].way, left: self.feedback.left(id) }
    }

    /// Block `block` was left with the countdown run out.
    pub fn left(&mut self, block: u32, way: WayOut) {
        if self.feedback.samples(self.expired) {
            let samples = self.blocks.get(block as usize).map_or(0, |b| b.samples());
            self.feedback.leaves(block, samples, way);
        }
    }

    /// The countdown ran out on the way to RIP from block `from`: now and then counts a sample of
    /// the block there. Whether to leave, so that it is translated anew.
    pub fn sample(&mut self, core: &mut SoftCore, from: u32, way: WayOut) -> bool {
        self.expired = self.expired.wrapping_add(1);
        if !self.feedback.samples(self.expired) {
            return false;
        }
        self.left(from, way);
        let Some(context) = self.context(core) else { return false };
        let Some(place) = core.known_place(core.linear_ip()) else { return false };
        let key = (place.linear, place.at, context);
        let Some(id) = self.find_key(&key) else { return false };
        let samples = self.blocks[id as usize].sample();
        self.exit = Exit::Branch;
        self.feedback.sampled(core, key, id, samples)
    }

    /// The translation at `place`.
    fn find(&self, place: &Place, key: u8) -> Option<u32> {
        self.find_key(&(place.linear, place.at, key))
    }
    fn find_key(&self, key: &Key) -> Option<u32> {
        self.by_place.find(place_hash(key), |id| self.blocks[id as usize].is(key))
    }

    /// Another block may not find room.
    fn is_full(&self) -> bool {
        let most = 2 * MAX_INSTRUCTIONS;
        self.memory.left() < BLOCK_BYTES
            || self.sites.len() + most > self.budget.sites
            || self.exits.len() + most > self.budget.exits
            || self.blocks.len() == self.budget.blocks
    }

    /// What of the host's may be emitted for a context.
    pub fn host(&self, context: u8) -> plan::Host {
        let c = &self.contexts[usize::from(context)];
        plan::Host { vector: self.host.vector.filter(|_| c.masked), x87: c.x87_masked, ..self.host }
    }

    /// Drops block `id`. Only while the vCPU is outside of its code.
    fn drop_block(&mut self, id: u32) {
        let b = &mut self.blocks[id as usize];
        b.die();
        let (b, start) = (*b, self.memory.start());
        let blocks = &self.blocks;
        self.by_place.remove(place_hash(&b.name()), id, |id| place_hash(&blocks[id as usize].name()));
        // Whoever still knows its entry comes out at the miss.
        self.lead(b.guarded(start), b.miss(start));
        let table = &mut self.contexts[usize::from(b.key & !CAREFUL)].table;
        let slot = b.linear as usize % TABLE_ENTRIES;
        if table[slot][1] == b.guarded(start) {
            table[slot] = nothing(slot);
        }
    }

    /// Drops block `id` alone of its page's. Ways into its body lead to what it became, the next time.
    fn forget(&mut self, id: u32) {
        let Some(page) = self.blocks.get(id as usize).map(|b| b.at() >> 12) else { return };
        if let Some(ids) = self.by_page.get_mut(&page)
            && let Some(n) = ids.iter().position(|known| *known == id)
        {
            ids.swap_remove(n);
            self.drop_block(id);
        }
    }

    fn clear(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        self.memory.truncate(self.fixed);
        self.sites.clear();
        self.blocks.clear();
        self.exits.clear();
        self.by_place.clear();
        self.by_page.clear();
        self.feedback.clear();
        for c in &mut self.contexts {
            c.table.empty();
        }
    }
}

/// For the table of blocks by place and key.
fn place_hash(&(linear, at, key): &Key) -> u32 {
    let mixed = (linear ^ at.rotate_left(29) ^ u64::from(key) << 57).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 32) as u32
}

/// Whether MXCSR masks every exception.
fn masks_all(core: &SoftCore) -> bool {
    core.cpu.x.mxcsr & MXCSR_MASKS == MXCSR_MASKS
}

impl Translator for Engine {
    fn threshold(&self) -> u32 {
        self.threshold
    }

    fn run(&mut self, core: &mut SoftCore, place: &Place, heat: &Heat<'_>, note: &mut Note) -> Option<Exit> {
        let exec_id = core.exec_id(place.linear)?;
        let context = self.make_context(core)?;
        let careful = self.careful_at.take() == Some(place.linear);
        let key = if careful { context | CAREFUL } else { context };
        let id = match self.feedback.is_wanted((place.linear, place.at, key)) {
            true if !place.checks_itself => self.renew(core, place, key, heat)?,
            _ if careful => self.careful_translation(core, place, key)?,
            _ => self.translation(core, place, key, heat, note)?,
        };
        let target = self.admit(id, exec_id);
        host::set_gs_base(self.ram_base);
        self.show_tables(core);
        core.hot.raw_flags = core.cpu.flags.bits();
        let span = core.hot.budget.clamp(1, runtime::SPAN);
        // It counts as spent what is not on the countdown.
        core.hot.budget += runtime::SPAN - span;
        core.hot.countdown = span;
        self.exit = Exit::Branch;
        let enter = self.thunks.enter;
        let engine: *mut Engine = self;
        core.hot.slots[slot::ENGINE] = engine as u64;
        core.hot.slots[slot::ATTENTION] = core.attention().as_ptr() as u64;
        core.hot.slots[slot::RAM] = self.ram_base;
        core.hot.slots[slot::VECTOR_LIVE] = 0;
        core.hot.slots[slot::X87_STATE] = x87::state::CORE;
        core.hot.slots[slot::HOST_MXCSR] = u64::from(MXCSR_MASKS);
        // SAFETY: `enter` is code of `Thunks::emit` with this signature. What it runs touches the core, guest
        // RAM at offsets that the TLB holds, and, through `runtime`, the engine; we touch none of them meanwhile.
        unsafe {
            let enter: extern "sysv64" fn(*mut SoftCore, u64) = std::mem::transmute(enter as *const ());
            enter(core, target);
            core.hot.budget -= runtime::SPAN - core.hot.countdown;
            x87::to_core(core, &*engine);
        }
        if let Some(stale) = self.stale.take() {
            self.forget(stale);
        }
        Some(self.exit)
    }

    fn forget_page(&mut self, page: u64) {
        for id in self.by_page.remove(&page).unwrap_or_default() {
            self.drop_block(id);
        }
    }

    fn forget_all(&mut self) {
        self.clear();
    }
}
