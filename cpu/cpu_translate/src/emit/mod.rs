//! Emission of one superblock.
//!
//! Where the guest's arithmetic flags are is tracked while code is emitted: in the host's flags, in
//! `Hot::raw_flags`, in both, or (where they do not matter) nowhere. At the border of a block they are in memory
//! if they matter.
//!
//! - here: entries, exits, flags, the walk over the instructions. `memory.rs`: the inline TLB.
//! - `integer.rs`: instructions on registers and memory; `divide.rs`: division. `branch.rs`: control flow and stack.
//! - `string.rs`: REP MOVS and REP STOS.
//! - `system.rs`: the system's part, and instructions across pages. `system_calls.rs`: SYSCALL and SYSRET. `x87.rs`: the x87 unit.

mod branch;
mod divide;
mod integer;
mod memory;
mod string;
mod system;
mod system_calls;
mod x87;

use crate::asm::{Asm, CONTEXT, Patch, Rm, T0, T1, at, cc, field, reg::*};
use crate::block::{Item, Source, SystemCalls};
use crate::elide::Range;
use crate::engine::{Block, Engine, ExitSite, Site};
use crate::feedback::Guesses;
use crate::liveness::{self, Flags};
use crate::plan::Plan;
use crate::thunks::{slot, slot_at};
use cpu_soft::SoftCore;
use cpu_soft::translate::{Place, layout};
use memory::Recall;
use smallvec::SmallVec;
use x86_decode::RflagsBits;
use x86_emulate::Op;

/// The host register that holds a general register of the guest's; `None`: it is in memory only.
pub fn home(guest: u8) -> Option<u8> {
    match guest {
        4 => Some(R15),
        CONTEXT | T0 | T1 | R15 => None,
        r => Some(r),
    }
}
/// Where the others are.
pub fn memory_home(guest: u8) -> crate::asm::Mem {
    field(layout::GPR + usize::from(guest) * 8)
}
/// The host register of the guest's stack pointer.
pub const STACK: u8 = R15;

/// Jumps that lead to the same place. Most accesses of memory have one.
type Jumps = SmallVec<[Patch; 4]>;

/// A way out of the straight path, emitted behind it.
enum Stub {
    /// The handler does the whole instruction instead.
    Slow { jumps: Jumps, site: u32, back: u64, reload: bool },
    /// Loads the vector state.
    LoadVector { jump: Patch, back: u64 },
    /// Loads the x87 unit.
    LoadX87 { jump: Patch, back: u64 },
    /// To another block, from behind instruction `done`.
    Exit { jump: Patch, target: u64, spill: bool, done: u16 },
    /// To the careful translation at `target`, from before the instruction that is there.
    Careful { jumps: Jumps, target: u64, done: u16 },
    /// To the interpreter, for the instruction at `target`.
    Interpreted { jumps: Jumps, target: u64, done: u16 },
    /// To Rust, with the countdown run out: the guest goes on at the linear address in a register or a field.
    Expired { jump: Patch, at: Rm, done: u16 },
    /// An exit's way to Rust: when the countdown ran out, and before it is linked.
    Unlinked { expired: Patch, jump: Patch, target: u64, careful: bool, guarded: bool, done: u16 },
    /// Its bytes are not those any more that the block was made from.
    Stale { jumps: Jumps },
}

/// See the module's header.
pub struct Emitter<'a> {
    a: Asm,
    engine: &'a mut Engine,
    place: Place,
    mmu_index: u8,
    block: Block,
    /// The host's flags are the guest's.
    in_host: bool,
    /// `raw_flags` are the guest's.
    in_memory: bool,
    stubs: Vec<Stub>,
    /// Instructions up to the one under way.
    done: u16,
    /// Offset of the one under way.
    at: u64,
    /// See `Source::groups`.
    groups: Vec<Range>,
    /// See `Source::system_calls`.
    system_calls: SystemCalls,
    /// Bits of the groups whose check was emitted.
    checked: u32,
    /// The group whose place in guest RAM is in `T1`.
    in_t1: Option<u8>,
    /// `T1` is the same behind the instruction under way.
    keeps_t1: bool,
    /// See `Finished::marks`.
    marks: Vec<usize>,
    /// See `Item::chained`, of the instruction under way.
    chained: bool,
    /// Of a hot block.
    pub guesses: Option<Guesses>,
    /// Comparisons that guesses were made for.
    recalls: Vec<(Patch, Recall)>,
}

/// What comes out.
pub struct Finished {
    /// The bytes.
    pub code: Vec<u8>,
    /// The block's record.
    pub block: Block,
    /// Where in the code each instruction's begins, and where the last one's ends.
    pub marks: Vec<usize>,
    /// What a hot one guesses.
    pub guesses: Option<Guesses>,
}

impl<'a> Emitter<'a> {
    /// For the code at `place`, to lie at host address `base`.
    pub fn new(base: u64, place: &Place, mmu_index: u8, key: u8, engine: &'a mut Engine) -> Self {
        let block = Block::new(place, key, (base - engine.memory.start()) as u32);
        let a = Asm::new(base);
        let (in_host, in_memory) = (false, true);
        Self {
            a,
            engine,
            place: *place,
            mmu_index,
            block,
            in_host,
            in_memory,
            stubs: Vec::new(),
            done: 0,
            at: 0,
            groups: Vec::new(),
            system_calls: SystemCalls::default(),
            checked: 0,
            in_t1: None,
            keeps_t1: false,
            marks: Vec::new(),
            chained: false,
            guesses: None,
            recalls: Vec::new(),
        }
    }

    /// Emits everything.
    pub fn block(&mut self, source: &Source) {
        let id = self.engine.blocks.len() as u32;
        let user = self.place.mode.cpl() == 3;
        // cmp dword [exec_id], imm32
        let guard = field(layout::exec_id(user, self.place.linear));
        self.a.modrm(&[], false, false, &[0x81], 7, guard.into());
        debug_assert_eq!(self.a.code.len() as u64, Block::GUARD);
        self.a.bytes(&[0; 4]);
        let miss = self.a.jcc_later(cc::NOT_EQUAL);
        debug_assert_eq!(self.a.code.len() as u64, Block::BODY);
        if source.checks_itself {
            self.check_itself(source);
        }
        if source.items.iter().any(|i| matches!(i.plan, Plan::Vector(_) | Plan::CopyVector)) {
            self.need_vector();
        }
        if source.items.iter().any(|i| matches!(i.plan, Plan::X87(..))) {
            self.need_x87();
        }
        self.groups.clone_from(&source.groups);
        self.system_calls = source.system_calls;
        for item in &source.items {
            self.done += 1;
            self.at = u64::from(item.op.at);
            self.marks.push(self.a.code.len());
            self.keeps_t1 = false;
            self.chained = item.chained;
            if !item.behind().is_empty() {
                self.check_behind(item);
            }
            self.item(item);
            self.in_t1 = self.in_t1.filter(|_| self.keeps_t1);
        }
        self.marks.push(self.a.code.len());
        self.close(source);
        self.emit_stubs();
        self.block.set_miss(self.a.code.len());
        self.a.bind(miss);
        self.a.mov_imm32(T1, id);
        self.a.jmp(self.engine.thunks.miss);
    }

    /// The result.
    pub fn finish(self) -> Finished {
        Finished { code: self.a.code, block: self.block, marks: self.marks, guesses: self.guesses }
    }

    fn item(&mut self, item: &Item) {
        match item.plan {
            Plan::Call | Plan::Barrier => self.call(item),
            Plan::Nop => self.keeps_t1 = true,
            Plan::Copy | Plan::CopyVector => self.copy(item),
            Plan::Encode(e) | Plan::Vector(e) => self.encoded(item, &e),
            Plan::X87(kind, e) => self.x87(item, kind, e.as_ref()),
            Plan::MovImm => self.mov_imm(item),
            Plan::Lea => self.lea(item),
            Plan::Divide { signed, wide } => self.divide(item, signed, wide),
            Plan::Push(g) => self.push(item, g),
            Plan::PushImm(v) => self.push_imm(item, v),
            Plan::Pop(g) => self.pop(item, g),
            Plan::Leave => self.leave(item),
            Plan::PushMemory => self.push_memory(item),
            Plan::PushFlags => self.push_flags(item),
            Plan::Cli => self.cli(item),
            Plan::Sti => self.sti(item),
            Plan::SwapGs => self.swap_gs(),
            Plan::Cld => self.cld(item),
            Plan::Syscall => self.syscall(item),
            Plan::Sysret => self.sysret(item),
            Plan::Repeat { moves, bytes } => self.repeat(item, moves, bytes),
            Plan::ReadCr2(to) => self.read_cr2(to),
            Plan::BitString(e) => self.bit_string(item, &e),
            Plan::Jcc(cc) => self.jcc(item, cc),
            Plan::Jmp => self.jmp(item),
            Plan::CallDirect => self.call_direct(item),
            Plan::Ret(more) => self.ret(item, more),
            Plan::Indirect(call) => self.indirect(item, call),
        }
    }

    /// The way on behind the last instruction.
    fn close(&mut self, source: &Source) {
        if !source.items.last().is_none_or(Item::goes_on) {
            return;
        }
        match &source.closing {
            Some(op) => {
                // As the interpreter counts: a guest that does nothing but fault has timers, too.
                self.done = self.done.max(1);
                self.call_handler(op, true, true);
            }
            None => self.leave_to(u64::from(source.end), source.live_end),
        }
    }

    /// Linear address of an offset from the page's start.
    fn linear(&self, offset: u64) -> u64 {
        let linear = (self.place.linear & !0xFFF).wrapping_add(offset);
        if self.wide() { linear } else { linear & 0xFFFF_FFFF }
    }

    /// 64-bit code; else 32-bit code, whose addresses have 32 bits.
    fn wide(&self) -> bool {
        self.place.mode.is_long()
    }
    /// Bytes that PUSH takes.
    fn word(&self) -> i32 {
        if self.wide() { 8 } else { 4 }
    }
    /// Moves the stack pointer.
    fn move_stack(&mut self, by: i32) {
        self.a.lea_word(self.wide(), STACK, at(STACK, by));
    }

    fn site(&mut self, op: &Op<SoftCore>, barrier: bool, sees_x87: bool) -> u32 {
        let block = self.engine.blocks.len() as u32;
        self.engine.sites.push(Site { op: *op, block, barrier, done: self.done, sees_x87 });
        self.engine.sites.len() as u32 - 1
    }

    /// Calls the interpreter's handler of `item`.
    fn call(&mut self, item: &Item) {
        self.call_handler(&item.op, matches!(item.plan, Plan::Barrier), item.sees_x87);
    }
    fn call_handler(&mut self, op: &Op<SoftCore>, barrier: bool, sees_x87: bool) {
        self.spill_if(liveness::ALL);
        let site = self.site(op, barrier, sees_x87);
        self.a.mov_imm32(T1, site);
        self.a.call(self.engine.thunks.operation);
        (self.in_host, self.in_memory) = (false, true);
    }

    /// At the start of a block on vector registers. Handlers leave the vector state where it was.
    fn need_vector(&mut self) {
        // cmp qword [live], 0
        self.a.modrm(&[], true, false, &[0x83], 7, field(slot_at(slot::VECTOR_LIVE)).into());
        self.a.bytes(&[0]);
        let jump = self.a.jcc_later(cc::EQUAL);
        let back = self.a.here();
        self.stubs.push(Stub::LoadVector { jump, back });
    }

    /// Before the host's flags are overwritten: saves them if they are all that holds `live` flags.
    fn spill_if(&mut self, live: Flags) {
        if live != 0 && self.in_host && !self.in_memory {
            self.spill();
            self.in_memory = true;
        }
    }
    fn spill(&mut self) {
        self.a.bytes(&[0x9C]); // pushfq
        self.a.modrm(&[], false, false, &[0x8F], 0, field(layout::RAW_FLAGS).into()); // pop
    }

    /// Before an instruction that reads or keeps `needed` flags: makes the host's these of the guest's.
    fn need_host_flags(&mut self, needed: Flags, t0_is_free: bool) {
        if self.in_host {
            return;
        }
        match needed {
            RflagsBits::CF => {
                // bt dword [flags], 0
                self.a.modrm(&[], false, false, &[0x0F, 0xBA], 4, field(layout::RAW_FLAGS).into());
                self.a.bytes(&[0]);
            }
            RflagsBits::ZF if t0_is_free => {
                self.a.load32(T0, field(layout::RAW_FLAGS));
                self.a.modrm(&[], false, false, &[0xF7], 2, T0.into()); // not
                self.a.modrm(&[], false, true, &[0xF6], 0, T0.into()); // test r10b, ZF
                self.a.bytes(&[0x40]);
            }
            _ => {
                self.reload();
                self.in_host = true;
            }
        }
    }
    /// Touches no register of the guest's but for a while RAX.
    fn reload(&mut self) {
        let rax = field(slot_at(slot::RAX));
        self.a.store(rax, RAX);
        self.a.load32(RAX, field(layout::RAW_FLAGS));
        self.a.bytes(&[0x86, 0xC4]); // xchg ah, al: AH has what SAHF wants, AL bit 3 is OF
        self.a.bytes(&[0x24, 0x08]); // and al, 8
        self.a.bytes(&[0x04, 0x78]); // add al, 0x78: overflows if it was set
        self.a.bytes(&[0x9E]); // sahf
        self.a.load(RAX, rax);
    }

    /// Goes to the instruction at `offset`, where `live` flags matter.
    fn leave_to(&mut self, offset: u64, live: Flags) {
        self.spill_if(live);
        self.exit_to(self.linear(offset));
    }

    /// Goes to another block. What of the flags matters is in memory.
    fn exit_to(&mut self, target: u64) {
        self.exit(target, false, false);
    }
    /// `careful`, `guarded`: see [`ExitSite::new`].
    fn exit(&mut self, target: u64, careful: bool, guarded: bool) {
        self.count();
        let expired = self.a.jcc_later(cc::SIGN);
        let jump = self.a.jmp_later();
        self.stubs.push(Stub::Unlinked { expired, jump, target, careful, guarded, done: self.done });
    }

    /// Takes the instructions up to this one off the countdown.
    fn count(&mut self) {
        self.a.modrm(&[], true, false, &[0x83], 5, field(layout::COUNTDOWN).into());
        self.a.bytes(&[self.done as u8]);
    }
    /// As `count`, before a jump whose target is where `at` says.
    fn count_before(&mut self, at: Rm) {
        self.count();
        let jump = self.a.jcc_later(cc::SIGN);
        self.stubs.push(Stub::Expired { jump, at, done: self.done });
    }

    fn emit_stubs(&mut self) {
        while let Some(stub) = self.stubs.pop() {
            match stub {
                Stub::Slow { jumps, site, back, reload } => {
                    self.bind_checks(jumps);
                    self.a.mov_imm32(T1, site);
                    self.a.call(self.engine.thunks.operation);
                    if reload {
                        self.reload();
                    }
                    self.a.jmp(back);
                }
                Stub::LoadVector { jump, back } => {
                    self.a.bind(jump);
                    self.a.call(self.engine.thunks.load_vector);
                    self.a.jmp(back);
                }
                Stub::LoadX87 { jump, back } => {
                    self.a.bind(jump);
                    self.a.call(self.engine.thunks.load_x87);
                    self.a.jmp(back);
                }
                Stub::Exit { jump, target, spill, done } => {
                    self.a.bind(jump);
                    if spill {
                        self.spill();
                    }
                    self.done = done;
                    self.exit_to(target);
                }
                Stub::Careful { jumps, target, done } => {
                    self.bind_checks(jumps);
                    self.done = done;
                    self.exit(target, true, false);
                }
                Stub::Interpreted { jumps, target, done } => {
                    self.bind_checks(jumps);
                    self.done = done;
                    self.count();
                    self.a.mov_imm(T1, target);
                    self.a.jmp(self.engine.thunks.interpret);
                }
                Stub::Stale { jumps } => {
                    jumps.into_iter().for_each(|p| self.a.bind(p));
                    self.a.mov_imm32(T1, self.engine.blocks.len() as u32);
                    self.a.jmp(self.engine.thunks.stale);
                }
                Stub::Expired { jump, at, done } => {
                    self.a.bind(jump);
                    let (block, done) = (self.engine.blocks.len() as i32, i32::from(done));
                    self.a.store_imm(field(slot_at(slot::LEFT_BLOCK)), block);
                    self.a.store_imm(field(slot_at(slot::LEFT_DONE)), done);
                    self.a.modrm(&[], true, false, &[0x8B], T1, at); // mov
                    self.a.jmp(self.engine.thunks.resume);
                }
                Stub::Unlinked { expired, jump, target, careful, guarded, done } => {
                    self.a.bind(expired);
                    self.a.bind(jump);
                    let start = self.engine.memory.start();
                    let jump = (self.block.guarded(start) - start) as u32 + jump.0 as u32;
                    let block = self.engine.blocks.len() as u32;
                    let from = (block, done);
                    self.engine.exits.push(ExitSite::new(from, target, jump, careful, guarded));
                    self.a.mov_imm32(T1, self.engine.exits.len() as u32 - 1);
                    self.a.jmp(self.engine.thunks.exit);
                }
            }
        }
    }

    /// A guest register's value in a host register: its home, or `scratch`, which it is loaded to.
    fn value(&mut self, guest: u8, scratch: u8) -> u8 {
        home(guest).unwrap_or_else(|| {
            self.a.load(scratch, memory_home(guest));
            scratch
        })
    }
}
