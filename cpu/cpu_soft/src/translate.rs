//! The seam to a translator, which takes over code that runs often (docs/adr/0006-translator.md).
//!
//! This crate emits no code and works without one. A translator is given a [`SoftCore`] and a place to go on
//! at; it runs guest code on the core until something has to be decided, and leaves the core as the
//! interpreter would between two blocks. [`layout`] says where emitted code finds what it needs.

use crate::cache::BlockId;
use crate::core::{NO_PAGE, SoftCore};
use crate::run::SoftVcpu;
use crate::shared::attention;
use alloc::boxed::Box;
use core::sync::atomic::Ordering::Relaxed;
use guest_memory::GuestRam;
use x86_defs::cpuid::FeatureSet;
use x86_defs::{SegmentIndex, flags};
use x86_emulate::cpu::RIP;
use x86_emulate::system::interrupts::Outcome;
use x86_emulate::{ModeKey, Op};

/// Translated instructions that take about as long as an interpreted one.
const SPEED: i64 = 8;

/// Makes the translators of a partition's vCPUs.
pub trait TranslatorFactory: Send + Sync {
    /// A translator for one vCPU of `vcpus`; `None` if this host cannot run one (the interpreter does it all then).
    fn create(&self, ram: &GuestRam, features: FeatureSet, vcpus: usize) -> Option<Box<dyn Translator>>;
}

/// Times that the interpreter came to an offset in the RAM span.
pub type Heat<'a> = dyn Fn(u64) -> u32 + 'a;

/// The hot tier of one vCPU.
pub trait Translator: Send {
    /// Times that the interpreter runs a block before the translator is asked for it.
    fn threshold(&self) -> u32;
    /// Runs translated code from `place` on, translating it first if need be. `None`: it does not take this
    /// place, nothing was done. `heat`: how often the interpreter came to an offset in the RAM span, in the mode of now.
    fn run(&mut self, core: &mut SoftCore, place: &Place, heat: &Heat<'_>, note: &mut Note) -> Option<Exit>;
    /// RAM page `page` was written: translations of it must not be entered again.
    fn forget_page(&mut self, page: u64);
    /// No translation may be entered again.
    fn forget_all(&mut self);
}

/// What a translator notes about a place in RAM. The interpreter's block there has room for it, which is in the host's caches
/// then: nothing else of cold code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, packed)]
pub struct Note {
    /// Number of a translation, which may be no more, or [`Note::NONE`].
    pub id: u32,
    /// Of which linear address and key it is.
    pub asker: u16,
    /// Times that there was none.
    pub times: u8,
}

impl Note {
    /// No translation.
    pub const NONE: u32 = u32::MAX;
    /// Nothing was asked yet.
    pub const EMPTY: Self = Self { id: Self::NONE, asker: 0, times: 0 };
}

/// Where a block starts, and what decides how it decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Linear address.
    pub linear: u64,
    /// Offset in the RAM span. The page is tracked for code, unless this checks itself.
    pub at: u64,
    /// Mode of the vCPU.
    pub mode: ModeKey,
    /// The page is written all the time: code there compares the bytes that it was made from whenever it is entered, and
    /// ends behind what [`may_change_code`](crate::may_change_code).
    pub checks_itself: bool,
}

/// Why translated code was left. RIP is where to go on, but for a fault.
#[derive(Clone, Copy)]
pub enum Exit {
    /// Nothing in particular: the code behind is not translated, or somebody wants something.
    Branch,
    /// This operation faulted as in [`x86_emulate::Step::Fault`]; RIP is what its offset counts from.
    Fault(Op<SoftCore>),
    /// As [`x86_emulate::Step::Exit`].
    Service,
    /// The processor is in shutdown.
    TripleFault,
}

/// Data of emitted code that is no state of the guest's between blocks. Plain integers, at fixed places
/// behind [`SoftCore::cpu`].
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Hot {
    /// Arithmetic flags as RFLAGS bits (others are rubbish), while translated code runs.
    pub raw_flags: u64,
    /// Checks left until Rust is asked whether somebody wants something.
    pub countdown: i64,
    /// Room for the translator's own use: pointers of its tables, spilled registers.
    pub slots: [u64; 64],
    /// Instructions (about) left of the slice between two looks at the clock.
    pub budget: i64,
    /// What hot code guesses about where it will access memory.
    pub guesses: [Guess; GUESSES],
}

/// Guesses in [`Hot`].
pub const GUESSES: usize = 512;

/// Where an access will find its page in the TLB: where it found the last one.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Guess {
    /// Bytes from the start of an array of the TLB to an entry.
    pub entry: u32,
    /// Times that it was wrong.
    pub misses: u32,
}

impl Default for Hot {
    fn default() -> Self {
        Self { raw_flags: 0, countdown: 0, slots: [0; 64], budget: 0, guesses: [Guess::default(); GUESSES] }
    }
}

/// Offsets in bytes from the start of a [`SoftCore`].
pub mod layout {
    use super::{GUESSES, Guess, Hot};
    use crate::core::SoftCore;
    use crate::tlb::{self, Tlb, TlbEntry};
    use core::mem::offset_of;
    use x86_defs::{Segment, SegmentIndex};
    use x86_emulate::Cpu;
    use x86_emulate::cpu::Msrs;

    /// `Cpu::gpr`.
    pub const GPR: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, gpr);
    /// `Cpu::seg_base`.
    pub const SEG_BASE: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, seg_base);
    /// `Cpu::rflags`.
    pub const RFLAGS: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, rflags);
    /// A segment register, a [`Segment`].
    pub const fn segment(index: SegmentIndex) -> usize {
        offset_of!(SoftCore, cpu) + offset_of!(Cpu, seg) + index as usize * size_of::<Segment>()
    }
    /// Base of the GS segment register.
    pub const GS: usize = segment(SegmentIndex::Gs) + offset_of!(Segment, base);
    const MSRS: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, msrs);
    /// The MSR that SWAPGS exchanges it with.
    pub const KERNEL_GS: usize = MSRS + offset_of!(Msrs, kernel_gs_base);
    /// Selectors of SYSCALL and SYSRET.
    pub const STAR: usize = MSRS + offset_of!(Msrs, star);
    /// Where SYSCALL leads.
    pub const LSTAR: usize = MSRS + offset_of!(Msrs, lstar);
    /// Flags that SYSCALL clears.
    pub const SFMASK: usize = MSRS + offset_of!(Msrs, sfmask);
    /// `Cpu::efer`.
    pub const EFER: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, efer);
    /// `Cpu::cr2`.
    pub const CR2: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, cr2);
    /// `Cpu::cr4`.
    pub const CR4: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, cr4);
    /// `Cpu::mode`.
    pub const MODE: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, mode);
    /// `Cpu::cpl`.
    pub const CPL: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, cpl);
    /// `Cpu::mmu_index`.
    pub const MMU_INDEX: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, mmu_index);
    /// `Cpu::open`.
    pub const OPEN: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, open);
    /// `Cpu::x`.
    pub const EXTENDED: usize = offset_of!(SoftCore, cpu) + offset_of!(Cpu, x);
    /// `Hot::raw_flags`.
    pub const RAW_FLAGS: usize = offset_of!(SoftCore, hot) + offset_of!(Hot, raw_flags);
    /// `Hot::countdown`.
    pub const COUNTDOWN: usize = offset_of!(SoftCore, hot) + offset_of!(Hot, countdown);
    /// `Hot::slots`.
    pub const SLOTS: usize = offset_of!(SoftCore, hot) + offset_of!(Hot, slots);
    /// A [`Guess`], which is less than [`GUESSES`].
    pub const fn guess(n: usize) -> usize {
        offset_of!(SoftCore, hot) + offset_of!(Hot, guesses) + n % GUESSES * size_of::<Guess>()
    }
    /// In a guess: `Guess::entry`.
    pub const GUESS_ENTRY: usize = offset_of!(Guess, entry);
    /// In a guess: `Guess::misses`.
    pub const GUESS_MISSES: usize = offset_of!(Guess, misses);

    /// Entries in each of the TLB's arrays (one an MMU index), 32 bytes each.
    pub const TLB_ENTRIES: usize = tlb::ENTRIES;
    /// The array of MMU index `index`.
    pub const fn tlb(index: u8) -> usize {
        offset_of!(SoftCore, tlb) + Tlb::ENTRIES_AT + index as usize * TLB_ENTRIES * size_of::<TlbEntry>()
    }
    /// In an entry: tag for reads.
    pub const TLB_READ: usize = offset_of!(TlbEntry, read);
    /// In an entry: tag for instruction fetches.
    pub const TLB_EXEC: usize = offset_of!(TlbEntry, exec);
    /// In an entry: tag for writes.
    pub const TLB_WRITE: usize = offset_of!(TlbEntry, write);
    /// In an entry: offset of the page in the RAM span.
    pub const TLB_HOST: usize = offset_of!(TlbEntry, host);
    /// The entry of `linear` in the array of MMU index `index`.
    pub const fn tlb_entry(index: u8, linear: u64) -> usize {
        tlb(index) + tlb::slot_of(linear) * size_of::<TlbEntry>()
    }
    /// Identity (32 bits) of the mapping that code at `linear` executes by; 0 if none.
    pub const fn exec_id(user: bool, linear: u64) -> usize {
        let slot = tlb::exec_slot_of(linear);
        offset_of!(SoftCore, tlb) + Tlb::EXEC_ID_AT + (user as usize * tlb::EXEC_ENTRIES + slot) * 4
    }
}

impl SoftCore {
    /// Whether blocks may go on: nothing waits that is to be looked at between blocks.
    pub fn may_go_on(&self) -> bool {
        let wanted = self.me.attention.load(Relaxed);
        let due = wanted & !attention::WINDOW != 0 || wanted != 0 && self.cpu.rflags & flags::IF != 0;
        !due && !self.cpu.interrupt_shadow && self.cpu.mode.0 & (ModeKey::TRAP | ModeKey::BREAKPOINTS) == 0
    }

    /// Linear address of RIP.
    #[inline(always)]
    pub fn linear_ip(&self) -> u64 {
        let cpu = &self.cpu;
        if cpu.mode.has(ModeKey::LONG) {
            cpu.gpr[RIP]
        } else {
            cpu.seg_base[SegmentIndex::Cs as usize].wrapping_add(cpu.gpr[RIP]) & 0xFFFF_FFFF
        }
    }

    /// The place of `linear` in the current mode, if the TLB knows it. (It does not say whether code there checks itself.)
    pub fn known_place(&self, linear: u64) -> Option<Place> {
        let e = self.tlb.entry(self.cpu.mmu_index, linear);
        let offset = linear ^ e.exec;
        let mode = self.cpu.mode;
        (offset < 4096).then(|| Place { linear, at: e.host + offset, mode, checks_itself: false })
    }

    /// As [`SoftCore::known_place`], with what the TLB's second level knows.
    pub fn refilled_place(&mut self, linear: u64) -> Option<Place> {
        if self.known_place(linear).is_none() {
            self.refill(linear);
        }
        self.known_place(linear)
    }

    /// Makes the mapping that `linear` executes by the one that [`layout::exec_id`] names; its identity, 0 if
    /// there is none.
    pub fn claim_exec_id(&mut self, linear: u64) -> u32 {
        self.tlb.claim_exec_id(self.cpu.mmu_index, linear)
    }

    /// Identity of the mapping that `linear` executes by, as [`layout::exec_id`] names it.
    pub fn exec_id(&self, linear: u64) -> Option<u32> {
        Some(self.tlb.exec_id(self.cpu.cpl == 3, linear)).filter(|id| *id != 0)
    }

    /// Delivers the exception that `op` raised, as the run loop would, and moves RIP to the handler. `None`: it raised
    /// none, but has to be run by itself.
    pub fn deliver(&mut self, op: &Op<SoftCore>) -> Option<Outcome> {
        self.cpu.exc.vector?;
        let ip = if self.cpu.exc.is_trap { op.next_ip(self) } else { op.ip(self) };
        Some(self.deliver_fault(ip))
    }

    /// Says that code of RAM page `page` runs: stores into it end the block first. `None`: code that checks itself.
    pub fn set_block_page(&mut self, page: Option<u64>) {
        self.block_page = page.unwrap_or(NO_PAGE);
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }
}

impl SoftVcpu {
    /// Runs translated code instead of block `id` at `linear`, if that is hot; `None`: the interpreter does it.
    #[inline]
    pub(crate) fn run_translated(&mut self, id: BlockId, linear: u64, budget: &mut i64) -> Option<Exit> {
        let translator = self.translator.as_mut()?;
        let (heat, block) = self.cache.warm(id)?;
        if heat < translator.threshold() {
            return None;
        }
        let (mode, checks_itself) = (self.core.cpu.mode, block.checks_itself());
        let place = Place { linear, at: block.page() << 12 | linear & 0xFFF, mode, checks_itself };
        let mut note = block.note();
        let whole = *budget * SPEED;
        self.core.hot.budget = whole;
        let heat = |at| self.cache.heat(at, place.mode);
        let exit = match self.lockstep {
            None => translator.run(&mut self.core, &place, &heat, &mut note),
            Some(_) => self.run_in_lockstep(&place, &mut note),
        };
        self.cache.set_note(id, note);
        let ran = (whole - self.core.hot.budget).max(0);
        self.instructions += ran as u64;
        *budget -= (ran + SPEED - 1) / SPEED;
        exit
    }
}
