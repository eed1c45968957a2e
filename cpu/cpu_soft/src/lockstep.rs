//! Lockstep: each run of translated code is done once more by the interpreter, from the same state, and must come to the
//! same. For finding mistakes of a translator on a whole boot; slow, and for one vCPU.
//!
//! A run is short. Before it all write tags are dropped, so that the first write to a page comes by [`Tape::keep`], which
//! copies the page. Behind the run what it changed is taken back, and the interpreter does as many instructions; what comes
//! from elsewhere (ports, MMIO, local APIC, time, random numbers) it is given as the translator got it, and what it sends
//! there must be the same. Then registers and all pages that either wrote are compared.
//!
//! Not compared: arithmetic flags that nothing reads before they are overwritten (ADR 6) or that are undefined, accessed and
//! dirty bits, which only come early; and runs in which the engine itself writes guest memory (kvmclock). A device that
//! writes RAM of its own meanwhile may be taken for a difference. In emitted code undefined flags are the processor's: where
//! a program stores them (PUSHF, SYSCALL), the interpreter is tried with each value.

use crate::core::SoftCore;
use crate::mmu::{Access, Target};
use crate::run::SoftVcpu;
use crate::translate::{Exit, Note, Place};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Write;
use hashbrown::HashMap;
use x86_decode::{Decoded, FlowControl, Instruction, MAX_LENGTH, decode, flag_use};
use x86_defs::cpuid::FeatureSet;
use x86_defs::flags::{self, STATUS};
use x86_emulate::cpu::RIP;
use x86_emulate::{Cpu, Fault, Step};

/// Instructions of a run.
const RUN: i64 = 300;
/// Instructions that the interpreter may take more: repeated ones are counted in pieces.
const MORE: i64 = 600;
/// Undefined flags of a run that are guessed: two of a shift, four of a multiplication, each time that a program stores them.
const GUESSED: u32 = 6;
/// Hears of differences, and at the end how much was compared.
pub type Report = Arc<dyn Fn(&str) + Send + Sync>;

type Page = Box<[u8; 4096]>;
/// What pages held before the run, and behind it.
type Written = HashMap<u64, (Page, Page)>;

/// What a run had to do with the world outside, and what the pages that it wrote held before.
#[derive(Default)]
pub(crate) struct Tape {
    replays: bool,
    /// What was asked, and the answer.
    events: Vec<(u64, u64)>,
    next: usize,
    /// The interpreter asked for something else.
    wrong: Option<(u64, u64)>,
    /// The engine wrote guest memory.
    unsure: bool,
    /// Translations were dropped.
    paging: bool,
    /// An exception was delivered: its handler finds flags that nothing reads (ADR 6).
    faulted: bool,
    pages: HashMap<u64, Page>,
}

/// Statistics, and who hears of them.
pub(crate) struct Lockstep {
    report: Report,
    instructions: u64,
    runs: u64,
    /// Runs that could not be compared.
    unsure: u64,
    differences: u32,
    /// Addresses of what was interpreted last.
    trail: Vec<u64>,
    /// How undefined flags are where they are stored.
    guess: Option<Guess>,
}

/// Bit n: whether the n-th undefined flag that is stored is set.
#[derive(Clone, Copy)]
struct Guess {
    bits: u32,
    next: u32,
}

/// What the translator did.
struct Run {
    /// Instructions.
    count: i64,
    before: Cpu,
    /// Behind it.
    wanted: Cpu,
    written: Written,
}

impl Lockstep {
    pub(crate) fn new(report: Report) -> Self {
        Self { report, instructions: 0, runs: 0, unsure: 0, differences: 0, trail: Vec::new(), guess: None }
    }
    /// Something is wrong: the VM ends.
    pub(crate) fn has_failed(&self) -> bool {
        self.differences > 0
    }
}

impl Drop for Lockstep {
    fn drop(&mut self) {
        let Self { report, instructions, runs, unsure, differences, .. } = self;
        report(&format!(
            "lockstep: {instructions} instructions in {runs} runs compared, {unsure} runs not, {differences} differences"
        ));
    }
}

impl SoftCore {
    /// Does `f`, or gives what it gave when it was done for real. `what` says what is asked for.
    pub(crate) fn taped(&mut self, what: u64, f: impl FnOnce(&mut Self) -> u64) -> u64 {
        match &mut self.tape {
            None => f(self),
            Some(tape) if tape.replays => {
                let (asked, answer) = tape.events.get(tape.next).copied().unwrap_or((0, 0));
                tape.next += 1;
                if asked != what && tape.wrong.is_none() {
                    tape.wrong = Some((asked, what));
                }
                answer
            }
            Some(_) => {
                let answer = f(self);
                if let Some(tape) = &mut self.tape {
                    tape.events.push((what, answer));
                }
                answer
            }
        }
    }

    /// Before RAM page `page` may be written.
    #[inline]
    pub(crate) fn keep_page(&mut self, page: u64) {
        if let Some(tape) = &mut self.tape {
            let ram = &self.ram;
            tape.pages.entry(page).or_insert_with(|| load(ram, page));
        }
    }

    /// The engine is about to write guest memory: not for comparison.
    pub(crate) fn make_unsure(&mut self) {
        if let Some(tape) = &mut self.tape {
            tape.unsure = true;
        }
    }

    /// An exception is delivered.
    pub(crate) fn note_fault(&mut self) {
        if let Some(tape) = &mut self.tape {
            tape.faulted = true;
        }
    }

    /// Mappings or address spaces change.
    pub(crate) fn note_paging(&mut self) {
        if let Some(tape) = &mut self.tape {
            tape.paging = true;
        }
    }
}

/// A tag for [`SoftCore::taped`].
pub(crate) fn what(kind: u64, at: u64, value: u64) -> u64 {
    (kind << 56) ^ at.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ value.rotate_left(17)
}

fn load(ram: &guest_memory::GuestRam, page: u64) -> Page {
    let mut bytes = Box::new([0; 4096]);
    ram.load_bytes(page << 12, &mut bytes[..]);
    bytes
}

/// Makes a page hold `bytes`; writes nothing that is there already.
fn put(ram: &guest_memory::GuestRam, page: u64, bytes: &[u8; 4096]) {
    let now = load(ram, page);
    for (n, (old, new)) in now.chunks(8).zip(bytes.chunks(8)).enumerate() {
        if old != new {
            ram.store_bytes((page << 12) + n as u64 * 8, new);
        }
    }
}

impl SoftVcpu {
    /// As the translator's `run`, and once more by the interpreter.
    pub(crate) fn run_in_lockstep(&mut self, place: &Place, note: &mut Note) -> Option<Exit> {
        let (translator, cache) = (self.translator.as_mut()?, &self.cache);
        let core = &mut *self.core;
        let before = core.cpu.clone();
        core.tape = Some(Box::default());
        core.tlb.drop_write_tags();
        let asked = core.hot.budget;
        core.hot.budget = RUN.min(asked);
        let exit = translator.run(core, place, &|at| cache.heat(at, place.mode), note);
        let ran = RUN.min(asked) - core.hot.budget;
        core.hot.budget = asked - ran;
        let mut tape = core.tape.take()?;
        let exit = exit?;
        let lockstep = self.lockstep.as_mut()?;
        lockstep.runs += 1;
        if tape.unsure {
            lockstep.unsure += 1;
            return Some(exit);
        }
        lockstep.instructions += ran as u64;
        let after = core.cpu.clone();
        let written: Written = core::mem::take(&mut tape.pages)
            .into_iter()
            .map(|(page, old)| (page, (old, load(&core.ram, page))))
            .collect();
        let mut wanted = after.clone();
        if let Exit::Fault(op) = &exit {
            core.cpu = after.clone();
            wanted.gpr[RIP] = op.ip(core);
            core.cpu = before.clone();
        }
        tape.replays = true;
        core.tape = Some(tape);
        let run = Run { count: ran, before, wanted, written };
        let (mut text, done) = self.again(&run, None)?;
        let first = text.clone();
        let (mut bits, mut guesses) = (0, 1);
        while !text.is_empty() && bits < guesses {
            text = self.again(&run, Some(Guess { bits, next: 0 }))?.0;
            let stored = self.lockstep.as_ref().and_then(|l| l.guess).map_or(0, |guess| guess.next);
            guesses = guesses.max(1 << stored);
            bits += 1;
        }
        let Run { before, wanted, .. } = run;
        let core = &mut *self.core;
        core.tape = None;
        core.cpu = after;
        if !text.is_empty() {
            text = first;
            let (from, to) = (before.gpr[RIP], wanted.gpr[RIP]);
            let _ = write!(text, "\n{ran} instructions, {done} interpreted, from {from:#x}");
            self.core.write_code(&mut text, &before);
            let _ = write!(text, "\n  to {to:#x}");
            self.core.write_code(&mut text, &wanted);
            if let Some(lockstep) = &mut self.lockstep {
                lockstep.differences += 1;
                (lockstep.report)(&format!("lockstep: the interpreter comes to something else:{text}"));
            }
        }
        Some(exit)
    }

    /// `run` once more, by the interpreter: what is not as the translator left it, and how many instructions it took. Memory
    /// is as the translator left it then.
    fn again(&mut self, run: &Run, guess: Option<Guess>) -> Option<(String, i64)> {
        let Run { count, before, wanted, written } = run;
        let core = &mut *self.core;
        written.iter().for_each(|(page, (old, _))| put(&core.ram, *page, old));
        core.cpu = before.clone();
        let tape = core.tape.as_mut()?;
        let faulted = tape.faulted;
        (tape.next, tape.wrong) = (0, None);
        if tape.paging {
            core.tlb.flush_all();
        }
        core.tlb.drop_write_tags();
        if let Some(lockstep) = &mut self.lockstep {
            lockstep.guess = guess;
        }
        let done = self.interpret(*count, wanted);
        let mut tape = self.core.tape.take()?;
        let text = self.differences(wanted, written, &tape);
        let core = &mut *self.core;
        written.iter().for_each(|(page, (_, new))| put(&core.ram, *page, new));
        for (page, old) in tape.pages.iter().filter(|(page, _)| !written.contains_key(*page)) {
            put(&core.ram, *page, old);
        }
        // Gone astray, it may have come to faults that are not of this run.
        tape.faulted = faulted;
        core.tape = Some(tape);
        Some((text, done))
    }

    /// Interprets `count` instructions; then on until the registers are as `wanted`, but not for long.
    fn interpret(&mut self, count: i64, wanted: &Cpu) -> i64 {
        let mut done = 0;
        if let Some(lockstep) = &mut self.lockstep {
            lockstep.trail.clear();
        }
        while done < count {
            done += self.interpret_block(count - done);
        }
        let mut more = 0;
        while more < MORE && self.core.cpu.gpr[..=RIP] != wanted.gpr[..=RIP] && !self.core.cpu.halted {
            self.interpret_block(1);
            more += 1;
        }
        done + if more < MORE { more } else { 0 }
    }

    /// Interprets at most `count` instructions of the block at RIP; how many it were.
    fn interpret_block(&mut self, count: i64) -> i64 {
        let linear = self.linear_ip();
        let Some(lockstep) = &mut self.lockstep else { return count };
        let (mut trail, mut guess) = (core::mem::take(&mut lockstep.trail), lockstep.guess);
        let ran = self.interpret_at(linear, count, &mut trail, &mut guess);
        if let Some(lockstep) = &mut self.lockstep {
            (lockstep.trail, lockstep.guess) = (trail, guess);
        }
        ran
    }

    fn interpret_at(
        &mut self,
        linear: u64,
        count: i64,
        trail: &mut Vec<u64>,
        guess: &mut Option<Guess>,
    ) -> i64 {
        let id = match self.find_block(linear) {
            Ok(Some(id)) if !self.core.cpu.interrupt_shadow => id,
            Ok(_) => {
                self.core.guess_flags(linear, trail, guess);
                trail.push(linear);
                self.run_single();
                return 1;
            }
            Err(Fault) => {
                let ip = self.core.cpu.gpr[RIP];
                let _ = self.core.deliver_fault(ip);
                return 1;
            }
        };
        let Some((block, ops)) = self.cache.get(id) else { return 1 };
        let core = &mut *self.core;
        core.block_page = block.watched_page();
        for (at, op) in ops.iter().enumerate() {
            let ran = (at as i64 + 1).min(block.instructions() as i64);
            core.guess_flags(op.ip(core), trail, guess);
            trail.push(op.ip(core));
            match (op.run)(core, op) {
                Step::Next if ran == count => {
                    core.cpu.gpr[RIP] = op.next_ip(core);
                    return ran;
                }
                Step::Next => {}
                Step::Branch | Step::Exit => return ran,
                Step::Fault => {
                    if core.deliver(op).is_none() {
                        // A store into its own page: the translator leaves it to the loop, too.
                        core.cpu.gpr[RIP] = op.ip(core);
                        if ran < count {
                            self.run_single();
                        }
                    }
                    return ran;
                }
            }
        }
        1
    }

    /// In what the interpreter's state and memory are not as the translator's.
    fn differences(&mut self, wanted: &Cpu, written: &Written, tape: &Tape) -> String {
        let trail = self.lockstep.as_ref().map(|l| l.trail.clone()).unwrap_or_default();
        let core = &mut *self.core;
        let mut text = String::new();
        registers(&mut text, wanted, &core.cpu);
        let live = if tape.faulted { 0 } else { core.live_flags() };
        let (a, b) = (wanted.flags.bits() & live, core.cpu.flags.bits() & live);
        if a != b && (a ^ b) & !core.undefined_flags(&trail) != 0 {
            let _ = write!(text, "\n  flags {a:#x}, interpreter {b:#x} (of {live:#x})");
        }
        if let Some((got, asks)) = tape.wrong {
            let _ = write!(text, "\n  it asks the world for {asks:#x}, not {got:#x}");
        }
        if tape.next < tape.events.len() {
            let _ = write!(text, "\n  it asks the world {} times, not {}", tape.next, tape.events.len());
        }
        for (page, (_, new)) in written {
            memory(&mut text, *page, new, &load(&core.ram, *page));
        }
        for (page, old) in tape.pages.iter().filter(|(page, _)| !written.contains_key(*page)) {
            memory(&mut text, *page, old, &load(&core.ram, *page));
        }
        text
    }
}

/// Differences of a page, as far as they matter.
fn memory(text: &mut String, page: u64, translator: &[u8; 4096], interpreter: &[u8; 4096]) {
    const AGE: u64 = 0x60;
    for (n, (a, b)) in translator.chunks_exact(8).zip(interpreter.chunks_exact(8)).enumerate() {
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
        let (a, b) = (word(a), word(b));
        // Accessed and dirty; the flags of an exception's frame.
        let is_frame = (a ^ b) & !STATUS == 0 && a & flags::FIXED_1 != 0 && a >> 22 == 0;
        if (a ^ b) & !AGE != 0 && !is_frame {
            let _ =
                write!(text, "\n  memory at {:#x}: {a:#x}, interpreter {b:#x}", (page << 12) + n as u64 * 8);
        }
    }
}

/// Differences of registers.
fn registers(text: &mut String, a: &Cpu, b: &Cpu) {
    for n in 0..=RIP {
        if a.gpr[n] != b.gpr[n] {
            let _ = write!(text, "\n  register {n}: {:#x}, interpreter {:#x}", a.gpr[n], b.gpr[n]);
        }
    }
    let mut check = |name: &str, same: bool| {
        if !same {
            let _ = write!(text, "\n  {name}");
        }
    };
    check("rflags", a.rflags == b.rflags);
    check("mode", (a.mode, a.cpl, a.mmu_index) == (b.mode, b.cpl, b.mmu_index));
    check("segments", (a.seg, a.seg_base, a.ldtr, a.tr) == (b.seg, b.seg_base, b.ldtr, b.tr));
    check("tables", (a.gdtr, a.idtr) == (b.gdtr, b.idtr));
    check("control", (a.cr0, a.cr2, a.cr3, a.cr4) == (b.cr0, b.cr2, b.cr3, b.cr4));
    check("efer", (a.efer, a.xcr0) == (b.efer, b.xcr0));
    check("debug", (a.dr, a.pending_debug) == (b.dr, b.pending_debug));
    check("msrs", a.msrs == b.msrs && a.pdpte == b.pdpte);
    check("exception", a.exc == b.exc);
    check("halted", (a.halted, a.nmi_blocked) == (b.halted, b.nmi_blocked));
    check("vectors", a.x.ymm == b.x.ymm);
    if a.x.mxcsr != b.x.mxcsr {
        let _ = write!(text, "\n  mxcsr {:#x}, interpreter {:#x}", a.x.mxcsr, b.x.mxcsr);
    }
    if a.x.x87 != b.x.x87 {
        let _ = write!(text, "\n  x87 {:x?}, interpreter {:x?}", a.x.x87, b.x.x87);
    }
}

impl SoftCore {
    /// Arithmetic flags that code from RIP on may read.
    fn live_flags(&mut self) -> u64 {
        self.live_at(self.cpu.gpr[RIP], 3)
    }

    /// Before the instruction at `linear`: if it stores flags that those at `trail` left undefined, these become what is guessed.
    fn guess_flags(&mut self, linear: u64, trail: &[u64], guess: &mut Option<Guess>) {
        let Some(guess) = guess else { return };
        let stores =
            self.instruction(linear).is_some_and(|insn| flag_use::shows_all(&insn) && !insn.is_privileged());
        let undefined = if stores { self.undefined_flags(trail) } else { 0 };
        for flag in (0..u64::BITS).map(|n| 1 << n).filter(|flag| undefined & flag != 0) {
            let set = guess.bits >> guess.next & 1 != 0;
            self.cpu.flags.replace(flag, if set { flag } else { 0 });
            guess.next = (guess.next + 1).min(GUESSED);
        }
    }

    /// The instruction at `linear`, if there is one.
    fn instruction(&mut self, linear: u64) -> Option<Instruction> {
        let (page, bits) = (self.code_page(linear)?, self.cpu.mode.bitness());
        match decode(page.get((linear & 0xFFF) as usize..)?, bits, 0, self.shared.model.features) {
            Decoded::Instruction(insn) => Some(insn),
            _ => None,
        }
    }

    /// Arithmetic flags that the instructions at `trail` leave undefined.
    fn undefined_flags(&mut self, trail: &[u64]) -> u64 {
        let mut undefined = 0;
        for linear in trail {
            if let Some(insn) = self.instruction(*linear) {
                undefined &= !flag_use::modified(&insn);
                undefined |= flag_use::undefined(&insn);
            }
        }
        undefined
    }

    /// The page of code at `linear`, and so much of the next one as the last instruction may need.
    fn code_page(&mut self, linear: u64) -> Option<Vec<u8>> {
        let mut bytes = self.fetch_page(linear)?.to_vec();
        if let Some(next) = self.fetch_page((linear | 0xFFF).wrapping_add(1)) {
            bytes.extend(&next[..MAX_LENGTH]);
        }
        Some(bytes)
    }

    fn fetch_page(&mut self, linear: u64) -> Option<Page> {
        let (exc, cr2) = (self.cpu.exc, self.cpu.cr2);
        let found = self.translate(self.cpu.mmu_index, linear, Access::Fetch);
        (self.cpu.exc, self.cpu.cr2) = (exc, cr2);
        match found {
            Ok(Target::Ram(at)) => Some(load(&self.ram, at >> 12)),
            _ => None,
        }
    }

    fn live_at(&mut self, linear: u64, depth: u32) -> u64 {
        let Some(page) = self.code_page(linear) else { return STATUS };
        let mut at = (linear & 0xFFF) as usize;
        let (mut read, mut written, bits) = (0, 0, self.cpu.mode.bitness());
        for _ in 0..64 {
            let Decoded::Instruction(insn) =
                decode(page.get(at..).unwrap_or_default(), bits, at as u64, self.shared.model.features)
            else {
                break;
            };
            let quiet = self.cpu.cpl == 0 && flag_use::is_quiet_in_supervisor(&insn);
            if flag_use::shows_all(&insn) && !quiet {
                break;
            }
            read |= flag_use::read(&insn) & !written;
            written |= flag_use::overwritten(&insn);
            if written == STATUS {
                return read;
            }
            let target = insn.near_branch_target();
            let inside = (target < 4096).then(|| (linear & !0xFFF) + target);
            match (insn.flow_control(), inside) {
                (FlowControl::Next, _) => at += insn.len(),
                (FlowControl::UnconditionalBranch | FlowControl::Call, Some(to)) if depth > 0 => {
                    return read | self.live_at(to, depth - 1) & !written;
                }
                (FlowControl::ConditionalBranch, Some(to)) if depth > 0 => {
                    let other = (linear & !0xFFF) + at as u64 + insn.len() as u64;
                    let both = self.live_at(to, depth - 1) | self.live_at(other, depth - 1);
                    return read | both & !written;
                }
                _ => break,
            }
        }
        read | STATUS & !written
    }

    /// The code at `cpu`'s RIP, for people.
    fn write_code(&mut self, text: &mut String, cpu: &Cpu) {
        let Some(page) = self.code_page(cpu.gpr[RIP]) else { return };
        let mut at = (cpu.gpr[RIP] & 0xFFF) as usize;
        let bits = cpu.mode.bitness();
        for _ in 0..24 {
            let features: FeatureSet = self.shared.model.features;
            let Decoded::Instruction(insn) =
                decode(page.get(at..).unwrap_or_default(), bits, at as u64, features)
            else {
                break;
            };
            let bytes = &page[at..at + insn.len()];
            let _ = write!(
                text,
                "\n    {:x}: {bytes:02x?} {:?}",
                (cpu.gpr[RIP] & !0xFFF) + at as u64,
                insn.code()
            );
            at += insn.len();
        }
    }
}
