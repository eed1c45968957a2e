//! Memory operands: the inline soft TLB.
//!
//! The check leaves the offset in the page in `T0` and the page's offset in guest RAM in `T1`, so that the
//! operand is `gs:[T0 + T1]`. It fails for whatever the TLB does not hold, and for operands that cross a page. In hot blocks
//! some accesses guess the TLB's entry (`feedback.rs`).
//! In a group (`elide.rs`) the first access checks for all; the operand is then `gs:[T1 + at]`, where `T1` is
//! the group's slot.

use super::{Emitter, Jumps, Stub, memory_home};
use crate::asm::{CONTEXT, Mem, Patch, Rm, T0, T1, at, cc, field};
use crate::block::Item;
use crate::elide::Member;
use crate::emit::home;
use crate::liveness::Flags;
use crate::plan::Access;
use crate::thunks::{slot, slot_at};
use cpu_soft::translate::layout;
use x86_decode::{Instruction, Register};

/// An operand that a check of its own leaves.
const OPERAND: Mem = Mem { base: T0, index: Some((T1, 0)), disp: 0, ram: true };

/// Where an access goes.
#[derive(Clone, Copy)]
pub enum Address<'a> {
    /// To the instruction's memory operand.
    Operand(&'a Instruction),
    /// To a host register's address plus a displacement.
    Register(u8, i32),
    /// To the word of that many bytes with the bit that a guest register numbers, from the memory operand on.
    Bit(&'a Instruction, u8, u32),
}

/// How the address that a check starts at comes to `T0`.
enum Start {
    Operand(Instruction, u32),
    Register(u8, i32),
    Bit(Instruction, u8, u32),
}

/// How a check goes on whose guess was wrong.
pub struct Recall {
    guess: usize,
    start: Start,
    access: Access,
    /// Behind the comparison.
    back: u64,
}

impl Emitter<'_> {
    /// Makes an access possible: the operand, and the jumps that are taken to where the handler does it. `live`: flags
    /// that matter before the instruction; a check loses the host's.
    pub(super) fn reach(
        &mut self,
        address: Address<'_>,
        access: Access,
        member: Option<Member>,
        live: Flags,
    ) -> (Mem, Jumps) {
        let Some((member, range)) = member.and_then(|m| self.shared(m, access)) else {
            self.spill_if(live);
            let jumps = self.check(address, 0, access);
            self.in_host = false;
            return (OPERAND, jumps);
        };
        let kept = field(slot_at(slot::GROUPS + usize::from(member.group)));
        if member.first {
            self.spill_if(live);
            let jumps = self.check(address, member.at, range);
            self.in_host = false;
            self.stubs.push(Stub::Careful { jumps, target: self.linear(self.at), done: self.done - 1 });
            self.a.alu(0x03, T1, T0); // add
            self.a.store(kept, T1);
        } else if self.in_t1 != Some(member.group) {
            self.a.load(T1, kept);
        }
        self.in_t1 = Some(member.group);
        (Mem { base: T1, index: None, disp: member.at as i32, ram: true }, Jumps::new())
    }

    /// The range of an access's group as an access. `None` if it does not cover this one or was not checked: `find_groups`
    /// makes none of that, but the guest's borders hang on it.
    fn shared(&mut self, member: Member, access: Access) -> Option<(Member, Access)> {
        let range = self.groups.get(usize::from(member.group))?;
        let inside = member.at.checked_add(access.size).is_some_and(|end| end <= range.bytes);
        let aligned = access.align <= range.align && member.at & (access.align - 1) == 0;
        let checked = member.first || self.checked & 1 << member.group != 0;
        let covered = inside && aligned && checked && (range.write || !access.write);
        debug_assert!(covered, "{member:?} {access:?} {range:?}");
        self.checked |= u32::from(covered) << member.group;
        let whole = Access { size: range.bytes, write: range.write, align: range.align };
        covered.then_some((member, whole))
    }

    /// Emits address and check of an access `back` bytes before `address`; the jumps lead to where it fails.
    fn check(&mut self, address: Address<'_>, back: u32, access: Access) -> Jumps {
        self.in_t1 = None;
        let start = match address {
            Address::Operand(insn) => Start::Operand(*insn, back),
            Address::Register(base, disp) => Start::Register(base, disp - back as i32),
            Address::Bit(insn, register, bytes) => Start::Bit(*insn, register, bytes),
        };
        let mut jumps = self.start(&start);
        let guess = self.guess(address);
        match guess {
            Some(n) => self.a.load32(T1, field(layout::guess(n) + layout::GUESS_ENTRY)),
            None => self.find_entry(),
        }
        let other = self.compare(access);
        if let Some(guess) = guess {
            let recall = Recall { guess, start, access, back: self.a.here() };
            self.recalls.push((other, recall));
        }
        jumps.push(other);
        if access.align > 1 {
            // test r10b, align - 1
            self.a.modrm(&[], false, true, &[0xF6], 0, Rm::Reg(T0));
            self.a.bytes(&[access.align as u8 - 1]);
            jumps.push(self.a.jcc_later(cc::NOT_EQUAL));
        }
        self.a.load(T1, self.entry(layout::TLB_HOST));
        jumps
    }

    /// Emits the address that a check starts at, to `T0`; the jumps are taken if there is none.
    fn start(&mut self, start: &Start) -> Jumps {
        let mut jumps = Jumps::new();
        match start {
            Start::Operand(insn, back) => jumps.extend(self.linear_address(insn, *back)),
            Start::Register(base, disp) => self.a.lea_word(self.wide(), T0, at(*base, *disp)),
            Start::Bit(insn, register, bytes) => jumps.extend(self.bit_address(insn, *register, *bytes)),
        }
        jumps
    }

    /// The TLB's entry whose offset in its array is in `T1`.
    pub(super) fn entry(&self, offset: usize) -> Mem {
        let disp = (layout::tlb(self.mmu_index) + offset) as i32;
        Mem { base: CONTEXT, index: Some((T1, 0)), disp, ram: false }
    }

    /// The offset of the entry for the address in `T0` to `T1`.
    pub(super) fn find_entry(&mut self) {
        self.a.mov(T1, T0);
        self.a.shift(false, T1, 7);
        self.a.and_imm32(T1, (layout::TLB_ENTRIES as u32 - 1) << 5);
    }

    /// `T0` becomes the offset in the page of the entry in `T1`; the jump is taken if it is another page.
    pub(super) fn compare(&mut self, access: Access) -> Patch {
        let tag = if access.write { layout::TLB_WRITE } else { layout::TLB_READ };
        self.a.alu(0x33, T0, self.entry(tag)); // xor
        self.a.cmp_imm(T0, 4096 - access.size);
        self.a.jcc_later(cc::ABOVE)
    }

    /// The guess of the operand's access of the instruction under way, in hot code.
    fn guess(&mut self, address: Address<'_>) -> Option<usize> {
        let chained = self.chained && !matches!(address, Address::Register(..));
        self.guesses.as_mut().filter(|_| chained)?.of(self.at as u16, &mut self.engine.next_guess)
    }

    /// `jumps` of checks lead to what is emitted next, if the TLB lacks the page; a guess is corrected before.
    pub(super) fn bind_checks(&mut self, jumps: Jumps) {
        let mut failed = Jumps::new();
        for jump in jumps {
            match self.recalls.iter().position(|(other, _)| other.0 == jump.0) {
                Some(n) => {
                    let (_, recall) = self.recalls.swap_remove(n);
                    self.a.bind(jump);
                    failed.extend(self.recall(&recall));
                }
                None => failed.push(jump),
            }
        }
        failed.into_iter().for_each(|jump| self.a.bind(jump));
    }

    /// Guesses anew and goes back; the jumps are taken if the TLB lacks the page.
    fn recall(&mut self, recall: &Recall) -> Jumps {
        let guess = layout::guess(recall.guess);
        let mut failed = self.start(&recall.start);
        self.find_entry();
        self.a.modrm(&[], false, false, &[0x89], T1, field(guess + layout::GUESS_ENTRY).into()); // mov
        self.a.modrm(&[], false, false, &[0xFF], 0, field(guess + layout::GUESS_MISSES).into()); // inc
        failed.push(self.compare(recall.access));
        self.a.jmp(recall.back);
        failed
    }

    /// The handler does `item` when one of `jumps` is taken, and comes back to where code is emitted now.
    pub(super) fn slow(&mut self, item: &Item, jumps: Jumps, reload: bool) {
        self.slow_site(item, jumps, reload, false);
    }
    /// As `slow`; what is behind is looked up anew then.
    pub(super) fn slow_barrier(&mut self, item: &Item, jumps: Jumps) {
        self.slow_site(item, jumps, false, true);
    }
    fn slow_site(&mut self, item: &Item, jumps: Jumps, reload: bool, barrier: bool) {
        if jumps.is_empty() {
            return;
        }
        self.in_t1 = None;
        let site = self.site(&item.op, barrier, item.sees_x87);
        let back = self.a.here();
        self.stubs.push(Stub::Slow { jumps, site, back, reload });
    }

    /// The offset of the memory operand in its segment less `back`, to `T0`. Changes no flags, `T1` perhaps.
    pub(super) fn offset(&mut self, insn: &Instruction, back: u32) {
        let constant = match insn.memory_base() {
            Register::RIP => Some(self.linear(insn.memory_displacement64())),
            Register::None if insn.memory_index() == Register::None => Some(insn.memory_displacement64()),
            _ => None,
        };
        let wide = self.wide();
        if let Some(target) = constant {
            let offset = target.wrapping_sub(back.into());
            return self.a.mov_imm(T0, if wide { offset } else { offset & 0xFFFF_FFFF });
        }
        let Some(m) = self.host_address(insn) else { return };
        match m.disp.checked_sub(back as i32) {
            Some(disp) => self.a.lea_word(wide, T0, Mem { disp, ..m }),
            None => {
                self.a.lea_word(wide, T0, m);
                self.a.lea_word(wide, T0, at(T0, -(back as i32)));
            }
        }
    }

    /// The linear address of the memory operand less `back`, to `T0`. Changes flags for FS and GS only, `T1` always. In
    /// 32-bit code the jump is taken if the segment has to be looked at.
    fn linear_address(&mut self, insn: &Instruction, back: u32) -> Option<Patch> {
        self.offset(insn, back);
        let segment = match insn.memory_segment() {
            Register::FS => x86_defs::SegmentIndex::Fs,
            Register::GS => x86_defs::SegmentIndex::Gs,
            _ => return None,
        };
        let wide = self.wide();
        let closed = (!wide).then(|| {
            self.a.modrm(&[], false, false, &[0xF6], 0, field(layout::OPEN).into()); // test
            self.a.bytes(&[1 << (segment as u8 - x86_defs::SegmentIndex::Fs as u8)]);
            self.a.jcc_later(cc::EQUAL)
        });
        let base = field(layout::SEG_BASE + segment as usize * 8);
        self.a.modrm(&[], wide, false, &[0x03], T0, base.into()); // add
        closed
    }

    /// The linear address of [`Address::Bit`], to `T0`.
    fn bit_address(&mut self, insn: &Instruction, register: u8, bytes: u32) -> Option<Patch> {
        let closed = self.linear_address(insn, 0);
        let (wide, log2) = (bytes == 8, bytes.trailing_zeros() as u8);
        let from: Rm = home(register).map_or_else(|| memory_home(register).into(), Rm::Reg);
        self.a.modrm(&[], true, false, if wide { &[0x8B] } else { &[0x63] }, T1, from); // mov, movsxd
        self.a.modrm(&[], true, false, &[0xC1], 7, Rm::Reg(T1)); // sar
        self.a.bytes(&[log2 + 3]);
        let word = Mem { base: T0, index: Some((T1, log2)), disp: 0, ram: false };
        self.a.lea_word(self.wide(), T0, word);
        closed
    }

    /// The operand's address in host registers (`T0` and `T1` may be loaded); `None` without base and index.
    pub(super) fn host_address(&mut self, insn: &Instruction) -> Option<Mem> {
        let number = |r: Register| r.full_register() as u8 - Register::RAX as u8;
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement64() as i32;
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        let index = (index != Register::None).then(|| (self.value(number(index), T1), scale));
        let base = match base {
            Register::None => {
                index?;
                // Every form of ours has a base.
                self.a.mov_imm32(T0, 0);
                T0
            }
            r => match home(number(r)) {
                Some(h) => h,
                None => {
                    self.a.load(T0, memory_home(number(r)));
                    T0
                }
            },
        };
        Some(Mem { base, index, disp, ram: false })
    }
}
