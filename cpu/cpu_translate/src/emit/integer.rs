//! Instructions on general registers and memory.

use super::memory::Address;
use super::{Emitter, home, memory_home};
use crate::asm::{Mem, Rm, T0, T1};
use crate::block::Item;
use crate::encoding::Encoding;
use crate::liveness::{self, ALL};
use crate::plan::{self, Access, number};
use smallvec::{SmallVec, smallvec};
use x86_decode::{Instruction, Mnemonic as M, OpKind, Register};

impl Emitter<'_> {
    /// Before `item`'s own instruction: the host's flags hold what it reads or keeps.
    fn flags_in(&mut self, item: &Item, t0_is_free: bool) {
        let (read, written) = liveness::effect(&item.insn);
        let kept = if changes_flags(&item.insn) { item.live_after & !written } else { 0 };
        if read | kept != 0 {
            self.need_host_flags(read | kept, t0_is_free);
        }
    }
    /// Behind it.
    fn flags_out(&mut self, item: &Item) {
        if changes_flags(&item.insn) {
            (self.in_host, self.in_memory) = (true, false);
        }
    }

    /// The guest's own bytes: all operands are registers in their own place.
    pub(super) fn copy(&mut self, item: &Item) {
        self.keeps_t1 = true;
        self.flags_in(item, true);
        self.a.bytes(item.bytes());
        self.flags_out(item);
    }

    pub(super) fn encoded(&mut self, item: &Item, e: &Encoding) {
        match e.rm {
            Some(_) => self.registers(item, e),
            None => self.with_memory(item, e),
        }
    }

    fn registers(&mut self, item: &Item, e: &Encoding) {
        let mut scratch = Scratch { free: smallvec![T1, T0], taken: SmallVec::new() };
        let reg = self.field(item, e.reg, e.roles.reg, &mut scratch);
        let rm = self.field(item, e.rm.unwrap_or(0), e.roles.rm, &mut scratch);
        let v = self.field(item, e.v().unwrap_or(0), e.roles.v, &mut scratch);
        self.flags_in(item, !scratch.taken.iter().any(|(_, h)| *h == T0));
        e.emit(&mut self.a, reg, v, Rm::Reg(rm));
        self.flags_out(item);
        self.store_back(&item.insn, &scratch);
        self.keeps_t1 = scratch.taken.is_empty();
    }

    fn with_memory(&mut self, item: &Item, e: &Encoding) {
        let insn = &item.insn;
        let Some(access) = plan::access(&item.plan, insn) else { return self.call(item) };
        let before = liveness::before(insn, item.live_after);
        let (operand, jumps) = self.reach(Address::Operand(insn), access, item.operand, before);
        let registers = [e.roles.reg.then_some(e.reg), e.v().filter(|_| e.roles.v)];
        let homeless = registers.iter().flatten().any(|r| home(*r).is_none());
        let (operand, free) = if homeless { self.with_scratch(operand) } else { (operand, T0) };
        let mut scratch = Scratch { free: smallvec![free], taken: SmallVec::new() };
        let reg = self.field(item, e.reg, e.roles.reg, &mut scratch);
        let v = self.field(item, e.v().unwrap_or(0), e.roles.v, &mut scratch);
        self.flags_in(item, false);
        e.emit(&mut self.a, reg, v, operand.into());
        self.flags_out(item);
        self.store_back(insn, &scratch);
        let reload = self.in_host && item.live_after & ALL != 0;
        self.slow(item, jumps, reload);
        self.keeps_t1 = true;
    }

    pub(super) fn bit_string(&mut self, item: &Item, e: &Encoding) {
        let insn = &item.insn;
        let Some(register) = number(insn.op1_register()) else { return self.call(item) };
        let (size, tests) = (insn.memory_size().size() as u32, insn.mnemonic() == M::Bt);
        let access = Access { size, write: !tests, align: 1 };
        let before = liveness::before(insn, item.live_after);
        let (operand, jumps) = self.reach(Address::Bit(insn, register, size), access, None, before);
        let (operand, scratch) = self.with_scratch(operand);
        let from: Rm = home(register).map_or_else(|| memory_home(register).into(), Rm::Reg);
        self.a.modrm(&[], false, false, &[0x8B], scratch, from); // mov
        self.a.and_imm32(scratch, size * 8 - 1);
        self.flags_in(item, false);
        if tests {
            self.a.modrm(&[], size == 8, false, &[0x8B], T0, operand.into()); // mov
            e.emit(&mut self.a, scratch, 0, Rm::Reg(T0));
        } else {
            e.emit(&mut self.a, scratch, 0, operand.into());
        }
        self.flags_out(item);
        let reload = self.in_host && item.live_after & ALL != 0;
        self.slow(item, jumps, reload);
    }

    /// The operand in one register, and a scratch register that it does not take.
    pub(super) fn with_scratch(&mut self, operand: Mem) -> (Mem, u8) {
        match operand.index {
            None => (operand, T0),
            Some(_) => {
                self.a.alu(0x03, T0, T1); // add
                (Mem { index: None, ..operand }, T1)
            }
        }
    }

    /// The host's number for what a field names: a general register of the guest's, or something else.
    fn field(&mut self, item: &Item, number: u8, general: bool, scratch: &mut Scratch) -> u8 {
        if general { self.operand(item, number, scratch) } else { number }
    }

    /// The host register for a guest register that an instruction names.
    fn operand(&mut self, item: &Item, guest: u8, scratch: &mut Scratch) -> u8 {
        if let Some(h) = home(guest) {
            return h;
        }
        if let Some((_, h)) = scratch.taken.iter().find(|(g, _)| *g == guest) {
            return *h;
        }
        // The plan has counted them.
        let h = scratch.free.pop().unwrap_or(T1);
        if !only_written(&item.insn, guest) {
            self.a.load(h, memory_home(guest));
        }
        scratch.taken.push((guest, h));
        h
    }

    fn store_back(&mut self, insn: &Instruction, scratch: &Scratch) {
        for (guest, host) in &scratch.taken {
            if writes(insn, *guest) {
                self.a.store(memory_home(*guest), *host);
            }
        }
    }

    pub(super) fn mov_imm(&mut self, item: &Item) {
        let insn = &item.insn;
        let Some(guest) = number(insn.op0_register()) else { return };
        self.keeps_t1 = true;
        let value = match insn.op1_kind() {
            OpKind::Immediate32 => u64::from(insn.immediate32()),
            OpKind::Immediate32to64 => insn.immediate32to64() as u64,
            _ => insn.immediate64(),
        };
        match home(guest) {
            Some(h) => self.a.mov_imm(h, value),
            None => {
                self.a.mov_imm(T0, value);
                self.a.store(memory_home(guest), T0);
            }
        }
    }

    pub(super) fn lea(&mut self, item: &Item) {
        let insn = &item.insn;
        let Some(guest) = number(insn.op0_register()) else { return };
        self.keeps_t1 =
            !matches!(insn.memory_index(), Register::R9 | Register::R10 | Register::R11 | Register::R15);
        let wide = insn.op0_register().is_gpr64();
        let to = home(guest).unwrap_or(T0);
        let constant = match insn.memory_base() {
            Register::RIP => Some(self.linear(insn.memory_displacement64())),
            _ => None,
        };
        match constant {
            Some(value) => self.a.mov_imm(to, if wide { value } else { value & 0xFFFF_FFFF }),
            None => match self.host_address(insn) {
                Some(m) => self.a.modrm(&[], wide, false, &[0x8D], to, m.into()),
                None => {
                    let value = insn.memory_displacement64();
                    self.a.mov_imm(to, if wide { value } else { value & 0xFFFF_FFFF });
                }
            },
        }
        if home(guest).is_none() {
            self.a.store(memory_home(guest), T0);
        }
    }
}

/// Guest registers without a home that are in scratch registers.
struct Scratch {
    free: SmallVec<[u8; 2]>,
    taken: SmallVec<[(u8, u8); 3]>,
}

fn changes_flags(insn: &Instruction) -> bool {
    insn.rflags_modified() & ALL != 0
}

/// Whether `insn` overwrites all of `guest` without reading it.
fn only_written(insn: &Instruction, guest: u8) -> bool {
    let moves = matches!(insn.mnemonic(), M::Mov | M::Movzx | M::Movsx | M::Movsxd);
    let to = insn.op0_register();
    let whole = insn.op0_kind() == OpKind::Register && to.is_gpr() && to.size() >= 4;
    let also_read = insn.op1_kind() == OpKind::Register && number(insn.op1_register()) == Some(guest);
    moves && whole && number(to) == Some(guest) && !also_read
}

/// Whether `insn` writes the general register `guest` that it names.
fn writes(insn: &Instruction, guest: u8) -> bool {
    let is = |i: u32| insn.op_kind(i) == OpKind::Register && number(insn.op_register(i)) == Some(guest);
    match insn.mnemonic() {
        M::Cmp | M::Test | M::Bt => false,
        M::Xchg | M::Xadd | M::Mulx => is(0) || is(1),
        _ => is(0),
    }
}
